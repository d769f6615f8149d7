"Optimizing: what may be asked, which switches are thrown where, and what is left as it was."
import codecs
import copy
import json
import locale
import threading

import numpy as np
import performance as benchmark
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from patience import PATIENCE

from devsky_nb import QuantizedSDXLGenerator
from devsky_nb.diffusion import speed
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1
from devsky_nb.diffusion.speed import (BF16_CPU, CLOSE, EXACT, NAMES, TECHNIQUES, Task, difference, draw_probe,
                                       optimize, predict_peak, reason_to_skip)
from devsky_nb.diffusion.turns import turns_of
from devsky_nb.errors import InsufficientMemoryError, MLError, ValidationError
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.hub.weights import model_bytes

SMALL = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def image(loaded):
    return draw_probe(loaded, 32, 32)


@pytest.fixture(params=[True, False], ids=["bfloat16", "no bfloat16"])
def bfloat16(request, monkeypatch):
    "Both kinds of processor, pretended: one that computes in bfloat16, and one that does not."
    monkeypatch.setattr(speed, "computes_bfloat16", lambda: request.param)
    return request.param


def named(name):
    return next(technique for technique in TECHNIQUES if technique.name == name)


def same(a, b):
    "Whether two pipelines have the same weights, in the same format and layout."
    networks = zip(Task(a).networks.values(), Task(b).networks.values())
    pairs = [pair for x, y in networks for pair in zip(x.state_dict().values(), y.state_dict().values(), strict=True)]
    return all(p.dtype == q.dtype and p.stride() == q.stride() and torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("call, says", [
    ({"goal": "fast"}, "expected one of speed, memory"),
    ({"goal": None}, "expected one of speed, memory"),
    ({"budget": "lots"}, "no size in 'lots'"),
    ({"budget": -1}, "no size in -1"),
    ({"budget": 1.5}, "no size in 1.5"),
    ({"budget": True}, "no size in True"),
    ({"budget": 0}, "more than nothing"),
    ({"batch": 0}, "batch=0"),
    ({"batch": 1.}, "batch=1.0"),
    ({"width": 65}, "multiple of 4"),
    ({"height": "64"}, "height='64'"),
    ({"width": True}, "width=True"),
    ({"techniques": "VAE tilling"}, "techniques='VAE tilling': expected one of SDPA attention"),
    ({"techniques": [None]}, "techniques=None"),
    ({"tolerance": -1}, "from 0 to 1"),
    ({"tolerance": float("nan")}, "from 0 to 1"),
    ({"tolerance": True}, "from 0 to 1"),
    ({"probe": "draw"}, "something to call")])
def test_wrong_arguments_are_named_before_anything_is_drawn(loaded, call, says, monkeypatch):
    monkeypatch.setattr(speed, "draw_probe", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValidationError, match=says): optimize(loaded, **call)


@pytest.mark.parametrize("thing", ["tiny-sdxl", None, 3, torch.nn.Linear(2, 2), [1], {"unet": 1}])
def test_what_is_no_pipeline_is_refused(thing):
    says = f"{type(thing).__name__} cannot be optimized: expected a QuantizedSDXLGenerator"
    with pytest.raises(ValidationError, match=says): optimize(thing)


def test_a_component_a_network_in_training_and_a_closed_generator_are_refused(pipeline):
    with pytest.raises(ValidationError, match="UNet2DConditionModel cannot be optimized"): optimize(pipeline.unet)
    generator = QuantizedSDXLGenerator(pipeline=pipeline)
    generator.close()
    with pytest.raises(MLError, match="this generator is closed"): optimize(generator)
    pipeline.unet.train()
    with pytest.raises(ValidationError, match="unet: in training mode"): optimize(pipeline)


@pytest.mark.parametrize("a, b, gap", [
    ([1., 2.], [1., 4.], .5), ([np.nan], [1.], np.inf), ([1.], [np.inf], np.inf), ([1.], [1., 1.], np.inf),
    ([0.], [0.], 0), ([-3.], [-4.], .25), ([], [], 0)])
def test_differences(a, b, gap):
    assert difference(np.array(a), np.array(b)) == gap


@pytest.mark.device
@pytest.mark.parametrize("name", NAMES)
def test_every_switch_does_what_it_says_and_goes_back_to_the_last_bit(pipeline, image, name):
    if name == "compiled blocks" and codecs.lookup(locale.getpreferredencoding(False)).name == "ascii":
        pytest.skip("torch's compiler reads its own templates in the locale's encoding")
    task = Task(pipeline, width=96, height=96, batch=2)
    if name == "SDPA attention": pipeline.unet.set_default_attn_processor()
    before, technique = copy.deepcopy(pipeline), named(name)
    drawn = draw_probe(pipeline, 32, 32)
    if name == "model offload" and task.device == "mps":
        assert "compute in the main memory" in technique.obstacle(task)
        return
    assert technique.obstacle(task) is None
    on, back = technique.switch(task)
    on()
    assert technique.obstacle(task)  # it is so already
    if name != "compiled blocks":
        assert difference(draw_probe(pipeline, 32, 32), drawn) <= (EXACT if technique.exact else CLOSE)
    back()
    assert technique.obstacle(task) is None
    assert same(pipeline, before)
    assert np.array_equal(draw_probe(pipeline, 32, 32), drawn)


def test_in_half_precision_the_vae_goes_along(pipeline):
    size, report = model_bytes(pipeline), optimize(pipeline, techniques=["half precision"], **SMALL)
    assert 0 < report.applied["half precision"] == report.difference < CLOSE
    assert (pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype) == \
        (torch.bfloat16, torch.bfloat16, torch.bfloat16)
    assert model_bytes(pipeline) < .6 * size


def test_layers_that_belong_in_float32_are_not_cast(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.text_encoder_2, "_keep_in_fp32_modules", ["wo"], raising=False)
    report = optimize(pipeline, techniques=["half precision"], **SMALL)
    assert "text_encoder_2: some layers are kept in float32" in report.skipped["half precision"]


def test_without_a_budget_no_digit_is_given_up_and_a_second_call_changes_nothing(pipeline, loaded, bfloat16):
    report = optimize(pipeline, "memory", batch=2, **SMALL)
    assert list(report.applied) == ["VAE slicing"] and report.fits is None
    assert report.difference < EXACT and same(pipeline, loaded)
    again = optimize(pipeline, "memory", batch=2, **SMALL)
    assert again.applied == {} and again.skipped["VAE slicing"] == "it is so already" and pipeline.vae.use_slicing


@pytest.mark.parametrize("budget, needed", [("1GB", False), ("20MB", True)])
def test_digits_are_given_up_for_a_budget_where_the_processor_computes_in_them(pipeline, budget, needed, bfloat16):
    report = optimize(pipeline, "memory", budget, **SMALL)
    given_up = needed and bfloat16
    assert list(report.applied) == ["half precision"] * given_up
    assert report.fits == (not needed or bfloat16)
    assert (report.peak_after < .7 * report.peak_before) == given_up
    assert ("is not met" in repr(report)) == ("is not met" in report._repr_html_()) == (not report.fits)


def test_for_speed_half_precision_is_taken_where_the_processor_computes_in_it(pipeline, bfloat16):
    report = optimize(pipeline, **SMALL)
    assert list(report.applied) == ["half precision"] * bfloat16
    assert pipeline.unet.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    if not bfloat16: assert report.skipped["half precision"] == f"worth trying on {BF16_CPU}, cuda, mps only"


@pytest.mark.parametrize("place, speed_up, save", [
    ("cpu", {"SDPA attention"}, {"SDPA attention", "VAE slicing", "VAE tiling"}),
    ("mps", {"SDPA attention", "half precision"}, {"SDPA attention", "VAE slicing", "VAE tiling"}),
    ("cuda:0", {"SDPA attention", "half precision", "channels_last", "compiled blocks"},
     {"SDPA attention", "VAE slicing", "VAE tiling", "model offload"})])
def test_which_switches_are_worth_trying_where(pipeline, monkeypatch, place, speed_up, save):
    monkeypatch.setattr(speed, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(speed, "where_it_runs", lambda pipeline: place)
    pipeline.enable_attention_slicing()
    for goal, expected in (("speed", speed_up), ("memory", save)):
        task = Task(pipeline, goal, width=128, height=128, batch=2)
        assert {t.name for t in TECHNIQUES if reason_to_skip(t, task) is None} == expected


def test_on_a_gpu_a_budget_turns_on_what_saves_memory_until_it_is_met(loaded, monkeypatch):
    monkeypatch.setattr(speed, "where_it_runs", lambda pipeline: "cuda:0")
    task = Task(loaded, width=64, height=64)
    peak = predict_peak(task)
    offload = named("model offload")
    assert reason_to_skip(offload, Task(loaded, "speed", 2 * peak, 64, 64)) == "the budget is met without it"
    assert reason_to_skip(offload, Task(loaded, "speed", peak, 64, 64)) is None
    assert reason_to_skip(offload, Task(loaded, "speed", peak, 64, 64, shared=True)).endswith("with low_memory=True")


def test_a_switch_that_leaves_its_tolerance_goes_back_and_the_report_says_so(pipeline, loaded):
    report = optimize(pipeline, "memory", width=128, height=128)
    assert "the output differs by 0.1" in report.skipped["VAE tiling"] and not pipeline.vae.use_tiling
    assert report.applied == {} and report.difference == 0 and same(pipeline, loaded)
    assert list(optimize(pipeline, "memory", width=128, height=128, tolerance=.5).applied) == ["VAE tiling"]


def test_a_tolerance_of_ones_own_holds_for_every_switch(pipeline):
    pipeline.enable_attention_slicing()
    sliced = dict(pipeline.unet.attn_processors)
    report = optimize(pipeline, techniques=["SDPA attention", "half precision"], tolerance=0, **SMALL)
    assert report.applied == {} and pipeline.unet.attn_processors == sliced and pipeline.unet.dtype == torch.float32


def test_small_differences_that_add_up_are_refused(pipeline):
    outputs = iter([np.ones(3), np.full(3, 1.08), np.full(3, 1.16)])
    report = optimize(pipeline, techniques=["VAE tiling", "half precision"], probe=lambda: next(outputs),
                      width=128, height=128)
    assert list(report.applied) == ["half precision"] and report.difference == pytest.approx(.08)
    assert "differs by 0.16" in report.skipped["VAE tiling"]


@pytest.mark.device
def test_a_pipeline_that_fails_with_a_switch_gets_it_back(pipeline):
    def probe():
        if pipeline.vae.use_slicing: raise RuntimeError("no slices")
        return np.ones(1)
    report = optimize(pipeline, "memory", probe=probe, batch=2)
    assert report.skipped["VAE slicing"] == "the pipeline fails with it: RuntimeError: no slices"
    assert not pipeline.vae.use_slicing and report.probe == "your own call"


@pytest.mark.parametrize("call", [2, 3, 4])
def test_ctrl_c_leaves_a_pipeline_that_draws_the_same(pipeline, image, call, bfloat16):
    pipeline.enable_attention_slicing()
    calls = []

    def probe():
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return draw_probe(pipeline, 32, 32)

    names = ["SDPA attention", "VAE slicing", "half precision"]
    with pytest.raises(KeyboardInterrupt): optimize(pipeline, techniques=names, probe=probe, batch=2)
    kinds = {type(processor) for processor in pipeline.unet.attn_processors.values()}
    assert (kinds == {AttnProcessor2_0}, pipeline.vae.use_slicing) == (call > 2, call > 3)  # what was checked stays
    assert pipeline.unet.dtype == torch.float32
    assert difference(draw_probe(pipeline, 32, 32), image) < EXACT
    assert optimize(pipeline, techniques=names, batch=2, **SMALL).applied.keys() == set(names[call - 2:])


def test_ctrl_c_while_a_switch_is_thrown_brings_it_back(pipeline, loaded, monkeypatch):
    def bfloat16(network): raise KeyboardInterrupt
    monkeypatch.setattr(type(pipeline.unet), "bfloat16", bfloat16)  # the last of the networks
    with pytest.raises(KeyboardInterrupt): optimize(pipeline, techniques=["half precision"], **SMALL)
    assert same(pipeline, loaded)


def test_a_pipeline_that_fails_before_anything_is_changed(pipeline):
    with pytest.raises(MLError, match="fails before anything is changed: division by zero"):
        optimize(pipeline, probe=lambda: 1 / 0)
    with torch.no_grad(): pipeline.unet.conv_out.weight.fill_(float("nan"))
    with pytest.raises(MLError, match="not finite before anything is changed"): optimize(pipeline, **SMALL)


def test_an_image_for_which_there_is_no_room(pipeline):
    def no_room(vae, args): raise MemoryError("cannot allocate memory")
    pipeline.vae.post_quant_conv.register_forward_pre_hook(no_room)
    with pytest.raises(InsufficientMemoryError, match="cannot draw even the image"): optimize(pipeline, **SMALL)


def test_offloaded_weights_are_left_where_they_are(pipeline, image):
    pipeline.enable_model_cpu_offload(device="cpu")
    report = optimize(pipeline, techniques=NAMES[:-1], **SMALL)
    assert report.skipped["model offload"] == "there is model offload already"
    assert list(report.applied) == ["channels_last", "half precision"]
    pipeline.remove_all_hooks()
    pipeline.to(torch.float32)
    pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    report = optimize(pipeline, techniques=NAMES, **SMALL)
    assert report.applied == {}
    for name in ("half precision", "channels_last", "compiled blocks", "model offload"):
        assert "group-leaf offload" in report.skipped[name]


def test_quantized_pipelines_keep_their_weights_and_get_the_rest():
    pipeline = load_sdxl_pipeline_with_quantization_v1("tiny-sdxl", use_4bit=False, device="cpu", quantize_once=False)
    packed = pipeline.unet.mid_block.attentions[0].proj_in.weight.data.clone()
    report = optimize(pipeline, "memory", 1000, techniques=NAMES[:-1], batch=2, **SMALL)
    assert list(report.applied) == ["channels_last", "VAE slicing", "model offload"]
    assert "quantized weights keep" in report.skipped["half precision"] and report.fits is False
    assert torch.equal(pipeline.unet.mid_block.attentions[0].proj_in.weight.data, packed)
    assert pipeline.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_unknown_attention_processors_are_left(pipeline):
    class Own(AttnProcessor2_0): pass
    names = list(pipeline.unet.attn_processors)
    pipeline.enable_attention_slicing()
    pipeline.unet.set_attn_processor(pipeline.unet.attn_processors | {names[0]: Own()})
    assert list(optimize(pipeline, **SMALL, techniques=["SDPA attention"]).applied) == ["SDPA attention"]
    kinds = [type(processor).__name__ for processor in pipeline.unet.attn_processors.values()]
    assert kinds == ["Own"] + ["AttnProcessor2_0"] * (len(names) - 1)


def test_a_pipeline_that_the_planner_does_not_know_gets_no_prediction_and_no_budget(pipeline):
    stranger = type(pipeline)(**pipeline.components)
    report = optimize(stranger, "memory", **SMALL)
    assert (report.peak_before, report.peak_after, report.fits) == (None, None, None) and "expected" not in repr(report)
    with pytest.raises(ValidationError, match="the planner does not know this"): optimize(stranger, budget="8GB")


def test_a_report_is_plain_data_and_names_every_switch(pipeline):
    report = optimize(pipeline, **SMALL)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["applied"].keys() | data["skipped"].keys() == set(NAMES) and data["fits"] is None
    assert all(name in repr(report) and name in report._repr_html_() for name in NAMES)


@pytest.mark.device
def test_the_pipeline_is_given_back_as_it_was_but_for_the_switches(pipeline):
    scheduler, bar = pipeline.scheduler, dict(pipeline._progress_bar_config)
    optimize(pipeline, "memory", **SMALL)
    assert pipeline.scheduler is scheduler and pipeline.scheduler.num_inference_steps is None
    assert pipeline._progress_bar_config == bar


def test_calls_on_one_pipeline_take_turns_with_each_other_and_with_a_generator(pipeline):
    inside, most, reports = [], [], []

    def probe():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(.03)
        inside.pop()
        return draw_probe(pipeline, 32, 32)

    def work(): reports.append(optimize(pipeline, "memory", probe=probe, batch=2))
    threads = [threading.Thread(target=work) for _ in range(3)]
    with turns_of(pipeline).take():
        for thread in threads: thread.start()
        threading.Event().wait(.1)
        assert not most
    for thread in threads: thread.join(PATIENCE)
    assert max(most) == 1 and sorted(len(report.applied) for report in reports) == [0, 0, 1]


def test_a_generator_is_taken_draws_as_before_and_keeps_the_switches(caplog):
    with QuantizedSDXLGenerator("tiny-sdxl", use_quantization=False, device="cpu", dtype=torch.float32,
                                registry=ModelRegistry()) as generator:
        def draw(): return np.asarray(generator.generate("a red dress", num_inference_steps=1, seed=1, progress=False))
        before = draw()
        report = optimize(generator, "memory", 1000, batch=2, **SMALL)
        assert report.pipeline == "StableDiffusionXLPipeline" and list(report.applied) == ["VAE slicing"]
        named_too = optimize(generator, techniques=["half precision", "model offload"], **SMALL)
        assert "a generator's" in named_too.skipped["half precision"]
        assert "low_memory=True" in named_too.skipped["model offload"]
        assert np.array_equal(draw(), before) and generator.pipeline.vae.use_slicing
        assert "put back" not in caplog.text
        with QuantizedSDXLGenerator(pipeline=generator.pipeline) as other:  # the pipeline by itself is shared as well
            report = optimize(other.pipeline, techniques=["half precision"], **SMALL)
            assert "a generator's" in report.skipped["half precision"]


@pytest.mark.slow
def test_the_benchmark_runs_for_a_few_rows(tmp_path):
    rows = ["plain", "channels_last", "half", "VAE slicing"]
    result = benchmark.main(["--rounds", "1", "--out", str(tmp_path), "--rows", *rows])
    assert list(result["tiny-sdxl"]) == ["plain / plain", "channels_last", "half precision",
                                         "channels_last, decoding with SDXL's VAE at 128 px",
                                         "VAE slicing, four images"]
    assert list(result["ViT-B/32"]) == ["plain / plain", "half precision"]
    assert json.loads((tmp_path / "performance.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / "performance.md").read_text(encoding="utf-8") == benchmark.table(result)


def test_the_benchmarks_page_is_made_from_the_json_beside_it():
    found = json.loads((benchmark.HERE / "performance.json").read_text(encoding="utf-8"))
    assert (benchmark.HERE / "performance.md").read_text(encoding="utf-8") == benchmark.table(found)
    assert all(row["processor"] > 0 for model in ("tiny-sdxl", "ViT-B/32") for row in found[model].values())
