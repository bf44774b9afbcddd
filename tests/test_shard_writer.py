"""Safetensors files written in pieces, as other readers see them."""

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from ferret_mlx.safetensors_file import SafetensorsFile
from ferret_mlx.shard_writer import ShardWriter
from ferret_mlx.tensor_files import TensorInfo


def values() -> dict[str, mx.array]:
    mx.random.seed(0)
    return {
        "bytes": mx.arange(7).astype(mx.uint8),
        "half": mx.random.normal((5, 3)).astype(mx.float16),
        "brain": mx.random.normal((5, 2)).astype(mx.bfloat16),
        "packed": mx.arange(15, dtype=mx.uint32).reshape(5, 3),
        "single": mx.random.normal((6,)),
        "turned": mx.random.normal((4, 6)).T,
    }


def write(path, tensors, skip=()):
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
    with ShardWriter(path, infos) as writer:
        # A row of each in turn, the way a layer's weight, scales and biases come.
        for row in range(7):
            for name, value in tensors.items():
                if row < len(value) and (name, row) not in skip:
                    writer.append(name, value[row : row + 1])
        writer.finish()


def test_other_readers_read_it(tmp_path):
    """Catches a header that does not say where the data are, and unaligned tensors."""
    path, tensors = tmp_path / "model.safetensors", values()
    write(path, tensors)
    loaded = mx.load(str(path))
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and mx.array_equal(loaded[name], value), name
    with safe_open(path, "numpy") as theirs:
        assert theirs.metadata() == {"format": "mlx"}
        for name in tensors.keys() - {"brain"}:
            assert np.array_equal(theirs.get_tensor(name), np.array(tensors[name])), name
    ours = SafetensorsFile(path)
    for name, (_, _, (start, _)) in ours._tensors.items():
        assert (ours._start + start) % tensors[name].dtype.size == 0, name
    ours.close()


def test_missing_and_surplus_rows(tmp_path):
    tensors = values()
    with pytest.raises(ValueError, match="packed has another number of rows"):
        write(tmp_path / "x", tensors, skip={("packed", 4)})
    infos = {"half": TensorInfo((4, 3), mx.float16)}
    with ShardWriter(tmp_path / "y", infos) as writer:
        writer.append("half", tensors["half"])
        with pytest.raises(ValueError, match="half has another number of rows"):
            writer.finish()


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="could not be written"):
        ShardWriter(tmp_path / "nowhere" / "x", {})
