"""The same numbers as torchvision, open_clip, timm and transformers on torchvision, where these are installed. None of them is needed by
the package; without them these tests are left out."""
import json

import numpy as np, pytest, torch
from PIL import Image

from devsky_nb.images.preprocess import ImagePreprocessor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def torchvision():
    "torchvision; beside the CPU build of PyTorch its compiled operators may be missing, which no transform needs."
    try:
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
        torchvision.library_kept = library
    return torchvision


def noise(w, h, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def sizes(seed, most=400, count=20):
    rng = np.random.default_rng(seed)
    return [(224, 224), (227, 224), (224, 231), (640, 427), (427, 640)] + [tuple(map(int, rng.integers(20, most, 2))) for _ in range(count)]


def agree(ours, theirs, seed, more=()):
    for w, h in sizes(seed) + list(more):
        image = noise(w, h, w + h)
        wanted, found = np.asarray(theirs(image)), ours(image)
        assert found.dtype == wanted.dtype == np.float32 and found.shape == wanted.shape == ours.shape, (w, h)
        assert np.array_equal(found, wanted), ((w, h), np.abs(found - wanted).max())


OPEN_CLIP = [{}, {"resize_mode": "squash", "mean": [.5] * 3, "std": [.5] * 3}, {"resize_mode": "longest", "fill_color": 127},
             {"interpolation": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]}, {"resize_mode": "longest"}, {"interpolation": "random"},
             {"resize_mode": "squash", "interpolation": "bilinear", "mean": .4, "std": .3}]


@pytest.mark.parametrize("preprocess", OPEN_CLIP, ids=lambda cfg: json.dumps(cfg)[:60])
@pytest.mark.parametrize("size", [64, 61, [64, 48], [45, 90]], ids=str)
def test_open_clips_transform(torchvision, tmp_path, preprocess, size):
    transform = pytest.importorskip("open_clip.transform")
    base = transform.merge_preprocess_dict(transform.PreprocessCfg(), preprocess)
    base["size"] = tuple(size) if isinstance(size, list) else (size, size)
    theirs = transform.image_transform_v2(transform.PreprocessCfg(**base), is_train=False)
    config = {"model_cfg": {"vision_cfg": {"image_size": size}}, "preprocess_cfg": preprocess | {"size": 999}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    agree(ImagePreprocessor.from_pretrained(tmp_path), theirs, 1, [(64, 64), (20, 21)] + ([(1, 1), (9, 7)] if size == 64 else []))


TIMM = [{}, {"crop_pct": 1.0, "interpolation": "bilinear"}, {"crop_pct": .95, "crop_mode": "squash"}, {"crop_mode": "border", "crop_pct": 1.0},
        {"crop_mode": "border", "crop_pct": .9, "mean": [.5, .4, .3]}, {"interpolation": "lanczos"}, {"interpolation": "nearest", "crop_pct": .7},
        {"crop_pct": 1.15, "interpolation": "box"}]


@pytest.mark.parametrize("changes", TIMM, ids=lambda cfg: json.dumps(cfg)[:60])
@pytest.mark.parametrize("shape", [[3, 64, 64], [3, 63, 63], [3, 48, 80]], ids=str)
def test_timms_transform(torchvision, tmp_path, changes, shape):
    timm_data = pytest.importorskip("timm.data")
    config = {"input_size": shape, "mean": [.485, .456, .406], "std": [.229, .224, .225]} | changes
    theirs = timm_data.create_transform(**timm_data.resolve_data_config(pretrained_cfg=config), is_training=False)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": config}))
    agree(ImagePreprocessor.from_pretrained(tmp_path), theirs, 2, [(70, 70), (71, 73)])


@pytest.fixture
def transformers_on_torchvision(torchvision, monkeypatch):
    "The module of transformers' processors on torchvision, loaded as it is where torchvision is installed."
    import transformers
    if not transformers.utils.is_torchvision_available(): pytest.skip("transformers sees no torchvision")
    return transformers


DINOV3 = [{}, {"size": {"height": 61, "width": 90}, "resample": 3}, {"size": {"shortest_edge": 50}, "do_center_crop": True, "crop_size": 45},
          {"size": {"height": 40, "width": 50}, "do_center_crop": True, "crop_size": {"height": 47, "width": 53}, "do_normalize": True},
          {"size": {"height": 40, "width": 40}, "do_normalize": False, "rescale_factor": 1 / 127.5}]


@pytest.mark.parametrize("settings", DINOV3, ids=lambda cfg: json.dumps(cfg)[:60])
def test_dinov3s_processor(transformers_on_torchvision, tmp_path, settings):
    from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor
    theirs = DINOv3ViTImageProcessor(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImagePreprocessor.from_pretrained(tmp_path)
    assert ours.settings()["arithmetic"] == "torch"
    agree(ours, lambda image: theirs(image, return_tensors="pt")["pixel_values"][0].numpy(), 3, [(1600, 1200), (30, 1)])


@pytest.mark.parametrize("name, module", [("CLIPImageProcessor", "clip"), ("SiglipImageProcessor", "siglip"), ("BitImageProcessor", "bit"),
                                          ("ViTImageProcessor", "vit")])
def test_with_torchvision_installed_our_numbers_are_those_of_pillow(transformers_on_torchvision, tmp_path, name, module):
    import importlib
    on_torchvision = getattr(importlib.import_module(f"transformers.models.{module}.image_processing_{module}"), name)()
    on_pillow = getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name + "Pil")()
    on_torchvision.save_pretrained(tmp_path)
    ours = ImagePreprocessor.from_pretrained(tmp_path)
    agree(ours, lambda image: on_pillow(image, return_tensors="np")["pixel_values"][0], 4)
    image = noise(640, 480)
    theirs = on_torchvision(image, return_tensors="pt")["pixel_values"][0].numpy()
    levels = np.abs(theirs - ours(image)) * np.reshape(ours.std, (3, 1, 1)) * 255
    assert 0 < levels.max() < 2.5, "the two implementations of transformers are near, and not the same"
