"""Take the traces that the package carries anew: every known model as it is drawn with unasked, its VAE also in tiles.

usage: python tools/traces.py [NAME ...]      (a quarter of an hour; after a change to tracing, or to a minor release of torch, transformers or diffusers)

With names only the traces of these models are taken, where they are missing or stale.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

from devsky_nb.hub.models import KNOWN
from devsky_nb.memory.configs import ModelSource, carried_configuration, class_in, listed_parts, networks_of
from devsky_nb.memory.estimate import asked_size, image_size, is_distilled, Setup
from devsky_nb.memory.inputs import Switches, Workload
from devsky_nb.memory.traces import PACKAGED_TRACES, read_trace, take_trace, trace_key, write_trace


def has_tiles(part: Path) -> bool:
    "Whether a pipeline's VAE can decode in tiles."
    return hasattr(class_in(*listed_parts(part.parent)["vae"]), "enable_tiling")


def usual(model: str) -> Iterator[tuple[Path, Workload, Switches]]:
    "What the planner asks for when it is told nothing but the model."
    folder = carried_configuration(KNOWN[model].repo_id)
    networks = networks_of(folder)
    asked_width, asked_height, frames = asked_size(Setup(model), KNOWN[model].repo_id)
    width, height = image_size(folder, networks, asked_width, asked_height)
    guidance = False if is_distilled(ModelSource(model, folder, KNOWN[model].repo_id)) else None
    workload = Workload(width, height, 1, guidance, frames, None, ())
    for name, part in networks.items():
        yield part, workload, Switches()
        if name == "vae" and has_tiles(part): yield part, workload, Switches(tiling=True)


def trace_file(question: tuple[Path, Workload, Switches]) -> Path:
    "Where the answer to a question is kept."
    return PACKAGED_TRACES / f"{trace_key(*question)}.npz"


def is_missing(question: tuple[Path, Workload, Switches]) -> bool:
    "Whether no answer is kept that is good today."
    file = trace_file(question)
    return not file.exists() or read_trace(file) is None


if __name__ == "__main__":
    PACKAGED_TRACES.mkdir(exist_ok=True)
    if not sys.argv[1:]:
        for file in PACKAGED_TRACES.iterdir(): file.unlink()
    for model in sys.argv[1:] or KNOWN:
        missing = [question for question in usual(model) if is_missing(question)]
        for question in missing: write_trace(take_trace(*question), trace_file(question))
        print(model, len(missing), flush=True)
    wanted = {trace_file(question) for model in KNOWN for question in usual(model)}
    for file in set(PACKAGED_TRACES.iterdir()) - wanted: file.unlink()
    print(f"{len(wanted)} traces, {sum(file.stat().st_size for file in PACKAGED_TRACES.iterdir()):,} bytes")
