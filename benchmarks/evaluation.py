"""Answering a benchmark's questions in batches: ``python -m benchmarks.evaluation``.

Writes ferret-tiny's test scenes in the formats of POPE (eight questions about each picture) and
LVIS (a box for each object), has ``ferret_mlx.evaluate``'s runner answer them one by one and in
batches, in turns, and compares the answers.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from ferret_mlx import load
from ferret_mlx.distribution import Ranks
from ferret_mlx.evaluate.answer_log import AnswerLog
from ferret_mlx.evaluate.benchmark import Benchmark
from ferret_mlx.evaluate.lvis import LVIS
from ferret_mlx.evaluate.pope import POPE
from ferret_mlx.evaluate.runner import Asking, answer_items
from reference.glyphs import NAMES, with_article
from reference.scenes import HALF_VISIBLE, Scene

from .accuracy import MAX_TOKENS, table
from .measure import alternate, machine_line
from .scene_questions import load_scenes

QUESTIONS = 8  # yes / no, about each picture


def write_data(folder: Path, scenes: list[tuple[int, Scene]]) -> dict[str, Benchmark]:
    """Pictures, and the questions about them."""
    pope, lvis = [], []
    for number, scene in scenes:
        name = f"{number}.png"
        scene.image.save(folder / name)
        present = {o.name for o in scene.objects}
        rng = np.random.default_rng([12, number])
        for asked in sorted(rng.choice(NAMES, QUESTIONS, replace=False)):
            text = f"Is there {with_article(asked)} in the image?"
            label = "yes" if asked in present else "no"
            pope.append(
                {"question_id": len(pope), "image": name, "text": text, "label": label}
            )  # fmt: skip
        w, h = scene.size
        for shown in scene.objects:
            if shown.visible >= HALF_VISIBLE:
                x1, y1, x2, y2 = map(int, shown.box)
                lvis.append({
                    "id": len(lvis), "image_path": name, "width": w, "height": h,
                    "name": shown.name, "synonyms": [shown.name], "neg_class": NAMES[0],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "bbox_norm": [x1 / w, y1 / h, x2 / w, y2 / h],
                })  # fmt: skip
    for name, lines in (("pope", pope), ("lvis", lvis)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "POPE, yes / no": POPE(folder / "pope.jsonl"),
        "LVIS, boxes": LVIS(folder / "lvis.jsonl", "box"),
    }


def measure(benchmark: Benchmark, images: Path, model: tuple, batches: list[int], repeats: int):
    """Timing of all items for each batch size, and the answers."""
    answers: dict[int, list[str]] = {}

    def run(batch: int) -> None:
        with tempfile.TemporaryDirectory() as output:
            log = AnswerLog(Path(output), benchmark, {}, Ranks())
            asking = Asking(batch, MAX_TOKENS)
            answer_items(benchmark, benchmark.items, images, lambda: model, log, asking)
            texts = log.texts()
        answers[batch] = [texts[item.key] for item in benchmark.items]

    timed = alternate({str(n): lambda n=n: run(n) for n in batches}, repeats, warmup=0)
    return {n: timed[str(n)] for n in batches}, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="MLX folder; default: the bundled model")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="compared with 1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    batches = [1, *args.batch]
    model, rows, began = load(args.model), {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder)
        for name, benchmark in write_data(images, load_scenes(args.scenes)).items():
            timings, answers = measure(benchmark, images, model, batches, args.repeats)
            for n in batches:
                same = sum(a == b for a, b in zip(answers[1], answers[n], strict=True))
                rows[f"{name}, batch of {n}"] = {
                    "items": len(benchmark.items),
                    "items/s": round(len(benchmark.items) / timings[n].median, 1),
                    "times as fast": round(timings[1].median / timings[n].median, 2),
                    "same answers as one by one": f"{same} of {len(benchmark.items)}",
                }
    print(table(rows))
    seconds = round(time.time() - began)
    print(json.dumps({"machine": machine_line(), "seconds": seconds, "rows": rows}))


if __name__ == "__main__":
    main()
