"""Masks of the benchmarks, and regions whose coordinate text does not follow from the mask."""

from __future__ import annotations

import numpy as np

from ..regions import POINT_RADIUS, FreeForm
from .benchmark import Size


class GivenRegion(FreeForm):
    """A region with a text and a mask of its own.

    Args:
        text: what stands in front of ``<region_fea>``, such as ``[249, 500]``; may be empty.
        mask: bool (w, h), indexed [x, y]; not necessarily of the picture's size.

    Raises ValueError for a mask without pixels.
    """

    def __init__(self, text: str, mask: np.ndarray):
        super().__init__(mask.T)
        self._text = text

    def text(self, size: Size) -> str:
        """The given text, whatever the picture's size."""
        return self._text

    def mask(self, size: Size) -> np.ndarray:
        """The given mask, whatever the picture's size."""
        return self.pixels.T


def point_mask(x: float, y: float, size: Size) -> np.ndarray:
    """Bool (w, h), true in the window around a point; each bound is clipped, then truncated."""
    columns, rows = (
        # A negative end would count from the other end.
        slice(int(max(0, v - POINT_RADIUS)), int(max(0, min(extent, v + POINT_RADIUS + 1))))
        for v, extent in zip((x, y), size, strict=True)
    )
    return _filled(columns, rows, size)


def box_mask(box: tuple[int, int, int, int], size: Size) -> np.ndarray:
    """Bool (w, h), true from corner to corner, both included; box: whole pixels.

    Raises ValueError for a negative corner, which would count from the other end.
    """
    x1, y1, x2, y2 = box
    if min(box) < 0:
        raise ValueError(f"The box {list(box)} begins outside the picture.")
    return _filled(slice(x1, x2 + 1), slice(y1, y2 + 1), size)


def canvas_text(*values: int) -> str:
    """``[X, Y]`` or ``[X1, Y1, X2, Y2]``."""
    return f"[{', '.join(map(str, values))}]"


def _filled(columns: slice, rows: slice, size: Size) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[columns, rows] = True
    return mask
