"The tree is in step with its source: exported modules, clean notebooks, the README, the package's own promises."
import ast, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent


def snapshot(root):
    files = [p for d in ("nbs", "devsky_nb") for p in (root / d).rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")]
    return {str(p.relative_to(root)): p.read_bytes() for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)} | {
        "README.md": (root / "README.md").read_bytes()}


def test_export_clean_and_readme_leave_no_diff(tmp_path):
    copy = tmp_path / "devsky_nb"
    copy.mkdir()
    for name in ("nbs", "devsky_nb", "tools"): shutil.copytree(ROOT / name, copy / name)
    for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, copy / name)
    for command in ([BIN / "nbdev_export"], [BIN / "nbdev_clean"], [sys.executable, "tools/outputs.py"], [sys.executable, "tools/readme.py"]):
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
    before, after = snapshot(ROOT), snapshot(copy)
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_file_is_sound(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    ids = [c.id for c in nb.cells]
    assert len(ids) == len(set(ids)) and len(nb.cells) <= 120
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    images = [d for o in outputs for mime, d in o.get("data", {}).items() if mime.startswith("image/")]
    assert all(len(d) < 100_000 for d in images)
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"/tmp/|/work/|/home/|0x[0-9a-f]{8,}", text)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if "#| default_exp" in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_cells_with_imports_hold_nothing_else(path):
    "nbdev runs them when it builds the site, and a lesson has no place there."
    trees = {c.id: ast.parse(c.source) for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and not c.source.startswith(("#| export", "%", "!"))}
    imports = lambda nodes: [isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes]
    mixed = [cell for cell, tree in trees.items() if any(imports(ast.walk(tree))) and not all(imports(tree.body))]
    assert mixed == [], "put the imports into a cell before"


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **env})


MODULES = sorted(p.stem for p in (ROOT / "devsky_nb").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_imports_no_heavy_library(module):
    heavy = "{'torch', 'transformers', 'diffusers', 'huggingface_hub', 'pyarrow', 'matplotlib', 'scipy', 'bitsandbytes', 'pandas'}"
    done = run(f"import sys, devsky_nb.{module}; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["errors", "device", "clip", "bulk", "cli"])
def test_what_a_user_imports_first_is_instant(module):
    done = run(f"import sys, devsky_nb.{module}; print(sorted({{'numpy', 'PIL', 'psutil', 'rich', 'jinja2'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_requirements_are_pinned_within_their_ranges():
    from configparser import ConfigParser

    from packaging.requirements import Requirement
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
                if line and line[0] != "#")
    for key in (k for k in cfg["DEFAULT"] if k.endswith("requirements")):
        for line in cfg["DEFAULT"][key].split():
            r = Requirement(line)
            assert r.specifier.contains(pins[r.name.lower().replace("_", "-")]), line
