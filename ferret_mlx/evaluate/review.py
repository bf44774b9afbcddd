"""Reviews by a judge model: what it is asked, how its reply is read, what the scores say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..regions import CANVAS

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
UNREADABLE = [-1, -1]

_BRACKET = re.compile(r"\[.*?\]")


class Summary(NamedTuple):
    """Scores of one category.

    Attributes:
        relative: the answers' mean in percent of the references' mean.
        unreadable: so many reviews without two scores; they enter the means as -1.
    """

    relative: float
    unreadable: int


def tidy_answer(text: str, category: str) -> str:
    """Ferret's answer as the judge reads it.

    In ``refer_desc`` and ``refer_reason`` brackets go together with a space before them (without
    the space they stay); in ``ground_conv`` coordinates become fractions, and brackets with
    another count of numbers go. A bracket that holds no numbers stays; there, and where it has
    fewer than four, the released script ends.
    """
    brackets = _BRACKET.findall(text)
    if category in ("refer_desc", "refer_reason"):
        for bracket in brackets:
            text = text.replace(f" {bracket}", "")
    elif category == "ground_conv":
        for bracket in brackets:
            try:
                numbers = [float(part) for part in re.sub(r"[\[\]]", "", bracket).split(",")]
            except ValueError:
                continue
            fractions = ", ".join(f"{number / CANVAS:.3f}" for number in numbers)
            text = text.replace(bracket, f"[{fractions}]" if len(numbers) == 4 else "")
    return text


def compose(
    context: str, question: str, answers: Sequence[str], rule: str, role: str, after_context: str
) -> str:
    """The message to the judge.

    Args:
        answers: the reference, then the answer to be judged.
        rule, role: of the category, from the benchmark's rule file.
        after_context: what stands between ``[Context]`` and the context.
    """
    parts = [f"[Context]{after_context}{context}", f"[Question]\n{question}"]
    for number, answer in enumerate(answers, 1):
        parts += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    return "\n\n".join([*parts, f"[System]\n{rule}", ""])


def read_scores(reply: str) -> list[float]:
    """The two scores in the first line of a reply, else ``[-1, -1]``.

    Commas count as spaces, and the line is split at single spaces: "8, 7" and "8 7 " fail.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return list(UNREADABLE)
    return [first, second]


def summarise(reviews: Iterable[dict[str, Any]]) -> Summary:
    """The score of some reviews (lines of a review file, field ``tuple``).

    Both means are rounded to 3 decimals before, the percentage to 1 after their division. 0 when
    there is no review or the references' mean is 0.
    """
    pairs = [review["tuple"] for review in reviews]
    if not pairs:
        return Summary(0.0, 0)
    reference, answer = (round(float(mean), 3) for mean in np.asarray(pairs, float).mean(0))
    relative = round(answer / reference * 100, 1) if reference else 0.0
    return Summary(relative, sum(list(pair) == UNREADABLE for pair in pairs))
