"""LVIS referring classification: which of two names fits the object at a point, box or shape.

Data: JSON lines, one object each. Source: the released ``model_lvis.py`` and ``eval_lvis.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..prompt import REGION_TOKEN
from ..regions import CANVAS, coordinate
from .benchmark import Benchmark, Item, Question, Size, Verdict
from .records import Line, read_lines, take, take_numbers, take_size
from .regions import GivenRegion, box_mask, canvas_text, point_mask
from .released_text import without_negations

FORMATS = ("point", "box", "free_shape")
_COPIED = ("name", "synonyms", "bbox", "bbox_norm", "width", "height")


class LVIS(Benchmark):
    """Choice between two names.

    Args:
        data: JSON-lines file.
        form: ``point``, ``box`` or ``free_shape``.
        region_feature: with the region's vector, as published; otherwise coordinates only.
        coordinates: with the region's coordinates, as published.

    Raises FileNotFoundError, or ValueError when the data is not of this form.
    """

    name = "lvis"

    def __init__(
        self, data: Path, form: str, region_feature: bool = True, coordinates: bool = True
    ):
        if form not in FORMATS:
            raise ValueError(f"The format is {form!r}, expected one of {', '.join(FORMATS)}.")
        self.form, self.region_feature, self.coordinates = form, region_feature, coordinates
        self.options = {
            "format": form, "region_feature": region_feature, "coordinates": coordinates,
        }  # fmt: skip
        self.set_items(_items(data, form))

    def question(self, item: Item, size: Size) -> Question:
        """size is not used: the data has its own. Raises ValueError for an empty mask."""
        record = item.record
        location, mask = _describe(record, self.form)
        if not self.coordinates:
            location = ""
        names = record["name"], record["neg_class"]
        first, second = names if record["index"] % 2 == 0 else names[::-1]
        form = f"Is the object {{}} of the image a {first} or a {second}?"
        if not self.region_feature:
            prompt = form.format(location)
            return Question(prompt, released=prompt)
        region = GivenRegion(location, mask)
        return Question(
            form.format("[region0]"), (region,), form.format(f"{location} {REGION_TOKEN}")
        )

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """What the released scorer needs, names and synonyms included."""
        record = item.record
        line = {
            "id": record["id"],
            "image_path": record["image_path"],
            "prompt": self.question(item, size).released,
            "text": text,
        }
        return line | {name: record[name] for name in _COPIED}

    def answer_key(self, line: Line) -> str:
        return str(take(line.record, "id", int, line.where))

    def verdict(self, item: Item, text: str) -> Verdict:
        """Right when name or synonym is a case-sensitive part of what is not negated."""
        record = item.record
        kept = without_negations(text)
        names = [_readable(record["name"])]
        for synonym in record["synonyms"]:
            # "bat_(club)" counts as "bat" and as "club".
            first, *rest = synonym.split("(")
            names += [_readable(first), *(_readable(part.replace(")", "")) for part in rest)]
        right = any(name in kept for name in names)
        return Verdict(item, text, hits=right, count=1, quality=right, details={"kept": kept})

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Accuracy in percent, as printed by the release."""
        return {"accuracy": sum(v.hits for v in verdicts) / max(1, len(verdicts)) * 100}


def _readable(name: str) -> str:
    return name.replace("_", " ").strip()


def _describe(record: dict[str, Any], form: str) -> tuple[str, np.ndarray]:
    """Coordinate text and (w, h) mask."""
    w, h = size = record["width"], record["height"]
    if form == "point":
        x, y = record["sample_point"]
        text = canvas_text(coordinate(x, w), coordinate(y, h))
        return text, point_mask(x, y, size)
    if form == "box":
        x1, y1, x2, y2 = corners = record["bbox_norm"]
        text = canvas_text(*(int(value * CANVAS) for value in corners))
        return text, box_mask((int(x1 * w), int(y1 * h), int(x2 * w), int(y2 * h)), size)
    x1, y1, x2, y2 = map(int, record["free_shape_bbox_raw"])
    text = canvas_text(
        coordinate(x1, w), coordinate(y1, h), coordinate(x2, w), coordinate(y2, h)
    )  # fmt: skip
    # w columns of h pixels each, packed to bits
    shape = np.unpackbits(record["mask"], count=w * h).reshape(w, h).astype(bool)
    return text, box_mask((x1, y1, x2, y2), size) & shape


def _items(data: Path, form: str) -> Iterator[Item]:
    for index, (where, line) in enumerate(read_lines(data)):
        path = take(line, "image_path", str, where)
        synonyms = take(line, "synonyms", list, where)
        if not all(isinstance(synonym, str) for synonym in synonyms):
            raise ValueError(f"{where}: 'synonyms' must be a list of texts.")
        w, h = take_size(line, where)
        record = {
            "index": index, "id": take(line, "id", int, where), "image_path": path,
            "name": take(line, "name", str, where), "synonyms": synonyms,
            "neg_class": take(line, "neg_class", str, where), "bbox": line.get("bbox"),
            "bbox_norm": take_numbers(line, "bbox_norm", 4, where), "width": w, "height": h,
        }  # fmt: skip
        if form == "point":
            record["sample_point"] = take_numbers(line, "sample_point", 2, where)
        elif form == "free_shape":
            record["free_shape_bbox_raw"] = take_numbers(line, "free_shape_bbox_raw", 4, where)
            record["mask"] = _packed(line, (w, h), where)
        yield Item(str(record["id"]), path.rsplit("/", 1)[-1], where, record)


def _packed(line: dict[str, Any], size: Size, where: str) -> np.ndarray:
    """The free shape as bits: lists of numbers would take gigabytes for the whole data."""
    try:
        mask = np.array(take(line, "free_shape_segment_mask", list, where))
    except ValueError:
        mask = np.zeros(0)
    if mask.shape != size or mask.dtype.kind not in "biuf":
        raise ValueError(
            f"{where}: 'free_shape_segment_mask' must hold {size[0]} lists of {size[1]} numbers."
        )
    return np.packbits(mask.astype(bool))
