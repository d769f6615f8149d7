"What nbdev does for the site beyond its usual: `renderer` and `procs` in settings.ini."
import ast, inspect, re
from itertools import groupby

from execnb.nbio import read_nb
from fastcore.docments import _unwrap_sym
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer, showdoc_nm


class Renderer(BasicMarkdownRenderer):
    """nbdev's own, and two things more. Annotations in quotes, which name what only a type checker imports or what the notebook defines
    later, are shown as they are written. A class lists the methods of its body, so that each has a place to link to."""
    def __init__(self, sym, name=None, **kwargs):
        name, sym = name or getattr(sym, "__qualname__", None), _unwrap_sym(sym)
        try: super().__init__(sym, name, **kwargs)
        except NameError:
            sym.__signature__ = inspect.signature(sym)
            super().__init__(sym, name, **kwargs)
        self.fn = self.nm  # under which nbdev's index finds the source

    def _repr_markdown_(self):
        members = [member(self.sym, name) for name in vars(self.sym) if name[0] != "_"] if inspect.isclass(self.sym) else []
        return super()._repr_markdown_() + "".join(f"\n{m}" for m in ["\n", *members] if m)


def member(cls: type, name: str) -> str:
    "A method or property of a class, in one line; empty for a field."
    found = inspect.getattr_static(cls, name)
    function = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
    if not inspect.isfunction(function): return ""
    parameters = [f"{p.name}={p.default!r}" if p.default is not p.empty else str(p).partition(":")[0] for p in inspect.signature(function).parameters.values()]
    called = found is function or isinstance(found, classmethod | staticmethod)
    call = f"({', '.join(p for p in parameters if p not in ('self', 'cls'))})" if called else ""
    return f'- <a id="{cls.__qualname__.lower()}.{name.lower()}"></a>`{name}{call}`{": " * bool(function.__doc__)}{function.__doc__ or ""}'


class in_order(Processor):
    "The definitions of a cell in the order in which they stand in it; nbdev puts them backwards."
    def begin(self):
        source = "\n".join(c.source for c in read_nb(self.nb.path_).cells if c.cell_type == "code" and c.source.startswith("#| export"))
        order = {showdoc_nm(o): n for n, o in enumerate(ast.parse(source).body) if isinstance(o, ast.FunctionDef | ast.ClassDef)}
        place = lambda cell: order[re.search(r"show_doc\((.*?)\)", cell.source)[1]]
        runs = [[*run] for _, run in groupby(self.nb.cells, lambda cell: hasattr(cell, "has_sd") or id(cell))]
        self.nb.cells[:] = [cell for run in runs for cell in (sorted(run, key=place) if hasattr(run[0], "has_sd") else run)]


def site_links(cell):
    "Links of nbdev's index become links within the site, unless their name is an everyday word or stands in code; what lies outside nbs/ is on the repository's page."
    cfg = get_config()
    site, repository = cfg.doc_host + cfg.doc_baseurl, f"{cfg.git_url}/blob/{cfg.branch}"
    link = re.compile(rf"\[(`[^`]+`)\]\({re.escape(site)}(/[^)]*)\)")
    def within(text): return link.sub(lambda m: f"[{m[1]}]({m[2]})" if distinct(m[1]) else m[1], text)
    def outside(m): return m[0] if (cfg.nbs_path / m[1].partition("#")[0]).exists() else f"]({repository}/{m[1]})"
    if cell.cell_type == "markdown": cell.source = re.sub(r"\]\((?:\.\./)+([^)]+)\)", outside, within(cell.source))
    for output in cell.get("outputs", []):
        if text := output.get("data", {}).get("text/markdown"):
            prose_and_code = re.split(r"(^```.*?^```)", "".join(text), flags=re.MULTILINE | re.DOTALL)
            output.data["text/markdown"] = "".join(link.sub(r"\1", part) if part.startswith("```") else within(part) for part in prose_and_code)


def distinct(name: str) -> bool:
    "Whether a word between backticks can only mean a definition: `embed_images`, `ModelRegistry`, `Plan.save`."
    return bool(re.search(r"[_.]|[a-z][A-Z]", name))
