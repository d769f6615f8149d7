"Images on their way to a GPU, on a pretended one: bytes, pinned, one batch ahead; the CPU's vectors; and nothing on another GPU."
import gc, io, itertools, threading
from dataclasses import replace

import numpy as np, pyarrow.parquet as pq, pytest, torch
from PIL import Image
from patience import PATIENCE

from devsky_nb import CLIPImageEmbedder, embed_images, ImageEmbedder, ImagePolicy, load_image, ModelRegistry
from devsky_nb.embedding import feeding, precision
from devsky_nb.embedding.backends import BACKENDS
from devsky_nb.embedding.embedder import Embedded
from devsky_nb.embedding.feeding import decoding_threads, Feed, look_up, table_on_device
from devsky_nb.embedding.rows import inputs_ahead
from devsky_nb.embedding.families import model_runner
from devsky_nb.errors import InsufficientMemoryError, MLError, ValidationError
from devsky_nb.images.preprocess import ImagePreprocessor
from image_models import save_model
from pretended_gpu import pretended

KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])
SIDE = 64  # of what tiny-clip takes
CROP = SIDE * SIDE * 3  # bytes


def noise(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8)) for w, h in rng.integers(20, 140, (n, 2))]


def embedder(device, precision="fp32", **options):
    return CLIPImageEmbedder("tiny-clip", device=device, precision=precision, backend="torch", registry=ModelRegistry(), **options)


def vectors(results): return np.stack([result.vector for result in results])


class Logged:
    "A runner that notes how many images it is given."
    def __init__(self, runner, log): self.runner, self.log = runner, log
    def __call__(self, pixels):
        self.log.append(len(pixels))
        return self.runner.forward(pixels)


def logging(e, log):
    "The same embedder; what its model is given is noted."
    runner = model_runner(e.model, e.output)
    return e.with_backend("fp32", replace(runner, forward=Logged(runner, log)))


# The numbers

@pytest.mark.parametrize("settings", [{}, {"size": 33, "crop": 33}, {"size": 36, "crop": 32}, {"size": 31, "crop": 36}, {"size": 1, "crop": 1},
                                      {"mean": (0, .5, 1), "std": (1e-3, 1, 7.)}, {"rescale_factor": 1.}, {"rescale_factor": 1e-5, "mean": (-3, 9.5, 1e6)}])
@pytest.mark.parametrize("policy", [ImagePolicy(), ImagePolicy(background=(0, 0, 0))])
def test_a_look_up_on_the_device_is_the_cpus_for_every_crop_and_policy(settings, policy):
    preprocess = ImagePreprocessor(**settings)
    sources = []
    for image, mode in zip(noise(8) + [Image.new("RGB", (1, 1), (0, 128, 255)), Image.new("RGB", (3, 700))], itertools.cycle(["RGB", "RGBA", "L", "P", "CMYK"])):
        image = image.convert(mode)
        if mode == "RGBA": image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(data := io.BytesIO(), "TIFF" if mode == "CMYK" else "PNG")
        sources.append(load_image(data.getvalue(), policy)[0])
    levels = torch.from_numpy(np.stack([preprocess.resize_crop(image) for image in sources]))
    table = torch.from_numpy(preprocess.table)
    wanted = torch.from_numpy(np.stack([preprocess(image) for image in sources]))
    assert torch.equal(look_up(table, levels), wanted)
    for dtype in (torch.bfloat16, torch.float16): assert torch.equal(look_up(table.to(dtype), levels), wanted.to(dtype))


def test_every_level_of_every_channel_has_its_number():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    table = torch.from_numpy(ImagePreprocessor().table)
    assert torch.equal(look_up(table, levels).view(3, 256), table)


@KINDS
@pytest.mark.parametrize("output", ["projected", "cls"])
def test_vectors_are_the_cpus_to_the_last_bit_and_errors_keep_their_places(kind, output):
    sources = noise(11)
    sources[3:3] = ["no-such.jpg", b"no image"]
    wanted = list(embedder("cpu", output=output).embed_stream(sources, 4))
    with pretended(kind):
        e = embedder(kind, output=output)
        got = list(e.embed_stream(sources, 4))
        single = e.encode_image(sources[0])
        together = e.encode_images_batch(sources[:3])
    assert [result.index for result in got] == list(range(13)) and [result.ok for result in got] == [result.ok for result in wanted]
    assert all(np.array_equal(a.vector, b.vector) for a, b in zip(got, wanted) if a.ok)
    assert [type(result.error) for result in got] == [type(result.error) for result in wanted]
    torch.testing.assert_close(single, together[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_sees_the_numbers_that_the_cpu_would_give_it(name, dtype):
    pixels = []
    with pretended("cuda"):
        e = CLIPImageEmbedder("tiny-clip", device="cuda", precision=name, registry=ModelRegistry())
        runner = model_runner(e.model)
        def forward(x):
            pixels.append(x.cpu())
            return runner.forward(x)
        e = e.with_backend(name, replace(runner, forward=forward))
        list(e.embed_stream(noise(3)))
    assert torch.equal(pixels[0], torch.from_numpy(np.stack([e.preprocess(image) for image in noise(3)])).to(dtype))


@KINDS
@pytest.mark.parametrize("model", ["siglip2", "dinov3_vit"])
def test_models_without_a_table_are_fed_one_batch_ahead_too(kind, model, tmp_path):
    folder = save_model(model, tmp_path / model)
    wanted = vectors(ImageEmbedder(folder, device="cpu", backend="torch").embed_stream(noise(11), 4))
    with pretended(kind) as gpu:
        e = ImageEmbedder(folder, device=kind, precision="fp32", registry=ModelRegistry())
        gpu.copies = {"to": 0, "from": 0}
        got = vectors(e.embed_stream(noise(11), 4))
        assert e._table is None and gpu.copies["to"] == gpu.copies["from"] == 3
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@KINDS
def test_a_data_set_is_the_cpus(kind, tmp_path):
    for i, image in enumerate(noise(21)): image.save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "copy.png").write_bytes((tmp_path / "05.png").read_bytes())
    embed_images(tmp_path, tmp_path / "cpu", embedder("cpu"), batch_size=8)
    with pretended(kind) as gpu:
        e = embedder(kind)
        e.fingerprint  # reads the weights
        gpu.copies, gpu.copied, gpu.synchronisations = {"to": 0, "from": 0}, {"to": 0, "from": 0}, 0
        report = embed_images(sorted(tmp_path.glob("*.*")), tmp_path / "gpu", e, batch_size=8)
    assert report.embedded == 21 and gpu.copies == {"to": 3, "from": 3} and gpu.copied["to"] == 3 * 8 * CROP and gpu.synchronisations == 3
    assert pq.read_table(tmp_path / "gpu")["embedding"].equals(pq.read_table(tmp_path / "cpu")["embedding"])


# The order

@KINDS
@pytest.mark.parametrize("n, size", [(12, 4), (13, 4), (1, 32), (33, None)])
def test_a_batch_is_one_copy_of_bytes_there_one_back_and_one_wait(kind, n, size):
    with pretended(kind) as gpu:
        e = embedder(kind)
        gpu.copies, gpu.copied, gpu.synchronisations = {"to": 0, "from": 0}, {"to": 0, "from": 0}, 0
        assert all(result.ok for result in e.embed_stream(noise(n), size))
    batches = -(-n // (size or 128))
    assert gpu.copies == {"to": batches, "from": batches} and gpu.synchronisations == batches
    assert gpu.copied == {"to": n * CROP, "from": n * e.dim * 4}


def test_the_next_batch_is_begun_before_a_batch_is_waited_for():
    for kind, wanted in ("cuda", [4, 4, "image 0", 1, "image 4", "image 8"]), ("cpu", [4, "image 0", 4, "image 4", 1, "image 8"]):
        with pretended("cuda"):
            log = []
            for result in logging(embedder(kind), log).embed_stream(noise(9), 4):
                if result.index % 4 == 0: log.append(f"image {result.index}")
        assert log == wanted


def test_the_copy_of_a_batch_has_a_stream_of_its_own_and_results_wait_for_their_event(monkeypatch):
    waits, streams, kept = [], {"cuda:1": [], "cpu": []}, []
    with pretended("cuda", count=2) as gpu:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((len(tensor), stream)))
        e = embedder("cuda:1")
        wait_for, moved = gpu.wait_for, gpu.moved
        def note_wait(copies):
            waits.append((set(copies), set(gpu.stream("cuda:1").before)))
            wait_for(copies)
        def note_copy(source, target, there, non_blocking):
            streams[str(there)].append(gpu.stream("cuda:1"))
            moved(source, target, there, non_blocking)
        gpu.wait_for, gpu.moved = note_wait, note_copy
        list(e.embed_stream(noise(12), 4))
        [copying], [computing] = set(streams["cuda:1"]), set(streams["cpu"])
        assert copying is not computing is gpu.stream("cuda:1") and str(copying.device) == "cuda:1"
        assert kept == [(4, computing)] * 3, "the next copy may take the memory of a batch that is still read"
        monkeypatch.undo()
    (first, begun), (second, _), (third, _) = waits
    assert first < second < third and first < begun  # the second batch was under way and nobody waited for it


@pytest.mark.parametrize("wrong", ["computing", "reading", "filling"])
def test_the_pretended_device_refuses_what_comes_too_early(wrong):
    with pretended("cuda") as gpu:
        there, side = torch.ones(4).pin_memory(), torch.cuda.Stream()
        with torch.cuda.stream(side): x = there.to("cuda", non_blocking=True)
        if wrong == "computing":
            with pytest.raises(RuntimeError, match="used before the copy that fills it"): x + 1
        if wrong == "filling":
            with pytest.raises(RuntimeError, match="changed while it is copied from"): there.fill_(2)
        torch.cuda.current_stream().wait_stream(side)
        back = (x + 1).to("cpu", non_blocking=True)
        done = torch.cuda.current_stream().record_event()
        assert gpu.synchronisations == 0
        if wrong == "reading":
            for read in (back.numpy, back.tolist, lambda: back + 1, lambda: torch.cat([back])):
                with pytest.raises(RuntimeError, match="on cpu is used before the copy"): read()
        done.synchronize()
        assert back.tolist() == [2, 2, 2, 2] and gpu.synchronisations == 1 and there.fill_(3).sum() == 12


def test_a_feed_without_its_waits_is_seen(monkeypatch):
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        monkeypatch.setattr(gpu.Stream, "wait_stream", lambda *_: None)
        [result] = e.embed_stream(noise(1))
        assert "used before the copy that fills it" in result.error.message
        monkeypatch.undo()
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        monkeypatch.setattr(gpu.Event, "synchronize", lambda *_: None)
        [result] = e.embed_stream(noise(1))
        assert "on cpu is used before the copy" in result.error.message


def test_a_stream_is_lazy_and_ends_when_its_reader_does():
    taken = []
    def endless():
        while True:
            taken.append(1)
            yield noise(1)[0]
    with pretended("cuda"):
        stream = embedder("cuda").embed_stream(endless(), 4)
        assert next(stream).index == 0 and len(taken) == 16  # two batches ahead, one begun, one waited for
        for i in range(1, 10): assert next(stream).index == i and len(taken) <= i + 16
        stream.close()
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("devsky-decode")]


def test_many_threads_share_one_embedder():
    wanted = embedder("cpu").encode_images_batch(noise(9), 3)
    with pretended("cuda"):
        e, got = embedder("cuda"), {}
        threads = [threading.Thread(target=lambda i=i: got.update({i: e.encode_images_batch(noise(9), 3)})) for i in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(PATIENCE)
    assert all(torch.equal(got[i], wanted) for i in range(4))


# Which device

def test_nothing_is_on_another_gpu_than_the_embedders():
    with pretended("cuda", count=2) as gpu:
        e = embedder("cuda:1")
        first = torch.device("cuda:0")
        list(e.embed_stream(noise(9), 4))
        e.encode_image(noise(1)[0])
        e.encode_text("a red dress")
        trial, _ = precision.try_candidate(e, BACKENDS["bf16-torch"], precision.read_sample(e, noise(12), 12, None))
        assert trial.cosine > .99, trial
        assert gpu.peak("cuda:0") == 0 and gpu.used("cuda:1") > 0
        assert gpu.current == 0 and not gpu.stream(first).before and gpu.stream("cuda:1").before


@KINDS
def test_what_takes_numbers_from_the_cpu_gets_them(kind):
    with pretended(kind):
        e = embedder(kind)
        seen = []
        def rounded(pixels):
            seen.append((pixels.shape, pixels.dtype))
            return e._runner(np.round(pixels, 2))
        coarse = e.with_backend("rounded", rounded)
        assert all(result.ok for result in coarse.embed_stream(noise(3)))
    assert seen == [((3, 3, SIDE, SIDE), np.float32)]


@KINDS
def test_other_backends_are_fed_in_the_same_way(kind):
    with pretended(kind) as gpu:
        e = embedder(kind)
        for name in ("fp32-torch", "bf16-torch", "fp16-torch"):
            backend = e.with_backend(name, BACKENDS[name].build(e.model, e.output))
            gpu.copies = {"to": 0, "from": 0}
            got = vectors(backend.embed_stream(noise(9), 4))
            assert gpu.copies == {"to": 3, "from": 3}
            assert (got * vectors(e.embed_stream(noise(9), 4))).sum(1).min() > (.9999 if name == "fp32-torch" else .99)


@KINDS
def test_a_trial_feeds_a_gpu_as_a_job_does(kind):
    with pretended(kind) as gpu:
        e = embedder(kind, precision="auto")
        assert e.fingerprint  # reads the weights
        gpu.copies = {"to": 0, "from": 0}
        chosen = precision.choose_precision(e, noise(20))
        receipt = chosen.receipt
        tried = [trial for trial in receipt.trials if trial.name in ("bf16-torch", "fp16-torch")]
        assert receipt.device == kind and receipt.sampled == 20 and tried[0].cosine > .99, receipt
        batches = 3 if tried[0].recall is not None else 1  # of eight; in fp32 and in half precision
        beside = {way: count - 2 * batches for way, count in gpu.copies.items()}  # tables, and what a build looks at: a few in all
        assert 0 <= beside["to"] <= 4 and 0 <= beside["from"] <= 1
        got = vectors(chosen.embed_stream(noise(9), 4))
        assert (got * vectors(e.embed_stream(noise(9), 4))).sum(1).min() > .99


def test_threads_and_inputs_under_way_follow_the_device(monkeypatch):
    for cores, wanted in (64, (8, 32)), (3, (3, 3)), (1, (1, 1)):
        monkeypatch.setattr(feeding, "usable_cores", lambda: cores)
        assert (decoding_threads("cpu"), decoding_threads("cuda:1")) == wanted
    assert [inputs_ahead(device, 8) for device in ("cpu", "cuda:1", "mps")] == [8, 16, 16]


# What goes wrong

@KINDS
def test_little_memory_halves_the_batch_and_what_did_not_fit_is_not_tried_again(kind):
    wanted = vectors(embedder("cpu").embed_stream(noise(48), 16))
    with pretended(kind) as gpu:
        log = []
        e = logging(embedder(kind), log)
        gpu.set_limit(gpu.used() + 2_500_000)
        got = list(e.embed_stream(noise(48), 16))
        assert all(result.ok for result in got), got[0].error
        np.testing.assert_allclose(vectors(got), wanted, atol=1e-6)
        fits = log[-1]
        assert 1 <= fits < 16 and log.count(16) <= 1 and log[-32 // fits:] == [fits] * (32 // fits)
        gpu.set_limit(gpu.used() + 4096)
        [result] = e.embed_stream(noise(1))
        assert type(result.error) is InsufficientMemoryError and "not even one image fits beside tiny-clip on" in str(result.error)
        gpu.set_limit(gpu.total)
        assert next(e.embed_stream(noise(1))).ok and gpu.used() < 8_000_000


def fail_at_the_second_wait(monkeypatch, gpu, message):
    wait, calls = gpu.Event.synchronize, []
    def synchronize(event):
        calls.append(event)
        if len(calls) == 2: raise RuntimeError(message)
        wait(event)
    monkeypatch.setattr(gpu.Event, "synchronize", synchronize)


def test_a_batch_that_fails_on_the_device_is_an_error_of_its_images_alone(monkeypatch):
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        fail_at_the_second_wait(monkeypatch, gpu, "CUDA error: an illegal memory access was encountered")
        got = list(e.embed_stream(noise(12), 4))
    assert [result.ok for result in got] == [True] * 4 + [False] * 4 + [True] * 4
    assert type(got[4].error) is MLError and "tiny-clip failed on 4 images: CUDA error" in got[4].error.message and got[4].error.details["stage"] == "encode"


def test_a_failed_batch_stops_a_job_and_what_was_computed_is_kept(tmp_path, monkeypatch):
    for i, image in enumerate(noise(24)): image.save(tmp_path / f"{i:02}.png")
    source = sorted(tmp_path.glob("*.png"))
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        fail_at_the_second_wait(monkeypatch, gpu, "CUDA error: device lost")
        with pytest.raises(MLError, match="device lost"): embed_images(source, tmp_path / "out", e, batch_size=8)
        monkeypatch.undo()
    with pretended("cuda"): report = embed_images(source, tmp_path / "out", embedder("cuda"), batch_size=8)
    assert (report.embedded, report.reused) == (24, 8)


def test_closing_an_embedder_ends_its_streams():
    with pretended("cuda"):
        e = embedder("cuda")
        stream = e.embed_stream(noise(20), 4)
        next(stream)
        e.close()
        with pytest.raises(ValidationError, match="closed"): list(stream)


def test_a_huge_batch_size_takes_no_more_memory_than_its_images():
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        before = gpu.peak()
        assert len(list(e.embed_stream(noise(3), 10**5))) == 3 and gpu.peak() - before < 4_000_000


def test_nothing_stays_on_the_device():
    with pretended("cuda") as gpu:
        e = embedder("cuda")
        list(e.embed_stream(noise(4), 4))
        used = gpu.used()
        list(e.embed_stream(noise(40), 8))
        assert gpu.used() == used


@pytest.mark.device
def test_the_best_device_has_the_cpus_vectors():
    wanted = vectors(embedder("cpu").embed_stream(noise(9), 4))
    e = CLIPImageEmbedder("tiny-clip", precision="fp32", backend="torch")
    assert (vectors(e.embed_stream(noise(9), 4)) * wanted).sum(1).min() > .9999
    assert (e.encode_images_batch(noise(9)).numpy() * wanted).sum(1).min() > .9999


def test_a_feed_takes_crops_of_any_kind_of_array():
    e = embedder("cpu")
    feed = Feed(model_runner(e.model), torch.from_numpy(e.preprocess.table))
    crops = [e.preprocess.resize_crop(image) for image in noise(3)]
    assert all(crop.flags.writeable for crop in crops)  # PyTorch warns of others
    assert np.array_equal(feed.start(crops).vectors(), e._forward(np.stack([e.preprocess(image) for image in noise(3)])))
    assert table_on_device(e.preprocess.table, model_runner(e.model)) is None and table_on_device(e.preprocess.table, len) is None
    item, pixels = e._prepare(0, noise(1)[0])
    assert isinstance(item, Embedded) and pixels.dtype == np.float32
