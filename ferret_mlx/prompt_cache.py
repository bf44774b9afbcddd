"""The keys and values of a prompt, and which of its ids they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.models.cache import KVCache, trim_prompt_cache


class PromptCache:
    """mlx_lm's caches, one per layer, with the ids that were evaluated into them.

    Attributes:
        layers: to be passed to the model, which fills them.
        ids: with -200 for the image.
        kv_bits: None, or the bits to which keys and values are quantized.
    """

    def __init__(
        self,
        layers: list[Any],
        length: Callable[[Sequence[int]], int],
        kv_bits: int | None = None,
    ):
        """length: how many places ids take, those of the image included."""
        self.layers = layers
        self.ids: list[int] = []
        self.kv_bits = kv_bits
        self._length = length

    @property
    def tokens(self) -> int:
        """Places that are taken."""
        return self._length(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, those of places yet to be filled included."""
        return sum(layer.nbytes for layer in self.layers if not layer.empty())

    def trim(self, count: int) -> None:
        """Keep the first `count` ids."""
        self.ids = self.ids[:count]
        trim_prompt_cache(self.layers, self.layers[0].offset - self.tokens)

    def record(self, ids: Sequence[int]) -> None:
        """Note which of these ids the layers have come to hold."""
        image_places = self._length(ids) - len(ids)
        self.ids = list(ids[: self.layers[0].offset - image_places])
        self.trim(len(self.ids))

    def prefix(self, count: int) -> list[KVCache]:
        """Layers of the first `count` ids alone, not copied; only for caches without `kv_bits`."""
        length = self._length(self.ids[:count])
        shared = []
        for layer in self.layers:
            part = KVCache()
            part.keys, part.values = layer.keys[..., :length, :], layer.values[..., :length, :]
            part.offset = length
            shared.append(part)
        return shared
