"""Farthest-point sampling on a GPU: one kernel launch for all regions of a stage.

Each region has one SIMD group of 32 threads (a warp on CUDA). A thread keeps some of the points and
their squared distances to the nearest chosen point in registers, so a step needs no barrier: it is
a pass over the registers and an arg-max over the 32 threads. All indices are those of
`geometry.farthest_points`: rounded products and sum, the first index on ties.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import geometry

LANES = 32

# Metal's contraction would change the chosen points. The pragma forbids it; fma(x, x, 0) is x * x
# rounded, and keeps its rounding where a compiler does not know the pragma.
METAL_HEADER = "#pragma METAL fp contract(off)\n"
METAL_SOURCE = """
    const uint region = threadgroup_position_in_grid.x;
    const uint lane = thread_position_in_threadgroup.x;
    float x[PER_LANE], y[PER_LANE], nearest[PER_LANE];
#pragma unroll
    for (uint k = 0; k < PER_LANE; k++) {
        const uint i = k * 32 + lane;
        const bool inside = i < POINTS;
        x[k] = inside ? points[(region * POINTS + i) * 2] : 0.0f;
        y[k] = inside ? points[(region * POINTS + i) * 2 + 1] : 0.0f;
        nearest[k] = inside ? INFINITY : -1.0f;
    }
    uint current = starts[region];
    for (uint step = 0; step < KEPT; step++) {
        if (lane == 0) {
            chosen[region * KEPT + step] = current;
        }
        const float cx = points[(region * POINTS + current) * 2];
        const float cy = points[(region * POINTS + current) * 2 + 1];
        float best = -1.0f;
        uint best_index = 0;
#pragma unroll
        for (uint k = 0; k < PER_LANE; k++) {
            const float dx = x[k] - cx;
            const float dy = y[k] - cy;
            const float distance = fma(dx, dx, 0.0f) + fma(dy, dy, 0.0f);
            nearest[k] = distance < nearest[k] ? distance : nearest[k];
            if (nearest[k] > best) {
                best = nearest[k];
                best_index = k * 32 + lane;
            }
        }
        const float farthest = simd_max(best);
        current = simd_min(best == farthest ? best_index : 0xffffffffu);
    }
"""
CUDA_SOURCE = """
    const unsigned region = blockIdx.x;
    const unsigned lane = threadIdx.x;
    float x[PER_LANE], y[PER_LANE], nearest[PER_LANE];
#pragma unroll
    for (unsigned k = 0; k < PER_LANE; k++) {
        const unsigned i = k * 32 + lane;
        const bool inside = i < POINTS;
        x[k] = inside ? points[(region * POINTS + i) * 2] : 0.0f;
        y[k] = inside ? points[(region * POINTS + i) * 2 + 1] : 0.0f;
        nearest[k] = inside ? __int_as_float(0x7f800000) : -1.0f;
    }
    unsigned current = starts[region];
    for (unsigned step = 0; step < KEPT; step++) {
        if (lane == 0) {
            chosen[region * KEPT + step] = current;
        }
        const float cx = points[(region * POINTS + current) * 2];
        const float cy = points[(region * POINTS + current) * 2 + 1];
        float best = -1.0f;
        unsigned best_index = 0;
#pragma unroll
        for (unsigned k = 0; k < PER_LANE; k++) {
            const float dx = __fsub_rn(x[k], cx);
            const float dy = __fsub_rn(y[k], cy);
            const float distance = __fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy));
            nearest[k] = distance < nearest[k] ? distance : nearest[k];
            if (nearest[k] > best) {
                best = nearest[k];
                best_index = k * 32 + lane;
            }
        }
        for (unsigned offset = 16; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, best, offset);
            const unsigned other_index = __shfl_xor_sync(0xffffffffu, best_index, offset);
            if (other > best || (other == best && other_index < best_index)) {
                best = other;
                best_index = other_index;
            }
        }
        current = best_index;
    }
"""

FarthestPoints = Callable[[mx.array, int, mx.array], mx.array]


def farthest_points_kernel() -> FarthestPoints | None:
    """The kernel of the GPU that MLX computes on; None on the CPU, or where it does not work.

    It takes (R, N, 2) float32 points, how many to keep, and (R,) starts, and returns (R, kept)
    int32, as `geometry.farthest_points`.
    """
    if mx.default_device().type != mx.gpu:
        return None
    return _checked_kernel("metal" if mx.metal.is_available() else "cuda")


@functools.cache
def _checked_kernel(backend: str) -> FarthestPoints | None:
    """Build and try the kernel once; a warning says why it is not used."""
    try:
        kernel = build_kernel(backend)
        fault = None if _agrees(kernel) else "gives other indices than NumPy"
    except Exception as error:
        fault = f"does not run ({type(error).__name__}: {error})"
    if fault is None:
        return kernel
    warnings.warn(
        f"The {backend} kernel for farthest points {fault}; the CPU does this step instead.",
        RuntimeWarning,
    )
    return None


def build_kernel(backend: str) -> FarthestPoints:
    """backend: "metal" or "cuda"."""
    names: dict[str, Any] = {
        "name": "ferret_farthest_points",
        "input_names": ["points", "starts"],
        "output_names": ["chosen"],
    }
    if backend == "metal":
        kernel: Any = mx.fast.metal_kernel(**names, source=METAL_SOURCE, header=METAL_HEADER)
    else:
        kernel = mx.fast.cuda_kernel(**names, source=CUDA_SOURCE)

    def farthest_points(points: mx.array, count: int, starts: mx.array) -> mx.array:
        regions, size = points.shape[:2]
        (chosen,) = kernel(
            inputs=[points.astype(mx.float32), starts.astype(mx.uint32)],
            template=[("POINTS", size), ("KEPT", count), ("PER_LANE", -(-size // LANES))],
            grid=(regions * LANES, 1, 1),
            threadgroup=(LANES, 1, 1),
            output_shapes=[(regions, count)],
            output_dtypes=[mx.int32],
        )
        return chosen

    return farthest_points


def nearest_neighbors(points: mx.array, centers: mx.array, count: int) -> mx.array:
    """As `geometry.nearest_neighbors`, nearest first: (R, N, 2), (R, M) -> (R, M, count) int32."""
    kept = mx.take_along_axis(points, centers[..., None], axis=1)
    # Products and sum are separate MLX operations and so rounded one by one.
    difference = kept[:, :, None] - points[:, None]
    square = difference * difference
    distance = square[..., 0] + square[..., 1]
    keys = distance.view(mx.uint32).astype(mx.uint64) << 32
    keys = keys | mx.arange(points.shape[1], dtype=mx.uint64)
    return (mx.sort(keys, axis=-1)[..., :count] & 0xFFFFFFFF).astype(mx.int32)


def sampling_indices(
    points: mx.array,
    stages: Sequence[tuple[int, int]],
    farthest_points: FarthestPoints,
    starts: Sequence[Any] | None = None,
    neighbors: Sequence[Any] | None = None,
) -> list[tuple[mx.array, mx.array]]:
    """`geometry.sampling_indices` without leaving the device."""
    chosen = []
    for stage, (kept, near) in enumerate(stages):
        regions, count = points.shape[:2]
        start = mx.zeros(regions, dtype=mx.uint32)
        if starts is not None:
            start = mx.array(geometry.checked_indices(starts, stage, "starts", (regions,), count))
        centers = farthest_points(points, kept, start)
        if neighbors is not None:
            shape = (regions, kept, near)
            given = geometry.checked_indices(neighbors, stage, "neighbors", shape, count)
            neighborhood = mx.array(given)
        else:
            neighborhood = nearest_neighbors(points, centers, near)
        chosen.append((centers, neighborhood))
        points = mx.take_along_axis(points, centers[..., None], axis=1)
    return chosen


def _agrees(farthest_points: FarthestPoints) -> bool:
    """Whether the indices are NumPy's, for points that tie often and for some that do not."""
    rng = np.random.default_rng(0)
    points = rng.random((4, 512, 2), dtype=np.float32)
    points[1] = np.round(points[1] * 20) / 20
    points[2] = points[2, :1]
    stages = ((128, 24), (32, 24))
    starts = [rng.integers(0, 512, 4), rng.integers(0, 128, 4)]
    ours = sampling_indices(mx.array(points), stages, farthest_points, starts)
    expected = geometry.sampling_indices(points, stages, starts)
    return all(
        np.array_equal(np.array(centers), own_centers)
        and np.array_equal(np.sort(np.array(near), axis=-1), own_near)
        for (centers, near), (own_centers, own_near) in zip(ours, expected, strict=True)
    )
