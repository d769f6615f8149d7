"Validation beyond its lesson: every kind of bad entry, the sum of the account, hostile text in reports, memory, contracts."
import gc, io, json, pickle, tracemalloc
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from rich.console import Console

from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.errors import ValidationError
from devsky_nb.demo.catalogue import write_catalogue
from devsky_nb.demo.garments import Garment, render_garment
from devsky_nb.validation.account import Embeddings, embed_entries, validate_image_embeddings
from devsky_nb.validation.checks import label_findings
from devsky_nb.validation.copies import MAX_DIFFERENCE, MIN_COSINE, near_pairs
from devsky_nb.validation.contract import ImageSetContract
from devsky_nb._core import one_line
from devsky_nb.validation.report import REMEDIES, check_image_set, json_data

@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return write_catalogue(tmp_path_factory.mktemp("catalogue"))


def make_image(seed=0, size=96, kind="dress", colour="red"):
    return render_garment(Garment(kind, colour, "plain"), size=size, seed=seed)


@pytest.mark.parametrize("image_set, says, keys", [
    ([], "image_set must be a dictionary", {"type", "expected"}), (None, "image_set must be a dictionary", {"type", "expected"}),
    ({}, "image_set must contain 'images' key", {"keys", "expected_schema"}),
    ({"images": None}, "image_set['images'] must be a list", {"type", "expected"}),
    ({"images": {"path": "x"}}, "image_set['images'] must be a list", {"type", "expected"}),
    ({"images": []}, "image_set['images'] cannot be empty", {"provided_count"})])
def test_a_wrong_container_raises_as_in_the_document(tiny, image_set, says, keys):
    with pytest.raises(ValidationError) as caught: validate_image_embeddings(image_set, tiny)
    assert str(caught.value).startswith(says) and set(caught.value.details) == keys


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 80, "0.8", None, float("nan"), True])
def test_a_threshold_outside_0_to_1_is_refused(tiny, threshold):
    with pytest.raises(ValidationError, match="from 0 to 1"):
        validate_image_embeddings({"images": [{"image": make_image()}]}, tiny, threshold)


def test_results_have_the_documents_keys_and_values(tiny):
    entries = [{"image": make_image(0), "id": "a", "label": "dress", "price": 9}, {"image": make_image(1)},
               {"path": "none.jpg", "id": "n"}]
    results = validate_image_embeddings({"images": entries, "metadata": {"version": "1.0"}}, tiny, 0.5, batch_size=2)
    assert list(results) == ["total_images", "successful", "failed", "embeddings", "errors", "metadata", "success_rate"]
    assert (results["total_images"], results["successful"], results["failed"], results["metadata"]) == (3, 2, 1, {"version": "1.0"})
    first, second = results["embeddings"]
    assert list(first) == ["id", "index", "embedding", "shape", "label", "metadata"]
    assert (first["id"], first["shape"], first["label"], first["metadata"]) == ("a", (1, tiny.dim), "dress", {"price": 9})
    assert (second["id"], second["index"], second["label"], second["metadata"]) == ("image_1", 1, None, {})
    torch.testing.assert_close(first["embedding"], tiny.encode_image(make_image(0)), atol=1e-5, rtol=0)
    [error] = results["errors"]
    assert (error["index"], error["image_id"], error["error_type"], error["stage"], error["reason"], error["path"]) == (
        2, "n", "FileNotFoundError", "load", "missing", "none.jpg")


class Unequal:
    "Breaks every comparison."
    __hash__ = lambda self: 1
    def __eq__(self, other): raise RuntimeError("no")


BAD = [("text", "not-a-dict"), (None, "not-a-dict"), ({}, "no-source"), ({"path": None, "image": None}, "no-source"),
       ({"path": "a.jpg", "image": b""}, "two-sources"), ({"path": 3}, "path-type"), ({"path": b"a"}, "path-type"),
       ({"path": "a", "label": 3}, "label-type"), ({"path": "a", "label": np.array([1, 2])}, "label-type"),
       ({"path": "a", "id": []}, "id-type"),
       ({"path": "a", "id": {}}, "id-type"), ({"path": "a", "id": np.zeros(2)}, "id-type"), ({"image": 3}, "unsupported-type"),
       ({"image": b""}, "empty"),
       ({"path": "/"}, "not-a-file"), ({"path": ""}, "missing"), ({"path": "a\0b"}, "bad-path"),
       ({"image": np.zeros((4, 4, 3))}, "unsupported-array"),
       ({"image": b"<html>"}, "unknown-format")]


@pytest.mark.parametrize("entry, reason", BAD, ids=[f"{i}-{r}" for i, (_, r) in enumerate(BAD)])
def test_a_bad_entry_is_one_typed_record_and_costs_no_neighbour(tiny, entry, reason):
    results = validate_image_embeddings({"images": [{"image": make_image(1)}, entry, {"image": make_image(2)}]}, tiny, 0.5)
    assert [e["index"] for e in results["embeddings"]] == [0, 2]
    [error] = results["errors"]
    assert (error["index"], error["reason"]) == (1, reason)
    assert error["error"]
    assert error["error_type"] in ("ValidationError", "FileNotFoundError")
    assert error["stage"] in ("schema", "load")


def test_ids_are_compared_even_when_they_resist(tiny):
    entries = [{"image": make_image(), "id": Unequal()}, {"image": make_image(), "id": Unequal()},
               {"image": make_image(), "id": "a"}, {"image": make_image(), "id": "a"}]
    assert [(e["index"], e["reason"]) for e in embed_entries({"images": entries}, tiny)["errors"]] == [(1, "id-type"),
                                                                                                       (3, "duplicate-id")]


HOSTILE = st.one_of(st.none(), st.text(max_size=5), st.integers(), st.floats(), st.binary(max_size=8),
                    st.lists(st.integers(), max_size=2))
ENTRY = st.one_of(HOSTILE, st.fixed_dictionaries({}, optional={"path": HOSTILE,
                                                               "image": st.one_of(HOSTILE, st.builds(make_image,
                                                                                                     st.integers(0, 3))),
                                                                                                     "id": HOSTILE,
                                                               "label": HOSTILE, "more": HOSTILE}))


@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(ENTRY, min_size=1, max_size=6))
def test_everything_is_accounted_for_and_can_be_reported(tiny, tmp_path, entries):
    report = check_image_set({"images": entries, "metadata": entries}, tiny,
                             ImageSetContract(labels=["a"], required_fields=["id"], max_failures=.1))
    assert sum(report.counts.values()) == len(entries)
    r = report.results
    assert sorted([e["index"] for e in r["errors"]] + r["embeddings"].indices.tolist()) == list(range(len(entries)))
    assert [report.status(e["index"]) for e in r["errors"]] == ["error"] * r["failed"]
    data = json.loads(report.to_json(tmp_path / "r.json").read_text(encoding="utf-8"))
    assert data["total_images"] == len(data["statuses"]) == len(entries)
    assert report.to_html(tmp_path / "r.html").stat().st_size > 1000
    report.print(Console(file=io.StringIO()))
    assert report._repr_html_() and repr(report)


@pytest.mark.parametrize("value", [float("nan"), 0.])
def test_a_broken_model_yields_records_and_no_vectors(value):
    broken = CLIPImageEmbedder("tiny-clip", device="cpu", registry=ModelRegistry())
    with torch.no_grad(): broken.model.visual_projection.weight.fill_(value)
    with pytest.raises(ValidationError) as caught:
        validate_image_embeddings({"images": [{"image": make_image(i)} for i in range(3)]}, broken)
    results = caught.value.details["results"]
    assert len(results["embeddings"]) == 0
    assert [(e["error_type"], e["stage"]) for e in results["errors"]] == [("MLError", "encode")] * 3
    report = check_image_set({"images": [{"image": make_image(1)}]}, broken)
    assert not report.ok and report.counts == {"embedded": 0, "duplicate": 0, "error": 1}


def test_the_exception_carries_the_whole_account(tiny, catalogue):
    with pytest.raises(ValidationError, match=r"^Validation failed: success rate 87.50% below threshold 100.00%") as caught:
        validate_image_embeddings(catalogue, tiny, 1.0)
    details = pickle.loads(pickle.dumps(caught.value)).details
    assert {k: details[k] for k in ("total", "successful", "failed", "threshold")} == {"total": 24, "successful": 21, "failed": 3,
                                                                                       "threshold": 1.0}
    expected = validate_image_embeddings(catalogue, tiny)
    assert details["results"]["errors"] == expected["errors"]
    np.testing.assert_allclose(details["results"]["embeddings"].vectors, expected["embeddings"].vectors, atol=1e-5)


def test_images_are_embedded_in_batches_and_not_one_by_one(tiny, catalogue, monkeypatch):
    sizes, forward = [], CLIPImageEmbedder._forward
    monkeypatch.setattr(CLIPImageEmbedder, "_forward", lambda self, px: sizes.append(len(px)) or forward(self, px))
    validate_image_embeddings(catalogue, tiny, batch_size=8)
    assert sum(sizes) == 21 and len(sizes) <= 3


def test_a_hundred_thousand_entries_hold_one_array():
    n, images = 100_000, [{"path": "a.jpg", "label": "coat"}] * 100_000
    vectors = np.zeros((n, 8), np.float32)
    gc.collect(); tracemalloc.start()
    embeddings = Embeddings(vectors, np.arange(n), images)
    count = sum(1 for e in embeddings[::100] if e["embedding"].shape == (1, 8))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1000 and len(embeddings) == n and held < 12 * n and peak < 20 * n
    assert embeddings[-1]["index"] == n - 1 and len(embeddings[10:20]) == 10 and embeddings[10:20][0]["index"] == 10
    assert np.shares_memory(embeddings[10:20].vectors, vectors)
    assert np.shares_memory(embeddings[3]["embedding"].numpy(), vectors)
    with pytest.raises(IndexError): embeddings[n]


def test_blockwise_duplicates_equal_brute_force():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8))[rng.integers(0, 40, 150)] + rng.normal(0, .05, (150, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    thumbs = (rng.integers(0, 240, (3, 256))[rng.integers(0, 3, 150)] + rng.integers(0, 3, (150, 1)) * 3).astype(np.uint8)  # 0, 3 or 6 levels apart
    grey = np.sqrt(((thumbs[:, None].astype(float) - thumbs[None]) ** 2).mean(-1))
    expected = np.argwhere(np.triu((vectors @ vectors.T >= MIN_COSINE) & (grey <= MAX_DIFFERENCE), 1)).tolist()
    assert len(expected) > 10
    for block in (1, 7, 64, 150, 4096):
        assert sorted(p for part in near_pairs(vectors, thumbs, block=block) for p in part.tolist()) == expected


def saved(image, **options):
    image.save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


def test_copies_are_found_and_look_alikes_are_not(tiny):
    garments = [(k, c) for k in ("dress", "t-shirt", "coat") for c in ("white", "red", "black")]
    shots = [make_image(s, 320, k, c) for k, c in garments for s in (0, 1)]
    copies = [saved(p.resize((300, 300)), quality=60) for p in shots[::2]] + [saved(p.resize((160, 160)),
                                                                                    quality=30) for p in shots[::2]]
    report = check_image_set({"images": [{"image": x} for x in shots + copies]}, tiny)
    n = len(garments)
    assert [g["members"] for g in report.findings["duplicates"]] == [[2 * i, 2 * n + i, 3 * n + i] for i in range(n)]
    assert all(g["kind"] == "near" and g["representative"] == g["members"][0] for g in report.findings["duplicates"])
    assert report.counts == {"embedded": 2 * n, "duplicate": 2 * n, "error": 0}


def test_one_image_under_two_labels_is_said(tiny):
    report = check_image_set({"images": [{"image": make_image(), "label": "dress"}, {"image": make_image(), "label": "gown"}]},
                             tiny)
    [group] = report.findings["duplicates"]
    assert (group["kind"], group["labels"]) == ("exact", ["dress", "gown"])


def test_labels_that_cannot_be_read_as_texts_are_judged_by_centroids(tiny):
    images = [{"image": make_image(i, 64),
               "label": "long " * 500 if i % 2 else "  "} for i in range(4)] + [{"image": make_image(9, 64), "label": "b"}]
    assert check_image_set({"images": images},
                           tiny).findings["label_method"].startswith("centroids, as labels cannot be read as texts")
    for output in ("pooled", "cls"):
        report = check_image_set({"images": [{"image": make_image(i, 64), "label": "ab"[i % 2]} for i in range(4)]},
                                 CLIPImageEmbedder("tiny-clip", device="cpu", output=output))
        assert report.findings["label_method"].startswith(f"centroids, as vectors are '{output}'")


def test_the_catalogue_is_reported_as_planted(tiny, catalogue):
    report = check_image_set(catalogue, tiny)
    condition = {i: e["condition"] for i, e in enumerate(catalogue["images"])}
    assert {condition[e["index"]] for e in report.results["errors"]} == {"truncated", "text", "empty"}
    assert [condition[w["index"]] for w in report.findings["wrong_labels"]] == ["wrong-label"]
    members = [{condition[m] for m in g["members"]} for g in report.findings["duplicates"]]
    assert sorted(map(sorted, members)) == [["duplicate", "good"], ["good", "near-duplicate"]]
    assert not report.findings["warnings"] and not report.findings["outliers"]
    noted = {condition[i] for n in report.findings["notes"] for i in n["members"]}
    assert noted == {"cmyk", "rotated", "transparent"}


def test_the_odd_one_out_is_in_the_report(tiny):
    images = [*(make_image(seed) for seed in range(14)), make_image(3, kind="boot", colour="blue")]
    report = check_image_set({"images": [{"image": p} for p in images]}, tiny)
    assert [f["index"] for f in report.findings["outliers"]] == [14]
    assert report.to_dict()["findings"]["outliers"][0]["id"] == "image_14"


def test_reports_are_written_whole_or_not_at_all(tiny, tmp_path):
    report = check_image_set({"images": [{"image": make_image()}]}, tiny)
    target = tmp_path / "new" / "r.json"
    report.to_json(target)
    assert [p.name for p in target.parent.iterdir()] == ["r.json"]
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path, tmp_path / "file" / "r.json"):
        for write in (report.to_json, report.to_html):
            with pytest.raises(ValidationError, match="cannot write") as caught: write(bad)
            assert caught.value.details["stage"] == "write"
    for bad in (None, 5, ""):
        for write in (report.to_json, report.to_html):
            with pytest.raises(ValidationError, match="expected a path"): write(bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]


def test_each_clause_can_hold_and_break(tiny):
    images = [{"image": saved(make_image(1, 96)), "id": "a", "label": "dress"},
              {"image": saved(make_image(1, 96)), "id": "b", "label": "dress"},
              {"image": saved(make_image(2, 64, "jeans", "blue")), "label": "jeans"},
              {"path": "none.jpg", "id": "d", "label": "dress"}]
    holds = dict(formats=["JPEG"], min_size=64, max_size=96, required_fields=["label"], labels=["dress", "jeans"], max_failures=.25,
                 max_duplicates=.25,
                 max_label_disagreement=0, min_success=.75)
    report = check_image_set({"images": images}, tiny, ImageSetContract(**holds))
    assert report.ok and [c.name for c in report.clauses] == list(holds), report
    breaks = dict(formats=["PNG"], min_size=65, max_size=95, required_fields=["id"], labels=["dress"], max_failures=.24,
                  max_duplicates=.24, min_success=.76)
    for name, value in breaks.items():
        report = check_image_set({"images": images}, tiny, ImageSetContract(**{"min_success": 0, name: value}))
        assert not report.ok and [c.name for c in report.clauses if not c.ok] == [name]
    report = check_image_set({"images": [dict(images[0], label="jeans"), {"image": make_image(5), "label": "dress"}]}, tiny,
                             ImageSetContract(max_label_disagreement=.4))
    assert [c.name for c in report.clauses if not c.ok] == ["max_label_disagreement"]


def test_a_list_of_paths_is_an_image_set(tiny, tmp_path):
    make_image().save(tmp_path / "a.png")
    report = check_image_set([tmp_path / "a.png", str(tmp_path / "b.png")], tiny)
    assert report.counts == {"embedded": 1, "duplicate": 0, "error": 1} and not report.ok
    assert report.results["errors"][0]["path"] == str(tmp_path / "b.png")


@pytest.mark.parametrize("template", ["a photo", "{0}", "{", 3, ""])
def test_a_template_without_a_place_for_the_label_is_refused(tiny, template):
    with pytest.raises(ValidationError, match="for the label"):
        check_image_set({"images": [{"image": make_image()}]}, tiny, template=template)


def test_a_map_can_be_drawn_of_few_and_of_odd_labels(tiny):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    for n in (1, 2, 5):
        axes = check_image_set({"images": [{"image": make_image(i, 64),
                                            "label": ["$x", "_y", "", "a_b^"][i % 4]} for i in range(n)]}, tiny).plot_map()
        axes.figure.canvas.draw()
        assert sum(len(c.get_offsets()) for c in axes.collections if c.get_label() != "suspected label") == n
        plt.close(axes.figure)


def test_shown_and_plain_never_raise():
    class Mute:
        def __repr__(self): raise RuntimeError
    assert one_line(Mute()) == "<Mute>" and json_data({Mute(): [Mute(), 10**5000, {1}, np.inf]})
    json.dumps(json_data([np.float32(1), np.int64(2), 10**400, b"x", {("a",): 1}]), allow_nan=False)


class Raising(dict):
    "A dict whose own access fails, as a lazy mapping's can."
    def get(self, *args): raise RuntimeError("lost connection")


def test_an_error_that_nobody_foresaw_is_a_record_and_the_others_go_on(tiny, monkeypatch):
    prepare, good = tiny.preprocess, make_image(1)
    def fails_on_wide(image):
        if image.width > image.height: raise RuntimeError("a mistake of ours")
        return prepare(image)
    monkeypatch.setattr(tiny, "preprocess", fails_on_wide)
    report = check_image_set({"images": [{"image": good}, {"image": make_image().resize((90, 40)), "id": "wide"},
                                         Raising(image=good), {"image": good}]}, tiny)
    assert sum(report.counts.values()) == 4
    [wide] = report.results["errors"]
    assert wide["unexpected"] and "a mistake of ours" in wide["error"] and wide["image_id"] == "wide"
    json.dumps(report.to_dict())


def test_labels_that_are_names_of_images_are_not_judged(tiny):
    entries = [{"label": f"product {i}"} for i in range(1001)]
    vectors = np.tile(np.eye(1, tiny.dim, dtype=np.float32), (1001, 1))
    for n, says in (1001, "not judged: 1,001 different labels are names of images"), (1, "not judged: fewer than two labels"):
        method, wrong = label_findings(Embeddings(vectors[:n], np.arange(n), entries), tiny, "a photo of a {}")
        assert says in method and wrong == []


@pytest.mark.parametrize("embedder", [None, "tiny-clip"])
def test_what_is_no_embedder_is_said_before_anything_is_read(embedder, catalogue):
    for check in (validate_image_embeddings, check_image_set):
        with pytest.raises(ValidationError, match="expected an ImageEmbedder"): check(catalogue, embedder)


@pytest.mark.parametrize("contract", [{}, {"min_success": .5}, "contract.yaml"])
def test_what_is_no_contract_is_said(contract, catalogue, tiny):
    with pytest.raises(ValidationError, match="expected an ImageSetContract"): check_image_set(catalogue, tiny, contract)


@pytest.mark.parametrize("image_set", [None, 5, iter(["a.jpg"])])
def test_check_image_set_says_all_that_it_takes(image_set, tiny):
    with pytest.raises(ValidationError, match="a list of paths or entries, or a folder"): check_image_set(image_set, tiny)


def test_what_was_left_out_of_a_folder_is_in_every_report(tiny, tmp_path):
    (tmp_path / "set").mkdir()
    make_image().save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / f"{'<b>x'}.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "set" / "notes.txt").write_text("no image", encoding="utf-8")
    report = check_image_set(tmp_path / "set", tiny)
    assert {Path(path).name for path, _ in report.left_out} == {"<b>x.tar.gz", "notes.txt"} and sum(report.left_out_counts.values()) == 2
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    page = report.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    data = json.loads(report.to_json(tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {Path(one["path"]).name for one in data["left_out"]} == {"<b>x.tar.gz", "notes.txt"}
    assert data["left_out_counts"] == report.left_out_counts
    for shown in (console.file.getvalue(), repr(report), report._repr_html_(), page): assert "notes.txt" in shown and "left out" in shown.lower()
    assert "<b>x" not in page and "<b>x" not in report._repr_html_()


@pytest.mark.parametrize("left_out, counts", [([1], {}), ("a", "b"), ([("a", "b")], {}), ([("a", "b")], {"b": "x"}), (None, {"b": 1}), ({}, []), ([["a"]], {"a": 1})])
def test_a_set_may_have_anything_under_that_name(tiny, left_out, counts, tmp_path):
    report = check_image_set({"images": [{"image": make_image()}], "left_out": left_out, "left_out_counts": counts}, tiny)
    report.to_html(tmp_path / "r.html")
    assert report.left_out == [] and json.dumps(report.to_dict())


def test_every_reason_of_a_failure_has_a_remedy():
    import re
    from devsky_nb import images
    sources = [file.read_text(encoding="utf-8") for file in Path(images.__path__[0]).glob("*.py")]
    reasons = {reason for text in sources for reason in re.findall(r'load_error\(\s*"([a-z-]+)"', text)}
    assert "aspect-ratio" in reasons and reasons - set(REMEDIES) <= {"bad-min-edge"}, "an argument's name is no image's fault"
