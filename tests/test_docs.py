"""The front page and the links of all pages; tools/docs.py, showdoc.py and readme.py: pages of one name in several folders, the
order of the sidebars, what is shown of a definition, in a lesson and in the reference."""
import io, json, re, runpy, shlex
from pathlib import Path

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import devsky_nb, readme, showdoc
from devsky_nb import ImagePolicy, ImageSetContract, VramMonitor, cli, estimate_vram

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


def terminal_lines(page):
    "Calls of `devsky` in the shell blocks of a page."
    if page.suffix == ".ipynb": text = "\n\n".join(c.source for c in nbformat.read(page, as_version=4).cells if c.cell_type == "markdown")
    else: text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in re.findall(r"^(?:\w+=\w+ )?devsky (.+)$", block, re.MULTILINE)]


def test_every_call_that_a_page_shows_is_one(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    shown = {(page.name, line) for page in [*WRITTEN, *NOTEBOOKS] for line in terminal_lines(page)}
    assert len(shown) > 20
    for page, line in shown:
        words = shlex.split(line, comments=True)
        try: assert cli.parse_arguments(cli.make_parser(), words).command == words[0]
        except SystemExit: pytest.fail(f"{page} shows a call that is none: devsky {line}")


def test_the_front_page_leads_to_every_guide_and_the_notebooks_page_to_every_notebook():
    front, book = ROOT / "nbs" / "index.ipynb", ROOT / "nbs" / "notebooks.ipynb"
    guides = {p for p in NOTEBOOKS if p.parent.name == "tutorials"}
    assert {*guides, book, ROOT / "nbs" / "start.ipynb"} - {*links(front).values()} == set()
    assert {*NOTEBOOKS} - {*links(book).values()} - {front, book} == set()


def test_the_page_of_the_package_index_has_absolute_links():
    absolute = runpy.run_path(str(ROOT / "setup.py"), run_name="")["for_package_index"]
    page = absolute((ROOT / "README.md").read_text(encoding="utf-8"))
    targets = re.findall(r"(!?)\[[^][]*\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    assert len(targets) > 20 and all(re.match("https?://", target) for _, target in targets)
    ours = "https://github.com/devsky-nb/devsky_nb/"
    for is_image, target in targets:
        if not target.startswith((f"{ours}blob/", f"{ours}raw/")): continue
        kind, branch, file = target.removeprefix(ours).split("/", 2)
        assert (ROOT / file).is_file() and (kind, branch) == ("raw" if is_image else "blob", "main"), target
    told = "[a](b/c.md) ![p](d.png) [`x`](e.py) `[f](g)` [h](#i) [j](https://k)\n```\nl[0](m)\n```\n"
    assert absolute(told) == (f"[a]({ours}blob/main/b/c.md) ![p]({ours}raw/main/d.png) [`x`]({ours}blob/main/e.py) `[f](g)` [h](#i) [j](https://k)\n"
                              "```\nl[0](m)\n```\n")


def test_the_notebooks_page_names_all_that_is_public():
    rows = [line.split("|") for line in prose(ROOT / "nbs" / "notebooks.ipynb").splitlines() if line.startswith("|")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[2])) == sorted(devsky_nb.__all__)


def test_the_rates_of_the_front_page_are_those_of_the_benchmark():
    measured = json.loads((ROOT / "benchmarks" / "embedding.json").read_text(encoding="utf-8"))
    sides = {"devsky_nb, int8": ("devsky_nb int8", "devsky_nb auto"), "devsky_nb, fp32": ("devsky_nb", "devsky_nb fp32"),
             "fastembed, int8": ("fastembed, int8",) * 2, "fastembed, fp32": ("fastembed",) * 2, "open_clip, fp32": ("open_clip",) * 2,
             "sentence-transformers, fp32": ("sentence-transformers",) * 2, "plain transformers, fp32": ("document",) * 2}
    rows = re.findall(r"^\| ([\w, -]+) \| \W*([\d.]+|–)\W* \| \W*([\d.]+)\W* \|$", prose(ROOT / "nbs" / "index.ipynb"), re.MULTILINE)
    assert {row[0] for row in rows} == {*sides}
    for name, *rates in rows:
        for kind, side, rate in zip(("vnni", "avx2"), sides[name], rates):
            found = measured[kind]["sides"].get(side)
            assert rate == (f"{found['images_per_second']['1600x1200']['median']:.1f}" if found else "–"), (name, kind)


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


def test_the_sidebars_show_guides_by_task_and_parts_in_reading_order(docs, processed):
    for name in ("review_code", "zebra", "check_a_catalogue", "practices_verified"):
        path = processed / "tutorials" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(), path)
    start, book, reference = docs.sidebars(processed)["website"]["sidebar"]
    guides = ["tutorials/check_a_catalogue.ipynb", "tutorials/review_code.ipynb", "tutorials/zebra.ipynb"]
    assert start["contents"] == ["start.ipynb", {"section": "Guides", "contents": guides}, {"text": "Planner", "href": "planner.qmd"},
                                 "tutorials/practices_verified.ipynb"]
    def page(text, href): return {"text": text, "href": href}
    assert book["contents"] == ["notebooks.ipynb",
                                {"section": "Hub: get a model", "contents": [page("Pins", "hub/01_pins.ipynb"), page("Load", "hub/02_load.ipynb")]},
                                {"section": "Images: read them", "contents": [page("Load", "images/01_load.ipynb")]},
                                {"section": "Zoo", "contents": [page("B", "zoo/10_b.ipynb"), page("A", "zoo/9_a.ipynb")]},
                                page("The command devsky", "03_cli.ipynb")]
    assert reference["contents"][0] == "reference/index.qmd" and len(reference["contents"]) > 10


def test_every_public_name_has_a_page_of_the_reference_and_nothing_else_has(docs):
    listed = docs.reference_names()
    assert {*devsky_nb.__all__} <= {name for names in listed.values() for name in names}
    assert listed["embedding"].index("embed_images") < listed["embedding"].index("scale_plan"), "what devsky_nb offers comes first"
    assert not any(name.startswith("_") for names in listed.values() for name in names)


def test_a_page_of_the_reference_says_parameters_errors_and_methods_once():
    shown = showdoc.reference("estimate_vram")
    assert shown.count("| `guidance` |") == 1 and "Args:" not in shown and "Raises:" not in shown
    assert "from devsky_nb import estimate_vram" in shown and "default `'fp16'` |" in shown and "\n- [`ValidationError`](/reference/ValidationError.html): " in shown
    assert "int \\| None" in shown and "def estimate_vram(\n    model,\n" in shown and "memory/estimate.html#estimate_vram" in shown
    of_class = showdoc.reference("VramMonitor")
    assert "## phase {#vrammonitor.phase}" in of_class and "devsky_nb/memory/monitor.py#L" in of_class
    assert "from devsky_nb.images.sources import open_source" in showdoc.reference("open_source")


def test_a_lesson_shows_what_is_called_and_leads_to_the_reference():
    shown = showdoc.Renderer(estimate_vram)._repr_markdown_()
    assert "### estimate_vram" in shown and "(/reference/estimate_vram.html)" in shown and "| `guidance` |" not in shown
    for sym, name in ((VramMonitor.phase, "VramMonitor.phase"), (ImageSetContract.from_yaml, "ImageSetContract.from_yaml")):
        rendered = showdoc.Renderer(sym)
        assert rendered.name == name and rendered.sym.__module__.startswith("devsky_nb.") and f"### {name}\n" in rendered._repr_markdown_()
    assert '<a id="imagepolicy.memory_cap"></a>`memory_cap`: ' in showdoc.Renderer(ImagePolicy)._repr_markdown_()
    assert showdoc.reference_page("VectorIndex.search") == "/reference/VectorIndex.html#vectorindex.search"


@pytest.mark.parametrize("source, outputs, mark", [
    ("test_eq(1, 1)\nfor x in y: test_fail(x)\nassert x", [], "✓ tested: 3 assertions"), ("np.testing.assert_allclose(a, b)", [], "✓ tested: 1 assertion"),
    ("import a\n\nfrom b import (c,\n  d)", [], "imports"), ("import a\nfrom b import c", [], None), ("import a\n\n\nx = a", [], None),
    ("test_eq(1, 1)\nx", ["1"], None), ("x = 1", [], None), ("test_it = 1", [], None), ("%%bash\nassert", [], None), ("#| echo: false\ntest_eq(1, 1)", [], None)])
def test_assertions_that_show_nothing_and_long_imports_are_folded_under_a_mark(source, outputs, mark):
    cell = new_code_cell(source, outputs=outputs and [new_output("execute_result", {"text/plain": "1"})])
    showdoc.fold(cell)
    assert cell.source == (f'#| code-fold: true\n#| code-summary: "{mark}"\n{source}' if mark else source)


def test_badges_say_what_settings_and_workflows_say(monkeypatch, tmp_path):
    text = readme.badges()
    assert "devsky-nb/devsky_nb/actions/workflows/test.yml/badge.svg" in text and "python-3.11%20or%20newer" in text and "Apache--2.0" in text
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert "actions" not in readme.badges() and "python" in readme.badges(), "a repository without the workflow has no badge of it"


def test_what_is_said_of_a_parameter_is_text():
    assert showdoc.as_text("an *image*, <b>_new_ | `a | *b*`", cell=True) == r"an \*image\*, &lt;b>\_new\_ \| `a \| *b*`"
    assert showdoc.sections("What.\n\nMore.\n\nRaises:\n    A: one\n        more\n    B: two") == {"": "What.\n\nMore.", "Raises": "A: one\n    more\nB: two"}
    assert showdoc.entries("A: one\n    more\nB: two") == {"A": "one more", "B": "two"}
