"LoRA on any pipeline: as diffusers itself draws it, completely or not at all, and away again without a trace."
import copy, gc, json, os, pickle, weakref, zipfile

import numpy as np
import pytest
import torch
from hubcache import make_repo
from safetensors.torch import load_file, save_file
from tiny_pipelines import save

from devsky_nb import _core, load_lora, load_quantized, load_quantized_pipeline, ModelRegistry, PipelineGenerator, save_quantized, unload_lora
from devsky_nb.diffusion import lora as lora_module
from devsky_nb.diffusion.lora import adapter_layers, adapter_names, describe_adapters, weights_in_force
from devsky_nb.diffusion.turns import go_back, is_offloaded, keep_state, OwnLoras, place_networks, undisturbed
from devsky_nb.errors import DevSkyyError, FileNotFoundError, InsufficientMemoryError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.weights import model_bytes, networks

LAYERS = ("to_q", "to_v", "q_proj", "v_proj")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("text, SD", "text, SDXL", "text, SD3", "video, Wan")]


def draw(pipeline):
    "What a pipeline draws, as numbers."
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64} if not hasattr(pipeline, "transformer_2") else {"height": 16, "width": 16, "num_frames": 5}
    if type(pipeline).__name__ == "SanaPipeline": options["use_resolution_binning"] = False  # which would draw 1024 pixels
    if type(pipeline).__name__ == "ZImagePipeline": pipeline.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = pipeline("a red dress", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np", **options)
    return (found.images if hasattr(found, "images") else found.frames)[0]


def tensors_for(pipeline, rank=4, scale=.2, seed=0, layers=LAYERS, parts=None):
    "A random LoRA for the networks of a pipeline."
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part in parts or type(pipeline)._lora_loadable_modules:
        network = getattr(pipeline, part, None)
        for name, layer in network.named_modules() if network and part != "transformer_2" else ():
            name = name.replace(".base_layer", "")
            if not (name.endswith(layers) and hasattr(layer, "in_features")): continue
            tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * scale
            tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * scale
    return tensors


def write(pipeline, file, metadata=None, change=lambda tensors: tensors, **options):
    file.parent.mkdir(exist_ok=True, parents=True)
    save_file(change(tensors_for(pipeline, **options)), file, metadata=metadata)
    return file


def settings(**values):
    "What diffusers writes into a file beside the tensors."
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in values.items()})}


def build_of(pipeline):
    "Everything that can be told apart: layers, what they have, and every byte of the weights."
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    layers = [(name, path, id(layer), type(layer), sorted(vars(layer)), layer.training) for name, part in parts.items()
              for path, layer in part.named_modules()]
    weights = [(name, path, id(weight), weight.data_ptr(), weight.requires_grad, weight._version) for name, part in parts.items()
               for path, weight in part.named_parameters()]
    return sorted(vars(pipeline)), layers, weights, adapter_names(pipeline), weights_in_force(pipeline)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    "Loads a pipeline of a kind, each its own."
    folder = tmp_path_factory.mktemp("pipelines")
    def load(kind, quantize=None, backend="bitsandbytes", dtype=torch.float32):
        if kind != "tiny-sdxl" and not (folder / kind).exists(): save(kind, folder / kind)
        model = kind if kind == "tiny-sdxl" else folder / kind
        return load_quantized_pipeline(model, quantize, backend, "cpu", dtype, False, cache_dir=folder / "hub")
    return load


@pytest.fixture(scope="module")
def sdxl(pipelines): return pipelines("tiny-sdxl")


@pytest.fixture(scope="module")
def flux(pipelines): return pipelines("text, FLUX")


@pytest.mark.parametrize("kind", ["text, FLUX", *SLOW])
def test_images_are_those_of_diffusers(kind, pipelines, tmp_path):
    ours, theirs = pipelines(kind), pipelines(kind)
    style, other = write(ours, tmp_path / "style.safetensors"), write(ours, tmp_path / "other.safetensors", seed=1, rank=8)
    plain, before = draw(ours), [layer for network in networks(ours) for layer in network.modules()]
    assert load_lora(ours, style, .75).layers == len(tensors_for(ours)) / 2
    for name, file in {"style": style, "other": other}.items():
        theirs.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=name, local_files_only=True)
    theirs.set_adapters(["style"], [.75])
    alone = draw(ours)
    assert np.array_equal(alone, draw(theirs)) and not np.array_equal(alone, plain)
    load_lora(ours, other, -.5)
    theirs.set_adapters(["style", "other"], [.75, -.5])
    assert np.array_equal(draw(ours), draw(theirs)) and weights_in_force(ours) == {"style": .75, "other": -.5}
    assert unload_lora(ours, "other") == ["other"] and np.array_equal(draw(ours), alone)
    assert unload_lora(ours) == ["style"] and np.array_equal(draw(ours), plain)
    assert before == [layer for network in networks(ours) for layer in network.modules()] and not adapter_names(ours)
    assert all(weight.requires_grad for weight in ours.components.get("transformer", ours.components.get("unet")).parameters())  # torch multiplies otherwise without


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", ["QwenImagePipeline", "ZImagePipeline", "ChromaPipeline", "SanaPipeline"])
def test_further_kinds_are_as_before_when_their_loras_are_gone(kind, quantize, pipelines, tmp_path):
    pipeline = pipelines(kind, quantize)
    first, second = write(pipeline, tmp_path / "first.safetensors", scale=.5), write(pipeline, tmp_path / "second.safetensors", seed=1, rank=8, scale=.5)
    draw(pipeline)  # a processor may pack 4-bit weights anew at the first
    plain = draw(pipeline)
    load_lora(pipeline, first, .75)
    one = draw(pipeline)
    load_lora(pipeline, second, -.5)
    two = draw(pipeline)
    refused(pipeline, ModelLoadError, "LoRA cannot be loaded", write(pipeline, tmp_path / "bad.safetensors", change=lambda tensors: dict(list(tensors.items())[:-1])))
    assert np.array_equal(draw(pipeline), two) and not np.array_equal(one, plain) and not np.array_equal(two, one)
    assert unload_lora(pipeline, "second") == ["second"] and np.array_equal(draw(pipeline), one)
    assert unload_lora(pipeline) == ["first"] and np.array_equal(draw(pipeline), plain)


FORMATS = [("nf4", "bitsandbytes", torch.float32), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    ("int8", "bitsandbytes", torch.float32), ("int8", "torchao", torch.bfloat16), ("fp8", "torchao", torch.bfloat16), ("fp8", "layerwise", torch.bfloat16)))]


@pytest.mark.parametrize("kind", [pytest.param("text, FLUX"), *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tiny-sdxl", "text, SD3"))])
@pytest.mark.parametrize("quantize, backend, dtype", FORMATS)
def test_a_quantized_pipeline_is_as_before_when_its_lora_is_gone(quantize, backend, dtype, kind, pipelines, tmp_path):
    if backend == "torchao": pytest.importorskip("torchao")
    pipeline = pipelines(kind, quantize, backend, dtype)
    draw(pipeline)  # a processor may pack 4-bit weights anew at the first
    plain, size = draw(pipeline), model_bytes(pipeline)
    loaded = load_lora(pipeline, write(pipeline, tmp_path / "style.safetensors", scale=.5))
    kinds = {weight.dtype for layer in adapter_layers(pipeline) for weight in lora_module.adapter_tensors(layer, "style")}
    assert kinds == {dtype} and model_bytes(pipeline) - size == loaded.bytes
    assert not np.array_equal(draw(pipeline), plain)
    unload_lora(pipeline)
    assert np.array_equal(draw(pipeline), plain) and model_bytes(pipeline) == size


def first(part, pair):
    "Changes the first tensor of a network."
    def change_with(how):
        def change(tensors):
            name = next(name for name in tensors if name.startswith(part) and f"lora_{pair}" in name)
            return tensors | {name: how(tensors[name]).contiguous()}
        return change
    return change_with


def renamed(old, new): return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}
def without(what): return lambda tensors: {name: value for name, value in tensors.items() if what not in name}
def added(name, value=torch.ones(1)): return lambda tensors: tensors | {name: value}


CHANGES = {  # what is changed in a good file, and what the error says
    "NaN": (first("text_encoder_2", "B")(lambda t: t * torch.nan), "not finite"), "infinite": (first("unet", "A")(lambda t: t + torch.inf), "not finite"),
    "whole numbers": (first("unet", "A")(lambda t: t.to(torch.int8)), "no fractions"),
    "other width": (first("text_encoder", "A")(lambda t: t[:, :-1]), "the layer has"), "other height": (first("unet", "B")(lambda t: t[:-1]), "the layer has"),
    "ranks that differ": (first("unet", "A")(lambda t: t[:2]), "do not go with each other"), "no rank": (first("unet", "B")(lambda t: t[:, :0]), "do not go with each other"),
    "one half": (lambda tensors: dict(list(tensors.items())[:-1]), "would count|missing"), "only halves": (without("lora_B"), "LoRA cannot be loaded"),
    "of another model": (renamed("unet.", "transformer."), "for another model"), "a part of another": (added("transformer.x.lora_A.weight"), "for another model"),
    "layers that are not there": (renamed("attn1", "attn9"), "LoRA cannot be loaded"), "one layer that is not there": (added("unet.mid_block.none.lora_A.weight", torch.ones(4, 4)), "LoRA cannot be loaded"),
    "weights of the network": (added("unet.conv_in.weight"), "LoRA"), "no LoRA": (renamed("lora_", "lara_"), "no LoRA in it"),
    "a DoRA of kohya": (added("unet.mid_block.dora_scale"), "a DoRA"), "a LoHa": (added("unet.x.hada_w1_a"), "a LoHa"), "a LoKr": (added("unet.x.lokr_w1"), "a LoKr"),
    "a pattern for a name": (added("unet.(a+)+$.lora_B.weight"), "no layer is called so"), "a name without an end": (added("unet." + "a" * 400 + ".lora_A.weight"), "no layer is called so")}
SETTINGS = {
    "a rank without an end": {"r": 10**9}, "no rank at all": {"r": 0}, "a pattern": {"target_modules": "(a+)+$"}, "patterns": {"rank_pattern": {"(a+)+$": 4}},
    "an infinite scale": {"lora_alpha": 1e999}, "other weights": {"init_lora_weights": "pissa"}, "whole layers": {"modules_to_save": ["conv_in"]},
    "layers again": {"layer_replication": [[0, 4]]}, "tokens": {"trainable_token_indices": [1]}, "what nobody knows": {"run": "this"}, "biases": {"bias": "all"}}


def refused(pipeline, expected, match, *args, **options):
    "A call that fails, and leaves everything as it was."
    before = build_of(pipeline)
    with pytest.raises(expected, match=match): load_lora(pipeline, *args, **options)
    gc.collect()
    assert build_of(pipeline) == before


@pytest.mark.parametrize("beside", [pytest.param(False, marks=pytest.mark.slow), True], ids=["the first", "beside another"])
def test_a_file_that_does_not_fit_changes_nothing(beside, sdxl, tmp_path):
    plain = draw(sdxl)
    if beside: load_lora(sdxl, write(sdxl, tmp_path / "good.safetensors"), .5)
    image = draw(sdxl)
    for name, (change, match) in CHANGES.items():
        refused(sdxl, ModelLoadError, match, write(sdxl, tmp_path / "bad.safetensors", change=change))
    for name, values in SETTINGS.items():
        refused(sdxl, ModelLoadError, "settings are not those of a LoRA", write(sdxl, tmp_path / "bad.safetensors", settings(**values)))
    refused(sdxl, ModelLoadError, "settings", write(sdxl, tmp_path / "bad.safetensors", {"lora_adapter_metadata": "[" * 500}))
    refused(sdxl, ModelLoadError, "settings", write(sdxl, tmp_path / "bad.safetensors", {"lora_adapter_metadata": "[1]"}))
    assert np.array_equal(draw(sdxl), image)
    if beside: assert unload_lora(sdxl) == ["good"]
    assert np.array_equal(draw(sdxl), plain)


def test_what_is_no_safetensors_is_refused(sdxl, tmp_path):
    good = write(sdxl, tmp_path / "good.safetensors")
    data, bad = good.read_bytes(), tmp_path / "bad.safetensors"
    header = 8 + int.from_bytes(data[:8], "little")
    contents = {"cut": data[:-1], "cut in its header": data[:20], "empty": b"", "one byte": b"x", "text": b"a LoRA" * 50, "too long": data + b"x",
                "a pickle": pickle.dumps({"unet.a.lora_A": 1}), "a header without an end": (2**60).to_bytes(8, "little") + data[8:],
                "a header of nothing": (64).to_bytes(8, "little") + b" " * 64, "a header of no JSON": data[:8] + b"{" * (header - 8) + data[header:]}
    for name, content in contents.items():
        bad.write_bytes(content)
        refused(sdxl, ModelLoadError, "bad.safetensors", bad)
    with zipfile.ZipFile(bad, "w") as file: file.writestr("archive/data.pkl", b"x" * 5000)
    refused(sdxl, ModelLoadError, "no file of safetensors", bad)
    torch.save(load_file(good), tmp_path / "style.bin")
    refused(sdxl, ValidationError, "a pickle may run code", tmp_path / "style.bin")
    refused(sdxl, ValidationError, "a pickle may run code", str(tmp_path / "style.ckpt")) if (tmp_path / "style.bin").rename(tmp_path / "style.ckpt") else None
    (tmp_path / "folder").mkdir()
    refused(sdxl, ValidationError, "no file of safetensors", tmp_path / "folder")
    (tmp_path / "folder.safetensors").mkdir()
    refused(sdxl, ValidationError, "no file of safetensors", tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(sdxl, ModelLoadError, "no regular file", tmp_path / "pipe.safetensors")
    refused(sdxl, FileNotFoundError, "none.safetensors", tmp_path / "none.safetensors")
    refused(sdxl, FileNotFoundError, "none.safetensors", "none.safetensors")


def test_what_is_no_pipeline_and_what_is_no_lora_is_told_what_would_do(tmp_path, monkeypatch):
    call = "pipeline = load_quantized_pipeline('tiny-sdxl'), then load_lora(pipeline, file)"
    for mistaken in (lambda: load_lora("tiny-sdxl", tmp_path / "a.safetensors"), lambda: unload_lora("tiny-sdxl")):
        with pytest.raises(ValidationError) as caught: mistaken()
        assert call in caught.value.message
    with pytest.raises(ValidationError, match="has LoRAs of its own: generator.load_lora"): load_lora(PipelineGenerator.__new__(PipelineGenerator), "a.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    registry = ModelRegistry(tmp_path, offline=True)
    for name in ("style", "./style", "a/b/style", "/none/style"):
        with pytest.raises(FileNotFoundError, match="no file or folder .*style"): lora_module.find_lora(name, None, registry, None)
    for file in (None, "a.safetensors"):
        with pytest.raises(ModelNotFoundError, match="only LoRAs are loaded beside a pipeline: if it is one, `hf download some/style") as caught: lora_module.find_lora("some/style", file, registry, None)
        assert "tiny-clip" not in str(caught.value) and len(caught.value.details["remedies"]) == 1
    with pytest.raises(ValidationError, match="is a model of kind 'flux', and only LoRAs"): lora_module.find_lora("black-forest-labs/FLUX.1-dev", "a.safetensors", registry, None)


@pytest.mark.slow
def test_wrong_arguments_are_said(sdxl, tmp_path):
    good = write(sdxl, tmp_path / "good.safetensors")
    for weight in (float("nan"), float("inf"), 11, True, "1", None): refused(sdxl, ValidationError, "weight", good, weight)
    for name in ("", "a.b", "a b", "-a", "ä", "x" * 65, 5, ["a"], "half", "keys", "type"): refused(sdxl, ValidationError, "adapter=", good, 1., name)
    for path in (5, None, "", b"x"): refused(sdxl, ValidationError, "path|model", path)
    refused(sdxl, ValidationError, "no revision", good, revision="main")
    refused(sdxl, ValidationError, "is a file: leave", good, file="good.safetensors")
    for file in ("../good.safetensors", "/etc/x.safetensors", 5, ""): refused(sdxl, ValidationError, "file=", tmp_path, file=file)
    for network in ("unet", "transformer_2", 5): refused(sdxl, ValidationError, "network=", good, network=network)
    with pytest.raises(ValidationError, match="no LoRA into a dict"): load_lora({}, good)
    with pytest.raises(ValidationError, match="there is none"): unload_lora(sdxl, "good")
    load_lora(sdxl, good)
    refused(sdxl, ValidationError, "has a LoRA 'good' already", good)
    with pytest.raises(ValidationError, match="there are good"): unload_lora(sdxl, 5)
    unload_lora(sdxl)
    assert unload_lora(sdxl) == []
    assert load_lora(sdxl, write(sdxl, tmp_path / "half.safetensors")).adapter == "half-lora"
    unload_lora(sdxl)


@pytest.mark.slow
def test_names_that_are_words_of_peft_are_names(sdxl, tmp_path):
    plain, good = draw(sdxl), write(sdxl, tmp_path / "good.safetensors")
    load_lora(sdxl, good)
    image = draw(sdxl)
    unload_lora(sdxl)
    for name in ("default", "weight", "lora_A", "base_layer", "unet", "0", "my-lora-style"):
        load_lora(sdxl, good, adapter=name)
        assert np.array_equal(draw(sdxl), image), name
        unload_lora(sdxl, name)
    assert np.array_equal(draw(sdxl), plain)


@pytest.mark.slow
def test_what_a_file_says_of_itself_is_kept_to(sdxl, tmp_path):
    values = {"r": 4, "lora_alpha": 12, "lora_dropout": .5, "target_modules": ["to_q", "to_v"], "use_dora": False, "bias": "none",
              "init_lora_weights": True, "peft_type": "LORA", "loftq_config": {}}
    load_lora(sdxl, write(sdxl, tmp_path / "one.safetensors", settings(**values), parts=["unet"]))
    image = draw(sdxl)
    assert np.array_equal(draw(sdxl), image)  # nothing is dropped by chance
    assert {layer.scaling["one"] for layer in adapter_layers(sdxl)} == {3} and weights_in_force(sdxl) == {"one": 1}
    unload_lora(sdxl)
    load_lora(sdxl, write(sdxl, tmp_path / "two.safetensors", parts=["unet"]), 3.)
    assert np.allclose(draw(sdxl), image, atol=1e-4)
    unload_lora(sdxl)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_in_other_number_formats_are_read(dtype, sdxl, tmp_path):
    plain = draw(sdxl)
    load_lora(sdxl, write(sdxl, tmp_path / "some.safetensors", change=lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}))
    assert {weight.dtype for layer in adapter_layers(sdxl) for weight in lora_module.adapter_tensors(layer, "some")} == {torch.float32}
    assert not np.array_equal(draw(sdxl), plain)
    unload_lora(sdxl)
    assert np.array_equal(draw(sdxl), plain)


@pytest.mark.slow
def test_a_control_lora_is_refused(flux, tmp_path):
    width = flux.transformer.x_embedder.in_features
    wider = {"transformer.x_embedder.lora_A.weight": torch.ones(4, 2 * width), "transformer.x_embedder.lora_B.weight": torch.ones(flux.transformer.x_embedder.out_features, 4)}
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones_like(flux.transformer.transformer_blocks[0].attn.norm_q.weight)}
    config = dict(flux.transformer.config) | vars(flux.transformer.config)
    for extra in (wider, norm):
        refused(flux, ModelLoadError, "control LoRA", write(flux, tmp_path / "control.safetensors", change=lambda tensors: tensors | extra))
    assert dict(flux.transformer.config) | vars(flux.transformer.config) == config


@pytest.mark.slow
def test_what_fails_half_way_leaves_nothing(sdxl, tmp_path, monkeypatch):
    good = write(sdxl, tmp_path / "good.safetensors")
    from diffusers import StableDiffusionXLPipeline as Pipeline
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (torch.OutOfMemoryError("CUDA out of memory"), InsufficientMemoryError), (OSError("no"), ModelLoadError)):
        def fails(self, *args, **kwargs): raise error
        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "load_lora_into_text_encoder", fails)
            refused(sdxl, expected, "", good)
    def changes(path, text):
        good.write_bytes(good.read_bytes() + b"")
        os.utime(good, (1, 1))
        return text
    with monkeypatch.context() as patched:
        digest = lora_module.file_digest
        patched.setattr(lora_module, "file_digest", lambda path: changes(path, digest(path)))
        refused(sdxl, ModelLoadError, "changed while it was read", good)
    with monkeypatch.context() as patched:
        patched.setattr(lora_module, "room_for", lambda needed, device: 10)
        refused(sdxl, InsufficientMemoryError, "the LoRA needs", good)
    with monkeypatch.context() as patched:
        patched.setattr(_core, "find_spec", lambda name: None)
        refused(sdxl, DevSkyyError, r"pip install 'devsky_nb\[diffusion\]'", good)


@pytest.mark.slow
def test_nothing_of_it_stays_in_memory(sdxl, tmp_path):
    load_lora(sdxl, write(sdxl, tmp_path / "good.safetensors"))
    layers = [weakref.ref(layer) for layer in adapter_layers(sdxl)]
    unload_lora(sdxl)
    gc.collect()
    assert layers and not any(layer() for layer in layers)


@pytest.mark.slow
def test_a_hub_id_is_a_name_like_any_other(sdxl, tmp_path):
    files = {name: write(sdxl, tmp_path / f"{name}.safetensors", seed=seed).read_bytes() for seed, name in enumerate(("red", "blue"))}
    commits = "a" * 40, "b" * 40
    revisions = {commits[0]: {"pytorch_lora_weights.safetensors": files["red"], "README.md": b"#"},
                 commits[1]: {"red.safetensors": files["red"], "sub/blue.safetensors": files["blue"]}}
    make_repo(tmp_path / "hub", "shop/style", revisions, {"main": commits[0], "new": commits[1]})
    options = {"cache_dir": tmp_path / "hub", "offline": True}
    found = load_lora(sdxl, "shop/style", **options)
    assert (found.adapter, found.file, found.revision) == ("style", "shop/style/pytorch_lora_weights.safetensors", commits[0])
    unload_lora(sdxl)
    refused(sdxl, ValidationError, "name one, such as file='red.safetensors'", "shop/style", revision="new", **options)
    found = load_lora(sdxl, "shop/style", file="sub/blue.safetensors", revision=commits[1][:8], **options)
    assert (found.adapter, found.revision) == ("blue", commits[1])
    unload_lora(sdxl)
    refused(sdxl, ModelNotFoundError, "green.safetensors|not in the cache", "shop/style", file="green.safetensors", **options)
    refused(sdxl, ModelNotFoundError, "offline=True|HF_HUB_OFFLINE", "shop/other", **options)
    refused(sdxl, ValidationError, "file=", "shop/style", file="x.bin", **options)
    refused(sdxl, FileNotFoundError, "no file or folder '.*tiny-clip': name a LoRA's file, or a Hub id", "tiny-clip", **options)


def test_a_pipeline_that_others_have_is_not_changed(tmp_path):
    registry = ModelRegistry(cache_dir=tmp_path / "hub", device="cpu")
    with registry.lease("tiny-sdxl", dtype=torch.float32) as shared:
        good = write(shared, tmp_path / "good.safetensors")
        refused(shared, ValidationError, "shared by all", good)
        refused(type(shared)(**shared.components), ValidationError, "shared by all", good)
        with pytest.raises(ValidationError, match="shared by all"): unload_lora(shared)
        keep_state(shared)
        plain = draw(shared)
        mine, yours = OwnLoras(shared), OwnLoras(shared)
        mine.load(shared, good, registry, .5)
        yours.load(shared, write(shared, tmp_path / "other.safetensors", seed=1), registry, adapter="good")
        images = []
        for user in (mine, yours, mine):
            with undisturbed(shared, loras=user.weights):
                images.append(draw(shared))
                assert [entry["name"] for entry in describe_adapters(shared)] == ["good"]
        assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[1])
        assert np.array_equal(draw(shared), plain) and not describe_adapters(shared)
        shared.load_lora_weights(str(tmp_path), weight_name="good.safetensors", adapter_name="foreign", local_files_only=True)
        assert not np.array_equal(draw(shared), plain)
        go_back(shared)
        assert np.array_equal(draw(shared), plain)
        assert mine.unload(shared) == ["good"] and not mine.weights
        del yours
        go_back(shared)
        assert adapter_names(shared) == ["foreign"]


@pytest.mark.slow
def test_a_pipeline_with_loras_is_not_saved_as_one_without(pipelines, tmp_path):
    pipeline = pipelines("tiny-sdxl", "int8")
    load_lora(pipeline, write(pipeline, tmp_path / "good.safetensors"))
    with pytest.raises(ValidationError, match="has LoRAs .good."): save_quantized(pipeline, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    unload_lora(pipeline)
    plain = draw(pipeline)
    again = load_quantized(save_quantized(pipeline, tmp_path / "saved"), "cpu")
    assert np.array_equal(draw(again), plain)


@pytest.mark.slow
def test_what_is_fused_is_said(pipelines, tmp_path):
    pipeline = pipelines("text, FLUX")
    load_lora(pipeline, write(pipeline, tmp_path / "good.safetensors"))
    pipeline.fuse_lora(components=["transformer"])
    for adapter in (None, "good"):
        with pytest.raises(ValidationError, match="good is fused into the weights"): unload_lora(pipeline, adapter)
    pipeline.unload_lora_weights()
    assert describe_adapters(pipeline) == [{"name": "good", "weight": None, "file": None, "sha256": None}]


@pytest.mark.slow
def test_what_was_loaded_otherwise_is_named_too(sdxl, tmp_path):
    load_lora(sdxl, write(sdxl, tmp_path / "mine.safetensors"), .3)
    write(sdxl, tmp_path / "theirs.safetensors", seed=1)
    sdxl.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors", adapter_name="theirs", local_files_only=True)
    sdxl.set_adapters(["mine", "theirs"], [.7, .2])
    found = {entry["name"]: entry for entry in describe_adapters(sdxl)}
    assert found["mine"]["weight"] == .7 and len(found["mine"]["sha256"]) == 64
    assert found["theirs"] == {"name": "theirs", "weight": .2, "file": None, "sha256": None}
    assert describe_adapters(copy.deepcopy(sdxl)) == describe_adapters(sdxl)
    sdxl.disable_lora()
    assert describe_adapters(sdxl) == []
    assert sorted(unload_lora(sdxl)) == ["mine", "theirs"]


@pytest.mark.slow
def test_offload_stays_as_it_was(sdxl, tmp_path):
    pipeline = copy.deepcopy(sdxl)
    plain = draw(pipeline)
    place_networks(pipeline, "cpu", True)
    good = write(pipeline, tmp_path / "good.safetensors")
    load_lora(pipeline, good)
    assert is_offloaded(pipeline) and not np.array_equal(draw(pipeline), plain)
    unload_lora(pipeline)
    assert is_offloaded(pipeline) and np.array_equal(draw(pipeline), plain)
    refused(pipeline, ModelLoadError, "", write(pipeline, tmp_path / "bad.safetensors", change=CHANGES["other width"][0]))
    assert is_offloaded(pipeline) and np.array_equal(draw(pipeline), plain)
    place_networks(pipeline, "cpu", False)
    pipeline.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    refused(pipeline, ValidationError, "load a LoRA first", good)


@pytest.mark.slow
def test_each_of_two_denoisers_can_have_its_own(pipelines, tmp_path):
    pipeline = pipelines("video, Wan")
    plain, good = draw(pipeline), write(pipeline, tmp_path / "good.safetensors")
    load_lora(pipeline, good, adapter="second", network="transformer_2")
    assert adapter_layers(pipeline.transformer_2) and not adapter_layers(pipeline.transformer)
    load_lora(pipeline, good, .5, adapter="first")
    assert weights_in_force(pipeline) == {"first": .5, "second": 1} and not np.array_equal(draw(pipeline), plain)
    assert sorted(unload_lora(pipeline)) == ["first", "second"] and np.array_equal(draw(pipeline), plain)
