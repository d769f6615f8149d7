"Networks without weights: their structure, what a run of them is said to hold, and PyTorch's allocator in numbers."
import json, random, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from devsky_nb.errors import ValidationError
from devsky_nb.tracing import CONFIGS, REPOS, TRACES, CachingAllocator, Shape, Switches, config_folder, meta_network, networks_of, read_trace, take_trace, trace_key, trace_part, write_trace
from traces import usual

MIB = 2**20
COUNTS = {("sdxl-base", "unet"): 2567463684, ("sdxl-refiner", "unet"): 2259526660, ("sd15", "unet"): 859520964, ("sd21", "unet"): 865910724, ("sd3-medium", "transformer"): 2028328000,
          ("sd35-medium", "transformer"): 2243171520, ("sd35-large", "transformer"): 8056627520, ("flux1-dev", "transformer"): 11901408320, ("flux1-dev", "text_encoder_2"): 4762310656,
          ("sdxl-base", "text_encoder"): 123060480, ("sdxl-base", "text_encoder_2"): 694659840, ("sdxl-base", "vae"): 83653863, ("flux1-dev", "vae"): 83819683,
          ("clip-vit-base", ""): 151277313, ("clip-vit-large", ""): 427616513, ("clip-bigg", ""): 2539567105, ("siglip-base", ""): 203155970}


@pytest.mark.parametrize("model, part", COUNTS)
def test_configurations_have_the_published_number_of_parameters(model, part):
    assert sum(p.numel() for p in meta_network(networks_of(config_folder(model))[part]).parameters()) == COUNTS[model, part]


def test_folders_with_missing_or_broken_configurations(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValidationError, match=r"lacks unet/config.json, vae/config.json"): networks_of(tmp_path)


def same(a, b):
    events = lambda part: [] if part.trace is None else [part.trace.kind, part.trace.which, part.trace.size, part.trace.result, part.trace.scaled]
    return (a.kind, a.layers, a.config.get("force_upcast")) == (b.kind, b.layers, b.config.get("force_upcast")) and all(map(np.array_equal, events(a), events(b))) and (a.trace is None) == (b.trace is None)


def test_the_traces_of_the_package_are_those_of_its_models_and_no_others():
    assert {f"{trace_key(*question)}.npz" for model in REPOS for question in usual(model)} == {f.name for f in TRACES.iterdir()}, "run make traces"


@pytest.mark.parametrize("model", [m if m in ("sd15", "sdxl-base", "sd3-medium", "flux1-dev", "pixart-sigma", "clip-vit-base", "siglip-base", "tiny-sdxl") else pytest.param(m, marks=pytest.mark.slow)
                                   for m in REPOS])  # at once: one of each architecture
def test_a_trace_of_the_package_is_what_tracing_gives(model):
    for question in usual(model):
        assert same(read_trace(TRACES / f"{trace_key(*question)}.npz"), take_trace(*question)), "run make traces"


def test_a_trace_that_is_kept_comes_back(tmp_path):
    part = config_folder("tiny-sdxl")
    for name, shape in (("unet", Shape(64, 64)), ("vae", Shape(128, 64, 3)), ("text_encoder", Shape(0, 0, 2))):
        taken = take_trace(part / name, shape, Switches())
        write_trace(taken, tmp_path / "t.npz")
        assert same(taken, read_trace(tmp_path / "t.npz"))
    assert not same(taken, take_trace(part / "unet", Shape(64, 64)))


def test_another_configuration_size_or_switch_is_another_trace(tmp_path):
    part = config_folder("tiny-sdxl") / "unet"
    key = trace_key(part, Shape(64, 64), Switches())
    assert len({key, trace_key(part, Shape(64, 128), Switches()), trace_key(part, Shape(64, 64, 2), Switches()), trace_key(part, Shape(64, 64), Switches("math"))}) == 4
    shutil.copytree(part.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    copy = tmp_path / "copy" / "unet"
    assert trace_key(copy, Shape(64, 64), Switches()) == key
    (copy / "config.json").write_text((copy / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert trace_key(copy, Shape(64, 64), Switches()) != key


def test_a_plan_of_a_known_model_imports_no_torch():
    code = "import sys; from devsky_nb.vram import plan_vram; assert plan_vram('sdxl-base', '8GB').best; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("config", ["", "{", "[]", "null", "{}", '{"_class_name": "UNet9DModel"}', '{"model_type": "gpt2"}', '{"model_type": "nonsense"}', "\x00\xff"])
def test_what_cannot_be_traced_is_named(config, tmp_path):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValidationError, match="cannot be traced: ") as e: trace_part(tmp_path, Shape(0, 0))
    assert str(tmp_path) in str(e.value) and e.value.original_error is not None


@pytest.mark.parametrize("change", [{"block_out_channels": [7, 3]}, {"cross_attention_dim": None}, {"class_embed_type": "timestep"}, {"down_block_types": ["NoBlock"]}, {"in_channels": -1}])
def test_a_unet_that_is_wrong_in_itself_is_named(change, tmp_path):
    for part in ("unet", "vae", "text_encoder_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text((CONFIGS / "sdxl-base" / part / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | change))
    with pytest.raises(ValidationError, match="unet cannot be traced: "): trace_part(tmp_path / "unet", Shape(1024, 1024))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest resident memory is asked of Linux")
@pytest.mark.slow
def test_tracing_leaves_no_memory_behind():
    code = ("import gc, psutil; from pathlib import Path; from devsky_nb.tracing import Shape, config_folder, take_trace\n"
            "take_trace(config_folder('tiny-sdxl') / 'unet', Shape(64, 64)); rss = lambda: psutil.Process().memory_info().rss; before = rss()\n"
            "take_trace(config_folder('sd35-medium') / 'transformer', Shape(1024, 1024))\n"
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
            allocator.give(address, held.pop(address))
        else:
            size = rng.choice([100, 4096, 700_000, 3 * MIB, 15 * MIB, 33 * MIB])
            address = allocator.take(size)
            assert all(address + size <= a or a + s <= address for a, s in held.items())
            held[address] = size
        assert allocator.reserved >= sum(held.values())
    for address, size in held.items(): allocator.give(address, size)
    allocator.release()
    assert allocator.reserved == 0 and not allocator.blocks
