"""JSON files of the benchmarks, read with errors that name the file, the line and the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

OWN_FILES = {"answers.jsonl", "verdicts.jsonl"}  # of a run; they may lie beside released ones

_LARGEST = 1e9  # more than any picture's pixels or area; infinity and NaN are not below it
_CHUNK = re.compile(r"([0-9]+)_of_([0-9]+)\.jsonl")


class Line(NamedTuple):
    """One record and where it stands, for the errors about it."""

    where: str
    record: dict[str, Any]


def read_text(path: Path) -> str:
    """A whole text file. Raises FileNotFoundError, or ValueError when it is not UTF-8."""
    try:
        return _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); copy the file again.") from None


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises FileNotFoundError, or ValueError when it is not JSON."""
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the file again.") from None


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSON-lines file, blank lines skipped. Raises as ``read_json``."""
    with _existing(path).open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(text.decode())
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}).") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where} holds {_short(record)}, expected an object.")
            yield Line(where, record)


def take(record: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field that must be there. Raises ValueError when it is missing or of another kind."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where} has no {name!r}; is it a file of this benchmark?")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{where}: {name!r} is {_short(value)}, which is of the wrong kind.")
    return value


def take_numbers(record: dict[str, Any], name: str, count: int, where: str) -> list[float]:
    """A list of so many finite numbers. Raises ValueError."""
    values = take(record, name, list, where)
    numbers = (type(value) in (int, float) and abs(value) < _LARGEST for value in values)
    if len(values) != count or not all(numbers):
        raise ValueError(f"{where}: {name!r} is {_short(values)}, expected {count} numbers.")
    return values


def take_size(record: dict[str, Any], where: str) -> tuple[int, int]:
    """(w, h) in pixels, from ``width`` and ``height``. Raises ValueError."""
    size = take(record, "width", int, where), take(record, "height", int, where)
    if min(size) < 1:
        raise ValueError(f"{where}: the picture has {size[0]} x {size[1]} pixels.")
    return size


def answer_files(path: Path, single: str) -> list[Path]:
    """The files of released answers, in the order of their items.

    Chunks ``k_of_n.jsonl`` come in the order of their numbers: by name, 10 would stand before 2.
    Nothing else in the folder is read (the released scripts take their own metric.json for
    answers).

    Args:
        path: a folder, or one file of answers.
        single: name of the file in a folder without chunks; may hold ``*``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: chunks of different runs, or one is missing between others.
    """
    if path.is_file():
        return [path]
    chunks = {}
    for file in path.glob("*_of_*.jsonl"):
        if match := _CHUNK.fullmatch(file.name):
            chunks[int(match[1]), int(match[2])] = file
    if not chunks:
        files = sorted(file for file in path.glob(single) if file.name not in OWN_FILES)
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} holds {len(files)} files of answers called {single} and no k_of_n.jsonl; "
                "give the folder or the file that holds the answers."
            )
        return files
    numbers = sorted(chunks)
    if len({count for _, count in numbers}) > 1:
        raise ValueError(f"{path} holds chunks of several runs; leave those of one.")
    for expected, (number, count) in enumerate(numbers):
        if number != expected:
            raise ValueError(f"{path} lacks {expected}_of_{count}.jsonl; add the chunk.")
    return [chunks[number] for number in numbers]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    return path


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
