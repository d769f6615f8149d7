"Checkpoints of quantized networks: whose they are, what a damaged one is told as, and what never costs one."
import errno, json, os, shutil, threading, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devsky_nb.diffusion import checkpoint
from devsky_nb.diffusion.checkpoint import (
    checkpoint_folder,
    describe_file,
    from_cache,
    list_files,
    load_quantized,
    read_network,
    save_quantized,
)
from devsky_nb.diffusion.load import LoadReport, make_request
from devsky_nb.diffusion.networks import load_network
from devsky_nb.diffusion.quantization import bnb_settings, PARTS
from devsky_nb.diffusion.sdxl import load_sdxl_pipeline_with_quantization_v1 as load_v1
from devsky_nb.errors import DevSkyyError, InsufficientMemoryError, ModelLoadError, ValidationError
from devsky_nb.hub import weights
from devsky_nb.hub.cache import MANIFEST
from devsky_nb.hub.load import quiet
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.registry import ModelRegistry

TINY = locate_model("tiny-sdxl")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXTS = "text_encoder/model.safetensors"
SETTINGS = {"unet": bnb_settings(compute_dtype=torch.float32)}


def load(cache, model="tiny-sdxl", **options):
    return load_v1(model, device="cpu", cache_dir=cache / "hub", offline=True, **options)


def request_for(model, cache): return make_request(model, ModelRegistry(cache / "hub", offline=True), "cpu", None, SETTINGS)


def exchange(file):
    "Other content of the same size, the time restored."
    times, data = file.stat(), bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) - 64, 97): data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def state(pipeline): return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def same(a, b): return all(torch.equal(a[name], b[name]) for name in a)


# --- whose a kept checkpoint is


def test_two_folders_of_one_name_and_one_size_do_not_share_their_networks(tmp_path):
    a = shutil.copytree(TINY, tmp_path / "a" / "model")
    b = shutil.copytree(TINY, tmp_path / "b" / "model")
    exchange(b / UNET)
    for file in a.rglob("*"): shutil.copystat(file, b / file.relative_to(a))
    assert sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in a.rglob("*")) == sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in b.rglob("*")
    )
    first, second = load(tmp_path, a), load(tmp_path, b)
    assert not second.load_report.from_checkpoint and not same(state(first), state(second))
    shutil.copy2(b / UNET, a / UNET)  # and now the one has become the other
    third = load(tmp_path, a)
    assert third.load_report.from_checkpoint and same(state(third), state(second))


def test_a_loaded_model_is_not_taken_for_what_its_folder_has_become(tmp_path):
    folder = shutil.copytree(locate_model("tiny-clip"), tmp_path / "clip")
    registry = ModelRegistry(tmp_path / "hub", offline=True)
    first = registry.get_model(folder, device="cpu")
    assert registry.get_model(folder, device="cpu") is first
    exchange(folder / "model.safetensors")
    second = registry.get_model(folder, device="cpu")
    assert second is not first and any(
        not torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
    )


def test_the_second_load_reads_no_byte_of_the_model(tmp_path, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "hub-digests").write_text("a file where the folder should be")
    assert load(tmp_path, folder).load_report.checkpoint  # that no checksum can be kept stops no load
    (tmp_path / "hub-digests").unlink()
    monkeypatch.setattr(weights, "_DIGESTS", {})
    assert load(tmp_path, folder).load_report.from_checkpoint
    large = [path for path in weights.model_files(folder) if path.stat().st_size >= weights.KEPT_FROM]
    assert len(large) == 2
    monkeypatch.setattr(weights, "_DIGESTS", {})  # as in another process
    real = weights.compute_digest
    def compute(path, identity):
        assert path not in large, f"{path.name} was read again"
        return real(path, identity)
    monkeypatch.setattr(weights, "compute_digest", compute)
    assert load(tmp_path, folder).load_report.from_checkpoint


def test_what_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "model")
    real = checkpoint.from_cache
    def meanwhile(*args):
        exchange(folder / UNET)
        return real(*args)
    monkeypatch.setattr("devsky_nb.diffusion.pipelines.from_cache", meanwhile)
    report = load(tmp_path, folder).load_report
    assert report.checkpoint is None and "changed while they were read" in report.warnings[0]
    assert not (tmp_path / "hub-quantized").exists()


# --- damaged checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A folder as save_quantized writes it."
    folder = tmp_path_factory.mktemp("saved")
    return save_quantized(load(folder, quantize_once=False), folder / "model")


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path / "model")


def manifest(folder, **changes):
    about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(about | changes), encoding="utf-8")


def part(folder, **changes):
    about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    about["parts"][0] |= changes
    manifest(folder, parts=about["parts"])


MANIFESTS = {  # what is done to the manifest; a word that the error must have
    "empty": (lambda f: (f / MANIFEST).write_bytes(b""), "Expecting value"),
    "cut": (lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:500]), MANIFEST),
    "no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\0\0"), "UTF-8"),
    "deep": (lambda f: (f / MANIFEST).write_text("[" * 200_000), "levels"),
    "deep, closed": (lambda f: (f / MANIFEST).write_text('{"a":' * 90 + "1" + "}" * 90), "levels"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "expected an object"),
    "null": (lambda f: (f / MANIFEST).write_text("null"), "expected an object"),
    "a number of 5000 digits": (lambda f: (f / MANIFEST).write_text('{"format": ' + "9" * 5000 + "}"), MANIFEST),
    "too large": (lambda f: (f / MANIFEST).write_bytes(b" " * 20_000_000), "16.0 MiB"),
    "nothing in it": (lambda f: (f / MANIFEST).write_text("{}"), "'format' should be a whole number, found nothing"),
    "another format": (lambda f: manifest(f, format=3), "'format' should be 2, found 3"),
    "format true": (lambda f: manifest(f, format=True), "'format' should be a whole number"),
    "no dtype": (lambda f: manifest(f, dtype="float99"), "'dtype' should be float32 or float16 or bfloat16"),
    "a dtype of another kind": (lambda f: manifest(f, dtype="int8"), "'dtype' should be float32"),
    "a name of torch": (lambda f: manifest(f, dtype="nn"), "'dtype' should be float32"),
    "dtype of another type": (lambda f: manifest(f, dtype=["float32"]), "'dtype' should be a text"),
    "no such decoding": (lambda f: manifest(f, vae="fp8"), "'vae' should be same or auto"),
    "model null": (lambda f: manifest(f, model=None), "'model' should be a text"),
    "commit a number": (lambda f: manifest(f, commit=5), "'commit' should be a text or nothing"),
    "asked a list": (lambda f: manifest(f, asked=[]), "'asked' should be an object"),
    "files a list": (lambda f: manifest(f, files=[]), "'files' should be an object"),
    "files of other types": (lambda f: manifest(f, files={UNET: None}), "is not as it was written"),
    "files outside": (lambda f: manifest(f, files={"../../etc/passwd": [1, "a"]}), "it is missing"),
    "parts a text": (lambda f: manifest(f, parts="unet"), "'parts' should be a list"),
    "parts of texts": (lambda f: manifest(f, parts=["unet"]), "describes no network"),
    "parts null": (lambda f: manifest(f, parts=[None]), "describes no network"),
    "no parts": (lambda f: manifest(f, parts=[]), "other networks than"),
    "a part too many": (lambda f: manifest(f, parts=json.loads((f / MANIFEST).read_text())["parts"] * 2), "other networks"),
    "a part of another name": (lambda f: part(f, name="scheduler"), "other networks than"),
    "a part without a name": (lambda f: part(f, name=None), "'name' cannot be None"),
    "a part with a new field": (lambda f: part(f, new=1), "describes no network"),
    "negative bytes": (lambda f: part(f, bytes_after=-10**18), "'bytes_after' cannot be -1000"),
    "too many bytes": (lambda f: part(f, bytes_after=10**30), "'bytes_after' cannot be 1000"),
    "layers a text": (lambda f: part(f, layers="many"), "'layers' cannot be 'many'"),
    "layers that are not there": (lambda f: part(f, layers=7), "quantized layers, and quantized.json says 7"),
    "left alone a number": (lambda f: part(f, left_alone=5), "'left_alone' cannot be 5"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_one_error(what, folder):
    spoil, word = MANIFESTS[what]
    spoil(folder)
    with pytest.raises(ModelLoadError) as caught: load_quantized(folder, "cpu")
    assert word in str(caught.value) and str(folder) in str(caught.value) and caught.value.details["folder"]
    assert "again" in str(caught.value) and json.dumps(caught.value.to_dict())


PLACES = {  # instead of the manifest
    "nothing": lambda m: m.unlink(), "fifo": lambda m: (m.unlink(), os.mkfifo(m)),
    "device": lambda m: (m.unlink(), m.symlink_to("/dev/zero")), "folder": lambda m: (m.unlink(), m.mkdir()),
    "a link that leads nowhere": lambda m: (m.unlink(), m.symlink_to("none")),
    "a link to itself": lambda m: (m.unlink(), m.symlink_to(m)),
}


def within(seconds, work):
    "What a call raises, if it does not wait for ever."
    found = []
    def run():
        try: found.append(work())
        except BaseException as e: found.append(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file_is_no_manifest(what, folder):
    PLACES[what](folder / MANIFEST)
    error = within(60, lambda: load_quantized(folder, "cpu"))
    assert isinstance(error, ValidationError) and "not what save_quantized writes: it has no quantized.json" in str(error)


def test_a_pipe_among_the_files_is_waited_for_by_nobody(folder):
    for name in ("unet/model.safetensors.index.json", "unet/config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        error = within(60, lambda: load_quantized(folder, "cpu"))
        assert isinstance(error, ModelLoadError) and name in str(error)
        (folder / name).unlink()


def relist(folder): manifest(folder, files={name: describe_file(path) for name, path in list_files(folder).items()})


def change(folder, name, edit):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def first(tensors, *endings): return next(k for k in sorted(tensors) for e in endings if k.endswith(e))


def without(*endings): return lambda tensors: tensors.pop(first(tensors, *endings))


def reshaped(*endings):
    def edit(tensors): tensors[first(tensors, *endings)] = torch.zeros(3, 5, dtype=tensors[first(tensors, *endings)].dtype)
    return edit


def added(tensors): tensors["new.weight"] = torch.zeros(4)


ALL = (UNET, TEXTS)
WEIGHTS = {  # the manifest agrees with these: whoever wrote them wrote that, too
    "no bytes": (ALL, lambda f, n: (f / n).write_bytes(b"")),
    "cut": (ALL, lambda f, n: (f / n).write_bytes((f / n).read_bytes()[:-1000])),
    "cut in the header": (ALL, lambda f, n: (f / n).write_bytes((f / n).read_bytes()[:100])),
    "a header of 2 GB": (ALL, lambda f, n: (f / n).write_bytes((2**31).to_bytes(8, "little") + b"{" * 100)),
    "no header": (ALL, lambda f, n: (f / n).write_bytes(b"\xff" * 1000)),
    "a deep header": (ALL, lambda f, n: (f / n).write_bytes((9000).to_bytes(8, "little") + b"[" * 9000)),
    "gone": (ALL, lambda f, n: (f / n).unlink()),
    "a bias is missing": (ALL, lambda f, n: change(f, n, without("bias"))),
    "quantized bytes are missing": (ALL, lambda f, n: change(f, n, without("to_q.weight", "q_proj.weight"))),
    "scales are missing": (ALL, lambda f, n: change(f, n, without("absmax"))),
    "the table is missing": (ALL, lambda f, n: change(f, n, without("quant_map"))),
    "the state is missing": (ALL, lambda f, n: change(f, n, without("bitsandbytes__nf4"))),
    "nothing is there": (ALL, lambda f, n: save_file({}, f / n, metadata={"format": "pt"})),
    "other bytes for the state": (ALL, lambda f, n: change(f, n, reshaped("bitsandbytes__nf4"))),
    "a bias of another shape": (ALL, lambda f, n: change(f, n, reshaped("bias"))),
    "quantized bytes of another shape": (ALL, lambda f, n: change(f, n, reshaped("to_q.weight", "q_proj.weight"))),
    "scales of another shape": (ALL, lambda f, n: change(f, n, reshaped("absmax"))),
    "a tensor too many": (ALL, lambda f, n: change(f, n, added)),
}
CASES = [(what, name) for what, (names, _) in WEIGHTS.items() for name in names]


def read(folder, network):
    with quiet("transformers", "diffusers"): return read_network(folder / network, "cpu", torch.float32)


@pytest.mark.parametrize("what,name", CASES, ids=[f"{what}, {name.partition('/')[0]}" for what, name in CASES])
def test_weights_that_do_not_fit_are_one_error(what, name, folder):
    WEIGHTS[what][1](folder, name)
    network = name.partition("/")[0]
    error = within(120, lambda: read(folder, network))
    assert isinstance(error, ModelLoadError), error
    assert str(folder / network) in str(error) and "again" in str(error)


@pytest.mark.parametrize("ending", ["layer_norm1.bias", "q_proj.weight"])
@pytest.mark.parametrize("label", ["nf4", "int8"])
def test_weights_that_do_not_fit_are_refused_while_they_are_quantized(label, ending, tmp_path):
    shutil.copytree(locate_model("tiny-sdxl"), tmp_path / "model")
    part = tmp_path / "model" / "text_encoder"
    change(part, "model.safetensors", reshaped(ending))
    settings = bnb_settings(use_4bit=label == "nf4", compute_dtype=torch.float32)
    with quiet("transformers"), pytest.raises(ModelLoadError, match="text_encoder .*again"):
        load_network(part, torch.float32, settings, "cpu")


CONFIGS = {  # of a network; the second is for all
    "no configuration": lambda c: {},
    "other widths": lambda c: c | {"cross_attention_dim": 64, "hidden_size": 128},
    "of no bits": lambda c: c | {"quantization_config": {}},
    "of another method": lambda c: c | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "of 8 bits": lambda c: c | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "a text": lambda c: c | {"quantization_config": "nf4"}, "a list": lambda c: c | {"quantization_config": [1]},
    "null": lambda c: c | {"quantization_config": None},
    "not quantized": lambda c: {k: v for k, v in c.items() if k != "quantization_config"},
    "a dtype of none": lambda c: c
    | {"quantization_config": c["quantization_config"] | {"bnb_4bit_compute_dtype": "float99"}},
}


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_does_not_fit_is_one_error(what, network, folder):
    file = folder / network / "config.json"
    file.write_text(json.dumps(CONFIGS[what](json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    error = within(120, lambda: read(folder, network))
    assert isinstance(error, ModelLoadError), error
    assert network in str(error)


def test_a_whole_checkpoint_with_a_tensor_too_many_is_one_error(folder):
    change(folder, UNET, added)
    relist(folder)
    with pytest.raises(ModelLoadError, match="new.weight is a tensor too many"): load_quantized(folder, "cpu")


# --- what is no damage


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A copy in the cache, and what asks for it."
    cache = tmp_path_factory.mktemp("kept")
    folder = Path(load(cache).load_report.checkpoint)
    settings = dict.fromkeys(PARTS, bnb_settings(compute_dtype=torch.float32))
    request = make_request("tiny-sdxl", ModelRegistry(cache / "hub", offline=True), "cpu", None, settings)
    assert checkpoint_folder(request) == folder
    return folder, request


def ask(request):
    "What is read of a kept copy, and what is said."
    report = LoadReport("tiny-sdxl", None, "nf4-dq", "cpu", "float32", "auto", {})
    with quiet("transformers", "diffusers"): return from_cache(request, report), report.warnings


def content(folder): return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_looked_into_is_no_damage(kept, monkeypatch):
    folder, request = kept
    before, real = content(folder), os.scandir
    def full(path=".", *args):
        if str(path) == str(folder / "unet"): raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args)
    with monkeypatch.context() as m:
        m.setattr(os, "scandir", full)
        found, warnings = ask(request)
    assert found is None and "Too many open files" in warnings[0] and content(folder) == before
    assert ask(request)[0] is not None


ERRORS = {
    "of the library": RuntimeError("kernel gave up"), "no memory of the system": OSError(errno.ENOMEM, "Cannot allocate"),
    "no memory": MemoryError(), "of the disk": OSError(errno.EIO, "Input/output error"), "a bug": KeyError("absmax"),
    "deep": RecursionError("too deep"), "of the device": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize("where", ["read_network", "describe_file"])
def test_what_fails_while_a_kept_copy_is_read_costs_no_copy(what, where, kept, monkeypatch):
    folder, request = kept
    before = content(folder)
    def fail(*args, **kwargs): raise ERRORS[what]
    monkeypatch.setattr(checkpoint, where, fail)
    try: found, warnings = ask(request)
    except InsufficientMemoryError: assert "memory" in what or "device" in what
    else: assert found is None and "quantized again" in warnings[0]
    assert content(folder) == before
    with pytest.raises(DevSkyyError): load_quantized(folder, "cpu")
    assert content(folder) == before
