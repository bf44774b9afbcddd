"""Writes a .safetensors file of known tensors in pieces, so that it never has to be in memory."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np

from .output import NotWritten
from .safetensors_file import TYPES
from .tensor_files import TensorInfo

_CODES = {element: code for code, element in TYPES.items()}


class ShardWriter:
    """A new .safetensors file. Also a context manager, which closes it."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]):
        """Raises NotWritten, as all methods do, when the file cannot be written."""
        self.path = path
        header, self._next = file_header(tensors)
        self._end = {name: self._next[name] + info.nbytes for name, info in tensors.items()}
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise _not_written(path, error) from None
        self._write(header, 0)

    def append(self, name: str, block: mx.array) -> None:
        """The next rows of a tensor, in its dtype."""
        if block.dtype == mx.bfloat16:
            block = block.view(mx.uint16)  # numpy has none
        data = np.ascontiguousarray(np.array(block)).reshape(-1).view(np.uint8).data
        self._write(data, self._next[name])
        self._next[name] += len(data)

    def finish(self) -> None:
        """Put everything on the disk. Raises ValueError when rows are missing or too many."""
        if self._next != self._end:
            wrong = next(name for name in self._end if self._next[name] != self._end[name])
            raise ValueError(f"{self.path}: {wrong} has another number of rows than planned.")
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _not_written(self.path, error) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise _not_written(self.path, error) from None
            view, offset = view[count:], offset + count


def file_header(tensors: dict[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, and where in the file each one begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts = {}
    position = 0
    # The format wants values aligned to their size: the widest come first.
    for name, info in sorted(tensors.items(), key=lambda entry: -entry[1].dtype.size):
        entries[name] = {
            "dtype": _CODES[str(info.dtype).removeprefix("mlx.core.").rstrip("_")],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        starts[name] = position
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _not_written(path: Path, error: OSError) -> NotWritten:
    return NotWritten(path, f"could not be written ({error.strerror})")
