"""Shared fixtures: parity data computed by the released implementation (data/parity/README.md)."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

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
