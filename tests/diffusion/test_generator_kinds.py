"PipelineGenerator on every kind of pipeline: the images are diffusers' own, what does not fit is refused, and memory that runs out costs no image."
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pretended_gpu import pretended
from tiny_pipelines import save

from devsky_nb import PipelineGenerator, QuantizedSDXLGenerator, load_image, load_model, load_quantized_pipeline
from devsky_nb.cli import main
from devsky_nb.diffusion.calls import denoiser
from devsky_nb.diffusion.metadata import read_metadata
from devsky_nb.diffusion.siblings import Inputs, make_job
from devsky_nb.diffusion.turns import switches_of
from devsky_nb.errors import InsufficientMemoryError, MLError, ValidationError
from devsky_nb.hub.registry import ModelRegistry

USUAL = ("StableDiffusionPipeline", "FluxPipeline", "StableDiffusion3Pipeline")
SLOW = ("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline", "QwenImagePipeline", "ChromaPipeline", "ZImagePipeline",
        "Flux2KleinPipeline", "FluxKontextPipeline", "AuraFlowPipeline", "CogView4Pipeline", "Lumina2Pipeline", "SanaPipeline", "PixArtAlphaPipeline")
KINDS = [*USUAL, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
FROM_IMAGES = ["FluxPipeline", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "QwenImagePipeline", "ChromaPipeline", "ZImagePipeline"))]
CHAT = "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
FAST = {"width": 64, "height": 64, "num_inference_steps": 2, "progress": False}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((32, 0), (0, 0))))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "Folders of pipelines by class, made when they are asked for."
    made = {}
    def folder(kind):
        if kind not in made: made[kind] = save(kind, tmp_path_factory.mktemp("pipeline") / "model")
        return made[kind]
    return folder


@pytest.fixture(scope="session")
def pipelines(folders):
    "Pipelines in float32 on the CPU, by class; not to be changed."
    made = {}
    def pipeline(kind):
        if kind not in made:
            made[kind] = load_quantized_pipeline(folders(kind), None, device="cpu", dtype=torch.float32)
            if kind.startswith(("ZImage", "Flux2")): made[kind].tokenizer.chat_template = CHAT
            made[kind].set_progress_bar_config(disable=True)
        return made[kind]
    return pipeline


@pytest.fixture
def generator(pipelines, request):
    return PipelineGenerator(pipeline=pipelines(getattr(request, "param", "FluxPipeline")))


def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


def gap(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class refusing:
    "The real network, which fails on a condition."
    def __init__(self, network, error, when=lambda x: True): self.network, self.error, self.when = network, error, when
    def __enter__(self): self.hook = self.network.register_forward_pre_hook(self.check)
    def __exit__(self, *_): self.hook.remove()
    def check(self, network, args, *_):
        if self.when(args[0] if args else None): raise self.error


# --- the images are the pipeline's own

@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_one_of_the_pipelines_own_call(kind, pipelines):
    pipeline = pipelines(kind)
    with PipelineGenerator(pipeline=pipeline) as generator:
        seen = []
        image = generator.generate("a red dress", seed=3, **FAST, callback=lambda *news: seen.append(news[:2]))
        theirs = pipeline(prompt="a red dress", width=64, height=64, num_inference_steps=2, generator=seeded(3)).images[0]
        assert same(image, theirs) and seen == [(1, 2), (2, 2)]
        assert image.info["pipeline"] == kind and (image.info["width"], image.info["height"]) == image.size
        again = generator.generate(**{name: image.info.get(name) for name in ("prompt", "negative_prompt", "num_inference_steps", "width", "height", "seed")
                                      if image.info.get(name) is not None}, guidance_scale=image.info.get("guidance_scale"), progress=False)
        assert same(image, again)


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*USUAL[:2], *SLOW[:-2]))])  # the last two draw 1024 pixels
def test_a_seed_is_an_images_own_whatever_the_batch(kind, pipelines):
    generator, prompts = PipelineGenerator(pipeline=pipelines(kind)), ["a red dress", "a coat"]
    alone = [generator.generate(prompt, seed=seed, **FAST) for seed, prompt in enumerate(prompts)]
    listed = generator.generate_batch(prompts[::-1], seeds=[1, 0], **FAST)
    together = generator.generate_batch(prompts, seeds=[0, 1], batch_size=2, **FAST)
    assert same(alone[0], listed[1]) and same(alone[1], listed[0])
    if kind.startswith("Lumina2") or kind == "ZImagePipeline": return  # texts of a batch are padded alike, which random weights read
    assert max(map(gap, alone, together)) <= 2 and [image.info["seed"] for image in together] == [0, 1]


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("kind", FROM_IMAGES)
def test_an_image_from_an_image_is_the_siblings_own(kind, task, pipelines):
    if (kind, task) == ("StableDiffusion3Pipeline", "Inpaint"): pytest.skip("that sibling wants a network with 16 channels")
    if (kind, task) == ("ChromaPipeline", "Inpaint"): pytest.skip("that sibling of diffusers reads a setting that no Chroma has")
    pipeline = pipelines(kind)
    given = {"image": PHOTO, "strength": .75} | ({"mask_image": MASK} if task == "Inpaint" else {})
    generator = PipelineGenerator(pipeline=pipeline)
    options = {"num_inference_steps": 4, "progress": False}
    seen = []
    image = generator.generate("a red dress", seed=3, **given, **options, callback=lambda *news: seen.append(news[:2]))
    sibling = getattr(diffusers, kind.replace("Pipeline", f"{task}Pipeline"))(**pipeline.components)
    sibling.set_progress_bar_config(disable=True)
    sized = {} if kind.startswith("StableDiffusion") and "3" not in kind and task == "Img2Img" else {"width": 64, "height": 64}
    theirs = sibling(prompt="a red dress", num_inference_steps=4, generator=seeded(3), **given, **sized).images[0]
    assert same(image, theirs) and seen == [(step, 3) for step in (1, 2, 3)]
    assert image.info["pipeline"] == type(sibling).__name__ and image.info["strength"] == .75
    assert len(image.info["image_hash"]) == 64 and (image.info["mask_hash"] is None) == (task == "Img2Img")
    together = generator.generate_batch(["a red dress", "a coat"], seeds=[3, 4], batch_size=2, **given, **options)
    if kind != "ZImagePipeline": assert gap(together[0], image) <= 2
    assert all(getattr(pipeline, name) is part for name, part in sibling.components.items())


OWN = {"StableDiffusion3InpaintPipeline": {"strength": .75, "mask_image": MASK, "width": 64, "height": 64}, "FluxFillPipeline": {"mask_image": MASK, "width": 64, "height": 64},
       "StableDiffusionInpaintPipeline": {"mask_image": MASK, "strength": .75}, "StableDiffusionXLImg2ImgPipeline": {"strength": .75},
       "StableDiffusionInstructPix2PixPipeline": {}, "StableDiffusionControlNetPipeline": {}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN)
def test_a_pipeline_that_begins_with_an_image_draws_by_itself(kind, pipelines):
    pipeline, options = pipelines(kind), {"num_inference_steps": 4, "image": PHOTO} | OWN[kind]
    image = PipelineGenerator(pipeline=pipeline).generate("a red dress", seed=3, progress=False, **options)
    assert same(image, pipeline(prompt="a red dress", generator=seeded(3), **options).images[0]) and image.info["pipeline"] == kind


def test_an_image_from_a_file_or_memory_is_the_same_and_its_hash_is_kept(generator, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    options = {"prompt": "a coat", "strength": .5, "seed": 1, "num_inference_steps": 2, "progress": False}
    images = [generator.generate(image=source, **options) for source in (load_image(tmp_path / "photo.png")[0], load_image(np.asarray(PHOTO))[0], PHOTO)]
    assert all(same(images[0], image) and image.info == images[0].info for image in images)
    images[0].save(tmp_path / "drawn.png")
    assert read_metadata(tmp_path / "drawn.png") == images[0].info and b"photo.png" not in (tmp_path / "drawn.png").read_bytes()
    other = generator.generate(image=PHOTO.rotate(90), **options)
    assert other.info["image_hash"] != images[0].info["image_hash"] and not same(other, images[0])


# --- what does not fit is refused before anything is drawn

LONG = "a red dress " * 300
WRONG = {  # class -> what is given, and what the error says
    "FluxPipeline": [({"width": 66}, "width=66: expected a multiple of 4"), ({"width": 8192}, "to 4096"), ({"num_inference_steps": 0}, "from 1 to 1000"),
                     ({"negative_prompt": "blue"}, "with true_cfg_scale=1.0"), ({"true_cfg_scale": 4}, "nothing to lead away from"),
                     ({"prompt": LONG}, "the model reads 512"), ({"prompt": ""}, "non-empty"), ({"guidance_scale": "7"}, "guidance_scale="),
                     ({"strength": .5}, "a FluxPipeline takes none"), ({"mask_image": MASK}, "mask_image= needs image="), ({"seed": -1}, "seed="),
                     ({"num_images_per_prompt": 2}, "generate_batch"), ({"generator": None}, "use seed="), ({"prompt_2": "a"}, "all text encoders read"),
                     ({"image": PHOTO.crop((0, 0, 63, 64)), "width": None, "height": None}, "crop or resize it to 60×64"),
                     ({"image": PHOTO, "mask_image": MASK.resize((32, 32))}, "make them alike"), ({"image": PHOTO, "strength": 0}, "leaves none"),
                     ({"image": PHOTO, "strength": 1.5}, "from 0 to 1"), ({"image": PHOTO, "width": 128}, "width and height are those of image"),
                     ({"image": b"this is text"}, "image: a bytes is no image")],
    "StableDiffusion3Pipeline": [({"width": 72}, "expected a multiple of 16"), ({"width": 1600}, "to 1536"), ({"prompt": LONG}, "the model reads 256"),
                                 ({"true_cfg_scale": 2.}, "guidance_scale= alone"), ({"negative_prompt": "blue", "guidance_scale": 1}, "guidance_scale=1.0")],
    "StableDiffusionPipeline": [({"width": 63}, "expected a multiple of 8"), ({"prompt": "a red dress " * 30}, "the model reads 77"), ({"max_sequence_length": 9}, "there is no max_sequence_length=")],
    "ChromaPipeline": [({"width": 66}, "multiple of 4"), ({"prompt": LONG}, "the model reads 512")],
    "LatentConsistencyModelPipeline": [({"negative_prompt": "blue"}, "takes no negative_prompt")],
    "QwenImagePipeline": [({"guidance_scale": 3}, "has true_cfg_scale="), ({"width": 72}, "multiple of 16")],
    "CogView4Pipeline": [({"width": 72}, "multiple of 16"), ({"image": PHOTO}, "no pipeline of the kind of CogView4Pipeline")],
    "SanaPipeline": [({"width": 80}, "multiple of 32")],
    "ZImagePipeline": [({"width": 1024}, "to 512"), ({"prompt": LONG}, "the model reads")],
    "FluxFillPipeline": [({}, "give image= and mask_image="), ({"image": PHOTO}, "needs mask_image=")],
    "StableDiffusionImg2ImgPipeline": [({}, "draws from an image: give image=")],
    "StableDiffusionControlNetPipeline": [({}, "itself refuses: image must be passed")],
}
CASES = [pytest.param(kind, given, words, marks=() if kind in USUAL else pytest.mark.slow) for kind, cases in WRONG.items() for given, words in cases]


@pytest.mark.parametrize("kind, given, words", CASES, ids=lambda value: " and ".join(value) if isinstance(value, dict) else str(value))
def test_what_a_pipeline_does_not_take_is_named_before_it_runs(kind, given, words, pipelines):
    generator = PipelineGenerator(pipeline=pipelines(kind))
    with refusing(generator.pipeline.text_encoder, AssertionError("it ran")), refusing(generator.pipeline.vae.encoder, AssertionError("it ran")):
        with pytest.raises(ValidationError) as caught: generator.generate(**{"prompt": "a red dress"} | FAST | given)
    assert words in caught.value.message and caught.value.details


def test_a_network_in_training_mode_is_refused(pipelines):
    network = pipelines("FluxPipeline").text_encoder_2.train()
    try:
        with pytest.raises(ValidationError, match="text_encoder_2 is in training mode"): PipelineGenerator(pipeline=pipelines("FluxPipeline"))
    finally: network.eval()


def test_a_request_is_checked_without_weights(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("devsky_nb.hub.load.load_part", lambda *_, **__: pytest.fail("weights were read"))
    check = lambda *prompts, **options: PipelineGenerator.check(folders("FluxPipeline"), list(prompts), cache_dir=tmp_path / "hub", **options)
    assert check("a dress", "a coat", seeds=[1, 2], width=64)[1] == {"prompt": "a coat", "negative_prompt": None, "num_inference_steps": 28, "guidance_scale": 3.5,
                                                                     "width": 64, "height": 256, "seed": 2}
    for prompt, given, words in (("a dress", {"num_inference_steps": 0}, "num_inference_steps=0"), (LONG, {}, "prompt 0: prompt has"), ("a dress", {"width": 66}, "multiple of 4"),
                                 ("a dress", {"strength": .5}, "takes none"), ("a dress", {"image": PHOTO, "strength": 2}, "strength=2"), ("a dress", {"seeds": []}, "a list of 1")):
        with pytest.raises(ValidationError, match=words): check(prompt, **given)


def test_what_load_image_would_change_is_sent_there(generator):
    lying = PHOTO.copy()
    lying.getexif()[0x0112] = 6
    clear = PHOTO.convert("P")
    clear.info["transparency"] = 0
    for image, words in (("photo.png", "a str is no image"), (np.asarray(PHOTO), "a ndarray is no image"), (PHOTO.convert("RGBA"), "in mode RGBA"),
                         (PHOTO.convert("CMYK"), "in mode CMYK"), (clear, "in mode P"), (lying, "lies on its side")):
        with pytest.raises(ValidationError, match=words + ".*load_image"): generator.generate("a dress", image=image, **FAST)
        with pytest.raises(ValidationError, match="^mask_image: .*load_image"): generator.generate("a dress", image=PHOTO, mask_image=image, **FAST)


def test_a_negative_prompt_counts_where_it_is_taken(generator):
    plain, led = (generator.generate("a red dress", *negative, seed=1, **FAST, true_cfg_scale=scale) for negative, scale in (((), None), (("a coat",), 4.)))
    theirs = generator.pipeline("a red dress", negative_prompt="a coat", true_cfg_scale=4., width=64, height=64, num_inference_steps=2, generator=seeded(1)).images[0]
    assert same(led, theirs) and not same(led, plain) and led.info["true_cfg_scale"] == 4. and "true_cfg_scale" not in plain.info


def test_a_model_that_was_distilled_takes_no_guidance(pipelines):
    pipeline = pipelines("FluxPipeline")
    pipeline.transformer.register_to_config(guidance_embeds=False)
    try:
        generator = PipelineGenerator(pipeline=pipeline)
        with pytest.raises(ValidationError, match="guidance_scale=3.5 counts for nothing here"): generator.generate("a dress", guidance_scale=3.5, **FAST)
        assert make_job(pipeline, Inputs(), "a dress").settings.guidance_scale is None
    finally: pipeline.transformer.register_to_config(guidance_embeds=True)


@pytest.mark.parametrize("kind, words", [("WanPipeline", "makes videos"), pytest.param("KandinskyV22Pipeline", "draws from no text", marks=pytest.mark.slow)])
def test_what_draws_no_image_is_refused_before_it_is_loaded(kind, words, folders, tmp_path, monkeypatch):
    folder = folders(kind)
    monkeypatch.setattr("devsky_nb.diffusion.load.load_network", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValidationError, match=f"a {kind} {words}: load it with load_quantized_pipeline"):
        PipelineGenerator(folder, device="cpu", cache_dir=tmp_path / "hub")


# --- memory that runs out

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("generator", ["FluxPipeline", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "ChromaPipeline"))], indirect=True)
def test_decoding_steps_down_without_denoising_again(generator):
    pipeline, seen, steps = generator.pipeline, [], []
    network, before = denoiser(pipeline), switches_of(pipeline)
    hooks = [network.register_forward_pre_hook(lambda *_: steps.append(1)),
             pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))]
    roomy = generator.generate("a red dress", seed=0, **FAST)
    taken, whole = len(steps), seen[0]
    with refusing(pipeline.vae.decoder, OUT, lambda z: z.shape[-1] > whole // 2):
        tiled = generator.generate("a red dress", seed=0, **FAST)
    for hook in hooks: hook.remove()
    assert tiled.info["stepped_down"] == ["VAE tiles of 32 px"] and tiled.size == (64, 64) and len(steps) == 2 * taken
    assert switches_of(pipeline) == before and "decode" not in vars(pipeline.vae)
    assert not same(tiled, roomy) and same(roomy, generator.generate("a red dress", seed=0, **FAST))


def test_a_batch_is_sliced_and_then_halved(generator):
    prompts = ["a red dress", "a coat"]
    alone = [generator.generate(prompt, seed=seed, **FAST) for seed, prompt in enumerate(prompts)]
    with refusing(generator.pipeline.vae.decoder, MemoryError(), lambda z: len(z) > 1):
        sliced = generator.generate_batch(prompts, seeds=[0, 1], batch_size=2, **FAST)
    transformer = generator.pipeline.transformer
    run, done = transformer.forward, []
    def forward(*args, **kwargs):
        if len(kwargs["hidden_states"]) > 1: raise OUT
        return run(*args, **kwargs)
    transformer.forward = forward
    try: halved = generator.generate_batch(prompts, seeds=[0, 1], batch_size=2, **FAST, callback=lambda *news: done.append(news[:2]))
    finally: del transformer.forward
    assert sliced[0].info["stepped_down"] == ["VAE slicing"] and halved[0].info["stepped_down"] == ["batches of 1"]
    assert max(map(gap, alone, sliced)) <= 1 and all(map(same, alone, halved)) and done == [(step, 4) for step in (1, 2, 3, 4)]


def test_when_nothing_is_left_it_says_what_was_tried_and_the_next_image_is_whole(generator):
    before = generator.generate("a red dress", seed=0, **FAST)
    with refusing(generator.pipeline.vae.decoder, OUT), pytest.raises(InsufficientMemoryError, match="tried VAE tiles of 32 px, VAE tiles of 16 px") as caught:
        generator.generate("a red dress", seed=0, **FAST)
    assert caught.value.details["stage"] == "decoding" and caught.value.original_error is OUT
    with refusing(generator.pipeline.vae.encoder, OUT), pytest.raises(InsufficientMemoryError) as caught:
        generator.generate("a red dress", image=PHOTO, seed=0, num_inference_steps=2, progress=False)
    assert caught.value.details["stage"] == "encoding"
    with refusing(generator.pipeline.text_encoder, ValueError("broken")), pytest.raises(MLError, match="denoising failed: broken"):
        generator.generate("a red dress", seed=0, **FAST)
    assert same(before, generator.generate("a red dress", seed=0, **FAST))


def test_on_a_gpu_networks_wait_in_main_memory_when_all_else_failed(folders, tmp_path):
    with pretended("cuda"):
        options = {"dtype": torch.bfloat16, "cache_dir": tmp_path / "hub", "offline": True}
        with PipelineGenerator(folders("StableDiffusionPipeline"), None, device="cuda", **options) as generator:
            roomy, failed = generator.generate("a red dress", seed=0, **FAST), []
            with refusing(generator.pipeline.vae.decoder, OUT, lambda z: len(failed) < 3 and not failed.append(1)):
                stepped = generator.generate("a red dress", seed=0, **FAST)
            assert stepped.info["stepped_down"] == ["VAE tiles of 32 px", "VAE tiles of 16 px", "model offload"] and roomy.info["stepped_down"] == []
            assert generator.generate("a red dress", seed=0, **FAST).info["stepped_down"] == ["model offload"]
            assert generator.generate("a red dress", image=PHOTO, seed=0, num_inference_steps=2, progress=False).info["device"].startswith("cuda")


# --- watching

@pytest.mark.parametrize("generator", ["FluxPipeline", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline", "LatentConsistencyModelPipeline"))], indirect=True)
def test_previews_end_at_the_image(generator):
    seen = []
    image = generator.generate("a red dress", seed=2, **FAST, preview_every=1, callback=lambda *news: seen.append(news[2]))
    assert [list(previews) for previews in seen] == [[0], [0]] and not same(seen[0][0], image)
    if type(generator.pipeline).__name__ != "LatentConsistencyModelPipeline": assert same(seen[1][0], image)  # which decodes its last guess instead


@pytest.mark.slow
def test_previews_that_cannot_be_are_refused(pipelines):
    generator = PipelineGenerator(pipeline=pipelines("Flux2KleinPipeline"))
    with pytest.raises(ValidationError, match="there are no previews of a Flux2KleinPipeline"):
        generator.generate("a dress", **FAST, preview_every=1, callback=print)


def test_a_job_stops_between_steps_and_leaves_nothing(generator):
    before, done = generator.generate("a red dress", seed=0, **FAST), []
    with pytest.raises(MLError, match="cancelled after 2 of 4 steps"):
        generator.generate("a coat", image=PHOTO, strength=1, num_inference_steps=4, progress=False, callback=lambda step, *_: done.append(step), cancel=lambda: bool(done) and done[-1] == 2)
    assert same(before, generator.generate("a red dress", seed=0, **FAST))


# --- one pipeline for all who ask for the same

def test_the_same_weights_are_in_memory_once(folders, tmp_path):
    registry = ModelRegistry(tmp_path / "hub", device="cpu", offline=True)
    options = {"dtype": torch.float32, "registry": registry}
    first, second = (PipelineGenerator(folders("FluxPipeline"), "int8", **options) for _ in range(2))
    by_name = PipelineGenerator(folders("FluxPipeline"), {"transformer": "int8", "text_encoder_2": "int8", "text_encoder": "int8"}, **options)
    other = PipelineGenerator(folders("FluxPipeline"), {"transformer": "int8"}, **options)
    plain = PipelineGenerator(folders("FluxPipeline"), None, **options)
    assert first.pipeline is second.pipeline is by_name.pipeline and len({id(g.pipeline) for g in (first, other, plain)}) == 3
    assert (first.label, other.label, plain.label) == ("int8", "int8", "float32") and plain.pipeline is registry.get_model(folders("FluxPipeline"), dtype=torch.float32)
    image = first.generate("a red dress", seed=1, **FAST)
    assert image.info["quantization"] == "int8" and "bitsandbytes" in image.info["versions"] and image.info["model"] == "model"
    for generator in (first, second, by_name, other, plain): generator.close()
    assert "leased" not in repr(registry)
    with pytest.raises(MLError, match="is closed"): first.generate("a dress")


def test_both_generators_share_an_sdxl(tmp_path):
    registry = ModelRegistry(tmp_path / "hub", device="cpu", offline=True)
    options = {"dtype": torch.float32, "registry": registry}
    sdxl, general = QuantizedSDXLGenerator("tiny-sdxl", use_4bit=False, **options), PipelineGenerator("tiny-sdxl", "int8", **options)
    assert sdxl.pipeline is general.pipeline
    short = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 5., "progress": False}
    assert same(sdxl.generate("a red dress", **short), general.generate("a red dress", **short))
    assert general.generate("a red dress", image=PHOTO, **short | {"num_inference_steps": 4}).info["pipeline"] == "StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(ValidationError, match="use PipelineGenerator, which takes image="): sdxl.generate("a dress", image=PHOTO)


@pytest.mark.parametrize("given, words", [({}, "name a model, or give a pipeline"), ({"pipeline": 3}, "must be a pipeline of diffusers, not int"),
                                          ({"model": "tiny-clip"}, "is no pipeline"), ({"model": "tiny-sdxl", "quantize": "int5"}, "nf4-dq"),
                                          ({"model": "tiny-sdxl", "quantize": {"transformer": "nf4"}}, "no network 'transformer'"),
                                          ({"model": "tiny-sdxl", "load_in_4bit": True}, "load_in_4bit"), ({"model": "tiny-sdxl", "low_memory": 1}, "low_memory=1")])
def test_the_constructor_refuses_what_makes_no_sense(given, words, tmp_path):
    with pytest.raises(ValidationError, match=words): PipelineGenerator(device="cpu", cache_dir=tmp_path / "hub", **given) if "pipeline" not in given else PipelineGenerator(**given)


# --- from a terminal

def test_a_kept_copy_is_announced_when_it_is_made_and_quiet_means_silence(tmp_path, capsys):
    PHOTO.save(tmp_path / "photo.png")
    command = ["generate", "a red dress", "--model", "tiny-sdxl", "--device", "cpu", "--steps", "1", "--out", str(tmp_path), "--cache-dir", str(tmp_path / "hub")]
    said = []
    for more in ([], [], ["--quiet", "--image", str(tmp_path / "photo.png"), "--strength", "1"]):
        assert main([*command, *more]) == 0
        said.append(capsys.readouterr().err)
    assert ["kept for the next time: tiny-sdxl-nf4-dq-" in text for text in said] == [True, False, False]
    assert said[2] == ""


@pytest.mark.slow
def test_the_command_draws_with_any_pipeline_and_from_images(folders, tmp_path, capsys):
    PHOTO.save(tmp_path / "photo.png")
    MASK.save(tmp_path / "mask.png")
    common = ["--model", str(folders("FluxPipeline")), "--device", "cpu", "--steps", "2", "--seed", "1", "--quiet", "--json", "--cache-dir", str(tmp_path / "hub")]
    for more, kind in (([], "FluxPipeline"), (["--image", str(tmp_path / "photo.png"), "--strength", "1"], "FluxImg2ImgPipeline"),
                       (["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--quantize", "none"], "FluxInpaintPipeline")):
        assert main(["generate", "a red dress", *common, *more, "--out", str(tmp_path / kind)]) == 0
        [file] = json.loads(capsys.readouterr().out)["files"]
        info = read_metadata(file["path"])
        assert info["pipeline"] == kind and info["quantization"] == ("float32" if "none" in more else info["quantization"])


@pytest.mark.parametrize("given, words", [(["--steps", "0"], "--steps=0"), (["--steps", "2000"], "from 1 to 1000"), (["--true-cfg", "4"], "--true-cfg=4.0 counts for nothing"), (["--strength", "2"], "--strength=2"), (["--batch-size", "0"], "--batch-size=0"), (["--image", "none.png"], "no such file"),
                                          (["--bits", "4", "--quantize", "nf4"], "give one of them"), (["--backend", "torchao"], "needs --quantize"), (["--width", "100"], "multiple of")])
def test_the_command_checks_its_arguments_before_weights_are_read(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("devsky_nb.hub.load.load_part", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["generate", "a dress", "--model", "tiny-sdxl", "--out", str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
