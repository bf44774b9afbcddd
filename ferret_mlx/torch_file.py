"""PyTorch's checkpoint format (a zip archive since PyTorch 1.6), read without torch."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .tensor_files import (
    ITEM_SIZES,
    MAX_HEADER,
    PositionedFile,
    TensorInfo,
    mx_dtype,
    np_dtype,
    to_mx,
)
from .torch_pickle import TensorRecord, read_tensor_dict


class TorchFile(PositionedFile):
    """A file of `torch.save`: a zip of stored entries, one per storage, and a pickle.

    A storage's CRC-32 is checked before a tensor of it is first read, which reads the storage
    twice (the second time from the system's cache) and never holds it.
    """

    def _open(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        # zipfile lets a damaged directory surface as any of these.
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError):
            raise ValueError(
                f"{self.path} is truncated or damaged (no zip directory); copy it again."
            ) from None
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ValueError(
                f"{self.path} is damaged: its zip directory repeats a name; copy it again."
            )
        pickles = [
            name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(pickles) != 1:
            raise ValueError(
                f"{self.path} is a zip archive but not one of torch.save (no data.pkl); "
                "give a checkpoint."
            )
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "constants.pkl" in self._entries:
            raise ValueError(f"{self.path} is a TorchScript archive; expected a dict of tensors.")
        if self._root + "byteorder" in self._entries:
            order = self._record("byteorder")
            if order != b"little":
                raise ValueError(
                    f"{self.path} has byte order {order!r}; "
                    "save it again on a little-endian machine."
                )
        data = self._record("data.pkl")
        try:
            self._tensors = read_tensor_dict(data)
        except ValueError as error:
            raise type(error)(f"{self.path}: {error}") from None
        self._checked: set[str] = set()
        for name, tensor in self._tensors.items():
            self._check_storage(name, tensor)

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(tensor.shape, mx_dtype(tensor.storage.element))

    def read(self, name: str) -> mx.array:
        tensor = self._tensors[name]
        size = ITEM_SIZES[tensor.storage.element]
        start = self._verify_storage(name, tensor)
        data = np.empty(tensor.extent * size, np.uint8)
        self.read_into(data.data, start + tensor.offset * size)
        elements = data.view(np_dtype(tensor.storage.element))
        if 0 in tensor.shape:
            view = elements.reshape(tensor.shape)
        else:
            strides = [size * stride for stride in tensor.strides]
            view = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        return to_mx(np.ascontiguousarray(view).reshape(tensor.shape), tensor.storage.element)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        tensor = self._tensors[name]
        element = tensor.storage.element
        if tensor.is_contiguous:
            offset = self._verify_storage(name, tensor) + tensor.offset * ITEM_SIZES[element]
            yield from self.blocks_at(offset, tensor.shape, element, rows)
        else:
            value = self.read(name)
            for first in range(0, len(value), rows):
                yield value[first : first + rows]

    def _check_storage(self, name: str, tensor: TensorRecord) -> None:
        storage = tensor.storage
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        if entry is None:
            raise ValueError(f"{self.path} lacks the storage of {name}; copy it again.")
        expected = storage.numel * ITEM_SIZES[storage.element]
        if entry.file_size != expected:
            raise ValueError(
                f"{self.path}: the storage of {name} has {entry.file_size} bytes, "
                f"expected {expected}; copy it again."
            )

    def _locate(self, record: str) -> tuple[zipfile.ZipInfo, int]:
        """The record's directory entry and the file offset of its first byte."""
        entry = self._entries[self._root + record]
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not stored or entry.compress_size != entry.file_size:
            raise ValueError(
                f"{self.path}: record {record} is compressed or encrypted; "
                "save it again with torch.save."
            )
        header = b""
        if 0 <= entry.header_offset <= self.size - 30:
            header = self.bytes_at(entry.header_offset, 30)
        if not header.startswith(b"PK\x03\x04"):
            raise ValueError(
                f"{self.path}: record {record} is not where the directory says; copy it again."
            )
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = entry.header_offset + 30 + name_length + extra_length
        if offset + entry.file_size > self.size:
            raise ValueError(f"{self.path} ends within record {record}; copy it again.")
        return entry, offset

    def _record(self, record: str) -> bytes:
        entry, offset = self._locate(record)
        if entry.file_size > MAX_HEADER:
            raise ValueError(
                f"{self.path}: record {record} has {entry.file_size} bytes, "
                "more than any checkpoint needs."
            )
        data = self.bytes_at(offset, entry.file_size)
        if zlib.crc32(data) != entry.CRC:
            raise ValueError(f"{self.path} is damaged: wrong CRC-32 of {record}; copy it again.")
        return data

    def _verify_storage(self, name: str, tensor: TensorRecord) -> int:
        """The file offset of the storage's first byte, once its CRC-32 is known to be right."""
        key = tensor.storage.key
        entry, start = self._locate(f"data/{key}")
        if key not in self._checked:
            crc = 0
            for chunk in self.chunks(start, entry.file_size):
                crc = zlib.crc32(chunk, crc)
            if crc != entry.CRC:
                raise ValueError(
                    f"{self.path} is damaged: wrong CRC-32 of the storage of {name}; copy it again."
                )
            self._checked.add(key)
        return start
