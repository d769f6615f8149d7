"""What VramMonitor costs: generations with and without it, in turn, and one sample by itself.

usage: python benchmarks/monitor.py [--rounds 80] [--steps 4]

Method. tiny-sdxl draws the same image (64 px, fp32, on the CPU) plainly and under `VramMonitor(pipeline)` with its default
of 50 samples a second, in turn, after one warm-up each; which side goes first alternates. The time includes entering and
leaving the monitor. The ratio is that of the medians, by the clock and by processor time (of all threads, which the
machine's other work disturbs less); "plain / plain" is the same of the plain runs of even and odd rounds, which is what
noise alone makes. "Counted" is what the monitor's readings take by themselves: samples and borders of one run, at the cost
of each. A step of tiny-sdxl takes tens of milliseconds where SDXL's on a CPU takes ten thousand and on a GPU a hundred, so
the share of the borders is larger here than in earnest. A sample is one reading that is kept; a border is a sample, and
reading and resetting the system's highest use. Their cost is measured in place, between a network's operations, where
nothing of them is in the processor's caches, and in a loop, where all of it is; means of both. The rows are written to
benchmarks/monitor.json and benchmarks/monitor.md.
"""
import argparse, json, os, platform, statistics, time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
RUNS = 10  # that are looked into
CALLS = 2000  # of one reading, in a loop


def timed(f: Callable[[], object]) -> tuple[float, float]:
    "Seconds by the clock and of processor time."
    clock = time.perf_counter()
    work = time.process_time()
    f()
    return time.perf_counter() - clock, time.process_time() - work


def load(steps: int):
    "The pipeline, and a function that draws with it."
    import torch
    from devsky_nb.hub.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> bytes:
        generator = torch.Generator().manual_seed(0)
        images = pipeline("a red dress", num_inference_steps=steps, width=64, height=64, generator=generator).images
        return images[0].tobytes()
    return pipeline, draw


def summary(plain: list[float], monitored: list[float]) -> dict:
    "Medians of both sides, and what they mean."
    median = statistics.median
    return {"plain": round(median(plain), 5), "monitored": round(median(monitored), 5),
            "ratio": round(median(monitored) / median(plain), 4),
            "plain_to_plain": round(median(plain[::2]) / median(plain[1::2]), 4)}


def measure(pipeline, draw: Callable[[], bytes], rounds: int) -> dict:
    "Both sides in turn."
    from devsky_nb import VramMonitor

    def watched() -> bytes:
        with VramMonitor(pipeline): return draw()

    sides = {"plain": draw, "monitored": watched}
    if draw() != watched(): raise SystemExit("the monitor changed the image")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in (list(sides) if i % 2 else reversed(sides)): seconds[name].append(timed(sides[name]))
    result = {}
    for k, kind in enumerate(("clock", "processor")):
        result[kind] = summary(*([both[k] for both in seconds[name]] for name in sides))
    return result


def microseconds(seconds: list[float]) -> float:
    "The mean."
    return round(statistics.mean(seconds) * 1e6, 1)


def readings(pipeline, draw: Callable[[], bytes]) -> dict:
    "Microseconds of samples and of borders, their number in one run, in place and in a loop."
    from devsky_nb import VramMonitor
    took: dict[str, list[float]] = {"_sample": [], "_border": []}

    def watch(monitor: VramMonitor, name: str) -> None:
        "Have one of the monitor's readings timed whenever it is taken."
        reading = getattr(monitor, name)
        setattr(monitor, name, lambda: took[name].append(timed(reading)[0]))

    for _ in range(RUNS):
        with VramMonitor(pipeline) as monitor:
            for name in took: watch(monitor, name)
            draw()
    result = {}
    with VramMonitor(device="cpu", interval=3600.) as monitor:
        for name, found in took.items():
            in_a_loop = [timed(getattr(monitor, name))[0] for _ in range(CALLS)]
            result[name] = {"in_place": microseconds(found), "in_a_loop": microseconds(in_a_loop),
                            "of_one_run": round(len(found) / RUNS, 1)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import diffusers, torch
    pipeline, draw = load(args.steps)
    generation = measure(pipeline, draw, args.rounds)
    parts = readings(pipeline, draw)
    sample = parts["_sample"]
    border = parts["_border"]
    by_thread = sample["of_one_run"] - border["of_one_run"]  # a border takes a sample, too
    extra = border["of_one_run"] * border["in_place"] + by_thread * sample["in_place"]
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "rounds": args.rounds,
        "steps": args.steps, "generation": generation, "microseconds": parts,
        "counted": round(1 + extra / 1e6 / generation["clock"]["plain"], 4)}
    (HERE / "monitor.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (HERE / "monitor.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    versions = result["versions"]
    sample = result["microseconds"]["_sample"]
    border = result["microseconds"]["_border"]
    rows = []
    for kind, found in result["generation"].items():
        plain = f"{found['plain'] * 1e3:.1f} | {found['monitored'] * 1e3:.1f} | **{found['ratio']:.3f}**"
        rows.append(f"| {kind} | {plain} | {found['plain_to_plain']:.3f} | {result['counted']:.3f} |")
    by_thread = sample["of_one_run"] - border["of_one_run"]
    return "\n".join([
        "# A generation with and without VramMonitor", "",
        f"{result['machine']}; torch {versions['torch']}, diffusers {versions['diffusers']}; tiny-sdxl, {result['steps']} steps, "
        f"64 px, on the CPU; {result['rounds']} rounds, medians.", "",
        "| | plain, ms | monitored, ms | ratio | plain / plain | counted |", "|---|---|---|---|---|---|", *rows, "",
        "| | in place, µs | in a loop, µs | in one run |", "|---|---|---|---|",
        f"| a sample by the thread | {sample['in_place']} | {sample['in_a_loop']} | {by_thread:.0f} |",
        f"| a border | {border['in_place']} | {border['in_a_loop']} | {border['of_one_run']:.0f} |", "",
        "Method: see the head of `monitor.py`. Run it again with `python benchmarks/monitor.py`.", ""])


if __name__ == "__main__":
    main()
