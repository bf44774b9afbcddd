"""What a run found: results.json, one line for each verdict, a table for the terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .answer_log import RELEASED_FOLDER, write_lines, write_whole
from .benchmark import Benchmark, Size, Verdict

RESULT_FILE = "results.json"
VERDICT_FILE = "verdicts.jsonl"


def build_results(
    benchmark: Benchmark,
    verdicts: Sequence[Verdict],
    figures: Mapping[str, float],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        figures: by name, as ``Benchmark.figures`` gives them.
        facts: about the run: model, quantization, seed, ...
    """
    return {
        "benchmark": benchmark.name,
        "options": benchmark.options,
        "figures": dict(figures),
        "items": len(verdicts),
        "unparsable": sum(verdict.unparsable for verdict in verdicts),
        **facts,
        "versions": {
            "ferret-mlx": __version__, "mlx": _version("mlx"), "mlx-lm": _version("mlx-lm"),
            "python": platform.python_version(),
        },
        "platform": platform.platform(terse=True),
    }  # fmt: skip


def write_results(folder: Path, results: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
    """Write ``results.json``, and ``verdicts.jsonl`` with a line for each item."""
    write_lines(
        folder / VERDICT_FILE,
        (
            {
                "key": v.item.key, "text": v.text, "hits": float(v.hits), "count": v.count,
                "quality": float(v.quality), "unparsable": v.unparsable, **v.details,
            }
            for v in verdicts
        ),
    )  # fmt: skip
    write_whole(folder / RESULT_FILE, json.dumps(results, indent=2) + "\n")


def write_released(
    folder: Path, benchmark: Benchmark, texts: Mapping[str, str], sizes: Mapping[str, Size]
) -> None:
    """Write the answers to the subfolder ``released`` as the released scripts would have.

    sizes: (w, h) in pixels by picture.
    """
    lines = {
        item.key: benchmark.answer_line(item, sizes[item.picture], texts[item.key])
        for item in benchmark.items
        if item.key in texts
    }
    for name, rows in benchmark.released_files(lines).items():
        write_lines(folder / RELEASED_FOLDER / name, rows)


def table(results: Mapping[str, Any]) -> str:
    """Names and figures in two columns, with at most four decimals."""
    rows = [(name, f"{value:.4f}".rstrip("0").rstrip(".")) for name, value in
            results["figures"].items()]  # fmt: skip
    rows.append(("items", str(results["items"])))
    if results["unparsable"]:
        rows.append(("unparsable answers", str(results["unparsable"])))
    left, right = (max(len(row[side]) for row in rows) for side in (0, 1))
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
