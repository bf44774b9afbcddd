"""Accuracy of a model on unseen scenes: ``python -m benchmarks.accuracy [--scenes 1000]``.

Measures naming by point, box and silhouette, finding, yes / no, and what the region vectors are
worth on overlapping pairs. ``--model`` may be repeated (float32, 8-bit, 4-bit folders) and
``--twin DIR`` adds the PyTorch twin on the same points; answers are compared one by one.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from tqdm import tqdm

from ferret_mlx import generate, load
from ferret_mlx.tokenizer import Tokenizer
from reference.layout import read_released

from .scene_questions import Question, load_scenes, questions, score

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


def run(label: str, answer: Answer, scenes, kinds: set[str] | None = None) -> list[dict]:
    """One record per question: scene, kind, answer, score."""
    records = []
    for number, scene in tqdm(scenes, desc=label, mininterval=5):
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


def agreement(a: list[dict], b: list[dict]) -> float:
    """Percent of questions that two runs answered with the same text."""
    same = [x["text"] == y["text"] for x, y in zip(a, b, strict=True)]
    return round(100 * float(np.mean(same)), 2)


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
    parser.add_argument("--no-pairs", action="store_true", help="skip the zeroed-regions run")
    parser.add_argument("--output", type=Path, help="write every answer here, as JSON lines")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    scenes = load_scenes(args.scenes, args.first_scene)
    began = time.time()
    runs: dict[str, list[dict]] = {}
    processor = None
    for path in args.model or [None]:
        label = Path(path).name if path else "bundled"
        answer, processor = mlx_answerer(path)
        runs[label] = run(label, answer, scenes)
    rows = {label: summarise(records) for label, records in runs.items()}
    first = next(iter(runs))
    if not args.no_pairs:
        answer, _ = mlx_answerer((args.model or [None])[0], zero_regions=True)
        rows[f"{first}, region vectors zero"] = summarise(
            run("regions zero", answer, scenes, {"pair", "point", "silhouette", "box"})
        )
    if args.twin:
        runs["PyTorch twin"] = run("twin", twin_answerer(args.twin, processor), scenes)
        rows["PyTorch twin"] = summarise(runs["PyTorch twin"])
    for label in list(runs)[1:]:
        rows[label]["same answers"] = agreement(runs[first], runs[label])
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
