"The colours of one known image in every format, mode, depth and byte order that can be built: truth against what is loaded."
import io, struct, zlib

import numpy as np, pytest
from PIL import Image, features

from devsky_nb.errors import ValidationError
from devsky_nb.images.load import load_image

H, W = 24, 40
Y, X = np.mgrid[:H, :W]
GREY = (X * 255 // (W - 1)).astype(np.uint8)
RGB = np.dstack([X * 255 // (W - 1), Y * 255 // (H - 1), (X + 2 * Y) * 255 // (W + 2 * H - 3)]).astype(np.uint8)
OPAQUE, HALF, EMPTY = (np.full((H, W), a, np.uint8) for a in (255, 128, 0))
REFUSED = "refused"


def on_white(a): return np.rint(a * (128 / 255) + 255 * (127 / 255))


def scaled(top, dtype): return (GREY.astype(np.int64) * top // 255).astype(dtype)


def encode(image, format, **options):
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def packed(values, bits):
    "Rows of values of fewer than 8 bits, each row padded to whole bytes."
    rows = ["".join(format(int(v), f"0{bits}b") for v in row) for row in values]
    return [int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows]


def tiff(array, order="<", meaning=1, kind=1, bits=None, extra=(), deflate=False, planar=1, data=None, tags=()):
    "A TIFF by hand: meaning is its PhotometricInterpretation (None: left out), kind its SampleFormat."
    a = array if array.ndim == 3 else array[..., None]
    planes = [a[..., n:n + 1] for n in range(a.shape[2])] if planar == 2 else [a]
    strips = [data] if data else [np.ascontiguousarray(p).astype(p.dtype.newbyteorder(order)).tobytes() for p in planes]
    strips = [zlib.compress(s) if deflate else s for s in strips]
    h, w, n = a.shape
    entries = {256: ("L", [w]), 257: ("L", [h]), 258: ("H", [bits or a.dtype.itemsize * 8] * n), 259: ("H", [8 if deflate else 1]),
               273: ("L", [0] * len(strips)), 277: ("H", [n]), 278: ("L", [h]), 279: ("L", [len(s) for s in strips]),
               284: ("H", [planar]), 339: ("H", [kind] * n), **dict(tags)}
    if meaning is not None: entries[262] = ("H", [meaning])
    if extra: entries[338] = ("H", list(extra))
    base, body = 8 + 2 + 12 * len(entries) + 4, b""
    def place(content):
        nonlocal body
        at = base + len(body)
        body += content + bytes(len(content) % 2)
        return at
    entries[273] = ("L", [place(s) for s in strips])
    directory = b""
    for tag, (code, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{code}", *values)
        content = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(order + "L", place(content))
        directory += struct.pack(order + "HHL", tag, {"H": 3, "L": 4, "f": 11}[code], len(values)) + content
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(entries))
    return head + directory + bytes(4) + body


def chunk(name, body): return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(rows, depth, colour, *chunks, passes=None):
    data = b"".join(b"\0" + row for row in rows) if passes is None else passes
    header = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, passes is not None)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


def adam7(array):
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return b"".join(b"\0" + row.tobytes() for x, y, dx, dy in starts for row in array[y::dy, x::dx] if row.size)


def bmp(array, bits, header=40, compression=0, masks=b"", palette=b"", down=False):
    rows = [row if isinstance(row, bytes) else row.tobytes() for row in (array if down else array[::-1])]
    pixels = b"".join(row + bytes(-len(row) % 4) for row in rows)
    info = struct.pack("<IiiHHIIiiII", header, W, -H if down else H, 1, bits, compression, len(pixels), 0, 0, len(palette) // 4, 0)
    info += masks if header == 40 else (masks + bytes(100))[:header - 40]
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels


def tiffs():
    big = scaled(2**32 - 1, np.uint32)
    ink = np.dstack([255 - RGB, EMPTY])
    twelve = scaled(4095, np.int64).reshape(-1, 2)
    twelve_packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    premultiplied = np.rint(RGB * (128 / 255)).astype(np.uint8)
    ycc = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
    halved = ycc.copy()
    halved[..., 1:] = ycc[::2, ::2, 1:].repeat(2, 0).repeat(2, 1)
    unhalved = np.asarray(Image.frombytes("YCbCr", (W, H), halved.tobytes()).convert("RGB"))
    squares = ycc[..., 0].reshape(H // 2, 2, W // 2, 2).transpose(0, 2, 1, 3).reshape(H // 2, W // 2, 4)
    units = np.concatenate([squares, ycc[::2, ::2, 1:]], 2)
    for order, deflate in (("<", False), ("<", True), (">", False), (">", True)):
        def make(array, meaning=1, kind=1, **options): return tiff(array, order, meaning, kind, deflate=deflate, **options)
        where = f"{'little' if order == '<' else 'big'}-endian{' compressed' if deflate else ''}"
        cases = {
            "8 bits": (make(GREY), GREY), "8 bits, 0 is white": (make(255 - GREY, 0), GREY),
            "8 bits, meaning left out": (make(GREY, None), GREY), "RGB, meaning left out": (make(RGB, None), RGB),
            "signed 8 bits": (make(GREY >> 1, 1, 2), GREY), "negative 8 bits": (make(GREY - 128, 1, 2), REFUSED),
            "16 bits": (make(scaled(65535, np.uint16)), GREY), "16 bits, 0 is white": (make(65535 - scaled(65535, np.uint16), 0), GREY),
            "signed 16 bits": (make(scaled(32767, np.int16), 1, 2), GREY),
            "signed 16 bits, 0 is white": (make(32767 - scaled(32767, np.int16), 0, 2), GREY),
            "negative 16 bits": (make(scaled(32767, np.int16) - 99, 1, 2), REFUSED),
            "32 bits": (make(big), GREY), "32 bits, 0 is white": (make(~big, 0), GREY), "32 bits, undefined": (make(big, 1, 4), GREY),
            "signed 32 bits": (make(scaled(2**31 - 1, np.int32), 1, 2), GREY),
            "18 bits in signed 32": (make(scaled(2**18 - 1, np.int32), 1, 2), GREY),
            "20 bits in 32": (make(scaled(2**20 - 1, np.uint32)), GREY), "16 bits in 32": (make(scaled(65535, np.uint32)), GREY),
            "12 bits in 32": (make(scaled(4095, np.uint32)), GREY), "negative 32 bits": (make(scaled(9999, np.int32) - 1, 1, 2), REFUSED),
            "32 bits of a stated range": (make(scaled(1000, np.uint32), tags={341: ("L", [2000])}), GREY // 2),
            "32 bits from a stated black": (make(500 + scaled(1000, np.uint32), tags={340: ("L", [500]), 341: ("L", [1500])}), GREY),
            "12 bits in 16": (make(scaled(4095, np.uint16)), GREY),
            "12 bits in 16, 0 is white": (make(4095 - scaled(4095, np.uint16), 0), GREY),
            "10 bits in 16": (make(scaled(1023, np.uint16)), GREY), "8 bits in 16": (make(GREY.astype(np.uint16)), GREY),
            "a mask in 16": (make((GREY > 99).astype(np.uint16)), (GREY > 99) * 255),
            "float to 1": (make((GREY / 255).astype(np.float32), 1, 3), GREY),
            "float to 1, 0 is white": (make((1 - GREY / 255).astype(np.float32), 0, 3), GREY),
            "float to 255": (make(GREY.astype(np.float32), 1, 3), GREY), "float to 7": (make((GREY / 36.4).astype(np.float32), 1, 3), GREY),
            "float to 1.03": (make((GREY / 247.5).astype(np.float32), 1, 3), GREY),
            "float to 100000": (make((GREY * 392.).astype(np.float32), 1, 3), GREY),
            "float from -1": (make((GREY / 127 - 1).astype(np.float32), 1, 3), REFUSED),
            "float from a stated -1": (make((GREY / 127.5 - 1).astype(np.float32), 1, 3, tags={340: ("f", [-1]), 341: ("f", [1])}), GREY),
            "not a number": (make(np.where(X == 3, np.nan, 1).astype(np.float32), 1, 3), REFUSED),
            "RGB": (make(RGB, 2), RGB), "RGB in planes": (make(RGB, 2, planar=2), RGB),
            "RGB of 16 bits": (make(RGB.astype(np.uint16) * 257, 2), RGB),
            "RGB of 16 bits in planes": (make(RGB.astype(np.uint16) * 257, 2, planar=2), RGB),
            "RGB of 12 bits in 16": (make((RGB.astype(np.int64) * 4095 // 255).astype(np.uint16), 2), REFUSED),
            "RGB of 16 bits, all black": (make(np.zeros((H, W, 3), np.uint16), 2), RGB * 0),
            "fourth sample unsaid and empty": (make(np.dstack([RGB, EMPTY]), 2), RGB),
            "fourth sample unspecified": (make(np.dstack([RGB, EMPTY]), 2, extra=[0]), RGB),
            "transparent everywhere": (make(np.dstack([RGB, EMPTY]), 2, extra=[2]), RGB * 0 + 255),
            "half transparent": (make(np.dstack([RGB, HALF]), 2, extra=[2]), on_white(RGB)),
            "half transparent, premultiplied": (make(np.dstack([premultiplied, HALF]), 2, extra=[1]), on_white(RGB)),
            "half transparent of 16 bits": (make(np.dstack([RGB, HALF]).astype(np.uint16) * 257, 2, extra=[2]), on_white(RGB)),
            "half transparent grey": (make(np.dstack([GREY, HALF]), extra=[2]), on_white(GREY)),
            "inks": (make(ink, 5), RGB), "inks in planes": (make(ink, 5, planar=2), RGB),
            "inks of 16 bits": (make(ink.astype(np.uint16) * 257, 5), RGB),
            "YCbCr": (make(ycc, 6, tags={530: ("H", [1, 1])}), RGB),
            "YCbCr, colour at half resolution": (make(halved, 6, data=units.tobytes(), tags={530: ("H", [2, 2])}), unhalved)}
        if order == "<":
            cases["12 bits packed"] = make(GREY.astype(np.uint16), bits=12, data=twelve_packed.astype(np.uint8).tobytes()), GREY
        for bits in (1, 2, 4):
            top = 2**bits - 1
            few = np.rint(GREY / 255 * top).astype(int)
            cases[f"{bits} bits"] = make(GREY, bits=bits, data=b"".join(packed(few, bits))), few * 255 // top
            cases[f"{bits} bits, 0 is white"] = make(GREY, 0, bits=bits, data=b"".join(packed(top - few, bits))), few * 255 // top
        yield from ((f"TIFF {where}: {name}", *case) for name, case in cases.items())


def pngs():
    def rows(array): return [row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array]
    sixteen, colour = scaled(65535, np.uint16), RGB[10, 20].astype(int)
    for bits in (1, 2, 4):
        top = 2**bits - 1
        few = np.rint(GREY / 255 * top).astype(int)
        shades = few * 255 // top
        yield f"{bits} bits", png(packed(few, bits), bits, 0), shades
        for level in {0, top // 2, top}:
            yield (f"{bits} bits, {level} transparent", png(packed(few, bits), bits, 0, chunk(b"tRNS", struct.pack(">H", level))),
                   np.where(few == level, 255, shades))
        palette = chunk(b"PLTE", bytes(v for i in range(top + 1) for v in (i * 255 // top, 0, 128)))
        coloured = np.dstack([shades, shades * 0, shades * 0 + 128])
        yield f"palette of {bits} bits", png(packed(few, bits), bits, 3, palette), coloured
        yield (f"palette of {bits} bits, first transparent", png(packed(few, bits), bits, 3, palette, chunk(b"tRNS", b"\0")),
               np.where(few[..., None] == 0, 255, coloured))
    level = int(GREY[0, 20])
    yield "8 bits, one transparent", png(rows(GREY), 8, 0, chunk(b"tRNS", struct.pack(">H", level))), np.where(GREY == level, 255, GREY)
    yield ("8 bits, one transparent by its low byte", png(rows(GREY), 8, 0, chunk(b"tRNS", struct.pack(">H", 512 + level))),
           np.where(GREY == level, 255, GREY))
    yield "16 bits", png(rows(sixteen), 16, 0), GREY
    yield "16 bits interlaced", png([], 16, 0, passes=adam7(sixteen.astype(">u2"))), GREY
    yield ("16 bits, one transparent", png(rows(sixteen), 16, 0, chunk(b"tRNS", struct.pack(">H", int(sixteen[0, 20])))),
           np.where(GREY == level, 255, GREY))
    yield "12 bits in 16", png(rows(scaled(4095, np.uint16)), 16, 0), GREY
    yield "RGB", png(rows(RGB), 8, 2), RGB
    yield "RGB interlaced", png([], 8, 2, passes=adam7(RGB)), RGB
    found = np.where((RGB == colour).all(-1)[..., None], 255, RGB)
    yield "RGB, one transparent", png(rows(RGB), 8, 2, chunk(b"tRNS", struct.pack(">3H", *colour))), found
    odd = RGB.astype(np.uint16) * 256 + 9
    yield "RGB of 16 bits", png(rows(RGB.astype(np.uint16) * 257), 16, 2), RGB
    yield "RGB of 16 bits, one transparent", png(rows(odd), 16, 2, chunk(b"tRNS", struct.pack(">3H", *(colour * 256 + 9)))), found
    yield "RGB of 12 bits in 16", png(rows((RGB.astype(np.int64) * 4095 // 255).astype(np.uint16)), 16, 2), REFUSED
    for bits, factor, dtype in ((8, 1, np.uint8), (16, 257, np.uint16)):
        yield f"half transparent grey of {bits} bits", png(rows(np.dstack([GREY, HALF]).astype(dtype) * factor), bits, 4), on_white(GREY)
        yield f"half transparent of {bits} bits", png(rows(np.dstack([RGB, HALF]).astype(dtype) * factor), bits, 6), on_white(RGB)
    yield "transparent everywhere", png(rows(np.dstack([RGB, EMPTY])), 8, 6), RGB * 0 + 255


def bmps():
    bgr, few = RGB[..., ::-1], (RGB.astype(int) * 31 + 127) // 255
    with_alpha, without = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000), struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0)
    yield "24 bits", bmp(bgr, 24), RGB
    yield "24 bits from the top", bmp(bgr, 24, down=True), RGB
    for name, fourth in (("empty", EMPTY), ("full", OPAQUE)):
        four = np.dstack([bgr, fourth])
        yield f"32 bits, {name}", bmp(four, 32), RGB
        yield f"32 bits by masks, {name}", bmp(four, 32, 40, 3, without[:12]), RGB
        yield f"32 bits by empty masks, {name}", bmp(four, 32, 124, 3), RGB
        for header in (56, 108, 124):
            yield f"32 bits, alpha, header {header}, {name}", bmp(four, 32, header, 3, with_alpha), RGB
            yield f"32 bits, no alpha, header {header}, {name}", bmp(four, 32, header, 3, without), RGB
    yield "32 bits, half transparent", bmp(np.dstack([bgr, HALF]), 32, 124, 3, with_alpha), on_white(RGB)
    yield "15 bits", bmp((few[..., 0] << 10 | few[..., 1] << 5 | few[..., 2]).astype("<u2"), 16), few * 255 // 31
    sixteen = (few[..., 0] << 11 | few[..., 1] << 6 | few[..., 2]).astype("<u2")
    yield ("16 bits", bmp(sixteen, 16, 40, 3, struct.pack("<3I", 0xF800, 0x7E0, 0x1F)),
           np.dstack([few[..., 0] * 255 // 31, few[..., 1] * 2 * 255 // 63, few[..., 2] * 255 // 31]))
    ramp = b"".join(bytes([i, i, i, 0]) for i in range(256))
    yield "grey", bmp(GREY, 8, palette=ramp), GREY
    yield "grey, turned round", bmp(255 - GREY, 8, palette=b"".join(ramp[i:i + 4] for i in range(1020, -1, -4))), GREY
    yield "1 bit, turned round", bmp(packed(GREY < 128, 1), 1, palette=b"\xff\xff\xff\0\0\0\0\0"), (GREY >= 128) * 255


CASES = [*tiffs(), *((f"PNG: {n}", *c) for n, *c in pngs()), *((f"BMP: {n}", *c) for n, *c in bmps())]


def check(data, truth, tolerance):
    if truth is REFUSED:
        with pytest.raises(ValidationError) as caught: load_image(data)
        return caught.value.details["reason"] == "pixel-range"
    found = np.asarray(load_image(data)[0]).astype(int)
    expected = truth if truth.ndim == 3 else np.repeat(truth[..., None], 3, 2)
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ["TIFF little-endian:", "TIFF little-endian compressed", "TIFF big-endian:", "TIFF big-endian compressed",
                                  "PNG", "BMP"])
def test_every_kind_of_file_shows_what_was_written(kind):
    chosen = [case for case in CASES if case[0].startswith(kind)]
    wrong = [name for name, data, truth in chosen if not check(data, truth, 3)]
    assert len(chosen) >= 20 and not wrong


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_every_mode_that_pillow_writes_into_a_tiff(compression):
    if compression != "raw" and not features.check("libtiff"): pytest.skip("this Pillow has no libtiff")
    base, wrong = Image.fromarray(RGB), []
    deep = {"I": (scaled(65535, np.int32), GREY), "F": ((GREY / 255).astype(np.float32), GREY), "I;16": (scaled(65535, np.uint16), GREY)}
    shown = {m: (base.convert(m), np.asarray(base.convert(m).convert("RGB")))
             for m in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")}
    for mode, (image, truth) in (shown | {m: (Image.fromarray(a), truth) for m, (a, truth) in deep.items()}).items():
        try: data = encode(image, "TIFF", compression=compression)
        except OSError: continue  # libtiff was built without it
        if not check(data, truth, 4): wrong.append(mode)
    assert not wrong


def inks(rgb, stored_ycc=False):
    "A JPEG of four channels as Adobe's programs write it: inverted, and perhaps as YCCK."
    samples = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    if stored_ycc: samples[..., :3] = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    data = encode(Image.frombytes("CMYK", rgb.shape[1::-1], (255 - samples).tobytes()), "JPEG", quality=98, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([2 * stored_ycc]) + data[at + 1:]


def test_jpegs_of_four_inks_with_adobes_mark_without_and_as_ycck():
    large = np.kron(RGB, np.ones((4, 4, 1), np.uint8))
    marked = inks(large)
    at = marked.index(b"\xff\xee")
    bare = marked[:at] + marked[at + 2 + int.from_bytes(marked[at + 2:at + 4], "big"):]
    assert b"Adobe" not in bare
    assert np.array_equal(np.asarray(load_image(bare)[0]), np.asarray(Image.open(io.BytesIO(bare)).convert("RGB")))
    for data in (marked, bare, inks(large, stored_ycc=True)): assert check(data, large, 9)
    assert load_image(bare)[1].actions[0].startswith("cmyk: no mark of Adobe's")
    assert load_image(marked)[1].actions == ("cmyk: converted without a profile",)


def test_what_was_guessed_is_called_so():
    def action(array, **options): return load_image(tiff(array, **options))[1].actions[0]
    assert action(scaled(65535, np.uint16)).endswith("white is 65535")
    assert action(scaled(4095, np.uint16)).endswith("white is 4095 (guessed)")
    assert action(scaled(2**18 - 1, np.uint32)).endswith("white is 262143 (guessed)")
    assert action(scaled(32767, np.int16), kind=2).endswith("white is 32767")
    assert action(scaled(900, np.uint32), tags={340: ("L", [0]), 341: ("L", [1000])}).endswith("white is 1000")
    assert action(scaled(65535, np.uint16), meaning=0).endswith("white is 65535, stored inverted")


def test_deep_grey_keeps_its_profile():
    from PIL import ImageCms
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = linear.index(b"rTRC") + 4
    offset = int.from_bytes(linear[at:at + 4], "big")
    linear = linear[:offset] + b"curv" + bytes(8) + linear[offset + 12:]
    images = Image.fromarray(GREY), Image.fromarray(scaled(65535, np.uint16))
    eight, sixteen = (encode(image, "PNG", icc_profile=linear) for image in images)
    assert np.array_equal(np.asarray(load_image(sixteen)[0]), np.asarray(load_image(eight)[0]))
    assert load_image(sixteen)[1].actions[-1].startswith("icc: ") and not check(sixteen, GREY, 20)


def test_an_image_that_the_caller_opened_is_read_by_its_tags_too():
    for data in (tiff(65535 - scaled(65535, np.uint16), meaning=0), tiff(scaled(2**32 - 1, np.uint32)), tiff(GREY >> 1, kind=2)):
        opened = Image.open(io.BytesIO(data))
        assert np.abs(np.asarray(load_image(opened)[0])[..., 0].astype(int) - GREY).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_record_of_a_turned_tiff_has_the_stored_size(orientation):
    image, record = load_image(tiff(scaled(65535, np.uint16), tags={274: ("H", [orientation])}))
    assert record.size == (W, H) and image.size == ((W, H) if orientation < 5 else (H, W))


def test_a_preview_at_the_head_of_a_raw_file_is_called_so():
    assert load_image(tiff(RGB, meaning=2, tags={254: ("L", [1])}))[1].actions == ("frames: the first is a preview",)


@pytest.mark.filterwarnings("ignore")
def test_tags_of_odd_types_are_no_traceback():
    rng, seen = np.random.default_rng(0), set()
    data = bytearray(tiff(scaled(65535, np.uint16), meaning=0, tags={340: ("H", [0]), 341: ("H", [9])}))
    for _ in range(400):
        bad = data.copy()
        entry = 10 + 12 * int(rng.integers(0, 13))
        bad[entry + int(rng.choice([2, 3, 4, 8, 9, 10]))] = int(rng.integers(0, 256))
        try: seen.add(load_image(bytes(bad))[0].mode)
        except ValidationError as e: seen.add(e.details["reason"])
    assert "RGB" in seen and seen <= {"RGB", "undecodable", "unsupported-kind", "truncated", "pixel-range", "too-many-pixels", "no-pixels", "memory"}


def gif(box, canvas=(8, 8), control=b""):
    "One frame of palette colour 1 (green) in a canvas whose colour 0 is red."
    x, y, w, h = box
    value = length = 0
    for code in [c for _ in range(w * h) for c in (4, 1)] + [5]:
        value |= code << length
        length += 3
    data = value.to_bytes(-(-length // 8), "little")
    blocks = b"".join(bytes([len(data[i:i + 255])]) + data[i:i + 255] for i in range(0, len(data), 255))
    return (b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x81, 0, 0) + b"\xff\0\0\0\xff\0\0\0\xff\xff\xff\xff" + control + b","
            + struct.pack("<HHHHB", x, y, w, h, 0) + b"\2" + blocks + b"\0;")


@pytest.mark.parametrize("control", [b"", b"!\xf9\4\0\0\0\0\0", b"!\xf9\4\1\0\0\3\0", b"!\xf9\4\1\0\0\0\0"])
def test_what_a_frame_of_a_gif_does_not_cover_is_ground(control):
    truth = np.full((8, 8, 3), 255)
    truth[2:5, 3:7] = 0, 255, 0
    assert check(gif((3, 2, 4, 3), control=control), truth, 0)
    whole = load_image(gif((0, 0, 8, 8)))
    assert whole[0].getpixel((7, 7)) == (0, 255, 0) and whole[1].actions == ("palette: expanded to RGB",)
