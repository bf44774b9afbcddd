"""Answers read as the released scripts read them (data/eval/README.md)."""

import json
from pathlib import Path

import pytest

from ferret_mlx.evaluate.released_text import (
    decode_boxes,
    normalise_phrase,
    to_pixels,
    without_negations,
)

COMMON = Path(__file__).parent / "data" / "eval" / "common"


def cases(name):
    return json.loads((COMMON / f"{name}.json").read_text())


@pytest.mark.parametrize("case", cases("decode_cases"), ids=lambda c: f"{c['text']}-{c['w']}")
def test_boxes_are_those_of_the_release(case):
    size = case["w"], case["h"]
    if "exception" in case:
        with pytest.raises(ValueError):
            decode_boxes(case["text"], size)
        return
    found = decode_boxes(case["text"], size)
    assert [entity for entity, _ in found] == case["entities"]
    assert [list(box) for _, box in found] == case["boxes"]


def test_a_bracket_of_two_numbers_is_malformed():
    """The released script ends with an IndexError there, and all other answers are lost."""
    with pytest.raises(ValueError, match="2 numbers"):
        decode_boxes("a dog [1, 2, 3, 4]. a cat [5, 6].", (640, 480))


def test_an_endless_number_is_malformed():
    """A model that repeats one digit must not end the evaluation of all other answers."""
    with pytest.raises(ValueError, match="hundreds of digits"):
        decode_boxes(f"a dog [{'9' * 400}, 2, 3, 4].", (640, 480))


def test_one_malformed_bracket_loses_earlier_boxes():
    """``parse_boxes`` keeps them; a score with it would not be comparable."""
    with pytest.raises(ValueError):
        decode_boxes("a dog [1, 2, 3, 4]. a cat [5, x, 7, 8].", (640, 480))


def test_canvas_to_pixels_truncates_after_the_ratio():
    for width, expected in cases("resize_bbox").items():
        size = int(width), 1
        assert [to_pixels([v, 0, v, 0], size)[0] for v in range(1001)] == expected, width


def test_phrases_are_the_same_as_in_the_release():
    for a, b, same in cases("phrase_pairs"):
        assert (normalise_phrase(a) == normalise_phrase(b)) == same, (a, b)


def test_negations_go_as_in_the_release():
    for text, expected in cases("not_removal"):
        assert without_negations(text) == expected
