"How the two models in the wheel were made: what the training notebooks define, at a tiny size, and the committed files."
import ast, hashlib, json, os, subprocess, sys, types
from pathlib import Path

import nbformat, numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from devsky_nb import CLIPImageEmbedder, ValidationError, render_garment
from devsky_nb.demo.garments import KINDS, sample_garments, split_garments
from devsky_nb.hub.locate import locate_model

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs" / "training"


def is_definition(node):
    "Imports, functions, classes and constants: what a notebook defines, without what it tries out."
    if isinstance(node, ast.Assign): return all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets)
    if isinstance(node, ast.With): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in node.body)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def definitions(name):
    "A notebook as a module, without running its examples."
    cells = nbformat.read(NOTEBOOKS / name, as_version=4).cells
    tree = ast.parse("\n".join(c.source for c in cells if c.cell_type == "code"))
    tree.body = [node for node in tree.body if is_definition(node)]
    module = sys.modules[Path(name).stem] = types.ModuleType(Path(name).stem)
    exec(compile(tree, name, "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def clip(): return definitions("01_tiny_clip.ipynb")


@pytest.fixture(scope="module")
def sdxl(): return definitions("02_tiny_sdxl.ipynb")


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
    "Two runs of the same short training."
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    short = {"steps": 5, "renders": 2, "batch": 12, "garments": sample_garments(12), "progress": False}
    return folders, [clip.train_tiny_clip(f, **short) for f in folders]


@pytest.fixture(scope="module")
def committed():
    "The model of the wheel as transformers loads it, and its tokenizer."
    folder = locate_model("tiny-clip")
    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- the tokenizer

def test_tokenizer_round_trips_captions_and_is_the_committed_one(clip, committed):
    built, (_, tokenizer) = clip.build_tokenizer(), committed
    assert all(clip.build_tokenizer().get_vocab() == built.get_vocab() for _ in range(3))  # ties are broken the same way each time
    for garment in split_garments("all"):
        ids = built(garment.caption).input_ids
        assert ids == tokenizer(garment.caption).input_ids
        assert ids[0] == built.bos_token_id and ids[-1] == built.eos_token_id
        assert built.decode(ids, skip_special_tokens=True).replace("t - shirt", "t-shirt") == garment.caption
        assert len(ids) <= 2 + len(garment.caption.replace("-", " - ").split())  # each word is one token


def test_both_models_and_both_notebooks_use_the_same_words(clip, sdxl):
    pipeline = sdxl.build_pipeline(sdxl.build_vae())
    small, large = clip.build_tokenizer(), pipeline.tokenizer
    saved = CLIPTokenizer.from_pretrained(locate_model("tiny-sdxl") / "tokenizer")
    assert set(small.get_vocab()) == set(large.get_vocab()) == set(saved.get_vocab())
    assert large.model_max_length == saved.model_max_length == 77
    for garment in sample_garments(40, split="all"):
        assert small(garment.caption).input_ids == large(garment.caption).input_ids == saved(garment.caption).input_ids
    texts = [[m.caption_text(garment, np.random.default_rng(seed)) for seed,
              garment in enumerate(split_garments("all"))] for m in (clip, sdxl)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("text", ["", " ", "\x00", "👗🧵", "ÄÖÜ ß 北京 العربية", "a" * 10_000, "<|endoftext|>", "<|startoftext|> a hat",
                                  "\ud7ff\u200b\ufeff", "t-shirt\n\t<b>&amp;</b>", "'; DROP TABLE", "e\u0301" * 50])
def test_any_text_becomes_a_finite_vector(committed, text):
    model, tokenizer = committed
    tokens = tokenizer([text, "a hat"], padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape[1] <= 32 and tokens.input_ids.max() < model.config.text_config.vocab_size
    with torch.inference_mode(): assert torch.isfinite(model.get_text_features(**tokens).pooler_output).all()


def test_padding_does_not_change_a_text(committed):
    model, tokenizer = committed
    def vectors(*texts):
        with torch.inference_mode():
            return model.get_text_features(**tokenizer(list(texts), padding=True, return_tensors="pt")).pooler_output
    assert torch.allclose(vectors("a hat")[0], vectors("a hat", "a photo of a red striped t-shirt on a grey ground")[0], atol=1e-5)


# ---------------------------------------------------------------- the committed models

@pytest.mark.parametrize("name, notebook, most_bytes",
                         [("tiny-clip", "01_tiny_clip.ipynb", 6_000_000), ("tiny-sdxl", "02_tiny_sdxl.ipynb", 12_000_000)])
def test_committed_files_match_their_recipe(name, notebook, most_bytes):
    folder = locate_model(name)
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    weights = sorted(folder.rglob("*.safetensors"))
    assert recipe["sha256"] == {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}
    assert sum(f.stat().st_size for f in folder.rglob("*")) < most_bytes
    assert (recipe["model"], recipe["license"]) == (name, "Apache-2.0")
    assert {t.dtype for p in weights for t in load_file(p).values() if t.is_floating_point()} == {torch.float16}
    assert not [f.name for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    made_in, function = recipe["made_by"].split(": ")
    assert made_in == f"nbs/training/{notebook}" and callable(getattr(definitions(notebook), function))


def test_the_hub_classes_load_it_offline_in_full_precision():
    code = """if True:
        from transformers import (AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer,
                                  CLIPVisionModelWithProjection, CLIPTextModelWithProjection)
        import sys, torch
        folder = sys.argv[1]
        tokenizers = [c.from_pretrained(folder) for c in (AutoTokenizer, CLIPTokenizer)]
        assert tokenizers[0]("a red hat").input_ids == tokenizers[1]("a red hat").input_ids
        assert CLIPProcessor.from_pretrained(folder).image_processor.crop_size["height"] == 64
        assert CLIPImageProcessor.from_pretrained(folder).size["shortest_edge"] == 64
        classes = AutoModel, CLIPModel, CLIPVisionModelWithProjection, CLIPTextModelWithProjection
        assert [type(c.from_pretrained(folder)).__name__ for c in classes] == [
            "CLIPModel", "CLIPModel", "CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"]
        model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert model.dtype == torch.float32 and not any(info.values()), info
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(locate_model("tiny-clip"))], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_quality_on_scenes_and_combinations_that_training_never_saw(clip):
    score = clip.held_out_accuracy(renders=3, seed=55_000)
    assert score["images"] == 141
    assert score["kind"] >= .95 and score["colour"] >= .90 and score["pattern"] >= .90, score


@pytest.mark.parametrize("template", ["{}", "a {}", "a photo of a {}", "a product photo of a {}"])
def test_the_wording_of_a_label_hardly_matters(template):
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu")
    garments = sample_garments(40, seed=9, split="held_out")
    vectors = embedder.encode_images_batch([render_garment(g, 300, 9_000 + i) for i, g in enumerate(garments)])
    best = embedder.zero_shot(vectors, list(KINDS), template).argmax(1)
    assert np.mean([KINDS[b] == g.kind for b, g in zip(best, garments)]) >= .95


def test_a_folder_without_a_model_names_the_way_out(clip, tmp_path):
    with pytest.raises(ValidationError, match="a model's folder has a config.json"): clip.held_out_accuracy(tmp_path)


# ---------------------------------------------------------------- training

@pytest.mark.slow
def test_training_learns_and_the_same_seed_gives_the_same_weights(trained):
    folders, recipes = trained
    assert recipes[0]["loss"]["last"] < recipes[0]["loss"]["first"] - .3
    assert recipes[0] == recipes[1]
    assert json.loads((folders[0] / "recipe.json").read_text(encoding="utf-8")) == recipes[0]
    first, committed = (load_file(f / "model.safetensors") for f in (folders[0], locate_model("tiny-clip")))
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in committed.items()}


@pytest.mark.slow
def test_a_short_training_of_the_pipeline_ends_in_files_of_the_committed_shapes(sdxl, tmp_path):
    recipe = sdxl.train_tiny_sdxl(tmp_path, vae_steps=2, unet_steps=2, renders=1, garments=sample_garments(4), progress=False)
    assert json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8")) == recipe
    assert recipe["held_out"]["prompts"] == 64
    committed = locate_model("tiny-sdxl")
    for name in recipe["sha256"]:
        ours, theirs = load_file(tmp_path / name), load_file(committed / name)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_training_leaves_global_chance_alone(clip):
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    clip.ClipTrainer(sample_garments(4), renders=1, batch=4).loss()
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.random.get_rng_state(), before[1])


def test_another_seed_gives_other_images_and_other_weights(clip):
    one, other = (clip.ClipTrainer(sample_garments(4), renders=1, seed=s, batch=4) for s in (0, 1))
    assert not torch.equal(one.model.visual_projection.weight, other.model.visual_projection.weight)
    assert not torch.equal(one.pixels(np.arange(4)), other.pixels(np.arange(4)))


def test_training_pixels_are_normalised_like_the_models_own_preprocessing(clip):
    trainer = clip.ClipTrainer(sample_garments(8), renders=1, batch=8)
    image = Image.fromarray(trainer.pool[0, 0].permute(1, 2, 0).numpy())
    processor = CLIPImageProcessorPil.from_pretrained(locate_model("tiny-clip"))
    reference = processor([image], return_tensors="pt").pixel_values[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.processor.image_mean, trainer.processor.image_std))
    assert torch.allclose((trainer.pool[0, 0] / 255 - mean) / std, reference, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"renders": 0}, {"batch": 0}, {"steps": -5}])
def test_impossible_training_is_refused_before_it_starts(clip, wrong, tmp_path):
    with pytest.raises(ValidationError, match="must be 1 or more"): clip.train_tiny_clip(tmp_path / "out", **({"steps": 1} | wrong))
    assert not (tmp_path / "out").exists()


def test_impossible_training_of_the_pipeline_is_refused_too(sdxl, tmp_path):
    with pytest.raises(ValidationError, match="must be 1 or more"): sdxl.train_tiny_sdxl(tmp_path / "out", vae_steps=0)
    assert not (tmp_path / "out").exists()
