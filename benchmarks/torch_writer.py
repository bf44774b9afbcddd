"""Writes PyTorch's checkpoint format without holding the tensors, which torch.save cannot."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch


class _Storage:
    def __init__(self, key: int, count: int):
        self.pid = ("storage", torch.HalfStorage, str(key), "cpu", count)


class _Tensor:
    """Pickles as torch.save pickles a tensor, without having its values."""

    def __init__(self, key: int, shape: tuple[int, ...]):
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        self.arguments = (_Storage(key, prod(shape)), 0, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, _Storage) else None


def write_torch_file(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    values: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """A file as torch.save makes it, one block of values in memory at a time.

    values: name -> the tensor's float16 elements in row-major order, in blocks of any size.
    """
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as record:
            tensors = OrderedDict(
                (name, _Tensor(key, shape)) for key, (name, shape) in enumerate(shapes.items())
            )
            _Pickler(record, 2).dump(tensors)
        archive.writestr("archive/byteorder", "little")
        for key, name in enumerate(shapes):
            with archive.open(f"archive/data/{key}", "w") as record:
                for block in values(name):
                    record.write(block.data)
        archive.writestr("archive/version", "3\n")
