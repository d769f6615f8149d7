"VramMonitor on pretended GPUs: whose memory it is that it measures."
import copy

import pytest, torch

from devsky_nb.errors import ValidationError
from devsky_nb.hub.registry import load_model
from devsky_nb.memory.monitor import RUNNING, VramMonitor, where_it_runs
from pretended_gpu import pretended

MIB = 2**20
SMALL = {"prompt": "a red dress", "num_inference_steps": 1, "width": 32, "height": 32, "output_type": "np"}


@pytest.fixture(scope="module")
def loaded():
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded): return copy.deepcopy(loaded)


def test_the_memory_of_another_gpu_is_not_measured(pipeline):
    with pretended("cuda", count=2) as gpu:
        pipeline.to("cuda:1")
        for device in (None, "cuda", "cuda:0"):
            with VramMonitor(device=device) as monitor, pytest.raises(ValidationError, match="the pipeline runs on cuda:1, and the memory of cuda:0 is measured: .*device='cuda:1'"):
                monitor.watch(pipeline)
        with pytest.raises(ValidationError, match="the pipeline runs on cuda:1"), VramMonitor(pipeline, device="cuda:0"): pass
        assert RUNNING == []
        for options in ({}, {"device": "cuda:1"}):
            with VramMonitor(pipeline, interval=60., **options) as monitor: pipeline(**SMALL)
            timeline = monitor.timeline
            assert timeline.device == "cuda:1" and timeline.exact and gpu.used("cuda:1") >= timeline.baseline > 20 * MIB
            assert list(timeline.peaks) == ["encode", "denoise", "decode"] and min(timeline.peaks.values()) > 0
        with VramMonitor(pipeline, device="cpu"): pass  # main memory, which is meant


def test_a_gpu_is_not_measured_for_a_pipeline_that_stayed_on_the_cpu(pipeline):
    with pretended("cuda"):
        with VramMonitor(device="cuda") as monitor, pytest.raises(ValidationError, match="runs on cpu, and the memory of cuda:0"): monitor.watch(pipeline)
        assert where_it_runs(pipeline) == "cpu"


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_is_measured_where_it_computes(pipeline, offload):
    with pretended("cuda", count=2):
        device = "cuda:1" if offload == "model" else "cuda:0"
        if offload == "model": pipeline.enable_model_cpu_offload(device=device)
        else: pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")  # without a number
        assert where_it_runs(pipeline) == device
        with VramMonitor(pipeline, interval=60.) as monitor: pipeline(**SMALL)
        timeline = monitor.timeline
        assert timeline.device == device and timeline.baseline == 0
        assert timeline.peak > (5 * MIB if offload == "model" else MIB)  # the denoiser's weights, or a layer's


def test_on_mps_what_is_in_use_is_measured_and_said_to_be_no_exact_peak(pipeline):
    with pretended("mps"):
        pipeline.to("mps")
        with VramMonitor(pipeline, interval=.001) as monitor: pipeline(**SMALL)
        timeline = monitor.timeline
        assert (timeline.device, timeline.exact, timeline.error) == ("mps", False, None)
        assert timeline.baseline > 20 * MIB and timeline.peak > 0 and "short peaks may be missing" in repr(timeline)
        assert where_it_runs(pipeline) == "mps"
