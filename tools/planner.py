"""Predict the grid that the site's planner shows: nbs/planner-data.js, committed, and compared with `estimate_vram` by tests/test_site.py.

usage: python tools/planner.py      (about a quarter of an hour; after a change to the planner or to the pinned libraries)
"""
import json
from pathlib import Path

from devsky_nb.tracing import config_folder, networks_of
from devsky_nb.vram import MARGIN, PALETTE, Estimate, Option, candidates, picture_size, usual_dtype

FILE = Path(__file__).resolve().parents[1] / "nbs" / "planner-data.js"
PREFIX = "const PLANNER = "
MODELS = ("sdxl-base", "sdxl-refiner", "ssd-1b", "sd15", "sd21", "sd3-medium", "sd35-medium", "sd35-large", "flux1-dev", "pixart-xl", "pixart-sigma")
SIZES, BATCHES = (512, 768, 1024), (1, 2, 4, 8)


def words(estimate: Estimate) -> tuple[str, str, dict[str, str]]:
    "How weights are kept, how the picture is decoded, and on what each phase depends: the same key must mean the same bytes (`record` checks it)."
    s = estimate.setup
    way = f"{s.quant or '16'} {s.offload or 'none'}"
    decoder = "-" + "".join(letter for letter, used in (("f", s.vae == "fp16-fix"), ("t", s.vae_tiling), ("s", s.vae_slicing)) if used)
    return way, decoder, {"load": way, "encode": f"{way} {s.batch}", "denoise": f"{way} {s.batch} {s.width}", "decode": f"{way} {s.batch} {s.width} {decoder}"}


def record(model: dict, estimate: Estimate) -> None:
    "Rank, and each phase at its worst moment, in MiB: which set of weights, the tensors, what stands beside them."
    way, decoder, keys = words(estimate)
    model["ranks"][f"{way} {decoder}"] = Option(estimate, 0).rank
    for phase, key in keys.items():
        worst = max((s for s in estimate.stages if s.phase == phase), key=lambda s: s.total)
        weights = [round(worst.weights.get(name, 0) / 2**20) for name in model["networks"]]
        if weights not in model["weights"]: model["weights"].append(weights)
        entry = [model["weights"].index(weights), round(worst.activations / 2**20), round(worst.workspace / 2**20)]
        if model[phase].setdefault(key, entry) != entry: raise SystemExit(f"{estimate.setup}: {phase} depends on more than {key!r}")


def grid(model: str) -> dict:
    "All that the page knows of a model."
    folder, dtype = config_folder(model), usual_dtype(model, "cuda")
    nets = networks_of(folder)
    found = {"dtype": dtype, "own": picture_size(folder, nets, None, None)[0], "networks": list(nets), "weights": [], "ranks": {}, "load": {}, "encode": {}, "denoise": {}, "decode": {}}
    for size in SIZES:
        for batch in BATCHES:
            fixed = {"width": size, "height": size, "batch": batch, "guidance": True}
            for estimate in candidates(model, dtype, "cuda", fixed): record(found, estimate)
    return found


def read(file: Path = FILE) -> dict:
    "The grid as the page reads it."
    return json.loads(file.read_text(encoding="utf-8").removeprefix(PREFIX).rstrip(";\n"))


if __name__ == "__main__":
    data = {"sizes": SIZES, "batches": BATCHES, "margin": MARGIN, "palette": PALETTE, "models": {}}
    for model in MODELS:
        data["models"][model] = grid(model)
        print(model, flush=True)
    FILE.write_text(PREFIX + json.dumps(data, separators=(",", ":")) + ";\n", encoding="utf-8")
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
