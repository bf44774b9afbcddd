"""Scores of answers that the released code wrote, against what its scripts print on them."""

import json
import shutil
from pathlib import Path

import pytest

from ferret_mlx.evaluate.benchmark import check_complete
from ferret_mlx.evaluate.ferret_bench import FerretBench
from ferret_mlx.evaluate.flickr import Flickr
from ferret_mlx.evaluate.llava_bench import LLaVABench
from ferret_mlx.evaluate.lvis import FORMATS, LVIS
from ferret_mlx.evaluate.point_grid import PointGrid
from ferret_mlx.evaluate.pope import POPE
from ferret_mlx.evaluate.records import answer_files, read_lines
from ferret_mlx.evaluate.refcoco import RefCOCO
from ferret_mlx.evaluate.results import write_released
from ferret_mlx.evaluate.review import read_scores, summarise, tidy_answer

REFCOCO = ("finetune_refcoco_val", "finetune_refcoco+_testA", "finetune_refcocog_test")
CATEGORIES = ("refer_desc", "refer_reason", "ground_conv")


def read(path):
    return json.loads(path.read_text())


def expected(folder):
    return read(folder / "expected_metrics.json")


def score(benchmark, path):
    answers = benchmark.read_answers(path)
    check_complete(benchmark.items, answers)
    verdicts = [benchmark.verdict(item, answers[item.key]) for item in benchmark.items]
    return verdicts, benchmark.figures(verdicts)


def read_answer_lines(folder):
    return [line for file in answer_files(folder, "") for line in read_lines(file)]


def flickr(folder, **options):
    data = folder / "flickr" / "final_flickr_mergedGT_test.json"
    return Flickr(data, folder / "flickr" / "flickr30k", **options)


FLICKR_ANSWERS = "flickr/answers/final_flickr_mergedGT_test"


@pytest.mark.parametrize("split", REFCOCO)
def test_refcoco(evaluation, split):
    folder = evaluation / "refexp"
    released = expected(folder)[split]
    verdicts, figures = score(RefCOCO(folder / f"{split}.json"), folder / "answers" / split)
    names = {"@1": "1", "mean": "mean", "upper bound": "upper bound"}
    dataset = released["data_set"]
    assert figures == {f"{dataset} {ours}": released["by_name"][n] for ours, n in names.items()}
    assert sorted(figures.values()) == released["metric_json"][dataset]
    for verdict, item in zip(verdicts, released["per_item"], strict=True):
        assert {names[n]: float(v) for n, v in verdict.details["hit"].items()} == item["hit"]
        assert [list(box) for box in verdict.boxes] == item.get("boxes", [])
        assert verdict.unparsable == ("parse_error" in item)


def test_refcoco_counts_a_short_bracket_instead_of_ending(evaluation, tmp_path):
    """``[5, 6]`` raises an uncaught IndexError in the released script."""
    folder = evaluation / "refexp"
    benchmark = RefCOCO(folder / f"{REFCOCO[0]}.json")
    assert expected(folder)[REFCOCO[0]]["two_number_bracket_exception"] == "IndexError"
    verdict = benchmark.verdict(benchmark.items[0], "tin robot [232, 242].")
    assert verdict.unparsable and verdict.hits == 0


def test_refcoco_refuses_a_gap(evaluation, tmp_path):
    """The released script pairs by position: one missing answer shifts all later ones."""
    folder = evaluation / "refexp"
    released = expected(folder)[REFCOCO[0]]
    assert released["second_prediction_missing"] != released["by_name"]
    answers = shutil.copytree(folder / "answers" / REFCOCO[0], tmp_path / "answers")
    chunk = answers / "0_of_3.jsonl"
    lines = chunk.read_text().splitlines(keepends=True)
    chunk.write_text("".join([lines[0], *lines[2:]]))
    benchmark = RefCOCO(folder / f"{REFCOCO[0]}.json")
    with pytest.raises(ValueError, match=r"1 of 8 items have no answer, the first is 7 "):
        score(benchmark, answers)


def test_answers_are_matched_by_id_not_by_place(evaluation, tmp_path):
    folder = evaluation / "refexp"
    lines = [
        line
        for chunk in sorted((folder / "answers" / REFCOCO[0]).iterdir())
        for line in chunk.read_text().splitlines()
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(reversed(lines)))
    _, figures = score(RefCOCO(folder / f"{REFCOCO[0]}.json"), file)
    assert figures["refcoco @1"] == expected(folder)[REFCOCO[0]]["by_name"]["1"]


@pytest.mark.parametrize("name", ("refexp", "flickr", "pope"))
def test_a_results_file_among_the_answers_is_not_read(evaluation, tmp_path, name):
    """The released scripts write metric.json there and die of it when run again."""
    benchmark, answers = {
        "refexp": lambda: (
            RefCOCO(evaluation / "refexp" / f"{REFCOCO[0]}.json"),
            f"refexp/answers/{REFCOCO[0]}",
        ),
        "flickr": lambda: (flickr(evaluation), FLICKR_ANSWERS),
        "pope": lambda: (
            POPE(evaluation / "pope" / "coco_pope_random.json"),
            "pope/answers/coco_pope_random",
        ),
    }[name]()
    folder = shutil.copytree(evaluation / answers, tmp_path / "answers")
    _, before = score(benchmark, folder)
    (folder / "metric.json").write_text(json.dumps(before, indent=2))
    assert score(benchmark, folder)[1] == before


@pytest.mark.parametrize("merge", (True, False))
def test_flickr(evaluation, merge):
    released = expected(evaluation / "flickr")
    verdicts, figures = score(flickr(evaluation, merge=merge), evaluation / FLICKR_ANSWERS)
    assert figures == released["metric_json" if merge else "merge_boxes_false_class_only"]
    assert [v.unparsable for v in verdicts] == [
        "parse_error" in s for s in released["per_sentence"]
    ]
    if merge:
        for verdict, sentence in zip(verdicts, released["per_sentence"], strict=True):
            ours = [
                {
                    "phrase": phrase["phrase"],
                    "hit_at_k(-1=any)": {str(k): int(hit) for k, hit in phrase["hit"].items()},
                }
                for phrase in verdict.details["phrases"]
            ]
            assert ours == sentence["phrases"]


def test_flickr_scores_a_repeated_phrase_against_its_first_entity(evaluation, tmp_path):
    """Both times, as released, although the second one is another girl."""
    folder = shutil.copytree(evaluation / "flickr" / "flickr30k", tmp_path / "flickr30k")
    sentences = folder / "Sentences" / "930013.txt"
    sentences.write_text(sentences.read_text().replace("people A girl]", "people a girl]"))
    data = tmp_path / "twice_test.json"
    text = (evaluation / "flickr" / "final_flickr_mergedGT_test.json").read_text()
    data.write_text(text.replace("A girl waves", "a girl waves"))
    benchmark = Flickr(data, folder)
    (item,) = [item for item in benchmark.items if item.key == "930013/0"]
    verdict = benchmark.verdict(item, "a girl [50, 67, 400, 934].")  # the first girl
    assert [phrase["hit"][1] for phrase in verdict.details["phrases"]] == [True, True, False]


def test_flickr_refuses_another_entities_folder(evaluation, tmp_path):
    """Before anything is asked."""
    folder = shutil.copytree(evaluation / "flickr" / "flickr30k", tmp_path / "flickr30k")
    sentences = folder / "Sentences" / "930012.txt"
    sentences.write_text(sentences.read_text().replace("the ball]", "a ball]"))
    data = evaluation / "flickr" / "final_flickr_mergedGT_test.json"
    with pytest.raises(ValueError, match=r"image 3: the phrase 'the ball' has no box in"):
        Flickr(data, folder)


def test_flickr_names_an_entities_file_that_is_no_text(evaluation, tmp_path):
    folder = shutil.copytree(evaluation / "flickr" / "flickr30k", tmp_path / "flickr30k")
    data = evaluation / "flickr" / "final_flickr_mergedGT_test.json"
    for path in (folder / "Sentences" / "930012.txt", folder / "test.txt"):
        path.write_bytes(b"\xff" + path.read_bytes())
        with pytest.raises(ValueError, match=f"{path.name} is not text"):
            Flickr(data, folder)


def test_flickr_refuses_missing_answers(evaluation, tmp_path):
    """The released script leaves one out of the score, and ends with status 0 for more."""
    shutil.copy(evaluation / FLICKR_ANSWERS / "0_of_2.jsonl", tmp_path)
    with pytest.raises(ValueError, match="items have no answer"):
        score(flickr(evaluation), tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_lvis(evaluation, form):
    released = expected(evaluation / "lvis")[form]
    benchmark = LVIS(evaluation / "lvis" / "lvis_eval.jsonl", form)
    verdicts, figures = score(benchmark, evaluation / "lvis" / "answers" / form)
    assert f"Acc:{figures['accuracy']:.3f}%" == released["stdout"]
    for verdict, item in zip(verdicts, released["per_item"], strict=True):
        assert verdict.details["kept"] == item["after_not_removal"]
        assert bool(verdict.hits) == item["correct"]


def test_lvis_refuses_answers_about_another_form(evaluation):
    """All three have the same ids: the points' accuracy would be told as that of the boxes."""
    folder = evaluation / "lvis"
    with pytest.raises(ValueError, match=r"line 1 answers '.*', but .*line 1 asks .*options"):
        score(LVIS(folder / "lvis_eval.jsonl", "box"), folder / "answers" / "point")


@pytest.mark.parametrize("split", ("random", "popular", "adversarial"))
def test_pope(evaluation, split):
    folder, name = evaluation / "pope", f"coco_pope_{split}"
    released = expected(folder)[name]
    verdicts, figures = score(POPE(folder / f"{name}.json"), folder / "answers" / name)
    assert figures == released["metric_json"]
    ours = [(v.details["label"], v.text, v.details["verdict"]) for v in verdicts]
    assert ours == [(i["label"], i["answer"], i["verdict"]) for i in released["per_item"]]


def test_more_than_ten_chunks_come_in_numeric_order(evaluation):
    """Read by name, 10_of_12 stands before 1_of_12 and answers meet other questions."""
    folder = evaluation / "pope"
    released = expected(folder)["order12"]
    assert "Accuracy: 0.5" in released["released_stdout"]
    _, figures = score(POPE(folder / "order12" / "labels.json"), folder / "order12" / "answers")
    assert figures["Accuracy"] == released["accuracy_if_read_in_numeric_order"]


def test_pope_reports_zero_where_nothing_can_be_divided(evaluation, tmp_path):
    """The released script ends with a ZeroDivisionError when every answer is no."""
    data = evaluation / "pope" / "coco_pope_random.json"
    assert "ZeroDivisionError" in expected(data.parent)["all_answers_no_exception"]
    benchmark = POPE(data)
    figures = benchmark.figures([benchmark.verdict(item, "no.") for item in benchmark.items])
    right = sum(not item.record["yes"] for item in benchmark.items) / len(benchmark.items)
    assert figures == {
        "Accuracy": right, "Precision": 0, "Recall": 0, "F1 score": 0, "Yes ratio": 0,
    }  # fmt: skip


@pytest.mark.parametrize("present", (True, False))
def test_pope_reports_zero_without_a_hit(evaluation, present):
    """Every answer wrong: precision and recall are 0, and with no object recall is 0 / 0."""
    benchmark = POPE(evaluation / "pope" / "coco_pope_random.json")
    items = [item for item in benchmark.items if present or not item.record["yes"]]
    said = ["no." if item.record["yes"] else "yes." for item in items]
    figures = benchmark.figures([benchmark.verdict(i, t) for i, t in zip(items, said, strict=True)])
    assert [figures[n] for n in ("Accuracy", "Precision", "Recall", "F1 score")] == [0, 0, 0, 0]
    assert figures["Yes ratio"] == said.count("yes.") / len(said)


def test_pope_refuses_answers_to_other_questions(evaluation):
    folder = evaluation / "pope"
    benchmark = POPE(folder / "coco_pope_popular.json")
    with pytest.raises(ValueError, match="answers 'Is there a owl.*give the data"):
        shuffled = read_answer_lines(folder / "answers" / "coco_pope_popular")[::-1]
        benchmark.match_answers(shuffled)


def test_pope_refuses_more_answers_than_questions(evaluation):
    folder = evaluation / "pope"
    with pytest.raises(ValueError, match="is the answer 8, but the data has 7 questions"):
        POPE(folder / "coco_pope_adversarial.json").match_answers(
            read_answer_lines(folder / "answers" / "coco_pope_random")
        )


def test_point_grid_reads_its_answers(evaluation):
    folder = evaluation / "point_cls"
    verdicts, figures = score(PointGrid(folder / "picture.png"), folder / "answers")
    said = [json.loads(line)["text"] for line in next((folder / "answers").iterdir()).open()]
    assert [verdict.text for verdict in verdicts] == said
    assert figures == {"points": 100, "different answers": len(set(said))}


def test_ferret_bench_summary(evaluation):
    folder = evaluation / "ferret_bench"
    released = expected(folder)
    benchmark = FerretBench(folder)
    reviews = benchmark.read_reviews(folder / "reviews")
    scores = {c: row[c] for row in released["summary"]["metric_json"] for c in row if c != "all"}
    figures = benchmark.review_figures(reviews)
    unreadable = sum(r["tuple"] == [-1, -1] for rows in reviews.values() for r in rows)
    mean = round(sum(scores.values()) / 3, 1)
    assert figures == scores | {"average": mean, "replies without scores": unreadable}
    assert benchmark.review_figures({}) == {}
    fewer = benchmark.review_figures(reviews, ignore=[2])
    printed = released["summary_ignoring_question_id_2"]["stdout"]
    assert {f"{category} {fewer[category]}" for category in CATEGORIES} <= set(printed)


def test_ferret_bench_of_the_current_folder(evaluation, monkeypatch):
    """The folder above "." is not "."."""
    monkeypatch.chdir(evaluation / "ferret_bench" / "ground_conv")
    assert FerretBench(Path()).categories() == ["ground_conv"]


def test_judge_replies_are_read_as_released(evaluation):
    for reply, scores in expected(evaluation / "ferret_bench")["parse_score"]:
        assert read_scores(reply) == scores, reply


def test_answers_are_tidied_for_the_judge_as_released(evaluation):
    for category, text, tidy in expected(evaluation / "ferret_bench")["postprocess_answer"]:
        if isinstance(tidy, str):
            assert tidy_answer(text, category) == tidy


def test_short_or_wordy_brackets_do_not_end_the_review():
    """An IndexError and a ValueError in the released script."""
    assert tidy_answer("A [1, 2].", "ground_conv") == "A ."
    assert tidy_answer("A [x, 2, 3, 4].", "ground_conv") == "A [x, 2, 3, 4]."


def test_an_empty_summary_is_zero():
    assert summarise([]).relative == 0
    assert summarise([{"tuple": [0, 5]}]).relative == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_judge_messages_and_review_lines_are_those_of_the_release(evaluation, category):
    folder = evaluation / "ferret_bench"
    released = expected(folder)[category]
    benchmark = FerretBench(folder)
    answers = benchmark.read_answers(folder / "ferret_answers")
    check_complete(benchmark.items, answers)
    items = [item for item in benchmark.items if item.record["category"] == category]
    messages = [benchmark.message(item, answers[item.key]) for item in items]
    assert messages == [request["messages"][1]["content"] for request in released["requests"]]
    replies = read(folder / f"judge_replies_{category}.json")
    lines = [
        benchmark.review_line(item, answers[item.key], reply)
        for item, reply in zip(items, replies, strict=True)
    ]
    assert lines == released["review_rows"]


def test_llava_bench_shares_judge_and_summary(tmp_path):
    rows = {
        "questions": [
            {"question_id": 0, "image": "1.png", "text": "Why?", "category": "conv"},
            {"question_id": 1, "image": "1.png", "text": "How?", "category": "detail"},
        ],
        "context": [{"id": "1", "image": "1.png", "caption": ["A tin.", "A lid."]}],
        "answers_gpt4": [
            {"answer_id": "a", "question_id": 0, "text": "So."},
            {"answer_id": "b", "question_id": 1, "text": "Thus."},
        ],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rule = {"role": "Assistant", "prompt": "Give two scores."}
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({f"llava_bench_{c}": rule for c in ("conv", "detail")}))
    benchmark = LLaVABench(tmp_path, rules)
    message = benchmark.message(benchmark.items[0], "Because.")
    assert message.startswith("[Context]\nA tin.\nA lid.\n\n[Question]\nWhy?\n\n[Assistant 1]\nSo.")
    (tmp_path / "answer.jsonl").write_text('{"question_id": 1, "text": "Well."}')
    assert benchmark.read_answers(tmp_path) == {"llava_bench_detail/1": "Well."}
    reviews = {
        item.record["category"]: [benchmark.review_line(item, "Because.", reply)]
        for item, reply in zip(benchmark.items, ("10 5", "10 8"), strict=True)
    }
    assert benchmark.review_figures(reviews) == {
        "llava_bench_conv": 50, "llava_bench_detail": 80, "all": 65, "replies without scores": 0,
    }  # fmt: skip


def test_reviews_of_questions_that_are_not_there_are_refused(evaluation, tmp_path):
    folder = evaluation / "ferret_bench"
    reviews = shutil.copytree(folder / "reviews", tmp_path / "reviews")
    path = reviews / "review_ground_conv.jsonl"
    path.write_text(path.read_text().replace('"question_id": 4', '"question_id": 5'))
    with pytest.raises(ValueError, match="line 3 is about question 5"):
        FerretBench(folder).read_reviews(reviews)


def test_released_files_are_read_back(evaluation, tmp_path):
    """What a run writes to released/ scores like the run, for every benchmark."""
    folders = {name: evaluation / name for name in ("refexp", "lvis", "pope", "point_cls")}
    benchmarks = [
        RefCOCO(folders["refexp"] / "finetune_refcoco+_testA.json"),
        flickr(evaluation),
        LVIS(folders["lvis"] / "lvis_eval.jsonl", "point"),
        POPE(folders["pope"] / "coco_pope_random.json"),
        PointGrid(folders["point_cls"] / "picture.png"),
        FerretBench(evaluation / "ferret_bench"),
    ]
    for benchmark in benchmarks:
        texts = {item.key: f"answer {i}" for i, item in enumerate(benchmark.items)}
        sizes = {item.picture: (120, 90) for item in benchmark.items}
        folder = tmp_path / benchmark.name
        write_released(folder, benchmark, texts, sizes)
        assert benchmark.read_answers(folder / "released") == texts
