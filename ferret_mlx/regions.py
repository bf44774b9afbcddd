"""Regions of a picture -> coordinate text, mask and points.

Pixels of the upright picture, (x, y) = column, row; every size is (w, h). Masks are indexed
``[x, y]`` and have shape (w, h), which is how the released code builds them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .image import open_image
from .shapes import XY, Size, polygon_mask, stroke_mask

CANVAS = 1000
POINT_RADIUS = 5
POINTS_PER_REGION = 512


def coordinate(value: float, extent: int) -> int:
    """A pixel coordinate on the 1000 x 1000 canvas of the prompt, truncated.

    The ratio comes first, as in the released training and evaluation code: ``int(1000 * x / w)``
    gives one less for a few pairs, such as x = 87, w = 174.
    """
    return int(value * (float(CANVAS) / extent))


@dataclass(frozen=True)
class Point:
    """A point, 0 <= x < w and 0 <= y < h; its mask is the square window of 11 x 11 pixels."""

    x: float
    y: float

    def text(self, size: Size) -> str:
        """``[X, Y]`` on the canvas. Raises ValueError when the point is outside the picture."""
        self._check(size)
        return _bracket(self.x, self.y, size=size)

    def mask(self, size: Size) -> np.ndarray:
        """Bool (w, h), the window x-5..x+5, y-5..y+5 clipped to the picture."""
        self._check(size)
        x, y = int(self.x), int(self.y)
        # The paper says circle; the released code, and so the weights, say square.
        return _filled(size, x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS)

    def _check(self, size: Size) -> None:
        w, h = size
        _check_finite("Point", (self.x, self.y))
        if not (0 <= self.x < w and 0 <= self.y < h):
            raise ValueError(
                f"The point ({self.x:g}, {self.y:g}) is outside the picture of {w} x {h} pixels; "
                f"x must be from 0 to below {w}, y from 0 to below {h}."
            )


@dataclass(frozen=True)
class Box:
    """A box with both ends included, 0 <= x1 <= x2 <= w and 0 <= y1 <= y2 <= h.

    x2 = w is read as w - 1, y2 = h as h - 1, so that a whole-picture box can be written either
    way.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def text(self, size: Size) -> str:
        """``[X1, Y1, X2, Y2]`` on the canvas. Raises ValueError as described at ``mask``."""
        return _bracket(*self._inside(size), size=size)

    def mask(self, size: Size) -> np.ndarray:
        """Bool (w, h), columns int(x1)..int(x2) and rows int(y1)..int(y2), both included.

        Raises:
            ValueError: a corner is outside the picture, or x1 > x2 or y1 > y2.
        """
        return _filled(size, *(int(v) for v in self._inside(size)))

    def _inside(self, size: Size) -> tuple[float, float, float, float]:
        w, h = size
        box = (self.x1, self.y1, self.x2, self.y2)
        _check_finite("Box", box)
        shown = "({:g}, {:g}, {:g}, {:g})".format(*box)
        if self.x1 > self.x2 or self.y1 > self.y2:
            raise ValueError(
                f"The box {shown} has its corners swapped; "
                f"give x1,y1,x2,y2 with x1 <= x2 and y1 <= y2."
            )
        if not (0 <= self.x1 < w and 0 <= self.y1 < h and self.x2 <= w and self.y2 <= h):
            raise ValueError(
                f"The box {shown} reaches outside the picture of {w} x {h} pixels; "
                f"x must be from 0 to {w}, y from 0 to {h}."
            )
        x2 = w - 1 if self.x2 == w else self.x2
        y2 = h - 1 if self.y2 == h else self.y2
        return self.x1, self.y1, x2, y2


class FreeForm:
    """A region of any shape.

    Args:
        mask: array (h, w), true inside; bool, or integers where all but 0 is inside. Note the
            order: rows first, as pictures are stored. Other sizes here are (w, h).

    Raises:
        ValueError: the mask is not two-dimensional, not bool or integer, or has no true pixel.
    """

    def __init__(self, mask: np.ndarray):
        pixels = np.asarray(mask)
        if pixels.ndim != 2 or pixels.dtype.kind not in "biu":
            raise ValueError(
                f"A mask must be a bool array of shape (h, w), "
                f"got {pixels.dtype} of shape {pixels.shape}."
            )
        pixels = pixels.astype(bool)
        if not pixels.any():
            raise ValueError("The mask is empty; at least one pixel must be inside the region.")
        pixels.setflags(write=False)
        self.pixels = pixels

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FreeForm:
        """The pixels of a picture whose luminance is above 127; transparent ones are outside.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a readable picture, or no pixel is that bright.
        """
        pixels = np.asarray(open_image(path, background=0).convert("L")) > 127
        if not pixels.any():
            raise ValueError(
                f"The mask {os.fspath(path)} is empty; "
                f"paint the region white (luminance above 127) on black."
            )
        return cls(pixels)

    @classmethod
    def from_polygon(cls, points: Sequence[XY], size: Size) -> FreeForm:
        """A filled polygon, its outline included.

        Args:
            points: at least three (x, y) corners in pixels, 0 <= x <= w and 0 <= y <= h.
            size: (w, h) of the picture.
        """
        return cls(polygon_mask(points, size))

    @classmethod
    def from_stroke(cls, points: Sequence[XY], width: float, size: Size) -> FreeForm:
        """A pen stroke with round joints and ends; a single point gives a dot.

        Args:
            points: at least one (x, y) in pixels, 0 <= x <= w and 0 <= y <= h.
            width: of the pen in pixels, at least 1.
            size: (w, h) of the picture.
        """
        return cls(stroke_mask(points, width, size))

    def text(self, size: Size) -> str:
        """The mask's bounding box ``[X1, Y1, X2, Y2]`` on the canvas, last pixels included."""
        self._check(size)
        columns = np.flatnonzero(self.pixels.any(axis=0))
        rows = np.flatnonzero(self.pixels.any(axis=1))
        return _bracket(columns[0], rows[0], columns[-1], rows[-1], size=size)

    def mask(self, size: Size) -> np.ndarray:
        """Bool (w, h). Raises ValueError when the mask is not as large as the picture."""
        self._check(size)
        return self.pixels.T

    def _check(self, size: Size) -> None:
        h, w = self.pixels.shape
        if (w, h) != tuple(size):
            raise ValueError(
                f"The mask has {w} x {h} pixels, but the upright picture has "
                f"{size[0]} x {size[1]}; draw the mask at the picture's size."
            )

    def __repr__(self) -> str:
        h, w = self.pixels.shape
        return f"FreeForm({np.count_nonzero(self.pixels)} of {w} x {h} pixels)"


Region: TypeAlias = Point | Box | FreeForm


def describe_regions(regions: Sequence[Region], size: Size) -> tuple[list[str], list[np.ndarray]]:
    """Coordinate texts and (w, h) masks of all regions. A ValueError says which region it is."""
    texts, masks = [], []
    for index, region in enumerate(regions):
        if not isinstance(region, Point | Box | FreeForm):
            raise ValueError(
                f"[region{index}] must be a Point, Box or FreeForm, got {type(region).__name__}."
            )
        try:
            texts.append(region.text(size))
            masks.append(region.mask(size))
        except ValueError as error:
            raise ValueError(f"[region{index}]: {error}") from error
    return texts, masks


def sample_points(
    mask: np.ndarray, rng: np.random.Generator, count: int = POINTS_PER_REGION
) -> np.ndarray:
    """Points of a mask for the visual sampler, float32 (count, 2).

    Each is a mask pixel as (x / w, y / h), so 0 <= value < 1. A mask of more than ``count`` pixels
    gives a random choice without replacement; a smaller one gives all its pixels in ``[x, y]``
    raster order, followed by random repeats (FERRET section 3.2, as the released code draws them).

    Args:
        mask: bool (w, h), indexed [x, y].
        rng: the source of every random choice.
    """
    w, h = mask.shape
    inside = np.flatnonzero(mask)
    if inside.size == 0:
        raise ValueError("A mask without pixels has no points to sample.")
    if inside.size > count:
        inside = rng.choice(inside, count, replace=False)
    elif inside.size < count:
        inside = np.concatenate([inside, rng.choice(inside, count - inside.size)])
    x, y = np.divmod(inside, h)
    return np.stack([x / w, y / h], axis=1).astype(np.float32)


def _bracket(*values: float, size: Size) -> str:
    canvas = (coordinate(value, size[i % 2]) for i, value in enumerate(values))
    return f"[{', '.join(map(str, canvas))}]"


def _filled(size: Size, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[max(x1, 0) : x2 + 1, max(y1, 0) : y2 + 1] = True
    return mask


def _check_finite(kind: str, values: Sequence[float]) -> None:
    for value in values:
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"{kind} takes finite numbers of pixels, got {value!r}.")
