"Faster arithmetic beyond its lesson: one vector for one image, planted outliers, failing candidates, interruptions, receipts."
import io, itertools, json, threading
from dataclasses import replace

import numpy as np, pytest, torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from devsky_nb import CLIPImageEmbedder, ModelRegistry
from devsky_nb.embedding import backends as B, precision as P
from devsky_nb.embedding.vectors import clip_vectors
from devsky_nb.errors import ModelLoadError, ValidationError
from devsky_nb.demo.garments import render_garment, sample_garments
from devsky_nb.images.load import load_image

INT8 = ["int8-onnxruntime", "int8-onnxruntime-w7"]


@pytest.fixture(scope="module")
def images():
    return [render_garment(g, seed=i) for i, g in enumerate(sample_garments(72, seed=3))]


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def pixels(tiny, images):
    return np.stack([tiny.preprocess(p) for p in images])


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    "No test here is about how fast something is."
    for name, value in {"ROUNDS": 1, "TIMED": 8}.items(): monkeypatch.setattr(P, name, value)


@pytest.fixture
def fast(monkeypatch):
    "A processor that computes well in every number format, pretended: no candidate is refused for its speed."
    monkeypatch.setattr(B, "slower_product", lambda product, device="cpu": None)


@pytest.fixture
def slow(monkeypatch):
    "A processor that computes well in fp32 only, pretended."
    monkeypatch.setattr(B, "slower_product", lambda product,
                        device="cpu": "its matrix product takes 9.0 times as long as fp32 on this machine")


def small_clip(folder, cls=CLIPModel, layers=2, **vision):
    config = CLIPConfig(text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         vocab_size=99),
                        vision_config={**dict(hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=3,
                                              patch_size=32,
                                              image_size=96, projection_dim=40, hidden_act="quick_gelu"), **vision},
                                              projection_dim=40)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    if cls is not CLIPModel:
        whole, model = model, cls(model.config.vision_config).eval()
        model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def own_embedder():
    "With a model that nobody else has, to be damaged."
    return CLIPImageEmbedder("tiny-clip", device="cpu", registry=ModelRegistry())


def cosine(a, b):
    return float((a * b).sum(1).min())


@pytest.mark.parametrize("bits", [7, 8])
def test_products_are_whole_numbers_even_where_sixteen_bits_would_overflow(bits):
    "All weights and activations at their largest: the sum that a saturating instruction cuts off."
    linear = torch.nn.Linear(512, 8, bias=False)
    with torch.no_grad(): linear.weight.copy_(torch.tensor([1., -1.]).repeat(4)[:, None].expand(8, 512))
    g = B.Graph(bits)
    run = B.make_session(g, B.quantized_linear(g, B.quantize_rows(g, "x"), linear, bias=False), ["M", 512])
    x = np.ones((3, 512), np.float32) * np.float32([[1], [100], [-1e-3]])
    np.testing.assert_allclose(run.run(None, {"x": x})[0], x @ linear.weight.detach().numpy().T, rtol=1e-5)


@pytest.mark.parametrize("backend", INT8)
def test_a_vector_depends_on_nothing_but_its_image(tiny, pixels, backend, few_threads):
    run = B.BACKENDS[backend].build(tiny.model, "projected")
    alone = np.concatenate([run(p[None]) for p in pixels[:24]])
    rng = np.random.default_rng(0)
    for threads, size in itertools.product((1, 2, 3, 8), (1, 2, 5, 24)):
        torch.set_num_threads(threads)
        order = rng.permutation(24)
        assert np.array_equal(np.concatenate([run(pixels[order[i:i + size]]) for i in range(0, 24, size)]),
                              alone[order]), (threads, size)
    extreme = pixels[:4].copy()
    extreme[1:] = [np.zeros_like(extreme[0]), np.full_like(extreme[0], 3e4), -extreme[0]]
    assert np.array_equal(run(extreme)[0], alone[0])


@pytest.mark.parametrize("vision",
                         [{}, {"hidden_act": "gelu"}, {"num_channels": 3, "num_hidden_layers": 1, "patch_size": 16},
                          {"layer_norm_eps": 1e-3}])
@pytest.mark.parametrize("output", ["projected", "pooled", "cls"])
def test_the_graph_is_the_model(tmp_path, vision, output):
    model = CLIPModel.from_pretrained(small_clip(tmp_path, **vision)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .02)  # biases and norms that are not trivial
    x = torch.randn(6, 3, 96, 96)
    with torch.inference_mode(): exact = clip_vectors(model, x, output).numpy()
    got = B.int8_runner(model, output)(x.numpy())
    assert got.shape == exact.shape and got.dtype == np.float32 and cosine(got, exact) > .999


def test_a_vision_model_without_texts_and_an_unknown_activation(tmp_path, pixels):
    e = CLIPImageEmbedder(small_clip(tmp_path / "a", CLIPVisionModelWithProjection), device="cpu")
    x = np.random.default_rng(0).standard_normal((5, 3, 96, 96), dtype=np.float32)
    assert cosine(B.int8_runner(e.model)(x), e._forward(x)) > .999
    e = CLIPImageEmbedder(small_clip(tmp_path / "b", hidden_act="relu"), device="cpu")
    with pytest.raises(ModelLoadError, match="hidden_act='relu'"): B.int8_runner(e.model)


def test_a_damaged_weight_is_refused_and_named(images, fast):
    e = own_embedder()
    sources, reference = P.reference_vectors(e, images)
    with torch.no_grad(): e.model.vision_model.encoder.layers[1].mlp.fc1.weight[0, 0] = float("nan")
    trial, twin = P.try_candidate(e, P.Trial("int8-onnxruntime"), sources, reference)
    assert twin is None and "a weight is not finite" in trial.refused


def plant_outliers(model, channels=4, factor=300.):
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            attn = layer.self_attn
            for norm, readers in ((layer.layer_norm1, (attn.q_proj, attn.k_proj, attn.v_proj)),
                                  (layer.layer_norm2, (layer.mlp.fc1,))):
                norm.weight[:channels] *= factor
                norm.bias[:channels] *= factor
                for reader in readers: reader.weight[:, :channels] /= factor


def test_planted_outliers_make_eight_bits_fall_back(images, fast):
    e = own_embedder()
    before = e.encode_images_batch(images)
    plant_outliers(e.model)
    torch.testing.assert_close(e.encode_images_batch(images), before, atol=1e-4, rtol=0)
    chosen = P.choose_precision(e, images, images=1500)
    assert not chosen.backend.startswith("int8")
    refused = {t.backend: t.refused for t in chosen.receipt.trials}
    assert all("below 0.999" in refused[backend] for backend in INT8)
    assert cosine(chosen.encode_images_batch(images), before) > .999


def test_where_only_fp32_is_fast_nothing_else_is_built(images, slow, monkeypatch):
    def never(model, output): pytest.fail("built, although its product is slow")
    others = {name: replace(backend, build=never) for name, backend in B.BACKENDS.items() if name != "fp32"}
    monkeypatch.setattr(P, "BACKENDS", {"fp32": B.BACKENDS["fp32"]} | others)
    receipt = P.choose_precision(CLIPImageEmbedder("tiny-clip", device="cpu"), images, images=1500).receipt
    assert receipt.backend == "fp32"
    assert all("9.0 times as long as fp32" in t.refused for t in receipt.trials if t.backend in (*INT8, "bf16"))


@pytest.mark.parametrize("winner", ["fp32", "bf16", "int8-onnxruntime"])
def test_a_receipt_chooses_a_faithful_line_and_survives_json(images, winner, fast, monkeypatch):
    "On a processor of each kind, pretended: one candidate is a thousand times as fast as the others."
    monkeypatch.setattr(P, "measure_speeds", lambda candidates,
                        sources: {name: 1000. if name == winner else 1. for name in candidates})
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    shared = {k: v.clone() for k, v in e.model.state_dict().items()}
    tuned = P.choose_precision(e, images, images=3000)
    receipt = tuned.receipt
    chosen = next(t for t in receipt.trials if t.name == receipt.name)
    assert receipt.name == winner
    assert chosen.refused is None
    assert chosen.cosine >= .999
    assert chosen.recall >= .99
    assert chosen.speed == 1000
    assert all((t.refused is None) == (t.speed is not None) for t in receipt.trials)
    assert all(torch.equal(v, shared[k]) and v.dtype == shared[k].dtype for k, v in e.model.state_dict().items())
    stored = P.Receipt.from_dict(json.loads(json.dumps(receipt.to_dict())))
    assert stored == receipt
    other = P.apply_receipt(CLIPImageEmbedder("tiny-clip", device="cpu"), stored)
    assert other.fingerprint == tuned.fingerprint
    assert torch.equal(other.encode_images_batch(images[:9]), tuned.encode_images_batch(images[:9]))
    assert torch.equal(other.encode_text(["a red dress"]), e.encode_text(["a red dress"]))
    exact = P.apply_receipt(tuned, replace(receipt, backend="fp32", min_edge=None))
    assert exact.fingerprint == receipt.reference == e.fingerprint
    assert torch.equal(exact.encode_images_batch(images[:9]), e.encode_images_batch(images[:9]))


def broken_build(model, output): raise MemoryError("Unable to allocate 9 TiB")
def broken_run(model, output): return lambda pixels: np.full((len(pixels), 128), np.nan, np.float32)
def crashing_run(model, output):
    def run(pixels): raise RuntimeError("the kernel is gone")
    return run
def interrupted(model, output): raise KeyboardInterrupt


@pytest.mark.parametrize("build, why",
                         [(broken_build, "MemoryError"), (broken_run, "non-finite"), (crashing_run, "the kernel is gone")])
def test_a_candidate_that_fails_is_refused_and_the_rest_goes_on(images, monkeypatch, build, why):
    monkeypatch.setattr(P, "BACKENDS", {"fp32": B.BACKENDS["fp32"], "bad": B.Backend(build), "good": B.Backend(B.torch_runner)})
    chosen = P.choose_precision(CLIPImageEmbedder("tiny-clip", device="cpu"), images)
    trials = {t.name: t for t in chosen.receipt.trials}
    assert why in trials["bad"].refused and trials["good"].cosine > .9999


def test_an_interruption_changes_nothing(images, monkeypatch):
    registry = ModelRegistry(device="cpu")
    e = CLIPImageEmbedder("tiny-clip", registry=registry)
    monkeypatch.setattr(P, "BACKENDS",
                        {"fp32": B.BACKENDS["fp32"], "stop": B.Backend(interrupted), "copy": B.Backend(B.torch_runner)})
    earlier = P.Receipt("copy", None, "because", e.fingerprint, "cpu", 64, None, 1.)
    tuned = P.apply_receipt(e, earlier)
    state, before = dict(vars(tuned)), tuned.encode_images_batch(images[:3])
    with pytest.raises(KeyboardInterrupt): P.choose_precision(tuned, images)
    assert vars(tuned) == state and e.receipt is None and e.backend == "fp32"
    assert torch.equal(tuned.encode_images_batch(images[:3]), before)
    assert not [t for t in threading.enumerate() if t.name.startswith("devsky")]
    for embedder in (tuned, e): embedder.close()
    assert registry.unload("tiny-clip") > 0, "a candidate still holds a lease"


def test_choosing_leaves_the_callers_embedder_and_one_model(images, fast):
    registry = ModelRegistry(device="cpu")
    e = CLIPImageEmbedder("tiny-clip", registry=registry)
    state, before = dict(vars(e)), e.encode_images_batch(images[:5])
    chosen = P.choose_precision(e, images, images=1500)
    assert chosen is not e and chosen.model is e.model and vars(e) == state | {"_content": e._content}
    assert torch.equal(e.encode_images_batch(images[:5]), before)
    e.close()
    assert chosen.encode_images_batch(images[:5]).shape == before.shape
    with pytest.raises(ValidationError, match="closed"): P.choose_precision(e, images)
    chosen.close()
    assert registry.unload("tiny-clip") > 0, "a candidate still holds a lease"


def test_a_backend_that_is_not_here_says_what_to_install(tiny, monkeypatch):
    found = B.find_spec
    monkeypatch.setattr(B, "find_spec", lambda name: None if name in ("onnx", "onnxruntime", "torchao") else found(name))
    trial, candidate = P.try_candidate(tiny, P.Trial("int8-onnxruntime"), [], None)
    assert trial.refused == "onnx and onnxruntime not installed: pip install 'devsky_nb[fast]'" and candidate is None
    with pytest.raises(ModelLoadError) as e:
        P.apply_receipt(tiny, replace(P.make_receipt(tiny, [], images=1), backend="int8-onnxruntime"))
    assert trial.refused in str(e.value) and "precision='fp32' and a new output" in str(e.value)


def test_samples_of_every_sort(tiny, images, tmp_path):
    assert "0 different readable images" in P.make_receipt(tiny, []).reason
    assert "0 different readable images" in P.make_receipt(tiny, ["no.jpg", b"", None] * 40).reason
    assert "1 different readable images" in P.make_receipt(tiny, [images[0]] * 200).reason
    for i, p in enumerate(images): p.save(tmp_path / f"{i}.png")
    sources, reference = P.reference_vectors(tiny, [*map(str, sorted(tmp_path.iterdir())), "no.jpg", images[0]])
    assert len(sources) == len(reference) == len(images)
    for bad in (None, "a.jpg", {1: 2}, (x for x in images)):
        with pytest.raises(ValidationError, match="sample must be a list"): P.choose_precision(tiny, bad)
    for bad in (0, -1, 2.5, "9"):
        with pytest.raises(ValidationError, match="images=.*: expected a whole number"): P.choose_precision(tiny, images, bad)


@pytest.mark.parametrize("change",
                         [{"trials": [{"nonsense": 1}]}, {"trials": None}, {"min_edge": "all"}, {"min_edge": -1},
                          {"backend": "int4"}, {"backend": ["fp32"]}, {"reference": None}, {"extra": 1}, {"reason": 5},
                          {"device": None}, {"sampled": "64"}, {"images": 1.5}, {"images": True}, {"seconds": "long"},
                          {"trials": 5}, {"trials": [5]}, {"trials": [{"backend": "fp32"}]},
                          {"trials": [{**P.Trial("fp32").__dict__, "speed": "fast"}]}])
def test_a_damaged_receipt_is_refused(change):
    good = P.Receipt("fp32", None, "because", "projected-fp32-0", "cpu", 64, None, 1.).to_dict()
    assert P.Receipt.from_dict(good).backend == "fp32"
    for data in (good | change, None, [], "fp32"):
        with pytest.raises(ValidationError, match="not a receipt"): P.Receipt.from_dict(data)


def test_a_receipt_is_for_one_model_and_one_output(tiny):
    receipt = P.Receipt("fp32", None, "because", tiny.fingerprint, "cpu", 64, None, 1.)
    with pytest.raises(ValidationError, match="choose again"):
        P.apply_receipt(CLIPImageEmbedder("tiny-clip", device="cpu", output="cls"), receipt)
    exact = CLIPImageEmbedder("tiny-clip", device="cpu", precision="fp32")
    with pytest.raises(ValidationError, match="precision='auto'"): P.apply_receipt(exact, receipt)


@pytest.mark.parametrize("wrong", [None, "tiny-clip", CLIPImageEmbedder])
def test_what_is_no_embedder_is_said(wrong):
    receipt = P.Receipt("fp32", None, "because", "projected-fp32-0", "cpu", 64, None, 1.)
    for call in (lambda: P.choose_precision(wrong, []), lambda: P.apply_receipt(wrong, receipt), lambda: receipt.apply(wrong)):
        with pytest.raises(ValidationError, match="expected a CLIPImageEmbedder"): call()


def test_text_of_a_receipt_is_escaped():
    html = P.Receipt("fp32", None, "<script>", "x", "cpu", 0, None, 0., (P.Trial("bf16", refused="<img>"),))._repr_html_()
    assert "<script>" not in html and "<img>" not in html


def test_torchao_rounds_by_token_and_leaves_the_shared_model_alone(tiny, pixels):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    pytest.importorskip("torchao")
    run = B.torch_runner(tiny.model, quantized=True)
    vectors = run(pixels[:6])
    assert cosine(vectors, tiny._forward(pixels[:6])) > .999
    assert np.array_equal(np.concatenate([run(pixels[:1]), run(pixels[1:6])]), vectors)
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


@pytest.mark.slow
def test_compiled_once_for_every_batch_size(tmp_path):
    e = CLIPImageEmbedder(small_clip(tmp_path, layers=1), device="cpu")
    x = np.random.default_rng(0).standard_normal((11, 3, 96, 96), dtype=np.float32)
    run = B.BACKENDS["fp32-compiled"].build(e.model, "projected")
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
    receipt = P.make_receipt(e, files, images=1500)
    trial = next(t for t in receipt.trials if t.name == "fp32-edge64")
    assert trial.cosine is not None and trial.cosine < 1
    smaller = P.apply_receipt(e, replace(receipt, backend="fp32", min_edge=64))
    assert smaller.fingerprint.startswith("projected-fp32-edge64-")
    [small], [whole] = smaller.embed_stream(files[:1]), e.embed_stream(files[:1])
    assert small.record.actions != whole.record.actions and small.vector @ whole.vector > .99
