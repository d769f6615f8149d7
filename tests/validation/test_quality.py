"Blur and exposure on what a catalogue has: small and large products, plain and patterned, on any page, at any size."
import numpy as np, pytest
from PIL import Image, ImageDraw, ImageFilter

from devsky_nb.demo.garments import Garment, render_garment
from devsky_nb.validation.quality import QUALITY, QUALITY_LIMITS, blur, grey_view, measure_quality, quality_warnings

INK = {"dark": (30, 30, 40), "red": (200, 40, 40), "pale": (205, 205, 200), "grey": (128, 128, 128)}


def warnings_of(image):
    quality = np.array([measure_quality(grey_view(image))], QUALITY)
    return [name for name, hit in quality_warnings(quality, np.array([image.size])).items() if hit[0]]


def softened(image, percent):  # of the shorter edge
    return image.filter(ImageFilter.GaussianBlur(percent / 100 * min(image.size)))


def product(share, ink="red", page="white", size=(1000, 1000), shape="ellipse"):
    "A plain shape that covers a share of each side."
    image = Image.new("RGB", size, page)
    width, height = size
    box = (width * (1 - share) / 2, height * (1 - share) / 2, width * (1 + share) / 2, height * (1 + share) / 2)
    getattr(ImageDraw.Draw(image), shape)(box, fill=INK[ink])
    return image


PRODUCTS = {
    "earring": product(.06, "dark"), "pale earring": product(.06, "pale"), "ring on black": product(.06, "pale", "black"),
    "bag": product(.5, shape="rectangle"), "bag in grey": product(.5, page=(225, 225, 225)), "filling": product(.98, "dark"),
    "black dress": product(.6, "dark"), "white on black": Image.eval(product(.6, "dark"), lambda v: 255 - v),
    "tall": product(.5, size=(500, 1500)), "wide": product(.5, size=(1600, 500)), "large": product(.3, size=(3000, 4000)),
    "small": product(.6, size=(150, 150)), "striped": render_garment(Garment("dress", "blue", "striped"), 700, 3),
    "checked": render_garment(Garment("coat", "white", "checked"), 700, 4), "plain": render_garment(Garment("hat", "white", "plain"), 700, 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_sharp_product_is_sharp_and_its_blurred_copy_is_not(name):
    sharp = PRODUCTS[name]
    assert warnings_of(sharp) == []
    if min(sharp.size) < 300: return  # there, half a percent is less than a pixel
    assert warnings_of(softened(sharp, .8)) == ["blurred"]
    assert 2 < blur(grey_view(softened(sharp, .8))) < 6
    if name != "pale earring": assert "blurred" in warnings_of(softened(sharp, 2))  # that one has vanished by then


def test_the_number_is_the_blur_in_pixels():
    for percent in (.2, .3, .4, .5, .6):
        levels = grey_view(softened(product(.6, shape="rectangle"), percent))
        assert blur(levels) == pytest.approx(6 * percent, abs=.4)
    slanting = product(.6, shape="rectangle").rotate(30, Image.Resampling.BICUBIC, fillcolor="white")
    assert blur(grey_view(softened(slanting, .5))) == pytest.approx(3, abs=.4)


@pytest.mark.parametrize("angle", [0, 90])
def test_what_moved_is_blurred(angle):
    garment = render_garment(Garment("dress", "red", "dotted"), 600, 2).rotate(angle)
    trail = np.mean([np.roll(np.asarray(garment, np.float32), s, axis=1) for s in range(-8, 9)], 0)
    assert warnings_of(Image.fromarray(trail.round().astype(np.uint8)).rotate(-angle)) == ["blurred"]


def noise(deviation, image, seed=0):
    grain = np.random.default_rng(seed).normal(0, deviation, np.asarray(image).shape)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def test_noise_and_texture_are_not_blurred_and_do_not_hide_a_strong_blur():
    dress = render_garment(Garment("dress", "blue", "striped"), 700, 3)
    assert warnings_of(noise(20, dress)) == [] and warnings_of(noise(60, Image.new("RGB", (500, 500), "grey"))) == []
    assert warnings_of(noise(5, softened(dress, .8))) == ["blurred"]
    assert warnings_of(Image.effect_noise((300, 300), 80).convert("RGB")) == []


@pytest.mark.parametrize("image", [
    Image.new("RGB", (500, 500), "grey"), Image.new("RGB", (500, 500), "white"), Image.new("RGB", (500, 500)),
    Image.linear_gradient("L").resize((900, 900), Image.Resampling.BICUBIC).convert("RGB"), Image.new("RGB", (1, 1), "red"),
    Image.new("RGB", (3, 700), "red"), Image.new("RGB", (30_000, 2), "red")], ids=lambda image: f"{image.size}")
def test_without_edges_there_is_no_verdict(image):
    assert np.isnan(blur(grey_view(image))) and "blurred" not in warnings_of(image)


def test_exposure_is_judged_on_the_product():
    for image in PRODUCTS.values(): assert not {"too dark", "too bright"} & {*warnings_of(image)}
    bag = PRODUCTS["bag in grey"]
    assert warnings_of(bag.point(lambda v: v // 5)) == ["too dark"]
    assert warnings_of(bag.point(lambda v: 240 + v // 16)) in (["too bright"], ["nearly uniform"])
    street = Image.fromarray(np.kron(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8), np.ones((30, 30, 1), np.uint8)))
    assert warnings_of(street) == []
    assert warnings_of(street.point(lambda v: min(255, 3 * v))) == ["too bright"]
    assert warnings_of(street.point(lambda v: v // 5)) == ["too dark"]


@pytest.mark.parametrize("size, page", [((2000, 1000), "white"), ((64, 64), "black"), ((401, 1203), (200, 30, 30))])
def test_a_page_with_nothing_on_it_is_said_once(size, page):
    assert warnings_of(Image.new("RGB", size, page)) == ["nearly uniform"]


def test_every_warning_has_its_limit_in_words():
    hits = quality_warnings(np.zeros(0, QUALITY), np.zeros((0, 2), np.int32))
    assert list(hits) == list(QUALITY_LIMITS) and all(hit.shape == (0,) for hit in hits.values())
