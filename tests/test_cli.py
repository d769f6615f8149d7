"The command as its users meet it: a process with arguments, two streams and an exit status."
import contextlib, io, json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image
from patience import PATIENCE

import devsky_nb
from devsky_nb.cli import as_options, main, make_parser

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
    assert "--anew" in embed(tmp_path / "shop.tar", "--dtype", "float16").stderr
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
    [metadata] = (tmp_path / "site").glob("devsky_nb-*/METADATA")
    page = re.sub(r"```.*?```", "", metadata.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "github.com/devsky-nb/devsky_nb/raw/main/nbs/images/report.png" in page and re.findall(r"\]\((?!https?:|#)[^)]+", page) == []
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([*DEVSKY, "demo", "--out", "demo", "--json"], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=PATIENCE)
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
    call = ("demo", "--images", "14", "--out", tmp_path / "demo", "--json", "--quiet")
    for name in ("report.html", "report.json", "catalogue/notes.txt"):
        (tmp_path / "demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo" / name).write_text("of somebody", encoding="utf-8")
        done = devsky(*call)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and name.partition("/")[0] in done.stderr, done.stderr
        assert [p.read_text(encoding="utf-8") for p in (tmp_path / "demo").rglob("*") if p.is_file()] == ["of somebody"]
        (tmp_path / "demo" / name).unlink()
    devsky_nb.write_catalogue(tmp_path / "demo" / "catalogue", n=20)
    (tmp_path / "demo" / "report.html").write_text('<meta name="generator" content="devsky_nb">', encoding="utf-8")
    (tmp_path / "demo" / "report.json").write_text('{\n "total_images": 20}', encoding="utf-8")
    done = devsky(*call)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [Path(path).name for path in json.loads(done.stdout)["written"].values()] == ["report.json", "report.html"]
    assert json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))["failed"] == 3


@pytest.mark.parametrize("args, says", [
    ([], "COMMAND"),
    (["embed", "no-such-folder", "--out", "x", "--model", "tiny-clip"], "no-such-folder"),
    (["embed", ".", "--model", "tiny-clip"], "--out"),
    (["embed", ".", "--out", "", "--model", "tiny-clip"], "argument --out: an empty path: is a variable not set?"),
    (["embed", "", "--out", "x", "--model", "tiny-clip"], "argument SOURCE: an empty path"),
    (["embed", ".", "--out", "x", "--root", "", "--model", "tiny-clip"], "argument --root: an empty path"),
    (["validate", "", "--model", "tiny-clip"], "argument SOURCE: an empty path"),
    (["doctor", ""], "argument PATH: an empty path"),
    (["cache", "report", "--cache-dir", ""], "argument --cache-dir: an empty path"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--output", "clip"], "argument --output: invalid choice: 'clip'"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--batch-size", "0"], "argument --batch-size: '0' is no whole number of at least 1"),
    (["embed", "nbs/images", "--out", "x", "--model", "tiny-clip", "--batch-size", "99999999999999999999"], "--batch-size=99999999999999999999: expected a whole number from 1 to 100000"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--root", "no-such"], "--root='no-such' is no folder"),
    (["embed", ".", "--out", "x", "--model", ""], "argument --model: an empty text: is a variable not set?"),
    (["embed", ".", "--out", "x", "--device", " "], "argument --device: an empty text"),
    (["embed", ".", "--out", "x\udce9", "--model", "tiny-clip"], "this name is no UTF-8"),
    (["embed", "tests/hub", "--out", "x", "--model", "tiny-clip"], "no images in 'tests/hub'"),
    (["search", "x", "a dress", ""], "argument TEXT: an empty text"),
    (["plan", "sdxl-base", "--config", ""], "argument --config: an empty text"),
    (["plan", "no-such-model", "--budget", "8GB"], "`devsky models list` has the known ones"),
    (["models", "verify", ""], "argument NAME: an empty text"),
    (["demo", "--images", "20000"], "argument --images: '20000' is no whole number from 14 to 10000"),
    (["doctor", "--source", "--target", "torch"], "--target='torch': expected a library and its version"),
    (["doctor", "--environment", "--budget", "8GB"], "--budget is about the model of --plan"),
    (["doctor", "--source", "--plan", "sdxl-base"], "--plan asks this machine"),
    (["doctor", "--source", "--fix", "--diff"], "argument --diff: not allowed with argument --fix"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--device", "tpu"], "--device='tpu': "),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--precision", "int3"], "argument --precision: invalid choice: 'int3'"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--engine", "spark"], "argument --engine: invalid choice: 'spark'"),
    (["embed", "nbs/index.ipynb", "--out", "x", "--model", "tiny-clip"], "is no image, no archive, no Parquet file and no list of images"),
    (["validate", "no-such-folder", "--model", "tiny-clip"], "no-such-folder"),
    (["validate", "settings.ini", "--model", "tiny-clip"], "is no image, no archive, no Parquet file and no list of images"),
    (["validate", "nbs", "--model", "tiny-clip", "--contract", "no-such.yaml"], "no-such.yaml"),
    (["embed", "nbs", "tests", "-", "--out", "x", "--model", "tiny-clip"], "'-' is the list on standard input: give it alone"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--max-failures", "few"], "a number of images such as 10, or a share such as 1%"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--shard-rows", "1.5"], "argument --shard-rows: '1.5' is no whole number"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["embed", ".", "--out", "x", "--model", "tiny-sdxl"], "only models that see images are embedded with"),
    (["validate", ".", "--accepted", "good.xlsx"], "must end in .csv or .json"),
    (["search", "x", "a dress", "-k", "0"], "argument -k: '0' is no whole number of at least 1"),
    (["plan", "sdxl-base"], "--budget: how much may be taken?"),
    (["plan", "shop/own", "--budget", "8GB"], "--fetch, or `devsky plan shop/own"),
    (["plan", "sdxl-base", "--budget", "8GB", "--top", "0"], "argument --top: '0' is no whole number"),
    (["cache", "evict", "--max-size", "plenty"], "no size in 'plenty'"),
    (["models", "prefetch", "../etc"], "../etc"),
    (["doctor", "no-such-file.py", "--source"], "no-such-file.py"),
    (["doctor", "nbs", "--environment"], "--environment reads no files"),
    (["doctor", "--source", "--select", "E501"], "no rule 'E501'"),
    (["doctor", "--source", "--select", "DSK01", "--ignore", "DSK0"], "no rule is left: what is ignored covers all that is selected"),
    (["embed", ".", "--out", "x", "--modle", "tiny-clip"], "devsky embed: error: unrecognized arguments: --modle tiny-clip. Did you mean --model?"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it\n"),
    (["cache", "pin"], "the following arguments are required: REPO, REVISION, ALIAS"),
    (["generate", "--model", "tiny-sdxl"], "the following arguments are required: PROMPT"),
    (["generate", "a dress", "--model", "tiny-sdxl", "--cache-dir", "settings.ini"], "argument --cache-dir: 'settings.ini' is a file, and a cache is a folder"),
    (["embed", ".", "--out", "x", "--model", "tiny-clip", "--cache-dir", "settings.ini/hub"], "'settings.ini' is a file, and a cache is a folder"),
    (["embed", "nbs/images", "--out", "x", "--model", "tiny-clip", "--id-column", "sku"], "--id-column='sku' names a column of a table or list, and 'nbs/images' holds none: leave it out"),
    (["validate", "nbs/images", "--model", "tiny-clip", "--id-column", "sku"], "'nbs/images' holds none: leave it out"),
    (["validate", "-", "--model", "tiny-clip", "--column", "front"], "--column names a column of a table or list, and standard input has paths alone"),
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
    rest = process.communicate(timeout=PATIENCE)[1]
    assert "1000/1000" not in rest and process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest


def test_help_answers_without_heavy_imports():
    code = "import sys; sys.argv=['devsky','--help']\ntry:\n    from devsky_nb.cli import main; main()\nexcept SystemExit: print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")


# ---- what an option means on a terminal ----

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Six photographs, in two folders, an archive and a table."
    import tarfile
    import pyarrow as pa
    folder = tmp_path_factory.mktemp("shop")
    for season, first in ("spring", 0), ("autumn", 3):
        (folder / season).mkdir()
        for i in range(first, first + 3):
            devsky_nb.render_garment(devsky_nb.Garment("dress" if i % 2 else "coat", "red"), 96, i).save(folder / season / f"{i % 3}.png")
    files = sorted((folder / "spring").iterdir())
    with tarfile.open(folder / "spring.tar", "w") as tar: [tar.add(p, f"coats/{p.name}") for p in files]
    pq.write_table(pa.table({"sku": ["a", "b", "c"], "photo": [p.read_bytes() for p in files], "label": ["coat", "dress", "coat"]}), folder / "spring.parquet")
    return folder


def embedded_ids(done, out):
    assert done.returncode == 0, done.stderr
    return pq.read_table(out)["id"].to_pylist()


def test_several_sources_a_shells_pattern_and_a_list_on_standard_input(shop, tmp_path, monkeypatch):
    from devsky_nb import cli
    from devsky_nb.images.sources import open_sources
    monkeypatch.chdir(shop)
    ids = lambda *sources: [part.id for part in open_sources(sources).parts()]
    expanded = [f"spring/{i}.png" for i in range(3)]
    assert ids(*expanded) == ids("spring/*.png") == expanded
    assert ids("spring.tar", "autumn/0.png") == ["spring.tar/coats/0.png", "spring.tar/coats/1.png", "spring.tar/coats/2.png", "autumn/0.png"]
    assert ids("./spring/", "autumn") == [f"./spring/{i}.png" for i in range(3)] + [f"autumn/{i}.png" for i in range(3)]
    for separator in ("\n", "\r\n", "\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(separator.join(expanded).encode())))
        assert cli.names_on_standard_input() == expanded
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    done = devsky("embed", "-", "--out", tmp_path / "d", "--model", "tiny-clip")
    assert done.returncode == 2 and "standard input lists no images" in done.stderr
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"spring/0.png\nautumn/0.png\n")))
    embed = lambda *words: devsky("embed", *words, "--model", "tiny-clip", "--precision", "fp32", "--quiet")
    assert embedded_ids(embed("-", "--out", tmp_path / "e"), tmp_path / "e") == ["spring/0.png", "autumn/0.png"]
    assert len(embedded_ids(embed("spring", "--out", tmp_path / "f", "autumn"), tmp_path / "f")) == 6


def test_archives_tables_and_lists_are_validated_and_what_passed_is_listed(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(shop)
    validate = lambda *words: devsky("validate", *words, "--model", "tiny-clip", "--quiet", "--json", "--accepted", tmp_path / "good.json")
    for source, ids in [(["spring.tar", "spring"], [f"spring.tar/coats/{i}.png" for i in range(3)] + [f"spring/{i}.png" for i in range(3)]),
                        (["spring.parquet", "--id-column", "sku"], ["a", "b", "c"])]:
        done = validate(*source)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [image["id"] for image in report["images"]] == ids and report["successful"] == len(ids), source
        good = json.loads((tmp_path / "good.json").read_text(encoding="utf-8"))
        assert {row["id"] for row in good} == {image["id"] for image in report["images"] if image["status"] == "embedded"}
    assert [row["label"] for row in good] == ["coat", "dress", "coat"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"spring/0.png\nnone.png\n")))
    assert [image["status"] for image in json.loads(validate("-").stdout)["images"]] == ["embedded", "error"]


def test_a_contract_is_spoken_of_where_there_is_one(shop, tmp_path, monkeypatch):
    (tmp_path / "spring").symlink_to(shop / "spring")
    monkeypatch.chdir(tmp_path)
    validate = lambda: devsky("validate", "spring/0.png", "--model", "tiny-clip", "--quiet")
    assert "min_success" not in validate().stdout
    (tmp_path / "pyproject.toml").write_text("[tool.devsky.contract]\nmin_size = 4000\n", encoding="utf-8")
    done = validate()
    assert done.returncode == 1 and "min_size" in done.stdout and "[tool.devsky.contract] of" in done.stderr
    (tmp_path / "pyproject.toml").write_text("[tool.devsky.contract]\nminimum = 4000\n", encoding="utf-8")
    done = validate()
    assert done.returncode == 2 and "unknown key 'minimum'" in done.stderr
    (tmp_path / "pyproject.toml").write_text("[tool.devsky", encoding="utf-8")
    assert validate().returncode == 2


def test_too_many_failures_are_a_verdict(shop, tmp_path):
    from devsky_nb.cli import failure_limit
    folder = tmp_path / "in"
    shutil.copytree(shop / "spring", folder)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = devsky("embed", folder, "--out", tmp_path / "v", "--model", "tiny-clip", "--precision", "fp32", "--quiet", "--max-failures", "0")
    assert done.returncode == 1 and "1 of 4 images failed: more than --max-failures allows" in done.stderr
    assert [failure_limit(text)(4) for text in ("0", "1", "25%", "100%")] == [0, 1, 1, 4]


def test_photographs_get_no_verdict_of_a_model_that_knows_drawings(photographs, tmp_path):
    for name, label in ("astronaut.png", "coat"), ("chelsea.png", "dress"), ("coffee.png", "hat"), ("rocket.jpg", "bag"):
        (tmp_path / label).mkdir()
        shutil.copy(photographs / name, tmp_path / label / name)
    done = devsky("validate", tmp_path, "--model", "tiny-clip", "--labels-from-folders", "--quiet")
    assert done.returncode == 0 and "labels: zero-shot, by a model trained on drawn garments: 4 of 4 images" in done.stderr, done.stderr
    assert "mislabelled" not in done.stdout


def test_every_help_has_examples_that_parse(monkeypatch, capsys):
    "They are calls to copy: what is not there fails later, what is misspelt here."
    from devsky_nb import cli
    shown = {parser.prog for parser in cli.parsers_below(cli.make_parser()) if "examples:" in parser.format_help()}
    assert shown == {f"devsky {name}".strip() for name in cli.EXAMPLES}
    assert {f"devsky {name}" for name in cli.COMMANDS} <= shown
    import shlex
    for lines in cli.EXAMPLES.values():
        for line in lines:
            words = shlex.split(line.rpartition("| devsky ")[2].partition(" > ")[0])
            assert cli.parse_arguments(cli.make_parser(), words).command == words[0], line


def test_choices_are_those_that_the_package_takes():
    from devsky_nb import cli
    from devsky_nb.embedding import embedder, export, rows, vectors
    choices = {(parser.prog.split()[-1], action.dest): set(action.choices) for parser in cli.parsers_below(cli.make_parser())
               for action in parser._actions if action.choices and action.option_strings}
    assert choices["embed", "precision"] == set(embedder.PRECISIONS) and choices["embed", "dtype"] == set(rows.DTYPES)
    assert set(vectors.OUTPUTS) <= choices["embed", "output"]
    assert (choices["export", "to"], choices["export", "copies"]) == (set(export.FORMATS), set(export.COPIES))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(shell, tmp_path):
    pytest.importorskip("shtab")
    done = devsky("completion", shell)
    assert done.returncode == 0 and all(word in done.stdout for word in ("prefetch", "max-failures", "clip-vit-base"))
    if shell != "bash" or not shutil.which("bash"): return
    (tmp_path / "devsky.bash").write_text(done.stdout, encoding="utf-8")
    ask = f"source {tmp_path}/devsky.bash; COMP_WORDS=(devsky models pre); COMP_CWORD=2; _shtab_devsky; echo ${{COMPREPLY[@]}}"
    assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split() == ["prefetch"]


def test_colours_are_for_terminals_and_no_program_gets_them(monkeypatch, tmp_path):
    (tmp_path / "shop.py").write_text("from_pretrained('a', trust_remote_code=True)\n", encoding="utf-8")
    doctor = lambda *more: devsky("doctor", tmp_path, "--source", *more)
    for name in ("NO_COLOR", "FORCE_COLOR"): monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in doctor().stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = doctor()
    assert "\x1b[33mDSK051 warning" in coloured.stdout
    assert "\x1b" not in doctor("--json").stdout + doctor("--format", "github").stdout
    assert devsky("models", "verify", "tiny-clap").stderr.startswith("\x1b[1;31mdevsky: ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.stdout) == doctor().stdout


def test_findings_show_the_line_of_code(tmp_path):
    (tmp_path / "shop.py").write_text("def load():\n\tm = from_pretrained('größe', trust_remote_code=True)  # \x1b[31m\n", encoding="utf-8")
    shown = devsky("doctor", tmp_path, "--source").stdout.splitlines()
    line = next(i for i, text in enumerate(shown) if text.startswith("    2 | m = from_pretrained('größe'"))
    assert "\x1b" not in "".join(shown) and shown[line + 1].index("^") >= shown[line].index("m = ")


def test_a_listing_of_models_has_a_head_and_sizes(tmp_path):
    head, *rows = devsky("models", "list", "--cache-dir", tmp_path).stdout.splitlines()
    assert head.split() == ["alias", "on", "the", "Hub", "kind", "weights", "stage", "here"]
    assert rows[0].split()[-5:] == ["3.0", "MiB", "in", "the", "package"] or "in the package" in rows[0]
    assert all(re.search(r"\d [KMG]iB", row) for row in rows), "each has a size"


def test_what_was_to_be_fetched_is_not_told_to_fetch_it(tmp_path):
    done = devsky("models", "prefetch", "clip-vit-base", "--cache-dir", tmp_path)
    assert done.returncode == 2 and "devsky models prefetch" not in done.stderr and "where HF_HUB_OFFLINE is not set" in done.stderr


def test_a_plan_says_what_it_fetches_before(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants
    from devsky_nb import cli
    registry = devsky_nb.ModelRegistry(tmp_path)
    cli.announce_fetching("shop/own", registry, None)
    assert capsys.readouterr().err == "", "nothing is fetched offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    cli.announce_fetching("shop/own", registry, None)
    assert capsys.readouterr().err == "shop/own: asking the Hub for its JSON files, 16.0 MiB at most, and no weights\n"
    cli.announce_fetching("sdxl-base", registry, None)
    assert capsys.readouterr().err == "", "the package carries them"
    listed, code = devsky("plan", "sdxl-base", "--budget", "8GB", "--top", "2").stdout.split("\n\n", 1)
    assert re.search(r" more: --top \d+ lists all$", listed) and "dtype=torch.float16" in code and "--" not in code
    compile(code, "plan", "exec")


def test_a_message_names_the_options_of_its_command():
    from devsky_nb import cli
    args = cli.make_parser().parse_args(["embed", "a", "--out", "b"])
    said = "batch_size=0: resume=False replaces them, offline=True forbids it; revision='v1'; x/dtype=1/a and 'model=2' are names; prune=False"
    assert cli.as_options(said, args) == ("--batch-size=0: --anew replaces them, --offline forbids it; --revision='v1'; x/dtype=1/a and 'model=2' are names; "
                                          "prune=False")
    args = cli.make_parser().parse_args(["plan", "a"])
    assert cli.as_options("budget: how much? with config=, or fetch=True", args) == "--budget: how much? with --config, or --fetch"


@pytest.mark.parametrize("command, message, told", [
    ("generate a", "negative_prompt counts for nothing with guidance_scale=1.0, which", "--negative-prompt counts for nothing with --guidance=1.0, which"),
    ("generate a", "mask_image is 8×8, and image 64×64: make them alike", "--mask is 8×8, and image 64×64: make them alike"),
    ("generate a", "mask_image= needs image=: it says", "--mask needs --image: it says"),
    ("generate a", "without a negative_prompt, even an empty one", "without a --negative-prompt, even an empty one"),
    ("generate a", "give image= and mask_image=.", "give --image and --mask."),
    ("generate a", "or give fit='crop' or fit='resize'", "or give --fit='crop' or --fit='resize'"),
    ("generate a", "loras: 'a.safetensors' is cut off", "--lora: 'a.safetensors' is cut off"),
    ("generate a", "device='xyz': no such device", "--device='xyz': no such device"),
    ("generate a", "no file '/photos/mask_image.png', 'negative_prompt' and negative_prompt.txt", "no file '/photos/mask_image.png', 'negative_prompt' and negative_prompt.txt"),
    ("plan a", "width=65, height=64: give both; host_budget= is", "--width=65, --height=64: give both; --host-budget is"),
    ("plan a", "mask_image= is none of this command", "mask_image= is none of this command"),
    ("search a b", "shorten it or use truncate=True", "shorten it"),
    ("export a b", "cannot write to '/proc'", "cannot write to '/proc'")])
def test_a_message_names_options_and_not_arguments(command, message, told):
    assert as_options(message, make_parser().parse_args(command.split())) == told


@pytest.mark.parametrize("args", [["plan", "sdxl-base", "--budget", "8XB"], ["plan", "sdxl-base", "--host-budget", "x"], ["doctor", "--plan", "sdxl-base", "--budget", "1q"],
                                  ["models", "prefetch", "tiny-clip", "--max-bytes", "3zb"], ["cache", "evict", "--max-size", "many"]])
def test_a_size_that_is_none_is_named_with_its_option(args):
    done = devsky(*args)
    assert done.returncode == 2 and f"argument {args[-2]}: no size in {args[-1]!r}" in done.stderr, done.stderr
