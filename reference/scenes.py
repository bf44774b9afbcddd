"""Pictures of everyday objects on varied backgrounds, with exact silhouettes and boxes.

A scene is a pure function of its split and number: train, validation, test and example scenes come
from different random streams, so they never share a seed.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from .backgrounds import background
from .glyphs import NAMES, sprites

SPLITS = {"train": 0, "validation": 1, "test": 2, "examples": 3}
SOLID = 127  # alpha above which a pixel belongs to the silhouette
PAIR_IOU = 0.5
HALF_VISIBLE = 0.5


@dataclass(frozen=True)
class SceneObject:
    """One object. ``box``: visible pixels' bounds (x1, y1, x2, y2), both ends included;
    ``mask``: visible silhouette, bool (h, w); ``visible``: visible share of the silhouette."""

    name: str
    box: tuple[int, int, int, int]
    mask: np.ndarray
    visible: float


@dataclass(frozen=True)
class Scene:
    """``objects`` in painting order (the last lies on top); ``pair``: indices of the overlapping
    pair (box IoU >= 0.5) when the scene was built around one."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    pair: tuple[int, int] | None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    def unique(self) -> list[SceneObject]:
        """Objects that are alone of their kind and at least half visible."""
        counts = [o.name for o in self.objects]
        return [o for o in self.objects if counts.count(o.name) == 1 and o.visible >= HALF_VISIBLE]


def box_iou(a, b) -> float:
    """Intersection over union of two pixel boxes with both ends included."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return shared / (sum(areas) - shared)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Bounds of a bool (h, w) mask as (x1, y1, x2, y2), both ends included."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _glyph(name: str, extent: float, rng: np.random.Generator) -> Image.Image:
    """A sprite whose longer side is ``extent`` pixels; mirrored, tilted, its light varied."""
    sprite = sprites()[name]
    scale = extent / max(sprite.size)
    size = [max(4, round(side * scale)) for side in sprite.size]
    sprite = sprite.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.5:
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(rng.uniform(0.8, 1.15))
        sprite.putalpha(alpha)
    return sprite


def _solid(sprite: Image.Image) -> np.ndarray:
    return np.asarray(sprite.getchannel("A")) > SOLID


def _silhouette(solid: np.ndarray, at, size: tuple[int, int]) -> np.ndarray:
    """A sprite's solid pixels, pasted at (x, y), as bool (h, w), clipped to the picture."""
    width, height = size
    mask = np.zeros((height, width), bool)
    x, y = at
    left, top = max(0, x), max(0, y)
    right, bottom = min(width, x + solid.shape[1]), min(height, y + solid.shape[0])
    if right > left and bottom > top:
        mask[top:bottom, left:right] = solid[top - y : bottom - y, left - x : right - x]
    return mask


def _place_pair(names, extent, size, rng):
    """Two sprites whose visible boxes overlap by IoU >= 0.5, both half visible, or None."""
    for _ in range(3):
        back = _glyph(names[0], extent, rng)
        front = _glyph(names[1], extent * rng.uniform(0.55, 0.9), rng)
        # Tried at a third of the resolution: this is the slow part of a scene.
        hind, fore = _solid(back)[1::3, 1::3], _solid(front)[1::3, 1::3]
        span = np.array(hind.shape[::-1])
        origin = np.array(fore.shape[::-1])
        frame = tuple(span + 2 * origin)
        behind = _silhouette(hind, origin, frame)
        for shift in rng.uniform(-0.45, 0.45, (30, 2)):
            at = origin + np.round((span - origin) / 2 + shift * span).astype(int)
            ahead = _silhouette(fore, at, frame)
            left = behind & ~ahead
            if left.sum() < 0.53 * behind.sum():
                continue
            if box_iou(mask_box(left), mask_box(ahead)) >= PAIR_IOU + 0.03:
                offset = 3 * (at - origin)
                return _into_picture([(back, (0, 0)), (front, tuple(offset))], size, rng)
    return None


def _into_picture(pair, size, rng):
    """Moves a pair as a whole to a random place where it fits the picture."""
    left, top = (min(at[i] for _, at in pair) for i in (0, 1))
    right = max(at[0] + sprite.width for sprite, at in pair)
    bottom = max(at[1] + sprite.height for sprite, at in pair)
    if right - left > size[0] or bottom - top > size[1]:
        return None
    dx = int(rng.integers(0, size[0] - (right - left) + 1)) - left
    dy = int(rng.integers(0, size[1] - (bottom - top) + 1)) - top
    return [(sprite, (int(x) + dx, int(y) + dy)) for sprite, (x, y) in pair]


def compose(split: str, number: int, sides: tuple[int, int] = (160, 320)) -> Scene:
    """Scene ``number`` of a split. ``sides``: range of the picture's sides in pixels."""
    rng = np.random.default_rng([SPLITS[split], number])
    width = int(rng.integers(sides[0], sides[1] + 1))
    height = int(np.clip(width * np.exp(rng.uniform(-0.5, 0.5)), *sides))
    size = (width, height)
    unit = float(np.sqrt(width * height))
    picture = background(size, rng)

    chosen = [NAMES[i] for i in rng.permutation(len(NAMES))[: int(rng.integers(2, 6))]]
    placed: list[tuple[str, Image.Image, tuple[int, int]]] = []
    is_pair = False
    if rng.random() < 0.6:
        pair = _place_pair(chosen[:2], unit * rng.uniform(0.34, 0.58), size, rng)
        if pair is not None:
            placed = [(n, *p) for n, p in zip(chosen[:2], pair, strict=True)]
            chosen, is_pair = chosen[2:], True
    if chosen and rng.random() < 0.3:  # several of one kind, for counting and listing
        chosen += [chosen[0]] * int(rng.integers(1, 3))
    for name in chosen:
        placed += _place_alone(name, placed, unit, size, rng)

    masks: list[np.ndarray] = []
    shares: list[int] = []
    for _, sprite, at in placed:
        picture.paste(sprite, at, sprite)
        solid = _solid(sprite)
        silhouette = _silhouette(solid, at, size)
        masks = [m & ~silhouette for m in masks] + [silhouette]
        shares.append(int(solid.sum()))
    objects = tuple(
        SceneObject(name, mask_box(mask), mask, float(mask.sum()) / share)
        for (name, _, _), mask, share in zip(placed, masks, shares, strict=True)
        if mask.any()
    )
    return Scene(picture, objects, (0, 1) if is_pair and _still_pair(objects) else None)


def _still_pair(objects) -> bool:
    """Later objects may have hidden a part of what was a pair when it was placed."""
    first, second = objects[:2]
    seen = min(first.visible, second.visible) >= HALF_VISIBLE
    return seen and box_iou(first.box, second.box) >= PAIR_IOU


def _place_alone(name, placed, unit, size, rng):
    """The sprite at a place where it hides little of the others; empty when none is found."""
    sprite = _glyph(name, unit * rng.uniform(0.2, 0.46), rng)
    over = 0.12  # a little may stick out of the picture
    for _ in range(12):
        x = int(rng.uniform(-over * sprite.width, size[0] - (1 - over) * sprite.width))
        y = int(rng.uniform(-over * sprite.height, size[1] - (1 - over) * sprite.height))
        mine = (x, y, x + sprite.width - 1, y + sprite.height - 1)
        if all(_overlap(mine, at, other) < 0.2 for _, other, at in placed):
            return [(name, sprite, (x, y))]
    return []


def _overlap(box, at, sprite) -> float:
    """Share of the smaller of two boxes that the other covers."""
    x1, y1 = at
    x2, y2 = x1 + sprite.width - 1, y1 + sprite.height - 1
    width = min(box[2], x2) - max(box[0], x1) + 1
    height = min(box[3], y2) - max(box[1], y1) + 1
    smaller = min((box[2] - box[0] + 1) * (box[3] - box[1] + 1), sprite.width * sprite.height)
    return max(0, width) * max(0, height) / smaller
