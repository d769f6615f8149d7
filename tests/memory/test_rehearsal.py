"What the planner feeds each network, against what pipelines of every kind feed theirs when they really run."
import inspect
from functools import wraps
from types import SimpleNamespace

import pytest
import torch

from devsky_nb.hub.load import quiet
from devsky_nb.memory import rehearsal
from devsky_nb.memory.configs import class_in, pipeline_kind
from devsky_nb.memory.inputs import Workload
from devsky_nb.memory.rehearsal import arguments, describe, ENTRIES, rehearse, texts_cleaned
from tiny_pipelines import PIPELINES, random_network, write_pipeline

VIDEO = ("Wan", "LTX", "HunyuanVideo", "CogVideo", "StableVideo", "AnimateDiff", "T2V", "Mochi")
AT_ONCE = {"StableDiffusionXLInpaintPipeline", "QwenImagePipeline", "WanPipeline"}  # at once: an image and a mask, a language model, a video
KINDS = [kind if kind in AT_ONCE else pytest.param(kind, marks=pytest.mark.slow) for kind in PIPELINES]


def question(kind, side=64):
    "A small call of a pipeline."
    return Workload(side, side, frames=9 if any(word in kind for word in VIDEO) else 0)


def shape_of(said):
    "What of an argument is compared: kinds of numbers rather than their width, for the one runs in bf16 and the other in fp32."
    if isinstance(said, list): return [shape_of(item) for item in said]
    if not isinstance(said, dict): return 0. if isinstance(said, float) else said
    if "tensor" in said: return {"shape": said["shape"], "fraction": "float" in said["tensor"]}
    return {name: shape_of(item) for name, item in said.items()}


def really_given(folder, workload, monkeypatch):
    "What each network of a real pipeline with random weights is called with."
    found = []

    def note(name, entry, args, kwargs):
        said = [name, entry, shape_of(describe(list(args))), shape_of({k: describe(v) for k, v in kwargs.items()})]
        if said not in found: found.append(said)

    def watched(name, network, entry):
        method, inside = getattr(network, entry), SimpleNamespace(now=False)
        @wraps(method)
        def called(*args, **kwargs):
            if not inside.now: note(name, entry, args, kwargs)
            inside.now = True
            try: return method(*args, **kwargs)
            finally: inside.now = False
        return called

    monkeypatch.setattr(rehearsal, "meta_network", random_network)
    parts = rehearsal.cast(folder)
    cls = class_in("diffusers", pipeline_kind(folder))
    known = inspect.signature(cls.__init__).parameters
    with quiet("transformers", "diffusers"):
        pipeline = cls(**{name: part for name, part in parts.items() if name in known})
        pipeline.set_progress_bar_config(disable=True)
        for name, network in pipeline.components.items():
            if not isinstance(network, torch.nn.Module): continue
            for entry in ENTRIES:
                if hasattr(type(network), entry): setattr(network, entry, watched(name, network, entry))
            network.forward = watched(name, network, "forward")
        with texts_cleaned(cls), torch.no_grad(): pipeline(**arguments(pipeline, workload))
    monkeypatch.undo()
    inner = [said for said in found if said[1] == "forward" and any(other[0] == said[0] and other[1] in ENTRIES for other in found)]
    return [said for said in found if said not in inner]  # decode() may call forward()


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_fed_what_a_real_pipeline_feeds_them(kind, tmp_path, monkeypatch):
    with quiet("transformers", "diffusers"): write_pipeline(kind, tmp_path)
    workload = question(kind)
    played = rehearse(tmp_path, workload)
    assert played.problem == ""
    told = [[call.component, call.entry, shape_of(call.args), shape_of(call.kwargs)] for call in played.calls.values()]
    given = really_given(tmp_path, workload, monkeypatch)
    assert [said for said in told if said not in given] == []
    assert [said for said in given if said not in told] == []
    assert all((trace.kind == 0).any() for trace in played.traces.values())
