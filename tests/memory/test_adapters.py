"An IP-Adapter without weights against the one that diffusers loads: every layer, and what the networks are given when a pipeline draws."
import json, re
from functools import wraps

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from devsky_nb import estimate_vram, plan_vram
from devsky_nb.errors import ValidationError
from devsky_nb.hub.load import quiet
from devsky_nb.memory import adapters
from devsky_nb.memory.adapters import add_ip_adapter, find_ip_adapter, image_encoder
from devsky_nb.memory.configs import config_folder, meta_network
from devsky_nb.memory.estimate import network_bytes
from devsky_nb.memory.inputs import Workload
from devsky_nb.memory.rehearsal import describe, rehearse
from devsky_nb.memory.tracing import describe_layers
from tiny_pipelines import save, SIDE

TINY = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "projection_dim": 24}
DENOISERS = {"text, SD": "unet", "text, SDXL": "unet", "text, FLUX": "transformer"}
FAST = "text, SDXL"
FILES = {  # parameters, and bytes of the published files, in 16 bits
    ("sd15", "unet", "plain"): 44_642_768, ("sdxl-base", "unet", "plus"): 847_517_512, ("flux1-dev", "transformer", "plain"): 982_000_000}


def weights(*shape): return torch.zeros(shape)


def adapter_file(network, width, tokens=4):
    "What the file of an adapter holds, as its authors write it."
    is_flux = type(network).__name__ == "FluxTransformer2DModel"
    text = network.config.joint_attention_dim if is_flux else network.config.cross_attention_dim
    layers = {}
    names = [name for name in network.attn_processors if not name.startswith("single") and not name.endswith("attn1.processor")]
    for n, name in enumerate(names):
        hidden = network.inner_dim if is_flux else network.get_submodule(name.removesuffix(".processor")).to_q.out_features
        number = n if is_flux else 2 * n + 1
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{number}.{part}.weight"] = weights(hidden, text)
            if is_flux: layers[f"{number}.{part}.bias"] = weights(hidden)
    image = {"proj.weight": weights(tokens * text, width), "proj.bias": weights(tokens * text), "norm.weight": weights(text), "norm.bias": weights(text)}
    return {"image_proj": image, "ip_adapter": layers}


def shapes(said):
    "What is compared: shapes, and whether numbers are whole; the one runs in bf16, the other in fp32."
    if isinstance(said, list): return [shapes(item) for item in said]
    if not isinstance(said, dict): return 0. if isinstance(said, float) else said
    if "tensor" in said: return {"shape": said["shape"], "fraction": "float" in said["tensor"]}
    return {name: shapes(item) for name, item in said.items()}


def watch(network, name, found):
    forward = network.forward
    @wraps(forward)
    def called(*args, **kwargs):
        found.setdefault(name, shapes([describe(list(args)), {key: describe(value) for key, value in kwargs.items()}]))
        return forward(*args, **kwargs)
    network.forward = called


@pytest.fixture
def tiny_encoders(monkeypatch):
    for name in adapters.IMAGE_ENCODERS: monkeypatch.setitem(adapters.IMAGE_ENCODERS, name, TINY)


@pytest.mark.parametrize("kind", [kind if kind == FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in DENOISERS])
def test_a_pipeline_with_an_adapter_is_played_as_it_runs(kind, tmp_path, tiny_encoders):
    with quiet("diffusers", "transformers"):
        folder = save(kind, tmp_path / "pipeline")
        played = rehearse(folder, Workload(SIDE, SIDE, ip_adapter="plain"))
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(num_attention_heads=16, patch_size=14, **TINY)))
        network = getattr(pipeline, DENOISERS[kind])
        pipeline.load_ip_adapter(adapter_file(network, TINY["projection_dim"]), subfolder="", weight_name="", image_encoder_folder=None)
        pipeline.set_progress_bar_config(disable=True)
        given = {}
        for name in ("image_encoder", DENOISERS[kind]): watch(getattr(pipeline, name), name, given)
        pipeline("a dress", width=SIDE, height=SIDE, num_inference_steps=1, ip_adapter_image=Image.new("RGB", (90, 60)), output_type="latent")
    assert played.problem == ""
    for name in given:
        call = played.given(name)[0]
        assert shapes([call.args, call.kwargs]) == given[name], name
    real = {layer.name: layer.weights for layer in describe_layers(network)}
    assert {layer.name: layer.weights for layer in describe_layers(played.networks[DENOISERS[kind]])} == real
    found = estimate_vram(folder, "fp32", width=SIDE, height=SIDE, ip_adapter=True)
    assert network_bytes(found.traced, DENOISERS[kind])[0].sum() == sum(t.nbytes for t in [*network.parameters(), *network.buffers()])
    assert [run for run in found.traced.runs if run in given] == ["image_encoder", DENOISERS[kind]]


@pytest.mark.slow
@pytest.mark.parametrize("alias, part, name", FILES)
def test_the_parameters_fill_the_published_files(alias, part, name):
    network = meta_network(config_folder(alias) / part)
    before = sum(p.numel() for p in network.parameters())
    adapter = find_ip_adapter(name, type(network).__name__, network.config)
    add_ip_adapter(network, adapter, image_encoder(adapter))
    added = sum(p.numel() for p in network.parameters()) - before
    assert abs(2 * added / FILES[alias, part, name] - 1) < 1e-3


@pytest.mark.slow
def test_what_an_adapter_adds_is_counted_and_never_packed():
    plain, with_image = (estimate_vram("flux1-dev", "bf16", "nf4", ip_adapter=name) for name in (False, "plain"))
    more = {name: with_image.by_component[name] - plain.by_component.get(name, 0) for name in with_image.by_component}
    assert abs(more["image_encoder"] / (2 * 303_966_208) - 1) < .02 and abs(more["transformer"] / (2 * 490_880_000) - 1) < .01
    assert more["text_encoder"] == more["vae"] == 0
    assert with_image.needed > plain.needed + 1.5e9


@pytest.mark.parametrize("options, said", [
    ({"model": "sd15", "ip_adapter": "large"}, "plain"), ({"model": "sd15", "ip_adapter": "vit-h"}, "there are 'plain', 'plus'"),
    ({"model": "pixart-sigma", "ip_adapter": True}, "for Stable Diffusion, SDXL and FLUX.1"), ({"model": "clip-vit-base", "ip_adapter": True}, "model without a denoiser"),
    ({"model": "sdxl-base", "ip_adapter": True, "attention": "sliced"}, "take the IP-Adapter out"),
    pytest.param({"model": "sd15", "ip_adapter": True, "fused": True}, "takes an IP-Adapter out", marks=pytest.mark.slow),
    pytest.param({"model": "sd15", "ip_adapter": "plus", "quant": "nf4"}, "unet is packed in nf4", marks=pytest.mark.slow), ({"model": "sd15", "ip_adapter": 1}, "plain")])
def test_what_has_no_adapter_is_refused(options, said):
    with pytest.raises(ValidationError, match=re.escape(said)): estimate_vram(**options)


@pytest.mark.slow
def test_a_plan_has_the_adapter_in_every_way_and_in_its_code():
    plan = plan_vram("sdxl-base", "16GB", ip_adapter="plus", top=99)
    assert plan.best is not None and all(option.estimate.setup.ip_adapter == "plus" for option in plan.options)
    assert not any((option.estimate.traced.quantized["unet"] or "").startswith(("int8", "nf4", "torchao")) for option in plan.options)
    code = plan.best.code
    compile(code, "plan", "exec")
    assert "weight_name='ip-adapter-plus_sdxl_vit-h.safetensors', image_encoder_folder='models/image_encoder')" in code
    assert 'ip_adapter_image=load_image("reference.png")' in code and json.dumps(plan.to_dict())
