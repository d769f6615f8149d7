"The built site: every page, link, anchor and picture, and what a reader does with it in a real browser."
import re
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

from browser import SITE, open_page
from devsky_nb._modidx import d as INDEX
from devsky_nb.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
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


def test_every_notebook_has_a_page_and_stands_in_the_sidebar_in_order(pages):
    listed = [a["href"] for a in pages["index.html"].select("#quarto-sidebar a[href$='.html']")]
    tutorials = [page_of(p) for p in NOTEBOOKS if p.parent.name == "tutorials"]
    lessons = [page_of(p) for p in NOTEBOOKS if p.parent.name == "nbs" and p.stem != "index"]
    assert set(listed) == {"index.html", "planner.html", *lessons, *tutorials} == set(pages)
    assert [h for h in listed if h in lessons] == lessons and [h for h in listed if h in tutorials] == tutorials


def test_every_link_leads_somewhere(pages):
    anchors = {name: {t["id"] for t in page.find_all(id=True)} | {t["name"] for t in page.find_all("a", {"name": True})} for name, page in pages.items()}
    broken = []
    for name, page in pages.items():
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
            for link in (t[attribute] for t in page.find_all(tag, {attribute: True})):
                url = urlsplit(link)
                if link.startswith(OWN_FILES):
                    if not (ROOT / unquote(url.path.partition("/blob/main/")[2])).is_file(): broken.append((name, link, "no such file in the repository"))
                elif url.scheme in ("http", "https"):
                    if tag in ("img", "script") or tag == "link" and "stylesheet" in str(page.find(tag, {attribute: link})) or not re.fullmatch(r"[\w.-]+\.[a-z]{2,}", url.netloc):
                        broken.append((name, link, "not on this site"))
                elif url.scheme == "data" or not link: continue
                elif url.scheme: broken.append((name, link, "not a link"))
                else:
                    target = unquote(urlsplit(urljoin(f"/{name}", url.path)).path if url.path else f"/{name}")[1:] or "index.html"
                    if not (SITE / target).is_file(): broken.append((name, link, "no such file"))
                    elif url.fragment and target in anchors and unquote(url.fragment) not in anchors[target]: broken.append((name, link, "no such anchor"))
    assert broken == []


def test_own_pages_are_linked_within_the_site(pages):
    own = re.compile(r"https://[\w-]+\.github\.io/devsky_nb")
    assert [(name, a["href"]) for name, page in pages.items() for a in page.select("main a[href]") if own.match(a["href"])] == []


def test_every_picture_says_what_it_shows(pages):
    silent = [(name, str(i)[:80]) for name, page in pages.items() for i in page.find_all("img") if not (i.get("alt") or "").strip()]
    assert silent == [], 'the cell needs `#| fig-alt: "..."` as its first line, or the output an alt text'


def test_definitions_stand_in_the_order_of_their_module(pages):
    source = (ROOT / "devsky_nb" / "cli.py").read_text(encoding="utf-8")
    defined, shown = re.findall(r"^def (\w+)", source, re.MULTILINE), [h["id"] for h in pages["cli.html"].select("main h3[id], main h2[id]")]
    documented = [name for name in shown if name in defined and name not in COMMANDS]  # a command has a section of its name before it
    assert len(documented) > 15 and documented == sorted(documented, key=defined.index)


def test_every_public_name_is_on_its_page_with_a_link_to_its_source(pages):
    entries = {name: where for names in INDEX["syms"].values() for name, (where, _) in names.items()
               if not any(part.startswith("_") for part in name.split(".")[2:])}
    assert len(entries) > 500
    ids = {name: {t["id"] for t in page.find_all(id=True)} for name, page in pages.items()}
    assert [name for name, where in entries.items() if where.partition("#")[2] not in ids[where.partition("#")[0]]] == []
    classes_and_functions = [where for name, where in entries.items() if name.count(".") == 2]
    sources = [a["href"] for page in pages.values() for a in page.select("main a") if a.string == "source" and a["href"].startswith(OWN_FILES)]
    assert len(sources) >= len(classes_and_functions)
    assert [link for link in sources if not re.fullmatch(re.escape(OWN_FILES) + r"devsky_nb/\w+\.py#L\d+", link)] == []


CUT_OFF = """() => {
    const scrolls = (e) => e && e.tagName !== "MAIN" && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    return [...document.querySelectorAll("main *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e)).map((e) => e.outerHTML.slice(0, 80));
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
        page.wait_for_url(re.compile(r"/bulk\.html(\?[^#]*)?#embed_images"))
        assert page.locator("#embed_images").first.is_visible()
    assert complaints == []


def test_the_sidebar_and_the_next_page_lead_through_the_notebooks(site, browser):
    with open_page(browser) as (page, complaints):
        page.goto(site)
        page.locator("#quarto-sidebar").get_by_role("link", name="registry", exact=True).click()
        assert page.locator("h1").inner_text() == "registry"
        page.locator(".nav-page-next a").click()
        assert page.locator("h1").inner_text() == "garments"
        page.locator("#TOC a", has_text="zero_shot").first.click()
        page.wait_for_url("**/garments.html#zero_shot*")
    assert complaints == []


def test_the_menu_of_a_narrow_screen_opens_and_leads_on(site, browser):
    with open_page(browser, viewport={"width": 360, "height": 740}) as (page, complaints):
        page.goto(site)
        link = page.locator("#quarto-sidebar").get_by_role("link", name="clip", exact=True)
        assert not link.is_visible()
        page.get_by_role("button", name=re.compile("sidebar", re.IGNORECASE)).first.click()
        first = page.locator("#quarto-sidebar a").first
        first.wait_for()
        assert first.bounding_box()["y"] >= page.locator("#quarto-header").bounding_box()["height"], "the header covers no entry"
        link.click()
        assert page.locator("h1").inner_text() == "clip"
    assert complaints == []


def brightness(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_reader_and_the_switch(site, browser, scheme):
    with open_page(browser, color_scheme=scheme) as (page, complaints):
        page.goto(site + "clip.html")
        assert (brightness(page) > 380) == (scheme == "light")
        page.locator(".quarto-color-scheme-toggle").first.click()
        page.goto(site + "vram.html")
        assert (brightness(page) > 380) == (scheme == "dark"), "the choice is kept on the next page"
    assert complaints == []
