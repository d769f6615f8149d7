"""Write README.md from nbs/index.ipynb, so that the front page is a notebook that ran.

usage: python tools/readme.py [OUTPUT]      (default: README.md beside settings.ini)
"""
import posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit the notebook, then run `make prepare`. -->\n\n"


def readme(notebook: Path) -> str:
    "The notebook as Markdown, without hidden cells and without directives."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.lstrip().startswith(("#| hide", "#|hide"))]
    for c in nb.cells:
        if c.cell_type == "code": c.source = "\n".join(l for l in c.source.splitlines() if not l.startswith("#|"))
    nb.metadata.language_info = {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]: raise SystemExit("index.ipynb must link its images, not produce them: README.md is a single file")
    body = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({posixpath.normpath(posixpath.join('nbs', m[1]))})", body)
    return NOTE + re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.strip().splitlines())) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "README.md"
    target.write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
