"What editors, scripts, crashes and other people leave in a cache: each named for what it is, nothing followed outside, no hang."
import hashlib, json, os, shutil
from pathlib import Path

import pytest
from hubcache import blob_name, make_repo

from devsky_nb.errors import DevSkyyError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.cache import cache_report, plan_eviction, quantized_copies
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.models import edit_lock, find_spec, load_lock, lock_path
from devsky_nb.hub.pins import cached_commit, last_used, pin, pins, record_use, unpin
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.hub.settings import cache_problems, quantized_cache
from devsky_nb.hub.verify import verify_cache
from devsky_nb.hub.versions import verify_bundled

A, B = "a" * 40, "b" * 40
TINY = Path(__file__).parents[2] / "devsky_nb" / "models" / "tiny-clip"
FILES = {name: (TINY / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json",
                                                       "tokenizer_config.json", "preprocessor_config.json")}


@pytest.fixture
def hub(tmp_path):
    "One model in one revision, `main`."
    make_repo(tmp_path / "hub", "o/m", {A: FILES}, {"main": A})
    return tmp_path / "hub"


def repo(hub): return hub / "models--o--m"


def short(value):
    "The name of a test."
    return ascii(value)[:20]


def put(path, content):
    "Put in place of a file: text or bytes, a pipe, a link to a device, a folder, or nothing at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path): path.unlink()
    if isinstance(content, bytes): path.write_bytes(content)
    elif content == "pipe": os.mkfifo(path)
    elif content == "device": path.symlink_to("/dev/zero")
    elif content == "loop": path.symlink_to(path.name)
    elif content == "folder": path.mkdir()
    return path


NO_JSON = [b"", b"{", b'{"models": {"o--', b"null", b"5", b"[]", b'"text"', b"{}", b"\xff\xfe{\x00", b"[" * 100_000, b'{"a":' * 50_000,
           b'{"n": ' + b"9" * 5000 + b"}", b" " * (17 * 2**20), "pipe", "device", "folder", "loop"]
NO_COMMIT = [b"", b" \n", b"main", b"../../../x", b"/etc/passwd", A[:39].encode(), (A + "0").encode(), b"\0" * 40, b"\xff" * 40,
             A.encode("utf-16"), b"x" * 100_000, f"{A} {A}".encode(), A.upper().encode(), "pipe", "device", "loop"]


# --- refs

@pytest.mark.parametrize("text", [f"{A}\n", f"{A}\r\n", f" {A} ", f"\ufeff{A}", f"\n{A}\n\n"])
def test_white_space_around_a_commit_is_no_part_of_it_and_is_named_for_the_hubs_client(text, hub):
    (repo(hub) / "refs" / "main").write_text(text, encoding="utf-8", newline="")
    assert locate_model("o/m", hub, offline=True).name == A
    [problem] = verify_cache(cache_dir=hub).problems
    assert "ref main has more in it than a commit" in problem.what
    assert f"hf download o/m --cache-dir {hub}" in problem.remedy


@pytest.mark.parametrize("content", NO_COMMIT, ids=short)
def test_a_ref_that_is_no_commit_is_named_with_its_remedy(content, hub):
    put(repo(hub) / "refs" / "main", content)
    with pytest.raises(ModelLoadError, match="refs/main cannot be read: .*hf download o/m --cache-dir"):
        locate_model("o/m", hub, offline=True)
    with pytest.raises(ModelLoadError, match="refs/main cannot be read"): pin("o/m", "main", "x", hub)
    assert ["ref main" in p.what for p in verify_cache(cache_dir=hub).problems] == [True]
    report = cache_report(hub)
    assert any("refs" in p.what or "left out" in p.what for p in report.problems)
    assert locate_model("o/m", hub, offline=True, revision=A).name == A  # what needs no ref is not stopped


@pytest.mark.parametrize("content", NO_COMMIT, ids=short)
def test_a_pin_that_is_no_commit_stops_its_own_repository_alone(content, hub):
    make_repo(hub, "o/other", {B: FILES}, {"main": B})
    put(repo(hub) / "refs" / "devsky" / "o--m", content)
    assert locate_model("o/other", hub, offline=True).name == B
    assert pins(hub) == {}
    with pytest.raises(ModelLoadError, match="devsky/o--m cannot be read: .*Delete the pin with `rm "): locate_model("o/m", hub, offline=True)
    pin("o/m", A, "o--m", hub)
    assert locate_model("o/m", hub, offline=True).name == A
    assert pins(hub) == {("o/m", "o--m"): A}


@pytest.mark.parametrize("content", ["pipe", "device", b"\xff" * 40], ids=short)
def test_unreadable_refs_of_one_repository_are_a_line_of_the_report_and_stop_an_eviction(content, hub, tmp_path):
    make_repo(hub, "o/other", {B: FILES}, {"main": B})
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    link = hub / "models--o--other" / "snapshots" / B / "more.json"
    link.symlink_to(outside)
    (hub / "models--o--third").mkdir()
    whole = cache_report(hub)
    ref = put(repo(hub) / "refs" / "main", content)
    report = cache_report(hub)
    assert [(r.repo_id, r.commit, r.refs) for r in report.revisions] == [("o/other", B, ("main",))]  # the others are listed
    assert 0 < report.size == whole.size - sum(map(len, FILES.values()))
    problem, *others = report.problems
    assert f"{ref} cannot be read: " in problem.what and "its repository is left out" in problem.what and f"rm {ref}" in problem.remedy
    assert others == whole.problems and f"{hub}/models--o--third" in others[0].what and f"rm {link}" in others[1].remedy
    with pytest.raises(ModelLoadError, match="refs/main cannot be read"): plan_eviction(max_bytes=0, cache_dir=hub)


def test_a_ref_that_is_a_link_is_not_followed_out_of_the_repository(hub, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text(A)
    for name in ("main", "devsky/o--m"):
        ref = repo(hub) / "refs" / name
        ref.parent.mkdir(exist_ok=True)
        ref.unlink(missing_ok=True)
        ref.symlink_to(outside)
    with pytest.raises(ModelLoadError, match="it leads out of the repository's folder"): cached_commit("o/m", "main", hub)
    pin("o/m", A, "o--m", hub)
    assert outside.read_text() == A and not (repo(hub) / "refs" / "devsky" / "o--m").is_symlink()
    shutil.rmtree(repo(hub) / "refs" / "devsky")
    (tmp_path / "elsewhere").mkdir()
    (repo(hub) / "refs" / "devsky").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelLoadError, match="it leads out"): pin("o/m", A, "x", hub)
    assert unpin("o/m", "x", hub) is False
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("revision", ["../../../x", "/etc/hostname", "refs/../../x", "a\0b", "", " main", "-x", 5, True, ["main"]])
def test_what_is_no_revision_is_refused(revision, hub):
    with pytest.raises(ValidationError, match="revision="): locate_model("o/m", hub, offline=True, revision=revision)


def test_a_snapshot_without_refs_is_named_with_what_takes_it(hub):
    shutil.rmtree(repo(hub) / "refs")
    with pytest.raises(ModelNotFoundError, match=f"no ref leads to {A[:8]}: take it with revision='{A[:12]}'"): locate_model("o/m", hub, offline=True)
    assert locate_model("o/m", hub, offline=True, revision=A[:12]).name == A


def test_folders_that_are_no_commit_are_not_taken_for_one(hub):
    for name in ("main", ".DS_Store", "A" * 40, A[:20]): (repo(hub) / "snapshots" / name).mkdir()
    for name in ("main", A[:8]): assert locate_model("o/m", hub, offline=True, revision=name).name == A
    with pytest.raises(ModelNotFoundError): locate_model("o/m", hub, offline=True, revision="A" * 40)


# --- links out of the cache

def test_a_file_that_is_kept_outside_is_not_sound_not_loaded_and_not_deleted(hub, tmp_path):
    outside = tmp_path / "precious.json"
    outside.write_bytes(FILES["config.json"])
    link = repo(hub) / "snapshots" / A / "config.json"
    link.unlink()
    link.symlink_to(outside)
    report = verify_cache("o/m", cache_dir=hub)
    assert [(p.file, p.what.startswith("the link leads out of the cache")) for p in report.problems] == [("config.json", True)]
    assert f"rm {link}" in report.problems[0].remedy
    with pytest.raises(ModelLoadError, match="it is a link out of the cache"): locate_model("o/m", hub, offline=True)
    assert any("link out of the cache" in p.what for p in cache_report(hub).problems)
    done = plan_eviction(max_bytes=0, cache_dir=hub).execute()
    assert outside.exists() and (done.evict, done.ok) == ([], False)


@pytest.mark.parametrize("target", ["../../../../outside", "/etc"])
def test_folders_that_are_links_out_of_the_cache_are_named(target, hub, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (repo(hub) / "snapshots" / A / "unet").symlink_to(target)
    (repo(hub) / "snapshots" / B).symlink_to(tmp_path / "outside")
    found = {(p.revision, p.file) for p in verify_cache(cache_dir=hub).problems}
    assert {(A, "unet"), (B, None)} <= found
    for revision in (A, B):
        with pytest.raises(ModelLoadError, match="link out of the cache"): locate_model("o/m", hub, offline=True, revision=revision)


def test_a_repository_on_another_disk_is_sound(hub, tmp_path):
    shutil.move(repo(hub), tmp_path / "large-disk")
    repo(hub).symlink_to(tmp_path / "large-disk")
    assert locate_model("o/m", hub, offline=True).name == A
    assert str(verify_cache("o/m", cache_dir=hub)).endswith("all sound")


def test_a_link_to_another_files_content_is_not_sound(hub):
    write_tree(hub)
    link = repo(hub) / "snapshots" / A / "tokenizer_config.json"
    link.unlink()
    link.symlink_to(os.path.relpath(repo(hub) / "blobs" / blob_name("config.json", FILES["config.json"]), link.parent))
    [problem] = verify_cache(cache_dir=hub).problems
    assert problem.file == "tokenizer_config.json" and "do not match the checksum in the Hub's list" in problem.what


# --- copies without links

def write_tree(hub, change=lambda files: files):
    "The list that the Hub's client keeps of a commit."
    files = {}
    for name, data in FILES.items():
        files[name] = {"size": len(data), "blob_id": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name.endswith(".safetensors"):
            files[name] = {"size": len(data), "blob_id": "c" * 40, "lfs_sha256": hashlib.sha256(data).hexdigest(), "lfs_size": len(data)}
    tree = repo(hub) / "trees" / f"{A}.json"
    tree.parent.mkdir(exist_ok=True)
    tree.write_text(json.dumps({"format_version": 1, "files": change(files)}), encoding="utf-8")
    return tree


@pytest.fixture
def copies(tmp_path):
    "A cache on a file system without links."
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / A
    snapshot.mkdir(parents=True)
    for name, data in FILES.items(): (snapshot / name).write_bytes(data)
    (tmp_path / "hub" / "models--o--m" / "refs").mkdir()
    (tmp_path / "hub" / "models--o--m" / "refs" / "main").write_text(A)
    return tmp_path / "hub"


def test_copies_without_a_list_are_unchecked_with_how_to_check_them(copies):
    report = verify_cache("o/m", cache_dir=copies)
    assert (report.ok, report.unchecked) == (True, len(FILES))
    assert "all sound" not in repr(report)
    assert report.how_to_check == [f"`hf cache verify o/m --revision {A} --cache-dir {copies}`"]
    assert report.to_dict()["unchecked"] == len(FILES) and "hf cache verify" in report._repr_html_()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_copies_are_checked_by_the_hubs_list(name, copies):
    write_tree(copies)
    assert str(verify_cache(cache_dir=copies)).endswith("all sound")
    path = repo(copies) / "snapshots" / A / name
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    report = verify_cache(cache_dir=copies)
    assert [p.file for p in report.problems] == [name] and report.unchecked == 0
    assert f"rm {path}" in report.problems[0].remedy  # the Hub's client leaves a copy as it is


@pytest.mark.parametrize("about", [None, 5, [], {}, {"blob_id": 5}, {"blob_id": "../x"}, {"lfs_sha256": "z" * 64}])
def test_a_list_without_a_checksum_leaves_the_file_unchecked(about, copies):
    write_tree(copies, lambda files: files | {"config.json": about})
    assert (verify_cache(cache_dir=copies).unchecked, verify_cache(cache_dir=copies).ok) == (1, True)


@pytest.mark.parametrize("content", NO_JSON, ids=short)
def test_a_damaged_list_is_named_and_stops_nothing(content, copies):
    put(repo(copies) / "trees" / f"{A}.json", content)
    report = verify_cache(cache_dir=copies)
    assert report.unchecked == len(FILES)
    assert [("list of its files cannot be read" in p.what, "rm " in p.remedy) for p in report.problems] == [(True, True)]
    assert locate_model("o/m", copies, offline=True).name == A


# --- the lockfile

@pytest.mark.parametrize("content", NO_JSON, ids=short)
def test_a_damaged_lockfile_is_named(content, hub):
    lock = put(lock_path(cache_dir=hub), content)
    registry = ModelRegistry(hub, offline=True, device="cpu")
    for use in (lambda: registry.locate("o/m"), registry.specs, lambda: registry.prefetch("o/m"), lambda: load_lock(lock)):
        with pytest.raises(ValidationError, match="lockfile .*is damaged .*prefetch the models again"): use()


def entry(**changes):
    return {"repo_id": "o/m", "commit": A, "patterns": ["*.json"], "stage": "staging", "locked_at": "2026-01-01"} | changes


BAD_ENTRIES = [None, 5, {}, [1], [None], [entry(commit="../../x")], [entry(commit=5)], [entry(stage="live")], [entry(stage=[])],
               [entry(repo_id=None)], [entry(patterns="*.json")], [entry(locked_at=5)]]


@pytest.mark.parametrize("bad", BAD_ENTRIES, ids=short)
def test_a_damaged_entry_of_the_lockfile_stops_its_own_model_alone(bad, hub):
    lock = lock_path(cache_dir=hub)
    lock.write_bytes(b"\xef\xbb\xbf" + json.dumps({"models": {"o--m": [entry()], "o--other": bad}}).encode())
    make_repo(hub, "o/other", {B: FILES}, {"main": B})
    registry = ModelRegistry(hub, offline=True, device="cpu")
    assert registry.locate("o/m").name == A and registry.prefetch("o/m").ok
    for use in (lambda: registry.locate("o/other"), lambda: registry.prefetch("o/other"), lambda: registry.promote("o/other", "staging")):
        with pytest.raises(ValidationError, match="is damaged .o--other: "): use()
    assert json.loads(lock.read_text(encoding="utf-8-sig"))["models"]["o--other"] == bad  # and is as it was


@pytest.mark.parametrize("content", ["pipe", "folder", "device", b"x"], ids=short)
def test_whatever_stands_where_the_lock_of_the_lockfile_should_be(content, hub):
    path = put(hub.parent / "hub-models.lock.json.lock", content)
    try:
        with edit_lock(lock_path(cache_dir=hub)) as models: models["x"] = []
    except DevSkyyError as e: assert str(path.parent) in str(e)


# --- uses, quantized copies, what comes with the package

@pytest.mark.parametrize("content", [b"x" * 1000, "pipe", "device", "folder", "loop"], ids=short)
def test_whatever_stands_in_the_log_of_uses(content, hub, tmp_path):
    stamp = put(repo(hub) / "devsky-used" / A, content)
    before = os.stat("/dev/zero").st_mtime
    assert set(last_used(hub)) == {("o/m", A)}
    assert record_use("o/m", A, hub) is True
    assert os.stat("/dev/zero").st_mtime == before
    assert locate_model("o/m", hub, offline=True).name == A
    shutil.rmtree(stamp.parent)
    stamp.parent.write_text("a file")
    assert (record_use("o/m", A, hub), last_used(hub)) == (False, {})
    stamp.parent.unlink()
    stamp.parent.symlink_to(tmp_path)
    assert record_use("o/m", A, hub) is False and not (tmp_path / A).exists()


@pytest.mark.parametrize("content", [*NO_JSON, b'{"model": 5, "label": [], "commit": {}}', b'{"model": "", "label": null}'], ids=short)
def test_a_copy_that_does_not_say_what_it_is_is_damaged(content, hub):
    put(quantized_cache(hub) / "o--m-nf4" / "quantized.json", content)
    [copy] = quantized_copies(hub)
    assert (copy.model, copy.label, copy.commit) == ("o--m-nf4", "damaged", None)
    assert "o--m-nf4" in repr(cache_report(hub))


@pytest.mark.parametrize("content", [*NO_JSON, b'{"sha256": []}', b'{"sha256": {"../x": "' + b"a" * 64 + b'"}}', b'{"sha256": {"config.json": 5}}'], ids=short)
def test_a_damaged_recipe_of_a_bundled_model_is_named(content, tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny-clip")
    put(tmp_path / "tiny-clip" / "recipe.json", content)
    with pytest.raises(ModelLoadError, match="recipe.json cannot be read: .*Install devsky_nb again"):
        verify_bundled(tmp_path / "tiny-clip", find_spec("tiny-clip"))


# --- a home that is none

def test_a_cache_that_is_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for cache in (file, file / "hub"):
        for use in (cache_report, lambda c: plan_eviction(max_bytes=0, cache_dir=c), lambda c: verify_cache(cache_dir=c),
                    lambda c: pin("o/m", "main", "x", c), lambda c: locate_model("o/m", c, offline=True),
                    lambda c: ModelRegistry(c, offline=True, device="cpu").locate("o/m")):
            with pytest.raises(ValidationError, match=f"no folder: '{file}' is a file.*mv {file} {file}.old"): use(cache)
        [problem] = cache_problems(cache)
        assert "it is a file, no folder" in problem.what and f"mv {file}" in problem.remedy


@pytest.mark.parametrize("call, message", [
    (lambda: pin(5, "main", "x"), "repo_id=5"), (lambda: pin("o/m", 5, "x"), "revision=5|not in the cache"), (lambda: pin("o/m", "main", None), "alias=None"),
    (lambda: unpin(["o/m"], "x"), "repo_id="), (lambda: verify_cache(5), "repo_id=5"), (lambda: verify_cache(cache_dir=5), "cache_dir=5"),
    (lambda: verify_cache(progress="yes"), "progress="), (lambda: cache_report(5), "cache_dir=5"), (lambda: cache_report("a\0b"), "cache_dir="),
    (lambda: cache_report("~nobody-of-that-name/x"), "cache_dir="), (lambda: ModelRegistry(cache_dir=5), "cache_dir=5"),
    (lambda: ModelRegistry(cache_dir=True), "cache_dir=True"), (lambda: ModelRegistry(offline="yes"), "offline='yes'"),
    (lambda: ModelRegistry(offline=1), "offline=1"), (lambda: ModelRegistry(lockfile=5), "lockfile=5"), (lambda: ModelRegistry(device=5), "device='5': "),
    (lambda: ModelRegistry().prefetch(5), "5"), (lambda: ModelRegistry().locate("tiny-clip", timeout="1h"), "timeout="),
    (lambda: ModelRegistry().prefetch("tiny-clip", timeout=0), "timeout=0"), (lambda: ModelRegistry().prefetch("tiny-clip", max_bytes=1.5), "max_bytes=1.5"),
    (lambda: locate_model("tiny-clip", offline="no"), "offline='no'"), (lambda: plan_eviction(max_bytes="1GB"), "max_bytes='1GB'")])
def test_what_is_of_the_wrong_type_is_said_before_any_work(call, message):
    with pytest.raises(ValidationError, match=message): call()


def test_messages_speak_of_a_model_as_it_was_asked_for(tmp_path):
    registry = ModelRegistry(tmp_path, offline=True, device="cpu")
    for use in (lambda: registry.locate("org/clip"), lambda: registry.get_model("org/clip"), lambda: registry.verify("org/clip"),
                lambda: registry.prefetch("org/clip"), lambda: registry.locate("org/clip", stage="staging"),
                lambda: registry.promote("org/clip", "staging")):
        with pytest.raises(DevSkyyError) as e: use()
        assert "org/clip" in str(e.value) and "org--clip" not in json.dumps(e.value.to_dict())
