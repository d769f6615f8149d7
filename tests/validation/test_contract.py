"Contracts in YAML: what is written is what is meant, and what is wrong is told with its line."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from patience import PATIENCE

from devsky_nb.errors import FileNotFoundError, ValidationError
from devsky_nb.validation.contract import ImageSetContract

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9))


def contract_file(folder: Path, text: str | bytes) -> Path:
    file = folder / "contract.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return file


@pytest.mark.parametrize("text, expected", [
    ("min_size: 0200", {"min_size": 200}),
    ("min_size: 0o17", {"min_size": 15}),
    ("min_size: 0x1F", {"min_size": 31}),
    ("min_size: +12", {"min_size": 12}),
    ("min_success: 1", {"min_success": 1}),
    ("min_success: 5e-1", {"min_success": .5}),
    ("min_success: .5", {"min_success": .5}),
    ("labels: [yes, no, on, off, y, n, No, OFF]", {"labels": ("yes", "no", "on", "off", "y", "n", "No", "OFF")}),
    ("labels: [2024-01-01, 1:30, 1_000, 12e, =, 2024-01-01 10:00:00]",
     {"labels": ("2024-01-01", "1:30", "1_000", "12e", "=", "2024-01-01 10:00:00")}),
    ("labels: ['0200', \"38\"]", {"labels": ("0200", "38")}),
    ("labels: &l [a, b]\nrequired_fields: *l", {"labels": ("a", "b"), "required_fields": ("a", "b")}),
    ("max_failures: null\nmin_size: 3", {"max_failures": None, "min_size": 3}),
    ("max_failures: ~", {"max_failures": None}),
    ("%YAML 1.1\n---\nmin_size: 0200\nlabels: [no]\n...\n", {"min_size": 200, "labels": ("no",)}),
    ("\ufefflabels: [größe]", {"labels": ("größe",)}),
    ("labels: [größe]\r\nmin_size: 7\r\n", {"labels": ("größe",), "min_size": 7}),
    ("# nothing but one clause\nlabels:\n- coat\n- |\n  long\n", {"labels": ("coat", "long\n")}),
    ("{}", {}),
], ids=lambda value: value[:24].replace("\n", "|") if isinstance(value, str) else "")
def test_what_is_written_is_what_is_meant(tmp_path, text, expected):
    contract = ImageSetContract.from_yaml(contract_file(tmp_path, text))
    assert contract == ImageSetContract(**expected)


@pytest.mark.parametrize("text, says", [
    ("min_size: 1\nmin_size: 2", "line 2: 'min_size' stands here again: line 1 has it already"),
    ("min_size: 1\nlabels: [a]\n'min_size': 1", "line 3: 'min_size' stands here again"),
    ("{min_size: 1,\n min_size: 1}", "line 2: 'min_size' stands here again"),
    ("labels: [a]\nmin_sise: 3", "line 2: unknown key 'min_sise', did you mean 'min_size'?"),
    ("labels: [a]\n<<: {min_size: 3}", "line 2: unknown key '<<'"),
    ("a: &a {min_size: 1}\n<<: *a", "line 1: unknown key 'a'"),
    ("labels:\n  - a\n  - 38\n", "line 3: labels: 38 is no word"),
    ("labels:\n  - a\n  - true\n", "line 3: labels: True is no word"),
    ("labels:\n  - a\n  -\n", "line 3: labels: None is no word"),
    ("formats:\n- JPEG\n- HEIC", "line 3: formats: 'HEIC' is not a format"),
    ("formats: [jpge]", "did you mean 'JPEG'?"),
    ("min_success: .5\nmin_size: 1:30", "line 2: min_size='1:30'"),
    ("min_size: 1_000", "line 1: min_size='1_000'"),
    ("min_size: yes", "min_size='yes'"), ("min_size: true", "min_size=True"), ("min_size: 0", "at least 1"),
    ("min_size: big", "min_size='big'"), ("max_size: 2.5", "max_size=2.5"), ("min_size: 1e3", "min_size=1000.0"),
    ("min_size: [3]", "min_size=[3]"), ("min_size: {a: b}", "min_size={'a': 'b'}"),
    ("labels: [a]\nmin_size: 9\nmax_size: 8", "lines 2 and 3: min_size=9 is more than max_size=8"),
    ("labels: coat", "list of words"), ("labels: []", "list of words"), ("required_fields: {a: b}", "list of words"),
    ("max_failures: 5", "max_failures=5"), ("max_duplicates: -0.1", "from 0 to 1"), ("min_success: null", "min_success=None"),
    ("max_label_disagreement: .nan", "from 0 to 1"), ("max_failures: .inf", "from 0 to 1"), ("max_failures: 5%", "'5%'"),
    ("max_failures:", "line 1: 'max_failures' has no value"), ("labels: [a]\nmin_size:   # later\n", "line 2: 'min_size' has no value"),
    ("1: 2", "line 1: unknown key 1"), ("no: 2", "unknown key 'no'"), ("null: 2", "unknown key None"),
    ("? [a, b]\n: 1", "unknown key"), ("? {a: b}\n: 1", "unknown key"),
    ("- a", "found a list"), ("", "found nothing"), ("# only a remark", "found nothing"), ("coat", "found a single value"),
    ("a: 1\n---\nb: 2", "line 2: not readable as YAML"),
    ("min_size:\t3\n\tmax_size: 4", "not readable as YAML"), ("labels: [a\nmin_size: 3", "not readable as YAML"),
    ("a: [", "not readable as YAML"), ("labels: *unknown", "line 1: not readable as YAML"), ("\x00", "not readable as YAML"),
    ("labels: [a, \x07]", "not readable as YAML"), ("@a: b", "not readable as YAML"), ("a: b: c", "not readable as YAML"),
    ("!!python/object/apply:os.system ['true']", "found a list"),
    ("min_size: !!python/object/apply:os.system ['true']", "not readable as YAML"),
    ("min_size: !!timestamp 2024-01-01", "not readable as YAML"), ("labels: !!set {a, b}", "not readable as YAML"),
    ("min_size: !!binary aGk=", "not readable as YAML"), ("min_size: !!int x", "invalid literal"), ("labels: !x [a]", "not readable as YAML"),
    ("min_size: !!bool maybe", "not readable as YAML"), ("min_success: !!float 1:30", "could not convert"),
    ("min_size: " + "9" * 5000, "limit"), ("[" * 5000, "too deep"), ("labels: " + "{a: " * 3000, "too deep"),
    ("labels: &l [a, *l]", "unfold to more than"), ("labels: &l [[*l]]", "unfold to more than"), (BOMB, "unfold to more than"),
    ("a: &a [x]\nlabels: [*a, *a]", "line 1: unknown key 'a'"), ("labels: &a [x]\nformats: [*a]", "line 1: formats: ['x'] is no word"),
    ("labels: [" + "a," * 40_000 + "]", "more than 64.0 KiB"),
    (b"labels: [caf\xe9]", "no UTF-8"), ("labels: [a]".encode("utf-16"), "no UTF-8"), (b"\xff\xfe\x00", "no UTF-8"),
    ("k" * 1000 + ": 1", "unknown key"), ("k" * 9000 + ": 1", "not readable as YAML"), ("min_size: " + "x" * 9000, "min_size="),
], ids=lambda value: repr(value[:24]))
def test_a_wrong_contract_names_the_file_and_the_line(tmp_path, text, says):
    file = contract_file(tmp_path, text)
    with pytest.raises(ValidationError) as caught: ImageSetContract.from_yaml(file)
    message = str(caught.value)
    assert str(file) in message and says in message, message
    assert len(message) < 700 and "\n" not in message.split(str(file))[1], message
    assert caught.value.details["path"] == str(file)
    json.dumps(caught.value.to_dict(), allow_nan=False)


@pytest.mark.parametrize("path, error, says", [
    ("none.yaml", FileNotFoundError, "no contract"), ("none/none.yaml", FileNotFoundError, "no contract"),
    (".", ValidationError, "cannot be read"), ("a\0b", ValidationError, "expected a path"), ("", ValidationError, "expected a path"),
    ("gone", ValidationError, "cannot be read"), (None, ValidationError, "path=None"), (3, ValidationError, "path=3"),
    ({}, ValidationError, "path={}")])
def test_what_is_no_file_is_said(tmp_path, monkeypatch, path, error, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(error, match=says): ImageSetContract.from_yaml(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = ("import sys; from devsky_nb import ImageSetContract\n"
            "try: ImageSetContract.from_yaml(sys.argv[1])\nexcept ValueError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], capture_output=True, text=True, timeout=PATIENCE)
    assert "no regular file" in done.stdout
