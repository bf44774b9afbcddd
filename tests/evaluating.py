"""The evaluation's command line, called within the tests."""

import json

import pytest

from ferret_mlx.evaluate.cli import evaluate_main


def run(*words):
    evaluate_main([str(word) for word in words])


def fails(capsys, *words):
    """The one line of a command that ends with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def results(folder):
    return json.loads((folder / "results.json").read_text())
