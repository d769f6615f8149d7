"Jobs over what lies elsewhere or in memory: each source of `devsky embed`, resumed without fetching anything twice."
import io, json, zipfile
from pathlib import Path

import fsspec, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest

from shopserver import Shop, image

from devsky_nb import CLIPImageEmbedder, embed_images
from devsky_nb.cli import main
from devsky_nb.embedding.dataset import STATE
from devsky_nb.embedding.fetched import FETCHED


@pytest.fixture(scope="module")
def embedder():
    with CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32") as made: yield made


@pytest.fixture
def shop():
    with Shop() as made: yield made


def rows(out): return [(row["id"], row["status"], row["content_hash"]) for row in pq.read_table(out).to_pylist()]


def files(out): return {path.name: path.read_bytes() for path in Path(out).glob("part-*")}


def test_addresses_are_fetched_once(shop, embedder, tmp_path):
    for n in range(20): shop.files[f"{n}.png"] = image(n)
    addresses = [f"{shop.address}/{n}.png?sig=secret" for n in range(20)] + [f"{shop.address}/gone.png?sig=secret", f"{shop.address}/page.jpg"]
    report = embed_images(addresses, tmp_path / "out", embedder, shard_rows=8)
    assert (report.embedded, report.error, report.reasons) == (20, 2, {"missing": 1, "html": 1})
    before = files(tmp_path / "out")
    shop.sent = 0
    report = embed_images(addresses, tmp_path / "out", embedder, shard_rows=8)
    assert report.reused == 20 and shop.sent == 1 and files(tmp_path / "out") == before  # the page, which has no vector
    shop.files["7.png"] = image(77)
    assert embed_images(addresses, tmp_path / "out", embedder, shard_rows=8).reused == 19
    assert embed_images(addresses, tmp_path / "anew", embedder, shard_rows=8).embedded == 20 and files(tmp_path / "anew") == files(tmp_path / "out")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"secret" not in everything
    (tmp_path / "out" / STATE / FETCHED).write_bytes(b"damaged" * 1000)
    assert embed_images(addresses, tmp_path / "out", embedder, shard_rows=8).reused == 20


def test_a_bucket_is_followed(embedder, tmp_path):
    bucket = fsspec.filesystem("memory")
    fetched = []
    class Counting(type(bucket)):
        cachable = False
        def cat_file(self, path, *args, **kwargs):
            fetched.append(path)
            return super().cat_file(path, *args, **kwargs)
    fsspec.register_implementation("counting", Counting, clobber=True)
    Counting._strip_protocol = classmethod(lambda cls, path: super(Counting, cls)._strip_protocol(path.replace("counting://", "memory://")))
    Counting.protocol = "counting"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for n in range(3): archive.writestr(f"{n}.png", image(100 + n))
    bucket.pipe({f"/followed/{n}.png": image(n) for n in range(5)} | {"/followed/more.zip": packed.getvalue()})
    report = embed_images("counting://followed", tmp_path / "out", embedder)
    assert report.embedded == 8 and [id for id, *_ in rows(tmp_path / "out")] == [f"{n}.png" for n in range(5)] + [f"more.zip/{n}.png" for n in range(3)]
    fetched.clear()
    bucket.rm("/followed/0.png")
    bucket.pipe_file("/followed/1.png", image(200))
    bucket.pipe_file("/followed/9.png", image(9))
    report = embed_images("counting://followed", tmp_path / "out", embedder)
    assert (report.embedded, report.reused) == (8, 6)
    assert {path for path in fetched if path.endswith("png")} == {"/followed/1.png", "/followed/9.png"}
    bucket.rm("/followed", recursive=True)


def test_a_table_in_memory_becomes_rows_and_leaves_nothing(embedder, tmp_path):
    frame = pd.DataFrame({"sku": range(5), "jpg": [image(n) for n in range(4)] + [None]})
    report = embed_images(frame, tmp_path / "out", embedder, shard_rows=2)
    assert (report.embedded, report.error) == (4, 1) and [id for id, *_ in rows(tmp_path / "out")] == list("01234")
    assert embed_images(frame, tmp_path / "out", embedder, shard_rows=2).reused == 4
    assert not list((tmp_path / "out").rglob("table*"))


def test_the_command_takes_each_of_them(shop, tmp_path, capsys):
    for n in range(3): shop.files[f"{n}.png"] = image(n)
    shop.files["list.csv"] = b"id,image_url\nA,0.png\nB,1.png\n"
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"url": f"{shop.address}/{n}.png?sig=secret"}) + "\n" for n in range(3)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("a.png", image(5))
    shop.files["a.zip"] = (tmp_path / "a.zip").read_bytes()
    sources = [(f"{shop.address}/list.csv?sig=secret", 2), (str(tmp_path / "list.jsonl"), 3), (str(tmp_path / "a.zip"), 1), (f"{shop.address}/a.zip?sig=secret", 1), (f"{shop.address}/2.png?sig=secret", 1)]
    for n, (source, count) in enumerate(sources):
        assert main(["embed", source, "--model", "tiny-clip", "--device", "cpu", "--precision", "fp32", "--json", "--out", str(tmp_path / "out" / str(n))]) == 0
        assert len(rows(tmp_path / "out" / str(n))) == count
    assert main(["embed", "carrier-pigeon://x?secret", "--model", "tiny-clip", "--out", str(tmp_path / "x")]) != 0
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err and "carrier-pigeon:// is a remote address" in said.err


@pytest.mark.slow
def test_workers_of_a_cluster_open_every_source_anew(shop, embedder, tmp_path):
    pytest.importorskip("ray")
    from devsky_nb.embedding.ray import RayEngine, ray_cluster
    for n in range(12): shop.files[f"{n}.png"] = image(n)
    addresses = [f"{shop.address}/{n}.png" for n in range(12)]
    frame = pa.table({"id": list(range(12)), "jpg": [image(n) for n in range(12)]})
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(12): archive.writestr(f"{n}.png", image(n))
    with ray_cluster(2):
        for name, source in (("web", addresses), ("table", frame), ("zip", tmp_path / "a.zip")):
            alone, together = tmp_path / f"{name}-alone", tmp_path / f"{name}-together"
            embed_images(source, alone, embedder, shard_rows=5)
            assert embed_images(source, together, embedder, shard_rows=5, engine=RayEngine()).embedded == 12
            assert files(alone) == files(together)
        shop.sent = 0
        assert embed_images(addresses, tmp_path / "web-together", embedder, shard_rows=5, engine=RayEngine()).reused == 12 and shop.sent == 0
        assert embed_images(addresses, tmp_path / "web-together", embedder, shard_rows=5).reused == 12 and shop.sent == 0
