"""Take the traces that the package carries anew: of every known model at its usual size, with and without guidance, and of its VAE in tiles.

usage: python tools/traces.py
"""
import shutil

from devsky_nb.tracing import REPOS, TRACES, Shape, Switches, config_folder, networks_of, take_trace, trace_key, write_trace
from devsky_nb.vram import picture_size


def usual(model: str):
    "What the planner asks for when it is told nothing but the model."
    folder = config_folder(model)
    nets = networks_of(folder)
    width, height = picture_size(folder, nets, None, None)
    for name, part in nets.items():
        if name in ("unet", "transformer"): yield from ((part, Shape(width, height, 1, guidance), Switches()) for guidance in (True, False))
        elif name == "vae": yield from ((part, Shape(width, height), Switches(tiling=tiling)) for tiling in (False, True))
        else: yield part, Shape(0, 0), Switches()


if __name__ == "__main__":
    shutil.rmtree(TRACES, ignore_errors=True)
    TRACES.mkdir()
    for model in REPOS:
        for question in usual(model):
            file = TRACES / f"{trace_key(*question)}.npz"
            if not file.exists(): write_trace(take_trace(*question), file)
    print(f"{len(list(TRACES.iterdir()))} traces, {sum(f.stat().st_size for f in TRACES.iterdir()):,} bytes")
