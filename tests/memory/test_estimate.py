"The planner against bytes that were really allocated, against published figures, and against what users get wrong."
import json, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from devsky_nb import ModelRegistry, ModelSpec, estimate_vram, plan_vram
from devsky_nb.cli import main
from devsky_nb.errors import ModelNotFoundError, ValidationError
from devsky_nb.hub.locate import bundled_folder
from devsky_nb.hub.models import KNOWN
from devsky_nb.memory import inputs, traces
from devsky_nb.memory.configs import CONFIGS, config_folder, meta
from devsky_nb.memory.formats import check_format, QUANTS
from devsky_nb.memory.inputs import Switches, Workload
from devsky_nb.memory.plan import PlanOption
from devsky_nb.memory.traces import take_trace
from hubcache import make_repo
from tiny_pipelines import write_pipeline

GIB = 2**30
RESIDENT = """
import sys, torch, psutil
from pathlib import Path
from transformers import AutoConfig, AutoModel
from devsky_nb.hub.registry import load_model
from devsky_nb.memory.configs import config_folder

if sys.argv[1] == "tiny-sdxl":
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    nets = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
    run = lambda: pipeline("a red dress", num_inference_steps=1, num_images_per_prompt=8, guidance_scale=5., output_type="np")
else:
    nets = [AutoModel.from_config(AutoConfig.from_pretrained(config_folder(sys.argv[1]))).eval()]
    run = lambda: nets[0].get_image_features(pixel_values=torch.zeros(8, 3, 224, 224))
with torch.no_grad():
    run()  # code and kernels are there from now on
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the system counts the highest resident size anew
    run()
most = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status", encoding="utf-8") if line.startswith("VmHWM"))
print(sum(t.nbytes for net in nets for t in (*net.parameters(), *net.buffers())), most - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not count the highest resident size")
@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-sdxl", "clip-vit-base"])
def test_on_a_cpu_the_prediction_is_what_a_fresh_process_has_resident(model):
    at_once = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "16384"}  # freed memory goes back to the system
    done = subprocess.run([sys.executable, "-c", RESIDENT, model], capture_output=True, text=True, env=at_once)
    assert done.returncode == 0, done.stderr
    weights, activations = map(int, done.stdout.split())
    expected = estimate_vram(model, dtype="fp32", device="cpu", batch=8)
    assert weights == expected.loaded
    assert abs(expected.peak_allocated / (weights + activations) - 1) < .15
    assert abs((expected.peak_allocated - expected.loaded) / activations - 1) < .15


@pytest.mark.parametrize("model", KNOWN)
def test_every_model_is_estimated(model):
    e = estimate_vram(model)
    assert 0 < e.loaded <= e.peak_allocated <= e.peak_reserved
    assert sum(e.by_component.values()) == e.loaded and e.peak_allocated == max(e.by_phase.values())
    assert json.loads(json.dumps(e.to_dict()))["peak_allocated"] == e.peak_allocated


@pytest.mark.parametrize("options, gib", [
    ({}, 10.47), ({"batch": 4}, 21.72), ({"dtype": "fp32", "batch": 4}, 28.09), ({"controlnet": True}, 12.861)])
def test_published_figures_of_sdxl(options, gib):
    assert abs(estimate_vram("sdxl-base", **options).peak_allocated / GIB / gib - 1) < .02


def test_what_saves_memory_saves_memory():
    peak = lambda **options: estimate_vram("sdxl-base", **options).peak_allocated
    assert peak() > peak(quant="int8") > peak(quant="nf4") > peak(quant="nf4-dq")
    assert peak() > peak(offload="model") > peak(offload="sequential")
    assert peak(batch=4) > peak(batch=4, vae_slicing=True) > peak()
    assert peak(width=1024) == peak(width=1024, vae_tiling=True) and peak(width=1536) > peak(width=1536, vae_tiling=True)
    assert peak(quant="nf4", quant_components=["text_encoder"]) > peak(quant="nf4", quant_components=["unet"])


def test_a_trace_serves_every_other_configuration(monkeypatch):
    estimate_vram("sdxl-base", width=512)  # no trace of the package
    monkeypatch.setattr(traces, "meta_network", lambda part: pytest.fail(f"{part} was built again"))
    for quant in QUANTS:
        for dtype in ("fp16", "bf16", "fp32"):
            for offload in (None, "model", "sequential", "group"):
                try: check_format(quant, dtype, "cuda", offload)
                except ValidationError: continue
                if not (quant or "").startswith("gguf") or dtype == "bf16": estimate_vram("sdxl-base", dtype, quant, offload=offload, width=512)


@pytest.mark.parametrize("options, said", [
    ({"model": "sdxl-bsae"}, "did you mean 'sdxl-base'"), ({"model": None}, "expected an alias"), ({"model": ""}, "devsky models list"),
    ({"model": 7}, "expected an alias"), ({"model": "/nowhere"}, "no model '/nowhere'"), ({"dtype": "float16"}, "fp32, fp16, bf16"),
    ({"quant": "int4"}, "int8, nf4, nf4-dq, fp4"), ({"offload": "disk"}, "model, sequential, group"), ({"vae": "huge"}, "fp16-fix"),
    ({"attention": "flash"}, "sdpa, math, sliced"), ({"device": "tpu"}, "cuda, mps, cpu"),
    *[({"width": width}, "a multiple of 8 from 8 to 8192") for width in (1001, -8, 80000, "1024", 1024., True)],
    ({"height": -8}, "height=-8: expected a multiple of 8"),
    *[({"batch": batch}, "a whole number from 1 to 10000") for batch in (0, 1.5, "2", True, None, 10**9)],
    ({"quant": "nf4", "quant_components": "unet"}, "a list of components"), ({"quant": "nf4", "quant_components": []}, "no component"),
    ({"quant_components": 5}, "a list of components"), ({"quant_components": [None]}, "a list of components"),
    ({"quant": "nf4", "quant_components": ["unnet"]}, "did you mean 'unet'"),
    ({"without": "vae"}, "a list of components"), ({"without": ["nsfw"]}, "There are"),
    ({"quant_components": ["unet"]}, "give both, or neither"), ({"card": "ada", "device": "cpu"}, "on cpu leave it out"),
    ({"model": "clip-vit-base", "without": ["vae"]}, "is a network by itself"), ({"controlnet": "sdxl-base"}, "a StableDiffusionXLPipeline, and no ControlNet"),
    ({"controlnet": "clip-vit-base"}, "a clip, and no ControlNet"), ({"model": "clip-vit-base", "controlnet": True}, "goes into a pipeline"),
    ({"model": "clip-vit-base", "guidance": False}, "about a denoiser, and there is none"),
    ({"without": ["unet", "vae", "text_encoder", "text_encoder_2"]}, "nothing of sdxl-base is left"),
    ({"vae_tiling": "yes"}, "True or False"), ({"guidance": "yes"}, "True or False"), ({"calibration": 1}, "a Calibration"),
    ({"device": "cpu", "offload": "model"}, "on cpu use None"), ({"revision": ""}, "a branch, a tag or a commit"),
    ({"model": "tiny-sdxl", "revision": "main"}, "has no revisions"), ({"registry": "hub"}, "expected a ModelRegistry")])
def test_bad_input_is_named(options, said):
    with pytest.raises(ValidationError) as e: estimate_vram(**{"model": "sdxl-base"} | options)
    assert said in str(e.value)


@pytest.mark.parametrize("budget", [8, 0, "8 gigs", "8 apples", "", "-8GB", None, 8.5, float("nan"), True, "8GBit", "9" * 400 + "GB"])
def test_a_budget_in_wrong_units(budget):
    with pytest.raises(ValidationError, match="8GB|20GB"): plan_vram("tiny-sdxl", budget)


@pytest.mark.parametrize("options, said", [
    ({"top": 0}, "at least 1"), ({"top": "3"}, "at least 1"), ({"dtype": ""}, "fp32, fp16, bf16"),
    ({"without": ["unet"]}, "cannot draw without 'unet'"), ({"device": "tpu"}, "cuda, mps, cpu")])
def test_bad_wishes_for_a_plan(options, said):
    with pytest.raises(ValidationError) as e: plan_vram("sdxl-base", "8GB", **options)
    assert said in str(e.value)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\x00\xff"])
def test_a_folder_with_a_broken_file_is_refused_and_the_file_named(file, content, tmp_path):
    folder = shutil.copytree(CONFIGS / "sd15", tmp_path / "model")
    (folder / file).write_bytes(content.encode("latin-1"))
    for ask in (estimate_vram, lambda model: plan_vram(model, "8GB")):
        with pytest.raises(ValidationError) as e: ask(folder)
        assert str(folder / file).removesuffix("/config.json") in str(e.value)


@pytest.mark.parametrize("change", [
    {"unet": {"sample_size": "64"}}, {"unet": {"sample_size": [64, 64]}},
    {"vae": {"block_out_channels": "abc"}}, {"vae": {"block_out_channels": 4}}])
def test_odd_values_in_a_configuration(change, tmp_path):
    folder = shutil.copytree(CONFIGS / "sd15", tmp_path / "model")
    for part, values in change.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
    with pytest.raises(ValidationError, match="sample_size|block_out_channels"): estimate_vram(folder)


def test_a_folder_without_anything_and_one_without_a_component(tmp_path):
    with pytest.raises(ValidationError, match="has a config.json or a model_index.json"): estimate_vram(tmp_path)
    folder = shutil.copytree(CONFIGS / "sd15", tmp_path / "model")
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValidationError, match="lacks unet/config.json"): plan_vram(folder, "8GB")


@pytest.mark.parametrize("model, part, kind", [
    ("sd15", "unet", "UNet2DConditionModel"), ("sdxl-base", "vae", "AutoencoderKL"),
    ("sdxl-base", "text_encoder_2", "CLIPTextModelWithProjection"), ("sd3-medium", "text_encoder_3", "T5EncoderModel"),
    ("pixart-xl", "transformer", "PixArtTransformer2DModel")])
def test_a_network_by_itself_is_what_it_is_in_its_pipeline(model, part, kind, tmp_path):
    inside, alone = CONFIGS / model / part, shutil.copytree(CONFIGS / model / part, tmp_path / "alone")
    a, b = estimate_vram(inside), estimate_vram(alone)
    assert a.loaded == b.loaded
    if part == "text_encoder_3":  # 256 tokens for Stable Diffusion 3, 512 alone; scores grow with the square, and older releases keep them in fp32 twice
        assert 2 < b.peak_run.activations / a.peak_run.activations < 4
    else: assert abs(a.peak_allocated / b.peak_allocated - 1) < .01
    for folder in (inside, alone):
        best = plan_vram(folder, "64GB").best
        compile(best.code, "plan", "exec")
        assert f"model = {kind}.from_pretrained({str(folder)!r}" in best.code


TINY_VAE = bundled_folder(KNOWN["tiny-sdxl"]) / "vae"


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_many_slices_are_what_slice_after_slice_is(batch, monkeypatch):
    question = (TINY_VAE, Workload(64, 64, batch), Switches(slicing=True))
    short = take_trace(*question).trace.live().max()

    def every_slice(vae, batch, height, width):
        latents = meta(batch, vae.config.latent_channels, height, width)
        return lambda: vae.decode(latents, return_dict=False), [latents]

    monkeypatch.setattr(inputs, "decode_call", every_slice)
    assert short == take_trace(*question).trace.live().max()


def test_a_large_batch_takes_no_longer_than_a_small_one():
    events = [len(take_trace(TINY_VAE, Workload(64, 64, batch), Switches(slicing=True)).trace.kind) for batch in (4, 10_000)]
    assert events[0] == events[1]
    assert estimate_vram("tiny-sdxl", batch=10_000, vae_slicing=True).peak_allocated > 2**30


@pytest.mark.parametrize("quant, options", [("int8", {"use_4bit": False}), ("nf4", {"double_quant": False}), ("nf4-dq", {})])
def test_a_pipeline_that_is_really_quantized_has_the_predicted_bytes(quant, options, tmp_path):
    from devsky_nb import load_sdxl_pipeline_with_quantization_v2
    settings = {"device": "cpu", "quantize_once": False, "cache_dir": tmp_path} | options
    report = load_sdxl_pipeline_with_quantization_v2("tiny-sdxl", **settings).load_report
    expected = estimate_vram("tiny-sdxl", "fp32", quant, device="cpu").by_component
    assert {part.name: part.bytes_after for part in report.parts} == expected


# which model is meant: a registry says so

BASE = json.loads((CONFIGS / "clip-vit-base/config.json").read_text(encoding="utf-8"))
A, B, C = "a" * 40, "b" * 40, "c" * 40


def cached(cache_dir, repo_id, **revisions):
    "A cache with configurations only: revision -> projection_dim; commits are a…, b…, c…."
    commits = dict(zip(revisions, (A, B, C)))
    files = {}
    for name, size in revisions.items():
        files[commits[name]] = {"config.json": json.dumps(BASE | {"projection_dim": size}).encode()}
    make_repo(cache_dir, repo_id, files, commits)


def projected(model, **options):
    "The size of the projection that an estimate was made for."
    return estimate_vram(model, **options).traced.networks[""].config["projection_dim"]


@pytest.fixture
def shop(tmp_path):
    cached(tmp_path / "hub", "shop/fabric-clip", main=64, v2=128, old=256)
    registry = ModelRegistry(cache_dir=tmp_path / "hub", lockfile=tmp_path / "models.lock.json", offline=True)
    registry.register(ModelSpec("fabric-clip", "shop/fabric-clip", "clip"))
    return registry


def lock(registry, alias, repo_id, commit):
    version = {"repo_id": repo_id, "commit": commit, "patterns": ["*.json"], "stage": "production", "locked_at": "2026-11-23"}
    registry.lockfile.write_text(json.dumps({"models": {alias: [version]}}), encoding="utf-8")


def test_a_model_that_is_registered_can_be_planned_for_without_weights(shop):
    assert projected("fabric-clip", registry=shop) == projected("shop/fabric-clip", registry=shop) == 64
    assert 'from_pretrained(\'shop/fabric-clip\', dtype=' in plan_vram("fabric-clip", "8GB", registry=shop).best.code
    with pytest.raises(ValidationError, match="no model 'fabric-clip'"): estimate_vram("fabric-clip")  # another registry


def test_a_revision_is_that_revision_or_an_error(shop):
    assert [projected("fabric-clip", registry=shop, revision=revision) for revision in ("v2", B, C, "old")] == [128, 128, 256, 256]
    plan = plan_vram("fabric-clip", "8GB", registry=shop, revision="v2")
    assert "revision='v2'" in plan.best.code and plan.best.estimate.setup.revision == "v2"
    for model in ("fabric-clip", "clip-vit-base"):  # the package carries the second, and nobody knows of which revision
        with pytest.raises(ModelNotFoundError, match="revision v9"): estimate_vram(model, registry=shop, revision="v9")
        with pytest.raises(ModelNotFoundError, match="revision v9"): plan_vram(model, "8GB", registry=shop, revision="v9")


def test_the_lockfile_of_a_registry_decides(shop):
    lock(shop, "fabric-clip", "shop/fabric-clip", C)
    assert projected("fabric-clip", registry=shop) == 256
    assert projected("fabric-clip", registry=shop, revision="main") == 64
    assert f"revision={C!r}" in plan_vram("fabric-clip", "8GB", registry=shop).best.code


def test_what_lies_in_the_cache_wins_over_what_the_package_carries(shop):
    assert projected("clip-vit-base", registry=shop) == BASE["projection_dim"]
    cached(shop.cache_dir, "openai/clip-vit-base-patch32", main=96)
    assert projected("clip-vit-base", registry=shop) == projected("openai/clip-vit-base-patch32", registry=shop) == 96
    assert projected("clip-vit-base") == BASE["projection_dim"]  # another registry, another cache


def test_a_cached_model_that_lacks_a_configuration_is_planned_from_the_package(shop):
    index = (CONFIGS / "sd15/model_index.json").read_bytes()
    make_repo(shop.cache_dir, KNOWN["sd15"].repo_id, {A: {"model_index.json": index}}, {"main": A})
    assert estimate_vram("sd15", registry=shop).loaded == estimate_vram("sd15").loaded


def test_another_alias_of_a_known_model_has_its_configuration(shop):
    shop.register(ModelSpec("our-sdxl", KNOWN["sdxl-base"].repo_id, "sdxl"))
    assert estimate_vram("our-sdxl", registry=shop).peak_allocated == estimate_vram("sdxl-base").peak_allocated


def test_a_model_that_is_nowhere_is_not_fetched(tmp_path):
    online = ModelRegistry(cache_dir=tmp_path, offline=False)
    for name, said in [("shop/nowhere", "the package does not carry its configuration"),
                       ("stabilityai/stable-difusion-xl-base-1.0", "did you mean 'stabilityai/stable-diffusion-xl-base-1.0'")]:
        with pytest.raises(ModelNotFoundError, match=said): estimate_vram(name, registry=online)
    assert list(tmp_path.iterdir()) == []


def test_twenty_threads_two_registries(shop, tmp_path):
    cached(tmp_path / "other", "shop/fabric-clip", main=32)
    other = ModelRegistry(cache_dir=tmp_path / "other", offline=True)
    other.register(ModelSpec("fabric-clip", "shop/fabric-clip", "clip"))
    with ThreadPoolExecutor(20) as pool:
        sizes = list(pool.map(lambda registry: projected("fabric-clip", registry=registry), [shop, other] * 20))
    assert sizes == [64, 32] * 20


def test_every_configuration_that_the_package_carries_belongs_to_a_known_model():
    carried = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    assert carried | {alias for alias, spec in KNOWN.items() if spec.bundled} == set(KNOWN)


# plans

def test_plans_are_ranked_fit_and_run():
    for budget in ("6GB", "12GB"):
        plan = plan_vram("sdxl-base", budget, top=99)
        assert [o.rank for o in plan.options] == sorted(o.rank for o in plan.options)
        for o in plan.options:
            assert o.estimate.needed <= plan.budget and o.margin > 0
            assert not any(other.beats(o) for other in plan.options if other is not o)
            compile(o.code, "plan", "exec")
    assert plan_vram("sdxl-base", "24GB").best.estimate.setup.offload is None
    eight = plan_vram("sdxl-base", "8GB").options
    assert any(o.estimate.setup.offload is None for o in eight)  # a slower way of better quality hides no fast one
    nothing = plan_vram("flux1-dev", "300MB")
    assert nothing.best is None and "nothing fits" in repr(nothing) and nothing.smallest.peak_allocated > 3e8


def test_the_code_of_a_plan_runs():
    options = plan_vram("tiny-sdxl", "1GB", device="cpu", top=99).options
    assert {(o.estimate.setup.vae_tiling, o.estimate.setup.vae_slicing) for o in options} == {(False, False)}  # nothing speaks for more
    for setup in ({}, {"vae_tiling": True, "vae_slicing": True, "batch": 2, "guidance": False}):
        scope = {}
        exec(PlanOption(estimate_vram("tiny-sdxl", "fp32", device="cpu", **setup), 0).code, scope)
        assert [i.size for i in scope["images"]] == [(64, 64)] * setup.get("batch", 1)
        assert (scope["pipeline"].vae.use_tiling, scope["pipeline"].vae.use_slicing) == (bool(setup), bool(setup))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_the_code_for_one_network_runs(part):
    scope = {}
    exec(plan_vram(bundled_folder(KNOWN["tiny-sdxl"]) / part, "1GB", device="cpu").best.code, scope)
    assert sum(p.nbytes for p in scope["model"].parameters()) > 0


def test_the_code_for_a_refiner_runs_with_an_image(tmp_path, monkeypatch):
    from diffusers import StableDiffusionXLImg2ImgPipeline
    from PIL import Image
    folder = tmp_path / "tiny-refiner"
    tiny = StableDiffusionXLImg2ImgPipeline.from_pretrained(bundled_folder(KNOWN["tiny-sdxl"]), variant=None)
    tiny.save_pretrained(folder)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(plan_vram(folder, "1GB", device="cpu").best.code, scope)
    assert scope["images"][0].size == (64, 64)


@pytest.mark.parametrize("model", ["sdxl-turbo", *(pytest.param(model, marks=pytest.mark.slow) for model in (
    "sd15", "sdxl-refiner", "sd3-medium", "flux1-dev", "flux1-kontext-dev", "qwen-image-edit", "wan21-t2v-1.3b", "sana-1600m"))])
def test_code_names_what_each_pipeline_takes(model):
    "With all that it can be drawn without."
    from inspect import signature
    import ast, diffusers
    parts = estimate_vram(model).by_component
    for without in ([], [name for name in ("safety_checker", "text_encoder_3") if name in parts]):
        for option in plan_vram(model, "80GB", top=99, guidance=False, without=without).options:
            tree, kind = ast.parse(option.code), getattr(diffusers, option.estimate.traced.kind)
            calls = {ast.unparse(n.func): {k.arg for k in n.keywords} for n in ast.walk(tree) if isinstance(n, ast.Call)}
            assert calls["pipeline"] <= set(signature(kind.__call__).parameters)
            loading = {"dtype", "revision", "variant", "use_safetensors", "quantization_config", "device_map"}
            loaded = calls["DiffusionPipeline.from_pretrained"] - loading
            assert loaded <= set(signature(kind.__init__).parameters)
            for name in calls: assert not name.startswith("pipeline.enable") or hasattr(kind, name.partition(".")[2])
        if not parts.keys() & {"safety_checker", "text_encoder_3"}: break


def test_group_offload_is_not_planned_with_a_vae_that_is_cast():
    setups = [o.estimate.setup for budget in ("3GB", "5GB") for o in plan_vram("sdxl-base", budget, top=99).options]
    assert {s.vae for s in setups if s.offload == "group"} == {"fp16-fix"}


def test_the_command(capsys):
    assert main(["plan", "tiny-sdxl", "--budget", "100MB", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main(["plan", "tiny-sdxl", "--budget", "70MB", "--width", "512", "--height", "512"]) == 1 and "nothing fits" in capsys.readouterr().out
    assert main(["plan", "sdlx-base", "--budget", "8GB"]) == 2 and "did you mean 'sdxl-base'" in capsys.readouterr().err


# --- what a folder says of itself

BITS = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "fp4": {"load_in_4bit": True}, "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                                  "bnb_4bit_use_double_quant": True}}


def with_settings(folder, settings, *parts, alias="sdxl-base"):
    "The configuration of a model, some of whose networks are quantized in the files."
    shutil.copytree(CONFIGS / alias, folder)
    for part in parts:
        file = folder / part / "config.json"
        about = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": settings}
        file.write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.mark.parametrize("label", BITS)
def test_weights_that_are_packed_in_the_files_are_counted_so(label, tmp_path):
    own = estimate_vram(with_settings(tmp_path / "m", {"quant_method": "bitsandbytes"} | BITS[label], "unet"))
    asked = estimate_vram("sdxl-base", quant=label, quant_components=["unet"])
    assert abs(own.loaded / asked.loaded - 1) < .02 and f"unet is {label} already" in str(own)  # blocks lie otherwise
    assert abs(own.by_phase["denoise"] / asked.by_phase["denoise"] - 1) < .02
    assert all(abs(size / asked.by_component[name] - 1) < .03 for name, size in own.by_component.items())
    assert own.by_phase["load"] <= 1.01 * asked.by_phase["load"] < 1.01 * estimate_vram("sdxl-base").by_phase["load"]
    texts = estimate_vram(tmp_path / "m", quant="nf4")  # the others can be quantized still
    assert texts.by_component["unet"] == own.by_component["unet"]
    assert texts.by_component["text_encoder"] < own.by_component["text_encoder"]
    with pytest.raises(ValidationError, match="unet is .* already, as its config.json says"):
        estimate_vram(tmp_path / "m", quant="int8" if label != "int8" else "nf4", quant_components=["unet"])


def test_layers_that_were_left_in_full_are_counted_in_full(tmp_path):
    settings = BITS["nf4"] | {"llm_int8_skip_modules": ["down_blocks", "conv_in"]}
    some = estimate_vram(with_settings(tmp_path / "some", settings, "unet")).by_component["unet"]
    every = estimate_vram(with_settings(tmp_path / "all", BITS["nf4"], "unet")).by_component["unet"]
    assert every < some < estimate_vram("sdxl-base").by_component["unet"]


def test_a_plan_for_packed_weights_packs_what_is_left(tmp_path):
    folder = with_settings(tmp_path / "m", BITS["nf4"], "unet")
    plan = plan_vram(folder, "24GB")
    for option in plan.options:
        if option.estimate.setup.quant: assert "'unet'" not in option.code.partition("quant_kwargs")[0]
    everything = with_settings(tmp_path / "all", BITS["nf4"], "unet", "text_encoder", "text_encoder_2")
    assert {option.estimate.setup.quant for option in plan_vram(everything, "24GB").options} == {None}


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4}, "torchao": {"quant_method": "torchao", "quant_type": "int4wo"},
    "awq": {"quant_method": "awq", "bits": 4}, "a text": "nf4", "a list": [4], "no bits": {"quant_method": "bitsandbytes"},
    "bits of another type": {"load_in_4bit": "yes"}, "nf5": BITS["nf4"] | {"bnb_4bit_quant_type": "nf5"},
    "double of another type": BITS["nf4"] | {"bnb_4bit_use_double_quant": "no"},
    "skipped of another type": BITS["nf4"] | {"llm_int8_skip_modules": "conv_in"}, "true": True,
    "deep": json.loads('{"quant_method":' * 40 + "1" + "}" * 40),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_counted_is_refused_by_its_name(what, tmp_path):
    folder = with_settings(tmp_path / "m", REFUSED[what], "unet")
    for ask in (lambda: estimate_vram(folder), lambda: plan_vram(folder, "24GB"), lambda: estimate_vram(folder / "unet")):
        with pytest.raises(ValidationError) as caught: ask()
        assert "unet" in str(caught.value) and (what not in ("gptq", "torchao", "awq") or what in str(caught.value))
        assert what not in ("gptq", "torchao", "awq") or "the model that it was made from" in str(caught.value)


def as_pipeline(folder, kind):
    "A folder whose index names another pipeline."
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | {"_class_name": kind}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize("alias,kind", [
    ("sd15", "StableDiffusionControlNetPipeline"), ("sd15", "NoSuchPipeline"), pytest.param("flux1-dev", "FluxFillPipeline", marks=SLOW),
    pytest.param("pixart-xl", "PixArtSigmaPAGPipeline", marks=SLOW), pytest.param("sd15", "MarigoldDepthPipeline", marks=SLOW),
    pytest.param("sdxl-base", "StableVideoDiffusionPipeline", marks=SLOW)])
def test_a_pipeline_that_cannot_be_played_through_says_so(alias, kind, tmp_path):
    folder = as_pipeline(with_settings(tmp_path / "m", None, alias=alias), kind)
    found = estimate_vram(folder)
    assert found.traced.lower_bound and found.peak_allocated > found.loaded > 2**30
    assert "the peak is a lower bound" in str(found) and "the peak is a lower bound" in json.dumps(found.to_dict())


@pytest.mark.parametrize("size", [{}, {"width": 64, "height": 64}])
def test_arguments_that_only_a_pipeline_s_user_knows_make_a_lower_bound(size, tmp_path):
    found = estimate_vram(as_pipeline(write_pipeline("FluxFillPipeline", tmp_path), "VisualClozeGenerationPipeline"), **size)
    assert found.traced.lower_bound and "task_prompt" in str(found) and found.peak_allocated > found.loaded


def test_a_plan_says_of_every_way_that_its_peak_is_a_lower_bound(tmp_path, capsys):
    folder = as_pipeline(with_settings(tmp_path / "m", None, alias="sd15"), "NoSuchPipeline")
    assert main(["plan", str(folder), "--budget", "8GB", "--device", "cuda"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "GiB" in line and "budget" not in line]
    assert any("(lower bound)" in line for line in rows)
    plan = plan_vram(folder, "8GB", device="cuda")
    assert plan.options and all("(lower bound)" in row for row in str(plan).splitlines() if row.lstrip().startswith(("fp", "bf", "int8", "nf4")))
    assert all(option["lower_bound"] for option in plan.to_dict()["options"])


@pytest.mark.parametrize("words, settings", [
    (["--vae", "fp32", "--no-guidance"], {"vae": "fp32", "guidance": False}), (["--lora", "4", "--guidance"], {"lora": 4, "guidance": True})])
def test_the_command_hands_every_option_to_the_planner(words, settings, capsys):
    assert main(["plan", "tiny-sdxl", "--budget", "1GB", "--device", "cpu", "--json", *words]) == 0
    for option in json.loads(capsys.readouterr().out)["options"]: assert settings.items() <= option["setup"].items()


def test_a_pipeline_that_refuses_its_own_networks_is_refused(tmp_path):
    folder = as_pipeline(with_settings(tmp_path / "m", None, alias="sd15"), "StableDiffusionInstructPix2PixPipeline")
    with pytest.raises(ValidationError, match="InstructPix2PixPipeline does not run with these networks: .*in_channels") as caught: estimate_vram(folder)
    assert caught.value.details["folder"] == str(folder)


@pytest.mark.parametrize("alias,kind,runs", [
    ("sd15", "StableDiffusionInpaintPipeline", "vae.encode"), ("flux1-dev", "FluxKontextPipeline", "vae.encode"),
    pytest.param("sdxl-base", "StableDiffusionXLImg2ImgPipeline", "vae.encode", marks=SLOW),
    pytest.param("sdxl-base", "StableDiffusionXLInpaintPipeline", "vae.encode", marks=SLOW),
    pytest.param("sdxl-base", "StableDiffusionXLPAGPipeline", "unet", marks=SLOW)])
def test_a_pipeline_is_counted_as_what_it_is(alias, kind, runs, tmp_path):
    plain = estimate_vram(alias)
    found = estimate_vram(as_pipeline(with_settings(tmp_path / "m", None, alias=alias), kind))
    assert runs in found.traced.runs and not found.traced.lower_bound and found.traced.size == plain.traced.size
    drawn = {name: e.by_phase["denoise"] - e.loaded for name, e in (("plain", plain), ("found", found))}
    takes_more = kind in ("FluxKontextPipeline", "StableDiffusionXLPAGPipeline")  # an image's tokens, a third prompt
    assert (drawn["found"] > 1.4 * drawn["plain"]) == takes_more


@SLOW
@pytest.mark.parametrize("alias,tokens", [("pixart-sigma", 300), ("flux1-dev", 512), ("sd3-medium", 256), ("auraflow", 256), ("chroma1-hd", 512)])
def test_how_long_a_prompt_is_the_pipeline_says(alias, tokens):
    from devsky_nb.memory.rehearsal import rehearse
    played = rehearse(config_folder(alias), Workload(512, 512))
    calls = [played.given(name)[0] for name in played.networks if name.startswith("text_encoder")]
    lengths = {(call.args or [call.kwargs.get("input_ids")])[0]["shape"][-1] for call in calls}
    assert tokens in lengths, lengths


@pytest.mark.parametrize("alias", ["sdxl-turbo", pytest.param("flux1-schnell", marks=SLOW), pytest.param("z-image-turbo", marks=SLOW)])
def test_distilled_models_run_without_guidance(alias):
    usual, doubled = estimate_vram(alias), estimate_vram(alias, guidance=True)
    assert "counted without guidance" in str(usual) and "counted without guidance" not in str(doubled)
    assert usual.by_phase["denoise"] == estimate_vram(alias, guidance=False).by_phase["denoise"]
    assert (doubled.by_phase["denoise"] > usual.by_phase["denoise"]) == (alias != "flux1-schnell")


def test_a_folder_that_is_named_as_a_distilled_model_is_one(tmp_path):
    own = config_folder("tiny-sdxl")
    turbo = shutil.copytree(own, tmp_path / "fabric-sdxl-lightning", ignore=shutil.ignore_patterns("*.safetensors"))
    peaks = [estimate_vram(model, **options).by_phase["denoise"] for model, options in ((turbo, {}), (own, {"guidance": False}), (own, {}))]
    assert peaks[0] == peaks[1] < peaks[2]


@pytest.mark.parametrize("options, words", [
    ({"frames": 32}, "33 frames"), ({"frames": 0}, "frames"), ({"width": 830, "height": 480}, "divisible by 16"), ({"width": 832}, "give both")])
def test_a_video_that_would_be_another_one_is_refused(options, words):
    with pytest.raises(ValidationError, match=words): estimate_vram("wan21-t2v-1.3b", **options)


@SLOW
def test_frames_of_a_video_are_counted():
    few, many = (estimate_vram("wan21-t2v-1.3b", dtype="bf16", frames=frames) for frames in (17, 81))
    assert (few.traced.frames, many.traced.frames, many.traced.size) == (17, 81, (832, 480))
    assert few.by_phase["denoise"] < many.by_phase["denoise"] and few.by_phase["decode"] < many.by_phase["decode"]
    with pytest.raises(ValidationError, match="would draw one image"): estimate_vram("sdxl-base", frames=9)


@SLOW
@pytest.mark.parametrize("options", [{"model": "sdxl-refiner"}, {"model": "flux1-kontext-dev"}, {"model": "sdxl-base", "controlnet": True}])
def test_as_many_images_as_a_pipeline_does_not_draw_from_are_refused_and_not_left_out(options):
    with pytest.raises(ValidationError, match="images=2: "): estimate_vram(**options, images=2)
    assert not estimate_vram(**options, images=1).traced.lower_bound


@SLOW
def test_what_is_added_to_a_pipeline_is_counted():
    plain = estimate_vram("sdxl-base")
    control, lora, tiny = (estimate_vram("sdxl-base", **added) for added in ({"controlnet": True}, {"lora": 64}, {"vae": "tiny"}))
    assert abs(control.by_component["controlnet"] / 2**30 - 2.33) < .05 and "controlnet" in control.traced.runs  # 1.25 G parameters
    assert 0 < lora.loaded - plain.loaded < 2**28 and tiny.by_component["vae"] < 2**24
    packed = estimate_vram("sdxl-base", lora=64, quant="nf4"), estimate_vram("sdxl-base", quant="nf4")
    assert abs((packed[0].loaded - packed[1].loaded) / (lora.loaded - plain.loaded) - 1) < .02  # a LoRA is not packed
    with pytest.raises(ValidationError, match="for models with a UNet"): estimate_vram("flux1-dev", controlnet=True)
    with pytest.raises(ValidationError, match="no TinyVAE"): estimate_vram("wan21-t2v-1.3b", vae="tiny")


ENCODERS = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "vit": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "dinov2": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}, "dinov3_vit": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "siglip": {}, "siglip2": {}, "siglip_vision_model": {}, "umt5": {"num_layers": 1, "d_model": 64}, "roberta": {"num_hidden_layers": 1},
    "gemma2": {"num_hidden_layers": 1}, "qwen3": {"num_hidden_layers": 1}, "llama": {"num_hidden_layers": 1}, "mistral": {"num_hidden_layers": 1},
    "glm": {"num_hidden_layers": 1}, "qwen2": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "convnext": {}, "clip_text_model": {}}


SOON = ("bert", "dinov2", "siglip", "umt5")


@pytest.mark.parametrize("kind", [kind if kind in SOON else pytest.param(kind, marks=SLOW) for kind in ENCODERS])
def test_encoders_of_any_kind_are_run(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | ENCODERS[kind]), encoding="utf-8")
    found = estimate_vram(tmp_path, batch=2)
    assert found.peak_allocated > found.loaded > 0 and not found.traced.lower_bound


@SLOW
@pytest.mark.parametrize("kind, options", [
    ("AutoencoderTiny", {}), ("AutoencoderKLWan", {"base_dim": 16}), ("AutoencoderKLQwenImage", {"base_dim": 16}), ("AutoencoderKLFlux2", {}),
    ("AutoencoderKLLTXVideo", {}), ("AutoencoderDC", {"encoder_block_types": "ResBlock"}), ("AutoencoderKLHunyuanVideo", {}), ("AutoencoderKLCogVideoX", {})])
def test_decoders_of_any_kind_are_run(kind, options, tmp_path, recwarn):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind} | options), encoding="utf-8")
    found = estimate_vram(tmp_path, width=256, height=256)
    assert found.peak_allocated > found.loaded > 0 and not found.traced.lower_bound
    assert not [str(warning.message) for warning in recwarn if "config attribute" in str(warning.message)]


def test_to_encode_an_image_takes_less_than_to_decode_it():
    from devsky_nb.memory.configs import meta, meta_network
    from devsky_nb.memory.tracing import trace_call
    for alias, side in (("sdxl-base", 1024), ("sd15", 512)):
        vae = meta_network(CONFIGS / alias / "vae")
        latents, image = meta(1, 4, side // 8, side // 8), meta(1, 3, side, side)
        peaks = []
        for run, given in ((lambda: vae.encode(image, return_dict=False), image),
                           (lambda: vae.decode(latents, return_dict=False), latents)):
            trace = trace_call(vae, run, [given], "sdpa")
            peaks.append(int((trace.live(4) + trace.workspace(4)).max()))
        assert peaks[0] < .8 * peaks[1]


def test_a_folder_of_save_quantized_is_counted_as_it_is_loaded(tmp_path):
    from devsky_nb.diffusion.checkpoint import save_quantized
    from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load_v1
    for label, options in (("nf4-dq", {}), ("int8", {"use_4bit": False})):
        pipeline = load_v1("tiny-sdxl", device="cpu", cache_dir=tmp_path / "hub", quantize_once=False, **options)
        folder = save_quantized(pipeline, tmp_path / label)
        found = estimate_vram(folder, "fp32", device="cpu")
        measured = {part.name: part.bytes_after for part in pipeline.load_report.parts}
        for name, size in measured.items(): assert abs(found.by_component[name] / size - 1) < .01, name
        assert f"unet is {label} already" in str(found)
