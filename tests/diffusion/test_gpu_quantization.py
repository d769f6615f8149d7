"Quantized pipelines on pretended GPUs: where they are built, what moves with them, what they compute in."
import copy, functools, gc, pickle

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from pretended_gpu import pretended

from devsky_nb.device import release_memory
from devsky_nb.diffusion.checkpoint import load_quantized, save_quantized
from devsky_nb.diffusion.load import try_layers
from devsky_nb.diffusion.networks import guard
from devsky_nb.diffusion.quantization import keep_whole, PARTS
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load_v1
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v2 as load_v2
from devsky_nb.errors import ModelLoadError
from devsky_nb.memory.plan import plan_vram

KINDS = {"int8": {"use_4bit": False}, "nf4": {"double_quant": False}, "nf4-dq": {}}


def load(cache, device, kind, loader=load_v1, **options):
    options = {"dtype": torch.float32, "quantize_once": False, "fallback": False} | KINDS[kind] | options
    return loader("tiny-sdxl", device=device, cache_dir=cache / "hub", offline=True, **options)


def draw(pipeline, device):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(device if device == "cpu" else "cpu").manual_seed(0)
    latents = torch.randn((1, 4, 8, 8), generator=generator).to(device, pipeline.unet.dtype)
    with torch.no_grad():
        return pipeline("a red t-shirt", num_inference_steps=1, height=64, width=64, latents=latents, output_type="pt").images.cpu()


def tensors(network):
    "Everything that a network holds, wherever it is kept."
    for layer in network.modules():
        yield from layer.parameters(recurse=False)
        yield from layer.buffers(recurse=False)
        for holder in (getattr(layer, "state", None), *layer.parameters(recurse=False)):
            yield from (held for name in ("CB", "SCB") if isinstance(held := getattr(holder, name, None), torch.Tensor))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    "The image that the CPU draws, by kind."
    @functools.cache
    def drawn(kind): return draw(load(tmp_path_factory.mktemp(kind), "cpu", kind), "cpu")
    return drawn


def places(pipeline):
    return {str(tensor.device) for name in (*PARTS, "vae") for tensor in tensors(getattr(pipeline, name))}


def eight_bits(device="cpu"):
    torch.manual_seed(0)
    network = torch.nn.Sequential(Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.), torch.nn.ReLU())
    network.to(device).eval().requires_grad_(False)
    return network


# --- 8-bit weights move as a whole

@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_an_8_bit_layer_moves_with_its_parent_before_and_after_a_call(kind):
    with pretended(kind) as gpu, torch.no_grad():
        network = eight_bits("cpu")
        keep_whole(network)
        x = torch.randn(3, 64)
        expected = network(x)
        for device in (f"{kind}:0", "cpu", f"{kind}:0", "cpu"):
            network.to(device)
            assert {str(t.device) for t in tensors(network)} == {device}
            assert device != "cpu" or gpu.used() == 0
            assert torch.equal(network(x.to(device)).cpu(), expected)


@pytest.mark.parametrize("called", [False, True])
def test_weights_that_are_replaced_are_used_and_nothing_else_is_held(called):
    "What group offload does: the parameter's data is another tensor, no method of the layer is called."
    with pretended("cuda") as gpu, torch.no_grad():
        network = eight_bits()
        keep_whole(network)
        x = torch.randn(3, 64)
        expected = network(x)
        on_cpu = [p.data for p in network.parameters()]
        for _ in range(2):
            for p in network.parameters(): p.data = p.data.to("cuda:0")
            if called: assert torch.equal(network(x.to("cuda:0")).cpu(), expected)
            for p, data in zip(network.parameters(), on_cpu): p.data = data
            gc.collect()
            assert gpu.used() <= 512, "all but the scales is gone"
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_8_bit_network_moves_as_a_whole_too(copied):
    with pretended("cuda") as gpu, torch.no_grad():
        network = eight_bits()
        network.dtype = torch.float32
        guard(network)
        x = torch.randn(3, 64)
        expected = network(x)
        other = copied(network)
        assert isinstance(other[0], Linear8bitLt) and other[0].weight is not network[0].weight
        assert torch.equal(other(x), expected)
        other.to("cuda:0")
        assert torch.equal(other(x.to("cuda:0")).cpu(), expected)
        other.to("cpu")
        assert gpu.used() == 0 and torch.equal(network(x), expected)


def test_an_8_bit_layer_saves_loads_and_learns_as_before():
    network = eight_bits()
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    keep_whole(network)
    assert network.state_dict().keys() == stored.keys()
    x = torch.randn(3, 64, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    network[0].weight.SCB.zero_()
    network.load_state_dict(stored)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in stored.items())


# --- where a pipeline is built

@pytest.mark.parametrize("kind, loader", [("int8", load_v1), ("nf4-dq", load_v2)])
def test_a_quantized_pipeline_is_built_on_the_gpu_that_was_asked_for(tmp_path, kind, loader, on_cpu):
    expected = on_cpu(kind)
    with pretended("cuda", count=2) as gpu:
        pipeline = load(tmp_path, "cuda:1", kind, loader)
        assert pipeline.load_report.label == kind and pipeline.load_report.fallback is None
        assert places(pipeline) == {"cuda:1"} and gpu.peak("cuda:0") == 0
        assert (draw(pipeline, "cuda:1") - expected).abs().max() < .02
        assert gpu.peak("cuda:0") == 0


@pytest.mark.parametrize("machine, kind", [("cuda", "int8"), ("mps", "nf4-dq")])
def test_beside_a_gpu_the_cpu_is_taken_where_it_was_asked_for(tmp_path, machine, kind, on_cpu):
    expected = on_cpu(kind)
    with pretended(machine) as gpu:
        pipeline = load(tmp_path, "cpu", kind)
        assert places(pipeline) == {"cpu"} and torch.equal(draw(pipeline, "cpu"), expected)
        assert gpu.peak() == 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_on_mps(tmp_path, kind):
    with pretended("mps"):
        pipeline = load(tmp_path, "mps", kind)
        assert places(pipeline) == {"mps:0"} and draw(pipeline, "mps").isfinite().all()


def test_8_bits_with_model_offload_free_the_card(tmp_path):
    with pretended("cuda") as gpu:
        pipeline = load(tmp_path, "cuda", "int8")
        whole = gpu.used()
        expected = draw(pipeline, "cuda")
        pipeline.enable_model_cpu_offload(device="cuda")
        for drawn in (False, True):
            if drawn: assert torch.equal(draw(pipeline, "cuda"), expected)
            pipeline.maybe_free_model_hooks()
            release_memory()
            assert places(pipeline) == {"cpu"}
            assert gpu.used() <= 1024 < whole, "the scheduler's timesteps stay, nothing else"


def test_the_planner_s_code_keeps_8_bit_layers_whole_before_it_offloads_them():
    for words in ("int8", "int8, model offload"):
        option = plan_vram("tiny-sdxl", "24GB", device="cuda", config=words).options[0]
        lines = option.code.splitlines()
        kept = [f"keep_whole(pipeline.{name})" for name in PARTS]
        offloaded = option.estimate.setup.offload is not None
        assert all((line in lines) == offloaded for line in kept), option.code
        if offloaded: assert max(map(lines.index, kept)) < lines.index("pipeline.enable_model_cpu_offload()")


# --- checkpoints

def test_a_checkpoint_of_a_cpu_computes_in_what_suits_the_gpu(tmp_path):
    save_quantized(load(tmp_path, "cpu", "nf4"), tmp_path / "kept")
    with pretended("cuda", count=2) as gpu:
        pipeline = load_quantized(tmp_path / "kept", "cuda:1")
        assert pipeline.dtype == torch.bfloat16 and pipeline.load_report.dtype == "bfloat16"
        layers = [m for name in PARTS for m in getattr(pipeline, name).modules() if isinstance(m, Linear4bit)]
        assert {m.compute_dtype for m in layers} == {torch.bfloat16} and places(pipeline) == {"cuda:1"}
        assert draw(pipeline, "cuda:1").isfinite().all()
        assert gpu.peak("cuda:0") == 0
        as_it_was = load_quantized(tmp_path / "kept", "cuda:1", dtype=torch.float32)
        assert as_it_was.dtype == torch.float32 and as_it_was.unet.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    assert load_quantized(tmp_path / "kept", "cpu").dtype == torch.float32


# --- a load counts as done when every kind of layer has run

@pytest.mark.parametrize("kind, kernel", [("int8", "MatMul8bitLt"), ("nf4", "matmul_4bit")])
def test_layers_that_load_and_cannot_run_fall_back(tmp_path, monkeypatch, kind, kernel):
    def broken(*args, **kwargs): raise RuntimeError("no kernel image is available for execution on the device")
    if kind == "int8": monkeypatch.setattr("bitsandbytes.autograd._functions.MatMul8bitLt.apply", broken)
    else: monkeypatch.setattr("bitsandbytes.matmul_4bit", broken)
    with pretended("cuda"):
        report = load(tmp_path, "cuda", kind, fallback=True).load_report
        assert report.label == "float32" and "no kernel image" in report.fallback
        if kind == "nf4": return  # the rest takes the same way
        with pytest.raises(ModelLoadError, match="no kernel image"): load(tmp_path, "cuda", kind)


def test_trying_layers_leaves_them_as_they_are():
    network = eight_bits().append(Linear4bit(32, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu"))
    network.dtype = torch.float32
    keep_whole(network)
    before, ran = {name: value.clone() for name, value in network.state_dict().items()}, []
    for layer in network: layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    try_layers(network, "cpu")
    assert [type(layer) for layer in ran] == [type(network[0]), Linear4bit] and not {*ran} & {*network}  # copies of them
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
