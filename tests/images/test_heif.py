"HEIC as phones write it, read through pillow-heif as any other image, or as one typed error."
import io, sys

import numpy as np, pytest
from PIL import Image, ImageCms

from devsky_nb import ImagePolicy, ValidationError, load_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def heif(): return pytest.importorskip("pillow_heif")


def photo(size=(64, 48), mode="RGB"):
    x = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(x).convert(mode)


def encoded(heif, image, **options):
    buffer = io.BytesIO()
    file = heif.from_pillow(image)
    file.save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


@pytest.fixture(params=[False, True], ids=["as Pillow is", "registered with Pillow"])
def plugins(request, heif, monkeypatch):
    "What Pillow opens, without HEIF, or with it, as where imageio was imported before."
    for name in ("OPEN", "ID", "MIME", "EXTENSION", "SAVE", "SAVE_ALL", "DECODERS"): monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    Image.OPEN.pop("HEIF", None)
    if request.param: heif.register_heif_opener()
    return Image.OPEN


def test_a_photo_is_what_it_was(heif, plugins):
    before = dict(plugins)
    image, record = load_image(encoded(heif, photo()))
    assert image.mode == "RGB" and image.size == (64, 48) and record.format == "HEIF" and record.n_frames == 1
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo())).max() <= 3
    assert ("HEIF" in Image.OPEN) == ("HEIF" in before)  # a reader of ours registers nothing


def test_alpha_and_profile(heif):
    rgba = photo().convert("RGBA")
    rgba.putalpha(0)
    assert np.asarray(load_image(encoded(heif, rgba))[0]).min() >= 250  # white ground
    profiled = photo()
    profiled.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_image(encoded(heif, profiled))[0].size == (64, 48)


def test_several_images_limits_and_damage(heif):
    file = heif.from_pillow(photo())
    file.add_from_pillow(photo((32, 32)))
    buffer = io.BytesIO()
    file.save(buffer, quality=90)
    image, record = load_image(buffer.getvalue())
    assert record.n_frames == 2 and image.size == (64, 48) and "frames: first of 2" in record.actions
    data = encoded(heif, photo())
    with pytest.raises(ValidationError, match="max_pixels=100") as e: load_image(data, ImagePolicy(max_pixels=100))
    assert e.value.details["reason"] == "too-many-pixels"
    for cut in range(12, len(data), max(1, len(data) // 40)):
        with pytest.raises(ValidationError): load_image(data[:cut])
    for at in range(0, len(data), max(1, len(data) // 60)):
        bad = bytearray(data)
        bad[at] ^= 255
        try: load_image(bytes(bad))
        except ValidationError: pass


def test_without_the_library_it_is_said_how_to_get_it(heif, monkeypatch):
    data = encoded(heif, photo())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValidationError, match="looks like HEIC: .*pip install 'devsky_nb\\[heif\\]'"): load_image(data)


def test_it_is_an_image_in_a_folder_and_a_zip(heif, tmp_path):
    import zipfile
    from devsky_nb.images.items import read_item
    from devsky_nb.images.sources import open_source
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("IMG_0001.HEIC", encoded(heif, photo()))
    [item] = open_source(tmp_path).parts()
    assert load_image(read_item(item, ImagePolicy()))[0].size == (64, 48)
