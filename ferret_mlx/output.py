"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def refuse_existing(path: Path) -> None:
    """Raises ValueError when there is anything at `path`, be it an empty folder."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; remove it or give another output folder.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name at the end.

    On any error, Ctrl-C included, the temporary folder and the parents made for it are removed.
    Raises ValueError when there is something at `path`, before or by then.
    """
    refuse_existing(path)
    made = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"{path.parent} is not a folder to write to ({error.strerror}); "
                "give another output folder."
            ) from None
        yield partial
        refuse_existing(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
