"""Which reviews of a judge count."""

import json
import shutil

import pytest

from tests.evaluating import fails, results, run


@pytest.fixture
def reviewed(evaluation):
    folder = evaluation / "ferret_bench"
    return [
        "ferret-bench", "--data", folder, "--score-only", "--answers", folder / "ferret_answers",
        "--reviews", folder / "reviews",
    ]  # fmt: skip


def test_reviews_are_summarised(evaluation, tmp_path):
    folder = evaluation / "ferret_bench"
    run(
        "ferret-bench", "--data", folder, "--score-only", "--answers", folder / "ferret_answers",
        "--reviews", folder / "reviews", "--output", tmp_path,
    )  # fmt: skip
    figures = results(tmp_path)["figures"]
    assert [figures[c] for c in ("refer_desc", "refer_reason", "ground_conv")] == [75, 50, 68.8]
    assert figures["average"] == 64.6


def test_a_limit_leaves_out_the_reviews_of_the_rest(reviewed, evaluation, tmp_path, capsys):
    run(*reviewed, "--output", tmp_path, "--limit", 1)
    (line, *_) = (evaluation / "ferret_bench" / "reviews" / "review_refer_desc.jsonl").open()
    reference, answer = json.loads(line)["tuple"]
    figures = results(tmp_path)["figures"]
    assert list(figures)[:3] == ["answers", "refer_desc", "average"]
    assert figures["refer_desc"] == round(answer / reference * 100, 1)
    assert "note" not in capsys.readouterr().err


def test_missing_reviews_are_told(reviewed, evaluation, tmp_path, capsys):
    reviews = shutil.copytree(evaluation / "ferret_bench" / "reviews", tmp_path / "reviews")
    (reviews / "review_ground_conv.jsonl").unlink()
    count = sum(len(path.read_text().splitlines()) for path in reviews.iterdir())
    words = [*reviewed[:-1], reviews, "--output", tmp_path / "out"]
    run(*words)
    total = results(tmp_path / "out")["items"]
    assert f"the scores are of the {count} of {total} answers" in capsys.readouterr().err
    shutil.rmtree(reviews)
    assert f"{reviews} holds no reviews of these answers" in fails(capsys, *words)


def test_reviews_of_other_answers_are_not_summarised(reviewed, evaluation, tmp_path, capsys):
    reviews = shutil.copytree(evaluation / "ferret_bench" / "reviews", tmp_path / "reviews")
    path = reviews / "review_refer_reason.jsonl"
    path.write_text(path.read_text().replace("it leans", "it falls"))
    line = fails(capsys, *reviewed[:-1], reviews, "--output", tmp_path / "out")
    assert f"{path} reviews another answer to question 0" in line
