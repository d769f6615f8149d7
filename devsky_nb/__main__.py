"`python -m devsky_nb` is the command `devsky`."
from .cli import main

if __name__ == "__main__": raise SystemExit(main())
