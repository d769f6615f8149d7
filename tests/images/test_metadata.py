"""What hangs on an image never costs it: oversized, damaged and hostile metadata, films behind a JPEG, lists of further images; and what is
no image that is read, named with its remedy."""
import io, os, random, struct, sys, time, zlib

import numpy as np, psutil, pytest
from PIL import Image, ImageCms, ImageFile

from devsky_nb.errors import ValidationError
from devsky_nb.images.load import load_image
from devsky_nb.images.metadata import MAX_CHUNKS, count_scans, lighten

LARGE = "metadata: larger than 1 MB, ignored"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def encode(image, format="PNG", **options):
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def photo(w=60, h=40):
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.dstack([x * 255 // (w - 1), y * 255 // (h - 1), (x + y) * 3 % 256]).astype(np.uint8))


def chunk(name, body, damage=0): return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ damage)


def segment(marker, body): return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def text(key, body): return key + b"\0\0" + zlib.compress(body)


PNG, JPEG = encode(photo()), encode(photo(), "JPEG", quality=95)
START, END = PNG[:33], PNG[33:]  # the header of the PNG; its pixels and its end
EXIF = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # orientation 6


def reason(data):
    with pytest.raises(ValidationError) as caught: load_image(data)
    return caught.value.details["reason"]


def actions(data, expected=photo(), exact=True):
    "What was done to a file whose pixels are sound."
    image, record = load_image(data)
    if exact: assert image == expected
    return list(record.actions)


# --- PNG -----------------------------------------------------------------------------------------------------------------

CHUNKS = {
    "3 MB of text": (chunk(b"zTXt", text(b"workflow", b"{}" * 1_500_000)), [LARGE]),
    "3 MB of plain text": (chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000), [LARGE]),
    "3 MB of international text": (chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3_000_000))), [LARGE]),
    "3 MB of plain international text": (chunk(b"iTXt", b"a\0\0\0\0\0" + bytes(3_000_000)), [LARGE]),
    "a profile of 2 MB": (chunk(b"iCCP", text(b"p", bytes(2_000_000))), [LARGE]),
    "EXIF of 3 MB": (chunk(b"eXIf", bytes(3_000_000)), [LARGE]),
    "an unknown chunk of 3 MB": (chunk(b"prVt", bytes(3_000_000)), [LARGE]),
    "ten texts of 200 kB": (b"".join(chunk(b"zTXt", text(b"t%d" % n, bytes(200_000))) for n in range(10)), [LARGE]),
    "a text of 900 kB": (chunk(b"zTXt", text(b"workflow", bytes(900_000))), []),
    "thousands of small texts": (b"".join(chunk(b"zTXt", text(b"t", bytes(900))) for _ in range(20_000)), [LARGE]),
    "a text called transparency": (chunk(b"tEXt", b"transparency\0x"), []),
    "a text called icc_profile": (chunk(b"tEXt", b"icc_profile\0x"), []),
    "a text called bbox": (chunk(b"tEXt", b"bbox\0x"), []), "a text called interlace": (chunk(b"tEXt", b"interlace\0x"), []),
    "a short gamma": (chunk(b"gAMA", b""), []), "a short resolution": (chunk(b"pHYs", b"x"), []),
    "short primaries": (chunk(b"cHRM", b"x"), []),
    "a short intent": (chunk(b"sRGB", b""), []), "a wrong checksum of a text": (chunk(b"tEXt", b"a\0b", 1), []),
    "an unknown packing of a text": (chunk(b"zTXt", b"a\0\7x"), []), "a name that is none": (chunk(b"te.t", b"x"), []),
    "a short transparency": (chunk(b"tRNS", b"x"), ["alpha: damaged transparency ignored"]),
    "a wrong checksum of the transparency": (chunk(b"tRNS", bytes(6), 1), ["alpha: damaged transparency ignored"]),
    "an empty profile": (chunk(b"iCCP", b""), ["icc: unusable profile ignored (damaged)"]),
    "a profile packed in an unknown way": (chunk(b"iCCP", b"p\0\7x"), ["icc: unusable profile ignored (damaged)"]),
    "a profile that does not unpack": (chunk(b"iCCP", b"p\0\0xxxxxx"), ["icc: unusable profile ignored (damaged)"]),
    "a wrong checksum of the profile": (chunk(b"iCCP", text(b"p", SWAPPED), 1), ["icc: unusable profile ignored (damaged)"]),
    "a wrong checksum of EXIF": (chunk(b"eXIf", EXIF, 1), ["exif: unreadable block ignored (damaged)"]),
    "EXIF that is none": (chunk(b"eXIf", b"garbage"), ["exif: unreadable block ignored (SyntaxError)"]),
    "an animation without frames": (chunk(b"acTL", bytes(8)), []), "a short animation": (chunk(b"acTL", b"x"), []),
    "a frame out of order": (chunk(b"fcTL", struct.pack(">5I", 7, 60, 40, 0, 0) + bytes(6)), []),
    "a frame outside": (chunk(b"fcTL", struct.pack(">5I", 0, 999, 999, 9, 9) + bytes(6)), [])}


@pytest.mark.parametrize("name", CHUNKS)
def test_no_ancillary_chunk_costs_the_pixels_of_a_png(name):
    extra, expected = CHUNKS[name]
    assert actions(START + extra + END) == expected
    assert actions(PNG[:-12] + extra + PNG[-12:]) == expected, "behind the pixels"
    assert actions(START + extra + extra + END)[:len(expected)] == expected


def test_a_large_text_costs_neither_profile_nor_orientation_nor_transparency():
    large = CHUNKS["3 MB of text"][0]
    data = START + large + chunk(b"iCCP", text(b"p", SWAPPED)) + large + chunk(b"eXIf", EXIF) + END
    image, record = load_image(data)
    assert record.actions == (LARGE, "exif: turned upright (orientation 6)", "icc: 'sRGB built-in' converted to sRGB")
    assert image == load_image(START + chunk(b"iCCP", text(b"p", SWAPPED)) + chunk(b"eXIf", EXIF) + END)[0] and image.size == (40, 60)
    corner = photo().getpixel((0, 0))
    image, record = load_image(START + large + chunk(b"tRNS", struct.pack(">3H", *corner)) + END)
    assert image.getpixel((0, 0)) == (255, 255, 255) and record.actions == (LARGE, "alpha: composited on white")


@pytest.mark.parametrize("name, body", [
    (b"tEXt", lambda hexed: b"Raw profile type exif\0" + hexed), (b"zTXt", lambda hexed: text(b"Raw profile type exif", hexed)),
    (b"iTXt", lambda _: b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')])
def test_an_orientation_that_is_written_as_a_text_is_obeyed(name, body):
    hexed = b"\nexif\n%8d\n" % (len(EXIF) + 6) + (b"Exif\0\0" + EXIF).hex().encode()
    image, record = load_image(START + chunk(name, body(hexed)) + END)
    assert (image.size, record.actions) == ((40, 60), ("exif: turned upright (orientation 6)",))


@pytest.mark.parametrize("name", [b"teSt", b"tEXt", b"IDAT", b"fdAT"])
def test_a_png_of_a_million_chunks_is_refused_at_once(name):
    started = time.process_time()
    many = chunk(name, b"") * 1_000_000
    assert reason(START + many + END) == "too-many-parts" and reason(PNG[:-12] + many + PNG[-12:]) == "too-many-parts"
    assert time.process_time() - started < 20
    assert actions(START + chunk(b"teSt", b"") * (MAX_CHUNKS - 10) + END) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("default", [False, True])
def test_animated_pngs_are_their_first_image(mode, default):
    first, second = photo().convert(mode), photo().rotate(90).convert(mode)
    data = encode(first, save_all=True, append_images=[second, first, second], default_image=default)
    image, record = load_image(data)
    assert image == load_image(encode(first))[0] and record.n_frames == Image.open(io.BytesIO(data)).n_frames >= 3
    cut = data[:data.index(b"fdAT") + 30]
    assert load_image(cut)[0] == image, "frames that are damaged or missing do not count"


def test_a_film_of_any_stated_length_is_counted_to_a_thousand():
    assert actions(START + chunk(b"acTL", b"\x7f\xff\xff\xff" + bytes(4)) + END) == ["frames: first of 1000 or more"]


def test_an_ordinary_png_is_passed_on_whole():
    assert lighten(PNG).data == PNG and lighten(JPEG).data is JPEG


# --- JPEG ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tail", [
    b"\0\0\0\x18ftypmp42" + random.Random(0).randbytes(9_000_000), b"\xff\xda" * 4_000_000, JPEG * 200, b"\xff" * 9_000_000,
    b"\xff\xd9" * 1000],
    ids=["a film", "scans", "more images", "ones", "ends"])
def test_what_follows_the_end_of_a_jpeg_is_not_the_image(tail):
    for data in (JPEG, encode(photo(), "JPEG", progressive=True), encode(photo(), "JPEG", restart_marker_blocks=1)):
        started = time.process_time()
        assert load_image(data + tail)[0] == load_image(data)[0] and load_image(data + tail)[1].actions == ()
        assert time.process_time() - started < 20


@pytest.mark.filterwarnings("ignore")
def test_marks_of_scans_in_previews_and_notes_are_none():
    for marker, start in ((0xE1, b"Exif\0\0"), (0xE2, b"MPF\0"), (0xEB, b"JP"), (0xFE, b"")):
        data = JPEG[:2] + segment(marker, start + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 4000) + JPEG[2:]
        assert load_image(data)[0] == load_image(JPEG)[0] and count_scans(data) == count_scans(JPEG) == 1


def test_repeated_scans_are_found_wherever_they_hide(monkeypatch):
    data = encode(photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for between in (b"", segment(0xFE, b"x"), segment(0xDD, b"\0\0"), b"\xff" * 9, bytes(9)):
        bomb = data[:last] + (scan + between) * 300
        for tail in (b"", b"\xff\xd9", b"\xff\xd9" + b"film" * 999): assert reason(bomb + tail) == "too-many-scans"
    assert count_scans(data + (scan * 300)) == count_scans(data)


@pytest.mark.parametrize("bomb", [segment(0xFE, b"") * 500_000, segment(0xE1, b"Exif\0\0") * 200_000, b"\xff\xd0" * 1_000_000,
                                  b"\xff\xfe\0\2" + bytes(2_000_000), b"\xff\xfe\0\2" + b"\xff" * 2_000_000,
                                  b"\xff\xfe\0\2" + b"\xff\0" * 1_000_000, segment(0xDB, (b"\0" + bytes(64)) * 900) * 100,
                                  segment(0xC4, bytes(60_000)) * 30],
                         ids=["comments", "EXIF", "restarts", "zeros", "ones", "escapes", "tables", "more tables"])
def test_a_jpeg_with_a_bomb_before_its_first_scan_is_refused_at_once(bomb):
    started = time.process_time()
    assert reason(JPEG[:2] + bomb + JPEG[2:]) == "too-many-parts"
    assert time.process_time() - started < 10


def test_large_notes_are_left_out_and_what_the_image_needs_stays():
    notes = segment(0xEB, bytes(65_000)) * 400
    many_exif = segment(0xE1, b"Exif\0\0" + EXIF) + segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 400
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + SWAPPED)
    light = JPEG[:2] + segment(0xE1, b"Exif\0\0" + EXIF) + profile + JPEG[2:]
    expected = load_image(light)
    for data in (JPEG[:2] + notes + many_exif + profile + JPEG[2:], JPEG[:2] + many_exif + notes + profile + notes + JPEG[2:]):
        started = time.process_time()
        image, record = load_image(data)
        assert image == expected[0] and record.actions == (LARGE, *expected[1].actions) and len(expected[1].actions) == 2
        assert record.n_bytes == len(data) and time.process_time() - started < 10
    inks = encode(photo().convert("CMYK"), "JPEG")
    assert load_image(inks[:2] + notes + inks[2:])[0] == load_image(inks)[0], "Adobe's mark is needed"


def test_a_profile_of_many_parts_is_whole_or_ignored_aloud():
    padded = SWAPPED + bytes(3_000_000)
    parts = [padded[i:i + 65_000] for i in range(0, len(padded), 65_000)]
    def jpeg(parts, total):
        segments = [segment(0xE2, b"ICC_PROFILE\0" + bytes([n, total]) + part) for n, part in enumerate(parts, 1)]
        return JPEG[:2] + b"".join(segments) + JPEG[2:]
    assert actions(jpeg(parts, len(parts)), exact=False) == ["icc: 'sRGB built-in' converted to sRGB"]
    assert actions(jpeg(parts[:-1], len(parts)), exact=False) == ["icc: incomplete profile ignored"]


def test_a_jpeg_that_ends_early_is_refused_still():
    for at in range(len(JPEG) - 200, len(JPEG) - 3, 7): assert reason(JPEG[:at]) == "truncated"


@pytest.mark.slow
def test_metadata_of_a_hundred_megabytes_costs_no_more_than_itself():
    for data in (JPEG[:2] + segment(0xEB, bytes(65_000)) * 1500 + JPEG[2:], START + chunk(b"prVt", bytes(100_000_000)) + END):
        before = psutil.Process().memory_info().rss
        assert actions(data, exact=False) == [LARGE]
        assert psutil.Process().memory_info().rss - before < 60 * 2**20


# --- EXIF and lists of images --------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_damaged_exif_never_costs_the_pixels(format):
    rng, block = random.Random(1), Image.Exif()
    block[274], block[270], block[0x8769] = 6, "x" * 50, {36864: b"0230", 33434: (1, 100)}
    raw, options = block.tobytes(), {"lossless": True} if format == "WEBP" else {}
    whole = np.asarray(load_image(encode(photo(), format, **options))[0])
    turned = {a.tobytes() for k in range(4) for a in (np.rot90(whole, k), np.rot90(whole.transpose(1, 0, 2), k))}
    for _ in range(80):
        bad = bytearray(raw)
        for _ in range(rng.choice((1, 2, 5))): bad[rng.randrange(6, len(bad))] = rng.choice((0, 1, 255, rng.randrange(256)))
        if rng.random() < .2: bad = bad[:rng.randrange(6, len(bad))]
        try: data = encode(photo(), format, exif=bytes(bad), **options)
        except Exception: continue  # Pillow itself would not write it
        assert np.asarray(load_image(data)[0]).tobytes() in turned


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_list_of_images_never_costs_the_first():
    rng, data = random.Random(1), encode(photo(), "MPO", save_all=True, append_images=[photo()])
    at = data.index(b"MPF\0") + 4
    whole = load_image(data)
    assert (whole[1].format, whole[1].actions) == ("MPO", ("frames: first of 2",))
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))): bad[rng.randrange(at, at + 86)] = rng.choice((0, 1, 255, rng.randrange(256)))
        assert load_image(bytes(bad))[0] == whole[0]


# --- formats that are not read, and alpha that is none -------------------------------------------------------------------

@pytest.mark.parametrize("data, name", [
    (b"\0\0\0\x18ftypheic" + bytes(12), "HEIC"), (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
    (b"\0\0\0\x14ftypmsf1" + bytes(8), "HEIC"), (b"\0\0\0\x18ftypmp42" + bytes(12), "a film"),
    (b"\0\0\0\x18ftypqt  " + bytes(12), "a film"), (b"\0\0\0\x18ftypcrx " + bytes(12), "raw file"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51" + bytes(12), "JPEG 2000"), (b"\xff\x0a" + bytes(12), "JPEG XL"),
    (b"II\xbc\1" + bytes(12), "JPEG XR"), (b"DDS |" + bytes(12), "DDS"), (b"8BPS\0\1", "Photoshop"), (b"%PDF-1.7", "PDF"),
    (b"\0\0\1\0\1\0", "an icon"), (b"<svg xmlns='x'/>", "SVG")])
def test_what_is_not_read_is_named_with_its_remedy(data, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    expected = f"looks like .*{name}.*: save it as JPEG or PNG.*; can be read: JPEG, PNG"
    with pytest.raises(ValidationError, match=expected) as caught: load_image(data)
    assert ("pillow-heif" in str(caught.value)) == (name == "HEIC") and caught.value.details["reason"] == "unknown-format"


@pytest.mark.parametrize("data, shown", [
    (b"a blue cotton dress", "begins like a text, 'a blue cotton dr': if it is an image, save it as JPEG or PNG"), (b"\xff", "begins with the bytes ff: if"),
    ("größe".encode(), "begins with the bytes 67 72 c3 b6"), (b"\x1b[31mred", "begins with the bytes 1b 5b 33 31"), (b"a\nb", "begins with the bytes 61 0a 62")])
def test_what_is_not_known_is_shown_in_words_or_in_numbers(data, shown):
    with pytest.raises(ValidationError, match=shown): load_image(data)


@pytest.mark.parametrize("format", ["TGA", "DDS", "ICO", "PNG"])
def test_an_opened_image_whose_alpha_is_empty_is_transparent_only_where_that_is_meant(format):
    Image.init()
    colours = np.asarray(photo(64, 64))
    empty = Image.fromarray(np.dstack([colours, np.zeros((64, 64), np.uint8)]))
    opened = Image.open(io.BytesIO(encode(empty, format)))
    image, record = load_image(opened)
    meant = format == "PNG"
    assert ("alpha: transparent everywhere, only the ground is left" in record.actions) == meant
    assert ("alpha: zero everywhere, ignored" in record.actions) != meant and (image.getpixel((5, 5)) == (255, 255, 255)) == meant


def test_links_and_pipes_beside_images_never_hang(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    assert {reason(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")} == {"not-a-file"}
