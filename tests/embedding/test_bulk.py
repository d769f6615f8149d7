"embed_images when things break: processes killed at every step, disks full or read-only, damaged and foreign files, sources that change."
import json, os, re, shutil, signal, subprocess, sys, tarfile
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from patience import wait_until

from devsky_nb import FolderIndex, Garment, render_garment
from devsky_nb.embedding import bulk
from devsky_nb.embedding.bulk import embed_images, local_engine
from devsky_nb.embedding.pool import VectorPool
from devsky_nb.embedding.rows import embed_slice, embedding_schema
from devsky_nb.embedding.shards import add_shards, shard_kind, vector_kind
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.errors import DevSkyyError, MLError, ValidationError
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.images.folders import ImageFolder, ImageList
from devsky_nb.images.sources import slices
from devsky_nb.images.tables import ParquetImages

LOAD = "from devsky_nb.embedding.embedder import CLIPImageEmbedder\ne = CLIPImageEmbedder('tiny-clip', device='cpu', precision='fp32')\n"


@pytest.fixture(scope="module")
def embedder():
    return CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32")


def make_images(folder, n, seed=0, size=(20, 25)):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:04}.png")
    return folder


def files(out): return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def vectors(out):
    return {r["content_hash"]: r["embedding"] for r in pq.read_table(out).to_pylist() if r["status"] == "embedded"}


# rows

def test_every_input_has_one_row_in_order_and_shards_are_full(embedder, tmp_path):
    folder = make_images(tmp_path / "in" / "a", 7)
    (folder / "0003b.jpg").write_text("no image", encoding="utf-8")
    (folder / "0006b.png").write_bytes((folder / "0000.png").read_bytes())
    report = embed_images(tmp_path / "in", tmp_path / "out", embedder, batch_size=2, shard_rows=4)
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))] == [4, 4, 1]
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [r["id"] for r in rows] == sorted(f"a/{p.name}" for p in folder.iterdir())
    assert [r["status"] for r in rows] == ["embedded"] * 4 + ["error"] + ["embedded"] * 3 + ["duplicate"]
    assert (report.total, report.embedded, report.duplicate, report.error, report.reused) == (9, 7, 1, 1, 0)
    for r in rows: assert (r["embedding"] is not None) == (r["status"] == "embedded") and (r["error"] is not None) == (r["status"] == "error")
    np.testing.assert_allclose(rows[0]["embedding"], embedder.encode_image(folder / "0000.png")[0], atol=1e-5)
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text(encoding="utf-8")) == {"rows": 9, "shards": 3, "fingerprint": embedder.fingerprint, "dtype": "float32"}


def test_every_source_gives_the_same_vectors(embedder, tmp_path):
    folder = make_images(tmp_path / "in", 11)
    names = sorted(p.name for p in folder.iterdir())
    pq.write_table(pa.table({"image": [{"bytes": (folder / n).read_bytes(), "path": n} for n in names]}), tmp_path / "x.parquet", row_group_size=4)
    pq.write_table(pa.table({"path": [f"in/{n}" for n in names]}), tmp_path / "paths.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as t: t.add(folder, "shop")
    sources = [folder, (folder / n for n in reversed(names)), [(n, folder / n) for n in names], tmp_path / "x.parquet", tmp_path / "paths.parquet", tmp_path / "x.tar", f"{folder}/*.png"]
    found = []
    for n, (source, batch_size) in enumerate(zip(sources, (8, 8, 8, 8, 8, 5, 7))):
        assert embed_images(source, tmp_path / str(n), embedder, batch_size=batch_size, shard_rows=4).embedded == 11
        found.append(vectors(tmp_path / str(n)))
    assert all(f == found[0] for f in found), "bit for bit, in any order and any company"


def test_any_reader_reads_it_with_nothing_of_ours(embedder, tmp_path):
    import pandas as pd, pyarrow.dataset as ds
    embed_images(make_images(tmp_path / "in", 5), tmp_path / "out", embedder, shard_rows=2, dtype="float16")
    assert pq.read_table(tmp_path / "out").num_rows == ds.dataset(tmp_path / "out").count_rows() == len(pd.read_parquet(tmp_path / "out")) == 5
    assert pq.read_table(tmp_path / "out")["embedding"].type == pa.list_(pa.float16(), 128)
    exact = embed_slice(next(slices(ImageFolder(tmp_path / "in"))), embedder, embedding_schema(embedder))
    np.testing.assert_array_equal(np.float16(exact["embedding"].to_pylist()), pq.read_table(tmp_path / "out")["embedding"].to_pylist())


def test_empty_sources(embedder, tmp_path):
    (tmp_path / "empty").mkdir()
    for resume in (True, False):
        with pytest.raises(ValidationError, match="the source has no images: nothing is written"):
            embed_images(tmp_path / "empty", tmp_path / "deep" / "out", embedder, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    assert embed_images(make_images(tmp_path / "in", 2), tmp_path / "out", embedder).embedded == 2
    before = files(tmp_path / "out")
    with pytest.raises(ValidationError, match="has 2 rows: is a disk not mounted"): embed_images(tmp_path / "empty", tmp_path / "out", embedder)
    assert files(tmp_path / "out") == before
    assert embed_images([], tmp_path / "out", embedder, resume=False).total == 0 and pq.read_table(tmp_path / "out").num_rows == 0
    assert pq.read_table(tmp_path / "out").schema.names[-1] == "embedding"
    assert embed_images([], tmp_path / "out", embedder).total == 0 and embed_images(tmp_path / "in", tmp_path / "out", embedder).embedded == 2
    with pytest.raises(FileNotFoundError, match="no-such"): embed_images(tmp_path / "no-such", tmp_path / "out2", embedder)
    assert not (tmp_path / "out2").exists()


def test_two_inputs_with_one_id_are_refused_before_any_work(embedder, tmp_path):
    folder = make_images(tmp_path / "in", 3)
    pq.write_table(pa.table({"sku": ["a", "b", "a"], "image": [b"", b"", b""]}), tmp_path / "x.parquet")
    for source in (ImageList([folder / "0000.png", folder / "0001.png", folder / "0000.png"]), ParquetImages(tmp_path / "x.parquet", id_column="sku")):
        with pytest.raises(ValidationError, match="is given twice"): embed_images(source, tmp_path / "out", embedder, shard_rows=1)
    assert not (tmp_path / "out").exists()


def test_a_run_in_which_nothing_was_done_leaves_what_was_there(embedder, tmp_path):
    "Folders that it made go, those of others stay, and vectors that were computed stay too."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".gitkeep").touch()
    folder = make_images(tmp_path / "in", 3)
    def fails(*args):
        raise MLError("no model")
        yield
    for out in (tmp_path / "mine", tmp_path / "a" / "b" / "c"):
        with pytest.raises(MLError, match="no model"): embed_images(folder, out, embedder, engine=fails)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "mine"] and [p.name for p in (tmp_path / "mine").iterdir()] == [".gitkeep"]
    def fails_late(plan, embedder, schema, pool, batch_size, on_progress):
        yield embed_slice(plan.slice(0), embedder, schema, pool, batch_size=batch_size)
        raise MLError("gone")
    with pytest.raises(MLError, match="gone"): embed_images(folder, tmp_path / "out", embedder, engine=fails_late, shard_rows=2)
    with pytest.raises(ValidationError, match="has an unfinished data set"): FolderIndex(tmp_path / "out")
    assert embed_images(folder, tmp_path / "out", embedder, shard_rows=2).reused == 2


def test_failures_are_named(embedder, tmp_path):
    folder = make_images(tmp_path / "in", 1)
    for n in range(120): (folder / f"bad-{n:03}.png").write_bytes(b"broken %d" % n)
    report = embed_images(folder, tmp_path / "out", embedder)
    assert report.error == 120 and len(report.failures) == 100 and report.failures[0][0] == "bad-000.png" and report.failures[0][1].startswith("unknown-format: ")
    assert report.to_dict()["failures"][99][0] == "bad-099.png"


@pytest.mark.parametrize("wrong, says", [(dict(batch_size=0), "batch_size"), (dict(batch_size=2.5), "batch_size"), (dict(shard_rows=0), "shard_rows=0: expected a whole number of at least 1"), (dict(dtype="int8"), "float32, float16"),
                                         (dict(engine="spark"), "engine='spark': expected 'local', or an engine such as RayEngine"), (dict(engine=None), "an engine such as"), (dict(resume="no"), "True or False"), (dict(progress=2), "True or False")])
def test_wrong_arguments_touch_nothing(embedder, tmp_path, wrong, says):
    with pytest.raises(ValidationError, match=says): embed_images(["a.jpg"], tmp_path / "out", embedder, **wrong)
    assert not list(tmp_path.iterdir())


# kills

SERVER = LOAD + """
import json, os, sys, torch, traceback
from devsky_nb.embedding.bulk import embed_images
from devsky_nb.embedding.pool import VectorPool
torch.set_num_threads(2)
embed_images([sys.argv[1]], sys.argv[2], e, batch_size=8)
torch.set_num_threads(1)  # a fork has no others
for line in sys.stdin:
    if not (pid := os.fork()):
        try:
            exec(json.loads(line))
            os._exit(0)
        except BaseException: traceback.print_exc()
        finally: os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    "Run code in a fork of a process that has the model and is warm: `start` gives its pid, `end` its exit status."
    tmp = tmp_path_factory.mktemp("server")
    server = subprocess.Popen([sys.executable, "-c", SERVER, make_images(tmp / "in", 1) / "0000.png", tmp / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(tmp / "stderr").open("w", encoding="utf-8"), text=True)
    class Fork:
        stderr = tmp / "stderr"
        def start(self, code):
            print(json.dumps(code), file=server.stdin, flush=True)
            return int(server.stdout.readline())
        def end(self): return int(server.stdout.readline())
        def run(self, code): return self.start(code) and self.end()
    yield Fork()
    server.stdin.close()
    server.wait()


STEPS = ("replace", "fsync", "unlink", "mkdir")
KILLER = """
import itertools, signal
steps = itertools.count()
def killing(f):
    def g(*args, **kwargs):
        if next(steps) == KILL: os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return g
for name in NAMES: setattr(os, name, killing(getattr(os, name)))
VectorPool.add = killing(VectorPool.add)
"""


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow, id="every step"), pytest.param(3, id="every third")])
@pytest.mark.parametrize("update", [False, True], ids=["first run", "update"])
def test_kill_9_at_every_step_then_the_same_call_again(embedder, fork, tmp_path, update, stride):
    rows = 5 if update else 9
    folder, start, end = make_images(tmp_path / "in", 12 if update else 6), tmp_path / "start", tmp_path / "end"
    (folder / "0002b.png").write_bytes((folder / "0001.png").read_bytes())
    (folder / "0002c.png").write_bytes(b"broken")
    start.mkdir()
    if update:
        embed_images(folder, start, embedder, batch_size=8, shard_rows=rows)
        for n in range(5, 10): (folder / f"{n:04}.png").unlink()
        (folder / "0000.png").rename(folder / "moved.png")
        (folder / "0003.png").write_bytes((make_images(tmp_path / "new", 1, seed=1) / "0000.png").read_bytes())
    embed_images(folder, end, embedder, batch_size=8, shard_rows=rows)
    code, kill = -9, 0
    while code == -9:
        out = tmp_path / f"out-{kill}"
        shutil.copytree(start, out)
        call = f"embed_images({str(folder)!r}, {str(out)!r}, e, batch_size=8, shard_rows={rows})"
        code = fork.run(f"KILL, NAMES = {kill}, {STEPS}\n{KILLER}\n{call}")
        seen = files(out)
        assert "_SUCCESS" not in seen or seen in (files(start), files(end)), f"step {kill}: a mixture looks finished"
        if kill % 5 == 0: fork.run(f"KILL, NAMES = {kill % 11}, {STEPS}\n{KILLER}\n{call}")
        embed_images(folder, out, embedder, batch_size=8, shard_rows=rows)
        assert files(out) == files(end), f"step {kill}"
        assert set(os.listdir(out / ".devsky")) <= {"lock", "next"}
        kill += stride
    assert code == 0 and kill > 20


def test_a_kill_while_everything_is_replaced_by_another_kind(embedder, fork, tmp_path):
    "From the moment the new shards are announced, the next run completes them: it does not find two kinds in one folder."
    folder, call = make_images(tmp_path / "in", 4), dict(batch_size=8, shard_rows=2)
    embed_images(folder, tmp_path / "start", embedder, **call)
    embed_images(folder, tmp_path / "end", embedder, dtype="float16", **call)
    code, kill, announced = -9, 0, 0
    while code == -9:
        out = tmp_path / f"out-{kill}"
        shutil.copytree(tmp_path / "start", out)
        code = fork.run(f"KILL, NAMES = {kill}, ('replace', 'unlink')\n{KILLER}\nembed_images({str(folder)!r}, {str(out)!r}, e, resume=False, dtype='float16', batch_size=8, shard_rows=2)")
        if (out / ".devsky" / "commit.json").exists():
            announced += 1
            embed_images(folder, out, embedder, dtype="float16", **call)
            assert files(out) == files(tmp_path / "end")
        elif code == -9: assert files(out) in (files(tmp_path / "start"), files(tmp_path / "end"))
        kill += 1
    assert code == 0 and announced > 4


def wait_for_work(out):
    wal = out / ".devsky" / "vectors.sqlite-wal"
    wait_until(lambda: wal.exists() and wal.stat().st_size > 60_000 or (out / "_SUCCESS").exists())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_or_ctrl_c_in_the_middle_costs_a_batch_at_most(embedder, fork, tmp_path, signum):
    folder, out = make_images(tmp_path / "in", 300), tmp_path / "out"
    pid = fork.start(f"embed_images({str(folder)!r}, {str(out)!r}, e, batch_size=8, progress=True)")
    wait_for_work(out)
    os.kill(pid, signum)
    assert fork.end() == (-9 if signum == signal.SIGKILL else 1)
    said = fork.stderr.read_text(encoding="utf-8")
    assert "img/s" in said and "/300" in said and ("KeyboardInterrupt" in said or signum == signal.SIGKILL)
    assert [p.name for p in out.iterdir()] == [".devsky"]
    report = embed_images(folder, out, embedder, batch_size=8)
    assert report.embedded == 300 and 24 <= report.reused < 300
    embed_images(folder, tmp_path / "fresh", embedder, batch_size=8)
    assert files(out) == files(tmp_path / "fresh")


def test_two_runs_at_once(embedder, fork, tmp_path):
    folder, out = make_images(tmp_path / "in", 3), tmp_path / "out"
    pid = fork.start(f"from pathlib import Path; from devsky_nb.embedding.dataset import locked_folder; import time\nwith locked_folder(Path({str(out)!r})) as state: (state / 'mine').touch(); time.sleep(60)")
    wait_until((out / ".devsky" / "mine").exists)
    with pytest.raises(DevSkyyError, match="another run is writing"): embed_images(folder, out, embedder)
    os.kill(pid, signal.SIGKILL)
    assert fork.end() == -9
    assert embed_images(folder, out, embedder).embedded == 3


FORKED = """
import signal
from PIL import Image
signal.alarm(60)  # a hang ends here
image = Image.new("RGB", (64, 64), "red")
calls = [lambda: e.encode_image(image), lambda: e.encode_text("a dress"), lambda: CLIPImageEmbedder("tiny-clip", device="cpu").encode_image(image)]
torch.set_num_threads(2)
for call in calls:
    try: call()
    except Exception as error: assert type(error).__name__ == "DevSkyyError" and "get_context('spawn')" in str(error), error
    else: raise AssertionError("it did not notice the fork")
torch.set_num_threads(1)
for call in calls: assert tuple(call().shape) == (1, 128)
"""


def test_a_forked_process_says_what_to_do_or_computes_with_one_thread(fork):
    assert fork.run(FORKED) == 0, fork.stderr.read_text(encoding="utf-8")


# disks

def test_what_is_renamed_is_on_the_disk_before(embedder, tmp_path, monkeypatch):
    "Power may fail, too: no name appears before its content is durable, no file moves before its folder and the intention are."
    log, flush, replace = [], os.fsync, os.replace
    def unmarked(path): return re.sub(r"\.[0-9a-f]{16}\.partial$", ".partial", Path(path).name)
    def fsync(fd):
        log.append(unmarked(os.readlink(f"/proc/self/fd/{fd}")))
        flush(fd)
    def rename(a, b):
        log.append((unmarked(a), unmarked(b)))
        replace(a, b)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    embed_images(make_images(tmp_path / "in", 3), tmp_path / "out", embedder, shard_rows=2)
    def written(name, folder): return [f".{name}.partial", (f".{name}.partial", name), folder]
    shards = ["part-00000.parquet", "part-00001.parquet"]
    assert log == [*written("settings.json", ".devsky"), *written(shards[0], "next"), *written(shards[1], "next"), *written("commit.json", ".devsky"),
                   "out", (shards[0], shards[0]), (shards[1], shards[1]), "out", *written("_SUCCESS", "out")]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk, options): subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(embedder, tmp_path, small_disk):
    folder, out = make_images(tmp_path / "in", 200), small_disk / "out"
    with pytest.raises(DevSkyyError, match="(disk is full|No space left).*Make room"): embed_images(folder, out, embedder, shard_rows=50, batch_size=8)
    assert not list(out.glob("*.parquet"))
    remount(small_disk, "size=20m")
    report = embed_images(folder, out, embedder, shard_rows=50, batch_size=8)
    assert report.embedded == 200 and report.reused > 0
    embed_images(folder, tmp_path / "fresh", embedder, shard_rows=50, batch_size=8)
    assert files(out) == files(tmp_path / "fresh")
    before = files(out)
    make_images(tmp_path / "in", 500, seed=1)
    remount(small_disk, "size=700k")
    with pytest.raises(DevSkyyError, match="Make room"): embed_images(folder, out, embedder, shard_rows=50, batch_size=8)
    assert files(out) == before, "an update that fails leaves the old data set"


def test_a_read_only_target(embedder, tmp_path, small_disk):
    folder = make_images(tmp_path / "in", 3)
    remount(small_disk, "ro")
    with pytest.raises(DevSkyyError, match="Read-only file system"): embed_images(folder, small_disk / "out", embedder)
    remount(small_disk, "rw,size=2m")
    embed_images(folder, small_disk / "out", embedder)
    before = files(small_disk / "out")
    remount(small_disk, "ro")
    with pytest.raises(DevSkyyError, match="Read-only file system"): embed_images(folder, small_disk / "out", embedder)
    assert files(small_disk / "out") == before
    remount(small_disk, "rw")


# what is there already

def test_a_vector_that_is_computed_again_is_not_called_reused(embedder, tmp_path, monkeypatch):
    folder, out = make_images(tmp_path / "in", 9), tmp_path / "out"
    embed_images(folder, out, embedder)
    assert embed_images(folder, out, embedder).reused == 9
    monkeypatch.setattr(VectorPool, "find", lambda self, digest: None)
    assert embed_images(folder, out, embedder).reused == 0


def test_damaged_and_foreign_files_are_named(embedder, tmp_path):
    folder, out = make_images(tmp_path / "in", 9), tmp_path / "out"
    embed_images(folder, out, embedder, shard_rows=4)
    before, shard = files(out), out / "part-00001.parquet"
    sound = before[shard.name]
    middle = pq.read_metadata(shard).row_group(0).column(6).data_page_offset + 200  # of the vectors
    for data in (sound[:-7], b"", sound[:middle] + bytes([sound[middle] ^ 255]) + sound[middle + 1:]):
        shard.write_bytes(data)
        with pytest.raises(ValidationError, match=r"part-00001.parquet' is damaged.*delete it"): embed_images(folder, out, embedder, shard_rows=4)
    shard.unlink()
    report = embed_images(folder, out, embedder, shard_rows=4)
    assert files(out) == before and report.reused == 5
    for name in ("notes.txt", "part-00000-abc.parquet", "sub"):
        (out / name).mkdir() if name == "sub" else (out / name).touch()
        with pytest.raises(ValidationError, match=f"holds '{name}'"): embed_images(folder, out, embedder, shard_rows=4)
        (out / name).rmdir() if name == "sub" else (out / name).unlink()
    pq.write_table(pa.table({"a": [1]}), out / "part-00003.parquet")
    for resume, says in ((True, "part-00003.parquet' was not written by this version"), (False, "part-00003.parquet' was not written by embed_images: it is not replaced")):
        with pytest.raises(ValidationError, match=says): embed_images(folder, out, embedder, shard_rows=4, resume=resume)
    (out / "part-00003.parquet").unlink()
    assert files(out) == before
    (out / ".devsky" / "settings.json").write_text(json.dumps(vector_kind(embedding_schema(embedder)).to_dict()), encoding="utf-8")
    (out / ".devsky" / "vectors.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DevSkyyError, match="vectors.sqlite.*damaged: delete it"): embed_images(folder, out, embedder, shard_rows=4)


@pytest.fixture(scope="module")
def nine(embedder, tmp_path_factory):
    "Nine images, and their data set of three shards."
    folder, out = make_images(tmp_path_factory.mktemp("nine") / "in", 9), tmp_path_factory.mktemp("nine-out")
    embed_images(folder, out, embedder, shard_rows=4)
    return folder, out


def older_version(shard):
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"devsky_nb.format": b"0"}), shard)


DAMAGE = {
    "a shard is cut off": lambda out: (out / "part-00001.parquet").write_bytes((out / "part-00001.parquet").read_bytes()[:-7]),
    "a shard is empty": lambda out: (out / "part-00000.parquet").write_bytes(b""),
    "every shard is something else": lambda out: [p.write_bytes(b"something else") for p in out.glob("part-*")],
    "a shard is of another version": lambda out: older_version(out / "part-00002.parquet"),
    "the pool is no database": lambda out: (out / ".devsky" / "vectors.sqlite").write_bytes(b"no database" * 1000),
    "the pool is a folder": lambda out: (out / ".devsky" / "vectors.sqlite" / "sub").mkdir(parents=True),
    "the pool's kind cannot be read": lambda out: (out / ".devsky" / "settings.json").write_bytes(b"\xff{"),
    "the pool's kind is of another version": lambda out: (out / ".devsky" / "settings.json").write_text('{"format": 2}', encoding="utf-8"),
    "the pool's kind is a folder": lambda out: (out / ".devsky" / "settings.json").mkdir(),
    "the plan is of another version": lambda out: (out / ".devsky" / "plan.sqlite").write_bytes(b"version 2"),
    "the plan is a folder": lambda out: (out / ".devsky" / "plan.sqlite" / "sub").mkdir(parents=True),
    "a commit cannot be read": lambda out: (out / ".devsky" / "commit.json").write_bytes(b'{"shards": 3, "summ'),
    "a commit is of another version": lambda out: (out / ".devsky" / "commit.json").write_text('{"files": []}', encoding="utf-8"),
    "the staging folder is a file": lambda out: [shutil.rmtree(out / ".devsky" / "next"), (out / ".devsky" / "next").touch()],
    "the slices of a cluster are a file": lambda out: (out / ".devsky" / "slices").touch(),
    "the mark of success is something else": lambda out: (out / "_SUCCESS").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_from_nothing_no_state_of_an_earlier_run_stands_in_the_way(embedder, nine, tmp_path, damage):
    folder, good = nine
    out = tmp_path / "out"
    shutil.copytree(good, out)
    damage(out)
    report = embed_images(folder, out, embedder, resume=False, shard_rows=4)
    assert (report.embedded, report.reused) == (9, 0) and files(out) == files(good)
    assert embed_images(folder, out, embedder, shard_rows=4).reused == 9 and set(os.listdir(out / ".devsky")) == {"lock", "next"}


@pytest.mark.parametrize("name", ["settings.json", "commit.json"])
def test_state_that_cannot_be_read_is_named_and_can_be_deleted(embedder, nine, tmp_path, name):
    folder, good = nine
    out = tmp_path / "out"
    shutil.copytree(good, out)
    (out / ".devsky" / name).write_bytes(b"\xff{")
    with pytest.raises(ValidationError, match=f"{name}' is damaged.*delete") as e: embed_images(folder, out, embedder, shard_rows=4)
    assert json.loads(json.dumps(e.value.to_dict()))["details"]["path"].endswith(name)
    (out / ".devsky" / name).unlink()
    assert embed_images(folder, out, embedder, shard_rows=4).reused == 9


def test_what_is_not_ours_is_never_removed(embedder, nine, tmp_path):
    folder, good = nine
    def refused(out, says):
        before = files(out)
        for resume in (True, False):
            with pytest.raises(ValidationError, match=says[resume]): embed_images(folder, out, embedder, resume=resume)
            assert files(out) == before
    spark = tmp_path / "spark"
    spark.mkdir()
    (spark / "_SUCCESS").touch()
    (spark / "part-00000.parquet").write_bytes(b"encrypted")  # nothing says that it is ours, and a first refusal does not make it so
    for _ in range(2): refused(spark, ("nothing says that it is ours", "is damaged"))
    (tmp_path / "dask" / "part-00000.parquet").mkdir(parents=True)
    refused(tmp_path / "dask", ("holds 'part-00000.parquet', which is no part",) * 2)
    mixed = tmp_path / "mixed"
    shutil.copytree(good, mixed)
    pq.write_table(pa.table({"a": [1]}), mixed / "part-00007.parquet")
    refused(mixed, ("part-00007.parquet' was not written by embed_images", "part-00007.parquet' was not written by this version"))
    (mixed / "part-00007.parquet").unlink()
    (mixed / ".devsky" / "notes.txt").write_text("mine", encoding="utf-8")
    embed_images(folder, mixed, embedder, resume=False)
    assert (mixed / ".devsky" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_copied_data_set_with_a_damaged_shard_is_replaced(embedder, nine, tmp_path):
    "Without its hidden folder, a whole shard beside the damaged one says that both are ours."
    folder, good = nine
    for name in ("part-00000.parquet", "part-00001.parquet"): shutil.copy(good / name, tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(b"damaged")
    assert embed_images(folder, tmp_path, embedder, resume=False, shard_rows=4).reused == 0 and files(tmp_path) == files(good)


def test_a_damaged_shard_stays_until_the_new_data_set_is_complete(embedder, nine, tmp_path):
    folder, good = nine
    out = tmp_path / "out"
    shutil.copytree(good, out)
    (out / "part-00001.parquet").write_bytes(b"damaged")
    before = files(out)
    def engine(*args):
        yield from []
        raise DevSkyyError("stop")
    with pytest.raises(DevSkyyError, match="stop"): embed_images(folder, out, embedder, False, engine, shard_rows=4)
    assert files(out) == before


def test_the_model_of_a_job_is_not_evicted_and_an_engine_can_be_passed_in(nine, tmp_path):
    registry, said = ModelRegistry(), []
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu", registry=registry)
    def engine(plan, embedder, schema, pool, batch_size, on_progress):
        with pytest.raises(MLError, match="in use"): registry.unload("tiny-clip")
        said.append(embedder.receipt.backend)
        yield from local_engine(plan, embedder, schema, pool, batch_size, on_progress)
    assert embed_images(nine[0], tmp_path / "out", embedder, engine=engine).embedded == 9 and said == [embedder.backend]
    embedder.close()
    assert registry.unload("tiny-clip") > 0
    with pytest.raises(ValidationError, match="a closed embedder has no model"): embed_images(nine[0], tmp_path / "late", embedder)
    assert not (tmp_path / "late").exists()


def test_errors_and_reports_are_json(embedder, nine, tmp_path):
    with pytest.raises(ValidationError) as e: embedder.encode_images_batch([nine[0] / "0000.png", tmp_path / "no.png"])
    assert json.loads(json.dumps(e.value.to_dict()))["details"]["errors"][0]["index"] == 1
    with pytest.raises(ValidationError) as e: embed_images(nine[0], nine[0], embedder)
    assert json.loads(json.dumps(e.value.to_dict()))["details"]["out"] == str(nine[0])
    report = embed_images(nine[0], tmp_path / "out", CLIPImageEmbedder("tiny-clip", device="cpu"))
    assert json.loads(json.dumps(report.to_dict()))["receipt"]["backend"] == embedder.backend


def test_damage_never_becomes_a_vector(embedder, tmp_path):
    embed_images(make_images(tmp_path / "in", 2), tmp_path / "out", embedder)
    shard, rows = tmp_path / "out" / "part-00000.parquet", pq.read_table(tmp_path / "out").to_pylist()
    data, found = shard.read_bytes(), 0
    for at in range(4, len(data), 23):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1:])
        pool = VectorPool(tmp_path / f"{at}.sqlite", "float32")
        try:
            shard_kind(shard)
            add_shards(pool, [shard])
        except ValidationError: found += 1
        for row in rows:
            assert (got := pool.find(row["content_hash"])) is None or got.vector.tolist() == row["embedding"], at
        pool.close()
    assert found > 20


def test_vectors_of_two_kinds_do_not_come_together(embedder, tmp_path):
    folder, out = make_images(tmp_path / "in", 3), tmp_path / "out"
    other = CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32", output="pooled")
    embed_images(folder, out, embedder)
    before = files(out)
    for e, kwargs in ((other, {}), (embedder, dict(dtype="float16"))):
        with pytest.raises(ValidationError, match=r"has vectors of projected-fp32-[\w-]+ \(float32\), and this call makes (pooled|projected).*resume=False"): embed_images(folder, out, e, **kwargs)
        assert files(out) == before
    assert embed_images(folder, out, other, resume=False).reused == 0
    assert pq.read_schema(out / "part-00000.parquet").metadata[b"devsky_nb.fingerprint"].decode() == other.fingerprint
    assert files(out).keys() == before.keys()


def test_work_that_was_not_finished_has_a_kind_too(embedder, tmp_path, monkeypatch):
    folder, out = make_images(tmp_path / "in", 20), tmp_path / "out"
    forward, calls = type(embedder)._forward, []
    def fails(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 2: raise MLError("CUDA error: device lost", original_error=RuntimeError("device lost"))
        return forward(self, pixels)
    monkeypatch.setattr(type(embedder), "_forward", fails)
    with pytest.raises(MLError, match="device lost"): embed_images(folder, out, embedder, batch_size=8)
    monkeypatch.undo()
    other = CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32", output="pooled")
    with pytest.raises(ValidationError, match="this call makes pooled"): embed_images(folder, out, other)
    report = embed_images(folder, out, embedder, batch_size=8)
    assert (report.embedded, report.reused) == (20, 8)
    assert not (out / ".devsky" / "vectors.sqlite").exists()


def test_a_vector_that_is_not_finite_is_one_row(embedder, tmp_path, monkeypatch):
    forward = type(embedder)._forward
    def spoiled(self, pixels):
        vectors = forward(self, pixels).copy()
        vectors[3] = np.nan
        return vectors
    monkeypatch.setattr(type(embedder), "_forward", spoiled)
    report = embed_images(make_images(tmp_path / "in", 6), tmp_path / "out", embedder, batch_size=8)
    assert (report.embedded, report.error, report.reasons) == (5, 1, {"model": 1})


def test_an_output_inside_its_source_is_passed_over_or_refused_at_once(embedder, tmp_path):
    folder = make_images(tmp_path / "photos", 3)
    for _ in range(2): assert embed_images(folder, folder / "a_vectors", embedder).total == 3
    make_images(folder, 4)
    report = embed_images(folder, folder / "a_vectors", embedder)
    assert (report.total, report.reused) == (4, 3)
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    for pattern, out in ((f"{tmp_path}/**/*.parquet", "out"), (f"{tmp_path}/*/*.parquet", "out"), (f"{tmp_path}/{{a,b}}/*.parquet", "b")):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
        with pytest.raises(ValidationError, match="inside the source"): embed_images(pattern, tmp_path / out, embedder)
        assert not (tmp_path / out).exists()
    assert embed_images(f"{tmp_path}/*.parquet", tmp_path / "out", embedder).total == 1


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("stock") / "in", 9)
    (folder / "broken.png").write_bytes(b"broken")
    return sorted(folder.iterdir())


@settings(max_examples=8, deadline=None)
@example([([(0, 9)], 1, False), ([(0, 0)], 1, False)])
@given(st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 9)), unique_by=lambda x: x[0], max_size=12), st.integers(1, 5), st.booleans()), min_size=2, max_size=3))
def test_after_any_changes_an_update_equals_a_run_from_nothing(embedder, stock, tmp_path_factory, versions):
    tmp = tmp_path_factory.mktemp("updates")
    for n, (entries, rows, large) in enumerate(versions):
        source = [(f"sku-{i}", stock[p]) for i, p in entries]
        if not source: continue
        report = embed_images(source, tmp / "out", embedder, shard_rows=rows, batch_size=16 if large else 8, prune=True)
        fresh = embed_images(source, tmp / f"fresh-{n}", embedder, shard_rows=rows, batch_size=8)
        assert files(tmp / "out") == files(tmp / f"fresh-{n}")
        assert (report.total, report.embedded, report.duplicate, report.reasons) == (fresh.total, fresh.embedded, fresh.duplicate, fresh.reasons) and report.total == len(source)
        seen = set()
        for row, (name, path) in zip(pq.read_table(tmp / "out").to_pylist(), source, strict=True):
            expected = "error" if path.stem == "broken" else "duplicate" if path in seen else "embedded"
            seen.add(path)
            assert (row["id"], row["path"], row["status"]) == (name, str(path), expected)


def test_renames_cost_no_model(embedder, tmp_path, monkeypatch):
    folder, out = make_images(tmp_path / "in", 10), tmp_path / "out"
    embed_images(folder, out, embedder, shard_rows=4)
    for p in sorted(folder.iterdir()): p.rename(folder / f"{9999 - int(p.stem)}.png")
    monkeypatch.setattr(type(embedder), "_forward", None)
    monkeypatch.setattr(type(embedder), "_prepare", None)
    report = embed_images(folder, out, embedder, shard_rows=4)
    assert (report.embedded, report.reused) == (10, 10)


def test_shards_that_stay_the_same_are_not_touched(embedder, tmp_path):
    folder, out = make_images(tmp_path / "in", 10), tmp_path / "out"
    embed_images(folder, out, embedder, shard_rows=4)
    before = {p.name: p.stat().st_ino for p in out.glob("*.parquet")}
    shutil.copy(folder / "0000.png", folder / "9.png")
    embed_images(folder, out, embedder, shard_rows=4)
    assert {p.name for p in out.glob("*.parquet") if p.stat().st_ino != before[p.name]} == {"part-00002.parquet"}


def test_automatic_precision_chooses_once(tmp_path, monkeypatch):
    folder, out = make_images(tmp_path / "in", 6), tmp_path / "out"
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu")
    report = embed_images(folder, out, embedder)
    assert embedder.receipt is None, "the caller's embedder stays as it is"
    assert report.receipt == json.loads(pq.read_schema(out / "part-00000.parquet").metadata[b"devsky_nb.receipt"])
    before = files(out)
    monkeypatch.setattr(bulk, "choose_for_job", None)
    again = embed_images(folder, out, embedder)
    assert again.reused == 6 and again.receipt == report.receipt and files(out) == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_job(fork, tmp_path):
    make_images(tmp_path / "few", 300, size=(120, 150))
    make_images(tmp_path / "many", 1200, seed=1, size=(120, 150))
    assert fork.run(f"""
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from resident import peak
for name in ("few", "many"):
    embed_images({str(tmp_path)!r} + "/" + name, {str(tmp_path)!r} + "/out-" + name, e, shard_rows=100)
    print(peak() >> 20, file=open({str(tmp_path)!r} + "/" + name + ".rss", "w", encoding="utf-8"))""") == 0
    few, many = (int((tmp_path / f"{n}.rss").read_text(encoding="utf-8")) for n in ("few", "many"))
    assert many - few < 32, (few, many)  # MiB; in the hundreds, buffers are still warming up; the pixels of 900 images are 46


def test_another_source_does_not_replace_a_data_set_unless_that_is_asked_for(tmp_path, embedder):
    def images(folder, n, seed):
        folder.mkdir()
        for i in range(n): render_garment(Garment("hat", "red", "plain"), size=64, seed=seed + i).save(folder / f"{folder.name}-{i}.png")
    images(tmp_path / "many", 9, 0)
    images(tmp_path / "few", 2, 100)
    first = embed_images(tmp_path / "many", tmp_path / "v", embedder)
    before = {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir() if p.is_file()}
    for again in (dict(), dict(shard_rows=3)):
        with pytest.raises(ValidationError, match="would lose 9 of its 9 rows, not among the 2 inputs"): embed_images(tmp_path / "few", tmp_path / "v", embedder, **again)
        assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir() if p.is_file()} == before
    (tmp_path / "copies").mkdir()
    for path in sorted((tmp_path / "many").iterdir())[:2]: shutil.copy(path, tmp_path / "copies" / ("copy-" + path.name))
    with pytest.raises(ValidationError, match="not among the 2 inputs"): embed_images(tmp_path / "copies", tmp_path / "v", embedder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir() if p.is_file()} == before, "a few that are known do not speak for all"
    (tmp_path / "many").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir(): path.rename(path.with_name("other-" + path.name))
    renamed = embed_images(tmp_path / "moved", tmp_path / "v", embedder)
    assert (renamed.removed, renamed.reused, renamed.total) == (9, 9, 9), "the same images under other names are no other source"
    for path in sorted((tmp_path / "moved").iterdir())[:4]: path.unlink()
    assert (embed_images(tmp_path / "moved", tmp_path / "v", embedder).removed, first.removed) == (4, 0)
    pruned = embed_images(tmp_path / "few", tmp_path / "v", embedder, prune=True)
    assert (pruned.removed, pruned.total) == (5, 2) and pruned.to_dict()["removed"] == 5 and "5 earlier rows removed" in repr(pruned)
    replaced = embed_images(tmp_path / "moved", tmp_path / "v", embedder, resume=False)
    assert replaced.total == 5, "nothing is used, so nothing is kept"
    with pytest.raises(ValidationError, match="prune"): embed_images(tmp_path / "few", tmp_path / "v", embedder, prune=1)
