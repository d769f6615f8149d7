"ZIP files with everything that a packer, a copy or a stranger can do to them."
import io, os, pickle, random, struct, subprocess, sys, zipfile, zlib
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from patience import PATIENCE

from devsky_nb.embedding.plan import SourcePlan
from devsky_nb.errors import DevSkyyError
from devsky_nb.images.items import Item, LeftOut, read_item
from devsky_nb.images.kinds import HIDDEN, UNKNOWN
from devsky_nb.images.policy import ImagePolicy
from devsky_nb.images.sources import open_source
from devsky_nb.images.side_cars import APART
from devsky_nb.images.zips import EMPTY_ZIP, NESTED_ZIP, zip_items

POLICY = ImagePolicy(max_bytes=1_000_000)


def image(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members: archive.writestr(name, data)
    return path


def account(path):
    parts = list(zip_items(str(path), Path(path).name))
    return [p for p in parts if isinstance(p, Item)], [p for p in parts if isinstance(p, LeftOut)]


def outcome(item, policy=POLICY):
    try: return read_item(item, policy)
    except DevSkyyError as e: return e.details["reason"]


def patched(data, signature, offset, value, size=2):
    "A ZIP with one number changed in its first entry of a kind."
    data = bytearray(data)
    at = data.index(signature) + offset
    data[at:at + size] = value.to_bytes(size, "little")
    return bytes(data)


def test_strange_members_are_ids_and_no_more(tmp_path):
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    pack(tmp_path / "s.zip", [("/etc/abs.jpg", b"abs"), ("../../up.jpg", b"up"), ("folder/", b""), (link, b"/etc/passwd"), ("a\\b.jpg", b"windows"), ("größe.png", b"utf"), ("__MACOSX/._a.jpg", b"x"),
                              (".git/a.jpg", b"x"), ("more.zip", b"x"), ("more.tar", b""), ("t.parquet", b""), ("notes.txt", b""), ("noname", image()), ("README", b"text"), ("a.jpg?w=1", image(7)), ("n" * 60000 + ".jpg", b"long")])
    before = sorted(os.listdir(tmp_path))
    items, left = account(tmp_path / "s.zip")
    assert [(i.id.removeprefix("s.zip/"), outcome(i)) for i in items] == [
        ("/etc/abs.jpg", b"abs"), ("../../up.jpg", b"up"), ("link.jpg", "not-a-file"), ("a/b.jpg", b"windows"), ("größe.png", b"utf"), ("noname", image()), ("a.jpg?w=1", image(7)), ("n" * 60000 + ".jpg", b"long")]
    assert [(one.path.removeprefix("s.zip/"), one.reason) for one in left] == [
        ("__MACOSX/._a.jpg", HIDDEN), (".git/a.jpg", HIDDEN), ("more.zip", NESTED_ZIP), ("more.tar", NESTED_ZIP), ("t.parquet", NESTED_ZIP), ("notes.txt", APART), ("README", UNKNOWN)]
    assert items == pickle.loads(pickle.dumps(items)) and sorted(os.listdir(tmp_path)) == before


def test_members_of_one_name_have_a_row_each(tmp_path):
    with pytest.warns(UserWarning): pack(tmp_path / "s.zip", [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.jpg", b"3")])
    with closing(SourcePlan(tmp_path / "plan", 2)) as plan:
        plan.fill(open_source(tmp_path / "s.zip"))
        items = [item for n in range(plan.count) for item in plan.slice(n).items()]
    assert len({i.id for i in items}) == 3 and [outcome(i) for i in items] == [b"1", b"2", b"3"]


def test_names_of_old_programs(tmp_path):
    data = pack(tmp_path / "a.zip", [("XXXX.jpg", b"x")]).read_bytes()
    for raw, name in ((b"gr\x94\xe1", "größ"), ("größ"[:3].encode(), "grö"), (b"a\0bc", "a")):
        (tmp_path / "b.zip").write_bytes(data.replace(b"XXXX", raw))
        items, left = account(tmp_path / "b.zip")
        assert [i.id for i in items] == ([f"b.zip/{name}.jpg"] if name != "a" else []) and len(items) + len(left) == 1


def test_passwords_and_other_methods_are_named(tmp_path):
    data = pack(tmp_path / "a.zip", [("a.jpg", b"image" * 100)]).read_bytes()
    (tmp_path / "locked.zip").write_bytes(patched(patched(data, b"PK\1\2", 8, 1), b"PK\3\4", 6, 1))
    (tmp_path / "odd.zip").write_bytes(patched(data, b"PK\1\2", 10, 97))
    for name, reason in (("locked.zip", "encrypted"), ("odd.zip", "broken-zip")):
        [item], _ = account(tmp_path / name)
        assert outcome(item) == reason


def test_bombs_are_refused_in_little_memory_and_time(tmp_path):
    pack(tmp_path / "a.zip", [("a.jpg", bytes(50_000_000))])
    [item], _ = account(tmp_path / "a.zip")
    assert outcome(item) == "too-many-bytes"
    lying = patched(patched((tmp_path / "a.zip").read_bytes(), b"PK\1\2", 24, 1000, 4), b"PK\3\4", 22, 1000, 4)
    (tmp_path / "a.zip").write_bytes(lying)
    [item], _ = account(tmp_path / "a.zip")
    assert outcome(item) == "broken-zip"
    data = pack(tmp_path / "b.zip", [("a.jpg", bytes(900_000))]).read_bytes()
    entry = data[data.index(b"PK\1\2"):data.index(b"PK\5\6")]
    many = 20_000
    start = data.index(b"PK\1\2")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, many, many, len(entry) * many, start, 0)
    (tmp_path / "b.zip").write_bytes(data[:start] + entry * many + end)
    items, _ = account(tmp_path / "b.zip")
    assert len(items) == many and sum(i.problem is None for i in items) < many * len(entry) // len(data[:start]) + 10


def test_a_zip_cut_or_damaged_anywhere_is_rows_and_reasons(tmp_path):
    whole = pack(tmp_path / "whole.zip", [(f"{n}.jpg", bytes([n]) * 300 + os.urandom(200)) for n in range(4)]).read_bytes()
    good = [outcome(i) for i in account(tmp_path / "whole.zip")[0]]
    for cut in range(0, len(whole), 61):
        (tmp_path / "cut.zip").write_bytes(whole[:cut])
        items, left = account(tmp_path / "cut.zip")
        assert [outcome(i) for i in items] == ["broken-zip"] and not left, cut
    rng = random.Random(0)
    for _ in range(200):
        bad = bytearray(whole)
        for _ in range(rng.choice((1, 3))): bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / "bad.zip").write_bytes(bad)
        items, left = account(tmp_path / "bad.zip")
        found = [outcome(i) for i in items]
        assert found or left
        assert all(one in good or isinstance(one, str) for one in found)  # never bytes that were not packed
    for data in (b"", b"PK\5\6", b"PK\5\6" * 30000, b"\0" * 100_000, b"PK\3\4" + bytes(50)):
        (tmp_path / "odd.zip").write_bytes(data)
        assert [outcome(i) for i in account(tmp_path / "odd.zip")[0]] == ["broken-zip"]


def test_comments_prefixes_empty_and_several_parts(tmp_path):
    data = pack(tmp_path / "a.zip", [("a.jpg", b"image")]).read_bytes()
    comment = b"PK\5\6" + b"\0" * 18 + b"text"
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 50 + data[:-2] + len(comment).to_bytes(2, "little") + comment)
    assert [outcome(i) for i in account(tmp_path / "b.zip")[0]] == [b"image"]
    pack(tmp_path / "c.zip", [])
    assert account(tmp_path / "c.zip") == ([], [LeftOut("c.zip", EMPTY_ZIP)])
    (tmp_path / "d.zip").write_bytes(patched(data, b"PK\5\6", 4, 1))
    assert [outcome(i) for i in account(tmp_path / "d.zip")[0]] == ["broken-zip"]
    os.mkfifo(tmp_path / "e.zip")
    assert [outcome(i) for i in account(tmp_path / "e.zip")[0]] == ["broken-zip"]


def test_numbers_that_stand_elsewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        with archive.open("big.jpg", "w", force_zip64=True) as f: f.write(b"zip64")
    assert [outcome(i) for i in account(tmp_path / "a.zip")[0]] == [b"zip64"]


@pytest.mark.slow
def test_a_million_members_are_listed_in_little_memory(tmp_path):
    entries, start = 1_000_000, 0
    with open(tmp_path / "a.zip", "wb") as f:
        body = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, 11, 0)
        for n in range(entries): f.write(body + b"%07d.jpg" % n + b"x")
        start = f.tell()
        for n in range(entries): f.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, 11, 0, 0, 0, 0, 0, n * 42) + b"%07d.jpg" % n)
        end = f.tell()
        f.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, end - start, start) + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        f.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    code = (f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom resident import peak\nfrom devsky_nb.images.zips import zip_items\n"
            f"before = peak()\nn = sum(part.problem is None for part in zip_items({str(tmp_path / 'a.zip')!r}, 'a.zip'))\nprint(n, peak() - before >> 20)")
    n, grown = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE).stdout.split())
    assert n == entries and grown < 15, grown
