"PipelineGenerator on every kind of pipeline: the images are diffusers' own, what does not fit is refused, and memory that runs out costs no image."
import argparse, json, shutil, subprocess, sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from pretended_gpu import pretended
from safetensors.torch import save_file
from tiny_pipelines import assemble, save
from patience import PATIENCE

from devsky_nb import PipelineGenerator, QuantizedSDXLGenerator, load_image, load_model, load_quantized_pipeline
from devsky_nb.cli import lora_and_weight, main
from devsky_nb.diffusion.calls import denoiser, objection_to, size_multiple, stated_multiple, usual_size
from devsky_nb.diffusion.drawing import check_previews, patch_rows
from devsky_nb.diffusion.metadata import read_metadata
from devsky_nb.diffusion.siblings import fitting_size, image_hash, Inputs, make_job
from devsky_nb.diffusion.turns import switches_of
from devsky_nb.errors import DevSkyyError, InsufficientMemoryError, MLError, ValidationError
from devsky_nb.hub import load as loading
from devsky_nb.hub.registry import ModelRegistry

STATED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline", "FluxPipeline", "FluxKontextPipeline", "ChromaPipeline", "Flux2KleinPipeline")
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


@pytest.mark.parametrize("fit, mode", [("crop", "crop"), ("resize", "default")])
def test_an_image_of_any_size_is_fitted_with_its_mask_as_diffusers_does(generator, fit, mode, tmp_path):
    wide, half = PHOTO.resize((333, 217)), MASK.resize((333, 217))
    before = wide.tobytes(), half.tobytes()
    options = {"strength": .9, "num_inference_steps": 2, "progress": False}
    images = generator.generate_batch(["a coat", "a dress"], seeds=[1, 2], image=wide, mask_image=half, fit=fit, width=128, **options)
    assert (wide.tobytes(), half.tobytes(), images[0].size) == (*before, (128, 80))  # 217 · 128 / 333 = 83.4, and multiples of 4
    fitted = [VaeImageProcessor().resize(image, 80, 128, mode).convert(image.mode) for image in (wide, half)]
    theirs = generator.generate_batch(["a coat", "a dress"], seeds=[1, 2], image=fitted[0], mask_image=fitted[1], **options)
    assert all(map(same, images, theirs))
    images[1].save(tmp_path / "drawn.png")
    info = read_metadata(tmp_path / "drawn.png")
    assert info == images[1].info and (info["fit"], info["image_size"], info["image_hash"]) == (fit, [333, 217], image_hash(wide))
    assert theirs[0].info["fit"] is None and theirs[0].info["image_size"] == [128, 80]


@pytest.mark.parametrize("size, asked, expected", [((333, 217), (None, None), (316, 204)), ((4032, 3024), (None, None), (292, 220)), ((4032, 3024), (128, None), (128, 96)),
                                                   ((4032, 3024), (None, 96), (128, 96)), ((4032, 3024), (64, 96), (64, 96)), ((100, 100), (None, None), (100, 100)),
                                                   ((9000, 40), (None, None), (3840, 64)), ((40, 30), (None, None), (64, 64))])
def test_the_size_of_an_image_is_kept_unless_it_is_too_much_for_the_model(size, asked, expected, pipelines):
    assert usual_size(pipelines("FluxPipeline")) == (256, 256)
    assert fitting_size(pipelines("FluxPipeline"), size, 4, *asked) == expected


# --- what does not fit is refused before anything is drawn

@pytest.mark.parametrize("kind", [*USUAL, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_the_files_ask_for_the_multiple_that_the_pipeline_asks_for(kind, pipelines, folders):
    stated = stated_multiple(folders(kind))
    asked = size_multiple(pipelines(kind), prompt="a dress")
    assert stated == asked if kind in STATED else stated is None

LONG = "a red dress " * 300
WRONG = {  # class -> what is given, and what the error says
    "FluxPipeline": [({"width": 66}, "width=66: expected a multiple of 4"), ({"width": 8192}, "to 4096"), ({"num_inference_steps": 0}, "from 1 to 1000"),
                     ({"negative_prompt": "blue"}, "with true_cfg_scale=1.0"), ({"true_cfg_scale": 4}, "nothing to lead away from"),
                     ({"prompt": LONG}, "the model reads 512"), ({"prompt": ""}, "non-empty"), ({"guidance_scale": "7"}, "guidance_scale="),
                     ({"strength": .5}, "strength= needs image="), ({"mask_image": MASK}, "mask_image= needs image="), ({"seed": -1}, "seed="),
                     ({"num_images_per_prompt": 2}, "generate_batch"), ({"generator": None}, "use seed="), ({"prompt_2": "a"}, "all text encoders read"),
                     ({"image": PHOTO.crop((0, 0, 63, 64)), "width": None, "height": None}, "crop or resize it to 60×64"),
                     ({"image": PHOTO, "mask_image": MASK.resize((32, 32))}, "make them alike"), ({"image": PHOTO, "strength": 0}, "leaves none"),
                     ({"image": PHOTO, "strength": 1.5}, "from 0 to 1"), ({"image": PHOTO, "width": 128}, "width and height are those of image"),
                     ({"image": b"this is text"}, "image: a bytes is no image"), ({"fit": "crop"}, "fit= needs image="), ({"image": PHOTO, "fit": "fill"}, "one of crop, resize"),
                     ({"image": PHOTO, "fit": "crop", "width": 66, "height": None}, "width=66: expected a multiple of 4")],
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
    for prompt, given, words in (("a dress", {"num_inference_steps": 0}, "num_inference_steps=0"), (LONG, {}, "^prompt has"), ("a dress", {"width": 66}, "multiple of 4"),
                                 ("a dress", {"strength": .5}, "strength= needs image="), ("a dress", {"image": PHOTO, "strength": 2}, "strength=2"), ("a dress", {"seeds": []}, "a list of 1")):
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


OBJECTIONS = {"WanVideoToVideoPipeline": "makes videos", "CogVideoXVideoToVideoPipeline": "makes videos", "SanaVideoPipeline": "makes videos", "LTXPipeline": "makes videos",
              "StableAudio3Pipeline": "makes sounds", "QwenImageLayeredPipeline": "draws an image in several layers", "StableDiffusionLDM3DPipeline": "returns no images, but depth",
              "StableDiffusionAttendAndExcitePipeline": "needs token_indices", "FluxControlPipeline": "draws from a control image"}


@pytest.mark.parametrize("kind", OBJECTIONS)
def test_what_a_pipeline_returns_and_needs_says_whether_it_draws(kind): assert objection_to(getattr(diffusers, kind)).startswith(OBJECTIONS[kind])


@pytest.mark.parametrize("kind", ["FluxPipeline", "Flux2Pipeline", "QwenImageEditPipeline", "Kandinsky5T2IPipeline", "ChromaImg2ImgPipeline", "PixArtSigmaPipeline"])
def test_there_is_nothing_against_a_pipeline_that_draws(kind): assert objection_to(getattr(diffusers, kind)) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Kandinsky5T2IPipeline", "QwenImageEditPipeline"])
def test_a_pipeline_with_a_processor_draws_as_by_its_own_call(kind, tmp_path):
    pipeline = assemble(kind, tmp_path)
    if kind.startswith("Kandinsky"): pipeline.resolutions = [(64, 64), (96, 64)]  # not 1024 pixels
    given = {"image": PHOTO} if "Edit" in kind else {}
    seen, generator = [], PipelineGenerator(pipeline=pipeline)
    image = generator.generate("a red dress", seed=3, **FAST, **given, preview_every=1, callback=lambda *news: seen.append(news[2][0]))
    theirs = pipeline(prompt="a red dress", width=64, height=64, num_inference_steps=2, generator=seeded(3), **given)
    assert same(image, getattr(theirs, "images", None)[0] if hasattr(theirs, "images") else theirs.image[0]) and gap(seen[-1], image) <= 1
    together = generator.generate_batch(["a coat", "a red dress"], seeds=[1, 3], batch_size=2, **FAST, **given)
    assert gap(together[1], image) <= 2
    if not kind.startswith("Kandinsky"): return
    with pytest.raises(ValidationError, match="one of 64×64, 96×64"): generator.generate("a red dress", width=128, height=64, progress=False)


def test_a_processor_that_cannot_be_here_is_said_before_weights_are_read(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders("FluxPipeline"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "Qwen2VLProcessor"]}), encoding="utf-8")
    there = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "torchvision" else there(name))
    monkeypatch.setattr(loading, "load_part", lambda *_, **__: pytest.fail("weights were read"))
    options = {"device": "cpu", "cache_dir": tmp_path / "hub"}
    for ask in (lambda: load_quantized_pipeline(folder, **options), lambda: PipelineGenerator(folder, None, **options), lambda: load_model(folder, **options)):
        with pytest.raises(DevSkyyError, match="the tokenizer of 'model' is a Qwen2VLProcessor, which needs torchvision: run pip install torchvision"): ask()


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

@pytest.mark.parametrize("generator", ["FluxPipeline", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline", "Flux2KleinPipeline", "LatentConsistencyModelPipeline"))], indirect=True)
def test_previews_end_at_the_image(generator):
    seen = []
    image = generator.generate("a red dress", seed=2, **FAST, preview_every=1, callback=lambda *news: seen.append(news[2]))
    assert [list(previews) for previews in seen] == [[0], [0]] and not same(seen[0][0], image)
    if type(generator.pipeline).__name__ != "LatentConsistencyModelPipeline": assert same(seen[1][0], image)  # which decodes its last guess instead


def test_previews_that_cannot_be_are_refused(generator, monkeypatch):
    monkeypatch.setattr(generator.pipeline, "vae", diffusers.AutoencoderTiny(encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)))
    with pytest.raises(ValidationError, match="no previews of a FluxPipeline.*AutoencoderTiny.*leave preview_every out"): check_previews(generator.pipeline)


@pytest.mark.parametrize("count, width, height, rows", [(16, 64, 64, 4), (8, 128, 64, 2), (8, 64, 128, 4), (4056, 96, 64, 52), (7, 64, 64, 1), (1, 64, 4096, 1)])
def test_patches_lie_in_rows_of_nearly_the_shape_that_was_asked_for(count, width, height, rows): assert patch_rows(count, width, height) == rows


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
                                          ({"pipeline": 3, "quantize": "int8"}, "quantize: a loaded pipeline cannot"), ({"pipeline": 3, "backend": "torchao"}, "backend: a loaded"),
                                          ({"model": "tiny-sdxl", "use_4bit": True}, "there is no use_4bit= here: there are model, quantize"),
                                          ({"model": "tiny-clip"}, "only pipelines of diffusers are loaded here"), ({"model": "x.GGUF"}, "give the file for that network"), ({"model": "tiny-sdxl", "quantize": "int5"}, "nf4-dq"),
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


EARLY = [(["--steps", "0"], "--steps=0"), (["--steps", "2000"], "from 1 to 1000"), (["--strength", "2"], "--strength=2"), (["--batch-size", "0"], "--batch-size=0"), (["--image", "none.png"], "no such file"),
         (["--bits", "4", "--quantize", "nf4"], "give one of them"), (["--backend", "torchao"], "needs --quantize"), (["--backend", "torchao", "--quantize", "none"], "needs --quantize"),
         (["--quantize", "int4"], "--quantize='int4' needs --backend='torchao'"), (["--width", "65"], "--width=65: expected a multiple of 8 from 64 to 4096"), (["--height", "100"], "--height=100: expected a multiple of 8"),
         (["--device", "xyz"], "--device='xyz': no such device"), (["--strength", ".5"], "--strength needs --image: it says"), (["--mask", "MASK"], "--mask needs --image: it says"), (["--fit", "crop"], "--fit needs --image"),
         (["--image", "PHOTO", "--mask", "SMALL"], "--mask is 8×8, and image 70×64"), (["--seed", "-1"], "--seed=-1: expected"), (["--lora", "none.safetensors"], "--lora: no file or folder"), (["--lora", "PHOTO"], "--lora: 'photo.png' is no file of safetensors"),
         (["--lora", "style.bin"], "--lora: no file or folder"), (["--lora", "NONE"], "--lora: "), (["--model", "clip-vit-base"], "such as tiny-sdxl"), (["--model", "x.gguf"], "{'transformer': 'x.gguf'}")]
LATE = [(["--true-cfg", "4"], "--true-cfg=4.0 counts for nothing here: a StableDiffusionXLPipeline has --guidance alone"), (["--negative-prompt", "blue", "--guidance", "1"], "--negative-prompt counts for nothing with --guidance=1.0"),
        (["--image", "PHOTO", "--fit", "none"], "or give --fit='crop'"), (["--image", "PHOTO", "--width", "65"], "--width=65: expected")]


@pytest.mark.parametrize("given, words", [*EARLY, *LATE], ids=lambda value: " ".join(value) if isinstance(value, list) else "says")
def test_the_command_checks_its_arguments_before_weights_are_read(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("devsky_nb.hub.load.load_part", lambda *_, **__: pytest.fail("weights were read"))
    if (given, words) in EARLY: monkeypatch.setattr("devsky_nb.diffusion.generation.find_pipeline", lambda *_, **__: pytest.fail("diffusers was asked"))
    files = {"PHOTO": ("photo.png", PHOTO.resize((70, 64))), "MASK": ("mask.png", MASK), "SMALL": ("small.png", MASK.resize((8, 8)))}
    for name, image in files.values(): image.save(tmp_path / name)
    (tmp_path / "NONE").mkdir()
    given = [str(tmp_path / files[word][0]) if word in files else str(tmp_path / word) if word == "NONE" else word for word in given]
    assert main(["generate", "a dress", *(() if "--model" in given else ("--model", "tiny-sdxl")), "--out", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("devsky: ") and said.count("\n") == 1 and "prompt 0" not in said and not (tmp_path / "out").exists(), said


def test_wrong_arguments_are_found_before_torch_is_imported(tmp_path):
    calls = [["--width", "65"], ["--device", "xyz"], ["--strength", ".5"], ["--quantize", "int4"], ["--lora", "none.safetensors"], ["--model", "flux1-dev", "--device", "cpu"]]
    code = f"""import sys
from devsky_nb.cli import main
for given in {calls}:
    assert main(["generate", "a dress", *(() if "--model" in given else ("--model", "tiny-sdxl")), *given, "--cache-dir", "hub"]) == 2, given
print([name for name in ("torch", "transformers", "diffusers") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout == "[]\n", (done.stdout, done.stderr)
    assert done.stderr.count("\n") == len(calls) and "or try things out with `--model tiny-sdxl`" in done.stderr


@pytest.mark.parametrize("text, expected", [("a.safetensors", ("a.safetensors", 1.)), ("a.safetensors:0.8", ("a.safetensors", .8)), ("someone/style:-2", ("someone/style", -2.)), ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.)),
                                            ("C:\\a.safetensors:.5", ("C:\\a.safetensors", .5)), ("loras:x/a.safetensors", ("loras:x/a.safetensors", 1.)), ("a:11", None), ("a:nan", None), ("a:", None), ("a:b", None), ("", None)])
def test_a_weight_stands_behind_the_last_colon(text, expected):
    if expected: assert lora_and_weight(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError): lora_and_weight(text)


@pytest.mark.slow
def test_the_command_fits_a_photo_and_draws_with_loras(tmp_path, capsys, caplog):
    PHOTO.resize((333, 217)).save(tmp_path / "photo.png")
    pipeline = load_model("tiny-sdxl", device="cpu", dtype=torch.float32)
    for folder, wrong in (("one", 0), ("two", 0), ("three", 1)):
        name = next(name for name, layer in pipeline.unet.named_modules() if name.endswith("to_q"))
        layer = pipeline.unet.get_submodule(name)
        pair = {f"unet.{name}.lora_A.weight": torch.ones(2, layer.in_features + wrong), f"unet.{name}.lora_B.weight": torch.ones(layer.out_features, 2)}
        (tmp_path / folder).mkdir()
        save_file(pair, tmp_path / folder / "style.safetensors")
    common = ["generate", "a coat", "--model", "tiny-sdxl", "--device", "cpu", "--steps", "4", "--seed", "1", "--json", "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "hub"), "--image", str(tmp_path / "photo.png")]
    assert main([*common, "--lora", str(tmp_path / "one" / "style.safetensors:.5"), "--lora", str(tmp_path / "two")]) == 0
    done = capsys.readouterr()
    assert not [record for record in caplog.records if "LoRA" in record.message], "it has none for the text encoders, as most have"
    assert "photo.png is 333×217: cropped and resized to 76×64. --width and --height ask for another size" in done.err and "peft" not in done.err
    [file] = json.loads(done.out)["files"]
    info = read_metadata(file["path"])
    assert {name: info[name] for name in file if name != "path"} == {name: value for name, value in file.items() if name != "path"}
    assert [(one["name"], one["weight"], one["file"]) for one in file["adapters"]] == [("lora-1", .5, "style.safetensors"), ("lora-2", 1., "style.safetensors")]
    assert (file["width"], file["height"], file["image_size"], file["fit"]) == (76, 64, [333, 217], "crop")
    assert main([*common, "--lora", str(tmp_path / "three"), "--quiet"]) == 3 and "--lora: 'style.safetensors': the LoRA cannot be loaded" in capsys.readouterr().err
