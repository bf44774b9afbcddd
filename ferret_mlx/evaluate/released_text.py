"""How the released scripts read an answer: boxes, phrases and negations, oddities included."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..regions import CANVAS

_BRACKET = re.compile(r"[\[\]]")
_DELIMITER = re.compile(r"[.,;!?]")
_SPACED_MARK = re.compile(r"\s*(['\",.;!?|:])\s*")
_NEGATIONS = (re.compile(r"\s+not[^,.]*[,.]"), re.compile(r"\s+no[^,.]*[,.]"))

PixelBox = tuple[int, int, int, int]


class EntityBox(NamedTuple):
    """A box of an answer.

    Attributes:
        entity: the text before it, since the last delimiter; may be empty.
        box: (x1, y1, x2, y2) in pixels, truncated, neither ordered nor clipped.
    """

    entity: str
    box: PixelBox


def decode_boxes(text: str, size: tuple[int, int]) -> list[EntityBox]:
    """All boxes of an answer, read as strictly as in the release.

    Unlike in ``parse_boxes``, one malformed bracket loses every box of the answer. Further
    numbers in a bracket are ignored, and what follows a box up to the next ``. , ; ! ?`` belongs
    to no entity.

    Args:
        text: an answer.
        size: (w, h) of the picture in pixels.

    Raises:
        ValueError: a bracket holds anything but whole numbers, fewer than four, or one of hundreds
            of digits (where the released script ends with an IndexError or an OverflowError).
    """
    found = []
    entity, start = "", 0
    for bracket in _BRACKET.finditer(text):
        here = bracket.start()
        if bracket[0] == "[":
            entity, start = text[start:here].strip(), bracket.end()
            continue
        numbers = [int(part) for part in text[start:here].split(",")]
        if len(numbers) < 4:
            raise ValueError(f"A bracket has {len(numbers)} numbers, a box has four.")
        found.append(EntityBox(entity, to_pixels(numbers, size)))
        delimiter = _DELIMITER.search(text, bracket.end())
        start = delimiter.end() if delimiter else len(text)
    return found


def to_pixels(numbers: list[int], size: tuple[int, int]) -> PixelBox:
    """The first four numbers from the prompt's canvas to pixels, truncated and not clipped.

    Raises ValueError for a number that no float can hold.
    """
    # The ratio first, as released: int(200 * (145 / 1000)) is 28, not 29.
    across, down = (extent / CANVAS for extent in size)
    x1, y1, x2, y2 = numbers[:4]
    try:
        return int(x1 * across), int(y1 * down), int(x2 * across), int(y2 * down)
    except OverflowError:
        raise ValueError("A bracket has a number of hundreds of digits.") from None


def normalise_phrase(phrase: str) -> str:
    """Lower case, without punctuation, single spaces; phrases are the same where this is.

    A mark of ``' " , . ; ! ? | :`` separates words, any other (a hyphen) joins them.
    """
    spaced = _SPACED_MARK.sub(r"\1 ", phrase.lower())
    return " ".join(re.sub(r"[^\w\s]", "", spaced).split())


def without_negations(text: str) -> str:
    """An answer without what follows " not" or " no" up to the next comma or period.

    " no" has no end of word: " notebook." and " north," go as well. Without a following comma or
    period nothing goes.
    """
    for negation in _NEGATIONS:
        text = negation.sub("", text)
    return text
