"""Intersection over union as the released evaluations compute it."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike


def box_iou(boxes: np.ndarray, truth: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """(N, 4) and (M, 4) boxes (x1, y1, x2, y2) in pixels -> (N, M) of this dtype.

    No pixel is added to the sides, and a box with swapped corners keeps its signed area, as in
    the release. Where the union is empty the value is NaN, which is no hit.
    """
    a = np.asarray(boxes, dtype).reshape(-1, 1, 4)
    b = np.asarray(truth, dtype).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(min=0).prod(-1)
    union = _area(a) + _area(b) - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        return shared / union


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
