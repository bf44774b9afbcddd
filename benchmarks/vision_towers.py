"""The picture's encoder on MLX and on Core ML, timed in turns on the same pixels."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ferret_mlx import load

from .measure import Timing, alternate

Encode = Callable[[mx.array], mx.array]


def coreml_towers(
    model: str | None, packages: Sequence[str], compute_units: Sequence[str]
) -> dict[str, Encode]:
    """The towers of a model's packages on each of the compute units, by what `load` was given.

    packages: each `coreml` or a path, as for `load`. Raises ValueError and FileNotFoundError as it
    does, elsewhere than on macOS for one.
    """
    towers = {}
    for package in packages:
        for units in compute_units:
            loaded, _ = load(model, vision=package, coreml_compute_units=units)
            towers[f"{package}, {units}"] = loaded.vision_tower
    return towers


def compare_towers(
    towers: dict[str, Encode], pixels: mx.array, repeats: int
) -> dict[str, tuple[Timing, float]]:
    """Seconds for one picture, and the relative difference to the first tower's features."""
    features = {
        name: np.array(encode(pixels).astype(mx.float32)) for name, encode in towers.items()
    }
    first = next(iter(features.values()))
    timings = alternate(
        {name: lambda encode=encode: mx.eval(encode(pixels)) for name, encode in towers.items()},
        repeats,
    )
    return {
        name: (timings[name], float(np.linalg.norm(found - first) / np.linalg.norm(first)))
        for name, found in features.items()
    }


def report_towers(report, towers: dict[str, Encode], pixels: mx.array, repeats: int) -> None:
    """Print and keep what `compare_towers` finds. report: of `latency`."""
    for index, (name, found) in enumerate(compare_towers(towers, pixels, repeats).items()):
        timing, difference = found
        report.time(f"image encode, {name}", timing)
        if index:
            report.value(f"features, {name}: difference", 100 * difference, "%")
