"""What the end of a conversion or a check tells: sizes and errors, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

PARTS = {
    "language_model.": "language model",
    "vision_tower.": "vision tower",
    "mm_projector.": "projector",
    "region_sampler.": "region sampler",
}


@dataclass(frozen=True)
class TensorReport:
    """A tensor of the model, whose weight, scales and biases count as one.

    bytes: on the disk. error: norm of what quantization changed over the norm of the values;
    None where nothing was quantized.
    """

    name: str
    parameters: int
    bytes: int
    error: float | None = None


class RelativeError:
    """Norm of a difference over the norm of the values, summed up block by block."""

    def __init__(self) -> None:
        self._difference = self._values = 0.0
        self.largest = 0.0  # absolute difference of any element

    def add(self, values: mx.array, restored: mx.array) -> None:
        """Two blocks of the same shape and any dtype."""
        values = values.astype(mx.float32).reshape(-1)
        difference = restored.astype(mx.float32).reshape(-1) - values
        sums = mx.inner(difference, difference), mx.inner(values, values), difference.abs().max()
        mx.eval(*sums)
        difference_squared, values_squared, largest = (float(x) for x in sums)
        self._difference += difference_squared
        self._values += values_squared
        self.largest = max(self.largest, largest)

    @property
    def value(self) -> float:
        if self._difference == 0:
            return 0.0
        return math.sqrt(self._difference / self._values) if self._values else math.inf


def table(reports: Iterable[TensorReport]) -> str:
    """Lines of text: for each part its tensors, parameters, bits per weight, size on disk and
    the largest relative quantization error of one of its tensors."""
    reports = list(reports)
    rows: list[tuple[str, ...]] = [
        ("part", "tensors", "parameters", "bits/weight", "size", "largest error")
    ]
    for prefix, part in PARTS.items():
        rows.append(_row(part, [r for r in reports if r.name.startswith(prefix)]))
    rows.append(_row("all", reports))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(part: str, reports: list[TensorReport]) -> tuple[str, ...]:
    parameters = sum(report.parameters for report in reports)
    size = sum(report.bytes for report in reports)
    errors = [report.error for report in reports if report.error is not None]
    return (
        part,
        str(len(reports)),
        f"{parameters / 1e6:,.1f} M",
        f"{8 * size / parameters:.2f}" if parameters else "-",
        f"{size / 1e6:,.1f} MB",
        f"{100 * max(errors):.2f} %" if errors else "-",
    )
