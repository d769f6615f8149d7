"""Build the site into _docs: nbdev prepares the executed notebooks (nothing is executed but definitions), smalldocs renders them.

usage: python tools/docs.py

With Quarto at hand, `PYTHONPATH=tests:tools nbdev_docs` builds the same pages from the same _quarto.yml.
"""
import html, os, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

ROOT = Path(__file__).resolve().parents[1]


def home() -> str:
    "The address of the published site."
    cfg = get_config()
    return f"{cfg.doc_host}{cfg.doc_baseurl}/"


def rename_pages(folder: Path) -> dict[str, str]:  # page -> notebook
    "Give every notebook the name of its page, which its front matter states for Quarto (04_garments.ipynb is garments.html), and have links point there."
    names = {}
    for path in sorted(folder.rglob("*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        new = path.with_name(front.pop("output-file")).with_suffix(".ipynb")
        nb.cells[0].source = f"---\n{yaml.safe_dump(front, allow_unicode=True)}---"
        path.unlink()
        nbformat.write(nb, new)
        names[path.name] = new.name
    for path in folder.rglob("*.ipynb"):
        rewrite(path, r"(?<=[(/])[\w.-]+\.ipynb(?=[)#])", lambda m: names.get(m[0], m[0]))
        rewrite(path, re.escape(home()), lambda _: "../" * (len(path.relative_to(folder).parts) - 1))
    for path in (folder / "sidebar.yml", *folder.rglob("*.qmd")): rewrite(path, r"[\w.-]+\.ipynb", lambda m: names.get(m[0], m[0]))
    return {new: old for old, new in names.items()}


def keep_at_home(site: Path) -> None:
    "What the pages would take from other people's servers: fonts are the reader's own, formulas are MathML, which browsers set by themselves."
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
    nbdev_sidebar.__wrapped__(file_glob="", file_re=r"\.(ipynb|qmd)$")
    folder = proc_nbs(force=True)
    notebooks = rename_pages(folder)
    site = build(folder, quiet=True)
    warnings = [w for w in site.warnings if "respect-user-color-scheme" not in w]  # for Quarto; smalldocs respects it anyway
    if warnings: sys.exit("\n".join(warnings))
    keep_at_home(site.out)
    for page in site.out.rglob("*.html"): rewrite(page, r"(/nbs/(?:[\w-]+/)*)([\w-]+\.ipynb)", lambda m: m[1] + notebooks.get(m[2], m[2]))  # "View source"
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    print(f"{len(site.pages)} pages: {docs.name}/index.html")


if __name__ == "__main__": main()
