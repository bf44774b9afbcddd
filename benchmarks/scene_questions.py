"""The questions that accuracy is measured on: scenes of the test split, which training never sees.

Per scene one object named by point, by box and by silhouette, one unique object to find, one yes /
no question (half of them "no"), and in scenes with an overlapping pair both of its objects named
by silhouette. Targets are at least half visible; points lie on visible pixels.
"""

import re
from dataclasses import dataclass

import numpy as np

from ferret_mlx import parse_boxes
from reference.conversations import Region, region_of
from reference.glyphs import NAMES, with_article
from reference.scenes import HALF_VISIBLE, Scene, SceneObject, box_iou, compose

NAMING = ("point", "box", "silhouette")


@dataclass(frozen=True)
class Question:
    """``kind``: point, box, silhouette, find, yes_no or pair; ``expected``: the right answer's
    name, "Yes" / "No", or for find the pixel box (x1, y1, x2, y2), both ends included."""

    kind: str
    text: str
    regions: tuple[Region, ...]
    expected: object


def questions(scene: Scene, number: int) -> list[Question]:
    """The questions of scene ``number`` of the test split; the same at every call."""
    rng = np.random.default_rng([11, number])
    asked: list[Question] = []
    visible = [o for o in scene.objects if o.visible >= HALF_VISIBLE]
    if visible:
        target = visible[int(rng.integers(len(visible)))]
        asked += [_naming(kind, target, kind, rng) for kind in NAMING]
    unique = scene.unique()
    if unique:
        target = unique[int(rng.integers(len(unique)))]
        asked.append(Question("find", f"Where is the {target.name}?", (), target.box))
    present = {o.name for o in visible}
    if present and number % 2:
        name, expected = sorted(present)[int(rng.integers(len(present)))], "Yes"
    else:
        absent = [n for n in NAMES if n not in {o.name for o in scene.objects}]
        name, expected = absent[int(rng.integers(len(absent)))], "No"
    asked.append(Question("yes_no", f"Is there {with_article(name)} in the image?", (), expected))
    if scene.pair:
        asked += [_naming("pair", scene.objects[i], "silhouette", rng) for i in scene.pair]
    return asked


def _naming(kind: str, target: SceneObject, region: str, rng) -> Question:
    regions = (region_of(region, target, rng),)
    return Question(kind, "What is the object at [region0]?", regions, target.name)


def score(question: Question, answer: str, size: tuple[int, int]) -> float:
    """1 or 0 for names and yes / no; for find the IoU of the first box in the answer."""
    if question.kind == "find":
        boxes = parse_boxes(answer, size)
        return box_iou(boxes[0][1], question.expected) if boxes else 0.0
    said = answer.strip().rstrip(".").lower()
    if question.kind == "yes_no":
        first = re.match(r"[a-z]*", said)
        return float(bool(first) and first[0] == str(question.expected).lower())
    return float(said in (str(question.expected), with_article(str(question.expected))))


def load_scenes(count: int, first: int = 0) -> list[tuple[int, Scene]]:
    return [(number, compose("test", number)) for number in range(first, first + count)]
