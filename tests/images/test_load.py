"Every image in, one image or one typed error out: pixels compared with other programs, hostile files, bounded time and memory."
import gc, hashlib, inspect, io, json, os, pickle, random, socket, struct, subprocess, sys, threading, traceback, warnings, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, psutil, pytest
from PIL import ExifTags, GifImagePlugin, Image, ImageCms, ImageFile, ImageOps, PngImagePlugin
from transformers.image_transforms import convert_to_rgb
from patience import PATIENCE

from devsky_nb.errors import DevSkyyError, FileNotFoundError, ValidationError
from devsky_nb.images import files
from devsky_nb.images.decode import FORMATS, MAX_FRAMES
from devsky_nb.images.load import load_image, pixel_hash
from devsky_nb.images.policy import ImagePolicy

WHITE, SMALL = (255, 255, 255), ImagePolicy(max_pixels=4_000_000, max_bytes=4_000_000)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def counted(monkeypatch, cls, method):
    "The calls of a method from now on, which goes on working."
    calls, real = [], getattr(cls, method)
    def counting(self, *args, **options):
        calls.append(args)
        return real(self, *args, **options)
    monkeypatch.setattr(cls, method, counting)
    return calls


def encode(image, format="PNG", **options):
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def photo(w=60, h=40, mode="RGB"):
    "Smooth and asymmetric, so that lossy formats stay close and every turn shows."
    y, x = np.mgrid[:h, :w]
    a = np.dstack([x * 255 // max(1, w - 1), y * 255 // max(1, h - 1), (x + y) * 3 % 256,
                   255 - y * 255 // max(1, h - 1)]).astype(np.uint8)
    return Image.fromarray(a).convert(mode) if mode != "RGB" else Image.fromarray(a[..., :3].copy())


def pixels(image): return np.asarray(image).astype(int)


def refusal(source, policy=SMALL):
    with pytest.raises(DevSkyyError) as caught: load_image(source, policy)
    e = caught.value
    assert type(e) in (ValidationError, FileNotFoundError) and e.details["stage"] == "load"
    json.dumps(e.to_dict()); assert pickle.loads(pickle.dumps(e)).details == e.details
    return e.details["reason"]


def outcome(source, policy=SMALL):
    "The image, or the reason of a typed error; anything else escapes and fails the test."
    try: image, record = load_image(source, policy)
    except (ValidationError, FileNotFoundError) as e: return e.details["reason"]
    assert image.mode == "RGB" and image.width * image.height <= policy.max_pixels and not image.info
    json.dumps(record.to_dict())
    return image


# --- sources -------------------------------------------------------------------------------------------------------------

def test_every_carrier_of_a_image_gives_the_same_pixels_and_record(tmp_path):
    data = encode(photo(mode="RGBA"))
    (tmp_path / "a.png").write_bytes(data)
    path = tmp_path / "a.png"
    image, record = load_image(path)
    assert (record.path, record.format, record.mode, record.size, record.n_frames) == (str(path), "PNG", "RGBA", (60, 40), 1)
    assert (record.n_bytes, record.content_hash) == (len(data), hashlib.sha256(data).hexdigest())
    given = Image.open(path).convert("RGB")
    loaded = load_image(given)[0]
    loaded.putpixel((0, 0), (1, 2, 3))
    assert given.getpixel((0, 0)) != (1, 2, 3), "the caller's image is not ours to share"
    for source in (str(path), data, bytearray(data), memoryview(data), Image.open(path), np.asarray(Image.open(path)), image,
                   np.asarray(image)):
        assert load_image(source)[0] == image
    for source in (Image.open(path), np.asarray(image)): assert load_image(source)[1].content_hash is None


def test_arrays_of_every_accepted_shape_and_memory_order():
    rgba = np.asarray(photo(mode="RGBA"))
    assert np.array_equal(pixels(load_image(rgba[::-1, ::2, :3])[0]), rgba[::-1, ::2, :3])
    assert np.array_equal(pixels(load_image(np.asfortranarray(rgba[..., :3]))[0]), rgba[..., :3])
    assert np.array_equal(pixels(load_image(rgba[..., 0])[0]), np.repeat(rgba[..., :1], 3, 2))
    assert load_image(rgba)[0] == load_image(photo(mode="RGBA"))[0]


@pytest.mark.parametrize("source, reason", [
    (None, "unsupported-type"), (42, "unsupported-type"), ([1, 2], "unsupported-type"), (io.BytesIO(b"x"), "unsupported-type"),
    (np.zeros((4, 4, 3)), "unsupported-array"), (np.zeros((4, 4, 3), np.uint16), "unsupported-array"),
    (np.zeros((3, 9, 9), np.uint8), "unsupported-array"),
    (np.zeros((1, 4, 4, 3), np.uint8), "unsupported-array"), (np.zeros(5, np.uint8), "unsupported-array"),
    (np.zeros((4, 4, 3), bool), "unsupported-array"),
    (np.zeros((4, 4), object), "unsupported-array"), (np.zeros((0, 4, 3), np.uint8), "no-pixels"),
    (Image.new("RGB", (0, 4)), "no-pixels"),
    (Image.new("1", (3000, 3000)), "too-many-pixels"), (np.zeros((3000, 3000), np.uint8), "too-many-pixels"),
    (b"", "empty"), (b"\xff", "unknown-format"), (b"just text", "unknown-format"), (b"<svg xmlns='x'/>", "unknown-format"),
    (bytes(5_000_000), "too-many-bytes"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown-format"),
    ("", "missing"), ("a\0b", "bad-path"), ("no/such/file.jpg", "missing"), ("https://example.org/a.jpg", "missing"),
    ("\ud800.jpg", "bad-path"),
    ("x" * 5000, "unreadable"), ("/dev/null", "not-a-file"), ("/dev/zero", "not-a-file"), ("/proc/self/mem", "empty"),
    (Path("."), "not-a-file")], ids=lambda v: v if isinstance(v, str) and v.isascii() and v.isprintable() else type(v).__name__)
def test_a_bad_source_is_one_typed_error(source, reason): assert refusal(source) == reason


def test_special_files_neither_block_nor_crash(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket.jpg"))
        os.symlink("loop.jpg", tmp_path / "loop.jpg")
        os.symlink("gone.jpg", tmp_path / "dangling.jpg")
        (tmp_path / "a.jpg").write_bytes(encode(photo(), "JPEG"))
        found = {}
        names = ("pipe.jpg", "socket.jpg", "loop.jpg", "dangling.jpg", "a.jpg/b.jpg", ".")
        worker = threading.Thread(target=lambda: found.update({n: refusal(tmp_path / n) for n in names}), daemon=True)
        worker.start()
        worker.join(PATIENCE)
    assert not worker.is_alive(), "a special file blocked"
    assert found == {"pipe.jpg": "not-a-file", "socket.jpg": "not-a-file", "loop.jpg": "unreadable", "dangling.jpg": "missing",
                     "a.jpg/b.jpg": "missing", ".": "not-a-file"}


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as root only: it drops its rights to see a refusal")
def test_permission_denied(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encode(photo(), "JPEG"))
    (tmp_path / "secret.jpg").chmod(0)
    os.seteuid(65534)
    try: assert refusal(tmp_path / "secret.jpg") == "permission"
    finally: os.seteuid(0)


def test_root_confines_paths_after_following_links(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root-not"
    for d in (root, outside): d.mkdir(); (d / "a.png").write_bytes(encode(photo()))
    os.symlink(outside / "a.png", root / "link.png")
    os.symlink(outside, root / "folder")
    os.symlink(root, tmp_path / "alias")
    policy = ImagePolicy(root=root)
    for inside in (root / "a.png", tmp_path / "alias" / "a.png", root / ".." / "root" / "a.png"):
        assert load_image(inside, policy)[1].format == "PNG"
    for bad in (outside / "a.png", root / "link.png", root / "folder" / "a.png", root / ".." / "root-not" / "a.png", "/etc/passwd",
                tmp_path / "nothing"):
        assert refusal(bad, policy) == "outside-root"
    assert load_image(root / "link.png")[1].format == "PNG"


@pytest.mark.parametrize("swap", ["a folder for a link", "a link for another"])
def test_root_confines_while_links_are_exchanged(tmp_path, swap):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder, colour in ((root / "inner", "red"), (outside, "blue")):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(encode(Image.new("RGB", (2, 2), colour)))
    os.symlink(outside, root / "leads-out")
    os.symlink("inner", root / "leads-in")
    if swap == "a link for another": os.symlink("inner", root / "way")
    stop = threading.Event()

    def exchange():
        while not stop.is_set():
            if swap == "a folder for a link":
                for old, new in (("inner", "kept"), ("leads-out", "inner"), ("inner", "leads-out"), ("kept", "inner")):
                    os.rename(root / old, root / new)
            else:
                for target in ("leads-out", "leads-in"):
                    os.symlink(target, root / "next")
                    os.replace(root / "next", root / "way")

    path = root / ("inner" if swap == "a folder for a link" else "way") / "a.png"
    worker = threading.Thread(target=exchange, daemon=True)
    worker.start()
    try: found = Counter(str(r) if isinstance(r := outcome(path, ImagePolicy(root=root)), str) else r.getpixel((0, 0))
                         for _ in range(1500))
    finally: stop.set(); worker.join(PATIENCE)
    assert set(found) <= {(255, 0, 0), "missing", "outside-root", "unreadable"} and found[255, 0, 0] > 10, found


def test_without_stepwise_opening_an_exchanged_link_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STEPWISE", False)
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a.png").write_bytes(encode(photo()))
    (tmp_path / "a.png").write_bytes(encode(photo()))
    policy = ImagePolicy(root=root)
    assert load_image(root / "inner" / "a.png", policy)[1].format == "PNG"
    real = os.path.realpath
    def exchange(path, **options):
        found = real(path, **options)
        if str(found).endswith("inner/a.png"):
            os.rename(root / "inner", root / "kept")
            os.symlink(tmp_path, root / "inner")
        return found
    monkeypatch.setattr(os.path, "realpath", exchange)
    assert refusal(root / "inner" / "a.png", policy) == "outside-root"


def test_folders_that_may_be_passed_but_not_listed(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.png").write_bytes(encode(photo()))
    (tmp_path / "closed").chmod(0o111)
    try: assert load_image(tmp_path / "closed" / "a.png", ImagePolicy(root=tmp_path))[1].format == "PNG"
    finally: (tmp_path / "closed").chmod(0o755)


def test_a_device_is_not_even_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(os, "open", lambda *args, **options: opened.append(args) or pytest.fail("opened"))
    for path in ("/dev/null", "/dev/zero", tmp_path):
        for policy in (ImagePolicy(), ImagePolicy(root="/")): assert refusal(path, policy) == "not-a-file"
    assert not opened


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "a.gif").write_bytes(encode(photo(), "GIF", save_all=True, append_images=[photo().rotate(9)]))
    (tmp_path / "b.jpg").write_text("text")
    count = lambda: psutil.Process().num_fds()
    outcome(tmp_path / "a.gif"); before = count()
    for _ in range(30):
        for name in ("a.gif", "b.jpg", ".", "missing"): outcome(tmp_path / name)
    assert count() == before


# --- policies ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_once(format, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(photo(), format, exif=exif)
    image, record = load_image(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(image), pixels(expected.convert("RGB")))
    assert record.actions == (() if orientation == 1 else (f"exif: turned upright (orientation {orientation})",))
    assert load_image(image)[0] == image and load_image(Image.open(io.BytesIO(data)))[0] == image


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_meaningless_orientation_is_no_orientation(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert load_image(encode(photo(), "JPEG", exif=exif))[1].actions == ()


def test_a_garbled_exif_block_costs_the_orientation_and_not_the_image():
    image, record = load_image(png(60, 40, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno hex"),
                                   chunk(b"IDAT", zlib.compress(bytes(9 * 40)))))
    assert image.size == (60, 40) and record.actions[0].startswith("exif: unreadable block ignored")


COMPOSITES = "return_numpy" in inspect.signature(convert_to_rgb).parameters  # older ones cut transparency off


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_composited_as_transformers_does(mode):
    image = photo(mode="RGBA") if mode[0] == "R" else photo(mode="RGBA").convert("LA" if mode != "PA" else "PA")
    image = image.convert(mode)
    ours, record = load_image(image)
    assert "alpha: composited on white" in record.actions
    if mode in ("RGBA", "LA", "PA") and COMPOSITES:
        assert np.array_equal(pixels(ours), convert_to_rgb(image, return_numpy=True))
    corner = pixels(load_image(image, ImagePolicy(background=(0, 255, 0)))[0])[-1, 0]
    assert abs(corner - [0, 255, 0]).max() <= 1


def indexed():
    image = Image.fromarray(np.eye(4, dtype=np.uint8)[::-1].copy())
    image.putpalette([9, 8, 7, 90, 80, 70])
    return image


@pytest.mark.parametrize("make, transparent", [
    (lambda: encode(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)), True),
    (lambda: encode(Image.new("L", (4, 4), 9), transparency=9), True),
    (lambda: encode(Image.new("1", (4, 4), 0), transparency=0), True), (lambda: encode(indexed(), transparency=0), True),
    (lambda: encode(indexed(), transparency=bytes([0, 255])), True),
    (lambda: encode(indexed(), transparency=bytes([255, 0])), False),
    (lambda: encode(indexed(), "GIF", transparency=0), True),
    (lambda: encode(Image.fromarray(np.full((4, 4), 777, np.uint16)), transparency=777), True),
    (lambda: encode(Image.new("L", (4, 4), 0), transparency=9), False)])
def test_declared_transparency_of_every_kind(make, transparent):
    image, record = load_image(make())
    assert (image.getpixel((0, 0)) == WHITE) == transparent
    assert ("alpha: composited on white" in record.actions) == (transparent or "P" == record.mode)


def test_sixteen_bits_are_scaled_to_the_nearest_level():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(int)
    for data in (encode(Image.fromarray(values)), encode(Image.fromarray(values), "TIFF"),
                 encode(Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes()), "TIFF")):
        image, record = load_image(data)
        assert np.array_equal(pixels(image)[..., 1], expected)
        assert record.mode.startswith("I;16")
        assert record.actions[0].startswith("depth:")


@pytest.mark.parametrize("values, expected", [
    (np.float32([0, .5, 1]), [0, 128, 255]), (np.float32([0, 51, 255]), [0, 51, 255]), (np.float32([0, 257, 65535]), [0, 1, 255]),
    (np.int32([0, 0, 0]), [0, 0, 0]), (np.int32([0, 256, 65535]), [0, 1, 255]), (np.int32([0, 2**30, 2**31 - 1]), [0, 128, 255])])
def test_thirty_two_bits_are_scaled_by_the_written_rule(values, expected):
    image, record = load_image(encode(Image.fromarray(values[None]), "TIFF"))
    assert pixels(image)[0, :, 0].tolist() == expected and "white is" in record.actions[0]


@pytest.mark.parametrize("values", [[0, np.nan], [0, np.inf], [-1, 1], [0, 1e20], [-np.inf, 0]])
def test_measurements_are_not_images(values): assert refusal(Image.fromarray(np.float32([values]))) == "pixel-range"


@pytest.mark.parametrize("mode, tolerance",
                         [("1", 256), ("L", 0), ("P", 60), ("YCbCr", 3), ("HSV", 6), ("LAB", 64), ("CMYK", 1), ("RGBX", 0),
                          ("I;16", 0), ("I", 0), ("F", 0)])
def test_every_mode_becomes_the_image_it_shows(mode, tolerance):
    grey = mode[0] in "1LIF" and mode != "LAB"
    base = photo(mode="L") if grey else photo()
    image = Image.fromarray(np.asarray(base).astype(np.uint16) * 257) if mode == "I;16" else base.convert(mode)
    ours, record = load_image(image)
    assert record.mode == mode and np.abs(pixels(ours) - pixels(base.convert("RGB"))).max() <= tolerance


def lut_profile(space, n):
    "An ICC profile for n channels whose every colour is the same mid grey: what obeys it is unmistakable."
    table = (b"mft1" + bytes(4) + bytes([n, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
             + bytes(range(256)) * n + bytes([128, 128, 128]) * 2**n + bytes(range(256)) * 3)
    desc = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(12 + 67)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, at, body = [(b"A2B0", table), (b"desc", desc), (b"wtpt", white)], 128 + 4 + 36, b""
    index = struct.pack(">I", 3)
    for name, t in tags:
        t += bytes(-len(t) % 4)
        index += name + struct.pack(">II", at + len(body), len(t)); body += t
    header = struct.pack(">I4sI4s4s4s12s4s4sIIIQI3i", at + len(body), b"test", 0x02400000, b"prtr", space, b"Lab ", bytes(12),
                         b"acsp", b"APPL",
                         0, 0, 0, 0, 0, 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + index + body


def test_profiles_are_obeyed_for_rgb_cmyk_and_grey():
    for format in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        data = encode(Image.new("RGB", (16, 16), (200, 30, 50)), format, icc_profile=SWAPPED,
                      **({"lossless": True} if format == "WEBP" else {}))
        image, record = load_image(data)
        assert record.actions == ("icc: 'sRGB built-in' converted to sRGB",)
        assert np.abs(pixels(image)[8, 8] - [50, 30, 200]).max() <= 12
    for format in ("JPEG", "TIFF"):
        image, record = load_image(encode(photo(mode="CMYK"), format, icc_profile=lut_profile(b"CMYK", 4)))
        assert record.actions == ("icc: 'grey' converted to sRGB",)
        assert len(np.unique(pixels(image).reshape(-1, 3), axis=0)) == 1
    image, record = load_image(encode(photo(mode="RGBA"), icc_profile=lut_profile(b"RGB ", 3)))
    assert record.actions == ("icc: 'grey' converted to sRGB", "alpha: composited on white")
    assert image.getpixel((0, 39)) == WHITE
    image, record = load_image(encode(photo(mode="L"), icc_profile=SWAPPED))
    assert np.abs(pixels(image) - pixels(photo(mode="L").convert("RGB"))).max() <= 2


def test_a_profile_that_differs_a_little_from_srgb_is_obeyed_too():
    at = struct.unpack(">I", SRGB[SRGB.index(b"rXYZ") + 4:][:4])[0]
    duller = SRGB[:at + 8] + struct.pack(">i", int(struct.unpack(">i", SRGB[at + 8:at + 12])[0] * .9)) + SRGB[at + 12:]
    image, record = load_image(encode(photo(), icc_profile=duller))
    assert record.actions and 2 < np.abs(pixels(image) - pixels(photo())).max() < 80


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_ignored_aloud():
    data = encode(photo(), icc_profile=SRGB)
    assert load_image(data)[0] == photo() and load_image(data)[1].actions == ()
    for profile in (b"x", SRGB[:200], bytes(500), lut_profile(b"CMYK", 4), SRGB[:128] + bytes(len(SRGB) - 128)):
        image, record = load_image(encode(photo(), icc_profile=profile))
        assert image == photo() and record.actions[0].startswith("icc: unusable profile ignored"), profile[:20]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_the_first_frame_of_several_and_how_many(format):
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "lime", "blue")]
    image, record = load_image(encode(frames[0], format, save_all=True, append_images=frames[1:],
                                      **({"lossless": True} if format == "WEBP" else {})))
    assert record.n_frames == 3 and record.actions[-1] == "frames: first of 3" and record.format == format
    assert np.abs(pixels(image)[32, 32] - [255, 0, 0]).max() <= 3


def test_counting_frames_stops(monkeypatch):
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    sought = counted(monkeypatch, GifImagePlugin.GifImageFile, "_seek")
    record = load_image(head + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0" * 200_000 + b";")[1]
    assert record.actions[-1] == "frames: first of 1000 or more" and MAX_FRAMES - 1 <= len(sought) <= MAX_FRAMES + 1


# --- limits --------------------------------------------------------------------------------------------------------------

def chunk(name, body): return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(w, h, *chunks, depth=1, colour=0):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0,
                                                             0)) + b"".join(chunks) + chunk(b"IEND", b"")


PEAK = """
import sys
from devsky_nb import ImagePolicy, load_image
from devsky_nb.errors import DevSkyyError
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
policy = ImagePolicy(max_pixels=int(sys.argv[1]), max_bytes=int(sys.argv[2]))
before = peak()
done = []
for path in sys.argv[3:]:
    try: done.append("loaded " + "; ".join(load_image(path, policy)[1].actions))
    except DevSkyyError as e: done.append(e.details["reason"])
print(peak() - before, policy.memory_cap, *done, sep="\\n")
"""


def peak_memory(policy, *paths):
    run = subprocess.run([sys.executable, "-c", PEAK, str(policy.max_pixels), str(policy.max_bytes), *map(str, paths)],
                         capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0 and not run.stderr, run.stderr
    peak, cap, *done = run.stdout.splitlines()
    return int(peak), int(cap), done


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")


@linux
def test_bombs_are_refused_from_their_header(tmp_path):
    bombs = {"a.png": png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(6251 * 50_000), 9))),
             "a.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;",
             "a.bmp": encode(Image.new("RGB", (1, 1)), "BMP").replace(struct.pack("<ii", 1, 1), struct.pack("<ii", 60_000, 60_000)),
             "a.webp": (b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
                        + (13_000).to_bytes(3, "little") * 2 + b"VP8 \0\0\0\0"),
             "a.tif": b"II*\0\x08\0\0\0\4\0" + b"".join(struct.pack("<HHII", t, 4, 1, v) for t,
                                                        v in ((256, 60_000), (257, 60_000), (262, 1), (273, 8))) + bytes(4)}
    jpeg = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5:at + 9] = struct.pack(">HH", 65_500, 65_500)
    bombs["a.jpg"] = bytes(jpeg)
    for name, data in bombs.items(): (tmp_path / name).write_bytes(data)
    peak, _, reasons = peak_memory(ImagePolicy(), *(tmp_path / name for name in bombs))
    found = dict(zip(bombs, reasons))
    assert found.pop("a.webp") in ("too-many-pixels", "undecodable") and set(found.values()) == {"too-many-pixels"}, found
    assert peak < 32 * 2**20


@linux
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF"])
def test_the_hungriest_image_of_each_format_stays_below_the_cap(tmp_path, format):
    n, exif = 1500, Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = photo(n, n, "RGBA")
    options = {"JPEG": dict(icc_profile=SWAPPED, exif=exif, progressive=True, subsampling=0),
               "PNG": dict(icc_profile=SWAPPED, exif=exif),
               "WEBP": dict(icc_profile=SWAPPED, exif=exif, lossless=True, method=0),
               "AVIF": dict(icc_profile=SWAPPED, exif=exif, speed=10),
               "TIFF": dict(icc_profile=SWAPPED, compression="tiff_adobe_deflate"), "GIF": dict(transparency=0)}[format]
    image = image.convert("RGB") if format == "JPEG" else image.convert("RGB").quantize(64) if format == "GIF" else image
    (tmp_path / "a").write_bytes(encode(image, format, **options))
    policy = ImagePolicy(max_pixels=n * n, max_bytes=(tmp_path / "a").stat().st_size)
    peak, cap, [done] = peak_memory(policy, tmp_path / "a")
    assert done.startswith("loaded ") and n * n * 4 < peak < cap, (peak, cap, done)


def test_text_chunk_bombs_cost_little():
    bomb = zlib.compress(bytes(150_000_000))
    for name in (b"zTXt", b"iTXt", b"iCCP"):
        body = b"k\0\0" + bomb if name != b"iTXt" else b"k\0\1\0\0\0" + bomb
        before = psutil.Process().memory_info().rss
        outcome(png(8, 8, chunk(name, body), chunk(b"IDAT", zlib.compress(bytes(16)))))
        assert psutil.Process().memory_info().rss - before < 70 * 2**20


def test_repeated_progressive_scans_are_refused_before_they_are_decoded(monkeypatch):
    data = encode(photo(2000, 2000), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 300 + b"\xff\xd9"
    decoded = counted(monkeypatch, ImageFile.ImageFile, "load")
    assert refusal(bomb, ImagePolicy()) == "too-many-scans" and not decoded
    assert outcome(data).size == (2000, 2000) and decoded


def test_limits_are_inclusive(tmp_path):
    data = encode(Image.new("RGB", (100, 50)))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert outcome(source, ImagePolicy(max_pixels=5000, max_bytes=len(data))).size == (100, 50)
        assert refusal(source, ImagePolicy(max_pixels=4999)) == "too-many-pixels"
        assert refusal(source, ImagePolicy(max_bytes=len(data) - 1)) == "too-many-bytes"


def test_pillow_is_left_alone_and_stays_silent():
    state = lambda: (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:])
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(png(10_000, 10_000, chunk(b"IDAT", b"")), ImagePolicy()) == "too-many-pixels"  # where Pillow would warn
        assert outcome(png(10_000, 10_000, chunk(b"IDAT", zlib.compress(bytes(1251 * 10_000)))),
                       ImagePolicy(max_pixels=10**8)).size == (10_000, 10_000)
    assert state() == before


def test_half_images_are_refused_even_if_the_process_allows_them(monkeypatch):
    whole = encode(photo(), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert refusal(whole[:-200]) == "truncation-hidden"
    assert outcome(np.asarray(photo())) == photo()


def test_interrupts_pass_through(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): load_image(encode(photo()))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), OverflowError("big"), struct.error("short"),
                                   SyntaxError("broken"), IndexError(), EOFError()], ids=repr)
def test_whatever_a_decoder_raises_becomes_a_typed_error(monkeypatch, error):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(ValidationError) as caught: load_image(encode(photo()))
    assert caught.value.original_error is error
    assert caught.value.details["reason"] == ("memory" if type(error) is MemoryError else "undecodable")


def test_a_kept_error_keeps_no_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(noise), compress_level=0)[:-100_000])
    gc.collect()
    kept, before = [], psutil.Process().memory_info().rss
    for _ in range(60):
        try: load_image(tmp_path / "a.png")
        except ValidationError as e: kept.append(e)
    assert len(kept) == 60
    assert psutil.Process().memory_info().rss - before < 40 * 2**20


def test_the_callers_own_error_keeps_its_variables(tmp_path):
    def theirs():
        order = "number 7"
        raise KeyError(order)
    try: theirs()
    except KeyError as mine:
        with pytest.raises(ValidationError) as caught: load_image(b"no image")
        frames = [frame for frame, _ in traceback.walk_tb(mine.__traceback__)]
        assert caught.value.__context__ is mine and frames[-1].f_locals["order"] == "number 7"


# --- hostile files -------------------------------------------------------------------------------------------------------

def samples():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    several = lambda: dict(save_all=True, append_images=[photo().rotate(30)])
    yield from ((f"{f.lower()}", encode(photo(), f)) for f in FORMATS)
    yield "jpeg-full", encode(photo(), "JPEG", exif=exif, icc_profile=SWAPPED, progressive=True)
    yield "jpeg-cmyk", encode(photo(mode="CMYK"), "JPEG")
    yield "mpo", encode(photo(), "MPO", **several())
    yield "png-full", encode(photo(mode="RGBA"), exif=exif, icc_profile=SWAPPED)
    yield "png-palette", encode(photo().quantize(32), transparency=2)
    yield "png-16", encode(Image.fromarray(np.asarray(photo(mode="L")).astype(np.uint16) * 257))
    yield "apng", encode(photo(), "PNG", **several())
    yield "gif-film", encode(photo(), "GIF", **several())
    yield "webp-full", encode(photo(mode="RGBA"), "WEBP", exif=exif, icc_profile=SWAPPED, lossless=True)
    yield "webp-film", encode(photo(), "WEBP", **several())
    yield "avif-full", encode(photo(mode="RGBA"), "AVIF", exif=exif, icc_profile=SWAPPED)
    yield from ((f"tiff-{c}", encode(photo(), "TIFF", compression=c, exif=exif)) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg",
                                                                                           "packbits"))
    yield "tiff-float", encode(Image.fromarray(np.float32(np.asarray(photo(mode="L")))), "TIFF")
    yield "tiff-pages", encode(photo(), "TIFF", **several())
    yield "tiff-fax", encode(photo(mode="1"), "TIFF", compression="group4")


SAMPLES = dict(samples())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_file_is_never_half_an_image(name):
    data = SAMPLES[name]
    whole, wrong = outcome(data), []
    for at in sorted({int(len(data) * k / 60) for k in range(60)} | set(range(len(data) - 12, len(data)))):
        found = outcome(data[:at])
        if not isinstance(found, str) and found != whole: wrong.append(at)
    assert not wrong, f"partly decoded when cut at {wrong} of {len(data)}"


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_as_an_image_or_a_typed_error():
    rng, loaded, refused = random.Random(0), 0, 0
    before = psutil.Process().memory_info().rss
    for name, data in SAMPLES.items():
        for _ in range(40):
            bad = bytearray(data)
            for _ in range(rng.choice((1, 1, 3, 20))):
                at = rng.randrange(min(len(bad), 300)) if rng.random() < .7 else rng.randrange(len(bad))
                match rng.randrange(4):
                    case 0: bad[at] ^= 1 << rng.randrange(8)
                    case 1: bad[at] = rng.choice((0, 1, 127, 128, 255))
                    case 2: bad[at:at] = rng.randbytes(rng.randrange(1, 9))
                    case 3: bad[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\xff\xff"))
            found = outcome(bytes(bad))
            loaded, refused = loaded + (not isinstance(found, str)), refused + isinstance(found, str)
    assert loaded > 100 and refused > 100
    assert psutil.Process().memory_info().rss - before < SMALL.memory_cap


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("DEVSKY_HOSTILE_IMAGES" not in os.environ,
                    reason="set DEVSKY_HOSTILE_IMAGES to a folder of hostile files, such as Tests/images of Pillow's sources")
def test_a_folder_of_hostile_files():
    paths = sorted(p for p in Path(os.environ["DEVSKY_HOSTILE_IMAGES"]).rglob("*") if not p.is_dir())
    found = Counter(result if isinstance(result, str) else "loaded" for result in (outcome(path, ImagePolicy()) for path in paths))
    print(f"{len(paths)} files: {dict(found)}; {psutil.Process().memory_info().rss / 2**20:.0f} MiB")
    assert sum(found.values()) == len(paths) > 0


def test_threads_agree_with_one_thread():
    files = list(SAMPLES.values()) * 4
    alone = [pixel_hash(load_image(d)[0]) for d in SAMPLES.values()] * 4
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(lambda d: pixel_hash(load_image(d)[0]), files)) == alone


# --- hashes --------------------------------------------------------------------------------------------------------------

def test_pixel_hash_is_of_size_and_pixels():
    image = photo()
    assert pixel_hash(image) == pixel_hash(load_image(encode(image))[0]) == pixel_hash(load_image(encode(image, "TIFF"))[0])
    other = image.copy(); other.putpixel((59, 39), (1, 2, 3))
    assert len({pixel_hash(i) for i in (image, other, Image.new("RGB", (4, 6)), Image.new("RGB", (6, 4)))}) == 4
    with pytest.raises(ValidationError, match="not L"): pixel_hash(Image.new("L", (2, 2)))


# --- scaled decoding -----------------------------------------------------------------------------------------------------

def scaled(data, min_edge):
    image, record = load_image(data, min_edge=min_edge)
    return image.size, record.actions


def test_a_jpeg_is_decoded_as_small_as_min_edge_allows_and_the_record_says_so():
    for w, h in ((801, 600), (600, 801), (640, 640), (1600, 90), (8, 8), (1, 1)):
        data = encode(photo(w, h), "JPEG")
        for min_edge in (1, 7, 64, 75, 76, 149, 150, 151, 300, 301, 601, 10**9):
            size, actions = scaled(data, min_edge)
            factor = next(s for s in (8, 4, 2, 1) if s == 1 or min(w, h) // min_edge >= s)
            assert size == (-(-w // factor), -(-h // factor)), (w, h, min_edge)
            assert actions == ((f"decode: 1/{factor} scale",) if factor > 1 else ())
            assert factor == 1 or min(size) >= min_edge
        assert load_image(data, min_edge=1)[1].size == (w, h), "the record keeps the size as stored"


def test_without_min_edge_nothing_changes():
    data = encode(photo(801, 600), "JPEG")
    plain = pixel_hash(Image.open(io.BytesIO(data)).convert("RGB"))
    for min_edge in (None, 301, 600):
        assert (pixel_hash(load_image(data, min_edge=min_edge)[0]), load_image(data, min_edge=min_edge)[1].actions) == (plain, ())


@pytest.mark.parametrize("options",
                         [dict(progressive=True), dict(subsampling=0), dict(subsampling=1), dict(subsampling=2), dict(quality=1)],
                         ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_images_show_the_same(mode, options):
    data = encode(photo(320, 240, mode).resize((320, 240)), "JPEG", **options)
    whole, small = load_image(data)[0], load_image(data, min_edge=60)
    assert small[1].actions[0] == "decode: 1/4 scale" and small[1].mode == mode
    assert np.abs(pixels(small[0]) - pixels(whole.reduce(4))).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_images_are_turned_and_their_profile_obeyed(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(photo(320, 240), "JPEG", exif=exif, icc_profile=SWAPPED, quality=95)
    image, record = load_image(data, min_edge=100)
    assert record.actions[0] == "decode: 1/2 scale" and len(record.actions) == 2 + (orientation > 1)
    assert image.size == ((160, 120) if orientation < 5 else (120, 160)) and not image.info
    assert np.abs(pixels(image) - pixels(load_image(data)[0].reduce(2))).mean() < 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_only_jpegs_have_something_to_skip(format):
    data = encode(photo(320, 240), format)
    assert load_image(data, min_edge=10)[0] == load_image(data)[0]
    assert load_image(data, min_edge=10)[1] == load_image(data)[1]


def test_a_jpeg_of_several_images_is_scaled_too():
    data = encode(photo(320, 240), "MPO", save_all=True, append_images=[photo(320, 240).rotate(180)])
    image, record = load_image(data, min_edge=120)
    assert (image.size, record.format, record.n_frames, record.actions) == ((160, 120), "MPO", 2,
                                                                            ("decode: 1/2 scale", "frames: first of 2"))


def test_a_image_that_the_caller_opened_is_not_changed():
    mine = Image.open(io.BytesIO(encode(photo(320, 240), "JPEG")))
    assert load_image(mine, min_edge=10)[0].size == mine.size == (320, 240)


@pytest.mark.parametrize("min_edge", [0, -5, 1.5, "224", True, (8, 8)])
def test_a_bad_min_edge_is_refused_for_every_source(min_edge):
    for source in (encode(photo(), "JPEG"), encode(photo()), photo(), np.asarray(photo())):
        with pytest.raises(ValidationError, match="expected a whole number of pixels") as caught:
            load_image(source, min_edge=min_edge)
        assert caught.value.details["reason"] == "bad-min-edge"


def test_limits_and_damage_count_as_before():
    data = encode(photo(320, 240), "JPEG")
    for policy, bad in ((ImagePolicy(max_pixels=320 * 240 - 1), data), (ImagePolicy(), data[:len(data) // 2])):
        reasons = []
        for min_edge in (None, 30):
            with pytest.raises(ValidationError) as caught: load_image(bad, policy, min_edge)
            reasons.append(caught.value.details["reason"])
        assert reasons[0] == reasons[1] in ("too-many-pixels", "truncated")


@pytest.mark.parametrize("wrong", [{"max_pixels": "9"}, {"max_bytes": 1.5}, {"max_pixels": True}, {"background": 5}, {"background": None}])
def test_a_policy_of_the_wrong_types_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))): ImagePolicy(**wrong)


def test_what_is_no_policy_is_not_blamed_on_the_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValidationError, match="policy='strict': expected an ImagePolicy"): load_image(tmp_path / "a.png", "strict")
