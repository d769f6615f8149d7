"LoRA on quantized pipelines: loaded completely or not at all."
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devsky_nb import _core, QuantizedSDXLGenerator
from devsky_nb.diffusion.networks import adapters_of
from devsky_nb.diffusion.quantization import PARTS
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load_v1
from devsky_nb.errors import DevSkyyError, ModelLoadError

LAYERS = {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj", "v_proj"), "text_encoder_2": ("q_proj", "v_proj")}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "guidance_scale": 1.}
    return pipeline("a red dress", generator=torch.Generator().manual_seed(0), **options).images[0]


def states(pipeline):
    return {name: {k: v.clone() for k, v in getattr(pipeline, name).state_dict().items()} for name in PARTS}


def same(a, b):
    return all(a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a)


def write_lora(pipeline, folder, scale=.3, wrong=None, parts=LAYERS, prefix=""):
    "A LoRA for some layers; those of the network `wrong` do not fit."
    generator, tensors = torch.Generator().manual_seed(0), {}
    for part in parts:
        for name, layer in getattr(pipeline, part).named_modules():
            name = name.replace(".base_layer", "")
            if not (name.endswith(LAYERS[part]) and hasattr(layer, "in_features")): continue
            width = layer.in_features + (1 if part == wrong else 0)
            key = f"{part}.{name}" if not prefix else f"{prefix}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator) * .3
            tensors[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) * scale
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["8 bits", "4 bits"])
def pipeline(request, tmp_path_factory):
    return load_v1("tiny-sdxl", use_4bit=request.param, device="cpu", quantize_once=False,
                   cache_dir=tmp_path_factory.mktemp("lora") / "hub")


@pytest.mark.parametrize("wrong, others", [("text_encoder_2", False), ("unet", True), ("text_encoder", True)],
                         ids=["the first", "beside another-unet", "beside another-text encoder"])
def test_a_lora_that_does_not_fit_changes_nothing(wrong, others, pipeline, tmp_path):
    if others: pipeline.load_lora_weights(str(write_lora(pipeline, tmp_path / "good")), adapter_name="good")
    before, image, active = states(pipeline), draw(pipeline), pipeline.get_active_adapters()
    listed = {name: list(adapters_of(getattr(pipeline, name))) for name in PARTS}
    modules = {name: [type(m) for m in getattr(pipeline, name).modules()] for name in PARTS}
    bad = write_lora(pipeline, tmp_path / "bad", wrong=wrong)
    before = states(pipeline)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="LoRA cannot be loaded: .*is as it was"):
            pipeline.load_lora_weights(str(bad), adapter_name="bad")
        assert same(before, states(pipeline)) and pipeline.get_active_adapters() == active
        assert listed == {name: list(adapters_of(getattr(pipeline, name))) for name in PARTS}
        assert modules == {name: [type(m) for m in getattr(pipeline, name).modules()] for name in PARTS}
    if not others: assert not any(vars(getattr(pipeline, name)).get("_hf_peft_config_loaded") for name in PARTS)
    assert np.abs(draw(pipeline) - image).max() < .02  # the CPU rounds scales of 4-bit layers in a forward
    pipeline.unload_lora_weights()


def test_a_lora_with_text_encoders_works_and_can_be_taken_away(pipeline, tmp_path):
    plain = draw(pipeline)
    pipeline.load_lora_weights(str(write_lora(pipeline, tmp_path / "none", scale=0.)), adapter_name="none")
    assert np.abs(draw(pipeline) - plain).max() < .02
    pipeline.load_lora_weights(str(write_lora(pipeline, tmp_path / "good")), adapter_name="good")
    assert np.abs(draw(pipeline) - plain).mean() > .02
    assert all(set(adapters_of(getattr(pipeline, name))) == {"none", "good"} for name in PARTS)
    pipeline.unload_lora_weights()
    assert np.abs(draw(pipeline) - plain).max() < .02


def test_an_image_names_the_loras_that_were_in_force(pipeline, tmp_path):
    generator = QuantizedSDXLGenerator(pipeline=pipeline)
    def named(): return [entry["name"] for entry in generator.generate("a red dress", num_inference_steps=1, seed=1, progress=False).info["adapters"]]
    assert named() == []
    for name in ("first", "second"):
        pipeline.load_lora_weights(str(write_lora(pipeline, tmp_path / name, parts=["unet"])), adapter_name=name)
    pipeline.set_adapters(["first"])
    assert named() == ["first"]
    pipeline.set_adapters(["second", "first"])
    assert sorted(named()) == ["first", "second"]
    pipeline.disable_lora()
    assert named() == []
    pipeline.unload_lora_weights()


def test_a_lora_of_which_nothing_fits_is_an_error(pipeline, tmp_path):
    other = write_lora(pipeline, tmp_path / "other", parts=["unet"], prefix="transformer")
    before = states(pipeline)
    with pytest.raises(ModelLoadError, match="LoRA cannot be loaded"): pipeline.load_lora_weights(str(other))
    for nothing in (str(tmp_path / "none"), str(tmp_path), 5):
        with pytest.raises(ModelLoadError, match="LoRA cannot be loaded"): pipeline.load_lora_weights(nothing)
    (other / "pytorch_lora_weights.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelLoadError, match="LoRA cannot be loaded"): pipeline.load_lora_weights(str(other))
    assert same(before, states(pipeline))


def test_without_peft_it_is_said_how_to_get_it(pipeline, monkeypatch):
    monkeypatch.setattr(_core, "find_spec", lambda name: None)
    with pytest.raises(DevSkyyError, match=r"this needs peft: run pip install 'devsky_nb\[diffusion\]'"):
        pipeline.load_lora_weights("shop/lora")
