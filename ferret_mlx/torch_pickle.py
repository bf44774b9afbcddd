"""The pickle inside a PyTorch checkpoint, read without torch and without running any of it.

`torch.save` writes a dict of tensors as pickle opcodes that call `torch._utils._rebuild_tensor_v2`
on references to raw storages. Only the handful of names that such a dict needs is known here;
each stands for an inert record. Any other name ends the reading before anything is called.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from math import prod
from typing import Any, NamedTuple

from .tensor_files import MAX_DIMENSION

# torch storage class -> name of the element type
STORAGE_TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class StorageType(NamedTuple):
    element: str


class Storage(NamedTuple):
    """A run of elements in the archive's record `data/KEY`."""

    key: str
    element: str
    numel: int


class TensorRecord(NamedTuple):
    """Where a tensor's elements lie: offset and strides count elements of the storage.

    Like all records here a tuple, which a pickle cannot alter once its values are checked.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last one that the tensor touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in row-major order."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True


class RefusedPickle(ValueError):
    """The pickle asks for something that a dict of tensors does not need."""


def read_tensor_dict(data: bytes) -> dict[str, TensorRecord]:
    """Parse the bytes of `data.pkl`. Raises ValueError; RefusedPickle names what was asked for."""
    try:
        value = _TensorUnpickler(io.BytesIO(data)).load()
    except RefusedPickle:
        raise
    # A damaged pickle can fail in any way that the opcodes' operands allow.
    except Exception as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected a dict of tensors.")
    # A pickle may give an OrderedDict attributes of its own, `items` among them.
    records = list(dict.items(value))
    for name, record in records:
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            kind = type(record).__name__
            raise ValueError(f"its entry {name!r} is a {kind}; expected a flat dict of tensors.")
    return dict(records)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    backward_hooks: Any = None,
    metadata: Any = None,
) -> TensorRecord:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor's storage, offset, shape or strides are malformed.")
    record = TensorRecord(storage, offset, tuple(shape), tuple(strides))
    if len(shape) != len(strides) or offset + record.extent > storage.numel:
        raise ValueError(f"a tensor of shape {record.shape} reaches beyond its storage.")
    if max(record.shape, default=0) > MAX_DIMENSION:
        raise ValueError(f"a tensor has the impossible shape {record.shape}.")
    # Zero strides could otherwise blow a few bytes up to any size.
    if prod(shape) > storage.numel:
        raise ValueError(f"a tensor of shape {record.shape} repeats elements of its storage.")
    return record


def _rebuild_parameter(tensor: Any, requires_grad: Any, backward_hooks: Any) -> TensorRecord:
    if not isinstance(tensor, TensorRecord):
        raise ValueError("a parameter is not built of a tensor.")
    return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
_KNOWN |= {("torch", name): StorageType(element) for name, element in STORAGE_TYPES.items()}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise RefusedPickle(
                f"its pickle names {module}.{name}, which a dict of tensors does not need; "
                "nothing of it was run, do not load this file elsewhere unless you trust it."
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise RefusedPickle("its pickle refers to something other than tensor storage.")
        _, kind, key, _location, count = pid
        if not isinstance(kind, StorageType):
            raise RefusedPickle("its pickle refers to a storage of unknown type.")
        # The key becomes part of a record name in the archive.
        if type(key) is not str or not key.isalnum() or type(count) is not int or count < 0:
            raise ValueError("a storage reference is malformed.")
        return Storage(key, kind.element, count)
