"The page of a report: what it holds, what it leaves out, and what hostile text can do in it."
import csv, io, json, os, re
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from devsky_nb.demo.garments import Garment, render_garment
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.errors import ValidationError
from devsky_nb.validation import report as report_module
from devsky_nb.validation.contract import ImageSetContract
from devsky_nb.validation.report import KINDS, MAX_LISTED, MAX_THUMBNAILS, STATUSES, check_image_set, script_hash, spread

SCRIPT = "</script><script>alert('x')</script><!--<img src=http://evil.example/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


def make_image(seed=0, size=64, kind="dress", colour="red"):
    return render_garment(Garment(kind, colour, "plain"), size=size, seed=seed)


class Page(HTMLParser):
    "What a browser would load or run."
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.handlers, self.alts, self.scripts, self.policy = [], [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag == "img" and "src" in named: self.alts.append(named.get("alt"))
        if tag == "script": self.scripts.append("")
        if named.get("http-equiv") == "Content-Security-Policy": self.policy = named["content"]

    def handle_data(self, data):
        if self.cdata_elem == "script": self.scripts[-1] += data


def read_page(report, folder):
    "The text of a report's page, what a browser makes of it, and its list."
    text = report.to_html(folder / "deep" / "r.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    return text, page, json.loads(page.scripts[0])


def test_the_page_is_inert_and_self_contained_whatever_ids_and_labels_are(tiny, tmp_path):
    evil = [SCRIPT, "\ud800", "\x1b[31m", "\"'`{{7*7}}", "a" * 10_000, "\u2028"]
    entries = [{"image": make_image(i), "id": e + str(i % 2), "label": e} for i, e in enumerate(evil * 2)]
    entries += [{"image": make_image(0), "id": f"{SCRIPT}copy", "label": SCRIPT},
                {"path": f"/none/{SCRIPT}.jpg", "id": SCRIPT + "lost"}, {"path": "x", "id": "y", "label": 3},
                {"image": Image.new("RGB", (8, 90)), "id": (SCRIPT, 1)}]
    report = check_image_set({"images": entries, "metadata": {"dataset": SCRIPT}}, tiny,
                             ImageSetContract(labels=[SCRIPT], required_fields=[SCRIPT]))
    text, page, listed = read_page(report, tmp_path)
    assert not page.handlers and page.tags.count("script") == 2 and "alert" not in page.scripts[1]
    assert page.policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script_hash(page.scripts[1])}'"
    assert "&lt;script&gt;" in text and "{{7*7}}" in text and "<!--" not in text and len(text) < 600_000
    assert "innerHTML" not in page.scripts[1] and "eval" not in page.scripts[1]
    assert page.sources and all(s.startswith(("data:image/webp;base64,", "#")) for s in page.sources)
    assert all(page.alts) and "@import" not in text and "url(" not in text
    assert [row[0] for row in listed["images"]] == [row["id"] for row in report.to_dict()["images"]]
    assert listed["images"][0][0] == SCRIPT + "0" and listed["images"][4][1] == "a" * 10_000  # whole, not shortened
    assert "<script" not in report._repr_html_()
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    report.print(console)
    assert "\x1b" not in console.file.getvalue()
    json.loads(report.to_json(tmp_path / "r.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def large(tiny):
    "A thousand images: first 400 dresses, then 300 that are lost, then 20 labels of 15."
    one, shots = make_image(0), []
    for i in range(700):
        shots.append(one.copy())
        shots[-1].putpixel((0, 0), (i % 256, i // 256, 9))
    entries = [{"image": s, "label": "dress"} for s in shots[:400]] + [{"path": f"{i}.jpg", "label": "dress"} for i in range(300)]
    entries += [{"image": s, "label": f"label {i % 20}"} for i, s in enumerate(shots[400:])]
    return check_image_set({"images": [e | {"id": f"sku-{i}"} for i, e in enumerate(entries)]}, tiny, duplicates="exact")


def test_the_page_of_a_large_set_stays_small_and_lists_all(large, tmp_path):
    text, page, listed = read_page(large, tmp_path)
    assert page.tags.count("tr") < 250 and "All 300 are in the list of images" in text
    assert len(page.alts) <= MAX_THUMBNAILS and len(text) < 1_500_000
    assert (listed["total"], len(listed["images"]), listed["kinds"][:3]) == (1000, 1000, list(KINDS[:3]))
    assert Counter(row[3][0] for row in listed["images"]) == {STATUSES.index(s): n for s, n in large.counts.items() if n}
    assert len(large.to_dict()["errors"]) == 300


def test_thumbnails_are_of_every_label_and_of_every_finding(large, tmp_path):
    _, page, _ = read_page(large, tmp_path)
    shown = Counter(alt.rpartition("labelled ")[2] for alt in page.alts)
    wrong = len(large.findings["wrong_labels"])
    assert len(shown) == 21 and min(shown.values()) >= 10, shown
    assert len(page.alts) > MAX_THUMBNAILS - 2 * MAX_LISTED and (not wrong or shown["dress"] > 20)


def test_a_list_that_no_page_can_hold_is_cut_and_not_offered_as_the_accepted_ones(large, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_LIST_BYTES", 5000)
    text, page, listed = read_page(large, tmp_path)
    assert 0 < len(listed["images"]) < 200 and listed["total"] == 1000
    assert "The first 1" in text and "All 300" not in text and "entries.length < total" in page.scripts[1]


@pytest.mark.parametrize("items, limit, chosen", [("", 3, ""), ("aaab", 0, ""), ("aaab", 1, "a"), ("aaab", 2, "ab"), ("aaabbc", 4, "aabc"), ("cba", 9, "cba")])
def test_some_of_each_kind(items, limit, chosen):
    assert "".join(spread(list(items), str, limit)) == chosen


def test_the_image_that_is_kept_is_shown_however_many_copies_there_are(tiny, tmp_path):
    small = [{"image": make_image(3, 48)} for _ in range(9)]
    report = check_image_set({"images": [*small, {"image": make_image(3, 48), "path": None, "id": "tenth"}]}, tiny)
    [group] = report.findings["duplicates"]
    group["representative"], group["how"] = 9, ["exact"] * 9 + ["kept"]
    text, _, _ = read_page(report, tmp_path)
    assert re.search(r'keep</span> <b class="lines" title="tenth"', text) and "and 6 more" in text


@pytest.mark.parametrize("contract, badge, table", [(None, None, False), (ImageSetContract(), "✓ contract fulfilled", True),
                                                    (ImageSetContract(min_size=9999), "✗ contract not fulfilled", True)])
def test_a_contract_is_spoken_of_where_there_was_one(tiny, tmp_path, contract, badge, table):
    report = check_image_set({"images": [{"image": make_image(1)}]}, tiny, contract)
    text, _, _ = read_page(report, tmp_path)
    console = Console(file=io.StringIO(), width=120)
    report.print(console)
    seen = re.sub(r"(?s)<(style|script).*?</\1>", "", text)
    assert (badge is None) == ("contract" not in seen) and (badge or "") in seen
    assert report.contract is contract
    for said in (repr(report), report._repr_html_(), console.file.getvalue()): assert ("min_success" in said) == table


def test_too_few_successes_are_said_without_a_contract_too(tiny, tmp_path):
    report = check_image_set({"images": [{"path": "none.jpg"}]}, tiny)
    text, _, _ = read_page(report, tmp_path)
    assert not report.ok and "too few succeeded" in text and "No contract was given" in text and "min_success" in repr(report)


def test_what_breaks_a_clause_about_single_images_is_not_accepted(tiny, tmp_path):
    entries = [{"id": "large", "label": "dress", "image": make_image(1, 300)}, {"id": "again", "label": "dress", "image": make_image(1, 300)},
               {"id": "small", "label": "dress", "image": make_image(2, 150, colour="green")},
               {"id": "coat", "label": "coat", "image": make_image(3, 300, "coat", "blue")}, {"id": "broken", "path": "none.jpg"}]
    report = check_image_set(entries, tiny, ImageSetContract(min_size=200, labels=("dress",), required_fields=("label",)))
    assert [row["id"] for row in report.accepted()] == ["large"]
    assert report.verdict == "1 of 5 images is ready to use; 2 break the contract, 1 failed and 1 repeats another."
    written = json.loads(report.to_json(tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written["breaking"] == {"min_size": [{"id": "small", "index": 2}], "required_fields": [{"id": "broken", "index": 4}],
                                   "labels": [{"id": "coat", "index": 3}]}
    listed = report._entries()
    assert "min_size: shorter edge at least 200 px" in listed[2][4] and KINDS.index("breaks the contract") in listed[2][3]
    assert [0 in kinds for *_, kinds, _ in listed] == [True, False, False, False, False]
    assert check_image_set(entries, tiny).verdict.startswith("3 of 5 images are ready to use; 1 failed")


def test_what_was_accepted_is_written_with_what_was_found(tiny, tmp_path):
    images = [{"image": make_image(1), "id": 7, "label": "dress"}, {"image": make_image(1), "id": "again"},
              {"image": Image.new("RGB", (64, 64), "white"), "id": 'white, "all"\nof it'}, {"path": "none.jpg", "id": "lost"}]
    report = check_image_set({"images": images}, tiny)
    accepted = json.loads(report.to_accepted(tmp_path / "a" / "a.json").read_text(encoding="utf-8"))
    assert accepted == report.accepted() and [row["id"] for row in accepted] == [7, 'white, "all"\nof it']
    assert accepted[0] == {"index": 0, "id": 7, "path": "", "label": "dress", "finding": ""} and "uniform" in accepted[1]["finding"]
    with report.to_accepted(tmp_path / "a.CSV").open(encoding="utf-8", newline="") as file: rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["7", 'white, "all"\nof it'] and rows[0]["label"] == "dress"
    statuses = [(row["id"], row["status"]) for row in report.to_dict()["images"]]
    assert statuses == [(7, "embedded"), ("again", "duplicate"), ('white, "all"\nof it', "embedded"), ("lost", "error")]


def test_a_table_holds_any_file_name_and_refuses_an_id_that_is_no_text(tiny, tmp_path):
    make_image(1).save(tmp_path / "a.png")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    try: os.rename(tmp_path / "a.png", name)
    except OSError: pytest.skip("this file system has names of text only")
    report = check_image_set([name], tiny)
    assert os.fsencode(name) in report.to_accepted(tmp_path / "a.csv").read_bytes()
    assert json.loads(report.to_accepted(tmp_path / "a.json").read_text(encoding="utf-8"))[0]["path"] == name
    report = check_image_set({"images": [{"image": make_image(1), "id": "\ud800"}]}, tiny)
    with pytest.raises(ValidationError, match="write a .json file"): report.to_accepted(tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists() and report.to_accepted(tmp_path / "b.json").exists()


@pytest.mark.parametrize("path", ["a.txt", "accepted", "", None, 5])
def test_a_list_that_is_neither_table_nor_json_is_refused(tiny, path):
    report = check_image_set({"images": [{"image": make_image(1)}]}, tiny)
    with pytest.raises(ValidationError): report.to_accepted(path)
