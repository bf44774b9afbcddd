"""What is fetched from the Hub, and what is said when it cannot be."""

from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ferret_mlx.hub import find_folder, upload_folder

REPOSITORY = [
    "README.md",
    "config.json",
    "flax_model.msgpack",
    "generation_config.json",
    "merges.txt",
    "optimizer.pt",
    "preprocessor_config.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "tokenizer.json",
    "tokenizer.model",
    "training_args.bin",
    "vision_tower/config.json",
    "vision_tower/pytorch_model.bin",
]
WEIGHTS = {name for name in REPOSITORY if name.startswith("pytorch_model")}


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """The files that a call would fetch. `files` is what the repository holds."""
    seen = SimpleNamespace(files=list(REPOSITORY), names=set())

    def snapshot_download(hub_id, allow_patterns):
        seen.names = {name for name in seen.files if any(fnmatch(name, p) for p in allow_patterns)}
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, _: seen.files)
    return seen


def test_a_base_comes_without_its_tokenizer(fetched, tmp_path):
    assert find_folder("owner/vicuna", "--base-path", tokenizer=False) == tmp_path
    vision = {"vision_tower/config.json", "vision_tower/pytorch_model.bin"}
    assert fetched.names == WEIGHTS | vision | {"config.json", "preprocessor_config.json"}


def test_a_model_comes_whole(fetched):
    find_folder("owner/ferret", "--hf-path")
    other = {"flax_model.msgpack", "merges.txt", "optimizer.pt", "tf_model.h5", "training_args.bin"}
    assert fetched.names == set(REPOSITORY) - other
    find_folder("owner/ferret", "--hf-path", weights=False)
    assert not any(name.endswith(".bin") for name in fetched.names)


def test_weights_that_are_there_twice_come_once(fetched):
    fetched.files += ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    find_folder("owner/vicuna", "--base-path", tokenizer=False)
    assert "model-00001-of-00001.safetensors" in fetched.names
    assert not any(name.endswith(".bin") and "/" not in name for name in fetched.names)


def http_error(kind, message):
    return kind(message, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http_error(GatedRepoError, "403: gated\nmore"), "accept its terms at https://"),
        (http_error(RepositoryNotFoundError, "404"), "check the id"),
        (ConnectionError("no route to host"), "go online, or download it elsewhere"),
        (RuntimeError(), "go online, or download it elsewhere"),
    ],
)
def test_failures_tell_the_next_step(monkeypatch, tmp_path, error, advice):
    """Catches errors of the HTTP library, which are neither OSError nor ValueError."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(FileNotFoundError, match=advice) as raised:
        find_folder("owner/ferret", "--hf-path")
    assert "owner/ferret for --hf-path" in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ValueError, match="is written, but the upload to owner/out failed"):
        upload_folder(tmp_path, "owner/out")
