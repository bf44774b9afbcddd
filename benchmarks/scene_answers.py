"""Answers of a model to the questions about the scenes, kept in a file as they come."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ferret_mlx import Session, load, parse_boxes
from ferret_mlx.evaluate.answer_log import drop_cut_line
from ferret_mlx.regions import CANVAS

from .accuracy import MAX_TOKENS
from .scene_questions import load_scenes, questions, score
from .workers import spread

PART = 10  # scenes that are answered and kept at a time


def answer_scenes(path: Path, model: Path, numbers: range, label: str, workers: int) -> list[dict]:
    """A record for each question about the scenes: kind, text, score, error.

    score: 1 or 0, for finding the IoU. error: mean distance of the four coordinates of an
    answer's box from the true ones, on the canvas of 1000 x 1000; None without a box.

    Args:
        path: JSON lines, one for each scene that is done; appended to.
        model: MLX folder; not loaded when nothing is left.
        numbers: of the scenes of the test split.
        workers: processes.
    """
    drop_cut_line(path)
    done: dict[int, list[dict]] = {}
    if path.exists():
        done = {row["scene"]: row["records"] for row in map(json.loads, path.open())}
    left = [number for number in numbers if number not in done]
    jobs = [(model, left[i : i + PART]) for i in range(0, len(left), PART)]
    with tqdm(desc=label, initial=len(numbers) - len(left), total=len(numbers)) as bar:
        for answered in spread(_answer_part, jobs, workers):
            done |= answered
            with path.open("a") as file:
                for number, records in answered.items():
                    file.write(json.dumps({"scene": number, "records": records}) + "\n")
            bar.update(len(answered))
    return [record for number in numbers for record in done[number]]


def _answer_part(model: Path, numbers: list[int]) -> dict[int, list[dict]]:
    return {number: _answer_scene(_loaded(model), number) for number in numbers}


_loaded = lru_cache(1)(load)


def _answer_scene(loaded: tuple, number: int) -> list[dict]:
    ((_, scene),) = load_scenes(1, number)
    asked = questions(scene, number)
    session = Session(*loaded, scene.image)
    pairs = [(question.text, question.regions) for question in asked]
    answers = sorted(session.ask_many(pairs, max_tokens=MAX_TOKENS), key=lambda a: a.index)
    return [
        {
            "kind": question.kind,
            "text": answer.text,
            "score": score(question, answer.text, scene.size),
            "error": canvas_error(question.expected, answer.text, scene.size)
            if question.kind == "find"
            else None,
        }
        for question, answer in zip(asked, answers, strict=True)
    ]


def canvas_error(truth, text: str, size: tuple[int, int]) -> float | None:
    """Mean absolute difference of the first box's coordinates, in units of the canvas."""
    boxes = parse_boxes(text, size)
    if not boxes:
        return None
    unit = np.array([*size, *size]) / CANVAS
    return float(np.abs((np.array(boxes[0].box) - np.array(truth)) / unit).mean())
