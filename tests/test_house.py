"The tree is in step with its source, and the house stands as drawn: parts and their order, a small public API that explains itself."
import ast, importlib, inspect, os, re, shutil, subprocess, sys, textwrap
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import nbformat, pytest
from patience import PATIENCE

import devsky_nb

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "devsky_nb"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent


def dotted(path):
    "The name of a module."
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}
MODULES = [name for name in FILES if name not in ("devsky_nb", "devsky_nb.__main__")]


def name_of(notebook):
    return notebook.relative_to(ROOT / "nbs").as_posix().removesuffix(".ipynb")


def snapshot(root):
    files = [p for d in ("nbs", "devsky_nb") for p in (root / d).rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")]
    return {str(p.relative_to(root)): p.read_bytes() for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)} | {
        "README.md": (root / "README.md").read_bytes()}


def test_export_clean_and_readme_leave_no_diff(tmp_path):
    copy = tmp_path / "devsky_nb"
    copy.mkdir()
    for name in ("nbs", "devsky_nb", "tools", ".github"): shutil.copytree(ROOT / name, copy / name)
    for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, copy / name)
    python = sys.executable
    for command in ([python, "tools/export.py"], [BIN / "nbdev_clean"], [python, "tools/outputs.py"], [python, "tools/readme.py"]):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    before, after = snapshot(ROOT), snapshot(copy)
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_file_is_sound(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    ids = [c.id for c in nb.cells]
    assert len(ids) == len(set(ids))
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    images = [d for o in outputs for mime, d in o.get("data", {}).items() if mime.startswith("image/")]
    assert all(len(d) < 100_000 for d in images)
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"/tmp/|/work/|/home/|0x[0-9a-f]{8,}", text)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if "#| default_exp" in p.read_text(encoding="utf-8")], ids=name_of)
def test_cells_with_imports_hold_nothing_else(path):
    "nbdev runs them when it builds the site, and a lesson has no place there."
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    trees = {c.id: ast.parse(c.source) for c in cells if not c.source.startswith(("#| export", "%", "!"))}
    imports = lambda nodes: [isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes]
    mixed = [cell for cell, tree in trees.items() if any(imports(ast.walk(tree))) and not all(imports(tree.body))]
    assert mixed == [], "put the imports into a cell before"


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **env})


def test_importing_the_package_imports_nothing_but_what_loads_names_later():
    done = run("import sys; before = set(sys.modules); import devsky_nb; print(*(m for m in sys.modules if m not in before))")
    found = done.stdout.split()
    foreign = {m for m in found if m.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"devsky_nb", "lazy_loader"}, done.stdout + done.stderr
    assert len(found) < 40 and not {"asyncio", "dataclasses", "inspect", "logging", "typing", "unittest"} & set(found)


def test_importing_a_module_imports_no_heavy_library():
    heavy = {"torch", "transformers", "diffusers", "huggingface_hub", "pyarrow", "matplotlib", "scipy", "bitsandbytes", "pandas"}
    code = f"import importlib, sys\nfor m in {MODULES}:\n    importlib.import_module(m)\n    print(m, sorted({heavy} & set(sys.modules)))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    first = next((line for line in done.stdout.splitlines() if not line.endswith(" []")), None)
    assert first is None, "the first module that does"


@pytest.mark.parametrize("module", ["errors", "device", "hub.registry", "cli"])
def test_what_handles_no_image_imports_little(module):
    "Images are numpy's arrays and Pillow's images; whatever does without them does without the time that they take to load."
    done = run(f"import sys, devsky_nb.{module}; print(sorted({{'numpy', 'PIL', 'psutil', 'rich', 'jinja2'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "devsky_nb", "--version"], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [devsky_nb.__version__]), done.stderr


# ---- parts and their order ----

GROUND = {"errors", "device", "_core"}
MAY_IMPORT = {  # beside itself and the ground
    "hub": set(),
    "images": set(),
    "embedding": {"hub", "images"},
    "validation": {"hub", "images", "embedding"},
    "memory": {"hub"},
    "diffusion": {"hub", "memory"},
    "doctor": {"hub", "memory"},
    "demo": {"images"},
    "ui": {"hub", "images", "embedding", "validation", "memory", "diffusion", "doctor", "demo"},
    "cli": {"hub", "images", "embedding", "validation", "memory", "diffusion", "doctor", "demo", "ui"},
}


def part(module):
    return (module.split(".") + [""])[1]


@cache
def imports(module):
    return list(find_imports(module))


def find_imports(module):
    "Modules of the package that a module imports, inside functions and for type checkers too, and whether a function does."
    tree, package = ast.parse(FILES[module].read_text(encoding="utf-8")), module.split(".")[:-1]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = [*package[:len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
            names = [".".join([*stem, a.name]) for a in node.names]
        else: continue
        for name in names:
            while name and name not in FILES: name = name.rpartition(".")[0]
            if name: yield name, id(node) in inside


def test_every_module_is_in_a_part():
    assert {part(m) for m in MODULES} == {*GROUND, *MAY_IMPORT}


def test_a_part_imports_only_parts_below_it():
    wrong = [f"{m} imports {other}" for m in MODULES for other, _ in imports(m)
             if part(other) not in {part(m), "", *GROUND, *MAY_IMPORT.get(part(m), ())}]
    assert wrong == []
    ground = [m for m in MODULES if part(m) in GROUND]
    assert [f"{m} imports {other}" for m in ground for other, _ in imports(m) if part(other) not in {"", *GROUND}] == []


def test_no_circle_of_modules():
    try: TopologicalSorter({m: {other for other, _ in imports(m)} - {m} for m in MODULES}).prepare()
    except CycleError as e: pytest.fail(" imports ".join(e.args[1]))


def drawn_imports(picture):
    "Part -> parts that its arrows lead to: an arrow starts on the lower edge of a box and ends on the upper edge of another."
    boxes, arrows = {}, []
    for shape in ElementTree.parse(picture).getroot():
        tag, at = shape.tag.rpartition("}")[2], shape.attrib
        if tag == "rect": boxes[at["id"]] = [float(at[k]) for k in ("x", "y", "width", "height")]
        if tag == "path": arrows.append([float(n) for n in re.fullmatch(r"M([\d.]+) ([\d.]+)V([\d.]+)", at["d"]).groups()])
    found = {name: set() for name in boxes}
    for at, start, end in arrows:
        above, = (name for name, (x, y, width, height) in boxes.items() if x < at < x + width and y + height == start)
        below, = (name for name, (x, y, width, _) in boxes.items() if x < at < x + width and y == end)
        found[above].add(below)
    return found


def test_the_picture_shows_the_parts_and_their_order():
    drawn = drawn_imports(ROOT / "nbs" / "images" / "house.svg")
    below = {}
    for name in TopologicalSorter(drawn).static_order(): below[name] = drawn[name].union(*(below[other] for other in drawn[name]))
    assert below.pop("ground") == set()
    assert {name: parts - {"ground"} for name, parts in below.items()} == MAY_IMPORT
    assert [name for name, parts in below.items() if "ground" not in parts] == []


def test_functions_import_libraries_and_no_modules_of_ours():
    "The command line may: nothing imports it, and `devsky --version` is to be instant."
    assert [f"{m} imports {other} in a function" for m in MODULES if part(m) != "cli" for other, late in imports(m) if late] == []


def unused_imports(text):
    "Names that a file imports at its top and mentions nowhere else."
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    words = Counter(re.findall(r"\w+", text))
    return sorted(name for name in names if words[name] == 1)


def test_no_file_imports_what_it_does_not_use():
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    unused = {str(file.relative_to(ROOT)): unused_imports(file.read_text(encoding="utf-8")) for file in files}
    assert {name: found for name, found in unused.items() if found} == {}


def test_no_line_is_too_long_to_be_read():
    lines = {m: file.read_text(encoding="utf-8").splitlines() for m, file in FILES.items()}
    assert [f"{m}:{n}" for m, found in lines.items() for n, line in enumerate(found, 1) if len(line) > 140] == []


# ---- the public API ----

def stub():
    "Name and module of everything that `devsky_nb` offers, as its stub says."
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return {alias.name: f"devsky_nb.{node.module}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


PUBLIC = stub()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_where_it_is_said_to_be_and_explains_itself(name):
    found = getattr(devsky_nb, name)
    assert found.__module__ == PUBLIC[name] and name in importlib.import_module(PUBLIC[name]).__all__
    explained(found, name)
    for method, function in vars(found).items() if inspect.isclass(found) else ():
        function = getattr(function, "fget", None) or getattr(function, "func", None) or getattr(function, "__func__", function)
        if method[0] != "_" and inspect.isfunction(function): explained(function, f"{name}.{method}", parameters=False)


def explained(found, name, parameters=True):
    "A docstring that names all parameters, and the errors if any are raised here."
    doc = found.__doc__ or ""
    assert doc.strip(), f"{name} has no docstring"
    called = vars(found).get("__init__") if inspect.isclass(found) else inspect.unwrap(found)
    takes = [p for p in inspect.signature(called).parameters if p != "self" and p[0] != "_"] if called and parameters else []
    unsaid = [p for p in takes if not re.search(rf"^\s+\**{p}\b", doc, re.MULTILINE)]
    assert unsaid == [], f"parameters of {name} without a comment beside them"
    written = inspect.isfunction(called) and called.__code__.co_filename != "<string>"  # a dataclass's __init__ is not
    tree = ast.parse(textwrap.dedent(inspect.getsource(called))) if written else ast.Module([], [])
    raises = any(isinstance(n, ast.Raise) and n.exc for n in ast.walk(tree))
    assert not raises or re.search(r"^\s*Raises:$", doc, re.MULTILINE), f"{name} raises and does not say what"


def test_the_stub_names_what_the_package_offers():
    assert sorted(devsky_nb.__all__) == sorted(PUBLIC) and {*PUBLIC} <= {*dir(devsky_nb)}
    made = run("from devsky_nb import *; print(ModelRegistry.__name__, embed_images.__name__)")
    assert made.stdout.split() == ["ModelRegistry", "embed_images"], made.stderr


def test_every_public_name_loads_without_the_libraries_of_extras():
    "What needs one says so when it is called."
    extras = ("accelerate", "bitsandbytes", "diffusers", "ipywidgets", "matplotlib", "onnx", "onnxruntime", "peft", "ray", "torchao")
    done = run(f"import sys\nsys.modules |= dict.fromkeys({extras})\nfrom devsky_nb import *\nprint(sorted(set({sorted(PUBLIC)}) - set(globals())))")
    assert done.stdout.strip() == "[]", done.stderr


def test_type_checkers_see_a_program_that_uses_every_public_name():
    tree = ast.parse((ROOT / "tests" / "types_api.py").read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "devsky_nb" for a in n.names}
    used = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
    assert imported == {*PUBLIC} and [name for name in imported if not used[name]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_public_methods_stand_in_cells_that_the_site_has_headings_for(path):
    "`#| exporti` gives a method no heading, and a link to it would lead nowhere."
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    exported, hidden = ([n for source in cells if re.match(start, source) for n in ast.parse(source).body]
                        for start in (r"#\| *export *\n", r"#\| *exporti"))
    public = {n.name for n in exported if isinstance(n, ast.ClassDef)}
    methods = [n for n in hidden if isinstance(n, ast.FunctionDef) and any(ast.unparse(d).startswith("patch") for d in n.decorator_list)]
    named = [(ast.unparse(m.args.args[0].annotation), m.name) for m in methods if m.name[0] != "_"]
    assert [f"{owner}.{name}" for owner, name in named if owner in public] == [], "put the method into a cell with `#| export`"


def test_no_module_keeps_a_name_that_means_nothing():
    left = [f"{m}.{name}" for m in MODULES for name, value in vars(importlib.import_module(m)).items() if value is None and name[0] != "_"]
    assert left == []


def test_one_name_has_one_meaning():
    places = defaultdict(set)
    for module in MODULES:
        for name in getattr(importlib.import_module(module), "__all__", ()): places[name].add(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_requirements_are_pinned_within_their_ranges():
    from configparser import ConfigParser

    from packaging.requirements import Requirement
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
                if line and line[0] != "#")
    for key in (k for k in cfg["DEFAULT"] if k.endswith("requirements")):
        for line in cfg["DEFAULT"][key].split():
            r = Requirement(line)
            assert r.specifier.contains(pins[r.name.lower().replace("_", "-")]), line
