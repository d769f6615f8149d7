"What nbdev does for the site beyond its usual: `renderer` and `procs` in settings.ini."
import ast, inspect, re, textwrap
from importlib import import_module
from itertools import groupby

from execnb.nbio import read_nb
from fastcore.docments import _unwrap_sym, qual_name
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import showdoc_nm

from devsky_nb._modidx import d as INDEX

HEADING = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Warns|Examples?|Notes?|References?|Sources?|See Also):")
IN_TABLE = ("Args", "Attributes", "Returns", "Yields")
MODULES = {name.removeprefix(f"{module}."): module for module, names in INDEX["syms"].items() for name in names}


class Renderer:
    """A definition as the site shows it: signature, prose, a table of parameters, errors. It is that of the exported module,
    where methods are in their class and comments in the docstring. A class lists the methods of its cell, so that each has a
    place to link to."""
    def __init__(self, sym, name=None, title_level=3):
        self.name, self.level = name or qual_name(getattr(sym, "fget", sym)), title_level
        self.sym = exported(self.name, sym)
        self.members = [name for name in vars(sym) if name[0] != "_"] if inspect.isclass(sym) else []

    def _repr_markdown_(self):
        said = sections(inspect.getdoc(self.sym) or "")
        source = NbdevLookup().code(self.name)
        link = f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}' if source else ""
        table = table_of(self.sym, said)
        blocks = ["---", link, f"{'#' * self.level} {self.name}"]
        blocks += [signature_of(self.sym, self.name, short=bool(table)), emphasized(said.pop("")), table]
        if table: said = {heading: text for heading, text in said.items() if heading not in IN_TABLE}
        blocks += [f"**{heading}**\n\n{listed(text) if heading == 'Raises' else text}" for heading, text in said.items()]
        blocks.append("\n".join(filter(None, (member(self.sym, name) for name in self.members))))
        return "\n\n".join(block for block in blocks if block)

    def __repr__(self): return f"{type(self).__name__}({self.name})"


def exported(name, sym):
    "The definition of this name in the package; the one at hand, if it has none."
    found = import_module(MODULES[name]) if name in MODULES else None
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
        found = getattr(found, "func", None) or getattr(found, "__func__", None) or found
    return _unwrap_sym(found or sym)


def sections(doc: str) -> dict[str, str]:
    "The parts of a docstring by their headings; the prose before them has none."
    found, heading = {"": []}, ""
    for line in doc.splitlines():
        if m := HEADING.fullmatch(line): heading = m[1]
        found.setdefault(heading, [])
        if not m: found[heading].append(line)
    return {heading: textwrap.dedent("\n".join(lines)).strip() for heading, lines in found.items()}


def entries(text: str) -> dict[str, str]:
    "Names and what is said of them, of a section such as Args."
    found = {}
    for line in text.splitlines():
        if line[:1].isspace() and found: found[[*found][-1]] += " " + line.strip()
        elif line.strip():
            name, _, said = line.partition(":")
            found[name.strip()] = said.strip()
    return found


def listed(text: str) -> str:
    "The entries of a section as a list."
    return "\n".join(f"- `{name}`: {as_text(said)}" for name, said in entries(text).items())


def signature(sym) -> inspect.Signature | None:
    try: return inspect.signature(sym)
    except (ValueError, TypeError): return None


def annotation_of(annotation) -> str:
    "An annotation as it is written, without the modules of classes."
    if annotation is inspect.Parameter.empty: return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text).replace("'", "")


def default_of(default) -> str:
    text = getattr(default, "__name__", None) or repr(default)
    return text if len(text) < 60 else text[:57] + "…"


def signature_of(sym, name: str, short: bool) -> str:
    "The call; with annotations unless a table says them."
    found = signature(sym)
    if found is None: return ""
    parameters, keywords_only = [], False
    for p in found.parameters.values():
        if p.name in ("self", "cls"): continue
        if p.kind is p.KEYWORD_ONLY and not keywords_only: parameters.append("*")
        keywords_only = keywords_only or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parameters.append(parameter(p, short))
    result = "" if inspect.isclass(sym) else annotation_of(found.return_annotation)
    arrow = f" -> {result}" if result else ""
    call = name if inspect.isclass(sym) else f"def {name.rpartition('.')[2]}"
    line = f"{call}({', '.join(parameters)}){arrow}"
    if len(line) > 72: line = f"{call}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){arrow}"
    return f"```python\n{line}\n```"


def parameter(p: inspect.Parameter, short: bool = True) -> str:
    "A parameter as it stands in a signature."
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    annotation = "" if short else annotation_of(p.annotation)
    if annotation: annotation = f": {annotation}"
    if p.default is p.empty: return f"{star}{p.name}{annotation}"
    return f"{p.name}{annotation}{' = ' if annotation else '='}{default_of(p.default)}"


def table_of(sym, said: dict[str, str]) -> str:
    "Parameters or fields, their types and defaults, and what is said of them; and of the result."
    told = entries(said.get("Args") or said.get("Attributes") or "")
    if not told: return ""
    found = signature(sym)
    parameters = found.parameters if found else {}
    rows = []
    for name, text in told.items():
        p = parameters.get(name.lstrip("*"))
        annotation = annotation_of(p.annotation) if p else ""
        default = f"default {code(default_of(p.default))}" if p and p.default is not p.empty else ""
        kind = ", ".join(filter(None, (code(annotation), default)))
        rows.append((code(name), kind, "" if text == annotation else text))
    result = said.get("Returns") or said.get("Yields")
    if result: rows.append(("→", code(annotation_of(found.return_annotation)) if found else "", " ".join(result.split())))
    lines = [f"| {name} | {'<br>'.join(filter(None, (as_text(text, cell=True), kind)))} |" for name, kind, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def code(text: str) -> str:
    "Code in a cell of a table."
    return f"`{text}`".replace("|", r"\|") if text else ""


def as_text(text: str, cell: bool = False) -> str:
    "A comment as Markdown: nothing in it is a tag or emphasis, but code stays code."
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_\[\]\\])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).replace("|", r"\|") if cell else "".join(parts)


def emphasized(prose: str) -> str:
    "The first line stands out."
    first, _, rest = prose.partition("\n")
    return f"*{first}*\n{rest}".strip() if first else ""


def member(cls: type, name: str) -> str:
    "A method or property of a class, in one line; empty for a field."
    found = inspect.getattr_static(cls, name, None)
    function = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
    if not inspect.isfunction(function): return ""
    parameters = [parameter(p) for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    is_called = found is function or isinstance(found, classmethod | staticmethod)
    call = f"({', '.join(parameters)})" if is_called else ""
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    return f'- <a id="{cls.__qualname__.lower()}.{name.lower()}"></a>`{name}{call}`{": " * bool(first)}{first}'


class in_order(Processor):
    "The definitions of a cell in the order in which they stand in it; nbdev puts them backwards."
    def begin(self):
        cells = [c.source for c in read_nb(self.nb.path_).cells if c.cell_type == "code"]
        source = "\n".join(text for text in cells if text.startswith("#| export"))
        order = {showdoc_nm(o): n for n, o in enumerate(ast.parse(source).body) if isinstance(o, ast.FunctionDef | ast.ClassDef)}
        def place(cell): return order[re.search(r"show_doc\((.*?)\)", cell.source)[1]]
        runs = [[*run] for _, run in groupby(self.nb.cells, lambda cell: hasattr(cell, "has_sd") or id(cell))]
        self.nb.cells[:] = [cell for run in runs for cell in (sorted(run, key=place) if hasattr(run[0], "has_sd") else run)]


def site_links(cell):
    """Links of nbdev's index become links within the site, unless their name is an everyday word or stands in code; what lies
    outside nbs/ is on the repository's page."""
    cfg = get_config()
    site, repository = cfg.doc_host + cfg.doc_baseurl, f"{cfg.git_url}/blob/{cfg.branch}"
    link = re.compile(rf"\[(`[^`]+`)\]\({re.escape(site)}(/[^)]*)\)")
    def within(text): return link.sub(lambda m: f"[{m[1]}]({m[2]})" if distinct(m[1]) else m[1], text)
    def outside(m): return m[0] if (cfg.nbs_path / m[1].partition("#")[0]).exists() else f"]({repository}/{m[1]})"
    if cell.cell_type == "markdown": cell.source = re.sub(r"\]\((?:\.\./)+([^)]+)\)", outside, within(cell.source))
    for output in cell.get("outputs", []):
        if text := output.get("data", {}).get("text/markdown"):
            parts = re.split(r"(^```.*?^```)", "".join(text), flags=re.MULTILINE | re.DOTALL)
            parts = [link.sub(r"\1", part) if part.startswith("```") else within(part) for part in parts]
            output.data["text/markdown"] = "".join(parts)


def distinct(name: str) -> bool:
    "Whether a word between backticks can only mean a definition: `embed_images`, `ModelRegistry`, `Plan.save`."
    return bool(re.search(r"[_.]|[a-z][A-Z]", name))
