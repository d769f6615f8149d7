"Hugging Face models in production: get them, fit them, shrink them, embed images, trust the data and the code."
import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
