"""A folder of weights in the released layout, opened as one set of tensors.

Reads `.bin` (PyTorch's zip format, without torch), sharded or not, and `.safetensors`. Opening
reads names and shapes only; `read` brings in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from .json_fields import read_json
from .safetensors_file import SafetensorsFile
from .tensor_files import TensorFile, TensorInfo
from .torch_file import TorchFile

# In the order in which transformers looks for them.
_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Checkpoint:
    """The tensors of one or several files. Also a context manager that closes the files."""

    def __init__(self, path: Path, files: list[TensorFile], where: dict[str, TensorFile]):
        self.path = path
        self._files = files
        self._where = where

    def names(self) -> list[str]:
        """Names of all tensors, as stored."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """(shape, dtype) of a tensor. Raises ValueError for a name that is not there."""
        return self._file(name).info(name)

    def read(self, name: str) -> mx.array:
        """One tensor, in its stored dtype (float64 as float32).

        Raises ValueError naming the file when it is damaged, and for a name that is not there.
        """
        return self._file(name).read(name)

    def blocks(self, name: str, rows: int) -> Iterator[mx.array]:
        """What `read` gives, in runs of `rows` along the first axis. Raises as `read` does."""
        return self._file(name).blocks(name, rows)

    def location(self, name: str) -> str:
        return self._file(name).location(name)

    @property
    def files(self) -> list[Path]:
        return [file.path for file in self._files]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, name: str) -> TensorFile:
        if name not in self._where:
            raise ValueError(f"{self.path} holds no tensor {name}.")
        return self._where[name]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open the weights in a folder.

    Raises FileNotFoundError where there are none, and ValueError naming the file (and tensor)
    for files that are truncated, damaged, of another kind, or at odds with the index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a checkpoint.")
    for layout in _LAYOUTS:
        path = folder / layout
        if path.is_file():
            return _open_sharded(path) if path.suffix == ".json" else _open_single(path)
    shards = sorted(p.name for p in folder.glob("*-of-*") if p.suffix in (".bin", ".safetensors"))
    if shards:
        raise FileNotFoundError(
            f"{folder} holds shards ({shards[0]}, ...) but no index; "
            "copy the checkpoint's .index.json file too."
        )
    raise FileNotFoundError(f"{folder} holds no checkpoint; expected one of {', '.join(_LAYOUTS)}.")


def is_buffer(name: str) -> bool:
    """Tensors that older versions of transformers stored although they follow from the config."""
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))


def _open_single(path: Path) -> Checkpoint:
    file = _open_file(path)
    return Checkpoint(path, [file], dict.fromkeys(file.names(), file))


def _open_sharded(index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; copy it again.")
    for name, shard in weight_map.items():
        # A shard lies beside its index: an index must not lead anywhere else.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"{index}: {name} lies in {shard!r}, expected the name of a file beside the index; "
                "copy it again."
            )
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index.parent} lacks {shard}, which holds {name}; copy it too.")

    files: dict[str, TensorFile] = {}
    try:
        for shard in dict.fromkeys(weight_map.values()):
            files[shard] = file = _open_file(index.parent / shard)
            _compare(index, shard, weight_map, file.names())
    except BaseException:
        for file in files.values():
            file.close()
        raise
    where = {name: files[shard] for name, shard in weight_map.items()}
    return Checkpoint(index, list(files.values()), where)


def _compare(index: Path, shard: str, weight_map: dict[str, str], names: list[str]) -> None:
    listed = {name for name, file in weight_map.items() if file == shard}
    if missing := sorted(listed - set(names)):
        raise ValueError(
            f"{index.parent / shard} lacks {missing[0]}, which {index.name} lists; copy both again."
        )
    if extra := sorted(set(names) - listed):
        raise ValueError(
            f"{index.parent / shard} holds {extra[0]}, which {index.name} does not list; "
            "copy both again."
        )


def _open_file(path: Path) -> TensorFile:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; run git lfs pull there.")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if start.startswith(b"PK\x03\x04"):
        return TorchFile(path)
    if start.startswith(b"\x80"):
        raise ValueError(
            f"{path} is in PyTorch's format from before 1.6 (not a zip archive), which can run "
            "code; save it again with a current torch.save, or as safetensors."
        )
    raise ValueError(f"{path} is not a PyTorch checkpoint (zip archive); copy it again.")
