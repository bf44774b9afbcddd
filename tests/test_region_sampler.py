from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ferret_mlx import geometry_kernels, region_sampler
from ferret_mlx.config import SamplerConfig
from ferret_mlx.geometry import farthest_points, sampling_indices
from ferret_mlx.region_sampler import RegionSampler, pool_pair_by_pair, region_read_order


@pytest.fixture(scope="module")
def sampler(parity_model) -> RegionSampler:
    return parity_model.region_sampler


@pytest.fixture(scope="module")
def case(golden) -> dict:
    """Three regions and all that the sampler takes."""
    numbers = golden["mixed3"]
    return {
        "features": mx.array(numbers["image_features"])[None],
        "points": mx.array(numbers["points_xy"]),
        "starts": [mx.array(numbers[f"fps_idx_stage{stage}"][:, 0]) for stage in (0, 1)],
        "neighbors": [mx.array(numbers[f"knn_idx_stage{stage}"]) for stage in (0, 1)],
    }


def variant(sampler: RegionSampler, **changes) -> RegionSampler:
    """The same weights with another config."""
    other = RegionSampler(
        sampler.width, sampler.output_width, sampler.grid, replace(sampler.config, **changes)
    )
    other.update(sampler.parameters())
    return other


def relative(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def test_regions_in_one_pass_are_the_regions_alone(sampler, case):
    together = sampler(case["features"], case["points"])
    assert together.shape == (3, 48)
    for row in range(3):
        alone = sampler(case["features"], case["points"][row : row + 1])
        assert relative(together[row], alone[0]) < 1e-6


def test_starts_default_to_the_first_point(sampler, case):
    zeros = [mx.zeros(3, dtype=mx.int32)] * 2
    default = sampler(case["features"], case["points"])
    assert mx.array_equal(default, sampler(case["features"], case["points"], zeros))
    other = sampler(case["features"], case["points"], case["starts"])
    assert relative(default, other) > 1e-4


def test_order_of_neighbors_does_not_matter(sampler, case):
    reversed_neighbors = [indices[:, :, ::-1] for indices in case["neighbors"]]
    args = (case["features"], case["points"], case["starts"])
    assert relative(sampler(*args, reversed_neighbors), sampler(*args, case["neighbors"])) < 1e-6


def test_no_region(sampler, case):
    assert sampler(case["features"], mx.zeros((0, 512, 2))).shape == (0, 48)


@pytest.mark.parametrize("order", ["released", "upright"])
def test_read_order(order):
    """The released code reads the map transposed: x runs along the rows."""
    points = mx.array([[[0.5, 0.0], [0.5, 0.25], [1.0, 1.0], [0.0, 0.75]]])
    row, column = region_read_order(points, (5, 9), order)
    along_rows = [2.0, 2.0, 4.0, 0.0] if order == "released" else [0.0, 1.0, 4.0, 3.0]
    along_columns = [0.0, 2.0, 8.0, 6.0] if order == "released" else [4.0, 4.0, 8.0, 0.0]
    assert row[0].tolist() == along_rows
    assert column[0].tolist() == along_columns


@pytest.mark.parametrize("order", ["released", "upright"])
def test_bilinear_samples_are_exact_on_a_plane(order):
    """A feature map that is linear in row and column is read without error, edges included."""
    config = SamplerConfig(read_order=order)
    sampler = RegionSampler(2, 4, (3, 6), config)
    rows, columns = np.mgrid[:3, :6].astype(np.float32)
    features = mx.array(np.stack([rows, columns], axis=-1).reshape(1, 18, 2))
    points = np.random.default_rng(0).random((2, 512, 2), dtype=np.float32)
    points[0, :4] = [[0, 0], [1, 1], [1, 0], [0, 1]]
    sampled = np.array(sampler.features_at(features, mx.array(points)))
    x, y = points[..., 0], points[..., 1]
    row, column = (x * 2, y * 5) if order == "released" else (y * 2, x * 5)
    assert np.abs(sampled - np.stack([row, column], axis=-1)).max() < 1e-5


def straightforward(sampler, features, points, starts, neighbors) -> mx.array:
    """The whole sampler with its blocks as they are defined."""
    centers = [i for i, _ in sampling_indices(np.array(points), sampler.config.stages, starts)]
    points = points.astype(mx.float32)
    x = sampler.features_at(features, points)
    for stage, (kept, near) in enumerate(zip(centers, neighbors, strict=True)):
        block = (stage, points, x, mx.array(kept), near)
        points, x = pool_pair_by_pair(sampler, *block)
    return sampler.dim_projector(sampler.flatten_projector(x.flatten(1).astype(sampler.dtype)))


@pytest.mark.parametrize("by", ["grid", "points"])
@pytest.mark.parametrize("mode", ["max", "mean"])
@pytest.mark.parametrize(("dtype", "limit"), [(mx.float32, 1e-5), (mx.float16, 5e-3)])
def test_folded_maps_give_what_the_definition_gives(
    sampler, case, monkeypatch, by, mode, dtype, limit
):
    """Whether the first block's maps are applied to the feature map or to the points."""
    folded = variant(sampler, pooler_mode=mode)
    folded.set_dtype(dtype)
    monkeypatch.setattr(RegionSampler, "maps_the_grid", lambda self, regions: by == "grid")
    args = (case["features"].astype(dtype), case["points"], case["starts"], case["neighbors"])
    vectors, expected = folded(*args), straightforward(folded, *args)
    assert vectors.dtype == dtype
    assert relative(vectors.astype(mx.float32), expected.astype(mx.float32)) <= limit


@pytest.mark.parametrize("by", ["grid", "points"])
@pytest.mark.parametrize(("dtype", "limit"), [(mx.float32, 1e-5), (mx.float16, 5e-3)])
def test_folded_maps_at_full_size(monkeypatch, by, dtype, limit):
    """1,024 channels: ever longer sums must not add up to more than the bound."""
    mx.random.seed(0)
    full = RegionSampler(1024, 4096, (24, 24), SamplerConfig())
    full.set_dtype(dtype)
    points = np.random.default_rng(0).random((1, 512, 2), dtype=np.float32)
    neighbors = [mx.array(near) for _, near in sampling_indices(points, full.config.stages)]
    features = mx.random.normal((1, 576, 1024)).astype(dtype)
    args = (features, mx.array(points), None, neighbors)
    monkeypatch.setattr(RegionSampler, "maps_the_grid", lambda self, regions: by == "grid")
    vectors, expected = full(*args), straightforward(full, *args)
    assert vectors.dtype == expected.dtype == dtype
    assert relative(vectors.astype(mx.float32), expected.astype(mx.float32)) <= limit


@pytest.mark.parametrize("stage", [0, 1])
def test_maps_per_point_are_the_maps_per_pair(sampler, case, stage):
    """The blocks apply their linear maps before gathering; the definition gathers first."""
    points = case["points"][:, : (512, 128)[stage]]
    x = sampler.features_at(case["features"], points)
    centers = mx.array(np.random.default_rng(0).integers(0, points.shape[1], (3, 40)))
    near = mx.array(np.random.default_rng(1).integers(0, points.shape[1], (3, 40, 24)))
    block = (stage, points, x, centers, near)
    kept, pooled = sampler.pool(*block)
    assert kept.shape == (3, 40, 2)
    expected_kept, expected = pool_pair_by_pair(sampler, *block)
    assert mx.array_equal(kept, expected_kept)
    assert relative(pooled, expected) < 1e-6


def test_what_is_mapped_depends_on_the_number_of_regions():
    """24 x 24 cells, two maps: 1,152 products; per region 512 neighbours and 128 kept points."""
    sampler = RegionSampler(16, 8, (24, 24), SamplerConfig())
    assert [sampler.maps_the_grid(regions) for regions in (1, 2, 32)] == [False, True, True]


def test_maps_are_folded_once_and_again_for_other_weights(sampler, case):
    """A stale fold would go unnoticed: its vectors look like any others."""
    changed = variant(sampler)
    args = (case["features"], case["points"], case["starts"], case["neighbors"])
    before = changed(*args)
    folds = [changed.folded(stage) for stage in (0, 1)]
    changed(*args)
    assert [changed.folded(stage) for stage in (0, 1)] == folds
    conv = changed.agg_projector_list[1].net[0]
    conv.weight = conv.weight * 1.5
    after = changed(*args)
    assert changed.folded(0) is folds[0] and changed.folded(1) is not folds[1]
    assert relative(after, before) > 1e-3
    assert relative(after, straightforward(changed, *args)) <= 1e-5
    assert "folded" not in str(changed.parameters().keys())


def test_many_regions_are_pooled_in_parts(sampler, case, monkeypatch):
    args = [case[name] for name in ("features", "points", "starts", "neighbors")]
    whole = sampler(*args)
    monkeypatch.setattr(region_sampler, "PART_BYTES", 2 * 512 * sampler.width * 4)
    calls = []
    pool_pairs = RegionSampler._pool_pairs
    monkeypatch.setattr(
        RegionSampler, "_pool_pairs",
        lambda self, stage, *block: calls.append(len(block[0])) or pool_pairs(self, stage, *block),
    )  # fmt: skip
    assert relative(sampler(*args), whole) < 1e-6
    assert calls == [2, 1, 3]


def test_on_a_gpu_the_kernel_gives_the_indices(sampler, case, monkeypatch):
    used = []

    def kernel(points, count, starts):
        used.append(count)
        return mx.array(farthest_points(np.array(points), count, np.array(starts)))

    expected = sampler(case["features"], case["points"], case["starts"])
    monkeypatch.setattr(geometry_kernels, "farthest_points_kernel", lambda: kernel)
    vectors = sampler(case["features"], case["points"], case["starts"])
    assert used == [128, 32]
    assert relative(vectors, expected) < 1e-6


def test_memory_of_many_regions():
    """All pairs of 32 regions at once take 0.1 GB per array here, 0.4 GB at full size."""
    sampler = RegionSampler(256, 64, (24, 24), SamplerConfig())
    points = mx.array(np.random.default_rng(0).random((32, 512, 2), dtype=np.float32))
    features = mx.zeros((1, 576, 256))
    mx.eval(sampler.parameters(), points, features)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(sampler(features, points))
    assert mx.get_peak_memory() - before < 0.2e9


def test_block_against_its_formula(sampler, case):
    """g = [W (l - a) + b, a] per neighbour, in float64 with loops instead of gathers."""
    weights = {
        name: np.array(value, dtype=np.float64)
        for name, value in tree_flatten(sampler.parameters())
    }
    points, centers, near = case["points"], [5, 77], [[1, 2, 500], [77, 0, 3]]
    features = sampler.features_at(case["features"], points)
    local = np.concatenate([np.array(features[0]), np.array(points[0])], axis=-1)
    for mode, pool in (("max", np.max), ("mean", np.mean)):
        expected = []
        for center, neighborhood in zip(centers, near, strict=True):
            hidden = []
            for index in neighborhood:
                difference = (local[index] - local[center]).astype(np.float64)
                projected = weights["diff_projector_list.0.weight"] @ difference
                projected += weights["diff_projector_list.0.bias"]
                group = np.concatenate([projected, local[center]])
                x = weights["agg_projector_list.0.net.0.weight"] @ group
                x = np.maximum(x + weights["agg_projector_list.0.net.0.bias"], 0)
                x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
                x = x * weights["agg_projector_list.0.norm.weight"]
                hidden.append(x + weights["agg_projector_list.0.norm.bias"])
            expected.append(pool(hidden, axis=0))
        kept, pooled = variant(sampler, pooler_mode=mode).pool(
            0, points[:1], features[:1], mx.array([centers]), mx.array([near])
        )
        assert np.abs(np.array(pooled[0]) - np.stack(expected)).max() < 1e-5
        assert mx.array_equal(kept[0], points[0][mx.array(centers)])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights(sampler, case, dtype):
    """Products follow the weights; coordinates must not, or points of a large image collapse."""
    half = variant(sampler)
    half.set_dtype(dtype)
    args = (case["points"], case["starts"], case["neighbors"])
    vectors = half(case["features"].astype(dtype), *args)
    assert vectors.dtype == dtype
    assert relative(vectors.astype(mx.float32), sampler(case["features"], *args)) < 0.03


@pytest.mark.parametrize(
    ("features", "points", "message"),
    [
        ((1, 63, 32), (1, 512, 2), r"features have shape \(1, 63, 32\)"),
        ((64, 32), (1, 512, 2), "features have shape"),
        ((1, 64, 32), (512, 2), r"expected \(regions, 512, 2\)"),
        ((1, 64, 32), (1, 511, 2), "region_points have shape"),
    ],
)
def test_other_shapes_are_refused(sampler, features, points, message):
    with pytest.raises(ValueError, match=message):
        sampler(mx.zeros(features), mx.zeros(points))
