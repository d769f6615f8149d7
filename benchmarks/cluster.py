"""What an image costs a worker, and what it costs the driver: the figures behind `scale_plan`.

The worker embeds JPEG files of 1600x1200 with a ViT-B/32 of random weights, one thread, through `embed_images`. The driver
lists a made-up source and commits made-up vectors of the same length, with the functions that it uses in earnest.
Writes cluster.json.  Usage: python benchmarks/cluster.py [--images 48] [--rows 200000]
"""
import argparse, hashlib, json, platform, tempfile, time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np, pyarrow as pa, torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from devsky_nb.embedding.bulk import EmbedReport, embed_images, stage_shards
from devsky_nb.embedding.dataset import NEXT, PLAN
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.embedding.plan import SourcePlan
from devsky_nb.embedding.rows import PreparedInput, StoredVector, embedding_schema, slice_table
from devsky_nb.images.folders import ImageList

HERE = Path(__file__).parent
SLICE = 10_000  # rows


def write_jpegs(folder: Path, n: int) -> float:  # bytes per file
    "Images with some detail."
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)
    return sum(p.stat().st_size for p in folder.iterdir()) / n


def random_vit(folder: Path) -> CLIPImageEmbedder:
    "A ViT-B/32 of random weights."
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                              patch_size=32, projection_dim=512)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return CLIPImageEmbedder(folder, "cpu", precision="fp32")


def worker_costs(d: Path, embedder: CLIPImageEmbedder, n: int) -> dict:
    "Processor time from file to vector."
    size = write_jpegs(d / "in", n)
    embed_images(sorted((d / "in").iterdir())[:8], d / "warm", embedder, batch_size=8)
    start = time.process_time()
    embed_images(d / "in", d / "out", embedder, batch_size=8)
    return {"per_image_seconds": (time.process_time() - start) / n, "bytes_per_image": size}


def image_path(i: int) -> str: return f"shop/2026/{i // 1000:06}/{i:09}.jpg"


def content(i: int) -> str:
    "A hash; every tenth image is a copy of the one before."
    original = i - 1 if i % 10 == 9 else i
    return hashlib.sha256(str(original).encode()).hexdigest()


class MadeUpTables:
    "What workers would leave; the time that making it takes is theirs."
    def __init__(self, rows: int, embedder: CLIPImageEmbedder):
        self.rows = rows
        self.seconds = 0.
        self.schema = embedding_schema(embedder)
        self.vectors = np.random.default_rng(0).normal(size=(SLICE, embedder.dim)).astype(np.float32)

    def table(self, number: int) -> pa.Table:
        "One slice."
        numbers = range(number * SLICE, min(self.rows, (number + 1) * SLICE))
        rows = [PreparedInput(f"{i:09}", image_path(i), content(i)) for i in numbers]
        outcomes = {row.content_hash: StoredVector([], vector) for row, vector in zip(rows, self.vectors)}
        return slice_table(rows, outcomes, self.schema)

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(-(-self.rows // SLICE)):
            before = time.process_time()
            table = self.table(number)
            self.seconds += time.process_time() - before
            yield table


def driver_costs(d: Path, embedder: CLIPImageEmbedder, rows: int) -> dict:
    "Processor time for listing and committing."
    out = d / "driver"
    state = out / ".devsky"
    state.mkdir(parents=True)
    tables = MadeUpTables(rows, embedder)
    start = time.process_time()
    with closing(SourcePlan(state / PLAN, SLICE)) as plan:
        plan.fill(ImageList((f"{i:09}", image_path(i)) for i in range(rows)))
        listed = time.process_time()
        stage_shards(tables, plan, out, state, EmbedReport("", "", ""))
        commit = time.process_time() - listed - tables.seconds
    written = sum(p.stat().st_size for p in (state / NEXT).iterdir())
    return {"listing_seconds": (listed - start) / rows, "commit_seconds": commit / rows, "row_bytes": written / rows,
            "table_bytes": (state / PLAN).stat().st_size / rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rows", type=int, default=200_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        embedder = random_vit(Path(d, "model"))
        costs = worker_costs(Path(d), embedder, args.images) | driver_costs(Path(d), embedder, args.rows)
    result = {"machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread",
              "torch": torch.__version__, "images": args.images, "rows": args.rows,
              "costs": {k: float(f"{v:.3g}") for k, v in costs.items()}}
    (HERE / "cluster.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__": main()
