"Tars and tables that were made to harm: bounded time, bounded memory, one row for what cannot be read, and the rest goes on."
import io, os, random, struct, subprocess, sys, tarfile
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest
from patience import PATIENCE

from devsky_nb.images import pages
from devsky_nb.images.pages import SMALL_PAGE
from devsky_nb.images.sources import slices
from devsky_nb.images.tables import ParquetImages
from devsky_nb.images.tars import TarShards, tar_members


def items(source): return [item for s in slices(source, 1000) for item in s.items()]


def reasons(source): return [item.problem and item.problem[0] for item in items(source)]


def bounded(code, megabytes=6000):
    "Run code in a process that may not have more memory, nor go on for ever; its output, and its peak in MiB."
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)\n"
    peak = "\nprint(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", limit + code + peak], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    *output, mib = done.stdout.splitlines()
    return output, int(mib)


READ = """
from itertools import islice
from devsky_nb.images.sources import slices
from devsky_nb.images.tables import ParquetImages
from devsky_nb.images.tars import TarShards
for part in islice(slices({source}), 2):
    for item in islice(part.items(), 20): print(item.id[:60], item.problem and item.problem[0])
"""


# tars, block by block

def header(name="a.jpg", size=0, type=b"0", raw=None, **at):
    "A header of any content whose checksum is right; `raw`: the field of the size, `o257=…`: bytes from an offset on."
    info = tarfile.TarInfo(name)
    info.type = type
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = raw or b"%011o\0" % size
    for offset, data in at.items(): block[int(offset[1:]):int(offset[1:]) + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def before(data, type): return header("x", len(data), type) + data + bytes(-len(data) % 512)


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + len(str(len(body)))
    return str(length + (len(str(length)) + len(body) != length)).encode() + body


def base256(n): return b"\x80\0\0\0" + struct.pack(">Q", n)


END = bytes(1024)
GOOD = header("good.jpg", 4) + b"good" + bytes(508)
NEGATIVE, HUGE, MIN = b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" + bytes(11)
DAMAGE, MEMBER = "broken-tar", "not-a-file"
TARS = {  # content before a good member and the end mark; what becomes of it all
    "a negative size": (header(raw=NEGATIVE), [DAMAGE, None]),
    "the smallest size": (header(raw=MIN), [DAMAGE, None]),
    "a size of 96 bits": (header(raw=HUGE), [DAMAGE, None]),
    "a size of 63 bits": (header(raw=base256(2**63 - 1)), [DAMAGE, None]),
    "a size of letters": (header(raw=b"zzzzzzzzzzz\0"), [DAMAGE, None]),
    "a date of letters": (header(o136=b"xxxxxxxxxxx\0"), [DAMAGE, None]),
    "a wrong checksum": (GOOD[:5] + b"Z" + GOOD[6:], [DAMAGE, None]),
    "a negative long name": (header(type=b"L", raw=NEGATIVE), [DAMAGE, None]),
    "a negative extension": (header(type=b"x", raw=NEGATIVE), [DAMAGE, None]),
    "400 long names": (before(b"n" * 200 + b".jpg\0", b"L") * 400, [None]),
    "20,000 long names": (before(b"n.jpg\0", b"L") * 20_000, [None]),
    "400 long links": (before(b"n" * 200, b"K") * 400, [None]),
    "400 extensions": (before(record(b"path", b"p.jpg"), b"x") * 400, [None]),
    "a long name of 6 GiB": (header(type=b"L", raw=base256(6 << 30)), [DAMAGE]),
    "an extension of 6 GiB": (header(type=b"x", raw=base256(6 << 30)), [DAMAGE]),
    "a global extension of 1 TiB": (header(type=b"g", raw=base256(1 << 40)), [None]),
    "a long name of 1 MB": (before(b"n" * 1_000_000, b"L"), [DAMAGE]),
    "an extension of 1 MiB and more": (before(b"x" * (2**20 + 1), b"x"), [DAMAGE]),
    "a name of 900,000 characters": (before(record(b"path", b"n" * 900_000 + b".jpg"), b"x"), [DAMAGE]),
    "digits without end": (before(b"1" * 1_000_000, b"x"), [DAMAGE]),
    "spaces without end": (before(b" " * 1_000_000, b"x"), [DAMAGE]),
    "a record of length 0": (before(b"0 a=b\n", b"x"), [DAMAGE]),
    "a record of length 3": (before(b"3 a=b\n", b"x"), [DAMAGE]),
    "a record beyond the end": (before(b"99999999999999999999 a=b\n", b"x"), [DAMAGE]),
    "a record without =": (before(b"9 abcdef\n", b"x"), [DAMAGE]),
    "200,000 records": (before(b"5 a=\n" * 200_000, b"x"), [None]),
    "a size of 900,000 digits": (before(record(b"size", b"9" * 900_000), b"x"), [DAMAGE]),
    "a size below zero in text": (before(record(b"size", b"-5"), b"x"), [DAMAGE]),
    "a size in other digits": (before(record(b"size", "٣".encode()), b"x"), [DAMAGE]),
    "a size beyond the end": (before(record(b"size", b"9" * 18), b"x"), [None, DAMAGE]),
    "a global name": (before(record(b"path", b"evil.jpg"), b"g"), [None]),
    "holes": (header("s.jpg", 512, b"S") + bytes(512), [MEMBER, None]),
    "holes in the new format": (before(record(b"GNU.sparse.name", b"s.jpg") + record(b"GNU.sparse.realsize", b"9" * 18), b"x") + GOOD, [MEMBER, None]),
    "a map of holes without end": (header("s.jpg", 512, b"S", o482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 1000, [MEMBER]),
    "a link to itself": (header("l.jpg", 0, b"2", o157=b"l.jpg"), [MEMBER, None]),
    "a hard link": (header("l.jpg", 0, b"1", o157=b"/etc/passwd"), [MEMBER, None]),
    "a link with a size": (header("l.jpg", 1024, b"2"), [MEMBER, None]),
    "devices and a pipe": (header("a.jpg", 0, b"3") + header("b.jpg", 0, b"4") + header("c.jpg", 0, b"6"), [MEMBER] * 3 + [None]),
    "unknown types": (header("u.jpg", 4, b"Z") + bytes(512) + header("v.jpg", 4, b"M") + bytes(512), [MEMBER, MEMBER, None]),
    "no name": (header(""), [None]),
    "names that lead away": (header("/etc/a.jpg") + header("../../b.jpg") + header("a\n\x1b[31m.jpg"), [None] * 4),
    "noise": (random.Random(0).randbytes(5120), [DAMAGE, None]),
    "noise after an end": (GOOD + END + random.Random(1).randbytes(5120), [None, DAMAGE, None]),
    "noise twice": (GOOD + random.Random(2).randbytes(1024) + GOOD + random.Random(3).randbytes(1024), [None, DAMAGE, None, DAMAGE, None]),
    "a folder with a size": (header("d.jpg/", 1024, b"5"), [None]),
    "the oldest format": (header("old.jpg", 4, b"\0", o257=bytes(8)) + b"old!" + bytes(508), [None, None]),
}


@pytest.mark.parametrize("name", TARS)
def test_hostile_tars(tmp_path, name):
    content, expected = TARS[name]
    (tmp_path / "s.tar").write_bytes(content + GOOD + END)
    found = items(TarShards(tmp_path / "s.tar"))
    assert [item.problem and item.problem[0] for item in found] == expected
    assert all(len(item.id) < 70_000 and (item.problem is None or len(item.problem[1]) < 600) for item in found)
    assert sorted(os.listdir(tmp_path)) == ["s.tar"]


HOLES = {"x": header(type=b"x", raw=base256(6 << 30)), "L": header(type=b"L", raw=base256(1 << 39)), "zeros": GOOD,
         "member": header("a.jpg", raw=base256(1 << 39)), "sparse": header("s.jpg", 512, b"S", o482=b"\1") + bytes(504) + b"\1" + bytes(7), "nothing": b""}


def test_a_tar_of_a_terabyte_of_holes_takes_neither_memory_nor_time(tmp_path):
    for name, first in HOLES.items():
        with open(tmp_path / f"{name}.tar", "wb") as f:
            f.write(first)
            f.truncate(1 << 40)
    output, mib = bounded(READ.format(source=f"TarShards({str(tmp_path)!r})"))
    assert mib < 400
    for name in HOLES:
        told = [line for line in output if line.startswith(f"{name}.tar")]
        assert told[-1] == f"{name}.tar broken-tar" and len(told) <= 2


def test_a_tar_that_is_no_file_never_waits(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    assert bounded(READ.format(source=f"TarShards({str(tmp_path / 'a.tar')!r})"))[0] == ["a.tar broken-tar"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    names = ["a.jpg", "d/" * 60 + "b.jpg", "c" * 90 + ".jpg", "ü.jpg", "e e/" + "f" * 80 + ".png"] + ["n" * 300 + ".jpg"] * (format != tarfile.USTAR_FORMAT)
    with tarfile.open(tmp_path / "s.tar", "w", format=format, encoding="utf-8") as tar:
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 300 * n
            tar.addfile(info, io.BytesIO(bytes([n]) * info.size))
    with tarfile.open(tmp_path / "s.tar", encoding="utf-8") as tar: expected = [(m.name, m.offset_data, m.size) for m in tar]
    with open(tmp_path / "s.tar", "rb") as f: assert [(m.name, m.offset, m.size) for m in tar_members(f)] == expected


def change(data, rng, top):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(top)
        data[place] = rng.choice((rng.randrange(256), 0, 255, data[place] ^ (1 << rng.randrange(8))))
    return bytes(data)


def with_checksums(data):
    data = bytearray(data)
    for start in range(0, len(data), 512):
        if data[start + 257:start + 262] == b"ustar":
            data[start + 148:start + 156] = b" " * 8
            data[start + 148:start + 156] = b"%06o\0 " % sum(data[start:start + 512])
    return bytes(data)


def test_tars_with_changed_bytes_are_read_to_their_end(tmp_path):
    rng = random.Random(0)
    whole = before(record(b"path", "ü".encode() * 60 + b".jpg"), b"x") + GOOD + before(b"n" * 200 + b".jpg\0", b"L") + GOOD + GOOD + END
    for _ in range(400):
        (tmp_path / "s.tar").write_bytes(with_checksums(change(whole, rng, len(whole) - 1024)))
        items(TarShards(tmp_path / "s.tar"))


# tables

def big(n): return pa.array([bytes(n)], pa.large_binary())


BOMBS = {  # rows that a file of a few kB unfolds to, how it is written, and what is read of it
    "a page of zeros": (lambda: big(SMALL_PAGE + 1), dict(compression="zstd", use_dictionary=False), ["broken-parquet"]),
    "in brotli": (lambda: big(SMALL_PAGE + 1), dict(compression="brotli", use_dictionary=False), ["broken-parquet"]),
    "in a dictionary": (lambda: big(SMALL_PAGE + 1), dict(compression="zstd", dictionary_pagesize_limit=2**30), ["broken-parquet"]),
    "one value a million times": (lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array([bytes(2**19)])),
                                  dict(compression="zstd", dictionary_pagesize_limit=2**30), ["None"] * 40),
    "each as long as the last": (lambda: pa.array([b"a" * 3_000_000] * 20), dict(compression="zstd", use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"}),
                                 ["None"] * 20),
    "nothing 20 million times": (lambda: pa.nulls(20_000_000, pa.binary()), dict(compression="zstd", row_group_size=20_000_000), ["broken-parquet"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_table_does_not_unfold_to_gigabytes(tmp_path, name):
    column, options, expected = BOMBS[name]
    pq.write_table(pa.table({"image": column()}), tmp_path / "t.parquet", **options)
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    output, mib = bounded(READ.format(source=f"ParquetImages({str(tmp_path / 't.parquet')!r})"))
    assert [line.split()[1] for line in output] == expected and mib < 600


def test_a_page_that_unfolds_out_of_all_proportion_is_refused_before_it_is_unfolded(tmp_path, monkeypatch):
    size = 2**20 + 1
    monkeypatch.setattr(pages, "SMALL_PAGE", size - 1)
    pq.write_table(pa.table({"image": big(size), "sku": ["A1"]}), tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    [row] = items(ParquetImages(tmp_path / "t.parquet", id_column="sku"))
    assert row.problem[0] == "broken-parquet" and "in the column 'image'" in row.problem[1] and "unfold to 1.0 MiB" in row.problem[1]
    pq.write_table(pa.table({"path": ["a.jpg"], "other": big(size)}), tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert reasons(ParquetImages(tmp_path / "t.parquet", "path")) == [None]
    pq.write_table(pa.table({"image": pa.array([{"bytes": b"x", "path": "p", "more": bytes(size)}])}), tmp_path / "t.parquet", compression="zstd")
    assert reasons(ParquetImages(tmp_path / "t.parquet")) == [None]


def test_images_that_take_much_room_are_read(tmp_path):
    noise = os.urandom(1_000_000)
    images = [noise[n:] + noise[:n] for n in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", use_dictionary=False)
    assert [item.data for item in items(ParquetImages(tmp_path / "t.parquet"))] == images
    pq.write_table(pa.table({"image": [b"BM" + bytes(30_000_000)]}), tmp_path / "t.parquet", compression="zstd")
    assert reasons(ParquetImages(tmp_path / "t.parquet")) == [None]


def bad_text(): return pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok.jpg", b"\xff\xfe.jpg", b"z.jpg"]).buffers())


def days(unit, numbers): return pa.array(numbers, pa.int32() if unit == pa.date32() else pa.int64()).cast(unit)


@pytest.mark.parametrize("column", [bad_text(), days(pa.date32(), [0, 2**31 - 1, 1]), days(pa.date64(), [0, 2**62 // 86400000 * 86400000, 86400000]), days(pa.timestamp("us"), [0, 2**62, 1]),
                                    days(pa.duration("s"), [0, 2**62, 1]), pa.array(["a", "b" * 40_000, "c"])], ids=["text", "date32", "date64", "timestamp", "duration", "long"])
def test_an_id_that_cannot_be_read_is_its_rows_fault_alone(tmp_path, column):
    pq.write_table(pa.table({"id": column, "image": [b"1", b"2", b"3"]}), tmp_path / "t.parquet")
    found = items(ParquetImages(tmp_path / "t.parquet", id_column="id"))
    assert [item.problem and item.problem[0] for item in found] == [None, "bad-id", None] and found[1].id == "t.parquet/1"


def test_a_path_that_cannot_be_one_is_its_rows_fault_alone(tmp_path):
    pq.write_table(pa.table({"path": bad_text()}), tmp_path / "t.parquet")
    assert reasons(ParquetImages(tmp_path / "t.parquet")) == [None, "broken-parquet", None]
    pq.write_table(pa.table({"path": ["a.jpg", "b" * 2_000_000, "c.jpg"]}), tmp_path / "t.parquet")
    found = items(ParquetImages(tmp_path / "t.parquet"))
    assert [item.problem and item.problem[0] for item in found] == [None, "bad-path", None] and len(found[1].problem[1]) < 200
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "p" * 2_000_000}]}), tmp_path / "t.parquet")
    assert [(item.data, item.path) for item in items(ParquetImages(tmp_path / "t.parquet"))] == [(b"x", f"{tmp_path}/t.parquet/0")]


def footer(length, end=b"PAR1"): return struct.pack("<I", length) + end


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + footer(0), b"PAR1" + footer(2**32 - 1), b"PAR1" + bytes(1000) + footer(900), b"{}" * 100, b"PAR1" + bytes(100) + footer(90, b"PARE"),
                                  b"PAR1" + b"\x19" * 1000 + footer(1000), b"PAR1" + b"\x1c" * 100_000 + footer(100_000), b"PAR1" + b"\x15\x02\x19\xfc\xff\xff\xff\xff\x0f" + bytes(99) + footer(100)],
                         ids=range(11))
def test_footers_that_are_none(tmp_path, data):
    (tmp_path / "t.parquet").write_bytes(data)
    [row] = items(ParquetImages(tmp_path / "t.parquet"))
    assert row.problem[0] == "broken-parquet" and len(row.problem[1]) < 700


def test_footers_that_are_large_and_files_that_are_none(tmp_path):
    pq.write_table(pa.table({"image": [b"x"]}).replace_schema_metadata({"pandas": "x" * 30_000_000}), tmp_path / "a.parquet")
    pq.write_table(pa.table({f"c{n}": [1] for n in range(2000)} | {"image": [b"x"]}), tmp_path / "b.parquet")
    with open(tmp_path / "c.parquet", "wb") as f:
        f.seek((1 << 40) - 8)
        f.write(footer(2**31 - 1))
    os.mkfifo(tmp_path / "d.parquet")
    output, mib = bounded(READ.format(source=f"ParquetImages({str(tmp_path)!r})"))
    assert output == ["a.parquet broken-parquet", "b.parquet/0 None", "c.parquet broken-parquet", "d.parquet broken-parquet"] and mib < 500


FUZZ = """
import random, sys
sys.path[:0] = {folders!r}
from test_sources_hostile import change
from devsky_nb.errors import DevSkyyError
from devsky_nb.images.sources import slices
from devsky_nb.images.tables import ParquetImages
rng = random.Random({seed})
whole = [open(path, "rb").read() for path in {bases!r}]
for _ in range({rounds}):
    data = rng.choice(whole)
    with open({path!r}, "wb") as f: f.write(change(data, rng, len(data)))
    try:
        for part in slices(ParquetImages({path!r})):
            for n, item in zip(range(1000), part.items()): pass
    except DevSkyyError: pass
"""


@pytest.mark.parametrize("rounds", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_tables_with_changed_bytes_end_no_process(tmp_path, rounds):
    bases = []
    for n, options in enumerate((dict(compression="zstd"), dict(compression="none", data_page_version="2.0"), dict(compression="snappy", row_group_size=2))):
        bases.append(str(tmp_path / f"base-{n}"))
        pq.write_table(pa.table({"sku": ["a", "b", "c"], "image": [{"bytes": b"%d" % i * 20, "path": "p"} for i in range(3)]}), bases[-1], **options)
    bounded(FUZZ.format(folders=[str(folder) for folder in Path(__file__).parents[:2]], seed=rounds, bases=bases, rounds=rounds, path=str(tmp_path / "t.parquet")))
