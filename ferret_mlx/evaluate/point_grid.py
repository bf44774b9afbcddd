"""Classes of 10 x 10 points of one picture; there is no score.

Data: the picture. Source: the released ``model_point_cls_single_image.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..prompt import REGION_TOKEN
from ..regions import CANVAS
from .benchmark import Benchmark, Item, Question, Size, Verdict
from .records import Line, take_numbers
from .regions import GivenRegion, canvas_text, point_mask

SIDE = 10


class PointGrid(Benchmark):
    """data: a picture. Raises FileNotFoundError."""

    name = "point-grid"

    def __init__(self, data: Path):
        if not data.is_file():
            raise FileNotFoundError(f"There is no picture at {data}; check the path.")
        self.options = {}
        self.path = data
        steps = [int(CANVAS * (index + 1) / (SIDE + 1)) for index in range(SIDE)]
        self.set_items(
            Item(f"{x},{y}", data.name, f"the point ({x}, {y})", {"coor": [x, y]})
            for x in steps
            for y in steps
        )

    def question(self, item: Item, size: Size) -> Question:
        """The mask lies on the prompt's canvas, whatever the picture's size."""
        x, y = item.record["coor"]
        location = canvas_text(x, y)
        region = GivenRegion(location, point_mask(x, y, (CANVAS, CANVAS)))
        form = "What is the class of object {}?"
        return Question(
            form.format("[region0]"), (region,), form.format(f"{location} {REGION_TOKEN}")
        )

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """``img_w`` and ``img_h``: of the picture in pixels."""
        return {
            "img_w": size[0], "img_h": size[1], "VOCAB_IMAGE_W": CANVAS, "VOCAB_IMAGE_H": CANVAS,
            "coor": item.record["coor"], "image_path": str(self.path),
            "prompt": self.question(item, size).released, "text": text,
        }  # fmt: skip

    def answer_key(self, line: Line) -> str:
        x, y = take_numbers(line.record, "coor", 2, line.where)
        return f"{x},{y}"

    def verdict(self, item: Item, text: str) -> Verdict:
        """Nothing is known about the right answers."""
        return Verdict(item, text, hits=0, count=0)

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """How many points were answered, and how many different answers there are."""
        return {
            "points": float(len(verdicts)),
            "different answers": float(len({verdict.text for verdict in verdicts})),
        }

    def released_files(self, lines: Any) -> dict[str, list[dict]]:
        """One file, named after the picture."""
        return {f"{self.path.stem}.jsonl": [lines[i.key] for i in self.items if i.key in lines]}
