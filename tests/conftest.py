"""Shared fixtures: the parity data computed by the released implementation (tests/data/parity/README.md)."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def parity() -> Path:
    return DATA / "parity"


@pytest.fixture(scope="session")
def manifest(parity) -> list[dict]:
    return json.loads((parity / "golden" / "manifest.json").read_text())
