"""Training conversations: what is said must be true of the scene."""

import re
from collections import Counter

import numpy as np
import pytest

from ferret_mlx import parse_boxes
from ferret_mlx.prompt import build_prompt
from ferret_mlx.regions import Box, FreeForm, Point, sample_points
from reference import conversations as c
from reference.glyphs import NAMES, plural, with_article
from reference.scenes import Scene, compose

ARTICLES = {with_article(name): name for name in NAMES}
PLURALS = {plural(name): name for name in NAMES}
NUMBER = re.compile(r"\[\d+, \d+, \d+, \d+\]")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose("validation", number) for number in range(80)]


@pytest.fixture(scope="module")
def said(scenes) -> dict[str, list[tuple[Scene, c.Turn]]]:
    """Some turns of every kind, made one by one, so that rare kinds are many too."""
    made: dict[str, list] = {}
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([3, number])
        for maker, _ in c.MAKERS:
            for _ in range(8):
                turn = maker(scene, rng)
                if turn:
                    made.setdefault(turn.kind, []).append((scene, turn))
    return made


def every(said):
    return [(scene, turn) for made in said.values() for scene, turn in made]


def named(question: str, forms, names) -> str:
    """The one name that turns one of the forms into the question."""
    found = {name for form in forms for name in names if form.format(name) == question}
    assert len(found) == 1, question
    return found.pop()


def boxes_of(answer: str, scene: Scene) -> list[tuple[str, tuple]]:
    return [(label, box) for label, box, _ in parse_boxes(answer, scene.size)]


def agree(box, exact) -> bool:
    """The canvas has 1000 steps and both ways round down: up to one pixel is lost per side."""
    return all(0 <= want - got <= 1 for got, want in zip(box, exact, strict=True))


def name_in(label: str) -> str:
    return ARTICLES[label[0].lower() + label[1:]]


def test_every_kind_is_asked(scenes):
    kinds = Counter(
        turn.kind
        for number, scene in enumerate(scenes)
        for turn in c.converse(scene, np.random.default_rng(number), 20)
    )
    assert set(kinds) == set(c.TURN_KINDS)
    assert sum(kinds.values()) > 0.8 * 20 * len(scenes)
    assert min(kinds["name"], kinds["find"]) > 0.15 * sum(kinds.values())


def test_same_seed_same_conversation(scenes):
    for scene in scenes[:5]:
        first, again = (c.converse(scene, np.random.default_rng(5), 12) for _ in range(2))
        assert [(t.question, t.answer) for t in first] == [(t.question, t.answer) for t in again]
        other = c.converse(scene, np.random.default_rng(6), 12)
        assert [t.question for t in first] != [t.question for t in other]


def test_every_form_is_used(said):
    """Would catch a range that leaves out the last form."""
    for kind, forms in (("name", c.NAME), ("name_box", c.NAME_AND_BOX), ("list", c.LIST)):
        assert {turn.question for _, turn in said[kind]} == set(forms)
    assert {turn.question for _, turn in said["relate"]} == set(c.RELATE)


def test_questions_build_prompts(said):
    """Placeholders and regions agree, in ferret_mlx's own terms; nothing is left unformatted."""
    for scene, turn in every(said):
        texts = [region.text(scene.size) for region in turn.regions]
        prompt, order = build_prompt(turn.question, texts)
        assert sorted(order) == list(range(len(turn.regions)))
        assert all(text in prompt for text in texts)
        assert not re.search(r"[{}]|\[region", prompt + turn.answer)
        assert turn.answer.endswith(".") and turn.answer[0].isupper()


def test_regions_hold_pixels_of_their_target(said):
    counts = Counter()
    for scene, turn in every(said):
        for region, shown in zip(turn.regions, turn.targets, strict=bool(turn.regions)):
            mask = region.mask(scene.size)
            assert mask.shape == scene.size and mask.any()
            points = sample_points(mask, np.random.default_rng(0))
            assert points.min() >= 0 and points.max() < 1
            counts[type(region)] += 1
            target = shown.mask.T
            assert (mask & target).any()
            if isinstance(region, FreeForm):
                assert not (mask & ~target).any()
            elif isinstance(region, Point):
                assert target[region.x, region.y]
    assert min(counts[Point], counts[Box], counts[FreeForm]) > 0.2 * sum(counts.values())


def test_region_of(scenes):
    rng = np.random.default_rng(0)
    for o in (o for scene in scenes[:10] for o in scene.objects):
        x1, y1, x2, y2 = o.box
        assert c.region_of("box", o, rng) == Box(x1, y1, x2, y2)
        assert np.array_equal(c.region_of("silhouette", o, rng).pixels, o.mask)
        points = [c.region_of("point", o, rng) for _ in range(20)]
        assert all(o.mask[p.y, p.x] for p in points)
        assert len(set(points)) > 5


def test_names(said):
    for _, turn in said["name"]:
        assert name_in(turn.answer[:-1]) == turn.target.name
        assert turn.target.visible >= 0.5


def test_pairs_are_asked_about(scenes):
    """Naming draws on both objects of an overlapping pair: what region vectors are needed for."""
    rng = np.random.default_rng(0)
    for scene in (scene for scene in scenes if scene.pair):
        asked = Counter(id(c.name(scene, rng).target) for _ in range(60))
        of_pair = [asked[id(scene.objects[i])] for i in scene.pair]
        assert min(of_pair) > 10


def test_boxes_parse_back(said):
    for kind in ("find", "name_box"):
        for scene, turn in said[kind]:
            ((label, box),) = boxes_of(turn.answer, scene)
            assert agree(box, turn.target.box)
            if kind == "find":
                assert label == f"The {turn.target.name}"
                assert named(turn.question, c.FIND, NAMES) == turn.target.name
                assert [o.name for o in scene.objects].count(turn.target.name) == 1
            else:
                assert name_in(label) == turn.target.name


def test_answers_stay_below_the_canvas(said):
    """1000 would cost two tokens: the last pixel is 999 at most."""
    for _, turn in every(said):
        for text in NUMBER.findall(turn.answer):
            assert all(0 <= int(v) <= 999 for v in text[1:-1].split(", "))


def listed(answer: str, scene: Scene) -> list[tuple[str, tuple]]:
    """Name and box of each entry of a list; entries are joined by commas."""
    entries = re.split(r"(?<=\]), ", answer.removesuffix("."))
    found = []
    for entry in entries:
        ((label, box),) = boxes_of(entry, scene)
        found.append((name_in(label), box))
    return found


def test_lists_hold_every_object(said):
    for kind in ("list", "find_all"):
        for scene, turn in said[kind]:
            wanted = list(scene.objects)
            if kind == "find_all":
                name = PLURALS[named(turn.question, c.FIND_ALL, PLURALS)]
                wanted = [o for o in wanted if o.name == name]
                assert len(wanted) > 1
            wanted.sort(key=lambda o: o.box[:2])
            entries = listed(turn.answer, scene)
            assert len(entries) == len(wanted)
            for (name, box), o in zip(entries, wanted, strict=True):
                assert name == o.name and agree(box, o.box)


def test_yes_and_no_are_true_and_balanced(said):
    answers = Counter(turn.answer for _, turn in said["yes_no"])
    assert set(answers) == {"Yes.", "No."}
    assert 0.42 < answers["Yes."] / answers.total() < 0.58
    for scene, turn in said["yes_no"]:
        name = ARTICLES[named(turn.question, c.ANY, ARTICLES)]
        assert (name in {o.name for o in scene.objects}) == (turn.answer == "Yes.")


def test_is_it_is_true_and_balanced(said):
    answers = Counter(turn.answer for _, turn in said["is_it"])
    assert set(answers) == {"Yes.", "No."}
    assert 0.42 < answers["Yes."] / answers.total() < 0.58
    near = 0
    for scene, turn in said["is_it"]:
        (name,) = (
            name
            for phrase, name in ARTICLES.items()
            for form in c.IS_IT
            if form.format(phrase) == turn.question
        )
        assert (name == turn.target.name) == (turn.answer == "Yes.")
        near += turn.answer == "No." and name in {o.name for o in scene.objects}
    # A wrong name that is in the picture too: the region has to be looked at.
    assert near > 0.3 * answers["No."]


def test_counts(said):
    seen = Counter()
    for scene, turn in said["count"]:
        asked = named(turn.question, c.COUNT, (*PLURALS, "objects"))
        present = [o.name for o in scene.objects]
        number = len(present) if asked == "objects" else present.count(PLURALS[asked])
        words = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight"]
        assert turn.answer == words[number] + "."
        seen[number] += 1
    assert {0, 1, 2, 3, 4, 5} <= set(seen)


def test_relations_agree_with_geometry(said):
    """Against the boxes' centres in pixels; both regions are in the question's order."""
    seen = Counter()
    for scene, turn in said["relate"]:
        a, word, b = re.fullmatch(r"The (\w+) is (.+) the (\w+)\.", turn.answer).groups()
        centres = []
        for name, region in zip((a, b), turn.regions, strict=True):
            (o,) = (o for o in scene.objects if o.name == name and covers(region, o, scene))
            centres.append(((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2))
        dx, dy = (centres[0][i] - centres[1][i] for i in (0, 1))
        across = abs(dx) / scene.size[0] > abs(dy) / scene.size[1]
        expected = ("left of" if dx < 0 else "right of") if across else "below"
        if not across and dy < 0:
            expected = "above"
        assert word == expected
        assert max(abs(dx) / scene.size[0], abs(dy) / scene.size[1]) >= 0.1
        seen[word] += 1
    assert min(seen[w] for w in ("left of", "right of", "above", "below")) > 5


def covers(region, target, scene: Scene) -> bool:
    """Whether a region was drawn for an object: no other object of its kind holds more of it."""
    mask = region.mask(scene.size)
    held = {id(o): (mask & o.mask.T).sum() for o in scene.objects if o.name == target.name}
    return held[id(target)] == max(held.values()) > 0
