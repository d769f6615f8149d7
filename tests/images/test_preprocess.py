"From an image to the model's numbers: equal to the reference processor in every bit, for every size; settings in every spelling."
import importlib, inspect, io, json, os, subprocess, sys, threading
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from patience import PATIENCE

from devsky_nb.errors import FileNotFoundError, ModelLoadError, ValidationError
from devsky_nb.images.load import load_image
from devsky_nb.images.floats import resize_floats
from devsky_nb.images.placement import centre_start, grid_size, placement, resized_size, ROUNDINGS, RULES
from devsky_nb.images.preprocess import ImagePreprocessor
from devsky_nb.images.processors import ALL_PROCESSORS, MODEL_TYPES, PROCESSORS, read_size
from devsky_nb.images.resize import resize_box, source_rows, strips, SUPPORT

COMPOSITES = "return_numpy" in inspect.signature(convert_to_rgb).parameters  # transparency is painted on white


def encode(image, format="PNG", **options):
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def photo(w=60, h=40, mode="RGB"):
    y, x = np.mgrid[:h, :w]
    a = np.dstack([x * 255 // max(1, w - 1), y * 255 // max(1, h - 1), (x + y) * 3 % 256,
                   255 - y * 255 // max(1, h - 1)]).astype(np.uint8)
    return Image.fromarray(a).convert(mode) if mode != "RGB" else Image.fromarray(a[..., :3].copy())


def noise(w, h, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def reference(**settings):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    return CLIPImageProcessorPil(**settings)


def same(ours, theirs, image):
    a, b = ours(image), np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and np.array_equal(a, b)


@pytest.mark.parametrize("size, crop", [(32, 32), (33, 33), (36, 32), (37, 32), (32, 37), (31, 36)])
def test_preprocessing_equals_the_reference_to_the_last_bit(tmp_path, size, crop):
    theirs = reference(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    theirs.save_pretrained(tmp_path)
    ours, rng, residues = ImagePreprocessor.from_pretrained(tmp_path), np.random.default_rng(0), set()
    sizes = [(w, h) for w in range(28, 60, 3) for h in (29, 32, 33, 45, 100)] + [(1, 1), (1, 2), (2, 1), (1, 4000), (4000, 3),
                                                                                 (3, 700), (600, 2), (301, 517), (70, 100),
                                                                                 (640, 427)]
    for w, h in sizes + [(h, w) for w, h in sizes]:
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        assert same(ours, theirs, image), (w, h)
        residues.add((int(size * max(w, h) / min(w, h)) - crop) % 4)
    assert residues == {0, 1, 2, 3}


def test_preprocessing_equals_the_reference_at_full_size(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    ours = ImagePreprocessor.from_pretrained(tmp_path)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3).repeat(256, 0))
    rng = np.random.default_rng(1)
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w,
             h in ((1600, 1200), (427, 640), (224, 225), (2000, 7), (1, 1), (900, 299))]
    for image in (ramp, photo(1000, 700), *noise): assert same(ours, theirs, image)
    assert (ours.settings()["arithmetic"], theirs.backend) == ("pillow", "pil")
    assert ours.resize_crop(ramp).shape == (224, 224, 3)
    assert ours.resize_crop(ramp).dtype == np.uint8


def test_other_means_and_factors_stay_exact(tmp_path):
    theirs = reference(image_mean=[.5, .4, .3], image_std=[.25, .3, .7], rescale_factor=1 / 127.5, size={"shortest_edge": 40},
                       crop_size={"height": 40, "width": 40})
    theirs.save_pretrained(tmp_path)
    assert same(ImagePreprocessor.from_pretrained(tmp_path), theirs, photo(77, 61))


@pytest.mark.parametrize("source",
                         [photo(90, 70, "RGBA"), photo(90, 70, "L"), photo(90, 70).quantize(16),
                          photo(90, 70, "RGBA").convert("LA"), photo(90, 70, "CMYK")], ids=lambda i: i.mode)
def test_loading_then_preprocessing_equals_the_reference_on_the_raw_image(source):
    if source.mode in ("RGBA", "LA") and not COMPOSITES: pytest.skip("this release of transformers cuts transparency off")
    theirs = reference(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert np.array_equal(ImagePreprocessor(32, 32)(load_image(source)[0]), theirs(source, return_tensors="np")["pixel_values"][0])


def test_settings_in_every_spelling(tmp_path):
    def read(name, settings):
        for p in tmp_path.iterdir(): p.unlink()
        (tmp_path / name).write_text(json.dumps(settings))
        return ImagePreprocessor.from_pretrained(tmp_path)
    old = read("preprocessor_config.json",
               {"crop_size": 64, "size": 72, "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "resample": 3})
    assert (old.size, old.crop, old.mean[0], old.rule) == ((72, 72), (64, 64), 0.48145466, "shortest")
    new = read("processor_config.json",
               {"image_processor": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48},
                                    "crop_size": {"height": 40, "width": 40}}})
    assert (new.size, new.crop) == ((48, 48), (40, 40))
    (tmp_path / "preprocessor_config.json").write_text('{"size": 10}')
    assert ImagePreprocessor.from_pretrained(tmp_path).size == (48, 48), "processor_config.json wins, as in transformers"
    for other in ({"do_resize": False}, {"do_pad": True}, {"size": {"shortest_edge": 9, "longest_edge": 12}},
                  {"crop_size": {"shortest_edge": 9, "longest_edge": 10}}, {"image_processor_type": "Owlv2ImageProcessor"},
                  {"feature_extractor_type": "Evil--CLIPFeatureExtractor"}, {"image_processor_type": "CLIP"},
                  {"resample": 1, "image_processor_type": "DINOv3ViTImageProcessor"},
                  {"do_rescale": False, "image_processor_type": "DINOv3ViTImageProcessorFast"},
                  {"size": 224, "image_processor_type": "SiglipImageProcessor"}):
        with pytest.raises(ValidationError, match="differs from what is reproduced") as caught: read("preprocessor_config.json", other)
        assert next(iter(other)) in str(caught.value)
    with pytest.raises(ValidationError, match="'size': "): read("preprocessor_config.json", {"do_center_crop": False})
    (tmp_path / "preprocessor_config.json").unlink()
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"): ImagePreprocessor.from_pretrained(missing)


NAN, HUGE, DEEP = float("nan"), 10**400, "[" * 5000

@pytest.mark.parametrize("settings", [
    *({"size": v} for v in ("big", -3, 0, 10**9, HUGE, 2.5, True, [224], {"shortest_edge": "9"}, {"shortest_edge": 10**9})),
    *({"crop_size": v} for v in ("big", -3, 0, 5000, HUGE, NAN, {"height": -1, "width": -1}, {"height": 9.5, "width": 9.5})),
    *({"image_mean": v} for v in ([.5], [], [.5] * 4, "abc", {}, [1, NAN, 1], [1, HUGE, 1], [1, float("inf"), 1], [1, "x", 1],
                                  [1, True, 1])),
    *({"image_std": v} for v in ([1, 0, 1], [1, -.2, 1], [1, NAN, 1], [1, 1e-300, 1], [1] * 2, "abc", [HUGE] * 3, [[1]] * 3)),
    *({"rescale_factor": v} for v in ("x", 0, -1, NAN, float("inf"), HUGE, 1e-300, [1])),
    *({"resample": v} for v in (99, -1, "3", 2.5, True, [3], HUGE)),
    *({name: v} for name in ("do_resize", "do_pad", "do_normalize") for v in ("yes", 1, [], 0)),
    {"image_processor_type": 5}, {"feature_extractor_type": ["CLIP"]}], ids=lambda s: repr(s)[:40])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_setting_that_cannot_be_meant_is_a_damaged_file(tmp_path, name, settings):
    (tmp_path / name).write_text(json.dumps({"image_processor": settings} if name[:4] == "proc" else settings))
    with pytest.raises(ModelLoadError, match=name) as caught: ImagePreprocessor.from_pretrained(tmp_path)
    assert "Fetch the model again" in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null", '"x"', "5", b"\xff\xfe{", DEEP, '{"size":' * 3000, "{" + " " * 2**24 + "}"],
                         ids=lambda t: repr(t[:9]))
def test_a_file_that_is_no_configuration_is_damaged(tmp_path, text):
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelLoadError, match="preprocessor_config.json cannot be read"): ImagePreprocessor.from_pretrained(tmp_path)


def test_what_is_no_file_is_damaged_too_and_a_mark_of_utf8_is_none(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("gone")):
        make()
        with pytest.raises(ModelLoadError, match="preprocessor_config.json cannot be read"): ImagePreprocessor.from_pretrained(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": 5}')
    with pytest.raises(ModelLoadError, match="should be an object, found 5"): ImagePreprocessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    path.write_bytes(b'\xef\xbb\xbf{"size": 64, "crop_size": 64}')
    assert ImagePreprocessor.from_pretrained(tmp_path).size == (64, 64)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"crop": 10**9}, {"mean": (1, 2)}, {"mean": "abc"}, {"std": (1, 0, 1)}, {"std": None},
                                   {"rescale_factor": NAN}, {"rescale_factor": HUGE}], ids=lambda w: repr(w)[:40])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))): ImagePreprocessor(**wrong)


def test_neither_torch_nor_transformers_is_needed(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    code = ("import sys; from devsky_nb.images.load import load_image; from devsky_nb.images.preprocess import ImagePreprocessor; "
            f"ImagePreprocessor.from_pretrained({str(tmp_path)!r})(load_image({encode(photo())!r})[0]); "
            "assert not {'torch', 'transformers', 'torchvision'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_a_very_long_image_cannot_ask_for_any_amount_of_memory():
    with pytest.raises(ValidationError, match="too long and thin") as caught: ImagePreprocessor()(Image.new("RGB", (100_000, 1)))
    assert caught.value.details["reason"] == "aspect-ratio"


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 120), st.integers(1, 120), st.integers(1, 80), st.integers(1, 80),
       st.sampled_from(ROUNDINGS), st.sampled_from(list(SUPPORT)), st.integers(0, 99))
def test_the_kept_part_is_what_the_whole_resize_has_there(width, height, w, h, crop_w, crop_h, rounding, filter, seed):
    image = noise(width, height, seed)
    left, top = centre_start(w, crop_w, rounding), centre_start(h, crop_h, rounding)
    box = (left, top, left + crop_w, top + crop_h)
    whole = image.resize((w, h), Image.Resampling[filter.upper()])
    assert np.array_equal(resize_box(image, (w, h), box, filter), np.asarray(whole.crop(box)))


def test_strips_change_nothing(monkeypatch):
    monkeypatch.setattr("devsky_nb.images.resize.STRIP_PIXELS", 700)
    for w, h, size in ((90, 61, (64, 48)), (61, 90, (300, 200)), (3, 200, (20, 400)), (500, 2, (250, 30))):
        image, box = noise(w, h), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2)
        for filter in SUPPORT:
            wanted = image.resize(size, Image.Resampling[filter.upper()])
            assert np.array_equal(resize_box(image, size, box, filter), np.asarray(wanted.crop(box))), (w, h, filter)
            assert np.array_equal(resize_box(image, size, (0, 0, *size), filter), np.asarray(wanted)), (w, h, filter)
    assert [n for first, last in strips(3, 50, 100) for n in range(first, last)] == list(range(3, 50))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 700), st.sampled_from(list(SUPPORT)[1:]), st.data())
def test_no_row_outside_the_source_rows_matters(height, resized, filter, data):
    top = data.draw(st.integers(0, resized - 1))
    bottom = data.draw(st.integers(top + 1, resized))
    first, last = source_rows(height, resized, top, bottom, SUPPORT[filter])
    column = np.full((height, 1), 255, np.uint8)
    column[first:last] = 0
    seen = np.asarray(Image.fromarray(column).resize((1, resized), Image.Resampling[filter.upper()]))[top:bottom]
    assert not seen.any() and 0 <= first < last <= height


@pytest.mark.parametrize("width, height",
                         [(400, 1000), (300, 2000), (448, 449), (224, 224), (224, 500), (500, 224), (3, 2), (1, 90), (90, 1)])
def test_tall_wide_and_unchanged_edges(width, height):
    image = noise(width, height)
    for size, crop in ((224, 224), (64, 64), (64, 80)):
        theirs = reference(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
        assert same(ImagePreprocessor(size, crop), theirs, image)


PROCESSOR_CLASSES = {"CLIP": "clip", "ChineseCLIP": "chinese_clip", "Bit": "bit", "Siglip": "siglip", "Siglip2": "siglip2", "ViT": "vit",
                     "DeiT": "deit", "Blip": "blip"}


def processor_class(name):
    module = PROCESSOR_CLASSES[name]
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}ImageProcessorPil")


@pytest.mark.parametrize("name", PROCESSOR_CLASSES)
def test_each_processors_own_values_are_those_of_transformers(name):
    theirs, ours = processor_class(name), ALL_PROCESSORS | PROCESSORS[name]
    for setting in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"):
        assert bool(getattr(theirs, setting, None)) == ours[setting], setting
    assert theirs.resample == ours["resample"] and theirs.rescale_factor == ours["rescale_factor"]
    assert (tuple(theirs.image_mean), tuple(theirs.image_std)) == (ours["image_mean"], ours["image_std"])
    assert theirs.default_to_square == ours["default_to_square"]
    if name == "Siglip2": assert (theirs.patch_size, theirs.max_num_patches) == (ours["patch_size"], ours["max_num_patches"])
    else: assert read_size(theirs.size, theirs.default_to_square) == (read_size(ours["size"], ours["default_to_square"])[0],
                                                                      read_size(theirs.size, True)[1])


def test_a_model_type_means_the_processor_that_transformers_takes_for_it():
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as names
    known = {kind: name for kind, name in MODEL_TYPES.items() if kind in names}
    assert {kind: names[kind]["torchvision"] for kind in known} == {kind: f"{name}ImageProcessor" for kind, name in known.items()}
    assert len(known) >= 10


VARIANTS = [("CLIP", {}), ("CLIP", {"size": {"height": 40, "width": 56}, "crop_size": {"height": 37, "width": 51}}),
            ("CLIP", {"size": {"height": 40, "width": 56}, "do_center_crop": False, "resample": 1}),
            ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 50}, "resample": 4}),
            ("ChineseCLIP", {"size": {"shortest_edge": 31}, "crop_size": 36}), ("Siglip", {}), ("Siglip", {"size": [30, 50], "resample": 1}),
            ("Bit", {"size": {"shortest_edge": 64}, "crop_size": 56, "image_mean": [.485, .456, .406], "image_std": [.229, .224, .225]}),
            ("Bit", {"do_rescale": False}), ("ViT", {}), ("ViT", {"size": 48, "do_normalize": False}), ("ViT", {"size": 40, "resample": 0}),
            ("DeiT", {"size": 72, "crop_size": 64}), ("Blip", {"size": 64, "resample": 5}), ("ViT", {"size": 33, "image_mean": .4, "image_std": .3})]


@pytest.mark.parametrize("name, changes", VARIANTS, ids=lambda value: str(value)[:50])
def test_every_processor_on_pillow_is_reproduced_to_the_last_bit(tmp_path, name, changes):
    theirs = processor_class(name)(**changes)
    theirs.save_pretrained(tmp_path)
    ours, rng = ImagePreprocessor.from_pretrained(tmp_path), np.random.default_rng(5)
    sizes = [(1, 1), (1, 30), (40, 1), (64, 64), (2, 90), (340, 227)] + [tuple(rng.integers(1, 300, 2)) for _ in range(5)]
    for w, h in sizes:
        image = noise(w, h, w)
        assert same(ours, theirs, image) if changes.get("do_normalize", True) else \
            np.array_equal(ours(image), theirs(image, return_tensors="np")["pixel_values"][0]), (w, h)
        assert ours(image).shape == ours.shape
    again = ImagePreprocessor(**json.loads(json.dumps(ours.settings())))
    assert again.settings() == ours.settings() and np.array_equal(again(image), ours(image))


@pytest.mark.parametrize("changes", [{}, {"patch_size": 7, "max_num_patches": 50, "resample": 3, "image_mean": [.1, .2, .3]}])
def test_naflex_patches_are_reproduced_to_the_last_bit(tmp_path, changes):
    theirs = processor_class("Siglip2")(**changes)
    theirs.save_pretrained(tmp_path)
    ours, rng = ImagePreprocessor.from_pretrained(tmp_path), np.random.default_rng(6)
    assert ours.table is None and ours.shape == (theirs.max_num_patches + 1, theirs.patch_size**2 * 3)
    for w, h in [(1, 1), (1, 2000), (2000, 1), (640, 427)] + [tuple(map(int, rng.integers(1, 700, 2))) for _ in range(12)]:
        rows, wanted = ours(noise(w, h)), theirs(noise(w, h), return_tensors="np")
        assert rows.shape == ours.shape and rows.dtype == np.float32
        assert np.array_equal(rows[:-1], wanted["pixel_values"][0])
        assert rows[-1, :2].tolist() == wanted["spatial_shapes"][0].tolist() and not rows[-1, 2:].any()
        assert int(rows[-1, 0] * rows[-1, 1]) == wanted["pixel_attention_mask"][0].sum()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 32), st.integers(1, 1024))
def test_the_grid_is_the_one_that_the_reference_finds(width, height, patch, patches):
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
    assert grid_size(width, height, patch, patches) == get_image_size_for_max_num_patches(height, width, patch, patches)[::-1]


def test_a_processor_without_a_name_is_the_one_of_the_models_type(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    for kind, rule in (("siglip", "squash"), ("dinov2", "shortest"), ("siglip2", "patches"), ("vit", "squash"), ("clip", "shortest")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert ImagePreprocessor.from_pretrained(tmp_path).rule == rule
    for config in ({"model_type": "bert"}, {}, {"model_type": ["clip"]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValidationError, match="differs from what is reproduced"): ImagePreprocessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="config.json cannot be read"): ImagePreprocessor.from_pretrained(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 250), st.integers(1, 250), st.sampled_from(["bilinear", "bicubic"]),
       st.integers(50, 40_000), st.integers(0, 99))
def test_floats_are_resized_as_torch_does_whatever_the_strips(width, height, w, h, filter, results, seed):
    import torch
    levels = np.asarray(noise(width, height, seed))
    whole = torch.from_numpy(levels.copy()).permute(2, 0, 1).contiguous() * (1 / 255)
    wanted = torch.nn.functional.interpolate(whole[None], (h, w), mode=filter, antialias=True)[0].numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("devsky_nb.images.floats.SERIAL_RESULTS", results)
        assert np.array_equal(resize_floats(levels, (w, h), filter), wanted)


def test_floats_start_no_threads_and_are_the_same_with_any_number():
    import torch
    levels, found = np.asarray(noise(1300, 900)), []
    count = lambda: len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1).contiguous() * (1 / 255)
    whole = lambda: torch.nn.functional.interpolate(pixels[None], (224, 224), mode="bilinear", antialias=True)[0].numpy()

    def run():
        torch.set_num_threads(4)
        for resize in (lambda: resize_floats(levels, (224, 224)), whole):
            before = count()
            found.append((resize(), count() - before))
    threads = torch.get_num_threads()
    try:
        (worker := threading.Thread(target=run)).start()
        worker.join(PATIENCE)
    finally: torch.set_num_threads(threads)
    (ours, started), (theirs, would_start) = found
    assert started == 0 and np.array_equal(ours, theirs) and np.array_equal(ours, whole())
    assert would_start > 0 or sys.platform != "linux", "the control: PyTorch starts threads for the whole"


def test_dinov3_is_squashed_in_floats_and_can_be_looked_at(tmp_path):
    import torch
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 48, "width": 48}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [.485, .456, .406], "image_std": [.229, .224, .225]}))
    ours, image = ImagePreprocessor.from_pretrained(tmp_path), photo(300, 200)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() * (1 / 255)
    resized = torch.nn.functional.interpolate(whole[None], (48, 48), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.mean, ours.std))
    assert np.array_equal(ours(image), ((resized - mean) / std).numpy()) and ours.table is None
    seen = ours.resize_crop(image).astype(int)
    assert seen.shape == (48, 48, 3) and np.abs(seen - np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR))).max() <= 1


@pytest.mark.parametrize("rule", RULES)
def test_rules_agree_about_images_that_fit(rule):
    for w, h in ((64, 64), (128, 128), (1, 1)):
        assert resized_size(w, h, rule, (32, 32)) == (32, 32)
    for w, h in ((100, 50), (33, 70), (1, 20)):
        new_w, new_h = resized_size(w, h, rule, (32, 32))
        assert {"shortest": min(new_w, new_h) == 32, "cover": min(new_w, new_h) == 32, "longest": max(new_w, new_h) == 32,
                "squash": (new_w, new_h) == (32, 32)}[rule]


OPEN_CLIP = {"model_cfg": {"vision_cfg": {"image_size": 32}}, "preprocess_cfg": {}}
TIMM = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [.5] * 3, "std": [.5] * 3}}


def test_a_folder_of_several_libraries_has_several_preprocessors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | TIMM))
    assert ImagePreprocessor.from_pretrained(tmp_path).settings()["size"] == [36, 36]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    assert ImagePreprocessor.from_pretrained(tmp_path).rounding == "even"
    (tmp_path / "preprocessor_config.json").write_text('{"size": 40, "crop_size": 30}')
    assert ImagePreprocessor.from_pretrained(tmp_path).rounding == "down"
    shapes = [ImagePreprocessor.from_pretrained(tmp_path, layout=layout).size for layout in ("transformers", "open_clip", "timm")]
    assert shapes == [(40, 40), (32, 32), (36, 36)]
    with pytest.raises(ValidationError, match="layout='x'"): ImagePreprocessor.from_pretrained(tmp_path, layout="x")
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json"): ImagePreprocessor.from_pretrained(tmp_path, layout="open_clip")


@pytest.mark.parametrize("file, settings", [
    *(("open_clip_config.json", {"model_cfg": {"vision_cfg": {"image_size": size}}}) for size in ("big", -1, 10**9, [1, 2, 3], [], NAN, {})),
    *(("open_clip_config.json", OPEN_CLIP | {"preprocess_cfg": cfg}) for cfg in (
        [1], "x", {"mean": "x"}, {"mean": [1, 2]}, {"std": [0, 0, 0]}, {"resize_mode": "longest", "fill_color": 300},
        {"resize_mode": "longest", "fill_color": [1, "x", 3]}, {"resize_mode": "longest", "fill_color": 1.5})),
    *(("open_clip_config.json", value) for value in ({}, {"model_cfg": 5}, {"model_cfg": {}}, {"model_cfg": {"vision_cfg": []}})),
    *(("config.json", {"pretrained_cfg": TIMM["pretrained_cfg"] | cfg}) for cfg in (
        {"input_size": 224}, {"input_size": [3, 9]}, {"input_size": [3, "a", 9]}, {"input_size": [3, -5, 9]}, {"crop_pct": -1},
        {"crop_pct": HUGE}, {"crop_pct": 1e-9}, {"mean": [1, 2]}, {"std": [1, NAN, 1]}, {"crop_mode": "border", "mean": [5, 5, 5]})),
    ("config.json", {"pretrained_cfg": [5]})], ids=lambda value: repr(value)[:60])
def test_damaged_files_of_other_libraries(tmp_path, file, settings):
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=file) as caught: ImagePreprocessor.from_pretrained(tmp_path)
    assert "Fetch the model again" in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("file, settings", [
    *(("open_clip_config.json", OPEN_CLIP | {"preprocess_cfg": cfg}) for cfg in (
        {"mode": "L"}, {"resize_mode": "stretch"}, {"interpolation": "lanczos"}, {"interpolation": [1]})),
    *(("config.json", {"pretrained_cfg": TIMM["pretrained_cfg"] | cfg}) for cfg in (
        {"input_size": [1, 9, 9]}, {"crop_mode": "x"}, {"interpolation": "random"}, {"interpolation": {"a": 1}}, {"crop_mode": ["x"]})),
    ("preprocessor_config.json", {"image_processor_type": "Siglip2ImageProcessor", "do_resize": False})], ids=lambda value: repr(value)[:60])
def test_what_other_libraries_do_and_we_do_not_is_refused_by_name(tmp_path, file, settings):
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValidationError, match="differs from what is reproduced here"): ImagePreprocessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{"patch_size": v} for v in (0, -1, "a", 10**6, 2.5, NAN)] +
                         [{"max_num_patches": v} for v in (0, -3, "a", HUGE, 10**9, True)] +
                         [{"patch_size": 4096, "max_num_patches": 2}], ids=repr)
def test_damaged_numbers_of_patches(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Siglip2ImageProcessor"} | settings))
    with pytest.raises(ModelLoadError, match="preprocessor_config.json cannot be read"): ImagePreprocessor.from_pretrained(tmp_path)


THIN = [(1, 60_000), (60_000, 1), (2, 500_000), (500_000, 3), (1, 3_000_000), (3_000_000, 1), (3, 70_000), (16_000, 4_000)]


@pytest.mark.slow
def test_huge_and_thin_images_take_little_memory_or_are_refused():
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from resident import peak\n"
            "from PIL import Image; from devsky_nb.images.preprocess import ImagePreprocessor\n"
            "from devsky_nb.errors import ValidationError\n"
            "import torch; torch.nn.functional.interpolate(torch.ones(1, 3, 4, 4), (2, 2), mode='bilinear', antialias=True)\n"
            "kinds = [{}, {'rule': 'squash'}, {'rule': 'longest'}, {'rule': 'cover'}, {'rule': 'patches'}, "
            "{'rule': 'squash', 'filter': 'lanczos', 'crop': 96}, {'rule': 'squash', 'filter': 'bilinear', 'arithmetic': 'torch'}]\n"
            f"for w, h in {THIN}:\n"
            "    image = Image.new('RGB', (w, h)); before = peak()\n"
            "    for kind in kinds:\n"
            "        try: ImagePreprocessor(**kind)(image)\n"
            "        except ValidationError as e: assert e.details['reason'] == 'aspect-ratio', e\n"
            "        assert peak() - before < 700e6, (w, h, kind, peak() - before)\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_an_image_stays_as_it_was_given():
    image = noise(300, 500)
    before = image.tobytes()
    pixels = ImagePreprocessor(64, 64)(image)
    assert image.tobytes() == before and pixels.flags.c_contiguous and pixels.flags.writeable


def test_min_edge_is_enough_for_the_middle_of_a_photograph():
    from skimage import data
    pre = ImagePreprocessor()
    for name in ("astronaut", "coffee", "cat"):
        jpeg = encode(Image.fromarray(getattr(data, name)()).resize((1400, 1000), Image.Resampling.BICUBIC), "JPEG", quality=90)
        image, record = load_image(jpeg, min_edge=pre.min_edge)
        assert record.actions == ("decode: 1/2 scale",) and min(image.size) >= pre.min_edge
        error = (pre.resize_crop(image).astype(float) - pre.resize_crop(load_image(jpeg)[0])) ** 2
        assert 10 * np.log10(255**2 / error.mean()) > 45
