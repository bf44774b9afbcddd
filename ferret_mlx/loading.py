"""MLX folder or Hub id -> (model, processor)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from .blas import INSTALL_HINT, preload_openblas
from .checkpoint import open_checkpoint
from .config import FerretConfig
from .coreml_tower import CoreMLTower, check_runtime, open_package
from .hub import bundled_model, find_folder
from .json_fields import read_json
from .model import Model, check_weights
from .processor import Processor
from .sharding import shard_language_model
from .terminal import report
from .tokenizer import Tokenizer

DEQUANTIZED_LIMIT = 2 * 10**9  # bytes

_blas_hint_given = False


def load(
    path_or_hub_id: str | Path | None = None,
    dequantize: bool = True,
    lazy: bool = False,
    vision: str | Path = "mlx",
    coreml_compute_units: str = "ALL",
    tensor_group: mx.distributed.Group | None = None,
) -> tuple[Model, Processor]:
    """Load a converted model and what prepares its inputs.

    path_or_hub_id: an MLX folder as `convert.py` writes it, or the Hub id of one; the bundled
        model when left out. What exists on disk, or starts with `/`, `./`, `../` or `~`, is
        never looked up on the Hub.
    dequantize: on the CPU, turn quantized weights into float32 where all weights then stay under
        2 GB; MLX's quantized products are slow there.
    lazy: read the values of the weights only when they are used.
    vision: what runs the vision tower. `mlx`; `coreml`, on macOS: the Core ML package in the
        model's folder, as `convert.py --coreml` writes it; or the path of such a package.
    coreml_compute_units: ALL, CPU_AND_NE (the Neural Engine), CPU_AND_GPU or CPU_ONLY.
    tensor_group: processes that split the language model among them, of
        `mx.distributed.init()` under `mlx.launch`; all must then ask the same questions.

    On a GPU weights keep their dtype, on the CPU floating point weights become float32.

    Raises FileNotFoundError (no such folder, Hub model or file) or ValueError (another kind of
    model, damaged or missing weights, a Core ML package of another model or elsewhere than on
    macOS, a language model that does not divide), with one line that says what to do.
    """
    if vision != "mlx":
        check_runtime(vision, coreml_compute_units)
    _hint_at_blas()
    name = bundled_model() if path_or_hub_id is None else path_or_hub_id
    # The config comes alone first: no weights are fetched of a model that is then refused.
    folder = find_folder(name, "the model", weights=False)
    values = read_json(folder / "config.json")
    if values.get("model_type") == "ferret" and "vision_config" not in values:
        raise ValueError(_convert_first(name))
    config = FerretConfig.from_dict(values)
    folder = find_folder(name, "the model", packages=vision == "coreml")
    tokenizer = Tokenizer(folder)
    if len(tokenizer) > config.text["vocab_size"]:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.text['vocab_size']}; they belong to different models."
        )
    tower = None
    if vision != "mlx":
        tower = open_package(vision, folder, config, coreml_compute_units)
    model = _load_model(folder, config, dequantize, tower)
    if tensor_group is not None and tensor_group.size() > 1:
        shard_language_model(model, tensor_group)
    if not lazy:
        mx.eval(model.parameters())
        for stage in range(len(config.sampler.stages)):
            model.region_sampler.folded(stage)
    return model, Processor(config, tokenizer)


def _load_model(
    folder: Path, config: FerretConfig, dequantize: bool, tower: CoreMLTower | None
) -> Model:
    """The model, whose weights are not read yet."""
    if not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no model*.safetensors; give a folder that convert.py made."
        )
    # Looks into every file first: mx.load reads lazily and would fail in the middle of an answer.
    with open_checkpoint(folder) as checkpoint:
        if any(name.startswith("model.layers.") for name in checkpoint.names()):
            raise ValueError(_convert_first(folder))
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= cast(dict[str, mx.array], mx.load(str(file)))

    model = Model(config)
    weights = model.sanitize(weights)
    if config.quantization is not None:
        quantize_layers(model, config.quantization, weights)
    check_weights(model, weights, folder, "convert the checkpoint again")
    model.load_weights(list(weights.items()), strict=True)
    model.eval()

    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        model.set_dtype(mx.float32)
    if tower is not None:
        tower.dtype = model.vision_tower.pre_layrnorm.weight.dtype
        model.vision_tower = tower  # before the weights that it replaces are read
    if on_cpu and dequantize and _parameter_count(model) * mx.float32.size < DEQUANTIZED_LIMIT:
        dequantize_model(model)
        model.set_dtype(mx.float32)  # some modes dequantize to bfloat16
    return model


def quantize_layers(
    model: nn.Module, quantization: dict[str, Any], weights: dict[str, mx.array]
) -> None:
    """Replace the layers that `weights` hold quantized, by mlx_lm's convention.

    `quantization` has the default bits, group_size and mode, and under a layer's path either the
    options of that layer or whether it is quantized. Raises ValueError for impossible options.
    """

    def options_of(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        return hasattr(module, "to_quantized") and f"{path}.scales" in weights

    try:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=options_of,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config.json: quantization does not fit the model ({error}); "
            "convert the checkpoint again."
        ) from None


def _convert_first(name: str | Path) -> str:
    return (
        f"{name} is a PyTorch checkpoint; convert it first "
        f"(python convert.py --hf-path {name} --mlx-path OUT)."
    )


def _parameter_count(model: Model) -> int:
    """Parameters that the model has once dequantized."""
    count = 0
    for _, module in model.named_modules():
        for name, value in module.items():
            if not isinstance(value, mx.array) or name in ("scales", "biases"):
                continue
            packed = name == "weight" and hasattr(module, "bits")
            count += value.size * 32 // module.bits if packed else value.size
    return count


def _hint_at_blas() -> None:
    global _blas_hint_given
    on_linux_cpu = sys.platform.startswith("linux") and mx.default_device() == mx.cpu
    if on_linux_cpu and not preload_openblas() and not _blas_hint_given:
        _blas_hint_given = True
        report(f"note: {INSTALL_HINT}")
