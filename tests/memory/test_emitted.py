"The Python that a plan emits runs: every setting, for every kind of pipeline, on the CPU and on a pretended GPU."
import importlib, re
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest, torch
from diffusers.utils import torch_utils
from PIL import Image

from devsky_nb import estimate_vram, ModelRegistry, plan_vram
from devsky_nb.errors import ValidationError
from devsky_nb.hub.load import quiet
from devsky_nb.memory.emitted import code_of
from devsky_nb.memory.estimate import find_model, is_flat, lies_last, Setup
from devsky_nb.memory.formats import FORMATS, weight_bytes
from devsky_nb.memory.offload import fetched_bytes, group_numbers, OFFLOADS
from devsky_nb.memory.plan import candidates, PlanOption
from devsky_nb.memory.tracing import describe_layers, trace_call
from devsky_nb.memory.wording import settings_in, words_of
from hubcache import make_repo
from pretended_gpu import pretended
from tiny_pipelines import KINDS, save, SIDE
from written_code import drawn, ON_CPU

FAST = {"mask, SD": {}, "control image, SDXL": {}, "video, Wan": {}, "text, SDXL": {"vae": "fp32", "dtype": "bf16", "attention": "sliced"}}


def slow_but(fast, every):
    "Parameters of which some run always, and the others with the slow tests."
    return [pytest.param(value, marks=[] if value in fast else pytest.mark.slow) for value in every]

SETTINGS = [
    {}, {"offload": "model"}, {"offload": "group"}, {"offload": "group-block"}, {"offload": "group", "quant": "layerwise-fp8"},
    {"vae_tiling": True, "vae_slicing": True, "batch": 2}, {"attention": "math"}, {"attention": "sliced"}, {"channels_last": True},
    {"fused": True}, {"compile": True}, {"guidance": False}, {"guidance": True}, {"quant": "layerwise-fp8", "dtype": "bf16", "offload": "model"},
    {"vae": "fp32", "dtype": "bf16"}]


DRAWN = [kind for kind in KINDS if kind != "edit, FLUX"]  # Kontext draws a million pixels, whatever it is asked for
WHOLE = ("text, SDXL", "control image, SD", "mask, FLUX", "video, Wan")  # with every setting, the others with some
ASKED = [(kind, settings) for kind in DRAWN for settings in SETTINGS
         if kind in WHOLE or settings in ({}, {"offload": "model"}, {"vae": "fp32", "dtype": "bf16"})]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}
    def folder(kind):
        if kind not in made:
            with quiet("diffusers", "transformers"): made[kind] = save(kind, tmp_path_factory.mktemp("pipelines") / re.sub(r"\W+", "-", kind))
        return made[kind]
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    for name in ("image", "mask", "control"): Image.new("RGB", (80, 60), "white").save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)


def test_a_model_with_a_controlnet_and_a_lora_is_drawn_with_both(folder_of):
    code = code_of(estimate(folder_of("text, SD"), "text, SD", controlnet=True, lora=8))
    assert "StableDiffusionControlNetPipeline.from_pretrained(" in code and "controlnet=controlnet" in code and "load_lora_weights" in code
    assert 'image=load_image("control.png")' in code


def test_a_controlnet_of_the_hub_is_loaded_by_its_name_for_the_cache_may_have_its_small_files_alone(folder_of, tmp_path):
    config = (folder_of("control image, SD") / "controlnet/config.json").read_bytes()
    make_repo(tmp_path, "shop/edges", {"a" * 40: {"config.json": config}}, {"main": "a" * 40})
    code = code_of(estimate(folder_of("text, SD"), "text, SD", controlnet="shop/edges", registry=ModelRegistry(tmp_path, offline=True)))
    assert f"ControlNetModel.from_pretrained('shop/edges', revision='{'a' * 40}', dtype=torch.float32, use_safetensors=True)" in code


def estimate(folder, kind, **settings):
    if kind.startswith("video"): settings = {"frames": 5} | settings
    return estimate_vram(folder, **{"dtype": "fp32", "width": SIDE, "height": SIDE, "device": "cuda"} | settings)


def check(found, settings, scope, result):
    "The result is what was asked for, and the settings are those of the pipeline."
    assert len(result) == settings.get("batch", 1)
    first = result[0]
    shape = np.asarray(first).shape if isinstance(first, Image.Image) else np.asarray(first).shape[-3:]
    assert tuple(shape[:2]) == found.traced.size[::-1]
    pipeline = scope["pipeline"]
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    if settings.get("vae_tiling"): assert pipeline.vae.use_tiling and pipeline.vae.use_slicing
    if settings.get("fused"): assert any(getattr(m, "fused_projections", False) for m in denoiser.modules())
    if settings.get("attention") == "sliced": assert "Sliced" in str(denoiser.attn_processors)
    if settings.get("vae") == "fp32": assert pipeline.vae.dtype == torch.float32 and denoiser.dtype == torch.bfloat16
    if settings.get("quant") == "layerwise-fp8": assert torch.float8_e4m3fn in {p.dtype for p in denoiser.parameters()}
    if settings.get("channels_last") and hasattr(pipeline, "unet"): assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("kind, settings", ASKED, ids=str)
def test_the_code_of_every_setting_runs_for_every_kind_of_pipeline(kind, settings, folder_of, images, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: setattr(self, "was_compiled", True))
    try: found = estimate(folder_of(kind), kind, **settings)
    except ValidationError as e:
        assert set(settings) & set(e.details) or "is for UNets" in str(e), e  # what cannot be says which setting it is
        return
    code = code_of(found)
    for on_a_gpu, here in ON_CPU: code = code.replace(on_a_gpu, here)
    scope, result = drawn(code)
    check(found, settings, scope, result)
    if settings.get("compile"):
        assert any(getattr(m, "was_compiled", False) for m in (getattr(scope["pipeline"], "unet", None) or scope["pipeline"].transformer).modules())


@pytest.mark.parametrize("kind, settings", FAST.items())
def test_the_code_for_a_mask_a_control_image_a_video_and_a_text_runs(kind, settings, folder_of, images):
    found = estimate(folder_of(kind), kind, **settings)
    code = code_of(found)
    for on_a_gpu, here in ON_CPU: code = code.replace(on_a_gpu, here)
    check(found, settings, *drawn(code))


@contextmanager
def on_cuda():
    "A pretended GPU, and diffusers asked anew which device there is: newer releases ask once, at import."
    backend = getattr(torch_utils, "TorchDeviceBackend", None)
    asked = mock.patch.object(backend, "_detect_device_type", staticmethod(lambda: "cuda")) if backend else nullcontext()
    with pretended("cuda") as gpu, asked: yield gpu


@pytest.fixture
def gpu():
    with on_cuda() as gpu: yield gpu


def test_an_edit_is_written_for_the_size_that_its_pipeline_draws(folder_of):
    found = estimate_vram(folder_of("edit, FLUX"), "bf16")
    code = code_of(found)
    compile(code, "edit", "exec")
    assert found.traced.size == (1024, 1024) and "width=1024, height=1024" in code and 'image=load_image("image.png")' in code
    with pytest.raises(ValidationError, match="would draw 1024×1024"): estimate(folder_of("edit, FLUX"), "edit, FLUX")


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_the_code_of_every_candidate_runs_on_a_gpu(kind, folder_of, images, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: None)
    folder = folder_of(kind)
    fixed = {"width": SIDE, "height": SIDE} | ({"frames": 5} if kind.startswith("video") else {})
    tried = set()
    for found in candidates(find_model(folder), "fp32", "cuda", fixed):
        setup = found.setup
        if setup.vae_tiling or (setup.quant or "").startswith("torchao"): continue  # the library is not here
        tried.add((setup.quant, setup.offload))
        with on_cuda(): check(found, {}, *drawn(code_of(found)))
    assert len(tried) > 5


@pytest.mark.parametrize("offload", slow_but(["group"], [None, "model", "sequential", "group", "group-block-stream", "group-leaf-unpinned"]))
def test_the_code_of_every_offload_runs_as_it_is_on_a_gpu(offload, folder_of, images, gpu):
    found = estimate(folder_of("text, SDXL"), "text, SDXL", offload=offload)
    check(found, {}, *drawn(code_of(found)))
    if offload: assert gpu.peak() < 1.1 * sum(found.by_component.values()) + found.peak_allocated


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("offload", slow_but(["group", "group-block-stream"], [name for name, way in OFFLOADS.items() if way.level]))
def test_what_groups_hold_is_what_diffusers_holds(kind, offload):
    import diffusers
    way = OFFLOADS[offload]
    def make():
        torch.manual_seed(0)
        if kind == "UNet2DConditionModel":
            return diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(64, 128), layers_per_block=2, cross_attention_dim=64, attention_head_dim=8,
                                                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
                                                joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=[8, 12, 12])
    def run(network, device, dtype):
        new = lambda *shape: torch.zeros(*shape, device=device, dtype=dtype)
        if kind == "UNet2DConditionModel": return network(new(1, 4, 8, 8), torch.tensor(1, device=device), new(1, 77, 64)).sample
        return network(hidden_states=new(1, 16, 16), encoder_hidden_states=new(1, 8, 64), pooled_projections=new(1, 64), timestep=new(1), img_ids=new(16, 3),
                       txt_ids=new(8, 3), guidance=None).sample
    meta = make().to(torch.bfloat16).to("meta")
    trace = trace_call(meta, lambda: run(meta, "meta", torch.bfloat16))
    layers = describe_layers(meta)
    rounded = lambda shape: max(512, -(-4 * int(np.prod(shape)) // 512) * 512)
    stored = np.array([0, *(sum(rounded(shape) for _, shape in layer.weights) for layer in layers)])
    groups = group_numbers(kind, [layer.name for layer in layers], way.level)
    expected = (fetched_bytes(trace, stored, groups, way.stream) + trace.live(4)).max()
    with pretended("cuda") as gpu, torch.no_grad():
        network = make()
        network.enable_group_offload(torch.device("cuda"), offload_type=f"{way.level}_level", num_blocks_per_group=1 if way.level == "block" else None,
                                     use_stream=way.stream, record_stream=way.record, low_cpu_mem_usage=way.stream and not way.pinned)
        run(network, "cuda", torch.float32)  # diffusers learns the order
        gpu.reset_peak()
        run(network, "cuda", torch.float32)
        assert abs(gpu.peak() / expected - 1) < .02


# --- what cannot be is refused, by estimate_vram as well

@pytest.mark.parametrize("options, said", [
    *[({"quant": quant, "offload": offload}, "do not move by themselves") for quant in ("int8", "nf4", "fp4", "gguf-q4_k", "quanto-int8")
      for offload in ("sequential", "group", "group-block-stream")],
    *[({"quant": quant, "offload": "sequential"}, "do not move by themselves") for quant in ("torchao-int8", "layerwise-fp8")],
    ({"quant": "torchao-int4"}, "computes in bf16"), ({"quant": "torchao-int4", "dtype": "bf16", "device": "cpu"}, "for CUDA"),
    ({"fused": True, "quant": "nf4"}, "cannot be joined"), ({"compile": True, "offload": "sequential"}, "nothing to"),
    *[({"model": model, name: value}, "there is none") for model, name, value in (
        ("dinov2-base", "attention", "math"), ("tiny-clip", "lora", 8), ("tiny-clip", "vae", "fp16-fix"), ("kandinsky22", "vae_tiling", True))],
    ({"model": "tiny-clip", "frames": 4}, "makes no video"), ({"model": "tiny-clip", "images": 2}, "draws from none"), ({"images": 3}, "draws from none"),
    ({"model": "clip-vit-base", "compile": True}, "there is none"), ({"model": "clip-vit-base", "channels_last": True}, "there is neither"),
    ({"model": "sd15", "vae": "fp16-fix"}, "for Stable Diffusion XL"), ({"offload": "group-leaf-stream"}, "group-leaf"),
    ({"quant": "torchao"}, "torchao-int8"), ({"compile": "yes"}, "True or False"), ({"fused": 1}, "True or False")])
def test_impossible_combinations_are_refused(options, said):
    with pytest.raises(ValidationError) as e: estimate_vram(**{"model": "sdxl-base"} | options)
    assert said in str(e.value)
    config = {name: value for name, value in options.items() if name in ("quant", "offload", "dtype")}
    if set(options) <= {"quant", "offload", "dtype"} and said != "torchao-int8" and "stream" not in str(options.get("offload")):
        words = words_of(Setup("", **config))
        with pytest.raises(ValidationError) as e: plan_vram("sdxl-base", config=words)
        assert said in str(e.value)


# --- configurations in words, host memory, JSON

@pytest.mark.slow
def test_every_label_is_a_configuration():
    for found in candidates(find_model("sdxl-base"), "bf16", "cuda", {"batch": 2}):
        label = PlanOption(found, None).label
        again = estimate_vram("sdxl-base", batch=2, **settings_in(label))
        assert (again.peak_allocated, again.host_peak) == (found.peak_allocated, found.host_peak), label


def test_all_ways_are_counted():
    every = plan_vram("sdxl-base", "8GB", top=10_000)
    few = plan_vram("sdxl-base", "8GB", top=3)
    assert every.found == few.found == len(every.options) > 10 and len(few.options) == 3
    assert f"{every.found} ways" in repr(few) and f"and {every.found - 3} more" in repr(few) + few._repr_html_()
    assert "more" not in repr(every).splitlines()[-20]
    speeds = [(option.rank[0], 1 / option.speed) for option in every.options]
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("quant", slow_but([None, "nf4"], [None, "nf4", "torchao-int8", "layerwise-fp8"]))
def test_main_memory(quant):
    of = lambda offload: estimate_vram("sdxl-base", "bf16", quant, offload=offload)
    whole = estimate_vram("sdxl-base", "bf16").loaded
    weights = sum(estimate_vram("sdxl-base", "bf16", quant).by_component.values())
    assert of("model").host_peak >= .95 * weights and of("model").host_pinned == 0
    assert of(None).host_peak <= 1.05 * whole and (quant != "nf4" or of(None).host_peak < .1 * whole)
    if quant == "nf4": return
    assert abs(of("group").host_pinned / weights - 1) < .05 and of("group").host_peak > of("group").host_pinned
    assert of("group-leaf-unpinned").host_peak <= of("group").host_peak


@pytest.mark.slow
def test_a_budget_of_main_memory():
    free, small = (plan_vram("flux1-dev", "12GB", host_budget=host, top=99) for host in (None, "20GB"))
    assert free.best.estimate.host_peak > 20e9
    assert all(option.estimate.host_peak <= 20e9 for option in small.options)
    assert small.best is None or small.best.rank >= free.best.rank
    nothing = plan_vram("flux1-dev", "12GB", host_budget="100MB")
    assert nothing.best is None and "of main memory" in nothing.advice
    with pytest.raises(ValidationError, match="host_budget"): plan_vram("flux1-dev", "12GB", host_budget=8)


def test_streams_have_pools_of_their_own():
    reserved = {offload: estimate_vram("flux1-dev", "bf16", offload=offload).peak_reserved for offload in ("group-leaf", "group", "group-leaf-record")}
    assert reserved["group-leaf"] < reserved["group"] < reserved["group-leaf-record"]
    allocated = {offload: estimate_vram("flux1-dev", "bf16", offload=offload).by_phase for offload in ("group-leaf", "group", "group-block-stream")}
    assert allocated["group-leaf"]["denoise"] < allocated["group"]["denoise"] < allocated["group-block-stream"]["denoise"]
    assert allocated["group-block-stream"]["encode"] > 8.9 * 2**30  # T5's blocks are one level further down


def test_the_context_is_measured_where_a_gpu_is_used():
    found = estimate_vram("tiny-sdxl")
    assert found.context == (int(.3 * 2**30), int(.6 * 2**30))
    with pretended("cuda", others=700 << 20): assert found.context == (700 << 20, 700 << 20)
    assert estimate_vram("tiny-sdxl", device="cpu").context == (0, 0)


@pytest.mark.parametrize("quant", FORMATS)
def test_fewer_bits_take_less(quant):
    for shape in ((1280, 1280), (640, 5120), (320, 320)):
        full = 2 * shape[0] * shape[1]
        assert 0 < weight_bytes(shape, quant, 2) < .6 * full or (quant in ("torchao-int4", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k", "gguf-q3_k", "gguf-q2_k")
                                                                 and weight_bytes(shape, quant, 2) <= full)


@pytest.mark.parametrize("quant", ["torchao-int8", "torchao-fp8"])
def test_torchao_stores_what_is_predicted(quant):
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_
    config = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-fp8": "Float8WeightOnlyConfig"}[quant]
    layer = torch.nn.Linear(256, 384, bias=False, dtype=torch.bfloat16)
    quantize_(layer, getattr(importlib.import_module("torchao.quantization"), config)())
    names, _ = layer.weight.__tensor_flatten__()
    assert sum(getattr(layer.weight, name).nbytes for name in names) == weight_bytes((384, 256), quant, 2)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_channels_last_turns_the_operands_of_convolutions_and_not_their_results(dtype):
    usual, last = (estimate_vram("sdxl-base", dtype, vae="fp16-fix", channels_last=wanted) for wanted in (False, True))
    operand = 256 * 1024 ** 2 * (4 if dtype == "fp32" else 2)  # of the decoder's largest convolutions
    beside = [found.peak_run.workspace - found.calibration.library for found in (usual, last)]
    assert beside == [operand * (1 if dtype == "fp32" else 2), operand]
    assert last.peak_allocated <= usual.peak_allocated and last.peak_reserved > last.peak_allocated


@pytest.mark.slow
def test_the_way_to_attend_is_written_for_a_network_by_itself(folder_of):
    code = code_of(estimate_vram(folder_of("text, FLUX") / "transformer", "bf16", attention="math", width=SIDE, height=SIDE))
    compile(code, "network", "exec")
    assert "# run it with sdpa_kernel(SDPBackend.MATH): model(...)" in code


def test_networks_of_videos_are_not_flat(folder_of):
    flat = {name: is_flat(network) for name, network in estimate(folder_of("text, SDXL"), "text, SDXL").traced.networks.items()}
    assert flat == {"vae": True, "unet": True, "text_encoder": False, "text_encoder_2": False}
    last = estimate(folder_of("text, SDXL"), "text, SDXL", channels_last=True).traced
    assert {name: lies_last(last, name) for name in last.networks} == flat
    assert not any(is_flat(network) for network in estimate(folder_of("video, Wan"), "video, Wan").traced.networks.values())
