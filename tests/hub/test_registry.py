"The registry under threads, processes, crashes, damaged files, and against a real HTTP server that speaks the Hub's protocol."
import gc, hashlib, itertools, json, logging, os, re, shutil, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from patience import PATIENCE, wait_until

from devsky_nb.device import check_device
from devsky_nb.errors import DevSkyyError, InsufficientMemoryError, MLError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub import registry as registry_module
from devsky_nb.hub.models import edit_lock, find_spec, load_lock, ModelSpec
from devsky_nb.hub.pins import last_used
from devsky_nb.hub.registry import default_registry, load_model, ModelRegistry, registry_for
from devsky_nb.hub.weights import expected_bytes, model_bytes, networks
from hubcache import blob_name, make_repo

OLD, NEW = "a" * 40, "b" * 40
TINY = locate_model("tiny-clip")
FILES = {p.name: p.read_bytes() for p in TINY.iterdir() if p.suffix in (".json", ".safetensors")}


@pytest.fixture
def shop(tmp_path):
    "A cache with two small models, one of them in two versions."
    make_repo(tmp_path, "shop/clip", {OLD: FILES, NEW: {**FILES, "notes.json": b"{}"}}, {"main": NEW})
    make_repo(tmp_path, "shop/other", {OLD: FILES}, {"main": OLD})
    return tmp_path


def make_registry(shop, device="cpu", **options):
    r = ModelRegistry(shop, offline=True, device=device, **options)
    for name in ("clip", "other"): r.register(ModelSpec(name, f"shop/{name}", "clip"))
    return r


def in_memory(r):
    "The names of the models in memory, least recently used first."
    return [model.name for model in r._memory.models.values()]


def versions_in_memory(r): return [(model.name, Path(model.key.folder).name) for model in r._memory.models.values()]


def held_bytes(r): return sum(model.bytes for model in r._memory.models.values())


def python(code, *args, env={}):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE,
                          env={**os.environ, **env})


@pytest.fixture
def loads(monkeypatch):
    "Counts real loads."
    count, real = [], registry_module.load_folder

    def load_folder(*args):
        count.append(args[0])
        time.sleep(.05)
        return real(*args)
    monkeypatch.setattr(registry_module, "load_folder", load_folder)
    return count


# --- specs and names

@pytest.mark.parametrize("field,value",
                         [("alias", "../x"), ("alias", ""), ("repo_id", "a/b/c"), ("repo_id", "/etc"), ("repo_id", "a/b--c"),
                          ("kind", "gpt"), ("size_bytes", -1),
                                         ("allow_patterns", ()), ("allow_patterns", "*.json"), ("allow_patterns", ("*",)),
                                         ("allow_patterns", ("*.bin",)), ("allow_patterns", ("*.py",)),
                          ("allow_patterns", 5), ("revision", 5), ("variant", 5)])
def test_bad_specs_are_refused(field, value):
    with pytest.raises(ValidationError) as e: ModelSpec(**{"alias": "x", "repo_id": "shop/x", field: value})
    assert repr(value) in str(e.value) or f"pattern {value[0]!r}" in str(e.value)


def test_sdxl_patterns_take_the_fp16_components_and_nothing_else():
    from huggingface_hub.utils import filter_repo_objects
    here = ["model_index.json", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
            "vae_1_0/diffusion_pytorch_model.fp16.safetensors", "tokenizer/merges.txt", "text_encoder/model.onnx",
            "unet/pytorch_model.bin"]
    taken = list(filter_repo_objects(here, allow_patterns=list(find_spec("sdxl-base").allow_patterns)))
    assert taken == ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
                     "tokenizer/merges.txt"]


@pytest.mark.parametrize("name", ["../etc", "./x", "/x", "/no/such/folder", "a/b/c", "", "~", "x\0y", "a" * 5000, "tests",
                                  Path("openai/clip"), Path("/x"), "settings.ini"])
def test_names_that_are_no_model(name, tmp_path):
    with pytest.raises(ValidationError) as e: locate_model(name, tmp_path, offline=True)
    assert repr(str(name)) in str(e.value)


@pytest.mark.parametrize("name,command",
                         [("clip-vit-base", "devsky models prefetch clip-vit-base"),
                          ("openai/clip-vit-base-patch32", "devsky models prefetch clip-vit-base"),
                                          ("org/name", "hf download org/name")])
def test_offline_errors_name_both_ways_out(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError) as e: locate_model(name, tmp_path, offline=True)
    command = f"{command} --cache-dir {tmp_path}"
    assert f"`{command}`" in str(e.value) and "`--model tiny-clip`" in str(e.value) and "offline=True" in str(e.value)
    assert e.value.details["remedies"] == [command, "--model tiny-clip"] and json.dumps(e.value.to_dict())


@pytest.mark.parametrize("name, small", [("sdxl-base", "tiny-sdxl"), ("flux1-dev", "tiny-sdxl"), ("Qwen/Qwen-Image", "tiny-sdxl"), ("wan21-t2v-1.3b", "tiny-sdxl"), ("clip-vit-base", "tiny-clip"), ("siglip-base", None)])
def test_a_small_model_is_offered_of_the_kind_that_is_missing(name, small, tmp_path):
    with pytest.raises(ModelNotFoundError) as e: locate_model(name, tmp_path, offline=True)
    assert e.value.details["remedies"][1:] == ([f"--model {small}"] if small else []) and (small is None or f"`--model {small}`, which" in str(e.value))


@pytest.mark.parametrize("name, says", [("x.gguf", "load_quantized_pipeline('black-forest-labs/FLUX.1-dev', {'transformer': 'x.gguf'})"), ("models/X.GGUF", "'models/X.GGUF' is no model but a file"),
                                        (Path("wear.safetensors"), "from_single_file('wear.safetensors').save_pretrained(folder)")])
def test_a_file_of_weights_is_no_model_and_what_to_do_with_it_is_said(name, says, tmp_path):
    with pytest.raises(ValidationError) as e: locate_model(name, tmp_path, offline=True)
    assert says in str(e.value)


@pytest.mark.parametrize("of_transformers, of_the_hub", list(itertools.product([True, False], repeat=2)))
def test_a_load_leaves_the_libraries_as_they_were(of_transformers, of_the_hub, tmp_path, monkeypatch):
    import torch
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm as bars
    from transformers.utils import logging as messages
    monkeypatch.setattr(messages, "_tqdm_active", of_transformers)
    monkeypatch.setitem(sys.modules[bars.__module__].progress_bar_states, "_global", of_the_hub)
    log = logging.getLogger("transformers")
    def state(): return (messages.is_progress_bar_enabled(), not are_progress_bars_disabled(), log.handlers[:], log.level,
                         log.propagate, torch.get_default_dtype())
    damaged = Path(shutil.copytree(TINY, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(FILES["model.safetensors"][:1000])
    before = state()
    assert before[:2] == (of_transformers, of_the_hub)
    load_model("tiny-clip", "cpu", registry=ModelRegistry(tmp_path / "cache"))
    with pytest.raises(ModelLoadError): load_model(damaged, "cpu", registry=ModelRegistry(tmp_path / "cache"))
    assert state() == before


def test_a_revision_that_is_asked_for_counts_as_used(shop):
    assert last_used(shop) == {}
    make_registry(shop).locate("clip", revision=OLD)
    assert set(last_used(shop)) == {("shop/clip", OLD)}
    locate_model("shop/other", shop, offline=True)
    assert set(last_used(shop)) == {("shop/clip", OLD), ("shop/other", OLD)}


def test_a_folder_beside_us_does_not_hide_a_known_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "clip-vit-base")
    Path("openai/clip-vit-base-patch32").mkdir(parents=True)
    for name in ("clip-vit-base", "openai/clip-vit-base-patch32"):
        with pytest.raises(ModelNotFoundError): locate_model(name, tmp_path / "hub", offline=True)
    for name in (Path("clip-vit-base"), "./clip-vit-base"): assert locate_model(name) == tmp_path / "clip-vit-base"
    for name in (None, 5):
        with pytest.raises(ValidationError, match="expected an alias"): locate_model(name)


def test_the_registry_takes_whatever_names_a_model(shop, loads):
    r = ModelRegistry(shop, offline=True, device="cpu")
    assert r.get_model("shop/clip") is r.get_model("shop/clip")  # nobody registered it
    assert r.get_model(TINY) is r.get_model(str(TINY))
    assert r.get_model(TINY) is r.get_model("tiny-clip")
    assert len(loads) == 2
    with r.lease(TINY), pytest.raises(MLError, match="in use"): r.unload(TINY)
    with pytest.raises(ValidationError, match="has no versions"): r.get_model(TINY, "abc")
    assert r.unload(str(TINY)) == r.unload("shop/clip") > 0
    assert r.prefetch("shop/clip", OLD).ok
    with r.lease("shop/clip"): assert ("shop/clip", OLD) in versions_in_memory(r)


@pytest.mark.parametrize("limit", [0, -1, "1GB", float("nan"), 1.5])
def test_a_limit_is_a_number_of_bytes(limit):
    with pytest.raises(ValidationError, match="max_bytes=.*expected a whole number of at least 1"): ModelRegistry(max_bytes=limit)


def test_offline_by_environment_is_named_as_the_reason(tmp_path):
    done = python("from devsky_nb.hub.locate import locate_model; from devsky_nb.errors import MLError\ntry: locate_model('clip-vit-base')\nexcept MLError as e: print(e)",
                  env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert "HF_HUB_OFFLINE" in done.stdout and "devsky models prefetch clip-vit-base" in done.stdout, done.stderr


# --- damaged folders

def break_truncate(p): p.write_bytes(p.read_bytes()[:-1000])
def break_empty(p): p.write_bytes(b"")
def break_garbage(p): p.write_bytes(b"\xff" * 5000)


@pytest.mark.parametrize("damage", [break_truncate, break_empty, break_garbage, Path.unlink])
@pytest.mark.parametrize("where", ["cache", "folder"])
def test_damaged_weights_are_named_with_the_remedy(damage, where, shop, tmp_path):
    folder = locate_model("shop/other", shop, offline=True)
    if where == "folder": folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage((folder / "model.safetensors").resolve())
    with pytest.raises(ModelLoadError) as e:
        load_model("shop/other" if where == "cache" else folder, "cpu", cache_dir=shop, offline=True)
    assert "safetensors" in str(e.value)
    assert (f"hf download shop/other --revision {OLD} --force-download --cache-dir {shop}" if where == "cache" else "Copy or save the folder again") in str(e.value)
    assert damage not in (break_truncate, break_garbage) or e.value.original_error is not None


def test_a_snapshot_without_its_config_is_half_downloaded(shop):
    (shop / "models--shop--other" / "snapshots" / OLD / "config.json").unlink()
    with pytest.raises(ModelLoadError,
                       match="config.json: it was never downloaded. Fetch it again with `hf download shop/other --revision"):
        load_model("shop/other", "cpu", cache_dir=shop, offline=True)


def test_pickles_are_never_loaded(tmp_path):
    import torch
    from safetensors.torch import load_file
    folder = Path(shutil.copytree(TINY, tmp_path / "m"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no weights in this format"): load_model(folder, "cpu")


@pytest.mark.parametrize("change,message", [(lambda c: c["text_config"].update(num_hidden_layers=9), "are missing"),
                                            (lambda c: c.update(projection_dim=7), "cannot be loaded as CLIPModel|another shape"),
                                            (lambda c: c.update(model_type="bert"),
                                             "model of type 'bert', which this package cannot load yet")])
def test_weights_that_do_not_fit_the_config(change, message, tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=message): load_model(folder, "cpu")


def test_unreadable_config(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "m"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="config.json cannot be read"): load_model(folder, "cpu")


def test_dtype_must_be_a_dtype():
    with pytest.raises(ValidationError, match="expected a torch.dtype"): load_model("tiny-clip", "cpu", "float16")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    "A very small SDXL pipeline, saved as the Hub has it."
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    text = CLIPTextConfig(vocab_size=1000, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1,
                          projection_dim=32)
    unet = UNet2DConditionModel(block_out_channels=(32, 64), layers_per_block=1, sample_size=8,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
                                use_linear_projection=True, addition_embed_type="text_time",
                                addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, cross_attention_dim=64,
                                norm_num_groups=8)
    vae = AutoencoderKL(block_out_channels=[32], down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
                        norm_num_groups=8)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pipe = StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer, unet,
                                     EulerDiscreteScheduler())
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.mark.device
@pytest.mark.parametrize("variant", ["plain", "fp16"])
def test_a_pipeline_loads_completely(variant, sdxl, device):
    import torch
    pipe = load_model(sdxl / variant, device, torch.float16)
    assert {check_device(w.device) for part in (pipe.unet, pipe.vae, pipe.text_encoder_2) for w in part.parameters()} == {check_device(device)}
    weights = sum(p.stat().st_size for p in (sdxl / variant).rglob("*.safetensors"))
    assert (type(pipe).__name__, pipe.unet.dtype, pipe.unet.training) == ("StableDiffusionXLPipeline", torch.float16, False)
    assert .45 * weights < model_bytes(pipe) < .51 * weights
    assert abs(expected_bytes(sdxl / variant, torch.float16) - model_bytes(pipe)) < 2000


@pytest.fixture(scope="module")
def sharded(sdxl):
    "The same pipeline in half precision, each network in several files."
    pipe = load_model(sdxl / "plain", "cpu")
    pipe.save_pretrained(sdxl / "sharded", variant="fp16", max_shard_size="100KB")
    assert len(list((sdxl / "sharded" / "unet").glob("diffusion_pytorch_model.fp16-*-of-*.safetensors"))) > 1
    assert len(list((sdxl / "sharded" / "text_encoder").glob("model.fp16-*-of-*.safetensors"))) > 1
    return sdxl / "sharded"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sharded_variant_loads_completely(dtype, sharded, sdxl):
    import torch
    pipe, plain = (load_model(folder, "cpu", getattr(torch, dtype)) for folder in (sharded, sdxl / "plain"))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        saved, expected = getattr(pipe, name).state_dict(), getattr(plain, name).state_dict()
        assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    assert abs(expected_bytes(sharded, getattr(torch, dtype)) - model_bytes(pipe)) < 2000


@pytest.mark.parametrize("size", ["1MB", "1GB"])
def test_a_single_model_in_half_precision_alone_loads_completely(size, tmp_path):
    import torch
    from transformers import CLIPModel
    clip = Path(shutil.copytree(TINY, tmp_path / "clip"))
    (clip / "model.safetensors").unlink()
    CLIPModel.from_pretrained(TINY).half().save_pretrained(clip, variant="fp16", max_shard_size=size)
    names = {p.name for p in clip.glob("*.safetensors")}
    assert names and all(name.startswith("model.fp16") for name in names) and (len(names) > 1) == (size == "1MB")
    model, plain = load_model(clip, "cpu", torch.float32).state_dict(), load_model(TINY, "cpu", torch.float16).state_dict()
    assert model.keys() == plain.keys() and all(torch.equal(model[k], plain[k].float()) for k in plain)


def test_a_lost_shard_of_a_variant_is_named(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "p"))
    lost = sorted((folder / "unet").glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(ModelLoadError, match=f"unet/{lost.name}: .* lists it, and it was never downloaded"):
        load_model(folder, "cpu")


def test_two_variants_in_a_folder_count_once(sdxl, tmp_path):
    import torch
    folder = Path(shutil.copytree(sdxl / "plain", tmp_path / "both"))
    shutil.copytree(sdxl / "fp16", folder, dirs_exist_ok=True)
    for dtype in (torch.float16, torch.float32): assert expected_bytes(folder, dtype) == expected_bytes(sdxl / "plain", dtype)


def test_a_pipeline_with_lost_weights_is_refused(sdxl, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = Path(shutil.copytree(sdxl / "plain", tmp_path / "p"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lost = weights.pop("conv_in.weight")
    save_file(weights, file)
    with pytest.raises(ModelLoadError, match="conv_in.weight"): load_model(folder, "cpu")
    save_file({**weights, "conv_in.weight": lost}, file)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"]}))
    with pytest.raises(ModelLoadError, match="code from 'os'"): load_model(folder, "cpu")
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelLoadError, match="vae"): load_model(folder, "cpu")


# --- threads and memory

@pytest.mark.device
def test_32_threads_load_once(shop, loads, device):
    r, start = make_registry(shop, device), threading.Barrier(32)

    def get(_):
        start.wait()
        return r.get_model("clip")
    with ThreadPoolExecutor(32) as pool: models = list(pool.map(get, range(32)))
    assert len(loads) == 1 and len(set(map(id, models))) == 1


def test_a_failed_load_does_not_poison_the_name(shop, loads):
    r = make_registry(shop)
    blob = (locate_model("shop/clip", shop, offline=True) / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:1000])

    def get(_):
        try: return r.get_model("clip")
        except ModelLoadError as e: return e
    with ThreadPoolExecutor(8) as pool: assert all(isinstance(m, ModelLoadError) for m in pool.map(get, range(8)))
    blob.write_bytes(content)
    assert type(r.get_model("clip")).__name__ == "CLIPModel" and len(loads) == 1


def test_the_limit_is_in_bytes_and_the_least_recently_used_goes(shop, loads, device):
    size = model_bytes(load_model("tiny-clip", device))
    r = make_registry(shop, device, max_bytes=2 * size)
    r.get_model("clip"), r.get_model("other"), r.get_model("clip"), r.get_model("tiny-clip")
    assert in_memory(r) == ["clip", "tiny-clip"] and len(loads) == 4
    assert held_bytes(r) <= 2 * size
    r.get_model("clip")
    assert len(loads) == 4
    r.get_model("other")
    assert len(loads) == 5


@pytest.mark.device
def test_a_leased_model_is_never_evicted(shop, device):
    size = model_bytes(load_model("tiny-clip", device))
    r = make_registry(shop, device, max_bytes=size + 1000)
    with r.lease("clip") as model:
        with pytest.raises(InsufficientMemoryError) as e: r.get_model("other")
        assert e.value.details["leased"] == size and e.value.details["max_bytes"] == size + 1000
        assert r.get_model("clip") is model
        with pytest.raises(MLError, match="in use"): r.unload("clip")
    r.get_model("other")
    assert in_memory(r) == ["other"]


def test_eviction_passes_over_a_leased_model_although_it_is_the_oldest(shop):
    size = model_bytes(load_model("tiny-clip", "cpu"))
    r = make_registry(shop, max_bytes=2 * size + 1000)
    with r.lease("clip"):
        r.get_model("other"), r.get_model("tiny-clip")
        assert in_memory(r) == ["clip", "tiny-clip"]


def test_threads_that_lease_more_than_fits_keep_the_limit_and_their_models(shop, loads):
    size, bad, refused, leased, enough = model_bytes(load_model("tiny-clip", "cpu")), [], [], {k: 0 for k in range(4)}, 5
    r = make_registry(shop, max_bytes=2 * size + 1000)
    names = ["clip", "other", "tiny-clip", "shop/clip"]
    stop = time.monotonic() + PATIENCE  # if the others hold everything for ever

    def work(k):
        "Go on until each thread has had enough leases and somebody none, so that there is always someone to contend with."
        for i in itertools.count():
            if (min(leased.values()) >= enough and refused) or time.monotonic() > stop: return
            try:
                with r.lease(names[(i * (k + 1)) % 4]) as model:
                    for _ in range(2):
                        with r._memory.locked(): held = list(r._memory.models.values())
                        if sum(m.bytes for m in held) > r.max_bytes or not any(m.model is model for m in held): bad.append((k, i))
                        time.sleep(.001)
                leased[k] += 1
            except InsufficientMemoryError: refused.append((k, i))
    with ThreadPoolExecutor(4) as pool: list(pool.map(work, range(4)))
    assert not bad and all(m.leases == 0 for m in r._memory.models.values())
    assert min(leased.values()) >= enough
    assert refused
    assert len(loads) > 3


def test_leases_are_given_back_after_errors(shop):
    r = make_registry(shop)
    with pytest.raises(KeyError):
        with r.lease("clip"): raise KeyError
    assert r.unload("clip") > 0


def test_shared_weights_count_once():
    import torch
    net = torch.nn.Sequential(torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(100, 100, bias=False))
    assert model_bytes(net) == 80_000
    net[1].weight = net[0].weight
    assert model_bytes(net) == 40_000


MEMORY = """
import sys
from devsky_nb.device import process_memory
from devsky_nb.hub.registry import load_model
from devsky_nb.hub.models import ModelSpec
from devsky_nb.hub.registry import ModelRegistry
r = ModelRegistry(sys.argv[1], offline=True, device="cpu")
r.register(ModelSpec("big", "shop/big")); r.get_model("tiny-clip")
before = process_memory(); model = r.get_model("big")
total = sum(p.detach().sum().item() for p in model.parameters())
loaded = process_memory(); del model; freed = r.unload("big"); after = process_memory()
print(before, loaded, after, freed)
load_model(sys.argv[2], "cpu")
"""


@pytest.mark.slow
def test_memory_really_comes_back_and_loading_prints_nothing(tmp_path, sdxl):
    import torch
    from safetensors.torch import save
    from transformers import CLIPConfig, CLIPModel
    tower = dict(hidden_size=640, intermediate_size=2560, num_hidden_layers=5, num_attention_heads=8)
    config = CLIPConfig(text_config={**tower, "vocab_size": 1000}, vision_config={**tower, "image_size": 64, "patch_size": 16})
    with torch.device("meta"): shapes = {name: t.shape for name, t in CLIPModel(config).state_dict().items()}
    weights = save({name: torch.rand(shape) for name, shape in shapes.items()}, {"format": "pt"})
    make_repo(tmp_path, "shop/big",
              {OLD: {"config.json": config.to_json_string(use_diff=True).encode(), "model.safetensors": weights}}, {"main": OLD})
    done = python(MEMORY, tmp_path, sdxl / "fp16", env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    before, loaded, after, freed = map(int, done.stdout.split())
    assert freed > 190e6 and loaded - before > .9 * freed
    assert after - before < .1 * freed


# --- which revision

def test_a_revision_that_is_asked_for_wins_over_the_lockfile(shop):
    r = make_registry(shop)
    assert r.prefetch("clip", OLD).ok
    r.promote("clip", "production")
    (shop / "models--shop--clip" / "refs" / "v1").write_text(OLD)
    assert r.locate("clip").name == OLD
    for revision, commit in (("main", NEW), (NEW, NEW), (NEW[:8], NEW), ("v1", OLD), ("devsky/clip", OLD)):
        assert r.locate("clip", revision).name == commit
        with r.lease("clip", revision=revision) as model: assert r.get_model("clip", revision=commit) is model
    assert r.get_model("clip") is r.get_model("shop/clip", revision=OLD)
    assert r.get_model("clip") is not r.get_model("clip", revision="main")
    lease = r.lease("clip", revision="main")
    assert (lease.commit, lease.folder.name) == (NEW, NEW)


@pytest.mark.parametrize("revision", ["v2", NEW[:6], "c" * 40, "c" * 8])
def test_a_revision_that_is_not_here_is_not_replaced_by_another(revision, shop):
    with pytest.raises(ModelNotFoundError, match=f"revision {revision}\\) is not in the cache"):
        make_registry(shop).get_model("clip", revision=revision)


def test_the_beginning_of_two_commits_is_not_guessed(shop):
    make_repo(shop, "shop/clip", {OLD[:9] + "c" * 31: FILES})
    with pytest.raises(ValidationError, match="more than one cached revision 'aaaaaaaa'.*Give more digits"):
        make_registry(shop).get_model("clip", revision=OLD[:8])


@pytest.mark.parametrize("asked, message",
                         [({"revision": ""}, "expected a branch, a tag or a commit"), ({"revision": "../x"}, "expected a branch"),
                          ({"revision": 7}, "expected a branch"),
                                            ({"revision": "main", "stage": "production"}, "leave version and stage out"),
                                            ({"revision": "main", "version": "abc"}, "leave version and stage out")])
def test_what_contradicts_itself_is_refused(asked, message, shop):
    for call in (make_registry(shop).get_model, make_registry(shop).lease, make_registry(shop).locate):
        with pytest.raises(ValidationError, match=message): call("clip", **asked)
    for name in (TINY, "tiny-clip"):
        with pytest.raises(ValidationError, match="has no revisions"): make_registry(shop).get_model(name, revision="main")


def test_two_lockfiles_pin_two_commits_of_one_cache(shop, tmp_path):
    "A registry's own lockfile holds for whatever is loaded through it, and for nothing else."
    here, there = (make_registry(shop, lockfile=tmp_path / f"{name}.json") for name in ("here", "there"))
    here.prefetch("clip", OLD), there.prefetch("clip", NEW)
    assert (here.locate("clip").name, there.locate("clip").name) == (OLD, NEW)
    assert load_model("clip", "cpu", registry=here).dtype == load_model("clip", "cpu", registry=there).dtype
    with here.lease("clip") as a, there.lease("clip") as b: assert a is not b
    with here.lease("clip") as a: assert here.get_model("clip", revision=OLD) is a


# --- leases, forms, defaults

def test_twenty_threads_lease_models_forms_and_revisions(shop, loads):
    "Whatever is the same model is one object, loaded once; all leases come back."
    import torch
    r, start, built = make_registry(shop), threading.Barrier(20), []

    def build(folder, device, dtype):
        built.append(folder)
        time.sleep(.05)
        return torch.nn.Linear(4, 4, dtype=dtype)
    kinds = [dict(name="clip"), dict(name="shop/clip", revision="main"), dict(name="clip", revision=OLD),
             dict(name="clip", form="head", load=build),
             dict(name="clip", dtype=torch.bfloat16)]

    def work(i):
        start.wait()
        asked = kinds[i % 5]
        with r.lease(**asked) as model:
            time.sleep(.02)
            return i % 5, id(model)
    with ThreadPoolExecutor(20) as pool: found = set(pool.map(work, range(20)))
    assert len(found) == 5 and len({model for _, model in found}) == 4  # main is the version that "clip" means
    assert (len(loads), len(built)) == (3, 1) and all(m.leases == 0 for m in r._memory.models.values())


FORK = """
import os, sys, threading
from devsky_nb.hub import load, registry
r = registry.ModelRegistry(sys.argv[1], offline=True)
held = threading.Event()

def hold():
    with r._memory.locked(), registry._MAKING, load.LOADING:
        held.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    with load.quiet(): print(r, registry.default_registry(sys.argv[1]) is not None, flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_fork_while_another_thread_holds_the_locks_leaves_the_child_free(tmp_path):
    done = python(FORK, tmp_path)
    assert "in memory: none) True" in done.stdout, done.stderr


def test_loads_of_different_models_do_not_wait_for_each_other(shop):
    import torch
    r, both = make_registry(shop), threading.Barrier(2, timeout=PATIENCE)

    def build(folder, device, dtype):
        both.wait()  # passes only if the other load is running too
        return torch.nn.Linear(4, 4)
    with ThreadPoolExecutor(2) as pool: leases = list(pool.map(lambda name: r.lease(name, form="x", load=build), ("clip", "other")))
    assert leases[0].model is not leases[1].model


def test_a_load_that_fails_leaves_no_reservation_and_no_lease(shop):
    r = make_registry(shop, max_bytes=1000)
    def fail(folder, device, dtype): raise MLError("no GPU")
    for _ in range(3):
        with pytest.raises(MLError, match="no GPU"): r.lease("clip", form="x", load=fail, needed=900)
    def exhaust(folder, device, dtype): raise MemoryError
    with pytest.raises(InsufficientMemoryError, match="clip does not fit on cpu"): r.lease("clip", form="x", load=exhaust)
    def interrupt(folder, device, dtype): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): r.lease("clip", form="x", load=interrupt, needed=900)
    assert in_memory(r) == [] and len(r._memory._turns) == 0


def test_a_form_that_turns_out_larger_than_said_is_refused_and_dropped(shop):
    import torch
    r = make_registry(shop, max_bytes=1000)
    with pytest.raises(InsufficientMemoryError, match="clip needs 3.9 KiB"):
        r.lease("clip", form="x", load=lambda *_: torch.nn.Linear(1000, 1, bias=False), needed=10)
    assert in_memory(r) == []


def test_whoever_only_passes_is_waited_for(shop, loads):
    "Room for one model, and threads that each want another for a moment: nobody is refused."
    size = model_bytes(load_model("tiny-clip", "cpu"))
    r, start = make_registry(shop, max_bytes=size + 1000), threading.Barrier(3)

    def get(name):
        start.wait()
        return type(r.get_model(name)).__name__
    with ThreadPoolExecutor(3) as pool: assert list(pool.map(get, ("clip", "other", "tiny-clip"))) == ["CLIPModel"] * 3
    assert held_bytes(r) <= size + 1000


def test_a_load_may_lease_another_model(shop):
    import torch
    r = make_registry(shop, max_bytes=20_000_000)
    def build(folder, device, dtype):
        with r.lease("other") as other: return torch.nn.Linear(other.config.projection_dim, 1)
    with r.lease("clip", form="head", load=build) as head: assert head.in_features == 128
    small = make_registry(shop, max_bytes=1000)
    def too_large(folder, device, dtype): return small.get_model("other")
    with pytest.raises(InsufficientMemoryError): small.lease("clip", form="head", load=too_large, needed=900)  # and no dead end


def test_a_lease_that_is_collected_gives_itself_back(shop):
    r = make_registry(shop)
    lease = r.lease("clip")
    with pytest.raises(MLError, match="1 lease"): r.unload("clip")
    del lease
    assert r.unload("clip") > 0
    lease = r.lease("clip")
    lease.release(), lease.release()
    with pytest.raises(MLError, match="has been given back"): lease.model
    assert [m.leases for m in r._memory.models.values()] == [0]


def test_a_lease_in_a_circle_of_references_does_not_keep_others_out(shop):
    r = make_registry(shop, max_bytes=int(1.5 * expected_bytes(TINY, load_model(TINY, "cpu").dtype)))
    gc.disable()
    try:
        lease = r.lease("clip")
        lease.holder = lease
        del lease
        assert r.get_model("other") is not None
    finally: gc.enable()
    assert in_memory(r) == ["other"]


@pytest.mark.parametrize("needed", [-1, "1GB", 2.5, True])
def test_what_a_form_needs_is_a_number_of_bytes(needed, shop):
    with pytest.raises(ValidationError, match="needed="):
        make_registry(shop).lease("clip", form="f", load=lambda *_: object(), needed=needed)


def test_only_a_specification_is_registered(shop):
    with pytest.raises(ValidationError, match="expected a ModelSpec"): make_registry(shop).register("shop/clip")


def test_leases_that_are_collected_under_the_lock_do_not_hang(shop):
    "The collector runs at any moment, also while the thread itself holds the lock."
    import gc
    r = make_registry(shop)
    for _ in range(10):
        ring = [r.lease("clip")]
        ring.append(ring)
        del ring
        with r._memory.locked(): gc.collect(0)
    gc.collect()
    assert [m.leases for m in r._memory.models.values()] == [0]


def test_what_somebody_still_has_is_not_loaded_again(shop, loads):
    size = model_bytes(load_model("tiny-clip", "cpu"))
    loads.clear()
    r = make_registry(shop, max_bytes=size + 1000)
    model = r.get_model("clip")
    r.get_model("other")
    assert in_memory(r) == ["other"] and r.get_model("clip") is model and len(loads) == 2 and in_memory(r) == ["clip"]
    r.unload("clip")
    assert r.get_model("clip") is not model


def test_weights_that_were_saved_anew_are_loaded_anew(tmp_path, shop):
    from safetensors.torch import load_file, save_file
    folder, r = Path(shutil.copytree(TINY, tmp_path / "mine")), make_registry(shop)
    lease = r.lease(folder)
    assert r.get_model(folder) is lease.model
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    again = r.get_model(folder)
    assert again is not lease.model
    assert (again.visual_projection.weight == 2 * lease.model.visual_projection.weight).all()


def mapped(folder):
    "The files of a folder that this process has in its memory."
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads from /proc which files are mapped")
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sdxl"])
def test_no_weight_changes_with_its_file_while_it_is_in_use(name, tmp_path):
    import torch
    folder = Path(shutil.copytree(locate_model(name), tmp_path / "mine"))
    with ModelRegistry(tmp_path, device="cpu").lease(folder, dtype=torch.float16) as model:
        before = [weight.clone() for network in networks(model) for weight in network.parameters()]
        assert before[0].dtype == torch.float16 and mapped(folder) == []  # or a shorter file would end the process
        for file in folder.rglob("*.safetensors"):
            with file.open("r+b") as f: f.write(bytes(file.stat().st_size))
        after = [weight for network in networks(model) for weight in network.parameters()]
        assert all(map(torch.equal, before, after))


def test_the_blobs_of_a_cache_stay_mapped(shop):
    import torch
    if not Path("/proc/self/maps").exists(): pytest.skip("reads from /proc which files are mapped")
    with make_registry(shop).lease("clip", dtype=torch.float16): assert mapped(shop / "models--shop--clip" / "blobs")


def test_a_form_of_nothing_is_an_error(shop):
    r = make_registry(shop)
    with pytest.raises(MLError, match="has returned nothing for clip"): r.lease("clip", form="x", load=lambda *_: None)
    assert in_memory(r) == []


def test_evicted_weights_are_gone_before_others_are_loaded(shop):
    import torch, weakref
    r, gone = make_registry(shop, max_bytes=5000), []

    def build(folder, device, dtype):
        gone.append([old() is None for old in made])
        model = torch.nn.Linear(1000, 1, bias=False)
        made.append(weakref.ref(model))
        return model
    made = []
    for name in ("clip", "other"):
        with r.lease(name, form="x", load=build, needed=4000): pass
    assert gone == [[], [True]]


def test_device_and_dtype_make_another_model(shop):
    import torch
    r = make_registry(shop)
    assert r.get_model("clip", device="cpu:0") is r.get_model("clip", device="cpu") is r.get_model("clip", dtype=torch.float32)
    assert r.get_model("clip", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValidationError, match="device='cuda:99': "): r.get_model("clip", device="cuda:99")
    with pytest.raises(ValidationError, match="expected a torch.dtype"): r.lease("clip", dtype="fp16")


def test_the_default_registry_keeps_nothing_that_nobody_uses(shop):
    import gc, weakref
    r = default_registry(shop, True)
    assert r is default_registry(str(shop), True) is registry_for(None, shop, True)
    assert default_registry(shop / "other", True) is not r
    lease = r.lease("shop/clip")
    gone, again = weakref.ref(lease.model), r.lease("shop/clip", revision="main")
    assert again.model is lease.model
    lease.release()
    assert "shop/clip" in repr(r)
    again.release()
    gc.collect()
    assert gone() is None and "in memory: none" in repr(r)


def test_a_registry_brings_its_own_cache(shop):
    r = make_registry(shop)
    assert registry_for(r) is r
    for other in (dict(cache_dir=shop), dict(offline=True)):
        with pytest.raises(ValidationError, match="leave cache_dir and offline out"): registry_for(r, **other)
        with pytest.raises(ValidationError, match="leave cache_dir and offline out"): load_model("clip", registry=r, **other)
    with pytest.raises(ValidationError, match="expected a ModelRegistry"): registry_for("clip")


def test_a_registry_goes_to_another_process_without_its_models(shop):
    import pickle
    r = make_registry(shop, max_bytes=10**9)
    r.get_model("clip")
    copy = pickle.loads(pickle.dumps(r))
    assert (copy.max_bytes, copy.cache_dir, copy.offline, copy.spec("clip"), in_memory(copy)) == (10**9, shop, True, r.spec("clip"),
                                                                                                  [])
    assert pickle.loads(pickle.dumps(default_registry(shop, True))) is default_registry(shop, True)


def test_a_share_of_what_is_free_is_the_limit_where_none_is_given(shop, monkeypatch):
    from devsky_nb.device import MemoryInfo
    size = model_bytes(load_model("tiny-clip", "cpu"))
    r = make_registry(shop)
    monkeypatch.setattr(registry_module, "memory_info",
                        lambda device: MemoryInfo(device, int(size * 1.3) - held_bytes(r), size * 100))
    with r.lease("clip"):
        with pytest.raises(InsufficientMemoryError, match="that models may take on cpu"): r.get_model("other")
    r.get_model("other")
    assert in_memory(r) == ["other"]


# --- lockfile and stages

def test_versions_and_stages(shop):
    r = make_registry(shop)
    assert r.prefetch("clip", OLD).ok and r.prefetch("clip", NEW).ok
    assert [v["stage"] for v in r.versions("clip")] == ["development"] * 2
    with pytest.raises(ValidationError, match="2 versions can be meant"): r.promote("clip", "production")
    r.promote("clip", "production", OLD[:8])
    assert locate_model("shop/clip", shop, offline=True).name == NEW  # a bare id is the alias's business only where it is known
    with r.lease("clip"): assert versions_in_memory(r) == [("clip", OLD)]
    r.promote("clip", "production")
    assert [v["stage"] for v in r.versions("clip")] == ["archived", "production"]
    with pytest.raises(ModelNotFoundError, match="stage='archived'"): r.get_model("clip", OLD[:8])
    r.get_model("clip", stage="archived"), r.get_model("clip", NEW[:5], "production")
    assert [m["commit"] for m in r.specs().to_dict()["models"] if m["alias"] == "clip"] == [NEW]
    assert json.loads(r.lockfile.read_text(encoding="utf-8"))["models"]["clip"][0]["repo_id"] == "shop/clip"
    pruned = subprocess.run([Path(sys.executable).parent / "hf", "cache", "prune", "--yes", "--cache-dir", shop],
                            capture_output=True, text=True)
    assert pruned.returncode == 0 and r.verify("clip").ok and (shop / "models--shop--clip" / "snapshots" / OLD).is_dir()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": {"clip": [{"stage": "live"}]}}', '{"models": {"clip": [1]}}',
                                  '{"models": {"clip": [{"repo_id": "shop/clip", "commit": 5, "patterns": [], "stage": "staging", "locked_at": ""}]}}',
                                  '{"models": {"clip": [{"repo_id": "shop/clip", "commit": "../x", "patterns": [], "stage": "staging", "locked_at": ""}]}}'])
def test_a_damaged_lockfile_says_what_to_do(text, shop):
    r = make_registry(shop, lockfile=shop / "my.json")
    (shop / "my.json").write_text(text, encoding="utf-8")
    for use in (r.specs, lambda: r.get_model("clip"), lambda: r.prefetch("clip")):
        with pytest.raises(ValidationError, match="damaged .*prefetch the models again"): use()
    assert (shop / "my.json").read_text(encoding="utf-8") == text


def test_a_version_that_can_mean_two_is_not_guessed(shop):
    make_repo(shop, "shop/clip", {"a1" + "c" * 38: {**FILES, "n.json": b"{}"}})
    r = make_registry(shop)
    r.prefetch("clip", OLD), r.prefetch("clip", "a1" + "c" * 38)
    with pytest.raises(ValidationError, match="can mean aaaaaaaaaaaa or a1cccccccccc: give more digits"): r.get_model("clip", "a")
    assert r.get_model("clip", "a1")


def test_the_lock_of_another_repository_is_not_used(shop):
    make_registry(shop).prefetch("clip", OLD)
    r = ModelRegistry(shop, offline=True, device="cpu")
    r.register(ModelSpec("clip", "shop/other", "clip"))
    for use in (lambda: r.get_model("clip"), lambda: r.prefetch("clip", OLD), lambda: r.verify("clip")):
        with pytest.raises(ValidationError, match="locks 'clip' for shop/clip, not for shop/other"): use()


def test_a_locked_commit_that_is_gone_is_not_replaced_by_another(shop):
    r = make_registry(shop)
    r.prefetch("clip", OLD)
    shutil.rmtree(shop / "models--shop--clip" / "snapshots" / OLD)
    with pytest.raises(ModelNotFoundError, match=OLD): r.get_model("clip")


PROMOTE = """
import sys
from devsky_nb.hub.models import ModelSpec, edit_lock
from devsky_nb.hub.registry import ModelRegistry
from pathlib import Path
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    with edit_lock(Path(sys.argv[1])) as models:
        models.setdefault(sys.argv[2], []).append({"repo_id": "shop/x", "commit": f"{i:040x}", "patterns": ["*.json"] * 50, "stage": "development", "locked_at": "now"})
"""


def test_processes_lock_without_losing_a_version(tmp_path):
    lock = tmp_path / "lock.json"
    ps = [subprocess.Popen([sys.executable, "-c", PROMOTE, lock, f"m{i % 2}", "15"]) for i in range(4)]
    assert [p.wait(PATIENCE) for p in ps] == [0] * 4
    assert {k: len(v) for k, v in load_lock(lock).items()} == {"m0": 30, "m1": 30}


def test_a_killed_process_leaves_a_valid_lockfile(tmp_path):
    lock = tmp_path / "lock.json"
    for versions in (1, 5, 20, 40):
        p = subprocess.Popen([sys.executable, "-c", PROMOTE, lock, "m", "100000"])
        wait_until(lambda: len(load_lock(lock).get("m", ())) >= versions or p.poll() is not None, pause=.001)
        assert p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert len(load_lock(lock)["m"]) >= versions
    with edit_lock(lock) as models: assert models["m"]


# --- a Hub on this machine

class Hub(BaseHTTPRequestHandler):
    "The endpoints that snapshot_download uses."
    protocol_version = "HTTP/1.1"

    def send(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_GET(self):
        repos, path = self.server.repos, urlsplit(self.path).path
        self.server.log.append((self.command, path))
        if self.server.status: return self.send(b"{}", self.server.status, Content_Type="application/json")
        api = re.fullmatch(r"/api/models/(\w+/[\w-]+)/(revision|tree|discussions)/?(.*)", path)
        file = re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path)
        if not (api or file) or (api or file)[1] not in repos:
            return self.send(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound",
                             Content_Type="application/json")
        refs, commits = repos[(api or file)[1]]
        if file: return self.send_file(commits[file[2]], file[2], file[3])
        if api[2] == "discussions": answer = {"count": len(self.server.offers), "start": 0, "discussions": self.server.offers}
        else:
            commit = refs.get(api[3].replace("%2F", "/"), api[3])
            answer = {"id": api[1], "sha": commit, "siblings": [{"rfilename": n} for n in commits.get(commit, {})],
                      "private": False} if api[2] == "revision" else [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(b"blob %d\0" % len(d) + d).hexdigest(),
                 **({"lfs": {"oid": hashlib.sha256(d).hexdigest(), "size": len(d),
                             "pointerSize": 134}} if n.endswith((".safetensors", ".bin")) else {})}
                for n, d in commits[commit].items()]
        self.send(json.dumps(answer).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def send_file(self, files, commit, name):
        data = files[name]
        if self.command == "GET" and name.endswith(".safetensors") and self.server.cuts:
            self.server.cuts -= 1
            self.protocol_version, self.close_connection = "HTTP/1.0", True
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return self.wfile.write(data[:len(data) // 2])
        self.send(data, X_Repo_Commit=commit, ETag=f'"{blob_name(name, data)}"', Accept_Ranges="bytes")

    def log_message(self, *_): pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.log, server.offers, server.cuts, server.status = {}, [], [], 0, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(monkeypatch):
    "Ask a registry whose Hub is on this machine. Fetching has a process of its own, which gets the settings of this one."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")

    def ask(cache, hub, method, name, **env):
        for variable, value in env.items(): monkeypatch.setenv(variable, value)
        address = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        r = ModelRegistry(cache, device="cpu")
        r.register(ModelSpec("clip", "shop/clip", "clip"))
        try: answer = getattr(r, method)(name)
        except DevSkyyError as e: answer = e
        return answer if isinstance(answer, Path) else json.loads(json.dumps(answer.to_dict()))
    return ask


def test_prefetch_downloads_only_safe_files_and_locks_the_commit(hub, tmp_path, call):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: {**FILES, "pytorch_model.bin": b"\x80pickle", "model.py": b"evil()",
                                                   "README.md": b"# x"}}
    result = call(tmp_path, hub, "prefetch", "clip")
    assert result["ok"] and result["commit"] == NEW and result["verified"]["files"] == len(FILES)
    assert {p.name for p in Path(result["folder"]).iterdir()} == set(FILES)
    assert not [p for _, p in hub.log if p.endswith((".bin", ".py"))]
    hub.repos["shop/clip"] = {"main": OLD}, {OLD: FILES}  # main moves on; the lock does not
    r = make_registry(tmp_path)
    assert [(v["commit"], v["stage"]) for v in r.versions("clip")] == [(NEW, "development")]
    with r.lease("clip"): assert versions_in_memory(r) == [("clip", NEW)]


BOTH = [f"unet/diffusion_pytorch_model{v}.safetensors" for v in ("", ".fp16")] + [f"text_encoder/model{v}.safetensors" for v in ("", ".fp16")]
LISTED = {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}',
          "unet/config.json": b"{}",
          "text_encoder/config.json": b"{}",
          "sd_xl_base.safetensors": FILES["model.safetensors"]} | {name: FILES["model.safetensors"] for name in BOTH}


@pytest.mark.parametrize("name, lacks, expected", [
    ("shop/wear", [], ["text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]),
    ("shop/wear", ["unet/diffusion_pytorch_model.fp16.safetensors"],
     ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"])])
def test_of_an_unknown_repository_each_network_is_fetched_once(name, lacks, expected, hub, tmp_path, call):
    hub.repos[name] = {"main": NEW}, {NEW: {n: d for n, d in LISTED.items() if n not in lacks}}
    folder = Path(call(tmp_path, hub, "prefetch", name)["folder"])
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")) == expected
    log = len(hub.log)
    assert call(tmp_path, hub, "locate", name) == folder
    assert len(hub.log) == log


def test_a_single_model_is_fetched_in_full_precision(hub, tmp_path, call):
    hub.repos["shop/towel"] = {"main": NEW}, {NEW: {**FILES, "model.fp16.safetensors": FILES["model.safetensors"],
                                                    "onnx/model.safetensors": FILES["model.safetensors"]}}
    folder = Path(call(tmp_path, hub, "prefetch", "shop/towel")["folder"])
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_prefetch_replaces_a_damaged_file(hub, tmp_path, call):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: FILES}
    folder = Path(call(tmp_path, hub, "prefetch", "clip")["folder"])
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-5] + b"wrong")
    assert call(tmp_path, hub, "verify", "clip")["ok"] is False
    assert call(tmp_path, hub, "prefetch", "clip")["ok"] and call(tmp_path, hub, "verify", "clip")["ok"]


@pytest.mark.slow
def test_prefetch_replaces_a_damaged_copy_where_there_are_no_links(hub, tmp_path, call):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: FILES}
    fetched = call(tmp_path, hub, "prefetch", "clip", HF_HUB_DISABLE_SYMLINKS="1")
    weights = Path(fetched["folder"]) / "model.safetensors"
    assert not weights.is_symlink() and fetched["verified"]["unchecked"] == 0
    weights.write_bytes(weights.read_bytes()[:-5] + b"wrong")
    assert call(tmp_path, hub, "verify", "clip")["ok"] is False
    assert call(tmp_path, hub, "prefetch", "clip", HF_HUB_DISABLE_SYMLINKS="1")["ok"]
    assert weights.read_bytes() == FILES["model.safetensors"]


def test_pickles_on_main_are_left_for_the_converters_safetensors(hub, tmp_path, call):
    pickled = {**{n: d for n, d in FILES.items() if not n.endswith(".safetensors")}, "pytorch_model.bin": b"\x80pickle"}
    hub.repos["shop/clip"] = {"main": OLD, "refs/pr/3": NEW}, {OLD: pickled, NEW: {**pickled, **FILES}}
    refused = call(tmp_path, hub, "prefetch", "clip")
    assert not refused.get("ok") and "weights" in json.dumps(refused)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-models*"))
    offer = {"num": 3, "title": "Adding `safetensors` variant of this model", "status": "open", "isPullRequest": True,
             "createdAt": "2023-01-01T00:00:00.000Z",
             "author": {"name": "SFconvertbot"}, "repo": {"name": "shop/clip", "type": "model"}}
    hub.offers = [{**offer, "num": 2, "author": {"name": "mallory"}}, offer]
    assert call(tmp_path, hub, "prefetch", "clip")["commit"] == NEW
    assert type(make_registry(tmp_path).get_model("clip")).__name__ == "CLIPModel"


def test_a_repository_that_does_not_exist(hub, tmp_path, call):
    error = call(tmp_path, hub, "prefetch", "shop/hats")
    assert error["error_type"] == "ModelNotFoundError"
    assert "the Hub refuses" in error["message"]
    assert "Is that its name?" in error["message"] and "hf download" not in error["message"]


@pytest.mark.parametrize("name", ["clip-vit-base", "org/name"])
def test_an_unreachable_hub_is_a_clear_error_soon(name, tmp_path, call):
    error = call(tmp_path, "http://127.0.0.1:9", "prefetch", name)
    assert error["error_type"] == "ModelNotFoundError"
    assert "could not be reached" in error["message"]
    assert "call again" in error["message"] and "devsky models prefetch" not in error["message"]


def test_the_network_is_not_touched_for_what_is_cached(hub, shop, call):
    assert call(shop, hub, "locate", "shop/clip").name == NEW and hub.log == []


def test_a_download_that_breaks_off_goes_on_by_itself(hub, tmp_path, call):
    hub.repos["shop/clip"], hub.cuts = ({"main": NEW}, {NEW: FILES}), 1
    assert call(tmp_path, hub, "prefetch", "clip")["ok"] and hub.cuts == 0


def test_a_download_that_keeps_breaking_is_a_typed_error_and_leaves_nothing_that_looks_whole(hub, tmp_path, call):
    hub.repos["shop/clip"], hub.cuts = ({"main": NEW}, {NEW: FILES}), 1000
    error = call(tmp_path, hub, "prefetch", "clip")
    assert error["error_type"] == "ModelNotFoundError" and "could not be reached" in error["message"]
    with pytest.raises(MLError): make_registry(tmp_path).get_model("clip")
    hub.cuts = 0
    assert call(tmp_path, hub, "prefetch", "clip")["ok"]


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(tmp_path, call):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = call(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", "prefetch", "clip")
    assert error["error_type"] == "ModelNotFoundError"
    assert "could not be reached (timed out)" in error["message"]


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_a_hub_that_refuses_is_not_called_unreachable(status, hub, tmp_path, call):
    hub.repos["shop/clip"], hub.status = ({"main": NEW}, {NEW: FILES}), status
    error = call(tmp_path, hub, "prefetch", "clip", HF_TOKEN="hf_secret")
    assert "the Hub refuses: " in error["message"]
    assert str(status) in error["message"]
    assert "hf_secret" not in json.dumps(error)


def test_a_disk_that_takes_no_more_is_not_called_a_network(hub, tmp_path, call):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: FILES}
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try: error = call(tmp_path, hub, "prefetch", "clip")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be kept" in error["message"]
    assert "File too large" in error["message"]
    assert "reached" not in error["message"]
