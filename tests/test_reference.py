"""The PyTorch twin meets the same released numbers as the MLX side."""

import numpy as np
import pytest
import torch

from reference.layout import read_released, write_released
from reference.sampler import farthest_points, nearest_neighbors, take

NAMES = ["point", "box", "freeform", "scribble", "mixed3", "corners", "grounding", "multiturn"]
STAGES = (0, 1)


@pytest.fixture(scope="module")
def twin(parity):
    return read_released(parity / "checkpoint")


@pytest.fixture(params=NAMES)
def numbers(request, golden):
    return golden[request.param]


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def regions(numbers: dict, neighbors: bool) -> dict:
    if "points_xy" not in numbers:
        return {}
    given = {
        "region_points": tensor(numbers["points_xy"]),
        "starts": [tensor(numbers[f"fps_idx_stage{s}"][:, 0]) for s in STAGES],
    }
    if neighbors:
        given["neighbors"] = [tensor(numbers[f"knn_idx_stage{s}"]) for s in STAGES]
    return given


def relative(ours: torch.Tensor, released: np.ndarray) -> float:
    return float(np.linalg.norm(ours.numpy() - released) / np.linalg.norm(released))


@torch.no_grad()
def test_features_and_region_vectors(twin, numbers):
    features = twin.encode_image(tensor(numbers["pixel_values"])[None])
    assert relative(features[0], numbers["image_features"]) < 1e-5
    assert relative(twin.mm_projector(features)[0], numbers["projected"]) < 1e-5
    given = regions(numbers, neighbors=True)
    if given:
        points = given.pop("region_points")
        vectors = twin.region_geo_sampler(features, points, **given)
        assert relative(vectors, numbers["region_embeddings"]) < 1e-5


def test_geometry(numbers):
    if "points_xy" not in numbers:
        return
    points = tensor(numbers["points_xy"])
    for stage, count in zip(STAGES, (128, 32), strict=True):
        stored = tensor(numbers[f"fps_idx_stage{stage}"]).long()
        kept = farthest_points(points, count, stored[:, 0])
        assert torch.equal(kept, stored)
        centers = take(points, kept)
        released = tensor(numbers[f"knn_idx_stage{stage}"]).long()
        for ordered in (True, False):
            own = nearest_neighbors(points, centers, 24, ordered)
            ours, theirs = (
                (take(points, i) - centers[:, :, None]).square().sum(-1).sort(-1).values
                for i in (own, released)
            )
            assert (ours - theirs).abs().max() < 1e-7
        points = centers


def test_greedy_answers(twin, numbers):
    pixels = tensor(numbers["pixel_values"])[None]
    ids = twin.generate(
        numbers["input_ids"], pixels, **regions(numbers, neighbors=False), max_tokens=24
    )
    assert ids == numbers["generated"].tolist()


def test_released_layout_round_trip(twin, parity, tmp_path):
    write_released(twin, tmp_path, parity / "checkpoint")
    again = read_released(tmp_path)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    stored = torch.load(parity / "checkpoint" / "pytorch_model.bin", weights_only=True)
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    buffers = {name for name in stored if name.endswith("inv_freq")}
    assert set(written) == set(stored) - buffers
    assert all(written[name].shape == stored[name].shape for name in written)
