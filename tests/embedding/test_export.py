"Exports: whole or absent, every row accounted for, and the neighbours of FolderIndex wherever they are asked."
import json, os, re, signal, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from patience import PATIENCE

from devsky_nb import FolderIndex, export_embeddings
from devsky_nb.embedding import export as export_module
from devsky_nb.embedding.export import FORMATS, ExportJob, Format, point_id, switch_collection
from devsky_nb.errors import DevSkyyError, FileNotFoundError, InsufficientMemoryError, ValidationError

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"faiss": "faiss", "usearch": "usearch", "lancedb": "lancedb", "qdrant": "qdrant_client"}


def dataset(out, n=50, dim=16, dtype=np.float32, shard_rows=13, distinct=None, **more):
    """A finished data set: of every ten inputs the fourth failed, and the sixth and seventh are copies of the second, which may lie in
    an earlier shard. With `distinct`, the vectors repeat after so many."""
    rng = np.random.default_rng(0)
    x = np.resize(rng.normal(size=(distinct or n, dim)), (n, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    status = [{4: "error", 6: "duplicate", 7: "duplicate"}.get(i % 10, "embedded") for i in range(n)]
    original = [i - i % 10 + 2 if s == "duplicate" else i for i, s in enumerate(status)]
    number = pa.float32() if dtype == np.float32 else pa.float16()
    schema = pa.schema({"id": pa.string(), "path": pa.string(), "status": pa.string(), "error": pa.string(), "content_hash": pa.string(),
                        "actions": pa.list_(pa.string()), **{name: pa.int64() for name in more}, "embedding": pa.list_(number, dim)},
                       {"devsky_nb.format": "1", "devsky_nb.fingerprint": "projected-fp32-0123456789abcdef", "devsky_nb.model": "made-up"})
    columns = {"id": [f"sku-{i:05}" for i in range(n)], "path": [f"shop/{i}.jpg" for i in range(n)], "status": status,
               "error": ["truncated: it ends early" if s == "error" else None for s in status],
               "content_hash": [None if s == "error" else f"{o:064x}" for o, s in zip(original, status)], "actions": [[]] * n, **more}
    out.mkdir(parents=True)
    missing = pa.array([s != "embedded" for s in status])
    arrays = [pa.array(columns[name], schema.field(name).type) for name in schema.names[:-1]]
    table = pa.Table.from_arrays([*arrays, pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), dim, mask=missing)], schema=schema)
    for number, start in enumerate(range(0, n, shard_rows)): pq.write_table(table.slice(start, shard_rows), out / f"part-{number:05}.parquet")
    shards = len(list(out.glob("*.parquet")))
    (out / "_SUCCESS").write_text(json.dumps({"rows": n, "shards": shards}), encoding="utf-8")
    return x, status


def hidden(folder): return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_every_input_is_in_the_account_and_every_id_can_be_found(tmp_path):
    x, status = dataset(tmp_path / "v", price=list(range(50)))
    report = export_embeddings(tmp_path / "v", tmp_path / "new" / "a.parquet")
    assert (report.rows, report.embedded, report.duplicate, report.error, report.total) == (35, 35, 10, 5, 50)
    rows = pq.read_table(tmp_path / "new" / "a.parquet").to_pylist()
    kept = [i for i, s in enumerate(status) if s == "embedded"]
    assert [r["id"] for r in rows] == [f"sku-{i:05}" for i in kept] and [r["price"] for r in rows] == kept
    assert np.array_equal(np.array([r["embedding"] for r in rows], np.float32), x[kept]), "to the last bit"
    assert {r["id"]: r["copies"] for r in rows if r["copies"]} == {f"sku-{t}2": [f"sku-{t}6", f"sku-{t}7"] for t in ("0000", "0001", "0002", "0003", "0004")}
    assert set(rows[0]) == {"id", "path", "content_hash", "actions", "price", "copies", "embedding"}
    schema = pq.read_schema(tmp_path / "new" / "a.parquet")
    assert schema.metadata[b"devsky_nb.fingerprint"] == b"projected-fp32-0123456789abcdef" and b"inner product" in schema.metadata[b"devsky_nb.metric"]
    assert hidden(tmp_path / "new") == []
    again = export_embeddings(tmp_path / "v", tmp_path / "b.parquet", copies="repeated")
    repeated = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert again.rows == len(repeated) == 45 and "copies" not in repeated[0]
    assert {r["id"] for r in repeated} == {f"sku-{i:05}" for i, s in enumerate(status) if s != "error"}
    assert all(r["path"] == f"shop/{int(r['id'][4:])}.jpg" for r in repeated)
    assert all(r["embedding"] == rows[kept.index(int(r["content_hash"], 16))]["embedding"] for r in repeated)


def test_half_precision_becomes_float32_of_length_one(tmp_path):
    x, _ = dataset(tmp_path / "v", dtype=np.float16, dim=32)
    export_embeddings(tmp_path / "v", tmp_path / "a.parquet")
    column = pq.read_table(tmp_path / "a.parquet")["embedding"]
    vectors = column.combine_chunks().flatten().to_numpy().reshape(-1, 32)
    assert vectors.dtype == np.float32 and abs(np.linalg.norm(vectors.astype(float), axis=1) - 1).max() < 1e-6
    assert abs(np.linalg.norm(x.astype(float), axis=1) - 1).max() > 1e-5


@pytest.mark.parametrize("change, error, says", [
    (dict(out="nowhere"), FileNotFoundError, "no folder"),
    (dict(out="empty"), ValidationError, "no Parquet files"),
    (dict(out="begun"), ValidationError, "unfinished data set"),
    (dict(out="part"), ValidationError, "has no _SUCCESS"),
    (dict(out="failed"), ValidationError, "has no vectors"),
    (dict(out=""), ValidationError, "expected a path"),
    (dict(dest=""), ValidationError, "expected a path"),
    (dict(dest="taken.parquet"), ValidationError, "exists: choose another name"),
    (dict(dest="empty"), ValidationError, "is a folder: name a file"),
    (dict(dest="empty", overwrite=True), ValidationError, "is a folder: name a file"),
    (dict(dest="v/a.parquet"), ValidationError, "one inside the other"),
    (dict(dest=".", to="faiss", overwrite=True), ValidationError, "one inside the other"),
    (dict(dest="empty", to="faiss", overwrite=True), ValidationError, "is no export of ours"),
    (dict(dest="taken.parquet", to="usearch", overwrite=True), ValidationError, "is no export of ours"),
    (dict(dest="s3://bucket/a.parquet"), ValidationError, "is an address"),
    (dict(dest="http://localhost:6333", to="faiss"), ValidationError, "is an address"),
    (dict(to="milvus"), ValidationError, "expected one of parquet, faiss"),
    (dict(to=None), ValidationError, "expected one of parquet, faiss"),
    (dict(copies="both"), ValidationError, "expected one of listed, repeated"),
    (dict(overwrite="yes"), ValidationError, "expected True or False"),
    (dict(to="lancedb", table="../x"), ValidationError, "a name of letters"),
    (dict(to="qdrant", table=""), ValidationError, "a name of letters"),
])
def test_what_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, change, error, says):
    monkeypatch.chdir(tmp_path)
    dataset(Path("v"))
    dataset(Path("part"))
    os.unlink("part/_SUCCESS")
    Path("empty").mkdir()
    Path("begun/.devsky").mkdir(parents=True)
    dataset(Path("failed"), n=5)
    failed = pq.read_table("failed/part-00000.parquet").slice(4, 1)
    pq.write_table(failed, "failed/part-00000.parquet")
    Path("failed/_SUCCESS").write_text('{"rows": 1, "shards": 1}', encoding="utf-8")
    Path("taken.parquet").write_bytes(b"a file of theirs")
    before = sorted(p for p in tmp_path.rglob("*"))
    call = dict(out="v", dest="new.parquet") | change
    with pytest.raises(error, match=re.escape(says)): export_embeddings(**call)
    assert sorted(p for p in tmp_path.rglob("*")) == before and Path("taken.parquet").read_bytes() == b"a file of theirs"


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    dataset(tmp_path / "v")
    monkeypatch.setitem(FORMATS, "faiss", Format(export_module.write_faiss, ("faiss_that_is_missing",)))
    with pytest.raises(DevSkyyError, match="this needs faiss_that_is_missing: run pip install"): export_embeddings(tmp_path / "v", tmp_path / "i", "faiss")
    assert sorted(os.listdir(tmp_path)) == ["v"]


def test_a_link_is_written_through_and_a_file_replaced_only_when_asked(tmp_path):
    dataset(tmp_path / "v")
    (tmp_path / "real").mkdir()
    (tmp_path / "link.parquet").symlink_to(tmp_path / "real" / "a.parquet")
    with pytest.raises(ValidationError, match="exists"): export_embeddings(tmp_path / "v", tmp_path / "link.parquet")
    export_embeddings(tmp_path / "v", tmp_path / "real" / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "real" / "a.parquet").slice(0, 1), tmp_path / "real" / "a.parquet")
    export_embeddings(tmp_path / "v", tmp_path / "link.parquet", overwrite=True)
    assert (tmp_path / "link.parquet").is_symlink() and pq.read_table(tmp_path / "real" / "a.parquet").num_rows == 35


def test_a_file_of_somebody_is_not_replaced(tmp_path):
    dataset(tmp_path / "v")
    (tmp_path / "prices.csv").write_text("sku,price")
    pq.write_table(pa.table({"sku": [1]}), tmp_path / "prices.parquet")
    before = {path: path.read_bytes() for path in tmp_path.glob("prices.*")}
    for path in before:
        with pytest.raises(ValidationError, match="is no export of ours, and is not replaced"): export_embeddings(tmp_path / "v", path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("prices.*")} == before


def test_a_data_set_that_contradicts_itself_is_refused(tmp_path):
    dataset(tmp_path / "v")
    path = tmp_path / "v" / "part-00001.parquet"
    table = pq.read_table(path)
    hashes = pa.array(["f" * 64 if s == "duplicate" else h for s, h in zip(table["status"].to_pylist(), table["content_hash"].to_pylist())])
    pq.write_table(table.set_column(table.schema.get_field_index("content_hash"), "content_hash", hashes), path)
    with pytest.raises(ValidationError, match="2 copies have no original"): export_embeddings(tmp_path / "v", tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValidationError, match="part-00001.parquet"): export_embeddings(tmp_path / "v", tmp_path / "a.parquet")
    assert sorted(os.listdir(tmp_path)) == ["v"]


KILLED = """
import os, signal, sys
from devsky_nb.embedding import export
export.ROWS = 4
steps = []
def die(event, args):
    if event not in ("os.rename", "open", "shutil.rmtree") or "_exports_" not in str(args): return
    steps.append(event)
    if len(steps) == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
export.export_embeddings(sys.argv[1], sys.argv[2], sys.argv[4], overwrite=True)
print(len(steps))
"""


def killed_at(step, out, dest, to): return subprocess.run([sys.executable, "-c", KILLED, out, dest, str(step), to], capture_output=True, text=True, timeout=PATIENCE)


def is_whole(dest, to):
    "What a reader sees: nothing, or all of it."
    if not dest.exists(): return None
    if to == "parquet": return pq.read_table(dest).num_rows == 35
    if to == "faiss": return set(os.listdir(dest)) == {"index.faiss", "rows.parquet", "export.json"} and pq.read_metadata(dest / "rows.parquet").num_rows == 35
    import lancedb
    return lancedb.connect(dest).open_table("images").count_rows() == 35 if (dest / "images.lance").exists() else None


def kills(tmp_path, to, steps):
    dataset(tmp_path / "v")
    places = tmp_path / "_exports_"
    places.mkdir(exist_ok=True)
    dest = places / "a"
    seen = set()
    for step in steps:
        done = killed_at(step, tmp_path / "v", dest, to)
        seen.add(is_whole(dest, to))
        assert False not in seen, (step, done.stderr)
        if done.returncode == 0: break
        assert done.returncode == -signal.SIGKILL, done.stderr
    export_embeddings(tmp_path / "v", dest, to, overwrite=True)
    left = [name for name in hidden(places) if os.listdir(places / name)]
    assert is_whole(dest, to) and left == [], "what the killed ones left is gone"
    return done.returncode


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path):
    dataset(tmp_path / "again" / "v")
    (tmp_path / "_exports_").mkdir()
    steps = int(killed_at(1000, tmp_path / "again" / "v", tmp_path / "_exports_" / "b", "parquet").stdout)
    kills(tmp_path, "parquet", (2, steps - 3))  # the one that gives the file its name


@pytest.mark.slow
@pytest.mark.parametrize("to, stride", [("parquet", 1), ("faiss", 2), ("lancedb", 7)])
def test_a_kill_at_any_step_leaves_nothing_that_looks_whole(tmp_path, to, stride):
    pytest.importorskip(LIBRARIES.get(to, "pyarrow"))
    assert kills(tmp_path, to, range(1, 80, stride)) == 0, "the last step was tried"


def test_what_another_export_is_making_is_left_alone(tmp_path):
    with export_module.staging_folder(tmp_path / "a") as first:
        (first / "made").write_bytes(b"half")
        with export_module.staging_folder(tmp_path / "a") as second: assert first != second
        assert (first / "made").read_bytes() == b"half"
    assert os.listdir(tmp_path) == []


FULL = """
import resource, sys
from devsky_nb import export_embeddings
from devsky_nb.errors import DevSkyyError
for library in sys.argv[4:]: __import__(library)
sys.dont_write_bytecode = True  # Python would leave half a file of it, for everybody
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try: export_embeddings(sys.argv[1], sys.argv[2], sys.argv[3])
except DevSkyyError as e: print("refused:", e.message)
"""


def full_disk(tmp_path, to, *libraries):
    dataset(tmp_path / "v", n=2000, dim=64, shard_rows=1000)
    (tmp_path / "places").mkdir()
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path / "v", tmp_path / "places" / "a", to, *libraries], capture_output=True, text=True, timeout=PATIENCE)
    assert "refused: cannot" in done.stdout and "What was there is as it was" in done.stdout, (done.stdout, done.stderr[-2000:])
    assert os.listdir(tmp_path / "places") == []


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path): full_disk(tmp_path, "parquet")


@pytest.mark.slow
@pytest.mark.parametrize("to", LIBRARIES)
def test_a_full_disk_is_one_error_with_every_library(tmp_path, to):
    pytest.importorskip(LIBRARIES[to])
    full_disk(tmp_path, to, LIBRARIES[to])


def test_vectors_that_will_not_fit_into_memory_are_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "memory_info", lambda device: type("Info", (), {"free": 1000}))
    with pytest.raises(InsufficientMemoryError, match="holds all vectors in memory"): export_module.check_memory("usearch", 2000)
    export_module.check_memory("usearch", 1000)


def lesson_code(to):
    "The code that the lesson gives for asking an export."
    notebook = json.loads((ROOT / "nbs" / "embedding").glob("*_export.ipynb").__next__().read_text(encoding="utf-8"))
    blocks = re.findall(r"```python\n(.*?)```", "".join("".join(c["source"]) + "\n" for c in notebook["cells"]), re.S)
    [block] = [b for b in blocks if f'to="{to}"' in b]
    call = re.search(r'# (export_embeddings\(.*?\))', block)[1]
    return call, block


@pytest.mark.slow
@pytest.mark.parametrize("to", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_code_of_the_lesson_gives_the_neighbours_of_the_folder(tmp_path, monkeypatch, to, dtype):
    pytest.importorskip(LIBRARIES[to])
    monkeypatch.chdir(tmp_path)
    dataset(Path("vectors"), n=3000, dim=24, dtype=dtype, shard_rows=900)
    call, block = lesson_code(to)
    report = eval(call, {"export_embeddings": export_embeddings})
    assert report.rows == 2100
    index = FolderIndex("vectors")
    for seed in range(5):
        query = np.random.default_rng(seed).normal(size=24).astype(np.float32)
        query /= np.linalg.norm(query)
        names = {"query": query}
        exec(block, names)
        assert names["ids"] == index.search(query, 10).ids[0].tolist()
    with pytest.raises(ValidationError, match="exists"): eval(call, {"export_embeddings": export_embeddings})
    assert hidden(Path(".")) == []


MEMORY = """
import sys, threading, psutil
from devsky_nb import export_embeddings
for library in sys.argv[4:]: __import__(library)
process, most, stop = psutil.Process(), [0], threading.Event()
def held(): return process.memory_info().rss - process.memory_info().shared
def watch():
    while not stop.wait(.01): most[0] = max(most[0], held())
export_embeddings(sys.argv[1] + "-small", sys.argv[2] + "-small", sys.argv[3])
before = held()
thread = threading.Thread(target=watch)
thread.start()
report = export_embeddings(sys.argv[1], sys.argv[2], sys.argv[3])
stop.set()
thread.join()
print(report.rows, most[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "688 MB of vectors in one row group, and beside it a small data set of the same kind."
    folder, n = tmp_path_factory.mktemp("large"), 480_000
    dataset(folder / "v", n=n, dim=512, shard_rows=n, distinct=10_000)
    dataset(folder / "v-small", n=n // 40, dim=512, shard_rows=n)
    return folder / "v", n // 10 * 7


@pytest.mark.slow
@pytest.mark.parametrize("to", ["parquet", "faiss", "lancedb"])
def test_the_memory_does_not_grow_with_the_data_set(large, tmp_path, to):
    "Libraries hold 40 to 180 MB in threads and buffers of their own, whatever they write; half of the data set is more than that."
    pytest.importorskip(LIBRARIES.get(to, "pyarrow"))
    source, kept = large
    libraries = [LIBRARIES[to]] if to in LIBRARIES else []
    plain = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # allocators that give back what they had
    done = subprocess.run([sys.executable, "-c", MEMORY, source, tmp_path / "a", to, *libraries], capture_output=True, text=True, timeout=PATIENCE, env=plain)
    rows, grown = map(int, done.stdout.split())
    assert rows == kept and grown < kept * 512 * 4 / 2, (rows, grown / 1e6)


@pytest.mark.slow
def test_a_table_joins_a_database_and_replaces_only_itself(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    dataset(tmp_path / "v")
    database = lancedb.connect(tmp_path / "db")
    database.create_table("orders", pa.table({"a": [1, 2]}))
    export_embeddings(tmp_path / "v", tmp_path / "db", "lancedb", table="shop")
    with pytest.raises(ValidationError, match="exists"): export_embeddings(tmp_path / "v", tmp_path / "db", "lancedb", table="shop")
    report = export_embeddings(tmp_path / "v", tmp_path / "db", "lancedb", table="shop", overwrite=True, copies="repeated")
    opened = lancedb.connect(tmp_path / "db")
    assert report.rows == opened.open_table("shop").count_rows() == 45 and opened.open_table("orders").count_rows() == 2
    assert sorted(opened.list_tables().tables) == ["orders", "shop"] and hidden(tmp_path / "db") == []
    assert b"inner product" in opened.open_table("shop").schema.metadata[b"devsky_nb.metric"]


@pytest.mark.slow
def test_an_error_of_the_data_set_keeps_its_type_through_a_library(tmp_path):
    pytest.importorskip("lancedb")
    dataset(tmp_path / "v")
    path = tmp_path / "v" / "part-00003.parquet"
    table = pq.read_table(path)
    wrong = pa.array([None if v is None else [2.] * 16 for v in table["embedding"].to_pylist()], table.schema.field("embedding").type)
    pq.write_table(table.set_column(table.schema.get_field_index("embedding"), table.schema.field("embedding"), wrong), path)
    with pytest.raises(ValidationError, match="not of length 1"): export_embeddings(tmp_path / "v", tmp_path / "db", "lancedb")
    assert sorted(os.listdir(tmp_path)) == ["v"]


@pytest.mark.slow
def test_points_of_qdrant_are_found_by_the_products_id(tmp_path):
    qdrant = pytest.importorskip("qdrant_client")
    dataset(tmp_path / "v")
    export_embeddings(tmp_path / "v", tmp_path / "q", "qdrant", table="shop")
    client = qdrant.QdrantClient(path=str(tmp_path / "q"))
    [point] = client.retrieve("shop", [point_id("sku-00002")])
    assert point.payload == {"id": "sku-00002", "path": "shop/2.jpg", "content_hash": f"{2:064x}", "actions": [], "copies": ["sku-00006", "sku-00007"]}
    assert client.get_collection("shop").config.metadata["fingerprint"] == "projected-fp32-0123456789abcdef"
    client.close()


@pytest.mark.slow
def test_a_name_on_a_server_is_switched_when_all_points_are_there(tmp_path):
    "With Qdrant's own client in memory, which has the aliases of a server."
    qdrant = pytest.importorskip("qdrant_client")
    dataset(tmp_path / "v")
    client = qdrant.QdrantClient(":memory:")
    index = FolderIndex(tmp_path / "v")

    def upload(copies, overwrite, batches=lambda b: b):
        report = export_module.ExportReport("v", "http://here", "qdrant", 0, len(index), 0, 0, copies, 16, export_module.METRIC, index.fingerprint, "m", "shop")
        (tmp_path / "scratch").mkdir(exist_ok=True)
        for left in (tmp_path / "scratch").iterdir(): left.unlink()
        export_module.run_export(index, report, tmp_path / "scratch", lambda b, job: switch_collection(client, batches(b), job, overwrite), False)

    def breaks(batches):
        yield next(iter(batches))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError): upload("listed", False, breaks)
    assert client.get_collections().collections == [] and client.get_aliases().aliases == []
    upload("listed", False)
    assert client.count("shop").count == 35
    with pytest.raises(ValidationError, match="exists at"): upload("listed", False)
    with pytest.raises(OSError): upload("repeated", True, breaks)
    assert client.count("shop").count == 35, "the old one is as it was"
    upload("repeated", True)
    assert client.count("shop").count == 45 and len(client.get_collections().collections) == 1
    client.create_collection("mine", vectors_config=qdrant.models.VectorParams(size=2, distance=qdrant.models.Distance.DOT))
    with pytest.raises(ValidationError, match="as a collection of its own"):
        job = ExportJob(tmp_path, pa.schema({}), 0, 16, "mine", export_module.ExportReport("v", "http://here", "qdrant", 0, 0, 0, 0, "listed", 16, "", "", None))
        switch_collection(client, [], job, True)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_error(tmp_path):
    pytest.importorskip("qdrant_client")
    dataset(tmp_path / "v")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DevSkyyError, match="cannot export to 'http://127.0.0.1:1'"): export_embeddings(tmp_path / "v", "http://127.0.0.1:1", "qdrant")
