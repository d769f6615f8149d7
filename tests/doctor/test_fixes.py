"What `fix_source` writes, and that it writes nothing else."
import json, os, shutil, stat, subprocess

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from devsky_nb.doctor.scan import fix_source, scan_source
from devsky_nb.errors import DevSkyyError, ValidationError

FIXABLE = """\
import torch as th
from diffusers import (DiffusionPipeline,   # odd   spacing
    StableDiffusionXLPipeline)
pipe = DiffusionPipeline.from_pretrained(x, "é", torch_dtype = 'float16' ,  # é
                                         safety_checker=None)
pipe.enable_vae_tiling();  pipe . disable_vae_slicing ( )
"""
FIXED = (FIXABLE.replace("torch_dtype = 'float16'", "dtype = th.float16")
         .replace("pipe.enable_vae_tiling()", "pipe.vae.enable_tiling()")
         .replace("disable_vae_slicing ( )", "vae.disable_slicing ( )"))

ENCODINGS = {
    "plain": lambda text: text.encode(),
    "bom": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "latin-1": lambda text: ("# -*- coding: latin-1 -*-\n" + text).encode("latin-1"),
    "no end": lambda text: text.rstrip("\n").encode(),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_a_fix_changes_what_it_names_and_nothing_else(encode, tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes(encode(FIXABLE))
    file.chmod(0o751)
    assert [f.rule for f in fix_source(file)] == ["DSK020", "DSK022", "DSK031", "DSK031"]
    assert file.read_bytes() == encode(FIXED)
    assert stat.S_IMODE(file.stat().st_mode) == 0o751 and [p.name for p in tmp_path.iterdir()] == ["a.py"]
    before = file.stat().st_mtime_ns
    assert fix_source(file) == [] and file.stat().st_mtime_ns == before and scan_source(file) == []


STYLES = [dict(indent=1, ensure_ascii=False), dict(indent=4, ensure_ascii=True), dict(separators=(",", ":"))]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("as_lines", [True, False])
def test_a_fix_leaves_the_rest_of_a_notebook_alone(style, as_lines, tmp_path):
    def stored(text):
        return text.splitlines(keepends=True) if as_lines else text

    output = new_output("stream", text="torch_dtype 😀\n")
    cells = [new_markdown_cell("torch_dtype=é"), new_code_cell(FIXABLE, id="keep-me", outputs=[output]),
             new_code_cell("!pip install x\n%time pipe.enable_vae_slicing()  # é\nout = %timeit -o -n 3 pipe.enable_vae_tiling()")]
    nb = json.loads(nbformat.writes(new_notebook(cells=cells)))
    for cell in nb["cells"]: cell["source"] = stored("".join(cell["source"]))
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps(nb, **style) + "\n\n", encoding="utf-8")
    assert len(fix_source(file)) == 6
    nb["cells"][1]["source"] = stored(FIXED)
    magics = "!pip install x\n%time pipe.vae.enable_slicing()  # é\nout = %timeit -o -n 3 pipe.vae.enable_tiling()"
    nb["cells"][2]["source"] = stored(magics)
    assert file.read_text(encoding="utf-8") == json.dumps(nb, **style) + "\n\n"
    assert fix_source(file) == []


SESSION = """\
```py
>>> import diffusers as d
>>> d.FluxPipeline.from_pretrained(
...     x, torch_dtype=y
... )
```
"""


def document(code, session):
    "A text with a block in a list, and a session."
    indented = "".join(f"  {line}\n" for line in code.splitlines())
    return f"Text `torch_dtype=x`.\n\n- item:\n\n  ```python\n{indented}  ```\n\n{session}"


def test_a_fix_in_a_document(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(document(FIXABLE, SESSION), encoding="utf-8")
    assert len(fix_source(file)) == 5
    assert file.read_text(encoding="utf-8") == document(FIXED, SESSION.replace("torch_dtype=y", "dtype=y"))


def test_a_diff_can_be_applied_with_patch(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(FIXABLE, encoding="utf-8")
    found = [f for f in scan_source(file) if f.diff]
    assert found and all(f.diff.splitlines()[2].startswith(f"@@ -{f.line} +{f.line} @@") for f in found)
    if not shutil.which("patch"): return
    first = next(f for f in found if f.rule == "DSK020")
    command = ["patch", "-p0", str(file)]
    subprocess.run(command, input=first.diff + "\n", encoding="utf-8", check=True, capture_output=True)
    assert "dtype = 'float16'" in file.read_text(encoding="utf-8") and "torch_dtype" not in file.read_text(encoding="utf-8")


def test_a_file_with_an_unreadable_part_is_not_fixed(tmp_path):
    file = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(FIXABLE), new_code_cell("def f(:")]), file)
    before = file.read_bytes()
    assert fix_source(file) == [] and file.read_bytes() == before


def test_a_link_is_fixed_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "a.py", tmp_path / "b.py"
    real.write_text(FIXABLE, encoding="utf-8")
    link.symlink_to(real)
    assert fix_source(link) and link.is_symlink() and real.read_text(encoding="utf-8") == FIXED


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(FIXABLE, encoding="utf-8")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DevSkyyError, match="cannot write a.py .*No space left on device"): fix_source(tmp_path / "a.py")
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == FIXABLE and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root writes everything")
def test_a_write_protected_file_is_refused(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(FIXABLE, encoding="utf-8")
    file.chmod(0o444)
    with pytest.raises(DevSkyyError, match="write-protected"): fix_source(file)
    assert file.read_text(encoding="utf-8") == FIXABLE


def test_a_rule_can_be_named_by_itself(tmp_path):
    file = tmp_path / "shop.py"
    file.write_text("from diffusers import FluxPipeline\nFluxPipeline.from_pretrained(x, torch_dtype='bfloat16')\n", encoding="utf-8")
    rules = {finding.rule for finding in scan_source(path=file)}
    assert {"DSK020"} < rules
    assert {finding.rule for finding in scan_source(file, select="DSK020")} == {"DSK020"}
    assert {finding.rule for finding in scan_source(file, ignore="DSK020")} == rules - {"DSK020"}
    for wrong in ("E501", 5, None, [5]):
        with pytest.raises(ValidationError, match="no rule"): scan_source(file, select=wrong)
    assert {finding.rule for finding in fix_source(path=file, select="DSK020")} == {"DSK020"}
