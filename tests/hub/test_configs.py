"Configurations that name code, or describe what cannot be: refused by file, field and value before anything is built."
import ast, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from patience import PATIENCE

from devsky_nb import CLIPImageEmbedder, estimate_vram, load_model, ModelRegistry, plan_vram
from devsky_nb.errors import DevSkyyError, ModelLoadError, ValidationError
from devsky_nb.hub.configs import check_configs
from devsky_nb.hub.load import check_classes, load_folder
from devsky_nb.hub.locate import locate_model
from devsky_nb.memory.configs import CONFIGS, meta_network

TINY, TINY_SDXL = locate_model("tiny-clip"), locate_model("tiny-sdxl")
ROOT = Path(__file__).parents[2]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def changed(folder, file, **values):
    "Change fields of a JSON file; None takes one out."
    path = folder / file
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: v for k, v in (old | values).items() if v is not None}), encoding="utf-8")
    return folder


def copy_or_link(source, target):
    "Weights are only read."
    return os.symlink(source, target) if source.endswith(".safetensors") else shutil.copy(source, target)


@pytest.fixture
def clip(tmp_path): return shutil.copytree(TINY, tmp_path / "clip", copy_function=copy_or_link)


@pytest.fixture
def sdxl(tmp_path): return shutil.copytree(TINY_SDXL, tmp_path / "sdxl", copy_function=copy_or_link)


AUTO_MAP = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.T", None]}}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}
NAMES_CODE = [  # file of a CLIP folder, fields
    ("config.json", AUTO_MAP), ("tokenizer_config.json", AUTO_MAP), ("preprocessor_config.json", AUTO_MAP),
    ("generation_config.json", AUTO_MAP), ("processor_config.json", {"image_processor": AUTO_MAP}),
    ("config.json", {"text_config": AUTO_MAP}), ("config.json", {"a": [{"b": [AUTO_MAP]}]}),
    ("config.json", {"auto_map": "other/repo--evil.Evil"}), ("config.json", {"auto_map": ["evil.Evil"]}),
    ("config.json", {"custom_pipelines": {"draw": {"impl": "evil.Evil"}}}),
    ("generation_config.json", {"custom_generate": "evil/generate"}),
    ("config.json", {"attn_implementation": "evil/kernel"}), ("config.json", {"_attn_implementation": "evil/kernel"}),
    ("config.json", {"_attn_implementation_internal": "evil/kernel"}), ("config.json", {"attn_implementation": "flash"}),
    ("config.json", {"attn_implementation": "flash_attention_2"}), ("config.json", {"attn_implementation": ["sdpa"]}),
    ("config.json", {"attn_implementation": "paged|evil/kernel"}), ("config.json", {"attn_implementation": 3}),
    ("config.json", {"attn_implementation": "evil/kernel@main:forward"}),
    ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}}),
    ("config.json", {"vision_config": {"_attn_implementation": "evil/kernel"}}),
    ("config.json", {"per_layer_config": {"0": {"attn_implementation": "evil/kernel"}}}),
    ("config.json", {"experts_implementation": "sonicmoe"}), ("config.json", {"_experts_implementation": "evil/experts"}),
    ("config.json", {"quantization_config": {"quant_method": "evil"}}), ("config.json", {"quantization_config": "evil/x"}),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}), ("config.json", {"quantization_config": [1]}),
    ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}), ("config.json", {"quantization_config": 4}),
    ("config.json", {"quantization_config": {"quant_method": "gguf"}}),
    ("config.json", {"quantization_config": {"quant_method": ["bitsandbytes"]}}),
    ("config.json", {"quantization_config": BNB | {"kernel": "evil/kernel"}}),
    ("config.json", {"text_config": {"quantization_config": BNB | {"modules": ["evil/kernel"]}}}),
    ("config.json", {"compression_config": {"format": "evil"}}),
    ("config.json", {"use_kernels": True}), ("config.json", {"kernel_config": {"Linear": "evil/kernel:Linear"}}),
    ("config.json", {"hub_kernels": ["evil/kernel"]}), ("config.json", {"kernel_mapping": {"x": "y"}}),
    ("adapter_config.json", {"base_model_name_or_path": "evil/model", "peft_type": "LORA"}),
    ("adapter_config.json", {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}),
    ("config.json", {"backbone": "resnet50", "use_timm_backbone": True}), ("config.json", {"use_pretrained_backbone": True}),
    ("config.json", {"configuration_files": ["config.0/../../evil.json"]}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.0/../../evil.json"]}),
    ("config.json", {"architectures": ["evil.Evil"]}), ("config.json", {"architectures": "os.path"}),
    ("config.json", {"architectures": [["CLIPModel"]]}), ("config.json", {"architectures": {"CLIPModel": 1}}),
    ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}), ("tokenizer_config.json", {"tokenizer_class": 7}),
    ("tokenizer_config.json", {"tokenizer_class": "evil/repo"}), ("config.json", {"_class_name": ["evil", "Evil"]}),
    ("preprocessor_config.json", {"image_processor_type": "../evil"}), ("config.json", {"_class_name": "a" * 300}),
    ("preprocessor_config.json", {"feature_extractor_type": "evil--Evil"}),
    ("processor_config.json", {"processor_class": "evil:Evil"}),
    ("model.safetensors.index.json", {"weight_map": {"w": "../../evil.safetensors"}}),
    ("model.safetensors.index.json", {"weight_map": {"w": "/etc/passwd"}}),
    ("model.safetensors.index.json", {"weight_map": {"w": ".."}}), ("model.safetensors.index.json", {"weight_map": {"w": 3}}),
    ("model.safetensors.index.json", {"weight_map": ["w"]}), ("model.safetensors.index.json", {"weight_map": {"w": "a\\b"}}),
    ("model.safetensors.index.fp16.json", {"weight_map": {"w": "x/y.safetensors"}})]


@pytest.mark.parametrize("file, values", NAMES_CODE)
def test_a_configuration_that_names_code_or_files_from_elsewhere_is_refused(clip, file, values):
    changed(clip, file, **values)
    before = set(sys.modules)
    with pytest.raises(ModelLoadError) as e: check_configs(clip)
    assert file in e.value.message and e.value.details["file"] == file
    assert not {name for name in set(sys.modules) - before if "evil" in name}


@pytest.mark.parametrize("file, values", NAMES_CODE[::12])
def test_every_way_to_a_model_asks_the_guard(clip, file, values):
    changed(clip, file, **values)
    registry = ModelRegistry()
    for use in (load_folder, load_model, registry.get_model, registry.locate, CLIPImageEmbedder):
        with pytest.raises(ModelLoadError, match=file): use(clip)
    for ask in (estimate_vram, lambda model: plan_vram(model, "8GB")):
        with pytest.raises(ValidationError): ask(clip)


@pytest.mark.parametrize("file, values", [
    ("config.json", {"architectures": ["EvilModel"]}), ("config.json", {"architectures": ["CLIPModel", "Evil"]}),
    ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}), ("preprocessor_config.json", {"image_processor_type": "Evil"}),
    ("processor_config.json", {"processor_class": "EvilProcessor"}), ("config.json", {"_class_name": "EvilNet"})])
def test_a_class_that_the_libraries_do_not_export_is_refused(clip, file, values):
    changed(clip, file, **values)
    with pytest.raises(ModelLoadError, match="neither transformers nor diffusers has"): check_classes(clip)
    with pytest.raises(ModelLoadError, match="neither transformers nor diffusers has"): load_folder(clip, "cpu")


INDEXES = [{"unet": ["evil", "UNet2DConditionModel"]}, {"unet": ["evil.module", "UNet"]}, {"unet": ["diffusers_modules.local.evil", "U"]},
           {"unet": ["diffusers", "Evil"]}, {"unet": ["transformers", "Evil"]}, {"unet": ["diffusers", "utils.torch_utils"]},
           {"unet": ["diffusers", "DDIMScheduler"]}, {"unet": ["transformers", "pipeline"]}, {"unet": ["transformers", "AutoModel"]},
           {"unet": ["diffusers", "StableDiffusionXLPipeline"]}, {"unet": ["os", "system"]}, {"unet": ["stable_diffusion", "Evil"]},
           {"unet": ["diffusers"]}, {"unet": ["diffusers", "UNet2DConditionModel", "x"]}, {"unet": ["diffusers", None]},
           {"unet": [None, "UNet2DConditionModel"]}, {"unet": ["diffusers", 3]}, {"unet": [["diffusers"], "UNet2DConditionModel"]},
           {"unet": {"library": "diffusers"}}, {"unet": "diffusers"}, {"unet": 3}, {"unet": True}, {"unet": [1, 2]}, {"unet": []},
           {"u" * 300: ["diffusers", "UNet2DConditionModel"]}, {"../unet": ["diffusers", "UNet2DConditionModel"]},
           {"a/b": ["diffusers", "UNet2DConditionModel"]}, {"/etc": ["diffusers", "UNet2DConditionModel"]},
           {"..": ["diffusers", "UNet2DConditionModel"]}, {"": ["diffusers", "UNet2DConditionModel"]}, {"a\x00b": ["diffusers", "U"]},
           {"a\\b": ["diffusers", "U"]}, {"scheduler": ["evil", "Scheduler"]}, {"tokenizer": ["evil", "Tokenizer"]},
           {"tokenizer": ["transformers", "../evil"]}, {"feature_extractor": ["evil", "X"]}, {"_class_name": ["evil", "Evil"]},
           {"_class_name": "evil.Evil"}, {"_class_name": 3}, {"_class_name": {}}, {"auto_map": AUTO_MAP["auto_map"]},
           {"custom_pipeline": "evil/pipeline"}, {"_class_name": None}]


@pytest.mark.parametrize("entries", INDEXES, ids=lambda e: ascii(e)[:60])
def test_an_index_with_wrong_names_or_shapes_is_one_typed_error(sdxl, entries):
    index = json.loads((sdxl / "model_index.json").read_text(encoding="utf-8")) | entries
    (sdxl / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DevSkyyError) as e: load_folder(sdxl, "cpu")
    assert str(sdxl) in e.value.message
    with pytest.raises(ValidationError): estimate_vram(sdxl)


SIZES = [("num_hidden_layers", 10**7), ("num_hidden_layers", -1), ("num_hidden_layers", "12"), ("num_hidden_layers", 1.5),
         ("num_hidden_layers", [10**6]), ("num_hidden_layers", {}), ("num_hidden_layers", 10**300), ("num_hidden_layers", [1] * 2000),
         ("hidden_size", 10**9), ("hidden_size", -64), ("hidden_size", 64.0), ("hidden_size", "64"), ("hidden_size", [10**7]),
         ("vocab_size", 10**12), ("vocab_size", -1), ("vocab_size", "many"), ("vocab_size", [1, "x"]), ("vocab_size", 1e300),
         ("intermediate_size", 10**9), ("num_attention_heads", 10**9), ("num_attention_heads", -2), ("projection_dim", 10**9),
         ("projection_dim", "x"), ("max_position_embeddings", 10**12), ("max_position_embeddings", -1), ("image_size", 10**9),
         ("patch_size", -1), ("image_size", "224"), ("num_channels", 10**9), ("num_layers", 10**8), ("depths", [10**6, 1])]


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("field, value", SIZES)
def test_a_number_that_no_network_has_is_refused_at_once_with_its_name(clip, part, field, value):
    config = json.loads((clip / "config.json").read_text(encoding="utf-8"))
    (config[part] if part else config)[field] = value
    (clip / "config.json").write_text(json.dumps(config), encoding="utf-8")
    started = time.process_time()
    with pytest.raises(ModelLoadError) as e: check_configs(clip)
    assert time.process_time() - started < 20  # a network of this size would take hours
    assert f"{part}{'.' * bool(part)}{field}={value!r:.20}".rstrip(".") in e.value.message


MILLION = ["DownBlock2D"] * 1_000_000
UNETS = [("block_out_channels", [64] * 1_000_000), ("block_out_channels", [-64, 128]), ("block_out_channels", ["64", "128"]),
         ("block_out_channels", [64, 10**9]), ("down_block_types", MILLION), ("layers_per_block", 10**7), ("layers_per_block", "2"),
         ("transformer_layers_per_block", 10**6), ("transformer_layers_per_block", [1, [2, 10**7]]), ("layers_per_block", -1),
         ("cross_attention_dim", 10**10), ("in_channels", 10**9), ("in_channels", 4.5), ("attention_head_dim", [8, -8]),
         ("sample_size", "128"), ("num_attention_heads", [1] * 5000), ("addition_time_embed_dim", 10**12)]


@pytest.mark.parametrize("field, value", UNETS, ids=lambda v: ascii(v)[:40])
def test_numbers_of_a_unet_are_refused_at_once_with_their_name(sdxl, field, value):
    changed(sdxl, "unet/config.json", **{field: value})
    with pytest.raises(ModelLoadError, match=f"unet/config.json is refused: {field}="): check_configs(sdxl)
    with pytest.raises(ValidationError, match=f"unet/config.json is refused: {field}="): estimate_vram(sdxl)


@pytest.mark.slow
def test_a_product_of_small_numbers_stops_while_it_is_built(sdxl):
    changed(sdxl, "unet/config.json", layers_per_block=900, transformer_layers_per_block=900)
    with pytest.raises(ValidationError, match="more than 10,000 modules, which no network has"): meta_network(sdxl / "unet")
    with pytest.raises(ModelLoadError, match="more than 10,000 modules"): load_folder(sdxl, "cpu")


@pytest.mark.parametrize("field, value", [("vocab_size", 9_000_000), ("intermediate_size", 900_000)])
def test_a_far_larger_network_than_the_files_hold_is_refused_before_memory_is_taken(sdxl, field, value):
    changed(sdxl, "text_encoder/config.json", **{field: value})
    with pytest.raises(ModelLoadError, match="parameters, and the files beside it hold"): load_folder(sdxl, "cpu")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"[" * 100_000, b"\x00\xff", b'{"a":' * 200 + b"1" + b"}" * 200,
                                     b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_damaged_configuration_is_one_error_that_names_the_file(clip, file, content):
    (clip / file).write_bytes(content)
    with pytest.raises(ModelLoadError, match=re.escape(str(clip / file))): check_configs(clip)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("file", ["generation_config.json", "unet/config.json", "scheduler/scheduler_config.json",
                                  "tokenizer/tokenizer_config.json"])
def test_a_pipe_in_the_place_of_a_configuration_is_not_waited_for(sdxl, file):
    (sdxl / file).unlink(missing_ok=True)
    os.mkfifo(sdxl / file)
    code = f"from devsky_nb.hub.configs import check_configs; from pathlib import Path; check_configs(Path({str(sdxl)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env=OFFLINE)
    assert "no regular file" in done.stderr and Path(file).name in done.stderr


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer_config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_file_of_a_pipeline_is_one_error_that_names_it(sdxl, file, content):
    (sdxl / file).write_text(content, encoding="utf-8")
    with pytest.raises(ModelLoadError, match=re.escape(str(sdxl / file))): load_folder(sdxl, "cpu")


def llama(**more):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
            "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 10_485_760, "rope_theta": 5e5, "head_dim": None, "_name_or_path": "../../out/step-500"} | more


GOOD = [llama(), llama(_attn_implementation="eager"), llama(attn_implementation=None, quantization_config=None, auto_map={}),
        llama(quantization_config=BNB | {"llm_int8_skip_modules": ["model.layers.0", "lm_head"]}),
        {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 1024, "d_ff": 65536, "num_heads": 128, "num_layers": 24,
         "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "task_specific_params": {"x": {"num_beams": 4}}},
        {"architectures": ["SwinModel"], "model_type": "swin", "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48],
         "image_size": [224, 224], "id2label": {"0": "backbone"}, "label2id": {"backbone": 0, "auto_map": 1}},
        {"_class_name": "SD3Transformer2DModel", "num_layers": 38, "dual_attention_layers": list(range(13)), "patch_size": 2,
         "sample_size": 128, "qk_norm": "rms_norm"},
        {"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, [10, 3]],
         "attention_head_dim": [5, 10, 20], "sample_size": None, "num_attention_heads": None, "class_embed_type": None}]


@pytest.mark.parametrize("config", GOOD, ids=lambda c: c.get("model_type") or c["_class_name"])
def test_real_configurations_pass(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_configs(tmp_path)
    check_classes(tmp_path)


@pytest.mark.parametrize("folder", sorted(f for f in CONFIGS.iterdir() if f.is_dir()) + [TINY, TINY_SDXL], ids=lambda f: f.name)
def test_all_models_that_the_package_knows_pass(folder):
    check_configs(folder)
    check_classes(folder)


OLD_NAMES = {"config.json": {"model_type": "clip"}, "preprocessor_config.json": {"feature_extractor_type": "CLIPFeatureExtractor"},
             "processor_config.json": {"processor_class": "CLIPProcessor"},
             "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizerFast", "tokenizer_file": "/root/tokenizer.json",
                                       "model_max_length": 10**30, "added_tokens_decoder": {"1": {"content": "<auto_map>"}}}}


def test_names_that_the_libraries_have_given_up_pass_where_they_have_successors(tmp_path):
    for file, values in OLD_NAMES.items(): changed(tmp_path, file, **values)
    check_configs(tmp_path)
    check_classes(tmp_path)


EVIL = """
import pathlib
pathlib.Path(r"{marker}").write_text("ran")
from transformers import CLIPConfig, CLIPModel
class EvilConfig(CLIPConfig): pass
class Evil(CLIPModel): pass
"""
CALLS = """
import sys
from devsky_nb import (check_environment, CLIPImageEmbedder, estimate_vram, load_model, load_quantized,
                       load_sdxl_pipeline_with_quantization_v1, load_sdxl_pipeline_with_quantization_v2, ModelRegistry,
                       plan_vram, QuantizedSDXLGenerator)
from devsky_nb.errors import DevSkyyError
folder = sys.argv[1]
for call in ({calls}):
    try: call(folder)
    except DevSkyyError as e: print(type(e).__name__, e)
    else: print("NO ERROR")
"""
PUBLIC = ("load_model", "ModelRegistry().get_model", "CLIPImageEmbedder", "estimate_vram", "lambda f: plan_vram(f, '8GB')",
          "load_sdxl_pipeline_with_quantization_v1", "load_sdxl_pipeline_with_quantization_v2",
          "QuantizedSDXLGenerator", "load_quantized", "lambda f: ModelRegistry().locate(f)")
COMMANDS = (["plan", "{folder}", "--budget", "8GB"], ["doctor", "{images}", "--plan", "{folder}"],
            ["generate", "a red dress", "--model", "{folder}", "--out", "{out}"],
            ["embed", "{images}", "--model", "{folder}", "--out", "{out}"],
            ["validate", "{images}", "--model", "{folder}"])


def evil_folder(model, where, marker, mark):
    "A model whose configurations name a module beside them, which would write a file."
    folder = shutil.copytree(model, where)
    parts = [folder, *(p for p in folder.iterdir() if p.is_dir())]
    for part in parts:
        (part / "evil.py").write_text(EVIL.format(marker=marker), encoding="utf-8")
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "scheduler_config.json"):
            if (part / name).exists(): changed(part, name, **mark)
    if (folder / "config.json").exists(): changed(folder, "config.json", model_type="evil")  # of which transformers has no code
    if (folder / "model_index.json").exists() and mark is AUTO_MAP: changed(folder, "model_index.json", unet=["evil", "Evil"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, TINY_SDXL], ids=lambda m: m.name)
def test_no_call_runs_code_that_a_folder_brings_whatever_standard_input_says(model, tmp_path):
    marker = tmp_path / "marker"
    folder = evil_folder(model, tmp_path / "evil", marker, AUTO_MAP)
    code = CALLS.format(calls=", ".join(PUBLIC) + ",")
    if model == TINY:
        raw = f"import transformers\ntransformers.AutoConfig.from_pretrained({str(folder)!r})"
        subprocess.run([sys.executable, "-c", raw], input="y\n" * 1000, capture_output=True, text=True, timeout=PATIENCE, env=OFFLINE)
        assert marker.exists(), "transformers does not run it, so this test shows nothing"
        marker.unlink()
    done = subprocess.run([sys.executable, "-c", code, str(folder)], input="y\n" * 1000, capture_output=True, text=True,
                          timeout=PATIENCE, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    errors = [line for line in lines if re.match(r"(\w+Error|RefusedModel) |NO ERROR", line)]
    assert len(errors) == len(PUBLIC) and "NO ERROR" not in errors, done.stdout
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, TINY_SDXL], ids=lambda m: m.name)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
def test_no_command_runs_code_that_a_folder_brings(model, command, tmp_path):
    marker = tmp_path / "marker"
    folder = evil_folder(model, tmp_path / "evil", marker, AUTO_MAP)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images/red.png")
    names = {"folder": folder, "out": tmp_path / "out", "images": tmp_path / "images"}
    args = [word.format(**names) for word in command]
    done = subprocess.run([sys.executable, "-m", "devsky_nb", *args], input="y\n" * 1000, capture_output=True, text=True,
                          timeout=PATIENCE, env=OFFLINE)
    assert done.returncode == 2 and "evil" in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


KERNELS = '''
import pathlib, traceback
def get_kernel(*args, **kwargs):
    pathlib.Path(r"{marker}").write_text(repr(args) + "".join(traceback.format_stack()))
    raise RuntimeError("a kernel was fetched")
def has_kernel(*args, **kwargs): return get_kernel(*args)
def decorate(*args, **kwargs): return lambda cls: cls
use_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = decorate
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __class_getitem__(cls, item): return cls
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
'''
PRETENDED = """
import importlib.abc, importlib.util, sys
class Pretended(importlib.abc.MetaPathFinder):
    "A processor with bfloat16 instructions, on which bitsandbytes looks for a kernel."
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Pretended())
"""


@pytest.fixture
def kernels(tmp_path):
    "The package that fetches compiled code from the Hub; this one leaves a marker. Returns the marker and the environment."
    marker = tmp_path / "fetched"
    package = tmp_path / "site/kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(KERNELS.format(marker=marker), encoding="utf-8")
    about = tmp_path / "site/kernels-0.18.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n", encoding="utf-8")
    (about / "RECORD").write_text("kernels/__init__.py,,\n", encoding="utf-8")
    (about / "top_level.txt").write_text("kernels\n", encoding="utf-8")
    return marker, {**OFFLINE, "PYTHONPATH": f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def python(code, env, *args):
    return subprocess.run([sys.executable, "-c", PRETENDED + code, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE, env=env)


@pytest.mark.slow
def test_bitsandbytes_is_imported_without_the_kernel_that_it_would_fetch(kernels):
    marker, env = kernels
    done = python("import bitsandbytes", env)
    assert marker.exists(), f"the pretended processor or the pretended package does not work: {done.stderr}"
    marker.unlink()
    done = python("from devsky_nb.hub.load import import_bitsandbytes\nimport_bitsandbytes()\nimport bitsandbytes, kernels\n"
                  "print(kernels.get_kernel.__name__)", env)
    assert done.stdout == "get_kernel\n", done.stderr  # whoever wants it has it, afterwards
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import kernels, transformers.integrations\n"])
def test_no_call_fetches_a_kernel_where_the_package_is_installed(kernels, first, tmp_path):
    marker, env = kernels
    code = first + f"""
from devsky_nb import check_environment, CLIPImageEmbedder, estimate_vram, load_model, load_sdxl_pipeline_with_quantization_v2
estimate_vram({str(TINY_SDXL)!r})
load_model("tiny-sdxl", "cpu")
load_sdxl_pipeline_with_quantization_v2("tiny-sdxl", device="cpu", cache_dir={str(tmp_path)!r})
CLIPImageEmbedder("tiny-clip", device="cpu").encode_text(["a red dress"])
check_environment()
print("done")
"""
    done = python(code, env)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert not marker.exists(), marker.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evil/kernel", "flash_attention_2"])
def test_a_configuration_fetches_no_kernel_for_its_attention(kernels, name, clip, sdxl):
    marker, env = kernels
    raw = f"from transformers import CLIPModel\nCLIPModel.from_pretrained({str(TINY)!r}, attn_implementation={name!r})"
    python(raw, env)
    assert marker.exists(), "transformers does not fetch it, so this test shows nothing"
    marker.unlink()
    changed(clip, "config.json", attn_implementation=name)
    changed(sdxl, "text_encoder/config.json", _attn_implementation=name)
    for folder in (clip, sdxl):
        done = python(CALLS.format(calls=", ".join(PUBLIC) + ","), env, folder)
        assert "NO ERROR" not in done.stdout and "is refused" in done.stdout, done.stdout + done.stderr
    assert not marker.exists(), marker.read_text(encoding="utf-8")


READERS = ("from_pretrained", "from_config", "load_config", "from_single_file", "from_pipe")
OWN = {"ImagePreprocessor",  # ours
       "DiffusersAutoQuantizer",  # reads a configuration that was checked
       "Scheduler"}  # of diffusers, which looks for no code


def calls_that_read_models(source, name):
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in READERS: continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id in OWN: continue
        given = {word.arg: word.value for word in node.keywords}
        trusts = given.get("trust_remote_code")
        if not (isinstance(trusts, ast.Constant) and trusts.value is False): yield f"{name}:{node.lineno} {ast.unparse(node)[:100]}"


def test_no_lesson_reads_through_a_class_that_could_run_code():
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        for source in cells:
            if not any(reader in source for reader in READERS): continue
            code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
            found = [call for call in calls_that_read_models(code, path.name) if re.search(r" (\w+\.)*Auto\w+\.", call)]
            assert not found, "\n".join(found)


def test_every_call_that_reads_a_model_says_that_it_trusts_no_code():
    modules = sorted((ROOT / "devsky_nb").rglob("*.py"))
    found = [call for path in modules for call in calls_that_read_models(path.read_text(encoding="utf-8"), path.relative_to(ROOT))]
    assert not found, "\n".join(found)
    assert list(calls_that_read_models("AutoModel.from_pretrained(x)\nA.from_pretrained(x, trust_remote_code=True)", "x"))
