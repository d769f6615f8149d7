"torchao, GGUF and quanto: what a plan emits runs on tiny random pipelines, and what it predicts for weights is what the libraries keep."
import json
from unittest import mock

import numpy as np
import pytest
import torch

from devsky_nb import estimate_vram
from devsky_nb.errors import ValidationError
from devsky_nb.hub.load import quiet
from devsky_nb.memory.emitted import code_of
from devsky_nb.memory.estimate import network_bytes
from devsky_nb.memory.formats import FORMATS, GGUF_BLOCKS, weight_bytes
from tiny_pipelines import save, SIDE
from written_code import drawn, ON_CPU

pytestmark = pytest.mark.slow
DRAWN = ("text, SDXL", "text, SD3", "text, FLUX", "text, PixArt", "video, Wan")
SHAPES = ((384, 256), (100, 96), (1280, 1280), (64, 4304), (3072, 768))
TORCHAO = {name: name for name in FORMATS if name.startswith("torchao") and name != "torchao-int4"}
QUANTO = {name: name for name in FORMATS if name.startswith("quanto")}
GGUF = {name: name for name in FORMATS if name.startswith("gguf")}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}
    def folder(kind):
        with quiet("diffusers", "transformers"):
            if kind not in made: made[kind] = save(kind, tmp_path_factory.mktemp("pipelines") / "".join(filter(str.isalnum, kind)))
        return made[kind]
    return folder


def estimate(folder, kind, quant, dtype, offload=None):
    frames = {"frames": 5} if kind.startswith("video") else {}
    return estimate_vram(folder, dtype, quant, offload=offload, width=SIDE, height=SIDE, **frames)


def kept(tensor):
    "Bytes of a tensor; those of its parts, if it is a packed one."
    if not hasattr(tensor, "__tensor_flatten__"): return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(kept(getattr(tensor, name)) for name in names)


SCALES = ("input_scale", "output_scale")  # of quanto: four bytes a layer, for activations that are not packed
OTHERWISE = {"torchao": "wo", "quanto": "time_embedder"}  # layers of which torchao packs more in a T5 than it says, and quanto in a Wan


def compare(found, pipeline):
    "Every layer keeps what is predicted."
    library = FORMATS[found.setup.quant].library
    for name, network in found.traced.networks.items():
        layers = dict(getattr(pipeline, name).named_modules())
        for layer, predicted in zip(network.layers, network_bytes(found.traced, name)[0][1:]):
            if OTHERWISE.get(library, "-") in layer.name.split("."): continue
            if not layer.weights: continue  # its weights are another's
            parts = dict(layers[layer.name].named_parameters(recurse=False)) | dict(layers[layer.name].named_buffers(recurse=False))
            assert sum(kept(tensor) for key, tensor in parts.items() if key not in SCALES) == predicted, (name, layer.name)


def run(found):
    code = code_of(found)
    for on_a_gpu, here in ON_CPU: code = code.replace(on_a_gpu, here)
    scope, result = drawn(code)
    assert len(result) == 1
    return scope["pipeline"]


# --- torchao

@pytest.mark.parametrize("offload", [None, "model"])
@pytest.mark.parametrize("quant", TORCHAO)
@pytest.mark.parametrize("kind", DRAWN)
def test_the_code_for_torchao_runs(kind, quant, offload, folder_of):
    pytest.importorskip("torchao")
    found = estimate(folder_of(kind), kind, quant, "bf16", offload)
    compare(found, run(found))


@pytest.mark.parametrize("shape", [(256, 256), (384, 1024), (3072, 768), (104, 128)])
def test_four_bits_of_torchao_are_those_of_its_kernel(shape, monkeypatch):
    "The kernel is CUDA's; the shape of what it returns is known without one."
    pytest.importorskip("torchao")
    from torchao.quantization import Int4TilePackedTo4dTensor
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with mock.patch("torch.cuda.get_device_capability", lambda *a: (9, 0)):
        packed = Int4TilePackedTo4dTensor.from_hp(torch.empty(shape, dtype=torch.bfloat16, device="meta"), [1, 128])
    assert kept(packed) == weight_bytes(shape, "torchao-int4", 2)


def test_the_settings_for_four_bits_of_torchao_reach_every_network(folder_of):
    "Where there is no CUDA, with the layout for processors."
    pytest.importorskip("torchao")
    code = code_of(estimate(folder_of("text, FLUX"), "text, FLUX", "torchao-int4", "bf16"))
    assert code.count("int4_packing_format") == 3 and 'device_map="cuda"' in code
    assert 'to("cuda")' not in code and "to('cuda')" not in code


# --- quanto

@pytest.mark.parametrize("offload", [None, "model"])
@pytest.mark.parametrize("quant", QUANTO)
@pytest.mark.parametrize("kind", DRAWN)
def test_the_code_for_quanto_runs(kind, quant, offload, folder_of):
    pytest.importorskip("optimum.quanto")
    found = estimate(folder_of(kind), kind, quant, "fp32", offload)  # its kernels for bf16 on processors want larger layers
    compare(found, run(found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", QUANTO)
def test_quanto_stores_what_is_predicted(quant, dtype):
    quanto = pytest.importorskip("optimum.quanto")
    kinds = {"quanto-int8": quanto.qint8, "quanto-fp8": quanto.qfloat8, "quanto-int4": quanto.qint4}
    for rows, columns in SHAPES:
        network = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=dtype))
        quanto.quantize(network, weights=kinds[quant])
        quanto.freeze(network)
        assert kept(network[0].weight) == weight_bytes((rows, columns), quant, 2)


# --- GGUF

def write_gguf(file, network, quant):
    "A file as others write it: matrices in blocks, the rest in full."
    import gguf
    name = quant.removeprefix("gguf-")
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    numbers, size = GGUF_BLOCKS[name]
    writer = gguf.GGUFWriter(file, "diffusion")
    for key, tensor in network.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim != 2 or values.shape[1] % numbers: writer.add_tensor(key, values)
        elif name == "q8_0": writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else: writer.add_tensor(key, np.zeros((values.shape[0], values.shape[1] // numbers * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quant, offload", [("gguf-q8_0", None), ("gguf-q8_0", "model"), *[(quant, None) for quant in GGUF if quant != "gguf-q8_0"]])
@pytest.mark.parametrize("kind", [kind for kind in DRAWN if "PixArt" not in kind])
def test_the_code_for_a_gguf_file_runs(kind, quant, offload, folder_of, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    import diffusers
    monkeypatch.chdir(tmp_path)
    found = estimate(folder_of(kind), kind, quant, "bf16", offload)
    packed = [name for name, own in found.traced.quantized.items() if own == quant]
    assert packed
    for name in packed:
        config = json.loads((folder_of(kind) / name / "config.json").read_text())
        with quiet("diffusers"): network = getattr(diffusers, config["_class_name"]).from_pretrained(folder_of(kind) / name)
        write_gguf(f"{name}-{quant.removeprefix('gguf-')}.gguf", network, quant)
    compare(found, run(found))


@pytest.mark.parametrize("quant", GGUF)
def test_gguf_stores_what_is_predicted(quant):
    gguf = pytest.importorskip("gguf")
    name = quant.removeprefix("gguf-")
    assert GGUF_BLOCKS[name] == gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name.upper())]


def test_what_is_read_from_no_single_file_is_refused(folder_of):
    with pytest.raises(ValidationError, match="read from no single file"): estimate(folder_of("text, PixArt"), "text, PixArt", "gguf-q8_0", "bf16")
