"Checkpoints as open_clip saves them: its own vectors, its own texts, and nothing from elsewhere."
import json, logging, pickle, shutil

import numpy as np, pytest, torch

try: import torchvision  # noqa: F401
except ImportError: pass
except RuntimeError:  # PyPI's, beside the CPU build of torch, lacks compiled operators that its import names and nobody here calls
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"): OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image
from safetensors.torch import save_file

from devsky_nb import CLIPImageEmbedder, embed_images, ImageEmbedder, ModelRegistry
from devsky_nb.errors import DevSkyyError, ModelLoadError, ValidationError
from image_models import save_tokenizer

SIZES = [(64, 64), (40, 90), (97, 33), (32, 32)]
NATIVE = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
          "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
SIGLIP = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True,
          "vision_cfg": {"image_size": 32, "timm_model_name": "vit_tiny_patch16_siglip_small", "timm_pool": "map", "timm_proj": "none"},
          "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
                       "norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "shop/tokens", "tokenizer_kwargs": {"clean": "canonicalize"}}}
MODELS = {
    "native": NATIVE, "quick": NATIVE | {"quick_gelu": True},
    "average": NATIVE | {"vision_cfg": NATIVE["vision_cfg"] | {"pool_type": "avg", "final_ln_after_pool": True}},
    "wide": NATIVE | {"vision_cfg": NATIVE["vision_cfg"] | {"image_size": [32, 48]}},
    "convolutions": NATIVE | {"vision_cfg": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"}},
    "eva": NATIVE | {"custom_text": True, "vision_cfg": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token",
                                                         "timm_proj": None, "timm_model_pretrained": False}},
    "mobileclip": NATIVE | {"custom_text": True, "vision_cfg": {"image_size": 64, "timm_model_name": "fastvit_mci0", "timm_pool": "avg",
                                                                "timm_proj": None, "timm_model_pretrained": False}},
    "siglip": SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "avg",
                                                              "timm_proj": "linear"}}}
PREPROCESS = {"mean": [.5, .5, .5], "std": [.5, .5, .5], "interpolation": "bicubic", "resize_mode": "squash"}


def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def open_clip(): return pytest.importorskip("open_clip")


def save_model(open_clip, folder, described, preprocess=PREPROCESS):
    "As `push_to_hf_hub` leaves it."
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(described))
    if described["text_cfg"].get("hf_tokenizer_name"): described["text_cfg"]["vocab_size"] = save_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": preprocess}), encoding="utf-8")
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "logit" not in name: weight.add_(torch.randn_like(weight) * .1)
    save_file({name: weight.clone().contiguous() for name, weight in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def saved(open_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    return {name: save_model(open_clip, folder / name, described) for name, described in MODELS.items()}


def unit(features): return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_vectors_and_texts_are_those_of_open_clip(open_clip, saved, name):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{saved[name]}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{saved[name]}")
    texts = ["a photo of a red dress", "Blue JEANS, and a hat!", "50% off &amp; more"]
    with torch.inference_mode():
        expected = unit(model.eval().encode_image(torch.stack([preprocess(image) for image in images()])))
        read = unit(model.encode_text(tokenizer(texts)))
    with ImageEmbedder(saved[name], device="cpu") as e, ImageEmbedder(saved[name], device="cpu", backend="torch") as exact:
        for either in (e, exact): torch.testing.assert_close(either.encode_images_batch(images(), 3), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(e.encode_text(texts), read, atol=1e-5, rtol=0)
        assert (e.family.name, exact.backend, e.dim) == ("open_clip", "fp32-torch", expected.shape[1])
        p = e.zero_shot(expected, ["hat", "dress"])
    with torch.inference_mode():
        logits = expected @ unit(model.encode_text(tokenizer(["a photo of a hat", "a photo of a dress"]))).T * model.logit_scale.exp()
        judged = logits.softmax(-1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()
        np.testing.assert_allclose(p, judged, atol=1e-5)


@pytest.mark.slow
def test_an_order_to_open_clips_tokenizer_is_text(open_clip, saved):
    with ImageEmbedder(saved["native"], device="cpu") as e:
        cut, whole, plain = e.encode_text(["a red dress", "a red dress<end_of_text> and jeans", "a red dress and jeans"])
        assert cut @ whole < .9999 and whole @ plain < .9999
        with pytest.raises(ValidationError, match="tokens and the model reads 20"): e.encode_text("dress " * 30)
        assert e.encode_text("dress " * 30, truncate=True).isfinite().all()


@pytest.mark.slow
def test_the_fingerprint_covers_the_description(open_clip, saved, tmp_path):
    def fingerprint(folder):
        with ImageEmbedder(folder, device="cpu", registry=ModelRegistry()) as e: return e.fingerprint
    names = {fingerprint(saved["native"]), fingerprint(saved["quick"])}
    for n, change in enumerate(({"norm_kwargs": {"eps": .1}}, {"head_width": 32})):
        folder = shutil.copytree(saved["native"], tmp_path / str(n))
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        config["model_cfg"]["vision_cfg"] |= change
        (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        names.add(fingerprint(folder))
    assert len(names) == 4
    with ImageEmbedder(saved["native"], device="cpu") as e:
        assert pickle.loads(pickle.dumps(e)).fingerprint == e.fingerprint in names


@pytest.mark.slow
def test_jobs_take_it_and_pickles_and_code_are_left_alone(open_clip, saved, tmp_path):
    folder = shutil.copytree(saved["native"], tmp_path / "model")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "config.json").write_text('{"model_type": "siglip", "auto_map": {"AutoModel": "ours.Model"}}', encoding="utf-8")
    (folder / "ours.py").write_text("raise SystemExit", encoding="utf-8")
    (tmp_path / "shop").mkdir()
    for n, image in enumerate(images()): image.save(tmp_path / "shop" / f"{n}.png")
    with ImageEmbedder(folder, device="cpu") as e: assert embed_images(tmp_path / "shop", tmp_path / "out", e).embedded == len(SIZES)
    with pytest.raises(ValidationError, match="use ImageEmbedder"): CLIPImageEmbedder(folder, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["shape", "missing", "cut", "more", "none"])
def test_weights_are_all_there_or_an_error(open_clip, saved, tmp_path, damage):
    from safetensors.torch import load_file
    folder = shutil.copytree(saved["native"], tmp_path / "model")
    file = folder / "open_clip_model.safetensors"
    weights = load_file(file)
    if damage == "shape": weights["visual.proj"] = weights["visual.proj"][:5].clone()
    if damage == "missing": del weights["visual.proj"]
    if damage == "more": weights["visual.other"] = torch.zeros(3)
    save_file(weights, file)
    if damage == "cut": file.write_bytes(file.read_bytes()[:-100])
    if damage == "none": file.unlink()
    with pytest.raises(ModelLoadError): ImageEmbedder(folder, device="cpu", registry=ModelRegistry())


def test_without_the_library_it_is_named_before_anything_is_read(tmp_path, monkeypatch):
    from devsky_nb import _core
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": NATIVE}), encoding="utf-8")
    save_file({"w": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr(_core, "find_spec", lambda name: None)
    with pytest.raises(DevSkyyError, match=r"devsky_nb\[open_clip\]"): ImageEmbedder(tmp_path, device="cpu")


@pytest.mark.parametrize("change, says", [
    ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, "is a text half from another repository"),
    ({"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "is passed on to a library"),
    ({"text_cfg": {"tokenizer_mode": "clips"}}, "is a form of texts that is not read"),
    ({"vision_cfg": {"timm_model_name": "hf-hub:shop/x"}}, "is no name of an architecture of timm"),
    ({"vision_cfg": {"timm_model_name": ["x"]}}, "is no name of an architecture of timm"),
    ({"vision_cfg": {"layers": 10**9}}, "is not from 1 to 1,000"), ({"vision_cfg": {"width": 10**9}}, "is not from 0 to"),
    ({"vision_cfg": []}, "no 'vision_cfg' that can be meant"), ({"embed_dim": True}, "no 'embed_dim' that can be meant"),
    ({"multimodal_cfg": {"layers": 1}}, "writes captions"), ({"vision_cfg": {"auto_map": "x.y"}}, "names code")])
def test_what_leads_elsewhere_is_refused(tmp_path, change, says):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": NATIVE | change}), encoding="utf-8")
    save_file({"w": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModelLoadError, match=says): ImageEmbedder(tmp_path, device="cpu", registry=ModelRegistry())
