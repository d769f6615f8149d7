"The built site: every page, link, anchor and image, and what a reader does with it in a real browser."
import ast, re
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from browser import SITE, open_page
from devsky_nb._modidx import d as INDEX

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("index", "planner", "errors", "device", "core", "hub", "images", "embedding", "validation", "memory", "diffusion", "doctor",
         "demo", "ui", "cli", "tutorials", "training")
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


def test_every_notebook_has_a_page_and_the_sidebar_shows_the_parts_in_reading_order(pages):
    listed = [a["href"] for a in pages["index.html"].select("#quarto-sidebar a[href$='.html']")]
    by_part = {part: [page_of(p) for p in NOTEBOOKS if page_of(p).removesuffix(".html").partition("/")[0] == part] for part in PARTS}
    assert listed == [page for found in by_part.values() for page in found or ["planner.html"]]
    assert {*listed} == {*pages} and len(listed) == len(NOTEBOOKS) + 1


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
    links = [a for page in pages.values() for a in page.select("main a") if a.string == "source"]
    sources = [a["href"] for a in links if a["href"].startswith(OWN_FILES)]
    assert len(of_modules) > 60 and len(sources) >= len(of_modules)
    assert [link for link in sources if not re.fullmatch(re.escape(OWN_FILES) + r"devsky_nb/(\w+/)?\w+\.py#L\d+", link)] == []


def test_parameters_are_a_table_and_are_said_once(pages):
    table = pages["memory/estimate.html"].find("h3", id="estimate_vram").find_next("table")
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
        page.wait_for_url(re.compile(r"/embedding/bulk\.html(\?[^#]*)?#embed_images"))
        assert page.locator("#embed_images").first.is_visible()
    assert complaints == []


def part(page, name):
    "A part in the sidebar."
    return page.locator("#quarto-sidebar .sidebar-item-section").filter(has=page.get_by_text(name, exact=True))


def test_the_sidebar_and_the_next_page_lead_through_the_notebooks(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site)
        hub = part(page, "hub")
        link = hub.get_by_role("link", name="registry", exact=True)
        assert not link.is_visible(), "parts are folded until one is opened"
        hub.get_by_text("hub", exact=True).click()
        link.click()
        assert page.locator("h1").inner_text() == "registry"
        page.locator(".nav-page-next a").click()
        page.wait_for_url("**/images/*.html")
        page.go_back()
        page.locator("#TOC a", has_text="ModelRegistry").first.click()
        page.wait_for_url("**/hub/registry.html#modelregistry*")
    assert complaints == []


def test_the_menu_of_a_narrow_screen_opens_and_leads_on(site, browser):
    with open_page(browser, viewport={"width": 360, "height": 740}) as (page, complaints):
        page.goto(site)
        link = page.locator("#quarto-sidebar").get_by_role("link", name="errors", exact=True)
        assert not link.is_visible()
        page.get_by_role("button", name=re.compile("sidebar", re.IGNORECASE)).first.click()
        first = page.locator("#quarto-sidebar a").first
        first.wait_for()
        assert first.bounding_box()["y"] >= page.locator("#quarto-header").bounding_box()["height"], "the header covers no entry"
        link.click()
        assert page.locator("h1").inner_text() == "errors"
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
