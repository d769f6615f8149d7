"Files of every kind: notebooks, folders, and what is no code at all."
import os, subprocess, sys
from pathlib import Path

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from devsky_nb.doctor.scan import SKIPPED_FOLDERS, fix_source, scan_source
from devsky_nb.errors import FileNotFoundError, ValidationError

ROOT = Path(__file__).resolve().parents[2]
REMOTE_CODE = "import transformers as t\nt.AutoModel.from_pretrained(x, trust_remote_code=True)"


# ---- notebooks ----

def test_a_notebook_is_one_program_and_findings_name_the_cell(tmp_path):
    cells = ["%load_ext autoreload\n!pip install -q diffusers \\\n   transformers\nfiles = !ls", "%%bash\nrm -rf /",
             "%%time\nimport transformers as t\nt.CLIPModel?", "# no code\n\n%env HF_HOME=/data",
             "x = await f()\nimport os; os.environ['HF_HOME'] = 'x'"]
    notebook = new_notebook(cells=[new_markdown_cell("# x"), *map(new_code_cell, cells)])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    assert [(f.rule, f.cell, f.line) for f in scan_source(tmp_path / "a.ipynb")] == [("DSK001", 5, 3), ("DSK001", 6, 2)]


def test_a_broken_cell_does_not_hide_the_others(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("def f(:"), new_code_cell(REMOTE_CODE)]), tmp_path / "a.ipynb")
    found = scan_source(tmp_path / "a.ipynb")
    assert [(f.rule, f.cell, f.line) for f in found] == [("DSK000", 1, 1), ("DSK051", 2, 2)]
    assert "cell 1 is not Python" in found[0].message


ODD_NOTEBOOKS = [
    '{"cells": []}',
    '{"cells": [null, {"cell_type": "raw"}], "metadata": []}',
    '{"cells": [{"cell_type": "code", "source": "x <- 3"}], "metadata": {"kernelspec": {"language": "R"}}}',
]


@pytest.mark.parametrize("text", ODD_NOTEBOOKS)
def test_other_oddities_of_notebooks_are_no_findings(text, tmp_path):
    (tmp_path / "a.ipynb").write_text(text, encoding="utf-8")
    assert scan_source(tmp_path) == []


# ---- what is no code ----

UNREADABLE = [
    ("a.py", b"def f(:\n  pass\n", "not Python"),
    ("a.py", b"x = 1\ny = '\xff\xfe'\n", "not utf-8: byte 0xff"),
    ("a.py", b"# coding: klingon\n", "no usable encoding"),
    ("a.py", b"x = 1\0", "null bytes"),
    ("a.py", b"(" * 10_000, "nested"),
    ("a.py", b"x = " + b"-" * 200_000 + b"1", "nested too deeply"),
    ("a.py", b"#" * 3_000_000, "more than 2.0 MiB"),
    ("a.ipynb", b"", "no notebook"),
    ("a.ipynb", b"[]", "no list of cells"),
    ("a.ipynb", b'{"cells": 3}', "no list of cells"),
    ("a.ipynb", b'{"cells": [{"cell_type": "code", "source": 3}]}', "not text"),
    ("a.ipynb", b"[" * 200_000, "nested too deeply"),
    ("a.ipynb", b'{"cells": [\xff]}', "not utf-8"),
    ("a.md", b"# x\n\n```python\ndef f(:\n```\n", "this block is not Python"),
    ("a.md", b"\x80", "not utf-8"),
]


@pytest.mark.parametrize("name, data, says", UNREADABLE, ids=[f"{name}-{says}" for name, _, says in UNREADABLE])
def test_what_cannot_be_read_is_a_finding(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    [finding] = scan_source(tmp_path / name)
    assert finding.rule == "DSK000" and says in finding.message and finding.fix
    assert fix_source(tmp_path / name) == [] and (tmp_path / name).read_bytes() == data


# ---- folders ----

@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_odd_files_in_a_folder(tmp_path):
    (tmp_path / "ring").symlink_to(tmp_path)
    (tmp_path / "self.py").symlink_to(tmp_path / "self.py")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    for skipped in (*sorted(SKIPPED_FOLDERS), "my_env"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "bad.py").write_text("def f(:", encoding="utf-8")
    (tmp_path / "my_env" / "pyvenv.cfg").touch()
    (tmp_path / "z.py").write_text("def f(:", encoding="utf-8")
    found = scan_source(tmp_path)
    assert [(f.rule, Path(f.path).name) for f in found] == [("DSK000", n) for n in ("gone.py", "pipe.py", "self.py", "z.py")]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0)
    (tmp_path / "b.py").write_text("x = 1", encoding="utf-8")
    (tmp_path / "b.py").chmod(0)
    assert [f.message for f in scan_source(tmp_path)] == ["this file cannot be read: Permission denied"] * 2
    (tmp_path / "a").chmod(0o700)


def test_a_missing_path_is_an_error(tmp_path):
    for function in (scan_source, fix_source):
        with pytest.raises(FileNotFoundError, match="no file or folder"): function(tmp_path / "no")
        with pytest.raises(ValidationError, match="no rule 'DSK9'"): function(tmp_path, select=["DSK9"])


HEAVY = "print({'torch', 'transformers', 'diffusers', 'huggingface_hub', 'numpy'} & set(sys.modules))"


def test_nothing_is_executed_or_imported(tmp_path, scan):
    code = f"import os, sys\nopen({str(tmp_path / 'ran')!r}, 'w')\nimport torch, no_such_module\nraise SystemExit"
    assert scan(code) == [] and not (tmp_path / "ran").exists()
    run = f"import sys; from devsky_nb import scan_source; scan_source({str(ROOT / 'devsky_nb' / 'device.py')!r}); {HEAVY}"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
