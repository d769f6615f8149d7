"What nbdev does for the site beyond its usual: `renderer` and `procs` in settings.ini."
import inspect, re

from fastcore.docments import _unwrap_sym
from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer


class Renderer(BasicMarkdownRenderer):
    "Annotations in quotes name what only a type checker imports, or what the notebook defines later: shown as they are written."
    def __init__(self, sym, **kwargs):
        sym = _unwrap_sym(sym)
        try: super().__init__(sym, **kwargs)
        except NameError:
            sym.__signature__ = inspect.signature(sym)
            super().__init__(sym, **kwargs)


def site_links(cell):
    "Links of nbdev's index become links within the site, unless their name is an everyday word; files outside nbs/ are on the repository's page."
    if cell.cell_type != "markdown": return
    cfg = get_config()
    site, repository = cfg.doc_host + cfg.doc_baseurl, f"{cfg.git_url}/blob/{cfg.branch}"
    cell.source = re.sub(rf"\[(`[^`]+`)\]\((?:{re.escape(site)}(/[^)]*))\)", lambda m: f"[{m[1]}]({m[2]})" if distinct(m[1]) else m[1], cell.source)
    cell.source = re.sub(r"\]\((?:\.\./)+((?!images/)[^)]+)\)", rf"]({repository}/\1)", cell.source)


def distinct(name: str) -> bool:
    "Whether a word between backticks can only mean a definition: `embed_images`, `ModelRegistry`, `Plan.save`."
    return bool(re.search(r"[_.]|[a-z][A-Z]", name))
