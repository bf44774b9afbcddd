"""A folder on disk, or one fetched from the Hugging Face Hub by its id."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

BUNDLED_MODEL = "models/ferret-tiny"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Everything of a checkpoint but the weights, and the weights in the formats that are read.
METADATA_FILES = ("*.json", "tokenizer.model", "README.md")
_SAFETENSORS = ("model*.safetensors",)
_PYTORCH = ("pytorch_model*.bin",)


def find_folder(name: str | Path, purpose: str, weights: bool = True) -> Path:
    """The folder of a checkpoint in the released layout.

    name: a folder or a Hub id. What exists on disk, or starts with `/`, `./`, `../` or `~`, is
        never looked up on the Hub.
    purpose: what the folder is wanted for, to say in errors.
    weights: fetch the weights too, in one format.

    Raises FileNotFoundError where there is no such folder or it cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} for {purpose} is a file; give its folder.")
    path_like = isinstance(name, Path) or name.startswith(("/", "./", "../", "~"))
    if path_like or not _HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(
            f"There is no folder {name} for {purpose}; give a folder or a Hub id like owner/name."
        )
    return _fetch(str(name), purpose, weights)


def bundled_model() -> Path:
    """The folder of ferret-tiny, which comes with the package. Raises FileNotFoundError."""
    folder = Path(str(files(__package__) / BUNDLED_MODEL))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The bundled model is missing ({folder}); install the package again, or name "
            "the folder of a converted model."
        )
    return folder


def reason(error: Exception) -> str:
    """One line of the Hub's long errors."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _fetch(hub_id: str, purpose: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [*METADATA_FILES, *(f"vision_tower/{file}" for file in METADATA_FILES)]
    if weights:
        formats = _formats(hub_id)
        patterns += [*formats, *(f"vision_tower/{file}" for file in formats)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{hub_id} for {purpose} is no folder here and could not be fetched from the Hub "
            f"({reason(error)}); download it elsewhere and give its folder."
        ) from None


def _formats(hub_id: str) -> tuple[str, ...]:
    """Many repositories hold the same weights twice: fetch the format that would be read."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(hub_id)
    # Without a connection the cache decides; why there is none is told when fetching.
    except Exception:
        return (*_SAFETENSORS, *_PYTORCH)
    at_top = [file for file in files if "/" not in file]
    return _SAFETENSORS if any(file.endswith(".safetensors") for file in at_top) else _PYTORCH
