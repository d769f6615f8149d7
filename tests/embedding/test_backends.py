"Backends beyond their lesson: networks of every family, one vector for one image, hostile weights, big graphs, shared memory."
import gc, itertools, threading, weakref
from types import SimpleNamespace

import numpy as np, pytest, torch

try: import torchvision  # noqa: F401
except ImportError: pass
except RuntimeError:  # PyPI's, beside the CPU build of torch, lacks compiled operators that its import names and nobody here calls
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"): OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import (CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model,
                          Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig,
                          SiglipVisionModel, ViTConfig, ViTModel)
from patience import PATIENCE

from devsky_nb import CLIPImageEmbedder, ModelRegistry
from devsky_nb.embedding import backends as B, graphs as G, vision_graphs as V
from devsky_nb.embedding.families import family_of, model_runner
from devsky_nb.errors import ModelLoadError, ValidationError

FORMS = ["fp32-onnxruntime", "int8-onnxruntime", "int8-onnxruntime-w7"]


def noise(*shape, seed=0): return np.random.default_rng(seed).standard_normal(shape, np.float32)


def cosine(a, b): return float((a * b).sum(1).min())


def lively(model):
    "A model whose biases, norms and scales are not trivial."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .02)
    return model.eval()


SHAPE = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=48, patch_size=16)


def clip(**vision):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    config = CLIPConfig(text_config=text, vision_config={**SHAPE, "projection_dim": 40, **vision}, projection_dim=40)
    return lively(CLIPModel(config))


def siglip(**config): return lively(SiglipVisionModel(SiglipVisionConfig(**{**SHAPE, "hidden_act": "gelu_pytorch_tanh", **config})))
def dinov2(**config): return lively(Dinov2Model(Dinov2Config(**{**SHAPE, "layerscale_value": .5, **config})))
def registers(**config): return lively(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**SHAPE, **config})))
def dinov3(**config): return lively(DINOv3ViTModel(DINOv3ViTConfig(**{**SHAPE, "num_register_tokens": 4, "layerscale_value": .5, **config})))
def vit(**config): return lively(ViTModel(ViTConfig(**{**SHAPE, **config})))


NETWORKS = {
    "clip": (clip, {}, 48), "clip with gelu": (clip, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, 48),
    "clip of one layer": (clip, {"num_hidden_layers": 1}, 48), "siglip": (siglip, {}, 48),
    "siglip whose patches leave pixels over": (siglip, {"image_size": 52}, 52),
    "dinov2": (dinov2, {}, 48), "dinov2 of another size": (dinov2, {}, 80), "dinov2 without biases": (dinov2, {"qkv_bias": False}, 48),
    "dinov2 with a gate": (dinov2, {"use_swiglu_ffn": True}, 48), "registers": (registers, {}, 48),
    "registers of another size": (registers, {}, 64), "dinov3": (dinov3, {}, 48), "dinov3 of another size": (dinov3, {}, 80),
    "dinov3 with a gate": (dinov3, {"use_gated_mlp": True, "hidden_act": "silu"}, 48), "vit": (vit, {}, 48)}


def network(name):
    make, config, size = NETWORKS[name]
    return make(**config), noise(7, 3, size, size)


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_the_network(name):
    model, x = network(name)
    for output in family_of(model).outputs:
        why = V.why_no_graph(model, output)
        if why: pytest.skip(why)
        exact = model_runner(model, output)(x)
        assert np.abs(V.GraphRunner(model, output)(x) - exact).max() < 1e-6, output
        for bits in (7, 8): assert cosine(V.GraphRunner(model, output, bits)(x), exact) > .998, (output, bits)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov3"])
@pytest.mark.parametrize("form", FORMS)
def test_a_vector_depends_on_nothing_but_its_image(name, form, few_threads):
    model, _ = network(name)
    if V.why_no_graph(model): pytest.skip(V.why_no_graph(model))
    x = noise(12, 3, 48, 48)
    run = B.BACKENDS[form].build(model, family_of(model).outputs[0])
    alone = np.concatenate([run(image[None]) for image in x])
    rng = np.random.default_rng(0)
    for threads, size in itertools.product((1, 2, 3, 8), (1, 2, 5, 12)):
        torch.set_num_threads(threads)
        order = rng.permutation(12)
        parts = [run(x[order[i:i + size]]) for i in range(0, 12, size)]
        assert np.array_equal(np.concatenate(parts), alone[order]), (threads, size)
    extreme = x[:4].copy()
    extreme[1:] = [np.zeros_like(extreme[0]), np.full_like(extreme[0], 3e4), -extreme[0]]
    assert np.array_equal(run(extreme)[0], alone[0])


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("bits", [7, 8])
def test_products_are_whole_numbers_even_where_sixteen_bits_would_overflow(bits, fit, monkeypatch):
    "All weights and activations at their largest: the sum that a saturating instruction cuts off."
    if fit and not G.sums_fit(): pytest.skip("this processor cuts sums off")
    monkeypatch.setattr(G, "sums_fit", lambda: fit)
    weight = torch.tensor([1., -1.]).repeat(4)[:, None].expand(8, 512)
    g = G.Graph(bits)
    run = G.Session(g, G.linear(g, G.rows_of(g, "x"), weight), ["M", 512]).run
    x = np.ones((3, 512), np.float32) * np.float32([[1], [100], [-1e-3]])
    np.testing.assert_allclose(run(x), x @ weight.numpy().T, rtol=1e-5)


def test_a_form_has_the_same_bits_on_processors_that_store_it_in_another_way(monkeypatch):
    model, x = network("clip")
    if not G.sums_fit(): pytest.skip("this processor knows one way")
    here = V.GraphRunner(model, "projected", 8)(x)
    monkeypatch.setattr(G, "sums_fit", lambda: False)
    assert np.array_equal(V.unit_rows(V.Tower(model, "projected", 8, (48, 48)).session.run(x)), here)


@pytest.mark.parametrize("fit, form", [(True, "int8-onnxruntime"), (False, "int8-onnxruntime-w7")])
def test_the_processor_decides_the_form_of_eight_bits(fit, form, monkeypatch):
    monkeypatch.setattr(B, "sums_fit", lambda: fit)
    model, _ = network("clip")
    assert B.backend_for(model, "int8", "cpu").name == B.candidate_for("cpu", model).name == form


@pytest.mark.parametrize("bf16", [True, False])
def test_gpus_get_half_precision(bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    model, _ = network("clip")
    assert B.candidate_for("cuda:1", model).name == ("bf16-torch" if bf16 else "fp16-torch")
    assert B.candidate_for("mps", model).name == "fp16-torch"
    assert all(B.backend_for(model, "auto", device).name == "fp32-torch" for device in ("cuda", "cuda:3", "mps"))


def test_where_there_is_no_graph_fp32_is_torch_and_eight_bits_are_refused():
    model = clip(hidden_act="relu")
    assert B.backend_for(model, "auto", "cpu").name == "fp32-torch" and B.candidate_for("cpu", model) is None
    for precision, asked in (("int8", None), ("fp32", "onnxruntime")):
        with pytest.raises(ModelLoadError, match="hidden_act='relu'"): B.backend_for(model, precision, "cpu", asked)
    naflex = SimpleNamespace(config=SimpleNamespace(model_type="siglip2"))
    assert "NaFlex" in V.why_no_graph(naflex)


@pytest.mark.parametrize("precision, device, asked", [("int8", "cuda", None), ("int8", "cpu", "torch"), ("fp32", "mps", "onnxruntime"),
                                                      ("bf16", "cpu", "onnxruntime"), ("fp8", "cpu", None), ("fp32", "cpu", "openvino")])
def test_what_is_not_in_the_table_is_one_error(precision, device, asked):
    with pytest.raises(ValidationError): B.backend_for(clip(), precision, device, asked)


def test_without_the_library_there_is_torch(monkeypatch):
    found = B.find_spec
    monkeypatch.setattr(B, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    model, _ = network("clip")
    assert B.backend_for(model, "fp32", "cpu").name == "fp32-torch" and B.candidate_for("cpu", model) is None
    with pytest.raises(ModelLoadError, match="pip install onnxruntime"): B.backend_for(model, "int8", "cpu")


def test_half_precision_leaves_the_shared_model_and_what_reads_texts_alone():
    model, x = network("clip")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = B.BACKENDS["bf16-torch"].build(model, "projected")
    assert cosine(run(x), model_runner(model, "projected")(x)) > .999
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert model.text_model is not None and B.vision_copy(model, torch.bfloat16).text_model is None


# Weights that are not what they should be

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused_in_eight_bits_and_seen_in_fp32(value):
    model, x = network("clip")
    with torch.no_grad(): model.vision_model.encoder.layers[1].mlp.fc1.weight[0, 0] = value
    for bits in (7, 8):
        with pytest.raises(ModelLoadError, match="a weight is not finite"): V.GraphRunner(model, "projected", bits)(x)
    assert not np.isfinite(V.GraphRunner(model, "projected")(x)).all()


def plant_outliers(model, channels=4, factor=300.):
    "Large activations that the next weights take back: nothing changes but the scales."
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            attn = layer.self_attn
            for norm, readers in ((layer.layer_norm1, (attn.q_proj, attn.k_proj, attn.v_proj)), (layer.layer_norm2, (layer.mlp.fc1,))):
                norm.weight[:channels] *= factor
                norm.bias[:channels] *= factor
                for reader in readers: reader.weight[:, :channels] /= factor


def test_planted_outliers_cost_eight_bits_their_digits_and_fp32_nothing():
    model, x = network("clip")
    before = model_runner(model, "projected")(x)
    plant_outliers(model)
    assert np.abs(V.GraphRunner(model, "projected")(x) - before).max() < 1e-6
    assert cosine(V.GraphRunner(model, "projected", 8)(x), before) < .999


def test_a_residual_stream_with_huge_values_keeps_its_digits_in_fp32():
    "Trained towers have a few channels that are a thousand times the others."
    model, x = network("clip")
    with torch.no_grad(): model.vision_model.pre_layrnorm.bias[:2] = torch.tensor([300., -200.])
    assert np.abs(V.GraphRunner(model, "projected")(x) - model_runner(model, "projected")(x)).max() < 2e-6


@pytest.mark.parametrize("scale", [0., 1e-30, 1e6, 1e12])
def test_weights_of_any_size_give_the_models_vectors(scale):
    model, x = network("clip")
    with torch.no_grad(): model.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(scale)
    exact = model_runner(model, "projected")(x)
    for bits in (None, 7, 8):
        assert cosine(V.GraphRunner(model, "projected", bits)(x), exact) > .99


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    "A library that changes what a module computes, and leaves its parts where they are."
    model, x = network("clip")
    monkeypatch.setitem(V.READERS, "clip", lambda model, size, read=V.read_clip: read(clip(), size))
    with torch.no_grad(): model.vision_model.pre_layrnorm.bias[0] += 1
    with pytest.raises(ModelLoadError, match="use backend='torch'"): V.GraphRunner(model, "projected")(x)


# Memory

def sessions(): return sum(isinstance(o, V.Tower) for o in gc.get_objects())


def test_one_graph_for_the_same_weights_and_none_when_nobody_is_left():
    model, x = network("clip")
    before = sessions()
    first, second = V.GraphRunner(model, "projected"), V.GraphRunner(model, "projected")
    got: list = [None] * 8
    def work(i): got[i] = (first, second)[i % 2](x)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(PATIENCE)
    assert all(np.array_equal(vectors, got[0]) for vectors in got) and sessions() == before + 1
    V.GraphRunner(model, "projected", 8)(x)
    assert sessions() == before + 1  # the runner of eight bits is gone, and its graph with it
    del first
    assert sessions() == before + 1
    del second
    gc.collect()
    assert sessions() == before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_embedders_of_one_registry_share_a_graph_until_the_last_is_closed():
    registry = ModelRegistry(device="cpu")
    image = np.zeros((64, 64, 3), np.uint8)
    before = sessions()
    first, second = (CLIPImageEmbedder("tiny-clip", registry=registry) for _ in range(2))
    assert sessions() == before  # who embeds texts only needs none
    assert torch.equal(first.encode_image(image), second.encode_image(image))
    assert first.backend == "fp32-onnxruntime" and sessions() == before + 1
    first.close()
    assert sessions() == before + 1
    second.close()
    assert sessions() == before


def test_weights_that_were_changed_make_another_graph():
    model, x = network("clip")
    first = V.GraphRunner(model, "projected")
    first(x)
    with torch.no_grad(): model.visual_projection.weight.mul_(torch.linspace(1, 2, 40)[:, None])
    assert np.abs(V.GraphRunner(model, "projected")(x) - model_runner(model, "projected")(x)).max() < 1e-6


def test_a_model_in_half_precision_is_computed_in_fp32_by_a_graph():
    model, x = network("clip")
    half = CLIPVisionModelWithProjection(model.config.vision_config).eval()
    half.load_state_dict({k: v for k, v in model.state_dict().items() if k in half.state_dict()})
    g, output = V.network_graph(V.read_clip(half.bfloat16(), (48, 48)), "projected", None)
    assert cosine(V.unit_rows(G.Session(g, output, ["n", 3, 48, 48]).run(x)), model_runner(model, "projected")(x)) > .999


def test_large_constants_are_not_in_the_message(monkeypatch):
    "A message ends at 2 GB; what is handed over beside it does not."
    model, _ = network("clip")
    sizes = []
    describe = G._description
    monkeypatch.setattr(G, "_description", lambda *args: sizes.append(describe(*args)) or sizes[-1])
    V.Tower(model, "projected", None, (48, 48))
    weights = sum(p.numel() * 4 for p in model.vision_model.parameters())
    assert len(sizes[0]) < weights / 4


@pytest.mark.slow
def test_a_graph_of_more_than_two_gigabytes():
    "Three linear layers of 0.75 GB."
    g = G.Graph()
    weights = [torch.ones(1).expand(14_000, 14_000).contiguous() * (i + 1) / 14_000 for i in range(3)]
    x = "x"
    for weight in weights: x = G.linear(g, G.rows_of(g, x), weight)
    run = G.Session(g, x, ["M", 14_000]).run
    np.testing.assert_allclose(run(np.ones((2, 14_000), np.float32)), np.full((2, 14_000), 6), rtol=1e-3)


def test_images_of_another_size_than_the_positions_are_one_error():
    model, _ = network("clip")
    with pytest.raises(ModelLoadError, match="25 patches, and the model has positions for 9"):
        V.GraphRunner(model, "projected")(noise(1, 3, 80, 80))


def test_no_images_and_images_that_are_a_view():
    model, x = network("clip")
    run = V.GraphRunner(model, "projected")
    assert run(x[:0]).shape == (0, 40)
    assert np.array_equal(run(x[::2]), run(x)[::2]) and np.array_equal(run(np.asfortranarray(x)), run(x))


# open_clip's towers

OWN = {"image_size": 48, "layers": 2, "width": 48, "patch_size": 16, "head_width": 16}
SIGLIP = {"image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False, "timm_pool": "map",
          "timm_proj": "none"}


@pytest.fixture(scope="module")
def open_clip(): return pytest.importorskip("open_clip")


def open_clip_model(open_clip, vision, **settings):
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=99, width=32, heads=2, layers=1)
    model = lively(open_clip.model.CLIP(40, open_clip.model.CLIPVisionCfg(**vision), text, **settings))
    model.open_clip_config = {"embed_dim": 40}
    return model


@pytest.mark.slow
@pytest.mark.parametrize("vision, settings", [(OWN, {}), (OWN, {"quick_gelu": True}), (OWN | {"ls_init_value": .5}, {}), (SIGLIP, {})])
def test_the_graph_is_open_clips_tower(open_clip, vision, settings):
    model = open_clip_model(open_clip, vision, **settings)
    assert V.why_no_graph(model) is None
    x = noise(3, *V.example_pixels(model).shape[1:])
    exact = model_runner(model, "projected")(x)
    assert np.abs(V.GraphRunner(model, "projected")(x) - exact).max() < 1e-6
    assert cosine(V.GraphRunner(model, "projected", 8)(x), exact) > .998


@pytest.mark.slow
@pytest.mark.parametrize("vision, why", [(OWN | {"pool_type": "avg"}, "pool_type is 'avg'"), (OWN | {"attentional_pool": True}, "attn_pool"),
                                         ({"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "head_width": 16}, "ModifiedResNet")])
def test_what_open_clip_builds_otherwise_is_computed_by_torch(open_clip, vision, why):
    model = open_clip_model(open_clip, vision)
    assert why in V.why_no_graph(model)
    assert B.backend_for(model, "fp32", "cpu").name == "fp32-torch"
