"Networks without weights: their structure, what a run of them is said to hold, and PyTorch's allocator in numbers."
import json, os, random, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from devsky_nb.errors import ValidationError
from devsky_nb.memory.allocator import CachingAllocator
from devsky_nb.hub.models import KNOWN
from devsky_nb.memory import traces as module
from devsky_nb.memory.configs import CONFIGS, config_folder, meta_network, networks_of
from devsky_nb.memory.inputs import Switches, Workload
from devsky_nb.memory.traces import (PACKAGED_TRACES, current_releases, is_current, read_trace, take_trace, trace_key,
                                     trace_network, write_trace)
from published import PUBLISHED_TRACES, questions
from traces import usual

MIB = 2**20
COUNTS = {
    ("sdxl-base", "unet"): 2567463684, ("sdxl-refiner", "unet"): 2259526660, ("sd15", "unet"): 859520964,
    ("sd21", "unet"): 865910724, ("sd3-medium", "transformer"): 2028328000, ("sd35-medium", "transformer"): 2243171520,
    ("sd35-large", "transformer"): 8056627520, ("flux1-dev", "transformer"): 11901408320,
    ("flux1-dev", "text_encoder_2"): 4762310656, ("sdxl-base", "text_encoder"): 123060480,
    ("sdxl-base", "text_encoder_2"): 694659840, ("sdxl-base", "vae"): 83653863, ("flux1-dev", "vae"): 83819683,
    ("clip-vit-base", ""): 151277313, ("clip-vit-large", ""): 427616513, ("clip-bigg", ""): 2539567105,
    ("siglip-base", ""): 203155970}


@pytest.mark.parametrize("model, part", COUNTS)
def test_configurations_have_the_published_number_of_parameters(model, part):
    assert sum(p.numel() for p in meta_network(networks_of(config_folder(model))[part]).parameters()) == COUNTS[model, part]


def test_folders_with_missing_or_broken_configurations(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValidationError, match=r"lacks unet/config.json, vae/config.json"): networks_of(tmp_path)


WALKS_A_SET = {"Gemma3ForConditionalGeneration"}  # it takes its kinds of layers from a set of strings: another order in each process
COLUMNS = ("kind", "which", "size", "result", "scaled")


def whatever_the_order(trace):
    "What a trace holds, without the order in which it came and went."
    events = zip(*(getattr(trace, name).tolist() for name in COLUMNS if name != "which"))
    return sorted(events), int(trace.live().max())


def same(a, b):
    "Whether two networks were traced alike."
    if (a.kind, a.layers, a.config.get("force_upcast")) != (b.kind, b.layers, b.config.get("force_upcast")): return False
    if a.trace is None or b.trace is None: return a.trace is b.trace
    if a.kind in WALKS_A_SET: return whatever_the_order(a.trace) == whatever_the_order(b.trace)
    return all(np.array_equal(getattr(a.trace, name), getattr(b.trace, name)) for name in COLUMNS)


EXAMPLES = {"sd15", "flux1-dev", "clip-vit-base", "siglip-base", "tiny-sdxl"}
MODELS = [model if model in EXAMPLES else pytest.param(model, marks=pytest.mark.slow) for model in KNOWN]  # at once: each architecture
FITS = any(read_trace(file) for file in PACKAGED_TRACES.iterdir())  # taken with minor releases that are installed here
packaged = pytest.mark.skipif(not FITS, reason=f"the package's traces are not for {current_releases()}, and not used")


def test_the_traces_of_the_package_are_those_of_its_models_and_no_others():
    expected = {f"{trace_key(*question)}.npz" for model in KNOWN for question in usual(model)}
    assert expected == {file.name for file in PACKAGED_TRACES.iterdir()}, "run make traces"


@packaged
def test_no_trace_of_the_package_is_stale():
    stale = [file.name for file in (*PACKAGED_TRACES.iterdir(), *PUBLISHED_TRACES.iterdir()) if read_trace(file) is None]
    assert not stale, "run make traces"


@packaged
@pytest.mark.parametrize("model", MODELS)
def test_a_trace_of_the_package_is_what_tracing_gives(model):
    for question in usual(model):
        kept = read_trace(PACKAGED_TRACES / f"{trace_key(*question)}.npz")
        assert same(kept, take_trace(*question)), "run make traces"


@packaged
@pytest.mark.slow
def test_the_traces_of_published_figures_are_what_tracing_gives(monkeypatch):
    monkeypatch.setattr(module, "MORE_TRACES", [PUBLISHED_TRACES])
    asked = questions()
    assert {f"{key}.npz" for key in asked} == {file.name for file in PUBLISHED_TRACES.iterdir()}, "run make traces"
    for key, question in asked.items(): assert same(read_trace(PUBLISHED_TRACES / f"{key}.npz"), take_trace(*question)), "run make traces"


PREDICTION = """
import sys
from pathlib import Path
from devsky_nb import estimate_vram
from devsky_nb.memory import traces
traces.PACKAGED_TRACES = Path(sys.argv[1])
for dtype in ("fp32", "fp16", "bf16"):
    estimate = estimate_vram("ltx2", width=768, height=512, frames=121, dtype=dtype)
    print(estimate, estimate.runs)
"""


@pytest.mark.slow
def test_a_prediction_is_the_same_in_every_process(tmp_path):
    def predicted(seed):
        return subprocess.run([sys.executable, "-c", PREDICTION, tmp_path], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
    assert len(predicted("0")) > 1000 and predicted("0") == predicted("1")


@pytest.fixture
def kept_elsewhere(tmp_path, monkeypatch):
    "A folder of kept traces in place of the package's, and how often one was taken anew."
    taken = []
    def take(*question):
        taken.append(question)
        return take_trace(*question)
    monkeypatch.setattr(module, "PACKAGED_TRACES", tmp_path)
    monkeypatch.setattr(module, "take_trace", take)
    module.known_trace.cache_clear()
    yield tmp_path, taken
    module.known_trace.cache_clear()


QUESTION = (config_folder("tiny-sdxl") / "text_encoder", Workload(0, 0), Switches())


def keep(folder, releases, monkeypatch):
    "Keep a trace that says it was taken with certain releases, and that nobody could mistake for a fresh one."
    with monkeypatch.context() as m:
        m.setattr(module, "current_releases", lambda: releases)
        fresh = take_trace(*QUESTION)
        write_trace(module.TracedNetwork("Kept", fresh.layers, fresh.config, fresh.trace), folder / f"{trace_key(*QUESTION)}.npz")


def test_a_kept_trace_is_used_and_nothing_is_traced(kept_elsewhere, monkeypatch):
    folder, taken = kept_elsewhere
    keep(folder, current_releases(), monkeypatch)
    assert trace_network(*QUESTION).kind == "Kept" and taken == []


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers", "recorder"])
def test_a_trace_of_another_release_is_taken_anew(library, kept_elsewhere, monkeypatch):
    folder, taken = kept_elsewhere
    keep(folder, current_releases() | {library: "0.1"}, monkeypatch)
    assert trace_network(*QUESTION).kind == "CLIPTextModel" and len(taken) == 1


def test_a_patch_release_keeps_the_traces_and_a_minor_release_does_not(monkeypatch):
    made_with = current_releases()
    installed = {name: module.version(name) for name in ("torch", "transformers", "diffusers")}
    def now(**changed):
        monkeypatch.setattr(module, "version", (installed | changed).__getitem__)
        current_releases.cache_clear()
        return is_current(made_with)
    try:
        major, minor, *_ = installed["torch"].split(".")
        assert now() and now(torch=f"{major}.{minor}.99") and now(torch=f"{major}.{minor}.99+cu130")
        assert not now(torch=f"{major}.{int(minor) + 1}.0") and not now(diffusers="0.1.0")
    finally:
        monkeypatch.undo()
        current_releases.cache_clear()
    assert current_releases() == made_with


def test_what_a_library_notes_in_a_configuration_changes_nothing(tmp_path):
    part, copy = QUESTION[0], tmp_path / "text_encoder"
    shutil.copytree(part.parent, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    def key(**changed):
        (copy / "config.json").write_text(json.dumps(config | changed, indent=7), encoding="utf-8")
        return trace_key(copy, *QUESTION[1:])
    assert key() == key(transformers_version="1.2.3") == key(_name_or_path="elsewhere") == trace_key(*QUESTION)
    assert key(num_hidden_layers=1) != key()


def test_a_trace_that_is_kept_comes_back(tmp_path):
    part = config_folder("tiny-sdxl")
    for name, shape in (("unet", Workload(64, 64)), ("vae", Workload(128, 64, 3)), ("text_encoder", Workload(0, 0, 2))):
        taken = take_trace(part / name, shape, Switches())
        write_trace(taken, tmp_path / "t.npz")
        assert same(taken, read_trace(tmp_path / "t.npz"))
    assert not same(taken, take_trace(part / "unet", Workload(64, 64)))


def test_another_configuration_size_or_switch_is_another_trace(tmp_path):
    part = config_folder("tiny-sdxl") / "unet"
    key = trace_key(part, Workload(64, 64), Switches())
    others = [(Workload(64, 128), Switches()), (Workload(64, 64, 2), Switches()), (Workload(64, 64), Switches("math"))]
    assert len({key, *(trace_key(part, *question) for question in others)}) == 4
    shutil.copytree(part.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    copy = tmp_path / "copy" / "unet"
    assert trace_key(copy, Workload(64, 64), Switches()) == key
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"layers_per_block": 3}), encoding="utf-8")
    assert trace_key(copy, Workload(64, 64), Switches()) != key


@packaged
def test_a_plan_of_a_known_model_imports_no_torch():
    code = ("import sys; from devsky_nb import plan_vram; assert plan_vram('sdxl-base', '8GB').best\n"
            "assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("config", [
    "", "{", "[]", "null", "{}", "\x00\xff", '{"_class_name": "UNet9DModel"}', '{"model_type": "nonsense"}'])
def test_what_cannot_be_traced_is_named(config, tmp_path):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValidationError, match="cannot be traced: ") as e: trace_network(tmp_path, Workload(0, 0))
    assert str(tmp_path) in str(e.value) and e.value.original_error is not None


@pytest.mark.parametrize("change", [
    {"block_out_channels": [7, 3]}, {"cross_attention_dim": None},
    {"down_block_types": ["NoBlock"]}, {"in_channels": -1}])
def test_a_unet_that_is_wrong_in_itself_is_named(change, tmp_path):
    for part in ("unet", "vae", "text_encoder_2"):
        shutil.copytree(CONFIGS / "sdxl-base" / part, tmp_path / part)
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValidationError, match="unet cannot be traced: "): trace_network(tmp_path / "unet", Workload(1024, 1024))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest resident memory is asked of Linux")
@pytest.mark.slow
def test_tracing_leaves_no_memory_behind():
    code = ("import gc, psutil; from pathlib import Path; from devsky_nb.memory.configs import config_folder\n"
            "from devsky_nb.memory.inputs import Workload; from devsky_nb.memory.traces import take_trace\n"
            "take_trace(config_folder('tiny-sdxl') / 'unet', Workload(64, 64))\n"
            "rss = lambda: psutil.Process().memory_info().rss; before = rss()\n"
            "take_trace(config_folder('sd35-medium') / 'transformer', Workload(1024, 1024))\n"
            "highest = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024\n"
            "gc.collect(); print(rss() - before, highest - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left, most = map(int, done.stdout.split())
    assert left < 60 * MIB and most < 120 * MIB


def test_the_allocator_never_hands_out_a_byte_twice():
    rng, allocator, held = random.Random(0), CachingAllocator(), {}
    for _ in range(3000):
        if held and rng.random() < .5:
            address = rng.choice(list(held))
            allocator.free(address, held.pop(address))
        else:
            size = rng.choice([100, 4096, 700_000, 3 * MIB, 15 * MIB, 33 * MIB])
            address = allocator.allocate(size)
            assert all(address + size <= a or a + s <= address for a, s in held.items())
            held[address] = size
        assert allocator.reserved >= sum(held.values())
    for address, size in held.items(): allocator.free(address, size)
    allocator.empty_cache()
    assert allocator.reserved == 0 and not allocator.blocks
