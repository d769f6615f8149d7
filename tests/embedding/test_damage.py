"Every state that a crash, an editor or another program can leave in an output folder: repaired, or one error that says what to remove."
import json, os, shutil, sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image

from devsky_nb import CLIPImageEmbedder, embed_images, FolderIndex
from devsky_nb.embedding.dataset import open_pool, EarlierWork
from devsky_nb.embedding.pairs import look_alikes
from devsky_nb.embedding.rows import embed_slice, embedding_schema
from devsky_nb.embedding.shards import add_shards, vector_kind, write_shard
from devsky_nb.embedding.worker import slice_path
from devsky_nb.errors import DevSkyyError, ValidationError
from devsky_nb.images.folders import ImageFolder
from devsky_nb.images.sources import slices

CALL = {"batch_size": 8, "shard_rows": 2}


pytestmark = pytest.mark.usefixtures("nothing_hangs")


@pytest.fixture(scope="module")
def embedder():
    with CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32") as e: yield e


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    rng = np.random.default_rng(0)
    for n in range(5): Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def complete(embedder, images, tmp_path_factory):
    "A data set of three shards."
    out = tmp_path_factory.mktemp("complete") / "out"
    embed_images(images, out, embedder, **CALL)
    return out


@pytest.fixture(scope="module")
def unfinished(embedder, images, complete, tmp_path_factory):
    "The same, in the middle of an update: a pool, a plan, the slice of a worker, and shards that are about to become visible."
    out = tmp_path_factory.mktemp("unfinished") / "out"
    shutil.copytree(complete, out)
    state = out / ".devsky"
    schema = embedding_schema(embedder)
    pool = open_pool(state, EarlierWork([], 0, None), vector_kind(schema), resume=True)
    add_shards(pool, sorted(out.glob("*.parquet")))
    pool.close()
    part = next(slices(ImageFolder(images), 2))
    table = embed_slice(part, embedder, schema, batch_size=8)
    write_shard(table.append_column("new", pa.array([True] * len(table))), slice_path(state / "slices", 0))
    (state / "plan.sqlite").write_bytes(b"")
    shutil.copy(out / "part-00001.parquet", state / "next" / "part-00001.parquet")
    summary = json.loads((out / "_SUCCESS").read_text(encoding="utf-8"))
    (out / "_SUCCESS").unlink()
    (state / "commit.json").write_text(json.dumps({"shards": 3, "summary": summary}), encoding="utf-8")
    (state / "vectors.sqlite-wal").write_bytes(b"")
    return out


def files(out): return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def remove(path):
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path):
        remove(path)
        make(path)
    return damage


def flipped(path):
    if not path.is_file(): return
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 3, len(data), max(1, len(data) // 7)): data[at] ^= 0x41
    path.write_bytes(data)


def cut(path):
    if path.is_file(): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def filled(path):
    path.mkdir()
    (path / "mine.txt").write_text("a file of somebody", encoding="utf-8")


DAMAGES = {
    "missing": remove,
    "empty": replaced(lambda p: p.write_bytes(b"")),
    "cut": cut,
    "flipped": flipped,
    "random": replaced(lambda p: p.write_bytes(np.random.default_rng(1).bytes(4000))),
    "zeros": replaced(lambda p: p.write_bytes(bytes(5000))),
    "list": replaced(lambda p: p.write_text("[1, 2]", encoding="utf-8")),
    "null": replaced(lambda p: p.write_text("null", encoding="utf-8")),
    "number": replaced(lambda p: p.write_text("1" * 5000, encoding="utf-8")),
    "object": replaced(lambda p: p.write_text("{}", encoding="utf-8")),
    "deep": replaced(lambda p: p.write_text("[" * 100_000, encoding="utf-8")),
    "pipe": replaced(os.mkfifo),
    "device": replaced(lambda p: p.symlink_to("/dev/zero")),
    "link to nothing": replaced(lambda p: p.symlink_to("nowhere")),
    "link to itself": replaced(lambda p: p.symlink_to(p.name)),
    "folder": replaced(Path.mkdir),
    "folder of somebody": replaced(filled),
    "another's table": replaced(lambda p: pq.write_table(pa.table({"a": [1]}), p)),
    "another's database": replaced(lambda p: another_database(p)),
}


def another_database(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE vectors(a, b)")
    db.execute("CREATE TABLE slices(a)")
    db.commit()
    db.close()


COMPLETE = ["_SUCCESS", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", ".devsky", ".devsky/lock", ".devsky/next"]
UNFINISHED = [".devsky/settings.json", ".devsky/commit.json", ".devsky/vectors.sqlite", ".devsky/vectors.sqlite-wal",
              ".devsky/vectors.sqlite-shm", ".devsky/vectors.sqlite-journal", ".devsky/plan.sqlite", ".devsky/slices",
              ".devsky/slices/00000.parquet", ".devsky/next/part-00001.parquet", "part-00001.parquet", "_SUCCESS"]


def check(call, *names):
    "What a call gives, or None for one typed error that names what is damaged."
    try: return call()
    except DevSkyyError as e:
        assert len(str(e)) < 2000 and any(name in str(e) for name in names), e
        return None


def survive(embedder, images, out, damaged, good):
    "The folder is read and written, with the remedy if one is asked for, and in the end has every row."
    name = damaged.name
    index = check(lambda: FolderIndex(out), name, "part-", out.name)
    if index is not None and len(index): check(lambda: look_alikes(index), name, "part-")
    before = sorted(p.name for p in out.glob("part-*"))
    report = check(lambda: embed_images(images, out, embedder, **CALL), name)
    if report is None:
        assert before == sorted(p.name for p in out.glob("part-*")), "an error removes nothing"
        remove(damaged)
        report = check(lambda: embed_images(images, out, embedder, **CALL), "commit.json")
    if report is None:  # an intention cannot be carried out without its shards
        remove(out / ".devsky" / "commit.json")
        report = embed_images(images, out, embedder, **CALL)
    assert (report.embedded, report.error) == (5, 0) and files(out) == files(good)
    assert len(FolderIndex(out)) == 5


def damaged_copy(base, tmp_path, name, damage):
    out = tmp_path / "out"
    shutil.copytree(base, out, symlinks=True)
    damaged = out / name
    if damage in (remove, cut, flipped) and not damaged.exists(): pytest.skip("there is no such file")
    if damage is not flipped and damage is not cut and damage is not remove: remove(damaged)
    damage(damaged)
    return out, damaged


def cases(names):
    "Every damage of every file; a spread of them in the fast run, so that each file and each damage occurs."
    for i, name in enumerate(names):
        for j, damage in enumerate(DAMAGES):
            marks = [] if (5 * i + j) % len(DAMAGES) == 0 else [pytest.mark.slow]
            yield pytest.param(name, DAMAGES[damage], marks=marks, id=f"{name}-{damage}")


@pytest.mark.parametrize("name, damage", list(cases(COMPLETE)))
def test_a_complete_data_set(embedder, images, complete, tmp_path, name, damage):
    survive(embedder, images, *damaged_copy(complete, tmp_path, name, damage), complete)


@pytest.mark.parametrize("name, damage", list(cases(UNFINISHED)))
def test_an_update_that_did_not_finish(embedder, images, complete, unfinished, tmp_path, name, damage):
    survive(embedder, images, *damaged_copy(unfinished, tmp_path, name, damage), complete)


NUMBERS = {"a million million": 10**12, "negative": -1, "none": 0, "fewer": 1, "more": 4, "true": True, "text": "3", "fraction": 2.5, "null": None}


@pytest.mark.parametrize("shards", NUMBERS.values(), ids=NUMBERS)
def test_an_intention_with_a_wrong_number_removes_nothing(embedder, images, complete, tmp_path, shards):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    summary = json.loads((out / "_SUCCESS").read_text(encoding="utf-8"))
    commit = out / ".devsky" / "commit.json"
    commit.write_text(json.dumps({"shards": shards, "summary": summary}), encoding="utf-8")
    before = files(out)
    with pytest.raises(ValidationError, match="commit.json' is damaged"): embed_images(images, out, embedder, **CALL)
    assert files(out) == before
    commit.unlink()
    assert embed_images(images, out, embedder, **CALL).reused == 5 and files(out) == before


@pytest.mark.parametrize("rows", [*NUMBERS.values(), {}, []])
def test_an_index_compares_what_is_there_with_what_was_written(complete, tmp_path, rows):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    (out / "_SUCCESS").write_text(json.dumps({"rows": rows, "shards": 3}), encoding="utf-8")
    if type(rows) is not int: assert len(FolderIndex(out)) == 5  # it says nothing
    else:
        with pytest.raises(ValidationError, match="is damaged: it had"): FolderIndex(out)
    shutil.copy(complete / "_SUCCESS", out / "_SUCCESS")
    (out / "part-00001.parquet").unlink()
    with pytest.raises(ValidationError, match="it had 5 rows in 3 files, and has 3 in 2"): FolderIndex(out)


def edited(table, **columns):
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table


def noted(table, **notes):
    named = {f"devsky_nb.{key}".encode(): value for key, value in notes.items()}
    return table.replace_schema_metadata({**table.schema.metadata, **named})


EDITS = {
    "vectors of length 2": lambda t: edited(t, embedding=[[2.0] + [0.0] * 127] * len(t)),
    "vectors of NaN": lambda t: edited(t, embedding=[[float("nan")] * 128] * len(t)),
    "no hashes": lambda t: edited(t, content_hash=[None] * len(t)),
    "other hashes": lambda t: edited(t, content_hash=["no hash"] * len(t)),
    "a column less": lambda t: t.drop_columns("actions"),
    "a column more": lambda t: t.append_column("price", pa.array([1] * len(t))),
    "no fingerprint": lambda t: t.replace_schema_metadata({b"devsky_nb.format": b"1"}),
    "a fingerprint that is no text": lambda t: noted(t, fingerprint=b"\xff\xfe"),
    "a receipt that is a list": lambda t: noted(t, receipt=b"[1]"),
    "a receipt that is deep": lambda t: noted(t, receipt=b"[" * 100_000),
    "a receipt that is none": lambda t: noted(t, receipt=b"{"),
    "vectors of another length": lambda t: pa.Table.from_arrays(
        [*t.columns[:-1], pa.array([[1.0, 0.0]] * len(t), pa.list_(pa.float32(), 2))],
        schema=t.schema.set(6, pa.field("embedding", pa.list_(pa.float32(), 2)))),
    "of another model": lambda t: noted(t, fingerprint=b"projected-fp32-0123456789abcdef"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_shard_that_another_program_has_edited(embedder, images, complete, tmp_path, edit):
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    shard = out / "part-00001.parquet"
    pq.write_table(edit(pq.read_table(shard)), shard)
    check(lambda: FolderIndex(out).load(), "part-00001", "part-00000")
    with pytest.raises(ValidationError, match="part-0000[01]"): embed_images(images, out, embedder, **CALL)
    shard.unlink()
    assert embed_images(images, out, embedder, **CALL).reused == 3 and files(out) == files(complete)


def test_what_is_lost_is_counted(embedder, images, complete, unfinished, tmp_path):
    shutil.copytree(complete, tmp_path / "a")
    (tmp_path / "a" / "part-00001.parquet").write_bytes(b"")
    with pytest.raises(ValidationError, match="and its 2 rows will be embedded anew"): embed_images(images, tmp_path / "a", embedder, **CALL)
    shutil.copytree(unfinished, tmp_path / "b")
    (tmp_path / "b" / ".devsky" / "commit.json").unlink()
    (tmp_path / "b" / ".devsky" / "settings.json").write_bytes(b"")
    with pytest.raises(ValidationError, match="its 5 vectors will be computed anew"): embed_images(images, tmp_path / "b", embedder, **CALL)


def test_a_pool_with_a_changed_bit_gives_no_wrong_vector(embedder, images, complete, unfinished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unfinished, out)
    for shard in out.glob("*.parquet"): shard.unlink()
    for name in ("commit.json", "slices"): remove(out / ".devsky" / name)
    db = sqlite3.connect(out / ".devsky" / "vectors.sqlite")
    for digest, vector in db.execute("SELECT hash, vector FROM vectors").fetchall():
        changed = bytes([*vector[:3], vector[3] ^ 1, *vector[4:]])
        db.execute("UPDATE vectors SET vector = ? WHERE hash = ?", (changed, digest))
    db.commit()
    db.close()
    assert embed_images(images, out, embedder, **CALL).reused == 0 and files(out) == files(complete)


def test_slices_of_another_model_are_not_taken(embedder, images, complete, unfinished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unfinished, out)
    (out / ".devsky" / "commit.json").unlink()
    left = slice_path(out / ".devsky" / "slices", 0)
    write_shard(noted(pq.read_table(left), fingerprint=b"projected-fp32-0123456789abcdef"), left)
    with pytest.raises(ValidationError, match="00000.parquet' is damaged .its vectors are of another kind"):
        embed_images(images, out, embedder, **CALL)
    left.unlink()
    assert embed_images(images, out, embedder, **CALL).reused == 5 and files(out) == files(complete)


def test_links_lead_nowhere_else(embedder, images, complete, tmp_path):
    "What a link in the folder leads to is neither changed nor removed."
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(complete, elsewhere)
    (elsewhere / "vectors.sqlite").write_bytes(b"somebody's")
    before = files(elsewhere)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".devsky").symlink_to(elsewhere)
    with pytest.raises(ValidationError, match=".devsky' is damaged .it is no folder"): embed_images(images, out, embedder, **CALL)
    (out / ".devsky").unlink()
    for name in ("part-00000.parquet", "part-00001.parquet"): (out / name).symlink_to(elsewhere / name)
    (out / "_SUCCESS").symlink_to(elsewhere / "_SUCCESS")
    (images / "9.png").write_bytes((images / "0.png").read_bytes())
    (images / "00.png").write_bytes(b"new, and broken")
    try: assert embed_images(images, out, embedder, **CALL).reused == 4
    finally:
        (images / "9.png").unlink()
        (images / "00.png").unlink()
    assert files(elsewhere) == before
    (out / ".devsky" / "settings.json").symlink_to(elsewhere / "_SUCCESS")
    with pytest.raises(ValidationError, match="settings.json' is damaged .it is a link"): embed_images(images, out, embedder, **CALL)
    assert files(elsewhere) == before


@pytest.mark.parametrize("out", ["", 5, None, b"out", "a\0b", ["out"]])
def test_what_is_no_path_is_refused_before_any_work(embedder, images, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: embed_images(images, out, embedder), lambda: FolderIndex(out)):
        with pytest.raises(ValidationError, match="(out|folder)=.*expected a path"): call()
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(embedder, images, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(ValidationError, match="is no folder"): embed_images(images, tmp_path / "out", embedder)
    with pytest.raises(ValidationError, match="no folder"): FolderIndex(tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValidationError, match="is no folder"): embed_images(images, tmp_path / "link", embedder)


def test_a_pool_that_another_program_has_open(embedder, images, complete, unfinished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(unfinished, out)
    (out / ".devsky" / "commit.json").unlink()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: connect(*args, **{"timeout": 0.1, **kw}))
    db = connect(out / ".devsky" / "vectors.sqlite", isolation_level=None)
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DevSkyyError, match="another program has .*vectors.sqlite' open"): embed_images(images, out, embedder, **CALL)
    db.execute("ROLLBACK")
    db.close()
    assert embed_images(images, out, embedder, **CALL).reused == 5


def test_a_small_file_that_claims_many_rows(embedder, images, complete, tmp_path):
    "A kilobyte that unfolds to gigabytes is refused by what it claims."
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    schema = pq.read_schema(out / "part-00001.parquet")
    n = 200_000
    columns = [pa.nulls(n, field.type) for field in schema]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), out / "part-00001.parquet", row_group_size=n)
    assert (out / "part-00001.parquet").stat().st_size < 20_000
    with pytest.raises(ValidationError, match="part-00001.parquet.*it claims 200,000 rows"): FolderIndex(out)
    with pytest.raises(ValidationError, match="part-00001.parquet.*it claims 200,000 rows"): embed_images(images, out, embedder, **CALL)
