"`devsky doctor`: what it writes for a person, a program and GitHub, in any locale, and its exit status."
import json, os, re, subprocess, sys
from pathlib import Path

import nbformat, pytest, yaml
from nbformat.v4 import new_code_cell, new_notebook

from devsky_nb.doctor.environment import ENVIRONMENT_RULES
from devsky_nb.doctor.findings import REPORT_FORMATS
from devsky_nb.doctor.scan import SOURCE_RULES

ROOT = Path(__file__).resolve().parents[2]
SHOP = """\
import diffusers
pipe = diffusers.FluxPipeline.from_pretrained('a/b', torch_dtype=dtype, trust_remote_code=True)
"""


def test_codes_of_all_rules_differ():
    codes = [rule.code for rule in (*SOURCE_RULES, *ENVIRONMENT_RULES)]
    assert codes == sorted(set(codes)) and len(SOURCE_RULES) == 31


def test_sarif_has_what_github_requires(tmp_path, devsky):
    twice = SHOP + SHOP.splitlines()[1] + "\n"
    (tmp_path / os.fsdecode("ä b.py".encode())).write_text(twice, encoding="utf-8")
    (tmp_path / "bad.py").write_text("def f(:", encoding="utf-8")
    nbformat.write(new_notebook(cells=[new_code_cell(SHOP)]), tmp_path / "a.ipynb")
    done = devsky(".", "--source", "--format", "sarif", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    log = json.loads(done.stdout)
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    [run] = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] and [r["id"] for r in rules] == sorted(r["id"] for r in rules)
    for rule in rules:
        assert rule["shortDescription"]["text"] and rule["fullDescription"]["text"] and rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] and result["message"]["text"]
        assert result["level"] in ("note", "warning", "error")
        place = result["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[\w./%-]+", place["artifactLocation"]["uri"])
        assert place["region"]["startLine"] >= 1 and place["region"]["startColumn"] >= 1
    fingerprints = [r["partialFingerprints"]["devskyDoctor/v1"] for r in run["results"]]
    assert len(fingerprints) == len(set(fingerprints)) == 10
    places = [r["locations"][0]["physicalLocation"] for r in run["results"]]
    lines = [p["region"]["startLine"] for p in places if "ipynb" in p["artifactLocation"]["uri"]]
    notebook = (tmp_path / "a.ipynb").read_text(encoding="utf-8").splitlines()
    assert lines and all("from_pretrained" in notebook[n - 1] for n in lines)
    columns = {p["region"]["startColumn"] for p in places if "ipynb" in p["artifactLocation"]["uri"]}
    assert columns == {1}  # a column of the cell is none of the file


def test_github_annotations_cannot_be_forged(tmp_path, devsky):
    evil = tmp_path / "a,title=x::b%0A.py"
    evil.write_text(SHOP, encoding="utf-8")
    done = devsky(evil.name, "--source", "--format", "github", "--select", "DSK051", cwd=tmp_path)
    assert done.stdout.startswith("::warning file=a%2Ctitle=x%3A%3Ab%250A.py,line=2,col=") and done.stdout.count("\n") == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are bytes")
def test_names_and_texts_that_are_no_unicode(tmp_path, devsky):
    (tmp_path / os.fsdecode(b"\xff.py")).write_text(SHOP, encoding="utf-8")
    cell = '{"cells": [{"cell_type": "code", "source": "x = \'\\ud800\'"}]}'
    (tmp_path / "a.ipynb").write_text(cell, encoding="utf-8")
    for form in REPORT_FORMATS:
        done = devsky(".", "--source", "--format", form, cwd=tmp_path)
        assert done.returncode == 1 and "DSK000" in done.stdout and "DSK051" in done.stdout and done.stdout.encode()
    assert devsky(".", "--source", "--fix", cwd=tmp_path).stderr == ".: 1 fixed\n"


CAFE = """\
import diffusers
café = diffusers.FluxPipeline.from_pretrained(x, torch_dtype="größe")
"""
PROGRAM = "import sys; from devsky_nb.cli import main; sys.exit(main(sys.argv[1:]))"


OPTIONS = [*(["--format", form] for form in REPORT_FORMATS), ["--json"], ["--diff"], ["--rules"]]
ALL_REPORTS = """
import json, sys
from pathlib import Path
from devsky_nb.cli import main
out, encoding, reports = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for number, options in enumerate(reports):
    with open(out / f"{number}", "w", encoding=encoding) as sys.stdout: status = main(["doctor", ".", "--source", *options])
    if status != (0 if options == ["--rules"] else 1): sys.exit(f"{options}: {status}")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_report_can_be_written_to_any_terminal(encoding, tmp_path):
    out, tmp_path = tmp_path / "out", tmp_path / "shop"
    for folder in (out, tmp_path): folder.mkdir()
    (tmp_path / "file.py").write_text(CAFE, encoding="utf-8")
    utf8_name = os.fsdecode("名.py".encode())
    (tmp_path / utf8_name).write_text("from diffusers import CLIPModel\n", encoding="utf-8")
    command = [sys.executable, "-c", ALL_REPORTS, str(out), encoding, json.dumps(OPTIONS)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    for number, options in enumerate(OPTIONS):
        text = (out / f"{number}").read_bytes().decode(encoding)
        if "json" in options[-1]: assert {"file.py", "名.py"} == {f["path"] for f in json.loads(text)}
        if "sarif" in options:
            results = json.loads(text)["runs"][0]["results"]
            assert {"DSK020", "DSK022", "DSK040"} == {result["ruleId"] for result in results}
        if options == ["--diff"]: assert (r"caf\xe9" if encoding == "ascii" else "café") in text
        if options[-1] in ("text", "github"): assert (r"gr\xf6\xdfe" if encoding == "ascii" else "größe") in text


def test_the_c_locale_is_enough(tmp_path):
    (tmp_path / "file.py").write_text(CAFE, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    env |= {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for options in (["--format", "text"], ["--format", "github"], ["--diff"]):
        command = [sys.executable, "-c", PROGRAM, "doctor", ".", "--source", *options]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        assert (done.returncode, done.stderr) == (1, b""), options
        assert rb"\xe9" in done.stdout or rb"\xf6" in done.stdout


# ---- exit status and streams ----

def write_examples(folder):
    (folder / "good.py").write_text("x = 1\n", encoding="utf-8")
    (folder / "note.py").write_text("import transformers as t\nt.AutoModel.from_pretrained('a/b')\n", encoding="utf-8")
    (folder / "bad.py").write_text(SHOP, encoding="utf-8")


STATUSES = [
    (["good.py"], 0), (["note.py"], 0), (["bad.py"], 1), ([], 1), (["good.py", "bad.py"], 1),
    (["note.py", "--select", "DSK050"], 1),
    (["bad.py", "--ignore", "DSK051,DSK050", "--ignore", "DSK020"], 0),
    (["no-such.py"], 2), (["--select", "E501"], 2), (["--select", ""], 2), (["--format", "xml"], 2),
]


@pytest.mark.parametrize("arguments, status", STATUSES, ids=[" ".join(arguments) for arguments, _ in STATUSES])
def test_exit_status(arguments, status, tmp_path, devsky):
    write_examples(tmp_path)
    assert devsky("--source", *arguments, cwd=tmp_path).returncode == status


def test_wrong_usage_of_the_machine_checks(tmp_path, devsky):
    assert devsky("--environment", ".", cwd=tmp_path).returncode == 2
    assert devsky("--budget", "much", "--plan", "tiny-clip", "--environment", cwd=tmp_path).returncode == 2
    (tmp_path / "model").mkdir()
    config = {"model_type": "clip", "auto_map": {"AutoModel": "evil.Evil"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for model, says in (("tiny-clap", "did you mean 'tiny-clip'?"), (tmp_path / "model", "config.json"), (tmp_path, "no model in")):
        done = devsky("--environment", "--select", "DSK108", "--plan", model, cwd=tmp_path)
        assert done.returncode == 2 and says in done.stderr and done.stdout == ""


def test_streams(tmp_path, devsky):
    write_examples(tmp_path)
    as_json = devsky("--source", "--json", "bad.py", cwd=tmp_path).stdout
    assert {f["rule"] for f in json.loads(as_json)} == {"DSK020", "DSK050", "DSK051"}
    assert "-pipe" in devsky("--source", "--diff", "bad.py", cwd=tmp_path).stdout
    assert (tmp_path / "bad.py").read_text(encoding="utf-8") == SHOP
    fixed = devsky("--source", "--fix", "bad.py", cwd=tmp_path)
    assert fixed.stderr == "bad.py: 1 fixed\n" and "torch_dtype" not in (tmp_path / "bad.py").read_text(encoding="utf-8")
    assert "DSK061" in devsky("--rules", cwd=tmp_path).stdout and "DSK111" in devsky("--rules", cwd=tmp_path).stdout


def test_the_hook_is_a_command_that_exists(tmp_path, devsky):
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {"id", "name", "entry", "language", "types_or"} <= set(hook)
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    command = hook["entry"].split()
    assert command[:2] == ["devsky", "doctor"] and devsky(*command[2:], "a.py", cwd=tmp_path).returncode == 0
