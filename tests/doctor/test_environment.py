"The checks of a machine: what they see in a broken one."
import json, os, subprocess, sys, tempfile, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hubcache import make_repo

from devsky_nb.doctor import environment
from devsky_nb.doctor.environment import check_environment
from devsky_nb.errors import ValidationError

ROOT = Path(__file__).resolve().parents[2]


def seen(code, *args, **kwargs):
    "What one check says."
    return [(f.severity, f.message) for f in check_environment(*args, select=[code], **kwargs)]


def test_every_finding_about_the_machine_has_a_remedy(tmp_path):
    found = check_environment(tmp_path, ignore=["DSK111"])
    assert {f.rule for f in found} == set(environment.CHECKS) - {"DSK111"}
    assert all(f.fix and f.message and f.severity in ("pass", "info", "warning", "error") for f in found)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValidationError, match="no rule 'DSK0'"): check_environment(tmp_path, select=["DSK0"])
    with pytest.raises(ValidationError, match="no size in 'much'"): check_environment(tmp_path, budget="much")


def test_versions_that_do_not_go_together(monkeypatch):
    real = environment.metadata.version

    def old(name):
        return "0.1.0" if name in ("huggingface_hub", "huggingface-hub") else real(name)

    monkeypatch.setattr(environment.metadata, "version", old)
    assert any(severity == "error" and "needs huggingface" in message and "0.1.0 is installed" in message
               for severity, message in seen("DSK101"))


def run_alone(code, **env):
    "What a fresh process prints that has none of this one's settings of Hugging Face."
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = clean | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cache_and_why_it_is_there(tmp_path):
    code = "from devsky_nb import check_environment as c\nfor f in c(select=['DSK102']): print((f.severity, f.message))"

    def run(**env):
        return run_alone(code, HOME=str(tmp_path), **env)

    assert "no variable is set" in run() and f"{tmp_path}/.cache/huggingface/hub" in run()
    assert "x/hub: HF_HOME is set" in run(HF_HOME=str(tmp_path / "x"))
    both = run(HF_HOME=str(tmp_path / "x"), HF_HUB_CACHE=str(tmp_path / "y"), TRANSFORMERS_CACHE="/z")
    assert "y: HF_HUB_CACHE is set" in both and "TRANSFORMERS_CACHE=/z is read by no library" in both
    assert both.count("'warning'") == 2


class Listener(BaseHTTPRequestHandler):
    "A Hub that has nothing and counts who asks."
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args): pass


def test_the_network_is_not_asked_for_a_model_that_is_not_here(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    check = "c(select=['DSK108'], model='shop/unheard-of', budget='1GB')"
    code = f"from devsky_nb import check_environment as c; print({check}[0])"
    try: text = run_alone(code, HF_HOME=str(tmp_path), HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally: server.shutdown()
    assert Listener.asked == []
    assert text.startswith("DSK108 error") and "shop/unheard-of" in text


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert seen("DSK103", tmp_path) == [("error", f"{tmp_path} cannot be written: Read-only file system")]


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def repo(tmp_path):
    "A cache with two revisions, of which one has a ref."
    files = {OLD: {"config.json": b"{}"}, NEW: {"model.safetensors": b"1" * 5000}}
    return make_repo(tmp_path / "hub", "shop/model", files, {"main": NEW})


def test_bare_pins(repo, tmp_path):
    cache = tmp_path / "hub"
    assert seen("DSK106", cache) == [("info", "shop/model at aaaaaaaa has no ref: `hf cache prune` would delete it")]
    version = {"stage": "production", "commit": OLD, "repo_id": "shop/model", "patterns": [], "locked_at": "now"}
    lockfile = tmp_path / "hub-models.lock.json"
    lockfile.write_text(json.dumps({"models": {"clip": [version]}}), encoding="utf-8")
    [pin] = check_environment(cache, select=["DSK106"])
    assert pin.severity == "warning" and pin.fix == f"`devsky cache pin shop/model {OLD} clip` keeps it"


def test_broken_blobs(repo, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    assert [severity for severity, _ in seen("DSK105", cache)] == ["pass"]
    blob = max((repo / "blobs").iterdir(), key=lambda p: p.stat().st_size)
    blob.write_bytes(b"1" * 4999 + b"2")
    (repo / "blobs" / "x.incomplete").write_bytes(b"half")
    messages = [message for _, message in seen("DSK105", cache)]
    assert any("damaged" in m and "model.safetensors" in m for m in messages) and any("did not end" in m for m in messages)
    monkeypatch.setattr(environment, "MAX_HASHED_BYTES", -1)
    link = repo / "snapshots" / NEW / "model.safetensors"
    link.unlink()
    link.symlink_to("../../blobs/gone")
    messages = [message for _, message in seen("DSK105", cache)]
    assert any("did not end" in m for m in messages) and any("the link leads nowhere" in m for m in messages)
    assert "reads every byte" in messages[-1]


def test_processors_and_kernels(monkeypatch):
    monkeypatch.setattr(environment, "processor_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(environment.metadata, "version", lambda name: "1.0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert seen("DSK109")[0][0] == "info" and seen("DSK110")[0][0] == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert seen("DSK110")[0][0] == "pass"
    monkeypatch.setattr(environment, "processor_flags", lambda: {"avx2"})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert seen("DSK109")[0][0] == seen("DSK110")[0][0] == "pass"


def test_memory_for_a_model():
    assert seen("DSK108", model="clip-vit-large", budget="512MiB")[0][0] == "error"
    assert seen("DSK108", model="tiny-sdxl", budget="512MiB")[0][0] == "pass"


@pytest.mark.slow
def test_a_round_trip_in_4_bits_really_runs():
    [(severity, message)] = seen("DSK111")
    assert severity == "pass" and "runs and reads back the same on c" in message


def test_a_round_trip_that_fails_or_does_not_end(monkeypatch):
    monkeypatch.setattr(environment, "ROUND_TRIP", "raise SystemExit('no kernel for this processor')")
    assert seen("DSK111") == [("error", "a 4-bit layer failed: no kernel for this processor")]
    monkeypatch.setattr(environment, "ROUND_TRIP", "import time; time.sleep(60)")
    monkeypatch.setattr(environment, "ROUND_TRIP_SECONDS", .1)
    assert seen("DSK111") == [("error", "a 4-bit layer did not come to an end within 0.1 seconds")]


def test_a_machine_without_bitsandbytes_is_no_broken_one(monkeypatch):
    real = environment.metadata.version

    def missing(name):
        if name == "bitsandbytes": raise environment.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment.metadata, "version", missing)
    [finding] = check_environment(select=["DSK111"])
    assert finding.severity == "info" and "pip install 'devsky_nb[diffusion]'" in finding.fix
    versions = check_environment(select=["DSK101"])
    assert not any("bitsandbytes" in f.message for f in versions if f.severity == "pass")


def test_the_registry_and_the_revision_decide_which_model_is_meant(tmp_path):
    from devsky_nb import ModelRegistry, ModelSpec
    registry = ModelRegistry(tmp_path / "hub", offline=True)
    with pytest.raises(ValidationError, match="no model 'shop-clip'"):
        check_environment(model="shop-clip", budget="1GB", select=["DSK108"], registry=registry)
    registry.register(ModelSpec("shop-clip", "devsky_nb/tiny-clip", "clip", "apache-2.0"))
    [known] = check_environment(model="shop-clip", budget="1GB", select=["DSK108"], registry=registry)
    assert known.severity == "pass" or "shop-clip" in known.message
    [missing] = check_environment(model="clip-vit-base", revision="c" * 40, select=["DSK108"], cache_dir=tmp_path / "hub")
    assert missing.severity in ("error", "pass")
    for wrong in ({"registry": "x"}, {"registry": registry, "cache_dir": tmp_path}, {"revision": "main"}):
        with pytest.raises(ValidationError): check_environment(**wrong)


@pytest.mark.parametrize("path", [None, 3, b"x", ["a"], ""])
def test_what_is_no_path_is_said(path):
    from devsky_nb import fix_source, scan_source
    for look in (scan_source, fix_source):
        with pytest.raises(ValidationError, match="expected a path"): look(path)
