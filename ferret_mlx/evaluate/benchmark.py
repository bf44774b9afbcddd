"""What every benchmark offers: its items, its questions, and how an answer counts."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..regions import Region
from .records import Line, answer_files, read_lines, take

Size = tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One thing asked.

    Attributes:
        key: identifies it within the benchmark.
        picture: file name below the folder of pictures.
        where: the place in the data that it comes from, for errors.
        record: what the data says about it.
    """

    key: str
    picture: str
    where: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What the model is asked about an item.

    Attributes:
        prompt: as ``Session.ask_many`` takes it; ``[region0]`` stands for the first region.
        regions: in pixels.
        released: the text of released answer files, with coordinates and ``<region_fea>``.
    """

    prompt: str
    regions: tuple[Region, ...] = ()
    released: str = ""


@dataclass(frozen=True)
class Verdict:
    """How one answer counts.

    Attributes:
        hits, count: so many of so many; their sums give the running score.
        quality: orders answers from worst to best, 0..1.
        unparsable: its boxes or scores cannot be read.
        truth, boxes: (x1, y1, x2, y2) in pixels, where the benchmark is about boxes.
        details: what else is known, for the results file.
    """

    item: Item
    text: str
    hits: float
    count: int
    quality: float = 0.0
    unparsable: bool = False
    truth: tuple[Sequence[float], ...] = ()
    boxes: tuple[Sequence[float], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """One published evaluation with its data loaded.

    Attributes:
        name: as on the command line.
        items: in the order of the data; keys are unique.
        options: what changes the questions, for the record of a run.
    """

    name: ClassVar[str]
    single_file: ClassVar[str] = "*.jsonl"  # released answers that are not in chunks
    answer_field: ClassVar[str] = "text"
    not_asked: ClassVar[tuple[str, ...]] = ()  # fields of records that no answer depends on
    items: list[Item]
    options: dict[str, Any]

    @abstractmethod
    def question(self, item: Item, size: Size) -> Question:
        """The question about an item; size: (w, h) of its picture in pixels.

        Raises ValueError for a region without pixels.
        """

    def tidy(self, text: str) -> str:
        """An answer of the model as it is kept: without special tokens and outer white space."""
        for token in ("<unk>", "<s>", "</s>"):
            text = text.replace(token, "")
        return text.strip()

    @abstractmethod
    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """The answer as a line of the released answer files."""

    @abstractmethod
    def answer_key(self, line: Line) -> str:
        """The key of the item that a released line answers. Raises ValueError."""

    @abstractmethod
    def verdict(self, item: Item, text: str) -> Verdict:
        """How an answer counts."""

    @abstractmethod
    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """The named results of all verdicts."""

    def set_items(self, items: Iterable[Item]) -> None:
        """Raises ValueError for items with the same key, and for none."""
        self.items = list(items)
        seen: dict[str, Item] = {}
        for item in self.items:
            if item.key in seen:
                raise ValueError(f"{item.where} has the id {item.key} of {seen[item.key].where}.")
            seen[item.key] = item
        if not self.items:
            raise ValueError(f"The data of {self.name} holds nothing to ask.")

    def read_answers(self, path: Path) -> dict[str, str]:
        """Answers in the released format, by the key of their item.

        Raises FileNotFoundError, or ValueError for lines that are damaged, answer the same item
        twice, or belong to other items.
        """
        lines = [line for file in answer_files(path, self.single_file) for line in read_lines(file)]
        return self.match_answers(lines)

    def match_answers(self, lines: Sequence[Line]) -> dict[str, str]:
        """Released lines, each by the key of its item. Raises ValueError."""
        known = {item.key: item for item in self.items}
        answers: dict[str, str] = {}
        for line in lines:
            key = self.answer_key(line)
            if key not in known:
                raise ValueError(
                    f"{line.where} answers {key}, which is not in the data; "
                    "give the data that the answers belong to."
                )
            if key in answers:
                raise ValueError(f"{line.where} answers {key} a second time.")
            # The text follows from the data alone; the picture's size is not known here.
            asked = self.question(known[key], (1, 1)).released
            if line.record.get("prompt") not in (None, "", asked):
                raise ValueError(
                    f"{line.where} answers {line.record['prompt']!r}, but {known[key].where} asks "
                    f"{asked!r}; give the data and options that the answers belong to."
                )
            answers[key] = take(line.record, self.answer_field, str, line.where)
        return answers

    def released_files(self, lines: Mapping[str, dict[str, Any]]) -> dict[str, list[dict]]:
        """Released lines by the key of their item -> the files that hold them, by name."""
        return {"0_of_1.jsonl": [lines[item.key] for item in self.items if item.key in lines]}

    def digest(self) -> str:
        """SHA-256 of what is asked: answers go with the data that they were asked for."""
        found = hashlib.sha256()
        for item in self.items:
            asked = {k: v for k, v in item.record.items() if k not in self.not_asked}
            # Masks are the only values that JSON does not know.
            text = json.dumps([item.key, item.picture, asked], default=lambda v: v.tobytes().hex())
            found.update(text.encode())
        return found.hexdigest()


def check_complete(items: Sequence[Item], answers: Mapping[str, str]) -> None:
    """Raises ValueError when an item has no answer: a gap would shift or spoil the score."""
    missing = [item for item in items if item.key not in answers]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(items)} items have no answer, the first is "
            f"{missing[0].key} ({missing[0].where}); add the answers, or score fewer with --limit."
        )
