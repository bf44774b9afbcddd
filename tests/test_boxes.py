"""Boxes of an answer: labels, pixels, spans; malformed ones cost only themselves."""

import pytest

from ferret_mlx.boxes import parse_boxes

SIZE = (200, 150)


def labels(text: str) -> list[str]:
    return [label for label, _, _ in parse_boxes(text, SIZE)]


def test_label_box_and_span():
    text = "There is a dog [100, 200, 500, 720]. A red ball [0, 0, 999, 1000], too."
    found = parse_boxes(text, SIZE)
    assert found == [
        ("There is a dog", (20, 30, 100, 108), (15, 35)),
        ("A red ball", (0, 0, 199, 150), (48, 65)),
    ]
    assert [text[start:end] for _, _, (start, end) in found] == [
        "[100, 200, 500, 720]",
        "[0, 0, 999, 1000]",
    ]


def test_ratio_comes_first():
    """int(x * w / 1000) instead of int(x * (w / 1000)) differs by one pixel for rare pairs."""
    differing = [
        (v, w) for w in range(1, 400) for v in range(1000) if int(v * (w / 1000)) != v * w // 1000
    ]
    assert differing
    for v, w in differing[:50]:
        assert parse_boxes(f"[{v}, 0, {v}, 0]", (w, 10))[0].box[0] == int(v * (w / 1000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat [1, 2, 3, 4] and a dog [5, 6, 7, 8]", ["a cat", "and a dog"]),
        ("a cat [1, 2, 3, 4][5, 6, 7, 8]", ["a cat", ""]),
        ("Yes! a cat [1,2,3,4]; Two dogs: [ 5 , 6 , 7 , 8 ]", ["a cat", "Two dogs:"]),
        ("a cat ([1, 2, 3, 4])", ["a cat"]),
        ("dogs [[1, 2, 3, 4], [5, 6, 7, 8]]", ["dogs", ""]),
        ("", []),
        ("nothing here", []),
    ],
)
def test_labels(text, expected):
    assert labels(text) == expected


@pytest.mark.parametrize(
    "bracket",
    [
        "[1, 2, 3]",
        "[1, 2]",
        "[1, 2, 3, 4, 5]",
        "[1, 2, 3, x]",
        "[0.1, 0.2, 0.3, 0.4]",
        "[-1, 2, 3, 4]",
        "[9, 2, 3, 4]",
        "[1, 9, 3, 4]",
        "[1, 2, 1001, 4]",
        "[1, 2, 99999, 4]",
        "[1, 2, ٣, 4]",
        "[]",
    ],
)
def test_a_malformed_bracket_costs_only_itself(bracket):
    text = f"a cat [1, 2, 3, 4], a bird {bracket} and a dog [5, 6, 7, 8]"
    found = parse_boxes(text, (1000, 1000))
    assert [box for _, box, _ in found] == [(1, 2, 3, 4), (5, 6, 7, 8)]
    # What is left of it must not get into the next label.
    assert [label for label, _, _ in found] == ["a cat", "and a dog"]


def test_an_answer_cut_short():
    assert labels("a cat [1, 2, 3, 4] and a dog [5, 6,") == ["a cat"]
    assert labels("a dog [5, 6, a cat [1, 2, 3, 4]") == ["a cat"]
