"""The twin's spatial-aware visual sampler (Ferret, section 3.2; released ``region_geo_sampler``).

Written for training: the maps before the ReLU are linear, so they are applied once to the grid
(first block) or once to each point (second block) instead of to each of 3,072 pairs; the result is
the same. tests/ hold it against the released numbers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import STAGES


def bilinear_weights(points: Tensor, grid: int) -> Tensor:
    """(R, P, 2) points (x, y) -> (R, P, grid * grid) weights on the cells, corners aligned.

    The released code reads the map transposed: a point's x picks the row and y the column.
    """
    cells = torch.arange(grid, device=points.device, dtype=points.dtype)
    row, column = (
        (1 - (points[..., i, None] * (grid - 1) - cells).abs()).clamp(min=0) for i in (0, 1)
    )
    return (row[..., :, None] * column[..., None, :]).flatten(-2)


@torch.no_grad()
def farthest_points(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """(R, P, 2), (R,) -> (R, count) indices; the first index wins ties."""
    x, y = points.unbind(-1)
    rows = torch.arange(len(points), device=points.device)
    nearest = torch.full_like(x, torch.inf)
    chosen, current = [], starts
    for _ in range(count):
        chosen.append(current)
        dx = x - x[rows, current][:, None]
        dy = y - y[rows, current][:, None]
        nearest = torch.minimum(nearest, dx * dx + dy * dy)
        current = nearest.argmax(-1)
    return torch.stack(chosen, 1)


@torch.no_grad()
def nearest_neighbors(points: Tensor, kept: Tensor, count: int, ordered: bool = True) -> Tensor:
    """(R, P, 2), (R, M, 2) -> (R, M, count) indices of the nearest points of each kept one.

    ``ordered``: the lower index wins ties; without, whichever ``topk`` meets (five times faster).
    """
    dx = kept[:, :, None, 0] - points[:, None, :, 0]
    dy = kept[:, :, None, 1] - points[:, None, :, 1]
    distance = dx * dx + dy * dy
    if ordered:
        return distance.argsort(dim=-1, stable=True)[..., :count]
    return distance.topk(count, largest=False, sorted=False).indices


def take(values: Tensor, index: Tensor) -> Tensor:
    """(R, P, C) at (R, ...) indices -> (R, ..., C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).unflatten(1, index.shape[1:])


class AggregationNet(nn.Module):
    """Holds the released names ``net.0`` (a 1x1 convolution) and ``norm``."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2 * (width + 2), width, 1))
        self.norm = nn.LayerNorm(width)


class RegionSampler(nn.Module):
    def __init__(self, width: int, out: int, grid: int, pooler: str = "max"):
        super().__init__()
        self.grid, self.width, self.pooler = grid, width, pooler
        self.diff_projector_list = nn.ModuleList(nn.Linear(width + 2, width + 2) for _ in STAGES)
        self.agg_projector_list = nn.ModuleList(AggregationNet(width) for _ in STAGES)
        self.flatten_projector = nn.Linear(STAGES[-1][0] * width, width)
        self.dim_projector = nn.Linear(width, out)

    def _folded(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of the neighbour and of the kept point, (C, C + 2) each, and their constant."""
        diff, convolution = self.diff_projector_list[stage], self.agg_projector_list[stage].net[0]
        first, second = convolution.weight.squeeze(-1).split(self.width + 2, dim=1)
        neighbor = first @ diff.weight
        return neighbor, second - neighbor, first @ diff.bias + convolution.bias

    def _pool(self, stage: int, near: Tensor, kept: Tensor, index: Tensor) -> Tensor:
        """(R, P, C), (R, M, C), (R, M, K) -> (R, M, C)."""
        h = F.relu(take(near, index) + kept[:, :, None])
        h = self.agg_projector_list[stage].norm(h)
        return h.amax(2) if self.pooler == "max" else h.mean(2)

    def forward(self, features: Tensor, points: Tensor, picture=None, starts=None, neighbors=None):
        """features (B, n*n, C), points (R, 512, 2) in [0, 1) -> (R, D), all float32.

        ``picture``: (R,) which of the B maps a region belongs to (default: the only one);
        ``starts``: two (R,) index tensors (default 0); ``neighbors``: (R, M, K) for each block.
        """
        features, points = features.float(), points.float()
        if picture is None:
            picture = torch.zeros(len(points), dtype=torch.long, device=points.device)
        c = self.width
        weights = bilinear_weights(points, self.grid)
        states = None
        for stage, (count, near_count) in enumerate(STAGES):
            start = torch.zeros_like(picture) if starts is None else starts[stage].long()
            kept_index = farthest_points(points, count, start)
            kept_points = take(points, kept_index)
            if neighbors is None:
                index = nearest_neighbors(points, kept_points, near_count, not self.training)
            else:
                index = neighbors[stage].long()
            near_map, kept_map, constant = self._folded(stage)
            if stage == 0:
                grids = torch.cat([features @ near_map[:, :c].T, features @ kept_map[:, :c].T], -1)
                mapped = weights @ grids[picture]
            else:
                mapped = states @ torch.cat([near_map[:, :c], kept_map[:, :c]]).T
            near = mapped[..., :c] + points @ near_map[:, c:].T
            kept = take(mapped[..., c:], kept_index) + kept_points @ kept_map[:, c:].T + constant
            states, points = self._pool(stage, near, kept, index), kept_points
        return self.dim_projector(self.flatten_projector(states.flatten(1)))
