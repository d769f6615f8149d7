"QuantizedSDXLGenerator beyond its lesson: wrong arguments, seeds, failures, threads, and what a file keeps."
import copy, gc, io, json, logging, pickle, resource, shutil, threading, weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from PIL import Image, PngImagePlugin

from devsky_nb.errors import InsufficientMemoryError, MLError, ValidationError
from devsky_nb.generation import GenerationCancelled, QuantizedSDXLGenerator, read_metadata
from devsky_nb.registry import load_model, locate_model

PROMPTS = ["a red striped t-shirt", "blue plain jeans", "a green dotted dress"]
FAST = {"num_inference_steps": 2, "guidance_scale": 5., "progress": False}


@pytest.fixture(scope="module")
def pipeline():
    return load_model("tiny-sdxl", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(pipeline):
    return QuantizedSDXLGenerator(pipeline=pipeline)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "hub"


@pytest.fixture(scope="module")
def four(cache):
    return QuantizedSDXLGenerator("tiny-sdxl", device="cpu", dtype=torch.float32, cache_dir=cache)


@pytest.fixture(params=["exact", "four"], scope="module")
def generator(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def alone():
    "The pictures of single calls, by generator: seeds 0, 1, 2."
    made = {}
    def draw(generator):
        if generator.label not in made: made[generator.label] = [generator.generate(p, seed=i, **FAST) for i, p in enumerate(PROMPTS)]
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


# the same pictures as the pipeline's

@pytest.mark.parametrize("settings", [{"negative_prompt": "blue"}, {"guidance_scale": 1., "width": 128}], ids=str)
def test_a_picture_is_the_pipelines_own(exact, pipeline, settings):
    ours = exact.generate(PROMPTS[0], seed=5, **FAST | settings)
    theirs = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(5), **{"num_inference_steps": 2, "guidance_scale": 5.} | settings).images[0]
    assert same(ours, theirs) and type(pipeline.scheduler).__name__ == ours.info["scheduler"]


def test_none_and_empty_are_different_negative_prompts(exact):
    assert not same(exact.generate(PROMPTS[0], seed=5, **FAST), exact.generate(PROMPTS[0], "", seed=5, **FAST))


def test_a_vae_in_half_precision_decodes_in_float32_and_comes_back():
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float16)
    assert pipeline.vae.config.force_upcast
    half = QuantizedSDXLGenerator(pipeline=pipeline)
    theirs = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=5., generator=torch.Generator().manual_seed(5)).images[0]
    seen = []
    assert same(half.generate(PROMPTS[0], seed=5, **FAST, preview_every=1, callback=lambda *news: seen.append(news[2][0])), theirs)
    assert same(seen[-1], theirs)
    with refusing(pipeline.vae.decoder, ValueError("broken")), pytest.raises(MLError, match="decoding failed: broken"): half.generate(PROMPTS[0], **FAST)
    assert pipeline.vae.dtype == torch.float16 and same(half.generate(PROMPTS[0], seed=5, **FAST), theirs)


# seeds

def test_a_seed_gives_the_same_picture_at_every_position(generator, alone):
    torch.manual_seed(99)
    state, order = torch.get_rng_state(), [2, 0, 1]
    listed = generator.generate_batch([PROMPTS[i] for i in order], seeds=order, **FAST)
    assert all(same(alone(generator)[i], image) for i, image in zip(order, listed)) and torch.equal(state, torch.get_rng_state())


def test_a_larger_batch_has_the_same_noise_and_differs_by_rounding(generator, alone):
    noise, unet = [], generator.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, args: noise.append(args[0].clone()))
    together = generator.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST)
    generator.generate(PROMPTS[2], seed=2, **FAST)
    hook.remove()
    assert torch.equal(noise[0][2], noise[2][0])
    assert worst(alone(generator), together) <= (1 if generator.label == "float32" else 16)
    assert [i.info["seed"] for i in together] == [0, 1, 2] and [i.info["prompt"] for i in together] == PROMPTS


def test_noise_within_the_loop_is_each_pictures_own(pipeline, exact):
    kept, pipeline.scheduler = pipeline.scheduler, EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    try:
        alone = exact.generate(PROMPTS[1], seed=1, **FAST)
        together = exact.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST)
        other = exact.generate(PROMPTS[1], seed=2, **FAST)
    finally: pipeline.scheduler = kept
    assert np.abs(pixels(alone) - pixels(together[1])).max() <= 1 and not same(alone, other)


def test_a_seed_that_was_drawn_is_kept(exact):
    short = {"num_inference_steps": 1, "progress": False}
    first, second = exact.generate_batch(PROMPTS[:1] * 2, **short)
    assert first.info["seed"] != second.info["seed"] and same(first, exact.generate(PROMPTS[0], seed=first.info["seed"], **short))


# wrong arguments

LONG = "a very long description of a dress " * 20
WRONG = [
    (dict(prompt=""), "non-empty"), (dict(prompt=" \n"), "non-empty"), (dict(prompt=None), "not NoneType"), (dict(prompt=7), "not int"), (dict(prompt=b"dress"), "not bytes"),
    (dict(prompt=["a dress"]), "generate_batch"), (dict(prompt=LONG), "would be cut: '"), (dict(prompt="\ud800"), "half a character"),
    (dict(negative_prompt=1), "negative_prompt must be a text"), (dict(negative_prompt=["blue"]), "negative_prompt must be a text"), (dict(negative_prompt=LONG), "negative_prompt has"),
    (dict(negative_prompt="blue", guidance_scale=1), "counts for nothing"), (dict(negative_prompt="blue", guidance_scale=0.), "counts for nothing"),
    *((dict(num_inference_steps=v), "num_inference_steps=") for v in (0, -1, 1001, True, 2., "2", float("nan"), None)),
    *((dict(guidance_scale=v), "guidance_scale=") for v in (-.1, float("nan"), float("inf"), True, "5", None, [5.], 5j)),
    *((dict(width=v), "width=") for v in (0, -64, 63, 100, 2112, True, 64., "64", float("nan"))), (dict(height=65), "height=65 must be a multiple of 64 from 64 to 2048"),
    *((dict(seed=v), "seed=") for v in (-1, 2**32, 2**64, True, 1., "1", float("nan"))),
    (dict(callback=3), "callback must be something to call"), (dict(cancel=True), "cancel must be something to call"), (dict(preview_every=2), "needs a callback"),
    *((dict(preview_every=v, callback=print), "preview_every=") for v in (0, True, 1.5)),
]


@pytest.mark.parametrize("given, message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_are_named_before_anything_is_drawn(exact, given, message):
    with refusing(exact.pipeline.text_encoder, AssertionError("it ran")), pytest.raises(ValidationError) as caught:
        exact.generate(**{"prompt": PROMPTS[0]} | FAST | given)
    assert message in caught.value.message and json.dumps(caught.value.to_dict()) and caught.value.details


@pytest.mark.parametrize("given, message", [
    (dict(prompts="a dress"), "a list of at least one text"), (dict(prompts=[]), "a list of at least one"), (dict(prompts=["a dress", 3]), "prompt 1: prompt must be a text, not int"),
    (dict(prompts=["a dress", LONG]), "prompt 1: prompt has"), (dict(prompts=PROMPTS, seeds=[1]), "a list of 3"), (dict(prompts=PROMPTS, seeds=1), "a list of 3"),
    (dict(prompts=PROMPTS, seeds=[1, 2, -3]), "prompt 2: seed=-3"), (dict(prompts=PROMPTS, batch_size=0), "batch_size=0"), (dict(prompts=PROMPTS, batch_size=True), "batch_size=True")], ids=str)
def test_a_stream_checks_everything_when_it_is_called(exact, given, message):
    with pytest.raises(ValidationError, match=message): exact.generate_stream(**given)


def test_arguments_from_numpy_are_taken_and_written_as_plain_numbers(exact, tmp_path):
    image = exact.generate(PROMPTS[0], None, np.int64(2), np.float32(5), np.int32(64), np.int64(64), np.uint32(5), progress=False)
    image.save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == image.info and same(image, exact.generate(PROMPTS[0], seed=5, **FAST))


def test_both_tokenizers_are_asked(exact, pipeline):
    kept = pipeline.tokenizer_2
    pipeline.tokenizer_2 = copy.deepcopy(kept)
    pipeline.tokenizer_2.model_max_length = 5
    try:
        with pytest.raises(ValidationError, match="the model reads 5") as caught: exact.generate("red dress red dress", **FAST)
    finally: pipeline.tokenizer_2 = kept
    assert caught.value.details["tokenizer"] == "tokenizer_2"


def test_the_constructor_refuses_what_contradicts_itself(pipeline, cache):
    for given, message in ((dict(use_quantization=1), "use_quantization must be True or False"), (dict(pipeline=pipeline, vae="fp32"), "cannot be loaded otherwise"),
                           (dict(device="gpu"), "no device 'gpu'"), (dict(pipeline=pipeline.unet), "not UNet2DConditionModel"), (dict(load_in_4bit=True), "load_in_4bit")):
        with pytest.raises(ValidationError, match=message): QuantizedSDXLGenerator("tiny-sdxl", **given)


@pytest.mark.parametrize("flags, label", [((True, True), "nf4-dq"), ((True, False), "int8"), ((False, True), "float32")])
def test_it_says_what_it_is(cache, flags, label):
    generator = QuantizedSDXLGenerator("tiny-sdxl", *flags, "cpu", dtype=torch.float32, cache_dir=cache)
    image = generator.generate(PROMPTS[0], seed=1, **FAST)
    assert (generator.label, generator.use_quantization, generator.use_4bit) == (label, flags[0], label[:2] == "nf")
    assert image.info["quantization"] == label and label in repr(generator) and ("bitsandbytes" in image.info["versions"]) == flags[0]
    assert (generator.model_id, generator.device) == ("tiny-sdxl", "cpu") and image.size == (64, 64) and image.mode == "RGB"


# failures

def test_what_fails_inside_is_told_with_its_values(four, alone):
    generator = four
    with refusing(generator.pipeline.unet, ValueError("shapes do not match")), pytest.raises(MLError) as caught:
        generator.generate("red " * 50, "blue " * 50, seed=5, **FAST)
    error = caught.value
    assert type(error) is MLError and isinstance(error.original_error, ValueError) and "denoising failed: shapes do not match" in error.message
    assert json.loads(json.dumps(error.to_dict()))["details"].items() >= {"stage": "denoising", "prompt": "red " * 25, "negative_prompt": "blue " * 20, "width": 64, "height": 64, "seed": 5,
                                                                        "quantization": generator.label, "device": "cpu", "pictures": 1, "stepped_down": []}.items()
    assert same(alone(generator)[0], generator.generate(PROMPTS[0], seed=0, **FAST))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")], ids=lambda e: type(e).__name__)
def test_decoding_steps_down_and_the_pipeline_is_as_before(exact, alone, error, caplog):
    vae, scheduler = exact.pipeline.vae, exact.pipeline.scheduler
    state = [vae.use_tiling, vae.use_slicing, vae.tile_sample_min_size, vae.tile_latent_min_size, exact.pipeline._progress_bar_config, vae.dtype]
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


def test_a_batch_that_cannot_be_denoised_is_halved(exact, alone):
    done = []
    with refusing(exact.pipeline.unet, torch.OutOfMemoryError("CUDA out of memory"), lambda x: len(x) > 2):  # two for guidance
        images = exact.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=3, **FAST, callback=lambda *news: done.append(news[:2]))
    assert images[0].info["stepped_down"] == ["batches of 1"] and done == [(i, 6) for i in range(1, 7)]
    assert worst(alone(exact), images) <= 1


def test_noise_is_drawn_afresh_when_denoising_is_repeated(exact, alone):
    failures = iter([False, True])
    with refusing(exact.pipeline.unet, MemoryError(), lambda x: len(x) > 2 and next(failures, True)):
        images = exact.generate_batch(PROMPTS[:2], seeds=[0, 1], batch_size=2, **FAST)
    assert images[1].info["stepped_down"] == ["batches of 1"] and worst(alone(exact)[:2], images) <= 1


@pytest.mark.parametrize("part, stage, tried", [("unet", "denoising", []), ("vae", "decoding", ["VAE tiles of 32 px", "VAE tiles of 16 px"])])
def test_when_nothing_is_left_it_says_what_was_tried(exact, part, stage, tried):
    with refusing(getattr(exact.pipeline.vae, "decoder") if part == "vae" else exact.pipeline.unet, torch.OutOfMemoryError("CUDA out of memory")), \
            pytest.raises(InsufficientMemoryError, match="no other memory to offload to") as caught: exact.generate(PROMPTS[0], **FAST)
    assert (caught.value.details["stage"], caught.value.details["stepped_down"]) == (stage, tried)
    assert all(step in caught.value.message for step in tried) and isinstance(caught.value.original_error, torch.OutOfMemoryError)


def test_it_steps_down_only_if_it_may(pipeline):
    strict = QuantizedSDXLGenerator(pipeline=pipeline, allow_step_down=False)
    with refusing(pipeline.vae.decoder, MemoryError(), lambda z: z.shape[-1] > 8), pytest.raises(InsufficientMemoryError, match="allow_step_down is False"):
        strict.generate(PROMPTS[0], **FAST)


def test_low_memory_is_the_same_for_every_picture_and_recorded(pipeline, exact):
    frugal = QuantizedSDXLGenerator(pipeline=pipeline, low_memory=True)
    with refusing(pipeline.vae.decoder, MemoryError(), lambda z: z.shape[-1] > 8): stepped = exact.generate(PROMPTS[0], seed=5, **FAST)
    image = frugal.generate(PROMPTS[0], seed=5, **FAST)
    assert same(image, stepped) and image.info["stepped_down"] == ["VAE tiles of 32 px"] and not pipeline.vae.use_tiling


@pytest.mark.parametrize("layer", ["unet.conv_out", "vae.decoder.conv_out"])
def test_a_black_picture_is_an_error(exact, layer):
    weight = exact.pipeline.unet.get_parameter("conv_out.weight") if layer[0] == "u" else exact.pipeline.vae.get_parameter("decoder.conv_out.weight")
    kept = weight.data.clone()
    weight.data[0, 0] = float("inf")
    try:
        with pytest.raises(MLError, match="not finite"): exact.generate(PROMPTS[0], **FAST)
    finally: weight.data.copy_(kept)


# watching and stopping

def test_the_bar_is_on_standard_error_and_counts_every_step(exact, capsys):
    exact.generate_batch(PROMPTS, num_inference_steps=1)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "drawing: 100%" in err
    exact.generate(PROMPTS[0], num_inference_steps=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_previews_come_when_they_are_due_and_end_at_the_picture(exact):
    seen = []
    images = exact.generate_batch(PROMPTS, seeds=[0, 1, 2], batch_size=2, num_inference_steps=2, progress=False, preview_every=2, callback=lambda *news: seen.append(news))
    assert [(done, total, sorted(p)) for done, total, p in seen] == [(2, 6, []), (4, 6, [0, 1]), (5, 6, []), (6, 6, [2])]
    assert same(seen[1][2][1], images[1]) and same(seen[-1][2][2], images[2])


def test_a_preview_never_costs_the_picture(exact):
    calls, seen = iter([True, False]), []
    with refusing(exact.pipeline.vae.decoder, MemoryError(), lambda z: next(calls, False)):
        image = exact.generate(PROMPTS[0], seed=5, **FAST, preview_every=1, callback=lambda *news: seen.append(list(news[2])))
    assert seen == [[], [0]] and image.info["stepped_down"] == []


def stop_at(step):
    seen = []
    return dict(callback=lambda done, *_: seen.append(done), cancel=lambda: bool(seen) and seen[-1] >= step)


def test_cancelling_stops_at_the_step_and_leaves_nothing(exact):
    generator, kept = exact, exact.pipeline.scheduler
    generator.pipeline.scheduler = scheduler = DPMSolverMultistepScheduler.from_config(kept.config)  # remembers earlier steps
    try:
        before = generator.generate(PROMPTS[0], seed=5, **FAST)
        calls = []
        hook = generator.pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(GenerationCancelled, match="after 3 of 8 steps") as caught: generator.generate(PROMPTS[1], num_inference_steps=8, progress=False, **stop_at(3))
        hook.remove()
        assert len(calls) == 3 and caught.value.details == {"step": 3, "total": 8} and isinstance(caught.value, MLError)
        assert generator.pipeline.scheduler is scheduler and same(before, generator.generate(PROMPTS[0], seed=5, **FAST))
    finally: generator.pipeline.scheduler = kept


def test_an_event_that_is_set_already_stops_before_the_first_step(exact):
    stop = threading.Event()
    stop.set()
    with refusing(exact.pipeline.text_encoder, AssertionError("it ran")), pytest.raises(GenerationCancelled, match="after 0 of 2"): exact.generate(PROMPTS[0], **FAST, cancel=stop)


def test_pictures_that_are_finished_outlive_a_cancelled_stream(exact, alone):
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
    with pytest.raises(MLError, match="would wait for itself"): exact.generate(PROMPTS[0], **FAST, callback=lambda *_: other.generate(PROMPTS[1], **FAST))
    assert not exact._turns.queue


# threads

def test_threads_take_turns_and_get_their_own_picture(four, alone):
    generator = four
    second = QuantizedSDXLGenerator(pipeline=generator.pipeline)
    at_once, most = [], []
    def watch(entered): at_once.append(1) if entered else at_once.pop(); most.append(len(at_once))
    hooks = [generator.pipeline.unet.register_forward_pre_hook(lambda *_: watch(True)), generator.pipeline.unet.register_forward_hook(lambda *_: watch(False))]
    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(lambda i: (generator, second)[i % 2].generate(PROMPTS[i % 3], seed=i % 3, **FAST), range(4)))
    for hook in hooks: hook.remove()
    assert all(same(alone(generator)[i % 3], image) and image.info["seed"] == i % 3 for i, image in enumerate(images)) and max(most) == 1


def test_cancelling_works_while_waiting(exact):
    running, go_on, stop = threading.Event(), threading.Event(), threading.Event()
    def hold(*_): running.set(); go_on.wait(20)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(exact.generate, PROMPTS[0], **FAST, callback=hold)
        assert running.wait(20)
        second = pool.submit(exact.generate, PROMPTS[1], **FAST, cancel=stop)
        stop.set()
        with pytest.raises(GenerationCancelled, match="after 0 of 2"): second.result(10)
        assert not first.done()
        go_on.set()
        assert first.result(20) and not exact._turns.queue


def test_a_long_job_lets_others_have_their_turn(exact):
    finished, asked = [], threading.Event()
    def other():
        asked.set()
        exact.generate(PROMPTS[2], num_inference_steps=1, progress=False)
        finished.append("other")
    stream = exact.generate_stream(PROMPTS * 2, num_inference_steps=1, progress=False, callback=lambda done, *_: done == 1 and (thread.start(), asked.wait(20)))
    thread = threading.Thread(target=other)
    for _ in stream: finished.append("stream")
    thread.join()
    assert finished.index("other") < 5


def test_close_waits_for_the_picture_and_gives_the_memory_back(cache):
    generator = QuantizedSDXLGenerator("tiny-sdxl", device="cpu", dtype=torch.float32, cache_dir=cache)
    unet, running = weakref.ref(generator.pipeline.unet), threading.Event()
    with generator, ThreadPoolExecutor(1) as pool:
        job = pool.submit(generator.generate, PROMPTS[0], **FAST, callback=lambda *_: running.set())
        running.wait(20)
        generator.close()
        assert job.done() and job.result().size == (64, 64)
    gc.collect()
    assert unet() is None and "closed" in repr(generator)
    for call in (lambda: generator.generate(PROMPTS[0]), lambda: generator.generate_batch(PROMPTS)):
        with pytest.raises(MLError, match="is closed"): call()


# what a file keeps

@pytest.fixture(scope="module")
def image(four):
    return four.generate("a red dress, süß 👗", "blue\nplain", seed=5, **FAST)


def test_settings_come_back_from_the_file_and_make_the_picture_again(image, four, tmp_path):
    path = tmp_path / "a.png"
    image.save(str(path))
    metadata = read_metadata(path)
    assert metadata == image.info and same(Image.open(path), image)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "seed")
    again = four.generate(**{n: metadata[n] for n in names}, progress=False)
    assert same(again, image) and {"torch", "diffusers", "transformers", "bitsandbytes"} == set(metadata["versions"])
    assert (metadata["model"], metadata["quantization"], metadata["device"], metadata["dtype"]) == ("tiny-sdxl", "nf4-dq", "cpu", "float32")
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
    assert Image.open(tmp_path / "a.jpg").size == (64, 64) and "written into PNG files only, not into a.jpg" in caplog.text


def test_a_file_appears_whole_or_not_at_all(image, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"the old one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError): image.save(path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"the old one" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_local_folder_is_named_without_its_path(tmp_path):
    folder = tmp_path / "secret" / "my-model"
    shutil.copytree(locate_model("tiny-sdxl"), folder)
    for generator in (QuantizedSDXLGenerator(str(folder), use_quantization=False, device="cpu"), QuantizedSDXLGenerator(pipeline=load_model(folder, device="cpu"))):
        image = generator.generate(PROMPTS[0], **FAST)
        image.save(tmp_path / "a.png")
        assert image.info["model"] == "my-model" and len(image.info["fingerprint"]) == 16 and image.info["revision"] is None
        assert b"secret" not in (tmp_path / "a.png").read_bytes() and "secret" not in repr(generator) + generator._repr_html_()
        with refusing(generator.pipeline.unet, ValueError("no")), pytest.raises(MLError) as caught: generator.generate(PROMPTS[0], **FAST)
        assert "secret" not in json.dumps(caught.value.to_dict())


def test_the_fingerprint_follows_the_weights(tmp_path):
    from devsky_nb.generation import fingerprint
    folder = shutil.copytree(locate_model("tiny-sdxl"), tmp_path / "copy")
    weights, known = Path(folder, "unet", "diffusion_pytorch_model.safetensors"), fingerprint(locate_model("tiny-sdxl"))
    assert fingerprint(folder) == known
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\0\0\0\1"
    weights.write_bytes(data)
    assert fingerprint(folder) != known


HOSTILE = {"no settings": {}, "another program": {"software": "other", "seed": "1"}, "no json": {"software": "devsky_nb 1", "seed": "x"}, "missing": {"software": "devsky_nb 1"},
           "deep": {"software": "devsky_nb 1", "num_inference_steps": "[" * 100_000}}


@pytest.mark.parametrize("chunks", HOSTILE.values(), ids=HOSTILE)
def test_files_of_others_are_refused(tmp_path, chunks):
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items(): info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValidationError, match="'a.png' has"): read_metadata(tmp_path / "a.png")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("this is text")
    with pytest.raises(ValidationError, match="'a.png' is no picture"): read_metadata(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValidationError): read_metadata(tmp_path / "cut.png")
