"""Answer text -> labelled boxes in pixels."""

from __future__ import annotations

import re
from typing import NamedTuple

from .regions import CANVAS

_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"([0-9]{1,4})"] * 4) + r"\s*\]", re.ASCII)
# A bracket ends a label too: one that is no box must not leave its rest in the next label.
_BEFORE_LABEL = re.compile(r"[.,;!?\[\]]")


class LabelledBox(NamedTuple):
    """A box of an answer.

    Attributes:
        label: the text before it, since the previous . , ; ! ? or bracket, without white space
            around it; may be empty.
        box: (x1, y1, x2, y2) in pixels.
        span: (start, end) of the box, brackets included, in the answer.
    """

    label: str
    box: tuple[int, int, int, int]
    span: tuple[int, int]


def parse_boxes(text: str, image_size: tuple[int, int]) -> list[LabelledBox]:
    """All boxes of an answer, in text order.

    A box is four whole numbers on the 1000 x 1000 canvas, ``[x1, y1, x2, y2]`` with x1 <= x2 and
    y1 <= y2. Anything else in brackets is passed over and costs only itself.

    Args:
        text: an answer.
        image_size: (w, h) of the upright picture in pixels.
    """
    w, h = image_size
    found = []
    previous_end = 0
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (int(value) for value in match.groups())
        if x1 <= x2 <= CANVAS and y1 <= y2 <= CANVAS:
            # The ratio first, as for the coordinates of the prompt.
            box = (
                int(x1 * (w / CANVAS)),
                int(y1 * (h / CANVAS)),
                int(x2 * (w / CANVAS)),
                int(y2 * (h / CANVAS)),
            )
            before = text[previous_end : match.start()].rstrip(" \t\n[(")
            label = _BEFORE_LABEL.split(before)[-1].strip()
            found.append(LabelledBox(label, box, match.span()))
        previous_end = match.end()
    return found
