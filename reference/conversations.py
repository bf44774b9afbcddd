"""Questions and answers about a scene, in Ferret's form.

``[region0]`` in a question stands for the turn's first region, as in ferret_mlx; a question that
names none gets its region appended.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ferret_mlx.regions import Box, FreeForm, Point, coordinate

from .glyphs import NAMES, plural, with_article
from .scenes import HALF_VISIBLE, Scene, SceneObject, mask_box

Region = Point | Box | FreeForm
KINDS = ("point", "box", "silhouette")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

NAME = (
    "What is the object at [region0]?", "What is [region0]?", "What is in [region0]?",
    "What is this?", "Name the object at [region0].", "Identify [region0].", "What object is this?",
    "What can you see at [region0]?", "What is the object in [region0]?",
    "Tell me what [region0] is.",
    "What is the name of [region0]?", "What do you see in [region0] of the image?",
)  # fmt: skip
NAME_AND_BOX = (
    "What is [region0]? Give its box.", "Name the object at [region0] and give its box.",
    "What is this and where is it?", "What is the object at [region0]? Answer with its box.",
    "Identify [region0] with coordinates.",
)  # fmt: skip
FIND = (
    "Where is the {}?", "Find the {}.", "Locate the {} in the image.", "Give the box of the {}.",
    "Where is the {} in the picture?", "Point out the {}.", "Show me the {}.", "Detect the {}.",
    "Where can I see the {}? Give the coordinates.",
)  # fmt: skip
FIND_ALL = ("Where are the {}?", "Find all the {}.", "Locate the {}.", "Give the boxes of the {}.")
LIST = (
    "List the objects with their boxes.", "What is in the image? Give the boxes.",
    "Describe the image with boxes.", "Find all objects.",
    "What objects are in the picture and where?",
)  # fmt: skip
ANY = (
    "Is there {} in the image?", "Is there {} in the picture?", "Can you see {}?",
    "Does the image show {}?", "Do you see {} here?",
)  # fmt: skip
IS_IT = ("Is [region0] {}?", "Is the object at [region0] {}?", "Is this {}?")
COUNT = ("How many {} are there?", "How many {} are in the image?", "Count the {}.")
RELATE = (
    "Where is [region0] relative to [region1]?", "How does [region0] lie to [region1]?",
    "Where is [region0] seen from [region1]?", "What is the relation of [region0] to [region1]?",
)  # fmt: skip


TURN_KINDS = (
    "name", "find", "yes_no", "is_it", "name_box", "list", "find_all", "count", "relate",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """``kind``: one of TURN_KINDS; ``targets``: the objects asked about, the regions' first;
    ``boxed``: the objects whose boxes the answer gives, in its order; ``sought``: what a yes / no
    question asks for, empty when the scene has none, None for other questions."""

    kind: str
    question: str
    answer: str
    regions: tuple[Region, ...] = ()
    targets: tuple[SceneObject, ...] = ()
    boxed: tuple[SceneObject, ...] = ()
    sought: tuple[SceneObject, ...] | None = None

    @property
    def target(self) -> SceneObject | None:
        return self.targets[0] if self.targets else None


def box_text(box, size) -> str:
    """A pixel box on the 1000 x 1000 canvas of the answers."""
    return "[" + ", ".join(str(coordinate(v, size[i % 2])) for i, v in enumerate(box)) + "]"


def region_of(kind: str, target: SceneObject, rng: np.random.Generator) -> Region:
    """A point on the target's visible pixels, its box, or its visible silhouette."""
    if kind == "box":
        return Box(*target.box)
    if kind == "silhouette":
        return FreeForm(target.mask)
    rows, columns = np.nonzero(target.mask)
    i = int(rng.integers(len(rows)))
    return Point(int(columns[i]), int(rows[i]))


def _loose(target: SceneObject, rng: np.random.Generator) -> Region:
    """What a hand draws: a stroke-like part of the silhouette, or a box that is a little off."""
    if rng.random() < 0.5:
        x1, y1, x2, y2 = target.box
        h, w = target.mask.shape
        shift = rng.uniform(-0.08, 0.08, 4) * (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
        x1, x2 = np.clip([x1 + shift[0], x2 + shift[2]], 0, w - 1).astype(int)
        y1, y2 = np.clip([y1 + shift[1], y2 + shift[3]], 0, h - 1).astype(int)
        return Box(int(x1), int(y1), int(max(x1, x2)), int(max(y1, y2)))
    rows, columns = np.nonzero(target.mask)
    angle, at = rng.uniform(0, np.pi), int(rng.integers(len(rows)))
    across = np.cos(angle) * (columns - columns[at]) + np.sin(angle) * (rows - rows[at])
    near = np.abs(across) <= rng.uniform(3, 8)
    part = np.zeros_like(target.mask)
    part[rows[near], columns[near]] = True
    return FreeForm(part)


def _pick(options, rng):
    return options[int(rng.integers(len(options)))]


def _targets(scene: Scene) -> list[SceneObject]:
    return [o for o in scene.objects if o.visible >= HALF_VISIBLE]


def _region(target, rng):
    kind = _pick(KINDS + KINDS + ("loose",), rng)
    return _loose(target, rng) if kind == "loose" else region_of(kind, target, rng)


def name(scene: Scene, rng) -> Turn | None:
    targets = _targets(scene)
    if scene.pair and rng.random() < 0.5:
        targets = [scene.objects[i] for i in scene.pair]
    if not targets:
        return None
    target = _pick(targets, rng)
    answer = with_article(target.name).capitalize() + "."
    return Turn("name", _pick(NAME, rng), answer, (_region(target, rng),), (target,))


def name_and_box(scene: Scene, rng) -> Turn | None:
    targets = _targets(scene)
    if not targets:
        return None
    target = _pick(targets, rng)
    answer = f"{with_article(target.name).capitalize()} {box_text(target.box, scene.size)}."
    question, region = _pick(NAME_AND_BOX, rng), _region(target, rng)
    return Turn("name_box", question, answer, (region,), (target,), (target,))


def find(scene: Scene, rng) -> Turn | None:
    targets = scene.unique()
    if not targets:
        return None
    target = _pick(targets, rng)
    answer = f"The {target.name} {box_text(target.box, scene.size)}."
    return Turn("find", _pick(FIND, rng).format(target.name), answer, (), (target,), (target,))


def _boxed_list(kind: str, question: str, objects, scene) -> Turn:
    ordered = tuple(sorted(objects, key=lambda o: (o.box[0], o.box[1])))
    parts = [f"{with_article(o.name)} {box_text(o.box, scene.size)}" for o in ordered]
    text = ", ".join(parts)
    return Turn(kind, question, text[0].upper() + text[1:] + ".", boxed=ordered)


def find_all(scene: Scene, rng) -> Turn | None:
    counts = {o.name: 0 for o in scene.objects}
    for o in scene.objects:
        counts[o.name] += 1
    several = [n for n, count in counts.items() if count > 1]
    if not several:
        return None
    kind = _pick(several, rng)
    question = _pick(FIND_ALL, rng).format(plural(kind))
    return _boxed_list("find_all", question, [o for o in scene.objects if o.name == kind], scene)


def list_all(scene: Scene, rng) -> Turn | None:
    if not scene.objects:
        return None
    return _boxed_list("list", _pick(LIST, rng), scene.objects, scene)


def _absent(scene: Scene, rng) -> str:
    present = {o.name for o in scene.objects}
    return _pick([n for n in NAMES if n not in present], rng)


def is_there(scene: Scene, rng) -> Turn | None:
    targets = _targets(scene)
    if targets and rng.random() < 0.5:
        asked, answer = _pick(targets, rng).name, "Yes."
    else:
        asked, answer = _absent(scene, rng), "No."
    sought = tuple(o for o in scene.objects if o.name == asked)
    question = _pick(ANY, rng).format(with_article(asked))
    return Turn("yes_no", question, answer, sought=sought)


def is_it(scene: Scene, rng) -> Turn | None:
    targets = _targets(scene)
    if not targets:
        return None
    target = _pick(targets, rng)
    others = [o.name for o in scene.objects if o.name != target.name]
    if rng.random() < 0.5:
        asked, answer = target.name, "Yes."
    else:
        near = others and rng.random() < 0.5
        asked, answer = (_pick(others, rng) if near else _absent(scene, rng)), "No."
    question = _pick(IS_IT, rng).format(with_article(asked))
    return Turn("is_it", question, answer, (_region(target, rng),), (target,))


def count(scene: Scene, rng) -> Turn | None:
    names = sorted({o.name for o in scene.objects})
    if rng.random() < 0.3:
        asked, n = "objects", len(scene.objects)
    elif not names or rng.random() < 0.2:
        asked, n = plural(_absent(scene, rng)), 0
    else:
        kind = _pick(names, rng)
        asked, n = plural(kind), sum(o.name == kind for o in scene.objects)
    return Turn("count", _pick(COUNT, rng).format(asked), NUMBERS[n].capitalize() + ".")


def relate(scene: Scene, rng) -> Turn | None:
    targets = _targets(scene)
    if len(targets) < 2:
        return None
    a, b = (targets[i] for i in rng.permutation(len(targets))[:2])
    if a.name == b.name:
        return None
    shift = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / scene.size[i] for i in (0, 1)]
    if max(map(abs, shift)) < 1.4 * min(map(abs, shift)) or max(map(abs, shift)) < 0.2:
        return None
    if abs(shift[0]) > abs(shift[1]):
        word = "left of" if shift[0] < 0 else "right of"
    else:
        word = "above" if shift[1] < 0 else "below"
    answer = f"The {a.name} is {word} the {b.name}."
    return Turn("relate", _pick(RELATE, rng), answer, (_region(a, rng), _region(b, rng)), (a, b))


MAKERS: tuple[tuple[Callable[[Scene, np.random.Generator], Turn | None], float], ...] = (
    (name, 0.16), (find, 0.28), (is_there, 0.18), (is_it, 0.08), (name_and_box, 0.06),
    (list_all, 0.05), (find_all, 0.05), (count, 0.08), (relate, 0.06),
)  # fmt: skip


def converse(scene: Scene, rng: np.random.Generator, turns: int) -> list[Turn]:
    """About ``turns`` turns of mixed kinds; a kind that does not fit the scene is left out."""
    makers, weights = zip(*MAKERS, strict=True)
    drawn = rng.choice(len(makers), turns, p=np.array(weights) / sum(weights))
    made = [makers[i](scene, rng) for i in drawn]
    return [turn for turn in made if turn is not None]


__all__ = ["Turn", "converse", "region_of", "mask_box"]
