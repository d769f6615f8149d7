"The site's planner: its grid is what the planner says today, and its controls show the grid's numbers."
import json, random
from importlib.metadata import version
from pathlib import Path

import planner, pytest
from devsky_nb.memory.estimate import estimate_vram
from devsky_nb.memory.plan import PlanOption

from browser import SITE, open_page

GRID = planner.read()
PINS = dict(line.split("==") for line in (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
AS_MADE = all(version(name).partition("+")[0] == PINS[name] for name in ("torch", "transformers", "diffusers"))  # other releases hold other tensors for a moment
EXAMPLES = ["sdxl-base", "sd15", "flux1-dev", "z-image-turbo", "ltx-video"]


def test_the_grid_is_small_and_names_every_point():
    assert planner.FILE.stat().st_size < 300_000
    assert tuple(GRID["models"]) == tuple(planner.GRIDS) and GRID["quant"] == planner.QUANTS and GRID["offload"] == planner.OFFLOADS
    for model, known in GRID["models"].items():
        grid = planner.GRIDS[model]
        assert (known["sizes"], known["frames"], known["batches"]) == ([*map(list, grid.sizes)], list(grid.frames), list(grid.batches)), model


def own_point(model):
    "Where the page starts for a model, as its number and as it is asked for."
    grid = planner.GRIDS[model]
    number = (grid.own * len(grid.frames) + grid.own_frames) * len(grid.batches)
    return number, [*grid.points()][number]


@pytest.mark.parametrize("model", [pytest.param(model, marks=[] if model in EXAMPLES else pytest.mark.slow) for model in planner.GRIDS])
def test_the_page_starts_with_what_a_model_draws_unasked(model):
    drawn = tuple(own_point(model)[1].get(name, 1) for name in ("width", "height", "frames"))
    traced = estimate_vram(model, GRID["models"][model]["dtype"]).traced
    assert drawn == (*traced.size, traced.frames)


@pytest.mark.parametrize("model", EXAMPLES)
def test_the_grid_says_what_the_planner_says(model):
    known = GRID["models"][model]
    number, point = own_point(model)
    estimates = [*planner.estimates(model, known["dtype"], point)]
    for estimate in random.Random(0).sample(estimates, min(12, len(estimates))):
        config = GRID["configs"].index(json.loads(json.dumps(planner.about(estimate))))
        assert abs(planner.at(known["configs"][str(config)][-1], number) - estimate.needed / estimate.peak_allocated) < 2e-3, estimate.setup
        for phase, size in estimate.by_phase.items():
            held = planner.held(known, config, phase, number)
            off = abs(sum(held.values()) - size)
            assert off <= (len(held) * planner.UNIT if AS_MADE else .02 * estimate.peak_allocated), (estimate.setup, phase)


def mib(text):
    number, unit = text.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


@pytest.fixture
def opened(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site + "planner.html")
        yield page
    assert complaints == []


def shown(page):
    "The peak of the drawn configuration, in MiB."
    return mib(page.locator(".row-of-bars.worst > span").last.inner_text())


def plan_of(model, budget):
    "What `plan_vram` answers when it knows no other ways than the page."
    tried = [PlanOption(estimate, budget) for estimate in planner.estimates(model, GRID["models"][model]["dtype"], own_point(model)[1])]
    kept = []
    for option in sorted(tried, key=lambda option: option.rank):
        if option.fits and not any(better.beats(option) for better in kept): kept.append(option)
    return kept[:10]


@pytest.mark.browser
def test_a_visitor_sees_what_plan_vram_answers(opened):
    assert opened.locator("#planner-verdict").inner_text().startswith("✗ Does not fit: sdxl-base, fp16, 1 image of 1024 × 1024")
    plan = plan_of("sdxl-base", 8 * 10**9)
    rows = [row.split("\t") for row in opened.locator("#planner-table tbody tr").all_inner_texts()]
    assert [row[0].strip() for row in rows] == [o.label for o in plan]
    for row, option in zip(rows, plan):
        assert abs(mib(row[1]) - option.peak / 2**20) < 60 and row[2] == option.estimate.peak_phase
    opened.get_by_role("button", name=plan[0].label, exact=True).click()
    assert opened.locator("#planner-verdict").inner_text().startswith(f"✓ Fits: sdxl-base, {plan[0].label}")


@pytest.mark.browser
def test_a_video_has_frames_and_an_image_none(opened):
    assert not opened.get_by_label("Frames").is_visible()
    opened.get_by_label("Model").select_option("ltx-video")
    assert "1 video of 704 × 512 with 161 frames" in opened.locator("#planner-verdict").inner_text()
    before = shown(opened)
    opened.get_by_label("Frames").press("Home")
    assert "with 97 frames" in opened.locator("#planner-verdict").inner_text() and shown(opened) <= before
    assert "frames=97" in opened.locator("#planner-code").inner_text() and opened.get_by_label("At a time").is_disabled()


@pytest.mark.browser
def test_the_controls_move_by_keyboard_and_the_code_beside_them_gives_the_same(opened):
    opened.get_by_label("Model").select_option("sd15")
    opened.get_by_role("slider", name="Size").press("Home")
    opened.get_by_label("Weights").select_option("nf4")
    assert "sd15, fp16, nf4, 1 image of 512 × 512" in opened.locator("#planner-verdict").inner_text()
    assert opened.get_by_label("Offload").evaluate("e => [...e.options].filter(o => o.disabled).length") == 0
    before = shown(opened)
    assert abs(before - eval(opened.locator("#planner-code").inner_text(), {"estimate_vram": estimate_vram}).peak_allocated / 2**20) < 60
    opened.get_by_label("At a time").press("ArrowRight")
    assert opened.get_by_label("At a time").get_attribute("aria-valuetext") == "2 images" and shown(opened) > before
    opened.get_by_label("Budget").press("Home")
    opened.get_by_label("At a time").press("End")
    opened.get_by_role("slider", name="Size").press("End")
    assert "✗" in opened.locator("#planner-verdict").inner_text()
    opened.get_by_label("Budget").press("End")
    assert "✓" in opened.locator("#planner-verdict").inner_text()


@pytest.mark.browser
def test_what_does_not_go_together_settles_on_what_does(opened):
    opened.get_by_label("Offload").select_option("group")
    assert opened.get_by_label("fp16-fix VAE").is_checked(), "with SDXL's own VAE groups cannot be offloaded"
    opened.get_by_label("Weights").select_option("int8")
    assert opened.get_by_label("Offload").input_value() in ("none", "model")
    assert opened.get_by_label("image by image").is_disabled()
    opened.get_by_label("At a time").press("ArrowRight")
    assert opened.get_by_label("image by image").is_enabled()


@pytest.mark.browser
def test_when_nothing_fits_the_page_says_what_would(opened):
    opened.get_by_label("Model").select_option("ltx-video")
    opened.get_by_role("slider", name="Size").press("End")
    opened.get_by_label("Budget").press("Home")
    assert not opened.locator("#planner-table").is_visible()
    said = opened.locator("#planner-count").inner_text()
    assert said.startswith("Nothing fits. The least is bf16, ") and said.endswith("Make fewer or smaller ones, or take a smaller model.")


@pytest.mark.browser
@pytest.mark.usefixtures("site")
def test_the_page_works_from_a_folder_on_a_narrow_dark_screen(browser):
    with open_page(browser, viewport={"width": 360, "height": 740}, color_scheme="dark") as (page, complaints):
        page.goto((SITE / "planner.html").as_uri())
        assert page.locator("#planner-table tbody tr").count() > 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#planner-table").bounding_box()["width"] <= page.locator("main").bounding_box()["width"]
    assert complaints == []
