"Sources with everything wrong that a disk, a copy or a stranger can do to them."
import os, pickle, random, subprocess, sys, tarfile
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st

from archives import make_tar
from devsky_nb.errors import DevSkyyError, FileNotFoundError as NoSuchFile, ValidationError
from devsky_nb.images.policy import ImagePolicy
from devsky_nb.images.folders import ImageFolder, ImageList, expand_pattern
from devsky_nb.images.items import Item, read_item
from devsky_nb.images.lists import ListedImages
from devsky_nb.images.sources import AnyImages, open_source, slices
from devsky_nb.images.tables import ParquetImages
from devsky_nb.images.tars import TarShards

POLICY = ImagePolicy()


def items(source, rows=1000): return [i for s in slices(source, rows) for i in s.items()]


def outcome(item, policy=POLICY):
    try: return read_item(item, policy)
    except DevSkyyError as e: return e.details["reason"]


# folders and lists

def test_a_folder_with_loops_odd_names_and_hidden_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "me.jpg").symlink_to(tmp_path / "me.jpg")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "x.png").write_bytes(b"x")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "t.jpg").write_bytes(b"t")
    with open(os.fsencode(tmp_path) + b"/a/caf\xe9.jpg", "wb") as f: f.write(b"latin")
    os.mkfifo(tmp_path / "pipe.png")
    found = items(ImageFolder(tmp_path))
    assert [(i.id, outcome(i)) for i in found] == [("gone.png", "missing"), ("me.jpg", "unreadable"), ("pipe.png", "not-a-file"),
                                                  ("a/caf\\udce9.jpg", b"latin"), ("folder.jpg/x.png", b"x")]
    assert all(i.path.encode() for i in found)
    assert found == [i for s in pickle.loads(pickle.dumps(list(slices(ImageFolder(tmp_path), 2)))) for i in s.items()]


def test_a_folder_that_cannot_be_listed_is_a_row(tmp_path, monkeypatch):
    for name in ("a", "b", "c"): (tmp_path / name).mkdir(); (tmp_path / name / "1.jpg").write_bytes(b"1")
    scan = os.scandir
    def scandir(path="."):
        if os.path.basename(path) == "b": raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", scandir)
    assert [(i.id, outcome(i)) for i in items(ImageFolder(tmp_path))] == [("a/1.jpg", b"1"), ("b", "unreadable"), ("c/1.jpg", b"1")]


def test_files_that_vanish_or_lie_outside_of_root(tmp_path):
    (tmp_path / "in").mkdir()
    for n in ("a.jpg", "in/b.jpg"): (tmp_path / n).write_bytes(b"x")
    found = items(ImageList([tmp_path / "a.jpg", tmp_path / "in" / "b.jpg", tmp_path / "in" / "c.jpg", "\ud800.jpg", "a\0b.jpg"]))
    assert [outcome(i, ImagePolicy(root=tmp_path / "in")) for i in found] == ["outside-root", b"x", "missing", "bad-path",
                                                                              "bad-path"]


@pytest.mark.parametrize("entry", [None, 7, b"bytes.jpg", ("id",), ("a", "b", "c"), (7, "x.jpg"), {"path": "x.jpg"}])
def test_entries_of_a_wrong_type_are_refused_with_their_position(entry):
    with pytest.raises(ValidationError, match="input 1 is"): items(ImageList(["ok.jpg", entry]))


@pytest.mark.parametrize("source", [None, 7, b"folder", {"a.jpg": 1}, object()])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ValidationError, match="is no source"): open_source(source)


def test_many_files_are_listed_in_little_memory(tmp_path):
    "The objects of a listing go as the slices go."
    code = (f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom resident import peak\n"
            "from devsky_nb.images.sources import ImageList, slices\n"
            "before = peak()\nnames = (f'folder/{i:07}.jpg' for i in range(300_000))\n"
            "n = sum(len(s) for s in slices(ImageList(names), 10_000))\nprint(n, peak() - before >> 20)")
    n, grown = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert n == 300_000 and grown < 15, grown


# which source

@pytest.mark.parametrize("kind", [ImageFolder, TarShards, ParquetImages, ListedImages, AnyImages])
@pytest.mark.parametrize("name", ["no", "no.tar", "no.parquet", "no.csv", "no/", "no/below.jpg"])
def test_a_place_that_is_named_and_not_there_is_one_error_before_any_work(tmp_path, kind, name):
    path = os.path.join(tmp_path, name)
    with pytest.raises(NoSuchFile, match="no (file or )?folder"): list(kind(path if kind is not ListedImages else path + ".csv").parts())
    with pytest.raises(NoSuchFile, match="no file or folder"): open_source(path)
    with pytest.raises(NoSuchFile, match="no file or folder"): open_source(path, "image")


def test_a_shard_that_is_missing_among_others_is_an_input_that_fails(tmp_path):
    parts = list(TarShards(tmp_path / "{0..2}.tar").parts())
    assert [part.problem[0] for part in parts] == ["broken-tar"] * 3
    for pattern in (tmp_path / "*.tar", tmp_path / "no-*" / "a.jpg"):
        with pytest.raises(ValidationError, match="nothing matches"): open_source(pattern)


def test_kinds_of_folders_and_files(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "deep" / "er" / "a.parquet")
    assert open_source(tmp_path) == AnyImages(str(tmp_path))
    assert [i.data for i in items(open_source(tmp_path))] == [b"x"]
    assert open_source(tmp_path, "image", "id") == ParquetImages(str(tmp_path), "image", "id")
    (tmp_path / "one.md").touch()
    with pytest.raises(ValidationError, match="one.md' is no image, .*: no image, by its name"): open_source(tmp_path / "one.md")
    with pytest.raises(NoSuchFile, match="no file or folder"): open_source(tmp_path / "no.tar")
    with pytest.raises(ValidationError, match="nothing matches"): open_source(tmp_path / "no-*.tar")
    with pytest.raises(ValidationError, match="column='image' names .* are in none: leave"): open_source(["a.jpg"], "image")
    (tmp_path / "empty").mkdir()
    assert items(open_source(tmp_path / "empty")) == []


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    for n in ("a[1].jpg", "a1.jpg", "{x,y}.jpg"): (tmp_path / n).write_bytes(b"x")
    assert expand_pattern(tmp_path / "a[1].jpg") == [str(tmp_path / "a[1].jpg")]
    assert expand_pattern(tmp_path / "{x,y}.jpg") == [str(tmp_path / "{x,y}.jpg")]
    assert [i.path for i in items(open_source(f"{tmp_path}/a*.jpg"))] == [f"{tmp_path}/a1.jpg", f"{tmp_path}/a[1].jpg"]


# tars

def test_a_tar_of_strange_members(tmp_path):
    link, hard, fifo = (tarfile.TarInfo(n) for n in ("link.jpg", "hard.png", "fifo.gif"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../outside.png"
    fifo.type, folder = tarfile.FIFOTYPE, tarfile.TarInfo("folder.jpg")
    folder.type = tarfile.DIRTYPE
    make_tar(tmp_path / "s.tar",
             [("/etc/abs.jpg", b"abs"), ("../../up.jpg", b"up"), link, hard, fifo, folder, ("a/0001.front.JPG", b"front"),
              ("a/0001.json", b"{}"), ("a/0001.txt", b"t"),
                                  ("a/._0001.jpg", b"resource fork"), ("n" * 300 + ".png", b"long"),
                                  (os.fsdecode(b"caf\xe9.webp"), b"latin"), ("no-extension", b"")])
    before = sorted(os.listdir(tmp_path))
    found = items(TarShards(tmp_path / "s.tar"))
    assert [(i.id.removeprefix("s.tar/"), outcome(i)) for i in found] == [
        ("/etc/abs.jpg", b"abs"), ("../../up.jpg", b"up"), ("link.jpg", "not-a-file"), ("hard.png", "not-a-file"),
        ("fifo.gif", "not-a-file"), ("a/0001.front.JPG", b"front"),
        ("n" * 300 + ".png", b"long"), ("caf\\udce9.webp", b"latin")]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_loses_nothing_that_could_be_named(tmp_path, format):
    whole = make_tar(tmp_path / "whole.tar", [(f"{i}.jpg", bytes([i]) * (300 + 400 * i)) for i in range(4)],
                     format=format).read_bytes()
    good = items(TarShards(tmp_path / "whole.tar"))
    ends = [i.span[0] + i.span[1] for i in good]
    for cut in sorted({*range(0, len(whole), 256), *ends, *(e + 1 for e in ends), *(i.span[0] for i in good)}):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        found = items(TarShards(tmp_path / "cut.tar"))
        named = [i for i in good if i.span[0] <= cut]
        assert [i.id.split("/")[1] for i in found if "/" in i.id] == [i.id.split("/")[1] for i in named], cut
        expected = [outcome(g) if g.span[0] + g.span[1] <= cut else "truncated" for g in named]
        assert [outcome(i) for i in found if "/" in i.id] == expected, cut
        marked = cut >= -(-ends[-1] // 512) * 512 + 512
        assert [outcome(i) for i in found if "/" not in i.id] == ([] if marked else ["broken-tar"]), cut


def test_tars_that_are_none_and_headers_that_are_damaged(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    make_tar(tmp_path / "2.tar", [("a.jpg", b"a"), ("b.jpg", b"b"), ("c.jpg", b"c")])
    data = bytearray((tmp_path / "2.tar").read_bytes())
    data[1024 + 3] ^= 255
    (tmp_path / "2.tar").write_bytes(data)
    with tarfile.open(tmp_path / "3.tar", "w:gz") as t: t.add(__file__, "x.jpg")
    (tmp_path / "4.tar").mkdir()
    assert [(i.id, i.problem and i.problem[0]) for i in items(TarShards(tmp_path))] == [
        ("0.tar", "broken-tar"), ("1.tar", "broken-tar"), ("2.tar/a.jpg", None), ("2.tar", "broken-tar"), ("2.tar/c.jpg", None), ("3.tar", "broken-tar")]
    assert [i.id for i in items(TarShards(f"{tmp_path}/{{8..9}}.tar"))] == ["8.tar", "9.tar"]


def test_a_member_too_large_is_refused_before_it_is_read(tmp_path):
    make_tar(tmp_path / "s.tar", [("a.jpg", b"a" * 5000), ("b.jpg", b"b")])
    a, b = items(TarShards(tmp_path / "s.tar"))
    assert (outcome(a, ImagePolicy(max_bytes=100)), outcome(b, ImagePolicy(max_bytes=100))) == ("too-many-bytes", b"b")
    lying = tarfile.TarInfo("huge.jpg")
    lying.size = 8 << 30
    (tmp_path / "lie.tar").write_bytes(lying.tobuf() + b"x" * 512)
    assert [outcome(i) for i in items(TarShards(tmp_path / "lie.tar"))] == ["too-many-bytes", "broken-tar"]


# Parquet

def test_images_by_value_by_struct_and_by_path(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.jpg").write_bytes(b"one")
    pq.write_table(pa.table({"image": [{"bytes": b"zero", "path": "0.jpg"}, {"bytes": None, "path": "img/1.jpg"},
                                       {"bytes": None, "path": None}, None]}), tmp_path / "hf.parquet")
    pq.write_table(pa.table({"path": ["img/1.jpg", None, "img/none.jpg"]}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"jpg": pa.array([b"a", b"b"], pa.large_binary())}), tmp_path / "large.parquet")
    result = lambda n: [outcome(i) for i in items(ParquetImages(tmp_path / n))]
    assert result("hf.parquet") == [b"zero", b"one", "missing", "missing"]
    assert result("paths.parquet") == [b"one", "missing", "missing"]
    assert result("large.parquet") == [b"a", b"b"]
    assert [i.path for i in items(ParquetImages(tmp_path / "hf.parquet"))][:2] == ["0.jpg", str(tmp_path / "img" / "1.jpg")]


def test_wrong_columns_and_wrong_files(tmp_path):
    pq.write_table(pa.table({"label": [1], "score": [0.5]}), tmp_path / "a.parquet")
    with pytest.raises(ValidationError, match=r"label \(int64\), score \(double\)"): items(ParquetImages(tmp_path))
    with pytest.raises(ValidationError, match="no column 'label' of bytes"): items(ParquetImages(tmp_path, "label"))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValidationError, match="no column 'sku' for the ids.*image"): items(ParquetImages(tmp_path, id_column="sku"))
    pq.write_table(pa.table({"image": [b"x", b"y", None], "n": [7, None, 9]}), tmp_path / "a.parquet")
    [part] = slices(ParquetImages(tmp_path, id_column="n"))
    assert [i.id for i in part.items()] == [i for piece in part.parts for i in piece.given_ids()] == ["7", "a.parquet/1", "9"]
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    (tmp_path / "c.parquet").write_bytes(b"")
    assert [(i.id, outcome(i)) for i in items(ParquetImages(tmp_path))] == [("a.parquet/0", b"x"), ("b.parquet", "broken-parquet"),
                                                                            ("c.parquet", "broken-parquet")]


def test_rows_whose_file_changed_after_the_listing_are_still_rows(tmp_path):
    table = pa.table({"image": [bytes([i]) * 5000 for i in range(60)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, compression="none", use_dictionary=False)
    parts = list(slices(ParquetImages(tmp_path / "a.parquet"), 25))
    pq.write_table(table.slice(0, 30), tmp_path / "a.parquet")
    found = [[outcome(i) for i in s.items()] for s in parts]
    assert [len(f) for f in found] == [25, 25, 10]
    assert found[1][:5] == [bytes([i]) * 5000 for i in range(25, 30)]
    assert set(found[1][5:] + found[2]) == {"broken-parquet"}
    (tmp_path / "a.parquet").unlink()
    assert {outcome(i) for s in parts for i in s.items()} == {"broken-parquet"}
    assert [i.id for i in parts[2].items()][0] == "a.parquet/50"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 7))
def test_slices_of_parquet_are_the_rows_in_order_however_they_are_cut(tmp_path_factory, sizes, rows, group):
    folder, numbers = tmp_path_factory.mktemp("p"), iter(range(1000))
    for n, size in enumerate(sizes):
        pq.write_table(pa.table({"image": pa.array([b"%d" % next(numbers) for _ in range(size)], pa.binary())}),
                       folder / f"{n}.parquet", row_group_size=group)
    cut = list(slices(ParquetImages(folder), rows))
    assert [int(i.data) for s in cut for i in s.items()] == list(range(sum(sizes)))
    assert [len(s) for s in cut[:-1]] == [rows] * (len(cut) - 1) and [s.number for s in cut] == list(range(len(cut)))
    order = [(s, n) for s in cut for n in range(len(s))]
    random.Random(0).shuffle(order)
    assert all(s.item(n) == list(s.items())[n] for s, n in order)


def test_an_item_knows_its_path():
    assert Item("x", "a/b.jpg").path == "a/b.jpg" and Item("x", problem=("a", "b")).path is None
