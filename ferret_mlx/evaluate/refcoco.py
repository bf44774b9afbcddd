"""RefCOCO, RefCOCO+ and RefCOCOg: the location of one described object.

Data: COCO-style JSON, one image record and one annotation per expression. Source: the released
``model_refcoco.py`` and ``eval_refexp.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .benchmark import Benchmark, Item, Question, Size, Verdict
from .overlap import box_iou
from .records import Line, read_json, take, take_numbers, take_size
from .released_text import decode_boxes

IOU = 0.5
NO_BOX = (0, 0, 0, 0)
MEASURES = ("@1", "mean", "upper bound")


class RefCOCO(Benchmark):
    """data: JSON file. Raises FileNotFoundError, or ValueError when it is not of this form."""

    name = "refcoco"

    def __init__(self, data: Path):
        self.options = {}
        self.set_items(_items(data))

    def question(self, item: Item, size: Size) -> Question:
        """size is not used: the data has its own."""
        prompt = f"What is the location of {item.record['caption']} in the image?"
        prompt = prompt.replace(",", "").strip()
        return Question(prompt, released=prompt)

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """``image_id`` is the id of the image record."""
        w, h = item.record["size"]
        return {
            "image_id": item.record["id"], "file_name": item.picture,
            "prompt": self.question(item, size).released, "text": text, "width": w, "height": h,
        }  # fmt: skip

    def answer_key(self, line: Line) -> str:
        return str(take(line.record, "image_id", int, line.where))

    def verdict(self, item: Item, text: str) -> Verdict:
        """Hits at an IoU of 0.5 in float32: of the first box, the mean box, any box."""
        try:
            found = [box for _, box in decode_boxes(text, item.record["size"])]
            unparsable = False
        except ValueError:
            found, unparsable = [], True
        boxes = np.array(found or [NO_BOX], np.float32)
        truth = np.array([item.record["box"]], np.float32)
        overlap = box_iou(boxes, truth, np.float32)
        of_mean = box_iou(boxes.mean(0, keepdims=True), truth, np.float32)
        values = (overlap[0, 0], of_mean[0, 0], _largest(overlap))
        hits = {name: bool(v >= IOU) for name, v in zip(MEASURES, values, strict=True)}
        return Verdict(
            item, text, hits=hits["@1"], count=1, quality=float(np.nan_to_num(overlap[0, 0])),
            unparsable=unparsable, truth=(item.record["box"],), boxes=tuple(found),
            details={"dataset": item.record["dataset"], "hit": hits},
        )  # fmt: skip

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Fractions for each dataset in the data; ``@1`` is the published accuracy."""
        figures = {}
        for dataset in sorted({verdict.details["dataset"] for verdict in verdicts}):
            own = [v.details["hit"] for v in verdicts if v.details["dataset"] == dataset]
            for name in MEASURES:
                figures[f"{dataset} {name}"] = sum(hit[name] for hit in own) / len(own)
        return figures


def _largest(overlap: np.ndarray) -> float:
    return float(np.nan_to_num(overlap).max())


def _items(data: Path) -> Iterator[Item]:
    content = read_json(data)
    if not isinstance(content, dict):
        raise ValueError(f"{data} holds a list, expected an object with images and annotations.")
    images = take(content, "images", list, str(data))
    annotations = take(content, "annotations", list, str(data))
    if len(images) != len(annotations):
        raise ValueError(
            f"{data} has {len(images)} images and {len(annotations)} annotations, expected one "
            "annotation for each."
        )
    for index, (image, annotation) in enumerate(zip(images, annotations, strict=True)):
        where = f"{data}, image {index}"
        identity = take(image, "id", int, where)
        if take(annotation, "image_id", int, f"{data}, annotation {index}") != identity:
            raise ValueError(
                f"{where} has the id {identity}, but annotation {index} belongs to image "
                f"{annotation['image_id']}; both lists must be in the same order."
            )
        x, y, w, h = take_numbers(annotation, "bbox", 4, f"{data}, annotation {index}")
        record = {
            "id": identity,
            "caption": take(image, "caption", str, where),
            "dataset": take(image, "dataset_name", str, where),
            "size": take_size(image, where),
            "box": (x, y, x + w, y + h),
        }
        yield Item(str(identity), take(image, "file_name", str, where), where, record)
