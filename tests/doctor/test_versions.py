"The versions that a project states decide which rules are about it."
import json, os

import pytest

from devsky_nb.doctor.scan import fix_source, scan_source
from devsky_nb.errors import ValidationError

OLD = """\
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPModel, CLIPTextModel
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
pipe.enable_vae_tiling()
model = CLIPModel.from_pretrained(folder)
features = model.get_image_features(**inputs)
features = features / features.norm(dim=-1, keepdim=True)
CLIPTextModel.from_pretrained(folder).text_model
"""
OF_DIFFUSERS = {("DSK020", "info"), ("DSK031", "error")}
OF_TRANSFORMERS = {("DSK043", "error"), ("DSK044", "error")}
ALL = OF_DIFFUSERS | OF_TRANSFORMERS


def project(folder, files):
    "A project with these files, and the old code in a folder within."
    (folder / ".git").mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "src" / "shop").mkdir(parents=True, exist_ok=True)
    (folder / "src" / "shop" / "load.py").write_text(OLD, encoding="utf-8")
    return folder / "src"


def found(path, **kwargs):
    return {(f.rule, f.severity) for f in scan_source(path, ignore=["DSK050", "DSK024"], **kwargs) if f.rule != "DSK000"}


OLD_TRANSFORMERS = {
    "pep 621": {"pyproject.toml": '[project]\nname = "shop"\ndependencies = ["transformers[torch] >=4.40, <5; python_version >= \'3.9\'"]'},
    "optional": {"pyproject.toml": '[project]\nname = "shop"\n[project.optional-dependencies]\nml = ["Transformers~=4.57"]'},
    "dependency group": {"pyproject.toml": '[dependency-groups]\nml = ["transformers==4.57.1", {include-group = "x"}]'},
    "poetry": {"pyproject.toml": '[tool.poetry.dependencies]\npython = "^3.11"\ntransformers = "^4.40"'},
    "poetry table": {"pyproject.toml": '[tool.poetry.group.ml.dependencies]\ntransformers = {version = "~4.57", extras = ["torch"]}'},
    "pixi": {"pixi.toml": '[dependencies]\ntransformers = ">=4.40,<5"'},
    "uv constraints": {"pyproject.toml": '[project]\ndependencies = ["transformers"]\n[tool.uv]\nconstraint-dependencies = ["transformers<5"]'},
    "setup.cfg": {"setup.cfg": "[options]\ninstall_requires =\n    torch\n    transformers>=4.40,<5\n"},
    "setup.cfg extra": {"setup.cfg": "[options.extras_require]\nml =\n    transformers<5\n"},
    "setup.py": {"setup.py": "from setuptools import setup\nsetup(install_requires=['transformers<5', 'torch'])"},
    "setup.py table": {"setup.py": "deps = dict(a='transformers>=4.40,<5')\nsetup(install_requires=[deps['a']])"},
    "requirements": {"requirements.txt": "# x\n-i https://example.org\ntransformers==4.57.1 \\\n  --hash=sha256:00  # y\n"},
    "other requirements": {"requirements-gpu.txt": "transformers<5\n"},
    "included": {"requirements.txt": "-r reqs/ml.txt\n", "reqs/ml.txt": "transformers<5\n-r ../requirements.txt\n"},
    "constraints": {"requirements.txt": "transformers\n-c constraints.txt", "constraints.txt": "transformers==4.57.*"},
    "conda": {"environment.yml": "dependencies:\n  - python=3.11\n  - conda-forge::transformers=4.57\n  - pip\n"},
    "conda pip": {"environment.yaml": "dependencies:\n- pip:\n  - transformers<5\n- torch\n"},
    "uv.lock": {"pyproject.toml": '[project]\ndependencies = ["transformers>=4.40"]',
                "uv.lock": 'version = 1\n\n[[package]]\nname = "transformers"\nversion = "4.57.1"\n'},
    "poetry.lock": {"poetry.lock": '[[package]]\nname = "transformers"\nversion = "4.57.1"\ndescription = "x"\n'},
    "pylock": {"pylock.toml": '[[packages]]\nname = "transformers"\nversion = "4.57.1"\n'},
    "Pipfile.lock": {"Pipfile.lock": json.dumps({"default": {"transformers": {"version": "==4.57.1"}}})},
    "nearer one": {"requirements.txt": "transformers>=5.6\n", "src/requirements.txt": "transformers<5\n"},
    "with a mark": {"requirements.txt": "\ufefftransformers<5\n"},
}


@pytest.mark.parametrize("files", OLD_TRANSFORMERS.values(), ids=OLD_TRANSFORMERS)
def test_a_project_of_an_old_version_gets_no_findings_about_the_new_one(files, tmp_path):
    assert found(project(tmp_path, files)) == OF_DIFFUSERS


BOTH = {("DSK043", "warning"), ("DSK044", "warning")}
RANGES = {"transformers": ALL, "transformers>=5.6": ALL, "transformers>=4.40": OF_DIFFUSERS | BOTH,
          "transformers<5.1": OF_DIFFUSERS | {("DSK043", "warning")}, "transformers<=5.0": OF_DIFFUSERS | {("DSK043", "warning")},
          "transformers==5.1": OF_DIFFUSERS | {("DSK043", "error")}, "diffusers<0.40": OF_TRANSFORMERS, "numpy<2": ALL,
          "transformers!=5.0": ALL, "transformers @ git+https://example.org/x": ALL, "diffusers==0.40": ALL,
          "transformers<5 ; python_version<'3.12'\ntransformers>=5.6 ; python_version>='3.12'": OF_DIFFUSERS | BOTH}


@pytest.mark.parametrize("requirement, expected", RANGES.items())
def test_a_range_with_both_gets_a_warning(requirement, expected, tmp_path):
    assert found(project(tmp_path, {"requirements.txt": requirement})) == expected


def test_findings_say_which_version_they_speak_of(tmp_path):
    [finding] = scan_source(project(tmp_path, {"requirements.txt": "diffusers>=0.30"}), select="DSK031")
    assert finding.message == "pipelines have no enable_vae_tiling any more (diffusers 0.40 and newer; this project allows >=0.30)"
    assert (finding.versions, finding.severity, finding.diff, finding.edits) == ("diffusers 0.40 and newer", "warning", "", ())
    assert finding.to_dict()["versions"] == "diffusers 0.40 and newer"
    [finding] = scan_source(tmp_path, select="DSK031", target={"diffusers": "0.41"})
    assert finding.message.endswith("any more (diffusers 0.40 and newer)") and finding.edits


def test_a_fix_is_made_only_where_the_new_form_exists(tmp_path):
    source = project(tmp_path, {"requirements.txt": "diffusers>=0.30"})
    assert fix_source(source) == [] and (source / "shop" / "load.py").read_text(encoding="utf-8") == OLD
    assert {f.rule for f in fix_source(source, target={"diffusers": "0.42"})} == {"DSK020", "DSK031"}


TARGETS = [({"transformers": "4.57"}, OF_DIFFUSERS), ({"transformers": "4.57", "diffusers": "<0.40"}, set()),
           ({"transformers": "5"}, ALL - {("DSK044", "error")} | {("DSK044", "warning")}), ({"transformers": ">=5.6"}, ALL), ({}, ALL)]


@pytest.mark.parametrize("target, expected", TARGETS)
def test_a_target_goes_before_what_is_stated(target, expected, tmp_path):
    (tmp_path / "a").mkdir()
    source = project(tmp_path / "a", {"requirements.txt": "transformers>=5.6"})
    assert found(source, target=target) == expected


@pytest.mark.parametrize("target",
                         [{"numpy": "2"}, {"torch": "new"}, {"torch": ""}, {"torch": None}, {"torch": 2.9}, {5: "2"},
                          {"torch": "9" * 5000}])
def test_a_wrong_target_is_one_error(target, tmp_path):
    with pytest.raises(ValidationError, match="target="): scan_source(tmp_path, target=target)
    with pytest.raises(ValidationError, match="target="): fix_source(tmp_path, target=target)


def test_the_command_takes_targets(tmp_path, devsky):
    source = project(tmp_path, {"requirements.txt": "torch"})
    both = devsky(source, "--source", "--json", "--target", "transformers=4.57", "--target", "diffusers<0.40", cwd=tmp_path)
    assert (both.returncode, json.loads(both.stdout)) == (0, [])
    assert devsky(source, "--source", cwd=tmp_path).returncode == 1
    for wrong in ("transformers", "4.57", "numpy=2", ""):
        assert devsky(source, "--source", "--target", wrong, cwd=tmp_path).returncode == 2, wrong


def test_the_flags_of_a_quantized_load_were_arguments_of_transformers_4_and_never_of_diffusers(tmp_path):
    code = "import diffusers, transformers\n" + "".join(
        f"{cls}.from_pretrained(x, load_in_8bit=True)\n"
        for cls in ("diffusers.FluxPipeline", "diffusers.AutoencoderKL", "transformers.AutoModel"))
    (tmp_path / "load.py").write_text(code, encoding="utf-8")
    lines = {version: [f.line for f in scan_source(tmp_path, target={"transformers": version})] for version in ("4.57", "5.6")}
    assert lines == {"4.57": [2, 3], "5.6": [2, 3, 4]}


def test_a_project_that_is_the_library_is_of_its_own_version(tmp_path):
    files = {"pyproject.toml": '[project]\nname = "transformers"\nversion = "4.57.0.dev0"\n', "requirements.txt": "diffusers<0.40"}
    assert found(project(tmp_path, files)) == set()


# ---- files that cannot be read ----

DAMAGED = {"pyproject.toml": "[project\n", "setup.cfg": "no section\n", "setup.py": "def f(:\n", "Pipfile.lock": "[" * 100_000,
           "pixi.toml": "a = " + "[" * 50_000, "uv.lock": '[[package]]\nname = "torch"\nversion = "' + "9" * 10_000 + '"\n'}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_a_finding_and_does_not_stop_the_scan(name, tmp_path):
    source = project(tmp_path, {"requirements.txt": "transformers<5", name: DAMAGED[name]})
    damaged = [f for f in scan_source(source) if f.rule == "DSK000"]
    assert [(f.severity, os.path.basename(f.path)) for f in damaged] == [("warning", name)]
    assert all("states versions and cannot be read" in f.message and "--target" in f.fix for f in damaged)
    assert found(source) == OF_DIFFUSERS


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml", "uv.lock", "environment.yml"])
def test_a_pipe_or_a_device_is_not_waited_for(name, tmp_path):
    source = project(tmp_path, {})
    os.mkfifo(tmp_path / name)
    (tmp_path / "setup.cfg").symlink_to("/dev/zero")
    assert [os.path.basename(f.path) for f in scan_source(source, select="DSK000")] == sorted([name, "setup.cfg"])


HOSTILE = {"requirements.txt": "-r requirements.txt\n" + "transformers>=4,<5," * 50_000 + "\n" + "a" * 900_000,
           "setup.py": "setup(" * 90 + ")" * 90 + "\n" + "x('transformers<5')\n" * 8_000,
           "pyproject.toml": "[project]\n" + "".join(f'a{i}.b.c.d = "{i}"\n' for i in range(9_000)),
           "environment.yml": "- a: &a [x]\n" + "- [*a, *a, *a, *a]\n" * 9_000,
           "setup.cfg": "[options]\ninstall_requires = \n" + " x;\n" * 60_000}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_read_in_time(name, tmp_path):
    source = project(tmp_path, {name: HOSTILE[name]})
    assert ("DSK031", "error") in found(source)
