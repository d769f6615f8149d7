"The planner against bytes that were really allocated, against published figures, and against what users get wrong."
import json, subprocess, sys

import pytest

from devsky_nb.cli import main
from devsky_nb.errors import ValidationError
from devsky_nb.tracing import REPOS
from devsky_nb.vram import QUANTS, estimate_vram, plan_vram

GIB = 2**30
MEASURE = """
import json, torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel
from devsky_nb.registry import load_model
from devsky_nb.tracing import config_folder

def peak(run):  # bytes that torch's allocator for CPUs handed out, at the highest moment
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: run()
    now = top = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += e.nbytes()
        top = max(top, now)
    return top

def weights(*nets): return sum(t.nbytes for net in nets for t in (*net.parameters(), *net.buffers()))

pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
draw = lambda: pipeline("a red dress", num_inference_steps=1, num_images_per_prompt=8, guidance_scale=5., output_type="np")
net = AutoModel.from_config(AutoConfig.from_pretrained(config_folder("clip-vit-base"))).eval()
with torch.no_grad():
    print(json.dumps({"tiny-sdxl": [weights(*(c for c in pipeline.components.values() if isinstance(c, torch.nn.Module))), peak(draw)],
                      "clip-vit-base": [weights(net), peak(lambda: net.get_image_features(pixel_values=torch.zeros(8, 3, 224, 224)))]}))
"""


def test_on_a_cpu_the_prediction_is_what_a_fresh_process_allocates():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for model, (weights, activations) in json.loads(done.stdout.splitlines()[-1]).items():
        expected = estimate_vram(model, dtype="fp32", device="cpu", batch=8)
        assert weights == expected.loaded
        assert abs(expected.peak_allocated / (weights + activations) - 1) < .15
        assert abs((expected.peak_allocated - expected.loaded) / activations - 1) < .15


@pytest.mark.parametrize("model", REPOS)
def test_every_model_is_estimated(model):
    e = estimate_vram(model)
    assert 0 < e.loaded <= e.peak_allocated <= e.peak_reserved
    assert sum(e.by_component.values()) == e.loaded and e.peak_allocated == max(e.by_phase.values())
    assert json.loads(json.dumps(e.to_dict()))["peak_allocated"] == e.peak_allocated


@pytest.mark.parametrize("options, gib", [({}, 10.47), ({"batch": 4}, 21.72), ({"dtype": "fp32", "batch": 4}, 28.09), ({"dtype": "bf16", "vae": "fp16-fix"}, 8.33)])
def test_published_figures_of_sdxl(options, gib):
    assert abs(estimate_vram("sdxl-base", **options).peak_allocated / GIB / gib - 1) < .02


def test_what_saves_memory_saves_memory():
    peak = lambda **options: estimate_vram("sdxl-base", **options).peak_allocated
    assert peak() > peak(quant="int8") > peak(quant="nf4") > peak(quant="nf4-dq")
    assert peak() > peak(offload="model") > peak(offload="sequential")
    assert peak(batch=4) > peak(batch=4, vae_slicing=True) > peak()
    assert peak(width=1024) == peak(width=1024, vae_tiling=True) and peak(width=2048, height=2048) > peak(width=2048, height=2048, vae_tiling=True)
    assert peak(quant="nf4", quant_components=["text_encoder"]) > peak(quant="nf4", quant_components=["unet"])


def test_a_trace_serves_every_other_configuration(monkeypatch):
    estimate_vram("sdxl-base", width=512)  # no trace of the package
    from devsky_nb import tracing
    monkeypatch.setattr(tracing, "meta_network", lambda part: pytest.fail(f"{part} was built again"))
    for quant in QUANTS:
        for dtype in ("fp16", "bf16", "fp32"):
            for offload in (None, "model", "sequential", "group"): estimate_vram("sdxl-base", dtype, quant, offload=offload, width=512)


@pytest.mark.parametrize("options, said", [
    ({"model": "sdxl-bsae"}, "did you mean 'sdxl-base'"), ({"model": 7}, "expected an alias"), ({"model": "/nowhere"}, "a folder with a model_index.json"), ({"dtype": "float16"}, "fp32, fp16, bf16"),
    ({"quant": "int4"}, "int8, nf4, nf4-dq, fp4"), ({"offload": "disk"}, "model, sequential, group"), ({"vae": "tiny"}, "fp16-fix"), ({"attention": "flash"}, "sdpa, math, sliced"),
    ({"width": 1001}, "multiples of 8"), ({"height": -8}, "multiples of 8"), ({"width": 80000}, "to 8192"), ({"width": "1024"}, "multiples of 8"), ({"batch": 0}, "1 or more"), ({"batch": 1.5}, "1 or more"),
    ({"quant": "nf4", "quant_components": ["unnet"]}, "did you mean 'unet'"), ({"without": ["nsfw"]}, "There are"), ({"device": "tpu"}, "cuda, mps, cpu"), ({"device": "cpu", "offload": "model"}, "on cpu use None")])
def test_bad_input_is_named(options, said):
    with pytest.raises(ValidationError) as e: estimate_vram(**{"model": "sdxl-base"} | options)
    assert said in str(e.value)


@pytest.mark.parametrize("budget", [8, "8 gigs", "", "-8GB", None, 8.5, True, "8GBit"])
def test_a_budget_in_wrong_units(budget):
    with pytest.raises(ValidationError, match="8GB|20GB"): plan_vram("tiny-sdxl", budget)


def test_plans_are_ranked_fit_and_run():
    for budget in ("6GB", "12GB"):
        plan = plan_vram("sdxl-base", budget, top=99)
        assert [o.rank for o in plan.options] == sorted(o.rank for o in plan.options)
        for o in plan.options:
            assert o.estimate.peak_allocated * 1.05 <= plan.budget and o.margin > 0
            assert not any(other.beats(o) for other in plan.options if other is not o)
            compile(o.code, "plan", "exec")
    assert plan_vram("sdxl-base", "24GB").best.estimate.setup.offload is None
    assert any(o.estimate.setup.offload is None for o in plan_vram("sdxl-base", "8GB").options)  # a slower way of better quality hides no fast one
    nothing = plan_vram("flux1-dev", "300MB")
    assert nothing.best is None and "nothing fits" in repr(nothing) and nothing.smallest.peak_allocated > 3e8


def test_the_code_of_a_plan_runs(tmp_path):
    code = plan_vram("tiny-sdxl", "1GB", device="cpu").best.code.replace(".images", ".images; pipeline.set_progress_bar_config(disable=True)")
    scope = {}
    exec(code, scope)
    assert scope["images"][0].size == (64, 64)


def test_the_command(capsys):
    assert main(["plan", "tiny-sdxl", "--budget", "100MB", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main(["plan", "tiny-sdxl", "--budget", "70MB"]) == 1 and "nothing fits" in capsys.readouterr().out
    assert main(["plan", "sdlx-base", "--budget", "8GB"]) == 2 and "did you mean 'sdxl-base'" in capsys.readouterr().err
