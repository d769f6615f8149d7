"Texts beside images, in an archive or a folder, become their metadata, or are named: nothing vanishes, nothing fails, and memory has a bound."
import json, os, tarfile, tracemalloc, zipfile

import fsspec, pytest
from hypothesis import given, settings, strategies as st

from archives import make_tar
from devsky_nb.images.image_sets import read_image_set, TEXTS_BESIDE
from devsky_nb.images.folders import TEXT_ELSEWHERE, ImageFolder
from devsky_nb.images.items import Item, LeftOut
from devsky_nb.images.kinds import HIDDEN, NO_IMAGE, begins_like_image
from devsky_nb.images.side_cars import APART, MOST_BESIDE, MOST_TEXT, NOT_TAKEN, UNREADABLE, SideCar, with_metadata
from devsky_nb.images.sources import A_TEXT, open_source


def make_zip(path, members, method=zipfile.ZIP_DEFLATED):
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members: archive.writestr(name, data)
    return path


def make_stored_zip(path, members): return make_zip(path, members, zipfile.ZIP_STORED)


def read(source):
    "Metadata by id, without the archive's name, and what is left out."
    parts = list(open_source(source).parts())
    images = {part.id.partition("/")[2]: None if part.metadata is None else json.loads(part.metadata) for part in parts if isinstance(part, Item)}
    return images, {part.path.partition("/")[2]: part.reason for part in parts if isinstance(part, LeftOut)}


archives = pytest.mark.parametrize("make", [make_tar, make_zip, make_stored_zip])


@archives
def test_what_webdataset_makes_of_side_cars_in_any_order(make, tmp_path):
    members = [("a/1.cls", b"7\n"), ("a/1.front.jpg", b""), ("a/1.back.JPG", b""), ("a/1.JSON", b'{"b": [1.5, null], "a": "\xc3\xb6"}'), ("a/1.front.json", b"[]"), ("a/2.jpg", b""),
               ("a/2.txt", "\ufeffein Kleid\n".encode()), ("a/3.jpg", b""), ("b/3.txt", b"elsewhere"), ("4.txt", b"before"), ("4.npy", b""), ("4.cls", b"n01440764"), ("4.png", b""), ("5.txt", b"alone"), ("7.id", b"7"), ("6.index", b"-3"), ("6.id", b"000123"), ("6.webp", b"")]
    shared = {"cls": 7, "json": {"b": [1.5, None], "a": "ö"}}
    images, left = read(make(tmp_path / "s.tar", members))
    assert images == {"a/1.front.jpg": shared | {"front.json": []}, "a/1.back.JPG": shared, "a/2.jpg": {"txt": "ein Kleid\n"}, "a/3.jpg": None, "4.png": {"txt": "before", "cls": "n01440764"}, "6.webp": {"index": -3, "id": 123}}
    assert left == {"b/3.txt": APART, "4.npy": NO_IMAGE, "5.txt": APART, "7.id": APART}
    assert read(make(tmp_path / "t.tar", members[::-1])) == (images, left)


@archives
def test_what_is_broken_or_too_much_is_named_and_its_image_read(make, tmp_path):
    broken = [b"{", b"", b"\xff\xfe{\x00", b"[NaN]", b"[1e999]", b"[" * 3000 + b"]" * 3000, b"1" * 5000, b"\xef\xbb"]
    members = [m for n, data in enumerate(broken) for m in ((f"{n}.jpg", b""), (f"{n}.json", data), (f"{n}.txt", b"fine"))]
    images, left = read(make(tmp_path / "s.tar", members))
    assert set(images) == {f"{n}.jpg" for n in range(len(broken))} and all(found == {"txt": "fine"} for found in images.values())
    assert left == {f"{n}.json": UNREADABLE for n in range(len(broken))}
    room = MOST_TEXT - len('"txt": ""')
    members = [("a.jpg", b""), ("a.txt", b"x" * room), ("b.jpg", b""), ("b.txt", b"x" * (room + 1)), ("b.cls", b"1"), ("c.json", b'"' + b"x" * 2**20 + b'"'), ("c.jpg", b""),
               ("d.json", b" " * 70_000 + b"{}"), ("d.txt", b"\0" * 20_000), ("d.jpg", b""), ("e.txt", b"\xff"), ("e.jpg", b""), ("f.txt", b"one"), ("f.TXT", b"two"), ("f.jpg", b"")]
    images, left = read(make(tmp_path / "t.tar", members))
    assert images == {"a.jpg": {"txt": "x" * room}, "b.jpg": {"cls": 1}, "c.jpg": None, "d.jpg": None, "e.jpg": None, "f.jpg": {"txt": "one"}}
    assert left == {"b.txt": NOT_TAKEN, "c.json": NOT_TAKEN, "d.json": NOT_TAKEN, "d.txt": NOT_TAKEN, "e.txt": UNREADABLE, "f.TXT": NOT_TAKEN}


def test_damaged_members(tmp_path):
    path = make_stored_zip(tmp_path / "s.zip", [("a.jpg", b""), ("a.txt", b"caption of a"), ("a.cls", b"1")])
    path.write_bytes(path.read_bytes().replace(b"caption of a", b"caption of b", 1))
    assert read(path) == ({"a.jpg": {"cls": 1}}, {"a.txt": UNREADABLE})
    path = make_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.txt", b"x" * 3000)])
    path.write_bytes(path.read_bytes()[:2048])
    images, left = read(path)
    assert images["a.jpg"] is None and left == {"a.txt": UNREADABLE}
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert read(tmp_path / "l.tar") == ({"a.jpg": None}, {"a.txt": UNREADABLE})


def test_a_lone_surrogate_stays_json(tmp_path):
    [image] = open_source(make_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.json", b'{"k": "\\ud83d"}')])).parts()
    assert image.metadata.encode() and json.loads(image.metadata) == {"json": {"k": "\ud83d"}}


def test_a_key_of_a_million_members_is_not_held(tmp_path):
    "`frame.000001.jpg` is of the key `frame`, and so are all others."
    def parts():
        for n in range(20_000): yield SideCar(f"frame.{n}.txt", b"x" * 2**12) if n % 100 == 50 else Item(f"frame.{n}.jpg")
    tracemalloc.start()
    found = sum(part.metadata is not None for part in with_metadata(parts()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == 19_800 and peak < 8 * MOST_BESIDE * 2**12
    texts = [SideCar(f"5.{n}.txt", b"") for n in range(2 * MOST_BESIDE)]
    image, *left = with_metadata([Item("5.jpg"), *texts])
    assert len(json.loads(image.metadata)) == MOST_BESIDE - 1 and [one.reason for one in left] == [NOT_TAKEN] * (MOST_BESIDE + 1)


names = st.builds("{}{}".format, st.sampled_from(["a", "b", "c/a", "a.b"]), st.sampled_from([".jpg", ".x.png", ".txt", ".json", ".cls", ".npy", ".tmp", ""]))


@settings(deadline=None, max_examples=60)
@given(members=st.lists(st.tuples(names, st.binary(max_size=20).filter(lambda data: not begins_like_image(data)) | st.sampled_from([b"1", b"{}", b'"x"'])), max_size=30))
def test_every_member_is_an_input_is_left_out_or_is_metadata(members, tmp_path_factory):
    path = make_tar(tmp_path_factory.mktemp("s") / "s.tar", members)
    parts = list(open_source(path).parts())
    images = [part for part in parts if isinstance(part, Item)]
    assert sorted(image.id for image in images) == sorted(f"s.tar/{name}" for name, _ in members if name.endswith((".jpg", ".png")))
    for image in images: assert image.metadata is None or json.loads(image.metadata)
    left = [part.path for part in parts if isinstance(part, LeftOut) and part.reason not in ("a tar without a member",)]
    texts = [f"s.tar/{name}" for name, _ in members if name.endswith((".txt", ".json", ".cls"))]
    others = [f"s.tar/{name}" for name, _ in members if not name.endswith((".jpg", ".png", ".txt", ".json", ".cls"))]
    assert len(left) <= len(texts) + len(others) and set(others) <= set(left)
    taken = set(texts) - set(left)
    fields = {(image.id.rpartition("/")[0], key) for image in images for key in json.loads(image.metadata or "{}")}
    for text in taken:
        folder, _, name = text.rpartition("/")
        assert {(folder, name.partition(".")[2]), (folder, name.removeprefix("a.b."))} & fields


def test_an_image_set_names_them_and_holds_none(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.txt", b"text"), ("b.jpg", b"")])
    found = read_image_set(path)
    assert [entry["id"] for entry in found["images"]] == ["s.tar/a.jpg", "s.tar/b.jpg"] and found["images"][0]["image"].item.metadata is None
    assert found["left_out"] == [("s.tar/a.jpg", TEXTS_BESIDE)]


def write_folder(path, members):
    for name, data in members:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def metadata_of(source): return {part.id: part.metadata and json.loads(part.metadata) for part in source.parts() if isinstance(part, Item)}
def left_of(source): return {part.path: part.reason for part in source.parts() if isinstance(part, LeftOut)}


FOLDER = [("a.jpg", b""), ("a.json", b'{"price": 9.5}'), ("a.txt", b"hat"), ("v1.2_red.jpg", b""), ("v1.2_red.txt", b"red"), ("v1.3_blue.jpg", b""), ("v1.3_blue.jpg.json", b"[1]"), ("v1.cls", b"4"),
          ("sub.x/a.png", b""), ("sub.x/b.txt", b"alone"), ("noted.TXT", "größer".encode()), ("noted.webp", b""), ("labels.json", b"[]"), ("bad.json", b"{"), ("bad.jpg", b""), ("long.jpg", b""), ("long.txt", b"x" * (MOST_TEXT + 1))]


def test_a_folder_gives_what_its_archive_gives(tmp_path):
    folder = write_folder(tmp_path / "shop", FOLDER)
    found, left = metadata_of(open_source(folder)), left_of(open_source(folder))
    assert found == {"a.jpg": {"json": {"price": 9.5}, "txt": "hat"}, "v1.2_red.jpg": {"cls": 4, "txt": "red"}, "v1.3_blue.jpg": {"cls": 4, "jpg.json": [1]}, "sub.x/a.png": None, "noted.webp": {"txt": "größer"}, "bad.jpg": None, "long.jpg": None}
    assert left == {"bad.json": UNREADABLE, "long.txt": NOT_TAKEN, "labels.json": NO_IMAGE, "sub.x/b.txt": NO_IMAGE}
    assert metadata_of(ImageFolder(folder)) == found
    for make in (make_tar, make_zip):
        images, others = read(make(tmp_path / "packed.tar", FOLDER))
        assert images == found and others == left | {"labels.json": APART, "sub.x/b.txt": APART}


def test_texts_that_are_not_read_are_named_as_such(tmp_path):
    folder = write_folder(tmp_path / "shop", FOLDER)
    bucket = fsspec.filesystem("memory")
    for name, data in FOLDER: bucket.pipe_file(f"/side-cars/{name}", data)
    beside = {"a.json", "a.txt", "v1.2_red.txt", "v1.3_blue.jpg.json", "v1.cls", "noted.TXT", "bad.json", "long.txt"}
    elsewhere = open_source("memory://side-cars")
    assert left_of(elsewhere) == dict.fromkeys(beside, TEXT_ELSEWHERE) | {"labels.json": NO_IMAGE, "sub.x/b.txt": NO_IMAGE} and not any(metadata_of(elsewhere).values())
    assert left_of(open_source(folder / "a.*")) == {"a.json": A_TEXT, "a.txt": A_TEXT}
    assert set(left_of(read_set := open_source(folder))) and {part for part in left_of(read_set).values()} == {UNREADABLE, NOT_TAKEN, NO_IMAGE}
    named = dict(read_image_set(folder)["left_out"])
    assert named == dict.fromkeys(beside | {"labels.json", "sub.x/b.txt"}, NO_IMAGE)


def test_only_texts_that_lie_with_their_image_are_read(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    blobs = write_folder(tmp_path / "blobs", [("1", b"image"), ("2", b"caption")])
    folder = write_folder(tmp_path / "shop", [("plain.jpg", b""), ("pipe.jpg", b""), ("folder.jpg", b""), ("folder.txt/x.md", b""), (".a.txt", b"hidden"), ("gone.jpg", b"")])
    (folder / "cached.jpg").symlink_to(blobs / "1")
    (folder / "cached.txt").symlink_to("../blobs/2")
    (folder / "cached.json").symlink_to(secret)
    (folder / "plain.txt").symlink_to(secret)
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe.txt")
    source = open_source(folder)
    assert metadata_of(source) == {"cached.jpg": {"txt": "caption"}, "folder.jpg": None, "gone.jpg": None, "pipe.jpg": None, "plain.jpg": None}
    assert left_of(source) == {"cached.json": UNREADABLE, "plain.txt": UNREADABLE, "gone.txt": UNREADABLE, "pipe.txt": UNREADABLE, ".a.txt": HIDDEN, "folder.txt/x.md": NO_IMAGE}


def test_a_key_of_many_texts_in_a_folder(tmp_path):
    "Each of them is in the metadata of its images, or is named."
    folder = write_folder(tmp_path / "shop", [(f"5.{n}.jpg", b"") for n in range(3)] + [(f"5.t{n}.txt", b"") for n in range(MOST_BESIDE + 7)] + [("6.jpg", b""), ("6.txt", b"six")])
    found, left = metadata_of(open_source(folder)), left_of(open_source(folder))
    assert [len(found[f"5.{n}.jpg"]) for n in range(3)] == [MOST_BESIDE] * 3 and found["6.jpg"] == {"txt": "six"}
    assert list(left.values()) == [NOT_TAKEN] * 7
    many = write_folder(tmp_path / "many", [(f"day.{n}.{ending}", str(n).encode()) for n in range(300) for ending in ("jpg", "txt")])
    assert metadata_of(open_source(many)) == {f"day.{n}.jpg": {"txt": str(n)} for n in range(300)}
