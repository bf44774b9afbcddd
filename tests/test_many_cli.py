"""generate.py --regions: JSON in, JSON lines out, and every refusal."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_cli import ANSWER, BOX, SENTENCE, parrot, wide  # noqa: F401

from ferret_mlx import loading
from ferret_mlx.cli import generate_main
from ferret_mlx.questions import read_questions
from ferret_mlx.regions import Box, FreeForm, Point


@pytest.fixture
def ask(parrot, wide, tmp_path):  # noqa: F811
    def run(entries, *arguments):
        path = tmp_path / "questions.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        generate_main(
            ["--image", str(wide), "--model", str(parrot), "--regions", str(path), *arguments]
        )

    return run


@pytest.fixture
def refused(ask, capsys):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            ask(*arguments)
        output, errors = capsys.readouterr()
        assert exit.value.code == 2 and output == ""
        assert errors.count("\n") == 1 and ": error: " in errors
        return errors

    return run


def test_one_line_per_answer(ask, capsys, parity):
    entries = [
        {"point": [40, 60]},
        {"prompt": "[region1] [region0]?", "regions": [
            {"box": [20, 10, 90, 80]}, {"mask": str(parity / "cases/wide_freeform.png")},
        ]},
        {"prompt": "How many?"},
        {"stroke": [[10, 10], [90, 90]], "width": 5},
        {"polygon": [[0, 0], [50, 0], [0, 50]]},
    ]  # fmt: skip
    ask(entries, "--prompt", "What is this?", "--verbose")
    output, errors = capsys.readouterr()
    lines = [json.loads(line) for line in output.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(5))
    for line in lines:
        assert line["text"] == ANSWER
        assert line["boxes"] == [{"label": "a dog", "box": BOX}]
        assert line["finish_reason"] == "stop" and line["generation_tokens"] == len(SENTENCE)
        assert 0 < line["prompt_tokens"] < 64
    lines.sort(key=lambda line: line["index"])
    assert [line["prompt"] for line in lines] == [
        "What is this?", "[region1] [region0]?", "How many?", "What is this?", "What is this?",
    ]  # fmt: skip
    assert [line["regions"] for line in lines] == [
        [{"kind": "point", "text": "[200, 400]"}],
        [{"kind": "box", "text": "[100, 66, 450, 533]"},
         {"kind": "mask", "text": "[150, 133, 600, 800]"}],
        [],
        [{"kind": "stroke", "text": "[40, 53, 460, 613]"}],
        [{"kind": "polygon", "text": "[0, 0, 250, 333]"}],
    ]  # fmt: skip
    assert f"5 answers, {5 * len(SENTENCE)} tokens" in errors


def test_questions_from_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('[{"box": [1, 2, 3.5, 4]}, {"point": [0, 0]}]'))
    questions = read_questions("-", "What?", (10, 10))
    assert [question.regions for question in questions] == [[Box(1, 2, 3.5, 4)], [Point(0, 0)]]
    assert [question.kinds for question in questions] == [["box"], ["point"]]


def test_shapes_are_those_of_the_command_line(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text('[{"stroke": [[5, 5]]}, {"stroke": [[5, 5]], "width": 3}]')
    for options, widths in (([], (10, 3)), ([6], (6, 3))):
        questions = read_questions(str(path), "?", (20, 20), *options)
        for question, width in zip(questions, widths, strict=True):
            expected = FreeForm.from_stroke([(5, 5)], width, (20, 20))
            assert np.array_equal(question.regions[0].pixels, expected.pixels)


def test_no_question_no_line(ask, capsys):
    ask([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        ("{", [], "questions.json is not JSON"),
        ("[" * 100_000, [], "questions.json is not JSON"),
        (f"[{'1' * 5000}]", [], "questions.json is not JSON"),
        (f'[{{"point": [1{"0" * 400}, 1]}}]', [], "wrong numbers"),
        ({"point": [1, 1]}, [], "holds a JSON dict, expected a list"),
        ([3], [], "entry 0: got 3, expected an object"),
        ([{"prompt": "a"}, {"point": [1, 1]}], [], "entry 1: got no prompt.*--prompt"),
        ([{"prompt": 3}], [], "entry 0: got the prompt 3"),
        ([{"question": "a"}], [], "entry 0: unknown key 'question'"),
        ([{"prompt": "a", "regions": {}}], [], "regions is {}, expected a list"),
        ([{"prompt": "a", "regions": [[1, 2]]}], [], r"got the region \[1, 2\]"),
        ([{"point": [1, 1], "box": [1, 1, 2, 2]}], [], "with one of point, box"),
        ([{"point": [1, 1], "width": 3}], [], "with one of point, box"),
        ([{"point": [1]}], [], "wrong numbers"),
        ([{"point": [1, "2"]}], [], "wrong numbers"),
        ('[{"point": [1, NaN]}]', [], "wrong numbers"),
        ([{"polygon": [[1, 1], [2, 2]]}], [], "wrong numbers"),
        ([{"stroke": [[1, 1]], "width": 0}], [], "wrong numbers"),
        ([{"mask": 3}], [], "no file"),
        ([{"mask": "missing.png"}], [], "missing.png"),
        ([{"stroke": [[500, 1]]}], ["--prompt", "a"], r"entry 0: \[region0\] \(stroke\).*outside"),
        ([{"prompt": "a"}, {"point": [200, 1]}], ["--prompt", "a"], "Question 1.*outside"),
        ([{"prompt": " "}], [], "Question 0: The prompt is empty"),
        ([{"prompt": "caf\ud800"}], [], "Question 0: The text holds .* is no character"),
        ([{"prompt": "a " * 400}], [], "Question 0: It takes .*context of 400"),
        ([], ["--point", "1,1"], "--point does not go with --regions"),
        ([], ["--save-image", "out.png"], "--save-image does not go with"),
        ([], ["--kv-bits", "8"], "--kv-bits does not go with"),
    ],
)
def test_refused(refused, monkeypatch, entries, arguments, message):
    """Before the weights are read."""
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    if "--prompt" not in arguments and message != "entry 1: got no prompt.*--prompt":
        arguments = [*arguments, "--prompt", "What?"]
    assert re.search(message, refused(entries, *arguments))


def test_refused_files(parrot, wide, tmp_path, capsys):  # noqa: F811
    Image.new("L", (4, 4)).save(tmp_path / "picture.json", format="png")
    for name, message in (("missing.json", "missing.json"), ("picture.json", "not a text file")):
        with pytest.raises(SystemExit) as exit:
            generate_main(
                ["--image", str(wide), "--model", str(parrot), "--regions", str(tmp_path / name)]
            )
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_prompt_is_needed_without_a_file(wide, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as exit:
        generate_main(["--image", str(wide)])
    assert exit.value.code == 2 and "required: --prompt" in capsys.readouterr().err
