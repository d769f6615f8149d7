"What people's folders, lists and tars really hold is read, or named with a reason: nothing vanishes."
import io, json, os, subprocess, sys, tarfile
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image

from archives import make_tar
from patience import PATIENCE
from devsky_nb.embedding.plan import SourcePlan
from devsky_nb.errors import ValidationError
from devsky_nb.images.folders import ImageFolder, ImageList, READ_BEFORE, READ_THERE, LOOP, VECTORS, expand_pattern
from devsky_nb.images.image_sets import read_image_set
from devsky_nb.images.items import Account, Item, left_out_lines
from devsky_nb.images.kinds import HIDDEN, LIST, NO_IMAGE, PACKED, RAW, UNKNOWN
from devsky_nb.images.lists import ListedImages
from devsky_nb.images.load import load_image
from devsky_nb.images.sources import AnyImages, open_source, slices
from devsky_nb.images.tables import ParquetImages
from devsky_nb.images.side_cars import APART
from devsky_nb.images.tars import EMPTY, NESTED, TarShards


def image(format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format)
    return buffer.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def account(source):
    "The ids of a source, and its left-out paths by reason."
    left = Account()
    ids = [item.id for s in slices(open_source(source), 1000, left.add) for item in s.items()]
    reasons = {}
    for path, reason in left.named: reasons.setdefault(reason, []).append(path)
    return ids, reasons


# folders

def test_files_are_what_their_bytes_say_where_the_name_says_nothing(tmp_path):
    jpeg, png = image(), image("PNG")
    write(tmp_path, {"4f1c": jpeg, "a.jpg?w=600": jpeg, "b.jpg_large": jpeg, "c.JPEG": b"", "d.jfif": b"", "e.tmp": png, "f.bin": image("WEBP"),
                     "g": image("GIF"), "h": image("TIFF"), "i": image("BMP"), "README": b"hello", "j.jpg?w=1": b"<html>", "empty": b"",
                     "k.cr2": b"II*\0raw", "list.csv": b"path\n", "l.txt": b"text", "m.tar.gz": b"\x1f\x8b", "n.RAR": b"Rar!", "o": b"PK\3\4",
                     ".DS_Store": b"x", "Thumbs.db": b"x", "__MACOSX/._a.jpg": jpeg, ".git/x.jpg": jpeg})
    ids, left = account(tmp_path)
    assert ids == ["4f1c", "a.jpg?w=600", "b.jpg_large", "c.JPEG", "d.jfif", "e.tmp", "f.bin", "g", "h", "i"]
    assert left == {HIDDEN: [".DS_Store", ".git", "Thumbs.db", "__MACOSX"], UNKNOWN: ["README", "empty", "j.jpg?w=1"], RAW: ["k.cr2"],
                    NO_IMAGE: ["l.txt"], LIST: ["list.csv"], PACKED: ["m.tar.gz", "n.RAR", "o"]}


def test_each_real_folder_is_read_once_however_it_is_linked(tmp_path):
    write(tmp_path, {"set/real/a.jpg": b"", "set/.hidden/h.jpg": b"", "store/s.jpg": b"", "store/sub/t.jpg": b"", "other/o.jpg": b""})
    top = tmp_path / "set"
    links = {"0same": top / "real", "1store": tmp_path / "store", "2again": tmp_path / "store", "3sub": tmp_path / "store/sub", "4up": tmp_path,
             "5self": top, "6gone": tmp_path / "nothing", "7hidden": top / ".hidden", "real/back": top, "real/other": tmp_path / "other"}
    for name, target in links.items(): (top / name).symlink_to(target)
    (tmp_path / "store/home").symlink_to(top)
    (tmp_path / "store/round").symlink_to(tmp_path / "store")
    ids, left = account(top)
    assert ids == ["1store/s.jpg", "1store/sub/t.jpg", "7hidden/h.jpg", "real/a.jpg", "real/other/o.jpg"]
    assert left.pop(next(reason for reason in left if "No such file" in reason)) == ["6gone"]
    assert left == {HIDDEN: [".hidden"], READ_THERE: ["0same", "1store/home"], LOOP: ["4up", "5self", "1store/round", "real/back"],
                    READ_BEFORE: ["2again", "3sub"]}
    assert [e["id"] for e in read_image_set(top)["images"]] == ids


def test_a_pattern_for_every_folder_ends_where_links_lead_in_circles(tmp_path):
    write(tmp_path, {"a/x.jpg": b"", "b/c/y.jpg": b"", "z.jpg": b""})
    for name in ("a/l1", "a/l2", "b/l3"): (tmp_path / name).symlink_to(tmp_path)
    assert expand_pattern(f"{tmp_path}/**/*.jpg") == [f"{tmp_path}/{name}" for name in ("a/x.jpg", "b/c/y.jpg", "z.jpg")]
    ids, left = account(f"{tmp_path}/*")
    assert ids == [f"{tmp_path}/z.jpg"] and len(left) == 1 and "folder" in [*left][0]


def test_images_and_tars_of_one_tree_are_read_and_tables_beside_them_refused(tmp_path):
    write(tmp_path, {"y/a.jpg": image(), "y/b": image()})
    (tmp_path / "x").mkdir()
    make_tar(tmp_path / "x/s.tar", [("in.jpg", image()), ("noend", image())])
    make_tar(tmp_path / "y/t.TAR", [("in.jpg", image())])
    ids, left = account(tmp_path)
    assert ids == ["x/s.tar/in.jpg", "x/s.tar/noend", "y/a.jpg", "y/b", "y/t.TAR/in.jpg"] and not left
    of_kind, left = account(ImageFolder(tmp_path))
    assert of_kind == ["y/a.jpg", "y/b"] and [*left.values()] == [["x/s.tar", "y/t.TAR"]]
    assert [*account(TarShards(tmp_path))[1].values()] == [["y/a.jpg", "y/b"]]
    pq.write_table(pa.table({"path": ["y/a.jpg"]}), tmp_path / "z.parquet")
    with pytest.raises(ValidationError, match=r"holds a table, 'z.parquet', and other files, 'x/s.tar'.*ParquetImages"): account(tmp_path)
    assert account(ParquetImages(tmp_path))[0] == ["z.parquet/0"]


def test_vectors_that_lie_among_the_images_are_no_part_of_them(tmp_path):
    write(tmp_path, {"a.jpg": image(), "v/.devsky/lock": b"", "w/_SUCCESS": b'{"rows": 1, "fingerprint": "f"}', "w/part-00000.parquet": b"",
                     "spark/_SUCCESS": b"", "spark/b.jpg": image()})
    ids, left = account(tmp_path)
    assert ids == ["a.jpg", "spark/b.jpg"] and left[VECTORS] == ["v", "w"]


def test_what_is_left_out_is_counted_whole_and_named_in_part(tmp_path):
    write(tmp_path, {f"{i:04}.json": b"{}" for i in range(300)} | {"a.7z": b""})
    left = Account()
    assert sum(len(s) for s in slices(AnyImages(tmp_path), leave_out=left.add)) == 0
    assert left.counts == {NO_IMAGE: 300, PACKED: 1} and len(left.named) == 101 and ("a.7z", PACKED) in left.named
    assert left_out_lines(left.named, left.counts)[0] == "300 left out ('0000.json', '0001.json', '0002.json', …): no image, by its name"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.rar", "a.tar.zst", "a.7z", "notes.txt"])
def test_a_folder_of_which_nothing_is_read_is_an_error_that_says_why(tmp_path, name):
    write(tmp_path / "s", {name: b"x", ".hidden": b""})
    with closing(SourcePlan(tmp_path / "plan", 10)) as plan:
        with pytest.raises(ValidationError, match=rf"no images in '.*s': 1 left out \('{name}'\): .*"): plan.fill(open_source(tmp_path / "s"))
    with pytest.raises(ValidationError, match=rf"no images in '.*s': 1 left out \('{name}'\)"): read_image_set(tmp_path / "s")
    if name != "notes.txt":
        with pytest.raises(ValidationError, match="packed or compressed files are not read: unpack it"): open_source(tmp_path / "s" / name)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names of files are text here")
def test_a_name_that_is_no_text_is_read_by_validation_too(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as f: f.write(image("PNG"))
    (tmp_path / "none").mkdir()
    for source in (tmp_path, [tmp_path, tmp_path / "none"], tmp_path / "*.png"):
        [entry] = read_image_set([*map(str, source)] if isinstance(source, list) else source)["images"]
        assert entry["id"].endswith("caf\\udce9.png") and os.fsencode(entry["path"]) == name and load_image(entry["path"])[0].size


def test_a_list_of_no_images_says_so(tmp_path):
    for name, text in {"a.txt": "", "a.csv": "path\n", "a.json": '{"images": []}', "a.jsonl": "\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValidationError, match=f"no images in '.*{name}'"): read_image_set(tmp_path / name)


def test_a_folder_with_hidden_files_only_is_empty(tmp_path):
    write(tmp_path / "s", {".gitkeep": b""})
    with closing(SourcePlan(tmp_path / "plan", 10)) as plan:
        plan.fill(open_source(tmp_path / "s"))
        assert plan.total == 0 and plan.left_out.counts == {HIDDEN: 1}


# tars

def test_concatenated_damaged_and_compressed_tars_are_read_as_far_as_they_can_be(tmp_path):
    a, b = (make_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x")]).read_bytes() for n in "ab")
    (tmp_path / "c.tar").write_bytes(a + b)
    (tmp_path / "d.tar").write_bytes(a + b"no tar " * 512 + b)
    (tmp_path / "e.tar").write_bytes(bytes(10240))
    (tmp_path / "f.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    ids, left = account(f"{tmp_path}/{{c,d,e,f}}.tar")
    assert ids == ["c.tar/a.jpg", "c.tar/b.jpg", "d.tar/a.jpg", "d.tar", "d.tar/b.jpg", "f.tar"] and left == {EMPTY: ["e.tar"]}


def test_members_are_judged_like_files(tmp_path):
    make_tar(tmp_path / "s.tar", [("./a.jpg", b""), ("b", image()), ("c", b"text"), ("d.json", b"{}"), ("__MACOSX/._a.jpg", b""), (".x/e.jpg", b""),
                                  ("more.tar", b""), ("more.zip", b""), ("f.jpg?w=1", image())])
    ids, left = account(tmp_path / "s.tar")
    assert ids == ["s.tar/./a.jpg", "s.tar/b", "s.tar/f.jpg?w=1"]
    assert left == {UNKNOWN: ["s.tar/c"], APART: ["s.tar/d.json"], HIDDEN: ["s.tar/__MACOSX/._a.jpg", "s.tar/.x/e.jpg"],
                    NESTED: ["s.tar/more.tar", "s.tar/more.zip"]}


def test_members_of_one_name_have_a_row_each(tmp_path):
    make_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.jpg@2560", image()), ("a.jpg", b"4")])
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("a.jpg")
            info.type = tarfile.SYMTYPE
            tar.addfile(info)
    with closing(SourcePlan(tmp_path / "plan", 2)) as plan:
        plan.fill(open_source(tmp_path / "s.tar"))
        ids = [item.id for n in range(plan.count) for item in plan.slice(n).items()]
        assert plan.total == len(set(ids)) == 6
        assert ids[:3] == ["s.tar/a.jpg", "s.tar/a.jpg@1536", "s.tar/a.jpg@2560"] and all(id.startswith("s.tar/a.jpg@") for id in ids[3:])


# what is given

REMOTE = ["https:/x.example/a.jpg", "carrier-pigeon://b/{0..1}.tar", "abfss://c@a/x.csv", "data:image/png;base64,iVBOR", "pipe:aws s3 cp s3://b/0.tar -",
          "simplecache://x/a.jpg", Path("https://x.example/a.tar")]
UNREACHABLE = [*REMOTE, "file:///tmp/a.jpg"] + ["s3://b/{0..1}.tar"] * (find_spec("s3fs") is None) + ["gs://b/a"] * (find_spec("gcsfs") is None)


@pytest.mark.parametrize("address", UNREACHABLE, ids=str)
def test_what_cannot_be_reached_is_one_error_before_any_work(tmp_path, address):
    (tmp_path / "list.txt").write_text(f"a.jpg\n{address}\n", encoding="utf-8")
    for source in (address, [address], ["a.jpg", ("id", address)], TarShards(address), ParquetImages(address), tmp_path / "list.txt"):
        with pytest.raises(ValidationError, match="is a remote address, and those .*are not read. Download it first|needs a package .*install|give the path of the file"):
            with closing(SourcePlan(tmp_path / "plan", 10)) as plan: plan.fill(open_source(source))
    with pytest.raises(ValidationError, match="remote address|needs a package|give the path"): read_image_set(address)


def test_an_image_set_has_no_addresses(tmp_path):
    for address in ("https://x.example/a.csv", "memory://x"):
        with pytest.raises(ValidationError, match="those are not read here. Download it first"): read_image_set(address)


def test_local_names_with_a_colon_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"C:/a.jpg": image(), "shop:a.jpg": image(), "ns:/b.jpg": image()})
    assert account("shop:a.jpg")[0] == ["shop:a.jpg"] and account(["C:/a.jpg", "ns:/b.jpg"])[0] == ["C:/a.jpg", "ns:/b.jpg"]


class Modin:
    "As a DataFrame of a library looks that is not known."
    columns, shape = ["sku", "image_path"], (1, 2)
    def __iter__(self): return iter(["sku", "image_path"])


@pytest.mark.parametrize("source, says", [(Modin(), "a Modin is no source: make it a DataFrame of pandas or polars"), ({"images": [{"path": "a.jpg"}]}, "an image set is no source: give pairs"),
                                          ({"a.jpg", "b.jpg"}, r"no order: give sorted\(paths\)"), ({"path": "a.jpg"}, "is no source")], ids=["frame", "image set", "set", "dict"])
def test_what_is_no_source_is_refused_with_the_right_call(source, says):
    with pytest.raises(ValidationError, match=says): open_source(source)


def test_columns_of_a_table_are_sources_too(tmp_path):
    table = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "sku": [1, 2]}).astype({"path": "category", "sku": "str"})
    assert account(table["path"])[0] == ["a.jpg", "b.jpg"] and account(zip(table["sku"], table["path"]))[0] == ["1", "2"]
    table.to_parquet(tmp_path / "t.parquet")
    assert [item.file for s in slices(open_source(tmp_path / "t.parquet")) for item in s.items()] == [f"{tmp_path}/{n}.jpg" for n in "ab"]


# lists

ROWS = [{"id": "A1", "path": "größe/a.jpg", "label": "shirt"}, {"id": "B2", "path": "/abs/b.jpg", "label": "coat"}]
CSV = "id,path,label\nA1,größe/a.jpg,shirt\nB2,/abs/b.jpg,coat\n"
LISTS = {"a.json": json.dumps(ROWS), "b.json": json.dumps({"images": ROWS, "metadata": {"name": "n"}}), "c.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
         "d.ndjson": "\r\n".join(map(json.dumps, ROWS)), "e.csv": CSV, "f.CSV": CSV.replace(",", ";"), "g.tsv": CSV.replace(",", "\t"),
         "h.csv": CSV.replace("path", "File_Name").replace("\n", "\r\n"), "i.csv": '"id","path","label"\n"A1","größe/a.jpg","shirt"\nB2,/abs/b.jpg,coat'}


def on_disk(path):  # the file's name as a process of this locale writes it
    return os.fsdecode(path.encode())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", LISTS)
def test_every_list_gives_the_same_entries_from_where_it_lies(tmp_path, monkeypatch, name, encoding):
    (tmp_path / name).write_bytes(LISTS[name].encode(encoding))
    monkeypatch.chdir("/")
    items = [item for s in slices(open_source(tmp_path / name)) for item in s.items()]
    assert [(item.id, item.file) for item in items] == [("A1", on_disk(f"{tmp_path}/größe/a.jpg")), ("B2", "/abs/b.jpg")]
    entries = read_image_set(tmp_path / name)["images"]
    assert [(e["id"], e["path"], e["label"]) for e in entries] == [("A1", on_disk(f"{tmp_path}/größe/a.jpg"), "shirt"), ("B2", "/abs/b.jpg", "coat")]


@pytest.mark.parametrize("name, content", [("a.txt", "größe/a.jpg\n\nb c.jpg"), ("a.json", '["größe/a.jpg", "b c.jpg"]'), ("a.jsonl", '"größe/a.jpg"\n"b c.jpg"'),
                                           ("a.csv", "path\ngröße/a.jpg\nb c.jpg\n")])
def test_bare_paths_start_at_the_list_too(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    items = [item for s in slices(open_source(tmp_path / name)) for item in s.items()]
    assert [(item.id, item.file) for item in items] == [(n, on_disk(f"{tmp_path}/{n}")) for n in ("größe/a.jpg", "b c.jpg")]
    assert read_image_set(tmp_path / name)["images"] == [{"path": on_disk(f"{tmp_path}/{n}")} for n in ("größe/a.jpg", "b c.jpg")]


def test_columns_of_a_list_can_be_named(tmp_path):
    (tmp_path / "a.csv").write_text("sku,front,back\n1,a.jpg,b.jpg\n2,c.jpg,\n", encoding="utf-8")
    items = list(open_source(tmp_path / "a.csv", "back", "sku").parts())
    assert [(item.id, item.problem and item.problem[0]) for item in items] == [("1", None), ("2", "missing")]
    assert [item.file for item in ListedImages(tmp_path / "a.csv", "front").parts()] == [f"{tmp_path}/a.jpg", f"{tmp_path}/c.jpg"]
    with pytest.raises(ValidationError, match="expected names of columns, and among them one of path"): account(tmp_path / "a.csv")
    with pytest.raises(ValidationError, match="has no 'no', where its id should be"): account(open_source(tmp_path / "a.csv", "front", "no"))


def test_a_column_that_nothing_has_is_one_sentence(tmp_path):
    write(tmp_path, {"photos/a.jpg": image(), "a.txt": b"photos/a.jpg\n", "a.csv": b"front,path\n,photos/a.jpg\n",
                     "a.jsonl": b'{"front": null, "path": "photos/a.jpg"}', "long.csv": b"path,id\nphotos/a.jpg,1,more\n"})
    make_tar(tmp_path / "a.tar", [("a.jpg", image())])
    for name in ("photos", "a.txt", "a.tar", "photos/a.jpg"):
        with pytest.raises(ValidationError, match=rf"^id_column='sku' names a column .* '.*{name}' holds none: leave"): open_source(tmp_path / name, None, "sku")
        with pytest.raises(ValidationError, match="^column='sku' names .* holds none"): read_image_set(tmp_path / name, column="sku")
        with pytest.raises(ValidationError, match="^id_column='sku' names .* holds none"): read_image_set(tmp_path / name, id_column="sku")
    for column in ("front", "back"):
        with pytest.raises(ValidationError, match=f"no path under '{column}'"): account(ListedImages(tmp_path / "a.jsonl", column))
    assert account(ListedImages(tmp_path / "long.csv"))[0] == ["1"]  # a comma too many


DAMAGED = {"a.json": [b"", b"[", b"null", b"7", b'"a"', b"{}", b'{"images": 7}', b"[" * 100_000, b'[{"label": "x"}]', b"[7]", b"[null]", b"\xff\xfe[", b"[" + b"9" * 5000 + b"]"],
           "b.jsonl": [b"[", b'{"path": 7}', b"7", b"{" * 100_000, b'{"label": "x"}', b'"' + b"a" * 2_000_000 + b'"', b"\xe9"],
           "c.csv": [b"a.jpg\nb.jpg\n", b"sku,front\n1,a.jpg\n", b"path\nh\xe9.jpg\n", b'path\n"' + b"a\n" * 200_000, b"path," + b"x" * 2_000_000, b"id,path\n1\n"],
           "d.txt": [b"\xe9.jpg", b"a" * 2_000_000, b"a" * 40_000, b"\0\xff"]}


@pytest.mark.parametrize("name, data", [(name, data) for name, some in DAMAGED.items() for data in some], ids=lambda v: str(v)[:24])
def test_a_damaged_list_is_one_error_with_its_place(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValidationError, match="cannot be read as a list of images beyond entry|no path in it|characters|'images'") as e: account(tmp_path / name)
    assert name in e.value.message and len(e.value.message) < 3000


def test_a_list_that_is_no_file_never_waits(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    code = f"from devsky_nb.images.sources import *; from devsky_nb.images.lists import ListedImages; list(ListedImages({str(tmp_path / 'a.csv')!r}).parts())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert "it is no regular file" in done.stderr


# Parquet

@pytest.mark.parametrize("column", [pa.array(["a.jpg", None, "a.jpg"]).dictionary_encode(), pa.array(["a.jpg", None, "a.jpg"], pa.large_string()),
                                    pa.array(["a.jpg", None, "a.jpg"], pa.string_view()), pa.array(["a.jpg", None, "a.jpg"], pa.large_string()).dictionary_encode()], ids=lambda c: str(c.type)[:30])
def test_text_is_text_however_it_is_stored(tmp_path, column):
    pq.write_table(pa.table({"path": column}), tmp_path / "t.parquet")
    items = [item for s in slices(open_source(tmp_path / "t.parquet")) for item in s.items()]
    assert [item.file for item in items] == [f"{tmp_path}/a.jpg", None, f"{tmp_path}/a.jpg"]


@pytest.mark.parametrize("column", [pa.array([b"x"]), pa.array([b"x"], pa.large_binary()), pa.array([b"x"], pa.binary(1)), pa.array([b"x"], pa.binary_view()), pa.array([b"x"]).dictionary_encode(),
                                    pa.array([{"bytes": b"x", "path": None}]), pa.array([{"bytes": b"x", "path": "p", "more": [1]}]), pa.array([{"bytes": b"x"}])], ids=lambda c: str(c.type)[:30])
def test_bytes_are_bytes_however_they_are_stored(tmp_path, column):
    pq.write_table(pa.table({"image": column, "rest": [[1, 2]]}), tmp_path / "t.parquet")
    assert [item.data for s in slices(open_source(tmp_path / "t.parquet")) for item in s.items()] == [b"x"]


@pytest.mark.parametrize("column", [pa.array([[b"x"]]), pa.array([[{"bytes": b"x", "path": "p"}]]), pa.array([[("a", b"x")]], pa.map_(pa.string(), pa.binary()))], ids=["list", "hf", "map"])
def test_several_images_in_a_row_are_refused_by_name(tmp_path, column):
    pq.write_table(pa.table({"photos": column, "sku": [[1]]}), tmp_path / "t.parquet")
    with pytest.raises(ValidationError, match="such as 'photos', is to be unnested first"): account(tmp_path / "t.parquet")
    with pytest.raises(ValidationError, match="the column 'sku' holds several values in a row"):
        pq.write_table(pa.table({"image": [b"x"], "sku": [[1]]}), tmp_path / "t.parquet")
        account(ParquetImages(tmp_path / "t.parquet", id_column="sku"))


def test_an_address_that_nobody_can_follow_is_a_row_of_its_table(tmp_path):
    pq.write_table(pa.table({"path": ["carrier-pigeon://a.jpg", "a.jpg"]}), tmp_path / "t.parquet")
    first, second = [item for s in slices(open_source(tmp_path / "t.parquet")) for item in s.items()]
    assert first.problem[0] == "remote" and second.problem is None and isinstance(second, Item)


def test_a_list_of_paths_needs_no_more_than_paths():
    assert account(ImageList(p for p in ("a.jpg", Path("b.jpg"))))[0] == ["a.jpg", "b.jpg"]
    with pytest.raises(ValidationError, match="input 1: a text of 200,000 characters"): account(["a.jpg", "b" * 200_000])
    with pytest.raises(ValidationError, match="stands for 10,000,000 files"): open_source("{0..9999999}.tar")
    with pytest.raises(ValidationError, match="more than 1,000,000"): open_source("{a,b}" * 40)
