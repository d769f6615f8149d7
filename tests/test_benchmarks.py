"benchmarks/embedding.py from end to end at a tiny size: a side that cannot run has its reason in the table and stops nobody."
import json, platform
from pathlib import Path

import embedding, numpy as np, pytest
from PIL import Image

import devsky_nb

TINY = Path(devsky_nb.__file__).parent / "models/tiny-clip"
OURS = "devsky_nb, to Parquet"


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(embedding, "SET_BY_OTHERS", ())  # tests run beside each other: one thread each
        result = embedding.main(["--model", str(TINY), "--images", "4", "--rounds", "2", "--sizes", "96x64", "--out", str(out), "--others", "9", "--sides", "document", OURS, "open_clip",
                                 "--peers-python", program(out / "python", "echo no such environment >&2; exit 3")])
    return result, out


@pytest.mark.slow
def test_the_sides_that_run_are_measured_in_turn(run):
    r, _ = run
    assert list(r["sides"]) == ["document", OURS]
    for name, side in r["sides"].items():
        ms = side["cpu_ms"]["96x64"]
        assert 0 < ms["min"] <= ms["median"] <= ms["max"] and side["model_only"]["median"] > 0
        assert side["min_cosine"]["96x64"] > 1 - 1e-5 and side["images_per_second"]["96x64"]["median"] > 0
        assert len(r["raw"]["sides"][name]["end_to_end"]["96x64"]) == len(r["raw"]["sides"][name]["model"]) == 2
    for what in ("cpu", "seconds"):
        took = {name: [x[what] for x in side["end_to_end"]["96x64"]] for name, side in r["raw"]["sides"].items() if name in r["sides"]}
        assert r["sides"][OURS][f"{what}_ratio"]["document"]["96x64"]["max"] == round(max(a / b for a, b in zip(took["document"], took[OURS])), 2)
    assert all(shape["gops"] > 0 for limit in r["limits"].values() for shape in limit["shapes"].values()) and {"fp32"} <= set(r["limits"])
    assert r["sides"][OURS]["idle_cores"] < .5


@pytest.mark.slow
def test_what_became_of_a_broken_file_is_seen_not_said(run):
    r, _ = run
    assert r["sides"]["document"]["broken_file"] == "stops: ValidationError, no vector for any file"
    assert r["sides"][OURS]["broken_file"] == "reports it, keeps the others"


@pytest.mark.slow
def test_a_side_that_cannot_run_is_a_row_with_its_reason(run):
    r, out = run
    assert r["no_result"] == {"open_clip": "no such environment"}
    assert "| open_clip | no result: no such environment |" in (out / "embedding.md").read_text(encoding="utf-8")


def kind(): return embedding.kind_of(embedding.flags(), platform.machine())


@pytest.mark.slow
def test_table_plot_and_json_are_written_and_agree(run):
    r, out = run
    results = json.loads((out / "embedding.json").read_text(encoding="utf-8"))
    assert results == {kind(): json.loads(json.dumps(r))}
    page = (out / "embedding.md").read_text(encoding="utf-8")
    assert page == embedding.table(results)
    assert f"| {OURS} | {r['sides'][OURS]['cpu_ms']['96x64']['median']:.1f} (" in page
    with Image.open(out / f"embedding-{kind()}.png") as plot: assert plot.width > 600
    assert (out / f"embedding-{kind()}.png").stat().st_size < 100_000
    assert not list(out.glob("*.part.json"))


def test_the_page_in_the_repository_is_made_from_the_json_beside_it():
    results = json.loads((embedding.HERE / "embedding.json").read_text(encoding="utf-8"))
    assert (embedding.HERE / "embedding.md").read_text(encoding="utf-8") == embedding.table(results)
    assert all((embedding.HERE / f"embedding-{kind}.png").stat().st_size < 100_000 for kind in results)


def turn_of(shares):
    "Workers during whose rounds other programs took these shares of the machine."
    replies = iter(shares)
    turn = embedding.Turn([])
    turn.workers = {"side": None}
    turn.each = lambda f: {"side": {"seconds": 1., "others": next(replies) * embedding.CORES}}
    return turn


def test_a_disturbed_round_is_done_again_and_a_disturbed_machine_gives_no_result():
    found = embedding.rounds(turn_of([.01, .2, .03]), 2, None, .05)
    assert [reply["others"] / embedding.CORES for reply in found["side"]] == [.01, .03]
    with pytest.raises(embedding.Disturbed, match="took 30% of the machine, and 5%"): embedding.rounds(turn_of([.3] * 9), 2, None, .05)


def test_a_run_goes_on_where_an_earlier_one_was_disturbed(tmp_path):
    path = tmp_path / "embedding-vnni.part.json"
    first = embedding.Kept(path, ["vnni", 64])
    assert first.phases == {}
    first.keep("640x427", {"document": {"peak": 1}})
    assert embedding.Kept(path, ["vnni", 64]).phases == {"640x427": {"document": {"peak": 1}}}
    assert embedding.Kept(path, ["vnni", 32]).phases == {}
    path.write_text("{", encoding="utf-8")
    assert embedding.Kept(path, ["vnni", 64]).phases == {}


@pytest.mark.parametrize("instructions, machine, kind", [
    (["avx2"], "x86_64", "avx2"), (["avx2", "avx512f"], "x86_64", "avx2"), (["avx2", "avx512_vnni"], "x86_64", "vnni"),
    (["avx2", "avx_vnni"], "x86_64", "vnni"), (["avx2", "avx512_vnni", "amx_int8"], "x86_64", "amx"), ([], "aarch64", "arm")])
def test_processors_come_in_kinds(instructions, machine, kind):
    assert embedding.kind_of(instructions, machine) == kind and kind in embedding.KINDS


@pytest.mark.slow
def test_a_side_that_dies_leaves_and_the_others_go_on(tmp_path):
    hello, reply = '{"cpu": 0}', '{"cpu_before": 0, "cpu_after": 0, "seconds": 1}'
    fine = program(tmp_path / "fine", f"echo '{hello}'; while read task; do echo '{reply}'; done")
    dies = program(tmp_path / "dies", f"echo '{hello}'; read task; echo '{reply}'; read task; kill -9 $$")
    turn = embedding.Turn([embedding.Worker(name, python, TINY, tmp_path / f"{name}-work") for name, python in (("dies", dies), ("fine", fine))])
    turn.each(embedding.Worker.start); turn.each(embedding.Worker.ready)
    found = embedding.rounds(turn, 3, lambda w: w.do("files"))
    assert list(found) == ["fine"] and len(found["fine"]) == 3 and turn.failed == {"dies": "killed by signal 9"}
    for w in turn.workers.values(): w.close(); assert w.process.returncode == 0


@pytest.mark.parametrize("found, says", [
    ([[1.], [1.], [1.]], "invents a vector for it"), ([[1.], [1.]], "drops it: 2 vectors for 3 files"),
    ([[1.], [np.nan], [1.]], "reports it, keeps the others"), ([[np.nan], [np.nan], [1.]], "reports it, loses 1 others")])
def test_fates_of_a_broken_file(tmp_path, found, says):
    np.save(tmp_path / "v.npy", np.array(found))
    assert embedding.fate({}, tmp_path / "v.npy", np.array([True, False, True])) == says


def test_vectors_that_are_missing_or_of_another_space_are_no_result():
    ones = np.ones((2, 1))
    assert embedding.cosines(ones, ones) == 1
    with pytest.raises(embedding.SideFailed, match="expected"): embedding.cosines(np.ones((2, 2)), ones)
    with pytest.raises(embedding.SideFailed, match="1 good files"): embedding.cosines(np.array([[1.], [np.nan]]), ones)


def test_the_pictures_are_distinct_and_of_the_size(tmp_path):
    paths = embedding.photographs(tmp_path, 64, (64, 48))
    assert len({Path(p).read_bytes() for p in paths}) == len(set(paths)) == 64
    assert {Image.open(p).size for p in paths} == {(64, 48)}
