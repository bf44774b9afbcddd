"""The region sampler: ``python -m benchmarks.sampler [--width 1024 --grid 24 --output 4096]``.

Counts the multiplications of the definition and of the folded form, and times MLX's folded form
side by side with the PyTorch twin, both as it is defined and folded: same weights, points and
features, in turns. Indices are computed by each side itself, as part of the time.
"""

import argparse
import json

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from torch.nn import functional as F

from ferret_mlx.config import SamplerConfig
from ferret_mlx.region_sampler import RegionSampler
from ferret_mlx.regions import Box, sample_points
from reference import sampler as twin_sampler

from .measure import alternate, machine_line

PICTURE = (640, 480)
BILINEAR = 4  # products per value read


def multiplications(
    width: int, output: int, grid: int, regions: int, config: SamplerConfig
) -> dict[str, int]:
    """Products of all linear maps and interpolations, final projections included.

    The folded weights are made once per checkpoint and not counted.
    """
    points = config.num_points
    local = width + 2
    last = config.stages[-1][0] * width * width + width * output
    pairs = sum(kept * near for kept, near in config.stages)
    defined = BILINEAR * points * width + pairs * (local * local + 2 * local * width) + last

    first, second = config.stages[0][0], config.stages[1][0]
    coordinates = 2 * width * (points + first)
    by_points = BILINEAR * points * width + (points + first) * width * width
    by_grid = BILINEAR * (points + first) * width
    maps = 2 * grid * grid * width * width
    rest = coordinates + (first + second) * width * local + last
    folded = min(regions * (by_points + rest), maps + regions * (by_grid + rest))
    return {"defined": regions * defined, "folded": folded}


def shared_weights(width: int, output: int, grid: int) -> tuple[RegionSampler, torch.nn.Module]:
    """Both samplers with the same random weights."""
    torch.manual_seed(0)
    twin = twin_sampler.RegionSampler(width, output, grid).eval()
    ours = RegionSampler(width, output, (grid, grid), SamplerConfig())
    weights = {
        name: mx.array(
            value.squeeze(-1).numpy() if name.endswith("net.0.weight") else value.numpy()
        )
        for name, value in twin.state_dict().items()
    }
    assert weights.keys() == dict(tree_flatten(ours.parameters())).keys()
    ours.load_weights(list(weights.items()))
    mx.eval(ours.parameters())
    return ours, twin


@torch.no_grad()
def defined(twin, features: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The twin's sampler with its maps applied to every pair, a region at a time."""
    vectors = []
    for own in points.split(1):
        kept = own
        x = twin_sampler.bilinear_weights(own, twin.grid) @ features
        start = torch.zeros(1, dtype=torch.long)
        for stage, (count, near_count) in enumerate(twin_sampler.STAGES):
            index = twin_sampler.farthest_points(kept, count, start)
            centers = twin_sampler.take(kept, index)
            near = twin_sampler.nearest_neighbors(kept, centers, near_count, ordered=False)
            local = torch.cat([x, kept], -1)
            anchor = twin_sampler.take(local, index)[:, :, None]
            difference = twin_sampler.take(local, near) - anchor
            pairs = torch.cat(
                [twin.diff_projector_list[stage](difference), anchor.expand_as(difference)], -1
            )
            aggregation = twin.agg_projector_list[stage]
            convolution = aggregation.net[0]
            hidden = F.linear(pairs, convolution.weight.squeeze(-1), convolution.bias)
            x, kept = aggregation.norm(F.relu(hidden)).amax(2), centers
        vectors.append(twin.dim_projector(twin.flatten_projector(x.flatten(1))))
    return torch.cat(vectors)


def draw_points(regions: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = []
    for _ in range(regions):
        x, y = rng.integers(0, 400), rng.integers(0, 300)
        box = Box(x, y, x + rng.integers(20, 240), y + rng.integers(20, 180))
        points.append(sample_points(box.mask(PICTURE), rng))
    return np.stack(points)


def compare(args: argparse.Namespace, regions: int) -> dict:
    ours, twin = shared_weights(args.width, args.output, args.grid)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((1, args.grid**2, args.width), dtype=np.float32)
    points = draw_points(regions)
    torch_features, torch_points = torch.from_numpy(values), torch.from_numpy(points)
    features, own_points = mx.array(values), mx.array(points)
    found: dict[str, object] = {}

    def mlx_folded() -> None:
        found["mlx"] = ours(features, own_points)
        mx.eval(found["mlx"])

    def torch_folded() -> None:
        with torch.no_grad():
            found["folded"] = twin(torch_features, torch_points)

    def torch_defined() -> None:
        found["defined"] = defined(twin, torch_features, torch_points)

    times = alternate(
        {"MLX": mlx_folded, "PyTorch, folded": torch_folded, "PyTorch, as defined": torch_defined},
        args.repeats,
    )
    counted = multiplications(args.width, args.output, args.grid, regions, ours.config)
    fewer = counted["defined"] / counted["folded"]
    print(f"\n{regions} regions: {fewer:.1f} x fewer multiplications than the definition")
    for name, timing in times.items():
        factor = timing.median / times["MLX"].median
        print(f"  {name:<20} {timing}   {factor:.2f} x MLX's time")
    norm = np.linalg.norm(found["folded"])
    difference = float(np.linalg.norm(np.array(found["mlx"]) - found["folded"].numpy()) / norm)
    print(f"  MLX and the folded twin differ by {difference:.1g} (each with its own neighbors)")
    return {
        "regions": regions,
        "multiplications": counted,
        "fewer": round(fewer, 2),
        "seconds": {name: timing.as_dict() for name, timing in times.items()},
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--width", type=int, default=1024, help="of the vision tower")
    add("--grid", type=int, default=24, help="patches along each side")
    add("--output", type=int, default=4096, help="width of the language model")
    add("--regions", type=int, nargs="+", default=[1, 8, 32])
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{machine_line()}, PyTorch on the CPU with {torch.get_num_threads()} threads")
    results = [compare(args, regions) for regions in args.regions]
    print(json.dumps({"machine": machine_line(), "results": results}))


if __name__ == "__main__":
    main()
