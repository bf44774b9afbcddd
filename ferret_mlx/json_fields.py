"""Reading JSON files and checking their entries; every error names the key and its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, or ValueError for anything but an object."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a model folder, which holds this file."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); copy the file again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def size(values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value


def number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"config.json: {key} is {value!r}, expected a positive number.")
    return float(value)


def text_value(values: dict[str, Any], key: str, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"config.json: {key} is {value!r}, expected a string.")
    return value


def choice(values: dict[str, Any], key: str, default: str, choices: tuple[str, ...]) -> str:
    value = values.get(key, default)
    if value not in choices:
        raise ValueError(f"config.json: {key} is {value!r}, expected one of {', '.join(choices)}.")
    return value


def channels(
    values: dict[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = values.get(key, default)
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 3 or (key == "image_std" and min(value) <= 0):
        raise ValueError(f"config.json: {key} is {value!r}, expected three numbers.")
    red, green, blue = (float(v) for v in value)
    return red, green, blue
