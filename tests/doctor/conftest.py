import contextlib, io, subprocess

import pytest

from devsky_nb.cli import main
from devsky_nb.doctor.scan import scan_source


@pytest.fixture
def scan(tmp_path):
    "Scan a piece of code, and say which rules apply in which lines."
    def run(code, name="code.py", **kwargs):
        (tmp_path / name).write_text(code, encoding="utf-8")
        return [(f.rule, f.line) for f in scan_source(tmp_path / name, **kwargs)]
    return run


@pytest.fixture
def devsky():
    "Run `devsky doctor` in this process, as a terminal in that folder would see it."
    def run(*args, cwd):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: status = main(["doctor", *map(str, args)])
            except SystemExit as e: status = e.code
        return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())
    return run
