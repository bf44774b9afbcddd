"""Features + points -> one vector per region: the spatial-aware visual sampler.

Ferret paper (arXiv 2310.07704), section 3.1. Where the released code differs from the paper the
code is followed: the released weights were trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import SamplerConfig
from .geometry import sampling_indices


class Aggregation(nn.Module):
    """Parameters of a block's 1x1 convolution (here a Linear) and of its layer norm."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__()
        self.net = [nn.Linear(input_dims, output_dims)]
        self.norm = nn.LayerNorm(output_dims, eps=1e-5)


class RegionSampler(nn.Module):
    """Pools the image features around a region's points into one vector of the LLM's width.

    The blocks compute in float32, the two projections at the end in the weights' dtype.
    Parameters carry the released names after `region_geo_sampler.`.
    """

    def __init__(self, width: int, output_width: int, grid: tuple[int, int], config: SamplerConfig):
        super().__init__()
        self.width, self.output_width = width, output_width
        self.grid = grid
        self.config = config
        local_width = width + 2  # a feature and its (x, y)
        self.diff_projector_list = [nn.Linear(local_width, local_width) for _ in config.stages]
        self.agg_projector_list = [Aggregation(2 * local_width, width) for _ in config.stages]
        self.flatten_projector = nn.Linear(config.stages[-1][0] * width, width)
        self.dim_projector = nn.Linear(width, output_width)

    def __call__(
        self,
        features: mx.array,
        region_points: mx.array,
        starts: Sequence[mx.array] | None = None,
        neighbors: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """All regions of one image in one pass.

        features: (1, rows * columns, C), as the vision tower gives them.
        region_points: (R, 512, 2) float32, (x, y) normalised to [0, 1).
        starts: per block (R,) ints, the first farthest-point index; 0 when left out (the
            released code draws it).
        neighbors: per block (R, points kept, neighbours) ints; computed when left out.

        Returns (R, D). Raises ValueError for arrays of another shape.
        """
        self._check_shapes(features, region_points)
        if region_points.shape[0] == 0:
            return mx.zeros((0, self.output_width), dtype=self.dtype)
        stages = sampling_indices(
            np.array(region_points, dtype=np.float32), self.config.stages, starts, neighbors
        )
        points = region_points.astype(mx.float32)
        x = self.features_at(features, points)
        for stage, (centers, neighborhood) in enumerate(stages):
            points, x = self.pool(stage, points, x, mx.array(centers), mx.array(neighborhood))
        # (R, 32, C) -> (R, 32 * C) -> (R, C) -> (R, D)
        return self.dim_projector(self.flatten_projector(x.flatten(1).astype(self.dtype)))

    @property
    def dtype(self) -> mx.Dtype:
        """That of the matrix products; read off a layer norm, which is never quantized."""
        return self.agg_projector_list[0].norm.weight.dtype

    def features_at(self, features: mx.array, points: mx.array) -> mx.array:
        """Bilinear samples, corners aligned: (1, rows * columns, C), (R, N, 2) -> (R, N, C)."""
        columns = self.grid[1]
        flat_map = features[0].astype(mx.float32)
        row, column = region_read_order(points, self.grid, self.config.read_order)
        # The last interval takes the far edge along, so that the sum below never leaves the map.
        top = mx.minimum(mx.floor(row), self.grid[0] - 2)
        left = mx.minimum(mx.floor(column), self.grid[1] - 2)
        down, right = row - top, column - left
        index = (top * columns + left).astype(mx.int32)
        return (
            flat_map[index] * ((1 - down) * (1 - right))[..., None]
            + flat_map[index + 1] * ((1 - down) * right)[..., None]
            + flat_map[index + columns] * (down * (1 - right))[..., None]
            + flat_map[index + columns + 1] * (down * right)[..., None]
        )

    def pool(
        self, stage: int, points: mx.array, x: mx.array, centers: mx.array, neighborhood: mx.array
    ) -> tuple[mx.array, mx.array]:
        """One block: (R, N, 2) points and (R, N, C) features -> (R, M, 2) and (R, M, C).

        centers: (R, M) and neighborhood: (R, M, K), both indices into N.

        With l = [feature, x, y] of a neighbour and a = that of the kept point, each pair gives
        LayerNorm(ReLU(conv([diff(l - a), a]))), of which the maximum (or mean) over K is kept.
        """
        near, anchor = self._linear_parts(stage, mx.concatenate([x, points], axis=-1))
        norm = self.agg_projector_list[stage].norm
        pooled = []
        # A region at a time: all pairs of many regions would take gigabytes at full size.
        for region in range(points.shape[0]):
            kept = centers[region]
            # (M, K, C) + (M, 1, C)
            pairs = near[region, neighborhood[region]] + anchor[region, kept][:, None]
            pairs = norm(nn.relu(pairs))
            pooled.append(pairs.max(axis=1) if self.config.pooler_mode == "max" else pairs.mean(1))
            mx.async_eval(pooled[-1])  # left lazy, the regions' pairs would come to life together
        return mx.take_along_axis(points, centers[..., None], axis=1), mx.stack(pooled)

    def _linear_parts(self, stage: int, local: mx.array) -> tuple[mx.array, mx.array]:
        """(R, N, C + 2) float32 -> what a point adds to a pair as neighbour, and as kept point.

        Up to the ReLU a block is linear. With conv = [A1 | A2] and diff = (W, b):
        conv([diff(l - a), a]) = A1 W l + (A2 a - A1 W a + A1 b + bias), so both maps are applied
        to each point once, not to each pair. The two parts nearly cancel: float32 in any case.
        """
        diff, conv = self.diff_projector_list[stage], self.agg_projector_list[stage].net[0]
        diff_weight, diff_bias, weight, bias = (
            value.astype(mx.float32) for value in (diff.weight, diff.bias, conv.weight, conv.bias)
        )
        first, second = mx.split(weight, 2, axis=1)
        near = local @ (first @ diff_weight).T
        return near, local @ second.T - near + (first @ diff_bias + bias)

    def _check_shapes(self, features: mx.array, region_points: mx.array) -> None:
        expected = (1, self.grid[0] * self.grid[1], self.width)
        if features.shape != expected:
            raise ValueError(f"features have shape {features.shape}, expected {expected}.")
        count = self.config.num_points
        if region_points.ndim != 3 or region_points.shape[1:] != (count, 2):
            raise ValueError(
                f"region_points have shape {region_points.shape}, expected (regions, {count}, 2)."
            )


def region_read_order(
    points: mx.array, grid: tuple[int, int], order: str
) -> tuple[mx.array, mx.array]:
    """Where in the feature map a point is read: (..., 2) normalised (x, y) -> row, column.

    The released code reads the map transposed: x runs along the rows. Its weights were trained
    that way, so "released" is the order to use; "upright" is for experiments.
    """
    x, y = points[..., 0], points[..., 1]
    along_rows, along_columns = (x, y) if order == "released" else (y, x)
    return along_rows * (grid[0] - 1), along_columns * (grid[1] - 1)
