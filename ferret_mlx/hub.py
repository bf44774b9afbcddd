"""A folder on disk, or one fetched from the Hugging Face Hub by its id."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

BUNDLED_MODEL = "models/ferret-tiny"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Everything of a checkpoint but the weights, and the weights in the formats that are read.
METADATA_FILES = ("*.json", "tokenizer.model", "README.md")
_WITHOUT_TOKENIZER = ("config.json", "preprocessor_config.json", "*.index.json")
_SAFETENSORS = ("model*.safetensors",)
_PYTORCH = ("pytorch_model*.bin",)
_PACKAGES = ("*.mlpackage/*",)  # the Hub's * crosses folders


def find_folder(
    name: str | Path,
    purpose: str,
    weights: bool = True,
    tokenizer: bool = True,
    packages: bool = False,
) -> Path:
    """The folder of a checkpoint in the released layout.

    name: a folder or a Hub id. What exists on disk, or starts with `/`, `./`, `../` or `~`, is
        never looked up on the Hub.
    purpose: what the folder is wanted for, to say in errors.
    weights: fetch the weights too, in one format.
    tokenizer: fetch tokenizer and model card too; a base or a vision tower needs none.
    packages: fetch its Core ML packages too.

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
    metadata = METADATA_FILES if tokenizer else _WITHOUT_TOKENIZER
    return _fetch(str(name), purpose, metadata + (_PACKAGES if packages else ()), weights)


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


def upload_folder(folder: Path, repo: str) -> None:
    """Upload a finished folder, resuming where an earlier try stopped. Raises ValueError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_large_folder(folder_path=folder, repo_id=repo, repo_type="model")
    except Exception as error:  # those of the HTTP library come through, too
        raise ValueError(
            f"{folder} is written, but the upload to {repo} failed: {reason(error)}."
        ) from None
    print(f"Uploaded to {repo}.", file=sys.stderr)


def _fetch(hub_id: str, purpose: str, metadata: tuple[str, ...], weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*metadata, *(f"vision_tower/{file}" for file in metadata)]
    if weights:
        formats = _formats(hub_id)
        patterns += [*formats, *(f"vision_tower/{file}" for file in formats)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # those of the HTTP library come through, too
        raise FileNotFoundError(
            f"{hub_id} for {purpose} is no folder here and could not be fetched from the Hub "
            f"({reason(error)}); {_next_step(hub_id, error)}."
        ) from None


def _next_step(hub_id: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"accept its terms at https://huggingface.co/{hub_id} and run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "check the id, and run hf auth login if the repository is private"
    return "go online, or download it elsewhere and give its folder"


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
