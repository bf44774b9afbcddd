"""What the command lines say to people: on stderr, never among the answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distribution import Ranks
    from .model import Model
    from .processor import Processor

BUNDLED_NOTICE = (
    "note: no --model given, using ferret-tiny, the small model that comes along; for full-size "
    "weights run convert.py --hf-path FERRET --base-path VICUNA --mlx-path OUT once, then add "
    "--model OUT"
)


_silent = False


def report(line: str) -> None:
    if not _silent:
        print(line, file=sys.stderr, flush=True)


def be_silent() -> None:
    """Neither report nor print: of several processes with the same answer one speaks."""
    global _silent
    _silent = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


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


def load_model(
    name: str | None, ranks: Ranks | None = None, **options: Any
) -> tuple[Model, Processor, float]:
    """Model, processor and the seconds it took; None: the bundled one. options: as for `load`.

    ranks: processes that split the language model among them.
    """
    start = time.perf_counter()
    with transient(f"Loading {name or 'ferret-tiny'} ..."):
        from .loading import load

        if ranks is None or ranks.count == 1:
            model, processor = load(name, **options)
        else:
            from .session_file import fingerprint
            from .sharding import common_parameters

            with ranks.agree():
                model, processor = load(name, tensor_group=ranks.group, **options)
            ranks.require_same("model", fingerprint(model, common_parameters))
    return model, processor, time.perf_counter() - start


def read_processor(name: str | None) -> Processor:
    """The processor without the model, which takes seconds: does the prompt fit the context?"""
    from .hub import bundled_model, find_folder
    from .processor import Processor

    folder = bundled_model() if name is None else find_folder(name, "--model", weights=False)
    return Processor.from_folder(folder)


def join_ranks() -> Ranks:
    """All processes of this command; those that do not lead fall silent."""
    from .distribution import Ranks

    ranks = Ranks()
    if not ranks.leads:
        be_silent()
    return ranks


def report_loaded(name: str | None, seconds: float) -> None:
    if name is None:
        report(BUNDLED_NOTICE)
    report(f"Loaded {name or 'ferret-tiny'} in {seconds:.1f} s.")
