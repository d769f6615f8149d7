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


def config(estimate: Estimate) -> tuple[str, str]:
    "How weights are kept, and how the picture is decoded, in a word each."
    s = estimate.setup
    decoder = "".join(letter for letter, used in (("f", s.vae == "fp16-fix"), ("t", s.vae_tiling), ("s", s.vae_slicing)) if used)
    return f"{s.quant or '16'} {s.offload or 'none'}", f"-{decoder}"


def places(estimate: Estimate) -> dict[str, tuple[str, int]]:  # key and position by phase
    "On what each phase depends: in the same place the same bytes must stand (`record` checks it)."
    s, (way, decoder) = estimate.setup, config(estimate)
    batch = BATCHES.index(s.batch)
    at = SIZES.index(s.width) * len(BATCHES) + batch
    return {"load": (way, 0), "encode": (way, batch), "denoise": (way, at), "decode": (f"{way} {decoder}", at)}


def record(model: dict, estimate: Estimate) -> None:
    "Rank, and each phase at its worst moment, in KiB: which set of weights, the tensors, what stands beside them."
    model["ranks"][" ".join(config(estimate))] = Option(estimate, 0).rank
    for phase, (key, at) in places(estimate).items():
        worst = max((s for s in estimate.stages if s.phase == phase), key=lambda s: s.total)
        weights = [round(worst.weights.get(name, 0) / 1024) for name in model["networks"]]
        if weights not in model["weights"]: model["weights"].append(weights)
        entry = [model["weights"].index(weights), round(worst.activations / 1024), round(worst.workspace / 1024)]
        row = model[phase].setdefault(key, [None] * len(SIZES) * len(BATCHES))
        if row[at] not in (None, entry): raise SystemExit(f"{estimate.setup}: {phase} depends on more than {key!r}")
        row[at] = entry


def grid(model: str) -> dict:
    "All that the page knows of a model."
    folder, dtype = config_folder(model), usual_dtype(model, "cuda")
    nets = networks_of(folder)
    found = {"dtype": dtype, "own": picture_size(folder, nets, None, None)[0], "networks": list(nets), "weights": [], "ranks": {}, "load": {}, "encode": {}, "denoise": {}, "decode": {}}
    for size in SIZES:
        for batch in BATCHES:
            fixed = {"width": size, "height": size, "batch": batch, "guidance": True}
            for estimate in candidates(model, dtype, "cuda", fixed): record(found, estimate)
    found["load"] = {way: row[:1] for way, row in found["load"].items()}
    found["encode"] = {way: row[:len(BATCHES)] for way, row in found["encode"].items()}
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
