"CLIPImageEmbedder beyond its lesson: equal to the document's code, the same for every kind of input, whole under failure."
import copy, gc, io, json, multiprocessing, os, pickle, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest, torch
from PIL import Image
from practices_code import Document
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection
from patience import PATIENCE

from devsky_nb import CLIPImageEmbedder, embed_images, FolderIndex, ModelRegistry, ModelSpec
from devsky_nb.embedding.precision import choose_precision
from devsky_nb.embedding.families import model_runner
from devsky_nb.errors import (FileNotFoundError, InsufficientMemoryError, MLError, ModelLoadError, ModelNotFoundError,
                              ValidationError)
from devsky_nb.hub.locate import locate_model
from devsky_nb.images.policy import ImagePolicy
from devsky_nb.hub.weights import model_bytes
from hubcache import make_repo

SIZES = [(64, 64), (1, 1), (3, 200), (301, 97), (97, 302), (640, 427), (223, 225)]


def images(seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    "A random CLIP of the real preprocessing (224 px), small inside."
    folder = tmp_path_factory.mktemp("vit")
    cfg = CLIPConfig(text_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=99),
                     vision_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                        patch_size=32, projection_dim=48),
                     projection_dim=48)
    torch.manual_seed(0)
    CLIPModel(cfg).eval().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(device):
    return CLIPImageEmbedder("tiny-clip", device=device)


@pytest.fixture(params=["vit", "tiny-clip"])
def folder(request, vit):
    return vit if request.param == "vit" else locate_model("tiny-clip")


def test_cls_equals_the_documents_code_to_the_last_bit(folder):
    document, ours = Document(str(folder), device="cpu"), CLIPImageEmbedder(folder, device="cpu", output="cls", backend="torch")
    for image in images():
        assert torch.equal(document.encode_image(image), ours.encode_image(image))
    for batch_size in (2, 7, 32):
        assert torch.equal(document.encode_images_batch(images() * 2, batch_size),
                           ours.encode_images_batch(images() * 2, batch_size))


@pytest.mark.device
def test_projected_equals_normalised_image_features(folder, device):
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images(), return_tensors="pt")["pixel_values"]
    with torch.no_grad(): features = model.get_image_features(pixel_values=pixels).pooler_output
    ours = CLIPImageEmbedder(folder, device=device, precision="fp32").encode_images_batch(images())
    torch.testing.assert_close(ours, features / features.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)


def test_the_same_image_gives_the_same_vector_whatever_holds_it(tiny, tmp_path):
    for i, image in enumerate(images()):
        path = tmp_path / f"{i}.png"
        image.save(path)
        forms = [str(path), path, path.read_bytes(), image, np.asarray(image)]
        expected = tiny.encode_image(image)
        for batch_size in (1, 2, 3, 32):
            got = tiny.encode_images_batch(forms, batch_size)
            torch.testing.assert_close(got, expected.expand_as(got), atol=1e-5, rtol=0)


def test_stream_is_lazy_bounded_and_stops_when_the_reader_stops(tiny):
    taken = []
    def endless():
        while True:
            taken.append(1)
            yield images()[0]
    stream = tiny.embed_stream(endless(), batch_size=4)
    for i in range(10):
        assert next(stream).index == i
        assert len(taken) <= i + 4
    stream.close()
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("devsky-decode")]


def test_an_error_of_the_source_itself_is_the_callers(tiny):
    def source():
        yield images()[0]
        raise OSError("the tape is torn")
    with pytest.raises(OSError, match="torn"): list(tiny.embed_stream(source()))


@pytest.mark.device
def test_every_input_has_exactly_one_result_in_order(tiny, tmp_path):
    truncated = tmp_path / "cut.jpg"
    buffer = io.BytesIO()
    images()[5].save(buffer, "JPEG")
    truncated.write_bytes(buffer.getvalue()[:2000])
    bad = [tmp_path / "no.jpg", truncated, tmp_path, b"", None, 7, np.zeros((0, 4, 3), np.uint8), "\0", object()]
    mixed = [x for pair in zip(bad, [images()[0]] * len(bad)) for x in pair]
    for batch_size in (1, 4, 50):
        results = list(tiny.embed_stream(mixed, batch_size))
        assert [r.index for r in results] == list(range(len(mixed)))
        assert [r.ok for r in results] == [False, True] * len(bad)
        assert all((r.vector is None) != (r.error is None) for r in results)
        assert all(r.error.details["stage"] == "load" for r in results[::2])


def test_batch_error_keeps_the_whole_account(tiny):
    with pytest.raises(ValidationError, match="1 of 3 images failed; first, at index 1") as e:
        tiny.encode_images_batch([images()[0], "no.jpg", images()[1]])
    assert e.value.details["errors"][0]["error_type"] == "FileNotFoundError"
    assert torch.isfinite(e.value.details["embeddings"]).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [None, "a.jpg", b"", {"a": 1}, 3, np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (8, 8))])
def test_one_image_or_nothing_is_no_batch(tiny, bad):
    with pytest.raises(ValidationError, match="image_inputs must be a list or another iterable"): tiny.encode_images_batch(bad)
    with pytest.raises(ValidationError, match="items must be a list or another iterable"): tiny.embed_stream(bad)


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.zeros((0, 8, 8, 3), np.uint8)])
def test_a_batch_has_at_least_one_image(tiny, nothing):
    with pytest.raises(ValidationError, match="at least one image"): tiny.encode_images_batch(nothing)


def test_every_iterable_of_images_is_a_batch(tiny):
    arrays = np.random.default_rng(1).integers(0, 256, (5, 80, 70, 3), dtype=np.uint8)
    expected = tiny.encode_images_batch(list(arrays))
    for batch in (tuple(arrays), arrays, (a for a in arrays), map(Image.fromarray, arrays), dict(enumerate(arrays)).values()):
        torch.testing.assert_close(tiny.encode_images_batch(batch, 2), expected, atol=1e-5, rtol=0)
    paths = np.array(["no.jpg", "none.png"])
    for batch in (paths, paths.astype(object)): assert [r.source for r in tiny.embed_stream(batch)] == ["no.jpg", "none.png"]
    def source():
        yield arrays[0]
        yield "no.jpg"
    with pytest.raises(ValidationError, match="1 of 2 images failed; first, at index 1"): tiny.encode_images_batch(source())


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8", True])
def test_batch_size_is_checked(tiny, bad):
    with pytest.raises(ValidationError, match="batch_size"): tiny.encode_images_batch(images(), bad)


@pytest.mark.slow
def test_a_real_allocation_failure_halves_the_batch(tmp_path):
    "In a process whose address space is limited, the allocator really fails."
    cfg = CLIPConfig(text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
                     vision_config=dict(hidden_size=64, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=2,
                                        patch_size=32))
    CLIPModel(cfg).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    code = f"""
import resource, sys, numpy as np, torch
from devsky_nb.embedding.embedder import CLIPImageEmbedder
torch.set_num_threads(1)
e = CLIPImageEmbedder({str(tmp_path)!r}, device="cpu", backend="torch")
px = np.random.default_rng(0).standard_normal((64, 3, 224, 224), dtype=np.float32)
expected = e._forward(px[:2])
sizes, run = [], e.model.vision_model.forward
def counted(pixel_values, **kw):
    sizes.append(len(pixel_values))
    return run(pixel_values=pixel_values, **kw)
e.model.vision_model.forward = counted
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, -1))
got = e._forward(px)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert sizes[0] == 64 and len(sizes) > 2, sizes
assert got.shape == (64, 512) and np.abs(got[:2] - expected).max() < 1e-5
print("halved", min(sizes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith("halved"), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_broken_model_yields_errors_not_vectors(vit, value):
    e = CLIPImageEmbedder(vit, device="cpu", registry=ModelRegistry())
    with torch.no_grad(): e.model.visual_projection.weight.fill_(value)
    results = list(e.embed_stream(images()))
    assert all(isinstance(r.error, MLError) and r.error.details["stage"] == "encode" and r.record for r in results)
    with pytest.raises(MLError, match="non-finite"): e.encode_image(images()[0])


@pytest.mark.device
def test_many_threads_share_one_embedder(tiny):
    expected = tiny.encode_images_batch(images())
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: tiny.encode_images_batch(images()), range(16)):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_policy_reaches_the_loader(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    images()[0].save(outside)
    e = CLIPImageEmbedder("tiny-clip", device="cpu", policy=ImagePolicy(root=inside))
    with pytest.raises(ValidationError, match="outside"): e.encode_image(outside)


def test_fingerprint_names_everything_that_the_vectors_depend_on(vit, tmp_path):
    def fingerprint(folder, **kw): return CLIPImageEmbedder(folder, device="cpu", **kw).fingerprint
    base = fingerprint(vit)
    copied = shutil.copytree(vit, tmp_path / "copy")
    assert fingerprint(copied) == base
    config = copied / "preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("0.48145466", "0.5"), encoding="utf-8")
    moved = fingerprint(copied)
    config.write_text((vit / config.name).read_text(encoding="utf-8").replace("0.00392156862745098", "0.0039"), encoding="utf-8")
    scaled = fingerprint(copied)
    model = CLIPModel.from_pretrained(vit)
    with torch.no_grad(): model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(shutil.copytree(vit, tmp_path / "other"))
    names = {base, moved, scaled, fingerprint(tmp_path / "other"), fingerprint(vit, output="pooled"), fingerprint(vit, output="cls"),
             fingerprint(vit, precision="bf16"), fingerprint(vit, policy=ImagePolicy(background=(0, 0, 0)))}
    assert len(names) == 8
    assert fingerprint(vit, precision="fp32") == base


def test_what_does_not_touch_image_vectors_is_not_in_the_fingerprint(vit, tmp_path):
    model = CLIPModel.from_pretrained(vit)
    with torch.no_grad():
        model.logit_scale += 1
        model.text_projection.weight += 1
    model.config.text_config.hidden_act = "gelu"
    model.half().float().save_pretrained(shutil.copytree(vit, tmp_path / "texts"), max_shard_size="100KB")
    (tmp_path / "texts" / "model.safetensors").unlink()
    exact = CLIPModel.from_pretrained(vit)
    exact.vision_model.load_state_dict(model.vision_model.state_dict())
    exact.visual_projection.load_state_dict(model.visual_projection.state_dict())
    exact.save_pretrained(shutil.copytree(vit, tmp_path / "exact"))
    one, other = (CLIPImageEmbedder(tmp_path / name, device="cpu") for name in ("texts", "exact"))
    assert one.fingerprint == other.fingerprint, "shards, texts and their settings, temperature, names of folders"
    assert torch.equal(one.encode_images_batch(images()), other.encode_images_batch(images()))


OTHER_VALUES = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 0.1, "attention_dropout": 0.5, "image_size": 225,
                "initializer_range": 0.5, "initializer_factor": 9.0, "projection_dim": 47, "intermediate_size": 64, "patch_size": 16,
                "hidden_size": 32, "num_hidden_layers": 1, "num_channels": 1}


def test_every_field_of_the_configuration_that_changes_a_vector_changes_the_fingerprint(vit, tmp_path):
    base = CLIPImageEmbedder(vit, device="cpu")
    expected = base.encode_images_batch(images())
    fields = json.loads((vit / "config.json").read_text(encoding="utf-8"))["vision_config"]
    changed = []
    for name in set(fields) & set(OTHER_VALUES) | {"hidden_act", "layer_norm_eps", "num_attention_heads"}:
        folder = shutil.copytree(vit, tmp_path / name)
        config = json.loads((vit / "config.json").read_text(encoding="utf-8"))
        config["vision_config"][name] = OTHER_VALUES[name]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            e = CLIPImageEmbedder(folder, device="cpu")
            vectors = e.encode_images_batch(images())
        except (ModelLoadError, ValidationError, MLError): continue  # the weights do not fit, and that is said
        differs = not torch.equal(vectors, expected)
        assert differs <= (e.fingerprint != base.fingerprint), name
        if differs: changed.append(name)
    assert set(changed) >= {"hidden_act", "layer_norm_eps", "num_attention_heads"}
    assert set(fields) - set(OTHER_VALUES) <= {"dtype", "model_type", "torch_dtype"}, "a field that this test does not know"


def test_labels_in_the_configuration_are_nothing_to_the_fingerprint(vit, tmp_path):
    folder = shutil.copytree(vit, tmp_path / "labels")
    config = json.loads((vit / "config.json").read_text(encoding="utf-8"))
    config |= {"_name_or_path": "somebody/else", "transformers_version": "4.0.0", "architectures": ["CLIPModel"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert CLIPImageEmbedder(folder, device="cpu").fingerprint == CLIPImageEmbedder(vit, device="cpu").fingerprint


def test_the_fingerprint_is_of_the_weights_that_compute_not_of_the_files(vit, tmp_path):
    "A file may be replaced while its model is in memory, with the same size and the old date."
    folder = shutil.copytree(vit, tmp_path / "model")
    e = CLIPImageEmbedder(folder, device="cpu")
    expected = CLIPImageEmbedder(vit, device="cpu").fingerprint
    file = folder / "model.safetensors"
    about = file.stat()
    data = bytearray(file.read_bytes())
    data[-4:] = bytes(4)
    other = folder / "other"
    other.write_bytes(data)
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    os.replace(other, file)
    assert e.fingerprint == expected
    assert torch.equal(e.encode_images_batch(images()), CLIPImageEmbedder(vit, device="cpu").encode_images_batch(images()))
    with pytest.raises(ModelLoadError, match="were replaced since"): e.with_backend("other", e._runner)


def test_a_data_set_of_another_configuration_is_refused(vit, tmp_path):
    for n, image in enumerate(images()[:3]):
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / f"{n}.png")
    folder = shutil.copytree(vit, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    embed_images(tmp_path / "in", tmp_path / "out", CLIPImageEmbedder(vit, device="cpu"))
    other = CLIPImageEmbedder(folder, device="cpu")
    with pytest.raises(ValidationError, match="vectors of two kinds"): embed_images(tmp_path / "in", tmp_path / "out", other)
    with pytest.raises(ValidationError, match="their cosines mean nothing"):
        FolderIndex(tmp_path / "out").search(images=images()[:1], embedder=other)


@pytest.mark.parametrize("place", [None, "vision_config", "text_config"])
def test_a_quantized_checkpoint_is_refused_at_once(tmp_path, place):
    folder = shutil.copytree(locate_model("tiny-clip"), tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config if place is None else config[place])["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    registry = ModelRegistry()
    with pytest.raises(ModelLoadError, match="quantized"): CLIPImageEmbedder(folder, device="cpu", registry=registry)
    assert registry.unload(folder) == 0


@pytest.mark.parametrize("name", ["vision_model.post_layernorm.bias", "text_model.final_layer_norm.weight", "logit_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_at_once(vit, tmp_path, name, value):
    model = CLIPModel.from_pretrained(vit)
    [parameter] = [p for n, p in model.named_parameters() if n == name]
    with torch.no_grad(): parameter.reshape(-1)[0] = value
    model.save_pretrained(shutil.copytree(vit, tmp_path / "model"))
    registry = ModelRegistry()
    with pytest.raises(ModelLoadError, match=f"the weight {name} is NaN or infinite: fetch or save"):
        CLIPImageEmbedder(tmp_path / "model", device="cpu", registry=registry)
    assert registry.unload(tmp_path / "model") > 0, "no lease is left"


def test_weights_that_were_never_loaded_are_refused(vit):
    registry = ModelRegistry()
    with registry.lease(vit, device="cpu", dtype=torch.float32) as model:
        model.visual_projection.to("meta")
        with pytest.raises(ModelLoadError, match="visual_projection.weight was not loaded"):
            CLIPImageEmbedder(vit, device="cpu", registry=registry)


@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16"])
def test_a_folder_of_half_precision_works_on_the_cpu(vit, tmp_path, precision):
    exact = CLIPImageEmbedder(vit, device="cpu").encode_images_batch(images())
    for variant in (None, "fp16"):
        folder = shutil.copytree(vit, tmp_path / str(variant), ignore=shutil.ignore_patterns("model*"))
        CLIPModel.from_pretrained(vit).half().save_pretrained(folder, variant=variant)
        vectors = CLIPImageEmbedder(folder, device="cpu", precision=precision).encode_images_batch(images())
        assert (vectors * exact).sum(1).min() > 0.99


def spawned(e, connection):
    connection.send((e.fingerprint, e.encode_image(images()[0]).numpy()))


def test_an_embedder_can_be_pickled(shop):
    registry = shop_registry(shop)
    for e in (CLIPImageEmbedder("tiny-clip", device="cpu", output="pooled", policy=ImagePolicy(background=(0, 0, 0))),
              CLIPImageEmbedder("ours", registry=registry, revision="v1"),
              CLIPImageEmbedder(locate_model("tiny-clip"), device="cpu", precision="bf16"),
              choose_precision(CLIPImageEmbedder("tiny-clip", device="cpu"), [], images=1)):
        again = pickle.loads(pickle.dumps(e))
        assert (again.fingerprint, again.output, again.precision, again.policy, again.path) == (e.fingerprint, e.output, e.precision, e.policy, e.path)
        assert torch.equal(again.encode_image(images()[1]), e.encode_image(images()[1]))


@pytest.mark.slow
def test_an_embedder_can_be_sent_to_a_process_that_was_spawned():
    e = CLIPImageEmbedder("tiny-clip", device="cpu", output="pooled")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=spawned, args=(e, there))
    process.start()
    assert here.poll(100)
    fingerprint, vector = here.recv()
    process.join()
    assert fingerprint == e.fingerprint
    np.testing.assert_allclose(vector, e.encode_image(images()[0]).numpy(), atol=1e-6)


def test_what_is_unpickled_makes_the_same_vectors_or_an_error(vit, tmp_path):
    folder = shutil.copytree(vit, tmp_path / "model")
    sent = pickle.dumps(CLIPImageEmbedder(folder, device="cpu", registry=ModelRegistry()))
    config = folder / "preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("0.48145466", "0.5"), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="where the embedder was pickled"): pickle.loads(sent)


def test_copies_have_leases_of_their_own(shop):
    registry = shop_registry(shop)
    e = CLIPImageEmbedder("ours", registry=registry)
    for twin in (copy.copy(e), copy.deepcopy(e), copy.deepcopy({"embedder": e})["embedder"]):
        assert twin.model is e.model and twin.fingerprint == e.fingerprint
        twin.close()
        assert e.encode_image(images()[0]).shape == (1, 48)
    e.close()
    with pytest.raises(ValidationError, match="closed"): copy.copy(e)
    assert registry.unload("ours") > 0


def test_a_vision_model_without_texts(vit, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(vit).save_pretrained(tmp_path)
    CLIPImageProcessorPil.from_pretrained(vit).save_pretrained(tmp_path)
    e = CLIPImageEmbedder(tmp_path, device="cpu")
    whole = CLIPImageEmbedder(vit, device="cpu")
    assert torch.equal(e.encode_images_batch(images()), whole.encode_images_batch(images()))
    assert e.dim == whole.dim == 48
    with pytest.raises(ValidationError, match="no text model"): e.encode_text(["a dress"])


@pytest.mark.device
def test_texts_of_every_sort(tiny):
    texts = ["a red dress", "ein rotes Kleid", "赤いドレス", "👗", "\u202e<script>", "a\nb\tc", "dress!!! 50% OFF"]
    v = tiny.encode_text(texts)
    assert v.shape == (len(texts), tiny.dim) and torch.isfinite(v).all()
    torch.testing.assert_close(tiny.encode_text(texts[:1]), v[:1], atol=1e-5, rtol=0)
    assert torch.isfinite(tiny.encode_text(["dress " * 300], truncate=True)).all()
    for bad in (None, "", " ", b"a dress", {"a": 1}, ["a", ""], ["a", None], [], [b"a"], 3, iter(())):
        with pytest.raises(ValidationError, match="non-empty strings"): tiny.encode_text(bad)


def test_one_text_is_one_row_and_many_are_as_each_alone(tiny):
    one = tiny.encode_text("a red dress")
    assert one.shape == (1, tiny.dim)
    torch.testing.assert_close(tiny.encode_text(t for t in ["blue jeans", "a red dress"])[1:], one, atol=1e-5, rtol=0)
    many = [f"{i % 10} {'very ' * (i % 4)}red dresses" for i in range(600)]
    v = tiny.encode_text(many)
    torch.testing.assert_close(v[[0, 255, 256, 599]], torch.cat([tiny.encode_text(many[i]) for i in (0, 255, 256, 599)]), atol=1e-5,
                               rtol=0)
    with pytest.raises(ValidationError, match="text 400 has"): tiny.encode_text([*many[:400], "dress " * 200, *many[400:]])


def test_the_tokenizer_is_read_once_and_by_many_threads(monkeypatch):
    import transformers
    reads, read = [], transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **kw: reads.append(a) or read(*a, **kw))
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    assert not reads, "an embedder of images needs no tokenizer"
    texts = [["dress"] * (i % 3 + 1) + ["a long " * i + "coat"] for i in range(1, 9)] * 6
    with ThreadPoolExecutor(20) as pool: found = list(pool.map(e.encode_text, texts))
    e.with_backend("other", e._runner).encode_text("a hat")
    assert len(reads) == 1
    for got, want in zip(found, map(e.encode_text, texts)): torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_model_without_a_tokenizer_says_so(vit):
    with pytest.raises(ModelLoadError, match="no tokenizer that can be read"):
        CLIPImageEmbedder(vit, device="cpu").encode_text("a dress")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, np.float16, np.float32, np.float64])
def test_labels_are_judged_from_vectors_of_any_float_type(tiny, dtype):
    exact = tiny.encode_images_batch(images())
    vectors = exact.to(dtype) if isinstance(dtype, torch.dtype) else exact.numpy().astype(dtype)
    p = tiny.zero_shot(vectors, ["dress", "hat {x}"])
    assert p.dtype == np.float32 and p.shape == (len(SIZES), 2) and np.abs(p.sum(1) - 1).max() < 1e-5
    np.testing.assert_allclose(p, tiny.zero_shot(exact, ["dress", "hat {x}"]), atol=.2)


@pytest.mark.parametrize("vectors",
                         [torch.zeros(128), torch.zeros(2, 64), torch.zeros(1, 2, 128), torch.zeros(2, 128, dtype=torch.int32),
                          "vectors", [["a"]], np.zeros((3, 128), bool)])
def test_what_is_no_set_of_vectors_has_no_labels(tiny, vectors):
    with pytest.raises(ValidationError, match="vectors must be"): tiny.zero_shot(vectors, ["dress"])


@pytest.mark.parametrize("labels", [[], "dress", ["a", 3], None])
def test_labels_are_a_list_of_texts(tiny, labels):
    with pytest.raises(ValidationError, match="labels must be a list of texts"): tiny.zero_shot(torch.zeros(2, 128), labels)


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def shop(tmp_path, vit):
    "A cache with a model in two versions: the older one is the tiny CLIP, the newer another."
    def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors")}
    make_repo(tmp_path / "hub", "shop/clip", {OLD: files(locate_model("tiny-clip")), NEW: files(vit)}, {"main": NEW, "v1": OLD})
    return tmp_path / "hub"


def shop_registry(shop, **options):
    registry = ModelRegistry(shop, offline=True, device="cpu", **options)
    registry.register(ModelSpec("ours", "shop/clip", "clip"))
    return registry


def test_a_registered_model_is_known_by_its_alias_and_in_memory_once(shop):
    registry = shop_registry(shop)
    by_alias, by_id = CLIPImageEmbedder("ours", registry=registry), CLIPImageEmbedder("shop/clip", registry=registry, output="cls")
    assert by_alias.model is by_id.model is registry.get_model("ours") and by_alias.path.name == NEW
    assert by_alias.dim == 48
    half = CLIPImageEmbedder("ours", registry=registry, precision="bf16")
    assert half.model is not by_alias.model
    assert (half.model.dtype, by_alias.model.dtype) == (torch.bfloat16, torch.float32)


def test_without_a_registry_embedders_of_a_cache_share_one_model(shop):
    one, two = (CLIPImageEmbedder("shop/clip", device="cpu", cache_dir=shop, offline=True) for _ in range(2))
    assert one.registry is two.registry and one.model is two.model
    assert CLIPImageEmbedder("tiny-clip", device="cpu").model is CLIPImageEmbedder("tiny-clip", device="cpu").model


def test_a_revision_is_a_branch_a_tag_or_a_commit(shop):
    registry = shop_registry(shop)
    found = {revision: CLIPImageEmbedder("ours", registry=registry, revision=revision) for revision in (None, "main", "v1", OLD,
                                                                                                        NEW)}
    assert [e.path.name for e in found.values()] == [NEW, NEW, OLD, OLD, NEW]
    assert found["v1"].fingerprint == CLIPImageEmbedder("tiny-clip", device="cpu").fingerprint != found[None].fingerprint
    assert found["v1"].model is found[OLD].model
    with pytest.raises(ModelNotFoundError): CLIPImageEmbedder("ours", registry=registry, revision="v9")


def test_the_lockfile_of_a_registry_holds_for_its_embedders(shop, tmp_path):
    registry = shop_registry(shop, lockfile=tmp_path / "locked.json")
    registry.prefetch("ours", revision=OLD)
    e = CLIPImageEmbedder("ours", registry=registry)
    assert e.path.name == OLD and e.model is registry.get_model("ours")
    assert CLIPImageEmbedder("shop/clip", device="cpu", cache_dir=shop, offline=True).path.name == NEW


def test_an_offline_registry_fetches_nothing_for_an_embedder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="(?i)offline.* forbids fetching"):
        CLIPImageEmbedder("clip-vit-base", registry=ModelRegistry(tmp_path, offline=True, device="cpu"))
    for twice in ({"cache_dir": tmp_path}, {"offline": True}):
        with pytest.raises(ValidationError, match="leave cache_dir and offline out"):
            CLIPImageEmbedder("tiny-clip", registry=ModelRegistry(), **twice)
    with pytest.raises(ValidationError, match="expected a ModelRegistry"): CLIPImageEmbedder("tiny-clip", registry="hub")


def test_twenty_threads_that_make_an_embedder_get_one_model(shop):
    registry = shop_registry(shop)
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda i: CLIPImageEmbedder("ours", registry=registry, output=("projected", "cls")[i % 2]), range(20)))
    assert len({id(e.model) for e in made}) == 1 and made[0].model is registry.get_model("ours")
    def work(e):
        with e: return e.encode_image(images()[0])
    with ThreadPoolExecutor(20) as pool: vectors = list(pool.map(work, made))
    assert all(torch.equal(v, vectors[i % 2]) for i, v in enumerate(vectors))
    assert registry.unload("ours") > 0, "all leases were given back"


def test_a_leased_model_stays_while_an_embedder_lives(shop):
    registry = shop_registry(shop)
    with CLIPImageEmbedder("ours", registry=registry) as e:
        twin = e.with_backend("other", model_runner(e.model))
        with pytest.raises(MLError, match="in use"): registry.unload("ours")
    with pytest.raises(MLError, match="in use"): registry.unload("ours")
    assert twin.encode_image(images()[0]).shape == (1, 48)
    twin.close()
    twin.close()
    assert registry.unload("ours") > 0


def test_the_registrys_limit_counts_embedders(shop):
    registry = shop_registry(shop, max_bytes=model_bytes(CLIPImageEmbedder("tiny-clip", device="cpu").model) + 1000)
    e = CLIPImageEmbedder("ours", registry=registry)
    with pytest.raises(InsufficientMemoryError): CLIPImageEmbedder("tiny-clip", registry=registry)
    assert e.encode_image(images()[0]).shape == (1, 48)
    e.close()
    assert CLIPImageEmbedder("tiny-clip", registry=registry).encode_image(images()[0]).shape == (1, 128)


def test_an_embedder_that_is_forgotten_gives_its_lease_back(shop):
    registry = shop_registry(shop)
    e = CLIPImageEmbedder("ours", registry=registry)
    stream = e.embed_stream(images(), batch_size=2)
    next(stream)
    del e
    with pytest.raises(MLError, match="in use"): registry.unload("ours")
    stream.close()
    del stream
    gc.collect()
    assert registry.unload("ours") > 0


def test_a_closed_embedder_refuses_everything_and_still_says_what_it_was(vit):
    e = CLIPImageEmbedder(vit, device="cpu", registry=ModelRegistry())
    fingerprint = e.fingerprint
    started = e.embed_stream(images(), batch_size=2)
    next(started)
    e.close()
    for call in (lambda: e.encode_image(images()[0]), lambda: e.encode_image("no.jpg"), lambda: e.encode_images_batch(images()),
                 lambda: e.encode_text("a"),
                 lambda: e.zero_shot(torch.zeros(1, 48), ["a"]), lambda: e.embed_stream(images()), lambda: e.model,
                 lambda: e.with_backend("other", lambda x: x), lambda: list(started)):
        with pytest.raises(ValidationError, match="closed"): call()
    assert (e.dim, e.fingerprint) == (48, fingerprint) and "closed" in repr(e)


def test_an_embedder_that_cannot_be_made_leaves_no_lease(tmp_path):
    folder = shutil.copytree(locate_model("tiny-clip"), tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}', encoding="utf-8")
    registry = ModelRegistry()
    with pytest.raises(ValidationError, match="preprocessing that differs") as kept:
        CLIPImageEmbedder(folder, device="cpu", registry=registry)
    assert kept.value.__traceback__ is not None and registry.unload(folder) > 0


def test_a_pipeline_is_no_embedder():
    for name, says in (("tiny-sdxl", "only CLIP models"), (locate_model("tiny-sdxl"), "needs a CLIP model")):
        with pytest.raises(ValidationError, match=says): CLIPImageEmbedder(name, device="cpu", registry=ModelRegistry())


def test_another_backend_is_another_embedder(tiny):
    before, state = tiny.encode_images_batch(images()), dict(vars(tiny))
    class Receipt:
        def to_dict(self): return {}
    receipt = Receipt()
    other = tiny.with_backend("zeros", lambda pixels: np.zeros((len(pixels), 128), np.float32), min_edge=64, receipt=receipt)
    assert (other.backend, other.min_edge, other.receipt) == ("zeros", 64, receipt) and other.model is tiny.model
    assert other.fingerprint == tiny.fingerprint.replace(tiny.backend, "zeros-edge64")
    assert not other.encode_image(images()[0]).any() and torch.equal(other.encode_text("a"), tiny.encode_text("a"))
    assert torch.equal(tiny.encode_images_batch(images()), before)
    assert {**state, **vars(tiny)} == vars(tiny)
    assert tiny.receipt is None


def test_default_model_offline_and_not_cached_names_both_ways_out(tmp_path):
    with pytest.raises(ModelNotFoundError) as e: CLIPImageEmbedder(cache_dir=tmp_path, offline=True)
    assert "devsky models prefetch clip-vit-base" in str(e.value) and "--model tiny-clip" in str(e.value)


def test_missing_file_is_caught_by_either_name(tiny):
    import builtins
    for cls in (FileNotFoundError, builtins.FileNotFoundError):
        with pytest.raises(cls): tiny.encode_image("no.jpg")
