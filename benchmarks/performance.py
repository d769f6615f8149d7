"""What each technique of `nbs/diffusion/19_techniques.ipynb` brings on a CPU: with and without it, in turn, in one run.

usage: python benchmarks/performance.py [--rounds 9] [--rows NAME ...] [--out FOLDER]

Method. Two sides do the same work, once before the clock starts and then in turn; which goes first alternates. The
ratio is that of the medians, the time without the technique over the time with it, by processor time of all threads,
which the machine's other work disturbs less than the clock; the ratio by the clock stands beside it. Above 1, the
technique is faster. "plain / plain" is the same of two sides that are alike, which is what noise alone makes. The
pipeline is tiny-sdxl (64 px, 4 steps, fp32) and, because two convolutions do not make a network, also a VAE of SDXL's
widths with random weights (128 px) for the memory layout; CLIP is a CLIPVisionModelWithProjection of ViT-B/32's shape
with random weights, batch 4. Compiling is timed from the first call to its end, with the caches of earlier
compilations off. "warm-up" is a fresh process that has loaded and imported everything: its first image over its third.
The rows are written to performance.json and performance.md; --rows takes only those whose names begin so.
"""
import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def timed(f: Callable) -> tuple[float, float]:
    "Seconds by the clock and of processor time."
    start, work = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - work


def ratio(without: list[tuple[float, float]], with_it: list[tuple[float, float]]) -> dict:
    "A row: two lists of times, compared by their medians."
    medians = {name: [statistics.median(t[k] for t in times) for k in (0, 1)]
               for name, times in (("without", without), ("with", with_it))}
    clock, processor = (round(medians["without"][k] / medians["with"][k], 2) for k in (0, 1))
    return {"clock": clock, "processor": processor,
            "milliseconds": {name: round(m[1] * 1e3, 1) for name, m in medians.items()}}


def compare(without: Callable, with_it: Callable, rounds: int) -> dict:
    "Both sides in turn."
    sides = {"without": without, "with": with_it}
    for f in sides.values():
        f()
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in (list(sides) if i % 2 else reversed(sides)):
            seconds[name].append(timed(sides[name]))
    return ratio(seconds["without"], seconds["with"])


class Rows:
    "The rows of one model, measured as they are named; those that nobody asked for are left out."

    def __init__(self, rounds: int, wanted: list[str]):
        self.rounds, self.wanted = rounds, wanted
        self.rows: dict[str, dict] = {}

    def wants(self, name: str) -> bool:
        return not self.wanted or any(name.startswith(start) for start in self.wanted)

    def add(self, name: str, make_sides: Callable[[], tuple], rounds: int = 0) -> None:
        "Measure the two sides that a function makes."
        if not self.wants(name):
            return
        self.keep(name, compare(*make_sides(), min(rounds, self.rounds) or self.rounds))

    def add_compiled(self, make_sides: Callable[[], tuple]) -> None:
        "The same, with the first call by itself."
        if not self.wants("compiled blocks"):
            return
        without, with_it = make_sides()
        first, _ = timed(with_it)
        self.keep("compiled blocks", compare(without, with_it, self.rounds) | {"first_call_seconds": round(first, 1)})

    def keep(self, name: str, row: dict) -> None:
        self.rows[name] = row
        print(name, json.dumps(row), file=sys.stderr)


def draw(pipeline, n: int = 1, steps: int = 4, **prompt):
    "Images."
    import torch
    prompt = prompt or {"prompt": ["a red dress"] * n}
    noise = [torch.Generator().manual_seed(i) for i in range(n)]
    return pipeline(**prompt, num_inference_steps=steps, output_type="np", generator=noise).images


def decoding(vae, latents) -> Callable:
    import torch
    return torch.inference_mode()(lambda: vae.decode(latents))


def load_tiny():
    import torch
    from devsky_nb.hub.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def switched(pipeline, name: str):
    "A copy of a pipeline with a switch of `devsky_nb.diffusion.speed` thrown."
    from devsky_nb.diffusion.speed import TECHNIQUES, Task
    twin = copy.deepcopy(pipeline)
    technique = next(technique for technique in TECHNIQUES if technique.name == name)
    on, _ = technique.switch(Task(twin, width=64, height=64))
    on()
    return twin


def pipeline_rows(rounds: int, wanted: list[str]) -> dict:
    "tiny-sdxl."
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    pipeline = load_tiny()
    measured = Rows(rounds, wanted)
    with torch.no_grad():
        texts = pipeline.encode_prompt("a red dress", device="cpu")
    shared = {"encoder_hidden_states": texts[0].expand(2, -1, -1),
              "added_cond_kwargs": {"text_embeds": texts[2].expand(2, -1), "time_ids": torch.zeros(2, 6)}}

    def plain():
        return draw(pipeline)

    def unet():
        return pipeline.unet(torch.zeros(2, 4, 16, 16), 10, **shared)

    def against(change: Callable) -> Callable[[], tuple]:
        "The pipeline as it is, and a copy that is changed."
        def make_sides():
            twin = copy.deepcopy(pipeline)
            change(twin)
            return plain, lambda: draw(twin)
        return make_sides

    def with_switch(name: str) -> Callable[[], tuple]:
        def make_sides():
            twin = switched(pipeline, name)
            return plain, lambda: draw(twin)
        return make_sides

    def layouts():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
                            down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4).eval()
        latents = torch.randn(1, 4, 16, 16)
        twin = copy.deepcopy(vae).to(memory_format=torch.channels_last)
        return decoding(vae, latents), decoding(twin, latents)

    def in_pieces(switch: str, n: int, side: int) -> Callable[[], tuple]:
        def make_sides():
            latents, pieces = torch.randn(n, 4, side, side), copy.deepcopy(pipeline.vae)
            getattr(pieces, switch)()
            return decoding(pipeline.vae, latents), decoding(pieces, latents)
        return make_sides

    def encoded_once():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeddings = dict(zip(names, texts))
        return plain, lambda: draw(pipeline, **embeddings)

    def solvers():
        scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        quick = type(pipeline)(**pipeline.components | {"scheduler": scheduler})
        quick.set_progress_bar_config(disable=True)
        return lambda: draw(pipeline, steps=16), lambda: draw(quick, steps=8)

    def fp8(twin):
        twin.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    def group(twin):
        twin.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")

    measured.add("plain / plain", lambda: (plain, plain))
    measured.add("inference_mode, one call of the UNet", lambda: (unet, torch.inference_mode()(unet)))
    measured.add("attention slicing", against(lambda twin: twin.enable_attention_slicing()))
    measured.add("channels_last", with_switch("channels_last"))
    measured.add("fp8 storage", against(fp8))
    measured.add("half precision", with_switch("half precision"), 3)
    measured.add("channels_last, decoding with SDXL's VAE at 128 px", layouts, 3)
    measured.add("hooks of model offload, with nothing to move", with_switch("model offload"))
    measured.add("hooks of group offload, with nothing to move", against(group))
    measured.add("VAE slicing, four images", in_pieces("enable_slicing", 4, 16))
    measured.add("VAE tiling, 128 px", in_pieces("enable_tiling", 1, 32))
    measured.add("one call for four images",
                 lambda: (lambda: [draw(pipeline) for _ in range(4)], lambda: draw(pipeline, 4)), 5)
    measured.add("texts encoded once", encoded_once)
    measured.add("DPM++ 2M with 8 steps for DDIM with 16", solvers, 5)
    measured.add_compiled(with_switch("compiled blocks"))
    if measured.wants("warm-up: later images over the first"):
        measured.keep("warm-up: later images over the first", warm_up(min(rounds, 2)))
    return measured.rows


def clip_rows(rounds: int, wanted: list[str]) -> dict:
    "ViT-B/32's shape."
    import torch
    from diffusers.hooks import apply_layerwise_casting
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32)).eval()
    measured, pixels = Rows(rounds, wanted), torch.randn(4, 3, 224, 224)

    def run(network, x=pixels) -> Callable:
        return torch.inference_mode()(lambda: network(pixel_values=x))

    def eager():
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        return run(twin), run(model)

    def fp8():
        twin = copy.deepcopy(model)
        apply_layerwise_casting(twin, torch.float8_e4m3fn, torch.float32, ("pos_embed", "patch_embed", "norm"))
        return run(model), run(twin)

    def compiled():
        twin = copy.deepcopy(model)
        for layer in twin.vision_model.encoder.layers:
            layer.compile()
        return run(model), run(twin)

    measured.add("plain / plain", lambda: (run(model), run(model)))
    measured.add("inference_mode", lambda: (lambda: model(pixel_values=pixels), run(model)))
    measured.add("fused attention, over eager", eager)
    measured.add("one call for four images", lambda: (lambda: [run(model, p[None])() for p in pixels], run(model)))
    measured.add("half precision", lambda: (run(model), run(copy.deepcopy(model).bfloat16(), pixels.bfloat16())), 3)
    measured.add("fp8 storage", fp8)
    measured.add_compiled(compiled)
    return measured.rows


def first_images() -> list[tuple[float, float]]:
    "In this process: the first three images."
    pipeline = load_tiny()
    return [timed(lambda: draw(pipeline)) for _ in range(3)]


def warm_up(rounds: int) -> dict:
    "Processes, one after the other."
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--first"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return ratio([first for first, _, _ in found], [third for _, _, third in found])


def table(result: dict) -> str:
    "The result as Markdown."
    v = result["versions"]
    lines = ["# With and without each technique, on a CPU", "",
             f"{result['machine']}; torch {v['torch']}, diffusers {v['diffusers']}, transformers {v['transformers']}; "
             f"{result['rounds']} rounds, medians. A ratio above 1 means that the technique is faster."]
    for model in ("tiny-sdxl", "ViT-B/32"):
        lines += ["", f"| {model} | ratio, processor time | by the clock | ms without | ms with |"]
        lines.append("|---|---|---|---|---|")
        for name, row in result[model].items():
            note = f" (first call: {row['first_call_seconds']:.0f} s)" if "first_call_seconds" in row else ""
            without, with_it = row["milliseconds"]["without"], row["milliseconds"]["with"]
            lines.append(f"| {name}{note} | **{row['processor']:.2f}** | {row['clock']:.2f} | "
                         f"{without:.0f} | {with_it:.0f} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `performance.py`. Run it again with `make bench`.\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only rows whose names begin so")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of performance.json and performance.md")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.first:
        print(json.dumps(first_images()))
        return {}
    import diffusers
    import torch
    import transformers
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    result = {"machine": machine, "versions": {name: str(version) for name, version in versions.items()},
              "rounds": args.rounds, "tiny-sdxl": pipeline_rows(args.rounds, args.rows),
              "ViT-B/32": clip_rows(args.rounds, args.rows)}
    (args.out / "performance.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "performance.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return result


if __name__ == "__main__":
    main()
