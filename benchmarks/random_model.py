"""A model of the released sizes with random weights: as fast as the real one, and free."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.tokenizer import Tokenizer

# The parity checkpoint has the released vocabulary and config; only its sizes are small.
CHECKPOINT = Path(__file__).parents[1] / "tests" / "data" / "parity" / "checkpoint"
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40},
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def random_model(
    size: str, dtype: mx.Dtype = mx.float16, bits: int | None = None
) -> tuple[Model, Processor]:
    """size: a key of SIZES; bits: of the language model, in groups of 64."""
    values = read_config(CHECKPOINT)
    chosen = dict(SIZES[size])
    heads = chosen.pop("heads")
    values |= chosen | {"num_attention_heads": heads, "num_key_value_heads": heads}
    values |= {"mm_hidden_size": VISION["hidden_size"]}
    values["vision_config"] = values["vision_config"] | VISION
    config = FerretConfig.from_dict(values)
    mx.random.seed(0)
    model = Model(config)
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(
            model, group_size=64, bits=bits,
            class_predicate=lambda path, module: (
                path.startswith("language_model.") and hasattr(module, "to_quantized")
            ),
        )  # fmt: skip
    # One by one: all float32 values that they are made from do not fit at the same time.
    for _, value in tree_flatten(model.parameters()):
        mx.eval(value)
    return model, Processor(config, Tokenizer(CHECKPOINT))
