"""Items of an evaluation split over two processes by mlx.launch."""

import json

import mlx.core as mx

from ferret_mlx.distribution import Ranks
from ferret_mlx.evaluate.answer_log import ANSWER_FILE
from ferret_mlx.evaluate.cli import evaluate_main
from tests.launching import launch


def test_two_processes_find_what_one_finds(evaluation, tmp_path):
    """Also when they go on after an interruption of one or of both."""
    folder = evaluation / "lvis"
    words = [
        "lvis", "--format", "box", "--data", str(folder / "lvis_eval.jsonl"),
        "--images", str(folder / "images"), "--max-tokens", "6",
    ]  # fmt: skip
    alone, two = tmp_path / "alone", tmp_path / "two"
    evaluate_main([*words, "--output", str(alone)])
    lines = (alone / ANSWER_FILE).read_text().splitlines(keepends=True)
    two.mkdir()
    (two / "run.json").write_bytes((alone / "run.json").read_bytes())
    (two / ANSWER_FILE).write_text(lines[3] + lines[0][:30])
    (two / "answers-1.jsonl").write_text("".join(lines[6:9]))
    launch("-m", "ferret_mlx.evaluate", *words, "--output", two)
    names = [ANSWER_FILE, "verdicts.jsonl", "results.json", "released/0_of_1.jsonl"]
    for name in names:
        assert (two / name).read_bytes() == (alone / name).read_bytes(), name
    assert not list(two.glob("answers-*.jsonl"))


def test_one_process_takes_over_what_two_left(evaluation, tmp_path, capsys):
    folder = evaluation / "pope"
    words = [
        "pope", "--data", str(folder / "coco_pope_random.json"), "--output", str(tmp_path),
        "--images", str(folder / "images"),
    ]  # fmt: skip
    evaluate_main([*words, "--max-tokens", "2"])
    lines = (tmp_path / ANSWER_FILE).read_text().splitlines(keepends=True)
    (tmp_path / ANSWER_FILE).write_text("".join(lines[::2]))
    (tmp_path / "answers-1.jsonl").write_text("".join(lines[1::2]))
    capsys.readouterr()
    evaluate_main([*words, "--max-tokens", "2"])
    assert "Loaded" not in capsys.readouterr().err  # nothing was left to ask
    assert (tmp_path / ANSWER_FILE).read_text() == "".join(lines)
    assert json.loads((tmp_path / "results.json").read_text())["items"] == len(lines)


def test_a_process_alone_hears_itself(monkeypatch):
    """Without starting MPI, which takes a while where it is installed."""
    monkeypatch.setattr(mx.distributed, "init", None)
    ranks = Ranks()
    assert ranks.leads and ranks.count == 1
    assert ranks.gather({"a": "é"}) == [{"a": "é"}]


def test_two_processes_refuse_once(evaluation, tmp_path):
    data = evaluation / "pope" / "coco_pope_random.json"
    ended = launch(
        "-m", "ferret_mlx.evaluate", "pope", "--data", data, "--images", tmp_path, "--output",
        tmp_path / "out",
    )  # fmt: skip
    assert ended.stdout == ""
    assert ended.stderr.count("There is no picture") == ended.stderr.count("error:") == 1
    assert not (tmp_path / "out").exists()
