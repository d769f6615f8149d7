"The drawn garments and the catalogue of the demo: repeatable, honest about what was held out, broken as they say."
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
from PIL import Image

from devsky_nb import CLIPImageEmbedder, ValidationError, load_image
from devsky_nb.demo.catalogue import BROKEN, ODD, write_catalogue
from devsky_nb.demo.garments import (ATTRIBUTES, COLOURS, KINDS, PATTERNS, Garment, contact_sheet, is_held_out, render_cutout,
                                     render_garment, sample_garments)

EVERY = [Garment(k, c, p) for k in KINDS for c in COLOURS for p in PATTERNS]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory): return write_catalogue(tmp_path_factory.mktemp("made") / "catalogue")


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


def test_same_seed_same_image_in_another_process():
    code = ("import hashlib; from devsky_nb.demo.garments import Garment, render_garment;"
            "print(hashlib.sha256(render_garment(Garment('hat', 'blue', 'dotted'), 64, 5).tobytes()).hexdigest())")
    env = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip()
    assert other == hashlib.sha256(render_garment(Garment("hat", "blue", "dotted"), 64, 5).tobytes()).hexdigest()


def test_drawing_leaves_global_chance_alone():
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    render_garment(EVERY[0]), sample_garments(5)
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
    with pytest.raises(ValidationError, match="expected a whole number from 1 to 2048"): render_garment(EVERY[0], size)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValidationError, match="expected a whole number of at least 0"): render_garment(EVERY[0], 64, seed)


@pytest.mark.parametrize("wrong", [("", "red", "plain"), ("hat", "Red", "plain"), ("hat", "red", None), (["hat"], "red", "plain")])
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValidationError, match="expected one of"): Garment(*wrong)


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
    assert "image to follow" in Path(of(catalogue, "text")["path"]).read_text(encoding="utf-8")
    assert Image.open(of(catalogue, "truncated")["path"]).format == "JPEG"  # its header is fine: only decoding shows it


def test_odd_files_are_what_they_claim(catalogue):
    assert Image.open(of(catalogue, "cmyk")["path"]).mode == "CMYK"
    transparent = Image.open(of(catalogue, "transparent")["path"])
    assert transparent.mode == "RGBA" and transparent.getextrema()[3] == (0, 255)
    stored = Image.open(of(catalogue, "rotated")["path"])
    assert stored.getexif()[0x0112] == 6
    embedder = CLIPImageEmbedder("tiny-clip", device="cpu")
    def named(entry): return KINDS[embedder.zero_shot(embedder.encode_image(entry["path"]), list(KINDS)).argmax()]
    assert named(of(catalogue, "rotated")) == of(catalogue, "rotated")["label"]
    wrong = of(catalogue, "wrong-label")
    assert wrong["label"] == "jeans" and wrong["caption"].endswith("dress")
    assert named(wrong) == "dress"


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
    first, second = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    assert first == second


def test_a_smaller_catalogue_replaces_a_larger_one_entirely(tmp_path):
    write_catalogue(tmp_path, 30)
    write_catalogue(tmp_path, 15)
    assert len(list(tmp_path.iterdir())) == 16


@pytest.mark.parametrize("name, content",
                         [("holiday.jpg", "mine"), ("image_set.json", "{}"), ("image_set.json", "not json"),
                          ("image_set.json", "[1]"),
                                           ("image_set.json",
                                            '{"images": [{"path": "../victim"}], "metadata": {"made_by": "me"}}')])
def test_a_folder_of_somebody_else_is_left_alone(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValidationError, match="holds other files"): write_catalogue(tmp_path)
    assert [f.read_text(encoding="utf-8") for f in tmp_path.iterdir()] == [content]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_catalogue_that_was_not_finished_is_none(error, tmp_path, monkeypatch):
    write, written = Path.write_bytes, []
    def fails(path, data):
        written.append(path.name)
        if len(written) == 5: raise error
        return write(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValidationError): write_catalogue(tmp_path, n=14)
    assert len(written) == 5 and os.listdir(tmp_path) == []
    assert len(write_catalogue(tmp_path, n=14)["images"]) == 14


def test_a_forged_earlier_catalogue_deletes_nothing_outside(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    folder = tmp_path / "catalogue"
    folder.mkdir()
    (folder / "image_set.json").write_text(json.dumps({"images": [{"path": "../victim"}],
                                                       "metadata": {"made_by": "devsky_nb.demo.catalogue.write_catalogue"}}))
    write_catalogue(folder)
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("n", [0, 13, 10_001, 20.0, "24"])
def test_impossible_catalogue_sizes_are_refused_before_writing(n, tmp_path):
    with pytest.raises(ValidationError, match="expected a whole number from 14 to 10000"): write_catalogue(tmp_path / "new", n)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(ValidationError, match="is a file"): write_catalogue(tmp_path / "taken")


def test_an_impossible_place_is_one_error_and_nothing_is_drawn(tmp_path):
    drawn = []
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in ("/proc/nope", tmp_path / "file" / "below", "a\0b", "x" * 5000, None, 7):
        with pytest.raises(ValidationError, match="cannot be written to") as caught: write_catalogue(place, draw=drawn.append)
        assert json.dumps(caught.value.to_dict())
    assert drawn == []


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_impossible_catalogue_seeds_are_refused(seed, tmp_path):
    with pytest.raises(ValidationError, match="seed=.*expected a whole number of at least 0"):
        write_catalogue(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("draw, match",
                         [(7, "expected a function"), ("tiny-sdxl", "expected a function"), (lambda captions: [], "0 images for"),
                                         (lambda captions: captions, "a list with str"),
                                         (lambda captions: None, "returned NoneType"),
                                         (lambda captions: [Image.new("RGB", (8, 8))] * 99, "99 images for")])
def test_what_cannot_draw_is_refused_and_the_earlier_catalogue_stays(draw, match, tmp_path):
    write_catalogue(tmp_path, 14)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValidationError, match=match): write_catalogue(tmp_path, 14, draw=draw)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [TypeError("mine"), OSError("mine"), ValueError("mine")])
def test_an_error_of_the_function_that_draws_is_its_own(error, tmp_path):
    def draw(captions): raise error
    with pytest.raises(type(error)) as caught: write_catalogue(tmp_path / "new", draw=draw)
    assert caught.value is error


def test_every_broken_file_is_refused_for_the_reason_that_it_was_broken(catalogue):
    for condition, reason in {"truncated": "truncated", "text": "unknown-format", "empty": "empty"}.items():
        with pytest.raises(ValidationError) as caught: load_image(of(catalogue, condition)["path"])
        assert caught.value.details["reason"] == reason
