"""LLaVA-Bench: questions about a picture, whose answers a judge compares with references.

Data: a folder with LLaVA's published files; neither data nor answers for Ferret were released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .benchmark import Item, Question, Size
from .judged import Judged, Reviews, read_category
from .records import Line, take
from .review import Summary, summarise

FILES = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
PREFIX = "llava_bench_"


class LLaVABench(Judged):
    """Three kinds of questions: conversation, detail, complex.

    Args:
        data: folder with ``questions.jsonl``, ``context.jsonl`` and ``answers_gpt4.jsonl``.
        rules: LLaVA's rule file, with ``llava_bench_conv`` and so on.

    Raises FileNotFoundError, or ValueError when the data is not of this form.
    """

    name = "llava-bench"
    single_file = "answer.jsonl"
    after_context = "\n"
    overall_name = "all"

    def __init__(self, data: Path, rules: Path):
        self.options = {}
        self.set_items(_items(data, rules))

    def question(self, item: Item, size: Size) -> Question:
        """The text of the data, verbatim."""
        return Question(item.record["text"], released=item.record["text"])

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """As LLaVA's answer files have it, without ids that are drawn at random."""
        identity = item.record["question_id"]
        return {
            "question_id": identity, "answer_id": identity, "prompt": item.record["text"],
            "text": text,
        }  # fmt: skip

    def answer_key(self, line: Line) -> str:
        identity = take(line.record, "question_id", int, line.where)
        keys = [item.key for item in self.items if item.record["question_id"] == identity]
        return keys[0] if keys else str(identity)

    def released_files(self, lines: Mapping[str, dict[str, Any]]) -> dict[str, list[dict]]:
        """One file."""
        return {self.single_file: [lines[i.key] for i in self.items if i.key in lines]}

    def overall(self, reviews: Reviews, summaries: Mapping[str, Summary]) -> float:
        """The score over all reviews together, as LLaVA's summary prints it."""
        return summarise(review for rows in reviews.values() for review in rows).relative


def _items(folder: Path, rules: Path) -> Iterator[Item]:
    for (where, line), reference, context, rule in read_category(folder, rules, FILES, PREFIX):
        caption = take(context, "caption", (str, list), where)
        record = {
            "question_id": take(line, "question_id", int, where),
            "text": take(line, "text", str, where),
            "category": PREFIX + line["category"],
            "context": caption if isinstance(caption, str) else "\n".join(map(str, caption)),
            "reference": reference["text"],
            "reference_id": reference.get("answer_id", reference.get("question_id")),
            "rule": rule,
        }
        yield Item(f"{record['category']}/{record['question_id']}", line["image"], where, record)
