"""Take the traces that the published figures ask for anew; those that the package carries are not among them.

usage: python tools/published.py      (a minute; after a change to tracing, or to a minor release of torch, transformers or diffusers)
"""
import json
from pathlib import Path
from unittest.mock import patch

from devsky_nb import estimate_vram
from devsky_nb.memory import traces
from devsky_nb.memory.configs import config_folder
from devsky_nb.memory.inputs import Switches, Workload
from devsky_nb.memory.traces import PACKAGED_TRACES, TracedNetwork, write_trace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PUBLISHED_TRACES = BENCHMARKS / "published_traces"


def ask(arguments: dict) -> None:
    "Ask the planner for a figure."
    options = dict(arguments)
    alias, _, part = options.pop("model").partition("/")
    estimate_vram(config_folder(alias) / part if part else alias, **options)


def questions() -> dict[str, tuple[Path, Workload, Switches]]:  # by the key of the answer
    "What the figures ask of tracing, where the package has no answer."
    asked = {}
    known = traces.known_trace

    def noted(key: str, *question: tuple[Path, Workload, Switches]) -> TracedNetwork:
        if not (PACKAGED_TRACES / f"{key}.npz").exists(): asked[key] = question
        return known(key, *question)

    with patch.object(traces, "known_trace", noted):
        for row in json.loads((BENCHMARKS / "published_vram.json").read_text(encoding="utf-8"))["rows"]:
            if "arguments" in row: ask(row["arguments"])
    return asked


if __name__ == "__main__":
    PUBLISHED_TRACES.mkdir(exist_ok=True)
    for file in PUBLISHED_TRACES.iterdir(): file.unlink()
    for key, question in questions().items(): write_trace(traces.known_trace(key, *question), PUBLISHED_TRACES / f"{key}.npz")
    print(f"{len(list(PUBLISHED_TRACES.iterdir()))} traces, {sum(file.stat().st_size for file in PUBLISHED_TRACES.iterdir()):,} bytes")
