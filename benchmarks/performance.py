"""What each technique of `devsky_nb.performance` brings on a CPU: with and without it, in turn, in one run.

usage: python benchmarks/performance.py [--rounds 9]

Method. Two sides do the same work, once before the clock starts and then in turn; which goes first alternates. The ratio is that of the medians, the time without the technique over the time
with it, by processor time of all threads, which the machine's other work disturbs less than the clock; the ratio by the clock stands beside it. Above 1, the technique is faster. "plain / plain" is the same of two sides that are alike, which is what noise
alone makes. The pipeline is tiny-sdxl (64 px, 4 steps, fp32) and, because two convolutions do not make a network, also a VAE of SDXL's widths with random weights (128 px) for the memory layout; CLIP is a
CLIPVisionModelWithProjection of ViT-B/32's shape with random weights, batch 4. Techniques are applied by the package's own functions to a copy of the model. Compiling is timed from the first call to
its end, with the caches of earlier compilations off. "first picture" is a fresh process that has loaded and imported everything: its first picture over its third. The rows are written to benchmarks/performance.json and
benchmarks/performance.md.
"""
import argparse, copy, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def timed(f) -> tuple[float, float]:
    "Seconds by the clock and of processor time."
    start, work = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - work


def compare(without, with_it, rounds: int) -> dict:
    "Both sides in turn."
    sides = {"without": without, "with": with_it}
    for f in sides.values(): f()
    seconds = {name: [] for name in sides}
    for i in range(rounds):
        for name in (list(sides) if i % 2 else reversed(sides)): seconds[name].append(timed(sides[name]))
    middle = {name: [statistics.median(t[k] for t in found) for k in (0, 1)] for name, found in seconds.items()}
    return {"clock": round(middle["without"][0] / middle["with"][0], 2), "processor": round(middle["without"][1] / middle["with"][1], 2),
            "milliseconds": {name: round(m[1] * 1e3, 1) for name, m in middle.items()}}


def draw(pipeline, n: int = 1, steps: int = 4, **prompt):
    "Pictures."
    import torch
    prompt = prompt or {"prompt": ["a red dress"] * n}
    return pipeline(**prompt, num_inference_steps=steps, output_type="np", generator=[torch.Generator().manual_seed(i) for i in range(n)]).images


def changed(model, name: str):
    "A copy of a model with a technique applied."
    from devsky_nb.performance import TECHNIQUES, Job
    twin = copy.deepcopy(model)
    TECHNIQUES[name].apply(Job(twin, size=(64, 64) if hasattr(twin, "unet") else (0, 0)))
    return twin


def pipeline_rows(rounds: int) -> dict:
    "tiny-sdxl."
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from devsky_nb.performance import place, text_embeddings
    from devsky_nb.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)
    rows, plain = {}, lambda: draw(pipeline)

    def row(name, without, with_it, n=rounds):
        rows[name] = compare(without, with_it, n)
        print(name, json.dumps(rows[name]), file=sys.stderr)

    row("plain / plain", plain, plain)
    with torch.no_grad(): texts = pipeline.encode_prompt("a red dress", device="cpu", do_classifier_free_guidance=False)
    noise, extra = torch.zeros(2, 4, 16, 16), {"text_embeds": texts[2].expand(2, -1), "time_ids": torch.zeros(2, 6)}
    def unet(): return pipeline.unet(noise, 10, encoder_hidden_states=texts[0].expand(2, -1, -1), added_cond_kwargs=extra)
    row("inference_mode, one call of the UNet", unet, torch.inference_mode()(unet), 3 * rounds)
    sliced = copy.deepcopy(pipeline)
    sliced.enable_attention_slicing()
    row("attention slicing", plain, lambda: draw(sliced))
    for name, n in (("channels_last", rounds), ("fp8 storage", rounds), ("half precision", 3)):
        twin = changed(pipeline, name)
        row(name, plain, lambda: draw(twin), n)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4).eval()
    last, latents = copy.deepcopy(vae).to(memory_format=torch.channels_last), torch.randn(1, 4, 16, 16)
    decoded = [torch.inference_mode()(lambda v=v: v.decode(latents)) for v in (vae, last)]
    row("channels_last, decoding with SDXL's VAE at 128 px", *decoded, 3)
    for way in ("model", "group"):
        twin = copy.deepcopy(pipeline)
        place(twin, way, "cpu")
        row(f"hooks of {way} offload, with nothing to move", plain, lambda: draw(twin))
    small, pieces = torch.randn(4, 4, 16, 16), copy.deepcopy(pipeline.vae)
    pieces.enable_slicing()
    row("VAE slicing, four pictures", *[torch.inference_mode()(lambda v=v: v.decode(small)) for v in (pipeline.vae, pieces)])
    large, tiles = torch.randn(1, 4, 32, 32), copy.deepcopy(pipeline.vae)
    tiles.enable_tiling()
    row("VAE tiling, 128 px", *[torch.inference_mode()(lambda v=v: v.decode(large)) for v in (pipeline.vae, tiles)])
    row("one call for four pictures", lambda: [draw(pipeline) for _ in range(4)], lambda: draw(pipeline, 4), 5)
    embeddings = text_embeddings(pipeline, "a red dress")
    row("texts encoded once", plain, lambda: draw(pipeline, **embeddings))
    quick = type(pipeline)(**pipeline.components | {"scheduler": DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)})
    quick.set_progress_bar_config(disable=True)
    row("DPM++ 2M with 8 steps for DDIM with 16", lambda: draw(pipeline, steps=16), lambda: draw(quick, steps=8), 5)
    fast = changed(pipeline, "compiled blocks")
    seconds = timed(lambda: draw(fast))[0]
    row("compiled blocks", plain, lambda: draw(fast))
    rows["compiled blocks"]["first_call_seconds"] = round(seconds, 1)
    return rows


def clip_rows(rounds: int) -> dict:
    "ViT-B/32's shape."
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(0)
    model, rows, pixels = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32)).eval(), {}, torch.randn(4, 3, 224, 224)

    def row(name, without, with_it, n=rounds):
        rows[name] = compare(without, with_it, n)
        print(name, json.dumps(rows[name]), file=sys.stderr)

    def run(m, x=pixels): return torch.inference_mode()(lambda: m(pixel_values=x))
    row("plain / plain", run(model), run(model))
    row("inference_mode", lambda: model(pixel_values=pixels), run(model))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    row("fused attention, over eager", run(eager), run(model))
    row("one call for four pictures", lambda: [run(model, p[None])() for p in pixels], run(model))
    half = changed(model, "half precision")
    row("half precision", run(model), run(half, pixels.bfloat16()), 3)
    small = changed(model, "fp8 storage")
    row("fp8 storage", run(model), run(small))
    fast = changed(model, "compiled blocks")
    seconds = timed(run(fast))[0]
    row("compiled blocks", run(model), run(fast))
    rows["compiled blocks"]["first_call_seconds"] = round(seconds, 1)
    return rows


def first_picture() -> dict:
    "In this process: the first picture and the third."
    import torch
    from devsky_nb.registry import load_model
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32, offline=True)
    pipeline.set_progress_bar_config(disable=True)
    return [timed(lambda: draw(pipeline)) for _ in range(3)]


def warm_up(rounds: int) -> dict:
    "Processes, one after the other."
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--first"], capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, third = ([statistics.median(f[i][k] for f in found) for k in (0, 1)] for i in (0, 2))
    return {"clock": round(first[0] / third[0], 2), "processor": round(first[1] / third[1], 2), "milliseconds": {"without": round(first[1] * 1e3, 1), "with": round(third[1] * 1e3, 1)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.first: return print(json.dumps(first_picture()))
    import diffusers, torch, transformers
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
              "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}, "rounds": args.rounds,
              "tiny-sdxl": pipeline_rows(args.rounds) | {"warm-up: later pictures over the first": warm_up(2)}, "ViT-B/32": clip_rows(args.rounds)}
    (HERE / "performance.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "performance.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    v = result["versions"]
    lines = ["# With and without each technique, on a CPU", "", f"{result['machine']}; torch {v['torch']}, diffusers {v['diffusers']}, transformers {v['transformers']}; {result['rounds']} rounds, medians. "
             "A ratio above 1 means that the technique is faster."]
    for model in ("tiny-sdxl", "ViT-B/32"):
        lines += ["", f"| {model} | ratio, processor time | by the clock | ms without | ms with |", "|---|---|---|---|---|"]
        for name, r in result[model].items():
            note = f" (first call: {r['first_call_seconds']:.0f} s)" if "first_call_seconds" in r else ""
            lines.append(f"| {name}{note} | **{r['processor']:.2f}** | {r['clock']:.2f} | {r['milliseconds']['without']:.0f} | {r['milliseconds']['with']:.0f} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `performance.py`. Run it again with `make bench`.\n"


if __name__ == "__main__":
    main()
