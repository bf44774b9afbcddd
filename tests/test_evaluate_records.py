"""Which files of a folder are answers, and in which order."""

import pytest

from ferret_mlx.evaluate.records import answer_files


def names(folder):
    return [path.name for path in answer_files(folder, "answer.jsonl")]


@pytest.fixture
def chunks(tmp_path):
    for name in ("0_of_12.jsonl", "1_of_12.jsonl", "2_of_12.jsonl", "metric.json", "answer.jsonl"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_the_last_chunks_may_be_missing(chunks):
    """Of more chunks than items the released script writes the first ones, and no empty ones."""
    assert names(chunks) == ["0_of_12.jsonl", "1_of_12.jsonl", "2_of_12.jsonl"]


def test_a_chunk_missing_between_others_is_named(chunks):
    (chunks / "1_of_12.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks 1_of_12\.jsonl"):
        names(chunks)


def test_chunks_of_two_runs_are_refused(chunks):
    (chunks / "0_of_2.jsonl").write_text("")
    with pytest.raises(ValueError, match="chunks of several runs"):
        names(chunks)


def test_without_chunks_there_must_be_one_file(chunks):
    for path in chunks.glob("*_of_*"):
        path.unlink()
    assert names(chunks) == ["answer.jsonl"]
    (chunks / "answer.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"0 files of answers called answer\.jsonl"):
        names(chunks)
