"""What a conversion starts from: a released folder, its base, and a vision tower, as one."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from .checkpoint import Checkpoint, is_buffer, open_checkpoint
from .config import CLIP_MEAN, CLIP_STD, FerretConfig, vision_entries
from .delta import MergedCheckpoint
from .hub import find_folder
from .json_fields import read_json
from .model import Model, check_weights
from .tensor_files import TensorInfo, Tensors

_TOWER_INSIDE = ("model.vision_tower.", "vision_tower.")
# The tower of the released models, for checkpoints that hold its weights but not its config.
_RELEASED_TOWER = "openai/clip-vit-large-patch14-336"
_RELEASED_TOWER_CONFIG = {
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
    """The tensors of a whole Ferret model under their released names, and its config.

    The vision tower is the one named by `vision_tower`; else the folder's `vision_tower/`; else
    the tensors inside the checkpoint; else the Hub model that `mm_vision_tower` names.

    Names and shapes are checked on opening, before any weights are read. Raises
    FileNotFoundError for what is missing and ValueError for what does not fit together.
    """

    def __init__(
        self,
        folder: Path,
        base: str | Path | None = None,
        vision_tower: str | Path | None = None,
    ):
        self.folder = folder
        values = read_json(folder / "config.json")
        if values.get("quantization") is not None:
            raise ValueError(f"{folder} is quantized already; convert the checkpoint it came from.")
        with ExitStack() as stack:
            main = stack.enter_context(open_checkpoint(folder))
            tower_folder = _tower_folder(folder, values, main, vision_tower)
            tower: Checkpoint | None = None
            if tower_folder is not None:
                values |= vision_entries(tower_folder)
                tower = stack.enter_context(open_checkpoint(tower_folder))
            elif "vision_config" not in values:
                values |= _entries_of_inside_tower(values)
            self.config = FerretConfig.from_dict(values)

            language: Tensors = main
            if base is not None:
                base_folder = find_folder(base, "--base-path")
                language = MergedCheckpoint(main, stack.enter_context(open_checkpoint(base_folder)))
            self._where = _choose(language, tower, tower_folder)
            self._check()
            self._stack = stack.pop_all()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def info(self, name: str) -> TensorInfo:
        return self._where[name].info(name)

    def read(self, name: str) -> mx.array:
        return self._where[name].read(name)

    def load_model(self, dtype: mx.Dtype | None = None) -> Model:
        """Read everything into a Model, floats as `dtype` (None: each as it is stored)."""
        weights = {}
        total = sum(_nbytes(self.info(name)) for name in self._where)
        bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="reading", file=sys.stderr, disable=None
        )
        with bar:
            for name in self._where:
                value = self.read(name)
                if dtype is not None and mx.issubdtype(value.dtype, mx.floating):
                    value = value.astype(dtype)
                # A cast waits for its first use and would keep the stored tensor until then.
                mx.eval(value)
                weights[name] = value
                bar.update(_nbytes(self.info(name)))
        model = Model(self.config)
        model.load_weights(list(model.sanitize(weights).items()), strict=True)
        return model

    def looks_like_delta(self) -> bool:
        """Norm weights lie around 1 in a model, and around 0 in a difference of two."""
        name = "model.norm.weight"
        return name in self._where and float(mx.abs(self.read(name)).mean()) < 0.2

    def _check(self) -> None:
        """Compare all names and shapes with the model that the config describes."""
        # Never evaluated, so they have a shape but take no memory.
        blank = {name: mx.zeros(self.info(name).shape) for name in self._where}
        model = Model(self.config)
        try:
            found = model.sanitize(blank)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.folder}: a tensor has the wrong rank ({error}).") from None
        advice = "expected a Ferret checkpoint in the released layout"
        check_weights(model, found, self.folder, advice)


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
    folder: Path, values: dict[str, Any], main: Checkpoint, asked: str | Path | None
) -> Path | None:
    """Where the vision tower's own files lie; None when it is inside the main checkpoint."""
    if asked is not None:
        return find_folder(asked, "--vision-tower")
    if (folder / "vision_tower").is_dir():
        return folder / "vision_tower"
    if any(name.startswith(_TOWER_INSIDE) for name in main.names()):
        return None
    named = values.get("mm_vision_tower")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{folder} has no vision_tower/ and its config no mm_vision_tower; give --vision-tower."
        )
    return find_folder(named, f"the vision tower of {folder} (or give --vision-tower)")


def _entries_of_inside_tower(values: dict[str, Any]) -> dict[str, Any]:
    named = values.get("mm_vision_tower")
    if named == _RELEASED_TOWER:
        return {
            "vision_config": dict(_RELEASED_TOWER_CONFIG),
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }
    purpose = "the config of the vision tower inside the checkpoint (or give --vision-tower)"
    return vision_entries(find_folder(str(named), purpose, weights=False))


def _nbytes(info: TensorInfo) -> int:
    size = info.dtype.size
    for n in info.shape:
        size *= n
    return size
