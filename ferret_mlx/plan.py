"""What a conversion will write, known before any weights are read: layers, shards and config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .model import Model
from .quantization import Quantization, quantize_model_parts
from .source import Source
from .tensor_files import TensorInfo

# Finished shards are what a resumed conversion keeps, hence smaller ones than mlx-lm's of 5 GB.
SHARD_BYTES = 1 << 30
# Elements that are read, added and quantized at a time; about 30 bytes of memory each.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A tensor of the source and what is written of it.

    written: the tensor itself, or its weight, scales and (in mode affine) biases.
    quantization: group_size, bits and mode; None when it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    written: dict[str, TensorInfo]
    quantization: dict[str, Any] | None

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(info.nbytes for info in self.written.values())

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return max(1, BLOCK_ELEMENTS // max(1, prod(self.shape[1:])))


@dataclass(frozen=True)
class Shard:
    file: str
    layers: tuple[Layer, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for layer in self.layers for name, info in layer.written.items()}


@dataclass(frozen=True)
class Plan:
    """The shards in the order in which they are written, and the config.json beside them."""

    shards: tuple[Shard, ...]
    config: dict[str, Any]

    @property
    def layers(self) -> Iterator[Layer]:
        return (layer for shard in self.shards for layer in shard.layers)

    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        weight_map = {name: shard.file for shard in self.shards for name in shard.tensors}
        return {
            "metadata": {
                "total_size": sum(layer.bytes for layer in self.layers),
                "total_parameters": sum(layer.parameters for layer in self.layers),
            },
            "weight_map": dict(sorted(weight_map.items())),
        }


def make_plan(source: Source, options: Quantization | None, dtype: str | None) -> Plan:
    """Which tensors the MLX folder of `source` holds, in which files.

    dtype: of everything that is not quantized; None keeps each tensor's own.

    mlx-lm's `quantize_model` decides, on a model without values. Raises ValueError when no layer
    can be quantized.
    """
    blank = {}
    for name in source.names():
        shape, stored = source.info(name)
        blank[name] = mx.zeros(shape, getattr(mx, dtype) if dtype else stored)  # never evaluated
    model = Model(source.config)
    model.load_weights(list(blank.items()), strict=True)
    config = dict(source.config.raw)
    config["region_read_order"] = source.config.sampler.read_order
    config["image_mean"] = list(source.config.image_mean)
    config["image_std"] = list(source.config.image_std)
    if dtype:
        config["torch_dtype"] = dtype
    if options is not None:
        config = quantize_model_parts(model, config, options)
    layers = _layers(model, blank)
    return Plan(_pack(layers), config)


def _layers(model: Model, blank: dict[str, mx.array]) -> list[Layer]:
    written = {
        name: TensorInfo(value.shape, value.dtype)
        for name, value in dict(tree_flatten(model.parameters())).items()
    }
    modules = dict(model.named_modules())
    layers = []
    for name, value in blank.items():
        path = name.rpartition(".")[0]
        names, quantization = [name], None
        if name == f"{path}.weight" and f"{path}.scales" in written:
            module = modules[path]
            quantization = {
                "group_size": module.group_size, "bits": module.bits, "mode": module.mode
            }  # fmt: skip
            parts = (f"{path}.scales", f"{path}.biases")
            names += [part for part in parts if part in written]
        parts_of_layer = {part: written.pop(part) for part in names}
        layers.append(Layer(name, value.shape, value.dtype, parts_of_layer, quantization))
    if written:
        raise AssertionError(f"no layer writes {sorted(written)}")
    return layers


def _pack(layers: list[Layer]) -> tuple[Shard, ...]:
    """Shards of at most SHARD_BYTES; a layer is never split, so each can be made on its own."""
    packed: list[list[Layer]] = []
    size = 0
    for layer in layers:
        if not packed or size + layer.bytes > SHARD_BYTES:
            packed.append([])
            size = 0
        packed[-1].append(layer)
        size += layer.bytes
    count = len(packed)
    if count == 1:
        return (Shard("model.safetensors", tuple(packed[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(part))
        for i, part in enumerate(packed, 1)
    )
