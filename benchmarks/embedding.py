"""Images per second, end to end from JPEG files: the document's code and ours, on the same weights, in one run.

usage: python benchmarks/embedding.py [--images 32] [--rounds 5] [--sizes 1600x1200 640x427]

Method. The model has the shape of openai/clip-vit-base-patch32 with random weights (speed does not depend on their values), saved
in Hub format and loaded by both sides in fp32. The photographs are scikit-image's, resized and saved as JPEG at quality 90. Both sides
get the same list of files and batch size 32. They run in turn, A B A B, after one warm-up each; the ratio is taken round by round, and
its median is the result. "model alone" is the same vision model on prepared tensors: what a route with free decoding would reach.
The smallest cosine compares the document's vectors with ours at output="cls", which is what the document takes.
The rows are written to benchmarks/embedding.json and benchmarks/embedding.md.
"""
import argparse, json, os, platform, statistics, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent


def photographs(folder: Path, n: int, size: tuple[int, int]) -> list[str]:
    "`n` different JPEG files of `size`."
    from PIL import Image
    from skimage import data
    bases = [Image.fromarray(f()) for f in (data.astronaut, data.coffee, data.cat, data.rocket)]
    paths = [folder / f"{size[0]}x{size[1]}-{i:03}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        bases[i % 4].convert("RGB").rotate(3 * (i // 4), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return [str(p) for p in paths]


def save_model(folder: Path) -> Path:
    "A ViT-B/32-sized CLIP with random weights, as the Hub would hold it."
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).eval().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def timed(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(paths: list[str], model: Path, rounds: int) -> dict:
    "Both sides in turn on the same files."
    import torch
    from practices_code import Document

    from devsky_nb.clip import CLIPImageEmbedder, clip_vectors
    document, ours = Document(str(model), device="cpu"), CLIPImageEmbedder(str(model), device="cpu")
    same = CLIPImageEmbedder(str(model), device="cpu", output="cls")
    pixels = torch.randn(32, 3, 224, 224)

    def alone():
        with torch.inference_mode():
            for i in range(0, len(paths), 32): clip_vectors(ours.model, pixels[:len(paths) - i])

    sides = {"document": lambda: document.encode_images_batch(paths), "devsky_nb": lambda: ours.encode_images_batch(paths), "model alone": alone}
    cosine = (document.encode_images_batch(paths) * same.encode_images_batch(paths)).sum(-1).min().item()
    for f in sides.values(): f()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, f in sides.items(): seconds[name].append(timed(f))
    ratio = [a / b for a, b in zip(seconds["document"], seconds["devsky_nb"])]
    limit = [a / b for a, b in zip(seconds["document"], seconds["model alone"])]
    return {"images_per_second": {k: round(len(paths) / statistics.median(v), 1) for k, v in seconds.items()},
            "ratio": round(statistics.median(ratio), 2), "ratio_min_max": [round(min(ratio), 2), round(max(ratio), 2)],
            "ratio_if_decoding_were_free": round(statistics.median(limit), 2), "min_cosine": round(cosine, 7)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["1600x1200", "640x427"])
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch, transformers
    rows = {}
    with tempfile.TemporaryDirectory() as d:
        model = save_model(Path(d, "vit-b-32"))
        for size in args.sizes:
            rows[size] = measure(photographs(Path(d), args.images, tuple(map(int, size.split("x")))), model, args.rounds)
            print(size, json.dumps(rows[size]), file=sys.stderr)
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "images": args.images,
              "rounds": args.rounds, "rows": rows}
    (HERE / "embedding.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "embedding.md").write_text(table(result))
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    lines = ["# Embedding JPEG files with a ViT-B/32, fp32", "", f"{result['machine']}; torch {result['versions']['torch']}, transformers "
             f"{result['versions']['transformers']}; {result['images']} files, {result['rounds']} rounds. Images per second, medians.", "",
             "| JPEG | document | devsky_nb | ratio (min to max) | model alone | ratio if decoding were free | smallest cosine |",
             "|---|---|---|---|---|---|---|"]
    for size, r in result["rows"].items():
        ips = r["images_per_second"]
        lines.append(f"| {size} | {ips['document']} | {ips['devsky_nb']} | **{r['ratio']}** ({r['ratio_min_max'][0]} to {r['ratio_min_max'][1]}) "
                     f"| {ips['model alone']} | {r['ratio_if_decoding_were_free']} | {r['min_cosine']} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `embedding.py`. Run it again with `make bench`.\n"


if __name__ == "__main__":
    main()
