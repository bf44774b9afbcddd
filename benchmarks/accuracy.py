"""Accuracy of a model on unseen scenes: ``python -m benchmarks.accuracy [--scenes 1000]``.

Measures naming by point, box and silhouette, finding, yes / no, and what the region vectors are
worth on overlapping pairs. ``--model`` may be repeated (float32, 8-bit, 4-bit folders) and
``--twin DIR`` adds the PyTorch twin on the same points; answers are compared one by one.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from tqdm import tqdm

from ferret_mlx import generate, load
from ferret_mlx.tokenizer import Tokenizer
from reference.layout import read_released

from .scene_questions import Question, load_scenes, questions, score
from .workers import spread

MAX_TOKENS = 48
Answer = Callable[[object, Question, int], str]


def mlx_answerer(path: str | None, zero_regions: bool = False) -> tuple[Answer, object]:
    """Answers by the public ``generate``; with ``zero_regions`` the sampler's output is zero."""
    model, processor = load(path) if path else load()
    if zero_regions:
        sampler = model.region_sampler
        model.region_sampler = lambda *inputs, **options: mx.zeros_like(sampler(*inputs, **options))

    def answer(image, question: Question, seed: int) -> str:
        options = {"regions": question.regions, "seed": seed, "max_tokens": MAX_TOKENS}
        return generate(model, processor, image, question.text, **options)

    return answer, processor


def twin_answerer(folder: Path, processor) -> Answer:
    """Answers by the PyTorch twin, on the pixels and points that the processor made."""
    twin, tokenizer = read_released(folder), Tokenizer(folder)

    def answer(image, question: Question, seed: int) -> str:
        inputs = processor(image, question.text, question.regions, seed)
        pixels = torch.from_numpy(np.array(inputs.pixel_values)).permute(0, 3, 1, 2).contiguous()
        points = torch.from_numpy(np.array(inputs.region_points))
        return tokenizer.decode(
            twin.generate(inputs.input_ids, pixels, points, max_tokens=MAX_TOKENS)
        )

    return answer


@dataclass(frozen=True)
class Contender:
    """What is measured, in a form that a worker process can build for itself: an MLX folder (None:
    the bundled model), or the PyTorch twin in ``twin`` on the points of that folder's processor."""

    model: str | None
    twin: Path | None = None
    zero_regions: bool = False

    def answerer(self) -> Answer:
        answer, processor = mlx_answerer(self.model, self.zero_regions)
        return twin_answerer(self.twin, processor) if self.twin else answer


def measure(
    label: str, contender: Contender, numbers: range, kinds: frozenset[str] | None, workers: int
) -> list[dict]:
    """``run`` on the test scenes ``numbers``, in this process or spread over ``workers``."""
    if workers == 1:
        scenes = load_scenes(len(numbers), numbers.start)
        return run(contender.answerer(), tqdm(scenes, desc=label, mininterval=5), kinds)
    parts = [numbers[i : i + 10] for i in range(0, len(numbers), 10)]
    measured = spread(_measure_part, [(contender, part, kinds) for part in parts], workers)
    return [r for part in tqdm(measured, label, len(parts), mininterval=5) for r in part]


def _measure_part(contender: Contender, numbers: range, kinds) -> list[dict]:
    return run(_answerer(contender), load_scenes(len(numbers), numbers.start), kinds)


@lru_cache(1)
def _answerer(contender: Contender) -> Answer:
    torch.set_num_threads(1)
    return contender.answerer()


def run(answer: Answer, scenes, kinds=None) -> list[dict]:
    """One record per question: scene, kind, answer, score."""
    records = []
    for number, scene in scenes:
        for order, question in enumerate(questions(scene, number)):
            if kinds and question.kind not in kinds:
                continue
            text = answer(scene.image, question, seed=order)
            value = score(question, text, scene.size)
            records.append({"scene": number, "kind": question.kind, "text": text, "score": value})
    return records


def summarise(records: list[dict]) -> dict[str, float]:
    """Percent right per kind; finding at IoU 0.5, 0.75, 0.9 and its mean IoU."""
    found: dict[str, float] = {"questions": len(records)}
    for kind in ("point", "box", "silhouette", "yes_no", "pair"):
        values = [r["score"] for r in records if r["kind"] == kind]
        if values:
            found[kind] = round(100 * float(np.mean(values)), 1)
    overlaps = np.array([r["score"] for r in records if r["kind"] == "find"])
    if len(overlaps):
        for bar in (0.5, 0.75, 0.9):
            found[f"find@{bar}"] = round(100 * float((overlaps >= bar).mean()), 1)
        found["mean_iou"] = round(float(overlaps.mean()), 3)
    return found


def agreement(pairs: list[tuple[dict, dict]]) -> float:
    """Percent of questions that two runs answered with the same text."""
    return round(100 * float(np.mean([x["text"] == y["text"] for x, y in pairs])), 2)


def differences(a: list[dict], b: list[dict]) -> dict[str, float]:
    """How two runs' answers differ: percent with the same text, the same of all that are not boxes,
    and by how much the numbers of boxes differ on the mean, in canvas units."""
    pairs = list(zip(a, b, strict=True))
    said = [p for p in pairs if p[0]["kind"] != "find"]
    found = [p for p in pairs if p[0]["kind"] == "find"]
    numbers = [[re.findall(r"\d+", r["text"]) for r in pair] for pair in found]
    boxes = [zip(p, q, strict=True) for p, q in numbers if len(p) == len(q)]
    shifts = [abs(int(x) - int(y)) for box in boxes for x, y in box]
    result = {"same answers": agreement(pairs)}
    if said:
        result["same words"] = agreement(said)
    if shifts:
        result["box shift"] = round(float(np.mean(shifts)), 2)
    return result


def table(rows: dict[str, dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| model | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="MLX folder; default: the bundled model")
    parser.add_argument("--twin", type=Path, help="released-layout folder for the PyTorch twin")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--first-scene", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--no-pairs", action="store_true", help="skip the zeroed-regions run")
    parser.add_argument("--output", type=Path, help="write every answer here, as JSON lines")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    numbers = range(args.first_scene, args.first_scene + args.scenes)
    began = time.time()
    models = args.model or [None]
    contenders = {Path(m).name if m else "bundled": Contender(m) for m in models}
    first = next(iter(contenders))
    if args.twin:
        contenders["PyTorch twin"] = Contender(models[0], twin=args.twin)
    runs = {
        label: measure(label, contender, numbers, None, args.workers)
        for label, contender in contenders.items()
    }
    rows = {label: summarise(records) for label, records in runs.items()}
    if not args.no_pairs:
        kinds = frozenset({"pair", "point", "silhouette", "box"})
        zero = Contender(models[0], zero_regions=True)
        label = f"{first}, region vectors zero"
        rows[label] = summarise(measure(label, zero, numbers, kinds, args.workers))
    for label in list(runs)[1:]:
        rows[label] |= differences(runs[first], runs[label])
    if args.output:
        with args.output.open("w") as file:
            for label, records in runs.items():
                file.writelines(json.dumps({"model": label, **r}) + "\n" for r in records)
    print(table(rows))
    machine = f"{platform.system()} {platform.machine()}, MLX on {mx.default_device()}"
    print(
        json.dumps(
            {
                "scenes": args.scenes,
                "machine": machine,
                "seconds": round(time.time() - began),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
