"What people type into cells: each runs in Jupyter, VS Code, Colab or Databricks, and its Python is checked where it stands."
import codecs, json, random, warnings

import pytest

from devsky_nb.doctor.cells import is_python, translate
from devsky_nb.doctor.scan import fix_source, scan_source
from devsky_nb.doctor.source import Unreadable, parse_cell, split_lines

IMPORT = "from diffusers import DiffusionPipeline as D\n"
WRONG = "D.from_pretrained('a/b', load_in_4bit=True)"


def write(path, *cells, metadata=None, **kwargs):
    "A notebook with these cells: texts, or texts with their metadata."
    pairs = [cell if isinstance(cell, tuple) else (cell, {}) for cell in cells]
    stored = [{"cell_type": "code", "metadata": m, "outputs": [], "execution_count": None, "source": s} for s, m in pairs]
    notebook = {"cells": stored, "metadata": metadata or {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, **kwargs), encoding="utf-8")
    return path


def found(path):
    return [(f.rule, f.cell, f.line, f.column) for f in scan_source(path, ignore="DSK050")]


# ---- nothing is said of what is no Python ----

SILENT = [
    "pip install torch", "ls", "ls -la *.py", "cd ..", "cd /data\nimport torch", "mkdir out\n", "cat notes.txt | head",
    "!ls it's", "files = !ls -la 'a b'", "a, b = !ls", "!!ls", "out = %magic x=1", "%timeit x = !ls", "%cd ..\n%matplotlib inline",
    "x?", "x??", "?x", "??x", "x?;", "x.y[0]?  # what is it?", "%time?", "%%time?", ", f a b", "; f a", "/f a",
    "if x:\n    !pip install a \\\n        b\n    %cd ..", "!pip install a \\\n  b\nimport torch", "%%time", "%load_ext autoreload",
    "%sql\nSELECT * FROM torch\nWHERE x = 1", "%sql SELECT *\nFROM torch", "%md\n# Title's", "%%sql\nSELECT 1", "%%sql duck << out\nSELECT",
    "%%bash\nrm -rf it's", "%%writefile notes.txt\nit's", "%%html\n<b>it's</b>", "%%unheard_of\n<b>it's", "# a title\n\n%%bash\nfi",
    ("SELECT * FROM torch", {"vscode": {"languageId": "sql"}}), ("it's", {"deepnote_cell_type": "markdown"}),
    ("val x: Int = 1", {"language": "scala"}), ("it's", {"microsoft": {"language": "sparksql"}}),
    ("print('x')\nx <- 3", {"kernel": "R"}), ("it's", {"polyglot_notebook": {"kernelName": "fsharp"}}),
]


@pytest.mark.parametrize("cell", SILENT, ids=lambda cell: repr(cell)[:40])
def test_cells_that_run_give_no_finding(cell, tmp_path):
    assert found(write(tmp_path / "a.ipynb", cell)) == []


# ---- and the Python beside it is checked, in its place ----

CODE = [
    (f"%time pipe = {WRONG}", (1, 39)), (f"%timeit -n 3 -r1 {WRONG}", (1, 43)), (f"%prun -s time {WRONG}", (1, 40)),
    (f"  %time {WRONG}", (1, 34)), (f"if x:\n    %time {WRONG}", (2, 36)), (f"pipe = %time {WRONG}", (1, 39)),
    (f"%%time\n{WRONG}", (2, 26)), (f"%%timeit -n 1 {WRONG}\npass", (1, 40)), (f"%%capture out\n%%time\n\n{WRONG}", (4, 26)),
    (f"!ls it's\n{WRONG}", (2, 26)), (f"'''\n!ls\n'''\n{WRONG}", (4, 26)), (f"x = (1\n  % 2)\n!ls\n{WRONG}", (4, 26)),
    (f"!a \\\n  b\n{WRONG}", (3, 26)), (f"x?\n{WRONG}", (2, 26)), (f"pip install x\n{WRONG}", (2, 26)),
    (f"time {WRONG}", (1, 31)), (f"%python\n{WRONG}", (2, 26)), (f"%sql SELECT 1\n{WRONG}", (2, 26)),
    (f"%%unheard_of\n{WRONG}", (2, 26)), (f">>> {WRONG}\nNone", (1, 30)), (f"    x = 1\n    {WRONG}", (2, 30)),
    (f"%time for x in y: {WRONG}", (1, 44)), (f"%time {WRONG[:18]}'é'{WRONG[23:]}", (1, 30)),
    ((WRONG, {"vscode": {"languageId": "python"}}), (1, 26)), ((WRONG, {"kernel": "Python3", "tags": ["a"]}), (1, 26)),
    (f"%lprun -f D.from_pretrained {WRONG}", (1, 54)), (f"%memit -r 2 {WRONG}", (1, 38)),
]


@pytest.mark.parametrize("cell, place", CODE, ids=[repr(cell)[:40] for cell, _ in CODE])
def test_code_behind_magics_is_found_where_it_stands(cell, place, tmp_path):
    assert found(write(tmp_path / "a.ipynb", IMPORT, "!ls", cell)) == [("DSK011", 3, *place)]


def test_a_cell_that_writes_a_file_is_a_program_of_its_own(tmp_path):
    cells = [IMPORT, f"%%writefile load.py\n{WRONG}", f"%%writefile load.py\n{IMPORT}{WRONG}", f"%%python\n{WRONG}"]
    assert [(rule, cell) for rule, cell, *_ in found(write(tmp_path / "a.ipynb", *cells))] == [("DSK011", 3)]


def test_environment_variables_of_magics(tmp_path):
    cells = ["import transformers\n!ls", "%env HF_HOME=/data\n%set_env HF_ENDPOINT http://x\n%env HF_TOKEN=$x\n%env"]
    assert [(rule, line) for rule, _, line, _ in found(write(tmp_path / "a.ipynb", *cells))] == [("DSK001", 1), ("DSK001", 2)]


def test_blocks_of_a_document_hold_magics_too(tmp_path):
    text = f"```python\n!pip install diffusers\n{IMPORT}%time pipe = {WRONG}\n```\n"
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert [(f.rule, f.line, f.column) for f in scan_source(tmp_path)] == [("DSK011", 4, 39)]


def test_a_session_may_go_on_without_prompts(tmp_path):
    (tmp_path / "a.md").write_text(f"```py\n>>> {IMPORT}>>> D.from_pretrained('a/b',\n        load_in_4bit=True)\nNone\n```\n",
                                   encoding="utf-8")
    assert [(f.rule, f.line) for f in scan_source(tmp_path)] == [("DSK011", 4)]


# ---- a fix keeps everything else ----

OLD = "!ls it's\nimport torch, diffusers as d\n%time p = d.FluxPipeline.from_pretrained(x, 'é😀', torch_dtype='float16')\nq = %time d.FluxPipeline.from_pretrained(x, torch_dtype=y)\n"
NEW = OLD.replace("torch_dtype='float16'", "dtype=torch.float16").replace("torch_dtype=y", "dtype=y")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("prefix", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("style", [{}, {"ensure_ascii": False, "indent": 1}])
def test_a_fix_keeps_magics_line_ends_and_marks(end, prefix, style, tmp_path):
    path = write(tmp_path / "a.ipynb", "%%time\n", OLD.replace("\n", end), **style)
    path.write_bytes(prefix + path.read_bytes())
    after = write(tmp_path / "b.ipynb", "%%time\n", NEW.replace("\n", end), **style).read_bytes()
    assert len(fix_source(path)) == 3
    assert path.read_bytes() == prefix + after


# ---- what a notebook's file may look like ----

def test_of_a_key_that_is_there_twice_the_last_counts(tmp_path):
    cell = '{"cell_type": "code", "source": "x = (", "metadata": {}, "source": %s}'
    text = '{"cells": [1], "cells": [' + cell % json.dumps(OLD) + "]}"
    (tmp_path / "a.ipynb").write_text(text, encoding="utf-8")
    assert len(fix_source(tmp_path)) == 3
    assert (tmp_path / "a.ipynb").read_text(encoding="utf-8") == text.replace(json.dumps(OLD), json.dumps(NEW))


ODD = {'{"cells": {}}': "no list of cells", '{"cells": [{"cell_type": "code", "source": 3}]}': "source of cell 1 is not text",
       '{"worksheets": [{"cells": []}], "nbformat": 3}': "of format 3", '{"cells": [], "n": ' + "1" * 5000 + "}": "no notebook",
       '{"cells": [{"cell_type": "code", "source": ["x", 1]}]}': "source of cell 1 is not text", "null": "no list of cells"}


@pytest.mark.parametrize("text, says", ODD.items(), ids=ODD.values())
def test_what_is_no_notebook_is_said(text, says, tmp_path):
    (tmp_path / "a.ipynb").write_text(text, encoding="utf-8")
    [finding] = scan_source(tmp_path)
    assert finding.rule == "DSK000" and says in finding.message


# ---- whatever IPython runs can be read ----

LINES = ["import torch", "x = 1", "for b in bs:", "    m(b)", "if x:", "    pass", "!ls", "!ls \\\n -la", "%time p = f(x)",
         "%timeit -n 3 f(x)", "a = %time f(x)", "a = !ls", "a, b = !ls", "d['k'] = !ls -la", "x?", "?x", "??x", "x.y??", "x[0]?", "x?;",
         "%matplotlib inline", "%cd ..", "'''", "\"it's\"", "(1,", "2)", "    !pip install x", "    %time f(x)", "s = '%no'", "y = a % b",
         "y = (a", "  % b)", ", f a", "; f a", "/f a", "%magic?", "!!ls", "f(a)?  ", "print('?')", "x = y # what?", "x = !echo 'a ? b'",
         "# why?", "a = b = !ls", "a = %magic x=1", "%timeit x = !ls", "x!=y", "f'{a!r}'", "assert x != y  # 5 % 2"]


def test_whatever_ipython_makes_python_of_can_be_read():
    manager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    tried = 0
    for seed in range(400):
        choose = random.Random(seed)
        cell = "\n".join(choose.choice(LINES) for _ in range(choose.randrange(1, 6)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: runs = is_python(manager.transform_cell(cell))
            except Exception: continue  # IPython itself cannot read it
        if not runs: continue
        tried += 1
        assert len(split_lines(translate(cell).code)) == len(split_lines(cell)), cell
        try: parse_cell(cell)
        except Unreadable as e: pytest.fail(f"{cell!r} {e.reason}")
    assert tried > 100
