"""A model of the released sizes with random weights: as fast as the real one, and free."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.source import RELEASED_TOWER_CONFIG
from ferret_mlx.tokenizer import Tokenizer
from ferret_mlx.vision import VisionTower

# The parity checkpoint has the released vocabulary and config; only its sizes are small.
CHECKPOINT = Path(__file__).parents[1] / "tests" / "data" / "parity" / "checkpoint"
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40},
}
VISION = RELEASED_TOWER_CONFIG


def random_model(
    size: str, dtype: mx.Dtype = mx.float16, bits: int | None = None
) -> tuple[Model, Processor]:
    """size: a key of SIZES; bits: of the language model, in groups of 64."""
    config = FerretConfig.from_dict(_config(size))
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


def random_tower_folder(folder: Path) -> VisionTower:
    """Write an MLX folder of the 7B model that holds its config and, in float16, its vision tower
    only."""
    values = _config("7b")
    mx.random.seed(0)
    tower = VisionTower(FerretConfig.from_dict(values).vision)
    tower.set_dtype(mx.float16)
    weights = {f"vision_tower.{name}": value for name, value in tree_flatten(tower.parameters())}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return tower


def _config(size: str) -> dict[str, Any]:
    values = read_config(CHECKPOINT)
    chosen = dict(SIZES[size])
    heads = chosen.pop("heads")
    values |= chosen | {"num_attention_heads": heads, "num_key_value_heads": heads}
    values |= {"mm_hidden_size": VISION["hidden_size"]}
    values["vision_config"] = values["vision_config"] | VISION
    return values
