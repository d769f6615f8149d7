"Precision by fidelity beyond its lesson: what a trial costs, samples of every sort, planted outliers, interruptions, receipts, whole jobs."
import io, json, pickle, shutil, socket, subprocess, sys, threading, time
from dataclasses import replace

import numpy as np, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from devsky_nb import CLIPImageEmbedder, FolderIndex, ImageEmbedder, ModelRegistry, embed_images
from devsky_nb.embedding import backends, bulk, precision as P
from devsky_nb.embedding.fidelity import CheckedRunner, FIRST_IMAGES, worst_cosine
from devsky_nb.embedding.worker import EmbedderSpec
from devsky_nb.errors import ModelLoadError, ValidationError
from image_models import save_model

MANY = 1040  # images: enough for a trial


def encoded(pixels, kind="PNG", **settings):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def drawn(n, seed):
    "Smooth images that differ."
    rng = np.random.default_rng(seed)
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        yield np.asarray(coarse.resize((36, 40), Image.Resampling.BICUBIC))


def small_model(folder):
    "A CLIP whose images take next to no time: 32 pixels, four patches."
    vision = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, patch_size=16, image_size=32)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=40)).eval().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def plant_outliers(model, channels=4, factor=300.):
    for layer in model.vision_model.encoder.layers:
        attention = layer.self_attn
        for norm, readers in ((layer.layer_norm1, (attention.q_proj, attention.k_proj, attention.v_proj)),
                              (layer.layer_norm2, (layer.mlp.fc1,))):
            norm.weight.data[:channels] *= factor
            norm.bias.data[:channels] *= factor
            for reader in readers: reader.weight.data[:, :channels] /= factor


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(pixels) for pixels in drawn(72, seed=1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def outliers(model, tmp_path_factory):
    "The same model, but for rounding, with four channels that eight bits have no room for."
    folder = tmp_path_factory.mktemp("outliers")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    damaged = CLIPModel.from_pretrained(folder)
    plant_outliers(damaged)
    damaged.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Small images, some twice, some broken, all over the folder."
    folder = tmp_path_factory.mktemp("shop")
    for i, pixels in enumerate(drawn(MANY, seed=0)): (folder / f"{i:04}.png").write_bytes(encoded(pixels))
    for i in range(5, MANY, 40): (folder / f"{i:04}.png").write_bytes(b"broken")
    for i in range(7, MANY, 40): (folder / f"{i:04}.png").write_bytes((folder / "0001.png").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def eight_bits(monkeypatch):
    "The candidate is the same on every processor that runs these tests."
    monkeypatch.setattr(P, "candidate_for", lambda device, model, output=None: P.BACKENDS["int8-onnxruntime"])


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def auto(model, **settings): return CLIPImageEmbedder(model, device="cpu", **settings)
def files(out): return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
def outcome(receipt): return {trial.name: trial.refused for trial in receipt.trials}


def stored(out):
    table = pq.read_table(out)
    rows = [row for row in table.to_pylist() if row["status"] == "embedded"]
    return {row["id"]: row["embedding"] for row in rows}, json.loads(table.schema.metadata[b"devsky_nb.receipt"])


# What a trial costs

@given(st.integers(P.SMALL_JOB, 10**9))
def test_a_trial_costs_a_fiftieth_of_any_job(images):
    n = P.sample_size(images)
    cost = P.BUILDING + n * (P.WITH_SMALLER if P.tries_smaller(images) else P.WITH_CANDIDATE)
    assert P.LEAST <= n <= P.MOST and cost <= images / 50
    assert P.sample_size(images + 1) >= n


def counting(backend, seen, name, delay=0.):
    def build(model, output):
        run = backend.build(model, output)
        def counted(pixels):
            seen[name] = seen.get(name, 0) + len(pixels)
            time.sleep(delay * len(pixels))
            return run(pixels)
        return counted
    return replace(backend, make=build)


@pytest.mark.parametrize("delay", [0., .004])
def test_the_answer_knows_no_speed_and_the_cost_is_a_number_of_images(model, images, monkeypatch, delay):
    "On a machine that is slow, and slower in eight bits than in fp32, the answer is the same."
    seen, exact = {}, P.exact_backend
    monkeypatch.setattr(P, "exact_backend", lambda embedder: counting(exact(embedder), seen, "exact", delay))
    monkeypatch.setattr(P, "candidate_for", lambda *args: counting(P.BACKENDS["int8-onnxruntime"], seen, "lossy", 3 * delay))
    chosen = P.choose_precision(auto(model), images, images=2000)
    assert seen == {"exact": P.sample_size(2000), "lossy": P.sample_size(2000)} and P.sample_size(2000) == 18
    assert chosen.receipt.name == "int8-onnxruntime" and chosen.receipt.sampled == 18


@pytest.mark.parametrize("job", [1000, 2500, None])
def test_what_is_unfaithful_is_refused_after_eight_images(images, outliers, monkeypatch, job):
    "So with what it took to build, it costs no job more than a fiftieth."
    seen, exact = {}, P.exact_backend
    monkeypatch.setattr(P, "exact_backend", lambda embedder: counting(exact(embedder), seen, "exact"))
    monkeypatch.setattr(P, "candidate_for", lambda *args: counting(P.BACKENDS["int8-onnxruntime"], seen, "lossy"))
    chosen = P.choose_precision(auto(outliers), images, images=job)
    assert seen == {"exact": 8, "lossy": 8} and P.BUILDING + 8 * P.WITH_CANDIDATE <= (job or 1000) / 50
    assert "below 0.999" in outcome(chosen.receipt)["int8-onnxruntime"] and chosen.receipt.reason == "int8-onnxruntime is not faithful"


# Whole jobs

@pytest.fixture(scope="module")
def done(shop, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "candidate_for", lambda *args: P.BACKENDS["int8-onnxruntime"])
        return out, embed_images(shop, out, auto(model), shard_rows=400)


def test_a_job_without_a_word_about_precision(shop, model, done):
    out, report = done
    embedder = auto(model)
    vectors, receipt = stored(out)
    trials = {trial["backend"]: trial for trial in receipt["trials"]}
    assert (report.total, report.error, report.duplicate) == (MANY, 26, 26)
    assert receipt == report.receipt and receipt["backend"] == "int8-onnxruntime"
    assert receipt["sampled"] == P.sample_size(MANY) == 12
    assert trials["int8-onnxruntime"]["cosine"] >= .999 and trials["int8-onnxruntime"]["recall"] >= .99
    assert "precision: int8-onnxruntime, faithful on 12 images" in repr(report)
    assert "-int8-onnxruntime-" in report.fingerprint
    assert embedder.receipt is None and "int8" not in embedder.fingerprint
    names = sorted(vectors)[::10]
    exact = embedder.encode_images_batch([shop / name for name in names]).numpy()
    assert worst_cosine(exact, np.float32([vectors[name] for name in names])) > .998
    assert not {"seconds", "speed", "setup"} & {*receipt, *trials["int8-onnxruntime"]}


def test_the_same_files_and_model_give_the_same_bytes(shop, model, done, tmp_path, few_threads):
    few_threads(3)
    embed_images(shop, tmp_path / "out", auto(model), shard_rows=400, batch_size=8)
    assert files(tmp_path / "out") == files(done[0])


def test_a_second_call_keeps_the_receipt_without_a_trial(shop, model, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    monkeypatch.setattr(bulk, "choose_for_job", None)
    again = embed_images(shop, out, auto(model), shard_rows=400)
    assert (again.reused, again.receipt) == (again.embedded, done[1].receipt) and files(out) == files(done[0])
    more = embed_images([*((path.name, path) for path in sorted(shop.iterdir())), ("new", shop / "0003.png")], out, auto(model), shard_rows=400)
    assert more.receipt == done[1].receipt and more.total == MANY + 1


def test_a_model_with_outliers_stays_in_fp32_and_the_receipt_says_why(shop, outliers, tmp_path):
    report = embed_images(shop, tmp_path / "out", auto(outliers))
    vectors, receipt = stored(tmp_path / "out")
    [refused] = [trial for trial in receipt["trials"] if trial["refused"]]
    assert receipt["backend"] == auto(outliers).backend and refused["backend"] == "int8-onnxruntime"
    assert refused["cosine"] < .999 and f"{refused['cosine']:.4f}" in refused["refused"]
    assert f"int8-onnxruntime: smallest cosine {refused['cosine']:.4f} to fp32, below 0.999" in repr(report)
    assert report.fingerprint == auto(outliers, precision="fp32").fingerprint
    few = [(name, shop / name) for name in sorted(vectors)[::20]]
    exact = embed_images(few, tmp_path / "exact", auto(outliers, precision="fp32"))
    assert exact.receipt is None and stored_vectors(tmp_path / "exact").items() <= vectors.items()


def stored_vectors(out):
    return {row["id"]: row["embedding"] for row in pq.read_table(out).to_pylist() if row["status"] == "embedded"}


def test_a_data_set_that_grows_keeps_the_precision_it_began_with(shop, model, tmp_path):
    paths = sorted(shop.iterdir())
    few = embed_images(paths[:50], tmp_path / "out", auto(model))
    assert few.receipt["reason"] == "a job of fewer than 1,000 images is not worth a trial" and not few.receipt["trials"]
    grown = embed_images(paths, tmp_path / "out", auto(model))
    assert grown.receipt == few.receipt and grown.reused > 0


KILLED = """
import os, signal, sys
from devsky_nb import CLIPImageEmbedder, embed_images
from devsky_nb.embedding import precision as P, rows
from devsky_nb.embedding.pool import VectorPool
P.candidate_for = lambda *args: P.BACKENDS["int8-onnxruntime"]
kill = int(sys.argv[4])
steps = iter(range(10**6))
def killing(f):
    def g(*args, **kwargs):
        if next(steps) == kill: os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return g
P.compute = killing(P.compute)  # twice for each eight images of the sample
VectorPool.add = killing(VectorPool.add)
embed_images(sys.argv[1], sys.argv[2], CLIPImageEmbedder(sys.argv[3], device="cpu"), shard_rows=400)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill, begun", [(1, False), (3, False), (4, True), (15, True)])
def test_kill_9_during_the_trial_and_after_it(shop, model, done, tmp_path, kill, begun):
    "A trial that did not end is made again; a choice that was made is kept."
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", KILLED, shop, out, model, str(kill)], capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    assert (out / ".devsky" / "settings.json").exists() == begun and not list(out.glob("*.parquet"))
    with pytest.MonkeyPatch.context() as patch:
        if begun: patch.setattr(bulk, "choose_for_job", None)
        report = embed_images(shop, out, auto(model), shard_rows=400)
    assert files(out) == files(done[0]) and bool(report.reused) == (kill > 4)


ALONE = """
import sys
from devsky_nb import CLIPImageEmbedder, embed_images
from devsky_nb.embedding import precision as P
P.candidate_for = lambda *args: P.BACKENDS["int8-onnxruntime"]
embed_images(sys.argv[1], sys.argv[2], CLIPImageEmbedder(sys.argv[3], device="cpu"), shard_rows=400)
"""


@pytest.mark.slow
def test_another_process_on_a_busy_machine_makes_the_same_bytes(shop, model, done, tmp_path):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try: subprocess.run([sys.executable, "-c", ALONE, shop, tmp_path / "out", model], check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert files(tmp_path / "out") == files(done[0])


@pytest.mark.slow
def test_workers_of_a_cluster_do_what_the_driver_chose(shop, model, done, tmp_path):
    pytest.importorskip("ray")
    from devsky_nb.embedding.ray import RayEngine
    report = embed_images(shop, tmp_path / "out", auto(model), engine=RayEngine(actors=2, cpus=1), shard_rows=400)
    assert report.receipt == done[1].receipt and files(tmp_path / "out") == files(done[0])
    asked = embed_images(shop, tmp_path / "asked", auto(model, precision="int8"), engine=RayEngine(actors=2, cpus=1), shard_rows=400)
    assert asked.receipt is None and stored_vectors(tmp_path / "asked") == stored(done[0])[0]


def test_a_machine_that_cannot_do_what_was_chosen_says_so_and_changes_nothing(shop, model, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    spec = EmbedderSpec.of(P.apply_receipt(auto(model), P.Receipt.from_dict(done[1].receipt)))
    lacking = dict(P.BACKENDS)
    class Lacking(type(lacking["int8-onnxruntime"])):
        def why_not(self, *args): return "this processor has no AVX2"
    lacking["int8-onnxruntime"] = Lacking(**vars(lacking["int8-onnxruntime"]))
    monkeypatch.setattr(P, "BACKENDS", lacking)
    with pytest.raises(ModelLoadError, match="chose int8-onnxruntime, which cannot run here: this processor has no AVX2.*precision='fp32' and a new output"):
        embed_images(shop, out, auto(model), shard_rows=400)
    assert files(out) == files(done[0])
    monkeypatch.setattr(socket, "gethostname", lambda: "old-machine")
    with pytest.raises(ModelLoadError, match="^old-machine: the receipt chose int8-onnxruntime, which cannot run here"): spec.load()
    with pytest.raises(ValidationError, match="has vectors of projected-int8-onnxruntime.* and this call makes"):
        embed_images(shop, out, auto(model, precision="fp32"), shard_rows=400)
    assert files(out) == files(done[0])


def test_what_finds_dresses_in_it_is_made_from_the_receipt(model, done, shop):
    "A search in a data set of eight bits asks with a vector of eight bits."
    receipt = P.Receipt.from_dict(done[1].receipt)
    same = P.apply_receipt(auto(model), receipt)
    index = FolderIndex(done[0])
    assert index.fingerprint == same.fingerprint
    again = pickle.loads(pickle.dumps(same))
    assert again.fingerprint == same.fingerprint and again.receipt == receipt
    assert torch.equal(again.encode_image(shop / "0002.png"), same.encode_image(shop / "0002.png"))


# precision="int8"

def test_eight_bits_that_ruin_vectors_are_refused_before_anything_is_written(shop, outliers, tmp_path):
    embedder = auto(outliers, precision="int8")
    with pytest.raises(ValidationError, match=r"precision='int8' is not faithful here, by 16 of these images: smallest cosine 0\.\d+ to fp32, below 0.999") as e:
        embed_images(shop, tmp_path / "out", embedder)
    assert e.value.details["cosine"] < .999 and e.value.details["images"] == FIRST_IMAGES
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        with pytest.raises(ValidationError, match="not faithful here"): embedder.encode_images_batch([shop / "0000.png", shop / "0001.png"])
    with pytest.raises(ValidationError, match="by 1 of these images"): embedder.encode_image(shop / "0000.png")


def test_eight_bits_that_were_asked_for(shop, model, done, tmp_path):
    embedder = auto(model, precision="int8")
    few = sorted(shop.iterdir())[:60]
    report = embed_images(few, tmp_path / "out", embedder, batch_size=8)
    assert report.receipt is None and report.fingerprint == done[1].fingerprint
    vectors = stored(done[0])[0]
    assert all(vectors[name] == vector for name, vector in ((key.rpartition("/")[2], v) for key, v in stored_vectors(tmp_path / "out").items()) if name in vectors)
    assert embed_images(few, tmp_path / "out", embedder).reused == report.embedded
    with pytest.raises(ValidationError, match="nothing to choose"): P.choose_precision(embedder, few)
    again = pickle.loads(pickle.dumps(embedder))
    assert again.fingerprint == embedder.fingerprint and isinstance(again._runner, CheckedRunner) and not again._runner.checked
    worker = EmbedderSpec.of(embedder).load()
    assert worker.fingerprint == embedder.fingerprint and not isinstance(worker._runner, CheckedRunner), "the driver has checked"


def test_the_first_sixteen_images_are_compared_once_from_any_number_of_threads(model, shop):
    embedder = auto(model, precision="int8")
    seen = []
    runner = embedder._runner
    def counted(pixels):
        seen.append(len(pixels))
        return runner.exact(pixels)
    counting = embedder.with_backend(embedder.backend, CheckedRunner(runner.lossy, counted, "int8"))
    paths = [path for path in sorted(shop.iterdir())[:40] if path.read_bytes() != b"broken"]
    threads = [threading.Thread(target=counting.encode_images_batch, args=(paths[i::4], 3)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sum(seen) == FIRST_IMAGES and counting._runner.checked


# Samples

def test_samples_of_every_sort(model, images, tmp_path):
    embedder = auto(model)
    def found(sample): return P.choose_precision(embedder, sample).receipt
    assert "0 different readable images" in found([]).reason
    assert "0 different readable images" in found(["no.jpg", b"", None] * 40).reason
    assert "1 different readable images" in found([images[0]] * 200).reason
    assert found([images[0], "no.jpg"] * 100).sampled == 1
    for i, image in enumerate(images): image.save(tmp_path / f"{i}.png")
    mixed = [*map(str, sorted(tmp_path.iterdir())), "no.jpg", images[0], *[np.asarray(image) for image in images[:5]]]
    assert found(mixed).sampled == len(images), "the same pixels from a file, a PIL image and an array are one image"
    for bad in (None, "a.jpg", {1: 2}, (x for x in images)):
        with pytest.raises(ValidationError, match="sample must be a list"): P.choose_precision(embedder, bad)
    for bad in (0, -1, 2.5, "9"):
        with pytest.raises(ValidationError, match="images=.*: expected a whole number"): P.choose_precision(embedder, images, bad)


def test_where_half_of_a_source_is_broken_the_sample_is_whole(model, images):
    sample = [images[i // 2] if i % 2 else b"broken" for i in range(144)]
    assert P.choose_precision(auto(model), sample, images=2000).receipt.sampled in range(P.LEAST, P.sample_size(2000) + 1)
    half = [images[i // 2] if i % 2 else images[0] for i in range(144)]
    assert P.choose_precision(auto(model), half, images=2000).receipt.sampled >= P.LEAST


def photos(n, texture):
    "JPEG files far larger than the model looks at, in four groups. With `texture`, smaller decoding changes what is seen."
    rng = np.random.default_rng(0)
    groups = rng.integers(30, 226, (4, 4, 4, 3))
    grain = rng.choice([-120, 120], (256, 256, 3)) if texture else 0  # one for all, so the groups stay as they are
    made = []
    for i in range(n):
        coarse = np.uint8(groups[i % 4] + rng.integers(-30, 31, (4, 4, 3)))
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)).astype(int)
        made.append(encoded(np.uint8(np.clip(smooth + grain, 0, 255)), "JPEG", quality=30, subsampling=0))
    return made


def test_smaller_decoding_is_taken_where_it_changes_nothing_that_counts(model):
    "In groups of 11, each image's ten neighbours are the others of its group: no rounding of int8 makes them others."
    embedder = auto(model)
    smooth = P.choose_precision(embedder, photos(44, texture=False))
    assert smooth.receipt.min_edge == embedder.preprocess.min_edge and smooth.min_edge == smooth.receipt.min_edge
    assert f"-int8-onnxruntime-edge{smooth.min_edge}-" in smooth.fingerprint
    [small], [whole] = smooth.embed_stream(photos(1, False)), embedder.embed_stream(photos(1, False))
    assert small.record.actions != whole.record.actions and small.vector @ whole.vector > .999
    rough = P.choose_precision(embedder, photos(44, texture=True)).receipt
    assert rough.min_edge is None and rough.backend == "int8-onnxruntime"
    assert "smallest cosine" in rough.trials[-1].refused and rough.trials[-1].min_edge
    small_job = P.choose_precision(embedder, photos(44, texture=False), images=1200).receipt
    assert small_job.min_edge is None and len(small_job.trials) == 2


# Other families

def eight_bits_where_it_can(device, model, output=None):
    backend = P.BACKENDS["int8-onnxruntime"]
    return None if backend.why_not(model, output, device) else backend


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "dinov2", "dinov3_vit"])
def test_other_families_are_tried_as_well_and_what_no_graph_computes_stays_exact(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(P, "candidate_for", eight_bits_where_it_can)
    embedder = ImageEmbedder(save_model(kind, tmp_path / kind), device="cpu", precision="auto")
    receipt = P.choose_precision(embedder, photos(44, texture=False)).receipt
    assert receipt.reference == embedder.fingerprint
    assert (embedder.backend == "fp32-torch") == (not receipt.trials)  # DINOv2 has no graph before transformers builds it as the others
    if kind != "dinov2": assert bool(receipt.trials) == (kind != "siglip2")
    if receipt.trials:
        [eight] = (trial for trial in receipt.trials if trial.backend == "int8-onnxruntime" and trial.min_edge is None)
        assert eight.cosine > .999  # recall@10 of random weights, which differ between releases, is near its limit
        assert receipt.backend == ("fp32-onnxruntime" if eight.refused else "int8-onnxruntime")
        assert ("is not faithful" if eight.refused else "faithful on 44 images") in receipt.reason
    else: assert receipt.backend == "fp32-torch" and "nothing else computes this model" in receipt.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "siglip2", "dinov2", "dinov3_vit"])
def test_a_whole_job_of_another_family_keeps_its_vectors_and_its_receipt(tmp_path, monkeypatch, shop, kind):
    monkeypatch.setattr(P, "candidate_for", eight_bits_where_it_can)
    folder, out = save_model(kind, tmp_path / kind), tmp_path / "out"
    report = embed_images(shop, out, ImageEmbedder(folder, device="cpu", precision="auto"))
    assert (report.total, report.error, report.duplicate) == (MANY, 26, 26)
    vectors, receipt = stored(out)
    names = sorted(vectors)[::10]
    exact = ImageEmbedder(folder, device="cpu", precision="fp32").encode_images_batch([shop / name for name in names]).numpy()
    assert worst_cosine(exact, np.float32([vectors[name] for name in names])) > .998
    again = embed_images(shop, out, ImageEmbedder(folder, device="cpu", precision="auto"))
    assert again.receipt == receipt and again.fingerprint == report.fingerprint


# Failures

def broken_build(model, output): raise MemoryError("Unable to allocate 9 TiB")
def broken_run(model, output): return lambda pixels: np.full((len(pixels), 40), np.nan, np.float32)
def crashing_run(model, output):
    def run(pixels): raise RuntimeError("the kernel is gone")
    return run
def interrupted(model, output): raise KeyboardInterrupt


@pytest.mark.parametrize("build, why", [(broken_build, "MemoryError"), (broken_run, "non-finite"), (crashing_run, "the kernel is gone")])
def test_a_candidate_that_fails_is_refused_and_the_job_goes_on(model, images, monkeypatch, build, why):
    failing = replace(P.BACKENDS["int8-onnxruntime"], make=build)
    monkeypatch.setattr(P, "candidate_for", lambda *args: failing)
    chosen = P.choose_precision(auto(model), images)
    assert why in outcome(chosen.receipt)["int8-onnxruntime"] and chosen.fingerprint == auto(model).fingerprint
    assert chosen.encode_images_batch(images[:3]).shape == (3, 40)


def test_an_interruption_changes_nothing(model, images, monkeypatch):
    registry = ModelRegistry(device="cpu")
    embedder = auto(model, registry=registry)
    tuned = P.choose_precision(embedder, images)
    state, before = dict(vars(tuned)), tuned.encode_images_batch(images[:3])
    threads = set(threading.enumerate())
    stopping = replace(P.BACKENDS["int8-onnxruntime"], make=interrupted)
    monkeypatch.setattr(P, "candidate_for", lambda *args: stopping)
    with pytest.raises(KeyboardInterrupt): P.choose_precision(tuned, images)
    assert vars(tuned) == state and embedder.receipt is None
    assert torch.equal(tuned.encode_images_batch(images[:3]), before)
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("devsky")]
    for each in (tuned, embedder): each.close()
    assert registry.unload(model) > 0, "a candidate still holds a lease"


def test_choosing_leaves_the_callers_embedder_and_one_model(model, images):
    registry = ModelRegistry(device="cpu")
    embedder = auto(model, registry=registry)
    embedder.fingerprint  # reads the weights once
    state, before = dict(vars(embedder)), embedder.encode_images_batch(images[:5])
    weights = {name: tensor.clone() for name, tensor in embedder.model.state_dict().items()}
    chosen = P.choose_precision(embedder, images)
    assert chosen is not embedder and chosen.model is embedder.model and vars(embedder) == state
    assert torch.equal(embedder.encode_images_batch(images[:5]), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in embedder.model.state_dict().items())
    embedder.close()
    assert chosen.encode_images_batch(images[:5]).shape == before.shape
    with pytest.raises(ValidationError, match="closed"): P.choose_precision(embedder, images)
    chosen.close()
    assert registry.unload(model) > 0, "a candidate still holds a lease"


def test_where_there_is_no_candidate_nothing_is_tried(model, images, monkeypatch):
    monkeypatch.setattr(P, "candidate_for", lambda *args: None)
    receipt = P.choose_precision(auto(model), images).receipt
    assert receipt.reason == "nothing else computes this model on this kind of processor"
    assert receipt.trials == () and receipt.backend == auto(model).backend


def test_who_asked_for_pytorch_gets_it(model, images):
    assert P.choose_precision(auto(model, backend="torch"), images).receipt.name == "fp32-torch"


@pytest.mark.parametrize("fits, form", [(True, "int8-onnxruntime"), (False, "int8-onnxruntime-w7")])
def test_the_kind_of_processor_decides_the_form_of_eight_bits(model, images, monkeypatch, fits, form):
    "Two kinds, pretended; what one has chosen the other can compute, too."
    monkeypatch.setattr(P, "candidate_for", backends.candidate_for)
    monkeypatch.setattr(backends, "sums_fit", lambda: fits)
    chosen = P.choose_precision(auto(model), images)
    assert form in outcome(chosen.receipt)
    monkeypatch.setattr(backends, "sums_fit", lambda: not fits)
    assert P.apply_receipt(auto(model), chosen.receipt).fingerprint == chosen.fingerprint


# Receipts

GOOD = P.Receipt("int8-onnxruntime", None, "because", "projected-fp32-0", "cpu", 64,
                 (P.Trial("int8-onnxruntime", None, .9995, 1.),))


@pytest.mark.parametrize("change",
                         [{"trials": [{"nonsense": 1}]}, {"trials": None}, {"min_edge": "all"}, {"min_edge": -1}, {"backend": "int4"},
                          {"backend": ["fp32"]}, {"reference": None}, {"extra": 1}, {"reason": 5}, {"device": None},
                          {"sampled": "64"}, {"sampled": True}, {"sampled": 1.5}, {"trials": 5}, {"trials": [5]},
                          {"trials": [{"backend": "fp32"}]}, {"trials": [{**vars(GOOD.trials[0]), "cosine": "high"}]},
                          {"trials": [{**vars(GOOD.trials[0]), "speed": 20.}]}])
def test_a_damaged_receipt_is_refused(change):
    good = json.loads(json.dumps(GOOD.to_dict()))
    assert P.Receipt.from_dict(good) == GOOD
    for data in (good | change, None, [], "fp32"):
        with pytest.raises(ValidationError, match="not a receipt"): P.Receipt.from_dict(data)


def test_a_receipt_of_an_earlier_version_is_named_with_what_to_do(shop, model, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    for shard in out.glob("*.parquet"):
        table = pq.read_table(shard)
        old = done[1].receipt | {"backend": "int8-torchao", "seconds": 93.1}
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"devsky_nb.receipt": json.dumps(old).encode()}), shard)
    before = files(out)
    with pytest.raises(ValidationError, match="receipt in the data set's metadata is damaged.*resume=False"): embed_images(shop, out, auto(model), shard_rows=400)
    assert files(out) == before


def test_a_receipt_is_for_one_model_and_one_output(model):
    receipt = replace(GOOD, reference=auto(model).fingerprint)
    with pytest.raises(ValidationError, match="choose again"): P.apply_receipt(auto(model, output="cls"), receipt)
    with pytest.raises(ValidationError, match="precision='auto'"): P.apply_receipt(auto(model, precision="fp32"), receipt)


@pytest.mark.parametrize("wrong", [None, "clip", CLIPImageEmbedder])
def test_what_is_no_embedder_is_said(wrong):
    for call in (lambda: P.choose_precision(wrong, []), lambda: P.apply_receipt(wrong, GOOD), lambda: GOOD.apply(wrong)):
        with pytest.raises(ValidationError, match="expected a"): call()


def test_text_of_a_receipt_is_escaped():
    html = replace(GOOD, reason="<script>", trials=(P.Trial("bf16-torch", refused="<img>"),))._repr_html_()
    assert "<script>" not in html and "<img>" not in html


def test_numbers_are_decided_as_they_are_shown():
    assert [P.rounded_down(value, 5) for value in (.9989999, .999, .99900001, 1.)] == [.99899, .999, .999, 1.]
    assert np.isnan(P.rounded_down(float("nan"), 5))
