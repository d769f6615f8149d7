"What published figures say about the memory that tracing cannot see, and that a plan keeps the room its own errors ask for."
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from devsky_nb import estimate_vram, plan_vram
from devsky_nb.errors import ValidationError
from devsky_nb.memory import traces
from devsky_nb.memory.allocator import CachingAllocator, MIB, place
from devsky_nb.memory.configs import CONFIGS, find_model
from devsky_nb.memory.estimate import ACCEPTED_VALUES, CARDS, convolution_bytes, GPU_CALIBRATION, tensor_bytes, VAST
from devsky_nb.memory.margins import CLASS_MARGINS, configuration_classes, error_margin, UNKNOWN, WELL_KNOWN
from devsky_nb.memory.plan import candidates, PlanOption
from devsky_nb.memory.tracing import CONV, Trace
from published import PUBLISHED_TRACES

traces.MORE_TRACES.append(PUBLISHED_TRACES)

GIB = 2**30
FIELDS = {"peak_allocated", "peak_reserved", "loaded", "loaded_reserved"}
PUBLISHED = json.loads((Path(__file__).parents[2] / "benchmarks/published_vram.json").read_text(encoding="utf-8"))


def test_every_published_figure_has_its_source_and_can_be_asked_or_says_why_not():
    rows = PUBLISHED["rows"]
    assert {row["source"] for row in rows} == set(range(len(PUBLISHED["sources"]))) and len(rows) >= 272
    for row in rows:
        assert ("arguments" in row) != ("left_out" in row), row
        assert "arguments" not in row or (row["field"] in FIELDS and row["unit"] == "GiB" and row["value_gb"] >= 0)
        assert row.get("card") in CARDS and (row.get("marked") is None or len(row["marked"]) > 15)


PEAKS = [  # GiB allocated, as published
    (31.44, "flux1-dev", {"dtype": "bf16", "card": "hopper"}, "loaded"),
    (33.85, "flux1-dev", {"dtype": "bf16"}, "peak_allocated"),
    (2.41, "flux1-dev", {"dtype": "bf16", "offload": "sequential"}, "peak_allocated"),
    (22.64, "flux1-dev", {"dtype": "bf16", "offload": "model"}, "peak_allocated"),
    (6.72, "flux1-dev/transformer", {"dtype": "bf16", "quant": "nf4", "guidance": False, "card": "ada"}, "peak_allocated"),
    (2.533, "sdxl-base/vae", {"card": "ada"}, "peak_allocated"), (4.064, "sdxl-base/vae", {"dtype": "fp32"}, "peak_allocated"),
    (10.47, "sdxl-base", {}, "peak_allocated"), (16.397, "sd3-medium", {}, "loaded"),
    (3.068, "sd15", {"card": "volta"}, "peak_allocated"), (3.18, "sd15", {"card": "ampere"}, "peak_allocated"),
    (36.166, "flux1-dev", {"dtype": "bf16", "card": "hopper"}, "peak_reserved")]


@pytest.mark.parametrize("gib,model,options,field", PEAKS)
def test_well_known_figures(gib, model, options, field):
    alias, _, part = model.partition("/")
    found = estimate_vram(CONFIGS / alias / part if part else alias, **options)
    assert abs(getattr(found, field) / GIB / gib - 1) < .015


def test_a_budget_below_what_was_measured_is_not_enough():
    sequential = estimate_vram("flux1-dev", "bf16", offload="sequential")  # 2.41 GiB were measured
    fits = [PlanOption(sequential, int(gib * GIB)).fits for gib in (2.2, 2.41, 2.45, 2.6)]
    assert fits == [False, False, False, True]
    for found in candidates(find_model("flux1-dev"), "bf16", "cuda", {}):
        if found.setup.offload == "sequential": assert not PlanOption(found, int(2.45 * GIB)).fits


@pytest.mark.slow  # where nothing fits, smaller images are looked at
def test_a_plan_does_not_offer_what_was_measured_to_take_more():
    for budget in ("2.2GiB", "2.45GiB"):
        offered = plan_vram("flux1-dev", budget, top=99).options
        assert not any(option.estimate.setup.offload == "sequential" for option in offered)


def convolution(numbers, dtype_scaled=True):
    "One convolution whose operand and result have so many numbers."
    size = np.array([2 * numbers])
    return Trace(np.array([CONV]), np.array([1]), size, size, np.array([dtype_scaled]))


def test_the_workspace_of_a_convolution_by_format_size_and_card():
    one = convolution(2**20)
    size = lambda itemsize, calibration=GPU_CALIBRATION, trace=one, **o: int(convolution_bytes(trace, itemsize, calibration, **o)[0])
    assert size(2) == 4 * 2**20 and size(4) == 4 * 2**20  # both in 16 bits, one of them in 32
    assert size(2, CARDS["volta"]) == 2 * 2**20 and size(4, CARDS["volta"]) == size(4)
    assert (size(2, channels_last=True), size(4, channels_last=True)) == (2 * 2**20, 4 * 2**20)  # the operand, whatever the format
    below, vast = convolution(VAST - 1), convolution(VAST)
    assert size(2, trace=below) == 4 * (VAST - 1) and size(2, trace=vast) == 2 * VAST
    assert size(4, trace=vast) == 4 * VAST


def test_weights_are_counted_in_blocks_on_cuda_and_in_numbers_elsewhere():
    on_card, elsewhere = (estimate_vram("sdxl-base", device=device) for device in ("cuda", "cpu"))
    assert 50 * MIB < on_card.by_component["unet"] - elsewhere.by_component["unet"] < 150 * MIB
    for name, size in elsewhere.by_component.items():
        assert sum(map(sum, tensor_bytes(on_card.traced, name))) == size <= on_card.by_component[name] < 1.03 * size + MIB


def test_every_format_is_taken_apart_into_what_it_stores():
    for quant in ACCEPTED_VALUES["quant"]:
        model = estimate_vram("sdxl-base", "bf16", quant=quant, quant_components=["unet"] if quant else None).traced
        tensors = [size for layer in tensor_bytes(model, "unet") for size in layer]
        allocator = CachingAllocator()
        blocks = place(tensors, allocator)
        assert min(tensors) >= 0 and sum(size for _, size in blocks) == sum(tensors) <= allocator.allocated < 1.1 * sum(tensors)
        for address, size in blocks: allocator.free(address, size)
        assert allocator.allocated == 0 < allocator.peak_allocated <= allocator.peak_reserved


def test_every_configuration_has_a_margin():
    values = {name: ACCEPTED_VALUES[name] for name in ("quant", "offload", "attention", "vae")}
    seen = set()
    for options in product(*values.values()):
        classes = configuration_classes(**dict(zip(values, options)))
        seen |= set(classes)
        assert WELL_KNOWN <= error_margin("AutoencoderKL", classes) <= .15
    seen |= set(configuration_classes(vae_tiling=True, compile=True, channels_last=True, fused=True, controlnet=True, lora=True, ip_adapter=True))
    assert seen == set(CLASS_MARGINS)
    assert error_margin("SomeNewTransformer") == UNKNOWN


def test_what_is_needed_covers_every_run():
    for options in ({}, {"quant": "nf4"}, {"offload": "model"}, {"compile": True}):
        found = estimate_vram("sdxl-base", **options)
        assert all(run.total < found.needed for run in found.runs) and found.to_dict()["needed"] == found.needed
    assert estimate_vram("sdxl-base", compile=True).needed > 1.1 * estimate_vram("sdxl-base").needed


def test_reserved_is_a_bound_where_all_scores_of_attention_are_kept():
    math = estimate_vram("sd15", attention="math", batch=4, width=512, height=512, without=["safety_checker"])
    assert math.reserved_is_bound and "reserved at most" in repr(math) and math.to_dict()["reserved_is_bound"]
    assert 8.298 / 1.03 < math.peak_reserved / GIB < 9.5  # 6.28 and 8.30 GiB were published for the same run
    assert not estimate_vram("sd15").reserved_is_bound and "reserved about" in repr(estimate_vram("sd15"))


@pytest.mark.parametrize("card", ["turing", "RTX 4090", 4090, ""])
def test_a_card_without_measurements_is_refused_with_those_that_have_some(card):
    with pytest.raises(ValidationError, match="card=.*: expected one of None, volta, ampere, ada, hopper"):
        estimate_vram("sdxl-base", card=card)
