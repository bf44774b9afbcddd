"""What quantization costs: pairing, figures, and the whole command on two scenes."""

import json
import sys

import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.bootstrap import Difference, paired_difference
from benchmarks.quantization import FLOAT, Size, canvas_error, recommend, summarise
from ferret_mlx import Session


def record(kind, score, error=None):
    return {"kind": kind, "text": "", "score": score, "error": error}


def test_the_interval_belongs_to_the_differences():
    rng = np.random.default_rng(1)
    hard = rng.random(400) < 0.5  # items differ much, the two runs little
    baseline = 100.0 * hard
    values = baseline.copy()
    values[:20] = 0
    lost = 100 * hard[:20].sum() / 400
    found = paired_difference(values, baseline)
    assert found.mean == pytest.approx(-lost)
    assert found.low < found.mean < found.high < 0
    # Of a share p of N items that changed by 100: 1.96 standard errors to either side.
    share = lost / 100
    spread = 196 * np.sqrt(share * (1 - share) / 400)
    assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.15)
    assert paired_difference(values, baseline) == found


def test_equal_runs_differ_by_nothing():
    assert paired_difference(np.arange(5), np.arange(5)) == (0, 0, 0)


@pytest.mark.parametrize("values", ([], [1, 2, 3]))
def test_other_items_cannot_be_paired(values):
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.array(values), np.array(values[:-1]))


def test_canvas_error_is_in_units_of_the_canvas():
    text = "The cat [100, 200, 300, 400]."
    # 200 x 400 pixels: 5 and 2.5 units a pixel
    assert canvas_error((20, 80, 60, 160), text, (200, 400)) == 0
    assert canvas_error((22, 80, 60, 168), text, (200, 400)) == pytest.approx((10 + 20) / 4)
    assert canvas_error((20, 80, 60, 160), "Nowhere.", (200, 400)) is None


def test_a_row_has_all_figures():
    kinds = ("point", "box", "silhouette", "yes_no")
    baseline = [record(kind, 1) for kind in kinds] + [record("find", s, 2) for s in (1, 0.6, 0)]
    records = [record(kind, 0) for kind in kinds]
    records += [record("find", 0.8, 4), record("find", 0.5, 2), record("find", 0)]
    row = summarise(records, baseline, Size(2_000_000, 4.5, 3.5))
    assert (row["MB"], row["bits"], row["language model"]) == (2.0, 4.5, 3.5)
    assert [row[kind] for kind in kinds] == [0, 0, 0, 0]
    assert [row[f"find@{bar}"] for bar in (0.5, 0.75, 0.9)] == [66.7, 33.3, 0]
    assert row["find IoU"] == 0.433 and row["find error"] == 3
    assert row["find@0.5 - float"] == (0, 0, 0)
    assert row["find@0.9 - float"].mean == pytest.approx(-100 / 3)


def test_the_smallest_recipe_within_half_a_point_is_recommended():
    def row(bits, mean):
        difference = Difference(mean, mean - 1, mean + 1)
        return {"bits": bits, "language model": bits, "find@0.5 - float": difference}

    rows = {
        FLOAT: row(16, 0), "float32": row(8, 0), "8 bits": row(8.5, 0.1), "4 bits": row(4.5, -0.5),
        "mixed_3_6": row(4.1, -0.2), "mixed_2_6": row(3.3, -0.6),
    }  # fmt: skip
    assert " is mixed_3_6: -0.2 (-1.2 to +0.8) points" in recommend(rows, "find")
    assert " is 4 bits: -0.5 (-1.5 to +0.5) points" in recommend(rows, "find", least=4)
    rows = {name: rows[name] for name in (FLOAT, "float32", "mixed_2_6")}
    assert recommend(rows, "find").startswith("No recipe stays within 0.5 points")


def test_the_command_measures_resumes_and_plots(tmp_path, monkeypatch, capsys, evaluation):
    pytest.importorskip("matplotlib")
    folder = evaluation / "refexp"
    data = folder / "finetune_refcoco_val.json"
    words = [
        "quantization", "--scenes", "2", "--work", tmp_path, "--plot", tmp_path / "plot.png",
        "--recipe", "4 bits, ends kept", "--refcoco", data, "--images", folder / "images",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    quantization.main()
    first = capsys.readouterr().out
    rows = json.loads(first.splitlines()[-1])["rows"]
    assert list(rows) == [FLOAT, "4 bits, ends kept"]
    assert rows[FLOAT]["bits"] == pytest.approx(16, abs=0.1)
    assert rows[FLOAT]["language model"] == 16
    assert rows["4 bits, ends kept"]["bits"] < rows[FLOAT]["bits"]
    # All of it in 4 bits would be 4.5, with the scales.
    assert 4.6 < rows["4 bits, ends kept"]["language model"] < 16
    assert rows[FLOAT]["refcoco@0.5 - float"] == [0, 0, 0]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    scenes = tmp_path / "answers" / FLOAT / "scenes.jsonl"
    lines = scenes.read_text().splitlines(keepends=True)
    scenes.write_text(lines[0] + lines[1][:50])  # interrupted while the second was written
    asked = []
    ask_many = Session.ask_many

    def counted(self, questions, **options):
        asked.append(len(questions))
        return ask_many(self, questions, **options)

    monkeypatch.setattr(Session, "ask_many", counted)
    quantization.main()
    assert capsys.readouterr().out == first
    assert asked == [len(json.loads(lines[1])["records"])]

    # Conversions of another checkpoint would be taken for this one's.
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--hf-path", str(tmp_path)])
    with pytest.raises(SystemExit, match="give another --work"):
        quantization.main()
