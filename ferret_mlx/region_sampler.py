"""Features + points -> one vector per region: the spatial-aware visual sampler.

Ferret paper (arXiv 2310.07704), section 3.1. Where the released code differs from the paper the
code is followed: the released weights were trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import geometry, geometry_kernels
from .config import SamplerConfig
from .folding import Folded, fold

PART_BYTES = 2**22


class Aggregation(nn.Module):
    """Parameters of a block's 1x1 convolution (here a Linear) and of its layer norm."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__()
        self.net = [nn.Linear(input_dims, output_dims)]
        self.norm = nn.LayerNorm(output_dims, eps=1e-5)
        self.folded: Folded | None = None  # with the block's other map; no parameter


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
        regions = region_points.shape[0]
        if regions == 0:
            return mx.zeros((0, self.output_width), dtype=self.dtype)
        points = region_points.astype(mx.float32)
        stages = self._indices(points, starts, neighbors)
        centers, neighborhood = stages[0]
        if self.maps_the_grid(regions):
            points, x = self.pool_grid(features, points, centers, neighborhood)
        else:
            x = self.features_at(features, points)
            points, x = self.pool(0, points, x, centers, neighborhood)
        for stage, (centers, neighborhood) in enumerate(stages[1:], start=1):
            points, x = self.pool(stage, points, x, centers, neighborhood)
        # (R, 32, C) -> (R, 32 * C) -> (R, C) -> (R, D)
        return self.dim_projector(self.flatten_projector(x.flatten(1).astype(self.dtype)))

    @property
    def dtype(self) -> mx.Dtype:
        """That of the matrix products; read off a layer norm, which is never quantized."""
        return self.agg_projector_list[0].norm.weight.dtype

    def maps_the_grid(self, regions: int) -> bool:
        """Whether the first block's maps cost less on the feature map than on all points.

        Bilinear weights sum to 1, so the maps may come before or after the interpolation. The
        neighbours' map is needed at every point, the kept points' at those alone.
        """
        rows, columns = self.grid
        return 2 * rows * columns <= regions * (self.config.num_points + self.config.stages[0][0])

    def features_at(self, features: mx.array, points: mx.array) -> mx.array:
        """Bilinear samples, corners aligned: (1, rows * columns, F), (R, N, 2) -> (R, N, F)."""
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
        `pool_pair_by_pair` is the same, word for word.
        """
        folded = self.folded(stage)
        kept = mx.take_along_axis(points, centers[..., None], axis=1)
        kept_x = mx.take_along_axis(x, centers[..., None], axis=1)
        near = x @ folded.near.T + points @ folded.near_xy.T
        anchor = kept_x @ folded.kept.T + kept @ folded.kept_xy.T + folded.bias
        return kept, self._pool_pairs(stage, near, anchor, neighborhood)

    def pool_grid(
        self, features: mx.array, points: mx.array, centers: mx.array, neighborhood: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The first block with its maps applied to the feature map: see `pool`."""
        folded = self.folded(0)
        flat_map = features.astype(mx.float32)
        near_map, kept_map = flat_map @ folded.near.T, flat_map @ folded.kept.T
        kept = mx.take_along_axis(points, centers[..., None], axis=1)
        pooled = []
        for part in self._parts(points.shape[0], points.shape[1]):
            near = self.features_at(near_map, points[part]) + points[part] @ folded.near_xy.T
            anchor = self.features_at(kept_map, kept[part]) + kept[part] @ folded.kept_xy.T
            pooled.append(self._pool_pairs(0, near, anchor + folded.bias, neighborhood[part]))
        return kept, mx.concatenate(pooled)

    def folded(self, stage: int) -> Folded:
        """The linear maps of a block, folded at their first use and again when weights change."""
        diff, aggregation = self.diff_projector_list[stage], self.agg_projector_list[stage]
        conv = aggregation.net[0]
        weights = (diff.weight, diff.bias, conv.weight, conv.bias)
        known = aggregation.folded
        if known is None or any(a is not b for a, b in zip(known.weights, weights, strict=True)):
            known = aggregation.folded = fold(weights)
        return known

    def _pool_pairs(
        self, stage: int, near: mx.array, anchor: mx.array, neighborhood: mx.array
    ) -> mx.array:
        """(R, N, C) by neighbour, (R, M, C) by kept point, (R, M, K) indices -> (R, M, C)."""
        norm = self.agg_projector_list[stage].norm
        pooled = []
        for part in self._parts(neighborhood.shape[0], neighborhood[0].size):
            region = mx.arange(part.start, part.stop)[:, None, None]
            # (r, M, K, C) + (r, M, 1, C)
            pairs = near[region, neighborhood[part]] + anchor[part][:, :, None]
            pairs = norm(nn.relu(pairs))
            pooled.append(pairs.max(axis=2) if self.config.pooler_mode == "max" else pairs.mean(2))
            mx.async_eval(pooled[-1])  # left lazy, all parts' pairs would come to life together
        return mx.concatenate(pooled)

    def _parts(self, regions: int, rows: int) -> list[slice]:
        """Regions in parts whose arrays of (rows, C) float32 each stay small, of one at least."""
        size = max(1, PART_BYTES // (rows * self.width * mx.float32.size))
        return [slice(i, min(i + size, regions)) for i in range(0, regions, size)]

    def _indices(
        self,
        points: mx.array,
        starts: Sequence[mx.array] | None,
        neighbors: Sequence[mx.array] | None,
    ) -> list[tuple[mx.array, mx.array]]:
        """Per block the points kept and their neighbours, by the GPU's kernel where it works."""
        if (kernel := geometry_kernels.farthest_points_kernel()) is not None:
            return geometry_kernels.sampling_indices(
                points, self.config.stages, kernel, starts, neighbors
            )
        host = geometry.sampling_indices(np.array(points), self.config.stages, starts, neighbors)
        return [(mx.array(centers), mx.array(near)) for centers, near in host]

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


def pool_pair_by_pair(
    sampler: RegionSampler,
    stage: int,
    points: mx.array,
    x: mx.array,
    centers: mx.array,
    neighborhood: mx.array,
) -> tuple[mx.array, mx.array]:
    """`RegionSampler.pool` as it is defined and was trained; it multiplies tens of times as often.

    Both maps run for every pair of a kept point and a neighbour. Tests and benchmarks compare.
    """
    region = mx.arange(points.shape[0])[:, None]
    local = mx.concatenate([x, points], axis=-1)
    anchor = local[region, centers][:, :, None]
    difference = local[region[..., None], neighborhood] - anchor
    projected = sampler.diff_projector_list[stage](difference)
    anchor = mx.broadcast_to(anchor, projected.shape)
    aggregation = sampler.agg_projector_list[stage]
    hidden = aggregation.net[0](mx.concatenate([projected, anchor], axis=-1))
    hidden = aggregation.norm(nn.relu(hidden))
    pooled = hidden.max(axis=2) if sampler.config.pooler_mode == "max" else hidden.mean(axis=2)
    return points[region, centers], pooled
