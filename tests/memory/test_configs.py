"The configurations that the package carries and those that are fetched: which networks they describe, and that no weights come along."
import json

import pytest
from devsky_nb.errors import ModelNotFoundError, ValidationError
from devsky_nb.hub.configs import check_configs
from devsky_nb.hub.models import KNOWN, near_names
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.memory.configs import CONFIGS, carried_configuration, find_model, meta_network, networks_of
from devsky_nb.memory.estimate import estimate_vram

from lyinghub import COMMIT, LyingHub

# the size of a network's files as the Hub states it, and bytes of a parameter in them (configs/SOURCES.md says where)
FILES = {
    ("sdxl-turbo", "unet"): ("5.14 GB", 2), ("sd35-large-turbo", "transformer"): ("16.3 GB", 2), ("sd35-large-turbo", "text_encoder_3"): ("9.52 GB", 2),
    ("flux1-schnell", "transformer"): ("23.8 GB", 2), ("flux1-kontext-dev", "transformer"): ("23.8 GB", 2), ("flux1-fill-dev", "transformer"): ("23.8 GB", 2),
    ("flux2-dev", "transformer"): ("64.4 GB", 2), ("flux2-dev", "vae"): ("336 MB", 4), ("flux2-klein-4b", "text_encoder"): ("8.05 GB", 2),
    ("flux2-klein-9b", "transformer"): ("18.2 GB", 2), ("flux2-klein-9b", "text_encoder"): ("16.4 GB", 2),
    ("qwen-image", "transformer"): ("40.9 GB", 2), ("qwen-image-edit", "transformer"): ("40.9 GB", 2), ("qwen-image", "vae"): ("254 MB", 2),
    ("qwen-image", "text_encoder"): ("8.29 GB", 1), ("z-image-turbo", "transformer"): ("12.3 GB", 2), ("z-image-turbo", "text_encoder"): ("8.05 GB", 2),
    ("z-image-turbo", "vae"): ("168 MB", 2), ("chroma1-hd", "transformer"): ("17.800 GB", 2), ("sana-1600m", "transformer"): ("3.21 GB", 2),
    ("sana-1600m", "text_encoder"): ("5.23 GB", 2), ("sana-1600m", "vae"): ("1.25 GB", 4), ("auraflow", "transformer"): ("27.43 GB", 4),
    ("auraflow", "text_encoder"): ("4.89 GB", 4), ("cogview4", "transformer"): ("12.73 GB", 2), ("cogview4", "text_encoder"): ("17.56 GB", 2),
    ("cogview4", "vae"): ("812 MB", 2), ("lumina2", "transformer"): ("10.44 GB", 4), ("lumina2", "text_encoder"): ("10.45 GB", 4),
    ("lumina2", "vae"): ("335 MB", 4), ("wan21-t2v-1.3b", "transformer"): ("5.68 GB", 4), ("wan21-t2v-1.3b", "text_encoder"): ("22.7 GB", 4),
    ("wan21-t2v-1.3b", "vae"): ("508 MB", 4), ("wan21-t2v-14b", "transformer"): ("28.6 GB", 2), ("wan22-t2v-a14b", "transformer_2"): ("28.6 GB", 2),
    ("wan22-ti2v-5b", "transformer"): ("5.00 GB", 1), ("wan22-ti2v-5b", "vae"): ("2.82 GB", 4), ("ltx-video", "transformer"): ("7.69 GB", 4),
    ("ltx-video", "vae"): ("1.68 GB", 4), ("hunyuanvideo", "vae"): ("986 MB", 4), ("hunyuanvideo", "text_encoder"): ("15.0 GB", 2),
    ("cogvideox-2b", "transformer"): ("3.39 GB", 2), ("cogvideox-2b", "vae"): ("431 MB", 2), ("cogvideox-5b", "vae"): ("862 MB", 4),
    ("kolors", "text_encoder"): ("12.487168 GB", 2), ("hidream-i1-full", "transformer"): ("34.21 GB", 2), ("hidream-i1-full", "text_encoder"): ("0.49 GB", 4),
    ("hidream-i1-full", "text_encoder_3"): ("9.52 GB", 2), ("hunyuandit", "transformer"): ("1.50 GB", 1),
    ("kandinsky22", "unet"): ("5.012309 GB", 4), ("kandinsky22", "movq"): ("271.4 MB", 4),
    ("kandinsky5-t2i-lite", "transformer"): ("6.0 GB", 1), ("kandinsky5-t2i-lite", "text_encoder"): ("16.6 GB", 2), ("kandinsky5-t2v-lite", "transformer"): ("2.0 GB", 1),
    ("ltx2", "transformer"): ("37.8 GB", 2), ("ltx2", "connectors"): ("2.86 GB", 2), ("ltx2", "vae"): ("2.44 GB", 2)}
ALL_FILES = {"hunyuanvideo": ("41.9 GB", {"vae": 4}), "cogvideox-5b": ("21.5 GB", {"vae": 4}), "kandinsky22-prior": ("10.575 GB", {"prior": 4, "text_encoder": 4})}


def as_bytes(text):
    "A size as the Hub states it: bytes, and how far off its rounding may be."
    number, unit = text.split()
    scale = {"MB": 10**6, "GB": 10**9}[unit]
    return float(number) * scale, .5 * 10.0**-len(number.partition(".")[2]) * scale


counted = {}


def numbers(part):
    "How many numbers a network's files hold: its parameters, and the buffers that are kept with them."
    text = (part / "config.json").read_text(encoding="utf-8")
    if text not in counted:  # equal configurations are built once
        network = meta_network(part)
        kept = network.state_dict().keys()
        counted[text] = sum(t.numel() for t in network.parameters()) + sum(t.numel() for name, t in network.named_buffers() if name in kept)
    return counted[text]


AT_ONCE = {"flux2-klein-4b", "qwen-image", "sana-1600m", "wan22-ti2v-5b", "cogview4", "kandinsky22"}  # of the others `make slow` takes care
MODELS_AND_NETWORKS = [key if key[0] in AT_ONCE else pytest.param(*key, marks=pytest.mark.slow) for key in FILES]


@pytest.mark.parametrize("model, name", MODELS_AND_NETWORKS)
def test_the_parameters_fill_the_published_files(model, name):
    size, rounding = as_bytes(FILES[model, name][0])
    own = numbers(CONFIGS / model / name) * FILES[model, name][1]
    assert abs(own - size) <= rounding + 5e-4 * size  # headers


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL_FILES)
def test_the_networks_fill_the_published_repository(model):
    text, itemsizes = ALL_FILES[model]
    size, rounding = as_bytes(text)
    own = sum(numbers(part) * itemsizes.get(name, 2) for name, part in networks_of(CONFIGS / model).items())
    assert abs(own - size) <= rounding + 5e-4 * size


def test_in_8_bits_the_blocks_of_klein_take_one_byte_and_what_is_outside_two():
    names = meta_network(CONFIGS / "flux2-klein-4b/transformer").named_parameters()
    own = sum(p.numel() * (1 if "transformer_blocks." in name and p.ndim == 2 else 2) for name, p in names)
    assert abs(own / 4_070_624_520 - 1) < 1e-4


@pytest.mark.parametrize("model", KNOWN)
def test_a_carried_configuration_is_whole_and_names_no_code(model):
    folder = carried_configuration(KNOWN[model].repo_id)
    check_configs(folder)
    assert networks_of(folder) and find_model(model).folder == find_model(KNOWN[model].repo_id).folder == folder


def test_sources_are_stated_for_every_alias():
    rows = [line.split(" | ") for line in (CONFIGS / "SOURCES.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    stated = {alias for row in rows[1:] for alias in row[0].removeprefix("| ").split(", ")}
    assert stated == {model for model, spec in KNOWN.items() if not spec.bundled} and all(len(row) == 4 for row in rows)


@pytest.mark.parametrize("former, now", [("runwayml/stable-diffusion-v1-5", "sd15"), ("THUDM/CogView4-6B", "cogview4"), ("THUDM/CogVideoX-5b", "cogvideox-5b")])
def test_a_repository_that_has_moved_has_its_configuration(former, now):
    source = find_model(former)
    assert source.folder == CONFIGS / now and source.repo == former  # what a caller has in the cache under the old name stays his


@pytest.mark.parametrize("asked, meant", [
    ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"), ("black-forest-labs/FLUX.1-schnel", "black-forest-labs/FLUX.1-schnell"),
    ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509"), ("stabilityai/stable-diffusion-xl-base-1", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("stabilityai/stable-diffusion-xl-base-2.0", None), ("stabilityai/stable-video-diffusion-img2vid-xt", None), ("stabilityai/sd-turbo", None),
    ("shop/fabric-sdxl", None), ("Qwen/Qwen3-4B", None), ("stabilityai/stable-cascade", None)])
def test_a_suggestion_is_a_slip_of_the_pen_and_not_another_model(asked, meant):
    assert next(iter(near_names(asked, KNOWN)), None) == meant


# --- fetched on request

SD15 = {path.relative_to(CONFIGS / "sd15").as_posix(): path.read_bytes() for path in (CONFIGS / "sd15").rglob("*.json")}
PIPELINE = SD15 | {"scheduler/scheduler_config.json": b"{}", "tokenizer/tokenizer_config.json": b"{}", "tokenizer/vocab.json": b"{}" * 10**5, "README.md": b"#",
                   "unet/diffusion_pytorch_model.safetensors": b"w" * 10**6, "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
                   "vae/diffusion_pytorch_model.safetensors": b"w" * 10**6, "v1-5-pruned.safetensors": b"w" * 10**6, "text_encoder/pytorch_model.bin": b"p" * 10**6}


@pytest.fixture
def online(monkeypatch):
    "This process asks nobody; the one that fetches may ask this machine."
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    def connect(hub): monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    return connect


def asked_for(hub): return {path.split("/resolve/")[1].split("/", 1)[1] for _, path in hub.log if "/resolve/" in path}


def test_only_small_files_are_fetched_once_and_lie_in_the_cache(online, tmp_path):
    registry = ModelRegistry(cache_dir=tmp_path / "hub")
    with LyingHub({"files": PIPELINE}) as hub:
        online(hub)
        with pytest.raises(ModelNotFoundError, match="`devsky plan shop/drawings --budget 24GB --fetch`, fetches its small files, and no weights"):
            estimate_vram("shop/drawings", registry=registry)
        assert hub.log == []
        first = find_model("shop/drawings", registry, fetch=True)
        assert asked_for(hub) == {*SD15, "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"} and first.note.endswith(f"(commit {COMMIT[:8]}), and no weights")
        questions = len(hub.log)
        again = find_model("shop/drawings", registry, fetch=True)
        assert len(hub.log) == questions and (again.folder, again.note) == (first.folder, None)
    assert estimate_vram("shop/drawings", registry=registry).loaded == estimate_vram("sd15").loaded  # the Hub is gone by now
    with pytest.raises(ModelNotFoundError, match="not in the cache"): ModelRegistry(cache_dir=tmp_path / "hub", offline=True).locate("shop/drawings")


@pytest.mark.slow
def test_a_repository_of_pickles_is_planned_for_and_no_converter_is_asked(online, tmp_path):
    with LyingHub({"files": {"config.json": SD15["unet/config.json"], "diffusion_pytorch_model.bin": b"p" * 100}}) as hub:
        online(hub)
        assert find_model("shop/unet", ModelRegistry(cache_dir=tmp_path), fetch=True).folder.name == COMMIT
        assert not any("discussions" in path for _, path in hub.log)


def test_what_is_carried_or_cached_is_not_asked_for(online, tmp_path):
    with LyingHub({"files": PIPELINE}) as hub:
        online(hub)
        assert find_model("sd15", ModelRegistry(cache_dir=tmp_path), fetch=True).note is None
        assert hub.log == []
        assert find_model("sd15", ModelRegistry(cache_dir=tmp_path), revision="main", fetch=True).note is not None  # a certain revision is another question
        assert hub.log != []


@pytest.mark.slow
@pytest.mark.parametrize("lies, said", [
    ({"files": {"README.md": b"#", "lora.safetensors": b"w"}}, "the Hub lists none of its files"), ({"status": 401}, "accept its conditions on the Hub and log in (`hf auth login`), or fetch"),
    ({"files": {"config.json": b" " * 17 * 2**20}}, "more than 16.0 MiB"), ({"commit": "../../x"}, "makes no sense")])
def test_what_cannot_be_fetched_is_one_error_with_the_way_out(lies, said, online, tmp_path):
    with LyingHub(lies) as hub:
        online(hub)
        with pytest.raises(ModelNotFoundError, match="`hf download shop/x --include '\\*.json' --cache-dir") as raised:
            find_model("shop/x", ModelRegistry(cache_dir=tmp_path), fetch=True)
        assert said in str(raised.value)


@pytest.mark.parametrize("files, said", [
    ({"config.json": b'{"model_type": "clip", "auto_map": {"AutoModel": "x.X"}}'}, "names code"), ({"config.json": b"{"}, "cannot be read"),
    ({"model_index.json": SD15["model_index.json"]}, "lacks safety_checker/config.json, text_encoder/config.json")])
def test_what_is_fetched_is_checked_like_everything_else(files, said, online, tmp_path):
    with LyingHub({"files": files}) as hub:
        online(hub)
        with pytest.raises(ValidationError, match=said): find_model("shop/x", ModelRegistry(cache_dir=tmp_path), fetch=True)


def test_nothing_is_fetched_where_that_is_forbidden(online, tmp_path, monkeypatch):
    with LyingHub({"files": PIPELINE}) as hub:
        online(hub)
        with pytest.raises(ModelNotFoundError, match="offline=True forbids"): find_model("shop/x", ModelRegistry(cache_dir=tmp_path, offline=True), fetch=True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE forbids"): find_model("shop/x", ModelRegistry(cache_dir=tmp_path), fetch=True)
        assert hub.log == []
    for wrong in ("yes", 1, None):
        with pytest.raises(ValidationError, match="fetch="): find_model("sd15", fetch=wrong)
