"The cache under damage, full disks, other processes, and the Hub's own client."
import os, signal, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hubcache import blob_name, make_repo
from huggingface_hub import scan_cache_dir, snapshot_download

from devsky_nb.cache import (cache_problems, cache_report, cached_commit, last_used, pin, pins, plan_eviction, record_use, unpin, use_stamp,
                             verify_cache)
from devsky_nb.errors import ValidationError

A, B, C = "a" * 40, "b" * 40, "c" * 40
HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def hub(tmp_path):
    "Three revisions; the weights are shared by the first two."
    cache = tmp_path / "hub"
    make_repo(cache, "shop/clip", {A: {"config.json": b"{1}", "w.safetensors": b"w" * 9000}, B: {"config.json": b"{22}", "w.safetensors": b"w" * 9000},
                                   C: {"config.json": b"{333}", "w.safetensors": b"x" * 5000}}, {"main": C})
    return cache


def disk_usage(folder):
    return sum(p.stat().st_size for p in (folder).rglob("blobs/*") if p.is_file() and not p.is_symlink())


def age(hub, commit, days):
    record_use("shop/clip", commit, hub)
    then = time.time() - 86400 * days
    os.utime(use_stamp("shop/clip", commit, hub), (then, then))


def prune(hub):
    return subprocess.run([HF, "cache", "prune", "--yes", "--cache-dir", hub], capture_output=True, text=True, check=True)


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


@pytest.mark.parametrize("revision", ["", "d", "v1", "../../x", "refs/main", A + "0"])
def test_revisions_that_are_not_cached_name_what_is(hub, revision):
    with pytest.raises(ValidationError, match="cached are aaaaaaaa, bbbbbbbb, cccccccc"): cached_commit("shop/clip", revision, hub)


@pytest.mark.parametrize("repo", ["shop/none", "../../etc", "", "a/b/c"])
def test_repositories_that_are_not_cached(hub, repo):
    for call in (lambda: pin(repo, A, "x", hub), lambda: verify_cache(repo, cache_dir=hub)):
        with pytest.raises(ValidationError, match="is not in the cache"): call()


def test_a_sound_cache_verifies(hub):
    report = verify_cache(cache_dir=hub)
    assert report.ok and report.files == 5 and report.bytes == 9000 + 5000 + 3 + 4 + 5


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b[:50] + b"!" + b[51:], lambda b: b + b"w"])
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
    (repo / "blobs" / ("f" * 64 + ".incomplete")).write_bytes(b"half")
    (repo / "refs" / "gone").write_text("d" * 40)
    (repo / "snapshots" / A / "m.safetensors.index.json").write_text('{"weight_map": {"x": "m-1.safetensors"}}')
    (repo / "snapshots" / B / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "U"], "safety": [null, null], "vae": ["diffusers", "V"]}')
    (repo / "snapshots" / B / "vae").mkdir()
    found = {(p.revision, p.file) for p in verify_cache(cache_dir=hub).problems}
    assert found == {(C, "w.safetensors"), (None, "f" * 64 + ".incomplete"), (None, None), (A, "m-1.safetensors"), (B, "unet")}
    assert len(cache_report(hub).problems) == 1 and "devsky cache verify" in str(cache_report(hub).problems[0])


def test_copies_without_links_cannot_be_judged_and_are_not_called_damaged(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / A
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"w")
    report = verify_cache(cache_dir=tmp_path)
    assert report.ok and report.unverifiable == 1 and "1 without a checksum" in repr(report)


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
        assert cache_report(folder).revisions == [] and verify_cache(cache_dir=folder).ok and plan_eviction(max_bytes=0, cache_dir=folder).ok


def use_often(args):
    hub, n = args
    return all(record_use("shop/clip", (A, B, C)[i % 3], hub) for i in range(n))


def test_many_processes_log_their_use_at_once(hub):
    with ProcessPoolExecutor(4) as pool: assert all(pool.map(use_often, [(hub, 300)] * 4))
    assert {c for _, c in last_used(hub)} == {A, B, C}


def test_kill_9_while_pinning_leaves_a_whole_ref_or_the_old_one(hub):
    pin("shop/clip", A, "x", hub)
    code = f"from devsky_nb.cache import pin\nwhile True:\n    for c in ({A!r}, {B!r}): pin('shop/clip', c, 'x', {str(hub)!r})"
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(0.6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert pins(hub)["shop/clip", "x"] in (A, B)
        assert scan_cache_dir(hub).warnings == [] or all("missing commit" not in str(w) for w in scan_cache_dir(hub).warnings)


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
    with pytest.raises(ValidationError, match="cannot pin.*[Rr]ead-only"): pin("shop/clip", A, "x", disk)
    assert any("cannot be written" in p.what for p in cache_problems(disk))
    assert verify_cache(cache_dir=disk).ok


def test_a_full_disk_leaves_no_half_written_pin(mounted):
    disk = mounted("size=64k")
    make_repo(disk, "shop/clip", {A: {"config.json": b"{}"}})
    with pytest.raises(OSError): (disk / "filler").write_bytes(b"0" * 100_000)
    with pytest.raises(ValidationError, match="No space left"): pin("shop/clip", A, "x", disk)
    assert pins(disk) == {} and not list((disk / "models--shop--clip" / "refs").rglob("*.*"))


@pytest.mark.parametrize("setup, expected", [
    ("", []),
    ("os.environ['TRANSFORMERS_CACHE'] = '/x'", ["TRANSFORMERS_CACHE=/x is read by no library"]),
    ("import huggingface_hub.constants; os.environ['HF_HOME'] = '/late'", ["HF_HOME=/late was set after huggingface_hub was loaded"]),
    ("import transformers; os.environ['HF_HUB_OFFLINE'] = '1'", ["HF_HUB_OFFLINE=1 was set after"]),
    ("os.environ |= {'HF_HOME': '/a', 'HF_HUB_CACHE': '/b'}", ["HF_HUB_CACHE=/b decides where models are"]),
])
def test_settings_without_effect_are_explained(setup, expected):
    code = f"import os\n{setup}\nfrom devsky_nb.cache import cache_problems\nprint(*[p.what for p in cache_problems()], sep='\\n', end='')"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.splitlines()
    assert len(lines) == len(expected) and all(line.startswith(e) for line, e in zip(lines, expected)), lines
