"""Methods that a notebook adds to a class with fastcore's `@patch`, written into the body of the class.

It works on the text that nbdev writes. Positions come from `ast`, so comments, blank lines and formatting stay. ast counts
columns in bytes and lines from 1; lines are counted from 0 here.
"""
import ast, io, re, tokenize
from collections import defaultdict
from dataclasses import dataclass

MARKER = re.compile(r"# %% (?:\S*/)?([^/\s]+\.ipynb) #(\S+)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Problem(Exception):
    "What a notebook asks for and a module cannot have."


@dataclass
class Method:
    "A statement at the top of a module that belongs into a class."
    node: ast.stmt
    owner: str  # name of the class
    decorator: ast.expr | None = None  # fastcore's; None: an assignment such as `Walker.do_asyncfor = Walker.do_for`

    @property
    def name(self) -> str:
        return self.node.name if self.decorator else self.node.targets[0].attr


@dataclass
class Class:
    "A class that gets methods, and what its methods must heed."
    node: ast.ClassDef
    bound: set[str]  # names in its body, until now
    order: dict[str, int]  # first line of every name of the module

    def comes_later(self, name: str) -> bool:
        "Whether a name does not exist yet when the class is made (its own does not either)."
        return self.order.get(name, 0) >= self.node.lineno


def whole_classes(source: str) -> str:
    "A module in which the methods that `patch` added stand in the bodies of their classes, in their order."
    tree, lines = ast.parse(source), source.splitlines()
    order = first_lines(tree)
    classes = {n.name: Class(n, bound_in(n.body), order) for n in tree.body if isinstance(n, ast.ClassDef)}
    added, gone = defaultdict(list), set()
    for node in tree.body:
        method = as_method(node, classes)
        if method is None: continue
        where = cell_of(lines, node.lineno)
        owner = classes.get(method.owner)
        if owner is None:
            raise Problem(f"{where}: {method.owner} is not defined in this notebook: a method stands in the one of its class")
        if method.name in owner.bound: raise Problem(f"{where}: {method.name} is in the class already")
        start, end = extent(node, lines)
        added[method.owner].append((marker_above(lines, start), in_class(method, owner, lines[start:end], start, where)))
        owner.bound |= bound_by(node)
        gone |= set(range(start, end))
    if not added: return source
    owners = {name: classes[name].node for name in added}
    behind = {end_of(owners[name], lines): with_markers(owners[name], lines, parts) for name, parts in added.items()}
    return "\n".join(rearranged(lines, gone, behind, owners)) + "\n"


def as_method(node: ast.stmt, classes: dict[str, Class]) -> Method | None:
    "The statement as a method, if it is one."
    if isinstance(node, FUNCTIONS):
        for decorator in node.decorator_list:
            if called(decorator) == "patch": return Method(node, class_of_self(node), decorator)
    if isinstance(node, ast.Assign):
        owners = {t.value.id if is_attribute(t) else "" for t in node.targets}
        if len(owners) == 1 and owners <= {*classes}: return Method(node, owners.pop())
    return None


def is_attribute(node: ast.AST) -> bool:
    "Whether it is an attribute of a name, `Walker.run`."
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def called(decorator: ast.expr) -> str:
    "The name of a decorator, with or without arguments."
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def class_of_self(node: ast.FunctionDef) -> str:
    "The class that the first parameter is annotated with."
    first = first_parameter(node)
    if first is None or first.annotation is None: raise Problem(f"{node.name}: @patch needs an annotated first parameter")
    return first.annotation.value if isinstance(first.annotation, ast.Constant) else ast.unparse(first.annotation)


def first_parameter(node: ast.FunctionDef) -> ast.arg | None:
    return next(iter([*node.args.posonlyargs, *node.args.args]), None)


# ---- names ----

def first_lines(tree: ast.Module) -> dict[str, int]:
    "The line in which each name of a module is first bound."
    order: dict[str, int] = {}
    for node in tree.body:
        for name in bound_by(node): order.setdefault(name, node.lineno)
    return order


def bound_by(node: ast.stmt) -> set[str]:
    "Names that a statement binds where it stands; `Walker.run = …` binds `run` in the class."
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)): return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom): return {(a.asname or a.name).partition(".")[0] for a in node.names}
    if isinstance(node, ast.AnnAssign) and node.value is None: return set()
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found |= {t.attr for t in getattr(node, "targets", []) if isinstance(t, ast.Attribute)}
    return found | bound_in([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def bound_in(body: list[ast.stmt]) -> set[str]:
    return set().union(*map(bound_by, body))


def names_in(nodes: list[ast.expr]) -> list[str]:
    return [n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]


def check_names(names: list[str], owner: Class, where: str) -> None:
    "Refuse names that do not exist yet, or mean something else, where the class is."
    of = owner.node.name
    for name in names:
        if owner.comes_later(name):
            raise Problem(f"{where}: {name} is needed while {of} is made, and defined after it: define it before the class")
        if name in owner.bound: raise Problem(f"{where}: {name} would mean {of}.{name} in the class; rename one of them")


# ---- one method ----

def in_class(method: Method, owner: Class, text: list[str], start: int, where: str) -> list[str]:
    "The lines of a method as they stand in its class."
    edits = edits_of_function(method, owner, where) if method.decorator else edits_of_assignment(method, owner, where)
    return indented(edited(text, start, edits))


def edits_of_assignment(method: Method, owner: Class, where: str) -> list[tuple]:
    "`Walker.look_set = Walker.look_list` is `look_set = look_list` in the class."
    own = [n for n in ast.walk(method.node) if is_attribute(n) and n.value.id == method.owner]
    ids = {id(n.value) for n in own}
    others = [n.id for n in ast.walk(method.node.value) if isinstance(n, ast.Name) and id(n) not in ids]
    check_names(others, owner, where)
    return [(*span(n), n.attr) for n in own]


def edits_of_function(method: Method, owner: Class, where: str) -> list[tuple]:
    "Decorator and annotation of `self` go; annotations that name something later get quotes."
    node, first = method.node, first_parameter(method.node)
    line, column, end_line, end_column = span(first)
    edits = [edit_of_decorator(method, where), (line, column + len(first.arg), end_line, end_column, "")]
    others = [d for d in node.decorator_list if d is not method.decorator]
    check_names(names_in([*others, *node.args.defaults, *filter(None, node.args.kw_defaults)]), owner, where)
    parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    for annotation in [*(p.annotation for p in parameters if p), node.returns]:
        if annotation in (None, first.annotation) or isinstance(annotation, ast.Constant): continue
        names = names_in([annotation])
        for name in owner.bound.intersection(names):
            raise Problem(f"{where}: in the annotations of {node.name} `{name}` would mean {owner.node.name}.{name}; rename one of them")
        if any(map(owner.comes_later, names)): edits.append((*span(annotation), None))
    return edits


def edit_of_decorator(method: Method, where: str) -> tuple:
    "What becomes of fastcore's decorator: nothing, `@property`, `@classmethod`, or a setter."
    node, decorator = method.node, method.decorator
    if decorator is not node.decorator_list[0]:
        raise Problem(f"{where}: @patch is the first decorator of {node.name}, or the others would see no method")
    known = {"as_prop": "property", "cls_method": "classmethod", "set_prop": f"{node.name}.setter"}
    options = [k.arg for k in getattr(decorator, "keywords", []) if ast.literal_eval(k.value)]
    if len(options) > 1 or not {*options} <= {*known}: raise Problem(f"{where}: {ast.unparse(decorator)} is not understood")
    line, _, end_line, _ = span(decorator)
    return (*span(decorator), known[options[0]]) if options else (line, 0, end_line + 1, 0, "")


def span(node: ast.AST) -> tuple[int, int, int, int]:
    "Where a node stands: line and column of its start and of its end."
    return node.lineno - 1, node.col_offset, node.end_lineno - 1, node.end_col_offset


def edited(text: list[str], start: int, edits: list[tuple]) -> list[str]:
    "Lines with pieces replaced, last piece first; None puts a piece between quotes. `start` is the number of the first line."
    data = [line.encode() for line in text]
    for line, column, end_line, end_column, new in sorted(edits, reverse=True, key=lambda edit: edit[:2]):
        line, end_line = line - start, end_line - start
        before, behind = data[line][:column], data[end_line][end_column:]
        if new is None: new = quoted(b"\n".join([*data[line:end_line], data[end_line][:end_column]])[column:].decode())
        data[line:end_line + 1] = [before + new.encode() + behind]
    return [line.decode() for line in data]


def quoted(annotation: str) -> str:
    "An annotation as text: what it names is defined later."
    quote = "'" if '"' in annotation else '"'
    return quote + re.sub(r"\s*\n\s*", " ", annotation) + quote


def indented(lines: list[str]) -> list[str]:
    "Four spaces before every line, but within strings of several lines only if they are docstrings."
    source = "\n".join(lines)
    fixed = inside_strings(source)
    for node in ast.walk(ast.parse(source)):
        doc = docstring_of(node)
        if doc: fixed -= set(range(doc.lineno, doc.end_lineno))
    return [line if n in fixed or not line.strip() else f"    {line}" for n, line in enumerate(lines)]


def inside_strings(source: str) -> set[int]:
    "Lines that begin within a string."
    found, opened = set(), []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "STRING": found |= set(range(token.start[0], token.end[0]))
        elif kind.endswith("STRING_START"): opened.append(token.start[0])  # f-strings, from Python 3.12 on
        elif kind.endswith("STRING_END"): found |= set(range(opened.pop(), token.end[0]))
    return found


def docstring_of(node: ast.AST) -> ast.Constant | None:
    "The docstring of a function or class, as it stands in the source."
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)): return None
    first = node.body[0]
    text = first.value if isinstance(first, ast.Expr) else None
    return text if isinstance(text, ast.Constant) and isinstance(text.value, str) else None


# ---- the module around it ----

def extent(node: ast.stmt, lines: list[str]) -> tuple[int, int]:
    "First line and the one behind the last: with decorators, and with the comments that stand directly above."
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start and lines[start - 1].startswith("#") and not is_marker(lines[start - 1]): start -= 1
    return start, node.end_lineno


def is_marker(line: str) -> bool:
    "Whether a cell begins here."
    return line.startswith("# %%")


def marker_above(lines: list[str], line: int) -> str:
    "The marker of the cell that a line is of."
    return next((text for text in reversed(lines[:line + 1]) if is_marker(text)), "")


def cell_of(lines: list[str], number: int) -> str:
    "Notebook and cell of a line, counted from 1, for a message."
    found = MARKER.match(marker_above(lines, number - 1))
    return f"{found[1]}, cell {found[2]}" if found else f"line {number}"


def end_of(node: ast.ClassDef, lines: list[str]) -> int:
    "The line behind a class: comments at its end are of it."
    end = node.end_lineno
    while end < len(lines) and re.match(r"\s+#", lines[end]): end += 1
    return end


def with_markers(owner: ast.ClassDef, lines: list[str], parts: list[tuple[str, list[str]]]) -> list[str]:
    "What is put behind a class's own lines: its methods, and before the first of each other cell the marker of that cell."
    out, last, before = [], marker_above(lines, owner.lineno - 1), []
    for marker, text in parts:
        one_liners = len(text) == len(before) == 1 and marker == last
        if not one_liners: out.append("")
        if marker != last: out.append(f"    {marker}")
        out += text
        last, before = marker, text
    return out


def rearranged(lines: list[str],
               gone: set[int],  # lines that stand elsewhere now
               behind: dict[int, list[str]],  # line: what comes before it
               owners: dict[str, ast.ClassDef],
               ) -> list[str]:
    "The lines that stay, and others behind them. A cell that has become empty goes with its marker."
    one_liners = {n.body[0].lineno - 1: n for n in owners.values() if n.body[0].lineno == n.lineno}
    out: list[str] = []
    for number, line in enumerate([*lines, ""]):
        out += behind.get(number, [])
        after_gap = number - 1 in gone
        if after_gap and not line.strip(): gone.add(number)  # blank lines go with what stood before them
        if number in gone: continue
        if is_marker(line):
            drop_empty_cell(out)
            out += ["", line]
        elif number in one_liners: out += opened(one_liners[number], line)
        else:
            if after_gap and out[-1].strip() and not is_marker(out[-1]): out.append("")
            out.append(line)
    drop_empty_cell(out)
    return out


def drop_empty_cell(out: list[str]) -> None:
    "Take a marker with nothing behind it off the end, and blank lines."
    while out and not out[-1].strip(): out.pop()
    if out and is_marker(out[-1]): out.pop()
    while out and not out[-1].strip(): out.pop()


def opened(node: ast.ClassDef, line: str) -> list[str]:
    "A class of one line as its head and its body."
    head, body = line[:node.body[0].col_offset].rstrip(), line[node.body[0].col_offset:]
    return [head] if isinstance(node.body[0], ast.Pass) else [head, f"    {body}"]


def tidy_imports(source: str) -> str:
    "A module without imports of `patch` that nothing uses any more; imports of several lines stand below their bracket again."
    tree, lines = ast.parse(source), source.splitlines()
    used = names_in(tree.body)
    for node in reversed(tree.body):
        if not isinstance(node, ast.ImportFrom): continue
        bracket = lines[node.lineno - 1].find("(")
        for n in range(node.lineno, node.end_lineno):
            if lines[n].startswith(" "): lines[n] = " " * (bracket + 1) + lines[n].lstrip()
        names = [a for a in node.names if a.name != "patch" or (a.asname or a.name) in used]
        if len(names) == len(node.names): continue
        start, end = node.lineno - 1, node.end_lineno
        while not names and not lines[start - 1].strip() and end < len(lines) and not lines[end].strip(): end += 1
        left = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in names)
        lines[start:end] = [f"from {node.module} import {left}"] if names else []
    return "\n".join(lines) + "\n"
