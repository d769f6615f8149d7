"""Write README.md from nbs/index.ipynb, so that the front page is a notebook that ran.

usage: python tools/readme.py [OUTPUT]      (default: README.md beside settings.ini)
"""
import posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit the notebook, then run `make prepare`. -->\n\n"


def badges() -> str:
    "What settings.ini and the workflows say, as badges. They are pictures of other servers, so the site has none."
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    about = config["DEFAULT"]
    repository, tests = f"https://github.com/{about['user']}/{about['repo']}", ROOT / ".github" / "workflows" / "test.yml"
    found = []
    if tests.exists():
        workflow = f"{repository}/actions/workflows/{tests.name}"
        found.append(f"[![tests]({workflow}/badge.svg)]({workflow})")
    facts = {"python": f"{about['min_python']} or newer", "licence": {"apache2": "Apache-2.0"}[about["license"]]}
    found += [f"![{what}: {fact}](https://img.shields.io/badge/{quote(what)}-{quote(fact.replace('-', '--'))}-blue)" for what, fact in facts.items()]
    return " ".join(found)


def joined(cells: list) -> list:
    "Imports and the code that follows them as one block: nbdev wants them apart."
    found = []
    for cell in cells:
        before = found[-1] if found else None
        if before and before.cell_type == cell.cell_type == "code" and not before.outputs:
            cell.source = f"{before.source}\n\n{cell.source}"
            found.pop()
        found.append(cell)
    return found


def readme(notebook: Path) -> str:
    "The notebook as Markdown, without hidden cells and without directives."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.lstrip().startswith(("#| hide", "#|hide"))]
    nb.cells = joined(nb.cells)
    for c in nb.cells:
        if c.cell_type == "code": c.source = "\n".join(l for l in c.source.splitlines() if not l.startswith("#|"))
    nb.metadata.language_info = {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]: raise SystemExit("index.ipynb must link its images, not produce them: README.md is a single file")
    body = re.sub(r"\A(\s*# .+\n)", lambda m: f"{m[1]}\n{badges()}\n", body)
    body = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({posixpath.normpath(posixpath.join('nbs', m[1]))})", body)
    return NOTE + re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.strip().splitlines())) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "README.md"
    target.write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
