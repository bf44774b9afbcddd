"""The vision tower of an MLX folder by itself: its tensors, and what tells it from any other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from .checkpoint import open_checkpoint
from .config import FerretConfig
from .dequantization import DequantizedCheckpoint, dequantize_float32
from .model import check_weights
from .vision import VisionTower

PREFIX = "vision_tower."

ReadTensor: TypeAlias = Callable[[str], np.ndarray]


@contextmanager
def open_tower(folder: Path, config: FerretConfig) -> Iterator[ReadTensor]:
    """Yield what reads a tensor by its name after `vision_tower.`: float32, restored where it is
    quantized, in MLX's layout.

    Raises ValueError naming file and tensor where names, shapes or values are not in order.
    """
    with open_checkpoint(folder) as packed:
        restored = DequantizedCheckpoint(packed, config.quantization or {})
        blank = {
            name.removeprefix(PREFIX): mx.zeros(*restored.info(name))
            for name in restored.names()
            if name.startswith(PREFIX)
        }
        check_weights(
            VisionTower(config.vision), blank, folder, "give a folder that convert.py made"
        )

        def read(name: str) -> np.ndarray:
            stored = PREFIX + name
            options, layer = restored.options(stored), stored.removesuffix("weight")
            names = [stored, f"{layer}scales", f"{layer}biases"] if options else [stored]
            parts = [packed.read(part) for part in names if part in packed]
            restored_value = dequantize_float32(parts, options) if options else parts[0]
            value = np.array(restored_value.astype(mx.float32))
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{packed.location(stored)}: {stored} holds NaN or infinity; "
                    "convert the checkpoint again."
                )
            return value

        yield read


def tower_fingerprint(folder: Path, config: FerretConfig) -> str:
    """A SHA-256, in hex, of the tower's stored tensors, its config and the image constants."""
    described = (config.vision, config.image_mean, config.image_std)
    digest = hashlib.sha256(repr(described).encode())
    with open_checkpoint(folder) as packed:
        for name in sorted(packed.names()):
            if name.startswith(PREFIX):
                value = packed.read(name)
                digest.update(f"{name} {value.shape} {value.dtype}".encode())
                digest.update(np.array(value.view(mx.uint8)).tobytes())
    return digest.hexdigest()
