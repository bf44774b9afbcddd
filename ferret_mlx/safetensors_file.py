"""The safetensors format: a JSON header with shapes and byte ranges, then the raw data."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod

import mlx.core as mx

from .tensor_files import (
    ITEM_SIZES,
    MAX_DIMENSION,
    MAX_HEADER,
    PositionedFile,
    TensorInfo,
    mx_dtype,
)

# element type in a header -> its name
TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFile(PositionedFile):
    """One .safetensors file, its byte ranges checked against its size."""

    def _open(self) -> None:
        length = struct.unpack("<Q", self.bytes_at(0, 8))[0] if self.size >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER, self.size - 8):
            raise ValueError(f"{self.path} is truncated or not a safetensors file; copy it again.")
        try:
            header = json.loads(self.bytes_at(8, length))
            metadata = header.pop("__metadata__", None)
            self._tensors = {
                name: (
                    TYPES[entry["dtype"]],
                    tuple(int(n) for n in entry["shape"]),
                    tuple(int(n) for n in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
        except (
            ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            raise ValueError(
                f"{self.path}: unreadable safetensors header ({error}); copy it again."
            ) from None
        # What the writer said about the file, {"format": "mlx"} for one.
        self.metadata = metadata if isinstance(metadata, dict) else {}
        self._start = 8 + length
        for name, (element, shape, offsets) in self._tensors.items():
            expected = prod(shape) * ITEM_SIZES[element]
            possible = all(0 <= n <= MAX_DIMENSION for n in shape)
            if not possible or len(offsets) != 2 or offsets[0] < 0:
                raise ValueError(f"{self.path}: malformed entry of {name}; copy it again.")
            if offsets[1] - offsets[0] != expected:
                raise ValueError(
                    f"{self.path}: {name} does not have {expected} bytes; copy it again."
                )
            if self._start + offsets[1] > self.size:
                raise ValueError(f"{self.path} is truncated: it ends before {name}; copy it again.")
        end = 0
        for name, (_, _, (first, last)) in sorted(
            self._tensors.items(), key=lambda entry: entry[1][2]
        ):
            if first != end:
                raise ValueError(
                    f"{self.path}: {name} does not begin where the tensor before it ends; "
                    "copy it again."
                )
            end = last
        if self._start + end != self.size:
            raise ValueError(f"{self.path} goes on after its last tensor; copy it again.")

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        element, shape, _ = self._tensors[name]
        return TensorInfo(shape, mx_dtype(element))

    def read(self, name: str) -> mx.array:
        element, shape, (first, _) = self._tensors[name]
        return self.array_at(self._start + first, shape, element)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        element, shape, (first, _) = self._tensors[name]
        return self.blocks_at(self._start + first, shape, element, rows)
