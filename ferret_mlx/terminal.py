"""What the command lines say to people: on stderr, never among the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model
    from .processor import Processor

BUNDLED_NOTICE = (
    "note: no --model given, using ferret-tiny, the small model that comes along; for full-size "
    "weights run convert.py --hf-path FERRET --base-path VICUNA --mlx-path OUT once, then add "
    "--model OUT"
)


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def transient(line: str) -> Iterator[None]:
    """Show a line while something takes its time, to people only."""
    if not sys.stderr.isatty():
        yield
        return
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def load_model(name: str | None, **options: Any) -> tuple[Model, Processor, float]:
    """Model, processor and the seconds it took; None: the bundled one. options: as for `load`."""
    start = time.perf_counter()
    with transient(f"Loading {name or 'ferret-tiny'} ..."):
        from .loading import load

        model, processor = load(name, **options)
    return model, processor, time.perf_counter() - start


def report_loaded(name: str | None, seconds: float) -> None:
    if name is None:
        report(BUNDLED_NOTICE)
    report(f"Loaded {name or 'ferret-tiny'} in {seconds:.1f} s.")
