"""The front page and the links of all pages; tools/docs.py and tools/showdoc.py: pages of one name in several folders, the order
of the sidebar, what is shown of a definition."""
import re
from pathlib import Path

import nbformat, pytest
from nbformat.v4 import new_markdown_cell, new_notebook

import devsky_nb, showdoc
from devsky_nb import ImagePolicy, ImageSetContract, VramMonitor, estimate_vram

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
WRITTEN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "nbs/planner.qmd")]


def prose(page):
    "What a page says, without code."
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = page.read_text(encoding="utf-8")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links(page):
    "Files that a page links to, by their places in the repository."
    targets = re.findall(r"\]\((?!https?:|#|data:)([^)#\s]+)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return {target: (page.parent / target).resolve() for target in targets}


@pytest.mark.parametrize("page", [*WRITTEN, *NOTEBOOKS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    assert [target for target, file in links(page).items() if not file.is_file()] == []


def test_the_front_page_leads_to_every_notebook_and_names_all_that_is_public():
    front = ROOT / "nbs" / "index.ipynb"
    assert [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p not in links(front).values() and p != front] == []
    rows = [line.split("|") for line in prose(front).splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]
    assert sorted(named) == sorted(devsky_nb.__all__)


@pytest.fixture
def docs():
    return pytest.importorskip("docs", reason="`make docs` installs what it needs", exc_type=ImportError)


@pytest.fixture
def processed(tmp_path):
    "A folder as nbdev prepares it: pages named in the front matter, links to notebooks."
    pages = {"index.ipynb": "[a](hub/02_load.ipynb) [b](images/01_load.ipynb#top) [c](03_cli.ipynb)",
             "03_cli.ipynb": "[a](./hub/02_load.ipynb)",
             "hub/02_load.ipynb": "[b](../images/01_load.ipynb) [p](01_pins.ipynb)",
             "hub/01_pins.ipynb": "![](../images/shirt.png)",
             "images/01_load.ipynb": "[a](../hub/02_load.ipynb) [gone](../hub/09_gone.ipynb)",
             "zoo/10_b.ipynb": "", "zoo/9_a.ipynb": ""}
    for name, text in pages.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        page = path.stem.lstrip("0123456789_")
        cells = [new_markdown_cell(f"---\noutput-file: {page}.html\ntitle: {page}\n---"), new_markdown_cell(text)]
        nbformat.write(new_notebook(cells=cells), path)
    (tmp_path / "sidebar.yml").write_text("- hub/02_load.ipynb\n- images/01_load.ipynb\n", encoding="utf-8")
    (tmp_path / "planner.qmd").write_text("[a](images/01_load.ipynb)\n", encoding="utf-8")
    return tmp_path


def test_links_lead_to_the_page_of_their_own_folder(docs, processed):
    names = docs.rename_pages(processed)
    assert names["hub/load.ipynb"] == "hub/02_load.ipynb" and names["images/load.ipynb"] == "images/01_load.ipynb"
    text = {p.relative_to(processed).as_posix(): nbformat.read(p, as_version=4).cells[1].source for p in processed.rglob("*.ipynb")}
    assert text["index.ipynb"] == "[a](hub/load.ipynb) [b](images/load.ipynb#top) [c](cli.ipynb)"
    assert text["cli.ipynb"] == "[a](./hub/load.ipynb)"
    assert text["hub/load.ipynb"] == "[b](../images/load.ipynb) [p](pins.ipynb)"
    assert text["images/load.ipynb"] == "[a](../hub/load.ipynb) [gone](../hub/09_gone.ipynb)"
    assert (processed / "sidebar.yml").read_text(encoding="utf-8") == "- hub/load.ipynb\n- images/load.ipynb\n"
    assert (processed / "planner.qmd").read_text(encoding="utf-8") == "[a](images/load.ipynb)\n"


def test_two_notebooks_of_a_folder_cannot_make_one_page(docs, processed):
    notebook = nbformat.read(processed / "hub" / "02_load.ipynb", as_version=4)
    nbformat.write(notebook, processed / "hub" / "07_load.ipynb")
    with pytest.raises(SystemExit, match="two notebooks make the page hub/load.html"): docs.rename_pages(processed)


def test_the_sidebar_shows_the_parts_in_reading_order(docs, processed):
    assert docs.sidebar(processed)["website"]["sidebar"]["contents"] == [
        "index.ipynb", "planner.qmd", {"section": "hub", "contents": ["hub/01_pins.ipynb", "hub/02_load.ipynb"]},
        {"section": "images", "contents": ["images/01_load.ipynb"]}, "03_cli.ipynb",
        {"section": "zoo", "contents": ["zoo/10_b.ipynb", "zoo/9_a.ipynb"]}]


def test_a_definition_is_shown_with_a_table_of_its_parameters_once():
    shown = showdoc.Renderer(estimate_vram)._repr_markdown_()
    assert shown.count("`guidance`") == 1 and "Args:" not in shown and "Raises:" not in shown
    assert "### estimate_vram" in shown and "default `'fp16'` |" in shown and "\n- `ValidationError`: " in shown
    assert "int \\| None" in shown and "def estimate_vram(\n    model,\n" in shown


def test_fields_methods_and_decorated_methods_are_found_in_the_package():
    shown = showdoc.Renderer(ImagePolicy)._repr_markdown_()
    assert "| `max_pixels` | " in shown and '<a id="imagepolicy.memory_cap"></a>`memory_cap`: ' in shown
    for sym, name in ((VramMonitor.phase, "VramMonitor.phase"), (ImageSetContract.from_yaml, "ImageSetContract.from_yaml")):
        rendered = showdoc.Renderer(sym)
        assert rendered.name == name and rendered.sym.__module__.startswith("devsky_nb.") and f"### {name}\n" in rendered._repr_markdown_()


def test_what_is_said_of_a_parameter_is_text():
    assert showdoc.as_text("an *image*, <b>_new_ | `a | *b*`", cell=True) == r"an \*image\*, &lt;b>\_new\_ \| `a \| *b*`"
    assert showdoc.sections("What.\n\nMore.\n\nRaises:\n    A: one\n        more\n    B: two") == {"": "What.\n\nMore.", "Raises": "A: one\n    more\nB: two"}
    assert showdoc.entries("A: one\n    more\nB: two") == {"A": "one more", "B": "two"}
