"""What an image costs a worker, and what it costs the driver: the figures behind `scale_plan`.

The worker embeds JPEG files of 1600x1200 with a ViT-B/32 of random weights, one thread, through `embed_images`. The driver
lists a made-up source and commits made-up vectors of the same length, with the functions that it uses in earnest.
Writes cluster.json.  Usage: python benchmarks/cluster.py [--images 48] [--rows 200000]
"""
import argparse, hashlib, json, platform, tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from devsky_nb.bulk import EmbedReport, Plan, Prepared, embed_images, embedding_schema, make_shards, slice_table
from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb.sources import ImageList

HERE = Path(__file__).parent


def jpegs(folder: Path, n: int) -> float:  # bytes per file
    "Pictures with some detail."
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)
    return sum(p.stat().st_size for p in folder.iterdir()) / n


def vit(folder: Path) -> CLIPImageEmbedder:
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32, projection_dim=512)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return CLIPImageEmbedder(folder, "cpu", precision="fp32")


def worker(d: Path, embedder: CLIPImageEmbedder, n: int) -> dict:
    size = jpegs(d / "in", n)
    embed_images(sorted((d / "in").iterdir())[:8], d / "warm", embedder, batch_size=8)
    start = time.process_time()
    embed_images(d / "in", d / "out", embedder, batch_size=8)
    return {"per_image_seconds": (time.process_time() - start) / n, "bytes_per_image": size}


def driver(d: Path, embedder: CLIPImageEmbedder, rows: int) -> dict:
    "Listing and committing, in CPU time; every tenth picture is a copy."
    schema, report = embedding_schema(embedder), EmbedReport("", "", "")
    out, state, vectors = d / "driver", d / "driver" / ".devsky", np.random.default_rng(0).normal(size=(10_000, embedder.dim)).astype(np.float32)
    state.mkdir(parents=True)
    start = time.process_time()
    plan = Plan(state / "plan.sqlite", 10_000)
    plan.fill(ImageList((f"{i:09}", f"shop/2026/{i // 1000:06}/{i:09}.jpg") for i in range(rows)))
    listing, tables = time.process_time() - start, []
    def made():
        for n in range(plan.count):
            before = time.process_time()
            part = [Prepared(f"{i:09}", f"shop/2026/{i // 1000:06}/{i:09}.jpg", hashlib.sha256(str(i - i % 10 % 2 * (i % 10 == 9)).encode()).hexdigest()) for i in range(n * 10_000, min(rows, (n + 1) * 10_000))]
            table = slice_table(part, {p.content_hash: ([], vectors[j]) for j, p in enumerate(part)}, schema)
            tables.append(time.process_time() - before)  # the worker's part
            yield table
    start = time.process_time()
    make_shards(made(), plan, out, state, report)
    commit = time.process_time() - start - sum(tables)
    plan.close()
    written = sum(p.stat().st_size for p in (state / "next").iterdir())
    return {"listing_seconds": listing / rows, "commit_seconds": commit / rows, "row_bytes": written / rows, "table_bytes": (state / "plan.sqlite").stat().st_size / rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rows", type=int, default=200_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        embedder = vit(Path(d, "model"))
        costs = worker(Path(d), embedder, args.images) | driver(Path(d), embedder, args.rows)
    result = {"machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread", "torch": torch.__version__, "images": args.images, "rows": args.rows,
              "costs": {k: float(f"{v:.3g}") for k, v in costs.items()}}
    (HERE / "cluster.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__": main()
