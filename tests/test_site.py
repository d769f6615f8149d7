"The built site: every page, link, anchor and image, and what a reader does with it in a real browser."
import ast, re
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from browser import SITE, open_page
from devsky_nb._modidx import d as INDEX

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("notebooks", "errors", "device", "core", "hub", "images", "embedding", "validation", "memory", "diffusion", "doctor", "demo", "ui", "training",
         "cli")
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
OWN_FILES = "https://github.com/devsky-nb/devsky_nb/blob/main/"
pytestmark = pytest.mark.browser


def page_of(notebook):
    "The page of a notebook: its name without the number."
    return notebook.relative_to(ROOT / "nbs").with_name(re.sub(r"^\d+[a-z]*_", "", notebook.stem) + ".html").as_posix()


@pytest.fixture(scope="module")
def pages(site):
    "Every page, parsed."
    return {p.relative_to(SITE).as_posix(): BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in SITE.rglob("*.html")}


def test_every_notebook_has_a_page_and_every_page_a_place_in_a_sidebar(pages):
    def listed(name): return [urljoin(f"https://site/{name}", a["href"])[13:] for a in pages[name].select("#quarto-sidebar a[href$='.html']")]
    start, book, reference = listed("start.html"), listed("notebooks.html"), listed("reference/index.html")
    by_part = {part: [page_of(p) for p in NOTEBOOKS if page_of(p).removesuffix(".html").partition("/")[0] == part] for part in PARTS}
    assert book == [page for found in by_part.values() for page in found]
    assert start[:2] == ["start.html", "tutorials/embed_a_million_images.html"] and {"planner.html", "tutorials/practices_verified.html"} <= {*start}
    assert len({*start, *book, *reference}) == len([*start, *book, *reference]), "no page is in two of them"
    assert {*start, *book, *reference, "index.html"} == {*pages}
    assert {page_of(p) for p in NOTEBOOKS} < {*pages}


def test_every_link_leads_somewhere(pages):
    anchors = {name: {t["id"] for t in page.find_all(id=True)} for name, page in pages.items()}
    for name, page in pages.items(): anchors[name] |= {t["name"] for t in page.find_all("a", {"name": True})}
    broken = []
    for name, page in pages.items():
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
            for link in (t[attribute] for t in page.find_all(tag, {attribute: True})):
                url = urlsplit(link)
                if link.startswith(OWN_FILES):
                    file = ROOT / unquote(url.path.partition("/blob/main/")[2])
                    if not file.is_file(): broken.append((name, link, "no such file in the repository"))
                elif url.scheme in ("http", "https"):
                    is_loaded = tag in ("img", "script") or tag == "link" and "stylesheet" in str(page.find(tag, {attribute: link}))
                    if is_loaded or not re.fullmatch(r"[\w.-]+\.[a-z]{2,}", url.netloc): broken.append((name, link, "not on this site"))
                elif url.scheme == "data" or not link: continue
                elif url.scheme: broken.append((name, link, "not a link"))
                else:
                    target = unquote(urlsplit(urljoin(f"/{name}", url.path)).path if url.path else f"/{name}")[1:] or "index.html"
                    if not (SITE / target).is_file(): broken.append((name, link, "no such file"))
                    elif url.fragment and unquote(url.fragment) not in anchors.get(target, {unquote(url.fragment)}):
                        broken.append((name, link, "no such anchor"))
    assert broken == []


def test_own_pages_are_linked_within_the_site(pages):
    own = re.compile(r"https://[\w-]+\.github\.io/devsky_nb")
    assert [(name, a["href"]) for name, page in pages.items() for a in page.select("main a[href]") if own.match(a["href"])] == []


def test_every_image_says_what_it_shows(pages):
    silent = [(name, str(i)[:80]) for name, page in pages.items() for i in page.find_all("img") if not (i.get("alt") or "").strip()]
    assert silent == [], 'the cell needs `#| fig-alt: "..."` as its first line, or the output an alt text'


def test_definitions_stand_in_the_order_of_their_module(pages):
    for module, names in INDEX["syms"].items():
        if not names: continue
        page = pages[next(iter(names.values()))[0].partition("#")[0]]
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        defined = [n.name.lower() for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        shown = [h["id"] for h in page.select("main h3[id]") if f"{module}.{h.get_text().strip()}" in names and h["id"] in defined]
        assert shown == sorted(shown, key=defined.index), module


def test_every_public_name_is_on_its_page_with_a_link_to_its_source(pages):
    entries = {name: where for names in INDEX["syms"].values() for name, (where, _) in names.items()}
    ids = {name: {t["id"] for t in page.find_all(id=True)} for name, page in pages.items()}
    assert [name for name, where in entries.items() if where.partition("#")[2] not in ids[where.partition("#")[0]]] == []
    of_modules = [name for module, names in INDEX["syms"].items() for name in names if "." not in name.removeprefix(f"{module}.")]
    in_reference = {name.rpartition(".")[2] for name in of_modules if not name.startswith("devsky_nb.cli")}
    assert in_reference | {"index", "devsky"} == {Path(name).stem for name in pages if name.startswith("reference/")}
    links = [a for page in pages.values() for a in page.select("main a") if a.string == "source"]
    sources = [a["href"] for a in links if a["href"].startswith(OWN_FILES)]
    assert len(of_modules) > 60 and len(sources) >= len(of_modules)
    assert [link for link in sources if not re.fullmatch(re.escape(OWN_FILES) + r"devsky_nb/(\w+/)?\w+\.py#L\d+", link)] == []


def test_parameters_are_a_table_and_are_said_once(pages):
    table = pages["reference/estimate_vram.html"].select_one("main table")
    rows = {row.find("td").get_text(): row.get_text() for row in table.select("tr") if row.find("td")}
    assert {"model", "dtype", "quant", "batch"} <= {*rows} and "str, default 'fp16'" in rows["dtype"]
    heading = re.compile(r"^\s*(Args|Attributes|Returns|Raises):$", re.MULTILINE)
    assert [name for name, page in pages.items() if heading.search(page.find("main").get_text())] == []


CUT_OFF = """() => {
    const scrolls = (e) => e && e.tagName !== "MAIN"
        && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const cut = (e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e);
    return [...document.querySelectorAll("main *")].filter(cut).map((e) => e.outerHTML.slice(0, 80));
}"""


def test_no_page_complains_and_none_is_cut_off_on_a_telephone(site, pages, browser):
    cut_off = {}
    with open_page(browser, viewport={"width": 360, "height": 740}) as (page, complaints):
        for name in pages:
            page.goto(site + name)
            if cut := page.evaluate(CUT_OFF): cut_off[name] = cut[:3]
    assert (complaints, cut_off) == ([], {})


def test_search_finds_a_function_and_leads_to_it(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site)
        page.get_by_role("searchbox", name="Search").fill("embed_images")
        first = page.locator(".smalldocs-search-results a").first
        first.wait_for()
        assert "embed_images" in first.inner_text()
        first.click()
        page.wait_for_url(re.compile(r"/reference/embed_images\.html"))
        top = page.get_by_text("from devsky_nb import embed_images").bounding_box()["y"]
        assert top < 400 and page.locator("main table").first.is_visible()
    assert complaints == []


GUIDE = "tutorials/"
FIRST_QUESTIONS = {  # what people ask first, and the pages that may come first
    "install": ["start.html#install"], "quickstart": ["start.html", "start.html#two-minutes"],
    "How do I embed a million images?": [f"{GUIDE}embed_a_million_images.html"],
    "FLUX": ["planner.html", f"{GUIDE}fit_a_model.html"], "GPU": ["planner.html", f"{GUIDE}fit_a_model.html"],
    "will FLUX fit into 12 GB": ["planner.html", f"{GUIDE}fit_a_model.html"],
    "what does 4 bits cost": [f"{GUIDE}four_bits_in_images.html"], "quantize": [f"{GUIDE}quantize.html"],
    "find mislabelled products": [f"{GUIDE}check_a_catalogue.html"], "delete models cache full": [f"{GUIDE}keep_a_cache_healthy.html"],
    "check my code in CI": [f"{GUIDE}review_code.html"], "embed_images": ["reference/embed_images.html"], "VectorIndex.search": ["reference/VectorIndex.html#vectorindex.search"]}


@pytest.mark.parametrize("question", FIRST_QUESTIONS)
def test_search_answers_what_people_ask_first(site, browser, question):
    with open_page(browser, viewport={"width": 1366, "height": 800}) as (page, complaints):
        page.goto(site)
        page.get_by_role("searchbox", name="Search").fill(question)
        first = page.locator(".smalldocs-search-results a").first
        first.wait_for()
        found = first.get_attribute("href").removeprefix("./")
        assert found in FIRST_QUESTIONS[question] or found.partition("#")[0] in FIRST_QUESTIONS[question]
    assert complaints == []


def test_misspelt_words_are_found_all_the_same(site, browser):
    with open_page(browser) as (page, _):
        page.goto(site)
        page.get_by_role("searchbox", name="Search").fill("quantisaton")
        page.locator(".smalldocs-search-results a").first.wait_for()


@pytest.mark.parametrize("wish, heading", [("embed a million images", "Embed a million images"), ("check a catalogue", "Check a catalogue"), ("fit a model into your GPU", "Fit "),
                                           ("quantize", "Quantize"), ("keep a cache healthy", "Keep a cache healthy"), ("review code", "Review code")])
def test_each_wish_of_the_home_page_is_one_click_away_and_in_the_menu(site, browser, wish, heading):
    with open_page(browser, viewport={"width": 1366, "height": 800}) as (page, complaints):
        page.goto(site)
        link = page.locator("main table").first.get_by_role("link", name=wish, exact=True)
        assert link.bounding_box()["y"] < 800, "it is seen without scrolling"
        page.get_by_role("link", name="Guides", exact=True).click()
        of_menu = page.locator(".navbar .dropdown-menu a", has_text=re.compile(f"^\\s*{heading}", re.IGNORECASE))
        assert of_menu.get_attribute("href").removeprefix("./") == link.get_attribute("href").removeprefix("./")
        of_menu.click()
        assert page.locator("h1").inner_text().startswith(heading)
    assert complaints == []


def test_assertions_are_folded_and_open(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site + "tutorials/check_a_catalogue.html")
        mark = page.get_by_text(re.compile("tested: 2 assertions")).first
        code = page.locator("details.code-fold pre", has_text="test_eq((report.total").first
        assert not code.is_visible()
        mark.click()
        assert code.is_visible()
    assert complaints == []


CODE_CUT_OFF = "() => [...document.querySelectorAll('main pre')].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText.slice(0, 80))"


def test_no_block_of_code_is_cut_off_on_a_laptop(site, pages, browser):
    cut_off = {}
    with open_page(browser, viewport={"width": 1366, "height": 800}) as (page, _):
        for name in pages:
            page.goto(site + name)
            if cut := page.evaluate(CODE_CUT_OFF): cut_off[name] = cut[:2]
    assert cut_off == {}


def part(page, name):
    "A part in the sidebar."
    return page.locator("#quarto-sidebar .sidebar-item-section").filter(has=page.get_by_text(name, exact=True))


def test_the_sidebar_and_the_next_page_lead_through_the_notebooks(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site)
        page.locator(".navbar").get_by_role("link", name="Notebooks", exact=True).click()
        hub = part(page, "Hub: get a model")
        link = hub.get_by_role("link", name="Registry", exact=True)
        assert not link.is_visible(), "parts are folded until one is opened"
        hub.get_by_text("Hub: get a model", exact=True).click()
        link.click()
        page.wait_for_url("**/hub/registry.html")
        assert page.locator("h1").inner_text() == "registry"
        page.locator(".nav-page-next a").click()
        page.wait_for_url("**/images/*.html")
        page.go_back()
        page.locator("#TOC a", has_text="ModelRegistry").first.click()
        page.wait_for_url("**/hub/registry.html#modelregistry*")
    assert complaints == []


def test_the_menu_of_a_narrow_screen_opens_and_leads_on(site, browser):
    with open_page(browser, viewport={"width": 360, "height": 740}) as (page, complaints):
        page.goto(site + "tutorials/quantize.html")
        link = page.locator("#quarto-sidebar").get_by_role("link", name="Review code", exact=True)
        assert not link.is_visible()
        page.get_by_role("button", name=re.compile("sidebar", re.IGNORECASE)).first.click()
        first = page.locator("#quarto-sidebar a").first
        first.wait_for()
        assert first.bounding_box()["y"] >= page.locator("#quarto-header").bounding_box()["height"], "the header covers no entry"
        link.click()
        assert page.locator("h1").inner_text() == "Review code"
    assert complaints == []


def brightness(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_reader_and_the_switch(site, browser, scheme):
    with open_page(browser, color_scheme=scheme) as (page, complaints):
        page.goto(site + "errors.html")
        assert (brightness(page) > 380) == (scheme == "light")
        page.locator(".quarto-color-scheme-toggle").first.click()
        page.goto(site + "memory/estimate.html")
        assert (brightness(page) > 380) == (scheme == "dark"), "the choice is kept on the next page"
    assert complaints == []
