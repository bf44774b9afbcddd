"""A quantized MLX folder as if it had never been quantized, restored tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from .checkpoint import Checkpoint
from .tensor_files import TensorInfo

_WORD = 32  # bits of a packed element


def dequantize(parts: Sequence[mx.array], options: dict[str, Any]) -> mx.array:
    """The weight that mx.quantize made `parts` of: packed values, scales and maybe biases."""
    packed, scales, *biases = parts
    return mx.dequantize(packed, scales, biases[0] if biases else None, **options)


def dequantize_float32(parts: Sequence[mx.array], options: dict[str, Any]) -> mx.array:
    """The same without rounding to the scales' dtype; on a CPU several times as fast."""
    packed, *rest = parts
    floats = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in rest]
    return dequantize([packed, *floats], options)


class DequantizedCheckpoint:
    """The tensors of a quantized MLX folder, each layer's weight, scales and biases as one.

    Restored weights have the dtype of the scales, or bfloat16 in the modes whose scales are
    bytes.
    """

    def __init__(self, packed: Checkpoint, quantization: Any):
        """quantization: that of config.json, by mlx-lm's convention. Raises ValueError naming
        the tensor where it does not fit."""
        if not isinstance(quantization, dict):
            raise ValueError(f"{packed.path.parent} is not quantized; there is nothing to restore.")
        self._packed = packed
        stored = packed.names()
        scaled = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
        parts = {f"{layer}.{part}" for layer in scaled for part in ("scales", "biases")}
        self._names = [name for name in stored if name not in parts]
        self._options = {
            f"{layer}.weight": self._layer_options(layer, quantization) for layer in sorted(scaled)
        }

    def names(self) -> list[str]:
        return self._names

    def options(self, name: str) -> dict[str, Any] | None:
        """group_size, bits and mode of a quantized weight; None for any other tensor."""
        return self._options.get(name)

    def info(self, name: str) -> TensorInfo:
        shape, dtype = self._packed.info(name)
        options = self._options.get(name)
        if options is None:
            return TensorInfo(shape, dtype)
        width = shape[-1] * _WORD // options["bits"]
        scales = self._packed.info(_beside(name, "scales")).dtype
        restored = scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
        return TensorInfo((*shape[:-1], width), restored)

    def read(self, name: str) -> mx.array:
        blocks = list(self.blocks(name, 1 << 16))
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        options = self._options.get(name)
        if options is None:
            yield from self._packed.blocks(name, rows)
            return
        parts = [name, _beside(name, "scales")]
        if _beside(name, "biases") in self._packed:
            parts.append(_beside(name, "biases"))
        for values in zip(*(self._packed.blocks(part, rows) for part in parts), strict=True):
            yield dequantize(values, options)

    def location(self, name: str) -> str:
        return self._packed.location(name)

    def _layer_options(self, layer: str, quantization: dict[str, Any]) -> dict[str, Any]:
        own = quantization.get(layer)
        chosen = own if isinstance(own, dict) else quantization
        options = {
            "group_size": chosen.get("group_size"),
            "bits": chosen.get("bits"),
            "mode": chosen.get("mode", "affine"),
        }
        weight = f"{layer}.weight"
        try:
            for key in ("group_size", "bits"):
                if type(options[key]) is not int:
                    raise TypeError(f"{key} is {options[key]!r}")
            shape, dtype = self._packed.info(weight)
            blank = [mx.zeros(shape, dtype)]
            for part in ("scales", "biases"):
                if f"{layer}.{part}" in self._packed:
                    blank.append(mx.zeros(*self._packed.info(f"{layer}.{part}")))
            dequantize(blank, options)  # lazy: only shapes and options are checked here
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{self._packed.path}: {weight} does not fit its quantization in config.json "
                f"({error}); convert the checkpoint again."
            ) from None
        return options


def _beside(weight: str, part: str) -> str:
    return f"{weight.removesuffix('weight')}{part}"
