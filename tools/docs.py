"""Build the site into _docs: nbdev prepares the executed notebooks (nothing is executed but definitions), this file adds the
reference and the navigation, smalldocs renders them.

usage: python tools/docs.py [--prepare]

With Quarto at hand, `python tools/docs.py --prepare && quarto render _proc` renders the same pages from the same _quarto.yml.
"""
import html, json, os, posixpath, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

import showdoc

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("embed_a_million_images", "check_a_catalogue", "fit_a_model", "quantize", "four_bits_in_images", "keep_a_cache_healthy",
          "review_code")  # what people come for, first
PRACTICES = "practices_verified"
PARTS = {"hub": "Hub: get a model", "images": "Images: read them", "embedding": "Embedding: vectors", "validation": "Validation: trust a set",
         "memory": "Memory: will it fit?", "diffusion": "Diffusion: fewer bits", "doctor": "Doctor: review code", "demo": "Demo",
         "ui": "Panels in Jupyter", "training": "Training of the small models"}  # folders of notebooks, in reading order
GROUND = ("errors", "device", "core")  # notebooks on which all parts stand; other single ones come last
ACRONYMS = {"sdxl": "SDXL", "vram": "VRAM", "cli": "The command devsky", "clip": "CLIP", "ask": "Ask a data set", "ray": "Ray", "open_clip": "open_clip",
            "open_clip_texts": "open_clip texts", "tiny_clip": "tiny-clip", "tiny_sdxl": "tiny-sdxl", "rules_clip": "Rules: CLIP"}
SEARCH_WORDS = {  # what people call the thing, where a page has other words for it
    "start": "quickstart quick start getting started installation install setup pip begin hello world",
    "start#install": "install installation pip wheel gpu cuda windows mac macos linux extras offline conda docker",
    "start#two-minutes": "quickstart quick start first steps example",
    "planner": "flux gpu vram fit 8 12 16 24 gb calculator memory budget sdxl wan qwen video model card",
    "tutorials/embed_a_million_images": "million images folder bulk batch big scale cluster ray parquet resume embeddings vectors",
    "tutorials/check_a_catalogue": "mislabelled mislabeled wrong labels duplicates broken corrupt images products data quality clean",
    "tutorials/fit_a_model": "flux gpu vram fit 8 12 16 24 gb cuda out of memory oom sdxl model card offload",
    "tutorials/quantize": "4-bit 8-bit int8 nf4 bitsandbytes gguf torchao quantization bits cost quality",
    "tutorials/four_bits_in_images": "4 bits cost quality quantization nf4 compare difference",
    "tutorials/keep_a_cache_healthy": "cache disk space full delete evict offline prune verify checksum corrupt download hf_home",
    "tutorials/review_code": "lint linter doctor ci pre-commit check code review scan",
    "diffusion/generation": "image-to-image img2img inpainting inpaint mask flux draw generate image from image",
    "diffusion/lora": "lora adapter fine-tuned style weights load quantized",
    "images/tars": "webdataset captions side-cars metadata tar shards json txt cls",
}


def home() -> str:
    "The address of the published site."
    cfg = get_config()
    return f"{cfg.doc_host}{cfg.doc_baseurl}/"


def sidebars(folder: Path) -> dict:
    """The navigation beside the pages: where to start and the guides; the notebooks by parts, in reading order; the reference. A
    folder of notebooks that is not among `PARTS` comes last."""
    pages = sorted(p.relative_to(folder) for p in folder.rglob("*.ipynb"))
    lessons = [p for p in pages if p.parts[0] != "tutorials" and len(p.parts) > 1]
    single = {page_name(p): p for p in pages if len(p.parts) == 1 and page_name(p) not in ("index", "start", "notebooks")}
    others = sorted({p.parts[0] for p in lessons} - {*PARTS})
    book = [{"section": PARTS.get(part, part.capitalize()), "contents": [entry(p) for p in lessons if p.parts[0] == part]} for part in (*PARTS, *others)]
    ground = [entry(single.pop(name)) for name in GROUND if name in single]
    book = [{"section": "Ground: errors, devices", "contents": ground}, *book, *map(entry, single.values())]
    guides = {p.stem: p.as_posix() for p in pages if p.parts[0] == "tutorials" and p.stem != PRACTICES}
    in_order = [guides.pop(name) for name in GUIDES if name in guides]
    start = ["start.ipynb", {"section": "Guides", "contents": [*in_order, *guides.values()]}, {"text": "Planner", "href": "planner.qmd"}, f"tutorials/{PRACTICES}.ipynb"]
    chapters = ["notebooks.ipynb", *(part for part in book if "section" not in part or part["contents"])]
    reference = ["reference/index.qmd", *reference_contents(), "reference/devsky.qmd"]
    bars = {"start": start, "notebooks": chapters, "reference": reference}
    opened = {"start": 2, "notebooks": 1, "reference": 1}  # levels that are open on every page
    return {"website": {"sidebar": [{"id": name, "style": "floating", "collapse-level": opened[name], "contents": contents}
                                    for name, contents in bars.items()]}}


def entry(page: Path) -> dict:
    "A notebook in the sidebar: its name as a title."
    name = page_name(page)
    text = name.replace("rules_", "rules: ").replace("_", " ").capitalize()
    return {"text": ACRONYMS.get(name, text), "href": page.as_posix()}


def part_of(module: str) -> str:
    part = module.split(".")[1]
    return part if part in PARTS else "ground"


def reference_names() -> dict[str, list[str]]:
    "The names that have a page, by parts: first those of `devsky_nb` itself."
    public, found = showdoc.public_names(), {part: [] for part in ("ground", *PARTS)}
    for name, module in showdoc.MODULES.items():
        if "." not in name and module != "devsky_nb.cli": found[part_of(module)].append(name)
    return {part: sorted(names, key=lambda name: (name not in public, name.lower())) for part, names in found.items() if names}


def reference_contents() -> list[dict]:
    return [{"section": part.capitalize() if part != "ui" else "Panels", "contents": [f"reference/{name}.qmd" for name in names]}
            for part, names in reference_names().items()]


def write_reference(folder: Path) -> None:
    "A page for each public name, one that lists them, and one of what `devsky --help` says."
    (folder / "reference").mkdir(exist_ok=True)
    overview = []
    for part, names in reference_names().items():
        rows = [f"| [`{name}`]({name}.qmd) | {showdoc.as_text(showdoc.summary(name), cell=True)} |" for name in names]
        overview += [f"## {part.capitalize() if part != 'ui' else 'Panels'}", "", "| | |", "|---|---|", *rows, ""]
        for name in names: write_page(folder / "reference" / f"{name}.qmd", name, showdoc.reference(name), showdoc.summary(name))
    intro = "What you import, by parts: first what `from devsky_nb import …` offers, then what its module offers. [The command](devsky.qmd) is at the end."
    write_page(folder / "reference" / "index.qmd", "Reference", "\n".join([intro, "", *overview]))
    write_page(folder / "reference" / "devsky.qmd", "The command devsky", "\n\n".join(command_help()))


def write_page(path: Path, title: str, body: str, description: str = "") -> None:
    "A page that is no file of the repository."
    front = {"title": title, "description": description}
    path.write_text(f"---\n{yaml.safe_dump(front, allow_unicode=True)}---\n\n{body}\n", encoding="utf-8")


def command_help(*command: str) -> list[str]:
    "What the command and its subcommands say of themselves."
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    text = subprocess.run([sys.executable, "-m", "devsky_nb", *command, "--help"], env=env, text=True, capture_output=True, check=True).stdout
    has_actions = re.match(r"usage: [^\n]* (COMMAND|ACTION) \.\.\.", text)
    below = re.findall(r"^    (\w+)  +\w", text, re.MULTILINE) if has_actions else []
    head = [f"## devsky {' '.join(command)}"] if command else ["`devsky` is installed with the package. `--json` gives every result to a program."]
    return [*head, f"```text\n{text.rstrip()}\n```", *(block for name in below for block in command_help(*command, name))]


def page_name(path: Path) -> str:
    "The name of a notebook's page: its own without the number."
    return re.sub(r"^\d+[a-z]*_", "", path.stem)


def rename_pages(folder: Path) -> dict[str, str]:  # page -> notebook, both with their folders
    """Give every notebook the name of its page, and have links point there: hub/04_cache.ipynb is hub/cache.html, as its front
    matter states for Quarto."""
    names = {}
    for path in sorted(folder.rglob("*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        new = path.with_name(front.pop("output-file")).with_suffix(".ipynb")
        nb.cells[0].source = f"---\n{yaml.safe_dump(front, allow_unicode=True)}---"
        path.unlink()
        if new.exists(): sys.exit(f"two notebooks make the page {new.relative_to(folder).with_suffix('.html')}")
        nbformat.write(nb, new)
        names[path.relative_to(folder).as_posix()] = new.relative_to(folder).as_posix()

    def renamed(file: Path, link: str) -> str:
        target = posixpath.normpath(posixpath.join(file.parent.relative_to(folder).as_posix(), link))
        return posixpath.join(posixpath.dirname(link), posixpath.basename(names.get(target, target)))

    for path in folder.rglob("*.ipynb"):
        rewrite(path, r"(?<=\]\()[\w./-]+\.ipynb(?=[)#])", lambda m: renamed(path, m[0]))
        rewrite(path, re.escape(home()), lambda _: "../" * (len(path.relative_to(folder).parts) - 1))
    for path in (folder / "sidebar.yml", *folder.rglob("*.qmd")): rewrite(path, r"[\w./-]+\.ipynb", lambda m: renamed(path, m[0]))
    return {new: old for old, new in names.items()}


def keep_at_home(site: Path) -> None:
    """What the pages would take from other people's servers: fonts are the reader's own, formulas are MathML, which browsers set
    by themselves."""
    for sheet in site.rglob("*.css"): rewrite(sheet, r"@import url\(https?:[^)]*\);?", "")
    formula = r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]]</span>'
    mode = {"inline": "inline", "display": "block"}
    for page in site.rglob("*.html"):
        rewrite(page, r"<(link|script)[^>]*katex[^>]*>(</script>)?", "")
        rewrite(page, formula, lambda m: f"{m[1]}{convert(html.unescape(m[3]), display=mode[m[2]])}</span>")


def rewrite(file: Path, pattern: str, new) -> None:
    file.write_text(re.sub(pattern, new, file.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")


def rank_search(site: Path) -> None:
    "Say in the index of search of what kind a page is and what else people call it; search.js puts the results in order."
    file = site / "search.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    for found in index:
        page, _, anchor = found["href"].partition(".html")
        if not anchor: found["text"] = f"{description_of(site / f'{page}.html')} {found['text']}"
        found["kind"] = kind_of(page)
        found["words"] = SEARCH_WORDS.get(page + anchor, "")
    file.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    for page in site.rglob("*.html"):
        rewrite(page, r'(<script src="([./]*)site_libs/fuse/fuse\.min\.js"></script>)', r'\1\n<script src="\2search.js"></script>')


def description_of(page: Path) -> str:
    "The line below the title of a page."
    found = re.search(r'<meta name="description" content="([^"]*)"', page.read_text(encoding="utf-8"))
    return html.unescape(found[1]) if found else ""


def kind_of(page: str) -> str:
    "Where a page stands in the navigation."
    if page in ("index", "start", "planner"): return {"index": "Home", "start": "Start", "planner": "Planner"}[page]
    if page == f"tutorials/{PRACTICES}": return "Practices"
    return {"tutorials": "Guide", "reference": "Reference"}.get(page.partition("/")[0], "Notebook")


def prepare() -> tuple[Path, dict[str, str]]:
    "The folder that is rendered, and what notebook each of its pages is."
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))  # lessons take a model cache from there
    refresh_quarto_yml()
    folder = proc_nbs(force=True)
    (folder / "sidebar.yml").write_text(yaml.safe_dump(sidebars(folder), sort_keys=False), encoding="utf-8")
    notebooks = rename_pages(folder)
    write_reference(folder)
    return folder, notebooks


def main() -> None:
    folder, notebooks = prepare()
    if "--prepare" in sys.argv[1:]: return
    site = build(folder, quiet=True)
    warnings = [w for w in site.warnings if "respect-user-color-scheme" not in w]  # for Quarto; smalldocs respects it anyway
    if warnings: sys.exit("\n".join(warnings))
    keep_at_home(site.out)
    rank_search(site.out)
    for page in site.out.rglob("*.html"):  # "View source" leads to the notebook, or to the definition
        rewrite(page, r"(?<=/nbs/)[\w./-]+\.ipynb", lambda m: notebooks.get(m[0], m[0]))
        rewrite(page, r'(?<=href=")[^"]*/nbs/reference/(\w+)\.qmd', lambda m: showdoc.source_of(m[1]))
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    print(f"{len(site.pages)} pages: {docs.name}/index.html")


if __name__ == "__main__": main()
