"""The accuracy benchmark: its questions are fair, its marks right, its models asked alike."""

import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest

from benchmarks import accuracy, scene_questions
from benchmarks.accuracy import differences, run, summarise, table
from benchmarks.scene_questions import Question, load_scenes, questions, score
from ferret_mlx.config import read_config
from ferret_mlx.regions import Box, FreeForm, Point
from reference.conversations import box_text
from reference.glyphs import NAMES, with_article
from reference.scenes import compose

SIZE = (200, 160)


@pytest.fixture(scope="module")
def scenes():
    return load_scenes(60)


def asked(kind: str, expected) -> Question:
    return Question(kind, "?", (), expected)


# The questions.


def test_scenes_are_of_the_test_split(scenes):
    assert [number for number, _ in scenes] == list(range(60))
    assert [number for number, _ in load_scenes(2, first=7)] == [7, 8]
    assert scenes[7][1].image.tobytes() == compose("test", 7).image.tobytes()
    assert scenes[7][1].image.tobytes() != compose("train", 7).image.tobytes()


def test_questions_are_the_same_at_every_call(scenes):
    for number, scene in scenes[:10]:
        one, other = questions(scene, number), questions(scene, number)
        assert [(q.kind, q.text, q.expected) for q in one] == [
            (q.kind, q.text, q.expected) for q in other
        ]
        for a, b in zip(one, other, strict=True):
            for first, second in zip(a.regions, b.regions, strict=True):
                assert np.array_equal(first.mask(scene.size), second.mask(scene.size))


def test_questions_are_true_and_about_visible_objects(scenes):
    seen = Counter()
    for number, scene in scenes:
        made = questions(scene, number)
        seen.update(q.kind for q in made)
        objects = {o.box: o for o in scene.objects}
        for q in made:
            if q.kind == "find":
                target = objects[q.expected]
                assert q.text == f"Where is the {target.name}?"
                assert [o.name for o in scene.objects].count(target.name) == 1
                assert target.visible >= 0.5
            elif q.kind == "yes_no":
                (name,) = (n for n in NAMES if f" {with_article(n)} in" in q.text)
                present = name in {o.name for o in scene.objects}
                assert q.expected == ("Yes" if present else "No")
            else:
                (region,) = q.regions
                mask = region.mask(scene.size)
                (target,) = (
                    o
                    for o in scene.objects
                    if o.name == q.expected and matches(region, o) and (mask & o.mask.T).any()
                )
                assert target.visible >= 0.5
                expected = {"point": Point, "box": Box}.get(q.kind, FreeForm)
                assert isinstance(region, expected)
        pairs = [q.expected for q in made if q.kind == "pair"]
        assert pairs == [scene.objects[i].name for i in scene.pair or ()]
    assert seen["point"] == seen["box"] == seen["silhouette"] == len(scenes)
    assert seen["yes_no"] == len(scenes) and seen["find"] > 0.9 * len(scenes)
    assert seen["pair"] >= 6


def matches(region, target) -> bool:
    if isinstance(region, Point):
        return bool(target.mask[region.y, region.x])
    if isinstance(region, Box):
        return (region.x1, region.y1, region.x2, region.y2) == target.box
    return np.array_equal(region.pixels, target.mask)


def test_half_of_the_yes_no_questions_are_no(scenes):
    made = [q for number, scene in scenes for q in questions(scene, number)]
    answers = Counter(q.expected for q in made if q.kind == "yes_no")
    assert answers == {"Yes": 30, "No": 30}


# The marks.


@pytest.mark.parametrize("kind", ["point", "box", "silhouette", "pair"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("An owl.", 1),
        ("An owl", 1),
        ("an owl.", 1),
        ("owl", 1),
        (" Owl. ", 1),
        ("A dog.", 0),
        ("The owl and a dog.", 0),
        ("An owlet.", 0),
        ("An owl [0, 0, 10, 10].", 0),
        ("", 0),
        (".", 0),
    ],
)
def test_score_of_names(kind, answer, expected):
    assert score(asked(kind, "owl"), answer, SIZE) == expected


def test_score_of_names_without_article():
    assert score(asked("box", "grapes"), "Grapes.", SIZE) == 1
    assert score(asked("box", "grapes"), "A grapes.", SIZE) == 0


@pytest.mark.parametrize(
    ("expected", "answer", "mark"),
    [
        ("Yes", "Yes.", 1),
        ("Yes", "yes", 1),
        ("Yes", "Yes there is.", 1),
        ("No", "No.", 1),
        ("No", "Yes.", 0),
        ("Yes", "No.", 0),
        ("No", "Nothing.", 0),
        ("No", "", 0),
        ("Yes", "A dog.", 0),
    ],
)
def test_score_of_yes_and_no(expected, answer, mark):
    assert score(asked("yes_no", expected), answer, SIZE) == mark


def test_score_of_finding_is_the_first_boxs_iou():
    """On a picture of 200 x 160 pixels, where a canvas step is 0.2 by 0.16 pixels."""
    question = asked("find", (20, 16, 99, 79))

    def mark(answer):
        return score(question, answer, SIZE)

    assert mark("The dog [100, 100, 495, 494].") == 1
    half = mark("The dog [100, 100, 295, 494].")
    assert half == pytest.approx(0.5, abs=0.01)
    assert mark("The dog [500, 100, 900, 494].") == 0
    assert mark("A cat [0, 0, 40, 40], a dog [100, 100, 495, 494].") == 0
    for malformed in (
        *("", "The dog.", "The dog [100, 100, 495].", "The dog [100, 100, 495, 494"),
        *("[495, 100, 100, 494]", "[100, 100, 495, 4940]", "[a, b, c, d]"),
    ):
        assert mark(malformed) == 0, malformed
    assert mark("The dog [1, 2] [100, 100, 495, 494].") == 1  # a bad bracket costs only itself


# The runs.


def perfect(image, question: Question, seed: int) -> str:
    if question.kind == "find":
        return f"The thing {box_text(question.expected, image.size)}."
    if question.kind == "yes_no":
        return f"{question.expected}."
    return with_article(question.expected).capitalize() + "."


def test_perfect_answers_get_full_marks(scenes):
    records = run(perfect, scenes[:30])
    found = summarise(records)
    assert found["questions"] == len(records) == sum(len(questions(s, n)) for n, s in scenes[:30])
    for kind in ("point", "box", "silhouette", "yes_no", "pair", "find@0.5", "find@0.75"):
        assert found[kind] == 100, kind
    assert found["mean_iou"] > 0.94  # boxes are rounded down, on the canvas and back


def test_run_asks_kinds_with_the_same_seeds(scenes):
    """The run with zeroed regions must draw the points of the full run."""
    seeds: list[list[tuple]] = []
    for kinds in (None, {"box", "pair"}):
        seen: list[tuple] = []

        def answer(image, question, seed, seen=seen):
            seen.append((image.size, question.kind, question.text, seed))
            return "No."

        records = run(answer, scenes[:8], kinds)
        assert [r["kind"] for r in records] == [kind for _, kind, _, _ in seen]
        seeds.append(seen)
    full, some = seeds
    assert some == [entry for entry in full if entry[1] in {"box", "pair"}]
    assert len({seed for _, _, _, seed in full}) > 4


def record(kind: str, mark: float, text: str = "") -> dict:
    return {"scene": 0, "kind": kind, "text": text, "score": mark}


def test_summarise():
    records = [record("point", 1), record("point", 0), record("point", 1), record("yes_no", 0)]
    records += [record("find", iou) for iou in (0.5, 0.49, 0.95, 0.75)]
    assert summarise(records) == {
        "questions": 8,
        "point": 66.7,
        "yes_no": 0.0,
        "find@0.5": 75.0,
        "find@0.75": 50.0,
        "find@0.9": 25.0,
        "mean_iou": pytest.approx(0.672, abs=6e-4),
    }
    assert summarise([record("pair", 1)]) == {"questions": 1, "pair": 100.0}


def test_differences():
    a = [record("point", 1, t) for t in ("A dog.", "A cat.", "A cow.")]
    b = [record("point", 0, t) for t in ("A dog.", "A cat.", "a cow.")]
    assert differences(a, a) == {"same answers": 100, "same words": 100}
    assert differences(a, b) == {"same answers": 66.67, "same words": 66.67}
    a.append(record("find", 1, "The dog [10, 20, 300, 999]."))
    b.append(record("find", 1, "The dog [12, 20, 297, 999]."))
    assert differences(a, b) == {"same answers": 50, "same words": 66.67, "box shift": 1.25}
    a.append(record("find", 1, "The dog [10, 20, 300, 999]."))
    b.append(record("find", 0, "The dog."))  # no box, nothing to measure
    assert differences(a, b)["box shift"] == 1.25
    with pytest.raises(ValueError):
        differences(a, b[:2])


def test_table_fills_columns_that_a_row_lacks():
    rows = {"full": {"questions": 5, "point": 90.0}, "zero": {"questions": 2, "pair": 50.0}}
    assert table(rows).splitlines() == [
        "| model | questions | point | pair |",
        "| --- | --- | --- | --- |",
        "| full | 5 | 90.0 |  |",
        "| zero | 2 |  | 50.0 |",
    ]


# The whole program, on the parity model: its words are random, but both sides must say the same.


@pytest.fixture(scope="module")
def mlx_folder(parity, parity_model, parity_weights, tmp_path_factory):
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("mlx")
    (folder / "config.json").write_text(json.dumps(read_config(parity / "checkpoint")))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(parity / "checkpoint" / name, folder)
    weights = parity_model.sanitize(parity_weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


@pytest.mark.parametrize("zero", [False, True])
def test_zeroed_regions(mlx_folder, scenes, monkeypatch, zero):
    """The model that answers has region vectors, or zeros in their place; all else is the same."""
    asked_of = []
    monkeypatch.setattr(accuracy, "generate", lambda model, *_, **__: asked_of.append(model))
    answer, processor = accuracy.mlx_answerer(str(mlx_folder), zero_regions=zero)
    scene = scenes[0][1]
    question = questions(scene, 0)[0]
    answer(scene.image, question, 0)
    inputs = processor(scene.image, question.text, question.regions)
    rows = asked_of[0].embed_inputs(inputs.input_ids, inputs.pixel_values, inputs.region_points)
    norms = np.linalg.norm(np.array(rows[0]), axis=-1)
    at = inputs.input_ids[::-1].index(processor.tokenizer.region_token_id) + 1
    assert (norms[-at] == 0) == zero
    assert np.delete(norms, len(norms) - at).min() > 0


def test_program_compares_models_and_twin(mlx_folder, parity, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "MAX_TOKENS", 5)
    output = tmp_path / "answers.jsonl"
    arguments = ["--model", mlx_folder, "--twin", parity / "checkpoint", "--scenes", 1]
    arguments += ["--first-scene", 3, "--no-pairs", "--output", output]
    monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, arguments)])
    accuracy.main()
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    count = len(questions(compose("test", 3), 3))
    assert found["scenes"] == 1
    assert found["rows"][mlx_folder.name]["questions"] == count
    assert found["rows"]["PyTorch twin"]["same answers"] == 100
    assert printed[0].startswith("| model | questions |")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(answers) == 2 * count
    assert {a["scene"] for a in answers} == {3}
    assert any(a["text"] for a in answers)


def test_workers_answer_alike(mlx_folder):
    """Spread over processes, the same records come back in the same order."""
    contender, numbers = accuracy.Contender(str(mlx_folder)), range(2, 14)
    kinds = frozenset({"yes_no", "point"})
    alone, spread = (accuracy.measure("", contender, numbers, kinds, n) for n in (1, 2))
    assert alone == spread
    assert sorted({r["scene"] for r in alone}) == list(numbers)


def test_naming_is_what_the_benchmark_asks_in(scenes):
    """The forms asked are forms trained on."""
    from reference import conversations as c

    assert scene_questions.NAMING == c.KINDS
    for number, scene in scenes[:10]:
        for q in questions(scene, number):
            forms = {"find": c.FIND, "yes_no": c.ANY}.get(q.kind, c.NAME)
            names = {"find": NAMES, "yes_no": map(with_article, NAMES)}.get(q.kind, [""])
            assert q.text in {form.format(n) if n else form for n in names for form in forms}
