"embed_images when things break: a process killed, a disk full, a folder that cannot be written, inputs of every sort."
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest
from PIL import Image

from devsky_nb.bulk import embed_images
from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb.errors import DevSkyyError, ValidationError


@pytest.fixture(scope="module")
def embedder():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


def pictures(folder, n):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def test_every_input_has_one_row_in_order_and_shards_are_full(embedder, tmp_path):
    folder = pictures(tmp_path / "in" / "a", 7)
    (folder / "003b.jpg").write_text("no picture")
    (folder / "006b.png").write_bytes((folder / "000.png").read_bytes())
    report = embed_images(tmp_path / "in", tmp_path / "out", embedder, batch_size=2, shard_rows=4)
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").iterdir())] == [4, 4, 1]
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [r["id"] for r in rows] == sorted(f"a/{p.name}" for p in folder.iterdir())
    assert [r["status"] for r in rows] == ["embedded"] * 4 + ["error"] + ["embedded"] * 3 + ["duplicate"]
    assert (report.total, report.embedded, report.duplicate, report.error) == (9, 7, 1, 1)
    for r in rows: assert (r["embedding"] is not None) == (r["status"] == "embedded") and (r["error"] is not None) == (r["status"] == "error")
    np.testing.assert_allclose(rows[0]["embedding"], embedder.encode_image(folder / "000.png")[0], atol=1e-5)


def test_a_generator_of_paths_is_a_source(embedder, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    report = embed_images((p for p in sorted(folder.iterdir())), tmp_path / "out", embedder)
    assert report.embedded == 3
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == [str(p) for p in sorted(folder.iterdir())]


def test_an_output_that_holds_data_is_refused(embedder, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    embed_images(folder, tmp_path / "out", embedder)
    before = (tmp_path / "out" / "part-00000.parquet").read_bytes()
    with pytest.raises(ValidationError, match="already holds Parquet files"): embed_images(folder, tmp_path / "out", embedder)
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == before


def test_kill_9_leaves_only_whole_shards(tmp_path):
    pictures(tmp_path / "in", 60)
    code = ("from devsky_nb.bulk import embed_images; from devsky_nb.clip import CLIPImageEmbedder\n"
            f"e = CLIPImageEmbedder('tiny-clip', device='cpu'); embed_images({str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, e, batch_size=1, shard_rows=2)")
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("part-*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline: time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(parts) >= 3
    assert all(pq.read_table(p).num_rows == 2 for p in parts[:-1])


def test_a_shard_appears_only_when_it_is_whole_and_on_the_disk(embedder, tmp_path, monkeypatch):
    seen, flush = [], os.fsync
    def look(fd):
        seen.append([p.name for p in (tmp_path / "out").glob("*.parquet")])
        flush(fd)
    monkeypatch.setattr(os, "fsync", look)
    embed_images(pictures(tmp_path / "in", 3), tmp_path / "out", embedder, shard_rows=2)
    assert seen == [[], ["part-00000.parquet"]]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_clear_error_and_keeps_whole_shards(embedder, tmp_path, small_disk):
    folder = pictures(tmp_path / "in", 60)
    with pytest.raises(DevSkyyError, match="No space left.*Make room") as e: embed_images(folder, small_disk / "out", embedder, shard_rows=10)
    assert e.value.details["rows"] == 10
    left = sorted((small_disk / "out").iterdir())
    assert left and all(p.name.startswith("part-") and pq.read_table(p).num_rows == 10 for p in left)


def test_empty_folder_and_missing_folder(embedder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert embed_images(tmp_path / "empty", tmp_path / "out", embedder).total == 0
    with pytest.raises(ValidationError, match="no-such"): embed_images(tmp_path / "no-such", tmp_path / "out2", embedder)
