"The widgets in JupyterLab and Notebook 7: started for real, driven by keyboard and mouse, with a silent console."
import json, os, re, secrets, shutil, socket, subprocess, sys, urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat, pytest

from browser import open_page, unavailable
from patience import PATIENCE, wait_until

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
TOKEN = secrets.token_hex(8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab, which serves Notebook 7 too, on copies of the notebooks, with a home of its own; its address."
    for name in ("jupyterlab", "notebook"):
        if find_spec(name) is None:
            unavailable(f"{name} is not installed: `make browser` installs it and runs these tests")
    home = tmp_path_factory.mktemp("lab")
    (home / "tests").mkdir()
    shutil.copytree(ROOT / "nbs" / "ui", home / "nbs" / "ui")
    shutil.copy(ROOT / "tests" / "hubcache.py", home / "tests")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(home / "config"),
                        "JUPYTER_DATA_DIR": str(home / "data"),
                        "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython"),
                        "HF_HUB_OFFLINE": "1", "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
               "--allow-root", f"--ServerApp.root_dir={home}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None",
               "--LabApp.expose_app_in_browser=True",
               "--JupyterNotebookApp.expose_app_in_browser=True"]
    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    log = (home / "lab.log").open("w", encoding="utf-8")
    server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: server.poll() is not None or answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"), pause=.2)
        assert server.poll() is None, (home / "lab.log").read_text(encoding="utf-8")[-2000:]
        yield f"http://127.0.0.1:{port}", home
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def answers(url):
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


def write_notebook(home, name, *sources):
    "A notebook for a test."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources],
                                  metadata={"kernelspec": {"name": "python3", "display_name": "python3",
                                                           "language": "python"}})
    nbformat.write(nb, home / "nbs" / f"{name}.ipynb")


def open_notebook(page, address, name, app="lab"):
    "Open a notebook in JupyterLab (\"lab\") or Notebook 7 (\"notebooks\"), and wait for its kernel."
    where = f"lab/workspaces/{secrets.token_hex(4)}/tree" if app == "lab" else app
    page.goto(f"{address}/{where}/nbs/{name}.ipynb?token={TOKEN}")
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.status === 'idle'", timeout=PATIENCE * 1000)


def run_all(page):
    "Run every cell, as the menu does."
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
    page.evaluate(f"() => {{ window.ran = null; {run}.then(well => {{ window.ran = [well] }}) }}")
    page.wait_for_function("() => window.ran", timeout=PATIENCE * 1000)
    for kind in ("error", "stderr"):
        assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").all_text_contents() == []
    assert page.evaluate("() => window.ran") == [True]


def set_theme(page, theme):
    change = "window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
    page.evaluate(f"async theme => {{ await {change} }}", theme)


@pytest.mark.parametrize("name", ["02_memory_planner", "07_vram_timeline"])
def test_the_notebook_shows_images_before_it_runs_and_widgets_after(lab, browser, name):
    address, _ = lab
    with open_page(browser, viewport={"width": 1400, "height": 1000}) as (page, complaints):
        open_notebook(page, address, f"ui/{name}")
        image = page.locator(".jp-OutputArea-output img").first
        image.scroll_into_view_if_needed(timeout=PATIENCE * 1000)
        assert image.get_attribute("alt")
        assert image.evaluate("e => e.naturalWidth") > 100
        assert page.locator(".devsky").count() == 0
        run_all(page)
        page.locator(".devsky img").first.wait_for(timeout=PATIENCE * 1000, state="attached")
        assert page.locator(".devsky").count() == 1
        assert complaints == []


HUB = """from pathlib import Path
import sys; sys.path.append("../tests")
from hubcache import make_repo
from devsky_nb import *
commit = "c0ffee1" + "0" * 33
_ = make_repo("hub", "shop/clip", {commit: {"model.safetensors": b"weights" * 1000}}, refs={"main": commit})
catalogue, embedder = write_catalogue("catalogue", n=16), CLIPImageEmbedder("tiny-clip", device="cpu")"""
PANELS = {"Memory planner": "memory_planner()", "Quantization explorer": "quantization_explorer(steps=2, device='cpu')",
          "Embedding explorer": "embedding_explorer('catalogue', embedder)",
          "Validation review": "validation_review(catalogue, embedder, out='catalogue/image_set.json')",
          "Cache manager": "cache_manager('hub')", "VRAM timeline": "vram_timeline(device='cpu')"}


@pytest.fixture(scope="module")
def opened(lab, browser):
    "The six panels in one notebook that has run: a page, its complaints, and where its files are."
    address, home = lab
    write_notebook(home, "panels", HUB, *PANELS.values())
    with open_page(browser, viewport={"width": 1400, "height": 1400}) as (page, complaints):
        page.set_default_timeout(60_000)
        open_notebook(page, address, "panels")
        run_all(page)
        yield page, complaints, home / "nbs"


@pytest.fixture
def find(opened):
    "A panel by its name; afterwards, nothing must have been complained about."
    page, complaints, _ = opened
    def panel(name):
        found = page.locator(".devsky", has_text=name)
        found.scroll_into_view_if_needed()
        return found
    yield panel
    assert complaints == []


@pytest.fixture
def expect():
    from playwright.sync_api import expect
    expect.set_options(timeout=120_000)  # what fails, fails by this
    return expect


def labelled(panel, name): return panel.locator(".widget-inline-hbox, .jupyter-widget-inline-hbox",
                                                has=panel.page.get_by_text(name, exact=True)).first


def test_the_planner_is_moved_by_keyboard(find, expect, opened):
    planner, page = find("Memory planner"), opened[0]
    plot, code, ranked = planner.locator("img"), planner.locator("textarea"), planner.locator("select[size]").last
    expect(plot).to_have_attribute("alt", "fp16: does not fit, 10.5 GiB in decode")
    expect(ranked.locator("option").first).to_contain_text("fp16, model offload")
    ranked.focus()
    page.keyboard.press("ArrowDown")
    expect(plot).to_have_attribute("alt", re.compile("fp16, model offload, channels last: .* left"))
    expect(code).to_have_value(re.compile("enable_model_cpu_offload"))
    assert ranked.evaluate("e => e === document.activeElement")  # so the next arrow goes on from there
    labelled(planner, "budget, GB").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(planner.locator(".widget-readout").first).to_have_text("8.50")
    expect(ranked.locator("option").first).to_contain_text("2.7 GiB left")


def test_a_drawing_is_cancelled_while_other_panels_answer(find, expect, opened):
    page, explorer = opened[0], find("Quantization explorer")
    expect(explorer.locator("img")).to_have_count(3)
    steps = labelled(explorer, "steps").locator(".widget-readout")
    steps.fill("50")
    steps.press("Enter")
    explorer.get_by_role("button", name="Draw").focus()
    page.keyboard.press("Enter")
    expect(explorer).to_contain_text(re.compile(r"drawing: \d+ of 100"))
    planner = find("Memory planner")
    labelled(planner, "budget, GB").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(planner.locator("select[size] option").first).to_contain_text("3.2 GiB left")
    expect(explorer).to_contain_text(re.compile(r"drawing: \d+ of 100"))  # still: nobody had to wait for it
    explorer.get_by_role("button", name="Cancel").click()
    expect(explorer).to_contain_text("cancelled after")
    expect(explorer.locator("img")).to_have_count(3)


def test_a_point_of_the_map_is_reached_by_tab_and_shows_its_neighbours(find, expect, opened):
    page, explorer = opened[0], find("Embedding explorer")
    points = explorer.locator("button.devsky-point")
    expect(points.first).to_be_visible()
    assert points.count() >= 10 and points.first.get_attribute("title")
    explorer.locator(".devsky-map").first.focus()
    for _ in range(5): page.keyboard.press("Tab")  # past the four tools
    name = page.evaluate("() => document.activeElement.title")
    page.keyboard.press("Enter")
    expect(explorer.locator(".devsky-cards figure")).to_have_count(9)
    expect(explorer.locator("figcaption").first).to_have_text(name)
    expect(explorer.locator("button.devsky-chosen")).to_have_attribute("title", name)
    points.last.click()
    expect(explorer.locator("figcaption").first).to_have_text(points.last.get_attribute("title"))


def test_a_map_is_zoomed_and_a_loop_gives_ids(find, expect, opened):
    page, explorer = opened[0], find("Embedding explorer")
    area, points = explorer.locator(".devsky-map").first, explorer.locator("button.devsky-point")
    distance = "bs => Math.hypot(bs[0].offsetLeft - bs.at(-1).offsetLeft, bs[0].offsetTop - bs.at(-1).offsetTop)"
    before = points.evaluate_all(distance)
    explorer.get_by_role("button", name="Zoom in (+)").click()
    assert points.evaluate_all(distance) == pytest.approx(1.5 * before, abs=3)
    area.focus()
    page.keyboard.press("0")
    assert points.evaluate_all(distance) == pytest.approx(before, abs=1)
    area.hover()
    page.mouse.wheel(0, -300)
    assert points.evaluate_all(distance) == pytest.approx(1.25 * before, abs=3)
    page.keyboard.press("0")
    page.keyboard.press("l")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    corners = [(2, 2), (box["width"] - 90, 2), (box["width"] - 90, box["height"] - 2), (2, box["height"] - 2)]
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    for x, y in corners: page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
    page.mouse.up()
    within = points.evaluate_all("(bs, edge) => bs.filter(b => b.offsetLeft + b.offsetWidth / 2 < edge).map(b => b.title)", box["width"] - 90)
    ids = explorer.locator("textarea")
    expect(ids).to_have_value("\n".join(within))
    expect(explorer.locator("button.devsky-selected")).to_have_count(len(within))
    expect(explorer.get_by_text(f"{len(within)} ids")).to_be_visible()
    area.focus()
    page.keyboard.press("Escape")
    expect(ids).to_have_value("")


def test_images_are_found_by_words(find, expect, opened):
    explorer = find("Embedding explorer")
    explorer.get_by_placeholder("a red striped dress").fill("a hat")
    explorer.get_by_placeholder("a red striped dress").press("Enter")
    expect(explorer.locator("button.devsky-selected")).to_have_count(12)
    expect(explorer).to_contain_text("Nearest to 'a hat'")


def test_progress_is_seen_only_while_something_runs(find, expect):
    for name in PANELS:
        panel = find(name)
        expect(panel.locator(".progress-bar, .widget-hprogress").first).to_be_hidden()
        expect(panel.get_by_role("button", name="Cancel", exact=True)).to_have_count(0)


def test_a_panel_is_as_wide_as_its_cell(find, opened):
    page = opened[0]
    for width in (1400, 700):
        page.set_viewport_size({"width": width, "height": 1400})
        for name in PANELS:
            panel = find(name)
            cell = panel.evaluate("e => e.closest('.jp-OutputArea-output').clientWidth")
            assert panel.bounding_box()["width"] > .95 * cell, (name, width)
            assert panel.evaluate("e => e.scrollWidth - e.clientWidth") <= 1, (name, width)
    page.set_viewport_size({"width": 1400, "height": 1400})


def test_a_review_is_done_by_keys(find, expect, opened):
    page, review = opened[0], find("Validation review")
    decided, name = review.get_by_text(re.compile("entries decided")), review.locator(".devsky-pair b").first
    expect(decided).to_contain_text("0 of")
    name.click()  # anywhere in the panel
    first = name.text_content()
    page.keyboard.press("n")
    expect(name).not_to_have_text(first)
    page.keyboard.press("p")
    expect(name).to_have_text(first)
    page.keyboard.press("x")
    expect(decided).to_contain_text("1 left out")
    expect(name).not_to_have_text(first)
    second = name.text_content()
    page.keyboard.press("r")
    page.keyboard.type("bag")
    page.keyboard.press("Enter")
    expect(decided).to_contain_text("1 relabelled")
    page.keyboard.press("k")  # heard again: the field has lost the focus
    expect(decided).to_contain_text("3 of")
    for _ in range(2): page.keyboard.press("u")
    expect(name).to_have_text(second)
    page.keyboard.press("u")
    expect(decided).to_contain_text("0 of")
    page.keyboard.press("u")
    expect(review.get_by_role("alert")).to_contain_text("nothing is decided yet")
    labelled(review, "show").locator("select").select_option(label=review.locator("option", has_text="copies").first.inner_text())
    pair = review.locator(".devsky-pair figure")
    expect(pair).to_have_count(2)
    left, right = pair.nth(0).bounding_box(), pair.nth(1).bounding_box()
    assert abs(left["y"] - right["y"]) < 2 and right["x"] >= left["x"] + left["width"]


def test_a_review_is_exported_and_never_over_the_source(find, expect, opened):
    review, folder = find("Validation review"), opened[2]
    source = (folder / "catalogue" / "image_set.json").read_text(encoding="utf-8")
    labelled(review, "show").locator("select").select_option(label=review.locator("option",
                                                                                  has_text="failed").first.inner_text())
    review.get_by_role("button", name="Leave all out").click()
    review.get_by_role("button", name="Export").click()
    expect(review.get_by_role("alert")).to_contain_text("choose another name")
    assert (folder / "catalogue" / "image_set.json").read_text(encoding="utf-8") == source
    labelled(review, "file").locator("input").fill("reviewed.json")
    review.get_by_role("button", name="Export").click()
    expect(review.get_by_role("status")).to_contain_text("written: reviewed.json")
    assert len(json.loads((folder / "reviewed.json").read_text(encoding="utf-8"))["images"]) == 13


def test_the_cache_is_emptied_after_the_box_is_ticked(find, expect, opened):
    manager, snapshots = find("Cache manager"), opened[2] / "hub" / "models--shop--clip" / "snapshots"
    evict, box = manager.get_by_role("button", name="Evict"), manager.get_by_role("checkbox")
    expect(evict).to_be_disabled()
    labelled(manager, "shrink to").locator("input").fill("1KB")
    manager.get_by_role("button", name="Plan").click()
    expect(box).to_be_enabled()
    expect(evict).to_be_disabled()
    box.focus()
    opened[0].keyboard.press("Space")
    expect(evict).to_be_enabled()
    assert len(list(snapshots.iterdir())) == 1
    evict.click()
    expect(manager).to_contain_text("cached, 6.8 KiB freed")
    assert not snapshots.exists() or not list(snapshots.iterdir())


def test_the_timeline_is_drawn_until_it_is_stopped(find, expect):
    watch = find("VRAM timeline")
    watch.get_by_role("button", name="Start").click()
    expect(watch.locator("img")).to_be_visible()
    first = watch.locator("img").get_attribute("src")
    expect(watch.locator("img")).not_to_have_attribute("src", first)
    watch.get_by_role("button", name="Stop").click()
    expect(watch.get_by_role("button", name="Start")).to_be_enabled()
    expect(watch).to_contain_text("over a baseline of")


def test_a_block_shows_its_timeline_while_it_runs_and_afterwards(lab, browser, expect):
    address, home = lab
    write_notebook(home, "block", "import time\nfrom devsky_nb import vram_timeline",
                   "with vram_timeline(device='cpu', refresh=.1) as timeline:\n    time.sleep(4)")
    with open_page(browser, viewport={"width": 1000, "height": 900}) as (page, complaints):
        open_notebook(page, address, "block")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        panel = page.locator(".devsky", has_text="VRAM timeline")
        expect(panel.get_by_role("button", name="Stop")).to_be_enabled()
        expect(panel.locator("img")).to_be_visible()
        expect(panel.get_by_role("button", name="Start")).to_be_enabled()
        expect(panel).to_contain_text("over a baseline of")
        expect(panel).to_have_count(1)
        assert complaints == []


def test_text_follows_the_theme(find, opened):
    page, colours = opened[0], {}
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        set_theme(page, theme)
        page.wait_for_function("dark => document.body.dataset.jpThemeLight === String(!dark)", arg="Dark" in theme)
        if out := os.environ.get("DEVSKY_SCREENSHOTS"):
            for name in PANELS: find(name).screenshot(path=f"{out}/{name} {theme}.png")
        colours[theme] = find("Memory planner").locator("p").first.evaluate("e => getComputedStyle(e).color")
    assert len(set(colours.values())) == 2


# what Notebook 7 complains about without any widget
OF_AN_EMPTY_NOTEBOOK = r"reading 'schema'|'filebrowser:open-path' not registered"

def test_the_panels_in_notebook_7(lab, browser, expect):
    address, home = lab
    write_notebook(home, "classic",
                   "import shutil\nfor d in ('hub', 'catalogue'): shutil.rmtree(d, ignore_errors=True)", HUB,
                   *PANELS.values())
    with open_page(browser, viewport={"width": 1400, "height": 1400}) as (page, complaints):
        page.set_default_timeout(60_000)
        open_notebook(page, address, "classic", app="notebooks")
        assert page.evaluate("() => window.jupyterapp.name") == "Jupyter Notebook"
        run_all(page)
        for name in PANELS: expect(page.locator(".devsky", has_text=name)).to_have_count(1)
        planner = page.locator(".devsky", has_text="Memory planner")
        planner.scroll_into_view_if_needed()
        expect(planner.locator("select[size] option").first).to_contain_text("2.2 GiB left")
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:enter-command-mode')")
        labelled(planner, "budget, GB").locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        expect(planner.locator("select[size] option").first).to_contain_text("2.7 GiB left")
        labelled(planner, "quantization").locator("select").focus()
        page.keyboard.press("n")  # outside of a panel other letters change the cell
        page.keyboard.press("m")
        assert page.locator(".jp-MarkdownCell").count() == 0
        explorer = page.locator(".devsky", has_text="Embedding explorer")
        explorer.locator("button.devsky-point").last.click()
        expect(explorer.locator(".devsky-cards figure")).to_have_count(9)
        if out := os.environ.get("DEVSKY_SCREENSHOTS"): explorer.screenshot(path=f"{out}/notebook 7.png")
        assert [c for c in complaints if not re.search(OF_AN_EMPTY_NOTEBOOK, c)] == []
