"""Benchmarks whose answers a judge model compares with references."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark import Benchmark, Item, Verdict
from .records import Line, read_json, read_lines, take
from .review import Summary, compose, read_scores, summarise, tidy_answer

Reviews = dict[str, list[dict[str, Any]]]


class Judged(Benchmark):
    """Items hold ``question_id``, ``category``, ``text``, ``context``, ``reference``,
    ``reference_id`` and ``rule`` (of the judge: ``role`` and ``prompt``)."""

    not_asked = ("context", "reference", "reference_id", "rule")
    after_context: str

    def verdict(self, item: Item, text: str) -> Verdict:
        """Nothing before the judge's review."""
        return Verdict(item, text, hits=0, count=0)

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """How many answers there are; the scores are those of ``review_figures``."""
        return {"answers": float(len(verdicts))}

    def message(self, item: Item, text: str) -> str:
        """What the judge is asked about an answer."""
        record = item.record
        answers = record["reference"], tidy_answer(text, record["category"])
        rule = record["rule"]
        return compose(
            record["context"], record["text"], answers, rule["prompt"], rule["role"],
            self.after_context,
        )  # fmt: skip

    def review_line(self, item: Item, text: str, reply: str) -> dict[str, Any]:
        """A judge's reply as a line of the released review files."""
        record = item.record
        place = [other for other in self.items if other.record["category"] == record["category"]]
        return {
            "id": place.index(item) + 1, "question_id": record["question_id"],
            "answer1_id": record["reference_id"], "answer2_id": record["question_id"],
            "category": record["category"], "content": reply, "tuple": read_scores(reply),
            "answer1": record["reference"], "answer2": tidy_answer(text, record["category"]),
        }  # fmt: skip

    def read_reviews(self, folder: Path) -> Reviews:
        """``review_CATEGORY.jsonl`` of a folder, by category; what is missing is left out.

        Raises ValueError for a damaged line, one about another item, or a second one about the
        same.
        """
        known = {item.key for item in self.items}
        reviews: Reviews = {}
        for category in self.categories():
            path = folder / f"review_{category}.jsonl"
            for where, review in read_lines(path) if path.is_file() else ():
                identity = take(review, "question_id", int, where)
                scores = take(review, "tuple", list, where)
                if len(scores) != 2 or not all(type(s) in (int, float) for s in scores):
                    raise ValueError(f"{where}: 'tuple' must hold two scores.")
                if f"{category}/{identity}" not in known:
                    raise ValueError(
                        f"{where} is about question {identity}, which is not in the data."
                    )
                rows = reviews.setdefault(category, [])
                if any(row["question_id"] == identity for row in rows):
                    raise ValueError(f"{where} reviews question {identity} a second time.")
                rows.append(review)
        return reviews

    def reviews_of(self, items: Sequence[Item], texts: Mapping[str, str], folder: Path) -> Reviews:
        """The reviews of these items only.

        texts: the answers by the key of their item.

        Raises ValueError as ``read_reviews``, and for a review of another answer.
        """
        reviews: Reviews = {}
        by_key = {item.key: item for item in items}
        for category, rows in self.read_reviews(folder).items():
            for row in rows:
                item = by_key.get(f"{category}/{row['question_id']}")
                if item is None:
                    continue
                tidy = tidy_answer(texts[item.key], category)
                # LLaVA's review files do not repeat the answer.
                if row.get("answer2", tidy) != tidy:
                    raise ValueError(
                        f"{folder / f'review_{category}.jsonl'} reviews another answer to question "
                        f"{row['question_id']}; give the answers that it is about, or another "
                        "--output."
                    )
                reviews.setdefault(category, []).append(row)
        return reviews

    def categories(self) -> list[str]:
        """In the order of the data."""
        return list(dict.fromkeys(item.record["category"] for item in self.items))

    def review_figures(
        self, reviews: Mapping[str, Sequence[dict[str, Any]]], ignore: Iterable[int] = ()
    ) -> dict[str, float]:
        """Relative score of each category in percent, and how many replies had no two scores.

        ignore: question ids that do not count.
        """
        left_out = set(ignore)
        kept = {
            category: [row for row in rows if row["question_id"] not in left_out]
            for category, rows in reviews.items()
        }
        summaries = {category: summarise(rows) for category, rows in kept.items() if rows}
        figures = {category: summary.relative for category, summary in summaries.items()}
        if figures:
            figures[self.overall_name] = self.overall(kept, summaries)
            figures["replies without scores"] = sum(s.unreadable for s in summaries.values())
        return figures

    overall_name: str

    @abstractmethod
    def overall(self, reviews: Reviews, summaries: Mapping[str, Summary]) -> float:
        """The one number over all categories."""


def read_category(
    folder: Path, rules: Path, names: tuple[str, str, str], prefix: str = ""
) -> list[tuple[Line, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Questions with reference line, context and rule.

    Args:
        names: files of questions, contexts and references in the folder.
        prefix: of a category in the rule file.

    Raises FileNotFoundError, or ValueError when the files do not fit each other.
    """
    questions, contexts, references = (list(read_lines(folder / name)) for name in names)
    if len(questions) != len(references):
        raise ValueError(
            f"{folder} has {len(questions)} questions and {len(references)} references, which "
            "must be line by line."
        )
    by_picture = {take(line, "image", str, where): line for where, line in contexts}
    known = read_json(rules)
    rows = []
    for question, reference in zip(questions, references, strict=True):
        picture = take(question.record, "image", str, question.where)
        category = prefix + take(question.record, "category", str, question.where)
        if picture not in by_picture:
            raise ValueError(f"{question.where}: {folder / names[1]} has nothing on {picture}.")
        if not isinstance(known, dict) or category not in known:
            raise ValueError(f"{question.where}: {rules} has no rule for {category}.")
        for name in ("role", "prompt"):
            take(known[category], name, str, f"{rules}, {category}")
        take(reference.record, "text", str, reference.where)
        rows.append((question, reference.record, by_picture[picture], known[category]))
    return rows
