"The verified practices judge every line of the document, and their table is what ran."
import ast, io, re, tokenize
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "tests" / "practices.md").read_text(encoding="utf-8").splitlines()
NOTEBOOK = nbformat.read(ROOT / "nbs" / "tutorials" / "practices_verified.ipynb", as_version=4)
VERDICTS = {"holds", "holds with a condition", "outdated", "wrong"}


def numbers(spans):
    pairs = [[int(n) for n in s.split("-")] for s in spans.split(",")]
    return {n for p in pairs for n in range(p[0], p[-1] + 1)}


def calls():
    "What the notebook's cells judge: lines and quotation of each verdict."
    trees = [ast.parse(c.source) for c in NOTEBOOK.cells if c.cell_type == "code"]
    found = [n for t in trees for s in t.body if isinstance(s, ast.Expr) for n in [s.value] if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "verdict"]
    return [tuple(a.value for a in n.args[:2]) for n in found]


def table(cell):
    "The rows of a Markdown table in a cell's kept output, each as a dict."
    text = next(o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {}))
    columns, _, *rows = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    return [dict(zip(columns, r, strict=True)) for r in rows]


def code_blocks():
    "Spans of the fenced blocks, fences included; the last one is never closed."
    fences = [n for n, line in enumerate(LINES, 1) if line.startswith("```")]
    return [range(a, b + 1) for a, b in zip(fences[::2], [*fences[1::2], len(LINES)], strict=True)]


def comments(block):
    closed = LINES[block[-1] - 1].startswith("```")
    code = "\n".join(LINES[block[0]:block[-1] - closed]) + "\n"
    return {block[0] + t.start[0] for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT and re.search(r"\w", t.string)}


JUDGED = [numbers(lines) for lines, _ in calls()]
PARTS = set().union(*(j for j in JUDGED if j not in map(set, code_blocks())))  # judged by a row that is not about a whole block


def test_every_code_block_has_a_row_of_its_own():
    assert [(b[0], b[-1]) for b in code_blocks() if set(b) not in JUDGED] == []


def test_every_heading_statement_and_row_of_a_table_is_judged():
    inside = set().union(*code_blocks())
    prose = {n for n, line in enumerate(LINES, 1) if n not in inside and re.search(r"\w", line)} - {332, 333}  # the table's head
    assert sorted(prose - PARTS) == []


@pytest.mark.parametrize("block", code_blocks(), ids=lambda b: f"{b[0]}-{b[-1]}")
def test_every_comment_is_judged_apart_from_its_block(block):
    assert sorted(comments(block) - PARTS) == []


def test_every_item_of_a_checklist_and_every_common_mistake_is_judged():
    items = {n for n, line in enumerate(LINES, 1) if re.match(r"\s*(- \[ \]|□)", line) or n > 1063 and line.startswith(("❌", "✅"))}
    assert len(items) == 36 + 6 + 5 and sorted(items - PARTS) == []


def test_the_kept_table_has_the_rows_of_the_cells():
    rows = table(NOTEBOOK.cells[-1])
    assert sorted((r["lines"], r["says"]) for r in rows) == sorted(calls())
    assert {r["verdict"] for r in rows} == VERDICTS and all(r["shown"] and r["how"] and r["today"] for r in rows)
    starts = [min(numbers(r["lines"])) for r in rows]
    assert starts == sorted(starts)


def test_the_kept_count_is_that_of_the_table():
    rows = [r["verdict"] for r in table(NOTEBOOK.cells[-1])]
    assert {r["verdict"]: int(r["rows"]) for r in table(NOTEBOOK.cells[-2])} == {v: rows.count(v) for v in VERDICTS}
