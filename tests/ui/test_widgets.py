"The widgets without a browser: controls are set, threads are waited for, contents are read."
import base64, io, json, logging, re, subprocess, sys, threading, time
from pathlib import Path

import nbformat, numpy as np, pytest
from ipywidgets import HTML
from nbclient import NotebookClient
from PIL import Image
from patience import PATIENCE, wait_until

import devsky_nb._core
from devsky_nb import (cache_manager, embedding_explorer, memory_planner, quantization_explorer, validation_review,
                       vram_timeline)
from devsky_nb.hub.models import ModelSpec
from devsky_nb.hub.pins import pin, pins
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.hub.settings import quantized_cache
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.errors import DevSkyyError, FileNotFoundError, MLError, ValidationError
from devsky_nb.demo.catalogue import write_catalogue
from devsky_nb.ui import embedding_explorer as explorer_module
from devsky_nb.ui.embedding_explorer import MAP_SIZE, map_positions, MAX_ON_MAP
from devsky_nb.ui.panel import Job, Panel, Stopped
from devsky_nb.ui.validation_review import review_items, ReviewItem
from devsky_nb.validation.contract import ImageSetContract
from devsky_nb.validation.report import check_image_set
from devsky_nb.memory.plan import plan_vram
from hubcache import make_repo


OLD, NEW = "01da7e5" + "0" * 33, "2ead9e1" + "0" * 33

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
        assert go.wait(PATIENCE)
        show(text)(job)
    panel.ask(text, work, **options)
    assert begun.wait(PATIENCE)
    return go


def test_only_the_newest_request_is_shown(panel):
    seen = []
    panel.shown.observe(lambda change: seen.append(change["new"]), "value")
    go = held(panel, "first")
    for n in range(20): panel.ask("more", show(f"more {n}"))
    go.set()
    panel.wait()
    assert seen == ["more 19"]  # neither the one that was running nor those in between
    assert panel.status.value == "<span role='status'></span>" and "devsky-stale" not in panel.results._dom_classes

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
    wait_until(lambda: len(count) > 5 and "of 1,000,000" in panel.status.value)
    assert not panel.cancel_button.disabled and panel.progress_bar.max == 10**6
    panel.cancel_button.click()
    panel.wait(PATIENCE)
    n = len(count)
    time.sleep(.05)
    assert len(count) == n and "cancelled after" in panel.status.value and panel.cancel_button.disabled
    assert panel.shown.value == "before" and "devsky-stale" in panel.results._dom_classes
    assert not [t for t in threading.enumerate() if t.name == "devsky <Test>"]

def test_a_typed_error_is_shown_where_it_was_made_and_goes_away(panel):
    def work(job): raise ValidationError("no <b>such</b> thing: do that")
    panel.ask("failing", work)
    panel.wait()
    assert "<b>ValidationError</b> no &lt;b&gt;such" in panel.status.value and "role='alert'" in panel.status.value
    assert isinstance(panel.error, ValidationError) and "devsky-stale" in panel.results._dom_classes
    panel.ask("working", show("fine"))
    panel.wait()
    assert panel.shown.value == "fine" and panel.error is None and "alert" not in panel.status.value

@pytest.mark.parametrize("how", ["ask", "act"])
def test_a_mistake_of_ours_is_logged_and_the_panel_goes_on(panel, caplog, how):
    def work(*job): raise ZeroDivisionError("division by zero")
    with caplog.at_level(logging.ERROR, "devsky_nb.ui.panel"):
        panel.ask("failing", work) if how == "ask" else panel.act(work)
        panel.wait()
    assert "ZeroDivisionError" in panel.status.value and "please report" in panel.status.value
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    panel.ask("working", show("fine"))
    assert panel.wait().shown.value == "fine"

def test_work_that_must_end_refuses_the_next_and_cannot_be_cancelled(panel):
    go = held(panel, "deleted", stoppable=False)
    panel.ask("other", show("other"))
    panel.cancel()
    assert "deleted first" in panel.status.value and panel.cancel_button.disabled
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
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    return bundle["text/html"]

def pixels(value):
    parts = [part.split("'")[0] for part in value.split(";base64,")[1:]]
    return [Image.open(io.BytesIO(base64.b64decode(part))).convert("RGB") for part in parts]


CALLS = ["memory_planner()", "quantization_explorer()", "embedding_explorer('.')", "validation_review([], None)",
         "cache_manager()", "vram_timeline()"]

def test_without_its_library_a_widget_says_how_to_install_it():
    code = ["import sys", "from devsky_nb import *"]
    told = []
    absent = {("ipywidgets",): CALLS, ("matplotlib",): [CALLS[0], CALLS[5]], ("ipywidgets", "diffusers"): [CALLS[1]]}
    for missing, calls in absent.items():
        code.append(f"sys.modules |= dict.fromkeys({missing})")
        for call in calls: code += [f"try: {call}", "except DevSkyyError as e: print(e.error_code, e.message)"]
        code.append(f"for name in {missing}: del sys.modules[name]")
        extras = "diffusion,ui" if "diffusers" in missing else "ui"
        told += [f"MissingLibrary this needs {' and '.join(missing)}: run pip install 'devsky_nb[{extras}]'"] * len(calls)
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines() == told, done.stderr


@pytest.fixture(scope="module")
def planner():
    p = memory_planner("sdxl-base", "8GB").wait(PATIENCE)  # with other libraries than the packaged traces name, they are taken first
    yield p
    p.close()

def test_planner_says_what_the_planner_says(planner):
    plan = plan_vram("sdxl-base", "8GB")
    assert [o.code for o in planner.options] == [o.code for o in plan.options]
    assert len(planner.ranked.options) == len(plan.options)
    planner.ranked.value = 2
    assert planner.wait().code.value == plan.options[2].code
    setup = plan.options[2].estimate.setup
    assert (planner.controls.quant.value or None, planner.controls.offload.value or None,
            planner.controls.vae.value) == (setup.quant, setup.offload, setup.vae)
    assert planner.ranked.value == 2  # the list was not filled anew, so the keyboard stays where it was

def test_planner_follows_its_controls(planner):
    planner.controls.quant.value, planner.controls.offload.value, planner.controls.vae.value = "", "", "upcast"
    planner.wait()
    assert "✗" in planner.plot.value and "does not fit" in planner.plot.value
    for gb in np.arange(9, 24.5, .5).tolist(): planner.controls.budget.value = gb
    assert "✓" in planner.wait().plot.value and planner.ranked_for[1] == 24 * 10**9
    planner.controls.model.value = "tiny-clip"
    planner.wait()
    assert planner.controls.size.options == (("own", 0),) and "CLIPModel.from_pretrained" in planner.code.value
    planner.controls.model.value = "sdxl-base"
    assert 1024 not in dict(planner.wait().controls.size.options).values()
    assert ("1024² own", 0) in planner.controls.size.options

def test_planner_says_when_nothing_fits():
    planner = memory_planner("sdxl-base", "500MB").wait(PATIENCE)
    assert "nothing fits. The least is" in planner.verdict.value
    assert planner.ranked.options == ()
    assert "✗" in planner.plot.value

def test_planner_is_an_image_without_a_kernel(planner):
    text = html(planner)
    assert "memory_planner" not in text
    assert "data:image/png;base64," in text
    assert "alt='fp16" in text
    assert "<pre>import torch" in text
    assert pixels(text)[0].size == (675, 288)

@pytest.mark.parametrize("wrong", [{"model": "sdxl-bose"}, {"model": 5}, {"model": ""}, {"budget": "8 gigs"},
                                   {"budget": 8}, {"budget": None}, {"model": Path("/nowhere")}])
def test_planner_refuses_at_once(wrong):
    with pytest.raises(ValidationError): memory_planner(**wrong)

def test_planner_takes_models_and_revisions_of_its_registry(tmp_path):
    config = json.loads((ModelRegistry().locate("tiny-clip") / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["num_hidden_layers"] *= 2
    deep = json.dumps(config).encode()
    config["vision_config"]["num_hidden_layers"] = 1
    files = {OLD: {"config.json": deep}, NEW: {"config.json": json.dumps(config).encode()}}
    make_repo(tmp_path, "shop/clip", files, refs={"main": NEW})
    registry = ModelRegistry(tmp_path, offline=True)
    registry.register(ModelSpec("ours", "shop/clip", "clip"))
    planner = memory_planner("ours", "1GB", registry=registry).wait(PATIENCE)
    assert "ours" in planner.controls.model.options
    old = memory_planner("ours", "1GB", registry=registry, revision=OLD).wait(PATIENCE)
    assert old.options[0].estimate.peak_allocated > planner.options[0].estimate.peak_allocated
    old.controls.model.value = "tiny-clip"  # the revision is not one of this model
    assert old.wait().error is None
    assert "tiny-clip" in old.code.value
    with pytest.raises(DevSkyyError): memory_planner("ours", registry=registry, revision="v9")

def test_planning_tells_how_far_it_is_and_can_be_ended():
    tried = []
    assert plan_vram("tiny-sdxl", "2GB", tick=tried.append).best and set(tried) == {1} and len(tried) > 5
    def tick(n): raise Stopped("enough")
    with pytest.raises(Stopped): plan_vram("tiny-sdxl", "2GB", tick=tick)


def test_explorer_draws_cancels_and_draws_again():
    explorer = quantization_explorer(prompt="a blue dress", seed=1, steps=50, device="cpu")
    wait_until(lambda: explorer.job is not None and explorer.job.done > 1)
    explorer.cancel_button.click()
    explorer.wait()
    assert "cancelled after" in explorer.status.value and explorer.comparison.value == ""
    explorer.controls.steps.value, explorer.controls.left.value = 2, "nf4-dq"
    explorer.controls.draw.click()
    same = explorer.wait().comparison.value
    left, right, apart = pixels(same)
    assert (np.asarray(left) == np.asarray(right)).all() and np.asarray(apart).max() == 0 and "0.0 of 255" in same
    assert set(explorer.generators) == {"nf4-dq"}  # full precision was given up
    explorer.controls.left.value = "int8"
    explorer.controls.draw.click()
    assert np.asarray(pixels(explorer.wait().comparison.value)[2]).max() > 0
    assert "int8: weights" in explorer.comparison.value
    explorer.controls.prompt.value = "a dress " * 60
    explorer.controls.draw.click()
    assert "This would be cut" in explorer.wait().status.value and explorer.comparison.value
    generators = list(explorer.generators.values())
    explorer.close()
    assert all(g.pipeline is None for g in generators)

def test_explorer_shares_the_models_of_its_registry():
    registry = ModelRegistry(device="cpu")
    explorer = quantization_explorer(steps=1, registry=registry).wait()
    assert explorer.error is None
    assert explorer.generators["not quantized"].pipeline is registry.get_model("tiny-sdxl")
    with pytest.raises(MLError, match="in use: 2 leases"): registry.unload("tiny-sdxl")
    explorer.close()
    assert registry.unload("tiny-sdxl") > 0

@pytest.mark.parametrize("wrong", [{"model": "tiny-clip"}, {"model": "tiny-sdxxl"}, {"prompt": " "}, {"prompt": 3},
                                   {"seed": -1}, {"seed": True}, {"steps": 51}, {"device": "tpu"}])
def test_explorer_refuses_at_once(wrong):
    with pytest.raises(ValidationError): quantization_explorer(**wrong)


def tell(look, **message): look.map._handle_custom_msg(message, [])

def test_map_holds_every_image_and_leads_to_neighbours(catalogue, embedder):
    folder, _ = catalogue
    look = embedding_explorer(folder, embedder).wait()
    positions = np.frombuffer(look.map.positions, np.float32).reshape(-1, 2)
    assert len(positions) == len(look.index) and 0 <= positions.min() and positions.max() <= 1 and re.search("<p>.* failed .*</p><p>.* left out", look.account.value)
    names, _ = look.index.names(np.arange(len(look.index)))
    assert [name for _, name, _ in look.map.thumbnails] == [str(name) for name in names]
    tell(look, choose=3)
    found = look.index.search(look.index.vectors[3], k=9)
    text = look.wait().neighbours.value
    assert f"{found.ids[0][1]}: {found.scores[0][1]:.3f}" in text and len(pixels(text)) == 9
    assert look.map.chosen == 3
    assert pixels(html(look))[0].size == MAP_SIZE
    scratch = Path(look.scratch.name)
    look.close()
    assert not scratch.exists()

def test_what_is_in_the_loop_is_selected_and_has_its_ids(catalogue, embedder):
    look = embedding_explorer(catalogue[0], embedder).wait()
    names, _ = look.index.names(np.arange(len(look.index)))
    tell(look, select=[1, 4, 10**6, -1])  # whatever a page may send
    assert look.selected == [str(names[1]), str(names[4])] == look.ids.value.split("\n") and look.map.selected == [1, 4]
    assert look.ids.description == "2 ids"
    tell(look, select=[])
    assert (look.selected, look.map.selected, look.ids.value, look.ids.description) == ([], [], "", "no ids")
    tell(look, nothing=1)
    tell(look, choose=10**6)
    assert look.map.chosen == -1 and look.error is None
    look.close()

def test_words_select_what_is_nearest_to_them(catalogue, embedder):
    look = embedding_explorer(catalogue[0], embedder).wait()
    look.controls.words.value = "a <b>hat"
    look.controls.words._handle_custom_msg({"event": "submit"}, [])
    look.wait()
    found = look.index.search(texts=["a <b>hat"], embedder=embedder, k=12)
    assert look.selected == [str(name) for name in found.ids[0]] and look.neighbours.value.count("<figure") == 12
    assert "<b>" not in look.neighbours.value.replace("<b>Nearest", "") and f": {found.scores[0][0]:.3f}" in look.neighbours.value
    look.controls.words.value = ""
    look.controls.find.click()
    assert "no words to look for" in look.status.value
    look.close()

def test_a_large_map_has_points_for_some_and_ids_for_all_that_are_found(catalogue, embedder, monkeypatch):
    monkeypatch.setattr(explorer_module, "MAX_POINTS", 5)
    look = embedding_explorer(catalogue[0], embedder).wait()
    assert len(look.map.positions) == 5 * 8 and len(look.map.thumbnails) == 5 and look.rows[-1] == len(look.index) - 1
    look.controls.words.value = "a dress"
    look.controls.find.click()
    look.wait()
    assert len(look.selected) == 12 and 0 < len(look.map.selected) <= 5
    tell(look, choose=4)
    assert look.wait().map.chosen == 4 and len(pixels(look.neighbours.value)) == 9
    look.choose(1)  # of the index, and no point of the map
    assert look.wait().map.chosen == -1 and len(pixels(look.neighbours.value)) == 9
    look.close()

def test_embedding_goes_on_where_it_was_cancelled(tmp_path, embedder):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(300):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{n:03}.png", compress_level=0)
    look = embedding_explorer(folder, embedder, out=tmp_path / "out")
    wait_until(lambda: look.job is not None and look.job.done >= 64)
    look.cancel()
    look.wait()
    assert "embedding: cancelled after" in look.status.value and look.index is None
    look.controls.embed.click()
    look.wait()
    assert len(look.index) == 300 and "of them before" in look.account.value and len(look.map.thumbnails) == MAX_ON_MAP
    look.close()
    assert (tmp_path / "out").exists()

def test_folders_without_images_and_with_one(tmp_path, embedder):
    folder = tmp_path / "<b>shop"
    folder.mkdir()
    look = embedding_explorer(folder, embedder).wait()
    assert "the source has no images" in look.status.value and "<b>shop" not in html(look)
    Image.new("RGB", (80, 60), "red").save(folder / "<script>.png")
    look.controls.embed.click()
    look.wait().choose(0)
    assert "&lt;script&gt;.png" in look.wait().neighbours.value and "<script>" not in html(look)
    look.close()

def test_the_map_is_made_by_the_model_of_the_registry_and_gives_it_back(catalogue):
    registry = ModelRegistry(device="cpu")
    look = embedding_explorer(catalogue[0], registry=registry).wait()
    assert look.own_embedder.model is registry.get_model("tiny-clip")
    with pytest.raises(MLError, match="in use"): registry.unload("tiny-clip")
    look.close()
    assert registry.unload("tiny-clip") > 0

def test_an_embedder_of_the_caller_stays_open(catalogue, embedder):
    look = embedding_explorer(catalogue[0], embedder).wait()
    look.close()
    assert embedder.encode_image(Image.new("RGB", (64, 64))).shape == (1, embedder.dim)

def test_map_positions_are_the_same_at_every_run():
    vectors = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    a = map_positions(vectors)
    assert (a == map_positions(vectors.copy())).all() and a.min() == 0 and a.max() == 1

@pytest.mark.parametrize("wrong", [{"folder": None}, {"folder": ""}, {"folder": "/nowhere"}, {"embedder": "tiny-clip"},
                                   {"out": 3}, {"out": "."}])
def test_embedding_explorer_refuses_at_once(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValidationError, FileNotFoundError)): embedding_explorer(**{"folder": "."} | wrong)


@pytest.fixture
def review(catalogue, embedder, tmp_path):
    r = validation_review(catalogue[1], embedder, out=tmp_path / "reviewed.json").wait()
    yield r
    r.close()

def test_review_lists_every_finding(review):
    counts = {kind: text for text, kind in review.controls.kind.options}
    assert counts[""] == f"everything ({len(review.controls.item.options)})"
    assert len(review.controls.item.options) == len(review_items(review.report))
    assert counts["failed"] == f"failed ({review.report.counts['error']})"
    review.controls.kind.value = "copy"
    assert all("copy of" in text for text, _ in review.controls.item.options) and "<img" in review.card.value

def test_review_writes_what_was_decided_and_nothing_else(review, catalogue, tmp_path):
    folder, image_set = catalogue
    before = {p: p.read_bytes() for p in folder.iterdir()}
    review.controls.kind.value = "label"
    index = review._chosen().index
    review.controls.accept.click()
    assert review.controls.item.options[0][0].startswith("✎") and "relabelled" in review.card.value
    review.controls.kind.value = "failed"
    review.controls.leave_out.click()
    review.controls.undo.click()
    assert review.left_out == set() and "taken back" in review.status.value
    review.controls.keep.click()
    review.controls.leave_all_out.click()
    assert review.kept == set() and len(review.labels) == 1
    review.controls.export.click()
    written = json.loads((tmp_path / "reviewed.json").read_text(encoding="utf-8"))
    kept = [e for i, e in enumerate(image_set["images"]) if i not in review.left_out]
    assert [e["path"] for e in written["images"]] == [e["path"] for e in kept]
    assert written["metadata"] == image_set["metadata"]
    changed = [(a["id"], a["label"]) for a, b in zip(written["images"], kept) if a["label"] != b["label"]]
    assert changed == [(image_set["images"][index]["id"], review.labels[index])]
    assert "label" in image_set["images"][index]
    assert image_set["images"][index]["label"] != review.labels[index]
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["reviewed.json"]

def test_a_copy_is_shown_with_the_image_that_it_repeats(review):
    groups = review.report.findings["duplicates"]
    assert {group["kind"] for group in groups} == {"exact", "near"}
    partner = {member: group["representative"] for group in groups for member in group["members"]}
    for n, item in enumerate(review.items):
        if item.kind != "copy": continue
        review.controls.item.value = n
        shown = review.card.value.split("<figure>")[1:]
        assert review.card.value.startswith("<div class='devsky-pair'>") and "leave it out" in review.card.value
        assert ["<img" in figure for figure in shown] == [True, True]
        names = [review.report.images[i]["id"] for i in (item.index, partner[item.index])]
        assert [f"<b>{name}</b>" in figure for name, figure in zip(names, shown)] == [True, True]
    review.controls.kind.value = "failed"
    assert review.card.value.count("<figure>") == 1

def test_the_label_in_the_field_belongs_to_the_entry_that_is_chosen(review):
    c = review.controls
    c.kind.value = "failed"
    first, second = [n for _, n in c.item.options][:2]
    c.label.value = "coat"
    c.relabel.click()
    assert (c.item.value, c.label.value) == (second, "")  # it went on
    c.relabel.click()
    assert "no label is given" in review.status.value and len(review.labels) == 1
    c.label.value = "never decided"
    c.item.value = first
    assert c.label.value == "coat"
    c.kind.value = "copy"
    assert c.label.value == ""

@pytest.mark.parametrize("target", ["image_set.json", "sku-001.jpg", "", "\0name.json", "image_set.json/x.json"])
def test_review_writes_over_nothing(review, catalogue, target):
    folder = catalogue[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    review.controls.file.value = str(folder / target)
    review.controls.export.click()
    assert isinstance(review.error, ValidationError) and "ValidationError" in review.status.value
    assert {p: p.read_bytes() for p in folder.iterdir()} == before

def test_review_writes_its_own_file_again_whole_or_not_at_all(review, tmp_path, monkeypatch):
    review.controls.export.click()
    first = (tmp_path / "reviewed.json").read_bytes()
    review.controls.leave_out.click()
    review.controls.export.click()
    second = (tmp_path / "reviewed.json").read_bytes()
    assert first != second
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(devsky_nb._core.os, "fsync", full)
    review.controls.export.click()
    assert "No space left" in review.status.value
    assert (tmp_path / "reviewed.json").read_bytes() == second
    assert len(list(tmp_path.iterdir())) == 1

def test_review_says_what_is_missing(review):
    review.controls.label.value = " "
    for name, told in (("relabel", "no label is given"), ("undo", "nothing is decided yet")):
        getattr(review.controls, name).click()
        assert told in review.status.value
    review.items[review.controls.item.value] = ReviewItem("outlier", 0, "unlike dress")
    review.controls.accept.click()
    assert "no suggestion" in review.status.value and review.labels == {} and review.history == []

def test_a_decision_leads_to_the_next_that_is_open_and_can_be_taken_back(review):
    c = review.controls
    places = [n for _, n in c.item.options]
    before = [c.item.value]
    for name in ("keep", "leave_out", "accept"):
        getattr(c, name).click()
        before.append(c.item.value)
        assert review.error is None
    assert before == places[:4] and len(review.kept | review.left_out | review.labels.keys()) == 3
    assert f"3 of {len({item.index for item in review.items})} entries decided" in review.decided.value
    c.item.value = places[2]
    c.advance.value = False
    c.keep.click()
    assert c.item.value == places[2] and review.items[places[2]].index in review.kept
    for place in (places[2], *reversed(places[:3])):
        c.undo.click()
        assert c.item.value == place
    assert (review.kept, review.left_out, review.labels, review.history) == (set(), set(), {}, [])

def test_all_of_it_is_decided_by_keys(review):
    def press(*keys):
        for key in keys: review.script._handle_custom_msg({"key": key}, [])
    first = review.controls.item.value
    press("n", "n", "p", "p")
    assert review.controls.item.value == first
    press("k", "u", "?", "x")
    assert review.left_out == {review.items[first].index}
    for _ in review.items: press("a" if review._chosen().suggestion else "k")
    assert len(review.kept | review.left_out | review.labels.keys()) == len({item.index for item in review.items})
    assert set(review.script.known_keys) == set("akxnpu") and list(review.script.focus_keys) == ["r"]

def test_enter_in_the_field_gives_the_label(review):
    index = review._chosen().index
    review.controls.label.value = "coat"
    review.controls.label._handle_custom_msg({"event": "submit"}, [])
    assert review.labels == {index: "coat"}

def test_the_verdict_of_a_review_is_in_words_and_in_a_colour(catalogue, embedder, tmp_path):
    for contract, words, tone in ((None, "enough succeeded", "good"), (ImageSetContract(), "contract fulfilled", "good"),
                                  (ImageSetContract(min_size=9999), "contract not fulfilled", "bad")):
        review = validation_review(catalogue[1], embedder, contract, out=tmp_path / "r.json").wait()
        assert f"devsky-{tone}'><b>" in review.verdict.value and f" {words}</b>" in review.verdict.value
        review.close()

def test_checking_can_be_cancelled(embedder, catalogue):
    images = [e for e in catalogue[1]["images"] if e["condition"] == "good"] * 40
    r = validation_review({"images": [e | {"id": n} for n, e in enumerate(images)]}, embedder)
    wait_until(lambda: r.job is not None and r.job.done > 10)
    r.cancel()
    assert "cancelled after" in r.wait().status.value and r.report is None
    r.controls.export.click()
    assert "not checked yet" in r.status.value
    r.close()

def test_a_folder_is_reviewed_as_it_is(tmp_path, embedder):
    for name in ("red", "green"): Image.new("RGB", (80, 60), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    review = validation_review(str(tmp_path), embedder, out=tmp_path / "kept" / "reviewed.json").wait()
    review.controls.kind.value = "failed"
    review.controls.leave_all_out.click()
    review.controls.export.click()
    review.close()
    written = json.loads((tmp_path / "kept" / "reviewed.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in written["images"]] == [str(tmp_path / "green.png"), str(tmp_path / "red.png")]
    with pytest.raises(FileNotFoundError): validation_review(tmp_path / "nowhere", embedder)

@pytest.mark.parametrize("wrong", [{"image_set": {"images": []}}, {"image_set": None}, {"embedder": None},
                                   {"contract": {}}, {"out": None}])
def test_review_refuses_at_once(catalogue, embedder, wrong):
    with pytest.raises(ValidationError): validation_review(**{"image_set": catalogue[1], "embedder": embedder} | wrong)

def test_checking_tells_how_far_it_is(catalogue, embedder):
    told = []
    check_image_set(catalogue[1], embedder, tick=told.append)
    assert sum(told) == len(catalogue[1]["images"])



@pytest.fixture
def hub(tmp_path):
    weights = b"weights" * 1000
    make_repo(tmp_path / "hub", "shop/clip",
              {OLD: {"model.safetensors": weights}, NEW: {"model.safetensors": weights[::-1]}}, refs={"main": NEW})
    return tmp_path / "hub"

def stored(hub): return sorted(p.name for p in hub.glob("models--*/snapshots/*"))

def planned(manager, limit="1KB"):
    manager.controls.limit.value = limit
    manager.controls.make_plan.click()
    return manager.wait()

def test_nothing_is_evicted_without_the_box(hub):
    manager = cache_manager(hub).wait()
    planned(manager)
    assert "2 revisions" in manager.controls.confirm.description and manager.controls.evict.disabled
    manager.controls.evict.click()  # whoever calls it all the same
    manager.evict()
    assert "nothing is deleted" in manager.wait().status.value and stored(hub) == [OLD, NEW]
    manager.controls.confirm.value = True
    manager.controls.days.value = "90"  # another plan is wanted: this one is taken back
    assert manager.plan is None
    assert not manager.controls.confirm.value
    assert manager.controls.confirm.disabled
    assert manager.controls.evict.disabled
    manager.evict()
    assert manager.wait() and stored(hub) == [OLD, NEW]
    manager.controls.days.value = ""
    planned(manager).controls.confirm.value = True
    assert not manager.controls.evict.disabled
    manager.controls.evict.click()
    assert "freed" in manager.wait().planned.value
    assert stored(hub) == []
    assert manager.controls.revision.options == (("none", ""),)
    manager.close()

def test_pins_protect_even_between_the_plan_and_the_button(hub):
    manager = cache_manager(hub).wait()
    manager.controls.revision.value, manager.controls.alias.value = ("shop/clip", NEW), "production"
    manager.controls.pin.click()
    assert pins(hub) == {("shop/clip", "production"): NEW} and "production" in manager.wait().stored.value
    planned(manager).controls.confirm.value = True
    assert [r.commit for r in manager.plan.evict] == [OLD]
    pin("shop/clip", OLD, "other", hub)  # by somebody else
    manager.controls.evict.click()
    assert stored(hub) == [OLD, NEW] and "1 skipped" in manager.wait().planned.value
    manager.controls.unpin.click()
    assert pins(hub) == {("shop/clip", "other"): OLD} and stored(hub) == [OLD, NEW]
    manager.wait().controls.unpin.click()
    assert "no pin" in manager.status.value
    manager.close()

def test_quantized_copies_are_named_before_they_are_deleted(hub):
    folder = quantized_cache(hub) / "shop--clip-int8-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "quantized.json").write_text(json.dumps({"model": "shop/clip", "label": "int8"}), encoding="utf-8")
    manager = cache_manager(hub).wait()
    assert "int8" in manager.stored.value
    planned(manager, "1B")
    assert "Yes, delete 2 revisions, 1 quantized copy: " in manager.controls.confirm.description
    manager.controls.confirm.value = True
    manager.controls.evict.click()
    assert manager.wait().error is None and not folder.exists()
    manager.close()

@pytest.mark.parametrize("limit, days, told",
                         [("", "", "a size to shrink to"), ("much", "", "no size in"), ("", "ninety", "above 0"),
                          ("", "0", "above 0"), ("", "nan", "above 0"), ("", "inf", "above 0"), ("", "-1", "above 0")])
def test_limits_that_mean_nothing(hub, limit, days, told):
    manager = cache_manager(hub).wait()
    manager.controls.limit.value, manager.controls.days.value = limit, days
    manager.controls.make_plan.click()
    assert told in manager.wait().status.value and manager.plan is None and manager.controls.confirm.disabled
    manager.close()

@pytest.mark.parametrize("wrong", ["/nowhere", 5, ""])
def test_cache_manager_refuses_at_once(wrong):
    with pytest.raises(DevSkyyError): cache_manager(wrong)


def test_timeline_is_drawn_while_it_measures():
    watch = vram_timeline(device="cpu", refresh=.05, interval=.01, plan={"load": 50 * 2**20})
    drawn = set()
    watch.plot.observe(lambda change: drawn.add(change["new"]), "value")
    with watch:
        with watch.monitor.phase("load"): garment = np.ones(40 * 2**20, np.uint8)
        wait_until(lambda: len(drawn) > 2)
    assert "measuring" not in watch.wait().status.value and watch.monitor is None and "load" in watch.table.value
    assert "<img" in html(watch) and garment.any()
    watch.controls.start.click()
    assert watch.controls.start.disabled and not watch.controls.stop.disabled
    watch.act(watch.start)
    assert "measures already" in watch.status.value
    watch.cancel_button.click()  # as good as Stop
    assert watch.wait(PATIENCE).monitor is None and not [t for t in threading.enumerate() if t.name == "VramMonitor"]
    watch.controls.start.click()
    watch.close()
    assert not [t for t in threading.enumerate() if t.name == "VramMonitor"]

def test_a_block_displays_its_timeline_and_leaves_the_plot():
    code = """from devsky_nb import vram_timeline
with vram_timeline(device="cpu") as watch:
    with watch.monitor.phase("load"): pixels = bytearray(10**8)
    if FAILS: raise MemoryError("too large")"""
    cells = [nbformat.v4.new_code_cell(code.replace("FAILS", fails)) for fails in ("False", "True")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", allow_errors=True).execute()
    for cell, failed in zip(notebook.cells, ([], ["MemoryError"])):
        shown = [output for output in cell.outputs if output.output_type == "display_data"]
        assert len(shown) == 1 and shown[0].data["text/plain"] == "VRAM timeline"
        assert "data:image/png" in shown[0].data["text/html"] and "load" in shown[0].data["text/html"]
        assert [output.ename for output in cell.outputs if output.output_type == "error"] == failed

@pytest.mark.parametrize("wrong", [{"pipeline": "sdxl-base"}, {"device": "tpu"}, {"plan": {"denoise": "7GB"}},
                                   {"plan": 7}, {"interval": 0}, {"refresh": "1"}])
def test_timeline_refuses_at_once(wrong):
    with pytest.raises(ValidationError): vram_timeline(**wrong)
