"Every command on terminals, pipes and locales that are not what a developer has: no traceback, and the exit status stays true."
import contextlib, errno, io, json, os, signal, subprocess, sys, time
from pathlib import Path

import pyarrow.parquet as pq, pytest
from patience import PATIENCE

from devsky_nb import cli, render_garment, Garment
from devsky_nb.cli import main
from devsky_nb.errors import DevSkyyError, InsufficientMemoryError, ModelLoadError, ModelNotFoundError, MLError, ValidationError
from devsky_nb.errors import FileNotFoundError as NoSuchFile

DEVSKY = [sys.executable, "-c", "import sys; from devsky_nb.cli import main; sys.exit(main())"]
NAMES = ["größe.png", "服 ✓.png", "plain.png"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A folder whose name and files are of many scripts."
    try: os.fsencode("größe ✓")
    except UnicodeEncodeError: pytest.skip("this process cannot make files with such names; it runs in a locale without them")
    folder = tmp_path_factory.mktemp("läden") / "café ✓"
    folder.mkdir()
    for seed, name in enumerate(NAMES): render_garment(Garment("dress", "red", "striped"), 128, seed).save(folder / name)
    (folder / "größe.py").write_text("x = 'größe'\nfrom_pretrained('größe', trust_remote_code=True)\n", encoding="utf-8")
    return folder


def words(command, shop, out):
    places = {"SHOP": shop, "OUT": out, "CODE": shop / "größe.py", "HUB": out / "hub", "PNG": shop / NAMES[1]}
    def place(word):
        first, slash, rest = word.partition("/")
        return f"{places[first]}{slash}{rest}" if first in places else word
    return [place(word) for word in command]


TINY = ("--model", "tiny-clip")
COMMANDS = {
    "embed": ["embed", "SHOP", "--out", "OUT", *TINY, "--precision", "fp32"],
    "search": ["search", "OUT/none ✓", "ein rotes Kleid"],
    "export": ["export", "OUT/none ✓", "OUT/größe.parquet", "--to", "parquet"],
    "validate": ["validate", "SHOP", *TINY, "--html", "OUT/größe.html", "--report", "OUT/größe.json"],
    "generate": ["generate", "ein größes Kleid ✓", "--model", "tiny-sdxl", "--steps", "2", "--out", "OUT", "--cache-dir", "HUB"],
    "plan": ["plan", "tiny-sdxl", "--budget", "1GB", "--device", "cpu"],
    "plan nothing": ["plan", "größe ✓", "--budget", "1GB"],
    "doctor": ["doctor", "CODE", "--source", "--diff"],
    "doctor rules": ["doctor", "--rules"],
    "doctor place": ["doctor", "SHOP/✓ missing", "--source"],
    "models list": ["models", "list", "--cache-dir", "HUB"],
    "models verify": ["models", "verify", "tiny-clip"],
    "models prefetch": ["models", "prefetch", "größe/✓", "--cache-dir", "HUB"],
    "completion": ["completion", "bash"],
    "cache report": ["cache", "report", "--cache-dir", "HUB"],
    "cache verify": ["cache", "verify", "--cache-dir", "HUB"],
    "cache evict": ["cache", "evict", "--max-size", "0", "--cache-dir", "HUB"],
    "cache pin": ["cache", "pin", "größe/✓", "main", "café", "--cache-dir", "HUB"],
    "cache unpin": ["cache", "unpin", "a/b", "café ✓", "--cache-dir", "HUB"],
}
STATUS = {"search": 2, "export": 2, "plan nothing": 2, "doctor": 1, "doctor place": 2, "models prefetch": 2, "cache pin": 2, "cache unpin": 2}


def test_every_command_is_walked():
    assert {command[0] for command in COMMANDS.values()} | {"demo"} == set(cli.COMMANDS)


@contextlib.contextmanager
def terminal(encoding):
    "Standard streams of one encoding, which refuse what they cannot write, as Python's do on such a terminal."
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): yield out, err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_that_cannot_write_everything(name, encoding, shop, tmp_path):
    with terminal(encoding) as (out, err):
        status = main(words(COMMANDS[name], shop, tmp_path))
    shown, told = out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)
    assert status == STATUS.get(name, 0), told
    assert "Traceback" not in told + shown and (shown or told) and (out.errors, err.errors) == ("strict", "strict")
    if status == 2: assert told.count("devsky: ") == 1 and "unexpected" not in told
    for page in tmp_path.glob("*.html"): assert "服 ✓" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("error, status", [
    (ValidationError("wrong"), 2), (NoSuchFile("none"), 2), (ModelNotFoundError("none"), 2), (PermissionError(errno.EACCES, "no", "x"), 2),
    (ModelLoadError("damaged"), 3), (InsufficientMemoryError("small"), 3), (MLError("x"), 3), (DevSkyyError("full"), 3),
    (OSError(errno.ENOSPC, "full"), 3), (OSError("odd"), 3), (DevSkyyError("x", original_error=PermissionError(errno.EACCES, "no")), 2),
    (ValidationError("x", original_error=OSError(errno.ENOSPC, "full")), 3), (DevSkyyError("x", original_error=ConnectionError(errno.ECONNREFUSED, "no")), 3), (KeyError("größe"), 3), (RecursionError("deep"), 3), (MemoryError(), 3),
    (AssertionError(), 3), (UnicodeEncodeError("ascii", "ß", 0, 1, "no"), 3), (ValueError("one\nand\x1b[31m two"), 3),
    (KeyboardInterrupt(), 130), (BrokenPipeError(errno.EPIPE, "gone"), 141)], ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "")
def test_one_is_never_an_accident(error, status, monkeypatch, capsys):
    def fails(args):
        "Fail."
        raise error
    for name, (_, options, has_actions) in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, (fails, options, has_actions))
    for command in (["models", "list"], ["plan", "x", "--budget", "1"], ["cache", "report"], ["demo"], ["doctor"]):
        assert main(command) == status
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == (status != 141) and "\x1b" not in shown.err
        assert ("--debug" in shown.err) == (not isinstance(error, (DevSkyyError, KeyboardInterrupt)) and not getattr(error, "errno", None))
        assert main([*command, "--json"]) == status
        out = capsys.readouterr().out
        if status in (2, 3): assert json.loads(out)["error"]["message"]
    if status in (2, 3):
        assert main(["--debug", "models", "list"]) == main(["models", "list", "--debug"]) == status
        assert capsys.readouterr().err.count("Traceback") == 2
        monkeypatch.setenv("DEVSKY_DEBUG", "1")
        assert main(["models", "list"]) == status and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command, option", [
    (["demo", "--out"], "--out"), (["embed", "SHOP", *TINY, "--out"], "--out"), (["generate", "a dress", "--model", "tiny-sdxl", "--out"], "--out"),
    (["validate", "SHOP", *TINY, "--html"], "--html"), (["validate", "SHOP", *TINY, "--report"], "--report")])
@pytest.mark.parametrize("place", ["file/below", "file", "x" * 300, "null\0byte", "proc", "folder"])
def test_what_cannot_be_written_is_said_before_any_work(command, option, place, shop, tmp_path, monkeypatch, capsys):
    is_folder = option == "--out"
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    if place == "file" and not is_folder: place = "folder"
    if place == "folder" and is_folder: return
    for work in ("CLIPImageEmbedder", "QuantizedSDXLGenerator", "write_catalogue"):
        monkeypatch.setattr(f"devsky_nb.{work}", None, raising=False)  # whatever starts to work now fails otherwise
    path = "/proc/1/none/r" if place == "proc" else str(tmp_path / place)
    assert main([*words(command, shop, tmp_path), path]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"devsky: {option}=") and shown.err.count("\n") == 1 and "cannot be written" in shown.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_places_are_looked_at_and_left_as_they_were(tmp_path):
    cli.check_place("--out", tmp_path / "a" / "b")
    cli.check_place("--html", tmp_path / "a" / "b.html", "page")
    (tmp_path / "old.html").touch()
    (tmp_path / "link.html").symlink_to("later/b.html")
    for name in ("old.html", "link.html"): cli.check_place("--html", tmp_path / name, "page")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.html", "old.html"]


@pytest.mark.parametrize("command, option, kind", [
    (["validate", "SHOP", *TINY, "--html"], "--html", "page"), (["validate", "SHOP", *TINY, "--report"], "--report", "report"),
    (["validate", "SHOP", *TINY, "--accepted"], "--accepted", "list"), (["search", "VECTORS", "a dress", "--html"], "--html", "page")])
def test_what_is_not_ours_is_not_replaced(command, option, kind, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "x.json" if option != "--html" else "x.html"
    texts = {"page": "<html>mine</html>", "report": '{"images": []}', "list": '[{"path": "a.jpg"}]'}
    os.mkfifo("pipe.json")
    for text in (texts[kind], "index,path\n", "\0\1", " "):
        Path(name).write_text(text, encoding="utf-8")
        assert main([*words(command, shop, tmp_path), name]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"devsky: {option}='{name}' cannot be written: it holds something else than a {kind} of devsky's, and is not replaced"), told
        assert Path(name).read_text(encoding="utf-8") == text
    assert main([*words(command, shop, tmp_path), "pipe.json"]) == 2 and "it is no regular file" in capsys.readouterr().err


def test_files_are_written_named_and_replaced_by_their_own_kind(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.html").touch()  # as mktemp makes one
    call = ["validate", str(shop), *TINY, "--quiet", "--html", "r.html", "--report", "r.json"]
    assert main([*call, "--accepted", "good.csv"]) == 0
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if line.startswith("written: ")] == ["written: r.html", "written: r.json", "written: good.csv"]
    assert main([*call, "--accepted", "good.json", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["written"] == {"page": "r.html", "report": "r.json", "accepted": "good.json"} and told.err == ""
    for name in ("good.csv", "good.json"): cli.check_place("--accepted", Path(name), "list")
    assert main(["validate", str(shop), *TINY, "--report", "r.json", "--accepted", "./r.json"]) == 2 and "it holds something else" in capsys.readouterr().err
    assert main(["validate", str(shop), *TINY, "--report", "new.json", "--accepted", "./new.json"]) == 2
    assert "--accepted='new.json' names the file of --report" in capsys.readouterr().err
    assert main(["validate", "good.csv", *TINY, "--accepted", "good.csv"]) == 2 and "names the file of the source" in capsys.readouterr().err


def test_a_result_is_told_even_where_it_cannot_be_written(shop, tmp_path, capsys):
    "The disk may fill after the check that it can be written."
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try: status = main(["validate", str(shop), *TINY, "--quiet", "--html", str(tmp_path / "r.html")])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr()
    assert status == 3 and "ready to use" in told.out and told.err.count("\n") == 1 and "File too large" in told.err, told.err
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_arguments_is_json_too(capsys):
    for call in (["embed", "--json"], ["plan", "--json", "x", "--top", "none"], ["--json"], ["doctor", "--json", "--nonsense"]):
        with pytest.raises(SystemExit) as ended: main(call)
        shown = capsys.readouterr()
        assert ended.value.code == 2 and json.loads(shown.out)["error"]["error_type"] == "ValidationError" and "usage:" in shown.err
    with pytest.raises(SystemExit): main(["embed"])
    assert capsys.readouterr().out == ""


def test_a_name_of_a_function_becomes_that_of_a_command(tmp_path, capsys):
    (tmp_path / "begun" / ".devsky").mkdir(parents=True)
    assert main(["search", str(tmp_path / "begun"), "a dress"]) == 2
    assert "has an unfinished data set: run devsky embed again, it goes on from there" in capsys.readouterr().err


def process(*args, **kwargs):
    return subprocess.Popen([*DEVSKY, *map(str, args)], stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", **kwargs)


def test_a_reader_that_has_gone_changes_nothing():
    rules = process("doctor", "--rules", stdout=subprocess.PIPE)
    rules.stdout.readline()
    rules.stdout.close()
    told = rules.stderr.read()
    assert rules.wait(PATIENCE) == 0 and told == ""


def test_a_closed_stream_and_a_full_disk():
    closed = process("models", "list", close_fds=True, preexec_fn=lambda: os.close(1))
    told = closed.stderr.read()
    assert closed.wait(PATIENCE) == 0 and told == ""
    if not os.path.exists("/dev/full"): return
    with open("/dev/full", "w") as full: failed = process("models", "list", stdout=full)
    told = failed.stderr.read()
    assert failed.wait(PATIENCE) == 3 and told.count("\n") == 1 and "No space left" in told
    for call, status in (["models", "list"], 3), (["embed", "no-such", "--out", "x", "--json"], 2):
        with open("/dev/full", "w") as full: assert subprocess.run([*DEVSKY, *call], stdout=full, stderr=full, timeout=PATIENCE).returncode == status


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_locale(variables, *args):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIOENCODING"))} | variables
    return subprocess.run([*DEVSKY, *map(str, args)], env=env, capture_output=True, timeout=PATIENCE)


def test_ids_are_the_same_in_every_locale(shop, tmp_path):
    code = ("import json, sys; from devsky_nb.images.image_sets import read_image_set as r; s = r(sys.argv[1]);"
            "print(json.dumps([[e['id'] for e in s['images']], s['metadata'], s['left_out']]))")
    told = []
    for variables in ({"PYTHONUTF8": "1"}, ASCII):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))} | variables
        done = subprocess.run([sys.executable, "-c", code, shop], env=env, capture_output=True, timeout=PATIENCE)
        told.append(json.loads(done.stdout))
    assert told[0] == told[1] and told[0][0] == sorted(NAMES) and told[0][1] == {"name": "café ✓"}


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"PYTHONUTF8": "1"}, ASCII, ASCII | {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii:strict"},
                                       {"PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}], ids=str)
def test_every_command_in_every_locale(variables, shop, tmp_path):
    "As a process, with names of files that are no UTF-8 beside those that are."
    (tmp_path / "shop").mkdir()
    for name in NAMES: (tmp_path / "shop" / name).write_bytes((shop / name).read_bytes())
    with open(os.path.join(os.fsencode(tmp_path / "shop"), b"caf\xe9.png"), "wb") as file: file.write((shop / NAMES[0]).read_bytes() + b"1")
    (tmp_path / "shop" / "größe.py").write_bytes((shop / "größe.py").read_bytes())
    (tmp_path / "set.json").write_text(json.dumps({"images": [{"path": f"shop/{name}", "id": name} for name in NAMES]}, ensure_ascii=False), encoding="utf-8")
    for name, command in COMMANDS.items():
        out = tmp_path / name.replace(" ", "-")
        done = in_locale(variables, *words(command, tmp_path / "shop", out))
        assert done.returncode == STATUS.get(name, 0) and b"Traceback" not in done.stderr, (name, done.stderr[-600:])
    rows = pq.read_table(tmp_path / "embed").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted([*NAMES, "caf\\udce9.png"]) and {row["status"] for row in rows} <= {"embedded", "duplicate"}
    listed = in_locale(variables, "validate", tmp_path / "set.json", *TINY, "--quiet", "--json")
    assert json.loads(listed.stdout)["successful"] == 3, listed.stdout[-500:]
    demo = in_locale(variables, "demo", "--out", tmp_path / "démo", "--images", "14", "--quiet")
    assert demo.returncode == 0 and b"Traceback" not in demo.stderr, demo.stderr[-600:]
    assert "<meta charset" in (tmp_path / "démo" / "report.html").read_text(encoding="utf-8")


DROPPED = """
import argparse, signal, sys, time
from devsky_nb import cli
cli.SECONDS_UNTIL_AGAIN = .2

class Dying:
    def __del__(self): signal.raise_signal(signal.SIGINT)

def bare():
    try: signal.raise_signal(signal.SIGINT)
    except: pass

@cli.command(lambda parser: None)
def job(args):
    "Take long."
    {drop}
    time.sleep(60)
    return 0

sys.exit(cli.main(["job"]))
"""


@pytest.mark.parametrize("drop", ["Dying()", "bare()", "exec('signal.raise_signal(signal.SIGINT)')"])
def test_ctrl_c_that_a_library_drops_ends_the_command_all_the_same(drop):
    done = subprocess.run([sys.executable, "-c", DROPPED.format(drop=drop)], capture_output=True, text=True, timeout=PATIENCE)
    assert ended(done.returncode) == 130 and done.stderr == "devsky: interrupted; the same command goes on from here\n", done.stderr


def test_ctrl_c_while_the_command_line_is_loaded():
    code = "import builtins, signal\nplain = builtins.__import__\ndef late(name, *a, **kw):\n    if name == 'argparse': signal.raise_signal(signal.SIGINT)\n    return plain(name, *a, **kw)\n"
    code += "from devsky_nb import __main__\nbuiltins.__import__ = late\nraise SystemExit(__main__.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert ended(done.returncode) == 130 and done.stderr == "devsky: interrupted\n", done.stderr


def ended(status):
    "The exit status as a shell tells it: Python ends by the signal where Ctrl-C came in code that was made at run time (`exec`)."
    return 130 if status == -signal.SIGINT else status


@pytest.mark.slow
@pytest.mark.parametrize("command", [["demo", "--images", "4000", "--out", "OUT"], ["validate", "MANY", *TINY],
                                     ["generate", *["a dress"] * 60, "--model", "tiny-sdxl", "--steps", "30", "--out", "OUT", "--cache-dir", "HUB"]])
def test_ctrl_c_is_130_wherever_it_comes(command, shop, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(6000): (many / f"{i}.png").write_bytes((shop / NAMES[0]).read_bytes() + b"%d" % i)
    for seconds in (1, 4, 7):
        running = process(*(str(many) if word == "MANY" else word for word in words(command, shop, tmp_path)), stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        running.send_signal(signal.SIGINT)
        told = running.communicate(timeout=PATIENCE)[1]
        assert ended(running.returncode) == 130 and "interrupted" in told and "Traceback" not in told, told
