"""The random checkpoints of the benchmarks: released layout, sharded as the real ones."""

import json
from math import prod

import pytest
import torch

from benchmarks.make_checkpoint import (
    GEOMETRIES,
    SHARD_BYTES,
    added_shapes,
    chosen_geometry,
    language_shapes,
    make_checkpoint,
    vision_shapes,
    write_sharded,
)
from ferret_mlx.check import check
from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.convert import convert


@pytest.mark.parametrize(("size", "parameters"), [("7b", 6.74e9), ("13b", 13.02e9)])
def test_true_sizes(size, parameters):
    """Published counts of LLaMA 7B and 13B, and of CLIP-L's vision half."""
    geometry, limit = chosen_geometry(size)
    assert geometry == GEOMETRIES[size] and limit == SHARD_BYTES
    body, head = language_shapes(geometry, 32000)
    assert sum(map(prod, (body | head).values())) == pytest.approx(parameters, rel=1e-3)
    assert sum(map(prod, vision_shapes(geometry).values())) == pytest.approx(303.5e6, rel=1e-3)
    assert prod(added_shapes(geometry)["model.mm_projector.weight"]) == 1024 * geometry.hidden


def test_shards_of_the_true_7b(tmp_path, monkeypatch):
    """9.98 GB and the rest, as in the released files."""
    sizes = []

    def measured(path, shapes, values):
        sizes.append(sum(2 * prod(shape) for shape in shapes.values()))

    monkeypatch.setattr("benchmarks.make_checkpoint.write_torch_file", measured)
    body, head = language_shapes(GEOMETRIES["7b"], 32000)
    write_sharded(tmp_path, body | head, SHARD_BYTES, False, 0)
    assert [round(size / 1e9, 1) for size in sizes] == [10.0, 3.5]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    geometry, limit = chosen_geometry("13b", 0.01)
    make_checkpoint(folder, geometry, limit)
    return folder, geometry


def test_torch_reads_the_files(made):
    folder, geometry = made
    for part in ("base", "delta"):
        theirs = {}
        files = sorted((folder / part).glob("*.bin"))
        assert len(files) == 3  # as many as the released 13B has
        for file in files:
            theirs |= torch.load(file)
        body, head = language_shapes(geometry, 32000 + (part == "delta"))
        expected = body | head | (added_shapes(geometry) if part == "delta" else {})
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == expected
        assert {tensor.dtype for tensor in theirs.values()} == {torch.float16}
        norm = theirs["model.layers.1.input_layernorm.weight"].float().mean()
        assert abs(norm - float(part == "base")) < 0.01
        with open_checkpoint(folder / part) as checkpoint:
            for name, tensor in theirs.items():
                assert torch.equal(tensor, torch.tensor(checkpoint.read(name)).view(tensor.shape))


def test_it_converts(made, tmp_path):
    folder, geometry = made
    convert(folder / "delta", tmp_path / "out", folder / "base", quantize=True)
    reports = check(tmp_path / "out", folder / "delta", folder / "base")
    language = [r for r in reports if r.name.startswith("language_model.")]
    assert all(report.error is not None for report in language if "norm" not in report.name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == geometry.hidden and config["quantization"]["bits"] == 4
