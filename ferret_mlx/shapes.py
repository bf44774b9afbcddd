"""Polygons and pen strokes -> bool masks (h, w)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Size: TypeAlias = tuple[int, int]
XY: TypeAlias = tuple[float, float]


def polygon_mask(points: Sequence[XY], size: Size) -> np.ndarray:
    """The inside and the outline of a polygon; see ``FreeForm.from_polygon``."""
    corners = _inside_points("polygon", points, size, at_least=3)
    canvas = Image.new("1", size)
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in corners], fill=1, outline=1)
    return np.asarray(canvas)


def stroke_mask(points: Sequence[XY], width: float, size: Size) -> np.ndarray:
    """All pixels at most ``width / 2`` from the path; see ``FreeForm.from_stroke``."""
    if not (math.isfinite(width) and width >= 1):
        raise ValueError(f"A stroke must be at least 1 pixel wide, got {width:g}.")
    path = _inside_points("stroke", points, size, at_least=1)
    pixels = np.zeros((size[1], size[0]), dtype=bool)
    radius = min(width / 2, sum(size))  # beyond any pixel, and still a whole number of them
    for start, end in pairwise(path if len(path) > 1 else [*path, *path]):
        _draw_segment(pixels, start, end, radius)
    return pixels


def _inside_points(kind: str, points: Sequence[XY], size: Size, at_least: int) -> np.ndarray:
    w, h = size
    try:
        path = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A {kind} takes a list of (x, y) pairs, got {points!r}.") from error
    if len(path) < at_least:
        raise ValueError(f"A {kind} needs at least {at_least} points, got {len(path)}.")
    outside = ~((path >= 0) & (path <= (w, h))).all(axis=1)
    if outside.any():
        x, y = path[outside][0]
        raise ValueError(
            f"The {kind} point ({x:g}, {y:g}) is outside the picture of {w} x {h} pixels; "
            f"x must be from 0 to {w}, y from 0 to {h}."
        )
    return np.minimum(path, (w - 1, h - 1))


def _draw_segment(pixels: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Set every pixel of the (h, w) array whose distance from the segment is at most radius."""
    low = np.maximum(np.floor(np.minimum(start, end) - radius).astype(int), 0)
    high = np.ceil(np.maximum(start, end) + radius).astype(int) + 1
    rows, columns = slice(low[1], high[1]), slice(low[0], high[0])
    part = pixels[rows, columns]
    # (rows, columns, 2) offsets of the pixels from the start
    y, x = np.ogrid[low[1] : low[1] + part.shape[0], low[0] : low[0] + part.shape[1]]
    dx, dy = end - start
    length = dx * dx + dy * dy
    along = ((x - start[0]) * dx + (y - start[1]) * dy) / (length or 1.0)
    along = np.clip(along, 0, 1)
    distance = (x - start[0] - along * dx) ** 2 + (y - start[1] - along * dy) ** 2
    part |= distance <= radius * radius
