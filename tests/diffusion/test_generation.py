"QuantizedSDXLGenerator beyond its lesson: wrong arguments, seeds, failures, threads, and what a file keeps."
import copy, functools, gc, io, json, logging, os, pickle, resource, shutil, subprocess, sys, threading, weakref, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from PIL import Image, PngImagePlugin
from patience import PATIENCE

from devsky_nb.diffusion import generation, sdxl
from devsky_nb.diffusion.arguments import check_prompt_length, counting_copy
from devsky_nb.diffusion.generation import QuantizedSDXLGenerator
from devsky_nb.diffusion.metadata import read_metadata
from devsky_nb.diffusion.progress import GenerationCancelled
from devsky_nb.diffusion.turns import is_offloaded, keep_state
from devsky_nb.errors import (
    DevSkyyError,
    InsufficientMemoryError,
    MLError,
    ModelLoadError,
    ModelNotFoundError,
    ValidationError,
)
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.models import ModelSpec
from devsky_nb.hub.registry import load_model, ModelRegistry
from devsky_nb.hub.weights import folder_fingerprint

PROMPTS = ["a red striped t-shirt", "blue plain jeans", "a green dotted dress"]
FAST = {"num_inference_steps": 2, "guidance_scale": 5., "progress": False}


@pytest.fixture(scope="module")
def pipeline(device):
    return load_model("tiny-sdxl", device=device, dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(pipeline):
    return QuantizedSDXLGenerator(pipeline=pipeline)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "hub"


@pytest.fixture(scope="module")
def four(cache, device):
    return QuantizedSDXLGenerator("tiny-sdxl", device=device, dtype=torch.float32, cache_dir=cache)


@pytest.fixture(params=["exact", "four"], scope="module")
def generator(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def alone():
    "The images of single calls, by generator: seeds 0, 1, 2."
    made = {}
    def draw(generator):
        if generator.label not in made:
            made[generator.label] = [generator.generate(p, seed=i, **FAST) for i, p in enumerate(PROMPTS)]
        return made[generator.label]
    return draw


def pixels(image):
    return np.asarray(image, int)


def worst(some, others):
    return max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(some, others, strict=True))


def same(a, b):
    return np.array_equal(pixels(a), pixels(b))


class refusing:
    "The real network, which fails on a condition."
    def __init__(self, network, error, when=lambda x: True): self.network, self.error, self.when = network, error, when
    def __enter__(self): self.hook = self.network.register_forward_pre_hook(self.check)
    def __exit__(self, *_): self.hook.remove()
    def check(self, network, args):
        if self.when(args[0]): raise self.error


# the same images as the pipeline's

@pytest.mark.device
@pytest.mark.parametrize("settings", [{"negative_prompt": "blue"}, {"guidance_scale": 1., "width": 128}], ids=str)
def test_an_image_is_the_pipelines_own(exact, pipeline, settings):
    ours = exact.generate(PROMPTS[0], seed=5, **FAST | settings)
    theirs = pipeline(
        PROMPTS[0],
        generator=torch.Generator().manual_seed(5),
        **{"num_inference_steps": 2, "guidance_scale": 5.0} | settings,
    ).images[0]
    assert same(ours, theirs) and type(pipeline.scheduler).__name__ == ours.info["scheduler"]


def test_none_and_empty_are_different_negative_prompts(exact):
    assert not same(exact.generate(PROMPTS[0], seed=5, **FAST), exact.generate(PROMPTS[0], "", seed=5, **FAST))


@pytest.mark.device
def test_a_vae_in_half_precision_decodes_in_float32_and_comes_back(device):
    pipeline = load_model("tiny-sdxl", device=device, dtype=torch.float16)
    assert pipeline.vae.config.force_upcast
    half = QuantizedSDXLGenerator(pipeline=pipeline)
    side = 64 // pipeline.vae_scale_factor
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))  # ours is drawn in float32, too
    theirs = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=5.0, latents=noise.half()).images[0]
    seen = []
    assert same(
        half.generate(PROMPTS[0], seed=5, **FAST, preview_every=1, callback=lambda *news: seen.append(news[2][0])),
        theirs,
    )
    assert same(seen[-1], theirs)
    with refusing(pipeline.vae.decoder, ValueError("broken")), pytest.raises(MLError, match="decoding failed: broken"):
        half.generate(PROMPTS[0], **FAST)
    assert pipeline.vae.dtype == torch.float16 and same(half.generate(PROMPTS[0], seed=5, **FAST), theirs)


# seeds

@pytest.mark.device
def test_a_seed_gives_the_same_image_at_every_position(generator, alone):
    torch.manual_seed(99)
    state, order = torch.get_rng_state(), [2, 0, 1]
    listed = generator.generate_batch([PROMPTS[i] for i in order], seeds=order, **FAST)
    assert all(same(alone(generator)[i], image) for i, image in zip(order, listed)) and torch.equal(
        state, torch.get_rng_state()
    )


def test_a_larger_batch_has_the_same_noise_and_differs_by_rounding(generator, alone):
    noise, unet = [], generator.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, args: noise.append(args[0].clone()))
    together = generator.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST)
    generator.generate(PROMPTS[2], seed=2, **FAST)
    hook.remove()
    assert torch.equal(noise[0][2], noise[2][0])
    assert worst(alone(generator), together) <= (1 if generator.label == "float32" else 16)
    assert [i.info["seed"] for i in together] == [0, 1, 2] and [i.info["prompt"] for i in together] == PROMPTS


def test_noise_within_the_loop_is_each_images_own(pipeline, exact):
    kept, pipeline.scheduler = pipeline.scheduler, EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config
    )
    try:
        alone = exact.generate(PROMPTS[1], seed=1, **FAST)
        together = exact.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST)
        other = exact.generate(PROMPTS[1], seed=2, **FAST)
    finally:
        pipeline.scheduler = kept
    assert np.abs(pixels(alone) - pixels(together[1])).max() <= 1 and not same(alone, other)


def test_a_seed_that_was_drawn_is_kept(exact):
    short = {"num_inference_steps": 1, "progress": False}
    first, second = exact.generate_batch(PROMPTS[:1] * 2, **short)
    assert first.info["seed"] != second.info["seed"] and same(
        first, exact.generate(PROMPTS[0], seed=first.info["seed"], **short)
    )


# wrong arguments

LONG = "a very long description of a dress " * 20
WRONG = [
    (dict(prompt=""), "non-empty"),
    (dict(prompt=" \n"), "non-empty"),
    (dict(prompt=None), "not NoneType"),
    (dict(prompt=7), "not int"),
    (dict(prompt=b"dress"), "not bytes"),
    (dict(prompt=["a dress"]), "generate_batch"),
    (dict(prompt=LONG), "would be cut: '"),
    (dict(prompt="\ud800"), "half a character"),
    (dict(negative_prompt=1), "negative_prompt must be a text"),
    (dict(negative_prompt=["blue"]), "negative_prompt must be a text"),
    (dict(negative_prompt=LONG), "negative_prompt has"),
    (dict(negative_prompt="blue", guidance_scale=1), "counts for nothing"),
    (dict(negative_prompt="blue", guidance_scale=0.0), "counts for nothing"),
    *((dict(num_inference_steps=v), "num_inference_steps=") for v in (0, -1, 1001, True, 2.0, "2", float("nan"), None)),
    *(
        (dict(guidance_scale=v), "guidance_scale=")
        for v in (-0.1, float("nan"), float("inf"), True, "5", None, [5.0], 5j)
    ),
    *((dict(width=v), "width=") for v in (0, -64, 63, 100, 2112, True, 64.0, "64", float("nan"))),
    (dict(height=65), "height=65: expected a multiple of 64 from 64 to 2048"),
    *((dict(seed=v), "seed=") for v in (-1, 2**32, 2**64, True, 1.0, "1", float("nan"))),
    (dict(callback=3), "callback must be something to call"),
    (dict(cancel=True), "cancel must be something to call"),
    (dict(preview_every=2), "needs a callback"),
    *((dict(preview_every=v, callback=print), "preview_every=") for v in (0, True, 1.5)),
]


@pytest.mark.parametrize("given, message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_are_named_before_anything_is_drawn(exact, given, message):
    with refusing(exact.pipeline.text_encoder, AssertionError("it ran")), pytest.raises(ValidationError) as caught:
        exact.generate(**{"prompt": PROMPTS[0]} | FAST | given)
    assert message in caught.value.message and json.dumps(caught.value.to_dict()) and caught.value.details


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(prompts="a dress"), "a list of at least one text"),
        (dict(prompts=[]), "a list of at least one"),
        (dict(prompts=["a dress", 3]), "prompt 1: prompt must be a text, not int"),
        (dict(prompts=["a dress", LONG]), "prompt 1: prompt has"),
        (dict(prompts=PROMPTS, seeds=[1]), "a list of 3"),
        (dict(prompts=PROMPTS, seeds=1), "a list of 3"),
        (dict(prompts=PROMPTS, seeds=[1, 2, -3]), "prompt 2: seed=-3"),
        (dict(prompts=PROMPTS, batch_size=0), "batch_size=0"),
        (dict(prompts=PROMPTS, batch_size=True), "batch_size=True"),
    ],
    ids=str,
)
def test_a_stream_checks_everything_when_it_is_called(exact, given, message):
    with pytest.raises(ValidationError, match=message): exact.generate_stream(**given)


def test_arguments_from_numpy_are_taken_and_written_as_plain_numbers(exact, tmp_path):
    image = exact.generate(
        PROMPTS[0], None, np.int64(2), np.float32(5), np.int32(64), np.int64(64), np.uint32(5), progress=False
    )
    image.save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == image.info and same(image, exact.generate(PROMPTS[0], seed=5, **FAST))


def test_both_tokenizers_are_asked(exact, pipeline):
    kept = pipeline.tokenizer_2
    pipeline.tokenizer_2 = copy.deepcopy(kept)
    pipeline.tokenizer_2.model_max_length = 5
    try:
        with pytest.raises(ValidationError, match="the model reads 5") as caught:
            exact.generate("red dress red dress", **FAST)
    finally:
        pipeline.tokenizer_2 = kept
    assert caught.value.details["tokenizer"] == "tokenizer_2"


def test_counting_tokens_does_not_disturb_who_is_drawing(pipeline):
    stop, failures = threading.Event(), []
    def count():
        while not stop.is_set():
            try:check_prompt_length(pipeline, "prompt", PROMPTS[0])
            except Exception as e: failures.append(e)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3): pool.submit(count)
        try:
            for _ in range(300):
                found = pipeline.tokenizer(
                    PROMPTS[1], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                )
                assert found.input_ids.shape == (1, 77)
        finally:
            stop.set()
    assert not failures


def test_tokens_are_counted_with_those_that_were_added(pipeline):
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    first = counting_copy(tokenizer)
    assert counting_copy(tokenizer) is first is not tokenizer
    tokenizer.add_tokens(["strriped"])
    assert len(counting_copy(tokenizer)("strriped").input_ids) == 3 < len(first("strriped").input_ids)


def test_the_constructor_refuses_what_contradicts_itself(pipeline, cache):
    for given, message in (
        (dict(use_quantization=1), "use_quantization=1: expected True or False"),
        (dict(pipeline=pipeline, vae="fp32"), "cannot be loaded otherwise"),
        (dict(device="gpu"), "device='gpu': "),
        (dict(pipeline=pipeline.unet), "not UNet2DConditionModel"),
        (dict(load_in_4bit=True), "load_in_4bit"),
    ):
        with pytest.raises(ValidationError, match=message): QuantizedSDXLGenerator("tiny-sdxl", **given)


@pytest.mark.parametrize(
    "flags, label", [((True, True), "nf4-dq"), ((True, False), "int8"), ((False, True), "float32")]
)
def test_it_says_what_it_is(cache, flags, label):
    generator = QuantizedSDXLGenerator("tiny-sdxl", *flags, "cpu", dtype=torch.float32, cache_dir=cache)
    image = generator.generate(PROMPTS[0], seed=1, **FAST)
    assert (generator.label, generator.use_quantization, generator.use_4bit) == (label, flags[0], label[:2] == "nf")
    assert (
        image.info["quantization"] == label
        and label in repr(generator)
        and ("bitsandbytes" in image.info["versions"]) == flags[0]
    )
    assert (
        (generator.model_id, generator.device) == ("tiny-sdxl", "cpu")
        and image.size == (64, 64)
        and image.mode == "RGB"
    )


# failures

def test_what_fails_inside_is_told_with_its_values(four, alone):
    generator = four
    with refusing(generator.pipeline.unet, ValueError("shapes do not match")), pytest.raises(MLError) as caught:
        generator.generate("red " * 50, "blue " * 50, seed=5, **FAST)
    error = caught.value
    assert (
        type(error) is MLError
        and isinstance(error.original_error, ValueError)
        and "denoising failed: shapes do not match" in error.message
    )
    assert (
        json.loads(json.dumps(error.to_dict()))["details"].items()
        >= {
            "stage": "denoising",
            "prompt": "red " * 25,
            "negative_prompt": "blue " * 20,
            "width": 64,
            "height": 64,
            "seed": 5,
            "quantization": generator.label,
            "device": "cpu",
            "images": 1,
            "stepped_down": [],
        }.items()
    )
    assert same(alone(generator)[0], generator.generate(PROMPTS[0], seed=0, **FAST))


@pytest.mark.device
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")],
    ids=lambda e: type(e).__name__,
)
def test_decoding_steps_down_and_the_pipeline_is_as_before(exact, alone, error, caplog):
    vae, scheduler = exact.pipeline.vae, exact.pipeline.scheduler
    state = [vae.use_tiling, vae.use_slicing, vae.tile_sample_min_size, vae.tile_latent_min_size,
             getattr(exact.pipeline, "_progress_bar_config", {}), vae.dtype]
    exact.pipeline.set_progress_bar_config(desc="mine")
    roomy, drawn = alone(exact)[0], []
    hook = exact.pipeline.unet.register_forward_pre_hook(lambda *_: drawn.append(1))
    with refusing(vae.decoder, error, lambda z: z.shape[-1] > 8), caplog.at_level(logging.WARNING):
        tiled = exact.generate(PROMPTS[0], seed=0, **FAST)
    hook.remove()
    assert tiled.info["stepped_down"] == ["VAE tiles of 32 px"] and "going on with VAE tiles of 32 px" in caplog.text
    assert len(drawn) == 2, "denoising was repeated"
    assert 0 < np.abs(pixels(roomy) - pixels(tiled)).mean() < 40
    assert exact.pipeline._progress_bar_config == {"desc": "mine"} and exact.pipeline.scheduler is scheduler
    exact.pipeline.set_progress_bar_config(**state.pop(4))
    assert [vae.use_tiling, vae.use_slicing, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.dtype] == state
    again = exact.generate(PROMPTS[0], seed=0, **FAST)
    assert same(roomy, again) and again.info["stepped_down"] == []


def test_a_batch_is_sliced_before_it_is_tiled(exact, alone):
    with refusing(exact.pipeline.vae.decoder, MemoryError(), lambda z: len(z) > 1):
        sliced = exact.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST)
    assert all(i.info["stepped_down"] == ["VAE slicing"] for i in sliced)
    assert worst(alone(exact), sliced) <= 1


@pytest.mark.device
def test_a_batch_that_cannot_be_denoised_is_halved(exact, alone):
    done = []
    with refusing(
        exact.pipeline.unet, torch.OutOfMemoryError("CUDA out of memory"), lambda x: len(x) > 2
    ):  # two for guidance
        images = exact.generate_batch(
            PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST, callback=lambda *news: done.append(news[:2])
        )
    assert images[0].info["stepped_down"] == ["batches of 1"] and done == [(i, 6) for i in range(1, 7)]
    assert worst(alone(exact), images) <= 1


def test_noise_is_drawn_afresh_when_denoising_is_repeated(exact, alone):
    failures = iter([False, True])
    with refusing(exact.pipeline.unet, MemoryError(), lambda x: len(x) > 2 and next(failures, True)):
        images = exact.generate_batch(PROMPTS[:2], seeds=[0, 1], batch_size=2, **FAST)
    assert images[1].info["stepped_down"] == ["batches of 1"] and worst(alone(exact)[:2], images) <= 1


@pytest.mark.parametrize(
    "part, stage, tried", [("unet", "denoising", []), ("vae", "decoding", ["VAE tiles of 32 px", "VAE tiles of 16 px"])]
)
def test_when_nothing_is_left_it_says_what_was_tried(exact, part, stage, tried):
    with refusing(
        getattr(exact.pipeline.vae, "decoder") if part == "vae" else exact.pipeline.unet,
        torch.OutOfMemoryError("CUDA out of memory"),
    ), pytest.raises(InsufficientMemoryError, match="no other memory to offload to") as caught:
        exact.generate(PROMPTS[0], **FAST)
    assert (caught.value.details["stage"], caught.value.details["stepped_down"]) == (stage, tried)
    assert all(step in caught.value.message for step in tried) and isinstance(
        caught.value.original_error, torch.OutOfMemoryError
    )


def test_it_steps_down_only_if_it_may(pipeline):
    strict = QuantizedSDXLGenerator(pipeline=pipeline, allow_step_down=False)
    with refusing(pipeline.vae.decoder, MemoryError(), lambda z: z.shape[-1] > 8), pytest.raises(
        InsufficientMemoryError, match="allow_step_down is False"
    ):
        strict.generate(PROMPTS[0], **FAST)


def test_low_memory_is_the_same_for_every_image_and_recorded(pipeline, exact):
    frugal = QuantizedSDXLGenerator(pipeline=pipeline, low_memory=True)
    with refusing(pipeline.vae.decoder, MemoryError(), lambda z: z.shape[-1] > 8):
        stepped = exact.generate(PROMPTS[0], seed=5, **FAST)
    image = frugal.generate(PROMPTS[0], seed=5, **FAST)
    assert same(image, stepped) and image.info["stepped_down"] == ["VAE tiles of 32 px"] and not pipeline.vae.use_tiling


@pytest.mark.parametrize("layer", ["unet.conv_out", "vae.decoder.conv_out"])
def test_a_black_image_is_an_error(exact, layer):
    weight = (
        exact.pipeline.unet.get_parameter("conv_out.weight")
        if layer[0] == "u"
        else exact.pipeline.vae.get_parameter("decoder.conv_out.weight")
    )
    kept = weight.data.clone()
    weight.data[0, 0] = float("inf")
    try:
        with pytest.raises(MLError, match="not finite"): exact.generate(PROMPTS[0], **FAST)
    finally:
        weight.data.copy_(kept)


# watching and stopping

def test_the_bar_is_on_standard_error_and_counts_every_step(exact, capsys):
    exact.generate_batch(PROMPTS, num_inference_steps=1)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "drawing: 100%" in err
    exact.generate(PROMPTS[0], num_inference_steps=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_previews_come_when_they_are_due_and_end_at_the_image(exact):
    seen = []
    images = exact.generate_batch(
        PROMPTS,
        seeds=[0, 1, 2],
        batch_size=2,
        num_inference_steps=2,
        progress=False,
        preview_every=2,
        callback=lambda *news: seen.append(news),
    )
    assert [(done, total, sorted(p)) for done, total, p in seen] == [
        (2, 6, []),
        (4, 6, [0, 1]),
        (5, 6, []),
        (6, 6, [2]),
    ]
    assert same(seen[1][2][1], images[1]) and same(seen[-1][2][2], images[2])


def test_a_preview_never_costs_the_image(exact):
    calls, seen = iter([True, False]), []
    with refusing(exact.pipeline.vae.decoder, MemoryError(), lambda z: next(calls, False)):
        image = exact.generate(
            PROMPTS[0], seed=5, **FAST, preview_every=1, callback=lambda *news: seen.append(list(news[2]))
        )
    assert seen == [[], [0]] and image.info["stepped_down"] == []


def stop_at(step):
    seen = []
    return dict(callback=lambda done, *_: seen.append(done), cancel=lambda: bool(seen) and seen[-1] >= step)


def test_cancelling_stops_at_the_step_and_leaves_nothing(exact):
    generator, kept = exact, exact.pipeline.scheduler
    generator.pipeline.scheduler = scheduler = DPMSolverMultistepScheduler.from_config(
        kept.config
    )  # remembers earlier steps
    try:
        before = generator.generate(PROMPTS[0], seed=5, **FAST)
        calls = []
        hook = generator.pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(GenerationCancelled, match="after 3 of 8 steps") as caught:
            generator.generate(PROMPTS[1], num_inference_steps=8, progress=False, **stop_at(3))
        hook.remove()
        assert len(calls) == 3 and caught.value.details == {"step": 3, "total": 8} and isinstance(caught.value, MLError)
        assert generator.pipeline.scheduler is scheduler and same(
            before, generator.generate(PROMPTS[0], seed=5, **FAST)
        )
    finally:
        generator.pipeline.scheduler = kept


def test_an_event_that_is_set_already_stops_before_the_first_step(exact):
    stop = threading.Event()
    stop.set()
    with refusing(exact.pipeline.text_encoder, AssertionError("it ran")), pytest.raises(
        GenerationCancelled, match="after 0 of 2"
    ):
        exact.generate(PROMPTS[0], **FAST, cancel=stop)


def test_images_that_are_finished_outlive_a_cancelled_stream(exact, alone):
    stream, images = exact.generate_stream(PROMPTS, seeds=[0, 1, 2], **FAST, **stop_at(3)), []
    with pytest.raises(GenerationCancelled):
        for image in stream: images.append(image)
    assert len(images) == 1 and same(images[0], alone(exact)[0])


def test_what_a_callback_raises_is_the_callers(exact):
    class Mine(Exception): pass
    error = Mine()
    def callback(*_): raise error
    with pytest.raises(Mine) as caught: exact.generate(PROMPTS[0], **FAST, callback=callback)
    assert caught.value is error and not exact._turns.queue


def test_asking_from_a_callback_is_an_error_and_no_deadlock(exact, pipeline):
    other = QuantizedSDXLGenerator(pipeline=pipeline)
    with pytest.raises(MLError, match="would wait for itself"):
        exact.generate(PROMPTS[0], **FAST, callback=lambda *_: other.generate(PROMPTS[1], **FAST))
    assert not exact._turns.queue


# threads

def test_threads_take_turns_and_get_their_own_image(four, alone):
    generator = four
    second = QuantizedSDXLGenerator(pipeline=generator.pipeline)
    at_once, most = [], []
    def watch(entered): at_once.append(1) if entered else at_once.pop(); most.append(len(at_once))
    hooks = [
        generator.pipeline.unet.register_forward_pre_hook(lambda *_: watch(True)),
        generator.pipeline.unet.register_forward_hook(lambda *_: watch(False)),
    ]
    with ThreadPoolExecutor(6) as pool:
        images = list(
            pool.map(lambda i: (generator, second)[i % 2].generate(PROMPTS[i % 3], seed=i % 3, **FAST), range(4))
        )
    for hook in hooks: hook.remove()
    assert (
        all(same(alone(generator)[i % 3], image) and image.info["seed"] == i % 3 for i, image in enumerate(images))
        and max(most) == 1
    )


def test_cancelling_works_while_waiting(exact):
    running, go_on, stop = threading.Event(), threading.Event(), threading.Event()
    def hold(*_): running.set(); go_on.wait(PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(exact.generate, PROMPTS[0], **FAST, callback=hold)
        assert running.wait(PATIENCE)
        second = pool.submit(exact.generate, PROMPTS[1], **FAST, cancel=stop)
        stop.set()
        with pytest.raises(GenerationCancelled, match="after 0 of 2"): second.result(PATIENCE)
        assert not first.done()
        go_on.set()
        assert first.result(PATIENCE) and not exact._turns.queue


def test_a_long_job_lets_others_have_their_turn(exact):
    finished, asked = [], threading.Event()
    def other():
        asked.set()
        exact.generate(PROMPTS[2], num_inference_steps=1, progress=False)
        finished.append("other")
    stream = exact.generate_stream(
        PROMPTS * 2,
        num_inference_steps=1,
        progress=False,
        callback=lambda done, *_: done == 1 and (thread.start(), asked.wait(PATIENCE)),
    )
    thread = threading.Thread(target=other)
    for _ in stream: finished.append("stream")
    thread.join()
    assert finished.index("other") < 5


def test_close_waits_for_the_image_and_gives_the_memory_back(tmp_path):
    registry = ModelRegistry(tmp_path / "hub", device="cpu")
    generator = make(registry)
    unet, running = weakref.ref(generator.pipeline.unet), threading.Event()
    with generator, ThreadPoolExecutor(1) as pool:
        job = pool.submit(generator.generate, PROMPTS[0], **FAST, callback=lambda *_: running.set())
        running.wait(PATIENCE)
        generator.close()
        assert job.done() and job.result().size == (64, 64)
    assert registry.unload("tiny-sdxl") > 0  # a registry of one's own keeps what nobody uses
    assert unet() is None and "closed" in repr(generator)
    for call in (lambda: generator.generate(PROMPTS[0]), lambda: generator.generate_batch(PROMPTS)):
        with pytest.raises(MLError, match="is closed"): call()


# one pipeline for all who ask for the same

@pytest.fixture
def registry(cache):
    "A registry of its own, over the cache that has the quantized weights already."
    return ModelRegistry(cache, offline=True, device="cpu")


def make(registry, **options):
    return QuantizedSDXLGenerator("tiny-sdxl", dtype=torch.float32, registry=registry, **options)


def count_loads(monkeypatch):
    "A list that grows with every pipeline that is loaded."
    loads, load = [], generation.load_sdxl_pipeline_with_quantization_v1
    def counted(*args, **kwargs):
        loads.append(kwargs)
        return load(*args, **kwargs)
    monkeypatch.setattr(generation, "load_sdxl_pipeline_with_quantization_v1", counted)
    return loads


def leases(registry): return repr(registry).count("leased")


def test_twenty_threads_that_ask_at_once_get_one_pipeline(registry, monkeypatch):
    loads, start = count_loads(monkeypatch), threading.Barrier(20)
    def ask(_):
        start.wait(PATIENCE)
        return make(registry)
    with ThreadPoolExecutor(20) as pool: generators = list(pool.map(ask, range(20)))
    assert len({id(g.pipeline) for g in generators}) == 1 and len(loads) == 1
    for g in generators: g.close()
    assert leases(registry) == 0


def test_what_differs_is_another_pipeline(registry):
    four, eight, exact = make(registry), make(registry, use_4bit=False), make(registry, use_quantization=False)
    assert len({id(g.pipeline) for g in (four, eight, exact)}) == 3 and [g.label for g in (four, eight, exact)] == [
        "nf4-dq",
        "int8",
        "float32",
    ]
    assert exact.pipeline is registry.get_model("tiny-sdxl", dtype=torch.float32)  # as the registry itself loads it
    assert make(registry, pipeline=None, double_quant=False).label == "nf4"


def test_a_pipeline_counts_in_the_budget_and_is_not_evicted_while_it_is_used(cache):
    with make(ModelRegistry(cache, offline=True, device="cpu")) as generator:
        size = generator.pipeline.load_report.bytes_after
    tight = ModelRegistry(cache, max_bytes=int(1.5 * size), offline=True, device="cpu")
    generator = make(tight)
    with pytest.raises(InsufficientMemoryError, match="leased models hold"):
        tight.get_model("tiny-sdxl", dtype=torch.float32)
    with pytest.raises(InsufficientMemoryError): make(tight, use_4bit=False)
    with pytest.raises(MLError, match="in use"): tight.unload("tiny-sdxl")
    assert generator.generate(PROMPTS[0], **FAST).size == (64, 64)
    generator.close()
    with make(tight, use_4bit=False) as eight: assert eight.label == "int8"  # the other was evicted for it


@pytest.mark.parametrize("how", ["close", "with", "forgotten"])
def test_the_lease_is_given_back(how, registry):
    generator = make(registry)
    assert leases(registry) == 1
    if how == "forgotten":
        del generator
        gc.collect()
    elif how == "with":
        with generator: assert leases(registry) == 1
    else:
        generator.close()
        generator.close()
    assert leases(registry) == 0 and registry.unload("tiny-sdxl") > 0


def test_a_constructor_that_fails_keeps_no_lease(registry, monkeypatch):
    monkeypatch.setattr(generation, "model_identity", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError): make(registry)
    gc.collect()
    assert leases(registry) == 0


def test_closing_one_leaves_the_other_its_pipeline(registry):
    first, second = make(registry), make(registry)
    expected = first.generate(PROMPTS[0], seed=1, **FAST)
    first.close()
    assert leases(registry) == 1 and same(expected, second.generate(PROMPTS[0], seed=1, **FAST))


def test_the_registry_says_which_model_a_name_means(tmp_path):
    from hubcache import make_repo
    tiny = locate_model("tiny-sdxl")
    files = {p.relative_to(tiny).as_posix(): p.read_bytes() for p in tiny.rglob("*") if p.is_file()}
    make_repo(tmp_path / "hub", "shop/sdxl", {"a" * 40: files, "b" * 40: files}, {"main": "b" * 40})
    registry = ModelRegistry(tmp_path / "hub", tmp_path / "lock.json", offline=True, device="cpu")
    registry.register(ModelSpec("dresses", "shop/sdxl", "sdxl", allow_patterns=("*.json", "*.txt", "*.safetensors")))
    registry.prefetch("dresses", "a" * 40)
    def ask(name, **options): return QuantizedSDXLGenerator(name, registry=registry, dtype=torch.float32, **options)
    locked, newer = ask("dresses"), ask("dresses", revision="main")
    assert (locked.identity["revision"], newer.identity["revision"]) == (
        "a" * 40,
        "b" * 40,
    ) and locked.pipeline is not newer.pipeline
    assert ask("shop/sdxl").pipeline is locked.pipeline and locked.identity["model"] == "shop/sdxl"
    assert locked.generate(PROMPTS[0], **FAST).info["revision"] == "a" * 40
    own = sdxl.load_sdxl_pipeline_with_quantization_v2("dresses", registry=registry, dtype=torch.float32)
    assert own.load_report.revision == "a" * 40 and own is not locked.pipeline
    with pytest.raises(ValidationError, match="no model 'dresses'"):
        QuantizedSDXLGenerator("dresses", cache_dir=tmp_path / "hub")
    with pytest.raises(ModelNotFoundError, match="main"): QuantizedSDXLGenerator("shop/other", registry=registry)
    with pytest.raises(ModelNotFoundError): ask("dresses", revision="v9")
    with pytest.raises(ValidationError, match="leave cache_dir and offline out"): ask("dresses", cache_dir=tmp_path)


def test_a_fallback_is_shared_only_with_those_who_take_one(registry, tmp_path, monkeypatch):
    import bitsandbytes
    registry = ModelRegistry(tmp_path / "hub", offline=True, device="cpu")
    def broken(*args, **kwargs): raise RuntimeError("no kernel image")
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    fell_back = make(registry)
    assert (fell_back.label, fell_back.use_quantization) == ("float32", False) and make(
        registry
    ).pipeline is fell_back.pipeline
    with pytest.raises(ModelLoadError, match="no kernel image"): make(registry, fallback=False)
    fell_back.close()
    gc.collect()
    assert leases(registry) == 0


# what one changes, the other does not see

def test_an_exchanged_scheduler_is_put_back_at_the_next_turn(registry, caplog):
    first, second = make(registry), make(registry)
    expected, loaded = first.generate(PROMPTS[0], seed=1, **FAST), first.pipeline.scheduler
    first.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(loaded.config)
    first.pipeline.vae.enable_tiling()
    with caplog.at_level(logging.WARNING): image = second.generate(PROMPTS[0], seed=1, **FAST)
    assert same(image, expected) and image.info == expected.info and "generator.scheduler" in caplog.text
    assert second.pipeline.scheduler is loaded and not second.pipeline.vae.use_tiling
    first.pipeline.scheduler = other = EulerAncestralDiscreteScheduler.from_config(loaded.config)
    keep_state(first.pipeline)  # whoever means it for all says so
    assert second.generate(PROMPTS[0], seed=1, **FAST).info["scheduler"] == type(other).__name__


def test_generators_with_their_own_wishes_draw_at_once_what_they_draw_alone(registry):
    plain, frugal, ancestral = make(registry), make(registry, low_memory=True), make(registry)
    ancestral.scheduler = EulerAncestralDiscreteScheduler.from_config(ancestral.pipeline.scheduler.config)
    generators = [plain, frugal, ancestral]
    assert len({id(g.pipeline) for g in generators}) == 1
    def draw(i): return generators[i % 3].generate(PROMPTS[i % 3], seed=i % 3, **FAST)
    alone = [draw(i) for i in range(3)]
    with ThreadPoolExecutor(6) as pool: images = list(pool.map(draw, range(12)))
    assert all(same(image, alone[i % 3]) and image.info == alone[i % 3].info for i, image in enumerate(images))
    assert [i.info["stepped_down"] for i in alone] == [[], ["VAE tiles of 32 px"], []]
    assert [i.info["scheduler"][:4] for i in alone] == ["DDIM", "DDIM", "Eule"]
    assert (
        not same(alone[0], plain.generate(PROMPTS[0], seed=9, **FAST))
        and ancestral.scheduler.num_inference_steps is None
    )


@pytest.fixture
def offloading(monkeypatch):
    "A device with another memory, pretended: diffusers' offload works from the CPU to the CPU as well."
    monkeypatch.setattr(generation, "can_offload", lambda device: True)


def test_offload_is_the_wish_of_one_generator(registry, offloading):
    plain, frugal = make(registry), make(registry, low_memory=True)
    expected = plain.generate(PROMPTS[0], seed=1, **FAST)
    offloaded = frugal.generate(PROMPTS[0], seed=1, **FAST)
    assert offloaded.info["stepped_down"] == ["model offload", "VAE tiles of 32 px"] and is_offloaded(frugal.pipeline)
    again = plain.generate(PROMPTS[0], seed=1, **FAST)
    assert same(again, expected) and again.info == expected.info and not is_offloaded(plain.pipeline)
    assert not hasattr(plain.pipeline.unet, "_hf_hook") and same(offloaded, frugal.generate(PROMPTS[0], seed=1, **FAST))
    frugal.close()
    newcomer = make(registry)
    assert (
        newcomer.device == "cpu"
        and same(newcomer.generate(PROMPTS[0], seed=1, **FAST), expected)
        and not is_offloaded(newcomer.pipeline)
    )


def test_an_unlucky_generator_stays_offloaded_and_the_others_do_not(registry, offloading):
    unlucky, other = make(registry), make(registry)
    failures = iter([True])
    with refusing(unlucky.pipeline.unet, torch.OutOfMemoryError("CUDA out of memory"), lambda x: next(failures, False)):
        first = unlucky.generate(PROMPTS[0], seed=1, **FAST)
    second, unchanged = unlucky.generate(PROMPTS[0], seed=1, **FAST), other.generate(PROMPTS[0], seed=1, **FAST)
    assert [i.info["stepped_down"] for i in (first, second, unchanged)] == [["model offload"], ["model offload"], []]
    assert same(first, second) and same(first, unchanged) and not is_offloaded(other.pipeline)


def test_a_generator_that_cannot_have_its_networks_back_works_offloaded(registry, offloading, monkeypatch):
    plain, unlucky = make(registry), make(registry)
    failures = iter([True])
    with refusing(unlucky.pipeline.unet, torch.OutOfMemoryError("CUDA out of memory"), lambda x: next(failures, False)):
        unlucky.generate(PROMPTS[0], seed=1, **FAST)
    move, calls = type(plain.pipeline.unet).to, []
    def full(network, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return move(network, *args, **kwargs)
    monkeypatch.setattr(type(plain.pipeline.unet), "to", full)
    assert plain.generate(PROMPTS[0], seed=1, **FAST).info["stepped_down"] == ["model offload"] and len(calls) > 1


def test_a_pipeline_of_the_callers_own_stays_as_the_caller_made_it(pipeline, offloading):
    own = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
    own.enable_model_cpu_offload(device="cpu")
    adopted = QuantizedSDXLGenerator(pipeline=own)
    assert (
        adopted.device == "cpu"
        and adopted.generate(PROMPTS[0], **FAST).info["stepped_down"] == ["model offload"]
        and is_offloaded(own)
    )
    own.scheduler = EulerAncestralDiscreteScheduler.from_config(own.scheduler.config)
    assert adopted.generate(PROMPTS[0], **FAST).info["scheduler"] == "EulerAncestralDiscreteScheduler"


# what a file keeps

@pytest.fixture(scope="module")
def image(four):
    return four.generate("a red dress, süß 👗", "blue\nplain", seed=5, **FAST)


def test_settings_come_back_from_the_file_and_make_the_image_again(image, four, tmp_path):
    path = tmp_path / "a.png"
    image.save(str(path))
    metadata = read_metadata(path)
    assert metadata == image.info and same(Image.open(path), image)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "seed")
    again = four.generate(**{n: metadata[n] for n in names}, progress=False)
    assert same(again, image) and {"torch", "diffusers", "transformers", "bitsandbytes"} == set(metadata["versions"])
    assert (metadata["model"], metadata["quantization"], metadata["device"], metadata["dtype"]) == (
        "tiny-sdxl",
        "nf4-dq",
        "cpu",
        "float32",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_every_way_to_write_a_png_keeps_them(image, tmp_path):
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    assert Image.open(buffer).info["seed"] == "5"
    for kept in (copy.deepcopy(image), pickle.loads(pickle.dumps(image))):
        kept.save(tmp_path / "b.PNG")
        assert read_metadata(tmp_path / "b.PNG") == image.info and same(kept, image)


def test_other_formats_say_that_the_settings_stay_behind(image, tmp_path, caplog):
    image.save(tmp_path / "a.jpg")
    assert (
        Image.open(tmp_path / "a.jpg").size == (64, 64) and "written into PNG files only, not into a.jpg" in caplog.text
    )


@pytest.mark.parametrize("name, format", [("a", None), ("a.docx", None), ("", None), ("a.png", "painting"), ("a.png", 7)])
def test_what_says_no_format_is_refused(image, tmp_path, name, format):
    with pytest.raises(ValidationError, match="end its name in .png"): image.save(tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fp", [None, 7, ["a.png"]])
def test_what_cannot_be_written_to_is_refused(image, fp):
    with pytest.raises(ValidationError, match="expected a path or an open file"): image.save(fp, "PNG")


@pytest.mark.parametrize("name, options", [("a.png", {}), ("a.tiff", {}), ("a.webp", {"lossless": True})])
def test_a_file_appears_whole_or_not_at_all(image, tmp_path, name, options):
    path = tmp_path / name
    path.write_bytes(b"the old one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DevSkyyError, match=f"cannot write {name}"): image.save(path, **options)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"the old one" and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_local_folder_is_named_without_its_path(tmp_path):
    folder = tmp_path / "secret" / "my-model"
    shutil.copytree(locate_model("tiny-sdxl"), folder)
    for generator in (
        QuantizedSDXLGenerator(str(folder), use_quantization=False, device="cpu"),
        QuantizedSDXLGenerator(pipeline=load_model(folder, device="cpu")),
    ):
        image = generator.generate(PROMPTS[0], **FAST)
        image.save(tmp_path / "a.png")
        assert (
            image.info["model"] == "my-model"
            and len(image.info["fingerprint"]) == 16
            and image.info["revision"] is None
        )
        assert (
            b"secret" not in (tmp_path / "a.png").read_bytes()
            and "secret" not in repr(generator) + generator._repr_html_()
        )
        with refusing(generator.pipeline.unet, ValueError("no")), pytest.raises(MLError) as caught:
            generator.generate(PROMPTS[0], **FAST)
        assert "secret" not in json.dumps(caught.value.to_dict())


def test_the_fingerprint_follows_every_byte_of_the_weights(tmp_path):
    folder = shutil.copytree(locate_model("tiny-sdxl"), tmp_path / "copy")
    weights, known = Path(folder, "unet", "diffusion_pytorch_model.safetensors"), folder_fingerprint(
        locate_model("tiny-sdxl")
    )
    assert folder_fingerprint(folder) == known
    size, times = weights.stat().st_size, weights.stat()
    assert size > 1 << 22
    seen = {known}
    for place in (size // 3, size // 2 + 7, size - 1_000_001):  # wherever a sample might not look
        data = bytearray(weights.read_bytes())
        data[place] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been touched
        seen.add(folder_fingerprint(folder))
    assert len(seen) == 4
    generator = QuantizedSDXLGenerator(folder, use_quantization=False, device="cpu", dtype=torch.float32)
    assert generator.identity["fingerprint"] == folder_fingerprint(folder) != known


def test_a_fingerprint_is_read_once(tmp_path, monkeypatch):
    folder = shutil.copytree(locate_model("tiny-sdxl"), tmp_path / "copy")
    first = folder_fingerprint(folder)
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("a file was read again"))
    assert folder_fingerprint(folder) == first


SETTINGS = {"software": "devsky_nb 1", "num_inference_steps": "3", "guidance_scale": "7.5", "width": "64", "height": "64",
            "seed": "1", "adapters": "[]", "stepped_down": "[]", "versions": "{}"}
HOSTILE = {
    "no settings": {},
    "another program": {"software": "other", "seed": "1"},
    "missing": {"software": "devsky_nb 1"},
    **{f"{what} for {name}": SETTINGS | {name: value} for name in ("seed", "guidance_scale", "versions", "stepped_down")
       for what, value in {"no json": "x", "nothing": "", "deep": "[" * 100_000, "null": "null", "NaN": "NaN", "true": "true",
                           "a text": '"1"', "a number of 5000 digits": "9" * 5000, "texts and numbers": '["a", 1]'}.items()},
}


@pytest.mark.parametrize("chunks", HOSTILE.values(), ids=HOSTILE)
def test_files_of_others_are_refused(tmp_path, chunks):
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items(): info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValidationError, match="'a.png' has"): read_metadata(tmp_path / "a.png")


def png(*chunks):
    "A PNG with these chunks before its pixels."
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = buffer.getvalue()
    pieces = [len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks]
    return data[:33] + b"".join(pieces) + data[33:]


@functools.cache
def packed(size):
    "Zeros that unfold to `size` bytes."
    packer = zlib.compressobj(1)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.flush()])


BOMBS = {
    "a text of 1 GB": lambda: png((b"zTXt", b"software\0\0" + packed(1 << 30))),
    "an international text of 1 GB": lambda: png((b"iTXt", b"software\0\1\0\0\0" + packed(1 << 30))),
    "a hundred texts of 1 MB": lambda: png(*[(b"zTXt", b"k%d\0\0" % i + packed(1 << 20)) for i in range(100)]),
    "a profile of 1 GB": lambda: png((b"iCCP", b"p\0\0" + packed(1 << 30))),
    "a text without an end": lambda: png((b"tEXt", b"software")),
    "a text that is no zlib": lambda: png((b"zTXt", b"software\0\0not packed")),
    "of another method": lambda: png((b"zTXt", b"software\0\7x")),
    "a length of 4 GB": lambda: png()[:33] + b"\xff\xff\xff\xfftEXtsoftware",
    "a billion pixels": lambda: png()[:16] + (2**30).to_bytes(4, "big") * 2 + png()[24:],
    "cut": lambda: png()[:20], "empty": lambda: b"", "a text": lambda: b"this is text",
}


def test_a_file_that_is_no_image_of_ours_is_one_error_and_little_memory(tmp_path):
    for i, make in enumerate(BOMBS.values()): (tmp_path / f"{i:02}.png").write_bytes(make())
    code = ("import resource, sys; from pathlib import Path; from devsky_nb.diffusion.metadata import read_metadata\n"
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
            "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
            "    try: read_metadata(path)\n"
            "    except ValueError as e: print(type(e).__name__, e)")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True, timeout=PATIENCE)
    lines = out.stdout.splitlines()
    assert len(lines) == len(BOMBS), out.stderr
    for i, (what, line) in enumerate(zip(BOMBS, lines)): assert line.startswith(f"ValidationError '{i:02}.png' "), what


def test_what_is_no_file_has_no_settings(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "link.png", "zero.png"):
        with pytest.raises(ValidationError, match=f"{name} cannot be read"): read_metadata(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file 'none.png'"): read_metadata(tmp_path / "none.png")


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("this is text")
    with pytest.raises(ValidationError, match="'a.png' is no image"): read_metadata(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValidationError): read_metadata(tmp_path / "cut.png")


# --- wrong keywords, leases, copies

MISTAKEN = {
    "generator": (None, "use seed="), "num_images_per_prompt": (2, r"use generate_batch\(\[prompt\] \* n"),
    "output_type": ("np", "numpy.asarray"), "callback_on_step_end": (print, "use callback="), "cfg_scale": (7, "guidance_scale="),
    "size": (64, "width= and height="), "image": (None, "draws from texts"), "scheduler": (None, "generator.scheduler"),
    "widht": (64, r"did you mean width=\?"), "quality": ("high", "there are "), "eta": (0., "there are "),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_keyword_of_another_library_is_told_from_ours(name, exact):
    value, words = MISTAKEN[name]
    calls = (lambda: exact.generate("a red dress", **FAST, **{name: value}),
             lambda: exact.generate_stream(["a red dress"], **FAST, **{name: value}),
             lambda: exact.generate_batch(["a red dress"], **FAST, **{name: value}))
    for call in calls:
        with pytest.raises(ValidationError, match=f"there is no {name}= here: .*{words}") as caught: call()
        assert caught.value.details["argument"] == name


def test_one_seed_or_several_is_said(exact):
    with pytest.raises(ValidationError, match="no seeds= here: use seed="): exact.generate("a", seeds=[1], **FAST)
    with pytest.raises(ValidationError, match="no seed= here: use seeds=, a list"): exact.generate_batch(["a"], seed=1, **FAST)


@pytest.mark.parametrize("model", ["tiny-clip", "clip-vit-base", "siglip-base", locate_model("tiny-clip")])
def test_what_is_no_sdxl_pipeline_is_one_error_before_anything_is_fetched(model, cache):
    for call in (lambda: QuantizedSDXLGenerator(model, device="cpu", cache_dir=cache, offline=True),
                 lambda: QuantizedSDXLGenerator(model, False, device="cpu", cache_dir=cache, offline=True),
                 lambda: sdxl.load_sdxl_pipeline_with_quantization_v1(model, device="cpu", cache_dir=cache, offline=True)):
        with pytest.raises(ValidationError, match="only Stable Diffusion XL pipelines|is no SDXL pipeline"): call()


def test_who_misses_a_model_is_led_to_one_of_the_right_kind(cache):
    with pytest.raises(ModelNotFoundError, match="only Stable Diffusion XL pipelines are drawn with: if it is one, "
                                                 "`hf download someone/sdxl-wear.*--model tiny-sdxl") as caught:
        QuantizedSDXLGenerator("someone/sdxl-wear", device="cpu", cache_dir=cache, offline=True)
    assert "tiny-clip" not in str(caught.value) and caught.value.details["remedies"][1] == "--model tiny-sdxl"


@pytest.mark.parametrize("at", ["model_identity", "turns_of", "precision_label", "keep_state"])
def test_a_generator_that_cannot_be_made_leaves_no_lease(at, cache, monkeypatch):
    registry = ModelRegistry(cache_dir=cache, offline=True)
    def fail(*args): raise OSError(5, "Input/output error")
    with monkeypatch.context() as m:
        m.setattr(generation, at, fail)
        with pytest.raises(OSError) as caught:
            QuantizedSDXLGenerator("tiny-sdxl", False, device="cpu", dtype=torch.float32, registry=registry)
    assert registry.unload("tiny-sdxl") > 0 and caught.value is not None  # the error is held, the lease is not


def test_a_generator_says_that_it_is_not_to_be_copied(exact):
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(MLError, match="cannot be pickled or copied.* make another"): make(exact)


def test_a_folder_of_save_quantized_names_its_reader(cache, tmp_path):
    from devsky_nb.diffusion.checkpoint import save_quantized
    loaded = sdxl.load_sdxl_pipeline_with_quantization_v1("tiny-sdxl", device="cpu", cache_dir=cache, quantize_once=False)
    folder = save_quantized(loaded, tmp_path / "quantized")
    registry = ModelRegistry(cache_dir=cache, offline=True)
    for call in (lambda: load_model(folder, device="cpu"), lambda: registry.get_model(folder, device="cpu"),
                 lambda: QuantizedSDXLGenerator(folder, device="cpu", registry=registry),
                 lambda: QuantizedSDXLGenerator(folder, False, device="cpu", registry=registry),
                 lambda: sdxl.load_sdxl_pipeline_with_quantization_v2(folder, device="cpu", registry=registry)):
        with pytest.raises(ValidationError, match="'quantized' is quantized already: read it with load_quantized"): call()
