"""Leave of outputs what every viewer can show and every run repeats: no live view of a widget, which names a model in a kernel
that is gone; and nothing of standard error, where libraries speak of the machine.

usage: python tools/outputs.py      (after nbdev_clean, on the notebooks in nbs/)
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def without_views(nb: dict) -> dict:
    "The notebook without widget models, views of them, and standard error."
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        for output in cell["outputs"]: output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return nb


if __name__ == "__main__":
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        before = path.read_text(encoding="utf-8")
        after = json.dumps(without_views(json.loads(before)), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        if after != before: path.write_text(after, encoding="utf-8")
