"What lies elsewhere: servers that hang, lie, redirect and fail, buckets, and secrets that nobody may see."
import logging, pickle, socket, time, zipfile
from contextlib import closing

import fsspec, pyarrow as pa, pyarrow.parquet as pq, pytest
from fsspec.implementations.memory import MemoryFileSystem

from archives import make_tar
from shopserver import Shop, image

from devsky_nb.embedding.plan import SourcePlan
from devsky_nb.errors import DevSkyyError, FileNotFoundError as NoSuchFile, ValidationError
from devsky_nb.images import remote
from devsky_nb.images.fetching import CONNECTIONS, fetch, fetch_ahead, fetch_key
from devsky_nb.images.items import Item, read_item
from devsky_nb.images.policy import ImagePolicy
from devsky_nb.images.remote import ask, shown, stamp_of, without_secrets
from devsky_nb.images.sources import open_source, slices

POLICY = ImagePolicy(max_bytes=100_000)


@pytest.fixture
def shop():
    with Shop() as made: yield made


@pytest.fixture
def hurry(monkeypatch):
    "The same patience, a hundred times as fast."
    monkeypatch.setattr(remote, "SILENCE", .3)
    monkeypatch.setattr(remote, "PATIENCE", 1.5)
    monkeypatch.setattr(remote, "PAUSE", .01)


@pytest.fixture
def bucket():
    made = fsspec.filesystem("memory")
    yield made
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def items(source, rows=1000, left=None):
    return [i for s in slices(open_source(source), rows, (lambda one: left.append(one)) if left is not None else (lambda one: None)) for i in s.items()]


def outcome(item, policy=POLICY):
    try: return read_item(item, policy)
    except DevSkyyError as e: return e.details["reason"]


# over HTTP

OUTCOMES = {"a.jpg": None, "moved.jpg": None, "busy.jpg": None, "gone.jpg": "missing", "hang.jpg": "timeout", "drip.jpg": "timeout", "cut.jpg": "unreadable", "loop.jpg": "unreadable",
            "away.jpg": "unreadable", "page.jpg": "html", "endless.jpg": "too-many-bytes", "later.jpg": "unreadable", "401": "permission", "403": "permission", "410": "missing",
            "500": "unreadable", "418": "unreadable", "304": "unreadable"}


@pytest.mark.parametrize("name", OUTCOMES)
def test_whatever_a_server_does_is_bytes_or_one_reason(shop, hurry, name):
    shop.busy = 2
    shop.files["jpg"] = image()
    assert outcome(Item("x", f"{shop.address}/{name}?token=secret")) == (OUTCOMES[name] or image())
    assert len(shop.log) <= 6


def test_errors_of_the_moment_are_tried_again_and_others_are_not(shop, hurry):
    for name, tries in (("404", 1), ("403", 1), ("503", 3), ("cut.jpg", 3)):
        shop.log.clear()
        assert isinstance(outcome(Item("x", f"{shop.address}/{name}")), str) and len(shop.log) == tries, name


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.jpg", "http://[::1", "http://a b/c.jpg", "http://", "https://127.0.0.1:9/x", "http://user:pass/word@x/a.jpg", "http://x:99999/a.jpg"])
def test_addresses_of_nobody_are_a_reason(hurry, address):
    assert outcome(Item("x", address)) in ("unreadable", "timeout")


def test_a_server_that_says_nothing_at_all(hurry):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        assert outcome(Item("x", f"http://127.0.0.1:{deaf.getsockname()[1]}/a.jpg")) == "timeout"


def test_nothing_is_fetched_where_a_root_is_set(shop, bucket, tmp_path):
    bucket.pipe_file("/a.jpg", b"x")
    for address in (f"{shop.address}/a.jpg", "memory://a.jpg"):
        policy = ImagePolicy(root=tmp_path)
        assert outcome(Item("x", address), policy) == outcome(fetch(Item("x", address), policy, {}.get)) == "outside-root"
    assert not shop.log


# secrets

def test_nobody_sees_what_is_secret(shop, hurry, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    host = shop.address.removeprefix("http://")
    addresses = [f"http://user:secret@{host}/a.jpg?sig=secret#secret", f"http://{host}/gone.jpg?secret", f"http://{host}/loop.jpg?secret", f"http://{host}/500?secret", f"http://{host}/cut.jpg?secret"]
    (tmp_path / "list.csv").write_text("url\n" + "\n".join(addresses) + "\n")
    pq.write_table(pa.table({"url": addresses, "sku": addresses}), tmp_path / "t.parquet")
    said = []
    for source in (addresses, [(address, address) for address in addresses], tmp_path / "list.csv", tmp_path / "t.parquet", open_source(tmp_path / "t.parquet", "url", "sku")):
        for item in items(source):
            said += [item.id, item.path]
            for read in (lambda item=item: read_item(item, POLICY), lambda item=item: read_item(fetch(item, POLICY, {}.get), POLICY)):
                try: read()
                except DevSkyyError as e: said += [str(e), repr(e), str(e.to_dict())]
    with pytest.raises(ValidationError) as e, closing(SourcePlan(tmp_path / "plan", 10)) as plan: plan.fill(open_source([f"{addresses[1]}1", f"{addresses[1]}2"]))
    said.append(str(e.value))
    assert "what follows a '?' is no part of the id" in said[-1]
    assert "secret" not in "".join(map(str, said)) and "secret" not in caplog.text
    assert any("Authorization" in headers for _, headers in shop.log)  # and yet it was used


def test_a_plan_is_for_its_owner(tmp_path):
    with closing(SourcePlan(tmp_path / "plan", 10)): assert (tmp_path / "plan").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("address, seen", [("s3://b/a?b.jpg", "s3://b/a"), ("hf://datasets/o/n@main/a.jpg", "hf://datasets/o/n@main/a.jpg"), ("ftp://u:p@h/a", "ftp://h/a"), ("https://t0ken@h/a@2x.jpg", "https://h/a@2x.jpg"),
                                           ("https://h:8080/a", "https://h:8080/a"), ("https://[::1]:80/a", "https://[::1]:80/a"), ("https://u:p/w@h/a", "https://…"), ("abfs://c@acc.dfs/a", "abfs://c@acc.dfs/a"),
                                           ("https://h/\ud800.jpg", "https://h/\\ud800.jpg"), ("a?b.jpg", "a?b.jpg")])
def test_what_is_shown_of_an_address(address, seen):
    assert shown(address) == seen and without_secrets(f"at '{address}'.").startswith(f"at '{seen}"[:8])


# buckets

def test_a_folder_in_a_bucket_is_read_like_one_here(bucket, tmp_path):
    files = {"b.JPG": image(1), "a.png": image(2), "notes.txt": b"", ".hidden.png": b"", "c/d.webp": image(3), "c/.git/x.jpg": b"", "list.csv": b"path\n", "old.tar.gz": b"", "noname": image(4),
             "v/part-00000.parquet": b"", "v/_SUCCESS": b'{"fingerprint": "x"}', "w/_SUCCESS": b"", "w/README": b"", "w/e.jpg": image(5)}
    for name, data in files.items():
        bucket.pipe_file(f"/shop/{name}", data)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    here, there = [], []
    found = items("memory://shop", left=there)
    assert [i.id for i in found] == [i.id for i in items(tmp_path, left=here)] == ["a.png", "b.JPG", "noname", "c/d.webp", "w/e.jpg"]
    assert sorted(path for path, _ in there) == sorted(path for path, _ in here) and [outcome(i) for i in found] == [image(n) for n in (2, 1, 4, 3, 5)]
    assert found == pickle.loads(pickle.dumps(found)) and all(i.path.startswith("memory:///shop/") for i in found)


def test_archives_and_tables_in_a_bucket(bucket, shop, tmp_path):
    make_tar(tmp_path / "s.tar", [(f"{n}.png", image(n)) for n in range(3)])
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(3): archive.writestr(f"{n}.png", image(n))
    for name in ("s.tar", "z.zip"):
        bucket.put_file(str(tmp_path / name), f"/shop/{name}")
        shop.files[name] = (tmp_path / name).read_bytes()
    pq.write_table(pa.table({"image": [image(n) for n in range(3)]}), tmp_path / "t.parquet", row_group_size=2)
    pq.write_table(pa.table({"path": ["z.zip", "../shop/none.jpg", f"{shop.address}/a.jpg", "memory://shop/z.zip", None]}), tmp_path / "paths.parquet")
    for name in ("t.parquet", "paths.parquet"): bucket.put_file(str(tmp_path / name), f"/tables/{name}")
    shop.files["t.parquet"] = (tmp_path / "t.parquet").read_bytes()
    everything = [image(n) for n in range(3)]
    for source in ("memory://shop/s.tar", "memory://shop/z.zip", "memory://tables/t.parquet", f"{shop.address}/s.tar?sig=1", f"{shop.address}/z.zip?sig=1", f"{shop.address}/t.parquet?sig=1"):
        found = items(source, rows=2)
        assert [outcome(i) for i in found] == everything, source
        assert "sig" not in str([(i.id, i.path) for i in found])
        assert [i.id for i in found] == [i.id for i in items(tmp_path / source.partition("?")[0].rpartition("/")[2], rows=2)]
    assert [i.id for i in items("memory://shop")] == [f"{name}/{n}.png" for name in ("s.tar", "z.zip") for n in range(3)]
    assert [i.id for i in items("memory://shop/*.zip")] == [i.id for i in items("memory://shop/{z}.zip")][:0] + [f"z.zip/{n}.png" for n in range(3)]
    assert [i.problem and i.problem[0] for i in items("memory://shop/{y,z}.zip")] == ["broken-zip", None, None, None]
    rows = items("memory://tables/paths.parquet")
    zipped = shop.files["z.zip"]
    assert [outcome(i, ImagePolicy()) for i in rows] == ["missing", "missing", image(), zipped, "missing"]


def test_lists_that_lie_elsewhere(bucket, shop):
    shop.files["lists/spring.csv"] = b"sku,image_url\n1,a.jpg\n2,/b.jpg\n3,memory://x.jpg\n"
    found = items(f"{shop.address}/lists/spring.csv?sig=secret")
    assert [i.file for i in found] == [f"{shop.address}/lists/a.jpg", f"{shop.address}/lists/b.jpg", "memory://x.jpg"]
    bucket.pipe_file("/l/a.jsonl", b'{"id": "x", "path": "deep/a.jpg"}\n')
    bucket.pipe_file("/l/b.json", b'["deep/a.jpg"]')
    assert [(i.id, i.file) for n in ("a.jsonl", "b.json") for i in items(f"memory://l/{n}")] == [("x", "memory://l/deep/a.jpg"), ("deep/a.jpg", "memory://l/deep/a.jpg")]
    with pytest.raises(ValidationError, match="cannot be read as a list of images beyond entry 0"): items(f"{shop.address}/none.csv?token=secret")


def test_a_bucket_that_is_not_there_is_one_error(bucket):
    for source in ("memory://nothing", "memory://nothing/a.tar", "memory://nothing/*.jpg"):
        with pytest.raises((NoSuchFile, ValidationError), match="no such file|nothing matches"): items(source)
    bucket.pipe_file("/s/notes.md", b"")
    with pytest.raises(ValidationError, match="is no image, no archive"): open_source("memory://s/notes.md")


class Troubled(MemoryFileSystem):
    "A bucket with troubles."
    protocol, store, pseudo_dirs, calls = "troubled", {}, [""], []

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.calls.append(path)
        if "hang" in path: time.sleep(20)
        if "denied" in path: raise PermissionError("Access Denied")
        if "odd" in path: raise RuntimeError("the library of troubled://user:secret@bucket/x broke")
        if "flaky" in path and len(self.calls) < 3: raise ConnectionError("reset")
        return super().cat_file(path, start, end, **kwargs)

    @classmethod
    def _strip_protocol(cls, path): return super()._strip_protocol(path.replace("troubled://", "memory://"))

    def ls(self, path, detail=True, **kwargs):
        if "closed" in path: raise PermissionError("Access Denied")
        return super().ls(path, detail, **kwargs)


def test_a_bucket_with_troubles(hurry):
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    remote.protocol_problem.cache_clear()
    made = fsspec.filesystem("troubled")
    Troubled.store.clear()
    for name in ("hang.jpg", "denied.jpg", "odd.jpg", "flaky.jpg"): made.pipe_file(f"/b/{name}", b"x")
    made.pipe_file("/b/closed/a.jpg", b"x")
    found = {i.id: i for i in items("troubled://b")}
    assert list(found) == ["denied.jpg", "flaky.jpg", "hang.jpg", "odd.jpg", "closed"] and found["closed"].problem[0] == "unreadable"
    Troubled.calls.clear()
    assert outcome(found["flaky.jpg"]) == b"x"
    assert [outcome(found[name]) for name in ("denied.jpg", "hang.jpg", "odd.jpg", "closed")] == ["permission", "timeout", "unreadable", "unreadable"]
    with pytest.raises(DevSkyyError) as e: read_item(found["odd.jpg"], POLICY)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("info, is_stamp", [({"size": 1, "ETag": '"x"'}, True), ({"size": 1, "mtime": 7.5}, True), ({"size": 1}, False), ({"size": None, "ETag": '"x"'}, False), ({"size": 1, "ETag": 'W/"x"'}, False),
                                            ({"size": 1, "blob_id": "abc"}, True), ({"ETag": '"x"'}, False)])
def test_what_identifies_a_file(info, is_stamp):
    assert (stamp_of(info) is not None) == is_stamp
    assert stamp_of({"size": 2, "ETag": '"x"'}) != stamp_of({"size": 1, "ETag": '"x"'}) != stamp_of({"size": 1, "ETag": '"y"'})


# many at once

def test_many_are_fetched_at_once_and_come_in_order(shop):
    for n in range(48): shop.files[f"{n}.png"] = image(n)
    addresses = [f"{shop.address}/slow{n}.png" for n in range(48)]
    found = list(fetch_ahead([Item(str(n), address) for n, address in enumerate(addresses)], POLICY))
    assert [i.data for i in found] == [image(n) for n in range(48)]
    assert 4 <= shop.most <= CONNECTIONS


def test_no_more_is_fetched_ahead_than_fits(shop, monkeypatch):
    monkeypatch.setattr("devsky_nb.images.fetching.BYTES_AHEAD", 10_000)
    shop.files["big.jpg"] = bytes(5000)
    with closing(fetch_ahead((Item(str(n), f"{shop.address}/big.jpg?{n}") for n in range(200)), POLICY)) as found:
        next(found)
        time.sleep(.3)
        assert len(shop.log) <= 4 + CONNECTIONS + 1


def test_what_has_not_changed_is_not_sent_again(shop):
    item = Item("a", f"{shop.address}/a.jpg")
    first = fetch(item, POLICY, {}.get)
    known = {fetch_key(item): (first.stamp, "hash")}
    assert fetch(item, POLICY, known.get).content_hash == "hash" and shop.log[-1][1]["If-None-Match"] == first.stamp
    shop.files["a.jpg"] = image(200)
    assert fetch(item, POLICY, known.get).data == image(200)
    shop.etag = lambda data: None
    assert fetch(item, POLICY, known.get).stamp is None


def test_the_hub_offline_is_one_error():
    with pytest.raises(DevSkyyError, match="offline mode is enabled") as e: open_source("hf://datasets/shop/spring")
    assert e.value.details["reason"] == "offline"


class OwnStore(MemoryFileSystem):
    "A store that is reached with an option only."
    protocol = "ownstore"

    def __init__(self, *args, endpoint_url=None, **options):
        if endpoint_url != "https://store.example": raise PermissionError(f"no store at {endpoint_url}")
        super().__init__(*args, **options)

    @classmethod
    def _strip_protocol(cls, path): return super()._strip_protocol(path.removeprefix("ownstore:/"))


def test_options_of_a_file_system_are_those_of_fsspecs_configuration(monkeypatch, bucket):
    fsspec.register_implementation("ownstore", OwnStore, clobber=True)
    bucket.pipe_file("/bucket/a.png", image(1))
    with pytest.raises(DevSkyyError, match="no store at None"): items("ownstore://bucket")
    configured = {}
    fsspec.config.set_conf_env(configured, {"FSSPEC_OWNSTORE_ENDPOINT_URL": "https://store.example"})
    monkeypatch.setitem(fsspec.config.conf, "ownstore", configured["ownstore"])
    [found] = items("ownstore://bucket")
    assert found.id == "a.png"
    assert ask(found.file, 2**20).data == image(1)
