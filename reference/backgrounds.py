"""Procedural backgrounds: plain, gradients, sky and ground, noise, stripes, checks, clutter."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COARSE = 40  # backgrounds are drawn this small and enlarged: they are meant to be soft


def _colour(rng) -> np.ndarray:
    """A colour, rather muted than loud, as (3,) float in 0..255."""
    grey = rng.uniform(20, 245)
    return np.clip(grey + rng.normal(0, 38, 3), 0, 255)


def _plain(rng):
    return np.broadcast_to(_colour(rng), (COARSE, COARSE, 3))


def _gradient(rng):
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0 : 1 : COARSE * 1j, 0 : 1 : COARSE * 1j]
    t = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.5
    return _blend(_colour(rng), _colour(rng), t)


def _radial(rng):
    y, x = np.mgrid[0 : 1 : COARSE * 1j, 0 : 1 : COARSE * 1j]
    t = np.hypot(x - rng.random(), y - rng.random())
    return _blend(_colour(rng), _colour(rng), t)


def _ground(rng):
    y = np.mgrid[0 : 1 : COARSE * 1j, 0 : 1 : COARSE * 1j][0]
    horizon = rng.uniform(0.3, 0.75)
    sky, ground = _blend(_colour(rng), _colour(rng), y), _blend(_colour(rng), _colour(rng), 1 - y)
    return np.where((y < horizon)[..., None], sky, ground)


def _noise(rng):
    cells = int(rng.integers(3, 10))
    small = np.clip(_colour(rng) + rng.normal(0, 30, (cells, cells, 3)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((COARSE, COARSE), Image.Resampling.BICUBIC))


def _stripes(rng):
    y, x = np.mgrid[0:COARSE, 0:COARSE]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
    on = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period) > 0
    return _close_pair(on, rng)


def _checks(rng):
    y, x = np.mgrid[0:COARSE, 0:COARSE]
    side = int(rng.integers(3, 12))
    return _close_pair((x // side + y // side) % 2 == 0, rng)


def _clutter(rng):
    picture = Image.fromarray(np.uint8(_gradient(rng)))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 12))):
        x, y = rng.uniform(-5, COARSE, 2)
        w, h = rng.uniform(2, 18, 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(c) for c in _colour(rng)))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))))


def _blend(a, b, t):
    return a + (b - a) * np.clip(t, 0, 1)[..., None]


def _close_pair(on, rng):
    first = _colour(rng)
    return np.where(on[..., None], first, np.clip(first + rng.normal(0, 30, 3), 0, 255))


KINDS = (_plain, _gradient, _radial, _ground, _noise, _stripes, _checks, _clutter)


def background(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """An RGB picture of (w, h) pixels."""
    drawn = KINDS[int(rng.integers(len(KINDS)))](rng)
    drawn = np.clip(drawn + rng.normal(0, rng.uniform(0, 4), drawn.shape), 0, 255)
    return Image.fromarray(np.uint8(drawn)).resize(size, Image.Resampling.BILINEAR)
