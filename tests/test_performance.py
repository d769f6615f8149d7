"Optimizing: what may be asked, what is undone, and what is left as it was."
import copy, json, os, resource, signal, threading
from dataclasses import replace
from pathlib import Path

import numpy as np, performance as benchmark, pytest, torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from devsky_nb import performance
from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb.errors import InsufficientMemoryError, MLError, ValidationError
from devsky_nb.generation import TURNS, QuantizedSDXLGenerator, Turns
from devsky_nb.performance import CLOSE, LAID, ORDER, TECHNIQUES, Job, difference, draw_probe, embed_probe, keep, optimize, place, placement
from devsky_nb.quantization import load_sdxl_pipeline_with_quantization_v1
from devsky_nb.registry import load_model, model_bytes

SMALL = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def loaded():
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def picture(loaded):
    return draw_probe(loaded, 32, 32)


@pytest.fixture(params=[True, False], ids=["half pays", "half does not pay"])
def half_pays(request, monkeypatch):
    "Both kinds of processor, pretended: one that computes well in half precision, and one that does not."
    monkeypatch.setattr(performance, "slow_half", lambda dtype, device: None if request.param else "its matrix product takes 9.0 times as long as fp32 on this machine")
    return request.param


def tiny_vit(**config):
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=32, **config)).eval()


def states(report):
    return {s.name: s.state for s in report.steps}


def why(report, name):
    return next(s.why for s in report.steps if s.name == name)


@pytest.mark.parametrize("call, says", [
    ({"goal": "fast"}, "expected one of speed, memory"), ({"goal": None}, "expected one of speed, memory"),
    ({"budget": "lots"}, "no size in 'lots'"), ({"budget": -1}, "no size in -1"), ({"budget": 1.5}, "no size in 1.5"), ({"budget": True}, "no size in True"), ({"budget": 0}, "more than nothing"),
    ({"batch": 0}, "batch=0 must be"), ({"batch": 1.}, "batch=1.0 must be"), ({"width": 65}, "multiple of 4"), ({"height": "64"}, "height='64'"), ({"width": True}, "width=True"),
    ({"steps": []}, "expected a list"), ({"steps": "VAE tiling"}, "expected a list"), ({"steps": ["VAE tilling"]}, "did you mean 'VAE tiling'"), ({"steps": [None]}, "no technique None"),
    ({"tolerance": -1}, "from 0 to 1"), ({"tolerance": float("nan")}, "from 0 to 1"), ({"tolerance": True}, "from 0 to 1"), ({"tolerance": "0"}, "from 0 to 1"),
    ({"probe": "draw"}, "something to call"), ({"device": "cuda:9"}, "no device 'cuda:9'")])
def test_wrong_arguments_are_named_and_nothing_is_changed(loaded, call, says):
    with pytest.raises(ValidationError, match=says): optimize(loaded, **call)
    assert loaded not in LAID and any(p.requires_grad for p in loaded.unet.parameters())


@pytest.mark.parametrize("thing", ["tiny-sdxl", None, 3, torch.nn.Linear(2, 2), [1], {"unet": 1}])
def test_what_is_no_pipeline_is_refused(thing):
    with pytest.raises(ValidationError, match=f"{type(thing).__name__} cannot be optimized: expected a pipeline of diffusers"): optimize(thing)


def test_a_component_a_network_in_training_and_an_embedder_that_was_tuned_are_refused(loaded):
    with pytest.raises(ValidationError, match="UNet2DConditionModel cannot be optimized"): optimize(loaded.unet)
    with pytest.raises(ValidationError, match="in training mode"): optimize(tiny_vit().train())
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu")
    embedder._run, embedder.receipt = lambda pixels: pixels, type("Receipt", (), {"route": "int8", "name": "int8"})
    with pytest.raises(ValidationError, match="runs what `tune` built"): optimize(embedder)
    with pytest.raises(ValidationError, match="draws nothing"): optimize(tiny_vit(), width=64)


@pytest.mark.parametrize("a, b, gap", [([1., 2.], [1., 4.], .5), ([np.nan], [1.], np.inf), ([1.], [np.inf], np.inf), ([1.], [1., 1.], np.inf), ([0.], [0.], 0), ([-3.], [-4.], .25)])
def test_differences(a, b, gap):
    assert difference(np.array(a), np.array(b)) == gap


@pytest.mark.parametrize("name", [n for n in ORDER if n not in ("placement", "half precision")])
def test_every_technique_does_what_it_says_once_and_can_be_undone_to_the_last_bit(pipeline, picture, name):
    job, t = Job(pipeline, size=(32, 32)), TECHNIQUES[name]
    if name == "fused attention": pipeline.unet.set_default_attn_processor()
    before = draw_probe(pipeline, 32, 32)
    assert not t.done(job) and t.impossible(job) is None
    undo = t.apply(job)
    assert t.done(job)
    if name != "compiled blocks": assert difference(draw_probe(pipeline, 32, 32), before) <= t.tolerance(job)
    undo()
    assert not t.done(job) and (draw_probe(pipeline, 32, 32) == before).all()


def test_half_precision_is_within_its_tolerance_and_the_vae_stays_whole(pipeline, picture):
    size, report = model_bytes(pipeline), optimize(pipeline, steps=["half precision"], **SMALL)
    assert report.applied == ["half precision"] and 0 < report.difference < CLOSE and report.steps[0].saved > .4 * size
    assert (pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    report.undo()
    assert (draw_probe(pipeline, 32, 32) == picture).all() and model_bytes(pipeline) == size
    assert not any(layer._forward_pre_hooks for layer in pipeline.vae.modules())


def open_files(folder):
    "The sizes of files in a folder that this process holds open, those without a name included."
    return [fd.stat().st_size for fd in Path("/proc/self/fd").iterdir() if os.path.exists(fd) and os.readlink(fd).startswith(f"{folder}/")]


def test_weights_are_kept_in_a_file_that_goes_with_the_last_who_could_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(performance.tempfile, "tempdir", str(tmp_path))
    net = tiny_vit()
    before, restore = {n: p.clone() for n, p in net.named_parameters()}, keep([net])
    assert open_files(tmp_path) == [sum(p.nbytes for p in net.parameters())] and not list(tmp_path.iterdir())
    net.to(torch.float8_e4m3fn)
    restore()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters()) and open_files(tmp_path) == []
    unused = keep([net])
    assert len(open_files(tmp_path)) == 1
    del unused
    assert open_files(tmp_path) == []


def test_weights_of_every_kind_come_back():
    net = torch.nn.Module()
    net.scale = torch.nn.Parameter(torch.tensor(1.5))  # a single number
    net.columns = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16).T)  # not contiguous
    net.empty = torch.nn.Parameter(torch.zeros(0, 4))
    net.register_buffer("small", torch.randn(4).to(torch.float8_e4m3fn))
    net.register_buffer("steps", torch.arange(3))
    net.tied = net.scale
    before = {n: t.clone() for n, t in net.state_dict().items()}
    restore = keep([net])
    net.to(torch.float32)
    for t in net.parameters(): t.data.zero_()
    restore()
    after = net.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n].float(), t.float()) for n, t in before.items())


def test_kept_weights_do_not_outlive_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.setattr(performance.tempfile, "tempdir", str(tmp_path))
    net = tiny_vit()
    if (child := os.fork()) == 0:
        try:
            kept = keep([net])
            if kept and len(open_files(tmp_path)) == 1: os.kill(os.getpid(), signal.SIGKILL)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", ["FileNotFoundError", "OSError"])
def test_a_full_disk_leaves_the_step_out_and_the_model_as_it_was(error, monkeypatch, tmp_path):
    net = tiny_vit()
    before, limits = embed_probe(net), resource.getrlimit(resource.RLIMIT_FSIZE)
    if error == "FileNotFoundError": monkeypatch.setattr(performance.tempfile, "tempdir", str(tmp_path / "gone"))
    else: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try: report = optimize(net, steps=["half precision", "frozen weights"])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert states(report) == {"frozen weights": "applied", "half precision": "left"} and f"cannot be applied: {error}" in why(report, "half precision")
    assert net.dtype == torch.float32 and (embed_probe(net) == before).all()


def test_without_a_budget_nothing_is_given_up_and_a_second_call_changes_nothing(pipeline, picture):
    report = optimize(pipeline, "memory", **SMALL)
    assert report.applied == ["frozen weights", "VAE slicing", "VAE tiling"] and report.difference == 0 and report.fits is None
    again = optimize(pipeline, "memory", **SMALL)
    assert again.applied == [] and sum(s.why == "it was so already" for s in again.steps) == 4
    again.undo()
    assert pipeline.vae.use_tiling
    report.undo(); report.undo()
    assert not pipeline.vae.use_tiling and not pipeline.vae.use_slicing and (draw_probe(pipeline, 32, 32) == picture).all()


@pytest.mark.parametrize("budget, given_up, fits", [("1GB", [], True), ("10MB", ["half precision", "fp8 storage"], True)])
def test_digits_are_given_up_for_a_budget_only(pipeline, budget, given_up, fits):
    report = optimize(pipeline, "memory", budget, **SMALL)
    assert [n for n in report.applied if n in ("half precision", "fp8 storage")] == given_up and report.fits is fits
    assert report.difference < CLOSE and (report.expected[1] < .5 * report.expected[0]) == bool(given_up)


def test_a_budget_counts_for_speed_too_and_an_unmet_one_is_logged(caplog):
    report = optimize(tiny_vit(), "speed", 1000)
    assert report.fits is False and "fp8 storage" in report.applied and "is not met" in repr(report) and "is not met" in report._repr_html_()
    assert "is not met" in caplog.text


def test_for_speed_half_precision_is_taken_where_the_processor_computes_in_it(half_pays):
    net = tiny_vit()
    report = optimize(net, "speed")
    assert states(report)["half precision"] == ("applied" if half_pays else "left") and net.dtype == (torch.bfloat16 if half_pays else torch.float32)
    assert half_pays or why(report, "half precision") == "this CPU computes faster in float32"
    assert optimize(tiny_vit(), "speed", steps=["half precision"]).applied == ["half precision"]  # who asks for it gets it


def test_a_step_that_leaves_its_tolerance_is_undone_and_reported(pipeline):
    report = optimize(pipeline, steps=["VAE tiling", "frozen weights"], width=128, height=128)
    assert states(report) == {"frozen weights": "applied", "VAE tiling": "undone"} and not pipeline.vae.use_tiling
    assert "differs by 0.17" in why(report, "VAE tiling") and next(s for s in report.steps if s.name == "VAE tiling").difference > CLOSE and report.difference == 0


def test_a_tolerance_of_ones_own_holds_for_every_step():
    net = tiny_vit(attn_implementation="eager")
    assert states(optimize(net, steps=["frozen weights", "fused attention"], tolerance=0)) == {"frozen weights": "applied", "fused attention": "undone"}
    assert net.config._attn_implementation == "eager" and optimize(net, steps=["half precision"], tolerance=1e-4).applied == []
    assert optimize(net, steps=["half precision"]).applied == ["half precision"]


def test_small_differences_that_add_up_are_refused():
    outputs = iter([np.ones(3), np.full(3, 1.08), np.full(3, 1.16)])
    job = Job(tiny_vit(), call=lambda: next(outputs))
    seen = [job.first_output()]
    step = performance.Step("x", "left", "", "", CLOSE)
    assert job.compare(step, seen)[1] is None and "differs by 0.16" in job.compare(step, seen)[1] and len(seen) == 2


def test_a_model_that_fails_with_a_step_gets_it_undone():
    net = tiny_vit()
    def call():
        if not any(p.requires_grad for p in net.parameters()): raise RuntimeError("no graph")
        return embed_probe(net)
    report = optimize(net, steps=["frozen weights"], probe=call)
    assert states(report) == {"frozen weights": "undone"} and why(report, "frozen weights") == "the model fails with it: RuntimeError: no graph"
    assert all(p.requires_grad for p in net.parameters()) and report.checked == "your own call"


def test_ctrl_c_undoes_every_step(half_pays):
    net, calls = tiny_vit(attn_implementation="eager"), []
    def call():
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return embed_probe(net)
    with pytest.raises(KeyboardInterrupt): optimize(net, probe=call)
    assert net.config._attn_implementation == "eager" and all(p.requires_grad for p in net.parameters()) and net not in LAID
    assert net.dtype == torch.float32
    assert optimize(net).applied == ["frozen weights", "fused attention"] + ["half precision"] * half_pays


def test_a_model_that_fails_before_anything_is_changed():
    net = tiny_vit()
    with pytest.raises(MLError, match="fails before anything is changed: 1 / 0"): optimize(net, probe=lambda: exec("raise ValueError('1 / 0')"))
    with torch.no_grad(): net.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(MLError, match="not finite before anything is changed"): optimize(net)
    assert all(p.requires_grad for p in net.parameters())


def test_a_probe_that_does_not_fit_is_halved(pipeline):
    def no_room(vae, args): 
        if len(args[0]) > 1: raise MemoryError("cannot allocate memory")
    pipeline.vae.post_quant_conv.register_forward_pre_hook(no_room)
    report = optimize(pipeline, budget="1GB", steps=["frozen weights"], batch=4, **SMALL)
    assert report.checked == "2 steps at 32×32" and report.applied == ["frozen weights"] and report.job.estimate().setup.batch == 4
    pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda *_: exec("raise MemoryError"))
    with pytest.raises(InsufficientMemoryError, match="not even the call"): optimize(pipeline, **SMALL)


def test_offloading_runs_on_a_cpu_for_the_test_of_it(pipeline, picture):
    for way in ("model", "group", "model", None):
        place(pipeline, way, "cpu")
        assert placement(pipeline) == way and difference(draw_probe(pipeline, 32, 32), picture) < 1e-6
    place(pipeline, "group", "cpu")
    report = optimize(pipeline, steps=list(ORDER[:-1]), **SMALL)
    assert {n for n, s in states(report).items() if s == "applied"} == {"frozen weights", "VAE slicing", "VAE tiling"}
    assert "group offload holds the weights" in why(report, "half precision") and placement(pipeline) == "group"
    place(pipeline, None, "cpu")


@pytest.mark.parametrize("goal, budget, way", [("speed", None, None), ("memory", None, "model"), ("speed", "1GB", None), ("memory", "120MiB", "group")])
def test_where_the_weights_would_be_on_a_gpu(loaded, goal, budget, way):
    job = Job(loaded, goal, budget and performance.parse_bytes(budget), "cuda:0", (64, 64))
    assert TECHNIQUES["placement"].wanted(job) == way and not TECHNIQUES["placement"].done(job) and TECHNIQUES["placement"].impossible(job) is None


def test_quantized_pipelines_keep_their_weights_and_get_the_rest():
    pipeline = load_sdxl_pipeline_with_quantization_v1("tiny-sdxl", use_4bit=False, device="cpu", quantize_once=False)
    pipeline.set_progress_bar_config(disable=True)
    packed = copy.deepcopy(pipeline.unet.mid_block.attentions[0].proj_in.weight.data)
    report = optimize(pipeline, "memory", 1000, steps=list(ORDER[:-1]), **SMALL)
    assert report.applied[-3:] == ["channels_last", "VAE slicing", "VAE tiling"]
    assert all("quantized weights keep" in why(report, n) for n in ("half precision", "fp8 storage")) and report.fits is False
    report.undo()
    assert torch.equal(pipeline.unet.mid_block.attentions[0].proj_in.weight.data, packed)


def test_clip_in_both_forms_and_the_objects_around_a_model():
    net = tiny_vit(attn_implementation="eager")
    before, report = embed_probe(net), optimize(net, "memory", 300_000)
    assert {"frozen weights", "fused attention", "half precision"} <= set(report.applied) and net.dtype == torch.bfloat16 and report.difference < CLOSE
    report.undo()
    assert net.config._attn_implementation == "eager" and (embed_probe(net) == before).all()
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu")
    name, report = embedder.fingerprint, optimize(embedder, "memory", 1000)
    assert report.model == "CLIPModel" and "fingerprint and a generator's pictures" in why(report, "half precision") and embedder.fingerprint == name


def test_a_text_tower_is_checked_with_the_pictures():
    model = load_model("tiny-clip", device="cpu", dtype=torch.float32)
    before = embed_probe(model)
    with torch.no_grad(): model.text_projection.weight.mul_(-1)
    assert (embed_probe(model)[:-1] == before[:-1]).all() and difference(embed_probe(model), before) > 1


def test_sliced_attention_is_put_back_and_unknown_processors_are_left(pipeline):
    class Own(type(next(iter(pipeline.unet.attn_processors.values())))): pass
    names = list(pipeline.unet.attn_processors)
    pipeline.enable_attention_slicing()
    mixed = pipeline.unet.attn_processors | {names[0]: Own()}
    pipeline.unet.set_attn_processor(dict(mixed))
    report = optimize(pipeline, steps=["fused attention"], **SMALL)
    assert report.applied == ["fused attention"] and [type(p).__name__ for p in pipeline.unet.attn_processors.values()] == ["Own"] + ["AttnProcessor2_0"] * (len(names) - 1)
    report.undo()
    assert pipeline.unet.attn_processors == mixed


def test_reports_are_undone_in_reverse(pipeline):
    first, second = optimize(pipeline, steps=["frozen weights"], **SMALL), optimize(pipeline, steps=["VAE slicing"], **SMALL)
    with pytest.raises(ValidationError, match="undo that first"): first.undo()
    assert not first.undone and not any(p.requires_grad for p in pipeline.unet.parameters())
    second.undo()
    first.undo()
    assert first.undone and "has been undone" in repr(first) and LAID[pipeline] == []


def test_a_report_is_plain_data_and_names_every_technique(pipeline):
    report = optimize(pipeline, "speed", **SMALL)
    data = json.loads(json.dumps(report.to_dict()))
    assert [s["name"] for s in data["steps"]] == list(ORDER) and data["expected"] is None and data["fits"] is None
    assert all(s["why"] and s["cost"] and s["tolerance"] > 0 and s["state"] in ("applied", "left") for s in data["steps"])
    assert all(name in repr(report) and name in report._repr_html_() for name in ORDER)


def test_the_pipeline_is_given_back_as_it_was_but_for_the_steps(pipeline):
    scheduler, bar = pipeline.scheduler, dict(pipeline._progress_bar_config)
    optimize(pipeline, steps=["frozen weights"], **SMALL)
    assert pipeline.scheduler is scheduler and pipeline._progress_bar_config == bar and pipeline.scheduler.num_inference_steps is None


def test_calls_on_one_model_take_turns_with_each_other_and_with_a_generator(half_pays):
    net, inside, most = tiny_vit(), [], []
    def call():
        inside.append(1); most.append(len(inside))
        threading.Event().wait(.03)
        inside.pop()
        return embed_probe(net)
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(optimize(net, probe=call))) for _ in range(3)]
    with TURNS.setdefault(net, Turns()).take():
        for t in threads: t.start()
        threading.Event().wait(.1)
        assert not most
    for t in threads: t.join(120)
    assert max(most) == 1 and sorted(len(r.applied) for r in reports) == [0, 0, 1 + half_pays]


def test_a_generator_is_taken_and_draws_as_before(pipeline):
    generator = QuantizedSDXLGenerator(pipeline=pipeline)
    draw = lambda: generator.generate("a red dress", num_inference_steps=1, width=64, height=64, seed=1, progress=False).tobytes()
    before, report = draw(), optimize(generator, "memory", 1000, **SMALL)
    assert report.model == "StableDiffusionXLPipeline" and "generator's pictures name the precision" in why(report, "half precision") and draw() == before
    generator.close()
    with pytest.raises(MLError, match="this generator is closed"): optimize(generator)


def test_the_benchmarks_page_is_made_from_the_json_beside_it():
    found = json.loads((benchmark.HERE / "performance.json").read_text(encoding="utf-8"))
    assert (benchmark.HERE / "performance.md").read_text(encoding="utf-8") == benchmark.table(found)
    assert all(row["processor"] > 0 for model in ("tiny-sdxl", "ViT-B/32") for row in found[model].values())
