"What is no pipeline, or cannot be quantized: refused whole, with what is accepted, and nothing of it is left."
import gc, json, os, shutil

import pytest
import torch
from pretended_gpu import pretended
from tiny_pipelines import save

from devsky_nb import load_quantized_pipeline, save_quantized
from devsky_nb.diffusion import load as loading
from devsky_nb.diffusion.backends import check_backend, label_settings
from devsky_nb.errors import DevSkyyError, InsufficientMemoryError, ModelLoadError, ValidationError
from devsky_nb.hub.cache import MANIFEST

REFUSED = (ModelLoadError, ValidationError)


@pytest.fixture(scope="module")
def model(tmp_path_factory): return save("text, FLUX", tmp_path_factory.mktemp("model") / "model")


def load(folder, quantize="int8", backend="bitsandbytes", **options):
    options = {"device": "cpu", "dtype": torch.float32, "fallback": False, "cache_dir": folder.parent / "hub"} | options
    return load_quantized_pipeline(folder, quantize, backend, **options)


def index(**entries):
    "Changes what the index says; None takes an entry away."
    def change(folder):
        file = folder / "model_index.json"
        about = json.loads(file.read_text(encoding="utf-8")) | entries
        file.write_text(json.dumps({name: value for name, value in about.items() if value is not None}), encoding="utf-8")
    return change


def config(part, **entries):
    "Changes what a network's configuration says."
    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    return change


def written(name, text="raise SystemExit('code of the model has run')\n", *changes):
    "Puts a file into the folder."
    def change(folder):
        (folder / name).write_text(text, encoding="utf-8")
        for other in changes: other(folder)
    return change


def pickled(suffix):
    "Leaves a network with a pickle alone."
    def change(folder):
        (file,) = (folder / "transformer").glob("*.safetensors")
        torch.save({}, file.with_suffix(suffix))
        file.unlink()
    return change


def piped(pattern):
    "Puts a pipe in the place of a file, which nobody ever writes to."
    def change(folder):
        (file,) = folder.glob(pattern)
        file.unlink()
        os.mkfifo(file)
    return change


BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
FOLDERS = {  # what is changed in a good folder, and what the error says
    "another class of pipeline": (index(_class_name="MyPipeline"), "MyPipeline"), "no class of pipeline": (index(_class_name=None), "which pipeline it is"),
    "a network as a pipeline": (index(_class_name="FluxTransformer2DModel"), "no pipeline of diffusers"), "a number for a class": (index(_class_name=5), "no name of a class"),
    "a pipeline with code": (written("pipeline.py", changes := "raise SystemExit(1)\n", index(_class_name=["pipeline", "MyPipeline"])), "pipeline"),
    "a network with code": (written("transformer/net.py", changes, index(transformer=["net", "Net"])), "net"),
    "a module of Python": (index(transformer=["os", "system"]), "os"), "a module within": (index(transformer=["diffusers.utils", "load_image"]), "diffusers"),
    "a function": (index(transformer=["diffusers", "logging"]), "transformer|logging"), "no such class": (index(transformer=["diffusers", "NoSuchModel"]), "NoSuchModel"),
    "a scheduler as a network": (index(transformer=["diffusers", "DDIMScheduler"]), "DDIMScheduler"),
    "automatic code": (config("text_encoder", auto_map={"AutoModel": "net.Net"}), "auto_map|code"), "automatic code of others": (config("transformer", auto_map={"AutoModel": "other/repo--net.Net"}), "auto_map|code"),
    "a component that is not there": (index(extra=["diffusers", "AutoencoderKL"]), "extra"), "no network at all": (index(transformer=None), "transformer"),
    "a component of three": (index(transformer=["diffusers", "FluxTransformer2DModel", "x"]), "transformer"), "a component that is a text": (index(transformer="FluxTransformer2DModel"), "transformer"),
    "a component outside": (index(**{"../transformer": ["diffusers", "FluxTransformer2DModel"]}), "transformer"), "an index of nothing": (written("model_index.json", "[]"), "model_index.json"),
    "an index without an end": (written("model_index.json", "[" * 10**5), "model_index.json"), "weights in a pickle": (pickled(".bin"), "pickles|safetensors|weights"),
    "weights in a checkpoint": (pickled(".ckpt"), "pickles|safetensors|weights"), "bits of bitsandbytes": (config("transformer", quantization_config=BITS), "quantized already"),
    "bits in a text encoder": (config("text_encoder_2", quantization_config=BITS), "quantized already"),
    "bits of torchao": (config("transformer", quantization_config={"quant_method": "torchao", "quant_type": {"default": {}}}), "no quantization that this package reads"),
    "bits of nobody": (config("transformer", quantization_config={"quant_method": "mine"}), "no quantization that this package reads"), "bits of nothing": (config("transformer", quantization_config="nf4"), "no quantization that this package reads"),
    "weights in a pipe": (piped("transformer/*.safetensors"), "no regular file"), "a scheduler in a pipe": (piped("scheduler/*.json"), "no regular file"),
    "a tokenizer in a pipe": (piped("tokenizer_2/tokenizer.json"), "no regular file"),
    "a width without an end": (config("transformer", num_attention_heads=10**9), "describes|parameters|transformer"),
    "a configuration of nothing": (config("transformer", num_layers=None), "transformer")}


@pytest.mark.parametrize("quantize, backend", [pytest.param("int8", "bitsandbytes", id="bitsandbytes"), pytest.param("int8", "torchao", id="torchao", marks=pytest.mark.slow),
                                               pytest.param(None, "bitsandbytes", id="as it is", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_what_it_should_be(name, quantize, backend, model, tmp_path):
    if backend == "torchao": pytest.importorskip("torchao")
    folder = shutil.copytree(model, tmp_path / "model")
    FOLDERS[name][0](folder)
    if quantize is None and FOLDERS[name][1] == "quantized already": return  # see below
    with pytest.raises(REFUSED, match=FOLDERS[name][1]): load(folder, quantize, backend)
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.slow
def test_what_others_have_quantized_is_loaded_as_it_is_and_not_again(model, tmp_path):
    saved = save_quantized(load(model), tmp_path / "saved")
    (saved / MANIFEST).unlink()  # as diffusers itself saves it
    ours, theirs = load(model), load(saved, None)
    reports = [sorted((part.name, part.precision, part.layers) for part in pipeline.load_report.parts) for pipeline in (ours, theirs)]
    assert reports[0] == reports[1]
    for name, weight in ours.transformer.state_dict().items(): assert torch.equal(weight, theirs.transformer.state_dict()[name])
    with pytest.raises(ValidationError, match="cannot become"): theirs.to(torch.float16)
    for quantize, backend in (("nf4", "bitsandbytes"), ("fp8", "layerwise"), ({"text_encoder_2": "int8"}, "bitsandbytes")):
        with pytest.raises(ValidationError, match="quantized already"): load(saved, quantize, backend)


IMPOSSIBLE = [  # backend, format, device, dtype, offload
    ("torchao", "int4", "cpu", torch.bfloat16, False), ("torchao", "int4", "mps", torch.bfloat16, False), ("torchao", "int4", "cuda", torch.float16, False),
    ("torchao", "int4", "cuda:1", torch.float32, True), ("torchao", "fp8", "mps", torch.float16, False), ("layerwise", "fp8", "mps", torch.bfloat16, False)]


@pytest.mark.parametrize("backend, label, device, dtype, offload", IMPOSSIBLE)
def test_an_impossible_combination_is_said_before_anything_is_read(backend, label, device, dtype, offload):
    if backend == "torchao": pytest.importorskip("torchao")
    with pytest.raises(ValidationError, match="use"): check_backend(label_settings(label, backend, dtype), device, dtype, offload)


POSSIBLE = [("bitsandbytes", "int8"), ("bitsandbytes", "nf4-dq"), ("torchao", "int8"), ("torchao", "fp8"), ("layerwise", "fp8")]


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend, label", POSSIBLE)
def test_a_possible_combination_draws_on_a_cpu(backend, label, dtype, offload, model):
    if backend == "torchao": pytest.importorskip("torchao")
    pipeline = load(model, label, backend, dtype=dtype, offload=offload)
    assert bool(getattr(pipeline, "_all_hooks", None)) == offload
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red dress", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and (image == image).all()


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("backend, label", [("bitsandbytes", "int8"), ("bitsandbytes", "nf4-dq"), ("layerwise", "fp8")])
def test_what_waits_in_main_memory_leaves_the_card_free(backend, label, offload, model):
    with pretended("cuda", total=8 << 30) as gpu:
        pipeline = load(model, label, backend, device="cuda", offload=offload)
        assert (gpu.used("cuda") < pipeline.load_report.bytes_after / 2) == offload
        pipeline.set_progress_bar_config(disable=True)
        pipeline("a red dress", num_inference_steps=1, height=64, width=64, output_type="np")


DEVICES = {"a device that is not here": ("cuda", "cuda"), "a device of no kind": ("tpu", "tpu"), "no device": (5, "device")}


@pytest.mark.parametrize("device, match", DEVICES.values(), ids=DEVICES)
def test_a_device_that_is_not_here_is_said(device, match, model):
    if device == "cuda" and torch.cuda.is_available(): pytest.skip("it is here")
    with pytest.raises(ValidationError, match=match): load(model, device=device)


def alive():
    "The networks whose weights are in memory; the planner keeps one without."
    gc.collect()
    networks = [thing for thing in gc.get_objects() if type(thing).__name__ == "FluxTransformer2DModel"]
    return sum(not next(network.parameters()).is_meta for network in networks)


@pytest.mark.parametrize("where", ["bring", *(pytest.param(where, marks=pytest.mark.slow) for where in ("load_vae", "try_layers", "load_pipeline"))])
@pytest.mark.parametrize("error, expected", [(RuntimeError("CUDA out of memory"), InsufficientMemoryError), (OSError("broken"), ModelLoadError), (KeyError("x"), ModelLoadError)])
def test_what_fails_on_its_way_is_not_left_in_memory(where, error, expected, model, monkeypatch):
    before = alive()
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(loading, where, fails)
    with pytest.raises(expected) as failed: load(model, "fp8", "layerwise")
    assert isinstance(failed.value, DevSkyyError) and alive() == before  # while the error is still held
