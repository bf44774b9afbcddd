"""The released weights are differences to Vicuna: target = delta + base, added in float16.

Source: apple/ml-ferret, `ferret/model/apply_delta.py`; the rules are those of its arithmetic,
with every case that it would pass over in silence turned into an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from .checkpoint import Checkpoint, is_buffer
from .tensor_files import TensorInfo

# What Ferret adds to the language model ...
_ADDED = ("model.mm_projector.", "model.region_geo_sampler.", "model.vision_tower.")
# ... and what grows by the tokens that it adds.
_GROWN = ("model.embed_tokens.weight", "lm_head.weight")


class MergedCheckpoint:
    """A delta laid over its base, merged tensor by tensor as they are read (float16)."""

    def __init__(self, delta: Checkpoint, base: Checkpoint, base_vocabulary: int | None = None):
        """base_vocabulary: how many tokens the base's config says that it has.

        Raises ValueError naming the tensor when the two do not belong together.
        """
        _check_names(delta, base)
        self._delta, self._base = delta, base
        self._names = [name for name in delta.names() if not is_buffer(name)]
        for name in self._names:
            _check_dtype(name, delta)
            if name in base:
                _check_dtype(name, base)
                _check_shapes(name, delta, base, base_vocabulary)
                if name.endswith("norm.weight"):
                    _check_values(name, delta, base)

    def names(self) -> list[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._delta.info(name).shape, mx.float16)

    def read(self, name: str) -> mx.array:
        return _add(self._delta.read(name), self._base.read(name) if name in self._base else None)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        base = self._base.blocks(name, rows) if name in self._base else iter(())
        for block in self._delta.blocks(name, rows):
            yield _add(block, next(base, None))

    def location(self, name: str) -> str:
        delta = self._delta.location(name)
        return f"{delta} + {self._base.location(name)}" if name in self._base else delta


def _add(delta: mx.array, base: mx.array | None) -> mx.array:
    """The sum of all rows that there are in both, and the delta's further rows as they are."""
    delta = delta.astype(mx.float16)
    if base is None:
        return delta
    base = base.astype(mx.float16)
    if base.shape == delta.shape:
        return delta + base
    return mx.concatenate([delta[: len(base)] + base, delta[len(base) :]])


def _check_names(delta: Checkpoint, base: Checkpoint) -> None:
    for name in delta.names():
        if name not in base and not is_buffer(name) and not name.startswith(_ADDED):
            raise ValueError(
                f"{base.path} lacks {name}; it is not the base of {delta.path}, "
                "give the one that the delta was made from."
            )
    for name in base.names():
        if name not in delta and not is_buffer(name):
            raise ValueError(
                f"{base.path} holds {name}, which {delta.path} lacks; "
                "give the base that the delta was made from."
            )


def _check_shapes(name: str, delta: Checkpoint, base: Checkpoint, vocabulary: int | None) -> None:
    ours, theirs = delta.info(name).shape, base.info(name).shape
    grown = name in _GROWN and ours[1:] == theirs[1:] and ours[:1] > theirs[:1]
    if ours != theirs and not grown:
        raise ValueError(
            f"{name} is {theirs} in {base.location(name)} but {ours} in {delta.location(name)}; "
            "give the base model that the delta was made from."
        )
    # Rows that the base has lost would look like tokens that the delta adds.
    if name in _GROWN and vocabulary is not None and theirs[0] != vocabulary:
        raise ValueError(
            f"{base.location(name)}: {name} has {theirs[0]} rows, its config.json says "
            f"vocab_size {vocabulary}; copy both again."
        )


def _check_values(name: str, delta: Checkpoint, base: Checkpoint) -> None:
    """Catch a shard that was copied to the other folder: shards in the middle of both have the
    same names and shapes. Norms are small, and every layer has some."""
    value = delta.read(name)
    if mx.array_equal(value, base.read(name)) and mx.any(value != 0):
        raise ValueError(
            f"{name} is the same in {delta.location(name)} and in {base.location(name)}; "
            "one of the two files belongs into the other folder, copy both again."
        )


def _check_dtype(name: str, checkpoint: Checkpoint) -> None:
    dtype = checkpoint.info(name).dtype
    if not mx.issubdtype(dtype, mx.floating):
        raise ValueError(
            f"{checkpoint.location(name)}: {name} holds {dtype}, expected floating point numbers; "
            "copy the file again."
        )
