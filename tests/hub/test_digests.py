"Checksums of files: every byte counts, no byte is read twice, and nothing that goes wrong with their records counts."
import hashlib, json, multiprocessing, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
from patience import PATIENCE

from devsky_nb.errors import ModelLoadError
from devsky_nb.hub import weights
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.weights import digest_record, file_digest, folder_fingerprint, folder_stamp, identity_of, model_files

OLD, NEW = b"o" * 3_000_000, b"n" * 3_000_000


def sha256(data): return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(tmp_path): return tmp_path / "hub"


@pytest.fixture
def fresh(monkeypatch):
    "As in a process that has just begun."
    def forget(): monkeypatch.setattr(weights, "_DIGESTS", {})
    forget()
    return forget


def settled(path, data):
    "A file that was written a while ago, as far as its time of change can tell."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    time.sleep(.06)
    return path


def rewrite_in_place(path, data): path.write_bytes(data)


def replace_by_another(path, data):
    path.with_name("other").write_bytes(data)
    os.replace(path.with_name("other"), path)


def replace_within_a_link(path, data):
    path.with_name("other").write_bytes(data)
    path.unlink()
    path.symlink_to(path.with_name("other"))


@pytest.mark.parametrize("change", [rewrite_in_place, replace_by_another, replace_within_a_link])
@pytest.mark.parametrize("process", ["this one", "the next one"])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_file_that_was_exchanged_is_read_again(change, process, size, tmp_path, hub, fresh):
    file = settled(tmp_path / "model.safetensors", OLD[:size])
    times = file.stat()
    assert file_digest(file, hub) == sha256(OLD[:size])
    change(file, NEW[:size])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync -t do
    if process == "the next one": fresh()
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert file_digest(file, hub) == sha256(NEW[:size])


def test_copies_with_their_times_are_told_apart(tmp_path, hub):
    times = None
    for name, data in (("a", OLD), ("b", NEW)):
        file = settled(tmp_path / name / "model" / "model.safetensors", data)
        (file.parent / "config.json").write_text("{}")
        times = times or file.stat()
        for path in file.parent.iterdir(): os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    folders = [tmp_path / name / "model" for name in "ab"]
    assert folder_fingerprint(folders[0], hub) != folder_fingerprint(folders[1], hub)
    assert folder_fingerprint(shutil.copytree(folders[0], tmp_path / "c" / "x"), hub) == folder_fingerprint(folders[0], hub)


def test_no_byte_is_read_twice_not_even_in_another_process(tmp_path, hub, fresh, monkeypatch):
    file = settled(tmp_path / "model.safetensors", OLD)
    digest = file_digest(file, hub)
    monkeypatch.setattr(weights, "compute_digest", lambda *a: pytest.fail("the file was read again"))
    assert file_digest(file, hub) == digest
    fresh()
    assert file_digest(file, hub) == digest
    renamed = file.with_name("other.safetensors")
    os.link(file, tmp_path / "link")  # changes the time of change, so it is read
    with pytest.raises(BaseException, match="read again"): file_digest(file, hub)
    assert not renamed.exists()


def test_a_file_of_this_moment_is_waited_for_and_then_known(tmp_path, hub, fresh, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(OLD)
    digest = file_digest(file, hub)
    monkeypatch.setattr(weights, "compute_digest", lambda *a: pytest.fail("the file was read again"))
    assert file_digest(file, hub) == digest == sha256(OLD)


@pytest.mark.parametrize("ahead", [3600, 0.5])
def test_a_time_that_cannot_be_relied_upon_is_not(ahead, tmp_path, hub, fresh, monkeypatch):
    "A clock of a file server that is ahead; a disk that counts whole seconds."
    file = settled(tmp_path / "model.safetensors", OLD)
    real = identity_of(file.stat())
    now = real[-1] - int(ahead * 1e9) if ahead > 1 else real[-1] // 10**9 * 10**9 + int(1e9)
    changed = real[-1] if ahead > 1 else real[-1] // 10**9 * 10**9
    monkeypatch.setattr(weights, "identity_of", lambda about: (*real[:4], changed))
    monkeypatch.setattr(weights.time, "time_ns", lambda: now)
    file_digest(file, hub)
    assert not weights._DIGESTS and not hub.with_name("hub-digests").exists()


def test_where_there_is_no_time_of_change_every_byte_is_read_each_time(tmp_path, hub, fresh, monkeypatch):
    file = settled(tmp_path / "model.safetensors", OLD)
    monkeypatch.setattr(weights.os, "name", "nt")
    assert not weights.is_settled((1, 2, 3, 4, 5))
    monkeypatch.undo()
    assert weights.is_settled(identity_of(file.stat()))


RECORDS = {
    "empty": b"", "cut": b'{"identity": [1, 2', "a list": b"[]", "null": b"null", "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\0", "no checksum": b'{"identity": [1, 2, 3, 4, 5]}', "large": b" " * 10_000,
    "other types": b'{"identity": "x", "sha256": 5}', "no hexadecimal": b'{"identity": "IDENTITY", "sha256": "zz"}',
    "another file": b'{"identity": [1, 2, 3, 4, 5], "sha256": "' + b"a" * 64 + b'"}',
    "a huge number": b'{"identity": [' + b"9" * 5000 + b'], "sha256": "' + b"a" * 64 + b'"}',
}


@pytest.mark.parametrize("what", [*RECORDS, "fifo", "folder", "link to itself"])
def test_a_record_that_is_damaged_counts_for_nothing(what, tmp_path, hub, fresh):
    file = settled(tmp_path / "model.safetensors", OLD)
    identity = identity_of(file.stat())
    record = digest_record(identity, hub)
    record.parent.mkdir()
    if what == "fifo": os.mkfifo(record)
    elif what == "folder": record.mkdir()
    elif what == "link to itself": record.symlink_to(record)
    else: record.write_bytes(RECORDS[what].replace(b'"IDENTITY"', json.dumps(identity).encode()))
    assert file_digest(file, hub) == sha256(OLD)
    if what not in ("folder", "link to itself"):
        assert json.loads(record.read_text()) == {"identity": list(identity), "sha256": sha256(OLD)}


@pytest.mark.parametrize("kind", ["a file in the way", "write-protected", "too large"])
def test_a_disk_that_takes_no_record_stops_nothing(kind, tmp_path, hub, fresh):
    file = settled(tmp_path / "model.safetensors", OLD)
    place = hub.with_name("hub-digests")
    if kind == "a file in the way": place.write_text("")
    else:
        place.mkdir()
        if kind == "write-protected": place.chmod(0o555)
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
            "from pathlib import Path; from devsky_nb.hub.weights import file_digest;"
            "print(file_digest(Path(sys.argv[1]), sys.argv[2]))")
    if kind == "too large":
        out = subprocess.run([sys.executable, "-c", code, file, hub], capture_output=True, text=True, timeout=PATIENCE)
        assert out.stdout.strip() == sha256(OLD) and not list(place.iterdir()), out.stderr
    assert file_digest(file, hub) == sha256(OLD)


def digest_in_process(queue, barrier, file, hub):
    barrier.wait(PATIENCE)
    queue.put(file_digest(file, hub))


def test_processes_that_ask_at_once_agree(tmp_path, hub):
    file = settled(tmp_path / "model.safetensors", OLD)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.SimpleQueue()
    workers = [context.Process(target=digest_in_process, args=(queue, barrier, file, hub)) for _ in range(3)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(PATIENCE)
    assert [queue.get() for _ in workers] == [sha256(OLD)] * 3
    assert [p.name for p in hub.with_name("hub-digests").iterdir()] == [digest_record(identity_of(file.stat()), hub).name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is killed in a forked process")
def test_a_killed_writer_leaves_no_record_that_counts(tmp_path, hub, fresh):
    file = settled(tmp_path / "model.safetensors", OLD)
    for point in ("open", "os.rename"):
        child = os.fork()
        if not child:
            def hook(event, args):
                if event == point and "hub-digests" in str(args[0]): os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            file_digest(file, hub)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        fresh()
        assert weights.recorded_digest(digest_record(identity_of(file.stat()), hub), identity_of(file.stat())) is None
    assert file_digest(file, hub) == sha256(OLD)
    assert weights.recorded_digest(digest_record(identity_of(file.stat()), hub), identity_of(file.stat())) == sha256(OLD)


def test_what_is_written_meanwhile_has_no_checksum(tmp_path, hub, fresh, monkeypatch):
    file = settled(tmp_path / "model.safetensors", OLD)
    real = hashlib.file_digest
    def slow(f, name):
        digest = real(f, name)
        with file.open("r+b") as writer: writer.write(b"x")
        return digest
    monkeypatch.setattr(weights.hashlib, "file_digest", slow)
    with pytest.raises(ModelLoadError, match="changed while it was read. Call again"): file_digest(file, hub)
    assert not weights._DIGESTS
    for gone in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelLoadError, match="cannot be read"): file_digest(gone, hub)


def test_the_hubs_name_of_a_large_file_is_taken_and_given_up_when_the_file_changes(tmp_path, hub, fresh, monkeypatch):
    blob = settled(hub / "models--shop--sdxl" / "blobs" / sha256(OLD), OLD)
    link = hub / "models--shop--sdxl" / "snapshots" / ("a" * 40) / "unet" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    with monkeypatch.context() as m:
        m.setattr(weights, "compute_digest", lambda *a: pytest.fail("the file was read"))
        assert file_digest(link, hub) == sha256(OLD)
    times = blob.stat()
    link.write_bytes(NEW)  # through the link: somebody has saved a model into the snapshot
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(.06)
    for _ in range(2):
        assert file_digest(link, hub) == sha256(NEW)
        fresh()
    elsewhere = settled(tmp_path / "blobs" / sha256(OLD), NEW)  # called so, and in no cache
    assert file_digest(elsewhere, hub) == sha256(NEW)


def test_the_files_that_count_are_those_a_model_is_read_from(tmp_path):
    folder = shutil.copytree(locate_model("tiny-sdxl"), tmp_path / "model")
    counted = {path.relative_to(folder).as_posix() for path in model_files(folder)}
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} < counted
    assert "scheduler/scheduler_config.json" in counted and "tokenizer/tokenizer_config.json" in counted
    before = folder_fingerprint(folder)
    for other in ("sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.bin", "unet/model.onnx", "unet/.cache",
                  ".git/objects/x.json", "samples/a.png", "checkpoint-100/model.safetensors"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"x")
        os.utime(folder / other)
        assert folder_fingerprint(folder) == before, other
    os.mkfifo(folder / "unet" / "pipe.json")
    assert folder_fingerprint(folder) == before
    for own in ("tokenizer/merges.bpe", "unet/model.safetensors", "vae/extra.json"):
        stamp = folder_stamp(folder)
        (folder / own).write_bytes(b"x")
        assert folder_fingerprint(folder) != before and folder_stamp(folder) != stamp, own
        before = folder_fingerprint(folder)
