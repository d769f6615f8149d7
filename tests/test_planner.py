"The site's planner: its grid is what the planner says today, and its controls show the grid's numbers."
import random

import planner, pytest
from devsky_nb.memory.configs import find_model
from devsky_nb.memory.estimate import estimate_vram
from devsky_nb.memory.plan import PlanOption, candidates, plan_vram

from browser import SITE, open_page

GRID = planner.read()


def test_the_grid_is_small_and_names_every_point():
    assert planner.FILE.stat().st_size < 300_000
    assert tuple(GRID["models"]) == planner.MODELS and GRID["sizes"] == list(planner.SIZES) and GRID["batches"] == list(planner.BATCHES)


@pytest.mark.parametrize("model", ["sdxl-base", "sd15", "flux1-dev"])
def test_the_grid_says_what_the_planner_says(model):
    known = GRID["models"][model]
    fixed = {"width": known["own"], "height": known["own"], "batch": 1, "guidance": True}
    for estimate in random.Random(0).sample([*candidates(find_model(model), known["dtype"], "cuda", fixed)], 12):
        assert known["ranks"][" ".join(planner.config(estimate))] == list(PlanOption(estimate, 0).rank)
        for phase, (key, at) in planner.places(estimate).items():
            weights, tensors, workspace = known[phase][key][at]
            assert abs(sum(known["weights"][weights]) + tensors + workspace - estimate.by_phase[phase] / 1024) < 5, (estimate, phase)


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


@pytest.mark.browser
def test_a_visitor_sees_what_plan_vram_answers(opened):
    assert opened.locator("#planner-verdict").inner_text().startswith("✗ Does not fit: sdxl-base, fp16, 1 image of 1024 × 1024")
    plan = plan_vram("sdxl-base", "8GB")
    rows = [row.split("\t") for row in opened.locator("#planner-table tbody tr").all_inner_texts()]
    assert [row[0].strip() for row in rows] == [o.label for o in plan.options]
    for row, option in zip(rows, plan.options):
        assert abs(mib(row[1]) - option.estimate.peak_allocated / 2**20) < 60 and row[2] == option.estimate.peak_phase
    opened.get_by_role("button", name=plan.best.label, exact=True).click()
    assert opened.locator("#planner-verdict").inner_text().startswith(f"✓ Fits: sdxl-base, {plan.best.label}")


@pytest.mark.browser
def test_the_controls_move_by_keyboard_and_the_code_beside_them_gives_the_same(opened):
    opened.get_by_label("Model").select_option("sd15")
    opened.get_by_role("slider", name="Image").press("Home")
    opened.get_by_label("Weights").select_option("nf4")
    assert "sd15, fp16, nf4, 1 image of 512 × 512" in opened.locator("#planner-verdict").inner_text()
    assert opened.get_by_label("Offload").evaluate("e => [...e.options].filter(o => o.disabled).length") == 0
    before = shown(opened)
    assert abs(before - eval(opened.locator("#planner-code").inner_text(), {"estimate_vram": estimate_vram}).peak_allocated / 2**20) < 60
    opened.get_by_label("At a time").press("ArrowRight")
    assert opened.get_by_label("At a time").get_attribute("aria-valuetext") == "2 images" and shown(opened) > before
    opened.get_by_label("Budget").press("Home")
    opened.get_by_label("At a time").press("End")
    opened.get_by_role("slider", name="Image").press("End")
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
    opened.get_by_label("Model").select_option("flux1-dev")
    opened.get_by_label("At a time").press("End")
    opened.get_by_label("Budget").press("Home")
    assert not opened.locator("#planner-table").is_visible()
    said = opened.locator("#planner-count").inner_text()
    assert said.startswith("Nothing fits. The least is bf16, sequential offload, VAE slicing: 3.6 GiB")


@pytest.mark.browser
@pytest.mark.usefixtures("site")
def test_the_page_works_from_a_folder_on_a_narrow_dark_screen(browser):
    with open_page(browser, viewport={"width": 360, "height": 740}, color_scheme="dark") as (page, complaints):
        page.goto((SITE / "planner.html").as_uri())
        assert page.locator("#planner-table tbody tr").count() > 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#planner-table").bounding_box()["width"] <= page.locator("main").bounding_box()["width"]
    assert complaints == []
