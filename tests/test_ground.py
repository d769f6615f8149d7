"The ground under all parts: files that are whole or absent, arguments, errors as JSON, devices, memory that comes back."
import gc, json, os, signal, stat, subprocess, sys, threading, time, traceback, weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pretended_gpu import pretended

from devsky_nb import _core as core
from devsky_nb import device as devices
from devsky_nb import errors
from devsky_nb._core import check_choice, check_count, check_flag, check_number, check_share, parse_bytes, read_json, read_text, write_atomically
from devsky_nb.device import check_device, container_limit, is_out_of_memory, memory_info, release_traceback
from devsky_nb.errors import DevSkyyError, MLError, ModelLoadError, ValidationError


# --- files

def beside(path): return sorted(p.name for p in path.parent.iterdir() if p != path)


@pytest.mark.parametrize("data", ["größe ✂\n", b"\0\1\xff", lambda f: [f.write(b"a"), f.write(b"b")]])
def test_whatever_is_written_is_whole_and_alone(data, tmp_path):
    path = tmp_path / "a" / "b" / "f"
    for _ in range(2): write_atomically(path, data)
    assert path.read_bytes() == (b"ab" if callable(data) else data.encode() if isinstance(data, str) else data)
    assert beside(path) == []


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    device = tmp_path / "null"
    try: os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except (AttributeError, OSError): pytest.skip("only root makes devices, and not everywhere")
    (tmp_path / "link").symlink_to("null")
    for name in ("null", "link"):
        with pytest.raises(DevSkyyError, match="it is a device"): write_atomically(tmp_path / name, "x")
    assert device.is_char_device() and sorted(os.listdir(tmp_path)) == ["link", "null"]


def test_a_plain_write_would_do_the_same_to_links_and_permissions(tmp_path):
    real, link = tmp_path / "real", tmp_path / "elsewhere" / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.parent.mkdir()
    link.symlink_to(real)
    write_atomically(link, "new")
    assert (real.read_text(), link.is_symlink(), real.stat().st_mode & 0o777, beside(link), beside(real)) == ("new", True, 0o640,
                                                                                                              [], ["elsewhere"])
    write_atomically(tmp_path / "made", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_protected_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may be root
    with pytest.raises(DevSkyyError, match="cannot write f to .*: it is write-protected"): write_atomically(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and beside(tmp_path / "f") == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad row"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def fail(f):
        f.write(b"half")
        raise error
    with pytest.raises(DevSkyyError if isinstance(error, OSError) else type(error)): write_atomically(path, fail)
    assert path.read_text() == "old" and beside(path) == []


def test_many_threads_write_one_file_and_readers_see_whole_ones(tmp_path):
    path, texts, stop, seen = tmp_path / "f", [f"{i}" * 5000 for i in range(8)], threading.Event(), set()
    write_atomically(path, texts[0])

    def read():
        while not stop.is_set(): seen.add(path.read_text())
    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: write_atomically(path, texts[i % 8]), range(40)))
    stop.set()
    reader.join()
    assert seen <= set(texts) and path.read_text() in texts and beside(path) == []


WRITE = """
import sys
from pathlib import Path
from devsky_nb._core import write_atomically
write_atomically(Path(sys.argv[1]), "b" * 16_000_000)
print("ready", flush=True)
while True:
    for letter in "ab": write_atomically(Path(sys.argv[1]), letter * 16_000_000)
"""


def test_kill_9_leaves_one_of_the_two_files(tmp_path):
    path = tmp_path / "f"
    for delay in (.01, .02, .04):
        with subprocess.Popen([sys.executable, "-c", WRITE, path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL  # it was still writing
        assert path.read_text() in ("a" * 16_000_000, "b" * 16_000_000)


def test_windows_makes_no_names_durable_and_no_file_that_is_open_for_reading(tmp_path, monkeypatch):
    "There a folder cannot be opened, and fsync wants a handle that may write."
    file = tmp_path / "f"
    file.touch()
    opened = []

    class Windows:
        name, O_RDWR, O_RDONLY = "nt", os.O_RDWR, os.O_RDONLY
        fsync, close = staticmethod(os.fsync), staticmethod(os.close)

        @staticmethod
        def open(path, flags):
            opened.append((path, flags))
            return os.open(path, flags)

    monkeypatch.setattr(core, "os", Windows)
    core.sync(file)
    core.sync(tmp_path)
    assert opened == [(file, os.O_RDWR)]


DEEP = b"[" * 100_000
ATTACKS = {"nothing": (b"", "Expecting value"), "cut": (b'{"a": ', "Expecting value"), "list": (b"[1]", "expected an object, found list"),
           "null": (b"null", "found NoneType"), "number": (b"3", "found int"), "deep": (DEEP, "more than 64 levels"),
           "deep and whole": (b'{"a": ' * 500 + b"1" + b"}" * 500, "more than 64 levels"), "latin-1": ('{"a": "é"}'.encode("latin-1"), "no UTF-8"),
           "UTF-16": ("{}".encode("utf-16"), "no UTF-8"), "digits": (b'{"a": ' + b"9" * 5000 + b"}", "limit"), "large": (b" " * (17 << 20) + b"{}", "more than 16.0 MiB"),
           "another type": (b'{"a": true}', "'a' should be a whole number, found True"), "a field less": (b"{}", "'a' should be a whole number, found nothing")}


@pytest.mark.parametrize("content, what", ATTACKS.values(), ids=ATTACKS)
def test_a_small_file_that_is_damaged_is_one_typed_error(content, what, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for error in (ModelLoadError, ValidationError):
        with pytest.raises(error, match=what) as raised: read_json(path, {"a": int}, remedy="Fetch it again", error=error)
        assert str(raised.value).startswith(str(path)) and str(raised.value).endswith("Fetch it again")


def make_fifo(path): os.mkfifo(path)
def make_endless(path): path.symlink_to("/dev/zero")
def make_silent(path): path.symlink_to("/dev/tty")
def make_circle(path): path.symlink_to(path)
def make_folder(path): path.mkdir()
def make_nothing(path): pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system with pipes and devices among the files")
@pytest.mark.parametrize("make", [make_fifo, make_endless, make_silent, make_circle, make_folder, make_nothing])
def test_what_is_no_file_is_never_waited_for(make, tmp_path):
    make(tmp_path / "config.json")
    for read in (read_json, read_text):
        with pytest.raises(ModelLoadError, match="cannot be read"): read(tmp_path / "config.json")


# --- arguments

@pytest.mark.parametrize("size, expected",
                         [(np.int64(5), 5), (np.uint8(200), 200), (0, 0), ("1.5 GiB", 1610612736), (" 20gb ", 20 * 10**9), ("7", 7),
                          (10**20, 10**20)])
def test_sizes(size, expected): assert parse_bytes(size) == expected and type(parse_bytes(size)) is int


@pytest.mark.parametrize("size", [True, None, -1, np.int64(-1), 1.5, "", "GB", "1e9", "-1GB", "8 gigs", "1" * 40, b"1GB", [1],
                                  np.array([1, 2])])
def test_what_is_no_size(size):
    with pytest.raises(ValidationError, match="no size in"): parse_bytes(size)


NUMBERS = [True, None, "3", float("nan"), float("inf"), [3], np.array([1, 2]), 1 + 2j, b"3"]


@pytest.mark.parametrize("value", [*NUMBERS, 0, -1, 2.0, np.float32(2), 10**30])
def test_what_is_no_count(value):
    with pytest.raises(ValidationError, match="^n=.*: expected a whole number from 1 to 1000$") as e:
        check_count("n", value, 1, 1000)
    assert json.dumps(e.value.to_dict())


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(1000)])
def test_counts(value): assert check_count("n", value, 1, 1000) == value and type(check_count("n", value)) is int


@pytest.mark.parametrize("value", [*NUMBERS, -.1, 1.1])
def test_what_is_no_share(value):
    with pytest.raises(ValidationError, match="expected a number from 0 to 1"): check_share("s", value)


@pytest.mark.parametrize("value", [0, 1, .5, np.float32(.5), np.int64(1)])
def test_shares(value): assert check_share("s", value) == value and type(check_number("s", value)) is float


@pytest.mark.parametrize("value", [True, None, "c", 2, ["a"], np.array(["a", "b"])])
def test_what_is_not_among_the_choices(value):
    with pytest.raises(ValidationError, match="x=.*expected one of a, b, 1"): check_choice("x", value, ("a", "b", 1))
    with pytest.raises(ValidationError, match="expected True or False"): check_flag("x", 1)


def test_a_missing_library_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(DevSkyyError, match=r"^this needs diffusers: run pip install 'devsky_nb\[diffusion\]'$"):
        core.require("torch", "diffusers")
    with pytest.raises(DevSkyyError, match=r"diffusers and ipywidgets: run pip install 'devsky_nb\[diffusion,ui\]'"):
        core.require("diffusers", "ipywidgets")


# --- errors

def test_an_error_is_json_whatever_its_details_are():
    details = {"array": np.zeros(3), "number": np.float32(.5), "count": np.int64(2), "nan": float("nan"), "path": Path("x"),
               "set": {1}, 5: ValueError("no"), "day": date(2026, 1, 2),
               "inner": ValidationError("bad", details={"tensor": torch.zeros(2)}), "dtype": torch.float16, "flag": np.bool_(True),
               "tuple": (1, None), "bytes": b"x"}
    told = json.loads(json.dumps(DevSkyyError("told", details=details).to_dict(), allow_nan=False))["details"]
    assert (told["number"], told["count"], told["nan"], told["5"], told["inner"]["error_type"], told["set"],
            told["tuple"]) == (.5, 2, "nan", "ValueError: no", "ValidationError", [1], [1, None])


# --- devices and memory

def test_one_device_has_one_name():
    with pretended("cuda", count=2) as gpu:
        names = {"cpu:0": "cpu", "cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:01": "cuda:1", None: "cuda:0",
                 torch.device("cpu", 0): "cpu", torch.device("cuda", 1): "cuda:1"}
        assert {d: check_device(d) for d in names} == names
        gpu.current = 1
        assert check_device("cuda") == check_device(None) == "cuda:1"  # the GPU that is current
        for wrong in ("cuda:2", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "", "tpu", "CPU", 0, "mps", "mps:1", "None"):
            with pytest.raises(ValidationError, match="no such device"): check_device(wrong)
    with pretended("mps"):
        assert [check_device(d) for d in ("mps", "mps:0", None)] == ["mps"] * 3
        for wrong in ("cuda", "mps:1"):
            with pytest.raises(ValidationError, match="no such device"): check_device(wrong)


def test_memory_that_torch_keeps_to_use_again_is_free():
    with pretended("cuda", total=1 << 30, others=1 << 28) as gpu:
        before = memory_info("cuda").free
        block = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
        assert memory_info("cuda").free == before - (1 << 26) == 3 * (1 << 28) - (1 << 26)
        del block
        assert gpu.reserved() == 1 << 26 and memory_info("cuda").free == before
        devices.release_memory()
        assert gpu.reserved() == 0


def test_apples_gpu_shares_the_main_memory(monkeypatch):
    with pretended("mps", total=16 << 30):
        ram = psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: ram._replace(available=64 << 30))
        assert memory_info("mps").free == 16 << 30
        monkeypatch.setattr(psutil, "virtual_memory", lambda: ram._replace(available=2 << 30))
        assert memory_info("mps").free == 2 << 30


def test_the_cpu_by_another_name_takes_no_branch_of_a_gpu():
    assert devices.default_dtype("cpu:0") == torch.float32 and memory_info("cpu:0").device == "cpu"


GIB = 2**30


@pytest.mark.parametrize("files, expected", [
    ({"memory.max": 8 * GIB, "memory.current": 7 * GIB,
      "memory.stat": f"anon 1\nfile {6 * GIB}\ninactive_file {5 * GIB}\nactive_file 3\n"}, (8 * GIB, 2 * GIB)),
    ({"memory.max": 8 * GIB, "memory.current": 7 * GIB}, (8 * GIB, 7 * GIB)),
    ({"memory.max": 8 * GIB, "memory.current": 7 * GIB, "memory.stat": f"inactive_file {9 * GIB}\n"}, (8 * GIB, 0)),
    ({"memory.max": "max", "memory.current": 7 * GIB}, None),
    ({"memory/memory.limit_in_bytes": 4 * GIB, "memory/memory.usage_in_bytes": 3 * GIB,
      "memory/memory.stat": f"cache 7\ninactive_file 1\ntotal_inactive_file {2 * GIB}\n"}, (4 * GIB, GIB)),
    ({"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 3 * GIB}, None),
    ({}, None)])
def test_the_page_cache_of_a_container_does_not_count_as_taken(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert container_limit(tmp_path) == expected


def test_free_memory_follows_the_container(monkeypatch):
    monkeypatch.setattr(devices, "container_limit", lambda: (GIB, GIB // 4))
    assert memory_info("cpu").total == GIB and 0 < memory_info("cpu").free <= 3 * GIB // 4
    monkeypatch.setattr(devices, "container_limit", lambda: (GIB, 2 * GIB))
    assert memory_info("cpu").free == 0


class Tensor: "Something that one can see go."


def fail(cause=None):
    held = Tensor()
    watched.append(weakref.ref(held))
    raise RuntimeError("out of memory") from cause


watched = []


@pytest.fixture(autouse=True)
def nothing_watched(): watched.clear()


def test_what_an_error_holds_comes_back_and_its_lines_stay():
    def recover():
        try:
            try: fail()
            except RuntimeError as e: fail(e)
        except RuntimeError as e:
            release_traceback(e)
            return e
    error = recover()
    gc.collect()
    assert [r() for r in watched] == [None, None] and "in fail" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("late", [False, True])
def test_the_callers_own_error_keeps_its_variables(late):
    def recover():
        try: fail()
        except RuntimeError as e:
            if not late: release_traceback(e)
            error = e
        if late: release_traceback(error)
        return error
    try: fail()
    except RuntimeError as caught:
        ours, theirs = recover(), caught
        assert ours.__context__ is theirs
        gc.collect()
        assert watched[0]() is not None and watched[1]() is None
    assert list(traceback.walk_tb(theirs.__traceback__))[-1][0].f_locals["held"] is watched[0]()


def test_an_error_that_was_caught_deeper_and_one_that_links_to_itself():
    def inner():
        try: fail()
        except RuntimeError as e: return e
    error = inner()
    error.__context__ = ValueError("linked back")
    error.__context__.__context__ = error
    release_traceback(error)
    gc.collect()
    assert watched[0]() is None


def test_out_of_memory_is_told_in_every_way():
    wrapped = MLError("not loaded", original_error=RuntimeError("CUDA out of memory"))
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(MemoryError())
    for said in ("CUDA out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                 "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "GET was unable to find an engine to execute this computation",
                 "MPS backend out of memory", "Invalid buffer size: 24.00 GiB", "DefaultCPUAllocator: can't allocate memory"):
        assert is_out_of_memory(RuntimeError(said)), said
    assert not is_out_of_memory(None)
    assert not is_out_of_memory(ValueError("out of memory"))
    loop = RuntimeError("loop")
    loop.__cause__ = loop
    assert not is_out_of_memory(loop)


@pytest.mark.parametrize("locale", ["utf-8", "ascii", "latin-1"])
def test_a_name_is_the_same_text_in_every_locale(locale, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode(locale, "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda raw: raw.decode(locale, "surrogateescape"))
    for raw, text in (("größe.jpg".encode(), "größe.jpg"), (b"caf\xe9", "caf\\udce9"), ("服".encode(), "服"), (b"a", "a")):
        assert core.name_text(raw.decode(locale, "surrogateescape")) == text
        if "\\" not in text: assert core.name_path(text).encode(locale, "surrogateescape") == raw
    assert core.name_text("\ud800") == "\\ud800" and core.name_path("\ud800") == "\ud800"


def test_details_that_lie_in_themselves_or_unfold_without_end_are_cut(monkeypatch):
    monkeypatch.setattr(errors, "MOST_VALUES", 10_000)
    class Mute:
        def __str__(self): raise RuntimeError
    loop, deep, wide = {"n": 1}, [], [0]
    loop["me"] = [loop]
    for _ in range(5000): deep = [deep]
    for _ in range(60): wide = (wide, wide)
    error = DevSkyyError("told", details={"loop": loop, "deep": deep, "mute": Mute(), Mute(): 1, "huge": 10**5000})
    error.details["error"] = error
    told = json.loads(json.dumps(error.to_dict(), allow_nan=False))["details"]
    assert told["loop"] == {"n": 1, "me": ["…"]} and told["error"]["details"] == "…"
    assert told["mute"] == "<Mute>" and told["<Mute>"] == 1 and json.dumps(told["deep"]).count("[") < 40
    assert len(json.dumps(DevSkyyError("told", details={"wide": wide}).to_dict())) < 300_000
