"""What VramMonitor costs: generations with and without it, in turn, and one sample by itself.

usage: python benchmarks/monitor.py [--rounds 80] [--steps 4]

Method. tiny-sdxl draws the same picture (64 px, fp32, on the CPU) plainly and under `VramMonitor(pipeline)` with its default of 50 samples a
second, in turn, after one warm-up each; which side goes first alternates. The time includes entering and leaving the monitor. The ratio is that
of the medians, by the clock and by processor time (of all threads, which the machine's other work disturbs less); "plain / plain" is the same of
the plain runs of even and odd rounds, which is what noise alone makes. "Counted" is what the monitor's readings take by themselves: samples and
borders of one run, at the cost of each. A step of tiny-sdxl takes
tens of milliseconds where SDXL's on a CPU takes ten thousand and on a GPU a hundred, so the share of the borders is larger here than in earnest.
A sample is one reading that is kept; a border is a sample, and reading and resetting the system's highest use. Their cost is measured in place,
between a network's operations, where nothing of them is in the processor's caches, and in a loop, where all of it is; means of both.
The rows are written to benchmarks/monitor.json and benchmarks/monitor.md.
"""
import argparse, json, os, platform, statistics, sys, time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = 10


def timed(f) -> tuple[float, float]:
    "Seconds by the clock and of processor time."
    start, work = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - work


def load(steps: int):
    "The pipeline, and a function that draws with it."
    import torch
    from devsky_nb.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, lambda: pipeline("a red dress", num_inference_steps=steps, width=64, height=64, generator=torch.Generator().manual_seed(0)).images[0].tobytes()


def measure(pipeline, draw, rounds: int) -> dict:
    "Both sides in turn."
    from devsky_nb.monitor import VramMonitor

    def watched():
        with VramMonitor(pipeline): return draw()

    sides = {"plain": draw, "monitored": watched}
    if draw() != watched(): raise SystemExit("the monitor changed the picture")
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in (list(sides) if i % 2 else reversed(sides)): seconds[name].append(timed(sides[name]))
    result = {}
    for k, kind in enumerate(("clock", "processor")):
        plain, monitored = ([t[k] for t in seconds[name]] for name in sides)
        middle = statistics.median
        result[kind] = {"plain": round(middle(plain), 5), "monitored": round(middle(monitored), 5), "ratio": round(middle(monitored) / middle(plain), 4),
                        "plain_to_plain": round(middle(plain[::2]) / middle(plain[1::2]), 4)}
    return result


def parts(pipeline, draw) -> dict:
    "Microseconds of samples and of borders, their number in one run, in place and in a loop."
    from devsky_nb.monitor import VramMonitor
    took = {"_sample": [], "_border": []}

    def place(monitor):
        for name, seconds in took.items():
            setattr(monitor, name, lambda f=getattr(monitor, name), seconds=seconds: seconds.append(timed(f)[0]))

    for _ in range(RUNS):
        with VramMonitor(pipeline) as monitor:
            place(monitor)
            draw()
    with VramMonitor(device="cpu", interval=3600.) as monitor:
        return {name: {"in_place": round(statistics.mean(found) * 1e6, 1), "in_a_loop": round(statistics.mean(timed(getattr(monitor, name))[0] for _ in range(2000)) * 1e6, 1),
                       "of_one_run": round(len(found) / RUNS, 1)} for name, found in took.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import diffusers, torch
    pipeline, draw = load(args.steps)
    generation, readings = measure(pipeline, draw, args.rounds), parts(pipeline, draw)
    extra = readings["_border"]["of_one_run"] * readings["_border"]["in_place"] + (readings["_sample"]["of_one_run"] - readings["_border"]["of_one_run"]) * readings["_sample"]["in_place"]
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
              "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "rounds": args.rounds, "steps": args.steps,
              "generation": generation, "microseconds": readings, "counted": round(1 + extra / 1e6 / generation["clock"]["plain"], 4)}
    (HERE / "monitor.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "monitor.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    v, sample, border = result["versions"], result["microseconds"]["_sample"], result["microseconds"]["_border"]
    rows = [f"| {kind} | {g['plain'] * 1e3:.1f} | {g['monitored'] * 1e3:.1f} | **{g['ratio']:.3f}** | {g['plain_to_plain']:.3f} | {result['counted']:.3f} |" for kind, g in result["generation"].items()]
    return "\n".join([
        "# A generation with and without VramMonitor", "", f"{result['machine']}; torch {v['torch']}, diffusers {v['diffusers']}; tiny-sdxl, {result['steps']} steps, "
        f"64 px, on the CPU; {result['rounds']} rounds, medians.", "",
        "| | plain, ms | monitored, ms | ratio | plain / plain | counted |", "|---|---|---|---|---|---|", *rows, "",
        "| | in place, µs | in a loop, µs | in one run |", "|---|---|---|---|",
        f"| a sample by the thread | {sample['in_place']} | {sample['in_a_loop']} | {sample['of_one_run'] - border['of_one_run']:.0f} |",
        f"| a border | {border['in_place']} | {border['in_a_loop']} | {border['of_one_run']:.0f} |", "",
        "Method: see the head of `monitor.py`. Run it again with `python benchmarks/monitor.py`.", ""])


if __name__ == "__main__":
    main()
