"VramMonitor beyond its lesson: real phases, everything put back, threads, long runs, failures."
import gc, json, logging, subprocess, sys, threading, weakref
from concurrent.futures import ThreadPoolExecutor

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from patience import PATIENCE

from devsky_nb import QuantizedSDXLGenerator
from devsky_nb.errors import ValidationError
from devsky_nb.hub.registry import load_model
from devsky_nb.memory import monitor as module
from devsky_nb.memory.monitor import RUNNING, MemoryTimeline, ProcessMeter, VramMonitor
from devsky_nb.memory.plots import plot_timeline

MIB = 2**20
PHASES = ["encode", "denoise", "decode"]
FAST = {"num_inference_steps": 3, "width": 64, "height": 64}
exact = pytest.mark.skipif(not ProcessMeter().exact, reason="this system does not let a process reset its highest use")


def load(device="cpu"):
    pipeline = load_model("tiny-sdxl", device=device, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(device):
    pipeline = load(device)
    draw(pipeline)  # what it takes only once is none of the peaks below
    return pipeline


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert RUNNING == [] and [t.name for t in threading.enumerate() if t.name == "VramMonitor"] == []
    plt.close("all")


def draw(pipeline, **settings):
    return pipeline("a red plain dress", generator=torch.Generator().manual_seed(0), **FAST | settings).images[0]


def hooks(pipeline):
    "Everything that could be left on a pipeline: hooks of every layer, and what lies on the objects themselves."
    parts = [pipeline, *(p for p in pipeline.components.values() if isinstance(p, torch.nn.Module))]
    layers = [layer for part in parts[1:] for layer in part.modules()]
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    found = [[list(getattr(layer, name)) for name in names] for layer in layers]
    return found, [{name: id(value) for name, value in vars(part).items() if callable(value)} for part in parts]


def touched(n):
    return torch.ones(n * MIB // 4)


def near(measured, mib):
    return abs(measured - mib * MIB) < .1 * mib * MIB


# phases of a pipeline

@pytest.mark.device
def test_phases_of_a_real_run_come_in_order_and_do_not_overlap(pipeline):
    with VramMonitor(pipeline, interval=.002) as m: draw(pipeline); draw(pipeline, num_inference_steps=1)
    t = m.timeline
    assert [p for p, *_ in t.spans] == PHASES * 2 and list(t.peaks) == PHASES
    borders = [at for _, start, end in t.spans for at in (start, end)]
    assert borders == sorted(borders) and all(start < end for _, start, end in t.spans)
    assert 0 < borders[0] and borders[-1] <= t.seconds[-1] and (np.diff(t.seconds) >= 0).all()
    assert t.error is None and t.peak >= max(t.peaks.values())


def test_steps_that_are_not_followed_by_decoding_end_with_the_last_step(pipeline):
    with VramMonitor(pipeline) as m:
        draw_latent = pipeline("a red plain dress", output_type="latent", **FAST)
        last = m.timeline.spans[-1]
        if ProcessMeter().exact: touched(100)  # after the last step: no part of denoising
    assert [p for p, *_ in m.timeline.spans] == ["encode", "denoise"] and m.timeline.spans[-1] == last
    if m.timeline.exact: assert m.timeline.peaks["denoise"] < 60 * MIB < 90 * MIB < m.timeline.peak
    del draw_latent


@exact
def test_what_happens_between_two_steps_belongs_to_denoising(pipeline):
    def between(pipeline, step, timestep, tensors): touched(100 if step == 0 else 1); return {}
    with VramMonitor(pipeline, interval=100.) as m: draw(pipeline, callback_on_step_end=between)
    assert near(m.timeline.peaks["denoise"] - m.timeline.peaks["encode"], 100) and m.timeline.peaks["decode"] < 60 * MIB


@exact
def test_a_phase_within_a_callback_does_not_take_its_peak_from_denoising(pipeline):
    def between(pipeline, step, timestep, tensors):
        if step == 0:
            with m.phase("mine"): touched(100)
        return {}
    with VramMonitor(pipeline, interval=100.) as m: draw(pipeline, callback_on_step_end=between)
    peaks = m.timeline.peaks
    assert near(peaks["mine"] - peaks["encode"], 100) and peaks["denoise"] >= peaks["mine"] > peaks["decode"]
    assert sorted(p for p, *_ in m.timeline.spans) == sorted([*PHASES, "mine"])


@exact
def test_what_happens_after_a_step_that_failed_is_no_part_of_denoising(pipeline):
    def fail(*_): raise ZeroDivisionError
    handle = pipeline.unet.conv_in.register_forward_pre_hook(fail)
    with VramMonitor(pipeline, interval=100.) as m:
        try:
            with pytest.raises(ZeroDivisionError): draw(pipeline)
        finally: handle.remove()
        touched(100)
    assert m.timeline.peaks["denoise"] < 60 * MIB < 90 * MIB < m.timeline.peak


@pytest.mark.device
def test_every_hook_is_gone_afterwards_and_the_picture_is_the_same(pipeline):
    before, plain = hooks(pipeline), draw(pipeline)
    with VramMonitor(pipeline) as m:
        m.watch(pipeline)  # again
        assert hooks(pipeline) != before
        assert draw(pipeline).tobytes() == plain.tobytes()
    assert hooks(pipeline) == before and [p for p, *_ in m.timeline.spans] == PHASES
    draw(pipeline)
    assert len(m.timeline.spans) == 3


@pytest.mark.device
@pytest.mark.parametrize("where", ["encode", "denoise", "decode", "between"])
def test_every_hook_is_gone_after_an_exception(pipeline, where):
    before = hooks(pipeline)
    def fail(*_, **__): raise ZeroDivisionError(where)
    inner = {"encode": pipeline.text_encoder, "denoise": pipeline.unet.conv_in, "decode": pipeline.vae.decoder}.get(where)
    handle = inner.register_forward_pre_hook(fail) if inner is not None else None
    with pytest.raises(ZeroDivisionError, match=where), VramMonitor(pipeline) as m:
        try: draw(pipeline, **{"callback_on_step_end": fail} if handle is None else {})
        finally:
            if handle is not None: handle.remove()
    assert hooks(pipeline) == before
    assert [p for p, *_ in m.timeline.spans] == PHASES[:{"encode": 1, "denoise": 2, "decode": 3, "between": 2}[where]]
    with VramMonitor(pipeline) as again: draw(pipeline)
    assert [p for p, *_ in again.timeline.spans] == PHASES


def test_two_monitors_that_end_in_the_order_in_which_they_came(pipeline):
    before = hooks(pipeline)
    first, second = VramMonitor(pipeline), VramMonitor(pipeline)
    first.__enter__(); second.__enter__()
    draw(pipeline)
    first.__exit__(None, None, None)
    draw(pipeline)
    second.__exit__(None, None, None)
    assert hooks(pipeline) == before
    assert [[p for p, *_ in m.timeline.spans] for m in (first, second)] == [PHASES, PHASES * 2]


def test_a_method_covered_by_somebody_else_meanwhile_still_works(pipeline):
    plain = draw(pipeline)
    with VramMonitor(pipeline):
        ours = pipeline.encode_prompt
        pipeline.encode_prompt = lambda *args, **kwargs: ours(*args, **kwargs)
    assert draw(pipeline).tobytes() == plain.tobytes()
    del pipeline.encode_prompt


def test_it_works_with_hooks_of_accelerate_put_on_before_and_during(pipeline):
    class Counting(ModelHook):
        calls = 0
        def pre_forward(self, network, *args, **kwargs): self.calls += 1; return args, kwargs
    plain, early, late = draw(pipeline), Counting(), Counting()
    add_hook_to_module(pipeline.unet, early)
    try:
        with VramMonitor(pipeline, device="cpu") as m:
            add_hook_to_module(pipeline.vae, late)
            assert draw(pipeline).tobytes() == plain.tobytes()
        assert early.calls == 3 and late.calls >= 1 and [p for p, *_ in m.timeline.spans] == PHASES
        draw(pipeline)
        assert early.calls == 6
    finally:
        for network in (pipeline.unet, pipeline.vae): remove_hook_from_module(network)


def test_a_quantized_pipeline_and_its_generator(tmp_path):
    four = QuantizedSDXLGenerator("tiny-sdxl", device="cpu", dtype=torch.float32, cache_dir=tmp_path)
    settings = {"num_inference_steps": 2, "progress": False, "seed": 1}
    with pytest.raises(ValidationError, match="watch its .pipeline"): VramMonitor(four)
    four.generate("a red plain dress", **settings)  # repacks the weights
    before, plain = hooks(four.pipeline), four.generate("a red plain dress", **settings)
    with VramMonitor(four.pipeline) as m: watched = four.generate("a red plain dress", **settings)
    assert watched.tobytes() == plain.tobytes() and hooks(four.pipeline) == before
    assert [p for p, *_ in m.timeline.spans] == PHASES


@pytest.mark.device
def test_the_pipeline_is_not_kept_alive(device):
    pipeline = load(device)
    refs = [weakref.ref(o) for o in (pipeline, pipeline.unet, pipeline.vae)]
    m = VramMonitor(pipeline)
    with m: draw(pipeline)
    timeline = m.timeline
    del pipeline
    gc.collect()
    assert [r() for r in refs] == [None] * 3 and list(timeline.peaks) == PHASES


def test_the_pipeline_may_go_while_it_is_watched():
    pipeline = load()
    gone = weakref.ref(pipeline)
    with VramMonitor(pipeline) as m:
        draw(pipeline)
        del pipeline
        gc.collect()
        assert gone() is None
    assert list(m.timeline.peaks) == PHASES


# peaks

@pytest.mark.parametrize("interval", [.002, pytest.param(100., marks=exact)])
def test_a_large_allocation_is_in_its_phase_and_no_other(interval):
    with VramMonitor(device="cpu", interval=interval) as m:
        with m.phase("before"): pass
        with m.phase("large"):
            block = touched(200)
            if interval < 1: threading.Event().wait(.1)
            del block
        with m.phase("after"): pass
    peaks = m.timeline.peaks
    assert near(peaks["large"], 200) and near(m.timeline.peak, 200)
    assert peaks["before"] < 20 * MIB and peaks["after"] < 20 * MIB


@exact
def test_nested_and_entered_again():
    with VramMonitor(device="cpu", interval=100.) as m:
        with m.phase("outer"):
            with m.phase("inner"): touched(100)
            with m.phase("inner"): pass
        with m.phase("outer"), m.phase("outer"): touched(50)
    t = m.timeline
    assert near(t.peaks["outer"], 100) and near(t.peaks["inner"], 100)
    assert sorted(p for p, *_ in t.spans) == ["inner"] * 2 + ["outer"] * 3


@exact
def test_a_peak_from_before_is_not_counted():
    touched(150)
    with VramMonitor(device="cpu", interval=100.) as m:
        touched(80)
        with m.phase("quiet"): pass
    assert near(m.timeline.peak, 80) and m.timeline.peaks["quiet"] < 20 * MIB


@exact
def test_a_monitor_keeps_its_peak_when_another_one_resets_the_counter():
    with VramMonitor(device="cpu", interval=100.) as outer, outer.phase("all"):
        touched(120)
        with VramMonitor(device="cpu", interval=100.) as inner, inner.phase("part"): touched(60)
    assert near(outer.timeline.peaks["all"], 120) and near(inner.timeline.peaks["part"], 60)


@exact
def test_without_the_systems_counter_it_says_so_and_samples(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RESET", tmp_path / "none")
    with VramMonitor(device="cpu", interval=.002) as m, m.phase("large"):
        block = touched(200)
        threading.Event().wait(.1)
        del block
    assert not m.timeline.exact and near(m.timeline.peaks["large"], 200) and "short peaks may be missing" in repr(m.timeline)


def test_growth_is_counted_from_the_given_baseline():
    with VramMonitor(device="cpu", baseline=0) as absolute: pass
    assert absolute.timeline.baseline == 0 and absolute.timeline.peak > 100 * MIB


# threads, long runs, failures

def test_two_threads_two_monitors_two_pipelines(pipeline):
    pipelines, barrier = [pipeline, load()], threading.Barrier(2)
    def work(p):
        with VramMonitor(p, interval=.002) as m:
            barrier.wait(PATIENCE)
            for _ in range(2): draw(p)
            barrier.wait(PATIENCE)
        return m.timeline
    with ThreadPoolExecutor(2) as pool: timelines = list(pool.map(work, pipelines))
    assert [[p for p, *_ in t.spans] for t in timelines] == [PHASES * 2] * 2


def test_one_monitor_two_threads(pipeline):
    pipelines, barrier = [pipeline, load()], threading.Barrier(2)
    with VramMonitor(device="cpu") as m:
        for p in pipelines: m.watch(p)
        def work(i):
            barrier.wait(PATIENCE)
            with m.phase(f"thread {i}"): draw(pipelines[i])
        with ThreadPoolExecutor(2) as pool: list(pool.map(work, range(2)))
    found = [p for p, *_ in m.timeline.spans]
    assert {p: found.count(p) for p in set(found)} == {"thread 0": 1, "thread 1": 1} | dict.fromkeys(PHASES, 2)


def test_samples_and_spans_stay_bounded_and_keep_the_highest(monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLES", 100)
    monkeypatch.setattr(module, "MAX_SPANS", 50)
    with VramMonitor(device="cpu", interval=1.) as m:
        held = m._samples[0][1]
        m._meter.read = lambda: (held + 10**12, 0) if len(m._closed) == 20 and len(m._samples) % 7 == 0 else (held, 0)
        for i in range(300):
            with m.phase(f"step {i % 3}"): assert len(m._samples) < 100
    t = m.timeline
    assert len(t.seconds) < 100 and m.interval >= 8. and (np.diff(t.seconds) > 0).all() and t.allocated.max() == held + 10**12
    assert len(t.spans) == 50 and t.dropped == 250 and "250 older spans" in repr(t) and len(t.peaks) == 3


def test_the_defaults_of_a_long_run():
    with VramMonitor(device="cpu", interval=3600.) as m:
        for _ in range(module.MAX_SAMPLES): m._sample()
        assert len(m._samples) <= module.MAX_SAMPLES // 2 + 1 and m.interval == 7200.


def test_an_error_while_sampling_is_told_once_and_the_job_goes_on(pipeline, caplog):
    before, failed = hooks(pipeline), threading.Event()
    def gone(): failed.set(); raise RuntimeError("driver lost")
    with caplog.at_level(logging.WARNING), VramMonitor(pipeline, interval=.001) as m:
        m._meter.read = gone
        assert failed.wait(PATIENCE)
        assert draw(pipeline).size == (64, 64)
    assert [r.message for r in caplog.records] == ["memory of cpu is not measured any more: RuntimeError: driver lost"]
    assert m.timeline.error == "RuntimeError: driver lost" and [p for p, *_ in m.timeline.spans] == PHASES and hooks(pipeline) == before


def test_the_thread_is_a_daemon_and_stops_at_once_whatever_the_interval():
    with VramMonitor(device="cpu", interval=3600.) as m: assert m._thread.is_alive() and m._thread.daemon
    assert not m._thread.is_alive()


@pytest.mark.parametrize("end", ["raise KeyError('inside')", "sys.exit(3)", "m.__enter__()"])
def test_a_process_with_an_exception_inside_ends_cleanly(end):
    code = ("import sys\nfrom devsky_nb.memory.monitor import VramMonitor\n"
            f"with VramMonitor(device='cpu', interval=3600.) as m:\n    with m.phase('load'): {end}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == (3 if "exit" in end else 1) and "Fatal" not in done.stderr
    if "exit" in end: assert done.stderr == ""
    else:
        said = ("KeyError: 'inside'", "devsky_nb.errors.ValidationError: a monitor is entered once")
        assert done.stderr.splitlines()[-1].startswith(said)


def test_a_process_that_never_leaves_the_block_ends():
    code = "from devsky_nb.memory.monitor import VramMonitor\nm = VramMonitor(device='cpu').__enter__()\nprint('end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# what is refused

@pytest.mark.parametrize("arguments,words", [
    ({"interval": 0}, "interval=0 must be a number of seconds above 0"), ({"interval": -1.}, "interval=-1.0"),
    ({"interval": float("nan")}, "interval=nan"), ({"interval": True}, "interval=True"), ({"interval": "0.1"}, "interval='0.1'"),
    ({"interval": None}, "interval=None"), ({"interval": 1e9}, "up to 3600"),
    ({"baseline": -1}, "baseline=-1"), ({"baseline": .5}, "baseline=0.5"),
    ({"device": "cuda:99"}, "device='cuda:99': "), ({"device": "tpu"}, "device='tpu': "),
    ({"pipeline": torch.nn.Linear(1, 1)}, "not Linear"), ({"pipeline": "tiny-sdxl"}, "not str")], ids=lambda v: str(v)[:40])
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValidationError, match=words.replace(".", r"\.")): VramMonitor(**arguments)


def test_wrong_calls(pipeline):
    m = VramMonitor(device="cpu")
    for call in (lambda: m.timeline, lambda: m.watch(pipeline), lambda: m.phase("load").__enter__()):
        with pytest.raises(ValidationError): call()
    with m:
        for name in ("", " ", None, 3):
            with pytest.raises(ValidationError, match="a phase needs a name"), m.phase(name): pass
        with pytest.raises(ValidationError, match="entered once"), m: pass
    with pytest.raises(ValidationError, match="entered once"), m: pass
    assert m.timeline.spans == []


# the report and the figure

def timeline(spans, top=100, **peaks):
    seconds = np.linspace(0, 10, 50)
    return MemoryTimeline(seconds, np.full(50, MIB), np.full(50, 2 * MIB), spans, 0, {p: n * MIB for p, n in peaks.items()}, top * MIB)


def test_a_report_is_plain_data(pipeline):
    with VramMonitor(pipeline) as m:
        draw(pipeline)
        inside = m.timeline
    data = json.loads(json.dumps(m.timeline.to_dict()))
    samples = data["samples"]
    assert data["peaks"] == m.timeline.peaks
    assert len(samples["seconds"]) == len(samples["allocated"]) == len(m.timeline.seconds)
    assert [s["phase"] for s in data["spans"]] == PHASES and [p for p, *_ in inside.spans] == PHASES
    assert len(repr(m.timeline).splitlines()) == 4
    assert "<script" not in timeline([("<script>", 0, 1)], **{"<script>": 1})._repr_html_()


def test_names_are_written_where_they_fit_and_never_over_each_other():
    crowded = [("load", 0, 4), ("encode", 4, 4.02), ("denoise", 4.1, 8), ("own", 4.2, 8), ("decode", 8, 10)]
    ax = plot_timeline(timeline(crowded, load=10, encode=20, denoise=30, own=25, decode=100))
    assert [t.get_text() for t in ax.texts] == ["load", "denoise", "decode"]
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])
    assert {"encode: 20.0 MiB", "own: 25.0 MiB"} < {t.get_text() for t in ax.get_legend().get_texts()}


def levels(ax):
    return sorted({float(y) for line in ax.lines for y in line.get_ydata() if len(line.get_ydata()) <= 2})


def test_the_plan_is_drawn_at_its_level_in_the_units_of_the_axis():
    ax = plot_timeline(timeline([("load", 0, 5), ("denoise", 5, 10)], load=10, denoise=30), plan={"load": 40 * MIB, "decode": 5})
    assert {10., 30., 40.} <= set(levels(ax)) and ax.get_ylabel().startswith("MiB") and ax.get_ylim()[1] > 40
    ax = plot_timeline(timeline([("load", 0, 10)], load=3072), plan={"load": 2 * 2**30})
    assert {2., 3.} <= set(levels(ax)) and ax.get_ylabel().startswith("GiB")


@pytest.mark.parametrize("plan", [[1], {"load": "1"}, {"load": -1}, {"load": float("nan")}, {"load": None}, {"other": 1}], ids=str)
def test_a_plan_that_is_none(plan):
    with pytest.raises(ValidationError): plot_timeline(timeline([("load", 0, 1)], load=1), plan=plan)


def test_pictures_of_next_to_nothing_and_of_very_much():
    with VramMonitor(device="cpu") as m: pass
    assert plot_timeline(m.timeline).get_xlabel() == "seconds"
    many = timeline([("step", i / 500, i / 500 + .0015) for i in range(5000)], step=10)
    assert len(plot_timeline(many, ax=plt.figure().add_subplot()).patches) == 1
