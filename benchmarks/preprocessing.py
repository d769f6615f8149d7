"""CPU time from a JPEG file's bytes to CLIP's input (3 × 224 × 224 floats): the reference processor and everything that could replace it.

usage: python benchmarks/preprocessing.py [--rounds 9] [--sizes 1600x1200 1200x1600 640x427]

Method. Four photographs of scikit-image, resized and saved as JPEG at quality 90. The reference is PIL's `open` and `convert("RGB")`, then
transformers' CLIPImageProcessorPil. All candidates run in turn, round after round, on the same bytes; each round gives a ratio to the
reference of that round, and its median is the result. CPU time of the whole process is counted, so threads that a library starts are
paid for; torch, OpenCV, BLAS and the Rust pool get one thread. Differences are in levels of 255, on the model's input.
A candidate whose package is missing is left out. The rows are written to benchmarks/preprocessing.json and benchmarks/preprocessing.md.
"""
import argparse, io, json, os, platform, statistics, sys, time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
PACKAGES = ("pillow", "transformers", "torch", "simplejpeg", "opencv-python-headless", "hf-processors-rs")


def photographs(size: tuple[int, int]) -> list[bytes]:
    "JPEG files."
    from skimage import data
    files = []
    for f in (data.astronaut, data.coffee, data.cat, data.rocket):
        Image.fromarray(f()).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def middle(size: tuple[int, int], short: int = 224) -> tuple[tuple[int, int], tuple[int, int]]:
    "The resized size, and where the square starts in it."
    from devsky_nb.images.placement import resized_size
    w, h = resized_size(*size, "shortest", (short, short))
    return (w, h), ((w - short) // 2, (h - short) // 2)


def candidates() -> dict:
    "Functions from a file's bytes to (3, 224, 224) float32."
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from devsky_nb.images.load import load_image
    from devsky_nb.images.preprocess import ImagePreprocessor
    theirs, ours = CLIPImageProcessorPil(), ImagePreprocessor()
    reference = lambda image: np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
    floats = lambda pixels: np.stack([ours.table[c][pixels[..., c]] for c in range(3)])

    def boxed(data):
        image = load_image(data)[0]
        (w, h), (left, top) = middle(image.size)
        sx, sy = image.width / w, image.height / h
        return floats(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC,
                                              box=(left * sx, top * sy, (left + 224) * sx, (top + 224) * sy))))

    found = {"reference": lambda data: reference(Image.open(io.BytesIO(data)).convert("RGB")),
             "devsky_nb": lambda data: ours(load_image(data)[0]),
             "devsky_nb, scaled decoding": lambda data: ours(load_image(data, min_edge=ours.min_edge)[0]),
             "Pillow, boxed resize": boxed}
    if find_spec("simplejpeg"):
        import simplejpeg
        found["simplejpeg, then devsky_nb"] = lambda data: ours(Image.fromarray(simplejpeg.decode_jpeg(data)))
    if find_spec("hf_processors_rs"):
        import hf_processors_rs
        rust = hf_processors_rs.AutoImageProcessor.from_dict(theirs.to_dict() | {"image_processor_type": "CLIPImageProcessor"},
                                                             backend="pil")
        found["hf-processors-rs"] = lambda data: np.asarray(rust(data, num_threads=1))[0]
    if find_spec("cv2"):
        import cv2
        cv2.setNumThreads(1)
        def opencv(data):
            pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            size, (left, top) = middle(pixels.shape[1::-1])
            return floats(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)[top:top + 224, left:left + 224])
        found["OpenCV, area"] = opencv
    if find_spec("torch"):
        import torch
        torch.set_num_threads(1)
        def interpolate(data):
            pixels = np.array(load_image(data)[0])
            (w, h), (left, top) = middle(pixels.shape[1::-1])
            small = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], size=(h, w), mode="bicubic",
                                                    antialias=True)
            return floats(small[0].permute(1, 2, 0).numpy()[top:top + 224, left:left + 224])
        found["torch, uint8 antialias"] = interpolate
    return found


def measure(files: list[bytes], rounds: int) -> dict:
    "Every candidate in turn on the same files."
    from devsky_nb.images.processors import CLIP_STD
    sides = candidates()
    levels = np.float32(CLIP_STD)[:, None, None] * 255
    exact = [sides["reference"](d) for d in files]
    difference = {k: np.stack([np.abs(f(d) - e) * levels for d, e in zip(files, exact)]) for k, f in sides.items()}
    seconds = {k: [] for k in sides}
    for _ in range(rounds):
        for k, f in sides.items():
            start = time.process_time()
            for d in files: f(d)
            seconds[k].append((time.process_time() - start) / len(files))
    return {k: {"ms": round(1000 * statistics.median(seconds[k]), 2),
                "ratio": round(statistics.median(a / b for a, b in zip(seconds[k], seconds["reference"])), 2)} | deviation(difference[k])
            for k in sides}


def deviation(difference: np.ndarray) -> dict:
    "How far a candidate's values are from the reference's; in levels of 255, (images, 3, 224, 224)."
    equal = bool((difference == 0).all())
    psnr = None if equal else round(float(10 * np.log10(255**2 / (difference**2).mean((1, 2, 3)).max())), 1)
    return {"equal": equal, "largest_difference": round(float(difference.max()), 1),
            "share_that_differs": round(float((difference > 0.5).mean()), 4), "psnr": psnr}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=["1600x1200", "1200x1600", "640x427"])
    args = parser.parse_args()
    rows = {}
    for size in args.sizes:
        rows[size] = measure(photographs(tuple(map(int, size.split("x")))), args.rounds)
        print(size, json.dumps(rows[size]), file=sys.stderr)
    names = {"simplejpeg": "simplejpeg", "opencv-python-headless": "cv2", "hf-processors-rs": "hf_processors_rs"}
    result = {"machine": platform.machine(), "versions": {p: version(p) for p in PACKAGES if p not in names or find_spec(names[p])},
              "rounds": args.rounds, "rows": rows}
    (HERE / "preprocessing.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (HERE / "preprocessing.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    lines = ["# From JPEG bytes to CLIP's input", "",
             f"{result['machine']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; "
             f"{result['rounds']} rounds over four photographs, one thread. CPU time, medians.", "",
             "| JPEG | candidate | ms | ratio to the reference | equal | values that differ | by up to (levels of 255) | smallest PSNR |",
             "|---|---|---|---|---|---|---|---|"]
    for size, row in result["rows"].items():
        for name, r in row.items():
            equal = "yes" if r["equal"] else "no"
            lines.append(f"| {size} | {name} | {r['ms']} | **{r['ratio']}** | {equal} | {r['share_that_differs']:.2%} "
                         f"| {r['largest_difference']} | {r['psnr'] or ''} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `preprocessing.py`. Run it again with `python benchmarks/preprocessing.py`.\n"


if __name__ == "__main__":
    main()
