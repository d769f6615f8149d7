"Quantized loading: against diffusers' own route, under wrong calls, little memory, broken kernels and bad disks."
import copy, gc, io, json, logging, multiprocessing, os, pickle, resource, shutil, signal, subprocess, sys, time, weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import diffusers
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn.modules import Linear4bit, has_avx512bf16
from diffusers import PipelineQuantizationConfig, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from transformers import CLIPTextModel
from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit
from patience import PATIENCE

from devsky_nb import QuantizedSDXLGenerator
from devsky_nb.device import detect_device, MemoryInfo, process_memory, release_memory
from devsky_nb.diffusion import checkpoint, load as loading, networks, quantization
from devsky_nb.diffusion.checkpoint import (
    checkpoint_folder,
    from_cache,
    load_quantized,
    save_quantized,
    write_checkpoint,
)
from devsky_nb.diffusion.load import build, LoadReport, make_request, weight_bytes
from devsky_nb.diffusion.networks import guard, load_network, load_on_cpu, repacked
from devsky_nb.diffusion.quantization import bnb_settings, PARTS, quantized_layers
from devsky_nb.diffusion.pipelines import load_with_settings
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load_v1
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v2 as load_v2
from devsky_nb.errors import InsufficientMemoryError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.cache import cache_report, MANIFEST
from devsky_nb.hub.load import quiet
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.hub.weights import model_bytes
from devsky_nb.memory.estimate import estimate_vram
from devsky_nb.memory.emitted import FIXED_VAE

TINY = locate_model("tiny-sdxl")
KINDS = {"nf4": {"double_quant": False}, "nf4-dq": {}, "int8": {"use_4bit": False}}
DEFAULT = dict.fromkeys(PARTS, bnb_settings(compute_dtype=torch.float32))


def load(cache, model="tiny-sdxl", loader=load_v1, **options):
    return loader(model, device="cpu", cache_dir=cache/"hub", offline=True, **options)


def request_for(model, cache, settings=None, dtype=None):
    "The request that `load` makes of a model."
    return make_request(
        model, ModelRegistry(cache / "hub", offline=True), "cpu", dtype, DEFAULT if settings is None else settings
    )


def draw(pipeline, steps=1) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red t-shirt",
        num_inference_steps=steps,
        height=64,
        width=64,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def repack(pipeline):
    "Draw; what a processor with AVX512-BF16 does to 4-bit weights then is done here on any other."
    draw(pipeline)
    for layer in (m for name in PARTS for m in getattr(pipeline, name).modules() if isinstance(m, Linear4bit)):
        weight = layer.weight
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def states(pipeline):
    return {name: getattr(pipeline, name).state_dict() for name in (*PARTS, "vae")}


def same_bytes(a, b):
    return all(
        a[n].keys() == b[n].keys()
        and all(torch.equal(a[n][k], b[n][k]) and a[n][k].dtype == b[n][k].dtype for k in a[n])
        for n in a
    )


def kept(cache):
    "What the cache of quantized checkpoints shows, and what it hides."
    names = sorted(p.name for p in (cache/"hub-quantized").glob("*")) if (cache/"hub-quantized").is_dir() else []
    return [n for n in names if n[0] != "."], [n for n in names if n[0] == "."]


def tiny(folder, **parts):
    "A copy of tiny-sdxl, some of its networks exchanged."
    with quiet("transformers", "diffusers"):
        StableDiffusionXLPipeline.from_pretrained(
            TINY, dtype=torch.float32, local_files_only=True, **parts
        ).save_pretrained(folder)
    return folder


def unet(*channels, cross=128, **options):
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(TINY / "unet")
        | {"block_out_channels": channels, "cross_attention_dim": cross}
        | options
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    "A cache that has tiny-sdxl in nf4 with double quantization, its account, its weights and its image."
    cache = tmp_path_factory.mktemp("usual")
    pipeline = load(cache)
    state = {n: {k: v.clone() for k, v in s.items()} for n, s in states(pipeline).items()}
    return cache, pipeline.load_report, state, draw(pipeline)


@pytest.fixture
def cached(usual, tmp_path):
    "A copy of that cache, to be spoilt."
    checkpoint = Path(usual[1].checkpoint)
    return tmp_path, shutil.copytree(checkpoint, tmp_path/"hub-quantized"/checkpoint.name)


@pytest.fixture(params=[True, False], ids=["repacks", "does not repack"])
def repacks(request, monkeypatch):
    "Both kinds of processor, pretended: with AVX512-BF16, for which bitsandbytes repacks 4-bit weights, and without."
    for module in (quantization, checkpoint): monkeypatch.setattr(module, "repacks", lambda: request.param)
    if not request.param: monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return request.param


@pytest.fixture
def on_cpu(monkeypatch):
    "diffusers' own route on a CPU: its question for a GPU is answered, nothing else is touched."
    for cls in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(cls, "validate_environment", lambda self, *a, **k: None)
        monkeypatch.setattr(cls, "update_device_map", lambda self, device_map: {"": "cpu"})
    for cls in (quantizer_bnb_4bit.Bnb4BitHfQuantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer):
        monkeypatch.setattr(cls, "update_device_map", lambda self, device_map: {"": "cpu"})


@pytest.fixture(scope="module")
def processes():
    "Fresh processes that have imported everything and done nothing."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",
            "bitsandbytes",
            "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
            "diffusers.quantizers.auto",
            "transformers.models.clip.modeling_clip",
            "transformers.models.clip.tokenization_clip",
            "devsky_nb.diffusion.sdxl",
        ]
    )
    return context


def in_process(processes, target, *args):
    "What `target` returns in a process of its own."
    queue = processes.SimpleQueue()
    process = processes.Process(target=answer, args=(queue, target, *args))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, process.exitcode
    return queue.get()


def answer(queue, target, *args):
    torch.set_num_threads(1)
    queue.put(target(*args))


# --- the same as the libraries' own route

@pytest.mark.parametrize("kind", KINDS)
def test_our_route_equals_the_libraries(kind, on_cpu, tmp_path):
    settings = bnb_settings(compute_dtype=torch.float32, **KINDS[kind])
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{8 if kind == 'int8' else 4}bit",
        quant_kwargs=settings,
        components_to_quantize=list(PARTS),
    )
    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    ours = load(tmp_path, **KINDS[kind])
    request = request_for("tiny-sdxl", tmp_path, dict.fromkeys(PARTS, settings), None)
    report = LoadReport("tiny-sdxl", None, kind, "cpu:0", "float32", "auto", {})
    with quiet("transformers", "diffusers"):
        theirs = StableDiffusionXLPipeline.from_pretrained(TINY, quantization_config=config, **options)
        theirs.save_pretrained(tmp_path/"theirs")
        as_on_gpu = build(replace(request, device="cpu:0"), report, config)  # the branch that a GPU takes
        read_by_them = StableDiffusionXLPipeline.from_pretrained(ours.load_report.checkpoint, **options)
        unet_by_us = load_on_cpu(tmp_path/"theirs"/"unet", torch.float32, None)
    assert ours.load_report.label == kind == report.label and ours.load_report.fallback is None
    expected, layers = states(theirs), [(n, type(m).__name__) for n, m in theirs.unet.named_modules()]
    for other in (ours, as_on_gpu, read_by_them):
        assert [(n, type(m).__name__) for n, m in other.unet.named_modules()] == layers
        assert same_bytes(expected, states(other))
    assert same_bytes({"unet": expected["unet"]}, {"unet": unet_by_us.state_dict()})
    assert [(p.name, p.precision, p.layers, p.bytes_after) for p in report.parts] == [
        (p.name, p.precision, p.layers, p.bytes_after) for p in ours.load_report.parts
    ]
    assert sum(p.layers for p in report.parts) == 120 and report.bytes_read == ours.load_report.bytes_read
    images = [draw(p) for p in (theirs, ours, as_on_gpu, read_by_them)]
    assert all(np.array_equal(images[0], i) for i in images[1:]) and images[0].std() > .01
    with pytest.raises(ValidationError): as_on_gpu.unet.half()


def test_both_patterns_give_the_same(usual):
    second = load(usual[0], loader=load_v2)
    assert second.load_report.from_checkpoint and second.load_report.checkpoint == usual[1].checkpoint
    assert second.load_report.asked["pattern"] == "v2" and usual[1].asked["pattern"] == "v1"
    assert np.array_equal(draw(second), usual[3])


@pytest.mark.parametrize("loader", [load_v1, load_v2])
def test_the_cpu_may_have_a_number(loader, tmp_path):
    report = loader("tiny-sdxl", device="cpu:0", cache_dir=tmp_path/"hub", offline=True).load_report
    assert report.label == "nf4-dq" and report.fallback is None, report.fallback


# --- layers that would crash

@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "A pipeline with linear layers of sizes that a processor with AVX512-BF16 cannot run in 4 bits."
    torch.manual_seed(0)
    texts = CLIPTextModel.config_class.from_pretrained(TINY/"text_encoder")
    texts.hidden_size, texts.intermediate_size = 48, 200
    return tiny(tmp_path_factory.mktemp("odd")/"odd", unet=unet(32, 96, cross=112), text_encoder=CLIPTextModel(texts))


def test_layers_that_would_crash_are_left_alone(odd, tmp_path, repacks):
    pipeline = load(tmp_path, odd)
    alone = {p.name: p.left_alone for p in pipeline.load_report.parts}
    for name in PARTS:
        linear = {n: m for n, m in getattr(pipeline, name).named_modules() if isinstance(m, torch.nn.Linear)}
        bad = {n for n, m in linear.items() if m.in_features % 64 or m.out_features % 32}
        assert bool(bad) == (name != "text_encoder_2") and set(alone[name]) == (bad if repacks else set())
        assert {n for n, m in linear.items() if type(m) is torch.nn.Linear} >= set(alone[name])
        assert (sum(type(m) is not torch.nn.Linear for m in linear.values()) > 0) == (
            name != "text_encoder" or not repacks
        )
    first = draw(pipeline)
    assert np.isfinite(first).all() and first.std() > .01
    assert ("left alone, such as" in repr(pipeline.load_report)) == repacks
    again = load(tmp_path, odd)
    assert again.load_report.from_checkpoint and {p.name: p.left_alone for p in again.load_report.parts} == alone
    assert np.array_equal(draw(again), first)
    assert not any(p.left_alone for p in load(tmp_path, odd, use_4bit=False).load_report.parts)


def run_layer(inputs, outputs):
    "The signal or error of one 4-bit layer's first call."
    layer = torch.nn.Linear(inputs, outputs)
    four = bitsandbytes.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type="nf4")
    four.load_state_dict(layer.state_dict())
    try:
        with torch.inference_mode(): four.to("cpu").eval()(torch.randn(4, inputs))
    except Exception as e: return f"{type(e).__name__}: {e}"


@pytest.mark.slow
def test_such_layers_do_crash_on_such_a_processor_and_on_no_other(processes):
    assert in_process(processes, run_layer, 64, 32) is None
    for sizes in ((96, 64), (64, 48)):
        crashed = in_process(processes, run_layer, *sizes)
        assert bool(crashed) == bool(
            has_avx512bf16()
        ), f"{sizes}: {crashed or 'no crash'}. If it no longer crashes anywhere, crashing_layers can go"


# --- wrong calls

def config_of(library, **settings): return library.BitsAndBytesConfig(**settings or {"load_in_4bit": True})


def pipeline_config(components=("unet",), backend="bitsandbytes_4bit", **settings):
    return PipelineQuantizationConfig(
        quant_backend=backend,
        quant_kwargs=settings or {"load_in_4bit": True},
        components_to_quantize=components and list(components),
    )


def broken(config, **attributes):
    "A configuration whose attributes are set after its own checks."
    for name, value in attributes.items(): setattr(config, name, value)
    return config


WRONG = {  # the call; what the message must say: the value, and the remedy
    "transformers' config for a pipeline": (
        lambda: load_v1("tiny-sdxl", quantization_config=config_of(transformers)),
        ["BitsAndBytesConfig", "PipelineQuantizationConfig(", "load_in_4bit"],
    ),
    "diffusers' config for a pipeline": (
        lambda: load_v1("tiny-sdxl", quantization_config=config_of(diffusers, load_in_8bit=True)),
        ["BitsAndBytesConfig", "PipelineQuantizationConfig(", "load_in_8bit"],
    ),
    "pipeline config for networks": (
        lambda: load_v2("tiny-sdxl", quantization_config=pipeline_config()),
        ["PipelineQuantizationConfig", "load_sdxl_pipeline_with_quantization_v1"],
    ),
    "4-bit flag, v1": (
        lambda: load_v1("tiny-sdxl", load_in_4bit=True),
        ["load_in_4bit", "full precision", "PipelineQuantizationConfig("],
    ),
    "8-bit flag, v1": (
        lambda: load_v1("tiny-sdxl", load_in_8bit=True),
        ["load_in_8bit", "full precision", '"load_in_8bit": True'],
    ),
    "4-bit flag, v2": (
        lambda: load_v2("tiny-sdxl", load_in_4bit=True),
        ["load_in_4bit", "PipelineQuantizationConfig("],
    ),
    "8-bit flag, plain": (
        lambda: load_with_settings("tiny-sdxl", load_in_8bit=True),
        ["load_in_8bit", "PipelineQuantizationConfig("],
    ),
    "config, plain": (
        lambda: load_with_settings("tiny-sdxl", quantization_config=config_of(transformers)),
        ["BitsAndBytesConfig", "PipelineQuantizationConfig("],
    ),
    "4-bit backend, 8-bit flag": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(load_in_8bit=True)),
        ["bitsandbytes_4bit", "load_in_8bit=True", '"bitsandbytes_8bit"'],
    ),
    "8-bit backend, 4-bit flag": (
        lambda: load_v1(
            "tiny-sdxl", quantization_config=pipeline_config(backend="bitsandbytes_8bit", load_in_4bit=True)
        ),
        ["bitsandbytes_8bit", "load_in_4bit=True", '"bitsandbytes_4bit"'],
    ),
    "both flags": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(load_in_4bit=True, load_in_8bit=True)),
        ["load_in_4bit and load_in_8bit", "choose one"],
    ),
    "neither flag": (
        lambda: load_v1(
            "tiny-sdxl", quantization_config=pipeline_config(backend="bitsandbytes_8bit", llm_int8_threshold=6.0)
        ),
        ["neither load_in_4bit nor load_in_8bit", "choose one"],
    ),
    "no components in the config": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(None)),
        ["components_to_quantize", "VAE", "text_encoder_2"],
    ),
    "no components": (lambda: load_v1("tiny-sdxl", components=()), ["components_to_quantize", "VAE", "text_encoder_2"]),
    "a text for components": (lambda: load_v1("tiny-sdxl", components="unet"), ["components is a list", "['unet']"]),
    "a number for components": (lambda: load_v1("tiny-sdxl", components=5), ["components is a list", "5"]),
    "numbers for components": (lambda: load_v1("tiny-sdxl", components=[5]), ["components is a list", "[5]"]),
    "a model of another kind": (lambda: load_v1("tiny-clip"), ["only Stable Diffusion XL pipelines", "tiny-sdxl"]),
    "misspelt component": (
        lambda: load_v1("tiny-sdxl", components=("unet", "text_encodr")),
        ["'text_encodr'", "did you mean 'text_encoder'"],
    ),
    "misspelt in the config": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(["u-net"])),
        ["'u-net'", "did you mean 'unet'"],
    ),
    "tokenizer": (lambda: load_v1("tiny-sdxl", components=("tokenizer",)), ["'tokenizer'", "There are unet"]),
    "scheduler": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(["scheduler"])),
        ["'scheduler'", "There are unet"],
    ),
    "misspelt, v2": (
        lambda: load_v2("tiny-sdxl", quantization_config={"unett": config_of(diffusers)}),
        ["'unett'", "did you mean 'unet'"],
    ),
    "mapping, bad name": (
        lambda: load_v1(
            "tiny-sdxl",
            quantization_config=PipelineQuantizationConfig(quant_mapping={"text_encoder_3": config_of(transformers)}),
        ),
        ["'text_encoder_3'", "did you mean 'text_encoder_2'"],
    ),
    "mapping, neither flag": (
        lambda: load_v1(
            "tiny-sdxl",
            quantization_config=PipelineQuantizationConfig(
                quant_mapping={"unet": config_of(diffusers, llm_int8_threshold=6.0)}
            ),
        ),
        ["neither", "choose one"],
    ),
    "mapping, both flags": (
        lambda: load_v1(
            "tiny-sdxl",
            quantization_config=PipelineQuantizationConfig(
                quant_mapping={"unet": broken(config_of(diffusers), _load_in_8bit=True)}
            ),
        ),
        ["both True", "choose one"],
    ),
    "neither flag, v2": (
        lambda: load_v2("tiny-sdxl", quantization_config=config_of(transformers, llm_int8_threshold=6.0)),
        ["neither", "choose one"],
    ),
    "a text for a config, v2": (lambda: load_v2("tiny-sdxl", quantization_config="nf4"), ["neither"]),
    "a config and nothing to quantize, v2": (
        lambda: load_v2(
            "tiny-sdxl", quantize_unet=False, quantize_text_encoders=False, quantization_config=config_of(diffusers)
        ),
        ["quantize_unet"],
    ),
    "unknown setting": (
        lambda: load_v1("tiny-sdxl", quantization_config=pipeline_config(load_in_4bit=True, bnb_4bit_quant_typ="nf4")),
        ["bnb_4bit_quant_typ"],
    ),
    "unknown option": (lambda: load_v1("tiny-sdxl", quantise=True), ["quantise"]),
    "old dtype": (lambda: load_v1("tiny-sdxl", torch_dtype=torch.float32), ["torch_dtype", "dtype="]),
    "old dtype, plain": (lambda: load_with_settings("tiny-sdxl", torch_dtype=torch.float32), ["torch_dtype", "dtype="]),
    "dtype as a text": (lambda: load_v1("tiny-sdxl", dtype="float16"), ["'float16'", "torch.float16"]),
    "dtype of integers": (lambda: load_v2("tiny-sdxl", dtype=torch.int8), ["torch.int8", "torch.float16"]),
    "no such device": (lambda: load_v1("tiny-sdxl", device="cuda:7"), ["'cuda:7'", f"use {detect_device()!r}"]),
    "no such device, v2": (lambda: load_v2("tiny-sdxl", device="tpu"), ["device='tpu': no such device", "'cuda' and its numbers"]),
    "a text for a flag": (lambda: load_v1("tiny-sdxl", "no"), ["use_4bit='no'", "True or False"]),
    "a text for a flag, v2": (lambda: load_v2("tiny-sdxl", "no"), ["quantize_unet='no'", "True or False"]),
    "no folder to read": (lambda: load_quantized(None), ["folder=None", "a path"]),
    "no folder to write": (lambda: save_quantized(None, "a\0b"), ["folder=", "a path"]),
    "no such vae": (lambda: load_v1("tiny-sdxl", vae="fp8"), ["'fp8'", "fp16-fix"]),
    "upcast from bf16": (lambda: load_v1("tiny-sdxl", vae="upcast", dtype=torch.bfloat16), ["upcast", "vae='fp32'"]),
}


@pytest.fixture
def nothing_loaded(monkeypatch):
    "A test fails that begins to load a network."
    for module, names in {
        loading: ("load_network", "load_vae"),
        networks: ("load_part", "load_on_cpu"),
        checkpoint: ("load_part", "load_on_cpu"),
    }.items():
        for name in names: monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a network was loaded"))


def modules(): return sum(issubclass(type(o), torch.nn.Module) for o in gc.get_objects())


def test_wrong_calls_are_refused_before_anything_is_loaded(monkeypatch, tmp_path, nothing_loaded):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    gc.collect()
    errors, wrong, before = [], [], modules()
    for name, (call, words) in WRONG.items():
        try: errors.append((name, call()))
        except ValidationError as e:
            errors.append((name, e))
            wrong += [f"{name}: {w} is not in {e}" for w in words if w not in str(e)]
            wrong += [f"{name}: without details"] if not (e.details and json.dumps(e.to_dict())) else []
        except Exception as e: wrong.append(f"{name}: {type(e).__name__} {e}")
        else: wrong.append(f"{name}: was accepted")
    assert not wrong, "\n".join(wrong)
    assert modules() == before and not kept(tmp_path)[0]


def test_a_mapping_chooses_settings_for_each_network(tmp_path):
    mapping = {
        "unet": config_of(diffusers, load_in_8bit=True),
        "text_encoder_2": config_of(
            transformers, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    }
    for loader, given in ((load_v1, PipelineQuantizationConfig(quant_mapping=mapping)), (load_v2, mapping)):
        pipeline = load(tmp_path, loader=loader, quantization_config=given)
        assert {p.name: p.precision for p in pipeline.load_report.parts} == {
            "unet": "int8",
            "text_encoder": "float32",
            "text_encoder_2": "nf4",
            "vae": "float32",
        }
        assert pipeline.load_report.label == "int8+nf4" and pipeline.load_report.from_checkpoint == (loader is load_v2)


@pytest.mark.parametrize("options", [{}, {"use_4bit": False}], ids=["4 bits", "8 bits"])
def test_casts_are_refused_and_change_nothing(options, usual):
    pipeline = load(usual[0], **options)
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in states(pipeline).items()}
    assert len([p for p in pipeline.load_report.parts if p.layers]) == 3
    for model in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        for cast in (
            model.half,
            model.float,
            model.bfloat16,
            model.double,
            lambda: model.to(torch.float16),
            lambda: model.to("cpu", torch.bfloat16),
            lambda: model.to(dtype=torch.float16),
            lambda: model.to(torch.zeros(1, dtype=torch.float64)),
            lambda: model.type(torch.float16),
        ):
            with pytest.raises(
                ValidationError, match=f"{type(model).__name__} cannot become .*float.*Give dtype= when you load it"
            ):
                cast()
    for cast in (
        lambda: pipeline.to(torch.float16),
        lambda: pipeline.to("cpu", torch.float16),
        lambda: pipeline.to(dtype=torch.bfloat16),
    ):
        with pytest.raises(ValidationError, match="StableDiffusionXLPipeline cannot become"): cast()
    assert pipeline.to("cpu") is pipeline and same_bytes(before, states(pipeline))
    assert isinstance(pipeline, StableDiffusionXLPipeline) and pipeline.vae.half().dtype == torch.float16


def test_what_ran_on_the_cpu_is_not_moved_to_a_gpu(usual):
    pipeline = load(usual[0])
    assert not repacked(pipeline)
    repack(pipeline)
    for move in (lambda: pipeline.to("cuda"), lambda: pipeline.unet.to("cuda:0"), lambda: pipeline.text_encoder.cuda()):
        with pytest.raises(ValidationError, match="repacks 4-bit weights: load it again with device='cuda"): move()


def test_a_guard_leaves_the_class_alone(usual, tmp_path):
    pipeline = load(usual[0])
    unet, state = pipeline.unet, pipeline.unet.state_dict()
    assert (
        type(unet) is UNet2DConditionModel
        and type(pipeline) is StableDiffusionXLPipeline
        and type(pipeline.text_encoder) is CLIPTextModel
    )
    copied, pickled = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
    for other in (copied, pickled):
        assert type(other) is type(unet) and same_bytes({"unet": other.state_dict()}, {"unet": state})
        with pytest.raises(ValidationError, match="cannot become"): other.half()
        assert other.to("cpu") is other is not unet  # its guards are its own
    unet.save_pretrained(tmp_path/"unet")
    assert (
        json.loads((tmp_path / "unet" / "config.json").read_text(encoding="utf-8"))["_class_name"]
        == "UNet2DConditionModel"
    )
    guard(unet)
    assert quantized_layers(unet) == 96 and unet.to("cpu") is unet  # a second guard does nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_can_be_pickled_and_copied_before_and_after_an_image(kind, tmp_path):
    pipeline = load(tmp_path, quantize_once=False, **KINDS[kind])
    early = [pickle.dumps(pipeline), pickle.dumps(pipeline.text_encoder_2)]
    image = draw(pipeline)  # transformers has put hooks into the text encoders now
    hooks = [len(layer._forward_hooks) for layer in pipeline.text_encoder.modules()]
    again = [pickle.loads(early[0]), pickle.loads(pickle.dumps(pipeline)), copy.deepcopy(pipeline)]
    for other in again:
        assert np.array_equal(draw(other), image) and other.load_report == pipeline.load_report
        for name in PARTS:
            network = getattr(other, name)
            assert network is not getattr(pipeline, name) and network.to("cpu") is network
            with pytest.raises(ValidationError, match="cannot become"): network.half()
        with pytest.raises(ValidationError, match="cannot become"): other.to(torch.float16)
    assert hooks == [len(layer._forward_hooks) for layer in pipeline.text_encoder.modules()]
    with io.BytesIO() as file:
        torch.save(pipeline.text_encoder, file)
        file.seek(0)
        assert type(torch.load(file, weights_only=False)) is CLIPTextModel


def test_a_move_that_names_the_present_format_is_let_through(usual):
    pipeline = load(usual[0])
    for model in (pipeline.unet, pipeline.text_encoder, pipeline):  # as when diffusers loads an adapter
        assert model.to("cpu", dtype=model.dtype) is model.to("cpu", model.dtype) is model.to(torch.zeros(1)) is model
    pipeline.unet.to(memory_format=torch.channels_last)
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_guarded_model_dies_with_its_last_reference(usual):
    pipeline = load(usual[0])
    seen = [weakref.ref(pipeline), weakref.ref(pipeline.unet)]
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert [ref() for ref in seen] == [None, None]
    finally: gc.enable()


# --- memory

def declared(path, tensors):
    "A safetensors file whose header promises `tensors`; its data is a hole that takes no room on the disk."
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape, dtype=object))
        header[name], at = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}, at + size
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)


def test_too_little_memory_is_known_from_the_headers(tmp_path, nothing_loaded):
    shutil.copytree(TINY, tmp_path/"huge")
    declared(
        tmp_path / "huge" / "unet" / "diffusion_pytorch_model.safetensors",
        {"conv_in.weight": (1 << 18, 1 << 9, 3, 3), "proj.weight": (1 << 20, 1 << 18)},
    )
    assert os.stat(tmp_path/"huge"/"unet"/"diffusion_pytorch_model.safetensors").st_size > 1 << 39
    for options in ({}, {"use_4bit": False}, {"loader": load_v2}, {"loader": load_with_settings}):
        with pytest.raises(InsufficientMemoryError, match="Nothing would fit: the smallest, nf4-dq, needs 1"):
            load(tmp_path, tmp_path / "huge", **options)


def test_what_would_fit_is_said(tmp_path):
    labels = {None: "float32", **{label: label for label in ("int8", "nf4", "nf4-dq")}}
    sizes = {
        name: weight_bytes(TINY, torch.float32, label and dict.fromkeys(PARTS, label)) for label, name in labels.items()
    }
    order = sorted(sizes, key=sizes.get)
    assert order == ["nf4", "nf4-dq", "int8", "float32"]  # in layers as small as these tables outweigh scales
    for i, label in enumerate(order):
        with pytest.raises(InsufficientMemoryError) as e: load(tmp_path, loader=load_with_settings, budget=sizes[label] - 1)
        assert e.value.details["fits"] == {k: sizes[k] for k in order[:i]} and e.value.details["sizes"] == sizes
        assert e.value.details["needed"] == sizes["float32"] and e.value.details["free"] == sizes[label] - 1
        assert all(f"{k} (" in str(e.value) for k in order[:i]) and ("Nothing would fit" in str(e.value)) == (i == 0)
    assert load(tmp_path, loader=load_with_settings, budget=sizes["float32"]).load_report.label == "float32"
    with pytest.raises(InsufficientMemoryError): load(tmp_path, budget=sizes["nf4-dq"] - 1)


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_the_estimate_is_what_it_takes(kind, large):
    network, alone = load_network(large/"unet", torch.float16, bnb_settings(**KINDS[kind]), "cpu")
    estimate, measured = weight_bytes(large/"unet", torch.float16, {"unet": kind}), model_bytes(network)
    assert not alone and abs(estimate/measured - 1) < .02, (estimate, measured)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "A pipeline whose UNet has large linear layers."
    wide = unet(64, 384, transformer_layers_per_block=[1, 4], attention_head_dim=[2, 6]).half()
    return tiny(tmp_path_factory.mktemp("large")/"large", unet=wide)


# --- when quantization fails

def fail_after(monkeypatch, n, error, name="quantize_4bit"):
    "A kernel that breaks at the n-th layer."
    real, count = getattr(bitsandbytes.functional, name), [0]

    def kernel(*args, **kwargs):
        count[0] += 1
        if count[0] > n: raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(bitsandbytes.functional, name, kernel)
    return count


LATE = 40  # layers: both text encoders have 24, so that the UNet is half done
SAID = RuntimeError("kernel gave up at 0x2a")


def test_a_broken_kernel_gives_the_model_as_it_is(tmp_path, monkeypatch):
    count = fail_after(monkeypatch, LATE, SAID)
    pipeline = load(tmp_path)
    assert count[0] == LATE + 1
    report = pipeline.load_report
    assert (
        report.label == "float32"
        and {p.precision for p in report.parts} == {"float32"}
        and len(report.parts) == 4
        and not any(p.layers for p in report.parts)
    )
    assert (
        "nf4-dq failed on cpu" in report.fallback
        and "kernel gave up at 0x2a" in report.fallback
        and report.fallback in repr(report) + report._repr_html_()
    )
    assert kept(tmp_path) == ([], []) and report.checkpoint is None and json.dumps(report.to_dict())
    assert np.array_equal(draw(pipeline), draw(load(tmp_path, loader=load_with_settings)))
    assert pipeline.to(torch.float16).unet.dtype == torch.float16  # it is a plain pipeline: nothing is guarded
    monkeypatch.undo()
    assert load(tmp_path).load_report.label == "nf4-dq"  # the next one is quantized


def test_a_broken_kernel_in_a_text_encoder_is_named(tmp_path, monkeypatch):
    fail_after(monkeypatch, 3, SAID)
    report = load(tmp_path).load_report
    assert "kernel gave up at 0x2a" in report.fallback, report.fallback


def test_without_fallback_the_reason_is_raised(tmp_path, monkeypatch):
    fail_after(monkeypatch, LATE, SAID)
    with pytest.raises(
        ModelLoadError,
        match="tiny-sdxl cannot be quantized to nf4-dq on cpu: .*kernel gave up at 0x2a.* fallback=True",
    ) as e:
        load(tmp_path, fallback=False)
    assert (
        SAID in (e.value.original_error, e.value.original_error.__cause__)
        and e.value.details["device"] == "cpu"
        and e.value.details["components"] == list(PARTS)
        and json.dumps(e.value.to_dict())
    )
    assert kept(tmp_path) == ([], [])


@pytest.mark.parametrize(
    "n,error",
    [
        (LATE, MemoryError("no more")),
        (LATE, torch.OutOfMemoryError("CUDA out of memory")),
        (LATE, RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")),
        (3, MemoryError("no more")),
    ],
    ids=["python", "cuda", "cpu", "text encoder"],
)
def test_to_run_out_of_memory_is_no_reason_to_load_more(n, error, tmp_path, monkeypatch):
    fail_after(monkeypatch, n, error)
    with pytest.raises(InsufficientMemoryError, match="nf4-dq does not fit on cpu") as e: load(tmp_path)
    assert str(error) in str(e.value) and e.value.original_error is not None and kept(tmp_path) == ([], [])


def test_the_fallback_must_fit_too(tmp_path, monkeypatch):
    fail_after(monkeypatch, LATE, SAID)
    packed, whole = weight_bytes(TINY, torch.float32, dict.fromkeys(PARTS, "nf4-dq")), weight_bytes(TINY, torch.float32)
    with pytest.raises(InsufficientMemoryError) as e: load(tmp_path, budget=(packed + whole)//2)
    assert "nf4-dq" in e.value.details["fits"]


def test_a_source_without_all_weights_is_no_fallback(tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(TINY, tmp_path/"holes")
    file = tmp_path/"holes"/"unet"/"diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match="conv_in.bias"): load(tmp_path, tmp_path/"holes")


def memory_left(cache, folder):
    "Bytes that a failed load leaves while its error is held, what that was, and the bytes of a load that succeeds."
    load(
        cache, loader=load_with_settings, quantize={"text_encoder": bnb_settings()}, quantize_once=False
    )  # what the libraries take once
    estimate_vram(folder)  # the planner keeps its trace
    release_memory()
    before = process_memory()
    with pytest.MonkeyPatch.context() as m:
        count = fail_after(m, 180, SAID)
        try:load(cache, folder, fallback=False)
        except ModelLoadError as e: held = e
    failed = process_memory() - before
    pipeline = load(cache, folder, loader=load_with_settings)
    release_memory()
    return failed, count[0], str(held.original_error), process_memory() - before


@pytest.mark.slow
def test_a_failed_load_leaves_no_memory_behind(large, tmp_path, processes):
    failed, count, error, control = in_process(processes, memory_left, tmp_path, large)
    assert count == 181 and str(SAID) in error and control > 160 << 20, control
    assert failed < 8 << 20, (failed, control)


# --- the checkpoint that is kept

def test_the_second_load_reads_the_checkpoint(usual, monkeypatch):
    cache, first, state, image = usual
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", None)  # nothing is quantized any more
    pipeline = load(cache)
    second = pipeline.load_report
    assert (
        second.from_checkpoint
        and not first.from_checkpoint
        and second.checkpoint == first.checkpoint
        and not second.warnings
    )
    assert second.parts == first.parts and (second.label, second.vae, second.dtype, second.asked) == (
        first.label,
        first.vae,
        first.dtype,
        first.asked,
    )
    assert second.bytes_read == sum(f.stat().st_size for f in Path(first.checkpoint).rglob("*.safetensors"))
    assert same_bytes(state, states(pipeline)) and np.array_equal(draw(pipeline), image)
    assert [p.bytes_after for p in second.parts] == [model_bytes(getattr(load(cache), p.name)) for p in second.parts]


def edit(file, change):
    data = bytearray(file.read_bytes())
    file.write_bytes(bytes(change(data)))


def edit_manifest(folder, change):
    about = json.loads((folder/MANIFEST).read_text(encoding="utf-8"))
    (folder/MANIFEST).write_text(json.dumps(change(about)))


UNET = "unet/diffusion_pytorch_model.safetensors"
SPOILT = {
    "truncated": lambda f: edit(f / UNET, lambda d: d[:-1000]),
    "empty": lambda f: edit(f / UNET, lambda d: b""),
    "flipped": lambda f: edit(f / UNET, lambda d: d[:-5] + bytes([d[-5] ^ 1]) + d[-4:]),
    "missing": lambda f: (f / UNET).unlink(),
    "missing network": lambda f: shutil.rmtree(f / "text_encoder"),
    "config changed": lambda f: edit(f / "unet" / "config.json", lambda d: d.replace(b"silu", b"gelu")),
    "unlisted weights": lambda f: shutil.copy(
        f / "vae" / "diffusion_pytorch_model.safetensors", f / "unet" / "extra.safetensors"
    ),
    "garbage manifest": lambda f: (f / MANIFEST).write_bytes(b"\xff\0{"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "manifest is a list": lambda f: edit_manifest(f, lambda a: [a]),
    "manifest names no files": lambda f: edit_manifest(f, lambda a: a | {"files": {}}),
    "older manifest": lambda f: edit_manifest(f, lambda a: {k: v for k, v in a.items() if k != "dtype"}),
    "newer manifest": lambda f: edit_manifest(f, lambda a: a | {"parts": [p | {"new": 1} for p in a["parts"]]}),
    "other types": lambda f: edit_manifest(f, lambda a: a | {"files": list(a["files"])}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_damaged_checkpoint_is_found_and_made_anew(what, cached, usual):
    cache, folder = cached
    SPOILT[what](folder)
    with pytest.raises((ModelLoadError, ValidationError)): load_quantized(folder, "cpu")
    before = sorted(folder.rglob("*"))
    assert before and folder.is_dir()  # load_quantized leaves what is not its own
    if what not in ("flipped", "newer manifest", "no manifest"): return  # the rest takes the same way from here
    pipeline = load(cache)
    report = pipeline.load_report
    assert (
        not report.from_checkpoint
        and report.fallback is None
        and len(report.warnings) == 1
        and report.warnings[0].startswith("quantized again: ")
        and str(folder) in report.warnings[0]
    )
    assert (
        report.warnings[0] in repr(report)
        and report.parts == usual[1].parts
        and report.bytes_read == usual[1].bytes_read
    )
    assert same_bytes(usual[2], states(pipeline)) and kept(cache) == ([folder.name], [])
    again = load(cache).load_report
    assert again.from_checkpoint and not again.warnings


@pytest.mark.parametrize("what", SPOILT)
def test_every_damage_is_a_warning(what, cached):
    cache, folder = cached
    SPOILT[what](folder)
    report = LoadReport("tiny-sdxl", None, "nf4-dq", "cpu", "float32", "auto", {})
    with quiet("transformers", "diffusers"): found = from_cache(request_for("tiny-sdxl", cache, DEFAULT, None), report)
    assert found is None and len(report.warnings) == 1 and not folder.exists() and not report.parts


FULL = {"python": MemoryError("no more"), "cuda": torch.OutOfMemoryError("CUDA out of memory"),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")}


@pytest.mark.parametrize("name, error", [*zip(["load_part", "load_on_cpu", "load_pipeline"], FULL.values())], ids=FULL)
def test_a_checkpoint_survives_that_there_is_no_memory_for_it(name, error, cached, monkeypatch):
    cache, folder = cached
    before = listing(folder)
    def full(part, *args, **kwargs):
        if isinstance(error, MemoryError): raise error
        raise ModelLoadError(f"{part} cannot be loaded", original_error=error)  # as load_errors does
    monkeypatch.setattr(checkpoint, name, full)
    with pytest.raises(InsufficientMemoryError, match="nf4-dq does not fit on cpu"): load(cache)
    with pytest.raises(InsufficientMemoryError, match="does not fit on cpu"): load_quantized(folder, "cpu")
    assert listing(folder) == before
    monkeypatch.undo()
    assert load(cache).load_report.from_checkpoint


def test_memory_is_asked_before_a_checkpoint_is_read(cached, monkeypatch, nothing_loaded):
    cache, folder = cached
    before = listing(folder)
    with pytest.raises(InsufficientMemoryError, match="the weights need 12.9 MiB"): load(cache, budget=10_000_000)
    with pytest.raises(InsufficientMemoryError, match="the weights need 12.9 MiB"): load(cache, budget="10MB")
    monkeypatch.setattr("devsky_nb.diffusion.load.memory_info", lambda device: MemoryInfo(device, 10_000_000, 10_000_000))
    with pytest.raises(InsufficientMemoryError, match="the weights need 12.9 MiB, and cpu has 9.5 MiB"):
        load_quantized(folder, "cpu")
    assert listing(folder) == before


def test_what_cannot_be_read_for_the_moment_is_not_removed(cached, monkeypatch):
    cache, folder = cached
    before = listing(folder)
    def busy(folder): raise OSError(24, "Too many open files")
    monkeypatch.setattr(checkpoint, "list_files", busy)
    report = LoadReport("tiny-sdxl", None, "nf4-dq", "cpu", "float32", "auto", {})
    assert from_cache(request_for("tiny-sdxl", cache), report) is None and "Too many open files" in report.warnings[0]
    monkeypatch.undo()
    (folder/MANIFEST).rename(folder/"aside")
    (folder/MANIFEST).mkdir()  # no file: to read it is an error of the disk, not of its content
    assert from_cache(request_for("tiny-sdxl", cache), report) is None
    (folder/MANIFEST).rmdir()
    (folder/"aside").rename(folder/MANIFEST)
    assert listing(folder) == before


def test_a_copy_that_does_not_fit_into_memory_stops_no_load(tmp_path, monkeypatch):
    def full(self, *args, **kwargs): raise MemoryError("no more")
    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", full)
    report = load(tmp_path).load_report
    assert report.label == "nf4-dq" and "could not be kept" in report.warnings[0] and kept(tmp_path) == ([], [])


def test_a_kept_copy_says_what_it_is_and_when_it_was_used(tmp_path, caplog):
    with caplog.at_level(logging.INFO, checkpoint.log.name): pipeline = load(tmp_path)
    folder = Path(pipeline.load_report.checkpoint)
    [line] = [record.getMessage() for record in caplog.records if record.name == checkpoint.log.name]
    assert "a quantized copy of tiny-sdxl is kept" in line and folder.name in line and "devsky cache" in line
    about = json.loads((folder/MANIFEST).read_text(encoding="utf-8"))
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert (about["model"], about["commit"], about["label"], about["device"], about["dtype"]) == (
        "tiny-sdxl",
        None,
        "nf4-dq",
        "cpu",
        "float32",
    )
    assert about["bytes"] == sum(p.stat().st_size for p in files) and set(about["versions"]) == {
        "bitsandbytes",
        "diffusers",
        "transformers",
        "torch",
    }
    assert set(about["settings"]) == set(PARTS) and about["settings"]["unet"]["bnb_4bit_use_double_quant"] is True
    [copy] = cache_report(tmp_path/"hub").quantized
    assert "tiny-sdxl" in str(copy)
    os.utime(folder/MANIFEST, (1, 1))
    with caplog.at_level(logging.INFO, checkpoint.log.name): assert load(tmp_path).load_report.from_checkpoint
    assert (folder/MANIFEST).stat().st_mtime > 1 and sum("is kept" in r.getMessage() for r in caplog.records) == 1


def test_the_key_knows_everything_that_matters(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path/"model")
    request = request_for(tmp_path/"model", tmp_path, DEFAULT, None)
    folder = checkpoint_folder
    keys = {"first": folder(request)}
    assert (
        folder(request_for(str(tmp_path / "model"), tmp_path, dict(reversed(DEFAULT.items())), torch.float32))
        == keys["first"]
    )
    keys["nf4"] = folder(
        replace(request, settings=dict.fromkeys(PARTS, bnb_settings(double_quant=False, compute_dtype=torch.float32)))
    )
    keys["int8"] = folder(replace(request, settings=dict.fromkeys(PARTS, bnb_settings(False))))
    keys["compute"] = folder(
        replace(request, settings=dict.fromkeys(PARTS, bnb_settings(compute_dtype=torch.bfloat16)))
    )
    keys["parts"] = folder(replace(request, settings={"unet": DEFAULT["unet"]}))
    keys["swapped"] = folder(replace(request, settings={"text_encoder": DEFAULT["unet"]}))
    keys["dtype"] = folder(replace(request, dtype=torch.bfloat16))
    keys["vae"] = folder(replace(request, vae="fp32"))
    keys["device"] = folder(replace(request, device="cuda:0"))
    assert folder(replace(request, device="cuda:1")) == keys["device"]
    for library in ("bitsandbytes", "diffusers", "transformers", "torch"):
        with monkeypatch.context() as m:
            real = checkpoint.version
            m.setattr(checkpoint, "version", lambda name: "0.0.1" if name == library else real(name))
            keys[library] = folder(request)
    with monkeypatch.context() as m:
        m.setattr("bitsandbytes.functional.has_avx512bf16", lambda: not has_avx512bf16())
        keys["processor"] = folder(request)
    file = tmp_path/"model"/"unet"/"diffusion_pytorch_model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    assert folder(request) == keys["first"]  # the content is the same
    with (tmp_path/"model"/"unet"/"config.json").open("a", encoding="utf-8") as f: f.write("\n")
    keys["longer"] = folder(request)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        keys["format"] = folder(request)  # another devsky_nb does not take this one's copies for damaged
    assert len(set(keys.values())) == len(keys), keys
    assert all(k.parent == tmp_path/"hub-quantized" for k in keys.values())


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path):
    from hubcache import make_repo
    files = {p.relative_to(TINY).as_posix(): p.read_bytes() for p in TINY.rglob("*") if p.is_file()}
    make_repo(tmp_path/"hub", "shop/sdxl", {"a"*40: files, "b"*40: files}, {"main": "a"*40})
    keys = []
    for commit in "ab":
        (tmp_path/"hub"/"models--shop--sdxl"/"refs"/"main").write_text(commit*40)
        request = request_for("shop/sdxl", tmp_path, DEFAULT, None)
        assert request.revision == commit*40
        keys.append(checkpoint_folder(request))
    assert keys[0] != keys[1] and keys[0].name.startswith("shop--sdxl-nf4-dq-")
    first, second = load(tmp_path, "shop/sdxl"), load(tmp_path, "shop/sdxl")
    assert second.load_report.from_checkpoint and first.load_report.revision == second.load_report.revision == "b"*40


def kill_writes(cache, points):
    "Write a checkpoint over and over, killed at the n-th touch of the disk; what is to be seen after each."
    pipeline = load(cache, quantize_once=False)
    folder, seen = checkpoint_folder(request_for("tiny-sdxl", cache, DEFAULT, None)), []
    for point in points:
        if not (child := os.fork()):
            count = [0]

            def hook(event, args):
                if event not in ("open", "os.mkdir", "os.rename") or not str(args[0]).startswith(str(cache)): return
                count[0] += 1
                if count[0] == point or event == point: os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            write_checkpoint(pipeline, folder)
            os._exit(0)
        seen.append((point, os.waitpid(child, 0)[1], folder.exists(), len(kept(cache)[1])))
    return seen


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, processes, usual):
    points = [3, 20, 60, "os.rename"]
    seen = in_process(processes, kill_writes, tmp_path, points)
    assert seen == [(p, signal.SIGKILL, False, i) for i, p in enumerate(points, 1)], seen
    old, young = sorted((tmp_path/"hub-quantized").iterdir())[:2]
    for age, path in ((90_000, old), (80_000, young)): os.utime(path, (time.time() - age,)*2)
    pipeline = load(tmp_path)
    assert (
        not pipeline.load_report.from_checkpoint
        and not pipeline.load_report.warnings
        and same_bytes(usual[2], states(pipeline))
    )
    names, hidden = kept(tmp_path)
    assert len(names) == 1 and old.name not in hidden and young.name in hidden and len(hidden) == 3
    assert load(tmp_path).load_report.from_checkpoint


def load_and_draw(barrier, queue, cache):
    torch.set_num_threads(1)
    barrier.wait(PATIENCE)
    pipeline = load(cache)
    queue.put((pipeline.load_report.checkpoint, pipeline.load_report.warnings, draw(pipeline).tobytes()))


@pytest.mark.slow
def test_processes_that_load_at_once_agree(tmp_path, processes, usual):
    barrier, queue = processes.Barrier(3), processes.Queue()
    writers = [processes.Process(target=load_and_draw, args=(barrier, queue, tmp_path)) for _ in range(3)]
    for w in writers: w.start()
    results = [queue.get(timeout=PATIENCE) for _ in writers]
    for w in writers: w.join(PATIENCE)
    assert [w.exitcode for w in writers] == [0, 0, 0]
    names, hidden = kept(tmp_path)
    assert len(names) == 1 and not hidden
    for checkpoint, warnings, image in results:
        assert (
            checkpoint == str(tmp_path / "hub-quantized" / names[0]) and not warnings and image == usual[3].tobytes()
        )
    assert load(tmp_path).load_report.from_checkpoint


@contextmanager
def disk(folder, options):
    "A small file system of its own."
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def warned(cache):
    report = load(cache).load_report
    return report.label, report.fallback, report.checkpoint, report.warnings, kept(cache)


def warned_within(cache, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: return warned(cache)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["full", "read-only", "file in the way", "files too large"])
def test_a_disk_that_takes_nothing_stops_no_load(kind, tmp_path):
    reason = {"full": "No space left", "read-only": "Read-only", "file in the way": "exists"}.get(kind, "too large")
    if kind == "files too large":
        result = warned_within(tmp_path, 1 << 20)
    elif kind == "file in the way":
        (tmp_path/"hub-quantized").write_text("", encoding="utf-8")
        result = warned(tmp_path)
    else:
        with disk(tmp_path/"disk", "size=4m" if kind == "full" else "ro") as mounted:
            result = warned(mounted)
    label, fallback, checkpoint, warnings, left = result
    assert (label, fallback, checkpoint, left) == ("nf4-dq", None, None, ([], [])) and len(warnings) == 1
    assert "could not be kept" in warnings[0] and reason in warnings[0] and "hub-quantized" in warnings[0]


# --- saving and loading by hand


def listing(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind, tmp_path):
    pipeline = load(tmp_path, quantize_once=False, **KINDS[kind])
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in states(pipeline).items()}
    saved = save_quantized(pipeline, tmp_path/"out")
    again = load_quantized(saved, "cpu")
    assert same_bytes(before, states(again)) and np.array_equal(draw(again), draw(pipeline))
    assert (
        again.load_report.parts == pipeline.load_report.parts
        and again.load_report.label == kind
        and again.load_report.model == "tiny-sdxl"
    )
    assert again.load_report.asked == pipeline.load_report.asked and again.load_report.from_checkpoint
    with pytest.raises(ValidationError, match="Give dtype="):
        again.half() if hasattr(again, "half") else again.unet.half()
    if kind == "int8": assert listing(save_quantized(pipeline, tmp_path/"after"))[UNET] == listing(saved)[UNET]
    assert kept(tmp_path) == ([], [])


def test_what_is_not_to_be_saved(usual, tmp_path):
    pipeline, plain = load(usual[0]), load(tmp_path, loader=load_with_settings)
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"mine.txt").write_text("mine")
    (tmp_path/"file").write_text("mine")
    for taken in ("full", "file"):
        with pytest.raises(ValidationError, match=f"{taken} exists: name a new folder"):
            save_quantized(pipeline, tmp_path / taken)
    assert (tmp_path / "full" / "mine.txt").read_text(encoding="utf-8") == (tmp_path / "file").read_text(
        encoding="utf-8"
    ) == "mine" and len(list((tmp_path / "full").iterdir())) == 1
    for other in (plain, "text", None):
        with pytest.raises(ValidationError, match="not quantized by one of our loaders: use its save_pretrained"):
            save_quantized(other, tmp_path / "new")
    assert not (tmp_path/"new").exists()
    (tmp_path/"empty").mkdir()
    assert load_quantized(save_quantized(pipeline, tmp_path/"empty"), "cpu").load_report.label == "nf4-dq"
    with pytest.raises(ValidationError, match="quantized already: read it with load_quantized"):
        load(tmp_path, tmp_path / "empty")
    for nothing in (TINY, tmp_path/"file"):
        with pytest.raises(ValidationError, match="not what save_quantized writes"): load_quantized(nothing, "cpu")
    with pytest.raises(FileNotFoundError, match="no folder"): load_quantized(tmp_path/"none", "cpu")


def test_after_an_image_the_checkpoint_is_saved_or_nothing(cached, tmp_path):
    cache, folder = cached
    pipeline = load(cache)
    repack(pipeline)
    assert repacked(pipeline)
    assert listing(save_quantized(pipeline, tmp_path/"copy")) == listing(folder)
    SPOILT["flipped"](folder)
    with pytest.raises(ModelLoadError, match="damaged"): save_quantized(pipeline, tmp_path/"damaged")
    shutil.rmtree(folder)
    with pytest.raises(ValidationError, match="[Ll]oad it again and save it before the first image"):
        save_quantized(pipeline, tmp_path / "gone")
    assert not (tmp_path/"damaged").exists() and not (tmp_path/"gone").exists()


def test_layers_of_another_machine_are_refused_here(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)  # as on a machine that can run them
    monkeypatch.setattr("devsky_nb.diffusion.load.try_layers", lambda network, device: None)  # which this one may not be
    save_quantized(load(tmp_path, odd), tmp_path/"out")
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)  # as on one that cannot
    with pytest.raises((ValidationError, ModelLoadError), match="this processor"): load_quantized(tmp_path/"out", "cpu")


# --- number formats and files


@pytest.mark.parametrize(
    "dtype,mode,stored",
    [
        (torch.bfloat16, "same", torch.bfloat16),
        (torch.float16, "upcast", torch.float16),
        (torch.float32, "same", torch.float32),
    ],
)
def test_the_vae_decodes_in_a_format_that_does_not_overflow(dtype, mode, stored, tmp_path):
    for from_checkpoint in (False, True):
        pipeline = load(tmp_path, dtype=dtype, components=("text_encoder",))
        assert (
            pipeline.load_report.vae,
            pipeline.vae.dtype,
            pipeline.unet.dtype,
            pipeline.load_report.from_checkpoint,
        ) == (mode, stored, dtype, from_checkpoint)
        image = draw(pipeline)
        assert np.isfinite(image).all() and image.std() > .01
        if from_checkpoint: assert np.array_equal(image, first)
        first = image


def test_what_a_vae_would_not_do_is_refused(tmp_path, nothing_loaded):
    folder = shutil.copytree(TINY, tmp_path/"model")
    config = folder/"vae"/"config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"force_upcast": False}), encoding="utf-8")
    for call in (lambda: load(tmp_path, folder, vae="upcast", dtype=torch.float16),
                 lambda: load(tmp_path, folder, load_with_settings, vae="upcast", dtype=torch.float16),
                 lambda: QuantizedSDXLGenerator(folder, device="cpu", vae="upcast", dtype=torch.float16)):
        with pytest.raises(ValidationError, match="needs none .force_upcast is false.*Use vae='fp32', or 'auto'"): call()


def test_the_vae_of_the_fix_is_taken_from_the_cache(tmp_path):
    from hubcache import make_repo
    files = {p.name: p.read_bytes() for p in (TINY/"vae").iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"force_upcast": False}).encode()
    options = {"vae": "fp16-fix", "dtype": torch.bfloat16, "components": ("text_encoder",)}
    with pytest.raises(ModelNotFoundError, match="sdxl-vae-fp16-fix"): load(tmp_path, **options)
    make_repo(tmp_path/"hub", FIXED_VAE, {"c"*40: files, "d"*40: files}, {"main": "c"*40})
    pipeline = load(tmp_path, **options)
    assert (
        pipeline.load_report.vae == "same"
        and pipeline.vae.dtype == torch.bfloat16
        and not pipeline.vae.config.force_upcast
        and draw(pipeline).std() > 0.01
    )
    assert load(tmp_path, **options).load_report.from_checkpoint
    (tmp_path/"hub"/("models--" + FIXED_VAE.replace("/", "--"))/"refs"/"main").write_text("d"*40)
    assert not load(tmp_path, **options).load_report.from_checkpoint  # another VAE is another checkpoint


def test_shards_of_a_variant_are_quantized_too(tmp_path, usual):
    with quiet("transformers", "diffusers"):
        whole = StableDiffusionXLPipeline.from_pretrained(TINY, dtype=torch.float16, local_files_only=True)
        whole.save_pretrained(tmp_path/"model", variant="fp16", max_shard_size="3MB")
    shards = list((tmp_path/"model"/"unet").glob("*.fp16*.safetensors"))
    assert len(shards) > 2
    for loader in (load_v1, load_v2):
        pipeline = load(tmp_path, tmp_path/"model", loader, quantize_once=False)
        assert pipeline.load_report.fallback is None and pipeline.load_report.label == "nf4-dq"
        assert same_bytes(usual[2], states(pipeline))
    assert weight_bytes(tmp_path / "model", torch.float32, {"unet": "nf4"}) == weight_bytes(
        TINY, torch.float32, {"unet": "nf4"}
    )


def test_the_right_files_are_read(tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(TINY, tmp_path/"model")
    weights = {p: next((tmp_path/"model"/p).glob("*.safetensors")) for p in (*PARTS, "vae")}
    fp16 = {p: f.with_name(f.name.replace(".safetensors", ".fp16.safetensors")) for p, f in weights.items()}
    for p, f in weights.items():
        tensors = load_file(f)
        save_file({k: v.half() for k, v in tensors.items()}, fp16[p], metadata={"format": "pt"})
        if p == "unet":f.unlink()  # mixed: one network has its fp16 file only
        else: save_file({k: v.float()*2 for k, v in tensors.items()}, f, metadata={"format": "pt"})  # to be told apart
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = load(tmp_path, tmp_path/"model", load_v2, dtype=dtype, quantize_once=False)
        for part in ("text_encoder", "text_encoder_2", "vae"):
            expected = load_file(fp16[part])
            assert next(getattr(pipeline, part).parameters()).dtype == dtype
            for name, value in getattr(pipeline, part).state_dict().items():
                if "norm" in name:
                    assert torch.equal(
                        value, expected[name].to(value.dtype) * (2 if value.dtype == torch.float32 else 1)
                    )
        assert pipeline.load_report.fallback is None
        assert {p.name: p.layers > 0 for p in pipeline.load_report.parts} == {
            "unet": True,
            "text_encoder": True,
            "text_encoder_2": True,
            "vae": False,
        }
    for p in weights.values(): p.unlink(missing_ok=True)
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = load(tmp_path, tmp_path/"model", dtype=dtype, quantize_once=False)
        assert pipeline.load_report.fallback is None and pipeline.load_report.bytes_read == sum(
            f.stat().st_size for f in fp16.values()
        )
        assert draw(pipeline).std() > .01
