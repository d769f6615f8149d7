"Comments beside parameters, fields and results as sections of the docstring, in Google's style, so that `help()` shows them."
import ast, io, re, textwrap, tokenize

from classes import FUNCTIONS, Problem, called, cell_of, docstring_of

WIDTH = 120
HEADING = re.compile(r"\s*(Raises|Warns|Yields|Examples?|Notes?|References?|Sources?|See Also):\s*")
BY_HAND = re.compile(r"\s*(Args|Arguments|Attributes|Parameters|Returns):\s*")
Sections = dict[str, list[str]]  # heading: entries


def whole_docstrings(source: str) -> str:
    "A module whose public functions, classes and methods say in their docstrings what comments say beside their parameters."
    tree, said = ast.parse(source), Comments(source)
    public = [node for node in tree.body if getattr(node, "name", None) in names_in_all(tree)]
    documented = [pair for node in public for pair in parts_of(node, said)]
    lines = source.splitlines()
    for node, sections in sorted(documented, key=lambda pair: pair[0].lineno, reverse=True):
        doc = docstring_of(node)
        if doc and sections: lines[doc.lineno - 1:doc.end_lineno] = with_sections(node, doc, sections, lines)
    return "\n".join(lines) + "\n"


def names_in_all(tree: ast.Module) -> list[str]:
    "What `__all__` lists."
    assigned = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(assigned[0]) if assigned else []


class Comments:
    "The comments of a source, by line, and which of them stand alone (markers of cells are none)."
    def __init__(self, source: str):
        lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.text = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        self.alone = {n for n in self.text if lines[n - 1].lstrip().startswith("#") and not self.text[n].startswith("# %%")}

    def beside(self, first: int, last: int) -> str | None:
        "The comment beside lines, or else the lines of comment directly above them."
        found = [self.text[n] for n in range(first, last + 1) if n in self.text]
        while not found or first in self.alone:
            first -= 1
            if first not in self.alone: break
            found.insert(0, self.text[first])
        return " ".join(" ".join(comment.lstrip("# ") for comment in found).split()) or None


def parts_of(node: ast.AST, said: Comments) -> list[tuple[ast.AST, Sections]]:
    "A definition, and the public methods of a class, with what their comments say."
    if isinstance(node, FUNCTIONS): return [(node, of_function(node, said))]
    if not isinstance(node, ast.ClassDef): return []
    methods = [m for m in node.body if isinstance(m, FUNCTIONS) and m.name[0] != "_"]
    return [(node, of_class(node, said)), *((m, of_function(m, said, method=True)) for m in methods)]


def of_function(node: ast.FunctionDef, said: Comments, method: bool = False) -> Sections:
    "Parameters, and the result if there is something to say about it."
    decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    entries = parameters_of(node, said)[method and "staticmethod" not in decorators:]
    if decorators & {"setter", "property", "cached_property"}: entries = []
    sections = {"Args": entries} if entries else {}
    result = said.text.get(node.returns.end_lineno) if node.returns else None
    heading = "Yields" if decorators & {"contextmanager", "asynccontextmanager"} else "Returns"
    return sections | ({heading: [" ".join(result.lstrip("# ").split())]} if result else {})


def of_class(node: ast.ClassDef, said: Comments) -> Sections:
    "What the constructor takes, or the fields of a dataclass or a named tuple."
    init = next((m for m in node.body if isinstance(m, FUNCTIONS) and m.name == "__init__"), None)
    if init:
        entries = parameters_of(init, said)[1:]
        return {"Args": entries} if entries else {}
    kinds = [*map(called, node.decorator_list), *map(ast.unparse, node.bases)]
    if not any(kind.endswith(("dataclass", "NamedTuple", "TypedDict")) for kind in kinds): return {}
    entries = [entry(f.target.id, f.annotation, said.beside(f.lineno, f.end_lineno)) for f in node.body if is_field(f)]
    return {"Attributes": entries} if entries else {}


def is_field(node: ast.stmt) -> bool:
    "Whether it is a public field of a dataclass."
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name): return False
    return node.target.id[0] != "_" and "ClassVar" not in ast.unparse(node.annotation)


def parameters_of(node: ast.FunctionDef, said: Comments) -> list[str]:
    """One entry for each parameter, `self` included; none at all where no comment says anything.
    A comment is of the last parameter of its line, or of the result if that is there, too."""
    a = node.args
    regular = [*a.posonlyargs, *a.args]
    defaults = dict(zip([p.arg for p in regular[::-1]], a.defaults[::-1]))
    defaults |= {p.arg: default for p, default in zip(a.kwonlyargs, a.kw_defaults) if default}
    star = [(a.vararg, f"*{a.vararg.arg}")] if a.vararg else []
    stars = [(a.kwarg, f"**{a.kwarg.arg}")] if a.kwarg else []
    parameters = [*((p, p.arg) for p in regular), *star, *((p, p.arg) for p in a.kwonlyargs), *stars]
    last_of_line = {p.lineno: p for p, _ in parameters}
    found = []
    for p, name in parameters:
        end = max(p.end_lineno, defaults[p.arg].end_lineno if p.arg in defaults else 0)
        is_results = node.returns is not None and node.returns.lineno <= end
        comment = said.beside(p.lineno, end) if last_of_line[p.lineno] is p and not is_results else None
        found.append((comment, entry(name, p.annotation, comment)))
    return [text for _, text in found] if any(comment for comment, _ in found) else []


def entry(name: str, annotation: ast.expr | None, comment: str | None) -> str:
    "What is said of a parameter; without a comment its annotation says it."
    kind = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation) if annotation else ""
    return f"{name}: {comment or kind}".removesuffix(": ")


def with_sections(node: ast.AST, doc: ast.Constant, sections: Sections, lines: list[str]) -> list[str]:
    "The lines of a docstring with new sections before its own."
    where = cell_of(lines, node.lineno)
    data = [line.encode() for line in lines[doc.lineno - 1:doc.end_lineno]]
    before, behind = data[0][:doc.col_offset].decode(), data[-1][doc.end_col_offset:].decode()
    if behind.strip().startswith(";"): raise Problem(f"{where}: the docstring of {node.name} shares its line with code")
    data[-1] = data[-1][:doc.end_col_offset]
    literal = b"\n".join(data)[doc.col_offset:].decode()
    prefix, quotes, text = re.fullmatch(r"([rRuU]?)('''|\"\"\"|'|\")(.*)\2", literal, re.DOTALL).groups()
    if len(quotes) == 1: text = text.replace('"""', r'\"\"\"')
    own = text.rstrip().split("\n")
    if any(map(BY_HAND.fullmatch, own)):
        raise Problem(f"{where}: {node.name}: Args and Returns are made from the comments beside parameters; "
                      "take them out of the docstring")
    at = next((n for n, line in enumerate(own) if n and HEADING.fullmatch(line)), len(own))
    opening, rest = own[:at], ["", *own[at:]] if at < len(own) else []
    while not opening[-1].strip(): opening.pop()
    indent = " " * (node.col_offset + 4)
    made = [line for heading, entries in sections.items() for line in section(heading, entries, indent, prefix)]
    head = [before.rstrip()] if before.strip() else []
    return [*head, f'{indent}{prefix}"""{opening[0]}', *opening[1:], *made, *rest, f'{indent}"""{behind}']


def section(heading: str, entries: list[str], indent: str, prefix: str) -> list[str]:
    "The lines of a section, an empty one before it."
    wrapper = textwrap.TextWrapper(WIDTH, f"{indent}    ", f"{indent}        ", break_long_words=False, break_on_hyphens=False)
    return ["", f"{indent}{heading}:", *(line for text in entries for line in wrapper.wrap(escaped(text, prefix)))]


def escaped(text: str, prefix: str) -> str:
    "A comment as text within three quotes."
    return text.replace('"""', "'''") if "r" in prefix.lower() else text.replace("\\", "\\\\").replace('"""', r'\"\"\"')
