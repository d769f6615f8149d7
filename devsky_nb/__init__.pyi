# The public API, and nothing else. `__init__.py` reads this file: a name is loaded from its module when it is first used.
from .errors import (
    DevSkyyError as DevSkyyError,
    MLError as MLError,
    ModelNotFoundError as ModelNotFoundError,
    ModelLoadError as ModelLoadError,
    InsufficientMemoryError as InsufficientMemoryError,
    ValidationError as ValidationError,
)
from .hub.registry import ModelRegistry as ModelRegistry
from .hub.models import ModelSpec as ModelSpec
from .hub.registry import load_model as load_model
from .hub.cache import cache_report as cache_report, plan_eviction as plan_eviction
from .hub.verify import verify_cache as verify_cache
from .hub.pins import pin as pin, unpin as unpin
from .images.load import load_image as load_image
from .images.policy import ImagePolicy as ImagePolicy
from .embedding.embedder import ImageEmbedder as ImageEmbedder, CLIPImageEmbedder as CLIPImageEmbedder
from .embedding.bulk import embed_images as embed_images
from .embedding.search import VectorIndex as VectorIndex, FolderIndex as FolderIndex
from .embedding.pairs import similar_pairs as similar_pairs
from .embedding.ask import search_images as search_images, SearchReport as SearchReport
from .embedding.export import export_embeddings as export_embeddings, ExportReport as ExportReport
from .validation.account import validate_image_embeddings as validate_image_embeddings
from .validation.report import check_image_set as check_image_set, ValidationReport as ValidationReport
from .validation.contract import ImageSetContract as ImageSetContract
from .memory.estimate import estimate_vram as estimate_vram
from .memory.plan import plan_vram as plan_vram
from .memory.monitor import VramMonitor as VramMonitor
from .diffusion.pipelines import load_quantized_pipeline as load_quantized_pipeline
from .diffusion.sdxl import (
    load_sdxl_pipeline_with_quantization_v1 as load_sdxl_pipeline_with_quantization_v1,
    load_sdxl_pipeline_with_quantization_v2 as load_sdxl_pipeline_with_quantization_v2,
)
from .diffusion.generation import PipelineGenerator as PipelineGenerator, QuantizedSDXLGenerator as QuantizedSDXLGenerator
from .diffusion.lora import load_lora as load_lora, unload_lora as unload_lora
from .diffusion.checkpoint import save_quantized as save_quantized, load_quantized as load_quantized
from .diffusion.quantization import check_pipeline_call as check_pipeline_call
from .doctor.scan import scan_source as scan_source, fix_source as fix_source
from .doctor.environment import check_environment as check_environment
from .demo.catalogue import write_catalogue as write_catalogue
from .demo.garments import render_garment as render_garment, Garment as Garment
from .ui.memory_planner import memory_planner as memory_planner
from .ui.quantization_explorer import quantization_explorer as quantization_explorer
from .ui.embedding_explorer import embedding_explorer as embedding_explorer
from .ui.validation_review import validation_review as validation_review
from .ui.cache_manager import cache_manager as cache_manager
from .ui.vram_timeline import vram_timeline as vram_timeline

__version__: str
