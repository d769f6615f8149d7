"Any pipeline in fewer bits: every kind loads, is kept and read again; what cannot be is refused whole."
import json, shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_pipelines import KINDS, random_network, save, write_pipeline

from devsky_nb import load_quantized, load_quantized_pipeline, load_sdxl_pipeline_with_quantization_v1, save_quantized
from devsky_nb.diffusion import load as loading
from devsky_nb.diffusion.backends import label_settings
from devsky_nb.diffusion.networks import load_network
from devsky_nb.diffusion.quantization import is_quantized, quantized_layers
from devsky_nb.diffusion.small import write_small_pipeline
from devsky_nb.errors import InsufficientMemoryError, ModelLoadError, ValidationError
from devsky_nb.hub.weights import model_bytes

USUAL = ("text, SD", "text, FLUX", "text, SD3", "video, Wan")
DENOISERS = {"unet", "transformer", "transformer_2", "controlnet"}
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in USUAL]
NEWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("QwenImagePipeline", "ZImagePipeline", "ChromaPipeline", "SanaPipeline", "Flux2KleinPipeline",
                                                                 "AuraFlowPipeline", "CogView4Pipeline", "Lumina2Pipeline", "LTXPipeline")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "Folders of pipelines by kind, made when they are asked for."
    made = {}
    def folder(kind):
        if kind not in made: made[kind] = save(kind, tmp_path_factory.mktemp("pipeline") / "model")
        return made[kind]
    return folder


def load(folder, cache, quantize="nf4-dq", backend="bitsandbytes", **options):
    options = {"device": "cpu", "dtype": torch.float32, "fallback": False, "cache_dir": cache / "hub"} | options
    return load_quantized_pipeline(folder, quantize, backend, **options)


def weights(pipeline):
    "Every tensor of a pipeline's networks."
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", [*USUAL, *OTHERS, *NEWER])
def test_every_kind_is_quantized_kept_and_read_again(kind, folders, tmp_path):
    pipeline = load(folders(kind), tmp_path)
    assert type(pipeline).__name__ == KINDS.get(kind, kind) and not pipeline.load_report.from_checkpoint
    by_name = {part.name: part for part in pipeline.load_report.parts}
    denoisers = DENOISERS & by_name.keys()
    assert denoisers and all(by_name[name].layers + len(by_name[name].left_alone) for name in denoisers)
    if not any(part.layers for part in by_name.values()): return  # this processor would crash on layers so small
    assert {part.precision for part in by_name.values() if part.layers} == {"nf4-dq"}
    assert by_name["vae"].precision == "float32" and not by_name["vae"].layers
    for name, part in by_name.items():
        assert part.layers == quantized_layers(getattr(pipeline, name)) and part.bytes_after == model_bytes(getattr(pipeline, name))
    again = load(folders(kind), tmp_path)
    assert again.load_report.from_checkpoint and same_weights(pipeline, again)
    elsewhere = load_quantized(save_quantized(again, tmp_path / "saved"), device="cpu")
    assert type(elsewhere) is type(pipeline) and same_weights(elsewhere, again)


@pytest.mark.slow
def test_names_that_transformers_changes_while_it_reads_are_no_damage(tmp_path):
    folder = write_small_pipeline("qwen-image", tmp_path / "model")
    pipeline = load(folder, tmp_path, "int8")
    again = load(folder, tmp_path, "int8")
    assert again.load_report.from_checkpoint and same_weights(pipeline, again)
    assert any(name.startswith("text_encoder.model.language_model.") for name in weights(again))
    file = next(path for path in tmp_path.rglob("text_encoder/*.safetensors") if path.parents[1] != folder)
    with safe_open(file, framework="np") as stored: assert any(name.startswith("model.layers.") for name in stored.keys())


@pytest.mark.parametrize("quantize, backend", [("int8", "torchao"), ("fp8", "torchao"), ("fp8", "layerwise")])
@pytest.mark.parametrize("kind", [*USUAL, *OTHERS])
def test_every_kind_goes_through_the_other_backends(kind, quantize, backend, folders, tmp_path):
    if backend == "torchao": pytest.importorskip("torchao")
    pipeline = load(folders(kind), tmp_path, quantize, backend, dtype=torch.bfloat16)
    packed = {part.name: part.precision for part in pipeline.load_report.parts if part.layers}
    assert set(packed.values()) == {f"{backend}-{quantize}"} and "vae" not in packed and packed.keys() & DENOISERS
    if backend == "layerwise": assert packed.keys() <= DENOISERS
    with pytest.raises(ValidationError, match="only what bitsandbytes has quantized is kept"): save_quantized(pipeline, tmp_path / "saved")
    with pytest.raises(ValidationError, match="cannot become"): pipeline.to(torch.float32)


def test_layers_are_left_alone_where_that_was_asked_for(folders, tmp_path):
    for backend, quantize in {"bitsandbytes": "nf4", "layerwise": "fp8"}.items():
        pipeline = load(folders("text, FLUX"), tmp_path, {"transformer": quantize}, backend, modules_to_not_convert=("to_out", "proj_out"))
        layers = {name: is_quantized(layer) for name, layer in pipeline.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert any(layers.values()) and not any(packed for name, packed in layers.items() if "to_out" in name or name == "proj_out")


@pytest.mark.parametrize("backend, quantize", [("bitsandbytes", "int8"), ("layerwise", "fp8")])
def test_a_name_spares_the_same_layers_whatever_the_library(backend, quantize, folders, tmp_path):
    names = ("layers.0", "transformer_blocks.0.attn.to_q") if backend == "bitsandbytes" else ("transformer_blocks.0.attn.to_q",)
    usual, spared = (load(folders("text, FLUX"), tmp_path, quantize, backend, modules_to_not_convert=given, quantize_once=False)
                     for given in ((), names))
    for part in ("transformer", "text_encoder"):
        packed = [{name for name, layer in getattr(pipeline, part).named_modules() if is_quantized(layer)} for pipeline in (usual, spared)]
        meant = {name for name in packed[0] if any(f".{given}." in f".{name}." for given in names)}
        assert packed[1] == packed[0] - meant and (meant or not packed[0])


def test_layers_whose_weights_are_read_by_others_stay_as_they_are(tmp_path):
    folder = write_pipeline("HunyuanDiTPipeline", tmp_path / "model") / "transformer"
    random_network(folder).save_pretrained(folder)
    network, left_alone = load_network(folder, torch.float32, label_settings("int8", "bitsandbytes", torch.float32), "cpu")
    pooler = network.time_extra_emb.pooler
    assert {name.rpartition(".")[2] for name in left_alone} == {"q_proj", "k_proj", "v_proj", "c_proj"} and is_quantized(network.blocks[0].attn1.to_q)
    assert pooler(torch.ones(1, len(pooler.positional_embedding) - 1, pooler.k_proj.in_features)).isfinite().all()


def test_layers_that_casting_spares_are_spared_whatever_else_is(folders, tmp_path):
    kept = {}
    for skip in ((), ("to_out",)):
        pipeline = load(folders("text, SD3"), tmp_path, "fp8", "layerwise", dtype=torch.bfloat16, modules_to_not_convert=skip)
        kept[skip] = {name for name, weight in pipeline.transformer.named_parameters() if weight.dtype == torch.bfloat16}
    assert {name for name in kept[()] if "norm" in name} and kept[()] < kept["to_out",]
    assert all("to_out" in name for name in kept["to_out",] - kept[()])


@pytest.mark.parametrize("quantize, backend", [("int8", "bitsandbytes"), ("fp8", "layerwise"), ("int8", "torchao")])
@pytest.mark.parametrize("kind", ["text, FLUX", "text, SD"])
def test_the_headers_say_what_the_weights_will_take(kind, quantize, backend, folders, tmp_path):
    if backend == "torchao": pytest.importorskip("torchao")
    report = load(folders(kind), tmp_path, quantize, backend, dtype=torch.bfloat16).load_report
    labels = {part.name: part.precision for part in report.parts if part.layers}
    assert loading.weight_bytes(folders(kind), torch.bfloat16, labels) == pytest.approx(report.bytes_after, rel=.02)


def test_each_network_can_have_a_format_of_its_own(folders, tmp_path):
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    pipeline = load(folders("text, SD3"), tmp_path, {"transformer": config, "text_encoder_3": "nf4", "text_encoder": None})
    assert {p.name: p.precision for p in pipeline.load_report.parts if p.layers} == {"transformer": "int8", "text_encoder_3": "nf4"}


def gguf_file(path, network):
    "The weights of a network, packed as most GGUF files are."
    gguf = pytest.importorskip("gguf")
    packed = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "flux")
    for name, weight in network.state_dict().items():
        values = weight.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0: writer.add_tensor(name, gguf.quants.quantize(values, packed), raw_dtype=packed)
        else: writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_stands_in_for_a_denoiser(folders, tmp_path):
    folder = folders("text, FLUX")
    exact = load(folder, tmp_path, None).transformer
    file = gguf_file(tmp_path / "flux.gguf", exact)
    pipeline = load(folder, tmp_path, {"transformer": file})
    by_name = {part.name: part for part in pipeline.load_report.parts}
    assert by_name["transformer"].precision == "gguf-file" and by_name["transformer"].layers
    assert by_name["transformer"].bytes_after < .5 * by_name["transformer"].bytes_before
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), exact.transformer_blocks[0].attn.to_q(x), atol=.02)


def test_a_gguf_file_of_another_model_is_refused(folders, tmp_path):
    other = gguf_file(tmp_path / "other.gguf", load(folders("text, SD3"), tmp_path, None).transformer)
    with pytest.raises(ModelLoadError, match="other.gguf"): load(folders("text, FLUX"), tmp_path, {"transformer": other})
    (tmp_path / "cut.gguf").write_bytes(other.read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match="cut.gguf"): load(folders("text, SD3"), tmp_path, {"transformer": tmp_path / "cut.gguf"})


WRONG = {
    "unknown format": (lambda f: {"quantize": "int5"}, "nf4-dq"), "unknown backend": (lambda f: {"backend": "hqq"}, "torchao"),
    "format of another backend": (lambda f: {"quantize": "nf4", "backend": "torchao"}, "needs backend='bitsandbytes'"),
    "no such network": (lambda f: {"quantize": {"unet": "nf4"}}, "no network 'unet'"), "no networks": (lambda f: {"quantize": {}}, "name them"),
    "a number": (lambda f: {"quantize": 4}, "expected one of"), "flags": (lambda f: {"load_in_4bit": True}, "load_in_4bit: that is for one network"),
    "a map of devices": (lambda f: {"device_map": "auto"}, "offload=True"), "code of a model": (lambda f: {"trust_remote_code": True}, "never run"),
    "a configuration for no network": (lambda f: {"quantize": diffusers.BitsAndBytesConfig(load_in_8bit=True)}, "say for which"),
    "old dtype": (lambda f: {"torch_dtype": torch.float16}, "dtype="), "dtype as text": (lambda f: {"dtype": "fp16"}, "torch.float16"),
    "int4 on a CPU": (lambda f: {"quantize": "int4", "backend": "torchao", "dtype": torch.bfloat16}, "for CUDA"),
    "casting a text encoder": (lambda f: {"quantize": {"text_encoder": "fp8"}, "backend": "layerwise"}, "is one of transformers"),
    "SDXL's VAE": (lambda f: {"vae": "fp16-fix"}, "for SDXL"), "no GGUF file": (lambda f: {"quantize": {"transformer": f / "model_index.json"}}, "says nothing|no GGUF"),
    "a missing GGUF file": (lambda f: {"quantize": {"transformer": "none.gguf"}}, "none.gguf"),
    "one name instead of a list": (lambda f: {"modules_to_not_convert": "proj_out"}, "expected a list of names of layers"),
    "a layer that is nowhere": (lambda f: {"modules_to_not_convert": ("proj_out", "proj_aut")}, "has a layer 'proj_aut'"),
    "a piece of a name": (lambda f: {"modules_to_not_convert": ("to_",)}, "has a layer 'to_'"), "a pattern": (lambda f: {"modules_to_not_convert": ("(",)}, "has a layer"),
    "layers of nothing": (lambda f: {"quantize": None, "modules_to_not_convert": ("proj_out",)}, "nothing that is quantized"),
    "a misspelt keyword": (lambda f: {"modules_to_not_covert": ()}, "did you mean modules_to_not_convert="),
    "a configuration for all": (lambda f: {"quantization_config": diffusers.BitsAndBytesConfig(load_in_8bit=True)}, r"load_quantized_pipeline\(model, quantize='int8'\)"),
    "a backend among settings": (lambda f: {"quantize": {"transformer": {"backend": "torchao", "load_in_8bit": True}}}, "unknown settings backend"),
    "settings that say nothing": (lambda f: {"quantize": {"transformer": {}}}, "neither load_in_4bit nor load_in_8bit"),
    "a GGUF file for a text encoder": (lambda f: {"quantize": {"text_encoder": gguf_magic(f)}}, "reads no GGUF files for a CLIPTextModel"),
    "offload that is no flag": (lambda f: {"offload": "model"}, "offload"),
    "upcasting": (lambda f: {"vae": "upcast", "dtype": torch.float16}, "never does")}


def gguf_magic(folder):
    pytest.importorskip("gguf")
    (folder.parent / "few.gguf").write_bytes(b"GGUF")
    return folder.parent / "few.gguf"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_reads_nothing(name, folders, tmp_path, monkeypatch):
    if "torchao" in str(WRONG[name][0](tmp_path)): pytest.importorskip("torchao")
    for function in ("load_network", "load_vae"):
        monkeypatch.setattr(loading, function, lambda *a, **k: pytest.fail("a network was loaded"))
    options, message = WRONG[name][0](folders("text, FLUX")), WRONG[name][1]
    with pytest.raises(ValidationError, match=message): load(folders("text, FLUX"), tmp_path, **options)


def changed(folder, to, **entries):
    "A copy of a pipeline whose index says something else."
    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text(encoding="utf-8"))
    (to / "model_index.json").write_text(json.dumps(index | entries), encoding="utf-8")
    return to


def test_pipelines_of_others_are_refused(folders, tmp_path):
    folder = folders("text, FLUX")
    for n, entries in enumerate([{"_class_name": "MyPipeline"}, {"_class_name": "FluxTransformer2DModel"}, {"_class_name": ["my_pipeline", "MyPipeline"]},
                                 {"transformer": ["my_code", "Net"]}, {"transformer": ["diffusers", "NoSuchModel"]}]):
        with pytest.raises(ModelLoadError): load(changed(folder, tmp_path / str(n), **entries), tmp_path)
    with pytest.raises(ValidationError, match="no pipeline"): load(folder / "transformer", tmp_path)
    with pytest.raises(ModelLoadError, match="is a FluxPipeline, and this call is for SDXL alone.* load_quantized_pipeline"):
        load_sdxl_pipeline_with_quantization_v1(folder, device="cpu", cache_dir=tmp_path / "hub")


def test_pickled_weights_are_not_read(folders, tmp_path):
    folder = shutil.copytree(folders("text, FLUX"), tmp_path / "model")
    (file,) = (folder / "transformer").glob("*.safetensors")
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ModelLoadError): load(folder, tmp_path)


def test_what_is_quantized_already_is_not_quantized_again(folders, tmp_path):
    saved = save_quantized(load(folders("text, FLUX"), tmp_path), tmp_path / "saved")
    with pytest.raises(ValidationError, match="load_quantized"): load(saved, tmp_path)


def test_too_little_memory_is_said_before_anything_is_read(folders, tmp_path):
    with pytest.raises(InsufficientMemoryError, match="would fit"): load(folders("text, FLUX"), tmp_path, budget=10_000)


def test_a_broken_kernel_falls_back(folders, tmp_path, monkeypatch):
    def broken(network, device): raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(loading, "try_layers", broken)
    pipeline = load(folders("text, FLUX"), tmp_path, fallback=True)
    assert "no kernel image" in pipeline.load_report.fallback and not any(part.layers for part in pipeline.load_report.parts)
    with pytest.raises(ModelLoadError, match="no kernel image"): load(folders("text, FLUX"), tmp_path, fallback=False)
