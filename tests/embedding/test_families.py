"Every family of image models: the vectors of its own library, its own texts, and everything that takes an embedder."
import json, pickle, shutil

import numpy as np, pytest, torch, transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file

from devsky_nb import (check_image_set, CLIPImageEmbedder, embed_images, FolderIndex, ImageEmbedder, ImagePolicy, ModelRegistry,
                       similar_pairs, VectorIndex)
from devsky_nb.embedding.families import BY_TYPE, FAMILIES
from devsky_nb.cli import main
from devsky_nb.embedding.worker import EmbedderSpec
from devsky_nb.errors import ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.load import MODEL_CLASSES
from image_models import SAVED, save_model
from lyinghub import LyingHub

SIZES = [(64, 64), (40, 90), (97, 33), (32, 32), (120, 50)]
TEXTS = ["a photo of a red dress", "blue jeans", "this is a green hat ."]
WITH_TEXTS = [kind for kind in SAVED if kind in ("clip", "metaclip_2", "altclip", "chinese_clip", "siglip", "siglip2")]


def some(kinds, *quick):
    "Kinds as parameters: these at once, the others with the slow tests."
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def images(seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {kind: save_model(kind, folder / kind) for kind in SAVED}


def unit(features): return features / features.norm(dim=-1, keepdim=True)


def prepared(folder):
    "What transformers' own processor makes of the images, or ours where it has none without torchvision."
    described = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    name = described["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
    if name == "DINOv3ViTImageProcessor":
        from devsky_nb.images.preprocess import ImagePreprocessor
        ours = ImagePreprocessor.from_pretrained(folder)
        return {"pixel_values": torch.from_numpy(np.stack([ours(image) for image in images()]))}
    return dict(getattr(T, f"{name}Pil").from_pretrained(folder)(images(), return_tensors="pt"))


def reference(kind, folder, output):
    "Vectors as transformers' documentation computes them."
    inputs = prepared(folder)
    name, options = MODEL_CLASSES[kind]
    model = getattr(T, name).from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        if output == "projected" and hasattr(model, "get_image_features"): return unit(model.get_image_features(**inputs).pooler_output)
        out = (model if kind != "clip" else model.vision_model)(**inputs)
        if output == "projected": return unit(out.pooler_output if "image_embeds" not in out else out.image_embeds)
        if output == "mean": return unit(out.last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0):].mean(1))
        if output == "cls" or kind == "vit": return unit(out.last_hidden_state[:, 0])
        return unit(out.pooler_output)


def test_the_tables_of_loading_and_of_families_name_the_same_models():
    assert set(MODEL_CLASSES) == set(BY_TYPE) and set(SAVED) <= set(BY_TYPE)
    assert {FAMILIES[name].name for name in FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize("kind", some(SAVED, "altclip", "siglip", "siglip2", "dinov2", "dinov3_vit", "vit"))
def test_vectors_are_those_of_transformers(saved, kind):
    for output in BY_TYPE[kind].outputs:
        if kind == "clip_vision_model" and output != "projected": continue  # its class gives no other
        if kind in ("metaclip_2", "altclip", "chinese_clip") and output != "projected": continue
        expected = reference(kind, saved[kind], output)
        for backend in ("torch", None):
            with ImageEmbedder(saved[kind], device="cpu", output=output, backend=backend) as e:
                got = e.encode_images_batch(images(), 3)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
                torch.testing.assert_close(e.encode_image(images()[1])[0], expected[1], atol=1e-5, rtol=0)
                assert (e.family.name, e.dim, e.output) == (BY_TYPE[kind].name, expected.shape[1], output)


@pytest.mark.parametrize("kind", some(WITH_TEXTS, "altclip", "metaclip_2", "siglip", "siglip2"))
def test_texts_are_those_of_transformers(saved, kind):
    tokenizer = T.AutoTokenizer.from_pretrained(saved[kind])
    model = getattr(T, MODEL_CLASSES[kind][0]).from_pretrained(saved[kind]).eval()
    pads = kind.startswith("siglip")
    length = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "max_length": length} if pads else {"padding": True}
    tokens = tokenizer(TEXTS, return_tensors="pt", truncation=pads, **options)
    mask = {} if pads else {"attention_mask": tokens["attention_mask"]}
    with torch.inference_mode(): expected = unit(model.get_text_features(input_ids=tokens["input_ids"], **mask).pooler_output)
    with ImageEmbedder(saved[kind], device="cpu") as e:
        torch.testing.assert_close(e.encode_text(TEXTS), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(e.encode_text(TEXTS[1]), expected[1:2], atol=1e-5, rtol=0)
        assert e.reads_texts
        with pytest.raises(ValidationError, match="tokens and the model reads"): e.encode_text("a dress " * 30)
        assert e.encode_text("a dress " * 30, truncate=True).isfinite().all()


@pytest.mark.parametrize("kind", some(WITH_TEXTS, "clip", "siglip2"))
def test_labels_are_judged_as_the_model_was_trained(saved, kind):
    model = getattr(T, MODEL_CLASSES[kind][0]).from_pretrained(saved[kind]).eval()
    labels = ["dress", "hat", "coat"]
    with ImageEmbedder(saved[kind], device="cpu") as e:
        v = e.encode_images_batch(images())
        sentence = "This is a photo of {}." if kind.startswith("siglip") else "a photo of a {}"
        cosines = v @ e.encode_text([sentence.replace("{}", label) for label in labels]).T
        logits = cosines * model.logit_scale.exp().detach()
        expected = (logits + model.logit_bias.detach()).sigmoid() if kind.startswith("siglip") else logits.softmax(-1)
        np.testing.assert_allclose(e.zero_shot(v, labels), expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(e.zero_shot(v, labels, relative=True), logits.softmax(-1).numpy(), atol=1e-5)
        other = e.zero_shot(v, labels, "a {}")
        assert np.abs(other - e.zero_shot(v, labels)).max() > 0


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_reads_lower_case_and_the_padding(saved, kind):
    with ImageEmbedder(saved[kind], device="cpu") as e:
        upper, lower = e.encode_text(["A Photo of a RED dress", "a photo of a red dress"])
        assert torch.equal(upper, lower)
        alone = e.encode_text("blue jeans")
        torch.testing.assert_close(e.encode_text(["blue jeans", "a dress, a hat"])[:1], alone, atol=1e-6, rtol=0)


def test_siglips_own_tokenizer_is_read_without_the_library_that_its_class_wants(tmp_path):
    torch.manual_seed(0)
    SAVED["siglip"](tmp_path, tokenizer_class="SiglipTokenizer")
    with ImageEmbedder(tmp_path, device="cpu") as e:
        plain, marked = e.encode_text(["a red dress", "a: red, DRESS!"])
        assert torch.equal(plain, marked), "SigLIP was trained without punctuation"


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit"])
def test_what_has_never_seen_a_text_says_so(saved, kind):
    with ImageEmbedder(saved[kind], device="cpu") as e:
        assert not e.reads_texts
        for call in (lambda: e.encode_text("a dress"), lambda: e.zero_shot(e.encode_images_batch(images()), ["dress"])):
            with pytest.raises(ValidationError, match="reads no texts"): call()


def test_naflex_vectors_do_not_depend_on_their_neighbours(saved):
    with ImageEmbedder(saved["siglip2"], device="cpu") as e:
        together = e.encode_images_batch(images())
        for i, image in enumerate(images()): assert torch.allclose(e.encode_image(image)[0], together[i], atol=1e-6)


def test_clip_alone_and_any_family(saved):
    for kind in SAVED:
        if BY_TYPE[kind].name == "clip": CLIPImageEmbedder(saved[kind], device="cpu").close()
        else:
            with pytest.raises(ValidationError, match="CLIPImageEmbedder takes CLIP: use ImageEmbedder"): CLIPImageEmbedder(saved[kind], device="cpu")
    with pytest.raises(ValidationError, match="output='cls'"): ImageEmbedder(saved["siglip"], device="cpu", output="cls")
    with pytest.raises(ValidationError, match="output='projected'"): ImageEmbedder(saved["dinov2"], device="cpu", output="projected")


@pytest.mark.parametrize("kind", some(SAVED, "siglip2"))
def test_an_embedder_of_any_family_can_be_pickled_and_copied(saved, kind):
    with ImageEmbedder(saved[kind], device="cpu", backend="torch") as e:
        again = pickle.loads(pickle.dumps(e))
        assert type(again) is ImageEmbedder and again.fingerprint == e.fingerprint
        assert torch.equal(again.encode_image(images()[1]), e.encode_image(images()[1]))
        again.close()


# the fingerprint

CHANGES = {
    "clip": {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": .1},
    "siglip": {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": .1},
    "siglip2": {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": .1},
    "dinov2": {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": .1},
    "dinov3_vit": {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": .1, "rope_theta": 7.},
    "vit": {"num_attention_heads": 4, "hidden_act": "relu", "layer_norm_eps": .1}}
NO_CHANGE = {"initializer_range": .5, "use_mask_token": False, "attention_dropout": .5, "drop_path_rate": .3, "attention_probs_dropout_prob": .4}


@pytest.mark.parametrize("kind", some(CHANGES, "siglip", "dinov3_vit"))
def test_what_forward_reads_is_in_the_fingerprint_and_nothing_else_is(saved, tmp_path, kind):
    base = ImageEmbedder(saved[kind], device="cpu", backend="torch")
    expected = base.encode_images_batch(images())
    for n, (name, value) in enumerate((CHANGES[kind] | NO_CHANGE).items()):
        folder = shutil.copytree(saved[kind], tmp_path / str(n))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        part = config["vision_config"] if "vision_config" in config else config
        if name in NO_CHANGE and name not in part: continue
        part[name] = value
        config |= {"_name_or_path": "somebody/else", "transformers_version": "4.0"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with ImageEmbedder(folder, device="cpu", backend="torch") as e:
            differs = not torch.equal(e.encode_images_batch(images()), expected)
            assert differs == (name in CHANGES[kind]) == (e.fingerprint != base.fingerprint), name


@pytest.mark.parametrize("kind", some(SAVED, "siglip2"))
def test_a_fingerprint_covers_weights_preprocessing_output_and_what_computes(saved, tmp_path, kind):
    def fingerprint(folder, **options):
        with ImageEmbedder(folder, device="cpu", **options) as e: return e.fingerprint
    base = fingerprint(saved[kind], backend="torch")
    assert base == fingerprint(saved[kind], backend="torch", precision="fp32")
    names = {base, fingerprint(saved[kind], precision="bf16"), fingerprint(saved[kind], backend="torch", policy=ImagePolicy(background=(0, 0, 0)))}
    names |= {fingerprint(saved[kind], backend="torch", output=output) for output in BY_TYPE[kind].outputs[1:]}
    folder = shutil.copytree(saved[kind], tmp_path / "other")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"image_mean": [.4, .4, .4]}), encoding="utf-8")
    names.add(fingerprint(folder, backend="torch"))
    shutil.copy(saved[kind] / file.name, file)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith(".weight") and "norm" in n.lower() and "text" not in n)
    weights[name] = weights[name] + .25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    names.add(fingerprint(folder, backend="torch"))
    assert len(names) == 5 + len(BY_TYPE[kind].outputs) - 1, names


# refusals

def test_a_classifier_without_a_pooler_has_no_invented_one(saved):
    with ImageEmbedder(saved["vit"], device="cpu") as e:
        assert e.model.pooler is None
        with ImageEmbedder(saved["vit"], device="cpu", registry=ModelRegistry()) as again:
            assert torch.equal(e.encode_image(images()[0]), again.encode_image(images()[0]))


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
@pytest.mark.parametrize("change, says", [
    ({"model_type": "bert"}, "and no vector of it is known"), ({"model_type": None}, "and no vector of it is known"),
    ({"auto_map": {"AutoModel": "ours.Model"}}, "names code"), ({"model_type": ["clip"]}, "no vector of it is known"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized"),
    ({"quantization_config": {"quant_method": "gptq"}}, "is no quantization that this package reads")])
def test_what_cannot_be_embedded_with_is_refused(saved, tmp_path, kind, change, says):
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    registry = ModelRegistry()
    with pytest.raises(ModelLoadError, match=says): ImageEmbedder(folder, device="cpu", registry=registry)
    assert registry.unload(folder) == 0, "nothing was loaded"


def hub_files(folder, without=(), **config):
    "A checkpoint as a Hub would have it."
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | config).encode()
    return files


def online(monkeypatch, hub):
    "The Hub's client asks this server."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def weights_sent(hub): return [path for command, path in hub.log if path.endswith("model.safetensors") and command == "GET"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, without, config, says", [
    ("siglip", ("tokenizer.json",), {}, "reads texts, and tokenizer.json .* is missing"),
    ("dinov2", ("preprocessor_config.json",), {}, "has no preprocessor_config.json"),
    ("clip", (), {"model_type": "llama"}, "a model of type 'llama'"),
    ("clip", (), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "holds a quantized model"),
    ("clip", (), {"auto_map": {"AutoModel": "ours.Model"}}, "names code")])
def test_the_small_files_are_asked_before_the_weights_are_fetched(saved, tmp_path, monkeypatch, kind, without, config, says):
    with LyingHub({"files": hub_files(saved[kind], without, **config)}) as hub:
        online(monkeypatch, hub)
        with pytest.raises(ModelLoadError, match=says): ImageEmbedder("shop/clip", device="cpu", registry=ModelRegistry(tmp_path / "hub"))
        assert hub.log and not weights_sent(hub)


@pytest.mark.slow
def test_a_model_that_can_be_used_is_fetched_whole_and_once(saved, tmp_path, monkeypatch):
    with LyingHub({"files": hub_files(saved["siglip"])}) as hub:
        online(monkeypatch, hub)
        for _ in range(2):
            with ImageEmbedder("shop/clip", device="cpu", registry=ModelRegistry(tmp_path / "hub")) as e:
                with ImageEmbedder(saved["siglip"], device="cpu") as local: assert e.fingerprint == local.fingerprint
                assert e.encode_text("a dress").isfinite().all()
        assert len(weights_sent(hub)) == 1


def test_a_model_that_is_not_here_is_named_with_its_way(tmp_path):
    for name, says in (("siglip2-base", "devsky models prefetch siglip2-base"), ("dinov2-base", "prefetch dinov2-base"),
                       ("marqo-fashionsiglip", "prefetch marqo-fashionsiglip"), ("google/siglip-so400m-patch14-384", "hf download google")):
        with pytest.raises(ModelNotFoundError, match=says): ImageEmbedder(name, device="cpu", cache_dir=tmp_path, offline=True)


# everything that takes an embedder

@pytest.mark.parametrize("kind", some(["siglip", "siglip2", "dinov2", "dinov3_vit", "vit", "altclip"], "siglip2", "dinov3_vit"))
def test_jobs_searches_pairs_and_checks_take_every_family(saved, tmp_path, kind):
    shop = tmp_path / "shop"
    shop.mkdir()
    for n, image in enumerate(images()): image.save(shop / f"{n}.png")
    with ImageEmbedder(saved[kind], device="cpu") as e:
        assert embed_images(shop, tmp_path / "out", e).embedded == len(SIZES)
        index = FolderIndex(tmp_path / "out")
        assert index.search(images=[images()[2]], embedder=e, k=1).ids[0, 0] == "2.png"
        own = VectorIndex(e.encode_images_batch(images()).numpy(), fingerprint=e.fingerprint)
        assert own.search(images=images(), embedder=e, k=1).rows[:, 0].tolist() == list(range(len(SIZES)))
        assert sum(map(len, similar_pairs(own.vectors, .999999))) == 0
        report = check_image_set({"images": [{"path": str(shop / f"{n}.png"), "label": ["dress", "hat"][n % 2]} for n in range(5)]}, e)
        assert report.results["successful"] == 5
        assert report.findings["label_method"] == "zero-shot" if e.reads_texts else report.findings["label_method"].startswith("centroids")
        if e.reads_texts: assert len(index.search(texts=["a red dress"], embedder=e, k=2).ids[0]) == 2


@pytest.mark.parametrize("kind", some(["siglip", "siglip2", "dinov2", "clip_vision_model"], "siglip2"))
def test_workers_make_the_same_embedder(saved, kind):
    with ImageEmbedder(saved[kind], device="cpu", backend="torch", registry=ModelRegistry()) as e:
        there = EmbedderSpec.of(e).load()
        assert there.fingerprint == e.fingerprint and torch.equal(there.encode_image(images()[0]), e.encode_image(images()[0]))
        there.close()


@pytest.mark.parametrize("kind", some(["siglip2", "dinov2"], "dinov2"))
def test_the_command_embeds_with_any_family(saved, tmp_path, kind, capsys):
    (tmp_path / "shop").mkdir()
    for n, image in enumerate(images()): image.save(tmp_path / "shop" / f"{n}.png")
    assert main(["embed", str(tmp_path / "shop"), "--out", str(tmp_path / "out"), "--model", str(saved[kind]), "--device", "cpu"]) == 0
    with ImageEmbedder(saved[kind], device="cpu") as e: assert FolderIndex(tmp_path / "out").fingerprint == e.fingerprint


def test_a_widget_takes_any_family(saved, tmp_path):
    ui = pytest.importorskip("ipywidgets") and pytest.importorskip("devsky_nb.ui.embedding_explorer")
    (tmp_path / "shop").mkdir()
    for n, image in enumerate(images()): image.save(tmp_path / "shop" / f"{n}.png")
    with ImageEmbedder(saved["dinov2"], device="cpu") as e: assert ui.embedding_explorer(tmp_path / "shop", e) is not None
