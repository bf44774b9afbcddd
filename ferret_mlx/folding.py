"""The linear maps in front of a sampler block's ReLU, folded into one for each end of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Folded:
    """What a point adds to a pair as neighbour and as kept point, before the ReLU; float32.

    Attributes:
        near, kept: (C, C), applied to the point's feature.
        near_xy, kept_xy: (C, 2), applied to its coordinates.
        bias: (C,), once per pair.
        weights: what all of it was made of.
    """

    near: mx.array
    near_xy: mx.array
    kept: mx.array
    kept_xy: mx.array
    bias: mx.array
    weights: tuple[mx.array, ...]


def fold(weights: tuple[mx.array, ...]) -> Folded:
    """diff's (W, b) and conv's ([A1 | A2], c) -> one map for each end of a pair.

    conv([diff(l - a), a]) = A1 W l + (A2 - A1 W) a + A1 b + c: both maps can be applied to each
    point once, not to each pair. The two parts nearly cancel, hence float32 in any case.
    """
    diff_weight, diff_bias, conv_weight, conv_bias = (w.astype(mx.float32) for w in weights)
    first, second = mx.split(conv_weight, 2, axis=1)
    near = first @ diff_weight
    kept = second - near
    folded = Folded(
        near=mx.contiguous(near[:, :-2]),
        near_xy=mx.contiguous(near[:, -2:]),
        kept=mx.contiguous(kept[:, :-2]),
        kept_xy=mx.contiguous(kept[:, -2:]),
        bias=first @ diff_bias + conv_bias,
        weights=weights,
    )
    mx.eval(folded.near, folded.near_xy, folded.kept, folded.kept_xy, folded.bias)
    return folded
