"""Files made to keep a scan busy or to fill the memory. Each ends in time, within bounds, with a finding for what was not read.

What is measured is processor time and the memory of a process of its own; the bounds are far above what is needed, since what they
tell apart is minutes and gigabytes.
"""
import json, os, random, resource, subprocess, sys
from pathlib import Path

import pytest
from patience import PATIENCE

from devsky_nb.doctor import flow
from devsky_nb.doctor.scan import fix_source, scan_source

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import torch\nfrom transformers import CLIPModel\nimport diffusers as d\n"
LOAD = "d.FluxPipeline.from_pretrained('a/b', torch_dtype='float16')"
WORDS = ["x", "(", ")", "[", "]", "{", "}", "'", '"', "\n", "\n%", "\n!", " ", "=", "%", "!", "?", "#", "\\", ":", "def ", "if ", "```"]


def lines(form, size):
    "A numbered line, again and again, up to a size."
    count = size // len(form.format(10_000)) + 1
    return "".join(form.format(i) for i in range(count))


def cells(*sources):
    return json.dumps({"cells": [{"cell_type": "code", "metadata": {}, "source": s} for s in sources], "metadata": {}})


def keys(count):
    return ", ".join(f"'k{i}': {i}" for i in range(count))


def callers(depth, width, form):
    "Functions that call each other in many ways."
    bodies = "".join(f"def f{i + 1}(x):\n" + "".join(form.format(call=f"f{i}(x)", k=k, i=i) for k in range(width)) for i in range(depth))
    return f"{HEAD}m = CLIPModel.from_pretrained('a')\ndef f0(x): return m(x)\n{bodies}for x in y: f{depth}(x)\n"


def soup(size):
    return "import torch\n" + "".join(random.Random(size).choice(WORDS) for _ in range(size // 2))


def repeated(line, extra=""):
    return lambda size: HEAD + extra + lines(line, size)


# name -> (ending, what makes the text of a size)
ATTACKS = {
    "fences": (".md", lambda n: "torch\n" + "```py\nx\n```\n" * (n // 12)),
    "broken fences": (".md", lambda n: "torch\n" + "```py\ndef f(:\n```\n" * (n // 18)),
    "a fence of spaces": (".md", lambda n: "torch\n```" + " " * n + "`"),
    "fences of spaces": (".md", lambda n: "torch\n" + ("```" + " " * 1000 + "`\n") * (n // 1000)),
    "sessions": (".md", lambda n: "torch\n```py\n" + ">>> f(\n" * (n // 7)),
    "magics": (".ipynb", lambda n: cells(HEAD + "%time x = f()\n" * (n // 14))),
    "commands": (".ipynb", lambda n: cells(HEAD + "!ls it's\n" * (n // 9))),
    "words": (".ipynb", lambda n: cells(HEAD + "cd ..\n" * (n // 6))),
    "questions": (".ipynb", lambda n: cells(HEAD + "(\n?\n" * (n // 4))),
    "unknown magics": (".ipynb", lambda n: cells("%%foo\n" * (n // 6))),
    "languages": (".ipynb", lambda n: cells("%sql a\n" * (n // 7))),
    "cells": (".ipynb", lambda n: cells(*["import torch\n!ls\n"] * (n // 70))),
    "programs in cells": (".ipynb",
                          lambda n: cells(*[f"%%writefile a.py\nimport torch\no = {{{keys(200)}}}\n" + "f(**o)\n" * 500] * (n // 6000))),
    "findings in a cell": (".ipynb", lambda n: cells(HEAD + f"{LOAD}\n" * (n // 60))),
    "findings in many cells": (".ipynb", lambda n: cells(*[HEAD + LOAD] * (n // 190))),
    "escapes in a cell": (".ipynb", lambda n: cells(HEAD + "x = '" + "é\\\"" * (n // 8) + "'\n" + f"{LOAD}\n" * 20)),
    "a deep notebook": (".ipynb", lambda n: "[" * n),
    "a long number": (".ipynb", lambda n: '{"cells": [], "n": ' + "1" * n + "}"),
    "findings": (".py", repeated(LOAD + "\n")),
    "findings in a line": (".py", lambda n: HEAD + f"{LOAD};" * (n // 60)),
    "findings in a wide line": (".py", lambda n: HEAD + "'é';" + f"{LOAD};".replace("a/b", "é/b") * (n // 60) + "  # noqa: E501"),
    "names": (".py", repeated("a{0} = 1\n")),
    "attributes": (".py", repeated("a.b{0} = 1\na.b{0} = 2\n")),
    "branches": (".py", repeated("if x: a{0} = 1\nelse: a{0} = 2\n")),
    "names and branches": (".py", lambda n: HEAD + lines("a{0} = 1\n", n // 2) + "if x: y = 1\n" * (n // 24)),
    "conditions": (".py", repeated("if x: x = f(x)\n", "x = None\n")),
    "elif": (".py", lambda n: HEAD + ("if x: pass\n" + "elif x == 1: y = 1\n" * 500) * (n // 9500)),
    "cases": (".py", lambda n: HEAD + "match x:\n" + lines(" case {0}: a{0} = 1\n", n)),
    "tries": (".py", repeated("try: a{0} = f()\nexcept E: pass\n")),
    "handlers": (".py", lambda n: HEAD + "try:\n" + " f()\n" * (n // 15) + "except Exception:\n pass\n" * (n // 45)),
    "imports": (".py", repeated("import a{0}\n")),
    "classes": (".py", repeated("class A{0}:\n def f(self): 0\n")),
    "a chain of classes": (".py", lambda n: HEAD + "class A0: pass\n" + "".join(f"class A{i + 1}(A{i}, A{i}): pass\n" for i in range(n // 35))),
    "methods": (".py", repeated(" def f{0}(self): self.x = self.y\n", "class A:\n")),
    "calls that double": (".py", lambda n: HEAD + "def f0(x): return x\n" + "".join(f"def f{i + 1}(x): return [f{i}(x), f{i}(x)]\n" for i in range(n // 45))),
    "many calls": (".py", lambda n: HEAD + "def f(x):\n" + " torch.load(x)\n" * (n // 30) + "f(1)\n" * (n // 10)),
    "many results": (".py", lambda n: HEAD + "def f(x):\n" + lines(" if a: return x + {0}\n", n // 2) + "f(1)\n" * (n // 10)),
    "keywords": (".py", repeated("f(**o)\n", f"o = {{{keys(250)}}}\n")),
    "positions": (".py", repeated("f(*o)\n", f"o = [{'1, ' * 250}]\n")),
    "a dict that grows": (".py", repeated("d['k{0}'] = 1\n", "d = {{}}\n".format())),
    "a wide dict": (".py", lambda n: HEAD + f"d = {{{keys(n // 30)}}}\n" + "d['a'] = 1\n" * (n // 22)),
    "dicts that double": (".py", lambda n: HEAD + "d = {'x': 1}\ne = {'x': 2}\n" + "d = {'a': d, 'b': d}\ne = {'a': e, 'b': e}\n" * 60 + "x = d if c else e\n" * (n // 18)),
    "dicts that meet": (".py", lambda n: HEAD + f"d = {{{keys(250)}}}\ne = {{{keys(250).replace(': ', ': -')}}}\n" + "x = d if c else e\n" * (n // 18)),
    "a name that grows": (".py", repeated("x = x.a\n", "x = torch\n")),
    "values that double": (".py", lambda n: HEAD + "x = CLIPModel.from_pretrained('a').get_image_features(1)\n" + "x = x * x\n" * 300 + "x @ x\n" * (n // 6)),
    "choices that double": (".py", lambda n: HEAD + "m = CLIPModel.from_pretrained('a')\n" + "m = m.to(1) if c else m.cpu()\n" * (n // 60) + "m(1)\n" * (n // 10)),
    "objects that change": (".py", lambda n: HEAD + "m = CLIPModel.from_pretrained('a')\n" + "m = m.to(1) if c else m.cpu()\nm(1)\n" * (n // 36)),
    "ways to a call": (".py", lambda n: callers(7, 20, " {call}\n")),
    "managers on the ways": (".py", lambda n: callers(7, 20, " with torch.a{i}.b{k}(): {call}\n")),
    "decorators": (".py", lambda n: HEAD + lines("@torch.d{0}\n", n) + "def f(): g()\n"),
    "context managers": (".py", lambda n: HEAD + "with " + ", ".join(f"torch.a{i}()" for i in range(n // 30)) + ":\n" + " f()\n" * (n // 10)),
    "changes in place": (".py", lambda n: HEAD + lines("a{0} = f()\n", n // 2) + "a1.div_(2)\n" * (n // 22)),
    "a guard of thousands": (".py", lambda n: HEAD + "if [" + "1, " * (n // 12) + "]:\n" + " q.enable_vae_tiling()\n" * (n // 40)),
    "a pickle of thousands": (".py", lambda n: HEAD + "import pickle\ndef f(x): pickle.load([x, " + "1, " * (n // 12) + "])\n" + lines("f({0})\n", n // 2)),
    "a long text": (".py", lambda n: HEAD + f"d.FluxPipeline.from_pretrained('a/{'b' * n}', torch_dtype='{'c' * n}')"),
    "fields of a text": (".py", lambda n: HEAD + "x = f'''" + "xxxxxxxx{a}" * (n // 11) + "'''"),
    "brackets": (".py", lambda n: HEAD + "(" * 5000 + ")" * 5000),
    "classes in classes": (".py", lambda n: HEAD + "".join(" " * i + f"class A{i}:\n" for i in range(1400))),
    "an operator": (".py", lambda n: HEAD + "x = " + "a + " * (n // 4) + "b"),
    "calls of calls": (".py", lambda n: HEAD + "x = f" + "()" * (n // 2)),
    "a line": (".py", lambda n: "#" * n + "\nimport torch"),
    "comments": (".py", lambda n: HEAD + "x = 1 " + "#noqa:a" * (n // 7)),
    "statements": (".py", lambda n: HEAD + "x;" * (n // 2)),
    "numbers": (".py", lambda n: HEAD + "x = [" + "1, " * (n // 3) + "]"),
    "words at random": (".py", soup), "cells at random": (".ipynb", lambda n: cells(soup(n), soup(n // 2))),
    "a document at random": (".md", soup),
}


def text_of(name, size):
    ending, make = ATTACKS[name]
    return ending, make(size)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_of_small_size_ends(name, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "MAX_STEPS", 20_000)
    monkeypatch.setattr(flow, "MAX_REPEATED", 1_000)
    ending, text = text_of(name, 12_000)
    (tmp_path / f"a{ending}").write_text(text, encoding="utf-8")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    found = scan_source(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - used < 10
    assert {f.rule for f in found} <= {"DSK000", "DSK001", "DSK011", "DSK020", "DSK022", "DSK030", "DSK031", "DSK033", "DSK042", "DSK043",
                                       "DSK050", "DSK052"}


MEASURE = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import resident, test_hostile
from devsky_nb.doctor.scan import scan_source
folder = Path({folder!r})
for name in {names!r}:
    ending, text = test_hostile.text_of(name, {size})
    path = folder / f"a{{ending}}"
    path.write_text(text, encoding="utf-8")
    del text
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    scan_source(path)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    path.unlink()
    print(name, used, resident.peak() >> 20, sep="|", flush=True)
"""
BATCH = 11


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000_000, 420_000, 220_000])  # the largest are not parsed at all if they are all words
@pytest.mark.parametrize("first", range(0, len(ATTACKS), BATCH))
def test_a_megabyte_of_an_attack_stays_within_bounds(first, size, tmp_path):
    names = [*ATTACKS][first:first + BATCH]
    here = Path(__file__).parent
    program = MEASURE.format(root=str(ROOT), tests=str(here.parent), here=str(here), folder=str(tmp_path), names=names, size=size)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = [line.split("|") for line in done.stdout.splitlines()]
    assert [name for name, *_ in measured] == names
    assert [row for row in measured if float(row[1]) > 20 or int(row[2]) > 900] == [], "seconds of the processor, MiB at most so far"


def test_what_is_too_much_is_said(tmp_path):
    says = {("programs in cells", 60_000): "takes more than 500,000 steps", ("statements", 620_000): "more than 250,000 words and signs",
            ("fields of a text", 62_000): "a text of more than 2,000 fields"}
    for (name, size), reason in says.items():
        ending, text = text_of(name, size)
        path = tmp_path / f"a{ending}"
        path.write_text(text, encoding="utf-8")
        messages = [f.message for f in scan_source(path, select="DSK000")]
        assert messages and all(reason in message for message in messages), (name, messages[:3])


def test_what_comes_before_a_limit_is_checked(scan):
    text = HEAD + LOAD + f"\no = {{{keys(250)}}}\n" + "f(**o)\n" * 3_000
    assert scan(text) == [("DSK050", 4), ("DSK020", 4), ("DSK022", 4), ("DSK000", 2005)]


# ---- encodings ----

NO_ENCODINGS = ["rot13", "zlib", "hex", "base64", "bz2", "quopri", "uu", "undefined", "punycode", "idna", "unicode_escape",
                "raw_unicode_escape",
                "string-escape", "os", "../../x", "klingon", "mbcs-x", "a" * 5000, "utf-16", "utf-32"]


@pytest.mark.parametrize("name", NO_ENCODINGS, ids=lambda name: name[:12])
def test_encodings_that_are_none(name, tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(f"# coding: {name}\nimport torch\n".encode() + b"x = 1\n" * 100_000)
    [finding] = scan_source(path)
    assert finding.rule == "DSK000" and ("no usable encoding" in finding.message or "is not utf" in finding.message), finding.message
    assert len(finding.message) < 300 and fix_source(path) == []


@pytest.mark.parametrize("name", ["latin-1", "cp1252", "utf-7", "cp037", "iso2022_jp", "utf-8-sig"])
def test_unusual_encodings_are_read_or_refused_and_never_changed(name, tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(f"# coding: {name}\nimport torch\nx = 'a+b'\n".encode())
    before = path.read_bytes()
    assert {f.rule for f in scan_source(path)} <= {"DSK000"} and fix_source(path) == [] and path.read_bytes() == before


# ---- folders ----

@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_links_pipes_and_devices(tmp_path):
    top, outside = tmp_path / "top", tmp_path / "outside"
    for folder in (top / "inside", outside): folder.mkdir(parents=True)
    (outside / "bad.py").write_text("def f(:", encoding="utf-8")
    (top / "out").symlink_to(outside)
    (top / "in").symlink_to(top / "inside")
    (top / "ring").symlink_to(top)
    (top / "a").symlink_to(top / "b")
    (top / "b").symlink_to(top / "a")
    (top / "zero.py").symlink_to("/dev/zero")
    (top / "random.ipynb").symlink_to("/dev/urandom")
    (top / "loop.py").symlink_to(top / "loop.py")
    os.mkfifo(top / "pipe.md")
    found = {Path(f.path).name: (f.rule, f.severity) for f in scan_source(top)}
    error = ("DSK000", "error")
    assert found == {"out": ("DSK000", "info"), "zero.py": error, "random.ipynb": error, "loop.py": error, "pipe.md": error}


@pytest.mark.slow
def test_folders_that_are_deep(tmp_path):
    folders = [tmp_path]
    for _ in range(1100): folders.append(folders[-1] / "d")
    for folder in folders[1:]: folder.mkdir()
    program = folders[-1] / "a.py"
    program.write_text("def f(:", encoding="utf-8")
    try: assert [f.rule for f in scan_source(tmp_path)] == ["DSK000"]
    finally:  # deeper than `shutil.rmtree` can go
        program.unlink()
        for folder in folders[:0:-1]: folder.rmdir()
