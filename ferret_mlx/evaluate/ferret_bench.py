"""Ferret-Bench: describe a region, reason about it, converse with boxes; a judge compares.

Data: the folder ``ferret_gpt4_data`` of the release, read where it lies. Source: the released
``model_gpt4eval_3newclass.py``, ``eval_gpt_review_3newclass.py`` and ``summarize_gpt_review.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..prompt import REGION_TOKEN
from ..regions import CANVAS
from .benchmark import Item, Question, Size
from .judged import Judged, Reviews, read_category
from .records import Line, answer_files, read_lines, take
from .regions import GivenRegion, box_mask, canvas_text
from .review import Summary

FOLDERS = ("refer_caption", "refer_reason", "ground_conv")
FILES = ("question.jsonl", "context.jsonl", "answer.jsonl")
_BRACKET = re.compile(r"\[(.*?)\]")


class FerretBench(Judged):
    """The three categories.

    Args:
        data: folder with ``refer_caption``, ``refer_reason``, ``ground_conv`` and ``rule.json``;
            or one of the three, its rule file beside it.
        region_feature: with the regions' vectors, as published; otherwise coordinates only.

    Raises FileNotFoundError, or ValueError when the data is not of this form.
    """

    name = "ferret-bench"
    single_file = "ferret_answer.jsonl"
    # A backslash where a line break was meant; part of what the published judge read.
    after_context = "\\"
    overall_name = "average"

    def __init__(self, data: Path, region_feature: bool = True):
        self.region_feature = region_feature
        self.options = {"region_feature": region_feature}
        alone = (data / FILES[0]).is_file()
        folders = [data] if alone else [data / name for name in FOLDERS]
        rules = (data.absolute().parent if alone else data) / "rule.json"
        self.set_items(item for folder in folders for item in _items(folder, rules))

    def question(self, item: Item, size: Size) -> Question:
        """Fractions become canvas coordinates; size: (w, h) of the picture, for the masks."""
        regions, texts = [], []
        for numbers in item.record["boxes"]:
            extents = (*size, *size)
            x1, y1, x2, y2 = (int(v * e) for v, e in zip(numbers, extents, strict=True))
            texts.append(canvas_text(*(int(v * CANVAS) for v in numbers)))
            regions.append(GivenRegion(texts[-1], box_mask((x1, y1, x2, y2), size)))
        parts = _BRACKET.split(item.record["text"])[::2]
        if not self.region_feature:
            prompt = _interleave(parts, texts)
            return Question(prompt, released=prompt)
        return Question(
            _interleave(parts, [f"[region{index}]" for index in range(len(texts))]),
            tuple(regions),
            _interleave(parts, [f"{text} {REGION_TOKEN}" for text in texts]),
        )

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """``prompt`` has the canvas coordinates."""
        return {
            "question_id": item.record["question_id"], "image_path": item.picture,
            "prompt": self.question(item, size).released, "text": text,
        }  # fmt: skip

    def answer_key(self, line: Line) -> str:
        """Question ids count within a category, which the line does not name."""
        raise ValueError(f"{line.where} belongs to the category of its folder.")

    def read_answers(self, path: Path) -> dict[str, str]:
        """``CATEGORY/ferret_answer.jsonl`` of a folder; for one category also the file."""
        answers: dict[str, str] = {}
        categories = self.categories()
        for category in categories:
            folder = path / category
            if not folder.is_dir() and len(categories) == 1:
                folder = path
            for file in answer_files(folder, self.single_file):
                for where, line in read_lines(file):
                    key = f"{category}/{take(line, 'question_id', int, where)}"
                    answers |= self._match(where, key, line, answers)
        return answers

    def released_files(self, lines: Mapping[str, dict[str, Any]]) -> dict[str, list[dict]]:
        """One file for each category."""
        return {
            f"{category}/{self.single_file}": [
                lines[item.key]
                for item in self.items
                if item.record["category"] == category and item.key in lines
            ]
            for category in self.categories()
        }

    def overall(self, reviews: Reviews, summaries: Mapping[str, Summary]) -> float:
        """The mean of the categories, as published."""
        return round(sum(s.relative for s in summaries.values()) / len(summaries), 1)

    def _match(
        self, where: str, key: str, line: dict[str, Any], answers: Mapping[str, str]
    ) -> dict[str, str]:
        """One answer by its key. Raises ValueError for another item, or one answered before."""
        if key not in {item.key for item in self.items}:
            raise ValueError(f"{where} answers {key}, which is not in the data.")
        if key in answers:
            raise ValueError(f"{where} answers {key} a second time.")
        return {key: take(line, "text", str, where)}


def _interleave(parts: list[str], between: list[str]) -> str:
    return "".join(part + text for part, text in zip(parts, [*between, ""], strict=True))


def _items(folder: Path, rules: Path) -> Iterator[Item]:
    for (where, line), reference, context, rule in read_category(folder, rules, FILES):
        text = take(line, "text", str, where)
        record = {
            "question_id": take(line, "question_id", int, where), "text": text,
            "category": line["category"], "boxes": _boxes(text, where),
            "context": take(context, "text", str, where), "reference": reference["text"],
            "reference_id": reference.get("answer_id", reference.get("question_id")), "rule": rule,
        }  # fmt: skip
        key = f"{record['category']}/{record['question_id']}"
        yield Item(key, line["image"].rsplit("/", 1)[-1], where, record)


def _boxes(text: str, where: str) -> list[list[float]]:
    boxes = []
    for inside in _BRACKET.findall(text):
        try:
            numbers = [float(part) for part in inside.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 4 or not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"{where}: [{inside}] is not a box of four fractions.")
        boxes.append(numbers)
    return boxes
