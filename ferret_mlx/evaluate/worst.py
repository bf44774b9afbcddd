"""The worst answers, drawn: truth dashed, the answer's boxes solid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..boxes import LabelledBox
from ..draw import draw_answer, save_picture
from ..regions import Box, Region
from .benchmark import Benchmark, Size, Verdict
from .pictures import read_picture

FOLDER = "worst"


def save_worst(
    folder: Path, benchmark: Benchmark, verdicts: Sequence[Verdict], images: Path, count: int
) -> list[Path]:
    """Write the pictures of the ``count`` worst answers, the worst first; returns their files.

    Those of an earlier start go, which may have had fewer or other answers.
    What was asked about (or the true boxes) is dashed, the answer's boxes are solid. Raises
    FileNotFoundError or ValueError for a picture that cannot be read.
    """
    counted = [verdict for verdict in verdicts if verdict.count]
    worst = sorted(counted, key=lambda verdict: verdict.quality)[:count]
    if worst:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for earlier in (folder / FOLDER).glob("[0-9][0-9][0-9]*-*.png"):
        earlier.unlink()
    files = []
    for rank, verdict in enumerate(worst, 1):
        pixels = read_picture(images / verdict.item.picture)
        size = pixels.shape[1], pixels.shape[0]
        truth = [box for corners in verdict.truth if (box := _inside(corners, size))]
        regions: Sequence[Region] = truth
        if not truth and not verdict.truth:
            regions = benchmark.question(verdict.item, size).regions
        answers = [LabelledBox("answer", _whole(box), (0, 0)) for box in verdict.boxes]
        picture = draw_answer(Image.fromarray(pixels), answers, regions)
        name = re.sub(r"[^\w.-]", "_", verdict.item.key)
        files.append(folder / FOLDER / f"{rank:03}-{name}.png")
        save_picture(picture, files[-1])
    return files


def _inside(corners: Sequence[float], size: Size) -> Box | None:
    """The part of a box within the picture; annotations may reach a little outside."""
    w, h = size
    x1, y1, x2, y2 = corners
    x1, y1, x2, y2 = max(0, x1), max(0, y1), min(w, x2), min(h, y2)
    return Box(x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 and x1 < w and y1 < h else None


def _whole(box: Sequence[float]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = map(int, box)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
