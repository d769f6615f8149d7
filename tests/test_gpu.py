"What `make gpu` asks of a GPU, asked of the CPU and of a pretended GPU with the small models."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from patience import PATIENCE

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
SECTIONS = ("environment", "layers", "memory", "loaders", "across", "generation", "small_cards", "monitor", "speed", "clip", "registry",
            "second_gpu",
            "leaks")


def gpu(*options, out=None):
    "A run; its results."
    command = [sys.executable, str(SCRIPT), *options] + (["--out", str(out)] if out else [])
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})


def failed(out):
    return [f"{result['section']}: {result['name']}: {result['value']}" for result in json.loads(out.read_text(encoding="utf-8"))["results"] if result["status"] == "FAIL"]


@pytest.mark.slow
def test_it_runs_on_the_cpu_and_writes_what_it_saw(tmp_path):
    out = tmp_path / "gpu.json"
    done = gpu("--dry-run", "--only", "registry", out=out)
    told = json.loads(out.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert told["device"] == "cpu" and told["counts"]["PASS"] >= 3 and failed(out) == []
    assert {result["section"] for result in told["results"]} == {"registry"}


def test_a_section_that_is_not_there_is_said():
    done = gpu("--dry-run", "--only", "nonsense")
    assert done.returncode == 1 and "no section nonsense: there are environment" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_every_check_holds_on_a_pretended_gpu(section, tmp_path):
    done = gpu("--pretend", "--only", section, out=tmp_path / "gpu.json")
    assert failed(tmp_path / "gpu.json") == [] and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_check_holds_on_the_cpu(tmp_path):
    done = gpu("--dry-run", "--skip", "leaks", out=tmp_path / "gpu.json")
    assert failed(tmp_path / "gpu.json") == [] and done.returncode == 0, done.stdout + done.stderr
