"""What the readers of tensor files share: reads by position and element types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

_CHUNK = 16 << 20  # bytes per read; some systems cap a single read at 2 GB
MAX_HEADER = 100 << 20  # safetensors' own limit; torch's pickles are smaller still
MAX_DIMENSION = 2**31 - 1  # MLX counts in 32 bits

# bytes per element
ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
}


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read; `dtype` is the one that reading gives."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


class Tensors(Protocol):
    """Named tensors that are read one by one: a file, a checkpoint, a merged delta."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str) -> mx.array: ...

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        """The tensor in runs of `rows` along its first axis (the last may be shorter)."""
        ...

    def location(self, name: str) -> str:
        """The file or files that the tensor is read from, for messages."""
        ...


class TensorFile(Tensors, Protocol):
    """One open file of named tensors."""

    path: Path

    def close(self) -> None: ...


class PositionedFile:
    """Reads of a file by offset. They do not move a cursor, so nothing has to be kept in order."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Read, in a subclass, what the file says about its tensors."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def chunks(self, offset: int, count: int) -> Iterator[bytes]:
        while count > 0:
            try:
                chunk = os.pread(self._fd, min(count, _CHUNK), offset)
            except OSError as error:
                raise ValueError(f"{self.path} cannot be read ({error.strerror}).") from None
            if not chunk:
                raise ValueError(f"{self.path} is truncated; copy it again.")
            yield chunk
            offset += len(chunk)
            count -= len(chunk)

    def bytes_at(self, offset: int, count: int) -> bytes:
        return b"".join(self.chunks(offset, count))

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill `out` with the file's bytes from `offset` on."""
        position = 0
        for chunk in self.chunks(offset, len(out)):
            out[position : position + len(chunk)] = chunk
            position += len(chunk)

    def array_at(self, offset: int, shape: tuple[int, ...], element: str) -> mx.array:
        """The elements that lie in row-major order from `offset` on."""
        data = np.empty(prod(shape) * ITEM_SIZES[element], np.uint8)
        self.read_into(data.data, offset)
        return to_mx(data.view(np_dtype(element)).reshape(shape), element)

    def blocks_at(
        self, offset: int, shape: tuple[int, ...], element: str, rows: int
    ) -> Iterator[mx.array]:
        """What `array_at` gives, in runs of `rows` along the first axis; a scalar whole."""
        if not shape:
            yield self.array_at(offset, shape, element)
            return
        row_bytes = prod(shape[1:]) * ITEM_SIZES[element]
        for first in range(0, shape[0], rows):
            block = (min(rows, shape[0] - first), *shape[1:])
            yield self.array_at(offset + first * row_bytes, block, element)

    def location(self, name: str) -> str:
        return str(self.path)


def np_dtype(element: str) -> np.dtype:
    # numpy has no bfloat16: its bits travel as uint16.
    return np.dtype("uint16" if element == "bfloat16" else element).newbyteorder("<")


def mx_dtype(element: str) -> mx.Dtype:
    # MLX has no float64 on a GPU.
    if element == "float64":
        return mx.float32
    return mx.bool_ if element == "bool" else getattr(mx, element)


def to_mx(values: np.ndarray, element: str) -> mx.array:
    if element == "bfloat16":
        return mx.array(values).view(mx.bfloat16)
    return mx.array(values, dtype=mx_dtype(element))
