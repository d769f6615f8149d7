"""Build the site into _docs: nbdev prepares the executed notebooks (nothing is executed but definitions), smalldocs renders them.

usage: python tools/docs.py

With Quarto at hand, `PYTHONPATH=tests:tools nbdev_docs` builds the same pages from the same _quarto.yml; the parts stand in
the order of their names there.
"""
import html, os, posixpath, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("index", "planner", "errors", "device", "core", "hub", "images", "embedding", "validation", "memory", "diffusion", "doctor",
         "demo", "ui", "cli", "tutorials", "training")  # as they stand in the sidebar


def home() -> str:
    "The address of the published site."
    cfg = get_config()
    return f"{cfg.doc_host}{cfg.doc_baseurl}/"


def sidebar(folder: Path) -> dict:
    "The navigation: single pages and parts, in reading order. A folder that is not among `PARTS` comes last."
    pages = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".ipynb", ".qmd"))
    parts = sorted({p.parts[0] for p in pages if len(p.parts) > 1} - set(PARTS))
    contents = []
    for part in (*PARTS, *parts):
        inside = [p.as_posix() for p in pages if p.parts[0] == part and len(p.parts) > 1]
        single = [p.as_posix() for p in pages if len(p.parts) == 1 and page_name(p) == part]
        contents += single if not inside else [{"section": part, "contents": inside}]
    return {"website": {"sidebar": {"contents": contents}}}


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


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))  # lessons take a model cache from there
    refresh_quarto_yml()
    folder = proc_nbs(force=True)
    (folder / "sidebar.yml").write_text(yaml.safe_dump(sidebar(folder), sort_keys=False), encoding="utf-8")
    notebooks = rename_pages(folder)
    site = build(folder, quiet=True)
    warnings = [w for w in site.warnings if "respect-user-color-scheme" not in w]  # for Quarto; smalldocs respects it anyway
    if warnings: sys.exit("\n".join(warnings))
    keep_at_home(site.out)
    for page in site.out.rglob("*.html"):  # "View source" leads to the notebook
        rewrite(page, r"(?<=/nbs/)[\w./-]+\.ipynb", lambda m: notebooks.get(m[0], m[0]))
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    print(f"{len(site.pages)} pages: {docs.name}/index.html")


if __name__ == "__main__": main()
