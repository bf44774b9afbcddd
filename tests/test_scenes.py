"""Training scenes: exact silhouettes and boxes, reproducible, dense labels that agree with both."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from reference import scenes as scenes_module
from reference.config import IMAGE_MEAN, IMAGE_STD
from reference.data import DenseSample, SceneStream, dense_labels, normalise, pixels_of
from reference.glyphs import CELL, NAMES, plural, sprites, with_article
from reference.scenes import SPLITS, Scene, SceneObject, box_iou, compose, mask_box
from reference.vision import IGNORE

GRID = 10


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose("validation", number) for number in range(150)]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image)


def test_same_number_same_scene(scenes):
    """Would catch a draw from a global generator, or one that depends on earlier scenes."""
    for number in (17, 3):
        again = compose("validation", number)
        assert np.array_equal(pixels(again), pixels(scenes[number]))
        assert again.pair == scenes[number].pair
        for one, other in zip(again.objects, scenes[number].objects, strict=True):
            assert (one.name, one.box, one.visible) == (other.name, other.box, other.visible)
            assert np.array_equal(one.mask, other.mask)


def test_splits_and_numbers_differ():
    made = [pixels(compose(split, n)).tobytes() for split in SPLITS for n in range(3)]
    assert len(set(made)) == len(made)


def test_scene_shape(scenes):
    for scene in scenes:
        assert scene.image.mode == "RGB"
        assert all(160 <= side <= 320 for side in scene.size)
        assert 1 <= len(scene.objects) <= 8
        for o in scene.objects:
            assert o.name in NAMES
            assert o.mask.shape == scene.size[::-1]
            assert o.mask.dtype == bool
            assert 0 < o.visible <= 1
    assert {len(scene.objects) for scene in scenes} >= {2, 3, 4, 5}
    assert {o.name for scene in scenes for o in scene.objects} == set(NAMES)
    small = compose("examples", 0, sides=(40, 60))
    assert all(40 <= side <= 60 for side in small.size)


def test_boxes_are_the_visible_masks_bounds(scenes):
    for o in (o for scene in scenes for o in scene.objects):
        x1, y1, x2, y2 = o.box
        inside = o.mask[y1 : y2 + 1, x1 : x2 + 1]
        assert inside.sum() == o.mask.sum()
        assert inside[0].any() and inside[-1].any()
        assert inside[:, 0].any() and inside[:, -1].any()


def test_masks_are_disjoint(scenes):
    """A pixel belongs to the object on top only: else two silhouettes name one pixel."""
    for scene in scenes:
        assert np.stack([o.mask for o in scene.objects]).sum(0).max() == 1


def test_pairs_overlap_and_stay_half_visible(scenes):
    pairs = [[scene.objects[i] for i in scene.pair] for scene in scenes if scene.pair]
    assert len(pairs) >= 15
    for back, front in pairs:
        assert back.name != front.name
        assert box_iou(back.box, front.box) >= 0.5
        assert min(back.visible, front.visible) >= 0.5


def test_unique_objects(scenes):
    several = 0
    for scene in scenes:
        named = [o.name for o in scene.objects]
        several += len(set(named)) < len(named)
        unique = scene.unique()
        assert all(named.count(o.name) == 1 and o.visible >= 0.5 for o in unique)
        left_out = [o for o in scene.objects if all(o is not u for u in unique)]
        assert all(named.count(o.name) > 1 or o.visible < 0.5 for o in left_out)
    assert several > 20


def test_painted_pixels_agree_with_the_masks(scenes, monkeypatch):
    """Repaints scenes with hard-edged glyphs of one plain colour per kind on black: the silhouettes
    must stay, and each kind's colour must be exactly on its objects' visible pixels. Would catch a
    mask that is shifted, mirrored apart from its sprite, or in another painting order."""
    glyph, background = scenes_module._glyph, scenes_module.background

    def plain(name, extent, rng):
        alpha = np.asarray(glyph(name, extent, rng).getchannel("A"))
        sprite = np.zeros((*alpha.shape, 4), np.uint8)
        sprite[..., 0], sprite[..., 3] = NAMES.index(name) + 1, (alpha > 127) * 255
        return Image.fromarray(sprite)

    def black(size, rng):
        background(size, rng)  # keeps the random stream
        return Image.new("RGB", size)

    monkeypatch.setattr(scenes_module, "_glyph", plain)
    monkeypatch.setattr(scenes_module, "background", black)
    for number in range(60):
        before, scene = scenes[number], compose("validation", number)
        expected = np.zeros(scene.size[::-1], np.uint8)
        for o, original in zip(scene.objects, before.objects, strict=True):
            assert np.array_equal(o.mask, original.mask)
            expected[o.mask] = NAMES.index(o.name) + 1
        assert np.array_equal(pixels(scene)[..., 0], expected)


def test_visible_share(monkeypatch):
    """Visible pixels over the whole sprite's, parts outside the picture included."""
    sprite = Image.new("RGBA", (40, 40), (9, 9, 9, 255))
    front = Image.new("RGBA", (10, 40), (9, 9, 9, 255))
    picture = Image.new("RGB", (200, 200))
    monkeypatch.setattr(scenes_module, "background", lambda size, rng: picture.resize(size))
    monkeypatch.setattr(
        scenes_module,
        "_place_alone",
        lambda name, placed, unit, size, rng: (
            [(name, front, (0, 0))] if placed else [(name, sprite, (-20, 0))]
        ),
    )
    monkeypatch.setattr(scenes_module, "_place_pair", lambda *_: None)
    first = compose("validation", 0).objects[0]
    assert first.box == (10, 0, 19, 39)
    assert first.visible == 10 / 40


def test_box_iou():
    assert box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert box_iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 9, 9), (9, 9, 20, 20)) == pytest.approx(1 / (100 + 144 - 1))
    assert box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert box_iou((0, 0, 9, 9), (20, 20, 29, 29)) == 0


def test_mask_box_has_x_first():
    mask = np.zeros((20, 30), bool)
    mask[4:7, 11:25] = True
    assert mask_box(mask) == (11, 4, 24, 6)


def test_sprites_and_names():
    found = sprites()
    assert list(found) == NAMES
    for sprite in found.values():
        assert max(sprite.size) > CELL / 2
        solid = np.asarray(sprite)[..., 3] > 127
        assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any()
    distinct = {sprite.resize((16, 16)).tobytes() for sprite in found.values()}
    assert len(distinct) == len(NAMES)
    assert [with_article(n) for n in ("dog", "owl", "grapes")] == ["a dog", "an owl", "grapes"]
    assert [plural(n) for n in ("dog", "butterfly", "fish")] == ["dogs", "butterflies", "fish"]


# Dense labels and the sample stream.


def test_dense_labels_agree_with_masks():
    """On pictures whose cells are whole pixels wide, so that shares are exact."""
    slivers = objects = 0
    for number in range(40):
        scene = compose("validation", number, sides=(200, 200))
        labels, boxes = dense_labels(scene, GRID)
        assert labels.shape == (GRID * GRID,) and boxes.shape == (GRID * GRID, 4)
        masks = np.stack([o.mask for o in scene.objects])
        shares = masks.reshape(-1, GRID, 20, GRID, 20).mean((2, 4)).reshape(len(masks), -1)
        for cell, of_objects in enumerate(shares.T):
            *_, second, most = sorted([0, *of_objects])
            if min(abs(most - 0.1), abs(most - 0.02)) < 0.005 or 0 < most < second + 0.005:
                continue  # too close to call on 8-bit pixels
            o = scene.objects[of_objects.argmax()]
            if most >= 0.1:
                assert labels[cell] == NAMES.index(o.name) + 1
                assert np.allclose(boxes[cell], np.divide(o.box, 200), atol=1e-6)
                objects += 1
            else:
                assert labels[cell] == (IGNORE if most > 0.02 else 0)
                slivers += most > 0.02
    assert objects > 500 and slivers > 50


def test_dense_labels_by_hand():
    """A box in the top right of a wide picture: rows first, then columns, in raster order."""
    mask = np.zeros((100, 200), bool)
    mask[0:20, 160:200] = True  # cell (row 0, column 4) of 5 x 5, and nothing else
    mask[20, 160:200] = True  # 1/20 of the cell below: a sliver
    scene = Scene(
        Image.new("RGB", (200, 100)), (SceneObject("cat", (160, 0, 199, 20), mask, 1),), None
    )
    labels, boxes = dense_labels(scene, 5)
    expected = np.zeros(25, int)
    expected[4], expected[9] = NAMES.index("cat") + 1, IGNORE
    assert labels.tolist() == expected.tolist()
    assert boxes[4].tolist() == pytest.approx([0.8, 0.0, 0.995, 0.2])


def test_normalise():
    raw = torch.randint(0, 256, (2, 6, 6, 3), generator=torch.Generator().manual_seed(0))
    made = normalise(raw.to(torch.uint8))
    assert made.shape == (2, 3, 6, 6) and made.is_contiguous()
    red, row, column = 0, 2, 5
    expected = (raw[1, row, column, red].item() / 255 - IMAGE_MEAN[red]) / IMAGE_STD[red]
    assert made[1, red, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_training_pixels_are_inference_pixels(scenes):
    """The tower must be trained on what ``ferret_mlx.image.preprocess`` makes of a picture."""
    from ferret_mlx.image import preprocess

    for scene in scenes[:3]:
        ours = normalise(torch.from_numpy(pixels_of(scene.image, 70))[None])[0].permute(1, 2, 0)
        theirs = preprocess(scene.image, 70, IMAGE_MEAN, IMAGE_STD)
        assert np.abs(ours.numpy() - theirs).max() < 1e-5


def test_stream_starts_anywhere_and_repeats():
    """A stream that starts at scene 5 goes on as one that started at 3: resumed runs see no scene
    twice, and the generator handed to ``make`` belongs to the scene, not to the stream."""

    def make(scene, rng):
        return scene.image.tobytes(), rng.random()

    first = list(itertools.islice(SceneStream("train", 3, make), 4))
    assert list(itertools.islice(SceneStream("train", 5, make), 2)) == first[2:]
    assert len({draw for _, draw in first}) == 4


def test_workers_share_the_scenes():
    """Would catch workers that all draw the same scenes."""
    stream = SceneStream("train", 8, DenseSample(28, 2))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    from_workers = [labels.tolist() for _, labels, _ in itertools.islice(loader, 4)]
    alone = [labels.tolist() for _, labels, _ in itertools.islice(stream, 4)]
    assert sorted(from_workers) == sorted(alone)
