"""Shared fixtures: parity data computed by the released implementation (data/parity/README.md)."""

import json
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

# Not made for every machine and Python; see pyproject.toml.
collect_ignore_glob = [] if find_spec("coremltools") else ["test_coreml*.py"]

DATA = Path(__file__).parent / "data"

# A shell's background job ignores Ctrl-C; the tests of it, and the programs they start, must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def parity() -> Path:
    return DATA / "parity"


@pytest.fixture(scope="session")
def evaluation() -> Path:
    """Data sets, answers and scores of the released evaluation scripts (data/eval/README.md)."""
    return DATA / "eval"


@pytest.fixture(scope="session")
def manifest(parity) -> list[dict]:
    return json.loads((parity / "golden" / "manifest.json").read_text())


@pytest.fixture(scope="session")
def golden(parity, manifest) -> dict[str, dict[str, np.ndarray]]:
    """The numbers of each case by name."""
    return {
        case["name"]: dict(np.load(parity / "golden" / f"{case['name']}.npz")) for case in manifest
    }


@pytest.fixture(scope="session")
def parity_weights(parity) -> dict:
    """The parity checkpoint's tensors by their released names, float16."""
    from ferret_mlx.checkpoint import open_checkpoint

    weights = {}
    for folder in (parity / "checkpoint", parity / "checkpoint" / "vision_tower"):
        with open_checkpoint(folder) as checkpoint:
            weights |= {name: checkpoint.read(name) for name in checkpoint.names()}
    return weights


@pytest.fixture(scope="session")
def parity_model(parity, parity_weights):
    """The model of the parity checkpoint in float32."""
    import mlx.core as mx

    from ferret_mlx.config import FerretConfig
    from ferret_mlx.model import Model

    model = Model(FerretConfig.from_folder(parity / "checkpoint"))
    model.load_weights(list(model.sanitize(parity_weights).items()), strict=True)
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The tokenizer files of ferret-tiny's vocabulary."""
    from reference.vocabulary import write_tokenizer

    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return made


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """ferret-tiny's tokenizer; the test of a module that has its own shadows it."""
    from ferret_mlx.tokenizer import Tokenizer

    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def mlx_folders(parity, tmp_path_factory) -> dict[str, Path]:
    """MLX folders of the parity checkpoint and of ferret-tiny."""
    from ferret_mlx.convert import convert
    from ferret_mlx.hub import bundled_model

    made = tmp_path_factory.mktemp("models") / "parity"
    convert(parity / "checkpoint", made)
    return {"parity": made, "ferret-tiny": bundled_model()}


@pytest.fixture(scope="session")
def packages(mlx_folders, tmp_path_factory):
    """Gives the Core ML package of one of those folders with some options, each made once."""
    from ferret_mlx.coreml_package import convert_vision

    made, out = {}, tmp_path_factory.mktemp("packages")

    def package(name, options) -> Path:
        if (name, options) not in made:
            path = out / f"{len(made)}.mlpackage"
            convert_vision(mlx_folders[name], path, options)
            made[name, options] = path
        return made[name, options]

    return package


@pytest.fixture(scope="session")
def picture_features(mlx_folders):
    """Gives pixels and MLX's features of a picture, by one of those folders."""
    from functools import cache

    from tests.coreml_packages import mlx_features

    return cache(lambda name: mlx_features(mlx_folders[name]))
