"""The benchmark of batches asks what it says, and batches change no answer."""

from benchmarks.evaluation import QUESTIONS, measure, write_data
from benchmarks.scene_questions import load_scenes
from ferret_mlx import load
from ferret_mlx.evaluate.runner import check_pictures


def test_batches_answer_the_same(tmp_path):
    scenes = load_scenes(3)
    benchmarks = write_data(tmp_path, scenes)
    pope, lvis = benchmarks.values()
    assert len(pope.items) == 3 * QUESTIONS
    shown = {f"{number}.png": {o.name for o in scene.objects} for number, scene in scenes}
    for item in pope.items:
        name = item.record["text"].split(" in the")[0].split(" ", 3)[-1]
        assert item.record["yes"] == (name in shown[item.picture])
    for benchmark in benchmarks.values():
        check_pictures(benchmark.items, tmp_path)
        timings, answers = measure(benchmark, tmp_path, load(), [1, 8], 1)
        assert answers[1] == answers[8] and len(answers[1]) == len(benchmark.items)
        assert set(timings) == {1, 8}
    for item in lvis.items:
        assert item.record["name"] in shown[item.picture]
        x1, y1, x2, y2 = item.record["bbox_norm"]
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
