"""A saved Core ML package evaluated in NumPy, as written in its files.

Reads the program and the weights back through coremltools and computes each operation from its
definition in Apple's MIL reference, in float64 or float32, rounded to the type that the program
declares. Nothing here knows the vision tower or how its program was built.
"""

import math
from pathlib import Path

import numpy as np
from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
from coremltools.models.utils import load_spec
from coremltools.proto import MIL_pb2

_DTYPES = {
    MIL_pb2.BOOL: np.bool_,
    MIL_pb2.STRING: np.str_,
    MIL_pb2.FLOAT16: np.float16,
    MIL_pb2.FLOAT32: np.float32,
    MIL_pb2.INT8: np.int8,
    MIL_pb2.INT32: np.int32,
    MIL_pb2.UINT8: np.uint8,
    MIL_pb2.UINT32: np.uint32,
    MIL_pb2.UINT4: np.uint8,
    MIL_pb2.UINT6: np.uint8,
}
_READERS = {
    MIL_pb2.FLOAT16: "read_fp16_data",
    MIL_pb2.FLOAT32: "read_float_data",
    MIL_pb2.INT8: "read_int8_data",
    MIL_pb2.UINT8: "read_uint8_data",
    MIL_pb2.UINT4: "read_uint4_data",
    MIL_pb2.UINT6: "read_uint6_data",
}
_erf = np.vectorize(math.erf, otypes=[np.float64])


class Interpreter:
    """The program of a package; ``predict`` as coremltools' ``MLModel`` has it on macOS.

    ``constants``: those values by name, to look at or to change.
    """

    def __init__(self, package):
        package = Path(package)
        self.spec = load_spec(str(package))
        self._data = package / "Data" / "com.apple.CoreML"
        self._blobs = {}
        function = self.spec.mlProgram.functions["main"]
        (block,) = function.block_specializations.values()
        self.inputs = {item.name: item.type for item in function.inputs}
        self.output_names, self.operations = list(block.outputs), list(block.operations)
        self.constants = {
            op.outputs[0].name: self._value(op.attributes["val"])
            for op in self.operations
            if op.type == "const"
        }

    def predict(self, inputs: dict) -> dict[str, np.ndarray]:
        values = dict(self.constants)
        for name, kind in self.inputs.items():
            given = np.asarray(inputs[name])
            if self._is_image(name):
                # (S, S, 3) 0..255 -> (1, 3, S, S)
                given = given.transpose(2, 0, 1)[None]
            values[name] = _checked(name, given.astype(_dtype(kind)), kind)
        for op in self.operations:
            if op.type == "const":
                continue
            (output,) = op.outputs
            values[output.name] = self.evaluate(op, values)
        return {name: values[name] for name in self.output_names}

    def evaluate(self, op, values: dict) -> np.ndarray:
        """What an operation makes of values by name, in the shape and type that it declares."""
        arguments = {key: self._argument(a, values) for key, a in op.inputs.items()}
        # Where older systems have the operands of compressed weights.
        arguments |= {k: self._value(v) for k, v in op.attributes.items() if k != "name"}
        (output,) = op.outputs
        result = np.asarray(_OPERATIONS[op.type](**arguments)).astype(_dtype(output.type))
        return _checked(output.name, result, output.type)

    def _is_image(self, name: str) -> bool:
        described = {item.name: item.type for item in self.spec.description.input}
        return described[name].WhichOneof("Type") == "imageType"

    def _argument(self, argument, values: dict):
        bound = [
            values[b.name] if b.WhichOneof("binding") == "name" else self._value(b.value)
            for b in argument.arguments
        ]
        # Only the operands of a concat are a list.
        return bound[0] if len(bound) == 1 else bound

    def _value(self, value) -> np.ndarray:
        kind = value.type
        shape, dtype = _shape(kind), _dtype(kind)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            flat = self._read(blob.fileName, blob.offset, kind.tensorType.dataType)
        else:
            tensor = value.immediateValue.tensor
            field = tensor.WhichOneof("value")
            content = getattr(tensor, field).values
            flat = np.frombuffer(content, dtype) if field == "bytes" else np.array(list(content))
        return flat.astype(dtype).reshape(shape)

    def _read(self, file: str, offset: int, data_type: int) -> np.ndarray:
        path = self._data / file.removeprefix("@model_path/")
        if path not in self._blobs:
            self._blobs[path] = BlobReader(str(path))
        flat = np.asarray(getattr(self._blobs[path], _READERS[data_type])(offset))
        return flat.view(np.float16) if data_type == MIL_pb2.FLOAT16 else flat


def _shape(kind) -> tuple[int, ...]:
    dimensions = kind.tensorType.dimensions
    assert all(d.WhichOneof("dimension") == "constant" for d in dimensions), "a dynamic shape"
    return tuple(d.constant.size for d in dimensions)


def _dtype(kind) -> type:
    return _DTYPES[kind.tensorType.dataType]


def _checked(name: str, value: np.ndarray, kind) -> np.ndarray:
    assert value.shape == _shape(kind), (name, value.shape, _shape(kind))
    return value


def _wide(x: np.ndarray) -> np.ndarray:
    """What sums are formed in."""
    return x.astype(np.float32)


def _conv(x, weight, strides, pad_type, dilations, groups, pad=None, bias=None):
    assert str(pad_type) == "valid" and groups == 1 and (dilations == 1).all()
    rows, columns = weight.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(_wide(x), (rows, columns), axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    result = np.einsum("nchwij,ocij->nohw", windows, _wide(weight), optimize=True)
    return result if bias is None else result + _wide(bias)[:, None, None]


def _layer_norm(x, axes, gamma, beta, epsilon):
    x, axes = x.astype(np.float64), tuple(axes)
    centered = x - x.mean(axes, keepdims=True)
    variance = (centered**2).mean(axes, keepdims=True)
    return centered / np.sqrt(variance + float(epsilon)) * gamma + beta


def _linear(x, weight, bias):
    return _wide(x) @ _wide(weight).T + _wide(bias)


def _matmul(x, y, transpose_x, transpose_y):
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return _wide(x) @ _wide(y)


def _softmax(x, axis):
    powers = np.exp(x.astype(np.float64) - x.max(int(axis), keepdims=True))
    return powers / powers.sum(int(axis), keepdims=True)


def _gelu(x, mode):
    x = x.astype(np.float64)
    if str(mode) == "SIGMOID_APPROXIMATION":
        return x / (1 + np.exp(-1.702 * x))
    assert str(mode) == "EXACT"
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def _slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    assert squeeze_mask is None or not squeeze_mask.any()
    slices = []
    for axis in range(x.ndim):
        first = None if begin_mask is not None and begin_mask[axis] else begin[axis]
        last = None if end_mask is not None and end_mask[axis] else end[axis]
        slices.append(slice(first, last, None if stride is None else stride[axis]))
    return x[tuple(slices)]


def _affine_dequantize(quantized_data, zero_point, scale, axis):
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero_point, scale = (
        v.astype(np.float32).reshape(shape if v.ndim else ()) for v in (zero_point, scale)
    )
    return (quantized_data - zero_point) * scale


def _blockwise_shift_scale(data, scale, offset=None):
    for axis, size in enumerate(data.shape):
        scale = scale.repeat(size // scale.shape[axis], axis)
        offset = None if offset is None else offset.repeat(size // offset.shape[axis], axis)
    shifted = data.astype(np.float32) - (0 if offset is None else offset)
    return shifted * scale


def _lut_to_dense(indices, lut, shape=None, vector_axis=None):
    # Packed by the bit, first index in the lowest bits, in the form that older systems read.
    if shape is not None:
        width = int(math.log2(lut.size))
        bits = np.unpackbits(indices, bitorder="little")[: int(np.prod(shape)) * width]
        indices = (bits.reshape(-1, width) << np.arange(width)).sum(-1)
    else:
        shape = indices.shape
        assert lut.shape[-1] == 1 and lut.size == lut.shape[-2], "one table for all"
    return lut.reshape(-1)[indices].reshape(tuple(shape))


_OPERATIONS = {
    "add": lambda x, y: _wide(x) + _wide(y),
    "cast": lambda x, dtype: x,
    "concat": lambda values, axis, interleave: np.concatenate(values, int(axis)),
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "mul": lambda x, y: _wide(x) * _wide(y),
    "reshape": lambda x, shape: x.reshape(tuple(shape)),
    "slice_by_index": _slice_by_index,
    "softmax": _softmax,
    "sub": lambda x, y: _wide(x) - _wide(y),
    "transpose": lambda x, perm: x.transpose(tuple(perm)),
}
