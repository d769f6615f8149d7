"Faster arithmetic beyond its lesson: one vector for one picture, planted outliers, candidates that fail, interruptions, adoption elsewhere."
import io, itertools, json, subprocess, sys, threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np, pytest, torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from devsky_nb import precision as P
from devsky_nb.clip import CLIPImageEmbedder, clip_vectors
from devsky_nb.errors import ModelLoadError, ValidationError
from devsky_nb.garments import render_garment, sample_garments
from devsky_nb.images import load_image

INT8 = ["int8-onnxruntime", "int8-onnxruntime-w7"]


@pytest.fixture(scope="module")
def pictures():
    return [render_garment(g, seed=i) for i, g in enumerate(sample_garments(72, seed=3))]


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def pixels(tiny, pictures):
    return np.stack([tiny.preprocess(p) for p in pictures])


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fast(monkeypatch):
    "A processor that computes well in every number format, pretended: no candidate is refused for its speed."
    monkeypatch.setattr(P, "slower_product", lambda product, device="cpu": None)


@pytest.fixture
def slow(monkeypatch):
    "A processor that computes well in fp32 only, pretended."
    monkeypatch.setattr(P, "slower_product", lambda product, device="cpu": "its matrix product takes 9.0 times as long as fp32 on this machine")


def small_clip(folder, cls=CLIPModel, layers=2, **vision):
    config = CLIPConfig(text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
                        vision_config={**dict(hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=3, patch_size=32,
                                              image_size=96, projection_dim=40, hidden_act="quick_gelu"), **vision}, projection_dim=40)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    if cls is not CLIPModel:
        whole, model = model, cls(model.config.vision_config).eval()
        model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def cosine(a, b):
    return float((a * b).sum(1).min())


@pytest.mark.parametrize("bits", [7, 8])
def test_products_are_whole_numbers_even_where_sixteen_bits_would_overflow(bits):
    "All weights and activations at their largest: the sum that a saturating instruction cuts off."
    linear = torch.nn.Linear(512, 8, bias=False)
    with torch.no_grad(): linear.weight.copy_(torch.tensor([1., -1.]).repeat(4)[:, None].expand(8, 512))
    g = P.Graph(bits)
    run = P.session(g, P.product(g, P.quantize_rows(g, "x"), linear, bias=False), ["M", 512])
    x = np.ones((3, 512), np.float32) * np.float32([[1], [100], [-1e-3]])
    np.testing.assert_allclose(run.run(None, {"x": x})[0], x @ linear.weight.detach().numpy().T, rtol=1e-5)


@pytest.mark.parametrize("route", INT8)
def test_a_vector_depends_on_nothing_but_its_picture(tiny, pixels, route, few_threads):
    run = P.ROUTES[route].build(tiny)
    alone = np.concatenate([run(p[None]) for p in pixels[:24]])
    rng = np.random.default_rng(0)
    for threads, size in itertools.product((1, 2, 3, 8), (1, 2, 5, 24)):
        torch.set_num_threads(threads)
        order = rng.permutation(24)
        assert np.array_equal(np.concatenate([run(pixels[order[i:i + size]]) for i in range(0, 24, size)]), alone[order]), (threads, size)
    extreme = pixels[:4].copy()
    extreme[1:] = [np.zeros_like(extreme[0]), np.full_like(extreme[0], 3e4), -extreme[0]]
    assert np.array_equal(run(extreme)[0], alone[0])


@pytest.mark.parametrize("vision", [{}, {"hidden_act": "gelu"}, {"num_channels": 3, "num_hidden_layers": 1, "patch_size": 16}, {"layer_norm_eps": 1e-3}])
@pytest.mark.parametrize("output", ["projected", "pooled", "cls"])
def test_the_graph_is_the_model(tmp_path, vision, output):
    model = CLIPModel.from_pretrained(small_clip(tmp_path, **vision)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .02)  # biases and norms that are not trivial
    x = torch.randn(6, 3, 96, 96)
    with torch.inference_mode(): exact = clip_vectors(model, x, output).numpy()
    got = P.int8_runner(SimpleNamespace(model=model, output=output))(x.numpy())
    assert got.shape == exact.shape and got.dtype == np.float32 and cosine(got, exact) > .999


def test_a_vision_model_without_texts_and_an_unknown_activation(tmp_path, pixels):
    e = CLIPImageEmbedder(small_clip(tmp_path / "a", CLIPVisionModelWithProjection), device="cpu")
    x = np.random.default_rng(0).standard_normal((5, 3, 96, 96), dtype=np.float32)
    assert cosine(P.int8_runner(e)(x), e._forward(x)) > .999
    e = CLIPImageEmbedder(small_clip(tmp_path / "b", hidden_act="relu"), device="cpu")
    with pytest.raises(ModelLoadError, match="hidden_act='relu'"): P.int8_runner(e)


def test_a_damaged_weight_is_refused_and_named(pictures, fast):
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    sources, reference = P.reference_vectors(e, pictures)
    with torch.no_grad(): e.model.vision_model.encoder.layers[1].mlp.fc1.weight[0, 0] = float("nan")
    trial, twin = P.try_candidate(e, P.Trial("int8-onnxruntime"), sources, reference)
    assert twin is None and "a weight is not finite" in trial.refused


def plant_outliers(model, channels=4, factor=300.):
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            attn = layer.self_attn
            for norm, readers in ((layer.layer_norm1, (attn.q_proj, attn.k_proj, attn.v_proj)), (layer.layer_norm2, (layer.mlp.fc1,))):
                norm.weight[:channels] *= factor
                norm.bias[:channels] *= factor
                for reader in readers: reader.weight[:, :channels] /= factor


def test_planted_outliers_make_eight_bits_fall_back(pictures, fast):
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    before = e.encode_images_batch(pictures)
    plant_outliers(e.model)
    torch.testing.assert_close(e.encode_images_batch(pictures), before, atol=1e-4, rtol=0)
    receipt = e.tune(pictures, images=1500)
    assert not receipt.route.startswith("int8")
    refused = {t.route: t.refused for t in receipt.trials}
    assert all("below 0.999" in refused[r] for r in INT8)
    assert cosine(e.encode_images_batch(pictures), before) > .999


def test_where_only_fp32_is_fast_nothing_else_is_built(pictures, slow, monkeypatch):
    def never(embedder): pytest.fail("built, although its product is slow")
    monkeypatch.setattr(P, "ROUTES", {name: replace(route, build=route.build if name == "fp32" else never) for name, route in P.ROUTES.items()})
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    receipt = e.tune(pictures, images=1500)
    assert receipt.route == "fp32"
    assert all("9.0 times as long as fp32" in t.refused for t in receipt.trials if t.route in (*INT8, "bf16"))


@pytest.mark.parametrize("winner", ["fp32", "bf16", "int8-onnxruntime"])
def test_a_receipt_chooses_a_faithful_line_and_survives_json(pictures, winner, fast, monkeypatch):
    "On a processor of each kind, pretended: one candidate is a thousand times as fast as the others."
    monkeypatch.setattr(P, "measure_speeds", lambda candidates, sources: {name: 1000. if name == winner else 1. for name in candidates})
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    shared = {k: v.clone() for k, v in e.model.state_dict().items()}
    receipt = e.tune(pictures, images=3000)
    chosen = next(t for t in receipt.trials if t.name == receipt.name)
    assert receipt.name == winner and chosen.refused is None and chosen.cosine >= .999 and chosen.recall >= .99 and chosen.speed == 1000
    assert all((t.refused is None) == (t.speed is not None) for t in receipt.trials)
    assert all(torch.equal(v, shared[k]) and v.dtype == shared[k].dtype for k, v in e.model.state_dict().items())
    stored = P.Receipt.from_dict(json.loads(json.dumps(receipt.to_dict())))
    assert stored == receipt
    other = CLIPImageEmbedder("tiny-clip", device="cpu")
    other.adopt(stored)
    assert other.fingerprint == e.fingerprint
    assert torch.equal(other.encode_images_batch(pictures[:9]), e.encode_images_batch(pictures[:9]))
    assert torch.equal(other.encode_text(["a red dress"]), CLIPImageEmbedder("tiny-clip", device="cpu").encode_text(["a red dress"]))
    e.adopt(replace(receipt, route="fp32", least=None))
    assert e._run is None and e.fingerprint == receipt.reference


def broken_build(embedder): raise MemoryError("Unable to allocate 9 TiB")
def broken_run(embedder): return lambda pixels: np.full((len(pixels), embedder.dim), np.nan, np.float32)
def crashing_run(embedder):
    def run(pixels): raise RuntimeError("the kernel is gone")
    return run
def interrupted(embedder): raise KeyboardInterrupt


@pytest.mark.parametrize("build, why", [(broken_build, "MemoryError"), (broken_run, "non-finite"), (crashing_run, "the kernel is gone")])
def test_a_candidate_that_fails_is_refused_and_the_rest_goes_on(pictures, monkeypatch, build, why):
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    monkeypatch.setattr(P, "ROUTES", {"fp32": P.ROUTES["fp32"], "bad": P.Route(build), "good": P.Route(lambda e: P.torch_runner(e))})
    trials = {t.name: t for t in e.tune(pictures).trials}
    assert why in trials["bad"].refused and trials["good"].cosine > .9999


def test_an_interruption_changes_nothing(pictures, monkeypatch):
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    monkeypatch.setattr(P, "ROUTES", {"fp32": P.ROUTES["fp32"], "stop": P.Route(interrupted), "copy": P.Route(lambda e: P.torch_runner(e))})
    earlier = P.Receipt("copy", None, "because", e.fingerprint, "cpu", 64, None, 1.)
    e.adopt(earlier)
    run, fingerprint, before = e._run, e.fingerprint, e.encode_images_batch(pictures[:3])
    with pytest.raises(KeyboardInterrupt): e.tune(pictures)
    assert e.receipt is earlier and e._run is run and e.fingerprint == fingerprint
    assert torch.equal(e.encode_images_batch(pictures[:3]), before)
    assert not [t for t in threading.enumerate() if t.name.startswith("devsky")]


def test_a_route_that_is_not_here_says_what_to_install():
    "In a process that cannot see the optional packages."
    code = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *a, **k: None if name.split(".")[0] in ("onnx", "onnxruntime", "torchao") else find(name, *a, **k))
from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb import precision as P
from devsky_nb.errors import ModelLoadError
e = CLIPImageEmbedder("tiny-clip", device="cpu")
print(P.try_candidate(P.plain(e), P.Trial("int8-onnxruntime"), [], None)[0].refused)
from dataclasses import replace
try: e.adopt(replace(e.tune([], images=1), route="int8-onnxruntime"))
except ModelLoadError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    refused, error = done.stdout.splitlines()
    assert refused == "onnx and onnxruntime not installed: pip install 'devsky_nb[fast]'", done.stderr
    assert refused in error and "precision='fp32' and a new output" in error


def test_samples_of_every_sort(tiny, pictures, tmp_path):
    assert "0 different readable pictures" in tiny.tune([]).reason
    assert "0 different readable pictures" in tiny.tune(["no.jpg", b"", None] * 40).reason
    assert "1 different readable pictures" in tiny.tune([pictures[0]] * 200).reason
    for i, p in enumerate(pictures): p.save(tmp_path / f"{i}.png")
    sources, reference = P.reference_vectors(tiny, [*map(str, sorted(tmp_path.iterdir())), "no.jpg", pictures[0]])
    assert len(sources) == len(reference) == len(pictures)
    for bad in (None, "a.jpg", {1: 2}, (x for x in pictures)):
        with pytest.raises(ValidationError, match="sample must be a list"): tiny.tune(bad)
    for bad in (0, -1, 2.5, "9"):
        with pytest.raises(ValidationError, match="images must be a whole number"): tiny.tune(pictures, bad)


@pytest.mark.parametrize("change", [{"trials": [{"nonsense": 1}]}, {"trials": None}, {"least": "all"}, {"least": -1}, {"reference": None}, {"extra": 1}])
def test_a_damaged_receipt_is_refused(change):
    good = P.Receipt("fp32", None, "because", "projected-fp32-0", "cpu", 64, None, 1.).to_dict()
    assert P.Receipt.from_dict(good).route == "fp32"
    for data in (good | change, None, [], "fp32"):
        with pytest.raises(ValidationError, match="not a receipt"): P.Receipt.from_dict(data)


def test_a_receipt_is_for_one_model_and_one_output(tiny):
    receipt = P.Receipt("fp32", None, "because", tiny.fingerprint, "cpu", 64, None, 1.)
    with pytest.raises(ValidationError, match="tune again"): CLIPImageEmbedder("tiny-clip", device="cpu", output="cls").adopt(receipt)
    with pytest.raises(ValidationError, match="precision='auto'"): CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32").adopt(receipt)


def test_text_of_a_receipt_is_escaped():
    html = P.Receipt("fp32", None, "<script>", "x", "cpu", 0, None, 0., (P.Trial("bf16", refused="<img>"),))._repr_html_()
    assert "<script>" not in html and "<img>" not in html


def test_torchao_rounds_by_token_and_leaves_the_shared_model_alone(tiny, pixels):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    pytest.importorskip("torchao")
    run = P.torch_runner(tiny, quantized=True)
    vectors = run(pixels[:6])
    assert cosine(vectors, tiny._forward(pixels[:6])) > .999
    assert np.array_equal(np.concatenate([run(pixels[:1]), run(pixels[1:6])]), vectors)
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


@pytest.mark.slow
def test_compiled_once_for_every_batch_size(tmp_path):
    e = CLIPImageEmbedder(small_clip(tmp_path, layers=1), device="cpu")
    x = np.random.default_rng(0).standard_normal((11, 3, 96, 96), dtype=np.float32)
    run = P.ROUTES["fp32-compiled"].build(e)
    from torch._dynamo.utils import counters
    frames = counters["frames"]["ok"]
    for n in (1, 8, 11): np.testing.assert_allclose(run(x[:n]), e._forward(x[:n]), atol=1e-5)
    assert counters["frames"]["ok"] == frames


@pytest.mark.slow
def test_smaller_decoding_is_one_more_candidate(tmp_path):
    files = []
    for i, garment in enumerate(sample_garments(66, seed=5)):
        buffer = io.BytesIO()
        render_garment(garment, size=256, seed=i).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    receipt = e.tune(files, images=1500)
    trial = next(t for t in receipt.trials if t.name == "fp32-least64")
    assert trial.cosine is not None and trial.cosine < 1
    e.adopt(replace(receipt, route="fp32", least=64))
    assert e.fingerprint.startswith("projected-fp32-least64-")
    [small], [whole] = e.embed_stream(files[:1]), P.plain(e).embed_stream(files[:1])
    assert small.record.actions != whole.record.actions and small.vector @ whole.vector > .99
