"The page of a report in a real browser: opened as a file, without a network, by mouse and by keyboard."
import csv, json, time

import numpy as np, pytest
from PIL import Image

from browser import open_page
from devsky_nb.demo.catalogue import write_catalogue
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.validation.account import Embeddings
from devsky_nb.validation.contract import ImageSetContract
from devsky_nb.validation.report import MAX_THUMBNAILS, ValidationReport, check_image_set

pytestmark = pytest.mark.browser
EVIL = "</script><img src=x onerror=document.title='hacked'><b>bold</b>"


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    "A catalogue of 60, one of whose ids is an attack and one is long; its dresses may not be there."
    image_set = write_catalogue(tmp_path_factory.mktemp("catalogue"), n=60)
    image_set["images"][3]["id"] = EVIL
    image_set["images"][4]["id"] = "autumn-" * 40
    labels = {entry["label"] for entry in image_set["images"]} - {"dress"}
    return check_image_set(image_set, tiny, ImageSetContract(labels=sorted(labels)))


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    return report.to_html(tmp_path_factory.mktemp("report") / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    with open_page(browser, viewport={"width": 1366, "height": 900}, permissions=["clipboard-read", "clipboard-write"]) as (page, complaints):
        page.goto(address)
        yield page
    assert complaints == []


def test_images_are_found_by_text_status_and_label(page, report):
    said = page.locator("#said")
    assert said.text_content() == "60 of 60 images" and page.title() != "hacked"
    page.get_by_label("search").fill("sku-01")
    assert said.text_content() == "10 of 60 images"
    page.get_by_label("search").fill("TRUNCATED file")
    assert said.text_content().startswith(f"{sum('truncated' in e['error'] for e in report.results['errors'])} of")
    page.get_by_label("search").fill("")
    page.get_by_label("show").select_option(label=f"failed ({report.counts['error']})")
    assert page.locator("#rows tr").count() == report.counts["error"] and page.locator("#pictures li").count() == 0
    page.get_by_label("show").select_option(value="")
    page.locator("#label").select_option(label="dress")
    assert set(page.locator("#pictures .label").all_text_contents()) == {"dress"}
    page.get_by_label("search").fill("nothing is like that")
    assert "search for less" in said.text_content() and page.locator("#copy").is_disabled()


def test_numbers_lead_to_what_they_count(page, report):
    ready, broken = len(report.accepted()), report.counts["embedded"] - len(report.accepted())
    for count in (ready, broken):
        page.locator(".tiles").get_by_role("link", name=str(count), exact=True).first.click()
        assert page.locator("#said").text_content() == f"{count} of 60 images" and page.url.endswith("#all")
    assert ready > broken > 0 and set(page.locator("#pictures .label").all_text_contents()) == {"dress"}


def test_untrusted_text_is_text_everywhere(page):
    page.get_by_label("search").fill("onerror")
    assert page.locator("#pictures b").text_content() == EVIL
    page.locator("#pictures .zoom").click()
    assert page.locator("#one-name").text_content() == EVIL
    assert page.locator("#one-name *, #pictures b *").count() == 0 and page.title() != "hacked"


def test_an_image_is_enlarged_and_the_next_is_reached_by_keyboard(page, report):
    page.locator("#pictures .zoom").nth(1).focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    first = page.locator("#one-name").text_content()
    assert dialog.is_visible() and dialog.locator("img").bounding_box()["width"] > 250
    page.keyboard.press("ArrowRight")
    assert page.locator("#one-name").text_content() != first
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Copy id").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.closest('li').querySelector('b').textContent") == first  # back where one was


def test_findings_open_the_same_view(page, report):
    page.locator("#wrong .zoom").first.click()
    assert page.get_by_role("dialog").locator("dl").text_content().count("looks like") == 1
    assert "perhaps mislabelled" in page.locator("#one-kinds").text_content()


def test_ids_are_copied_as_they_are_found(page, report):
    page.get_by_label("show").select_option(label=f"failed ({report.counts['error']})")
    page.locator("#copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()").split("\n")
    assert copied == [row["id"] for row in report.to_dict()["images"] if row["status"] == "error"]


def test_what_was_accepted_is_downloaded_as_the_report_writes_it(page, report, tmp_path):
    for kind in ("csv", "json"):
        with page.expect_download() as download: page.locator(f"#{kind}").click()
        download.value.save_as(tmp_path / f"page.{kind}")
        assert download.value.suggested_filename == f"accepted.{kind}"
        report.to_accepted(tmp_path / f"report.{kind}")
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8")) == report.accepted()
    tables = [list(csv.reader((tmp_path / f"{name}.csv").open(encoding="utf-8", newline=""))) for name in ("page", "report")]
    assert tables[0] == tables[1] and len(tables[0]) == len(report.accepted()) + 1


@pytest.mark.parametrize("width", [1366, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_out_of_its_place(browser, address, width, scheme):
    with open_page(browser, viewport={"width": width, "height": 844}, color_scheme=scheme) as (page, complaints):
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        over = "[...document.querySelectorAll('.box *, dd, th, td')].filter(e => e.getBoundingClientRect().right > e.closest('.box, .table, .tiles').getBoundingClientRect().right + 1).length"
        assert page.evaluate(over) == 0
        page.get_by_label("search").fill("autumn-autumn")
        page.locator("#pictures .zoom").click()
        box = page.get_by_role("dialog").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert complaints == []


def test_without_its_script_the_page_shows_findings_and_images(browser, address):
    with open_page(browser, java_script_enabled=False) as (page, complaints):
        page.goto(address)
        assert page.locator("#pictures li").count() > 40 and page.locator("#wrong li").count() > 0
        assert page.locator("#tools, #one, #table, #more-rows").filter(visible=True).count() == 0
        assert complaints == []


def test_a_page_of_ten_thousand_images_opens_at_once(browser, tiny, tmp_path):
    "Each with a photograph's worth of detail in its thumbnail, a third with a finding."
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).resize((320, 320), Image.Resampling.BICUBIC)
    images = [{"image": photo, "id": f"sku-{i:05}-of-the-autumn-collection", "label": f"label {i % 40}"} for i in range(10_000)]
    wrong = [{"index": i, "label": images[i]["label"], "suggested": "dress", "probability": .97} for i in range(0, 10_000, 3)]
    found = {"label_method": "zero-shot", "wrong_labels": wrong, "duplicates": [], "outliers": [], "warnings": [], "notes": []}
    vectors = Embeddings(np.zeros((10_000, 4), np.float32), np.arange(10_000), images)
    report = ValidationReport({"embeddings": vectors, "errors": [], "failed": 0, "successful": 10_000, "metadata": {}}, found, tiny)
    path = report.to_html(tmp_path / "r.html")
    assert path.stat().st_size < 8_000_000
    best = 60.
    for _ in range(3):
        with open_page(browser, viewport={"width": 1366, "height": 900}) as (page, complaints):
            began = time.monotonic()
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            assert page.locator("#said").text_content() == "10,000 of 10,000 images"
            best = min(best, time.monotonic() - began)
            assert page.evaluate("document.querySelectorAll('*').length") < 6000
            assert page.locator("img").count() < MAX_THUMBNAILS
            page.get_by_label("search").fill("sku-0777")
            assert page.locator("#said").text_content() == "10 of 10,000 images" and complaints == []
    print(f"{path.stat().st_size / 1e6:.1f} MB, usable after {best:.2f} s")
    assert best < 10  # a second where nothing else runs
