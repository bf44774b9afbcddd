import numpy as np
import pytest

from ferret_mlx.geometry import (
    farthest_points,
    nearest_neighbors,
    sampling_indices,
    squared_distance,
)

STAGES = ((128, 24), (32, 24))


def test_distance_is_not_contracted():
    """With a fused multiply-add the sum differs in its last bit, and with it the chosen points."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1000, 2), dtype=np.float32)
    difference = (a - b).astype(np.float64)
    rounded = (difference**2).astype(np.float32).astype(np.float64).sum(-1).astype(np.float32)
    fused = (difference[:, 0] ** 2 + (difference[:, 1] ** 2).astype(np.float32)).astype(np.float32)
    assert np.array_equal(squared_distance(a, b), rounded)
    assert not np.array_equal(rounded, fused)


def test_farthest_takes_the_first_of_equals():
    # The far corners tie twice; the duplicate of the start is never better than a new point.
    corners = np.array([[[0, 0], [0, 0], [1, 0], [0, 1], [1, 1]]], dtype=np.float32)
    assert farthest_points(corners, 4, np.array([0])).tolist() == [[0, 4, 2, 3]]
    assert farthest_points(corners, 4, np.array([2])).tolist() == [[2, 3, 0, 4]]


def test_rows_do_not_influence_each_other():
    points = np.random.default_rng(1).random((3, 50, 2), dtype=np.float32)
    starts = np.array([4, 0, 49])
    together = farthest_points(points, 10, starts)
    for row in range(3):
        alone = farthest_points(points[row : row + 1], 10, starts[row : row + 1])
        assert np.array_equal(together[row], alone[0])
    near = nearest_neighbors(points, together, 5)
    assert np.array_equal(near[1], nearest_neighbors(points[1:2], together[1:2], 5)[0])


def test_neighbors_take_the_lowest_of_equals():
    # Four times the same grid of 9 points: every distance ties at least fourfold.
    x, y = np.meshgrid(np.arange(3), np.arange(3))
    grid = np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32) / 3
    points = np.tile(grid, (4, 1))[None]
    near = nearest_neighbors(points, np.array([[4, 0]]), 6)
    # The centre itself four times, then the first two of its sixteen equally near neighbours.
    assert near[0, 0].tolist() == [1, 3, 4, 13, 22, 31]
    assert near[0, 1].tolist() == [0, 1, 3, 9, 18, 27]


def test_neighbors_against_a_full_sort():
    points = np.random.default_rng(2).random((2, 200, 2), dtype=np.float32)
    centers = farthest_points(points, 20, np.zeros(2, dtype=int))
    kept = np.take_along_axis(points, centers[..., None], axis=1)
    distance = squared_distance(kept[:, :, None], points[:, None])
    expected = np.sort(np.argsort(distance, axis=-1, kind="stable")[..., :24], axis=-1)
    assert np.array_equal(nearest_neighbors(points, centers, 24), expected)


def test_farthest_points_are_the_released_ones(golden):
    """Contracting the squared distance changes 3 of these cases."""
    cases = [case for case in golden.values() if "points_xy" in case]
    assert len(cases) == 7
    for case in cases:
        starts = [case[f"fps_idx_stage{stage}"][:, 0] for stage in (0, 1)]
        for stage, (centers, _) in enumerate(sampling_indices(case["points_xy"], STAGES, starts)):
            assert np.array_equal(centers, case[f"fps_idx_stage{stage}"])


def test_neighbors_are_as_near_as_the_released_ones(golden):
    for case in golden.values():
        if "points_xy" not in case:
            continue
        points = case["points_xy"]
        starts = [case[f"fps_idx_stage{stage}"][:, 0] for stage in (0, 1)]
        for stage, (centers, near) in enumerate(sampling_indices(points, STAGES, starts)):
            kept = np.take_along_axis(points, centers[..., None], axis=1)
            region = np.arange(len(points))[:, None, None]
            own, released = (
                np.sort(squared_distance(kept[:, :, None], points[region, indices]), axis=-1)
                for indices in (near, case[f"knn_idx_stage{stage}"])
            )
            assert np.abs(own - released).max() <= 1e-7
            assert all(len(set(row)) == 24 for row in near.reshape(-1, 24).tolist())
            points = kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": [np.zeros(2, int)]}, "starts holds 1 arrays"),
        ({"starts": [np.zeros(3, int)] * 2}, r"starts\[0\] is int64 of shape \(3,\)"),
        ({"starts": [np.zeros(2)] * 2}, r"starts\[0\] is float64"),
        ({"starts": [np.array([0, 511]), np.array([0, 128])]}, r"starts\[1\] has indices outside"),
        ({"neighbors": [np.zeros((2, 128, 23), int)] * 2}, r"expected integers of shape \(2, 128"),
        ({"neighbors": [np.full((2, 128, 24), -1)] * 2}, r"outside of 0\.\.511"),
    ],
)
def test_given_indices_are_checked(options, message):
    points = np.random.default_rng(3).random((2, 512, 2), dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        sampling_indices(points, STAGES, **options)
