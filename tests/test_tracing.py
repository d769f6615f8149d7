"Networks without weights: their structure, what a run of them is said to hold, and PyTorch's allocator in numbers."
import json, random

import pytest

from devsky_nb.errors import ValidationError
from devsky_nb.tracing import CONFIGS, CachingAllocator, Shape, config_folder, meta_network, networks_of, trace_part

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


@pytest.mark.parametrize("config", ["", "{", "[]", "null", "{}", '{"_class_name": "UNet9DModel"}', '{"model_type": "gpt2"}', '{"model_type": "nonsense"}', "\x00\xff"])
def test_what_cannot_be_traced_is_named(config, tmp_path):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValidationError, match="cannot be traced: ") as e: trace_part(tmp_path, Shape(0, 0))
    assert str(tmp_path) in str(e.value) and e.value.original_error is not None


@pytest.mark.parametrize("change", [{"block_out_channels": [7, 3]}, {"cross_attention_dim": None}, {"class_embed_type": "timestep"}, {"down_block_types": ["NoBlock"]}, {"in_channels": -1}])
def test_a_unet_that_is_wrong_in_itself_is_named(change, tmp_path):
    for part in ("unet", "vae", "text_encoder_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text((CONFIGS / "sdxl-base" / part / "config.json").read_text())
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValidationError, match="unet cannot be traced: "): trace_part(tmp_path / "unet", Shape(1024, 1024))


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
