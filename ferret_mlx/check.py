"""Verify an MLX folder by itself, and tensor by tensor against what it was converted from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from .checkpoint import Checkpoint, open_checkpoint
from .config import FerretConfig
from .dequantization import DequantizedCheckpoint, dequantize
from .hub import find_folder
from .json_fields import read_json
from .loading import quantize_layers
from .model import Model, check_weights
from .plan import Layer
from .report import RelativeError, TensorReport, table
from .safetensors_file import SafetensorsFile
from .source import Source
from .tokenizer import Tokenizer
from .writing import cast_blocks, is_finite

# How much larger than its own quantization's the error of a tensor may be: devices round
# differently.
_TOLERANCE = 1.05


def check(
    mlx_path: str | Path,
    against: str | Path | None = None,
    base_path: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> list[TensorReport]:
    """Print a table of the folder's parts; with `against`, first the error of every tensor.

    mlx_path: folder or Hub id of a converted model.
    against, base_path, vision_tower: what it was converted from, as for `convert`.

    Checked are config, tokenizer, index, names, shapes and dtypes, that all values are finite,
    and with `against` that tensors are equal, or as near as their quantization allows.

    Raises FileNotFoundError or ValueError, naming file and tensor, for the first fault.
    """
    folder = find_folder(mlx_path, "--check")
    config = FerretConfig.from_dict(read_json(folder / "config.json"))
    tokenizer = Tokenizer(folder)
    if len(tokenizer) > config.text["vocab_size"]:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{config.text['vocab_size']}; they belong to different models."
        )
    _check_files(folder)
    with open_checkpoint(folder) as packed:
        _check_tensors(folder, packed, config)
        restored = DequantizedCheckpoint(packed, config.quantization or {})
        if against is None:
            reports = list(_finite_values(packed, restored))
        else:
            source_folder = find_folder(against, "--against")
            with Source(source_folder, base_path, vision_tower) as source:
                reports = list(_compare(source, packed, restored, config))
    print(table(reports))
    print(f"{folder} is in order.", file=sys.stderr)
    return reports


def _check_files(folder: Path) -> None:
    """All weights are listed in the index, and made for MLX."""
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; convert the checkpoint again.")
    # mlx-lm and `load` read every model*.safetensors, listed or not.
    for path in sorted(folder.glob("model*.safetensors")):
        file = SafetensorsFile(path)
        file.close()
        listed = {name for name, shard in weight_map.items() if shard == path.name}
        if odd := sorted(listed ^ set(file.names())):
            raise ValueError(f"{path}: {odd[0]} is only in one of this file and {index.name}.")
        if file.metadata.get("format") != "mlx":
            raise ValueError(f"{path} has no metadata format: mlx; convert the checkpoint again.")
    missing = sorted(set(weight_map.values()) - {path.name for path in folder.iterdir()})
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, which {index.name} lists; copy it too.")


def _check_tensors(folder: Path, packed: Checkpoint, config: FerretConfig) -> None:
    """Names, shapes and kinds are those of the model that config.json describes."""
    blank = {name: mx.zeros(*packed.info(name)) for name in packed.names()}
    model = Model(config)
    if config.quantization is not None:
        quantize_layers(model, config.quantization, blank)
    advice = "convert the checkpoint again"
    check_weights(model, blank, folder, advice)
    for name, expected in dict(tree_flatten(model.parameters())).items():
        found = blank[name].dtype
        floats = mx.issubdtype(found, mx.floating) and mx.issubdtype(expected.dtype, mx.floating)
        if found != expected.dtype and not floats:
            raise ValueError(
                f"{packed.location(name)}: {name} holds {found}, expected {expected.dtype}; "
                f"{advice}."
            )


def _finite_values(packed: Checkpoint, restored: DequantizedCheckpoint) -> Iterator[TensorReport]:
    for name in tqdm(restored.names(), unit=" tensors", desc="checking", disable=None):
        layer = _layer(packed, restored, name)
        for part in layer.written:
            _check_finite(packed, part, layer.rows)
        yield TensorReport(name, layer.parameters, layer.bytes)


def _check_finite(packed: Checkpoint, name: str, rows: int) -> None:
    if mx.issubdtype(packed.info(name).dtype, mx.floating):
        for block in packed.blocks(name, rows):
            if not is_finite(block):
                raise ValueError(
                    f"{packed.location(name)}: {name} holds NaN or infinity; "
                    "convert the checkpoint again."
                )


def _compare(
    source: Source, packed: Checkpoint, restored: DequantizedCheckpoint, config: FerretConfig
) -> Iterator[TensorReport]:
    if sorted(source.names()) != sorted(restored.names()):
        odd = sorted(set(source.names()) ^ set(restored.names()))
        raise ValueError(f"{odd[0]} is only in one of {source.folder} and {packed.path.parent}.")
    print("relative error, largest absolute error, tensor")
    for name in tqdm(source.names(), unit=" tensors", desc="comparing", disable=None):
        layer = _layer(packed, restored, name)
        if layer.shape != source.info(name).shape:
            raise ValueError(
                f"{packed.location(name)}: {name} is {layer.shape}, in {source.location(name)} "
                f"{source.info(name).shape}; it was not converted from there."
            )
        for part in layer.written:
            _check_finite(packed, part, layer.rows)
        found, expected = RelativeError(), RelativeError()
        blocks = restored.blocks(name, layer.rows)
        for block, stored in zip(cast_blocks(source, layer), blocks, strict=True):
            found.add(block, stored)
            if layer.quantization is not None:
                again = mx.quantize(block, **layer.quantization)
                expected.add(block, dequantize(again, layer.quantization))
        tqdm.write(f"{found.value:.3e} {found.largest:.3e} {name}")
        if not found.value <= _TOLERANCE * expected.value:
            raise ValueError(
                f"{packed.location(name)}: {name} differs from {source.location(name)} by "
                f"{100 * found.value:.3g} %, its quantization explains "
                f"{100 * expected.value:.3g} %; it was not converted from there."
            )
        error = found.value if layer.quantization is not None else None
        yield TensorReport(name, layer.parameters, layer.bytes, error)


def _layer(packed: Checkpoint, restored: DequantizedCheckpoint, name: str) -> Layer:
    info, options = restored.info(name), restored.options(name)
    path = name.removesuffix(".weight")
    parts = [name, f"{path}.scales", f"{path}.biases"] if options else [name]
    written = {part: packed.info(part) for part in parts if part in packed}
    return Layer(name, info.shape, info.dtype, written, options)
