"""Predict the grid that the planner of the site shows: nbs/planner-data.js, committed, compared by tests/test_planner.py.

usage: python tools/planner.py      (about a quarter of an hour; after a change to the planner or to the pinned libraries)
"""
import json
from pathlib import Path

from devsky_nb.memory.configs import find_model, networks_of
from devsky_nb.memory.estimate import Estimate, image_size
from devsky_nb.memory.plan import ERROR_MARGIN, PlanOption, candidates, usual_dtype
from devsky_nb.memory.plots import COMPONENT_COLOURS

FILE = Path(__file__).resolve().parents[1] / "nbs" / "planner-data.js"
PREFIX = "const PLANNER = "
MODELS = ("sdxl-base", "sdxl-refiner", "ssd-1b", "sd15", "sd21", "sd3-medium", "sd35-medium", "sd35-large", "flux1-dev",
          "pixart-xl", "pixart-sigma")
SIZES = (512, 768, 1024)
BATCHES = (1, 2, 4, 8)


def config(estimate: Estimate) -> tuple[str, str]:
    "How weights are kept, and how the image is decoded, in a word each."
    s = estimate.setup
    decoder = "".join(letter for letter, used in (("f", s.vae == "fp16-fix"), ("t", s.vae_tiling), ("s", s.vae_slicing)) if used)
    return f"{s.quant or '16'} {s.offload or 'none'}", f"-{decoder}"


def places(estimate: Estimate) -> dict[str, tuple[str, int]]:  # key and position by phase
    "On what each phase depends: in the same place the same bytes must stand (`record` checks it)."
    way, decoder = config(estimate)
    batch = BATCHES.index(estimate.setup.batch)
    at = SIZES.index(estimate.setup.width) * len(BATCHES) + batch
    return {"load": (way, 0), "encode": (way, batch), "denoise": (way, at), "decode": (f"{way} {decoder}", at)}


def record(model: dict, estimate: Estimate) -> None:
    "Rank, and each phase at its worst moment, in KiB: which set of weights, the tensors, what stands beside them."
    model["ranks"][" ".join(config(estimate))] = PlanOption(estimate, 0).rank
    for phase, (key, at) in places(estimate).items():
        worst = max((run for run in estimate.runs if run.phase == phase), key=lambda run: run.total)
        weights = [round(worst.weights.get(name, 0) / 1024) for name in model["networks"]]
        if weights not in model["weights"]: model["weights"].append(weights)
        entry = [model["weights"].index(weights), round(worst.activations / 1024), round(worst.workspace / 1024)]
        row = model[phase].setdefault(key, [None] * len(SIZES) * len(BATCHES))
        if row[at] not in (None, entry): raise SystemExit(f"{estimate.setup}: {phase} depends on more than {key!r}")
        row[at] = entry


def grid(model: str) -> dict:
    "All that the page knows of a model."
    source = find_model(model)
    dtype = usual_dtype(source, "cuda")
    networks = networks_of(source.folder)
    found = {"dtype": dtype, "own": image_size(source.folder, networks, None, None)[0], "networks": list(networks), "weights": [],
             "ranks": {}, "load": {}, "encode": {}, "denoise": {}, "decode": {}}
    for size in SIZES:
        for batch in BATCHES:
            fixed = {"width": size, "height": size, "batch": batch, "guidance": True}
            for estimate in candidates(source, dtype, "cuda", fixed): record(found, estimate)
    found["load"] = {way: row[:1] for way, row in found["load"].items()}
    found["encode"] = {way: row[:len(BATCHES)] for way, row in found["encode"].items()}
    return found


def read(file: Path = FILE) -> dict:
    "The grid as the page reads it."
    return json.loads(file.read_text(encoding="utf-8").removeprefix(PREFIX).rstrip(";\n"))


if __name__ == "__main__":
    data = {"sizes": SIZES, "batches": BATCHES, "margin": ERROR_MARGIN, "palette": COMPONENT_COLOURS, "models": {}}
    for model in MODELS:
        data["models"][model] = grid(model)
        print(model, flush=True)
    FILE.write_text(PREFIX + json.dumps(data, separators=(",", ":")) + ";\n", encoding="utf-8")
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
