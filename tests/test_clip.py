"CLIPImageEmbedder beyond its lesson: equal to the document's code, the same for every kind of input, whole under failure."
import gc, io, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest, torch
from PIL import Image
from practices_code import Document
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from devsky_nb.clip import CLIPImageEmbedder
from devsky_nb.errors import FileNotFoundError, MLError, ModelNotFoundError, ValidationError
from devsky_nb.images import ImagePolicy
from devsky_nb.registry import locate_model

SIZES = [(64, 64), (1, 1), (3, 200), (301, 97), (97, 302), (640, 427), (223, 225)]


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    "A random CLIP of the real preprocessing (224 px), small inside."
    folder = tmp_path_factory.mktemp("vit")
    cfg = CLIPConfig(text_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99),
                     vision_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=32, projection_dim=48),
                     projection_dim=48)
    torch.manual_seed(0)
    CLIPModel(cfg).eval().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(params=["vit", "tiny-clip"])
def folder(request, vit):
    return vit if request.param == "vit" else locate_model("tiny-clip")


def test_cls_equals_the_documents_code_to_the_last_bit(folder):
    document, ours = Document(str(folder), device="cpu"), CLIPImageEmbedder(folder, device="cpu", output="cls")
    for image in pictures():
        assert torch.equal(document.encode_image(image), ours.encode_image(image))
    for batch_size in (2, 7, 32):
        assert torch.equal(document.encode_images_batch(pictures() * 2, batch_size), ours.encode_images_batch(pictures() * 2, batch_size))


def test_projected_equals_normalised_image_features(folder):
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad(): features = model.get_image_features(pixel_values=pixels).pooler_output
    ours = CLIPImageEmbedder(folder, device="cpu").encode_images_batch(pictures())
    torch.testing.assert_close(ours, features / features.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)


def test_the_same_picture_gives_the_same_vector_whatever_holds_it(tiny, tmp_path):
    for i, image in enumerate(pictures()):
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
            yield pictures()[0]
    stream = tiny.embed_stream(endless(), batch_size=4)
    for i in range(10):
        assert next(stream).index == i
        assert len(taken) <= i + 4
    stream.close()
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("devsky-decode")]


def test_an_error_of_the_source_itself_is_the_callers(tiny):
    def source():
        yield pictures()[0]
        raise OSError("the tape is torn")
    with pytest.raises(OSError, match="torn"): list(tiny.embed_stream(source()))


def test_every_input_has_exactly_one_result_in_order(tiny, tmp_path):
    truncated = tmp_path / "cut.jpg"
    buffer = io.BytesIO()
    pictures()[5].save(buffer, "JPEG")
    truncated.write_bytes(buffer.getvalue()[:2000])
    bad = [tmp_path / "no.jpg", truncated, tmp_path, b"", None, 7, np.zeros((0, 4, 3), np.uint8), "\0", object()]
    mixed = [x for pair in zip(bad, [pictures()[0]] * len(bad)) for x in pair]
    for batch_size in (1, 4, 50):
        results = list(tiny.embed_stream(mixed, batch_size))
        assert [r.index for r in results] == list(range(len(mixed)))
        assert [r.ok for r in results] == [False, True] * len(bad)
        assert all((r.vector is None) != (r.error is None) for r in results)
        assert all(r.error.details["stage"] == "load" for r in results[::2])


def test_batch_error_keeps_the_whole_account(tiny):
    with pytest.raises(ValidationError, match="1 of 3 images failed; first, at index 1") as e:
        tiny.encode_images_batch([pictures()[0], "no.jpg", pictures()[1]])
    assert e.value.details["errors"][0]["error_type"] == "FileNotFoundError"
    assert torch.isfinite(e.value.details["embeddings"]).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [[], (), None, "a.jpg", {"a": 1}, 3, (x for x in "ab")])
def test_batch_wants_a_list(tiny, bad):
    with pytest.raises(ValidationError, match="image_inputs must be a list"): tiny.encode_images_batch(bad)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8", None])
def test_batch_size_is_checked(tiny, bad):
    with pytest.raises(ValidationError, match="batch_size"): tiny.encode_images_batch(pictures(), bad)


@pytest.mark.slow
def test_a_real_allocation_failure_halves_the_batch(tmp_path):
    "In a process whose address space is limited, the allocator really fails."
    cfg = CLIPConfig(text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
                     vision_config=dict(hidden_size=64, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=2, patch_size=32))
    CLIPModel(cfg).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    code = f"""
import resource, sys, numpy as np, torch
from devsky_nb.clip import CLIPImageEmbedder
torch.set_num_threads(1)
e = CLIPImageEmbedder({str(tmp_path)!r}, device="cpu")
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("halved"), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_broken_model_yields_errors_not_vectors(vit, value):
    e = CLIPImageEmbedder(vit, device="cpu")
    with torch.no_grad(): e.model.visual_projection.weight.fill_(value)
    results = list(e.embed_stream(pictures()))
    assert all(isinstance(r.error, MLError) and r.error.details["stage"] == "encode" and r.record for r in results)
    with pytest.raises(MLError, match="non-finite"): e.encode_image(pictures()[0])


def test_many_threads_share_one_embedder(tiny):
    expected = tiny.encode_images_batch(pictures())
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: tiny.encode_images_batch(pictures()), range(16)):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_policy_reaches_the_loader(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    pictures()[0].save(outside)
    e = CLIPImageEmbedder("tiny-clip", device="cpu", policy=ImagePolicy(root=inside))
    with pytest.raises(ValidationError, match="outside"): e.encode_image(outside)


def test_fingerprint_names_everything_that_the_vectors_depend_on(vit, tmp_path):
    def fingerprint(folder, **kw): return CLIPImageEmbedder(folder, device="cpu", **kw).fingerprint
    base = fingerprint(vit)
    copy = shutil.copytree(vit, tmp_path / "copy")
    assert fingerprint(copy) == base
    config = copy / "preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("0.48145466", "0.5"), encoding="utf-8")
    moved = fingerprint(copy)
    model = CLIPModel.from_pretrained(vit)
    with torch.no_grad(): model.logit_scale.add_(1)
    model.save_pretrained(shutil.copytree(vit, tmp_path / "other"))
    names = {base, moved, fingerprint(tmp_path / "other"), fingerprint(vit, output="pooled"), fingerprint(vit, output="cls"),
             fingerprint(vit, precision="bf16"), fingerprint(vit, policy=ImagePolicy(background=(0, 0, 0)))}
    assert len(names) == 7
    assert fingerprint(vit, precision="fp32") == base


def test_a_vision_model_without_texts(vit, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(vit).save_pretrained(tmp_path)
    CLIPImageProcessorPil.from_pretrained(vit).save_pretrained(tmp_path)
    e = CLIPImageEmbedder(tmp_path, device="cpu")
    whole = CLIPImageEmbedder(vit, device="cpu")
    assert torch.equal(e.encode_images_batch(pictures()), whole.encode_images_batch(pictures()))
    assert e.dim == whole.dim == 48
    with pytest.raises(ValidationError, match="no text model"): e.encode_text(["a dress"])


def test_texts_of_every_sort(tiny):
    texts = ["a red dress", "ein rotes Kleid", "赤いドレス", "👗", "\u202e<script>", "a\nb\tc", "dress!!! 50% OFF"]
    v = tiny.encode_text(texts)
    assert v.shape == (len(texts), tiny.dim) and torch.isfinite(v).all()
    torch.testing.assert_close(tiny.encode_text(texts[:1]), v[:1], atol=1e-5, rtol=0)
    assert torch.isfinite(tiny.encode_text(["dress " * 300], truncate=True)).all()
    for bad in (None, "a dress", ["a", ""], ["a", None], [], [b"a"]):
        with pytest.raises(ValidationError, match="non-empty strings"): tiny.encode_text(bad)


def test_default_model_offline_and_not_cached_names_both_ways_out(tmp_path):
    with pytest.raises(ModelNotFoundError) as e: CLIPImageEmbedder(cache_dir=tmp_path, offline=True)
    assert "devsky models prefetch clip-vit-base" in str(e.value) and "--model tiny-clip" in str(e.value)


def test_missing_file_is_caught_by_either_name(tiny):
    import builtins
    for cls in (FileNotFoundError, builtins.FileNotFoundError):
        with pytest.raises(cls): tiny.encode_image("no.jpg")
