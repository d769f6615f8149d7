"Drawing on pretended GPUs: how the VAE decodes, memory that runs out where weights are cast or read, and networks that wait elsewhere."
import copy

import numpy as np
import pytest
import torch

from devsky_nb import QuantizedSDXLGenerator
from devsky_nb import load_sdxl_pipeline_with_quantization_v1 as load_v1, load_sdxl_pipeline_with_quantization_v2 as load_v2
from devsky_nb.device import is_out_of_memory, release_memory
from devsky_nb.diffusion.drawing import decode
from devsky_nb.diffusion.load import network_sizes, peak_warning, weight_bytes
from devsky_nb.diffusion.networks import back_to_format, load_vae, stored_vae
from devsky_nb.diffusion.quantization import PARTS
from devsky_nb.diffusion.pipelines import load_with_settings
from devsky_nb.errors import InsufficientMemoryError, ValidationError
from devsky_nb.hub.locate import locate_model
from devsky_nb.memory.estimate import estimate_vram
from pretended_gpu import pretended

TINY = locate_model("tiny-sdxl")
FAST = {"prompt": "a red dress", "width": 64, "height": 64, "seed": 1, "num_inference_steps": 1, "progress": False}
MIB = 2**20


@pytest.fixture
def pipeline(half):
    return copy.deepcopy(half)


def formats(vae):
    return {weight.dtype for weight in vae.parameters()}


def call(pipeline):
    "An image by the pipeline's own call."
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(): return pipeline("a red dress", num_inference_steps=1, width=64, height=64, output_type="np").images


# --- one decision


@pytest.mark.parametrize("dtype, short", [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")])
@pytest.mark.parametrize("vae", ["auto", "fp32"])
def test_loader_prediction_and_warning_decide_alike_how_the_vae_decodes(dtype, short, vae):
    mode, stored = stored_vae(TINY / "vae", dtype, vae)
    estimate = estimate_vram(TINY, short, vae="upcast" if vae == "auto" else vae)
    while_decoding = next(run for run in estimate.runs if run.phase == "decode").weights["vae"]
    network, loaded_mode = load_vae(TINY / "vae", dtype, vae)
    assert (loaded_mode, formats(network)) == (mode, {stored})
    held = sum(weight.numel() for weight in network.parameters())
    itemsize = dtype.itemsize if mode == "same" else 4
    assert held * itemsize <= while_decoding < held * itemsize * 1.05, "in whole blocks of the allocator"
    assert network_sizes(TINY, dtype, vae=vae)["vae"] == held * stored.itemsize
    with pytest.MonkeyPatch.context() as patch:
        peak = estimate.peak_allocated
        patch.setattr("devsky_nb.diffusion.load.estimate_vram", lambda *args, **kwargs: estimate_vram(*args, **kwargs | {"device": "cuda"}))
        assert peak_warning("tiny-sdxl", TINY, dtype, {}, "cpu", peak, vae) is None
        assert "is expected to take" in peak_warning("tiny-sdxl", TINY, dtype, {}, "cpu", peak - 1, vae)


def test_in_bfloat16_the_vae_costs_two_levels_of_a_pixel_and_half_the_memory():
    half, mode = load_vae(TINY / "vae", torch.bfloat16, "auto")
    full, _ = load_vae(TINY / "vae", torch.float32, "auto")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1) for vae in (half, full))
    assert mode == "same" and (a - b).abs().max() < .05 and (a - b).pow(2).mean().sqrt() < .01
    sizes = [estimate_vram("sdxl-base", "bf16", vae=vae).peak_allocated for vae in ("upcast", "fp32")]
    assert sizes[1] - sizes[0] > 1.5 * 2**30


# --- memory runs out in the cast


@pytest.mark.parametrize("share", [.3, .9, 1.5])
def test_a_vae_whose_cast_ran_out_of_memory_is_whole_again(pipeline, share):
    with pretended("cuda") as gpu:
        pipeline.vae.to("cuda")
        size, before = sum(weight.nbytes for weight in pipeline.vae.parameters()), [weight.clone() for weight in pipeline.vae.parameters()]
        latents = torch.zeros(1, 4, 16, 16, dtype=torch.float16, device="cuda")
        with torch.no_grad(): [first] = decode(pipeline, latents)
        gpu.set_limit(gpu.used() + int(share * size))
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            decode(pipeline, latents)
        assert formats(pipeline.vae) == {torch.float16} and {weight.device.type for weight in pipeline.vae.parameters()} == {"cuda"}
        gpu.set_limit(1 << 30)
        assert all(torch.equal(a, b) for a, b in zip(before, pipeline.vae.parameters()))
        with torch.no_grad(): assert np.array_equal(decode(pipeline, latents)[0], first)


def test_a_vae_is_brought_back_where_there_is_no_room_for_a_single_tensor_more(pipeline):
    with pretended("cuda") as gpu:
        vae = pipeline.vae.to("cuda")
        vae.decoder.to(torch.float32)
        gpu.set_limit(gpu.used())
        with pytest.raises(torch.OutOfMemoryError): vae.decoder.conv_in.to(torch.float16)
        back_to_format(vae, torch.float16)
        assert formats(vae) == {torch.float16} and {weight.device.type for weight in vae.parameters()} == {"cuda"}


def test_a_vae_is_whole_again_that_the_pipelines_own_call_has_cast(tmp_path):
    with pretended("cuda") as gpu:
        pipeline = load_with_settings("tiny-sdxl", "cuda", dtype=torch.float16, cache_dir=tmp_path / "hub", offline=True)
        decode, size, convert = pipeline.vae.decode, sum(weight.nbytes for weight in pipeline.vae.parameters()), pipeline.vae.to
        first = call(pipeline)
        for share in (.3, 1.5):
            def short(*args, **kwargs):  # of memory, from here on
                if torch.float32 in (*args, *kwargs.values()): gpu.set_limit(gpu.used() + int(share * size))
                return convert(*args, **kwargs)
            pipeline.vae.to = short
            with pytest.raises(torch.OutOfMemoryError): call(pipeline)
            gpu.set_limit(1 << 30)
            pipeline.vae.to = convert
            assert formats(pipeline.vae) == {torch.float16} and pipeline.vae.decode is decode
        assert call(pipeline).shape == first.shape and formats(pipeline.vae) == {torch.float16}


@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_a_vae_in_float32_stays_so_whoever_draws(kind, tmp_path):
    with pretended(kind):
        pipeline = load_with_settings("tiny-sdxl", kind, dtype=torch.float16, vae="fp32", cache_dir=tmp_path / "hub", offline=True)
        twin = copy.deepcopy(pipeline)
        for drawn in (call(pipeline), call(twin)): assert np.isfinite(drawn).all() and drawn.std() > .01
        assert twin.vae.to(kind) is twin.vae is not pipeline.vae
        pipeline.to(torch.float16)
        assert pipeline.vae.to("cpu", torch.float16) is pipeline.vae and pipeline.vae.device.type == "cpu"
        assert formats(pipeline.vae) == {torch.float32} and formats(pipeline.unet) == {torch.float16}


@pytest.mark.parametrize("options, words", [
    ({"dtype": torch.float16}, "in float16 with vae='auto'"), ({"dtype": torch.bfloat16, "vae": "fp32"}, "in bfloat16 with vae='fp32'"),
])
def test_a_vae_that_must_be_cast_is_not_quantized(options, words, tmp_path):
    for load in (load_v1, load_v2):
        chosen = {"components": (*PARTS, "vae")}
        if load is load_v2:
            from diffusers import BitsAndBytesConfig
            chosen = {"quantization_config": {"vae": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}}
        with pytest.raises(ValidationError, match=words) as refused:
            load("tiny-sdxl", device="cpu", cache_dir=tmp_path / "hub", **chosen, **options)
        assert "Leave 'vae' out" in refused.value.message and not (tmp_path / "hub-quantized").exists()


# --- before and while weights are read


def test_a_kept_checkpoint_survives_every_want_of_memory(tmp_path):
    options = {"device": "cuda", "cache_dir": tmp_path / "hub", "offline": True}
    with pretended("cuda") as gpu:
        held = gpu.used()
        pipeline = load_v1("tiny-sdxl", **options)
        [kept] = (path for path in (tmp_path / "hub-quantized").iterdir() if path.is_dir())
        need = gpu.used() - held
        assert pipeline.load_report.checkpoint == str(kept)
        del pipeline
        for share in (.1, .7):
            gpu.set_limit(gpu.used() + int(share * need))
            with pytest.raises(InsufficientMemoryError): load_v1("tiny-sdxl", **options)
            assert kept.is_dir() and gpu.used() - held < MIB
        gpu.set_limit(1 << 30)
        assert load_v1("tiny-sdxl", **options).load_report.from_checkpoint


def test_room_is_looked_for_before_a_checkpoint_is_read(tmp_path, monkeypatch):
    with pretended("cuda") as gpu:
        assert load_v1("tiny-sdxl", device="cuda", cache_dir=tmp_path / "hub", offline=True).load_report.checkpoint
        release_memory()
        gpu.others = gpu.total - gpu.reserved() - 2 * MIB  # another program came
        monkeypatch.setattr("devsky_nb.diffusion.checkpoint.read_network", lambda *_: pytest.fail("it was read"))
        with pytest.raises(InsufficientMemoryError, match="the weights need"):
            load_v1("tiny-sdxl", device="cuda", cache_dir=tmp_path / "hub", offline=True)


# --- networks that wait in main memory


@pytest.mark.parametrize("options, label", [({"use_quantization": False}, None), ({"use_4bit": False}, "int8"),
                                            pytest.param({}, "nf4-dq", marks=pytest.mark.slow)])
def test_with_low_memory_no_more_than_one_network_is_ever_on_the_card(options, label, tmp_path):
    with pretended("cuda") as gpu:
        for again in (False, True):  # read or quantized now; from the checkpoint
            largest = weight_bytes(TINY, torch.bfloat16, label and dict.fromkeys(PARTS, label), offload=True)
            gpu.reset_peak()
            held = gpu.used()
            with QuantizedSDXLGenerator("tiny-sdxl", low_memory=True, cache_dir=tmp_path / "hub", offline=True, **options) as generator:
                assert gpu.peak() - held < 1.3 * largest and gpu.used() - held < MIB / 4
                assert generator.device == "cuda:0" and generator.generate(**FAST).info["stepped_down"][0] == "model offload"
                assert generator.pipeline.load_report.from_checkpoint is (again and label is not None)
            del generator


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_an_offloaded_pipeline_is_adopted_as_the_gpus(pipeline, way):
    with pretended("cuda", count=2) as gpu:
        if way == "model": pipeline.enable_model_cpu_offload(device="cuda:1")
        if way == "sequential": pipeline.enable_sequential_cpu_offload(device="cuda:1")
        if way == "group": pipeline.enable_group_offload(torch.device("cuda:1"), offload_type="leaf_level")
        pipeline.vae.register_to_config(force_upcast=False)
        assert QuantizedSDXLGenerator(pipeline=pipeline).device == "cuda:1"
        generator = QuantizedSDXLGenerator(pipeline=pipeline, low_memory=True)
        assert generator.device == "cuda:1" and generator.generate(**FAST).info["device"] == "cuda:1"
        assert gpu.peak("cuda:0") == 0


# --- what counts as out of memory


OUT_OF_MEMORY = {"cuda": ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                          "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                          "GET was unable to find an engine to execute this computation"],
                 "mps": ["Invalid buffer size: 16.00 GiB", "MPS backend out of memory (MPS allocated: 8.00 GiB)"]}


@pytest.mark.parametrize("words", [words for said in OUT_OF_MEMORY.values() for words in said])
def test_what_libraries_say_when_memory_is_out_is_known(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(ValueError(words))


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_what_libraries_say_when_memory_is_out_steps_down(pipeline, kind, monkeypatch):
    layer, failures = pipeline.vae.decoder.conv_in, []
    run = layer.forward

    def fails_once(x):
        if not failures: raise failures.append(1) or RuntimeError(OUT_OF_MEMORY[kind][0])
        return run(x)
    monkeypatch.setattr(layer, "forward", fails_once)
    with pretended(kind):
        generator = QuantizedSDXLGenerator(pipeline=pipeline.to(kind))
        assert generator.generate(**FAST).info["stepped_down"] == ["VAE tiles of 32 px"] and formats(pipeline.vae) == {torch.float16}
