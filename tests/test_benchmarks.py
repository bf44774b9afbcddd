"""What the benchmarks count and compute; they time nothing here."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks import random_model
from benchmarks.latency import main as latency_main
from benchmarks.measure import CHIPS, Machine, alternate, summary
from benchmarks.sampler import defined, draw_points, multiplications, shared_weights
from benchmarks.vision_towers import compare_towers
from ferret_mlx import coreml_tower
from ferret_mlx.config import SamplerConfig
from ferret_mlx.regions import Point
from ferret_mlx.session import Session


def test_multiplications_at_full_size():
    """The figures that the sampler was designed for, maps included."""
    fewer = []
    for regions in (1, 8, 32):
        counted = multiplications(1024, 4096, 24, regions, SamplerConfig())
        fewer.append(counted["defined"] / counted["folded"])
    assert [round(factor) for factor in fewer] == [14, 34, 49]


def test_multiplications_one_by_one():
    """Counted in loops, at a size where that is quick."""
    width, output, grid, regions = 4, 6, 3, 5
    config = SamplerConfig(num_points=8, stages=((4, 3), (2, 2)))
    products = 0
    for _ in range(regions):
        products += sum(4 for _point in range(8) for _channel in range(width))
        for kept, near in config.stages:
            for _ in range(kept * near):
                products += (width + 2) * (width + 2)  # diff
                products += 2 * (width + 2) * width  # conv
        products += 2 * width * width + width * output
    counted = multiplications(width, output, grid, regions, config)
    assert counted["defined"] == products

    maps = 2 * grid * grid * width * width
    each = 4 * (8 + 4) * width  # both maps read at the points, the second at the kept ones
    each += 2 * width * (8 + 4)  # coordinates
    each += (4 + 2) * (width + 2) * width
    each += 2 * width * width + width * output
    assert counted["folded"] == maps + regions * each


def test_all_three_samplers_agree():
    """The timed functions do the same thing, or their times could not be compared."""
    ours, twin = shared_weights(16, 8, 6)
    values = np.random.default_rng(0).standard_normal((1, 36, 16), dtype=np.float32)
    rng = np.random.default_rng(1)
    # Points that do not tie: each side chooses the same neighbours.
    points = rng.random((3, 512, 2), dtype=np.float32)
    features, region_points = torch.from_numpy(values), torch.from_numpy(points)
    vectors = np.array(ours(mx.array(values), mx.array(points)))
    with torch.no_grad():
        folded = twin(features, region_points).numpy()
    for other in (folded, defined(twin, features, region_points).numpy()):
        assert np.linalg.norm(vectors - other) / np.linalg.norm(other) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
def test_random_models_answer(monkeypatch, parity, bits):
    """At a small size; the sizes of the table only need memory."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2}
    monkeypatch.setitem(random_model.SIZES, "small", small)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": 56}
    monkeypatch.setattr(random_model, "VISION", random_model.VISION | tower)
    model, processor = random_model.random_model("small", mx.float32, bits)
    assert hasattr(model.language_model.lm_head, "bits") == (bits is not None)
    session = Session(model, processor, parity / "cases" / "wide.png")
    chunks = list(session.ask("What?", [Point(40, 60)], max_tokens=3))
    assert 0 < len(chunks) <= 3 and bool(mx.isfinite(chunks[0].logprobs).all())


def test_points_are_inside_their_picture():
    points = draw_points(4)
    assert points.shape == (4, 512, 2) and points.min() >= 0 and points.max() < 1


def test_summary():
    timing = summary([5.0, 1.0, 3.0, 100.0, 2.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 5.0)
    assert summary([4.0]).median == summary([4.0]).low == 4.0


def test_functions_are_timed_in_turns():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and set(times) == {"a", "b"}


def test_roofline():
    """Reading and computing overlap, so the slower of the two counts."""
    machine = Machine("chip", bandwidth=100e9, flops=10e12)
    assert machine.least(nbytes=1e9, operations=1e9) == pytest.approx(0.01)
    assert machine.least(nbytes=1e6, operations=1e12) == pytest.approx(0.1)
    assert "50 % of it" in machine.share(0.02, nbytes=1e9)
    unknown = Machine("chip", None, None)
    assert unknown.least(1e9) is None and "--bandwidth" in unknown.share(1.0, 1e9)


def test_chips_of_the_table(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.chip_name", lambda: "Apple M3 Max")
    assert CHIPS["Apple M3 Max"] == (400, 14.2)
    assert Machine.find(None, None) == Machine("Apple M3 Max", 400e9, 14.2e12)
    assert Machine.find(300, None).bandwidth == 300e9


def test_towers_are_compared():
    pixels, calls = mx.arange(12).reshape(1, 2, 2, 3), []

    def twice(pixels):
        calls.append(pixels)
        return 2 * pixels

    found = compare_towers({"mlx": lambda pixels: pixels, "other": twice}, pixels, 3)
    assert found["mlx"][1] == 0 and found["other"][1] == pytest.approx(1)
    assert len(calls) == 1 + 1 + 3 and all(seen is pixels for seen in calls)


def test_core_ml_elsewhere_than_on_macos(monkeypatch, capsys):
    monkeypatch.setattr(coreml_tower, "_on_macos", lambda: False)
    monkeypatch.setattr("sys.argv", ["latency", "--vision", "mlx,coreml"])
    with pytest.raises(SystemExit) as exit:
        latency_main()
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.count("\n") == 1 and "only macOS has" in errors
