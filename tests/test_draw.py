"""The annotated picture: what is drawn where, and that files are whole or absent."""

import numpy as np
import pytest
from PIL import Image

from ferret_mlx.boxes import LabelledBox, parse_boxes
from ferret_mlx.draw import (
    BOX_COLORS,
    REGION_COLORS,
    check_target,
    draw_answer,
    save_picture,
    short_label,
)
from ferret_mlx.regions import Box, FreeForm, Point


@pytest.fixture
def grey() -> Image.Image:
    return Image.new("RGB", (320, 240), (128, 128, 128))


def has(picture: Image.Image, color) -> np.ndarray:
    """(h, w), where the picture has this colour; smoothed letters come only near to it."""
    return (np.abs(np.asarray(picture).astype(int) - color) <= 20).all(axis=2)


def test_boxes_have_their_own_colors_on_their_edges(grey):
    boxes = parse_boxes("a cat [100, 400, 400, 900] and a dog [500, 400, 900, 900]", grey.size)
    drawn = draw_answer(grey, boxes)
    for (_, (x1, y1, x2, y2), _), color in zip(boxes, BOX_COLORS, strict=False):
        ink = has(drawn, color)
        assert ink[y1:y2, x1].all() and ink[y1:y2, x2].all()
        assert ink[y2, x1:x2].all()
        assert not ink[y1 + 8 : y2 - 8, x1 + 8 : x2 - 8].any()
        # The label, in white on the box's colour, lies above it.
        assert ink[: y1 - 2].any() and has(drawn, (255, 255, 255))[:y1, x1:x2].any()


def test_the_original_is_untouched_and_the_size_kept(grey):
    drawn = draw_answer(grey, parse_boxes("a cat [0, 0, 1000, 1000]", grey.size), [Point(3, 3)])
    assert drawn.size == grey.size
    assert (np.asarray(grey) == 128).all()
    assert (np.asarray(drawn) != 128).any()
    assert not has(draw_answer(grey), BOX_COLORS[0]).any()


def test_regions(grey):
    stroke = FreeForm.from_stroke([(30, 200), (150, 180)], 20, grey.size)
    regions = [Point(200, 100), Box(20, 40, 90, 90), stroke]
    drawn = draw_answer(grey, [], regions)
    ink = [has(drawn, color) for color in REGION_COLORS]
    assert ink[0][100, 200] and ink[0][88:113, 188:213].sum() > 20
    # Dashed: some of the edge, not all of it.
    edge = ink[1][90, 20:91]
    assert 0.3 < edge.mean() < 0.7
    changed = (np.asarray(drawn) != 128).any(axis=2)
    below_labels = slice(stroke.pixels.any(axis=1).argmax() + 1, None)
    np.testing.assert_array_equal(changed[below_labels], stroke.pixels[below_labels])
    inside = np.asarray(drawn)[188, 100]
    assert (inside > 128).any() and not ink[2][188, 100], "the inside is tinted, not covered"


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (40, 30), (3000, 2000)])
def test_any_size(size):
    """Labels larger than the picture, boxes on its edge and empty labels must all be drawn."""
    picture = Image.new("RGB", size)
    w, h = size
    boxes = [
        LabelledBox("a very long label " * 5, (0, 0, w, h), (0, 1)),
        LabelledBox("", (0, 0, 0, 0), (0, 1)),
        LabelledBox("日本", (w, h, w, h), (0, 1)),
    ]
    regions = [Point(0, 0), Box(0, 0, w, h), FreeForm(np.ones((h, w), bool))] * 2
    assert draw_answer(picture, boxes, regions).size == size


def test_lines_and_letters_grow_with_the_picture():
    def ink(scale):
        size = (320 * scale, 240 * scale)
        drawn = draw_answer(Image.new("RGB", size), parse_boxes("a cat [100, 400, 700, 900]", size))
        return has(drawn, BOX_COLORS[0]).mean()

    assert ink(4) == pytest.approx(ink(2), rel=0.3)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("and a dog", "a dog"),
        ("Two dogs:", "Two dogs"),
        ("The cat is at", "The cat"),
        ("andy", "andy"),
        ("and", "and"),
        ("word " * 20, "word word word word word word word wo..."),
    ],
)
def test_short_label(label, expected):
    assert short_label(label) == expected


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.WEBP"])
def test_saved_whole(grey, tmp_path, name):
    save_picture(grey, tmp_path / name)
    save_picture(grey, tmp_path / name)  # a second answer replaces the first
    assert Image.open(tmp_path / name).size == grey.size
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_left_when_saving_fails(grey, tmp_path):
    (tmp_path / "out.png").write_bytes(b"before")
    with pytest.raises(AttributeError):
        save_picture(None, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_targets(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, message in {"out": "ending", "out.txt": "ending", "folder.png": "folder"}.items():
        with pytest.raises(ValueError, match=message):
            check_target(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_target(tmp_path / "missing" / "out.png")
