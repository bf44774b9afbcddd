"""What a conversion starts from: a released folder, its base, and a vision tower, as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint, is_buffer, open_checkpoint
from .config import CLIP_MEAN, CLIP_STD, FerretConfig, vision_entries
from .delta import MergedCheckpoint
from .dequantization import DequantizedCheckpoint
from .hub import find_folder
from .json_fields import read_json
from .model import Model, check_weights
from .tensor_files import TensorInfo, Tensors

_QUANTIZATION = ("quantization", "quantization_config")
_TOWER_INSIDE = ("model.vision_tower.", "vision_tower.")
# The tower of the released models, for checkpoints that hold its weights but not its config.
_RELEASED_TOWER = "openai/clip-vit-large-patch14-336"
RELEASED_TOWER_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}


class Source:
    """The tensors of a whole Ferret model under their names in an MLX folder, and its config.

    The vision tower is the one named by `vision_tower`; else the folder's `vision_tower/`; else
    the tensors inside the checkpoint; else the Hub model that `mm_vision_tower` names.
    `dequantize`: the folder is a quantized MLX folder, whose tensors are restored.

    Names, shapes and kinds are checked on opening, before any weights are read. Raises
    FileNotFoundError for what is missing and ValueError for what does not fit together.
    """

    def __init__(
        self,
        folder: Path,
        base: str | Path | None = None,
        vision_tower: str | Path | None = None,
        dequantize: bool = False,
    ):
        self.folder = folder
        values = read_json(folder / "config.json")
        quantization = values.get("quantization")
        if dequantize:
            values = {key: value for key, value in values.items() if key not in _QUANTIZATION}
        elif quantization is not None:
            raise ValueError(f"{folder} is quantized already; convert the checkpoint it came from.")
        with ExitStack() as stack:
            opened = [stack.enter_context(open_checkpoint(folder))]
            self._main: Tensors = opened[0]
            if dequantize:
                self._main = DequantizedCheckpoint(opened[0], quantization)
            tower_folder = _tower_folder(folder, values, self._main, vision_tower)
            tower: Checkpoint | None = None
            if tower_folder is not None:
                values |= vision_entries(tower_folder)
                tower = stack.enter_context(open_checkpoint(tower_folder))
                opened.append(tower)
            elif "vision_config" not in values:
                values |= _entries_of_inside_tower(values)
            self.config = FerretConfig.from_dict(values)

            language: Tensors = self._main
            if base is not None:
                base_folder = find_folder(base, "--base-path", tokenizer=False)
                opened.append(stack.enter_context(open_checkpoint(base_folder)))
                vocabulary = read_json(base_folder / "config.json").get("vocab_size")
                language = MergedCheckpoint(opened[0], opened[-1], vocabulary)
            self._where = _choose(language, tower, tower_folder)
            self.files = [path for checkpoint in opened for path in checkpoint.files]
            self._model = Model(self.config)  # never evaluated, so it takes no memory
            self._stored = self._stored_names()
            self._check()
            self._stack = stack.pop_all()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """In the order of the model's parameters, which is that of its layers."""
        return list(dict(tree_flatten(self._model.parameters())))

    def info(self, name: str) -> TensorInfo:
        """Shape in an MLX folder, and dtype as it is read."""
        stored = self._stored[name]
        return TensorInfo(self._shapes[name], self._where[stored].info(stored).dtype)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        """The tensor in the layout of an MLX folder, in runs of `rows` along its first axis."""
        stored = self._stored[name]
        for block in self._where[stored].blocks(stored, rows):
            # Changes of layout keep the first axis, so a block can stand for the tensor.
            yield self._model.sanitize({stored: block})[name]

    def location(self, name: str) -> str:
        """Files and name of the stored tensor, for messages."""
        stored = self._stored[name]
        return f"{self._where[stored].location(stored)}: {stored}"

    def mean_of_norm(self) -> float:
        """Mean absolute weight of the last norm, without the base; NaN where there is none."""
        name = "model.norm.weight"
        if name not in self._main.names():
            return math.nan
        return float(mx.abs(self._main.read(name)).mean())

    def _stored_names(self) -> dict[str, str]:
        """Name in the model -> name in the files, without what the model does not use."""
        stored: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensors in self._where.items():
            # Never evaluated, so it has a shape but takes no memory.
            blank = mx.zeros(tensors.info(name).shape)
            try:
                found = self._model.sanitize({name: blank})
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"{tensors.location(name)}: {name} has a wrong name or rank ({error})."
                ) from None
            for ours, value in found.items():
                if ours in stored:
                    raise ValueError(
                        f"{self.folder} holds {ours} twice, as {stored[ours]} and as {name}."
                    )
                stored[ours] = name
                self._shapes[ours] = value.shape
        return stored

    def _check(self) -> None:
        """Compare names, shapes and kinds with the model that the config describes."""
        advice = "expected a Ferret checkpoint in the released layout"
        expected = dict(tree_flatten(self._model.parameters()))
        for name, shape in self._shapes.items():
            if name not in expected:
                raise ValueError(
                    f"{self.location(name)} is a tensor that Ferret, as config.json describes it, "
                    f"does not have; {advice}."
                )
            if shape != expected[name].shape:
                raise ValueError(
                    f"{self.location(name)} has shape {shape}, config.json says "
                    f"{expected[name].shape}; {advice}."
                )
        blank = {name: mx.zeros(shape) for name, shape in self._shapes.items()}
        check_weights(self._model, blank, self.folder, advice)
        for name in blank:
            dtype = self.info(name).dtype
            if not mx.issubdtype(dtype, mx.floating):
                raise ValueError(
                    f"{self.location(name)} holds {dtype}, expected floating point numbers; "
                    "copy the file again."
                )


def _choose(
    language: Tensors, tower: Checkpoint | None, tower_folder: Path | None
) -> dict[str, Tensors]:
    """Which file each tensor is read from."""
    where = {name: language for name in language.names() if not is_buffer(name)}
    if tower is None:
        return where
    where = {name: t for name, t in where.items() if not name.startswith(_TOWER_INSIDE)}
    # A full CLIP checkpoint holds the text model too.
    names = [name for name in tower.names() if name.startswith("vision_model.")]
    if not names:
        raise ValueError(f"{tower_folder} holds no vision_model.* tensors; give a CLIP checkpoint.")
    return where | {name: tower for name in names if not is_buffer(name)}


def _tower_folder(
    folder: Path, values: dict[str, Any], main: Tensors, asked: str | Path | None
) -> Path | None:
    """Where the vision tower's own files lie; None when it is inside the main checkpoint."""
    if asked is not None:
        return find_folder(asked, "--vision-tower", tokenizer=False)
    if (folder / "vision_tower").is_dir():
        return folder / "vision_tower"
    if any(name.startswith(_TOWER_INSIDE) for name in main.names()):
        return None
    named = values.get("mm_vision_tower")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{folder} has no vision_tower/ and its config no mm_vision_tower; give --vision-tower."
        )
    purpose = f"the vision tower of {folder} (or give --vision-tower)"
    return find_folder(named, purpose, tokenizer=False)


def _entries_of_inside_tower(values: dict[str, Any]) -> dict[str, Any]:
    named = values.get("mm_vision_tower")
    if named == _RELEASED_TOWER:
        return {
            "vision_config": dict(RELEASED_TOWER_CONFIG),
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }
    purpose = "the config of the vision tower inside the checkpoint (or give --vision-tower)"
    return vision_entries(find_folder(str(named), purpose, weights=False))
