"The command as its users meet it: a process with arguments, two streams and an exit status."
import contextlib, io, json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image

import devsky_nb
from devsky_nb.cli import main

ROOT = Path(__file__).resolve().parents[1]
DEVSKY = [sys.executable, "-c", "import sys; from devsky_nb.cli import main; sys.exit(main())"]


def devsky(*args):
    "Run the command in this process, as a terminal would see it."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main([*map(str, args)])
        except SystemExit as e: status = e.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    "Photographs that scikit-image carries, in colour and in grey."
    import skimage.data
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "page.png", "rocket.jpg"):
        Image.fromarray(getattr(skimage.data, name.partition(".")[0])()).save(folder / name)
    return folder


def test_photographs_are_validated_and_embedded(photographs, tmp_path):
    done = devsky("validate", photographs, "--model", "tiny-clip", "--json", "--html", tmp_path / "r.html", "--report", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["total_images"], report["successful"], report["failed"]) == (6, 6, 0)
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["successful"] == 6
    assert "astronaut" in (tmp_path / "r.html").read_text(encoding="utf-8")
    done = devsky("embed", photographs, "--out", tmp_path / "vectors", "--model", "tiny-clip", "--precision", "fp32", "--json", "--quiet")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = pq.read_table(tmp_path / "vectors").to_pylist()
    assert [r["id"] for r in rows] == sorted(p.name for p in photographs.iterdir())
    assert all(abs(np.linalg.norm(r["embedding"]) - 1) < 1e-5 for r in rows)


def test_parquet_and_tars_are_embedded_updated_and_made_anew(photographs, tmp_path):
    import tarfile
    import pyarrow as pa
    files = sorted(photographs.glob("c*.png"))
    pq.write_table(pa.table({"sku": [p.stem for p in files], "front": [p.read_bytes() for p in files], "back": [b""] * len(files)}), tmp_path / "shop.parquet")
    with tarfile.open(tmp_path / "shop.tar", "w") as t: [t.add(p, p.name) for p in files]
    embed = lambda source, *more: devsky("embed", source, "--out", tmp_path / "v", "--model", "tiny-clip", "--precision", "fp32", "--json", "--quiet", *more)
    done = embed(tmp_path / "shop.parquet")
    assert done.returncode == 2 and "front (binary), back (binary)" in done.stderr
    assert embed(tmp_path / "shop.parquet", "--column", "front", "--id-column", "sku", "--shard-rows", "2").returncode == 0
    assert pq.read_table(tmp_path / "v")["id"].to_pylist() == ["camera", "chelsea", "coffee"] and len(list((tmp_path / "v").glob("*.parquet"))) == 2
    twice = json.loads(embed(f"{tmp_path}/shop{{,}}.tar", "--anew").stdout)
    assert (twice["embedded"], twice["duplicate"], twice["error"]) == (3, 3, 0), twice
    assert json.loads(embed(tmp_path / "shop.tar").stdout)["reused"] == 3
    assert "resume=False" in embed(tmp_path / "shop.tar", "--dtype", "float16").stderr
    report = json.loads(embed(tmp_path / "shop.tar", "--dtype", "float16", "--anew").stdout)
    assert (report["embedded"], report["reused"]) == (3, 0)


def test_the_default_model_offline_names_both_ways_out(photographs, tmp_path):
    for command in (["embed", photographs, "--out", tmp_path / "v"], ["validate", photographs]):
        done = devsky(*command, "--cache-dir", tmp_path / "cache")
        assert done.returncode == 2 and done.stdout == ""
        assert "devsky models prefetch clip-vit-base" in done.stderr and "--model tiny-clip" in done.stderr
        assert "Traceback" not in done.stderr
    error = json.loads(devsky("embed", photographs, "--out", tmp_path / "v", "--cache-dir", tmp_path / "c", "--json").stdout)["error"]
    assert error["error_type"] == "ModelNotFoundError"


@pytest.mark.slow
def test_the_wheel_carries_what_the_demo_needs(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "nbs", "tests", "benchmarks", "build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    [wheel] = tmp_path.glob("devsky_nb-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path / "site", wheel], check=True, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([*DEVSKY, "demo", "--out", "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout)["total_images"] == report["total_images"]
    assert {"total_images", "successful", "failed", "embeddings", "errors", "metadata", "success_rate"} <= set(report)
    assert report["failed"] == len(report["errors"]) == 3
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000 and all(e["image_id"] in page for e in report["errors"])
    where = subprocess.run([sys.executable, "-c", "import devsky_nb; print(devsky_nb.__file__)"], cwd=tmp_path, capture_output=True, text=True, env=env).stdout
    assert str(tmp_path / "site") in where


def test_the_demo_again_in_the_same_folder(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.json").write_text("from an earlier run")
    done = devsky("demo", "--out", tmp_path / "demo", "--json", "--quiet")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))["failed"] == 3


@pytest.mark.parametrize("args, says", [
    ([], "COMMAND"),
    (["embed", "no-such-folder", "--out", "x", "--model", "tiny-clip"], "no-such-folder"),
    (["embed", ".", "--model", "tiny-clip"], "--out"),
    (["embed", ".", "--out", "", "--model", "tiny-clip"], "argument --out: an empty path: is a variable not set?"),
    (["embed", "", "--out", "x", "--model", "tiny-clip"], "no file or folder ''"),
    (["embed", ".", "--out", "x", "--root", "", "--model", "tiny-clip"], "argument --root: an empty path"),
    (["validate", "", "--model", "tiny-clip"], "argument SOURCE: an empty path"),
    (["doctor", ""], "argument PATH: an empty path"),
    (["cache", "report", "--cache-dir", ""], "argument --cache-dir: an empty path"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--output", "clip"], "expected one of projected, pooled, cls"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--batch-size", "0"], "batch_size"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--device", "tpu"], "no device 'tpu'"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--precision", "int3"], "expected one of auto"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--engine", "spark"], "expected one of local, ray"),
    (["embed", "nbs/index.ipynb", "--out", "x", "--model", "tiny-clip"], "is no image, no archive, no Parquet file and no list of images"),
    (["validate", "no-such-folder", "--model", "tiny-clip"], "no-such-folder"),
    (["validate", "settings.ini", "--model", "tiny-clip"], "neither a folder nor an image set"),
    (["validate", "nbs", "--model", "tiny-clip", "--contract", "no-such.yaml"], "no-such.yaml"),
    (["cache", "evict", "--max-size", "plenty"], "no size in 'plenty'"),
    (["models", "prefetch", "../etc"], "../etc"),
    (["doctor", "no-such-file.py", "--source"], "no-such-file.py"),
    (["doctor", "nbs", "--environment"], "--environment reads no files"),
    (["doctor", "--source", "--select", "E501"], "no rule 'E501'"),
])
def test_wrong_calls_exit_with_2_and_one_helpful_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = devsky(*(str(tmp_path / "x") if a == "x" else a for a in args))
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_misspelt_model_names_the_nearest(tmp_path):
    done = devsky("embed", tmp_path, "--out", tmp_path / "v", "--model", "tiny-clp")
    assert done.returncode == 2 and "tiny-clip" in done.stderr


def test_models_and_cache_as_json(tmp_path):
    listed = json.loads(devsky("models", "list", "--json", "--cache-dir", tmp_path).stdout)
    assert {"tiny-clip", "clip-vit-base"} <= {m["alias"] for m in listed["models"]}
    assert devsky("models", "verify", "tiny-clip", "--json", "--cache-dir", tmp_path).returncode == 0
    for action in (["report"], ["verify"], ["evict", "--unused-days", "30"]):
        done = devsky("cache", *action, "--json", "--cache-dir", tmp_path)
        assert done.returncode == 0 and isinstance(json.loads(done.stdout), dict), done.stderr


def test_listings_are_printed_whole(tmp_path):
    "A summary alone would not say what `--keep` can name, what is damaged, or what is to be deleted."
    from hubcache import make_repo
    make_repo(tmp_path, "shop/clip", {"a" * 40: {"config.json": b"{}", "w.safetensors": b"w"}}, {"main": "a" * 40})
    for action in (["report"], ["evict", "--max-size", "0"]):
        summary, line = devsky("cache", *action, "--cache-dir", tmp_path).stdout.splitlines()
        assert "shop/clip" in line and "aaaaaaaa" in line
    next(tmp_path.rglob("snapshots/*/w.safetensors")).resolve().write_bytes(b"v")
    done = devsky("cache", "verify", "--cache-dir", tmp_path)
    assert done.returncode == 1 and "w.safetensors" in done.stdout


def test_prefetch_locks_the_revision_that_is_asked_for(tmp_path):
    from hubcache import make_repo
    tiny = Path(devsky_nb.__file__).parent / "models" / "tiny-clip"
    files = {p.name: p.read_bytes() for p in tiny.iterdir() if p.suffix in (".json", ".safetensors")}
    old, new = "a" * 40, "b" * 40
    make_repo(tmp_path / "hub", "shop/clip", {old: files, new: {**files, "notes.json": b"{}"}}, {"main": new})
    done = devsky("models", "prefetch", "shop/clip", "--revision", old[:8], "--json", "--cache-dir", tmp_path / "hub")
    assert done.returncode == 0 and json.loads(done.stdout)["commit"] == old, done.stderr
    assert devsky_nb.ModelRegistry(tmp_path / "hub").locate("shop/clip").name == old


@pytest.mark.parametrize("command", [
    ["demo", "--out"],
    ["generate", "a dress", "--model", "tiny-sdxl", "--out"],
    ["embed", "PHOTOGRAPHS", "--model", "tiny-clip", "--precision", "fp32", "--out"],
    ["validate", "PHOTOGRAPHS", "--model", "tiny-clip", "--html"],
    ["validate", "PHOTOGRAPHS", "--model", "tiny-clip", "--report"],
])
def test_a_place_that_cannot_be_written_is_one_line(command, photographs, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    words = [photographs if word == "PHOTOGRAPHS" else word for word in command]
    done = devsky(*words, tmp_path / "file" / "below", "--quiet")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"devsky: {command[-1]}=") and "cannot be written" in done.stderr


def test_what_was_pinned_is_said_in_words(tmp_path):
    from hubcache import make_repo
    make_repo(tmp_path, "shop/model", {"a" * 40: {"config.json": b"{}"}}, {"main": "a" * 40})
    assert devsky("cache", "pin", "shop/model", "main", "keep", "--cache-dir", tmp_path).stdout == "pinned: shop/model at main as keep\n"
    assert devsky("cache", "unpin", "shop/model", "keep", "--cache-dir", tmp_path).stdout == "unpinned: shop/model keep\n"


def test_cache_pin_verify_evict_on_a_real_cache(tmp_path):
    from hubcache import make_repo
    old, new = "a" * 40, "b" * 40
    make_repo(tmp_path, "shop/model", {old: {"config.json": b"{}", "x.bin": b"1" * 5000}, new: {"config.json": b"{}", "x.bin": b"2" * 7000}}, {"main": new})
    run = lambda *a: devsky("cache", *a, "--cache-dir", tmp_path, "--json")
    assert run("pin", "shop/model", old, "keep").returncode == 0
    plan = json.loads(run("evict", "--max-size", "0").stdout)
    assert plan["freed_bytes"] == 7000 and (tmp_path / "models--shop--model" / "snapshots" / new).exists()
    done = run("evict", "--max-size", "0", "--execute")
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False, "the pin makes the limit unreachable, and that is said"
    assert not (tmp_path / "models--shop--model" / "snapshots" / new).exists()
    assert (tmp_path / "models--shop--model" / "snapshots" / old / "x.bin").read_bytes() == b"1" * 5000
    assert run("pin", "shop/model", "c" * 40, "gone").returncode == 2
    blob = next(p for p in (tmp_path / "models--shop--model" / "blobs").iterdir() if p.stat().st_size == 5000)
    blob.write_bytes(b"1" * 4000)
    done = run("verify")
    assert done.returncode == 1 and "x.bin" in done.stdout


def test_ctrl_c_ends_at_once_with_130(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(folder / "000.png")
    for i in range(1, 1000): (folder / f"{i:05}.png").write_bytes((folder / "000.png").read_bytes() + b"%d" % i)
    process = subprocess.Popen([*DEVSKY, "embed", folder, "--out", tmp_path / "v", "--model", "tiny-clip", "--precision", "fp32", "--batch-size", "1"],
                               stderr=subprocess.PIPE, text=True)
    told = ""
    while not re.search("[1-9]/1000", told):  # until the first pictures are done
        told += (more := process.stderr.read(1))
        assert more, told
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert "1000/1000" not in rest and process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest


def test_help_answers_without_heavy_imports():
    code = "import sys; sys.argv=['devsky','--help']\ntry:\n    from devsky_nb.cli import main; main()\nexcept SystemExit: print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")
