"The drawn catalogue and tiny-clip: repeatable, honest about what was held out, and as good as their recipe says."
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from devsky_nb.errors import ValidationError
from devsky_nb.garments import (ATTRIBUTES, BROKEN, COLOURS, KINDS, ODD, PATTERNS, ClipTrainer, Garment, build_tokenizer, contact_sheet,
                                held_out_accuracy, is_held_out, load_tiny_clip, render_cutout, render_garment, sample_garments,
                                train_tiny_clip, write_catalogue, zero_shot)
from devsky_nb.registry import locate_model

EVERY = [Garment(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory): return write_catalogue(tmp_path_factory.mktemp("made") / "catalogue")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two runs of the same short training."
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    return folders, [train_tiny_clip(f, steps=5, renders=2, batch=12, garments=sample_garments(12), progress=False) for f in folders]


def of(catalogue, condition): return next(i for i in catalogue["images"] if i["condition"] == condition)


# ---------------------------------------------------------------- drawing

@pytest.mark.parametrize("size", [*range(1, 13), 31, 63, 64, 65, 127, 128, 129, 200, 224, 513])
def test_every_size_is_drawn(size):
    image = render_garment(Garment("boot", "pink", "checked"), size, seed=size)
    assert (image.size, image.mode) == ((size, size), "RGB")


def test_every_combination_is_drawn_inside_its_frame_and_differs_from_the_others():
    seen = set()
    for i, garment in enumerate(EVERY):
        image = render_garment(garment, 32, seed=0)
        alpha = np.asarray(render_cutout(garment, 64, seed=i))[..., 3]
        assert .10 < (alpha > 127).mean() < .75, garment
        edge = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert (edge > 127).mean() < .10, f"{garment} is cut off by the frame"
        seen.add(image.tobytes())
    assert len(seen) == 400


def test_same_seed_same_picture_in_another_process():
    code = ("import hashlib; from devsky_nb.garments import Garment, render_garment;"
            "print(hashlib.sha256(render_garment(Garment('hat', 'blue', 'dotted'), 64, 5).tobytes()).hexdigest())")
    env = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip()
    assert other == hashlib.sha256(render_garment(Garment("hat", "blue", "dotted"), 64, 5).tobytes()).hexdigest()


def test_drawing_leaves_global_chance_alone():
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    render_garment(EVERY[0]), sample_garments(5), ClipTrainer(sample_garments(4), renders=1, batch=4).loss()
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.parametrize("colour", COLOURS)
def test_the_base_colour_stays_the_nearest_named_one(colour):
    names, wheel = list(COLOURS), np.array(list(COLOURS.values()), float)
    for seed in range(8):
        garment = Garment(KINDS[seed], colour)
        inside = np.asarray(render_cutout(garment, 64, seed))[..., 3] > 250
        pixels = np.asarray(render_garment(garment, 64, seed), float)[inside]
        nearest = Counter(names[i] for i in ((pixels[:, None] - wheel) ** 2).sum(2).argmin(1))
        assert nearest.most_common(1)[0][0] == colour, (garment, seed, nearest)


@pytest.mark.parametrize("size", [0, -1, 2049, 64.0, "64", None])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValidationError, match="size must be 1 to 2048"): render_garment(EVERY[0], size)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValidationError, match="seed must be a whole number from 0"): render_garment(EVERY[0], 64, seed)


@pytest.mark.parametrize("wrong", [("", "red", "plain"), ("hat", "Red", "plain"), ("hat", "red", None), (["hat"], "red", "plain")])
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValidationError, match="choose one of"): Garment(*wrong)


def test_contact_sheet_takes_any_mode_and_shape():
    odd = [Image.new(m, s) for m, s in (("RGBA", (9, 200)), ("L", (1, 1)), ("CMYK", (300, 5)), ("P", (64, 64)))]
    assert contact_sheet(odd, columns=3, cell=10).size == (30, 20)


# ---------------------------------------------------------------- the split

def test_held_out_is_disjoint_stable_and_covers_every_word():
    held = [g for g in EVERY if is_held_out(g)]
    train = sample_garments(400 - len(held), split="train")
    assert not set(held) & set(train) and len(set(train)) + len(held) == 400
    assert .10 <= len(held) / 400 <= .15
    assert hashlib.sha256("\n".join(g.caption for g in held).encode()).hexdigest().startswith("21d637391245")
    for name, values in ATTRIBUTES.items():
        for split in (held, train): assert {getattr(g, name) for g in split} == set(values)
    assert len({g.caption for g in EVERY}) == 400


def test_samples_repeat_only_after_everything_came():
    counts = Counter(sample_garments(100, seed=3, split="held_out"))
    assert len(counts) == 47 and set(counts.values()) == {2, 3}
    assert sample_garments(0) == []
    assert sample_garments(20, seed=1) != sample_garments(20, seed=2)


# ---------------------------------------------------------------- the tokenizer

def test_tokenizer_round_trips_captions_and_is_the_committed_one():
    built, (_, processor) = build_tokenizer(), load_tiny_clip()
    for garment in EVERY:
        ids = built(garment.caption).input_ids
        assert ids == processor.tokenizer(garment.caption).input_ids
        assert ids[0] == built.bos_token_id and ids[-1] == built.eos_token_id
        assert built.decode(ids, skip_special_tokens=True).replace("t - shirt", "t-shirt") == garment.caption
        assert len(ids) <= 2 + len(garment.caption.replace("-", " - ").split())  # each word is one token


@pytest.mark.parametrize("text", ["", " ", "\x00", "👗🧵", "ÄÖÜ ß 北京 العربية", "a" * 10_000, "<|endoftext|>", "<|startoftext|> a hat", "\ud7ff\u200b\ufeff",
                                  "t-shirt\n\t<b>&amp;</b>", "'; DROP TABLE", "e\u0301" * 50])
def test_any_text_becomes_a_finite_vector(text):
    clip, processor = load_tiny_clip()
    tokens = processor.tokenizer([text, "a hat"], padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape[1] <= 32 and tokens.input_ids.max() < clip.config.text_config.vocab_size
    with torch.inference_mode(): assert torch.isfinite(clip.get_text_features(**tokens).pooler_output).all()


def test_padding_does_not_change_a_text():
    clip, processor = load_tiny_clip()
    def vectors(*texts):
        with torch.inference_mode():
            return clip.get_text_features(**processor.tokenizer(list(texts), padding=True, return_tensors="pt")).pooler_output
    assert torch.allclose(vectors("a hat")[0], vectors("a hat", "a photo of a red striped t-shirt on a grey ground")[0], atol=1e-5)


# ---------------------------------------------------------------- the committed model

def test_committed_files_match_their_recipe():
    folder = locate_model("tiny-clip")
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == recipe["sha256"]["model.safetensors"]
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 6_000_000
    assert recipe["license"] == "Apache-2.0"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert not [f.name for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_the_hub_classes_load_it_offline_in_full_precision():
    code = """if True:
        from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModelWithProjection, CLIPTextModelWithProjection
        import sys, torch
        folder = sys.argv[1]
        tokenizers = [c.from_pretrained(folder) for c in (AutoTokenizer, CLIPTokenizer)]
        assert tokenizers[0]("a red hat").input_ids == tokenizers[1]("a red hat").input_ids
        assert CLIPProcessor.from_pretrained(folder).image_processor.crop_size["height"] == 64
        assert CLIPImageProcessor.from_pretrained(folder).size["shortest_edge"] == 64
        assert [type(c.from_pretrained(folder)).__name__ for c in (AutoModel, CLIPModel, CLIPVisionModelWithProjection, CLIPTextModelWithProjection)] == [
            "CLIPModel", "CLIPModel", "CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"]
        model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert model.dtype == torch.float32 and not any(info.values()), info
    """
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(locate_model("tiny-clip"))], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_quality_on_scenes_and_combinations_that_training_never_saw():
    score = held_out_accuracy(renders=3, seed=55_000)
    assert score["images"] == 141
    assert score["kind"] >= .95 and score["colour"] >= .90 and score["pattern"] >= .90, score


@pytest.mark.parametrize("template", ["{}", "a {}", "a photo of a {}", "a product photo of a {}"])
def test_the_wording_of_a_label_hardly_matters(template):
    garments = sample_garments(40, seed=9, split="held_out")
    best = zero_shot([render_garment(g, 300, 9_000 + i) for i, g in enumerate(garments)], [template.format(k) for k in KINDS]).argmax(1)
    assert np.mean([KINDS[b] == g.kind for b, g in zip(best, garments)]) >= .95


def test_a_missing_model_names_the_way_out(tmp_path):
    with pytest.raises(ValidationError, match="a model's folder has a config.json"): load_tiny_clip(tmp_path)


# ---------------------------------------------------------------- training

@pytest.mark.slow
def test_training_learns_and_the_same_seed_gives_the_same_weights(trained):
    folders, recipes = trained
    assert recipes[0]["loss"]["last"] < recipes[0]["loss"]["first"] - .3
    assert recipes[0] == recipes[1]
    assert json.loads((folders[0] / "recipe.json").read_text(encoding="utf-8")) == recipes[0]
    first, committed = (load_file(f / "model.safetensors") for f in (folders[0], locate_model("tiny-clip")))
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in committed.items()}


def test_another_seed_gives_other_pictures_and_other_weights():
    one, other = (ClipTrainer(sample_garments(4), renders=1, seed=s, batch=4) for s in (0, 1))
    assert not torch.equal(one.model.visual_projection.weight, other.model.visual_projection.weight)
    assert not torch.equal(one.pixels(np.arange(4)), other.pixels(np.arange(4)))


def test_training_pixels_are_normalised_like_the_models_own_preprocessing():
    trainer = ClipTrainer(sample_garments(8), renders=1, batch=8)
    picture = Image.fromarray(trainer.pool[0, 0].permute(1, 2, 0).numpy())
    reference = load_tiny_clip()[1].image_processor([picture], return_tensors="pt").pixel_values[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.processor.image_mean, trainer.processor.image_std))
    assert torch.allclose((trainer.pool[0, 0] / 255 - mean) / std, reference, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"renders": 0}, {"batch": 0}, {"steps": -5}])
def test_impossible_training_is_refused_before_it_starts(wrong, tmp_path):
    with pytest.raises(ValidationError, match="must be 1 or more"): train_tiny_clip(tmp_path / "out", **({"steps": 1} | wrong))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the catalogue

def test_the_catalogue_lists_every_file_once_and_matches_its_json(catalogue):
    folder = Path(catalogue["images"][0]["path"]).parent
    written = json.loads((folder / "image_set.json").read_text(encoding="utf-8"))
    assert [i | {"path": str(folder / i["path"])} for i in written["images"]] == catalogue["images"]
    assert {Path(i["path"]).name for i in catalogue["images"]} | {"image_set.json"} == {f.name for f in folder.iterdir()}
    assert len({i["id"] for i in catalogue["images"]}) == 24
    assert sorted(c for c in (i["condition"] for i in catalogue["images"]) if c != "good") == sorted(ODD)
    assert {Path(i["path"]).suffix for i in catalogue["images"]} == {".jpg", ".png", ".webp"}


def test_broken_files_are_broken_and_the_others_decode(catalogue):
    for item in catalogue["images"]:
        if item["condition"] in BROKEN:
            with pytest.raises(OSError): Image.open(item["path"]).load()
        else:
            with Image.open(item["path"]) as image:
                image.load()
                assert 230 <= min(image.size) and max(image.size) <= 384
    assert Path(of(catalogue, "empty")["path"]).stat().st_size == 0
    assert "picture to follow" in Path(of(catalogue, "text")["path"]).read_text(encoding="utf-8")
    assert Image.open(of(catalogue, "truncated")["path"]).format == "JPEG"  # its header is fine: only decoding shows it


def test_odd_files_are_what_they_claim(catalogue):
    assert Image.open(of(catalogue, "cmyk")["path"]).mode == "CMYK"
    transparent = Image.open(of(catalogue, "transparent")["path"])
    assert transparent.mode == "RGBA" and transparent.getextrema()[3] == (0, 255)
    stored = Image.open(of(catalogue, "rotated")["path"])
    assert stored.getexif()[0x0112] == 6
    clip_texts = [f"a photo of a {k}" for k in KINDS]
    assert KINDS[zero_shot([ImageOps.exif_transpose(stored).convert("RGB")], clip_texts).argmax()] == of(catalogue, "rotated")["label"]
    wrong = of(catalogue, "wrong-label")
    assert wrong["label"] == "jeans" and wrong["caption"].endswith("dress")
    assert KINDS[zero_shot([Image.open(wrong["path"]).convert("RGB")], clip_texts).argmax()] == "dress"


def test_duplicates_share_bytes_or_nearly_share_pixels(catalogue):
    good = {i["caption"]: Path(i["path"]) for i in catalogue["images"] if i["condition"] == "good"}
    exact, near = of(catalogue, "duplicate"), of(catalogue, "near-duplicate")
    assert Path(exact["path"]).read_bytes() == good[exact["caption"]].read_bytes()
    a, b = Image.open(near["path"]), Image.open(good[near["caption"]])
    assert a.size != b.size and Path(near["path"]).read_bytes() != good[near["caption"]].read_bytes()
    assert abs(np.asarray(a.resize(b.size), float) - np.asarray(b, float)).mean() < 4


@pytest.mark.parametrize("n, seed", [(14, 0), (14, 1), (40, 7)])
def test_every_seed_gives_a_whole_catalogue_and_the_same_bytes_again(n, seed, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    sets = [write_catalogue(f, n, seed) for f in folders]
    assert len(sets[0]["images"]) == n and set(ODD) <= {i["condition"] for i in sets[0]["images"]}
    assert [{f.name: f.read_bytes() for f in x.iterdir()} for x in folders[:1]] == [{f.name: f.read_bytes() for f in x.iterdir()} for x in folders[1:]]


def test_a_smaller_catalogue_replaces_a_larger_one_entirely(tmp_path):
    write_catalogue(tmp_path, 30)
    write_catalogue(tmp_path, 15)
    assert len(list(tmp_path.iterdir())) == 16


@pytest.mark.parametrize("name, content", [("holiday.jpg", "mine"), ("image_set.json", "{}"), ("image_set.json", "not json"), ("image_set.json", "[1]"),
                                           ("image_set.json", '{"images": [{"path": "../victim"}], "metadata": {"made_by": "me"}}')])
def test_a_folder_of_somebody_else_is_left_alone(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValidationError, match="holds other files"): write_catalogue(tmp_path)
    assert [f.read_text(encoding="utf-8") for f in tmp_path.iterdir()] == [content]


def test_a_forged_earlier_catalogue_deletes_nothing_outside(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "catalogue"
    folder.mkdir()
    (folder / "image_set.json").write_text(json.dumps({"images": [{"path": "../victim"}], "metadata": {"made_by": "devsky_nb.garments.write_catalogue"}}))
    write_catalogue(folder)
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("n", [0, 13, 10_001, 20.0, "24"])
def test_impossible_catalogue_sizes_are_refused_before_writing(n, tmp_path):
    with pytest.raises(ValidationError, match="n must be 14 to 10000"): write_catalogue(tmp_path / "new", n)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValidationError, match="is a file"): write_catalogue(tmp_path / "taken")
