"""What only a GPU can show, in one command: `make gpu`.

    python benchmarks/gpu.py                   # SDXL-base and CLIP at full size with random weights: no network, nobody's weights
    python benchmarks/gpu.py --tiny            # the two small models of the package on the GPU: a minute
    python benchmarks/gpu.py --dry-run         # the same on the CPU: is this script sound?
    python benchmarks/gpu.py --pretend         # the same on a pretended GPU (tests/pretended_gpu.py)
    python benchmarks/gpu.py --only memory,clip --out somewhere.json

Memory does not depend on what the weights are, so they are random, built from the configurations that the package carries. Every check is
one line: PASS, FAIL, or NOTE (a figure without a verdict). The exit status is 1 if a check failed. Needs a GPU of 12 GiB or more (what does
not fit is left out, and said), 16 GiB of main memory and 14 GiB of disk under --work. How to send a result in: benchmarks/gpu.md."""
import argparse, contextlib, gc, io, json, os, platform, re, shutil, subprocess, sys, tempfile, threading, time, traceback, warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
GIB, MIB = 2**30, 2**20
PROMPT = "a red striped t-shirt"
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "huggingface_hub", "numpy",
             "devsky_nb")


class Skip(Exception):
    "Why a section does not apply here."


class Run:
    "The device, the options, the results, and what sections share."

    def __init__(self, options: argparse.Namespace):
        import torch
        from devsky_nb.device import check_device
        self.options, self.torch, self.started = options, torch, time.time()
        self.device = check_device(options.device)
        self.kind = self.device.partition(":")[0]
        self.cuda, self.tiny = self.kind == "cuda", options.tiny
        self.size = 64 if self.tiny else options.size
        self.work = Path(options.work or tempfile.mkdtemp(prefix="devsky-gpu-"))
        self.cache = self.work / "hub"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.results: list[dict] = []
        self.figures: dict[str, Any] = {}  # by section: what is worth more than a line
        self.section = ""
        self.folder: Path | None = None  # of SDXL with random weights

    # --- results

    def say(self, status: str, name: str, value: object = "", expected: object = "") -> None:
        self.results.append({"section": self.section, "status": status, "name": name, "value": str(value)})
        wanted = f"   (expected {expected})" if expected != "" and status == "FAIL" else ""
        print(f"  {status:4} {name}" + (f": {value}" if value != "" else "") + wanted, flush=True)

    def note(self, name: str, value: object) -> None: self.say("NOTE", name, value)

    def check(self, name: str, holds: bool, value: object = "", expected: object = "") -> None:
        self.say("PASS" if holds else "FAIL", name, value, expected)

    def raises(self, name: str, kind: type[Exception], call: Callable[[], object], words: str = "") -> None:
        try: call()
        except Exception as e:
            self.check(name, isinstance(e, kind) and words in str(e), f"{type(e).__name__}: {str(e)[:160]}",
                       f"{kind.__name__} {words}")
        else: self.check(name, False, "nothing was raised", kind.__name__)

    def works(self, name: str, call: Callable[[], object]) -> Any:
        "What a call returns; None if it fails."
        try: result = call()
        except Exception as e:
            self.check(name, False, f"{type(e).__name__}: {str(e)[:200]}")
            traceback.clear_frames(e.__traceback__)
            return None
        self.check(name, True)
        return result

    # --- memory and time

    def wait(self) -> None:
        if self.cuda: self.torch.cuda.synchronize(self.device)
        elif self.kind == "mps": self.torch.mps.synchronize()

    def used(self) -> int:
        if self.cuda: return self.torch.cuda.memory_allocated(self.device)
        return self.torch.mps.current_allocated_memory() if self.kind == "mps" else 0

    def clean(self) -> int:  # bytes that are still in use
        "Give back what nobody uses."
        from devsky_nb.device import release_memory
        gc.collect()
        clear = getattr(self.torch._C, "_cuda_clearCublasWorkspaces", None)
        if self.cuda and clear and not self.options.pretend: clear()
        release_memory()
        return self.used()

    def peak(self) -> int: return self.torch.cuda.max_memory_allocated(self.device) if self.cuda else self.used()
    def reset(self) -> None:
        if self.cuda: self.torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def limited(self, size: int) -> Iterator[None]:
        "A smaller card: PyTorch may take this many bytes."
        if not self.cuda: raise Skip("only CUDA can be made smaller")
        total = self.torch.cuda.get_device_properties(self.device).total_memory
        self.clean()
        self.torch.cuda.set_per_process_memory_fraction(min(1., size / total), self.device)
        try: yield
        finally:
            self.torch.cuda.set_per_process_memory_fraction(1., self.device)
            self.clean()

    def seconds(self, call: Callable[[], object], rounds: int = 1) -> float:
        best = float("inf")
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best

    # --- models

    @property
    def dtypes(self) -> list:
        if self.kind == "cpu": return [self.torch.float32]
        modern = self.kind == "mps" or self.torch.cuda.get_device_capability(self.device)[0] >= 8
        return [self.torch.float16, self.torch.bfloat16] if modern else [self.torch.float16]

    def sdxl_folder(self) -> Path:
        from devsky_nb.hub.locate import bundled_folder
        from devsky_nb.hub.models import KNOWN
        if self.tiny: return bundled_folder(KNOWN["tiny-sdxl"])
        if self.folder is None: raise Skip("SDXL was not built")
        return self.folder

    def random_sdxl(self, dtype: Any) -> Any:
        "SDXL on the device, with random weights at full size."
        from devsky_nb import load_model
        return load_model("tiny-sdxl", self.device, dtype) if self.tiny else build_sdxl(self.torch, self.device, dtype)

    def draw(self, pipeline: Any, **options: Any) -> Any:
        "An image by the pipeline's own call."
        pipeline.set_progress_bar_config(disable=True)
        usual = {"num_inference_steps": self.options.steps, "width": self.size, "height": self.size,
                 "output_type": "np",
                 "generator": self.torch.Generator().manual_seed(0)}
        return pipeline(PROMPT, **usual | options).images

    # --- predictions

    def compare(self, what: str, measured: dict[str, int], estimate: Any) -> None:
        "Peaks that were measured beside those that were predicted, phase by phase."
        for phase, taken in measured.items():
            predicted = estimate.by_phase.get(phase)
            if not predicted or not taken: continue
            error = taken / predicted - 1
            told = f"{taken / GIB:.2f} GiB measured, {predicted / GIB:.2f} predicted, {error:+.1%}"
            self.figures.setdefault("peaks", {})[f"{what}, {phase}"] = {"measured": taken, "predicted": predicted}
            decides = predicted >= .98 * estimate.peak_allocated  # the phase that says whether it fits
            low, high = (-.20, .05) if decides else (-.60, .15)
            if not self.cuda or self.tiny: self.note(f"{what}, {phase}", told)
            else: self.check(f"{what}, {phase}", low <= error <= high, told, f"{low:+.0%} to {high:+.0%}")

    def measure(self, what: str, pipeline: Any, setup: dict, **options: Any) -> None:
        "Draw under a monitor, and compare."
        from devsky_nb import VramMonitor, estimate_vram
        model = "tiny-sdxl" if self.tiny else "sdxl-base"
        estimate = estimate_vram(model, width=self.size, height=self.size, device=self.kind, **setup)
        self.draw(pipeline, **options)  # what libraries allocate once
        self.clean()
        self.reset()
        with VramMonitor(pipeline, device=self.device, baseline=None if self.kind == "cpu" else 0) as monitor:
            taken = self.seconds(lambda: self.draw(pipeline, **options))
        timeline = monitor.timeline
        self.compare(what, timeline.peaks, estimate)
        self.check(f"{what}: the monitor measured", timeline.error is None, timeline.error or "")
        self.figures.setdefault("seconds", {})[what] = taken
        self.note(f"{what}: an image of {self.options.steps} steps", f"{taken:.2f} s")
        if not self.cuda: return
        reserved = self.torch.cuda.max_memory_reserved(self.device)
        told = f"{reserved / GIB:.2f} GiB, predicted up to {estimate.peak_reserved / GIB:.2f}"
        self.figures.setdefault("reserved", {})[what] = {"measured": reserved, "predicted": estimate.peak_reserved}
        if self.tiny: self.note(f"{what}: reserved", told)
        else: self.check(f"{what}: reserved", reserved <= 1.1 * estimate.peak_reserved, told, "at most 10% more")


def build_sdxl(torch: Any, device: str, dtype: Any) -> Any:
    "SDXL-base with random weights, made on the device from the package's own configuration."
    from devsky_nb.hub.load import quiet
    from devsky_nb.hub.locate import bundled_folder
    from devsky_nb.hub.models import KNOWN
    from devsky_nb.memory.configs import CONFIGS
    with quiet("transformers", "diffusers"):
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
        folder, usual = CONFIGS / "sdxl-base", torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
                vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
                first = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
                second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
        finally: torch.set_default_dtype(usual)
        words = bundled_folder(KNOWN["tiny-sdxl"]) / "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
        scheduler = EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                                           steps_offset=1, timestep_spacing="leading")
        for network in (unet, vae, first, second): network.eval().requires_grad_(False)
        return StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer, unet, scheduler,
                                         add_watermarker=False)


SECTIONS: list[Callable[[Run], None]] = []

def section(function: Callable[[Run], None]) -> Callable[[Run], None]:
    SECTIONS.append(function)
    return function


@section
def environment(run: Run) -> None:
    "Versions, the card, and what the package says of it."
    from devsky_nb import ValidationError, check_environment
    from devsky_nb.device import check_device, default_dtype, memory_info
    torch = run.torch
    run.note("versions",
             {name: version(name) for name in LIBRARIES} | {"python": platform.python_version(),
                                                            "system": platform.platform()})
    run.raises("a device that is not there is refused", ValidationError, lambda: check_device("cuda:99"), "no such device")
    info = memory_info(run.device)
    run.check("free memory is plausible", 0 < info.free <= info.total, info)
    if run.cuda:
        card = torch.cuda.get_device_properties(run.device)
        run.note("card", f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}")
        run.figures["card"] = {"name": card.name, "capability": f"{card.major}.{card.minor}",
                               "bytes": card.total_memory}
        wanted = torch.bfloat16 if card.major >= 8 else torch.float16
        run.check("the number format follows from the capability", default_dtype(run.device) == wanted,
                  default_dtype(run.device), wanted)
        size = MIB if run.tiny else GIB
        block = torch.empty(size, dtype=torch.uint8, device=run.device)
        del block
        gone = info.free - memory_info(run.device).free
        run.check("what PyTorch keeps to use again is free", gone <= size // 2,
                  f"{gone / MIB:.0f} MiB less after {size // MIB} MiB were freed")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=memory.total,memory.used,driver_version", "--format=csv,noheader"]
            told = subprocess.run([*asked, "-i", run.device.partition(":")[2]], capture_output=True, text=True,
                                  timeout=20)
            run.note("nvidia-smi: total, used, driver", told.stdout.strip() or told.stderr.strip())
    for finding in check_environment():
        run.check(f"check_environment: {finding.rule}", finding.severity != "error", finding.message[:160])


@section
def layers(run: Run) -> None:
    "bitsandbytes' layers on this device, beside PyTorch's in full precision; what moves with them."
    import bitsandbytes as bnb
    from devsky_nb.diffusion.networks import guard
    torch = run.torch
    torch.manual_seed(0)
    plain = torch.nn.Linear(640, 1280)
    kinds = {"nf4": lambda: bnb.nn.Linear4bit(640, 1280, compute_dtype=run.dtypes[-1], quant_type="nf4",
                                              compress_statistics=False),
             "nf4-dq": lambda: bnb.nn.Linear4bit(640, 1280, compute_dtype=run.dtypes[-1], quant_type="nf4"),
             "int8": lambda: bnb.nn.Linear8bitLt(640, 1280, has_fp16_weights=False, threshold=6.)}
    if run.kind == "mps": del kinds["int8"]
    for name, make in kinds.items():
        for rows in (1, 77, 2048):
            x = torch.randn(rows, 640)
            layer = make()
            layer.load_state_dict(plain.state_dict())
            with torch.no_grad():
                wanted = plain(x)
                got = layer.to(run.device).eval()(x.to(run.device, run.dtypes[0])).float().cpu()
            error = float((got - wanted).norm() / wanted.norm())
            run.check(f"{name}, {rows} rows", error < (.03 if name == "int8" else .15), f"off by {error:.1%}")
    if not run.cuda: return
    base = run.clean()
    network = torch.nn.Sequential(kinds["int8"]()).eval().to(run.device)
    network.dtype = torch.float16
    guard(network)
    x = torch.randn(4, 640, device=run.device, dtype=run.dtypes[0])
    with torch.no_grad(): before = network(x)
    held = run.clean() - base - x.nbytes - before.nbytes
    network.to("cpu")
    left = run.clean() - base - x.nbytes - before.nbytes
    run.check("8-bit weights leave the GPU with their network", left < .05 * held, f"{left} of {held} bytes are left")
    network.to(run.device)
    with torch.no_grad(): run.check("and come back as they were", torch.equal(network(x), before))


@section
def build(run: Run) -> None:
    "SDXL-base with random weights: on the device in fp16, and as a folder that every loader reads."
    from devsky_nb import estimate_vram
    from devsky_nb.device import memory_info
    from devsky_nb.memory.configs import CONFIGS
    if run.tiny: raise Skip("the package's small models are used")
    free = memory_info(run.device).free
    if free < 8 * GIB: raise Skip(f"{free / GIB:.1f} GiB are free, and SDXL in fp16 needs 8")
    before = run.clean()
    pipeline = run.random_sdxl(run.torch.float16)
    loaded, predicted = run.clean() - before, estimate_vram("sdxl-base").loaded
    run.check("weights take what was predicted", abs(loaded / predicted - 1) < .01,
              f"{loaded / GIB:.3f} GiB, predicted {predicted / GIB:.3f}")
    if shutil.disk_usage(run.work).free < 14 * GIB: raise Skip("no folder is written: less than 14 GiB of disk")
    folder, known = run.work / "sdxl-random", CONFIGS / "sdxl-base"
    if not (folder / "model_index.json").exists():
        pipeline.save_pretrained(str(folder), safe_serialization=True)
        for config in known.rglob("*.json"):
            shutil.copyfile(config, folder / config.relative_to(known))  # byte for byte: their traces are known
    run.folder = folder
    fixed = run.work / "vae-fix"
    if not fixed.exists(): pipeline.vae.save_pretrained(str(fixed))
    config = json.loads((fixed / "config.json").read_text(encoding="utf-8"))
    (fixed / "config.json").write_text(json.dumps(config | {"force_upcast": False}), encoding="utf-8")


@section
def memory(run: Run) -> None:
    "Peaks by phase, not quantized: ways of decoding, tiles, slices, and every way of offloading."
    import psutil
    from devsky_nb.diffusion.turns import offload_of, place_networks
    dtype = run.dtypes[0]
    short = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}[str(dtype)]
    pipeline = run.random_sdxl(dtype)
    vae = pipeline.vae
    run.measure(f"{short}, the VAE upcast", pipeline, {"dtype": short})
    vae.register_to_config(force_upcast=False)
    run.measure(f"{short}, fp16-fix", pipeline, {"dtype": short, "vae": "fp16-fix"})
    vae.enable_tiling()
    run.measure(f"{short}, fp16-fix, tiles", pipeline, {"dtype": short, "vae": "fp16-fix", "vae_tiling": True})
    vae.disable_tiling()
    vae.enable_slicing()
    run.measure(f"{short}, fp16-fix, 2 images in slices", pipeline,
                {"dtype": short, "vae": "fp16-fix", "vae_slicing": True, "batch": 2},
                num_images_per_prompt=2)
    vae.disable_slicing()
    if not run.cuda: raise Skip("offloading is for CUDA")
    first = run.draw(pipeline)
    ways = {"model": lambda: place_networks(pipeline, run.device, offload=True),
            "group": lambda: pipeline.enable_group_offload(run.torch.device(run.device), offload_type="leaf_level",
                                                           use_stream=not run.options.pretend),
            "sequential": lambda: pipeline.enable_sequential_cpu_offload(device=run.device)}
    for way, offload in ways.items():
        if not run.tiny and psutil.virtual_memory().available < (18 if way == "group" else 10) * GIB:
            run.note(f"{way} offload is left out", "too little main memory")
            continue
        pipeline = run.random_sdxl(dtype) if way != "model" else pipeline
        pipeline.vae.register_to_config(force_upcast=False)
        offload()
        run.check(f"{way} offload is known for what it is", str(offload_of(pipeline)).startswith(way), offload_of(pipeline))
        run.measure(f"{short}, fp16-fix, {way} offload", pipeline, {"dtype": short, "vae": "fp16-fix", "offload": way})
        gap = float(abs(run.draw(pipeline) - first).max())
        run.check(f"{way} offload changes no image", gap < .02 or way != "model", f"largest difference {gap:.4f} of 1")


@section
def loaders(run: Run) -> None:
    "Both patterns from a folder: quantized now, from the checkpoint, refused, saved, read again; peaks by phase."
    from devsky_nb import InsufficientMemoryError, ValidationError, VramMonitor, estimate_vram, load_quantized, save_quantized
    from devsky_nb import load_sdxl_pipeline_with_quantization_v1 as v1, load_sdxl_pipeline_with_quantization_v2 as v2
    from devsky_nb.device import default_dtype
    from devsky_nb.hub.settings import quantized_cache
    torch, folder = run.torch, run.sdxl_folder()
    short = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}[str(default_dtype(run.device))]
    kinds = {"nf4-dq": {}, "nf4": {"double_quant": False}, "int8": {"use_4bit": False}}
    if run.kind == "mps": del kinds["int8"]
    for label, options in kinds.items():
        for name, load in {"v1": v1, "v2": v2}.items():
            if name == "v2" and label == "nf4": continue
            base = run.clean()
            run.reset()
            with VramMonitor(device=run.device) as monitor, monitor.phase("load"):
                pipeline = load(folder, device=run.device, cache_dir=run.cache, fallback=False,
                                quantize_once=label != "nf4", **options)
            report = pipeline.load_report
            what = f"{name} {label}" + (" from its checkpoint" if report.from_checkpoint else "")
            held = run.clean() - base
            found = [part.precision for part in report.parts if part.layers]
            run.check(f"{what}: quantized as asked", report.fallback is None and found == [label] * 3, found)
            run.check(f"{what}: from the checkpoint the second time", report.from_checkpoint == (name == "v2"))
            places = {parameter.device.type for part in NETWORKS for parameter in getattr(pipeline, part).parameters()}
            run.check(f"{what}: all is on the device", places == {run.kind}, places)
            run.note(f"{what}: loaded in", f"{report.seconds:.1f} s, {report.bytes_read / GIB:.2f} GiB read")
            model, vae = ("tiny-sdxl" if run.tiny else "sdxl-base"), report.vae
            setup = {"dtype": short, "quant": label, "vae": "fp32" if vae == "fp32" else "upcast"}
            if run.cuda:
                told = f"{held / GIB:.3f} GiB on the card, {report.bytes_after / GIB:.3f} in the report"
                run.check(f"{what}: the report's bytes are the card's",
                          abs(held / report.bytes_after - 1) < (.1 if run.tiny else .02), told)
                estimate = estimate_vram(model, device=run.kind, width=run.size, height=run.size, **setup)
                run.compare(what, {"load": monitor.timeline.peaks["load"]}, estimate)
            image = run.draw(pipeline)
            if name == "v1":
                first = image
                run.measure(what, pipeline, setup)
                for cast in (lambda: pipeline.to(torch.float64), lambda: pipeline.unet.double()):
                    run.raises(f"{what}: a cast is refused", ValidationError, cast)
            else: run.check(f"{label}: a checkpoint draws the same image to the last bit", bool((image == first).all()))
            if name == "v2" and label == "nf4-dq":
                saved = run.work / "saved"
                shutil.rmtree(saved, ignore_errors=True)
                save_quantized(pipeline, saved)
                del pipeline
                run.clean()
                again = load_quantized(saved, run.device)
                run.check("save_quantized, load_quantized: the same image", bool((run.draw(again) == image).all()))
                del again
                shutil.rmtree(saved)
            pipeline = None
    if not run.cuda: return
    kept = [path for path in quantized_cache(run.cache).iterdir() if path.is_dir()]
    for room in (2 * MIB, 7 * MIB) if run.tiny else (int(1.2 * GIB),
                                                     int(2.3 * GIB)):  # gone while files are read; gone while the rest is moved
        with run.limited(run.clean() + room):
            run.raises(f"room for {room / MIB:.0f} MiB", InsufficientMemoryError,
                       lambda: v1(folder, device=run.device, cache_dir=run.cache))
    run.check("no checkpoint is deleted for want of memory", bool(kept) and all(path.is_dir() for path in kept),
              [path.name for path in kept])
    run.check("and nothing is left on the card", run.clean() < 64 * MIB, f"{run.used() / MIB:.0f} MiB")


@section
def across(run: Run) -> None:
    "Checkpoints of the CPU on the GPU and the other way round; device='cpu' beside a GPU (tiny-sdxl)."
    import numpy as np
    from devsky_nb import ModelLoadError, QuantizedSDXLGenerator, load_quantized, save_quantized
    from devsky_nb import load_sdxl_pipeline_with_quantization_v2 as v2
    def image(pipeline: Any) -> Any:
        return np.asarray(QuantizedSDXLGenerator(pipeline=pipeline).generate(PROMPT, num_inference_steps=4, seed=1,
                                                                             progress=False), float)
    for label, options in {"nf4-dq": {}, "int8": {"use_4bit": False}}.items():
        if label == "int8" and run.kind == "mps": continue
        usual = {"cache_dir": run.work / "across", "quantize_once": False, "fallback": False, **options}
        before = run.clean()
        run.reset()
        on_cpu = v2("tiny-sdxl", device="cpu", dtype=run.torch.float32, **usual)
        run.check(f"{label}, device='cpu': nothing touches the GPU", run.peak() - before < 64 * 1024,
                  f"{(run.peak() - before) / MIB:.2f} MiB")
        for name in ("cpu", "gpu"): shutil.rmtree(run.work / f"{name}-{label}", ignore_errors=True)
        save_quantized(on_cpu, run.work / f"cpu-{label}")
        wanted = run.works(f"{label}, device='cpu': draws", lambda: image(on_cpu))
        moved = load_quantized(run.work / f"cpu-{label}", run.device)
        got = run.works(f"{label}: the CPU's checkpoint draws on {run.kind}", lambda: image(moved))
        if wanted is not None and got is not None:
            run.check(f"{label}: and the same image", abs(got - wanted).mean() < 12,
                      f"{abs(got - wanted).mean():.2f} of 255 apart")
        run.note(f"{label}: the CPU's checkpoint computes on {run.kind} in", moved.unet.dtype)
        here = v2("tiny-sdxl", device=run.device, **usual)
        save_quantized(here, run.work / f"gpu-{label}")
        wanted = image(here)
        try: got = image(load_quantized(run.work / f"gpu-{label}", "cpu"))
        except ModelLoadError as e:
            run.check(f"{label}: the GPU's checkpoint on the CPU", "would crash" in str(e), str(e)[:160])
        else:
            run.check(f"{label}: the GPU's checkpoint on the CPU", abs(got - wanted).mean() < 12,
                      f"{abs(got - wanted).mean():.2f} of 255 apart")


@section
def generation(run: Run) -> None:
    "Seeds, batches, previews, cancelling, offload, metadata, and a VAE that is put back."
    import numpy as np
    from devsky_nb import QuantizedSDXLGenerator
    from devsky_nb.diffusion.progress import GenerationCancelled
    side = 64 if run.tiny else 512
    usual = {"num_inference_steps": max(2, run.options.steps), "width": side, "height": side, "progress": False}
    def apart(a: Any, b: Any) -> Any: return np.abs(np.asarray(a, float) - np.asarray(b, float))
    base = run.clean()
    with QuantizedSDXLGenerator(run.sdxl_folder(), device=run.device, cache_dir=run.cache) as generator:
        one = generator.generate(PROMPT, seed=7, **usual)
        run.check("the same seed is the same image, to the last bit",
                  generator.generate(PROMPT, seed=7, **usual).tobytes() == one.tobytes())
        run.check("another seed is another image",
                  generator.generate(PROMPT, seed=8, **usual).tobytes() != one.tobytes())
        run.check("metadata names the device", one.info["device"].startswith(run.kind), one.info["device"])
        alone = generator.generate_batch([PROMPT] * 2, seeds=[7, 8], batch_size=1, **usual)
        together = generator.generate_batch([PROMPT] * 2, seeds=[7, 8], batch_size=2, **usual)
        gap = max(apart(a, b).mean() for a, b in zip(alone, together))
        run.check("a batch draws what single images are", gap < 8, f"{gap:.2f} of 255 apart on average")
        seen: list[int] = []
        generator.generate(PROMPT, seed=7, callback=lambda done, total, previews: seen.append(len(previews)),
                           preview_every=1, **usual)
        run.check("a preview at each step", seen == [1] * usual["num_inference_steps"], seen)
        stop = threading.Event()
        stop.set()
        run.raises("cancelled", GenerationCancelled, lambda: generator.generate(PROMPT, seed=7, cancel=stop, **usual))
        run.check("and draws as before", generator.generate(PROMPT, seed=7, **usual).tobytes() == one.tobytes())
    del generator
    if run.cuda:
        run.check("closing gives the memory back", run.clean() - base < 32 * MIB,
                  f"{(run.used() - base) / MIB:.0f} MiB are left")
    for label, options in {"4 bits": {}, "8 bits": {"use_4bit": False}}.items():
        if not run.cuda: break
        with QuantizedSDXLGenerator(run.sdxl_folder(), device=run.device, cache_dir=run.cache, **options) as generator:
            first, held = generator.generate(PROMPT, seed=7, **usual), run.clean() - base
        del generator
        run.clean()
        with QuantizedSDXLGenerator(run.sdxl_folder(), device=run.device, cache_dir=run.cache, low_memory=True,
                                    **options) as generator:
            image, idle = generator.generate(PROMPT, seed=7, **usual), run.clean() - base
            room = .1 * held if run.tiny else max(.05 * held, 32 * MIB)
            run.check(f"offloaded, {label}: the card is empty between images", idle < room,
                      f"{idle / MIB:.1f} of {held / MIB:.1f} MiB")
            run.note(f"offloaded, {label}: tiles and offload change the image by",
                     f"{apart(image, first).mean():.2f} of 255 on average")
            adopted = QuantizedSDXLGenerator(pipeline=generator.pipeline)
            run.check(f"offloaded, {label}: adopted as the GPU's", adopted.device.startswith("cuda"), adopted.device)
        del generator, adopted
        run.clean()
    with QuantizedSDXLGenerator(run.sdxl_folder(), use_quantization=False, device=run.device, dtype=run.dtypes[0],
                                cache_dir=run.cache) as generator:
        before = {parameter.dtype for parameter in generator.pipeline.vae.parameters()}
        generator.generate(PROMPT, seed=7, **usual)
        run.check("the VAE's format is as before",
                  {parameter.dtype for parameter in generator.pipeline.vae.parameters()} == before, before)


@section
def small_cards(run: Run) -> None:
    "What the planner says for 6, 8 and 12 GB, run on a card made that small; stepping down when memory runs out."
    from devsky_nb import InsufficientMemoryError, QuantizedSDXLGenerator, plan_vram
    from devsky_nb._core import parse_bytes
    if not run.cuda: raise Skip("only CUDA can be made smaller")
    folder, total = run.sdxl_folder(), run.torch.cuda.get_device_properties(run.device).total_memory
    for budget in () if run.tiny else ("6GB", "8GB", "12GB"):
        if parse_bytes(budget) > total: continue
        options = plan_vram(folder, budget, dtype="fp16", top=20).options
        eight = [option for option in options if option.estimate.setup.quant == "int8"
                 and option.estimate.setup.offload]
        for label, option in {option.label: option for option in (*options[:1], *eight[:1])}.items():
            code = option.code.replace('"madebyollin/sdxl-vae-fp16-fix"', repr(str(run.work / "vae-fix")))
            code = re.sub("num_images_per_prompt", "num_inference_steps=2, num_images_per_prompt", code)
            failed = ""
            with run.limited(parse_bytes(budget)), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                run.reset()
                try: exec(code, {})
                except Exception as e: failed = f"{type(e).__name__}: {str(e)[:160]}"
                taken = run.peak()
            told = f"took {taken / GIB:.2f} GiB, predicted {option.estimate.peak_allocated / GIB:.2f}"
            run.check(f"{budget}, the planner's code: {label}", not failed, failed or told)
    usual = {"num_inference_steps": 2, "width": run.size, "height": run.size, "seed": 3, "progress": False}
    base = run.clean()
    with QuantizedSDXLGenerator(folder, device=run.device, cache_dir=run.cache) as generator:
        loaded = run.clean() - base
        run.reset()
        generator.generate(PROMPT, **usual)
        top = run.peak() - base
        for share in (.6, .3):
            with run.limited(base + loaded + int((top - loaded) * share) + (0 if run.tiny else 256 * MIB)):
                name = f"{share:.0%} of the room: it steps down and draws"
                try: image = generator.generate(PROMPT, **usual)
                except InsufficientMemoryError as e: run.check(name, False, str(e)[:200])
                else: run.check(name, bool(image.info["stepped_down"]), image.info["stepped_down"])
        run.works("with room again it draws", lambda: generator.generate(PROMPT, **usual))
    del generator
    run.clean()
    with QuantizedSDXLGenerator(folder, use_quantization=False, device=run.device, dtype=run.torch.float16,
                                cache_dir=run.cache) as generator:
        vae = generator.pipeline.vae
        half = sum(parameter.numel() for parameter in vae.parameters())  # bytes: a quarter of the VAE in fp32, so memory is out amid the upcast
        with run.limited(run.clean() + half), contextlib.suppress(InsufficientMemoryError):
            generator.generate(PROMPT, **usual)
        found = {str(parameter.dtype) for parameter in vae.parameters()}
        run.check("a VAE whose upcast ran out of memory is whole again", found == {"torch.float16"}, found)
        run.works("and draws", lambda: generator.generate(PROMPT, **usual))


@section
def monitor(run: Run) -> None:
    "VramMonitor: exact peaks, little cost, the right device."
    from devsky_nb import ValidationError, VramMonitor
    torch = run.torch
    if run.cuda:
        run.clean()
        with VramMonitor(device=run.device) as watch:
            with watch.phase("short"): block = torch.empty(64 * MIB, dtype=torch.uint8, device=run.device); del block
            with watch.phase("long"):
                block = torch.empty(16 * MIB, dtype=torch.uint8, device=run.device); time.sleep(.1)
        del block
        run.check("a peak between two samples is seen, in its own phase",
                  watch.timeline.peaks == {"short": 64 * MIB, "long": 16 * MIB}, watch.timeline.peaks)
    pipeline = run.random_sdxl(run.dtypes[0])
    small = {} if run.tiny else {"width": 512, "height": 512}
    run.draw(pipeline, **small)
    plain = run.seconds(lambda: run.draw(pipeline, **small), 3)
    def watched() -> None:
        with VramMonitor(pipeline): run.draw(pipeline, **small)
    cost = run.seconds(watched, 3) / plain - 1
    if run.tiny: run.note("it costs", f"{cost:+.1%}")
    else: run.check("it costs little", cost < .05, f"{cost:+.1%}")
    if run.cuda and torch.cuda.device_count() > 1:
        other = f"cuda:{(int(run.device.partition(':')[2]) + 1) % torch.cuda.device_count()}"
        def mistaken() -> None:
            with VramMonitor(device=run.device) as watch: watch.watch(run.random_sdxl(run.dtypes[0]).to(other))
        run.raises("a pipeline on another GPU than the one that is measured", ValidationError, mistaken, "runs on")


@section
def speed(run: Run) -> None:
    "optimize(): what it applies here, what that brings, and that the image stays."
    from devsky_nb import QuantizedSDXLGenerator
    from devsky_nb.diffusion.speed import optimize
    side = run.size if run.tiny else 512
    for goal in ("speed", "memory"):
        pipeline = run.random_sdxl(run.dtypes[-1])
        run.draw(pipeline, width=side, height=side)
        first, before = run.draw(pipeline, width=side,
                                 height=side), run.seconds(lambda: run.draw(pipeline, width=side, height=side), 2)
        report = optimize(pipeline, goal, width=side, height=side)
        print("\n".join("       " + line for line in repr(report).splitlines()), flush=True)
        run.draw(pipeline, width=side, height=side)
        run.clean()
        run.reset()
        after = run.seconds(lambda: run.draw(pipeline, width=side, height=side), 2)
        run.note(f"for {goal}", f"{before:.2f} s before, {after:.2f} s after; {run.peak() / GIB:.2f} GiB")
        run.figures.setdefault("optimize", {})[goal] = report.to_dict() | {"seconds_before": before,
                                                                           "seconds_after": after, "peak": run.peak()}
        gap = float(abs(run.draw(pipeline, width=side, height=side) - first).max())
        run.check(f"for {goal}: the image stays", gap < .1, f"largest difference {gap:.4f} of 1")
        broken = {name: reason for name, reason in report.skipped.items() if "fails" in reason}
        run.check(f"for {goal}: no switch breaks the pipeline", not broken, broken)
        if goal == "speed":
            run.check("for speed: it is not slower", after < 1.1 * before or run.tiny,
                      f"{before / after:.2f} times as fast")
        del pipeline
        run.clean()


def small_jpeg(rng: Any, width: int, height: int) -> bytes:
    "A smooth image with some noise, as JPEG."
    import numpy as np
    from PIL import Image
    smooth = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)).resize((width, height),
                                                                                                  Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth, np.int16) + rng.integers(-12, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noisy).save(data, "JPEG", quality=85)
    return data.getvalue()


def clip_folder(run: Run, name: str) -> Path:
    "A CLIP model with random weights at full size, as a folder."
    from devsky_nb.hub.load import quiet
    from devsky_nb.hub.locate import bundled_folder
    from devsky_nb.hub.models import KNOWN
    from devsky_nb.memory.configs import CONFIGS
    if run.tiny: return bundled_folder(KNOWN["tiny-clip"])
    folder = run.work / name
    if (folder / "preprocessor_config.json").exists(): return folder
    with quiet("transformers"):
        from transformers import CLIPConfig, CLIPModel
        run.torch.manual_seed(0)
        with run.torch.device(run.device): model = CLIPModel(CLIPConfig.from_pretrained(CONFIGS / name)).eval()
        model.save_pretrained(str(folder))
    preprocessing = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 224},
                     "resample": 3, "do_center_crop": True,
                     "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255,
                     "do_normalize": True,
                     "image_mean": [.48145466, .4578275, .40821073], "image_std": [.26862954, .26130258, .27577711],
                     "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")
    return folder


@section
def clip(run: Run) -> None:
    "Embedding: vectors beside the CPU's, images a second, and how busy the device is kept."
    import numpy as np
    from devsky_nb import CLIPImageEmbedder
    from devsky_nb.embedding.families import image_vectors
    torch, rng = run.torch, np.random.default_rng(0)
    images = [small_jpeg(rng, 640, 480) for _ in range(16 if run.tiny else 256)]
    least = {"fp32": .9999, "bf16": .995, "fp16": .999}
    for name in ("tiny-clip",) if run.tiny else ("clip-vit-base", "clip-vit-large"):
        folder = clip_folder(run, name)
        with CLIPImageEmbedder(folder, "cpu", precision="fp32") as embedder:
            wanted = np.stack([result.vector for result in embedder.embed_stream(images[:16])])
        for precision in ("fp32",) if run.kind == "cpu" else ("fp32", "bf16", "fp16"):
            with CLIPImageEmbedder(folder, run.device, precision=precision) as embedder:
                got = np.stack([result.vector for result in embedder.embed_stream(images[:16])])
                cosine = float((got * wanted).sum(1).min())
                run.check(f"{name} {precision}: the CPU's vectors", cosine > least[precision], f"cosine {cosine:.6f}")
                for batch in (32,) if run.tiny else (32, 128):
                    pixels = torch.randn(batch, 3, wanted_side(embedder), wanted_side(embedder), device=run.device,
                                         dtype=next(embedder.model.parameters()).dtype)
                    def model_only() -> None:
                        with torch.inference_mode(): image_vectors(embedder.model, pixels, "projected")
                    model_only()
                    alone = run.seconds(lambda: [model_only() for _ in range(3)], 2) / 3
                    many = images if run.tiny else images * 8
                    for _ in embedder.embed_stream(images, batch): pass
                    whole = run.seconds(lambda: [None for _ in embedder.embed_stream(many, batch)])
                    busy = alone * len(many) / batch / whole
                    run.note(f"{name} {precision}, batches of {batch}",
                             f"model alone {batch / alone:.0f} images/s, from JPEG {len(many) / whole:.0f}: busy {busy:.0%} of the time")
                    run.figures.setdefault("clip", {})[f"{name} {precision} {batch}"] = {"model": batch / alone,
                                                                                         "from_jpeg": len(many) / whole,
                                                                                         "busy": busy}
                if run.cuda:
                    with run.limited(run.clean() + (1_000_000 if run.tiny else 48 * MIB)):  # room for two or three images
                        errors = [result.error for result in embedder.embed_stream(images[:16], 16) if result.error]
                    run.check(f"{name} {precision}: little memory halves the batch", not errors,
                              str(errors[0])[:160] if errors else "")
            del embedder
            run.clean()


def wanted_side(embedder: Any) -> int:
    "Pixels a side of what the model takes."
    return int(embedder.model.config.vision_config.image_size)


@section
def registry(run: Run) -> None:
    "Models on the device, and memory that comes back when they are evicted."
    from devsky_nb import InsufficientMemoryError, ModelRegistry
    from devsky_nb.device import default_dtype
    from devsky_nb.hub.locate import bundled_folder
    from devsky_nb.hub.models import KNOWN
    from devsky_nb.hub.weights import expected_bytes
    base = run.clean()
    limit = int(1.1 * expected_bytes(bundled_folder(KNOWN["tiny-sdxl"]), default_dtype(run.device)))
    models = ModelRegistry(cache_dir=run.cache, device=run.device, max_bytes=limit)
    model = models.get_model("tiny-clip")
    run.check("on the device", next(model.parameters()).device.type == run.kind)
    del model
    models.get_model("tiny-sdxl")
    run.check("eviction keeps to the limit", not run.cuda or run.clean() - base < 1.2 * limit,
              f"{(run.used() - base) / MIB:.1f} MiB on the card")
    models.unload("tiny-sdxl")
    run.check("unloading gives the memory back", run.clean() - base < 4 * MIB,
              f"{(run.used() - base) / MIB:.2f} MiB are left")
    if not run.cuda: return
    roomy = ModelRegistry(cache_dir=run.cache, device=run.device, max_bytes=1 << 40)
    with run.limited(run.clean() + 2 * MIB):
        run.raises("a model that does not fit", InsufficientMemoryError, lambda: roomy.get_model("tiny-sdxl"))


@section
def second_gpu(run: Run) -> None:
    "Another GPU than the current one: nothing may touch the first (the small models)."
    import numpy as np
    from devsky_nb import CLIPImageEmbedder, QuantizedSDXLGenerator
    torch = run.torch
    if not (run.cuda and torch.cuda.device_count() > 1): raise Skip("there is one GPU, or none")
    first = f"cuda:{torch.cuda.current_device()}"
    other = next(f"cuda:{i}" for i in range(torch.cuda.device_count()) if i != torch.cuda.current_device())
    for label, options in {"plain": {"use_quantization": False}, "nf4-dq": {}, "int8": {"use_4bit": False}}.items():
        for low_memory in (False, True):  # quantized now; from the checkpoint, offloaded
            run.clean()
            torch.cuda.reset_peak_memory_stats(first)
            before = torch.cuda.memory_allocated(first)
            def draw() -> None:
                with QuantizedSDXLGenerator("tiny-sdxl", device=other, cache_dir=run.work / "second",
                                            low_memory=low_memory, **options) as generator:
                    image = generator.generate(PROMPT, seed=1, num_inference_steps=2, progress=False)
                if image.info["device"] != other: raise AssertionError(f"it was drawn on {image.info['device']}")
            what = f"{label}{', offloaded' if low_memory else ''} on {other}"
            run.works(f"{what}: draws", draw)
            taken = torch.cuda.max_memory_allocated(first) - before
            run.check(f"{what}: nothing on {first}", taken < 64 * 1024, f"{taken} bytes")
    with CLIPImageEmbedder("tiny-clip", device=other) as embedder:
        run.check(f"embeds on {other}",
                  bool(np.isfinite(embedder.encode_images_batch([np.zeros((64, 64, 3), np.uint8)]).numpy()).all()))


@section
def leaks(run: Run) -> None:
    "Loading, drawing and closing, again and again, leaves nothing (tiny-sdxl)."
    from devsky_nb import QuantizedSDXLGenerator
    held = []
    for _ in range(4):
        for options in ({}, {"use_4bit": False}, {"use_quantization": False}, {"low_memory": True}):
            if run.kind == "mps" and options.get("use_4bit") is False: continue
            with QuantizedSDXLGenerator("tiny-sdxl", device=run.device, cache_dir=run.work / "leaks",
                                        **options) as generator:
                generator.generate(PROMPT, seed=1, num_inference_steps=1, progress=False)
            del generator
        held.append(run.clean())
    run.check("memory on the device", held[-1] - held[0] < 64 * 1024, held)


def run_section(run: Run, function: Callable[[Run], None]) -> None:
    "One section, whatever happens in it."
    run.section = function.__name__
    print(f"== {function.__name__}: {function.__doc__}", flush=True)
    if time.time() - run.started > 60 * run.options.minutes:
        return run.note("left out", f"{run.options.minutes:g} minutes are over")
    start = time.time()
    try: function(run)
    except Skip as e: run.note("left out", e)
    except Exception as e:
        run.say("FAIL", "the section broke off", f"{type(e).__name__}: {str(e)[:300]}")
        traceback.print_exc(limit=-6)
        traceback.clear_frames(e.__traceback__)
    run.clean()
    print(f"   {time.time() - start:.0f} s", flush=True)


def chosen_sections(options: argparse.Namespace) -> list[Callable[[Run], None]]:
    names = {function.__name__ for function in SECTIONS}
    only, skip = (set(filter(None, text.split(","))) for text in (options.only, options.skip))
    if unknown := (only | skip) - names:
        sys.exit(f"no section {', '.join(sorted(unknown))}: there are {', '.join(function.__name__ for function in SECTIONS)}")
    if only & {"loaders", "generation", "small_cards"}: only.add("build")
    return [function for function in SECTIONS if function.__name__ not in skip
            and (not only or function.__name__ in only)]


def report(run: Run) -> int:  # exit status
    "The last lines, and the file."
    counts = {status: sum(result["status"] == status for result in run.results) for status in ("PASS", "FAIL", "NOTE")}
    seconds = time.time() - run.started
    print(f"\n{counts['PASS']} passed, {counts['FAIL']} failed, {counts['NOTE']} notes, {seconds:.0f} s on {run.device}")
    for result in run.results:
        if result["status"] == "FAIL": print(f"  FAIL {result['section']}: {result['name']}: {result['value']}")
    if run.options.out:
        told = {"device": run.device, "pretended": run.options.pretend, "tiny": run.tiny, "seconds": round(seconds, 1),
                "counts": counts,
                "figures": run.figures, "results": run.results}
        run.options.out.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    if not run.options.work: shutil.rmtree(run.work, ignore_errors=True)
    return int(counts["FAIL"] > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What only a GPU can show.",
                                     epilog="sections: " + ", ".join(function.__name__ for function in SECTIONS))
    parser.add_argument("--device", help="cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--tiny", action="store_true", help="the package's small models instead of SDXL and CLIP")
    parser.add_argument("--dry-run", action="store_true", help="the small models on the CPU")
    parser.add_argument("--pretend", action="store_true", help="the small models on two pretended GPUs")
    parser.add_argument("--only", default="", help="sections, with commas")
    parser.add_argument("--skip", default="", help="sections, with commas")
    parser.add_argument("--work", type=Path, help="a folder for weights, kept afterwards (default: a temporary one)")
    parser.add_argument("--minutes", type=float, default=9,
                        help="after which no section is begun (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of denoising (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024,
                        help="pixels a side where memory is measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all results as JSON")
    options = parser.parse_args()
    if options.dry_run: options.device = "cpu"
    if options.dry_run or options.pretend: options.tiny = True
    return options


def main() -> int:
    options = arguments()
    chosen = chosen_sections(options)
    warnings.filterwarnings("ignore")
    machine: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options.pretend:
        sys.path.insert(0, str(HERE.parent / "tests"))
        from pretended_gpu import pretended
        machine = pretended("cuda", count=2)
    with machine:
        run = Run(options)
        for function in chosen: run_section(run, function)
        return report(run)


if __name__ == "__main__": sys.exit(main())
