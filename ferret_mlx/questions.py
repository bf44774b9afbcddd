"""A file of questions about one picture, ``generate.py --regions``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import STROKE_WIDTH, RegionFlag
from .regions import Region

# How many numbers each kind takes; the others take a file, or a list of points.
_NUMBERS = {"point": 2, "box": 4}
_KINDS = ("point", "box", "mask", "polygon", "stroke")


@dataclass(frozen=True)
class Question:
    """A prompt, its regions, and what kind each was given as."""

    prompt: str
    regions: list[Region]
    kinds: list[str]


def read_questions(
    source: str,
    prompt: str | None,
    size: tuple[int, int],
    stroke_width: float = STROKE_WIDTH,
) -> list[Question]:
    """The entries of a JSON list.

    An entry is ``{"prompt": TEXT, "regions": [REGION, ...]}``, where the prompt may be left out if
    one is given for all, or a single region. A region is ``{"point": [x, y]}``,
    ``{"box": [x1, y1, x2, y2]}``, ``{"mask": FILE}``, ``{"polygon": [[x, y], ...]}`` or
    ``{"stroke": [[x, y], ...], "width": W}``, all in pixels of the upright picture.

    Args:
        source: a path, or ``-`` for stdin.
        prompt: for entries without one.
        size: (w, h) of the picture.
        stroke_width: of strokes without a width.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a list; the message names the entry.
    """
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        entries = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a text file; give a JSON list.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}); give a list of questions.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{name} holds a JSON {type(entries).__name__}, expected a list.")
    questions = []
    for index, entry in enumerate(entries):
        try:
            questions.append(_question(entry, prompt, size, stroke_width))
        except ValueError as error:
            raise ValueError(f"{name}, entry {index}: {error}") from error
    return questions


def _question(
    entry: Any, prompt: str | None, size: tuple[int, int], stroke_width: float
) -> Question:
    if not isinstance(entry, dict):
        raise ValueError(f"got {json.dumps(entry)}, expected an object.")
    if any(kind in entry for kind in _KINDS):
        entry = {"regions": [entry]}
    unknown = sorted(set(entry) - {"prompt", "regions"})
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r}; known: prompt, regions, {', '.join(_KINDS)}."
        )
    text = entry.get("prompt", prompt)
    if not isinstance(text, str):
        got = "no prompt" if text is None else f"the prompt {json.dumps(text)}"
        raise ValueError(f"got {got}; give a text here, or --prompt for all.")
    given = entry.get("regions", [])
    if not isinstance(given, list):
        raise ValueError(f"regions is {json.dumps(given)}, expected a list.")
    flags = [_region(region, stroke_width) for region in given]
    regions = []
    for number, (flag, width) in enumerate(flags):
        try:
            regions.append(flag.build(size, width))
        except ValueError as error:
            raise ValueError(f"[region{number}] ({flag.kind}): {error}") from error
    return Question(text, regions, [flag.kind for flag, _ in flags])


def _region(values: Any, stroke_width: float) -> tuple[RegionFlag, float]:
    """The region as the command line has it, and the width of its stroke."""
    kinds = [kind for kind in _KINDS if isinstance(values, dict) and kind in values]
    extra = set(values) - {*kinds, "width"} if kinds else set()
    if len(kinds) != 1 or extra or ("width" in values and kinds != ["stroke"]):
        raise ValueError(
            f"got the region {json.dumps(values)}, expected an object with one of "
            f"{', '.join(_KINDS)} (and width, of a stroke)."
        )
    kind, value = kinds[0], values[kinds[0]]
    width = values.get("width", stroke_width)
    if kind == "mask":
        fits = isinstance(value, str)
    elif kind in _NUMBERS:
        fits = _is_numbers(value, _NUMBERS[kind])
    else:
        least = 3 if kind == "polygon" else 1
        fits = isinstance(value, list) and len(value) >= least
        fits = fits and all(_is_numbers(point, 2) for point in value)
    if not fits or not _is_numbers([width], 1) or width < 1:
        raise ValueError(
            f"got the region {json.dumps(values)}, which has wrong numbers or no file."
        )
    return RegionFlag(kind, value), float(width)


def _is_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(
            type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values
        )
    )
