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
    """A definition within its lesson: signature, prose, and where its parameters and errors are listed. It is that of the
    exported module, where methods are in their class and comments in the docstring. A class lists the methods of its cell."""
    def __init__(self, sym, name=None, title_level=3):
        self.name, self.level = name or qual_name(getattr(sym, "fget", sym)), title_level
        self.sym = exported(self.name, sym)
        self.members = [name for name in vars(sym) if name[0] != "_"] if inspect.isclass(sym) else []

    def _repr_markdown_(self):
        said = sections(inspect.getdoc(self.sym) or "")
        table, prose = table_of(self.sym, said), said.pop("")
        blocks = ["---", source_link(self.name), f"{'#' * self.level} {self.name}", signature_of(self.sym, self.name, short=bool(table))]
        blocks += [emphasized(prose), "\n".join(filter(None, (member(self.sym, name) for name in self.members)))]
        listed_there = [*["parameters"] * bool(table), *["errors"] * ("Raises" in said)]
        if self.name in MODULES and listed_there:
            blocks.append(f"[{' and '.join(listed_there).capitalize()}: in the reference]({reference_page(self.name)}){{.to-reference}}")
        return "\n\n".join(block for block in blocks if block)

    def __repr__(self): return f"{type(self).__name__}({self.name})"


def reference_page(name: str) -> str:
    "The page of the reference that describes `embed_images` or `VectorIndex.search`."
    owner, _, method = name.partition(".")
    if MODULES[name] == "devsky_nb.cli": return "/reference/devsky.html"
    return f"/reference/{owner}.html" + (f"#{name.lower()}" if method else "")


def source_of(name: str) -> str:
    "The address of a definition; of what is no name, of the package's list of names."
    cfg = get_config()
    return NbdevLookup().code(name) or f"{cfg.git_url}/blob/{cfg.branch}/devsky_nb/__init__.pyi"


def source_link(name: str) -> str:
    source = NbdevLookup().code(name)
    return f'[source]({source}){{target="_blank" .source-link}}' if source else ""


def reference(name: str) -> str:
    "A page of the reference, below its title and its summary: import, parameters, errors; of a class also its methods."
    sym, module = exported(name, None), MODULES[name]
    where = "devsky_nb" if name in public_names() else module
    lesson = f"[{module.rpartition('.')[2].replace('_', ' ')}](/{INDEX['syms'][module][f'{module}.{name}'][0]})"
    blocks = [f"```python\nfrom {where} import {name}\n```", f"Explained and run in the notebook {lesson} · [source]({source_of(name)})"]
    blocks.append(described(sym, name, with_summary=False))
    if inspect.isclass(sym):
        methods = [member for member in MODULES if member.partition(".")[0] == name and "." in member and MODULES[member] == module]
        for method in sorted(methods, key=lambda method: line_of(module, method)):
            blocks += [source_link(method), f"## {method.rpartition('.')[2]} {{#{method.lower()}}}", described(exported(method, None), method)]
    return linked("\n\n".join(block for block in blocks if block), name)


def linked(text: str, own: str) -> str:
    "Names between backticks as links to their pages, outside blocks of code and headings; a page does not link to itself."
    def link(m): return f"[{m[0]}]({reference_page(m[1])})" if m[1] in MODULES and m[1] != own and distinct(m[1]) else m[0]
    parts = re.split(r"(^```.*?^```|^#.*?$|\[`[^`]*`\]\([^)]*\))", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"`([\w.]+)(?:\(\))?`", link, part) for part in parts[::2]]
    return "".join(parts)


def described(sym, name: str, with_summary: bool = True) -> str:
    "What a definition takes, gives, and raises."
    said = sections(inspect.getdoc(sym) or "")
    table, prose = table_of(sym, said), said.pop("")
    if table: said = {heading: text for heading, text in said.items() if heading not in IN_TABLE}
    blocks = [signature_of(sym, name, short=bool(table)), emphasized(prose) if with_summary else prose.partition("\n")[2].strip(), table]
    blocks += [f"**{heading}**\n\n{listed(text) if heading == 'Raises' else text}" for heading, text in said.items()]
    return "\n\n".join(block for block in blocks if block)


def summary(name: str) -> str:
    "The first line of a docstring."
    return (inspect.getdoc(exported(name, None)) or "").partition("\n")[0]


def line_of(module: str, name: str) -> int:
    "Where a name stands in its module."
    return int(re.search(r"#L(\d+)$", NbdevLookup().code(name) or "#L0")[1])


def public_names() -> list[str]:
    return import_module("devsky_nb").__all__


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


def fold(cell):
    "Cells that assert and show nothing are folded under a mark that says how many assertions there are; so are long imports."
    if cell.cell_type != "code" or cell.get("outputs") or cell.source.startswith("#|"): return
    tree = parsed(cell.source)
    tests = sum(is_test(node) for node in ast.walk(tree))
    only_imports = tree.body and all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
    mark = f"✓ tested: {tests} assertion{'s' * (tests > 1)}" if tests else ""
    if only_imports and len(cell.source.splitlines()) > 2: mark = "imports"
    if mark: cell.source = f'#| code-fold: true\n#| code-summary: "{mark}"\n{cell.source}'


def parsed(source: str) -> ast.Module:
    "The syntax of a cell; of one that is no Python (a magic), nothing."
    try: return ast.parse(source)
    except SyntaxError: return ast.Module([], [])


def is_test(node: ast.AST) -> bool:
    "Whether it asserts something: `assert`, `test_eq(…)`, `test_fail(…)`, `np.testing.assert_allclose(…)`."
    if not isinstance(node, ast.Call): return isinstance(node, ast.Assert)
    name = ast.unparse(node.func).rpartition(".")[2]
    return name.startswith(("test_", "assert_"))


def site_links(cell):
    """Links of nbdev's index become links within the site, unless their name is an everyday word or stands in code; what lies
    outside nbs/ is on the repository's page."""
    cfg = get_config()
    site, repository = cfg.doc_host + cfg.doc_baseurl, f"{cfg.git_url}/blob/{cfg.branch}"
    link = re.compile(rf"\[(`[^`]+`)\]\({re.escape(site)}(/[^)]*)\)")
    def referred(m): return f"[{m[1]}]({reference_page(m[1].strip('`').removesuffix('()'))})" if distinct(m[1]) else m[1]
    def within(text): return link.sub(referred, text)
    def outside(m): return m[0] if (cfg.nbs_path / m[1].partition("#")[0]).exists() else f"]({repository}/{m[1]})"
    if cell.cell_type == "markdown": cell.source = re.sub(r"\]\((?:\.\./)+([^)]+)\)", outside, within(cell.source))
    for output in cell.get("outputs", []):
        if text := output.get("data", {}).get("text/markdown"):
            parts = re.split(r"(^```.*?^```)", "".join(text), flags=re.MULTILINE | re.DOTALL)
            parts = [link.sub(r"\1", part) if part.startswith("```") else within(part) for part in parts]
            output.data["text/markdown"] = "".join(parts)


def distinct(name: str) -> bool:
    "Whether a word between backticks can only mean a definition: `embed_images`, `ModelRegistry`, `Plan.save`."
    return bool(re.search(r"[_.]|[a-z][A-Z]|Error$", name.strip("`()")))
