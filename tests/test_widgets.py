"The widgets without a browser: controls are set, threads are waited for, contents are read."
import base64, io, json, logging, threading, time
from pathlib import Path

import numpy as np, pytest
from ipywidgets import HTML
from PIL import Image

from devsky_nb import widgets as w
from devsky_nb.cache import pin, pins
from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb.errors import DevSkyyError, FileNotFoundError, MLError, ValidationError
from devsky_nb.garments import write_catalogue
from devsky_nb.panel import Job, Panel, Stopped
from devsky_nb.validation import check_image_set
from devsky_nb.vram import plan_vram
from hubcache import make_repo


@pytest.fixture(scope="module")
def embedder(): return CLIPImageEmbedder("tiny-clip", device="cpu")

@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "catalogue"
    return folder, write_catalogue(folder, n=18)

@pytest.fixture
def panel():
    p = Panel("<Test>", [], [HTML()])
    p.shown = p.results.children[0]
    yield p
    p.close()

def show(text): return lambda job: job.show(lambda: setattr(job.panel.shown, "value", text))

def held(panel, text, **options):
    "Ask for work that waits for a signal before it shows `text`."
    begun, go = threading.Event(), threading.Event()
    def work(job):
        begun.set()
        assert go.wait(60)
        show(text)(job)
    panel.ask(text, work, **options)
    assert begun.wait(60)
    return go

def until(true, seconds=60.):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(.01)


def test_only_the_newest_request_is_shown(panel):
    seen = []
    panel.shown.observe(lambda change: seen.append(change["new"]), "value")
    go = held(panel, "first")
    for n in range(20): panel.ask("more", show(f"more {n}"))
    go.set()
    panel.wait()
    assert seen == ["more 19"]  # neither the one that was running nor those in between
    assert panel.note.value == "<span role='status'></span>" and "devsky-stale" not in panel.results._dom_classes

def test_requests_that_follow_closely_are_one(panel):
    ran = []
    for n in range(10):
        panel.ask("sliding", lambda job, n=n: ran.append(n), delay=2)  # far more than ten calls take
        time.sleep(.01)
    panel.wait()
    assert ran == [9]

def test_cancel_stops_the_work(panel):
    count = []
    def work(job):
        job.total = 10**6
        for n in range(job.total): time.sleep(.001); job.tick(); count.append(n)
    show("before")(Job(panel, "", None))
    panel.ask("counting", work)
    until(lambda: len(count) > 5 and "of 1,000,000" in panel.note.value)
    assert not panel.stopper.disabled and panel.bar.max == 10**6
    panel.stopper.click()
    panel.wait(60)
    n = len(count)
    time.sleep(.05)
    assert len(count) == n and "cancelled after" in panel.note.value and panel.stopper.disabled
    assert panel.shown.value == "before" and "devsky-stale" in panel.results._dom_classes
    assert not [t for t in threading.enumerate() if t.name == "devsky <Test>"]

def test_a_typed_error_is_shown_where_it_was_made_and_goes_away(panel):
    def work(job): raise ValidationError("no <b>such</b> thing: do that")
    panel.ask("failing", work)
    panel.wait()
    assert "<b>ValidationError</b> no &lt;b&gt;such" in panel.note.value and "role='alert'" in panel.note.value
    assert isinstance(panel.error, ValidationError) and "devsky-stale" in panel.results._dom_classes
    panel.ask("working", show("fine"))
    panel.wait()
    assert panel.shown.value == "fine" and panel.error is None and "alert" not in panel.note.value

@pytest.mark.parametrize("how", ["ask", "act"])
def test_a_mistake_of_ours_is_logged_and_the_panel_goes_on(panel, caplog, how):
    def work(*job): raise ZeroDivisionError("division by zero")
    with caplog.at_level(logging.ERROR, "devsky_nb.panel"):
        panel.ask("failing", work) if how == "ask" else panel.act(work)
        panel.wait()
    assert "ZeroDivisionError" in panel.note.value and "please report" in panel.note.value
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    panel.ask("working", show("fine"))
    assert panel.wait().shown.value == "fine"

def test_work_that_must_end_refuses_the_next_and_cannot_be_cancelled(panel):
    go = held(panel, "deleted", stoppable=False)
    panel.ask("other", show("other"))
    panel.cancel()
    assert "deleted first" in panel.note.value and panel.stopper.disabled
    go.set()
    assert panel.wait().shown.value == "deleted"

def test_work_that_must_end_is_not_replaced_while_it_waits(panel):
    go = held(panel, "first")
    panel.ask("deleting", show("deleted"), stoppable=False)
    panel.ask("other", show("other"))
    go.set()
    assert panel.wait().shown.value == "deleted"

def test_closing_stops_the_work_and_a_late_result_changes_nothing():
    panel = Panel("closing", [], [HTML()])
    panel.shown = panel.results.children[0]
    go = held(panel, "late")
    panel.close()
    go.set()
    panel.wait()
    assert panel.shown.value == ""

def test_waiting_ends(panel):
    go = held(panel, "slow")
    with pytest.raises(MLError, match="not done after 0.01 s"): panel.wait(.01)
    go.set()


def html(panel):
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    return bundle["text/html"]

def pixels(value): return [Image.open(io.BytesIO(base64.b64decode(part.split("'")[0]))).convert("RGB") for part in value.split(";base64,")[1:]]


@pytest.fixture(scope="module")
def planner():
    p = w.memory_planner("sdxl-base", "8GB").wait()
    yield p
    p.close()

def test_planner_says_what_the_planner_says(planner):
    plan = plan_vram("sdxl-base", "8GB")
    assert [o.code for o in planner.options] == [o.code for o in plan.options] and len(planner.ranked.options) == len(plan.options)
    planner.ranked.value = 2
    assert planner.wait().code.value == plan.options[2].code
    setup = plan.options[2].estimate.setup
    assert (planner.ui.quant.value or None, planner.ui.offload.value or None, planner.ui.vae.value) == (setup.quant, setup.offload, setup.vae)
    assert planner.ranked.value == 2  # the list was not filled anew, so the keyboard stays where it was

def test_planner_follows_its_controls(planner):
    planner.ui.quant.value, planner.ui.offload.value, planner.ui.vae.value = "", "", "upcast"
    planner.wait()
    assert "✗" in planner.plot.value and "does not fit" in planner.plot.value
    for gb in np.arange(9, 24.5, .5).tolist(): planner.ui.budget.value = gb
    assert "✓" in planner.wait().plot.value and planner.planned[1] == 24 * 10**9
    planner.ui.model.value = "tiny-clip"
    planner.wait()
    assert planner.ui.size.options == (("own", 0),) and "CLIPModel.from_pretrained" in planner.code.value
    planner.ui.model.value = "sdxl-base"
    assert (1024 not in dict(planner.wait().ui.size.options).values()) and ("1024² own", 0) in planner.ui.size.options

def test_planner_says_when_nothing_fits():
    planner = w.memory_planner("tiny-sdxl", "64MiB").wait()
    assert "nothing fits. The least is" in planner.verdict.value and planner.ranked.options == () and "✗" in planner.plot.value

def test_planner_is_a_picture_without_a_kernel(planner):
    text = html(planner)
    assert "memory_planner" not in text and "data:image/png;base64," in text and "alt='fp16" in text and "<pre>import torch" in text
    assert pixels(text)[0].size == (675, 288)

@pytest.mark.parametrize("wrong", [{"model": "sdxl-bose"}, {"model": 5}, {"model": ""}, {"budget": "8 gigs"}, {"budget": 8}, {"budget": None}, {"model": Path("/nowhere")}])
def test_planner_refuses_at_once(wrong):
    with pytest.raises(ValidationError): w.memory_planner(**wrong)

def test_planning_tells_how_far_it_is_and_can_be_ended():
    tried = []
    assert plan_vram("tiny-sdxl", "2GB", tick=tried.append).best and set(tried) == {1} and len(tried) > 5
    def tick(n): raise Stopped("enough")
    with pytest.raises(Stopped): plan_vram("tiny-sdxl", "2GB", tick=tick)


def test_explorer_draws_cancels_and_draws_again():
    explorer = w.quantization_explorer(prompt="a blue dress", seed=1, steps=50, device="cpu")
    until(lambda: explorer.job is not None and explorer.job.done > 1, 60)
    explorer.stopper.click()
    explorer.wait()
    assert "cancelled after" in explorer.note.value and explorer.pictures.value == ""
    explorer.ui.steps.value, explorer.ui.left.value = 2, "nf4-dq"
    explorer.ui.draw.click()
    same = explorer.wait().pictures.value
    left, right, apart = pixels(same)
    assert (np.asarray(left) == np.asarray(right)).all() and np.asarray(apart).max() == 0 and "0.0 of 255" in same
    assert set(explorer.generators) == {"nf4-dq"}  # full precision was given up
    explorer.ui.left.value = "int8"
    explorer.ui.draw.click()
    assert np.asarray(pixels(explorer.wait().pictures.value)[2]).max() > 0 and "int8: weights" in explorer.pictures.value
    explorer.ui.prompt.value = "a dress " * 60
    explorer.ui.draw.click()
    assert "This would be cut" in explorer.wait().note.value and explorer.pictures.value
    generators = list(explorer.generators.values())
    explorer.close()
    assert all(g.pipeline is None for g in generators)

@pytest.mark.parametrize("wrong", [{"model": "tiny-clip"}, {"model": "tiny-sdxxl"}, {"prompt": " "}, {"prompt": 3}, {"seed": -1}, {"seed": True}, {"steps": 51}, {"device": "tpu"}])
def test_explorer_refuses_at_once(wrong):
    with pytest.raises(ValidationError): w.quantization_explorer(**wrong)


def test_map_holds_every_picture_and_leads_to_neighbours(catalogue, embedder):
    folder, _ = catalogue
    look = w.embedding_explorer(folder, embedder).wait()
    assert set(look.points) == set(range(len(look.index))) and "failed" in look.account.value
    assert all(0 <= float(p.layout.left[:-1]) <= 95 and 0 <= float(p.layout.top[:-1]) <= 91 for p in look.points.values())
    look.points[3].click()
    found = look.index.search(look.index.vectors[3], k=9)
    text = look.wait().chosen.value
    assert f"{found.ids[0][1]}: {found.scores[0][1]:.3f}" in text and len(pixels(text)) == 9
    assert [r for r, p in look.points.items() if "devsky-chosen" in p._dom_classes] == [3]
    assert pixels(html(look))[0].size == w.MAP
    scratch = Path(look.scratch.name)
    look.close()
    assert not scratch.exists()

def test_embedding_goes_on_where_it_was_cancelled(tmp_path, embedder):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(300): Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{n:03}.png", compress_level=0)
    look = w.embedding_explorer(folder, embedder, out=tmp_path / "out")
    until(lambda: look.job is not None and look.job.done >= 64)
    look.cancel()
    look.wait()
    assert "embedding: cancelled after" in look.note.value and look.index is None
    look.ui.embed.click()
    look.wait()
    assert len(look.index) == 300 and "of them before" in look.account.value and len(look.points) == w.MOST_THUMBS
    look.close()
    assert (tmp_path / "out").exists()

def test_folders_without_pictures_and_with_one(tmp_path, embedder):
    folder = tmp_path / "<b>shop"
    folder.mkdir()
    look = w.embedding_explorer(folder, embedder).wait()
    assert "no picture to show" in look.note.value and "<b>shop" not in html(look)
    Image.new("RGB", (80, 60), "red").save(folder / "<script>.png")
    look.ui.embed.click()
    look.wait().points[0].click()
    assert "&lt;script&gt;.png" in look.wait().chosen.value and "<script>" not in html(look)
    look.close()

def test_map_positions_are_the_same_at_every_run():
    vectors = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    a = w.map_positions(vectors)
    assert (a == w.map_positions(vectors.copy())).all() and a.min() == 0 and a.max() == 1

@pytest.mark.parametrize("wrong", [{"folder": None}, {"folder": ""}, {"folder": "/nowhere"}, {"embedder": "tiny-clip"}, {"out": 3}, {"out": "."}])
def test_embedding_explorer_refuses_at_once(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValidationError, FileNotFoundError)): w.embedding_explorer(**{"folder": "."} | wrong)


@pytest.fixture
def review(catalogue, embedder, tmp_path):
    r = w.validation_review(catalogue[1], embedder, out=tmp_path / "reviewed.json").wait()
    yield r
    r.close()

def test_review_lists_every_finding(review):
    counts = {kind: text for text, kind in review.ui.kind.options}
    assert counts[""] == f"everything ({len(review.ui.entry.options)})" == f"everything ({len(w.review_list(review.report))})"
    assert counts["failed"] == f"failed ({review.report.counts['error']})"
    review.ui.kind.value = "copy"
    assert all("copy of" in text for text, _ in review.ui.entry.options) and "<img" in review.card.value

def test_review_writes_what_was_decided_and_nothing_else(review, catalogue, tmp_path):
    folder, image_set = catalogue
    before = {p: p.read_bytes() for p in folder.iterdir()}
    review.ui.kind.value = "label"
    index = review._chosen()[1]
    review.ui.accept.click()
    assert review.ui.entry.options[0][0].startswith("✎") and "relabelled" in review.card.value
    review.ui.kind.value = "failed"
    review.ui.leave.click()
    review.ui.leave.click()  # and keep it after all
    assert review.left_out == set() and "kept" in review.note.value
    review.ui.leave_all.click()
    review.ui.export.click()
    written = json.loads((tmp_path / "reviewed.json").read_text(encoding="utf-8"))
    kept = [e for i, e in enumerate(image_set["images"]) if i not in review.left_out]
    assert [e["path"] for e in written["images"]] == [e["path"] for e in kept] and written["metadata"] == image_set["metadata"]
    changed = [(a["id"], a["label"]) for a, b in zip(written["images"], kept) if a["label"] != b["label"]]
    assert changed == [(image_set["images"][index]["id"], review.labels[index])]
    assert "label" in image_set["images"][index] and image_set["images"][index]["label"] != review.labels[index]  # the set in memory is as it was
    assert {p: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["reviewed.json"]

@pytest.mark.parametrize("target", ["image_set.json", "sku-001.jpg", "", "\0name.json", "image_set.json/x.json"])
def test_review_writes_over_nothing(review, catalogue, target):
    folder = catalogue[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    review.ui.out.value = str(folder / target)
    review.ui.export.click()
    assert isinstance(review.error, ValidationError) and "ValidationError" in review.note.value
    assert {p: p.read_bytes() for p in folder.iterdir()} == before

def test_review_writes_its_own_file_again_whole_or_not_at_all(review, tmp_path, monkeypatch):
    review.ui.export.click()
    first = (tmp_path / "reviewed.json").read_bytes()
    review.ui.leave.click()
    review.ui.export.click()
    second = (tmp_path / "reviewed.json").read_bytes()
    assert first != second
    import devsky_nb.cache as cache
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache.os, "fsync", full)
    review.ui.export.click()
    assert "No space left" in review.note.value and (tmp_path / "reviewed.json").read_bytes() == second and len(list(tmp_path.iterdir())) == 1

def test_review_says_what_is_missing(review):
    for name, told in (("relabel", "no label is given"), ("accept", "no suggestion")):
        review.ui.kind.value, review.ui.label.value = "failed", " "
        getattr(review.ui, name).click()
        assert told in review.note.value
    assert review.labels == {}

def test_checking_can_be_cancelled(embedder, catalogue):
    pictures = [e for e in catalogue[1]["images"] if e["condition"] == "good"] * 40
    r = w.validation_review({"images": [e | {"id": n} for n, e in enumerate(pictures)]}, embedder)
    until(lambda: r.job is not None and r.job.done > 10)
    r.cancel()
    assert "cancelled after" in r.wait().note.value and r.report is None
    r.ui.export.click()
    assert "not checked yet" in r.note.value
    r.close()

@pytest.mark.parametrize("wrong", [{"image_set": {"images": []}}, {"image_set": None}, {"embedder": None}, {"contract": {}}, {"out": None}])
def test_review_refuses_at_once(catalogue, embedder, wrong):
    with pytest.raises(ValidationError): w.validation_review(**{"image_set": catalogue[1], "embedder": embedder} | wrong)

def test_checking_tells_how_far_it_is(catalogue, embedder):
    told = []
    check_image_set(catalogue[1], embedder, tick=told.append)
    assert sum(told) == len(catalogue[1]["images"])


OLD, NEW = "01da7e5" + "0" * 33, "2ead9e1" + "0" * 33

@pytest.fixture
def hub(tmp_path):
    weights = b"weights" * 1000
    make_repo(tmp_path / "hub", "shop/clip", {OLD: {"model.safetensors": weights}, NEW: {"model.safetensors": weights[::-1]}}, refs={"main": NEW})
    return tmp_path / "hub"

def stored(hub): return sorted(p.name for p in hub.glob("models--*/snapshots/*"))

def planned(manager, limit="1KB"):
    manager.ui.limit.value = limit
    manager.ui.make_plan.click()
    return manager.wait()

def test_nothing_is_evicted_without_the_box(hub):
    manager = w.cache_manager(hub).wait()
    planned(manager)
    assert "2 revisions" in manager.ui.confirm.description and manager.ui.evict.disabled
    manager.ui.evict.click()  # whoever calls it all the same
    manager.evict()
    assert "nothing is deleted" in manager.wait().note.value and stored(hub) == [OLD, NEW]
    manager.ui.confirm.value = True
    manager.ui.days.value = "90"  # another plan is wanted: this one is taken back
    assert manager.plan is None and not manager.ui.confirm.value and manager.ui.confirm.disabled and manager.ui.evict.disabled
    manager.evict()
    assert manager.wait() and stored(hub) == [OLD, NEW]
    manager.ui.days.value = ""
    planned(manager).ui.confirm.value = True
    assert not manager.ui.evict.disabled
    manager.ui.evict.click()
    assert "freed" in manager.wait().planned.value and stored(hub) == [] and manager.ui.revision.options == (("none", ""),)
    manager.close()

def test_pins_protect_even_between_the_plan_and_the_button(hub):
    manager = w.cache_manager(hub).wait()
    manager.ui.revision.value, manager.ui.alias.value = ("shop/clip", NEW), "production"
    manager.ui.pin.click()
    assert pins(hub) == {("shop/clip", "production"): NEW} and "production" in manager.wait().stored.value
    planned(manager).ui.confirm.value = True
    assert [r.commit for r in manager.plan.evict] == [OLD]
    pin("shop/clip", OLD, "other", hub)  # by somebody else
    manager.ui.evict.click()
    assert stored(hub) == [OLD, NEW] and "1 skipped" in manager.wait().planned.value
    manager.ui.unpin.click()
    assert pins(hub) == {("shop/clip", "other"): OLD} and stored(hub) == [OLD, NEW]
    manager.wait().ui.unpin.click()
    assert "no pin" in manager.note.value
    manager.close()

@pytest.mark.parametrize("limit, days, told", [("", "", "a size to shrink to"), ("much", "", "no size in"), ("", "ninety", "above 0"), ("", "0", "above 0"), ("", "nan", "above 0"), ("", "-1", "above 0")])
def test_limits_that_mean_nothing(hub, limit, days, told):
    manager = w.cache_manager(hub).wait()
    manager.ui.limit.value, manager.ui.days.value = limit, days
    manager.ui.make_plan.click()
    assert told in manager.wait().note.value and manager.plan is None and manager.ui.confirm.disabled
    manager.close()

@pytest.mark.parametrize("wrong", ["/nowhere", 5, ""])
def test_cache_manager_refuses_at_once(wrong):
    with pytest.raises(DevSkyyError): w.cache_manager(wrong)


def test_timeline_is_drawn_while_it_measures():
    watch = w.vram_timeline(device="cpu", refresh=.05, interval=.01, plan={"load": 50 * 2**20})
    drawn = set()
    watch.plot.observe(lambda change: drawn.add(change["new"]), "value")
    with watch:
        with watch.monitor.phase("load"): garment = np.ones(40 * 2**20, np.uint8)
        until(lambda: len(drawn) > 2)
    assert "measuring" not in watch.wait().note.value and watch.monitor is None and "load" in watch.table.value
    assert "<img" in html(watch) and garment.any()
    watch.ui.start.click()
    assert watch.ui.start.disabled and not watch.ui.stop.disabled
    watch.act(watch.start)
    assert "measures already" in watch.note.value
    watch.stopper.click()  # as good as Stop
    assert watch.wait(10).monitor is None and not [t for t in threading.enumerate() if t.name == "VramMonitor"]
    watch.ui.start.click()
    watch.close()
    assert not [t for t in threading.enumerate() if t.name == "VramMonitor"]

@pytest.mark.parametrize("wrong", [{"pipeline": "sdxl-base"}, {"device": "tpu"}, {"plan": {"denoise": "7GB"}}, {"plan": 7}, {"interval": 0}, {"refresh": "1"}])
def test_timeline_refuses_at_once(wrong):
    with pytest.raises(ValidationError): w.vram_timeline(**wrong)
