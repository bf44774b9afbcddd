"""Weights of the vision tower -> Core ML's intermediate language (MIL).

The program computes what `vision.VisionTower` does, layer by layer, with static shapes. Every
operation is given in the program's own precision, so that no conversion pass has to choose one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Program, types

from .config import VisionConfig
from .coreml_tower import FEATURES
from .tower_weights import ReadTensor

_TYPES = {"float16": types.fp16, "float32": types.fp32}
_GELU_MODES = {"quick_gelu": "SIGMOID_APPROXIMATION", "gelu": "EXACT"}


def vision_program(
    read: ReadTensor,
    config: VisionConfig,
    precision: str,
    target: Any,
    image_constants: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Program:
    """Build the program from pixels to the features (1, rows * columns, C).

    read: gives the tower's tensors, see `tower_weights.open_tower`.
    precision: float16 or float32, of weights, operations, input and output.
    target: coremltools' deployment target, which decides the version of the operations.
    image_constants: mean and std of each channel. The program then reads `image`, 0..255 of shape
        (1, 3, S, S) in float32, and normalises it; else it reads normalised `pixel_values` of the
        same shape.
    """
    graph = _Graph(read, config, precision)
    shape = (1, 3, config.image_size, config.image_size)
    if image_constants is None:
        pixels = mb.TensorSpec(shape=shape, dtype=_TYPES[precision])

        @mb.program(input_specs=[pixels], opset_version=target)
        def tower(pixel_values):
            return graph.encode(graph.embed(pixel_values))

        return tower

    mean, std = (np.array(values, np.float64) for values in image_constants)
    image_spec = mb.TensorSpec(shape=shape, dtype=types.fp32)

    @mb.program(input_specs=[image_spec], opset_version=target)
    def tower_of_image(image):
        return graph.encode(graph.embed_image(image, mean, std))

    return tower_of_image


class _Graph:
    """The tower's stages, each adding its operations to the function that is being built."""

    def __init__(self, read: ReadTensor, config: VisionConfig, precision: str):
        self.read, self.config, self.precision = read, config, precision
        self.dtype = np.dtype(precision).type

    def constant(self, value: np.ndarray | float, name: str = "") -> np.ndarray:
        with np.errstate(over="ignore"):
            constant = np.asarray(value).astype(self.dtype)
        if not np.isfinite(constant).all():
            raise ValueError(
                f"vision_tower.{name} has values beyond {self.precision}; "
                "use --coreml-precision float32."
            )
        return constant

    def weight(self, name: str) -> np.ndarray:
        return self.constant(self.read(name), name)

    def embed(self, pixels: Any) -> Any:
        """(1, 3, S, S) normalised -> (1, 1 + rows * columns, C)."""
        return self._patches(pixels, self._kernel())

    def embed_image(self, image: Any, mean: np.ndarray, std: np.ndarray) -> Any:
        """(1, 3, S, S) in 0..255 -> (1, 1 + rows * columns, C).

        In float16 a difference of whole numbers is exact. So the whole part of the mean is
        subtracted, and the convolution's weights and bias take in the rest.
        """
        kernel = self._kernel().astype(np.float64)
        center, spread = np.round(255 * mean), 255 * float(std.mean())
        rest = (center - 255 * mean) / (255 * std)
        bias = np.einsum("ocij,c->o", kernel, rest)
        kernel *= (spread / (255 * std))[:, None, None]
        if self.precision != "float32":
            image = mb.cast(x=image, dtype="fp16", name="image_in_float16")
        centered = mb.sub(x=image, y=self.constant(center[:, None, None]), name="centered")
        scaled = mb.mul(x=centered, y=self.constant(1 / spread), name="normalised")
        return self._patches(scaled, kernel, bias)

    def _kernel(self) -> np.ndarray:
        # (C, k, k, 3) -> (C, 3, k, k)
        return self.read("embeddings.patch_embedding.weight").transpose(0, 3, 1, 2)

    def _patches(self, pixels: Any, kernel: np.ndarray, bias: np.ndarray | None = None) -> Any:
        rows, columns = self.config.grid
        patch, width = self.config.patch_size, self.config.hidden_size
        name = "embeddings.patch_embedding.weight"
        options = {} if bias is None else {"bias": self.constant(bias, name)}
        # (1, 3, S, S) -> (1, C, rows, columns) -> (1, rows * columns, C)
        patches = mb.conv(
            x=pixels, weight=self.constant(kernel, name), strides=[patch, patch],
            pad_type="valid", name="patch_embedding", **options,
        )  # fmt: skip
        patches = mb.reshape(x=patches, shape=[1, width, rows * columns], name="patches_flat")
        patches = mb.transpose(x=patches, perm=[0, 2, 1], name="patches")
        class_token = self.weight("embeddings.class_embedding")[None, None]
        tokens = mb.concat(values=[class_token, patches], axis=1, name="tokens")
        positions = self.weight("embeddings.position_embedding.weight")[None]
        return mb.add(x=tokens, y=positions, name="embeddings")

    def encode(self, embeddings: Any) -> Any:
        """(1, 1 + rows * columns, C) -> (1, rows * columns, C), by the layers that are read."""
        x = self._norm(embeddings, "pre_layrnorm")
        for index in range(self.config.layers_used):
            layer = f"encoder.layers.{index}"
            attended = self._attend(self._norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
            x = mb.add(x=x, y=attended, name=_name(f"{layer}.attended"))
            inner = self._linear(self._norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
            mode = _GELU_MODES[self.config.hidden_act]
            inner = mb.gelu(x=inner, mode=mode, name=_name(f"{layer}.mlp.activation"))
            x = mb.add(
                x=x, y=self._linear(inner, f"{layer}.mlp.fc2"), name=_name(f"{layer}.output")
            )
        rows, columns = self.config.grid
        end = [1, 1 + rows * columns, self.config.hidden_size]
        return mb.slice_by_index(x=x, begin=[0, 1, 0], end=end, name=FEATURES)

    def _norm(self, x: Any, path: str) -> Any:
        return mb.layer_norm(
            x=x, axes=[-1], gamma=self.weight(f"{path}.weight"), beta=self.weight(f"{path}.bias"),
            epsilon=self.dtype(self.config.layer_norm_eps), name=_name(path),
        )  # fmt: skip

    def _linear(self, x: Any, path: str) -> Any:
        return mb.linear(
            x=x, weight=self.weight(f"{path}.weight"), bias=self.weight(f"{path}.bias"),
            name=_name(path),
        )  # fmt: skip

    def _attend(self, x: Any, path: str) -> Any:
        rows, columns = self.config.grid
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        split = [1, 1 + rows * columns, heads, width // heads]
        # (1, L, C) -> (1, heads, L, C / heads)
        queries, keys, values = (
            mb.transpose(
                x=mb.reshape(x=self._linear(x, f"{path}.{part}_proj"), shape=split),
                perm=[0, 2, 1, 3], name=_name(f"{path}.{part}"),
            )
            for part in "qkv"
        )  # fmt: skip
        queries = mb.mul(
            x=queries, y=self.dtype((width // heads) ** -0.5), name=_name(f"{path}.q_scaled")
        )
        scores = mb.matmul(x=queries, y=keys, transpose_y=True, name=_name(f"{path}.scores"))
        shares = mb.softmax(x=scores, axis=-1, name=_name(f"{path}.shares"))
        mixed = mb.matmul(x=shares, y=values, name=_name(f"{path}.mixed"))
        # (1, heads, L, C / heads) -> (1, L, C)
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3])
        mixed = mb.reshape(x=mixed, shape=[1, 1 + rows * columns, width])
        return self._linear(mixed, f"{path}.out_proj")


def _name(path: str) -> str:
    return path.replace("encoder.layers.", "layer").replace(".", "_")
