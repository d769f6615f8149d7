"The registry under threads, processes, crashes, damaged files, and against a real HTTP server that speaks the Hub's protocol."
import hashlib, itertools, json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from devsky_nb import registry as reg
from devsky_nb.errors import InsufficientMemoryError, MLError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.registry import ModelRegistry, ModelSpec, find_spec, load_model, locate_model
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


def make_registry(shop, **options):
    r = ModelRegistry(shop, offline=True, device="cpu", **options)
    for name in ("clip", "other"): r.register(ModelSpec(name, f"shop/{name}", "clip"))
    return r


def python(code, *args, env={}, timeout=60):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})


@pytest.fixture
def loads(monkeypatch):
    "Counts real loads."
    count, real = [], reg.load_folder

    def load_folder(*args):
        count.append(args[0])
        time.sleep(.05)
        return real(*args)
    monkeypatch.setattr(reg, "load_folder", load_folder)
    return count


# --- specs and names

@pytest.mark.parametrize("field,value", [("alias", "../x"), ("alias", ""), ("repo_id", "a/b/c"), ("repo_id", "/etc"), ("repo_id", "a/b--c"), ("kind", "gpt"), ("size_bytes", -1),
                                         ("allow_patterns", ()), ("allow_patterns", "*.json"), ("allow_patterns", ("*",)), ("allow_patterns", ("*.bin",)), ("allow_patterns", ("*.py",))])
def test_bad_specs_are_refused(field, value):
    with pytest.raises(ValidationError) as e: ModelSpec(**{"alias": "x", "repo_id": "shop/x", field: value})
    assert repr(value) in str(e.value) or f"pattern {value[0]!r}" in str(e.value)


def test_sdxl_patterns_take_the_fp16_components_and_nothing_else():
    from huggingface_hub.utils import filter_repo_objects
    here = ["model_index.json", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
            "vae_1_0/diffusion_pytorch_model.fp16.safetensors", "tokenizer/merges.txt", "text_encoder/model.onnx", "unet/pytorch_model.bin"]
    taken = list(filter_repo_objects(here, allow_patterns=list(find_spec("sdxl-base").allow_patterns)))
    assert taken == ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json", "tokenizer/merges.txt"]


@pytest.mark.parametrize("name", ["../etc", "./x", "/x", "/no/such/folder", "a/b/c", "", "~", "x\0y", "a" * 5000, "tests", Path("openai/clip"), Path("/x"), "settings.ini"])
def test_names_that_are_no_model(name, tmp_path):
    with pytest.raises(ValidationError) as e: locate_model(name, tmp_path, offline=True)
    assert repr(str(name)) in str(e.value)


@pytest.mark.parametrize("name,command", [("clip-vit-base", "devsky models prefetch clip-vit-base"), ("openai/clip-vit-base-patch32", "devsky models prefetch clip-vit-base"),
                                          ("org/name", "hf download org/name")])
def test_offline_errors_name_both_ways_out(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError) as e: locate_model(name, tmp_path, offline=True)
    assert f"`{command}`" in str(e.value) and "`--model tiny-clip`" in str(e.value) and "offline=True" in str(e.value)
    assert e.value.details["remedies"] == [command, "--model tiny-clip"] and json.dumps(e.value.to_dict())


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
    assert r.get_model(TINY) is r.get_model(str(TINY)) and r.get_model(TINY) is not r.get_model("tiny-clip") and len(loads) == 3
    with r.lease(TINY), pytest.raises(MLError, match="in use"): r.unload(TINY)
    with pytest.raises(ValidationError, match="has no versions"): r.get_model(TINY, "abc")
    assert r.unload(str(TINY)) == r.unload("shop/clip") > 0
    assert r.prefetch("shop/clip", OLD).ok
    with r.lease("shop/clip"): assert ("shop--clip", OLD) in r._loaded


@pytest.mark.parametrize("limit", [0, -1, "1GB", float("nan"), 1.5])
def test_a_limit_is_a_number_of_bytes(limit):
    with pytest.raises(ValidationError, match="whole bytes"): ModelRegistry(max_bytes=limit)


def test_offline_by_environment_is_named_as_the_reason(tmp_path):
    done = python("from devsky_nb.registry import *; from devsky_nb.errors import MLError\ntry: locate_model('clip-vit-base')\nexcept MLError as e: print(e)",
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
    with pytest.raises(ModelLoadError) as e: load_model("shop/other" if where == "cache" else folder, "cpu", cache_dir=shop, offline=True)
    assert "safetensors" in str(e.value) and (f"hf download shop/other --revision {OLD} --force-download --cache-dir {shop}" if where == "cache" else "Copy or save the folder again") in str(e.value)
    assert damage not in (break_truncate, break_garbage) or e.value.original_error is not None


def test_a_snapshot_without_its_config_is_half_downloaded(shop):
    (shop / "models--shop--other" / "snapshots" / OLD / "config.json").unlink()
    with pytest.raises(ModelLoadError, match="config.json: it was never downloaded. Fetch it again with `hf download shop/other --revision"):
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
                                            (lambda c: c.update(model_type="bert"), "model_type 'bert'")])
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
    text = CLIPTextConfig(vocab_size=1000, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, projection_dim=32)
    unet = UNet2DConditionModel(block_out_channels=(32, 64), layers_per_block=1, sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
                                addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, cross_attention_dim=64, norm_num_groups=8)
    vae = AutoencoderKL(block_out_channels=[32], down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], norm_num_groups=8)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pipe = StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer, unet, EulerDiscreteScheduler())
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.mark.parametrize("variant", ["plain", "fp16"])
def test_a_pipeline_loads_completely(variant, sdxl):
    import torch
    pipe = load_model(sdxl / variant, "cpu", torch.float16)
    weights = sum(p.stat().st_size for p in (sdxl / variant).rglob("*.safetensors"))
    assert (type(pipe).__name__, pipe.unet.dtype, pipe.unet.training) == ("StableDiffusionXLPipeline", torch.float16, False)
    assert .45 * weights < reg.model_bytes(pipe) < .51 * weights
    assert abs(reg.expected_bytes(sdxl / variant, torch.float16) - reg.model_bytes(pipe)) < 2000


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

def test_32_threads_load_once(shop, loads):
    r, start = make_registry(shop), threading.Barrier(32)

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


def test_the_limit_is_in_bytes_and_the_least_recently_used_goes(shop, loads):
    size = reg.model_bytes(load_model("tiny-clip", "cpu"))
    r = make_registry(shop, max_bytes=2 * size)
    r.get_model("clip"), r.get_model("other"), r.get_model("clip"), r.get_model("tiny-clip")
    assert [k[0] for k in r._loaded] == ["clip", "tiny-clip"] and len(loads) == 4
    assert sum(m.bytes for m in r._loaded.values()) <= 2 * size
    r.get_model("clip")
    assert len(loads) == 4
    r.get_model("other")
    assert len(loads) == 5


def test_a_leased_model_is_never_evicted(shop):
    size = reg.model_bytes(load_model("tiny-clip", "cpu"))
    r = make_registry(shop, max_bytes=size + 1000)
    with r.lease("clip") as model:
        with pytest.raises(InsufficientMemoryError) as e: r.get_model("other")
        assert e.value.details["leased"] == size and e.value.details["max_bytes"] == size + 1000
        assert r.get_model("clip") is model
        with pytest.raises(MLError, match="in use"): r.unload("clip")
    r.get_model("other")
    assert [k[0] for k in r._loaded] == ["other"]


def test_eviction_passes_over_a_leased_model_although_it_is_the_oldest(shop):
    size = reg.model_bytes(load_model("tiny-clip", "cpu"))
    r = make_registry(shop, max_bytes=2 * size + 1000)
    with r.lease("clip"):
        r.get_model("other"), r.get_model("tiny-clip")
        assert [k[0] for k in r._loaded] == ["clip", "tiny-clip"]


def test_threads_that_lease_more_than_fits_keep_the_limit_and_their_models(shop, loads):
    size, bad, refused, leased, enough = reg.model_bytes(load_model("tiny-clip", "cpu")), [], [], {k: 0 for k in range(4)}, 25
    r = make_registry(shop, max_bytes=2 * size + 1000)
    names = ["clip", "other", "tiny-clip", "shop/clip"]
    stop = time.monotonic() + 120  # if the others hold everything for ever

    def work(k):
        "Go on until each thread has had enough leases, so that there is always someone to contend with."
        for i in itertools.count():
            if min(leased.values()) >= enough or time.monotonic() > stop: return
            try:
                with r.lease(names[(i * (k + 1)) % 4]) as model:
                    for _ in range(2):
                        with r._state: held = list(r._loaded.values())
                        if sum(m.bytes for m in held) > r.max_bytes or not any(m.model is model for m in held): bad.append((k, i))
                        time.sleep(.001)
                leased[k] += 1
            except InsufficientMemoryError: refused.append((k, i))
    with ThreadPoolExecutor(4) as pool: list(pool.map(work, range(4)))
    assert not bad and all(m.leases == 0 for m in r._loaded.values())
    assert min(leased.values()) >= enough and refused and len(loads) > 3  # there was work, there was contention, and models were evicted


def test_leases_are_given_back_after_errors(shop):
    r = make_registry(shop)
    with pytest.raises(KeyError):
        with r.lease("clip"): raise KeyError
    assert r.unload("clip") > 0


def test_shared_weights_count_once():
    import torch
    net = torch.nn.Sequential(torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(100, 100, bias=False))
    assert reg.model_bytes(net) == 80_000
    net[1].weight = net[0].weight
    assert reg.model_bytes(net) == 40_000


MEMORY = """
import sys
from devsky_nb.device import process_memory
from devsky_nb.registry import ModelRegistry, ModelSpec, load_model
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
    make_repo(tmp_path, "shop/big", {OLD: {"config.json": config.to_json_string(use_diff=True).encode(), "model.safetensors": weights}}, {"main": OLD})
    done = python(MEMORY, tmp_path, sdxl / "fp16", env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    before, loaded, after, freed = map(int, done.stdout.split())
    assert freed > 190e6 and loaded - before > .9 * freed
    assert after - before < .1 * freed


# --- lockfile and stages

def test_versions_and_stages(shop):
    r = make_registry(shop)
    assert r.prefetch("clip", OLD).ok and r.prefetch("clip", NEW).ok
    assert [v["stage"] for v in r.versions("clip")] == ["development"] * 2
    with pytest.raises(ValidationError, match="2 versions can be meant"): r.promote("clip", "production")
    r.promote("clip", "production", OLD[:8])
    assert locate_model("shop/clip", shop, offline=True).name == NEW  # a bare id is the alias's business only where it is known
    with r.lease("clip"): assert list(r._loaded) == [("clip", OLD)]
    r.promote("clip", "production")
    assert [v["stage"] for v in r.versions("clip")] == ["archived", "production"]
    with pytest.raises(ModelNotFoundError, match="stage='archived'"): r.get_model("clip", OLD[:8])
    r.get_model("clip", stage="archived"), r.get_model("clip", NEW[:5], "production")
    assert [m["commit"] for m in r.specs().to_dict()["models"] if m["alias"] == "clip"] == [NEW]
    assert json.loads(r.lockfile.read_text(encoding="utf-8"))["models"]["clip"][0]["repo_id"] == "shop/clip"
    pruned = subprocess.run([Path(sys.executable).parent / "hf", "cache", "prune", "--yes", "--cache-dir", shop], capture_output=True, text=True)
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
from devsky_nb.registry import ModelRegistry, ModelSpec, edit_lock
from pathlib import Path
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    with edit_lock(Path(sys.argv[1])) as models:
        models.setdefault(sys.argv[2], []).append({"repo_id": "shop/x", "commit": f"{i:040x}", "patterns": ["*.json"] * 50, "stage": "development", "locked_at": "now"})
"""


def test_processes_lock_without_losing_a_version(tmp_path):
    lock = tmp_path / "lock.json"
    ps = [subprocess.Popen([sys.executable, "-c", PROMOTE, lock, f"m{i % 2}", "15"]) for i in range(4)]
    assert [p.wait(60) for p in ps] == [0] * 4
    assert {k: len(v) for k, v in reg.read_lock(lock).items()} == {"m0": 30, "m1": 30}


def test_a_killed_process_leaves_a_valid_lockfile(tmp_path):
    lock = tmp_path / "lock.json"
    for versions in (1, 5, 20, 40):
        p, stop = subprocess.Popen([sys.executable, "-c", PROMOTE, lock, "m", "100000"]), time.monotonic() + 60
        while len(reg.read_lock(lock).get("m", ())) < versions:
            assert time.monotonic() < stop and p.poll() is None
            time.sleep(.001)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert len(reg.read_lock(lock)["m"]) >= versions
    with reg.edit_lock(lock) as models: assert models["m"]


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
            return self.send(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound", Content_Type="application/json")
        refs, commits = repos[(api or file)[1]]
        if file: return self.send_file(commits[file[2]], file[2], file[3])
        if api[2] == "discussions": answer = {"count": len(self.server.offers), "start": 0, "discussions": self.server.offers}
        else:
            commit = refs.get(api[3].replace("%2F", "/"), api[3])
            answer = {"id": api[1], "sha": commit, "siblings": [], "private": False} if api[2] == "revision" else [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(b"blob %d\0" % len(d) + d).hexdigest(),
                 **({"lfs": {"oid": hashlib.sha256(d).hexdigest(), "size": len(d), "pointerSize": 134}} if n.endswith((".safetensors", ".bin")) else {})}
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


CALL = """
import json, sys
from devsky_nb.errors import DevSkyyError
from devsky_nb.registry import ModelRegistry, ModelSpec
r = ModelRegistry(sys.argv[1], device="cpu")
r.register(ModelSpec("clip", "shop/clip", "clip"))
try: print(json.dumps(getattr(r, sys.argv[2])(sys.argv[3]).to_dict()))
except DevSkyyError as e: print(json.dumps(e.to_dict()))
"""


def call(cache, hub, method, name, code=CALL, **env):
    address = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
    done = python(code, cache, method, name, env={"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **env})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_prefetch_downloads_only_safe_files_and_locks_the_commit(hub, tmp_path):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: {**FILES, "pytorch_model.bin": b"\x80pickle", "model.py": b"evil()", "README.md": b"# x"}}
    result = call(tmp_path, hub, "prefetch", "clip")
    assert result["ok"] and result["commit"] == NEW and result["verified"]["files"] == len(FILES)
    assert {p.name for p in Path(result["folder"]).iterdir()} == set(FILES)
    assert not [p for _, p in hub.log if p.endswith((".bin", ".py"))]
    hub.repos["shop/clip"] = {"main": OLD}, {OLD: FILES}  # main moves on; the lock does not
    r = make_registry(tmp_path)
    assert [(v["commit"], v["stage"]) for v in r.versions("clip")] == [(NEW, "development")]
    with r.lease("clip"): assert list(r._loaded) == [("clip", NEW)]


def test_prefetch_replaces_a_damaged_file(hub, tmp_path):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: FILES}
    folder = Path(call(tmp_path, hub, "prefetch", "clip")["folder"])
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-5] + b"wrong")
    assert call(tmp_path, hub, "verify", "clip")["ok"] is False
    assert call(tmp_path, hub, "prefetch", "clip")["ok"] and call(tmp_path, hub, "verify", "clip")["ok"]


def test_pickles_on_main_are_left_for_the_converters_safetensors(hub, tmp_path):
    pickled = {**{n: d for n, d in FILES.items() if not n.endswith(".safetensors")}, "pytorch_model.bin": b"\x80pickle"}
    hub.repos["shop/clip"] = {"main": OLD, "refs/pr/3": NEW}, {OLD: pickled, NEW: {**pickled, **FILES}}
    refused = call(tmp_path, hub, "prefetch", "clip")
    assert not refused.get("ok") and "weights" in json.dumps(refused)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-models*"))
    offer = {"num": 3, "title": "Adding `safetensors` variant of this model", "status": "open", "isPullRequest": True, "createdAt": "2023-01-01T00:00:00.000Z",
             "author": {"name": "SFconvertbot"}, "repo": {"name": "shop/clip", "type": "model"}}
    hub.offers = [{**offer, "num": 2, "author": {"name": "mallory"}}, offer]
    assert call(tmp_path, hub, "prefetch", "clip")["commit"] == NEW
    assert type(make_registry(tmp_path).get_model("clip")).__name__ == "CLIPModel"


def test_a_repository_that_does_not_exist(hub, tmp_path):
    error = call(tmp_path, hub, "prefetch", "shop/hats")
    assert error["error_type"] == "ModelNotFoundError" and "the Hub refuses" in error["message"] and "hf download shop/hats" in error["message"]


@pytest.mark.parametrize("name", ["clip-vit-base", "org/name"])
def test_an_unreachable_hub_is_a_clear_error_soon(name, tmp_path):
    error = call(tmp_path, "http://127.0.0.1:9", "prefetch", name)  # within the minute that `python` grants
    assert error["error_type"] == "ModelNotFoundError" and "could not be reached" in error["message"] and "--model tiny-clip" in error["message"]


def test_the_network_is_not_touched_for_what_is_cached(hub, shop):
    code = "import sys, json; from devsky_nb.registry import locate_model; print(json.dumps(locate_model('shop/clip', sys.argv[1]).name))"
    assert call(shop, hub, "", "", code) == NEW and hub.log == []


def test_a_download_that_breaks_off_goes_on_by_itself(hub, tmp_path):
    hub.repos["shop/clip"], hub.cuts = ({"main": NEW}, {NEW: FILES}), 1
    assert call(tmp_path, hub, "prefetch", "clip")["ok"] and hub.cuts == 0


def test_a_download_that_keeps_breaking_is_a_typed_error_and_leaves_nothing_that_looks_whole(hub, tmp_path):
    hub.repos["shop/clip"], hub.cuts = ({"main": NEW}, {NEW: FILES}), 1000
    error = call(tmp_path, hub, "prefetch", "clip")
    assert error["error_type"] == "ModelNotFoundError" and "could not be reached" in error["message"]
    with pytest.raises(MLError): make_registry(tmp_path).get_model("clip")
    hub.cuts = 0
    assert call(tmp_path, hub, "prefetch", "clip")["ok"]


def test_a_hub_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = call(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", "prefetch", "clip")
    assert error["error_type"] == "ModelNotFoundError" and "could not be reached (timed out)" in error["message"]  # within the minute that `python` grants


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_a_hub_that_refuses_is_not_called_unreachable(status, hub, tmp_path):
    hub.repos["shop/clip"], hub.status = ({"main": NEW}, {NEW: FILES}), status
    error = call(tmp_path, hub, "prefetch", "clip", HF_TOKEN="hf_secret")
    assert "the Hub refuses: " in error["message"] and str(status) in error["message"] and "hf_secret" not in json.dumps(error)


def test_a_disk_that_takes_no_more_is_not_called_a_network(hub, tmp_path):
    hub.repos["shop/clip"] = {"main": NEW}, {NEW: FILES}
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    error = call(tmp_path, hub, "prefetch", "clip", full + CALL)
    assert "cannot be kept" in error["message"] and "File too large" in error["message"] and "reached" not in error["message"]
