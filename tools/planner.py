"""Predict the grid that the planner of the site shows: nbs/planner-data.js, committed, compared by tests/test_planner.py.

usage: python tools/planner.py [NAME ...]      (some hours on one core; after a change to the planner or to the pinned libraries)

With names only these models are predicted anew, and the others stay as they are. The file is written after each model.
"""
import json, sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path

from devsky_nb.memory import traces
from devsky_nb.memory.configs import find_model, networks_of
from devsky_nb.memory.estimate import check_setup, Estimate, estimate_traced, Setup, trace_model
from devsky_nb.memory.offload import offload_way
from devsky_nb.memory.plan import ABOUT, PlanOption, usual_dtype, ways_of
from devsky_nb.memory.plots import COMPONENT_COLOURS

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "nbs" / "planner-data.js"
KEPT = ROOT / "build" / "planner-traces"  # so that a change to what is made of traces does not take them anew
PREFIX = "const PLANNER = "
UNIT = 2**16  # bytes: sizes are written in it
PHASES = ("load", "encode", "denoise", "decode")
QUANTS = {"16": "16 bits", "int8": "int8", "nf4": "nf4", "nf4-dq": "nf4, double quantization", "torchao-int8": "int8 of torchao",
          "layerwise-fp8": "fp8, cast layer by layer"}
OFFLOADS = {"none": "none", "model": "model by model", "group-block-stream": "groups of blocks, fetched ahead", "group": "layers, fetched ahead",
            "sequential": "layer by layer"}


@dataclass(frozen=True)
class Grid:
    "The positions of the controls for a model."
    sizes: tuple[tuple[int, int], ...]  # width and height in pixels
    own: int  # which of the sizes is the model's own
    batches: tuple[int, ...] = (1, 2, 4)
    frames: tuple[int, ...] = (1,)
    own_frames: int = 0  # which of them

    def points(self) -> Iterator[dict[str, int]]:
        "What is drawn at each point, in the order in which the page counts them: the batch changes first."
        for (width, height), frames, batch in product(self.sizes, self.frames, self.batches):
            yield {"width": width, "height": height, "batch": batch} | ({"frames": frames} if self.frames != (1,) else {})


def squares(*sides: int) -> tuple[tuple[int, int], ...]:
    "Square images."
    return tuple((side, side) for side in sides)


ALL, ENDS, LARGE = squares(512, 768, 1024), squares(512, 1024), squares(1024, 1536)
FEW = (1, 4)
WAN = ((832, 480), (1280, 720))
GRIDS = {
    "sdxl-base": Grid(ALL, 2), "sdxl-turbo": Grid(ENDS, 0, FEW), "sdxl-refiner": Grid(ENDS, 1, FEW), "ssd-1b": Grid(ENDS, 1, FEW),
    "sd15": Grid(ALL, 0), "sd21": Grid(squares(512, 768), 1, FEW), "sd3-medium": Grid(ENDS, 1, FEW), "sd35-medium": Grid(ENDS, 1, FEW),
    "sd35-large": Grid(ENDS, 1, FEW), "flux1-dev": Grid(ALL, 2), "flux1-schnell": Grid(ENDS, 1, FEW),
    "flux1-kontext-dev": Grid(squares(1024), 0, FEW), "flux2-dev": Grid(LARGE, 0, FEW), "flux2-klein-4b": Grid(LARGE, 0, FEW),
    "flux2-klein-9b": Grid(LARGE, 0, FEW), "pixart-sigma": Grid(ENDS, 1, FEW), "qwen-image": Grid(LARGE, 0, FEW),
    "z-image-turbo": Grid(LARGE, 0, FEW), "chroma1-hd": Grid(LARGE, 0, FEW), "sana-1600m": Grid(LARGE, 0, FEW),
    "wan21-t2v-1.3b": Grid(WAN, 0, (1,), (33, 81), 1), "ltx-video": Grid(((704, 512), (1216, 704)), 0, (1,), (97, 161), 1),
    "cogvideox-5b": Grid(((720, 480),), 0, (1,), (25, 49), 1)}


def take_or_read(part: Path, workload: traces.Workload, switches: traces.Switches = traces.Switches()) -> traces.TracedNetwork:
    "A trace that was kept in an earlier run, or taken."
    file = KEPT / f"{traces.trace_key(part, workload, switches)}.npz"
    kept = traces.read_trace(file) if file.exists() else None
    if kept is not None: return kept
    taken = taken_anew(part, workload, switches)
    KEPT.mkdir(parents=True, exist_ok=True)
    traces.write_trace(taken, file)
    return taken


taken_anew = traces.take_trace


def estimates(model: str, dtype: str, point: dict[str, int]) -> Iterator[Estimate]:
    "Every configuration that the controls can be set to: those of `plan.candidates` that the page has controls for."
    source = find_model(model)
    for tiling, slicing in product((False, True), (False, True) if point["batch"] > 1 else (False,)):
        traced = trace_model(Setup(model, dtype, vae_tiling=tiling, vae_slicing=slicing, **point), source)
        cast = "XL" in traced.kind and dtype == "fp16"
        for way, vae in product(ways_of(traced), ("upcast", "fp16-fix") if cast else ("upcast",)):
            if (way.get("quant") or "16") not in QUANTS or (way.get("offload") or "none") not in OFFLOADS: continue
            if cast and vae == "upcast" and offload_way(way.get("offload")).stream: continue  # groups would lose the cast
            yield estimate_traced(replace(traced, setup=check_setup(replace(traced.setup, vae=vae, **way))))


def about(estimate: Estimate) -> dict:
    "A configuration as the page knows it: what `estimate_vram` is given, how it is called, and where it stands in the order."
    setup = estimate.setup
    option = PlanOption(estimate, 0)
    given = {"quant": setup.quant, "offload": setup.offload, "vae": setup.vae, "vae_tiling": setup.vae_tiling, "vae_slicing": setup.vae_slicing}
    return {"options": {name: value for name, value in given.items() if value != getattr(Setup, name)},
            "label": option.label.removeprefix(setup.dtype).removeprefix(", "), "rank": [round(number, 3) for number in option.rank]}


def column(numbers: list) -> object:
    "A number for each point, or one for each batch, or one for all: the shortest list that says the same when it is repeated."
    for length in range(1, len(numbers)):
        if len(numbers) % length == 0 and numbers == numbers[:length] * (len(numbers) // length): return numbers[:length] if length > 1 else numbers[0]
    return numbers if len(numbers) > 1 else numbers[0]


def index_of(value: object, table: list) -> int:
    "Where something stands in a table; it is put there if it is new."
    if value not in table: table.append(value)
    return table.index(value)


def grid(model: str, configs: list[dict]) -> dict:
    "All that the page knows of a model; `configs` is the table of configurations, which all models share."
    source = find_model(model)
    grid = GRIDS[model]
    dtype = usual_dtype(source, "cuda")
    networks = list(networks_of(source.folder))
    weights: list = []
    points = list(grid.points())
    found: dict[int, list] = {}  # by configuration: for each phase the points, each with weights, tensors and workspace; and what must be there for one byte
    for at, point in enumerate(points):
        for estimate in estimates(model, dtype, point):
            if estimate.traced.untraced: raise SystemExit(f"{model}: {estimate.traced.untraced}")
            rows = found.setdefault(index_of(about(estimate), configs), [[None] * len(points) for _ in (*PHASES, "needs")])
            for row, phase in zip(rows, PHASES):
                runs = [run for run in estimate.runs if run.phase == phase]
                if not runs: continue
                worst = max(runs, key=lambda run: run.total)
                kept = [round(worst.weights.get(name, 0) / UNIT) for name in networks]
                row[at] = [index_of(kept, weights), round(worst.activations / UNIT), round(worst.workspace / UNIT)]
            rows[-1][at] = ceil(1000 * estimate.needed / estimate.peak_allocated) / 1000
    table: list = []
    places = {}
    for config, rows in found.items():
        columns = [[column([entry and entry[i] for entry in row]) for i in range(3)] if any(row) else None for row in rows[:-1]]
        places[config] = [None if one is None else index_of(one, table) for one in columns] + [column(rows[-1])]
    return {"kind": "images" if grid.frames == (1,) else "videos", "dtype": dtype, "own": [grid.own, grid.own_frames], "sizes": grid.sizes,
            "frames": grid.frames, "batches": grid.batches, "networks": networks, "weights": weights, "rows": table, "configs": places}


def at(column: object, point: int) -> object:
    "The number of a column at a point."
    return column[point % len(column)] if isinstance(column, list) else column


def held(known: dict, config: int, phase: str, point: int) -> dict[str, int] | None:  # bytes by name; None: the grid has no such point
    "What is held in a phase, as the page reads it."
    place = known["configs"][str(config)][PHASES.index(phase)]
    if place is None: return None
    which, tensors, workspace = (at(one, point) for one in known["rows"][place])
    if which is None: return None
    sizes = dict(zip(known["networks"], known["weights"][which])) | {"tensors": tensors, "workspace": workspace}
    return {name: size * UNIT for name, size in sizes.items()}


def read(file: Path = FILE) -> dict:
    "The grid as the page reads it."
    return json.loads(file.read_text(encoding="utf-8").removeprefix(PREFIX).rstrip(";\n"))


def write(data: dict) -> None:
    "The grid for the page, models in the order of `GRIDS`."
    data["models"] = {name: data["models"][name] for name in GRIDS if name in data["models"]}
    FILE.write_text(PREFIX + json.dumps(data, separators=(",", ":")) + ";\n", encoding="utf-8")


if __name__ == "__main__":
    traces.take_trace = take_or_read
    data = read() if sys.argv[1:] else {"configs": [], "models": {}}
    data |= {"unit": UNIT, "about": ABOUT, "palette": COMPONENT_COLOURS, "quant": QUANTS, "offload": OFFLOADS}
    for model in sys.argv[1:] or GRIDS:
        data["models"][model] = grid(model, data["configs"])
        write(data)
        print(model, f"{FILE.stat().st_size:,} bytes", flush=True)
