"""The folder of a run: what it asks with, and its answers as far as they got."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..distribution import Ranks
from .benchmark import Benchmark
from .records import read_json, read_lines, take

RUN_FILE = "run.json"
ANSWER_FILE = "answers.jsonl"
SETTINGS = ("model", "quantization", "seed", "max_tokens")
RELEASED_FOLDER = "released"


class AnswerLog:
    """``answers.jsonl`` of a run: one line for each answer, written as soon as it is there.

    Args:
        folder: of the run; created.
        benchmark: what is asked.
        settings: what the answers depend on (model, seed, ...); kept in ``run.json``.
        ranks: the processes that share the items. Each appends to a file of its own until
            ``merge``; all know the answers of all that were kept before.

    A line that was cut by an interruption is dropped, and its item asked again.

    Raises ValueError when the folder holds answers of a run with other or unknown settings, of
    other data, or damaged ones; OSError when it cannot be written.
    """

    def __init__(self, folder: Path, benchmark: Benchmark, settings: dict[str, Any], ranks: Ranks):
        self.folder, self.benchmark, self.ranks = folder, benchmark, ranks
        self.path = _rank_file(folder, ranks.rank)
        self.settings = {**_asked(benchmark), **settings}
        self.answers: dict[str, dict[str, Any]] = {}
        with ranks.agree():
            folder.mkdir(parents=True, exist_ok=True)
            self._check_settings(folder / RUN_FILE)
            for path in self._own_files():
                drop_cut_line(path)
                if path.exists():
                    self.answers |= read_log(path, benchmark)
        self._share()

    def append(self, key: str, text: str, **facts: Any) -> None:
        """Keep one answer; facts: what else is known about it."""
        self.answers[key] = {"key": key, "text": text, **facts}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.answers[key]) + "\n")

    def merge(self) -> None:
        """Bring the answers of all processes together, in ``answers.jsonl`` of the first."""
        self._share()
        if self.ranks.leads:
            keys = [item.key for item in self.benchmark.items if item.key in self.answers]
            write_lines(self.path, (self.answers[key] for key in keys))
        self.ranks.gather(None)  # the others' files go only when the merged one is whole
        for path in self._own_files():
            if path.name != ANSWER_FILE:
                path.unlink(missing_ok=True)

    def _share(self) -> None:
        for answers in self.ranks.gather(self.answers):
            self.answers |= answers

    def _own_files(self) -> list[Path]:
        """The file of this process; the first also has those of an earlier run with more."""
        files = [self.path]
        if self.ranks.leads:
            own = {_rank_file(self.folder, rank) for rank in range(self.ranks.count)}
            files += sorted(set(self.folder.glob("answers-*.jsonl")) - own)
        return files

    def texts(self) -> dict[str, str]:
        """The answers by the key of their item."""
        return {key: line["text"] for key, line in self.answers.items()}

    def _check_settings(self, path: Path) -> None:
        logs = (path.parent / ANSWER_FILE, *path.parent.glob("answers-*.jsonl"))
        if not any(log.exists() for log in logs):
            write_whole(path, json.dumps(self.settings, indent=2) + "\n")
        elif path.exists():
            _require_same(path, self.settings, "give another --output")
        else:
            raise ValueError(
                f"{path.parent} holds answers of an unknown run, without {RUN_FILE}; "
                "give another --output."
            )


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / (f"answers-{rank}.jsonl" if rank else ANSWER_FILE)


def read_log(path: Path, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Lines of an answer log by the key of their item. Raises ValueError."""
    known = {item.key for item in benchmark.items}
    answers: dict[str, dict[str, Any]] = {}
    for where, line in read_lines(path):
        key = take(line, "key", str, where)
        take(line, "text", str, where)
        if key not in known:
            raise ValueError(f"{where} answers {key}, which is not in the data; give its data.")
        if key in answers:
            raise ValueError(f"{where} answers {key} a second time; remove one of the two.")
        answers[key] = line
    return answers


def read_settings(folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """What the answers of a run were made with, for its results; empty where it is not known.

    Raises ValueError when they answer other questions than those of the benchmark.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return {}
    known = _require_same(path, _asked(benchmark), "give the data and options of that run")
    return {name: known[name] for name in SETTINGS if name in known}


def _asked(benchmark: Benchmark) -> dict[str, Any]:
    return {"benchmark": benchmark.name, "options": benchmark.options, "data": benchmark.digest()}


def _require_same(path: Path, settings: dict[str, Any], advice: str) -> dict[str, Any]:
    """The content of a ``run.json`` with these settings among its own."""
    known = read_json(path)
    for name, value in settings.items():
        if not isinstance(known, dict) or known.get(name) != value:
            before = known.get(name) if isinstance(known, dict) else known
            raise ValueError(
                f"{path.parent} holds answers of another run: {name} was {json.dumps(before)}, "
                f"now it is {json.dumps(value)}; {advice}."
            )
    return known


def drop_cut_line(path: Path) -> None:
    """Shorten a file of lines to those that are whole."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file, under its name only once it is whole."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """Write a text file, under its name only once it is whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
