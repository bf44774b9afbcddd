"""What the words of a command line mean: numbers in a range, regions in pixels."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Regions are imported where they are built: bad arguments must not wait for it.
if TYPE_CHECKING:
    from .regions import Region

STROKE_WIDTH = 10.0  # pixels, where none is given


@dataclass(frozen=True)
class RegionFlag:
    """A region as given on the command line; its pixels need the picture's size."""

    kind: str
    value: Any

    def build(self, size: tuple[int, int], stroke_width: float) -> Region:
        from .regions import Box, FreeForm, Point

        if self.kind == "point":
            return Point(*self.value)
        if self.kind == "box":
            return Box(*self.value)
        if self.kind == "mask":
            return FreeForm.from_file(self.value)
        if self.kind == "polygon":
            return FreeForm.from_polygon(self.value, size)
        return FreeForm.from_stroke(self.value, stroke_width, size)


def join_negative(argv: Sequence[str]) -> list[str]:
    """``--point -5,10`` as ``--point=-5,10``, because argparse takes the former for two flags."""
    joined: list[str] = []
    for word in argv:
        if joined and re.match(r"-\.?[0-9]", word) and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def number(
    low: float, high: float | None, kind: type[int] | type[float] = float, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: a finite number from ``low`` (or above it) to ``high``."""
    expected = (
        f"a {'whole ' if kind is int else ''}number {'above' if above else 'of at least'} {low}"
    )
    expected += f" and at most {high}" if high is not None else ""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value if above else low <= value
        if not (inside and value < math.inf and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


def add_vision_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `vision_options` reads."""
    parser.add_argument(
        "--vision", default="mlx", metavar="mlx|coreml|FILE.mlpackage",
        help="what encodes the picture; coreml (macOS): the package in the model's folder",
    )  # fmt: skip
    parser.add_argument(
        "--coreml-compute-units", default="ALL", metavar="UNITS",
        help="ALL, CPU_AND_NE (the Neural Engine), CPU_AND_GPU or CPU_ONLY",
    )  # fmt: skip


def vision_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `load` about the vision tower."""
    return {"vision": args.vision, "coreml_compute_units": args.coreml_compute_units}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    add = parser.add_argument
    add("--max-tokens", type=number(1, None, int), default=512, metavar="N",
        help="longest answer, in tokens (default: %(default)s)")  # fmt: skip
    add("--temp", type=number(0, None), default=0.0, metavar="T",
        help="sampling temperature; 0 takes the likeliest token (default)")  # fmt: skip
    add("--top-p", type=number(0, 1, above=True), default=1.0, metavar="P",
        help="sample among the likeliest tokens of this total probability")  # fmt: skip
    add("--seed", type=number(0, 2**63 - 1, int), default=0, metavar="S",
        help="of the sampling and of the points drawn from each region (default: 0)")  # fmt: skip
    add("--kv-bits", type=int, choices=(2, 4, 8), help="quantize the key-value cache")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `stream_generate` and `Session.ask`."""
    return {
        name: getattr(args, name) for name in ("max_tokens", "temp", "top_p", "seed", "kv_bits")
    }


def region_type(kind: str, form: str) -> Callable[[str], RegionFlag]:
    """An argparse type for one of the region flags."""

    def parse(text: str) -> RegionFlag:
        if kind == "mask":
            return RegionFlag(kind, text)
        try:
            if kind in ("point", "box"):
                return RegionFlag(kind, _numbers(text, 2 if kind == "point" else 4))
            points = [_numbers(pair, 2) for pair in text.split()]
            if len(points) < (3 if kind == "polygon" else 1):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {form} in pixels") from None
        return RegionFlag(kind, points)

    return parse


def _numbers(text: str, count: int) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError
    return values
