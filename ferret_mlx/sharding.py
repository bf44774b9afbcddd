"""The language model split over the processes of ``mlx.launch``, by mlx-lm's tensor parallelism.

Every process keeps a part of each attention and MLP layer: some of the heads, some of the hidden
units. Vision tower, projector, region sampler, word embeddings and output head stay whole in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from .model import Model

_MOST = 16  # processes that are tried for the advice

# MLX packs nvfp4's groups of 16 in pairs.
_LEAST_WIDTH = 32


def shard_language_model(model: Model, group: mx.distributed.Group) -> None:
    """Keep this process's part of the language model, in place.

    With `load(..., lazy=True)` before and an evaluation layer by layer, as `load` itself does it,
    no process ever holds the other parts.

    Raises ValueError when heads, widths or quantization groups do not divide: mlx-lm would shard
    such a model without a word, and it would answer nonsense.
    """
    count = group.size()
    if trouble := next(_obstacles(model, count), None):
        fitting = [str(n) for n in range(2, _MOST + 1) if not any(_obstacles(model, n))]
        advice = f"{', '.join(fitting)} would do" if fitting else "start a single one"
        raise ValueError(
            f"The language model cannot be split over {count} processes: {trouble}; {advice}."
        )
    model.language_model.shard(group)
    for layer in model.layers:
        mx.eval(layer.parameters())
    model.tensor_group = group


def common_parameters(name: str) -> bool:
    """Whether all processes hold the same values of the parameter with this name."""
    return not (name.startswith("language_model.model.layers.") and "_proj." in name)


def agreed(
    sampler: Callable[[mx.array], mx.array], group: mx.distributed.Group | None
) -> Callable[[mx.array], mx.array]:
    """A sampler whose tokens are those of the first process in all of them.

    Machines with different chips round differently, and would go on with different tokens.
    """
    if group is None:
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        # A product, so that the others still compute their part of the model for it.
        tokens = sampler(logprobs) * int(group.rank() == 0)
        return mx.distributed.all_sum(tokens, group=group)

    return sample


def _obstacles(model: Model, count: int) -> Iterator[str]:
    """What does not divide into so many parts."""
    text = model.config.text
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if text[name] % count:
            yield f"its {name} is {text[name]}, no multiple of {count}"
    for layer in model.layers:
        # The two whose inputs are split, and with them the groups that share a scale.
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if isinstance(linear, nn.QuantizedLinear):
                width = linear.weight.shape[1] * 32 // linear.bits
                group_size = max(linear.group_size, _LEAST_WIDTH)
                if width % (count * group_size):
                    yield (
                        f"{width} quantized weights of a row in groups of {linear.group_size} "
                        f"do not divide into {count} parts"
                    )
                    return
