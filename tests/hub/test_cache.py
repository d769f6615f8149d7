"The cache under damage, full disks, other processes, and the Hub's own client."
import json, logging, multiprocessing, os, shutil, signal, subprocess, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hubcache import blob_name, make_repo
from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.utils import _shared_blobs
from patience import PATIENCE, wait_until

from devsky_nb.hub.cache import cache_report, plan_eviction
from devsky_nb.hub.pins import cached_commit, last_used, pin, pins, record_use, unpin, use_stamp
from devsky_nb.hub.settings import cache_problems, quantized_cache
from devsky_nb.hub.verify import verify_cache
from devsky_nb.errors import DevSkyyError, ValidationError

A, B, C = "a" * 40, "b" * 40, "c" * 40
HF = Path(sys.executable).with_name("hf")
CLIP = Path(__file__).parents[2] / "devsky_nb" / "models" / "tiny-clip" / "model.safetensors"


@pytest.fixture
def hub(tmp_path):
    "Three revisions; the weights are shared by the first two."
    cache = tmp_path / "hub"
    make_repo(cache, "shop/clip",
              {A: {"config.json": b"{1}", "w.safetensors": b"w" * 9000}, B: {"config.json": b"{22}", "w.safetensors": b"w" * 9000},
                                   C: {"config.json": b"{333}", "w.safetensors": b"x" * 5000}}, {"main": C})
    return cache


def disk_usage(folder):
    return sum(p.stat().st_size for p in folder.glob("models--*/**/*") if p.is_file() and not p.is_symlink()
               and p.parent.name not in ("refs", "devsky", "devsky-used"))


def age(hub, commit, days):
    record_use("shop/clip", commit, hub)
    then = time.time() - 86400 * days
    os.utime(use_stamp("shop/clip", commit, hub), (then, then))
    os.utime(hub / "models--shop--clip" / "snapshots" / commit, (then, then))


def prune(hub):
    return subprocess.run([HF, "cache", "prune", "--yes", "--cache-dir", hub], capture_output=True, text=True, check=True)


def become_nobody():
    os.setgroups([]), os.setgid(65534), os.setuid(65534)


def as_nobody(act, hub):
    "What `act(hub)` returns for a user who owns nothing here: root itself is not stopped by permissions."
    if os.getuid() != 0: pytest.skip("only root can become another user")
    for folder in (hub, *hub.parents[:4]): folder.chmod(0o755)  # up to pytest's own folder
    verify_cache(cache_dir=hub), cache_problems(hub), plan_eviction(max_bytes=0,
                                                                    cache_dir=hub)  # load what another user could not read
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), become_nobody) as pool: return pool.submit(act, hub).result()


def snapshots(hub):
    return {p.name for p in (hub / "models--shop--clip" / "snapshots").iterdir()}


def test_the_hubs_own_prune_deletes_what_is_not_pinned_and_spares_what_is(hub):
    pin("shop/clip", A, "storefront", hub)
    prune(hub)
    assert snapshots(hub) == {A, C}
    assert unpin("shop/clip", "storefront", hub)
    prune(hub)
    assert snapshots(hub) == {C}


def test_a_pin_is_a_revision_name_for_the_hubs_client_and_raises_no_warning(hub):
    pin("shop/clip", A, "storefront", hub)
    record_use("shop/clip", A, hub)
    assert Path(snapshot_download("shop/clip", revision="devsky/storefront", cache_dir=hub, local_files_only=True)).name == A
    assert scan_cache_dir(hub).warnings == []
    pin("shop/clip", B, "storefront", hub)
    assert pins(hub) == {("shop/clip", "storefront"): B}


@pytest.mark.parametrize("alias", ["", "..", "../x", "a/b", ".hidden", "a b", "a\0", "-x"])
def test_pin_names_are_checked(hub, alias):
    with pytest.raises(ValidationError, match="is no name for a pin"): pin("shop/clip", A, alias, hub)
    assert pins(hub) == {}


@pytest.mark.parametrize("revision", ["", "d", "v1", "../../x", "refs/main", A + "0", "a", "aaaaaa", "/etc/hostname", "a\0"])
def test_revisions_that_are_not_cached_name_what_is(hub, revision):
    with pytest.raises(ValidationError, match="cached are aaaaaaaa, bbbbbbbb, cccccccc"): cached_commit("shop/clip", revision, hub)


def test_files_outside_of_refs_name_no_revision(hub, tmp_path):
    (tmp_path / "elsewhere").write_text(A)
    for revision in (str(tmp_path / "elsewhere"), "../../../elsewhere"):
        with pytest.raises(ValidationError, match="no cached revision"): cached_commit("shop/clip", revision, hub)


@pytest.mark.parametrize("repo, remedy", [("shop/none", "hf download shop/none"), *((name, "name looks like 'org/name'") for name in ("../../etc", "/etc", "", "a/b/c"))])
def test_repositories_that_are_not_cached(hub, repo, remedy):
    for call in (lambda: pin(repo, A, "x", hub), lambda: verify_cache(repo, cache_dir=hub)):
        with pytest.raises(ValidationError, match=f"is not in the cache .*{remedy}"): call()


def test_a_sound_cache_verifies(hub):
    report = verify_cache(cache_dir=hub)
    assert report.ok and report.files == 5 and report.bytes == 9000 + 5000 + 3 + 4 + 5


@pytest.mark.parametrize("damage",
                         [lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b[:50] + b"!" + b[51:], lambda b: b + b"w"])
def test_damage_is_found_in_every_revision_that_shares_the_blob(hub, damage):
    blob = hub / "models--shop--clip" / "blobs" / blob_name("w.safetensors", b"w" * 9000)
    blob.write_bytes(damage(blob.read_bytes()))
    problems = verify_cache(cache_dir=hub).problems
    assert {(p.revision, p.file) for p in problems} == {(A, "w.safetensors"), (B, "w.safetensors")}
    assert all("--force-download" in p.remedy for p in problems)
    assert verify_cache("shop/clip", "main", hub).ok


def test_small_files_are_verified_by_gits_hash(hub):
    (hub / "models--shop--clip" / "blobs" / blob_name("config.json", b"{1}")).write_bytes(b"{2}")
    assert [(p.revision, p.file) for p in verify_cache(cache_dir=hub).problems] == [(A, "config.json")]


def test_missing_blobs_shards_components_refs_and_half_downloads_are_named(hub):
    repo = hub / "models--shop--clip"
    (repo / "blobs" / blob_name("w.safetensors", b"x" * 5000)).unlink()
    for name, text in (("newline", C + "\n"), ("empty", ""), ("zeros", "\0" * 40)): (repo / "refs" / name).write_text(text)
    (repo / "snapshots" / ("e" * 40)).mkdir()
    (repo / "blobs" / ("f" * 64 + ".incomplete")).write_bytes(b"half")
    (repo / "refs" / "gone").write_text("d" * 40)
    (repo / "snapshots" / A / "m.safetensors.index.json").write_text('{"weight_map": {"x": "m-1.safetensors"}}')
    (repo / "snapshots" / B / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "U"], "safety": [null, null], "vae": ["diffusers", "V"]}')
    (repo / "snapshots" / B / "vae").mkdir()
    found = {(p.revision, p.file) for p in verify_cache(cache_dir=hub).problems}
    assert found == {(C, "w.safetensors"), (None, "f" * 64 + ".incomplete"), (None, None), (B, "unet"), (B, "vae"), ("e" * 40, ".")}
    assert sum(p.file is None for p in verify_cache(cache_dir=hub).problems) == 4
    for owner in (cache_report(hub), plan_eviction(max_bytes=0, cache_dir=hub)):
        assert len(owner.problems) == 1 and "devsky cache verify" in repr(owner)


@pytest.mark.parametrize("files, missing", [
    (["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"], ["m-00002-of-00003.safetensors"]),
    (["m.safetensors.index.json"], ["m-1.safetensors", "m-2.safetensors"]),
    (["m.safetensors.index.json", "m-1.safetensors"], ["m-2.safetensors"]),
    (["m.safetensors.index.json", "training_args.bin"], ["m-1.safetensors", "m-2.safetensors"]),
    (["m.safetensors.index.json", "pytorch_model.bin"], []),
    (["m.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"], []),
    (["unet/m.safetensors.index.json", "unet/m-2.safetensors"], ["unet/m-1.safetensors"]),
    (["config.json"], ["config.json"]), (["config.json", "model.safetensors"], []), (["config.json", "onnx/model.onnx"], []),
    (["config.json", "training_args.bin"], ["config.json"]),
    (["unet/config.json", "vae/config.json", "vae/m.safetensors"], ["unet/config.json"]),
    (["tokenizer.json"], []),
])
def test_half_downloads(tmp_path, files, missing):
    content = {"m.safetensors.index.json": b'{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}',
               "config.json": b'{"architectures": ["M"]}'}
    make_repo(tmp_path, "a/b", {A: {f: content.get(f.split("/")[-1], f.encode()) for f in files}})
    report = verify_cache(cache_dir=tmp_path)
    assert sorted(p.file for p in report.problems) == missing
    assert all(f"--revision {A} --cache-dir {tmp_path}" in p.remedy for p in report.problems)


@pytest.mark.parametrize("text", [b"", b"[1]", b"nul", b"{", b"\xff", b'{"weight_map": 3}', b'{"weight_map": {"a": 1, "b": ["x"]}}',
                                  b'{"unet": 3}', b'{"architectures": 7}'])
@pytest.mark.parametrize("name", ["model_index.json", "m.safetensors.index.json", "config.json"])
def test_hostile_json_ends_no_verification(tmp_path, name, text):
    make_repo(tmp_path, "a/b", {A: {name: text, "model.safetensors": b"w"}})
    assert verify_cache(cache_dir=tmp_path).ok


def test_blobs_that_cannot_be_read_are_findings(hub):
    blobs = hub / "models--shop--clip" / "blobs"
    os.mkfifo(blobs / ("1" * 64))
    (blobs / ("2" * 64)).mkdir()
    (blobs / ("3" * 64)).write_bytes(b"of no revision")
    problems = verify_cache(cache_dir=hub).problems
    assert [p.what.split(":")[0] for p in problems] == ["not a file", "not a file", "damaged"]
    assert all(f"rm {blobs}/{p.file}" in p.remedy for p in problems)


def test_a_blob_that_may_not_be_read_is_a_finding_for_another_user(hub):
    blob = hub / "models--shop--clip" / "blobs" / blob_name("config.json", b"{1}")
    blob.chmod(0)
    assert [p.what for p in as_nobody(problems_of, hub)] == ["cannot be read: Permission denied"]


@pytest.mark.parametrize("part", [".", "snapshots", "blobs", "refs"])
def test_a_repository_that_may_not_be_read_is_a_finding_and_not_an_empty_one(part, hub):
    repo = hub / "models--shop--clip"
    (repo / part).chmod(0)
    try: [problem] = as_nobody(problems_of, hub)
    finally: (repo / part).chmod(0o755)
    assert problem.what == f"{repo.name if part == '.' else part} cannot be read: Permission denied" and "chmod -R u+rX" in problem.remedy


def test_a_cache_that_may_not_be_read_is_not_sound(hub):
    (hub / "locked").mkdir()
    (hub / "locked").chmod(0)
    assert "cannot be read: Permission denied" in as_nobody(refused_by, hub)


def refused_by(hub):
    locked = hub / "locked"
    try: return verify_cache(cache_dir=locked).ok
    except DevSkyyError as e: return e.message


def problems_of(hub): return verify_cache(cache_dir=hub).problems


def test_copies_without_links_have_no_checksum_and_are_judged_as_far_as_possible(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / A
    snapshot.mkdir(parents=True)
    shutil.copy(CLIP, snapshot / "model.safetensors")
    (snapshot / "vocab.txt").write_bytes(b"w")
    report = verify_cache(cache_dir=tmp_path)
    assert report.ok and report.unchecked == 2 and "2 unchecked" in repr(report)
    os.truncate(snapshot / "model.safetensors", 100_000)
    assert [p.file for p in verify_cache(cache_dir=tmp_path).problems] == ["model.safetensors"]
    before = disk_usage(tmp_path)
    done = plan_eviction(max_bytes=0, cache_dir=tmp_path).execute()
    assert done.freed_bytes == before - disk_usage(tmp_path) == 100_001


def test_names_that_are_no_hash_are_not_called_damaged(hub):
    repo = hub / "models--shop--clip"
    (repo / "blobs" / "some-xet-name").write_bytes(b"hello")
    (repo / "snapshots" / A / "README.md").symlink_to("../../blobs/some-xet-name")
    report = verify_cache(cache_dir=hub)
    assert report.ok and report.unchecked == 1


def test_the_hubs_shared_blob_store(tmp_path):
    weights, links = b"s" * 7000, []
    for repo_id in ("shop/one", "shop/two"):
        repo = make_repo(tmp_path, repo_id, {A: {"config.json": repo_id.encode(), "w.safetensors": weights}})
        links.append(repo / "blobs" / blob_name("w.safetensors", weights))
        assert _shared_blobs.publish_blob_to_shared_store(blob_path=str(links[-1]), xet_hash="c0" * 32, cache_dir=tmp_path,
                                                          expected_size=7000)
    store = links[0].resolve()
    assert store == links[1].resolve() and verify_cache(cache_dir=tmp_path).ok and cache_report(tmp_path).size == 7016
    pin("shop/two", A, "x", tmp_path)
    plan = plan_eviction(max_bytes=0, cache_dir=tmp_path)
    assert [r.repo_id for r in plan.evict] == ["shop/one"]
    assert plan.freed_bytes == plan.execute().freed_bytes == 8
    assert store.exists()
    store.write_bytes(b"S" * 7000)
    assert [p.repo_id for p in verify_cache(cache_dir=tmp_path).problems] == ["shop/two"]
    unpin("shop/two", "x", tmp_path)
    plan = plan_eviction(max_bytes=0, cache_dir=tmp_path)
    assert plan.freed_bytes == 7008 == plan.execute().freed_bytes and not store.exists()


def test_a_commit_that_two_repositories_share_is_evicted_where_planned(tmp_path):
    for i in range(6):
        cache = tmp_path / str(i)
        for repo_id, size in (("shop/original", 100), ("shop/duplicate", 200)):
            make_repo(cache, repo_id, {A: {"config.json": b"1" * size}})
        pin("shop/original", A, "production", cache)
        done = plan_eviction(max_bytes=0, cache_dir=cache).execute()
        assert done.freed_bytes == 200 and [p.name for p in cache.iterdir()] == ["models--shop--original"]


def test_nothing_is_sacrificed_for_nothing(hub):
    for commit, days in ((A, 3), (B, 2), (C, 1)): age(hub, commit, days)
    repo = hub / "models--shop--clip"
    shutil.copytree(repo / "snapshots" / B, repo / "snapshots" / ("d" * 40), symlinks=True)
    age(hub, "d" * 40, 9)
    pin("shop/clip", B, "x", hub)
    assert [r.commit for r in plan_eviction(max_bytes=0, cache_dir=hub).evict] == [A, C]
    assert [r.commit for r in plan_eviction(unused_days=8, cache_dir=hub).evict] == ["d" * 40]


def test_keep_and_other_repository_types_stay(hub):
    make_repo(hub, "shop/hats", {A: {"config.json": b"hats"}})
    data = hub / "datasets--shop--clip" / "snapshots" / A
    data.mkdir(parents=True)
    (data / "rows.csv").write_bytes(b"1234567890")
    plan = plan_eviction(max_bytes=0, cache_dir=hub, keep=["shop/hats", B])
    done = plan.execute()
    assert snapshots(hub) == {B} and (hub / "models--shop--hats").exists() and data.exists()
    assert not done.ok and "no model" in str(done) and plan.size == 9000 + 5000 + 3 + 4 + 5 + 4 + 10


@pytest.mark.parametrize("keep, left", [("shop/clip", {A, B, C}), ([A[:8], B[:7]], {A, B}), ((C,), {C}), ({"shop/hats"}, set())])
def test_what_is_kept_is_named_as_the_listing_names_it(hub, keep, left):
    make_repo(hub, "shop/hats", {"d" * 40: {"config.json": b"hats"}})
    plan_eviction(max_bytes=0, cache_dir=hub, keep=keep).execute()
    assert {p.name for p in hub.glob("models--shop--clip/snapshots/*")} == left


@pytest.mark.parametrize("keep", ["shop/cilp", "clip", A[:6], ["shop/clip", "b" * 39 + "a"], [None], "", "models--shop--clip", None, 5,
                                  Path("shop/clip")])
def test_a_name_to_keep_that_means_nothing_is_an_error(hub, keep, tmp_path):
    with pytest.raises(ValidationError, match="means nothing in this cache"): plan_eviction(max_bytes=0, cache_dir=hub, keep=keep)
    with pytest.raises(ValidationError, match="means nothing"):
        plan_eviction(max_bytes=0, cache_dir=tmp_path / "none", keep="shop/clip")
    assert snapshots(hub) == {A, B, C}


def make_copy(hub, name, size, days, **about):
    "A quantized copy of a model, as the loaders write it."
    folder = quantized_cache(hub) / name
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(b"q" * size)
    if about: (folder / "quantized.json").write_text(json.dumps(about), encoding="utf-8")
    for path in (folder / "quantized.json", folder):
        if path.exists(): os.utime(path, (time.time() - 86400 * days,) * 2)
    return folder


def test_quantized_copies_are_listed_and_evicted_with_the_revisions(hub):
    old = make_copy(hub, "shop--clip-nf4-0", 500, 40, model="shop/clip", label="nf4", commit=A)
    new = make_copy(hub, "shop--clip-nf4-1", 600, 1, model="shop/clip", label="nf4", commit=A)
    broken = make_copy(hub, "shop--clip-int8-2", 700, 50)
    report = cache_report(hub)
    assert [(c.model, c.label, c.commit) for c in report.quantized] == [("shop--clip-int8-2", "damaged", None),
                                                                        ("shop/clip", "nf4", A), ("shop/clip", "nf4", A)]
    assert "3 quantized copies" in str(report)
    assert "shop--clip-nf4-0" in repr(report)
    assert "shop--clip-nf4-0" in report._repr_html_()
    assert json.dumps(report.to_dict())
    for commit in (A, B, C): age(hub, commit, 2)
    plan = plan_eviction(unused_days=30, cache_dir=hub)
    sizes = sum(p.stat().st_size for folder in (old, broken) for p in folder.rglob("*") if p.is_file())
    assert [Path(c.folder) for c in plan.evict] == [broken, old]
    assert plan.freed_bytes == sizes
    assert plan.size > disk_usage(hub)
    done = plan.execute()
    assert done.freed_bytes == sizes
    assert (old.exists(), broken.exists(), new.exists()) == (False, False, True)
    assert snapshots(hub) == {A, B, C}
    assert plan_eviction(max_bytes=0, cache_dir=hub, keep=new.name).execute().ok is False
    assert new.exists()
    assert not (hub / "models--shop--clip").exists()


def test_a_copy_that_was_used_after_the_plan_stays(hub):
    copy = make_copy(hub, "shop--clip-nf4-0", 500, 40, model="shop/clip", label="nf4", commit=A)
    plan = plan_eviction(unused_days=30, cache_dir=hub)
    os.utime(copy / "quantized.json")
    assert plan.execute().skipped == ["shop--clip-nf4-0"] and copy.exists()


def test_copies_without_a_hub_cache_are_evicted_too(tmp_path):
    copy = make_copy(tmp_path / "hub", "shop--clip-nf4-0", 500, 40, model="shop/clip", label="nf4", commit=A)
    assert plan_eviction(max_bytes=0, cache_dir=tmp_path / "hub").execute().ok and not copy.exists()


def test_a_running_download_is_not_deleted_with_its_repository(hub):
    running = hub / "models--shop--clip" / "blobs" / ("f" * 64 + ".12345678.incomplete")
    early = plan_eviction(max_bytes=0, cache_dir=hub)
    running.write_bytes(b"half")
    assert plan_eviction(max_bytes=0, cache_dir=hub).evict == []
    assert len(early.execute().skipped) == 3 and running.exists() and snapshots(hub) == {A, B, C}


def test_a_fetched_revision_is_not_as_old_as_its_stamp(hub):
    age(hub, A, 100)
    os.utime(hub / "models--shop--clip" / "snapshots" / A)
    assert plan_eviction(unused_days=30, cache_dir=hub).evict == []


def test_eviction_frees_exactly_what_it_says_and_keeps_shared_blobs(hub):
    for commit, days in ((A, 3), (B, 2), (C, 1)): age(hub, commit, days)
    plan = plan_eviction(max_bytes=disk_usage(hub) - 1, cache_dir=hub)
    assert [r.commit for r in plan.evict] == [A] and plan.freed_bytes == 3
    plan = plan_eviction(max_bytes=9000, cache_dir=hub)
    assert [r.commit for r in plan.evict] == [A, B] and plan.freed_bytes == 9007
    before = disk_usage(hub)
    done = plan.execute()
    assert before - disk_usage(hub) == done.freed_bytes == 9007
    assert snapshots(hub) == {C} and verify_cache(cache_dir=hub).ok
    plan_eviction(max_bytes=0, cache_dir=hub).execute()
    assert not (hub / "models--shop--clip").exists()


def test_order_is_least_recently_used_by_our_own_log(hub):
    for commit, days in ((C, 30), (A, 20), (B, 1)): age(hub, commit, days)
    assert [r.commit for r in plan_eviction(unused_days=10, cache_dir=hub).evict] == [C, A]
    assert [r.commit for r in plan_eviction(max_bytes=10_000, cache_dir=hub).evict] == [C]
    assert plan_eviction(unused_days=99, cache_dir=hub).evict == []


def test_pins_are_never_evicted_and_an_unreachable_limit_is_said(hub):
    for alias, commit in (("x", A), ("y", C)): pin("shop/clip", commit, alias, hub)
    plan = plan_eviction(max_bytes=10, unused_days=0, cache_dir=hub)
    assert [r.commit for r in plan.evict] == [B] and not plan.ok and "the rest is pinned" in repr(plan)


def test_what_is_pinned_or_used_after_the_plan_stays(hub):
    for commit in (A, B, C): age(hub, commit, 9)
    plan = plan_eviction(max_bytes=0, cache_dir=hub)
    pin("shop/clip", A, "late", hub)
    record_use("shop/clip", B, hub)
    done = plan.execute()
    assert snapshots(hub) == {A, B} and sorted(done.skipped) == [f"shop/clip {A}", f"shop/clip {B}"]
    assert verify_cache(cache_dir=hub).ok


def test_only_stale_half_downloads_are_planned(hub):
    blobs = hub / "models--shop--clip" / "blobs"
    for name, hours in (("1", 0), ("2", 48)):
        (blobs / (name * 64 + ".incomplete")).write_bytes(b"half")
        os.utime(blobs / (name * 64 + ".incomplete"), (time.time() - 3600 * hours,) * 2)
    plan = plan_eviction(unused_days=999, cache_dir=hub)
    assert [Path(p).name[0] for p in plan.incomplete] == ["2"] and plan.freed_bytes == 4
    plan.execute()
    assert [p.name[0] for p in blobs.glob("*.incomplete")] == ["1"]


def test_an_absent_or_empty_cache_is_no_error(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        assert cache_report(folder).revisions == []
        assert verify_cache(cache_dir=folder).ok
        assert plan_eviction(max_bytes=0, cache_dir=folder).ok


def use_often(args):
    hub, n = args
    return all(record_use("shop/clip", (A, B, C)[i % 3], hub) for i in range(n))


def test_many_processes_and_threads_log_their_use_at_once(hub):
    results = []
    threads = [threading.Thread(target=lambda: results.append(use_often((hub, 300)))) for _ in range(4)]
    with ProcessPoolExecutor(3) as pool:
        running = pool.map(use_often, [(hub, 300)] * 3)
        for t in threads: t.start()
        for t in threads: t.join()
        assert all(running) and results == [True] * 4
    assert {c for _, c in last_used(hub)} == {A, B, C}
    assert len(list((hub / "models--shop--clip" / "devsky-used").iterdir())) == 3


@pytest.mark.parametrize("repo, commit",
                         [("shop/clip", "d" * 40), ("shop/none", A), ("shop/clip", "main"), ("shop/clip", ""),
                          ("shop/clip", "../snapshots/" + A),
                                          ("../x", A), ("shop/clip", "../../../../escaped")])
def test_a_use_of_what_is_not_cached_is_not_logged(hub, repo, commit):
    before = sorted(hub.parent.rglob("*"))
    assert record_use(repo, commit, hub) is False and last_used(hub) == {} and sorted(hub.parent.rglob("*")) == before


def test_kill_9_of_a_writer_leaves_the_log_readable(hub):
    code = f"from devsky_nb.hub.pins import record_use\nprint(1, flush=True)\nwhile True:\n    for c in ({A!r}, {B!r}): record_use('shop/clip', c, {str(hub)!r})"
    both = {("shop/clip", A), ("shop/clip", B)}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        wait_until(lambda: set(last_used(hub)) == both or process.poll() is not None, pause=0)
        assert process.poll() is None
        time.sleep(.1)  # in the midst of one of the next
        process.send_signal(signal.SIGKILL)
        process.wait()
        used = last_used(hub)
        assert set(used) == both and all(time.time() - t < PATIENCE for t in used.values())
    assert scan_cache_dir(hub).warnings == []


def test_kill_9_while_pinning_leaves_a_whole_ref_or_the_old_one(hub):
    pin("shop/clip", A, "x", hub)
    code = f"from devsky_nb.hub.pins import pin\nprint(1, flush=True)\nwhile True:\n    for c in ({A!r}, {B!r}): pin('shop/clip', c, 'x', {str(hub)!r})"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        for _ in range(20): assert scan_cache_dir(hub).warnings == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert pins(hub)["shop/clip", "x"] in (A, B) and set(pins(hub)) == {("shop/clip", "x")}
        assert scan_cache_dir(hub).warnings == [] and verify_cache(cache_dir=hub).ok


@pytest.fixture
def mounted(tmp_path):
    "Mounts small file systems, and unmounts them."
    made = []
    def mount(options):
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        made.append(folder)
        return folder
    yield mount
    for folder in made: subprocess.run(["umount", folder], check=True)


def test_a_read_only_cache_still_loads_and_refuses_a_pin(mounted):
    disk = mounted("size=1m")
    make_repo(disk, "shop/clip", {A: {"config.json": b"{}"}})
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert record_use("shop/clip", A, disk) is False
    with pytest.raises(DevSkyyError, match="cannot write x .*[Rr]ead-only"): pin("shop/clip", A, "x", disk)
    [problem] = [p for p in cache_problems(disk) if "cannot be written" in p.what]
    assert "its disk is mounted read-only" in problem.what and "set HF_HOME" in problem.remedy
    assert verify_cache(cache_dir=disk).ok
    with pytest.raises(DevSkyyError, match="cannot delete.*[Rr]ead-only"): plan_eviction(max_bytes=0, cache_dir=disk).execute()
    assert verify_cache(cache_dir=disk).ok


def use_and_evict(hub):
    logging.disable(logging.CRITICAL)  # the Hub's client logs each refusal
    with pytest.raises(DevSkyyError, match="cannot write x .*Permission denied"): pin("shop/clip", A, "x", hub)
    assert record_use("shop/clip", A, hub) is False
    [problem] = [p for p in cache_problems(hub) if "cannot be written" in p.what]
    assert "permission denied" in problem.what and f"sudo chown -R 65534 {hub}" in problem.remedy
    assert verify_cache(cache_dir=hub).ok
    return plan_eviction(max_bytes=0, cache_dir=hub).execute()


def test_another_users_cache_is_read_and_eviction_does_not_claim_what_it_may_not_delete(hub):
    done = as_nobody(use_and_evict, hub)
    assert (done.freed_bytes, len(done.skipped), done.evict, done.ok) == (0, 3, [], False)
    assert snapshots(hub) == {A, B, C} and verify_cache(cache_dir=hub).ok


def test_a_full_disk_leaves_no_half_written_pin(mounted):
    disk = mounted("size=64k")
    make_repo(disk, "shop/clip", {A: {"config.json": b"{}"}})
    with pytest.raises(OSError): (disk / "filler").write_bytes(b"0" * 100_000)
    with pytest.raises(DevSkyyError, match="No space left"): pin("shop/clip", A, "x", disk)
    assert pins(disk) == {} and not list((disk / "models--shop--clip").rglob("*.partial"))
    assert record_use("shop/clip", A, disk) in (True, False)  # an empty file may still fit
    (disk / "filler").unlink()
    pin("shop/clip", A, "x", disk)
    assert scan_cache_dir(disk / ".").repos and verify_cache(cache_dir=disk).ok and record_use("shop/clip", A, disk)


def test_a_disk_without_room_for_another_file_fails_no_model_load(mounted):
    disk = mounted("size=1m,nr_inodes=16")
    make_repo(disk, "shop/clip", {A: {"config.json": b"{}"}})
    with pytest.raises(OSError):
        for i in range(16): (disk / f"filler{i}").touch()
    assert record_use("shop/clip", A, disk) is False and last_used(disk) == {}
    with pytest.raises(DevSkyyError, match="No space left"): pin("shop/clip", A, "x", disk)
    assert pins(disk) == {} and verify_cache(cache_dir=disk).ok


CLEAN = {k: v for k,
         v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS", "HUGGINGFACE", "XDG_"))} | {"HOME": "/home/shop"}


@pytest.mark.parametrize("setup, expected", [
    ("", []),
    ("os.environ |= {'HF_HUB_OFFLINE': 'true', 'HF_HOME': '~/x', 'HF_HUB_CACHE': '$HOME/x/hub'}", []),
    ("os.environ['TRANSFORMERS_CACHE'] = '/x'", ["TRANSFORMERS_CACHE=/x is read by no library"]),
    ("import huggingface_hub.constants; os.environ['HF_HOME'] = '/late'",
     ["HF_HOME=/late was set after huggingface_hub was loaded"]),
    ("import huggingface_hub.constants; os.environ['HF_HUB_CACHE'] = '/late'",
     ["HF_HUB_CACHE=/late was set after huggingface_hub was loaded"]),
    ("import transformers; os.environ['HF_HUB_OFFLINE'] = '1'", ["HF_HUB_OFFLINE=1 was set after"]),
    ("os.environ |= {'HF_HOME': '/a', 'HF_HUB_CACHE': '/b'}", ["HF_HUB_CACHE=/b decides where models are"]),
    ("os.environ |= {'HF_HUB_DISABLE_SYMLINKS': '1', 'HF_HUB_CACHE': '/tmp'}", ["/tmp has no symbolic links"]),
])
def test_settings_without_effect_are_explained(setup, expected):
    code = f"import os\n{setup}\nfrom devsky_nb.hub.settings import cache_problems\nprint(*[p.what for p in cache_problems()], sep='\\n', end='')"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN).stdout.splitlines()
    assert len(lines) == len(expected) and all(line.startswith(e) for line, e in zip(lines, expected)), lines


@pytest.mark.parametrize("setup, call, expected", [
    ("", "'/m', True", "/m/hub True"),
    ("os.environ['HF_HUB_CACHE'] = '/m/hub'", "'/m'", "/m/hub False"),
    ("import huggingface_hub.constants", "offline=False", "/home/shop/.cache/huggingface/hub False"),
    ("os.environ['HF_HOME'] = '/m'; import huggingface_hub.constants", "'/m/'", "/m/hub False"),
    ("import transformers", "'/m'",
     "HF_HOME=/m comes too late: transformers and huggingface_hub were imported before, and HF_HOME=/home/shop/.cache/huggingface stays"),
    ("import huggingface_hub.constants", "offline=True",
     "HF_HUB_OFFLINE=1 comes too late: huggingface_hub was imported before, and HF_HUB_OFFLINE=0 stays"),
    ("os.environ['HF_HUB_CACHE'] = '/b'", "'/m'", "HF_HOME=/m would not move the models: HF_HUB_CACHE=/b decides"),
    ("os.environ['HUGGINGFACE_HUB_CACHE'] = '/b'", "'/m'",
     "HF_HOME=/m would not move the models: HUGGINGFACE_HUB_CACHE=/b decides"),
])
def test_settings_are_made_while_they_have_an_effect_and_refused_later(setup, call, expected):
    code = f"""import os, sys
{setup}
from devsky_nb.hub.settings import configure_cache, hub_cache
before = {{m for m in sys.modules if m.startswith("huggingface_hub")}}
try: configure_cache({call})
except ValueError as e: print(e); sys.exit()
assert before == {{m for m in sys.modules if m.startswith("huggingface_hub")}}
from huggingface_hub import constants
print(constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN)
    assert done.stdout.startswith(expected), (done.stdout, done.stderr)
