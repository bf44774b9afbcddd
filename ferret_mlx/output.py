"""A folder that appears complete or not at all, and that an interrupted run can go on with.

Everything is written to a working folder beside the target: `job.json` says what is being made,
`model/` holds the finished files. At the end `model/` takes the target's name in one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class NotWritten(ValueError):
    """The disk is full or fails; what is finished stays for the next run."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path} {reason}; free disk space and run the same command again, or give another "
            "output folder."
        )


def refuse_existing(path: Path) -> None:
    """Raises ValueError when there is anything at `path`, be it an empty folder."""
    if path.exists() or path.is_symlink():
        if not (_work(path) / "model").exists():
            shutil.rmtree(_work(path), ignore_errors=True)  # of a run killed after its rename
        raise ValueError(f"{path} exists already; remove it or give another output folder.")


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises NotWritten when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        gigabytes = f"needs {needed / 1e9:.2f} GB on a disk with {free / 1e9:.2f} GB free"
        raise NotWritten(folder, gigabytes)


class WorkingFolder:
    """Where the files of one job are made.

    resumed: whether an earlier run of the same job left finished files here.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path, self.resumed = path, resumed
        self.model = path / "model"

    def temporary(self, name: str) -> Path:
        """Where to write a file that `finish` will move into `model/`."""
        return self.path / f"{name}.part"

    def finish(self, name: str, report: Any) -> None:
        """Take the written file over into `model/`, with what is to be known of it later."""
        write_json(self.path / f"{name}.report", report)
        self.temporary(name).rename(self.model / name)
        sync(self.model)

    def report(self, name: str) -> Any:
        """What `finish` was given, or None for a file that is not finished."""
        if not (self.model / name).is_file():
            return None
        return _read(self.path / f"{name}.report")


@contextmanager
def working_folder(path: Path, job: dict[str, Any]) -> Iterator[WorkingFolder]:
    """Yield the working folder of `path`; leaving it gives its `model/` that name.

    job: describes all that the files depend on. What an earlier run left is kept if it was the
        same job, else removed.

    Ctrl-C and NotWritten leave the folder for the next run when a file is finished; on any other
    error it is removed together with the parents made for it. Raises ValueError when there is
    something at `path`, before or by then, and while another process makes it.
    """
    work = _work(path)
    made = [parent for parent in path.parents if not parent.exists()]
    refuse_existing(path)
    job = json.loads(json.dumps(job))
    with _locked(work, path):
        try:
            resumed = _read(work / "job.json") == job
            if not resumed:
                _empty(work, path)
                write_json(work / "job.json", job)
            folder = WorkingFolder(work, resumed)
            folder.model.mkdir(exist_ok=True)
            for file in folder.model.iterdir():
                if folder.report(file.name) is None:
                    file.unlink()
            yield folder
            for file in folder.model.iterdir():
                sync(file)
            sync(folder.model)
            refuse_existing(path)
            folder.model.rename(path)
            sync(path.parent)
        except BaseException as error:
            # Errors of a write itself name no file.
            if isinstance(error, OSError) and error.filename is None:
                error = NotWritten(work, f"could not be written ({error.strerror})")
            kept = isinstance(error, KeyboardInterrupt | NotWritten) and any(work.glob("*.report"))
            if kept and isinstance(error, KeyboardInterrupt):
                print(
                    "\nInterrupted; the same command goes on from the finished files "
                    f"({work}; remove it to free the space).",
                    file=sys.stderr,
                )
            if not kept:
                _remove(work, made)
            raise error from None
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.rename(path)


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _locked(work: Path, path: Path) -> Iterator[None]:
    """Keep other processes out of `work`; the system lets go of the lock when this one dies."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(
            f"{path.parent} is not a folder to write to ({error.strerror}); "
            "give another output folder."
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(work / "lock")  # gone when the other process has just finished
    except OSError:
        os.close(descriptor)
        raise ValueError(
            f"another process is writing {path}; wait for it or give another output folder."
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _remove(work: Path, made: list[Path]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def _empty(work: Path, path: Path) -> None:
    left = [entry for entry in work.iterdir() if entry.name != "lock"]
    if any(entry.suffix == ".report" for entry in left):
        print(f"note: what was left of another conversion to {path} is removed", file=sys.stderr)
    # job.json first: without it nothing else counts.
    for entry in sorted(left, key=lambda entry: entry.name != "job.json"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
