"""Take the traces that the package carries anew: every known model at its usual size, with and without guidance, its VAE in tiles.

usage: python tools/traces.py      (some minutes; after a change to tracing, or to a minor release of torch, transformers or diffusers)
"""
import shutil
from collections.abc import Iterator
from pathlib import Path

from devsky_nb.hub.models import KNOWN
from devsky_nb.memory.configs import carried_configuration, networks_of
from devsky_nb.memory.estimate import image_size
from devsky_nb.memory.inputs import Switches, Workload
from devsky_nb.memory.traces import PACKAGED_TRACES, take_trace, trace_key, write_trace


def usual(model: str) -> Iterator[tuple[Path, Workload, Switches]]:
    "What the planner asks for when it is told nothing but the model."
    folder = carried_configuration(KNOWN[model].repo_id)
    networks = networks_of(folder)
    width, height = image_size(folder, networks, None, None)
    for name, part in networks.items():
        if name in ("unet", "transformer"):
            for guidance in (True, False): yield part, Workload(width, height, 1, guidance), Switches()
        elif name == "vae":
            for tiling in (False, True): yield part, Workload(width, height), Switches(tiling=tiling)
        else: yield part, Workload(0, 0), Switches()


if __name__ == "__main__":
    shutil.rmtree(PACKAGED_TRACES, ignore_errors=True)
    PACKAGED_TRACES.mkdir()
    for model in KNOWN:
        for question in usual(model):
            file = PACKAGED_TRACES / f"{trace_key(*question)}.npz"
            if not file.exists(): write_trace(take_trace(*question), file)
    files = list(PACKAGED_TRACES.iterdir())
    print(f"{len(files)} traces, {sum(file.stat().st_size for file in files):,} bytes")
