"""The runner of the evaluations: answers kept, resumed, scored, and what it refuses."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferret_mlx.distribution import Ranks
from ferret_mlx.evaluate.answer_log import ANSWER_FILE, AnswerLog
from ferret_mlx.evaluate.ferret_bench import FerretBench
from ferret_mlx.evaluate.flickr import Flickr
from ferret_mlx.evaluate.lvis import LVIS
from ferret_mlx.evaluate.point_grid import PointGrid
from ferret_mlx.evaluate.runner import Asking, answer_items, by_picture
from ferret_mlx.processor import Processor
from tests.evaluating import fails, results, run


@pytest.fixture(scope="module")
def asked(parity_model, parity):
    """Answers of the small random model, as a function of folder, benchmark and batch."""
    processor = Processor.from_folder(parity / "checkpoint")

    def ask(folder, benchmark, images, batch=8, loads=None, count=None):
        log = AnswerLog(folder, benchmark, {"seed": 0}, Ranks())

        def loaded():
            if loads is not None:
                loads.append(1)
            return parity_model, processor

        asking = Asking(batch=batch, max_tokens=3)
        answer_items(benchmark, benchmark.items[:count], images, loaded, log, asking)
        return log.answers

    return ask


@pytest.fixture
def refcoco(evaluation):
    folder = evaluation / "refexp"
    data = folder / "finetune_refcoco_val.json"
    return ["refcoco", "--data", str(data), "--images", str(folder / "images")]


def test_a_batch_answers_as_one_by_one(asked, evaluation, tmp_path):
    grid = PointGrid(evaluation / "point_cls" / "picture.png")
    images = evaluation / "point_cls"
    together = asked(tmp_path / "8", grid, images, 8, count=24)
    assert together == asked(tmp_path / "1", grid, images, 1, count=24)


def test_interrupted_at_twenty_moments_it_ends_the_same(asked, evaluation, tmp_path):
    """The log is only appended to, so a killed run leaves a beginning of it, cut anywhere."""
    folder = evaluation / "ferret_bench"
    benchmark = FerretBench(folder)
    whole = asked(tmp_path / "whole", benchmark, folder / "images")
    assert len(whole) == len(benchmark.items)
    log = (tmp_path / "whole" / ANSWER_FILE).read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    rng = random.Random(0)
    for moment in sorted(rng.randrange(len(log)) for _ in range(20)):
        (tmp_path / "cut" / ANSWER_FILE).write_bytes(log[:moment])
        loads = []
        assert asked(tmp_path / "cut", benchmark, folder / "images", loads=loads) == whole
        assert loads == [1]
        assert len((tmp_path / "cut" / ANSWER_FILE).read_text().splitlines()) == len(whole)


def test_nothing_is_loaded_when_all_is_answered(asked, evaluation, tmp_path):
    grid = PointGrid(evaluation / "point_cls" / "picture.png")
    first = asked(tmp_path, grid, evaluation / "point_cls", count=5)
    loads = []
    assert asked(tmp_path, grid, Path("nowhere"), loads=loads, count=5) == first
    assert loads == []


def test_items_of_one_picture_come_together(evaluation):
    folder = evaluation / "flickr"
    items = Flickr(folder / "final_flickr_mergedGT_test.json", folder / "flickr30k").items
    mixed = items[::2] + items[1::2]
    groups = list(by_picture(mixed))
    assert [picture for picture, _ in groups] == ["930011.png", "930012.png", "930013.png"]
    assert [len(group) for _, group in groups] == [3, 2, 2]


def test_the_command_answers_scores_and_draws(refcoco, tmp_path, capsys):
    run(*refcoco, "--output", tmp_path, "--max-tokens", 12, "--save-images", 2)
    printed = capsys.readouterr().out
    found = results(tmp_path)
    assert found["items"] == 8 and found["model"] == "ferret-tiny" and found["seed"] == 0
    assert list(found["figures"]) == ["refcoco @1", "refcoco mean", "refcoco upper bound"]
    assert "refcoco @1" in printed
    assert len(list((tmp_path / "worst").glob("*.png"))) == 2
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
    log = {row["key"]: row for row in map(json.loads, (tmp_path / ANSWER_FILE).open())}
    assert [row["text"] for row in verdicts] == [log[row["key"]]["text"] for row in verdicts]
    cut = [row["finish_reason"] == "length" for row in log.values()]
    assert found["cut answers"] == sum(cut)

    before = found["figures"], (tmp_path / ANSWER_FILE).read_bytes()
    run(*refcoco, "--output", tmp_path, "--max-tokens", 12)
    assert before == (results(tmp_path)["figures"], (tmp_path / ANSWER_FILE).read_bytes())
    run(*refcoco, "--output", tmp_path / "later", "--score-only", "--answers", tmp_path)
    later = results(tmp_path / "later")
    assert later["figures"] == before[0]
    assert [later[name] for name in ("model", "seed", "max_tokens")] == ["ferret-tiny", 0, 12]
    released = tmp_path / "released"
    run(*refcoco, "--output", tmp_path / "again", "--score-only", "--answers", released)
    assert results(tmp_path / "again")["figures"] == before[0]
    with (released / "0_of_1.jsonl").open() as lines:
        assert [json.loads(line)["text"] for line in lines] == [v["text"] for v in verdicts]


def test_score_only_of_a_file_and_of_a_limit(refcoco, evaluation, tmp_path):
    """A file of answers dies in the released script after the score; results go elsewhere."""
    folder = evaluation / "refexp" / "answers" / "finetune_refcoco_val"
    one = tmp_path / "one.jsonl"
    one.write_text("".join(path.read_text() for path in sorted(folder.iterdir())))
    run(*refcoco, "--score-only", "--answers", one, "--output", tmp_path / "a")
    assert results(tmp_path / "a")["figures"]["refcoco @1"] == 0.375
    assert results(tmp_path / "a")["unparsable"] == 1
    run(*refcoco, "--score-only", "--answers", folder, "--output", tmp_path / "b", "--limit", 4)
    first = json.loads((evaluation / "refexp" / "expected_metrics.json").read_text())
    hits = [i["hit"]["1"] for i in first["finetune_refcoco_val"]["per_item"][:4]]
    assert results(tmp_path / "b")["figures"]["refcoco @1"] == sum(hits) / 4


def test_the_worst_of_an_earlier_start_go(refcoco, evaluation, tmp_path):
    """With other answers the same rank stood there twice."""
    answers = evaluation / "refexp" / "answers" / "finetune_refcoco_val"
    words = [*refcoco, "--score-only", "--answers", answers, "--output", tmp_path]
    own = tmp_path / "worst" / "notes.png"
    own.parent.mkdir()
    own.write_bytes(b"")
    drawn = []
    for limit in (1, 8):
        run(*words, "--limit", limit, "--save-images", 1)
        drawn.append(sorted(path.name for path in own.parent.iterdir()))
    assert drawn == [["001-3.png", own.name], ["001-7.png", own.name]]


def test_scoring_twice_in_the_folder_of_the_answers(evaluation, tmp_path):
    answers = shutil.copytree(evaluation / "point_cls" / "answers", tmp_path / "answers")
    words = ["point-grid", "--data", evaluation / "point_cls" / "picture.png", "--score-only"]
    for _ in range(2):
        run(*words, "--output", answers)
    assert results(answers)["figures"]["points"] == 100


def test_answers_are_not_ignored_without_score_only(refcoco, evaluation, tmp_path, capsys):
    answers = evaluation / "refexp" / "answers" / "finetune_refcoco_val"
    line = fails(capsys, *refcoco, "--output", tmp_path / "out", "--answers", answers)
    assert "add --score-only" in line


def test_a_killed_run_goes_on(refcoco, tmp_path):
    words = [*refcoco, "--max-tokens", "12", "--batch", "1"]
    run(*words, "--output", tmp_path / "whole")
    command = [sys.executable, "-m", "ferret_mlx.evaluate", *words, "--output", tmp_path / "cut"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / ANSWER_FILE
    while process.poll() is None and not log.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*words, "--output", tmp_path / "cut")
    whole, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert cut == whole
    verdicts = [(tmp_path / name / "verdicts.jsonl").read_bytes() for name in ("whole", "cut")]
    assert verdicts[0] == verdicts[1]


@pytest.fixture
def answered(refcoco, tmp_path):
    """A folder whose eight items are answered, by hand."""
    log = tmp_path / ANSWER_FILE
    keys = (3, 7, 8, 9, 11, 14, 17, 18)
    log.write_text("".join(f'{{"key": "{key}", "text": "a [1, 2, 3, 4]."}}\n' for key in keys))
    return log


def test_a_missing_picture_is_named_before_anything_is_loaded(refcoco, tmp_path, capsys):
    words = [*refcoco[:-1], tmp_path, "--output", tmp_path / "out"]
    line = fails(capsys, *words)
    assert "finetune_refcoco_val_00.png" in line and "image 0" in line
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_keeps_what_was_answered(refcoco, evaluation, tmp_path, capsys):
    images = shutil.copytree(evaluation / "refexp" / "images", tmp_path / "images")
    picture = images / "finetune_refcoco_val_03.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    words = [*refcoco[:-1], images, "--output", tmp_path / "out", "--max-tokens", 4]
    assert "finetune_refcoco_val_03.png is not a readable picture" in fails(capsys, *words)
    assert len((tmp_path / "out" / ANSWER_FILE).read_text().splitlines()) == 3
    picture.write_bytes(whole)
    run(*words)
    assert results(tmp_path / "out")["items"] == 8


def test_a_line_that_is_not_json_is_named(refcoco, answered, capsys):
    lines = answered.read_text().splitlines()
    answered.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:], ""]))
    words = [*refcoco, "--output", answered.parent, "--score-only"]
    assert f"{ANSWER_FILE}, line 3 is not JSON" in fails(capsys, *words)


def test_an_item_answered_twice_is_named(refcoco, answered, capsys):
    answered.write_text(answered.read_text() + answered.read_text().splitlines()[0] + "\n")
    words = [*refcoco, "--output", answered.parent, "--score-only"]
    assert "line 9 answers 3 a second time" in fails(capsys, *words)


def test_answers_to_other_items_are_refused(refcoco, evaluation, tmp_path, capsys):
    answers = evaluation / "refexp" / "answers" / "finetune_refcocog_test"
    words = [*refcoco, "--output", tmp_path, "--score-only", "--answers", answers]
    assert "line 1 answers 0, which is not in the data" in fails(capsys, *words)


@pytest.mark.parametrize(
    "flag, belongs",
    (
        (["--format", "box"], "--format belongs to lvis, not to refcoco"),
        (["--no-region-feature"], "--no-region-feature belongs to lvis and ferret-bench"),
        (["--judge-model", "x"], "--judge-model belongs to ferret-bench and llava-bench"),
        (["--entities", "x"], "--entities belongs to flickr"),
        (["--ignore", "3"], "--ignore belongs to"),
    ),
)
def test_flags_of_other_benchmarks_are_refused(refcoco, tmp_path, capsys, flag, belongs):
    """They were ignored without a word."""
    assert belongs in fails(capsys, *refcoco, "--output", tmp_path, *flag)


def test_the_same_id_twice_in_the_data_is_refused(refcoco, tmp_path, capsys):
    content = json.loads(Path(refcoco[2]).read_text())
    content["images"].append(content["images"][0])
    content["annotations"].append(content["annotations"][0])
    data = tmp_path / "twice.json"
    data.write_text(json.dumps(content))
    words = ["refcoco", "--data", data, *refcoco[3:], "--output", tmp_path / "out"]
    assert "image 8 has the id 3 of" in fails(capsys, *words)


@pytest.mark.parametrize("change", (["--seed", "1"], ["--max-tokens", "5"]))
def test_a_folder_holds_the_answers_of_one_run(refcoco, tmp_path, capsys, change):
    words = [*refcoco, "--output", tmp_path, "--limit", 1]
    run(*words, "--max-tokens", 2)
    kept = (tmp_path / ANSWER_FILE).read_bytes()
    line = fails(capsys, *words, *(["--max-tokens", 2] if change[0] == "--seed" else []), *change)
    assert "holds answers of another run" in line and "give another --output" in line
    assert (tmp_path / ANSWER_FILE).read_bytes() == kept


def test_answers_of_other_questions_are_not_taken_over(refcoco, tmp_path, capsys):
    words = [*refcoco, "--output", tmp_path / "out", "--limit", 1, "--max-tokens", 2]
    run(*words)
    data = tmp_path / "other.json"
    data.write_text(Path(refcoco[2]).read_text().replace("tin robot", "tin rocket"))
    line = fails(capsys, words[0], "--data", data, *words[3:])
    assert "holds answers of another run: data was" in line


def test_answers_of_an_unknown_run_are_not_taken_over(refcoco, answered, capsys):
    """They may come from another model; the new settings were written beside them."""
    line = fails(capsys, *refcoco, "--output", answered.parent)
    assert "holds answers of an unknown run" in line
    assert not (answered.parent / "run.json").exists()


def test_other_data_is_not_scored_with_the_answers_of_a_run(evaluation, tmp_path, capsys):
    """POPE counts its questions from 1 in every file: the ids fit, the answers do not."""
    folder = evaluation / "pope"
    words = ["pope", "--output", tmp_path, "--limit", 2]
    random = ["--data", folder / "coco_pope_random.json"]
    run(*words, *random, "--images", folder / "images", "--max-tokens", 2)
    other = ["--data", folder / "coco_pope_adversarial.json", "--score-only"]
    line = fails(capsys, *words, *other)
    assert "holds answers of another run: data was" in line and "give the data" in line
    (tmp_path / "run.json").write_text("5")
    assert "benchmark was 5" in fails(capsys, *words, *random, "--score-only")


def test_answers_that_are_no_text_are_refused_with_their_place(refcoco, answered, capsys):
    answered.write_bytes(b"\xff\xfe")
    words = [*refcoco, "--output", answered.parent, "--score-only"]
    assert f"{answered.parent} holds 0 files of answers" in fails(capsys, *words)


def test_another_mask_is_another_question(evaluation, tmp_path):
    line = json.loads((evaluation / "lvis" / "lvis_eval.jsonl").read_text().splitlines()[0])
    digests = set()
    for pixel in (0, 1):
        line["free_shape_segment_mask"][0][0] = pixel
        data = tmp_path / "lvis.jsonl"
        data.write_text(json.dumps(line))
        digests.add(LVIS(data, "free_shape").digest())
    assert len(digests) == 2


def test_a_judge_rule_may_change(evaluation, tmp_path):
    """The answers do not depend on it."""
    folder = shutil.copytree(evaluation / "ferret_bench", tmp_path / "data")
    before = FerretBench(folder).digest()
    rules = folder / "rule.json"
    rules.write_text(rules.read_text().replace("Invented", "Another"))
    assert FerretBench(folder).digest() == before
    question = folder / "refer_reason" / "question.jsonl"
    question.write_text(question.read_text().replace("tilted", "bent"))
    assert FerretBench(folder).digest() != before


@pytest.mark.parametrize(
    "words, message",
    [
        (["lvis", "--data", "lvis/lvis_eval.jsonl"], "lvis needs --format"),
        (["pope", "--data", "pope/nothing.json"], "There is no file"),
        (["pope", "--data", "pope/coco_pope_random.json"], "--images is missing"),
        (["pope", "--data", "refexp/finetune_refcoco_val.json"], "line 1 is not JSON"),
        (["refcoco", "--data", "pope/coco_pope_random.json"], "is not JSON"),
        (["flickr", "--data", "refexp/finetune_refcoco_val.json"], "no .*/val.txt"),
        (
            ["refcoco", "--data", "flickr/final_flickr_mergedGT_test.json"],
            "7 images and 17 annotations",
        ),
        (["ferret-bench", "--data", "lvis"], "There is no file"),
    ],
)
def test_wrong_data_is_refused_in_one_line(evaluation, tmp_path, capsys, words, message):
    line = fails(capsys, words[0], "--data", evaluation / words[2], *words[3:],
                 "--output", tmp_path / "out")  # fmt: skip
    assert re.search(message, line), line
