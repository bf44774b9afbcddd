"""The released weights are differences to Vicuna: target = delta + base, added in float16.

Source: apple/ml-ferret, `ferret/model/apply_delta.py`; the rules are those of its arithmetic,
with every case that it would pass over in silence turned into an error.
"""

from __future__ import annotations

import mlx.core as mx

from .checkpoint import Checkpoint, is_buffer
from .tensor_files import TensorInfo

# What Ferret adds to the language model ...
_ADDED = ("model.mm_projector.", "model.region_geo_sampler.", "model.vision_tower.")
# ... and what grows by the tokens that it adds.
_GROWN = ("model.embed_tokens.weight", "lm_head.weight")


class MergedCheckpoint:
    """A delta laid over its base, merged tensor by tensor as they are read (float16)."""

    def __init__(self, delta: Checkpoint, base: Checkpoint):
        """Raises ValueError naming the tensor when the two do not belong together."""
        _check_names(delta, base)
        self._delta, self._base = delta, base
        self._names = [name for name in delta.names() if not is_buffer(name)]
        for name in self._names:
            if name in base:
                _check_shapes(name, delta, base)

    def names(self) -> list[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._delta.info(name).shape, mx.float16)

    def read(self, name: str) -> mx.array:
        delta = self._delta.read(name).astype(mx.float16)
        if name not in self._base:
            return delta
        base = self._base.read(name).astype(mx.float16)
        if len(base) == len(delta):
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


def _check_shapes(name: str, delta: Checkpoint, base: Checkpoint) -> None:
    ours, theirs = delta.info(name).shape, base.info(name).shape
    grown = name in _GROWN and ours[1:] == theirs[1:] and ours[:1] > theirs[:1]
    if ours != theirs and not grown:
        raise ValueError(
            f"{name} is {theirs} in {base.path} but {ours} in {delta.path}; "
            "give the base model that the delta was made from."
        )
