"A Hub that lies: whatever it says, nothing appears outside the cache, and every answer ends in one reason, within the limits."
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
from lyinghub import COMMIT, FILES, LyingHub
from patience import PATIENCE, wait_until

from devsky_nb.errors import DevSkyyError, ModelNotFoundError
from devsky_nb.hub import fetch as fetching
from devsky_nb.hub.fetch import fetch_apart, fetched, FetchLimits, FetchRequest, is_commit, is_etag, is_file_name, NotFetched
from devsky_nb.hub.locate import complete_folder, download, HubSource
from devsky_nb.hub.models import find_spec

NAMES = ["../x.json", "../../../../tmp/x.json", "/x.json", "a/../../x.json", "./x.json", "a//x.json", "a/", "", "C:x.json", "C:/x.json", "a\\x.json",
         "..\\x.json", "a\0.json", "a\n.json", "\x1b[2J.json", "x" * 300 + ".json", "é" * 200, "d/" * 600 + "x.json", "\ud800.json", "..", ".", None, 5, ["x"]]
TAGS = ["../x", "../../../../x", "/tmp/x", "/x", "..", ".", "", "a/b", "a\\b", ".hidden", "x" * 300, "a b", "..%2fx", "CON:", "é", '"', "W/", 'W/"/x"', 'W/W/x/y']
COMMITS = ["../../x", "/abs/path", "", "main", COMMIT[:39], COMMIT + "0", COMMIT.upper(), f"{COMMIT}\n", None, 5, [], {}, True, b"5" * 40]


@pytest.mark.parametrize("check, bad, good", [
    (is_file_name, NAMES, ["config.json", "unet/config.json", "a/b/c d.json", "Größe.json", "..x", "a..b", "x" * 255]),
    (is_etag, TAGS, ["a" * 40, f'"{"b" * 64}"', f'W/"{"c" * 40}"', "some-xet-name", "a.b_c+d=="]),
    (is_commit, COMMITS, [COMMIT, "0" * 40])])
def test_forms(check, bad, good):
    assert [value for value in bad if check(value)] == []
    assert [value for value in good if not check(value)] == []


def info(**changes): return {"info": json.dumps({"id": "shop/clip", "sha": COMMIT, "siblings": []} | changes).encode()}


PICKLES = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
OFFER = {"num": 3, "title": "safetensors", "status": "open", "isPullRequest": True, "createdAt": "2023-01-01T00:00:00.000Z",
         "author": {"name": "SFconvertbot"}, "repo": {"name": "shop/clip", "type": "model"}}
A_MILLION = b'{"id":"o/m","sha":"' + COMMIT.encode() + b'","siblings":[' + b",".join(b'{"rfilename":"%d"}' % n for n in range(1_000_000)) + b"]}"
NONSENSE = "makes no sense"
ATTACKS = {  # what the Hub says, and what is said of it
    "commit that is a path": ({"commit": "../../x"}, "it names commit '../../x'"),
    "commit that is an absolute path": ({"commit": "{tmp}/x"}, "it names commit '/"),
    "commit that is a branch": ({"commit": "main"}, "it names commit 'main'"),
    "no commit": ({"commit": None}, "it names commit None"),
    "commit that is a list": ({"commit": [COMMIT]}, "it names commit ['5ca1ab1e"),
    "file of a path": ({"file_commit": "../../x"}, "a file of commit '../../x'"),
    "file of an absolute path": ({"file_commit": "{tmp}/x"}, "a file of commit '/"),
    "file of another commit": ({"file_commit": "0" * 40}, "a file of commit '000000"),
    "missing file of a path": ({"absent": ["config.json"], "missing_commit": "../../x"}, "a file of commit '../../x'"),
    "missing file of an absolute path": ({"absent": ["config.json"], "missing_commit": "{tmp}/x"}, "a file of commit '/"),
    "file that is listed and missing": ({"absent": ["config.json"]}, "the Hub refuses: 404"),
    "name upwards": ({"files": FILES | {"../../../../x.json": b"{}"}}, "it lists a file '../../../../x.json'"),
    "absolute name": ({"files": FILES | {"{tmp}/x.json": b"{}"}}, "it lists a file '/"),
    "name of another system": ({"files": FILES | {"..\\x.json": b"{}"}}, "it lists a file '..\\\\x.json'"),
    "name with a drive": ({"files": FILES | {"C:x.json": b"{}"}}, "it lists a file 'C:x.json'"),
    "name with NUL": ({"files": FILES | {"a\0.json": b"{}"}}, "it lists a file 'a\\x00.json'"),
    "checksum upwards": ({"etag": "../../../../x"}, "a checksum '\"../../../../x\"'"),
    "checksum that is an absolute path": ({"etag": "{tmp}/x"}, "a checksum '\"/"),
    "linked checksum": ({"headers": {"X-Linked-Etag": '"{tmp}/x"'}}, "a checksum '\"/"),
    "no checksum": ({"headers": {"ETag": ""}}, "a checksum ''"),
    "checksum of the other storage": ({"headers": {"X-Xet-Hash": "../../x", "X-Xet-Refresh-Route": "/x"}}, "a checksum '../../x'"),
    "empty": ({"info": b""}, NONSENSE), "garbage": ({"info": b"\0\xff\xfe garbage"}, NONSENSE), "login page": ({"info": b"<html>Log in to Hotel WiFi</html>"}, NONSENSE),
    "list": ({"info": b"[]"}, NONSENSE), "null": ({"info": b"null"}, NONSENSE), "number": ({"info": b"5"}, NONSENSE), "object": ({"info": b"{}"}, NONSENSE),
    "cut": ({"info": b'{"sha": "5ca1'}, NONSENSE), "deep": ({"info": b'{"sha":' + b"[" * 100_000}, NONSENSE), "no UTF-8": ({"info": b'{"sha": "\xff"}'}, NONSENSE),
    "long number": ({"info": b'{"id": "x", "sha": ' + b"9" * 9999 + b"}"}, NONSENSE),
    "files null": (info(siblings=None), "lists none of its files"), "files number": (info(siblings=5), NONSENSE), "files texts": (info(siblings=["a"]), NONSENSE),
    "names that are none": (info(siblings=[{"rfilename": 5}, {"rfilename": None}, {"rfilename": ["x"]}]), "lists none of its files"),
    "sizes that are none": (info(siblings=[{"rfilename": "config.json", "size": "x"}, {"rfilename": "m.safetensors", "size": -5, "lfs": 7}]), NONSENSE),
    "no files": ({"siblings": []}, "lists none of its files"), "6,000 files": ({"siblings": [{"rfilename": f"{n}.json"} for n in range(6_000)]}, "a model has 5,000 at most"),
    "a million files": ({"info": A_MILLION}, "an answer does not end: more than 16.0 MiB"), "endless answer": ({"info": "endless"}, "an answer does not end"),
    "list: garbage": ({"tree": b"\0\xff garbage"}, NONSENSE), "list: null": ({"tree": b"null"}, NONSENSE), "list: deep": ({"tree": b"[" * 100_000}, NONSENSE),
    "list: empty": ({"tree": []}, "and does not send it"), "list: endless": ({"tree": "endless"}, "an answer does not end"),
    "list: texts": ({"tree": ["a"]}, NONSENSE), "pages without end": ({"pages": True}, "it has part after part"),
    "compressed, unasked": ({"headers": {"Content-Encoding": "gzip"}}, "it is compressed, unasked"),
    "endless file": ({"file": "endless"}, "a file is longer than was said"), "file that is longer than said": ({"headers": {"X-Linked-Size": "10"}}, "a file is longer than was said: more than 10 B"),
    "file that is shorter than said": ({"content": b"shorter"}, "Consistency check failed"), "endless file of no length": ({"file": "endless", "unsized": True}, "it has more than 1.0 MiB (max_bytes=)"),
    "more than is allowed": ({"max_bytes": 1000}, "it has 6.9 KiB, more than 1000 B (max_bytes=)"),
    "more than the disk has": ({"siblings": [{"rfilename": "m.safetensors", "size": 10**15}], "max_bytes": 10**16}, "cannot be kept (909.5 TiB, and the disk has"),
    "far too long to wait": ({"status": 429, "retry": "9" * 400}, "the Hub refuses: 429"),
    "elsewhere: a file of this machine": ({"redirect": "file:///etc/passwd"}, "could not be reached"), "elsewhere: in a circle": ({"redirect": "config.json"}, "could not be reached"),
    "refusal": ({"status": 500}, "the Hub refuses: "), "wait for a year": ({"status": 429, "retry": "31536000"}, "asks to wait for 31536000 s"),
    "pickles, offers without end": ({"files": PICKLES, "discussions": {"count": 10**9, "start": 0, "discussions": []}}, "it has part after part"),
    "pickles, offer that is a path": ({"files": PICKLES, "discussions": {"count": 1, "start": 0, "discussions": [OFFER | {"num": "../../x"}]}}, "an offer 'refs/pr/../../x'"),
    "pickles, offers that are none": ({"files": PICKLES, "discussions": [5]}, NONSENSE)}
QUESTIONS = {"pages without end": 210, "pickles, offers without end": 5, "elsewhere: in a circle": 60}  # at most; of the others 10

RUN = """
import json, os, sys
from pathlib import Path
import test_lying_hub as t
from devsky_nb.hub import fetch

class Guards:
    "The guard of the attack at hand, so that one client serves for all."
    def before_request(self, request): self.now.before_request(request)
    def after_headers(self, response): self.now.after_headers(response)

guards = Guards()
fetch.watch_client(guards)
fetch.watch_client = lambda guard: setattr(guards, "now", guard)
for number, name in enumerate(["truth", *t.ATTACKS]):
    lies = {} if name == "truth" else t.ATTACKS[name][0]
    tmp = Path(sys.argv[1], str(number))
    tmp.mkdir()
    with t.LyingHub(t.placed(lies, str(tmp))) as hub:
        limits = fetch.FetchLimits(t.PATIENCE, lies.get("max_bytes", 2**20))
        request = fetch.FetchRequest("shop/clip", "main", ("*.json", "*.safetensors"), None, str(tmp / "hub"), hub.address, limits)
        said = fetch.answer(request, fetch.FetchGuard(limits))
        outside = [str(p) for p in tmp.iterdir() if p.name != "hub"]
        inside = [str(p.relative_to(tmp / "hub")) for p in (tmp / "hub").rglob("*")]
        print(json.dumps([name, said, outside, inside, len(hub.log)]), flush=True)
"""


def placed(value, tmp):
    "A lie with the name of a folder in it."
    if isinstance(value, str): return value.replace("{tmp}", tmp)
    if isinstance(value, dict): return {placed(k, tmp): placed(v, tmp) for k, v in value.items()}
    return value


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "What becomes of every attack, in one process, whose Hub client is ours alone."
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
                        "PYTHONPATH": os.pathsep.join([*tests, *sys.path]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path_factory.mktemp("attacks"))], capture_output=True, text=True, timeout=PATIENCE, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(ATTACKS) + 1, done.stderr[-3000:]
    return {name: rest for name, *rest in lines}


def test_the_truth_is_fetched(answers):
    said, outside, inside, _ = answers["truth"]
    assert said == {"commit": COMMIT, "converted": False} and outside == []
    assert {f"models--shop--clip/snapshots/{COMMIT}/{name}" for name in FILES} <= set(inside)


SIGNED = "/cdn/model?X-Sig=ab%2Fcd%3D&n=1&response-content-disposition=inline%3B+filename*%3DUTF-8%27%27m%20o.safetensors%3B&x=a|b~c(d)&e=%C3%A9"


def test_large_files_come_from_wherever_the_hub_says(online, tmp_path):
    large = bytes(17 * 2**20)  # more than an answer may have
    with LyingHub({"files": FILES | {"model.safetensors": large}, "elsewhere": SIGNED}) as hub:
        assert fetch_apart(request(hub, tmp_path, 100)).commit == COMMIT
        assert any(path.startswith("/cdn/") for _, path in hub.log)
    assert (tmp_path / "hub" / "models--shop--clip" / "snapshots" / COMMIT / "model.safetensors").read_bytes() == large


@pytest.mark.parametrize("name", ATTACKS)
def test_a_lie_ends_in_its_reason_and_nothing_appears_outside(name, answers):
    said, outside, inside, questions = answers[name]
    assert ATTACKS[name][1] in said["why"]
    assert outside == []
    assert not [path for path in inside if ".." in path or path.startswith("models--shop--clip/refs")]
    assert 0 < questions <= QUESTIONS.get(name, 10)


# --- limits of time, in a process of its own

@pytest.fixture
def online(monkeypatch):
    "This process asks nobody; the one that fetches may ask this machine."
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def request(hub, tmp_path, seconds): return FetchRequest("shop/clip", "main", ("*.json", "*.safetensors"), None, str(tmp_path / "hub"), hub.address, FetchLimits(seconds))


@pytest.mark.parametrize("lies", [pytest.param({"drip": True}, id="answer", marks=pytest.mark.slow),
                                  pytest.param({"file": "drip", "headers": {"X-Linked-Size": "10000000"}}, id="file")])
def test_a_trickle_is_given_up_in_time(lies, online, tmp_path):
    start = time.monotonic()
    with LyingHub(lies) as hub, pytest.raises(NotFetched, match="not fetched within 2 s"): fetch_apart(request(hub, tmp_path, 2))
    assert time.monotonic() - start < fetching.PATIENCE, "without a limit a trickle is given up then"


@pytest.mark.slow
def test_a_header_that_does_not_end_is_ended_with_the_process(online, tmp_path):
    with LyingHub({"drip": True, "header_drip": True}) as hub, pytest.raises(NotFetched, match="not fetched within 2 s"): fetch_apart(request(hub, tmp_path, 2))


@pytest.mark.slow
def test_a_trickle_is_given_up_without_a_limit_of_time(online, tmp_path, monkeypatch):
    code = "import devsky_nb.hub.fetch as f; f.PATIENCE = 2; f.serve()"
    monkeypatch.setattr(fetching.subprocess, "Popen", lambda command, **kwargs: subprocess_popen([*command[:3], code], **kwargs))
    with LyingHub({"drip": True}) as hub, pytest.raises(NotFetched, match="sends less than 1.0 KiB a second"): fetch_apart(request(hub, tmp_path, 100))


subprocess_popen = subprocess.Popen


def test_what_is_whole_is_kept_for_the_next_try(online, tmp_path, monkeypatch):
    files = FILES | {"notes.json": b"x" * 100}
    spec = find_spec("shop/clip")
    with LyingHub({"files": files, "absent": ["notes.json"]}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        with pytest.raises(ModelNotFoundError, match="the Hub refuses: 404.*and 2 of 3 files are kept for the next try. Fetch it with `hf download shop/clip"):
            complete_folder(HubSource(spec, "main"), tmp_path / "hub", None)
        del hub.lies["absent"]
        log = len(hub.log)
        fetched_again = fetch_apart(request(hub, tmp_path, 60))
        assert fetched_again.commit == COMMIT
        assert {path.rsplit("/", 1)[1] for _, path in hub.log[log:] if "/resolve/" in path} == {"notes.json"}


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_fetch_ends_with_whoever_wanted_it(end, online, tmp_path):
    with LyingHub({"file": "drip", "headers": {"X-Linked-Size": "10000000"}}) as hub:
        code = f"from devsky_nb.hub.fetch import fetch_apart, FetchLimits, FetchRequest\nfetch_apart(FetchRequest('shop/clip', 'main', ('*.json',), None, {str(tmp_path / 'hub')!r}, {hub.address!r}, FetchLimits(500)))"
        parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        wait_until(lambda: any("/resolve/" in path for _, path in hub.log), pause=.1)
        parent.send_signal(end)
        parent.wait(PATIENCE)
        time.sleep(1)
        asked = threading.active_count()
        hub.lies["file"] = None
        log = len(hub.log)
        time.sleep(3)
        assert len(hub.log) == log and threading.active_count() <= asked  # nobody goes on


@pytest.mark.slow
def test_the_limits_are_options_of_the_command(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with LyingHub({"file": "drip", "headers": {"X-Linked-Size": "10000000"}}) as hub:
        for option, message in ((["--max-bytes", "1kB"], "it has 6.9 KiB, more than 1000 B (--max-bytes)"), (["--timeout", "3"], "not fetched within 3 s (--timeout)")):
            command = [sys.executable, "-c", "import sys; from devsky_nb.cli import main; sys.exit(main())", "models", "prefetch", "shop/clip", "--cache-dir", str(tmp_path / "hub"), *option]
            done = subprocess.run(command, capture_output=True, text=True, env=env | {"HF_ENDPOINT": hub.address}, timeout=PATIENCE)
            assert message in done.stderr and "Traceback" not in done.stderr
            assert done.returncode != 0


@pytest.mark.parametrize("said, status, why", [(b"", -9, "ended with status -9"), (b"Traceback", 1, "ended with status 1"), (b'{"why": "x"}', 0, "x")])
def test_a_process_that_dies_is_said(said, status, why):
    with pytest.raises(NotFetched, match=why): fetched(said, status)


def test_a_frozen_program_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with LyingHub({}) as hub, pytest.raises(NotFetched, match="fetch it beforehand"): fetch_apart(request(hub, tmp_path, 5))
    assert hub.log == []


# --- what stands in the cache already

def pipe(path): os.mkfifo(path)


REPO = "models--shop--clip"
STATES = {".locks": [str.encode, "{out}"], f".locks/{REPO}": [str.encode], f"{REPO}/trees/{COMMIT}.json": [pipe, "/dev/zero"], f"{REPO}/trees": ["{out}", str.encode],
          f"{REPO}/snapshots/{COMMIT}": ["{out}"], f"{REPO}/snapshots": ["{out}", str.encode], f"{REPO}/blobs": [str.encode], f"{REPO}/refs": ["{out}", str.encode],
          f"{REPO}/refs/main": [pipe, "/dev/zero", "{out}/precious", "main", Path.mkdir], "CACHEDIR.TAG": [pipe], REPO: [str.encode, REPO]}


@pytest.mark.slow
@pytest.mark.parametrize("place, state", [(place, state) for place, states in STATES.items() for state in states], ids=lambda v: getattr(v, "__name__", str(v)[-30:]))
def test_whatever_stands_in_the_way_of_a_fetch_is_said_or_replaced(place, state, online, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("precious")
    path = tmp_path / "hub" / place
    path.parent.mkdir(parents=True)
    if isinstance(state, str): path.symlink_to(state.replace("{out}", str(out)))
    elif state is str.encode: path.write_bytes(b"a file")
    else: state(path)
    with LyingHub({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        try: assert download(find_spec("shop/clip"), "main", tmp_path / "hub", limits=FetchLimits(PATIENCE)).name == COMMIT
        except DevSkyyError as e: assert str(tmp_path / "hub") in str(e)
        else: assert (tmp_path / "hub" / REPO / "refs" / "main").read_text() == COMMIT
    assert [p.name for p in out.iterdir()] == ["precious"] and (out / "precious").read_text() == "precious"
