"""Regions: coordinate texts, masks and sampled points as the released code makes them."""

import numpy as np
import pytest
from PIL import Image

from ferret_mlx.regions import Box, FreeForm, Point, coordinate, sample_points


def parity_region(parity, spec):
    if spec["kind"] == "point":
        return Point(*spec["xy"])
    if spec["kind"] == "box":
        return Box(*spec["xyxy"])
    return FreeForm.from_file(parity / "cases" / spec["mask"])


def test_texts_masks_and_points_as_released(parity, manifest):
    for case in manifest:
        size = Image.open(parity / "cases" / case["image"]).size
        regions = [parity_region(parity, spec) for spec in case["regions"]]
        assert [region.text(size) for region in regions] == case["region_texts"]
        masks = [region.mask(size) for region in regions]
        assert [int(mask.sum()) for mask in masks] == case["mask_pixels"]
        if not regions:
            continue
        golden = np.load(parity / "golden" / f"{case['name']}.npz")["points_xy"]
        for row, index in zip(golden, case["region_order"], strict=True):
            mask = masks[index]
            everything = sample_points(mask, np.random.default_rng(0), int(mask.sum()))
            few = min(len(everything), 512) if len(everything) <= 512 else 0
            np.testing.assert_array_equal(row[:few], everything[:few])
            pixels = {tuple(point) for point in everything.tolist()}
            assert {tuple(point) for point in row.tolist()} <= pixels


def test_ratio_comes_first():
    """int(1000 * x / w) gives 500 here: one answer in a thousand would be off by one."""
    assert coordinate(87, 174) == int(87 * (1000.0 / 174))
    differing = [
        (x, w) for w in range(1, 400) for x in range(w) if coordinate(x, w) != int(1000 * x / w)
    ]
    assert (87, 174) in differing


@pytest.mark.parametrize("count", [1, 511, 512, 513, 4000])
def test_sample_points(count):
    mask = np.zeros((100, 50), bool)
    mask.ravel()[:count] = True
    points = sample_points(mask, np.random.default_rng(3))
    assert points.shape == (512, 2) and points.dtype == np.float32
    assert (points >= 0).all() and (points < 1).all()
    pixels = np.rint(points * (100, 50)).astype(int)
    assert mask[pixels[:, 0], pixels[:, 1]].all()
    assert len(np.unique(pixels, axis=0)) == min(count, 512) or count < 512
    if count <= 512:
        np.testing.assert_array_equal(pixels[:count], np.argwhere(mask))
    np.testing.assert_array_equal(points, sample_points(mask, np.random.default_rng(3)))
    if count != 1 and count != 512:
        other = sample_points(mask, np.random.default_rng(4))
        assert not np.array_equal(points, other)


def test_masks_are_indexed_x_first():
    mask = Point(30, 4).mask((40, 20))
    assert mask.shape == (40, 20)
    assert mask[25:36, 0:10].all() and mask.sum() == 11 * 10
    mask = Box(1.9, 2, 5.2, 3).mask((40, 20))
    assert mask[1:6, 2:4].all() and mask.sum() == 5 * 2


def test_box_to_the_far_edge():
    size = (40, 20)
    assert Box(0, 0, 40, 20).text(size) == Box(0, 0, 39, 19).text(size) == "[0, 0, 975, 950]"
    assert Box(0, 0, 40, 20).mask(size).all()


def test_float_coordinates():
    assert Point(10.9, 3.5).text((40, 20)) == "[272, 175]"
    assert Box(0.5, 0.5, 39.5, 19.5).text((40, 20)) == "[12, 25, 987, 975]"


def test_polygon():
    triangle = FreeForm.from_polygon([(2, 2), (12, 2), (2, 12)], (20, 30))
    assert triangle.pixels.shape == (30, 20)
    assert triangle.text((20, 30)) == "[100, 66, 600, 400]"
    assert triangle.pixels.sum() == pytest.approx(66, abs=6)
    whole = FreeForm.from_polygon([(0, 0), (20, 0), (20, 30), (0, 30)], (20, 30))
    assert whole.pixels.all()


def test_stroke_has_round_ends_and_joints():
    stroke = FreeForm.from_stroke([(20, 20), (60, 20), (60, 50)], 11, (80, 70))
    y, x = np.mgrid[0:70, 0:80]
    near = np.zeros((70, 80), bool)
    for t in np.linspace(0, 1, 2001):
        for start, end in (((20, 20), (60, 20)), ((60, 20), (60, 50))):
            px, py = np.add(start, t * np.subtract(end, start))
            near |= np.hypot(x - px, y - py) <= 5.5
    np.testing.assert_array_equal(stroke.pixels, near)


def test_thin_strokes_have_no_gaps():
    for end in [(49, 3), (49, 30), (3, 39), (49, 39)]:
        pixels = FreeForm.from_stroke([(1, 1), end], 1, (50, 40)).pixels
        longer = 0 if end[0] - 1 >= end[1] - 1 else 1
        span = end[longer] - 1 + 1
        assert pixels.any(axis=longer).sum() == span


def test_stroke_dot_and_clipping():
    assert FreeForm.from_stroke([(7, 8)], 1, (20, 20)).pixels.sum() == 1
    corner = FreeForm.from_stroke([(0, 0), (20, 20)], 9, (20, 20)).pixels
    assert corner[0, 0] and corner[19, 19] and not corner[0, 19]
    # Wider than whole numbers go.
    assert FreeForm.from_stroke([(0, 0)], 1e300, (20, 20)).pixels.all()


def test_mask_file(tmp_path):
    grey = np.zeros((20, 30), np.uint8)
    grey[5, 6], grey[7, 8] = 127, 128
    Image.fromarray(grey).save(tmp_path / "mask.png")
    region = FreeForm.from_file(tmp_path / "mask.png")
    assert np.argwhere(region.mask((30, 20))).tolist() == [[8, 7]]
    # Transparent pixels are outside, whatever colour hides in them.
    cut_out = np.full((20, 30, 4), 255, np.uint8)
    cut_out[..., 3] = grey
    Image.fromarray(cut_out).save(tmp_path / "cut_out.png")
    assert FreeForm.from_file(tmp_path / "cut_out.png").pixels.sum() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Point(40, 5).text((40, 20)), "outside the picture of 40 x 20"),
        (lambda: Point(-1, 5).mask((40, 20)), "outside"),
        (lambda: Point(float("nan"), 5).mask((40, 20)), "finite"),
        (lambda: Point("1", 5).mask((40, 20)), "finite"),
        (lambda: Box(5, 5, 41, 6).mask((40, 20)), "outside the picture"),
        (lambda: Box(5, 5, 6, 20.5).text((40, 20)), "outside the picture"),
        (lambda: Box(40, 5, 40, 6).text((40, 20)), "outside the picture"),
        (lambda: Box(9, 5, 8, 6).text((40, 20)), "x1 <= x2"),
        (lambda: Box(8, 7, 9, 6).mask((40, 20)), "y1 <= y2"),
        (lambda: FreeForm(np.zeros((20, 40), bool)), "empty"),
        (lambda: FreeForm(np.ones((20, 40, 3), bool)), r"shape \(h, w\)"),
        (lambda: FreeForm(np.ones((20, 40))), "bool"),
        (lambda: FreeForm(np.ones((40, 20), bool)).mask((40, 20)), "20 x 40 .* 40 x 20"),
        (lambda: FreeForm(np.ones((40, 20), bool)).text((40, 20)), "20 x 40 .* 40 x 20"),
        (lambda: FreeForm.from_polygon([(1, 1), (5, 5)], (40, 20)), "at least 3 points, got 2"),
        (lambda: FreeForm.from_polygon([(1, 1), (5, 5), (5, 21)], (40, 20)), "outside"),
        (lambda: FreeForm.from_polygon([(1, 1, 1), (5, 5)], (40, 20)), "pairs"),
        (lambda: FreeForm.from_stroke([], 3, (40, 20)), "at least 1 point"),
        (lambda: FreeForm.from_stroke([(1, 1)], 0.5, (40, 20)), "at least 1 pixel wide"),
        (lambda: FreeForm.from_stroke([(41, 1)], 3, (40, 20)), "outside"),
    ],
)
def test_bad_regions(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_mask_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        FreeForm.from_file(tmp_path / "missing.png")
    Image.new("L", (9, 9), 100).save(tmp_path / "dark.png")
    with pytest.raises(ValueError, match="dark.png is empty"):
        FreeForm.from_file(tmp_path / "dark.png")
