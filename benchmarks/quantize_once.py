"""Quantizing again against reading the quantized checkpoint: bytes read and seconds, side by side in one run.

usage: python benchmarks/quantize_once.py [--rounds 1]

Method. A pipeline with SDXL's structure and random weights (fp16 files, about half of them linear layers) is written to
a temporary folder, and its checkpoints to a cache beside it. Every load is a fresh process that has imported all
libraries before its clock starts; both sides take turns, in bfloat16 on the CPU. "cold": the files of both sides are
dropped from the page cache before each load (posix_fadvise); "warm": they have just been read. "bytes read" is what the
report says, the size of all weight files read; "from disk" is read_bytes of /proc/self/io during the load, which is
nothing when the cache is warm. Every byte of a checkpoint is read within the time, to be checked. With more rounds,
medians are shown. The rows are written to benchmarks/quantize_once.json and benchmarks/quantize_once.md.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
KINDS = {"nf4-dq": {"use_4bit": True}, "int8": {"use_4bit": False}}


def save_model(folder: Path) -> Path:
    "SDXL with two fifths of its widths and fewer layers, in fp16 files."
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from devsky_nb.hub.load import quiet
    from devsky_nb.hub.locate import locate_model
    torch.manual_seed(0)
    tiny = locate_model("tiny-sdxl")
    text = CLIPTextModel.config_class.from_pretrained(tiny / "text_encoder")
    text.hidden_size = text.projection_dim = 512
    text.intermediate_size = 2048
    text.num_hidden_layers = 4
    text.num_attention_heads = 8
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=1024,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 512,
    )
    with quiet("transformers", "diffusers"):
        parts = {
            "unet": unet.half(),
            "text_encoder": CLIPTextModel(text).half(),
            "text_encoder_2": CLIPTextModelWithProjection(text).half(),
        }
        StableDiffusionXLPipeline.from_pretrained(
            tiny, dtype=torch.float16, local_files_only=True, **parts
        ).save_pretrained(folder)
    return folder


def one_load(model: str, cache: str, kind: str, once: bool) -> dict:
    "One load in this process: what it cost."
    import psutil, torch
    from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load
    # imports, and what the libraries do once:
    load("tiny-sdxl", device="cpu", cache_dir=cache, quantize_once=False, offline=True)
    disk, start = psutil.Process().io_counters().read_bytes, time.perf_counter()
    pipeline = load(
        model,
        device="cpu",
        dtype=torch.bfloat16,
        cache_dir=cache,
        quantize_once=once,
        offline=True,
        fallback=False,
        **KINDS[kind],
    )
    seconds = time.perf_counter() - start
    report = pipeline.load_report
    return {
        "seconds": seconds,
        "bytes_read": report.bytes_read,
        "from_disk": psutil.Process().io_counters().read_bytes - disk,
        "weights": report.bytes_after,
        "from_checkpoint": report.from_checkpoint,
    }


def fresh_load(model: Path, cache: Path, kind: str, once: bool) -> dict:
    "One load in a process of its own."
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", str(model), str(cache), kind, str(int(once))],
        capture_output=True,
        text=True,
    )
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def forget_files(folder: Path) -> None:
    "Drop a folder's files from the page cache."
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, model: Path, rounds: int) -> dict:
    "Both sides in turn, warm and cold, for each kind."
    rows, cache = {}, folder / "hub"
    for kind in KINDS:
        fresh_load(model, cache, kind, True)  # writes the checkpoint
        for pages in ("warm", "cold"):
            found = {"again": [], "checkpoint": []}
            for _ in range(rounds):
                for side, loads in found.items():
                    if pages == "cold": forget_files(folder)
                    loads.append(fresh_load(model, cache, kind, side == "checkpoint"))
                    if loads[-1]["from_checkpoint"] != (side == "checkpoint"):
                        raise SystemExit(f"{kind}, {side}: not what was to be measured")
            row = {
                side: {k: statistics.median(r[k] for r in loads) for k in loads[0] if k != "from_checkpoint"}
                for side, loads in found.items()
            }
            row["ratio"] = {
                k: round(row["again"][k] / row["checkpoint"][k], 2)
                for k in ("seconds", "bytes_read", "from_disk")
                if row["checkpoint"][k]
            }
            rows[f"{kind}, {pages}"] = row
            print(kind, pages, json.dumps(row), file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.one: return print(json.dumps(one_load(*args.one[:3], args.one[3] == "1")))
    import bitsandbytes, diffusers, torch
    with tempfile.TemporaryDirectory() as d:
        model = save_model(Path(d, "random-sdxl"))
        size = sum(p.stat().st_size for p in model.rglob("*.safetensors"))
        rows = measure(Path(d), model, args.rounds)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
                   f"{torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
        "model_bytes": size,
        "rounds": args.rounds,
        "rows": rows,
    }
    (HERE / "quantize_once.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (HERE / "quantize_once.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    def mib(row: dict, key: str) -> str:
        ratio = f" (**{row['ratio'][key]}**)" if key in row["ratio"] else ""
        return f"{row['again'][key] / 2**20:.0f} / {row['checkpoint'][key] / 2**20:.0f}{ratio}"

    v = result["versions"]
    lines = [
        "# Quantizing again / reading the checkpoint",
        "",
        f"{result['machine']}; torch {v['torch']}, diffusers {v['diffusers']}, bitsandbytes {v['bitsandbytes']}; "
        f"a model of {result['model_bytes'] / 2**20:.0f} MiB in fp16 files, on the CPU in bfloat16; "
        f"rounds: {result['rounds']}. Ratios in brackets.",
        "",
        "| kind, page cache | seconds | MiB read | MiB from disk | MiB of weights |",
        "|---|---|---|---|---|",
    ]
    for name, r in result["rows"].items():
        seconds = f"{r['again']['seconds']:.1f} / {r['checkpoint']['seconds']:.1f} (**{r['ratio']['seconds']}**)"
        weights = f"{r['checkpoint']['weights'] / 2**20:.0f}"
        cells = (name, seconds, mib(r, "bytes_read"), mib(r, "from_disk"), weights)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `quantize_once.py`. Run it again with `make bench`.\n"


if __name__ == "__main__":
    main()
