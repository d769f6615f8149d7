"Optimizing and placing on pretended GPUs: where memory runs out half-way, where there is no other memory, and what is compiled how often."
import numpy as np
import pytest
import torch

from devsky_nb import QuantizedSDXLGenerator
from devsky_nb.diffusion.speed import Task, draw_probe, optimize
from devsky_nb.diffusion.turns import is_offloaded
from devsky_nb.errors import InsufficientMemoryError, ValidationError
from devsky_nb.hub.registry import ModelRegistry
from pretended_gpu import pretended

SMALL = {"width": 32, "height": 32}
FAST = {"prompt": "a red dress", "width": 64, "height": 64, "seed": 1, "num_inference_steps": 1, "progress": False}
MIB = 2**20


def places(pipeline):
    return {weight.device.type for network in Task(pipeline).networks.values() for weight in network.parameters()}


def formats(pipeline):
    return {tensor.dtype for network in Task(pipeline).networks.values() for tensor in network.state_dict().values() if tensor.is_floating_point()}


def test_networks_that_cannot_all_be_offloaded_stay_where_they_were(pipeline, monkeypatch):
    move = type(pipeline.unet).to

    def full(network, *args, **kwargs):  # main memory
        if str(args[0]) == "cpu": raise MemoryError("cannot allocate memory")
        return move(network, *args, **kwargs)
    with pretended("cuda"):
        pipeline.to("cuda")
        monkeypatch.setattr(type(pipeline.unet), "to", full)
        report = optimize(pipeline, "memory", **SMALL)
        assert "MemoryError" in report.skipped["model offload"] and report.applied == {} and report.device == "cuda:0"
        assert places(pipeline) == {"cuda"} and not is_offloaded(pipeline) and draw_probe(pipeline, 32, 32).any()


def test_networks_that_cannot_all_come_back_stay_offloaded_and_that_is_said(pipeline):
    outputs = iter([1., 2.])
    with pretended("cuda") as gpu:
        def probe():
            output = next(outputs)
            if output == 2: gpu.set_limit(15 * MIB)  # meanwhile somebody else has taken memory
            return [output]
        pipeline.to("cuda")
        with pytest.raises(InsufficientMemoryError, match="model offload cannot be set back: CUDA out of memory"):
            optimize(pipeline, "memory", techniques=["model offload"], probe=probe, **SMALL)
        assert places(pipeline) == {"cpu"} and is_offloaded(pipeline) and gpu.used() < MIB and Task(pipeline).device == "cuda:0"
        gpu.set_limit(100 * MIB)
        assert draw_probe(pipeline, 32, 32).any()


def test_half_precision_for_which_there_is_no_room_leaves_every_weight_as_it_was(pipeline, loaded):
    with pretended("cuda") as gpu:
        pipeline.to("cuda")
        used = gpu.used()
        gpu.set_limit(used + 3 * MIB)
        report = optimize(pipeline, techniques=["half precision"], probe=lambda: [1.], **SMALL)
        assert "OutOfMemoryError" in report.skipped["half precision"]
        assert formats(pipeline) == {torch.float32} and gpu.used() == used
        pairs = zip(pipeline.unet.state_dict().values(), loaded.unet.state_dict().values(), strict=True)
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)


def test_a_pipeline_of_which_a_part_stayed_on_the_cpu_is_refused(pipeline):
    with pretended("cuda") as gpu:
        gpu.set_limit(15 * MIB)
        with pytest.raises(torch.OutOfMemoryError): pipeline.to("cuda")
        gpu.set_limit(100 * MIB)
        with pytest.raises(ValidationError, match="the networks are on cpu and cuda:0: move all with"):
            optimize(pipeline, probe=lambda: [1.], **SMALL)
        pipeline.unet.to("cpu"), pipeline.text_encoder_2.to("cuda")
        assert Task(pipeline).device == "cpu"  # where its denoiser is, whatever the others do


def test_a_generator_that_offloads_is_optimized_as_it_draws():
    with pretended("cuda") as gpu, QuantizedSDXLGenerator("tiny-sdxl", use_quantization=False, low_memory=True,
                                                          registry=ModelRegistry()) as generator:
        report = optimize(generator, "memory", **SMALL)
        assert is_offloaded(generator.pipeline) and gpu.used() < MIB and report.device == "cuda:0"
        assert report.skipped["model offload"] == "there is model offload already"


def test_on_mps_nothing_is_offloaded(pipeline):
    with pretended("mps") as gpu:
        pipeline.to("mps")
        for options in ({"budget": "1MB"}, {"techniques": ["model offload", "VAE slicing"], "batch": 2}):
            report = optimize(pipeline, "memory", probe=lambda: [1.], **options, **SMALL)
            assert "model offload" in report.skipped and report.device == "mps"
        assert "compute in the main memory" in report.skipped["model offload"] and places(pipeline) == {"mps"}
        generator = QuantizedSDXLGenerator(pipeline=pipeline, low_memory=True)
        image = generator.generate(**FAST)
        assert image.info["stepped_down"] == ["VAE tiles of 32 px"] and not is_offloaded(pipeline)
        gpu.set_limit(gpu.used() + 1000)
        with pytest.raises(InsufficientMemoryError, match="on mps there is no other memory to offload to"): generator.generate(**FAST)


def test_what_is_compiled_is_compiled_once_whoever_draws(pipeline):
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph.forward
    pipeline.unet.compile_repeated_blocks(backend=count)
    draw_probe(pipeline, 64, 64)
    first = len(programs)
    generator = QuantizedSDXLGenerator(pipeline=pipeline)
    images = [generator.generate(**FAST | {"num_inference_steps": 2}) for _ in range(2)]
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red dress", num_inference_steps=2, width=64, height=64)
    assert first and len(programs) == first and np.array_equal(*images)


def test_weights_that_were_placed_while_drawing_can_still_be_changed(pipeline):
    with pretended("cuda"):
        generator = QuantizedSDXLGenerator(pipeline=pipeline.to("cuda"), low_memory=True)
        generator.generate(**FAST)
        assert not any(weight.is_inference() for network in Task(pipeline).networks.values() for weight in network.parameters())
        pipeline.unet.conv_out.bias.requires_grad_(False).add_(1)
