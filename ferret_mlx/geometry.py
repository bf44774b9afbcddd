"""Points -> indices: farthest-point sampling and nearest neighbours, all regions at once.

This is the definition, and what a CPU runs; `geometry_kernels` does the same on a GPU.

Both depend on the points alone, never on features, so they can run before the image is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distance of (..., 2) float32 points: two rounded products and a rounded sum.

    NumPy never contracts these to a fused multiply-add. Contraction changes which points are
    the farthest, so any other implementation has to switch it off.
    """
    difference = a - b
    x, y = difference[..., 0], difference[..., 1]
    return x * x + y * y


def farthest_points(points: np.ndarray, count: int, starts: np.ndarray) -> np.ndarray:
    """Indices of `count` points, each the farthest from those before it (first on ties).

    points: (R, N, 2) float32; starts: (R,) ints, the first index of each row.
    Returns (R, count) int32.
    """
    points = np.asarray(points, dtype=np.float32)
    rows = np.arange(len(points))
    chosen = np.empty((len(points), count), dtype=np.int32)
    nearest = np.full(points.shape[:2], np.inf, dtype=np.float32)
    farthest = np.asarray(starts)
    for step in range(count):
        chosen[:, step] = farthest
        distance = squared_distance(points, points[rows, farthest][:, None])
        nearest = np.minimum(nearest, distance)
        farthest = nearest.argmax(axis=1)
    return chosen


def nearest_neighbors(points: np.ndarray, centers: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` points nearest to each centre, itself included, ascending.

    points: (R, N, 2) float32; centers: (R, M) indices into N. Returns (R, M, count) int32.
    Of equally near points the lower index is taken (the released code leaves that open).
    """
    points = np.asarray(points, dtype=np.float32)
    kept = np.take_along_axis(points, np.asarray(centers)[..., None], axis=1)
    # (R, M, 1, 2) against (R, 1, N, 2) -> (R, M, N)
    distance = squared_distance(kept[:, :, None], points[:, None])
    # Bits of non-negative floats sort like the floats: distance and index make one unique key.
    keys = distance.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(points.shape[1], dtype=np.uint64)
    nearest = np.partition(keys, count - 1, axis=-1)[..., :count]
    return np.sort(nearest.astype(np.uint32), axis=-1).astype(np.int32)


def sampling_indices(
    points: np.ndarray,
    stages: Sequence[tuple[int, int]],
    starts: Sequence[Any] | None = None,
    neighbors: Sequence[Any] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per block the points kept, (R, kept), and their neighbours, (R, kept, near), as indices.

    points: (R, N, 2) float32; stages: (kept, near) per block, where each block chooses among the
    points that the one before it kept. `starts` and `neighbors` (an array per block) replace
    the first farthest-point index (0) and the computed neighbours. Raises ValueError for a wrong
    shape or an index that is out of range.
    """
    chosen = []
    for stage, (kept, near) in enumerate(stages):
        regions, count = points.shape[:2]
        start = np.zeros(regions, np.int32)
        if starts is not None:
            start = checked_indices(starts, stage, "starts", (regions,), count)
        centers = farthest_points(points, kept, start)
        if neighbors is not None:
            neighborhood = checked_indices(
                neighbors, stage, "neighbors", (regions, kept, near), count
            )
        else:
            neighborhood = nearest_neighbors(points, centers, near)
        chosen.append((centers, neighborhood))
        points = np.take_along_axis(points, centers[..., None], axis=1)
    return chosen


def checked_indices(
    given: Sequence[Any], stage: int, name: str, shape: tuple[int, ...], count: int
) -> np.ndarray:
    """The given array of a block as int32; raises ValueError as `sampling_indices` says."""
    if stage >= len(given):
        raise ValueError(f"{name} holds {len(given)} arrays, expected one for each block.")
    indices = np.array(given[stage])
    if indices.shape != shape or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"{name}[{stage}] is {indices.dtype} of shape {indices.shape}, "
            f"expected integers of shape {shape}."
        )
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(f"{name}[{stage}] has indices outside of 0..{count - 1}.")
    return indices.astype(np.int32)
