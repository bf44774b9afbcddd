"""Reads and writes the released checkpoint layout (FERRET folder with ``vision_tower/``)."""

import json
import shutil
from pathlib import Path

import torch

from .config import IMAGE_MEAN, IMAGE_STD, TwinConfig
from .model import Twin

TOKENIZER_FILES = (
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
PREPROCESSOR = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": IMAGE_MEAN,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": IMAGE_STD,
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def _released_name(name: str) -> str:
    """A twin tensor's name in ``pytorch_model.bin``."""
    return name.removeprefix("llama.") if name.startswith("llama.") else "model." + name


def _load_bin(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["pytorch_model.bin"]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= torch.load(folder / file, map_location="cpu", weights_only=True)
    return tensors


def read_released(folder: Path, dtype=torch.float32) -> Twin:
    """A twin from a released-layout folder, every tensor accounted for."""
    config = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / "vision_tower" / "config.json").read_text())
    twin = Twin(TwinConfig.from_released(config, vision))
    released = _load_bin(folder)
    state = {}
    for name in twin.state_dict():
        if not name.startswith("tower."):
            state[name] = released.pop(_released_name(name))
    unused = [
        n for n in released if not n.endswith("rotary_emb.inv_freq") and "vision_tower" not in n
    ]
    if unused:
        raise ValueError(f"{folder} holds tensors the twin has no place for: {unused[:3]}")
    tower = _load_bin(folder / "vision_tower")
    for name in twin.tower.state_dict():
        bare = name.removeprefix("vision_model.")
        if bare.endswith("position_ids"):
            continue
        state["tower." + name] = tower["vision_model." + bare]
    twin.load_state_dict({k: v.to(dtype) for k, v in state.items()})
    return twin.to(dtype).eval()


def write_released(twin: Twin, folder: Path, tokenizer: Path, dtype=torch.float16) -> None:
    """Writes ``folder`` anew; the tokenizer files come from the folder ``tokenizer``."""
    (folder / "vision_tower").mkdir(parents=True, exist_ok=True)
    released, tower = {}, {}
    for name, value in twin.state_dict().items():
        value = value.detach().to(dtype).contiguous().clone()
        if name.startswith("tower."):
            tower["vision_model." + name.removeprefix("tower.").removeprefix("vision_model.")] = (
                value
            )
        else:
            released[_released_name(name)] = value
    _add_unused_layer(tower, twin.config)
    torch.save(released, folder / "pytorch_model.bin")
    torch.save(tower, folder / "vision_tower" / "pytorch_model.bin")
    size = {"height": twin.config.image_size, "width": twin.config.image_size}
    files = {
        "config.json": twin.config.released(),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "vision_tower/config.json": twin.config.released_vision(),
        "vision_tower/preprocessor_config.json": PREPROCESSOR
        | {"crop_size": size, "size": {"shortest_edge": twin.config.image_size}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


def _add_unused_layer(tower: dict[str, torch.Tensor], config: TwinConfig) -> None:
    """The released classes build the last layer too, though nothing reads it: zeros."""
    last = config.vision_layers - 1
    for name in list(tower):
        if f".layers.{last - 1}." in name:
            zeros = torch.zeros_like(tower[name])
            tower[name.replace(f".layers.{last - 1}.", f".layers.{last}.")] = zeros
