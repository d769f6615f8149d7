"The column `metadata`: there if the source has side-cars, the same from every run and every engine, and carried to whoever reads."
import io, json, os, signal, subprocess, sys, zipfile

import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image

from archives import make_tar
from devsky_nb import export_embeddings, FolderIndex, ImagePolicy, search_images
from devsky_nb.cli import main
from devsky_nb.embedding.bulk import embed_images
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.embedding.rows import row_columns

OLD = ["id", "path", "status", "error", "content_hash", "actions", "embedding"]
SIZES = dict(batch_size=8, shard_rows=4)


@pytest.fixture(scope="module")
def embedder():
    return CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32")


def image(n):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 25, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def members(**texts):
    "Nine images, of which one is broken and one a copy of the first."
    images = {f"{n}": image(n) for n in range(7)} | {"7": b"broken", "8": image(0)}
    files = {f"{n}.png": data for n, data in images.items()}
    return dict(sorted((files | {name.replace("_", ".").removeprefix("n"): data for name, data in texts.items()}).items()))


TEXTS = dict(n0_txt=b"first", n0_json=b'{"price": 9.5}', n3_txt="größer".encode(), n5_json=b"{", n7_cls=b"7", n8_txt=b"copy")


def files(out): return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}
def told(out): return {r["id"][6:-4]: json.loads(r["metadata"]) for r in pq.read_table(out).to_pylist() if r["metadata"] is not None}

EXPECTED = {"0": {"json": {"price": 9.5}, "txt": "first"}, "3": {"txt": "größer"}, "7": {"cls": 7}, "8": {"txt": "copy"}}


@pytest.fixture(scope="module")
def made(embedder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    report = embed_images(make_tar(folder / "s.tar", members(**TEXTS).items()), folder / "out", embedder, **SIZES)
    assert (report.embedded, report.duplicate, report.error) == (7, 1, 1) and list(report.left_out) == [("s.tar/5.json", next(iter(report.left_out_counts)))]
    return folder


def test_rows_copies_and_errors_have_their_own_metadata(made, embedder, tmp_path):
    for shard in (made / "out").glob("*.parquet"):
        assert pq.read_schema(shard).names == [*OLD, "metadata"]
        assert pq.read_schema(shard).remove_metadata().equals(row_columns(embedder.dim, has_metadata=True))
    assert told(made / "out") == EXPECTED
    assert [r["status"] for r in pq.read_table(made / "out").to_pylist()][7:] == ["error", "duplicate"]
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, data in members(**TEXTS).items(): archive.writestr(name, data)
    embed_images(tmp_path / "s.zip", tmp_path / "out", embedder, **SIZES)
    assert told(tmp_path / "out") == EXPECTED


def test_a_source_without_side_cars_has_the_columns_it_had(embedder, tmp_path):
    embed_images(make_tar(tmp_path / "s.tar", members(n9_txt=b"alone", n5_json=b"{").items()), tmp_path / "out", embedder, **SIZES)
    for shard in (tmp_path / "out").glob("*.parquet"): assert pq.read_schema(shard).names == OLD
    assert not FolderIndex(tmp_path / "out").has_metadata
    answers = search_images(tmp_path / "out", "a hat", k=1, device="cpu").to_dict()["queries"][0]["neighbours"]
    assert list(answers[0]) == ["rank", "id", "path", "score"]


def test_side_cars_that_come_change_and_go_cost_no_vector(made, embedder, tmp_path):
    tar, out = tmp_path / "s.tar", tmp_path / "out"
    plain, full = members(), members(**TEXTS)
    embed_images(make_tar(tar, plain.items()), out, embedder, **SIZES)
    bare = files(out)
    for content in (full, members(**TEXTS | {"n3_txt": b"other"}), plain, full):
        report = embed_images(make_tar(tar, content.items()), out, embedder, **SIZES)
        assert report.reused == report.embedded == 7
        fresh = tmp_path / f"fresh{len(list(tmp_path.iterdir()))}"
        embed_images(tar, fresh, embedder, **SIZES)
        assert files(out) == files(fresh) and (content is not plain or files(out) == bare)
    assert told(out) == EXPECTED
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    embed_images(tar, out, embedder, **SIZES)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")} == stamps, "the same input rewrites no file"


@pytest.mark.parametrize("at", [2, 4, 9])
def test_the_files_after_a_kill_are_those_of_one_run(made, embedder, tmp_path, at, monkeypatch):
    "What a kill leaves behind: an exception that nobody catches stands for it, at a flush of a file."
    class Killed(BaseException): pass
    flush, calls = os.fsync, []
    def fsync(fd):
        calls.append(fd)
        if len(calls) == at: raise Killed
        flush(fd)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Killed): embed_images(made / "s.tar", tmp_path / "out", embedder, **SIZES)
    embed_images(made / "s.tar", tmp_path / "out", embedder, **SIZES)
    assert files(tmp_path / "out") == files(made / "out")


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 7])
def test_a_killed_process(made, embedder, tmp_path, at):
    code = ("import os, signal, sys\nfrom devsky_nb import CLIPImageEmbedder, embed_images\nflush, calls = os.fsync, []\n"
            f"def fsync(fd):\n    calls.append(fd)\n    if len(calls) == {at}: os.kill(os.getpid(), signal.SIGKILL)\n    flush(fd)\nos.fsync = fsync\n"
            "embed_images(sys.argv[1], sys.argv[2], CLIPImageEmbedder('tiny-clip', device='cpu', precision='fp32'), batch_size=8, shard_rows=4)")
    done = subprocess.run([sys.executable, "-c", code, made / "s.tar", tmp_path / "out"], stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    embed_images(made / "s.tar", tmp_path / "out", embedder, **SIZES)
    assert files(tmp_path / "out") == files(made / "out")


def test_search_shows_it(made, capsys):
    assert main(["search", str(made / "out"), "a hat", "-k", "7", "--json", "--device", "cpu"]) == 0
    answers = json.loads(capsys.readouterr().out)["queries"][0]["neighbours"]
    assert {near["id"][6:-4]: near["metadata"] for near in answers} == {str(n): EXPECTED.get(str(n)) for n in range(7)}


def test_exports_keep_it(made, tmp_path):
    export_embeddings(made / "out", tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert list(rows[0]) == ["id", "path", "content_hash", "actions", "metadata", "copies", "embedding"]
    assert {r["id"][6:-4]: json.loads(r["metadata"]) for r in rows if r["metadata"]} == {key: EXPECTED[key] for key in "03"}
    export_embeddings(made / "out", tmp_path / "b.parquet", copies="repeated")
    rows = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert {r["id"][6:-4]: json.loads(r["metadata"]) for r in rows if r["metadata"]} == {key: EXPECTED[key] for key in "038"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["lancedb", "qdrant"])
def test_databases_keep_it(made, tmp_path, to):
    if to == "lancedb":
        lancedb = pytest.importorskip("lancedb")
        export_embeddings(made / "out", tmp_path / "db", to=to)
        rows = lancedb.connect(str(tmp_path / "db")).open_table("images").to_arrow().to_pylist()
    else:
        qdrant = pytest.importorskip("qdrant_client")
        export_embeddings(made / "out", tmp_path / "db", to=to)
        client = qdrant.QdrantClient(path=str(tmp_path / "db"))
        rows = [point.payload for point in client.scroll("images", limit=100)[0]]
        client.close()
    assert {r["id"][6:-4]: json.loads(r["metadata"]) for r in rows if r["metadata"]} == {key: EXPECTED[key] for key in "03"}


@pytest.mark.slow
def test_a_cluster_gives_the_same_files(made, embedder, tmp_path):
    pytest.importorskip("ray")
    from devsky_nb.embedding.ray import RayEngine
    embed_images(made / "s.tar", tmp_path / "out", embedder, engine=RayEngine(actors=1, cpus=1), **SIZES)
    assert files(tmp_path / "out") == files(made / "out")


def test_a_folder_gives_the_metadata_of_its_archive(embedder, tmp_path):
    "And none for an image outside the root: what lies beside it lies outside, too."
    shop, out = tmp_path / "shop", tmp_path / "out"
    shop.mkdir()
    for name, data in members(**TEXTS).items(): (shop / name).write_bytes(data)
    report = embed_images(shop, out, embedder, **SIZES)
    assert {r["id"][:-4]: json.loads(r["metadata"]) for r in pq.read_table(out).to_pylist() if r["metadata"]} == EXPECTED
    assert (report.embedded, report.duplicate, report.error) == (7, 1, 1) and [path for path, _ in report.left_out] == ["5.json"]
    (shop / "3.txt").write_text("other")
    changed = embed_images(shop, out, embedder, **SIZES)
    assert changed.reused == 7 and {r["id"]: r["metadata"] for r in pq.read_table(out).to_pylist()}["3.png"] == '{"txt": "other"}'
    outside = write_outside(tmp_path)
    (shop / "9.png").symlink_to(outside / "9.png")
    (shop / "9.txt").symlink_to(outside / "9.txt")
    confined = CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32", policy=ImagePolicy(root=shop))
    embed_images(shop, tmp_path / "confined", confined, **SIZES)
    rows = {r["id"]: r for r in pq.read_table(tmp_path / "confined").to_pylist()}
    assert rows["9.png"]["error"].startswith("outside-root") and rows["9.png"]["metadata"] is None and rows["0.png"]["metadata"]


def write_outside(folder):
    outside = folder / "outside"
    outside.mkdir()
    (outside / "9.png").write_bytes(image(9))
    (outside / "9.txt").write_text("a secret")
    return outside
