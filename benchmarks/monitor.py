"""What VramMonitor costs: generations with and without it, in turn, and one sample by itself.

usage: python benchmarks/monitor.py [--rounds 30] [--steps 10]

Method. tiny-sdxl draws the same picture (64 px, fp32, on the CPU) plainly and under `VramMonitor(pipeline)` with its default of 50 samples a
second, in turn, after one warm-up each; which side goes first alternates. The time includes entering and leaving the monitor. The ratio is that
of the medians; "plain / plain" is the same of the plain runs of even and odd rounds, which is what the machine's noise alone makes. A step of
tiny-sdxl takes milliseconds where SDXL's takes hundreds, so the share of the two borders a step is far larger here than in earnest.
A sample is one reading that is kept; a border is a sample, and reading and resetting the system's highest use. Both are medians of 2,000.
The rows are written to benchmarks/monitor.json and benchmarks/monitor.md.
"""
import argparse, json, os, platform, statistics, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def timed(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(rounds: int, steps: int) -> dict:
    "Both sides in turn."
    import torch
    from devsky_nb.monitor import VramMonitor
    from devsky_nb.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)
    pictures = {}

    def draw(name):
        pictures[name] = pipeline("a red dress", num_inference_steps=steps, width=64, height=64, generator=torch.Generator().manual_seed(0)).images[0].tobytes()

    def watched():
        with VramMonitor(pipeline): draw("monitored")

    sides = {"plain": lambda: draw("plain"), "monitored": watched}
    for f in sides.values(): f()
    if pictures["plain"] != pictures["monitored"]: raise SystemExit("the monitor changed the picture")
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in (list(sides) if i % 2 else reversed(sides)): seconds[name].append(timed(sides[name]))
    middle = statistics.median
    return {"seconds": {k: round(middle(v), 5) for k, v in seconds.items()}, "ratio": round(middle(seconds["monitored"]) / middle(seconds["plain"]), 4),
            "plain_to_plain": round(middle(seconds["plain"][::2]) / middle(seconds["plain"][1::2]), 4),
            "seconds_min": {k: round(min(v), 5) for k, v in seconds.items()}}


def parts() -> dict:
    "Microseconds of a sample and of a border."
    from devsky_nb.monitor import VramMonitor
    with VramMonitor(device="cpu", interval=3600.) as monitor:
        return {name: round(statistics.median(timed(f) for _ in range(2000)) * 1e6, 1) for name, f in (("sample", monitor._sample), ("border", monitor._border))} | {"exact": monitor.timeline.exact}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import diffusers, torch
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
              "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "rounds": args.rounds, "steps": args.steps,
              "generation": measure(args.rounds, args.steps), "microseconds": parts()}
    (HERE / "monitor.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "monitor.md").write_text(table(result))
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    v, g, us = result["versions"], result["generation"], result["microseconds"]
    s = g["seconds"]
    return "\n".join([
        "# A generation with and without VramMonitor", "", f"{result['machine']}; torch {v['torch']}, diffusers {v['diffusers']}; tiny-sdxl, {result['steps']} steps, "
        f"64 px, on the CPU; {result['rounds']} rounds, medians.", "",
        "| plain, ms | monitored, ms | ratio | plain / plain | a sample, µs | a border, µs |", "|---|---|---|---|---|---|",
        f"| {s['plain'] * 1e3:.1f} | {s['monitored'] * 1e3:.1f} | **{g['ratio']:.3f}** | {g['plain_to_plain']:.3f} | {us['sample']} | {us['border']} |", "",
        "At 50 samples a second, sampling takes " + f"{us['sample'] * 50 / 1e4:.2f} % of one core.", "",
        "Method: see the head of `monitor.py`. Run it again with `python benchmarks/monitor.py`.", ""])


if __name__ == "__main__":
    main()
