"Copies that were mirrored, rotated or cropped: found when asked, named, and not confused with other products."
import io, json

import numpy as np, pytest
from PIL import Image, ImageDraw
from rich.console import Console

from devsky_nb.demo.garments import Garment, render_garment, sample_garments
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.errors import ValidationError
from devsky_nb.validation.copies import fine_image, is_part, turned_pairs, thumbnail
from devsky_nb.validation.quality import grey_view
from devsky_nb.validation.report import check_image_set

Transpose = Image.Transpose
TURNS = {Transpose.FLIP_LEFT_RIGHT: "mirrored", Transpose.FLIP_TOP_BOTTOM: "mirrored", Transpose.ROTATE_90: "rotated",
         Transpose.ROTATE_180: "rotated", Transpose.ROTATE_270: "rotated", Transpose.TRANSPOSE: "mirrored and rotated",
         Transpose.TRANSVERSE: "mirrored and rotated"}


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def garments():
    return [render_garment(g, size=240, seed=i) for i, g in enumerate(sample_garments(20, seed=11))]


def saved(image, quality=75):
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def as_entries(images): return [{"image": image, "id": str(i)} for i, image in enumerate(images)]


@pytest.mark.parametrize("turn", TURNS)
def test_each_turn_is_found_and_named(turn, garments):
    images = [*garments, *(saved(g.transpose(turn).resize((180, 180))) for g in garments)]
    levels = [grey_view(image) for image in images]
    found = turned_pairs(np.array([thumbnail(x).ravel() for x in levels]), [fine_image(x) for x in levels], block=7)
    by_pair = {(a, b): how for a, b, how in found}
    assert by_pair == {(i, i + 20): TURNS[turn] for i in range(20)}


@pytest.mark.parametrize("size", [(300, 200), (150, 400)])
def test_turned_images_need_not_be_square(tiny, size):
    image = render_garment(Garment("boot", "red", "striped"), 400, 3).crop((0, 50, size[0], 50 + size[1] * 3 // 4))
    report = check_image_set(as_entries([image, image.rotate(90, expand=True), image.transpose(Transpose.FLIP_LEFT_RIGHT)]), tiny, duplicates="altered")
    [group] = report.findings["duplicates"]
    assert group["how"] == ["kept", "rotated", "mirrored"]


def test_a_part_is_found_wherever_it_was_cut_and_whatever_was_done_to_it(garments):
    for i, whole in enumerate(garments[:8]):
        for box in ((0, 0, 170, 170), (50, 20, 230, 200), (20, 60, 220, 230)):
            part = saved(whole.crop(box).resize((110, 110 * (box[3] - box[1]) // (box[2] - box[0]))), 60)
            assert is_part(fine_image(grey_view(whole)), fine_image(grey_view(part))), (i, box)
            assert not is_part(fine_image(grey_view(garments[i + 8])), fine_image(grey_view(part))), (i, box)


def test_different_products_and_empty_pages_are_no_copies(tiny, garments):
    blank = Image.new("RGB", (240, 240), "white")
    rings = []
    for radius in (5, 9, 14):
        rings.append(blank.copy())
        ImageDraw.Draw(rings[-1]).ellipse((120 - radius, 120 - radius, 120 + radius, 120 + radius), outline="black")
    report = check_image_set(as_entries([*garments, blank.resize((90, 90)), *rings]), tiny, duplicates="altered")
    assert report.findings["duplicates"] == []


def test_copies_count_only_when_they_are_asked_for(tiny, garments, tmp_path):
    whole, other = garments[:2]
    images = [whole, other, whole, saved(whole), whole.transpose(Transpose.FLIP_LEFT_RIGHT), other.crop((30, 30, 220, 215)), other.rotate(180)]
    for duplicates, kept in (("exact", 6), ("near", 5), ("altered", 2)):
        report = check_image_set(as_entries(images), tiny, duplicates=duplicates)
        assert report.counts == {"embedded": kept, "duplicate": 7 - kept, "error": 0}, duplicates
    assert [(g["members"], g["how"]) for g in report.findings["duplicates"]] == [
        ([0, 2, 3, 4], ["kept", "exact", "near", "mirrored"]), ([1, 5, 6], ["kept", "cropped", "rotated"])]
    assert json.loads(json.dumps(report.to_dict()))["findings"]["duplicates"][1]["how"] == ["kept", "cropped", "rotated"]
    report.print(Console(file=io.StringIO(), width=200))
    page = report.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert ">mirrored</span>" in page and ">cropped</span>" in page


@pytest.mark.parametrize("images", [[], [0], [0, 0]])
def test_small_sets_are_no_trouble(tiny, images, garments):
    entries = as_entries([garments[i] for i in images]) or [{"path": "none.jpg"}]
    assert check_image_set(entries, tiny, duplicates="altered").counts["duplicate"] == max(0, len(images) - 1)


@pytest.mark.parametrize("duplicates", ["all", None, True, 3, ["near"]])
def test_what_is_no_kind_of_duplicate_is_said(tiny, duplicates):
    with pytest.raises(ValidationError, match="expected one of exact, near, altered"):
        check_image_set(["none.jpg"], tiny, duplicates=duplicates)
