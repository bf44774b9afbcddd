"""POPE: is there an object of this kind in the picture, yes or no.

Data: JSON lines of the POPE repository. Source: the released ``model_pope.py`` and
``eval_pope.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .benchmark import Benchmark, Item, Question, Size, Verdict
from .records import Line, read_lines, take

_NO = {"No", "no", "not"}


class POPE(Benchmark):
    """data: JSON-lines file. Raises FileNotFoundError, or ValueError."""

    name = "pope"
    answer_field = "answer"

    def __init__(self, data: Path):
        self.options = {}
        self.set_items(_items(data))

    def question(self, item: Item, size: Size) -> Question:
        """The text of the data, verbatim."""
        return Question(item.record["text"], released=item.record["text"])

    def tidy(self, text: str) -> str:
        """In lower case, as the released script writes answers."""
        return super().tidy(text).lower()

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """Only what was asked and answered: the released format names no item."""
        return {"question": item.record["text"], "answer": text}

    def answer_key(self, line: Line) -> str:
        """A released line says what was asked but not about which picture."""
        raise ValueError(f"{line.where} can only be told from its place among all answers.")

    def match_answers(self, lines: Sequence[Line]) -> dict[str, str]:
        """By position; the questions must be the same."""
        if len(lines) > len(self.items):
            raise ValueError(
                f"{lines[len(self.items)].where} is the answer {len(self.items) + 1}, but the "
                f"data has {len(self.items)} questions; give the data that the answers belong to."
            )
        answers = {}
        for item, line in zip(self.items, lines, strict=False):
            asked = take(line.record, "question", str, line.where)
            if asked != item.record["text"]:
                raise ValueError(
                    f"{line.where} answers {asked!r}, but {item.where} asks "
                    f"{item.record['text']!r}; give the data that the answers belong to."
                )
            answers[item.key] = take(line.record, self.answer_field, str, line.where)
        return answers

    def verdict(self, item: Item, text: str) -> Verdict:
        """No when the first sentence has the word no or not, otherwise yes."""
        words = text.split(".")[0].replace(",", "").split(" ")
        said_yes = not _NO.intersection(words)
        right = said_yes == item.record["yes"]
        return Verdict(
            item, text, hits=right, count=1, quality=right,
            details={"label": "yes" if item.record["yes"] else "no",
                     "verdict": "yes" if said_yes else "no"},
        )  # fmt: skip

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Fractions; 0 where nothing can be divided (the released script ends there)."""
        pairs = [(v.details["verdict"], v.details["label"]) for v in verdicts]
        hits, said = pairs.count(("yes", "yes")), [said for said, _ in pairs].count("yes")
        present = [label for _, label in pairs].count("yes")
        precision, recall = _ratio(hits, said), _ratio(hits, present)
        return {
            "Accuracy": _ratio(sum(said == label for said, label in pairs), len(pairs)),
            "Precision": precision,
            "Recall": recall,
            "F1 score": _ratio(2 * precision * recall, precision + recall),
            "Yes ratio": _ratio(said, len(pairs)),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _items(data: Path) -> Iterator[Item]:
    for where, line in read_lines(data):
        record = {
            "text": take(line, "text", str, where),
            # Anything but "no" counts as yes, as released.
            "yes": take(line, "label", str, where) != "no",
        }
        identity = str(take(line, "question_id", int, where))
        yield Item(identity, take(line, "image", str, where), where, record)
