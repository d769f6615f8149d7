"embed_images on a Ray cluster that runs here: workers killed, the driver killed, Ctrl-C, a slice that kills, machines that lack something."
import json, os, pickle, shutil, signal, subprocess, sys, threading, time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, pytest
from hubcache import make_repo
from patience import wait_until
from PIL import Image
from safetensors.numpy import load_file, save

pytest.importorskip("ray")

from devsky_nb.cli import main
from devsky_nb.embedding.bulk import embed_images, local_engine
from devsky_nb.embedding.rows import embedding_schema
from devsky_nb.embedding.dataset import SLICES
from devsky_nb.embedding.plan import SourcePlan
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.embedding.ray import RayEngine, ray_cluster, read_slice, spread_workers
from devsky_nb.embedding.scale import scale_plan
from devsky_nb.embedding.worker import EmbedderSpec, SliceWorker, TRIES, WorkerSettings, slice_path
from devsky_nb.errors import DevSkyyError, MLError, ModelLoadError, ModelNotFoundError, ValidationError
from devsky_nb.hub.locate import bundled_folder
from devsky_nb.hub.models import KNOWN, ModelSpec
from devsky_nb.hub.registry import ModelRegistry
from devsky_nb.embedding.precision import apply_receipt, Receipt
from devsky_nb.images.folders import ImageFolder

SIZES = dict(batch_size=8, shard_rows=12)


@pytest.fixture(scope="module")
def embedder():
    "With a receipt, so that workers make what it says."
    e = CLIPImageEmbedder("tiny-clip", device="cpu")
    return apply_receipt(e, Receipt(e.backend, 64, "found faithful", e.fingerprint, "cpu", 64))

@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(cores=2): yield

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "50 inputs: copies within a slice and across slices, broken files."
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    for i in range(44): Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    for copy, of in (("002-a", "001"), ("020-a", "001"), ("030-a", "025"), ("043-a", "000")): (folder / f"{copy}.png").write_bytes((folder / f"{of}.png").read_bytes())
    (folder / "010-a.jpg").write_text("no image", encoding="utf-8")
    (folder / "040-a.png").write_bytes((folder / "040.png").read_bytes()[:200])
    return folder

@pytest.fixture(scope="module")
def expected(shop, embedder, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    report = embed_images(shop, out, embedder, **SIZES)
    return report, files(out)


def files(out): return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

def attempts(out: Path, number: int) -> list[tuple[str, int]]:
    "Run and process of every attempt at a slice."
    return [(log.parent.name, int(line.split()[1])) for log in sorted(out.glob(f".devsky/{SLICES}/attempts-*/{number:05}")) for line in log.read_text(encoding="utf-8").splitlines() if line.count(" ") == 1]

def alive(pid: int) -> bool:
    try: return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError: return False

def in_background(work, *args) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_worker_is_killed_after_ctrl_c_and_the_data_set_is_that_of_one_process(shop, embedder, expected, cluster, tmp_path):
    def interrupt():
        wait_until(lambda: list((tmp_path / ".devsky" / SLICES).glob("*.parquet")))
        os.kill(os.getpid(), signal.SIGINT)
    waiting = in_background(interrupt)
    with pytest.raises(KeyboardInterrupt): embed_images(shop, tmp_path, embedder, engine=RayEngine(actors=1, cpus=1), **SIZES)
    waiting.join()
    done, first = [p.name for p in (tmp_path / ".devsky" / SLICES).glob("*.parquet")], {a for n in range(5) for a in attempts(tmp_path, n)}
    assert 1 <= len(done) < 5 and not files(tmp_path)
    wait_until(lambda: not any(alive(pid) for _, pid in first))

    killed = []
    def kill():
        wait_until(lambda: any(run not in {r for r, _ in first} for n in range(5) for run, _ in attempts(tmp_path, n)))
        killed.append(next(pid for n in range(5) for run, pid in attempts(tmp_path, n) if run not in {r for r, _ in first}))
        os.kill(killed[0], signal.SIGKILL)
    killing = in_background(kill)
    report = embed_images(shop, tmp_path, embedder, engine=RayEngine(actors=2, cpus=1), **SIZES)
    killing.join()
    local, there = expected
    assert len(killed) == 1 and files(tmp_path) == there
    assert (report.embedded, report.duplicate, report.error, report.reasons) == (local.embedded, local.duplicate, local.error, local.reasons)
    assert report.reused == sum(pq.read_table(tmp_path / f"part-{n}", columns=["status"])["status"].to_pylist().count("embedded") for n in done)
    assert sorted(p.name for p in (tmp_path / ".devsky").iterdir()) == ["lock", "next"]


@pytest.mark.slow
def test_a_slice_that_kills_every_worker_is_named(shop, embedder, expected, cluster, tmp_path):
    stop, dead = threading.Event(), set()
    def kill():
        while not stop.is_set():
            for _, pid in attempts(tmp_path, 1)[:TRIES]:
                if pid not in dead and alive(pid):
                    os.kill(pid, signal.SIGKILL)
                    dead.add(pid)
            time.sleep(.002)
    killing = in_background(kill)
    with pytest.raises(MLError, match=f"slice 1 ended {TRIES} workers") as e: embed_images(shop, tmp_path, embedder, engine=RayEngine(actors=1, cpus=1), **SIZES)
    stop.set()
    killing.join()
    assert len(dead) == TRIES and e.value.details["first"] == sorted(p.name for p in shop.iterdir())[12]
    report = embed_images(shop, tmp_path, embedder, **SIZES)  # in this process; slice 0 is there
    assert files(tmp_path) == expected[1] and report.reused >= 10


@pytest.mark.slow
def test_the_driver_is_killed(shop, embedder, expected, cluster, tmp_path):
    import ray
    code = ("import json, sys; from devsky_nb.embedding.bulk import embed_images; from devsky_nb.embedding.embedder import CLIPImageEmbedder; from devsky_nb.embedding.ray import RayEngine; from devsky_nb.embedding.precision import apply_receipt, Receipt\n"
            "e = apply_receipt(CLIPImageEmbedder('tiny-clip', device='cpu'), Receipt.from_dict(json.loads(sys.argv[3])))\n"
            "embed_images(sys.argv[1], sys.argv[2], e, engine=RayEngine(1, 1), batch_size=8, shard_rows=12)")
    driver = subprocess.Popen([sys.executable, "-c", code, shop, tmp_path, json.dumps(embedder.receipt.to_dict())], env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / ".devsky" / SLICES).glob("*.parquet")) or driver.poll() is not None)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    wait_until(lambda: not any(alive(pid) for n in range(5) for _, pid in attempts(tmp_path, n)))
    report = embed_images(shop, tmp_path, embedder, **SIZES)
    assert files(tmp_path) == expected[1] and report.reused >= 10


@pytest.fixture
def job(shop, embedder, tmp_path):
    (tmp_path / SLICES).mkdir()
    with closing(SourcePlan(tmp_path / "plan.sqlite", 12)) as plan: plan.fill(ImageFolder(shop))
    return WorkerSettings(EmbedderSpec.of(embedder), embedding_schema(embedder), tmp_path, False, 8, 1, "test", os.getcwd())


def failure(job, number=0): return pickle.loads(SliceWorker(job)({"number": [number]})["error"][0])


def test_errors_of_a_worker_come_back_as_they_are(job, tmp_path):
    assert "install the same version" in failure(replace(job, version="9")).message
    assert isinstance(failure(replace(job, embedder=replace(job.embedder, name="/no/model", model=None))), ModelNotFoundError)
    assert "must see the output under the same path" in failure(replace(job, state=tmp_path / "elsewhere")).message
    pickle.loads(pickle.dumps(failure(replace(job, has_pool=True))))


def test_an_error_of_a_worker_comes_back_whatever_its_details_hold(job, monkeypatch):
    def fails(self): raise MLError("broken", details={"lock": threading.Lock(), "path": Path("x")})
    monkeypatch.setattr(SliceWorker, "embedder", fails)
    assert failure(job).details["path"] == "x"


COMMITS = "1" * 40, "2" * 40

def make_cache(cache: Path, commits: dict[str, bool], main: str) -> None:
    "A Hub cache with commits of a model; True: with other weights."
    tiny = bundled_folder(KNOWN["tiny-clip"])
    files = {p.name: p.read_bytes() for p in tiny.iterdir() if p.is_file()}
    [weights] = tiny.glob("*.safetensors")
    changed = files | {weights.name: save({name: np.asarray(array + np.float32(.01)) for name, array in load_file(weights).items()}, {"format": "pt"})}
    make_repo(cache, "shop/clip", {commit: changed if other else files for commit, other in commits.items()}, {"main": main})


@pytest.fixture
def own(tmp_path):
    "The driver's embedder, of a model that only its registry knows, at a commit that is not its cache's newest."
    make_cache(tmp_path / "hub", dict(zip(COMMITS, (False, True))), main=COMMITS[1])
    registry = ModelRegistry(tmp_path / "hub", offline=True)
    registry.register(ModelSpec("shop-clip", "shop/clip", "clip"))
    return CLIPImageEmbedder("shop-clip", "cpu", precision="fp32", registry=registry, revision=COMMITS[0])


def test_a_worker_gets_a_registered_model_at_the_commit_of_the_driver(own, job):
    spec = pickle.loads(pickle.dumps(EmbedderSpec.of(own)))
    loaded = spec.load()
    assert loaded.registry is not own.registry and loaded.path.name == COMMITS[0] and loaded.fingerprint == own.fingerprint
    assert loaded.model is not own.model, "a registry of its own"
    newest = CLIPImageEmbedder("shop-clip", "cpu", precision="fp32", registry=own.registry)
    assert newest.fingerprint != own.fingerprint
    worker = SliceWorker(replace(job, embedder=spec, schema=embedding_schema(own)))
    assert worker({"number": [0]})["error"] == [b""]


def test_a_machine_with_another_commit_or_other_weights_refuses(own, tmp_path):
    spec = EmbedderSpec.of(own)
    make_cache(tmp_path / "elsewhere", {COMMITS[1]: True}, main=COMMITS[1])
    with pytest.raises(ModelNotFoundError, match=f"shop/clip .*revision {COMMITS[0]}"): replace(spec, cache_dir=str(tmp_path / "elsewhere")).load()
    make_cache(tmp_path / "changed", {COMMITS[0]: True}, main=COMMITS[0])
    with pytest.raises(ModelLoadError, match=f"and of {own.fingerprint} where the job was started"): replace(spec, cache_dir=str(tmp_path / "changed")).load()


def test_a_model_in_a_folder_and_one_in_the_package_are_found_again(tmp_path, monkeypatch):
    shutil.copytree(bundled_folder(KNOWN["tiny-clip"]), tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    folder, bundled = (EmbedderSpec.of(CLIPImageEmbedder(name, "cpu", precision="fp32")) for name in ("clip", "tiny-clip"))
    monkeypatch.chdir("/")
    assert (folder.name, folder.model) == (str(tmp_path / "clip"), None) and bundled.model == KNOWN["tiny-clip"]
    assert folder.load().fingerprint == bundled.load().fingerprint


def test_the_command_maps_ray_to_an_engine(shop, tmp_path, monkeypatch, capsys):
    used = []
    def instead(self, *args):
        used.append(self)
        yield from local_engine(*args)
    monkeypatch.setattr(RayEngine, "__call__", instead)
    command = ["embed", str(shop), "--out", str(tmp_path / "out"), "--model", "tiny-clip", "--precision", "fp32", "--json", "--quiet"]
    assert main([*command, "--engine", "ray"]) == 0 and used == [RayEngine()]
    assert json.loads(capsys.readouterr().out)["total"] == 50
    assert main(command) == 0 and len(used) == 1


def test_a_folder_that_cannot_be_written(job, tmp_path):
    (tmp_path / SLICES).rmdir()
    (tmp_path / SLICES).write_text("a file in its place", encoding="utf-8")
    assert "cannot write" in failure(job).message


def test_one_changed_file_is_embedded_again_and_no_other(job, shop, tmp_path):
    worker = SliceWorker(job)
    assert worker({"number": [1]}) == {"number": [1], "rows": [12], "error": [b""]}
    path = slice_path(tmp_path / SLICES, 1)
    assert sum(pq.read_table(path)["new"].to_pylist()) == 12
    changed = shop / sorted(p.name for p in shop.iterdir())[13]
    before = changed.read_bytes()
    try:
        Image.new("RGB", (40, 40), "red").save(changed)
        worker({"number": [1]})
    finally: changed.write_bytes(before)
    assert pq.read_table(path)["new"].to_pylist() == [i == 1 for i in range(12)]


def test_a_machine_that_does_not_see_the_images(job, shop, tmp_path):
    hidden = shop.with_name("hidden")
    shop.rename(hidden)
    try: SliceWorker(job)({"number": [0]})
    finally: hidden.rename(shop)
    with closing(SourcePlan(tmp_path / "again.sqlite", 12)) as plan:
        plan.fill(ImageFolder(shop))
        with pytest.raises(DevSkyyError, match="all machines must see the source under the same path"): read_slice(slice_path(tmp_path / SLICES, 0), plan.slice(0), job.schema, plan, None)


def test_relative_paths_start_where_the_driver_is(job, shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(SourcePlan(tmp_path / "plan.sqlite", 12)) as plan: plan.fill(ImageFolder(os.path.relpath(shop)))
    assert "the source has relative paths, and there is no '/not/here' here" in failure(replace(job, directory="/not/here")).message
    monkeypatch.chdir("/")
    SliceWorker(replace(job, directory=str(tmp_path)))({"number": [0]})
    assert "embedded" in pq.read_table(slice_path(tmp_path / SLICES, 0))["status"].to_pylist()


def test_a_damaged_or_foreign_slice_is_made_again(job, tmp_path):
    path, worker = slice_path(tmp_path / SLICES, 2), SliceWorker(job)
    for content in (b"no Parquet", b""):
        path.write_bytes(content)
        worker({"number": [2]})
        assert sum(pq.read_table(path)["new"].to_pylist()) >= 10
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"devsky_nb.fingerprint": b"another"}), path)
    worker({"number": [2]})
    assert sum(pq.read_table(path)["new"].to_pylist()) >= 10


def test_two_workers_at_the_same_slice(job, tmp_path):
    threads = [in_background(SliceWorker(replace(job, run_id=n)), {"number": [0]}) for n in "ab"]
    for t in threads: t.join()
    assert pq.read_table(slice_path(tmp_path / SLICES, 0)).num_rows == 12


def test_work_is_spread_over_what_a_cluster_has():
    assert spread_workers([(8, 0), (2, 0)], 100, False) == (2, 4)
    assert spread_workers([], 100, False, actors=50) == (50, 1)  # machines come when they are asked for
    assert spread_workers([(16, 2)], 100, True, cpus=2) == (2, 2)
    with pytest.raises(ValidationError, match="and a GPU"): spread_workers([(16, 0)], 100, True)
    for wrong in (True, 1.5, "2", -1):
        with pytest.raises(ValidationError, match="cpus=.*expected a whole number of at least 1"): RayEngine(cpus=wrong)


def test_a_small_plan_has_singulars_and_units_that_fit():
    costs = dict(listing_seconds=2e-5, commit_seconds=7e-5, row_bytes=2200, table_bytes=65)
    plan = scale_plan(100, .2, 4e5, 1, store=1e3, **costs)
    assert repr(plan).splitlines()[:3] == ["100 images on 1 machine of 1 worker: 11.1 hours, limited by read",
                                           "more than 1 machine does not help", "40.0 MB read, 220.0 kB in 1 file, 6.5 kB of tables"]
    assert "list: 0.0 seconds" in repr(plan) and "20.0 seconds</td>" in plan._repr_html_()
    assert scale_plan(10**9, .2, 4e5, 2, workers=2, **costs)._lines()[0].startswith("1,000,000,000 images on 2 machines of 2 workers: ")
    assert "1 images" not in repr(scale_plan(1, .2, 4e5, **costs)) and "400.0 kB read, 2.2 kB in 1 file, 65.0 B" in repr(scale_plan(1, .2, 4e5, **costs))


def test_the_first_part_to_limit_a_job_is_found():
    costs = dict(listing_seconds=2e-5, commit_seconds=7e-5, row_bytes=2200, table_bytes=65)
    slow, fast = (scale_plan(10**8, s, 4e5, m, **costs) for s, m in ((.2, 10), (.001, 1000)))
    assert (slow.bottleneck, fast.bottleneck) == ("embed", "commit")
    assert fast.hours == pytest.approx((10**8 * (2e-5 + 7e-5)) / 3600)
    at = [scale_plan(10**8, .2, 4e5, m, **costs).hours for m in (slow.useful_machines, slow.useful_machines * 10)]
    assert at[0] == pytest.approx(at[1], rel=1e-3)
    assert scale_plan(10**8, .2, 4e5, 1000, store=1e6, **costs).bottleneck == "read"
    assert not slow.warnings and len(scale_plan(10**10, .2, 4e5, 10, **costs).warnings) == 2
