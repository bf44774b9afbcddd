"""What quantization costs: ``python -m benchmarks.quantization [--scenes 1000]``.

Converts a model to float and to every recipe, asks all of them the same questions about the same
points, and prints a table of naming, grounding and yes / no, of size and bits per weight, with the
paired difference to float at IoU 0.5 and its bootstrap interval. Questions are those of
``benchmarks.accuracy`` on ferret-tiny's scenes and, with ``--refcoco``, RefCOCO's. Answers are kept
in ``--work``; an interrupted run goes on when the same command is started again.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ferret_mlx import Session, load, parse_boxes
from ferret_mlx.convert import convert
from ferret_mlx.evaluate.answer_log import AnswerLog, drop_cut_line
from ferret_mlx.evaluate.distribution import Ranks
from ferret_mlx.evaluate.refcoco import RefCOCO
from ferret_mlx.evaluate.runner import Asking, answer_items
from ferret_mlx.regions import CANVAS

from .accuracy import MAX_TOKENS, table
from .bootstrap import Difference, paired_difference
from .scene_questions import NAMING, load_scenes, questions, score

BARS = (0.5, 0.75, 0.9)
WITHIN = 0.5  # points at IoU 0.5 that the recommended recipe may lose
FLOAT = "float"
RECIPES: dict[str, dict] = {
    FLOAT: {},
    "8 bits": {"q_bits": 8},
    "6 bits": {"q_bits": 6},
    "5 bits": {"q_bits": 5},
    "4 bits": {"q_bits": 4},
    "4 bits, groups of 32": {"q_bits": 4, "q_group_size": 32},
    "4 bits, ends kept": {"q_bits": 4, "q_keep_ends": True},
    "4 bits, groups of 32, ends kept": {"q_bits": 4, "q_group_size": 32, "q_keep_ends": True},
    **{
        recipe: {"quant_predicate": recipe}
        for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    },
}


@dataclass(frozen=True)
class Size:
    """bytes: of the weight files. bits: of them for each parameter of the model."""

    bytes: int
    bits: float


def convert_all(source: str, base: str | None, work: Path, dtype: str, names: list[str]) -> None:
    """Write a folder for each recipe that is not there yet."""
    for name in names:
        if not folder_of(work, name).exists():
            options = RECIPES[name]
            convert(source, folder_of(work, name), base, quantize=bool(options), dtype=dtype,
                    **options)  # fmt: skip


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace(", ", "-").replace(" ", "-")


def size_of(folder: Path, parameters: int) -> Size:
    """parameters: of the model, as ``count_parameters`` gives them."""
    total = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return Size(total, 8 * total / parameters)


def count_parameters(folder: Path) -> int:
    """Of a model that is not quantized."""
    files = folder.glob("model*.safetensors")
    return sum(value.size for file in files for value in mx.load(str(file)).values())


def answer_scenes(path: Path, model: Callable, numbers: range, label: str) -> list[dict]:
    """A record for each question about the scenes: kind, text, score, error.

    score: 1 or 0, for grounding the IoU. error: mean distance of the four coordinates of an
    answer's box from the true ones, on the canvas of 1000 x 1000; None without a box.

    Args:
        path: JSON lines, one for each scene that is done; appended to.
        model: gives model and processor; not called when nothing is left.
    """
    drop_cut_line(path)
    done: dict[int, list[dict]] = {}
    if path.exists():
        done = {row["scene"]: row["records"] for row in map(json.loads, path.open())}
    left = [number for number in numbers if number not in done]
    if left:
        loaded = model()
        for number in tqdm(left, desc=label, initial=len(numbers) - len(left), total=len(numbers)):
            done[number] = _answer_scene(loaded, number)
            with path.open("a") as file:
                file.write(json.dumps({"scene": number, "records": done[number]}) + "\n")
    return [record for number in numbers for record in done[number]]


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


def answer_refcoco(work: Path, model: Callable, benchmark: RefCOCO, images: Path) -> list[dict]:
    """Records of kind refcoco, whose score is the first box's IoU as the release measures it."""
    log = AnswerLog(work, benchmark, {"model": work.parent.name}, Ranks())
    answer_items(benchmark, benchmark.items, images, model, log, Asking())
    texts = log.texts()
    verdicts = [benchmark.verdict(item, texts[item.key]) for item in benchmark.items]
    return [
        {
            "kind": "refcoco",
            "text": v.text,
            "score": v.quality,
            "error": canvas_error(v.truth[0], v.text, v.item.record["size"]),
        }
        for v in verdicts
    ]


def summarise(records: list[dict], baseline: list[dict], size: Size) -> dict:
    """One row: percentages, mean IoU, canvas error, differences to the baseline."""
    row: dict[str, object] = {"MB": round(size.bytes / 1e6, 1), "bits": round(size.bits, 2)}
    for kind in (*NAMING, "yes_no"):
        if scores := [r["score"] for r in records if r["kind"] == kind]:
            row[kind] = round(100 * float(np.mean(scores)), 1)
    for kind in ("find", "refcoco"):
        if any(r["kind"] == kind for r in records):
            row |= _grounding(kind, records, baseline)
    return row


def _grounding(kind: str, records: list[dict], baseline: list[dict]) -> dict:
    overlaps, before = (
        np.array([r["score"] for r in rows if r["kind"] == kind]) for rows in (records, baseline)
    )
    row = {f"{kind}@{bar}": round(100 * float((overlaps >= bar).mean()), 1) for bar in BARS}
    row[f"{kind} IoU"] = round(float(overlaps.mean()), 3)
    errors = [r["error"] for r in records if r["kind"] == kind and r["error"] is not None]
    row[f"{kind} error"] = round(float(np.mean(errors)), 1) if errors else ""
    row[f"{kind}@0.5 - float"] = paired_difference(
        100 * (overlaps >= BARS[0]), 100 * (before >= BARS[0])
    )
    return row


def recommend(rows: dict[str, dict], kind: str) -> str:
    """The smallest recipe that loses at most half a point at IoU 0.5, or why there is none."""
    column = f"{kind}@0.5 - float"
    within = {
        name: row for name, row in rows.items() if name != FLOAT and row[column].mean >= -WITHIN
    }
    if not within:
        return f"No recipe stays within {WITHIN} points of float at IoU 0.5."
    name = min(within, key=lambda name: within[name]["bits"])
    return (
        f"The smallest recipe within {WITHIN} points of float at IoU 0.5 is {name}: "
        f"{within[name][column]} points, {within[name]['bits']} bits per weight."
    )


def plot(rows: dict[str, dict], kind: str, path: Path) -> None:
    """Difference to float at IoU 0.5 with intervals, a line for each recipe, the largest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted((name for name in rows if name != FLOAT), key=lambda name: rows[name]["bits"])
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(names)), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    axes.axvline(-WITHIN, color="0.6", linewidth=1, linestyle="dashed")
    for place, name in enumerate(names):
        found: Difference = rows[name][f"{kind}@0.5 - float"]
        around = [[found.mean - found.low], [found.high - found.mean]]
        axes.errorbar(found.mean, place, xerr=around, fmt="o", capsize=3, color="tab:blue")
    labels = [f"{name} ({rows[name]['bits']} bits per weight)" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel(f"{kind}: points won or lost at IoU 0.5 against float, 95 % interval")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", default="reference/ferret-tiny", help="released-layout folder")
    parser.add_argument("--base-path", help="the language model that --hf-path is a delta to")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--scenes", type=int, default=1000, help="0: none")
    parser.add_argument(
        "--refcoco", type=Path, help="RefCOCO's JSON, as ferret_mlx.evaluate has it"
    )
    parser.add_argument("--images", type=Path, help="folder of RefCOCO's pictures")
    parser.add_argument("--recipe", action="append", choices=[n for n in RECIPES if n != FLOAT],
                        help="may be repeated; default: all")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("out/quantization"))
    parser.add_argument("--plot", type=Path, help="write a PNG")
    args = parser.parse_args()
    if (args.refcoco is None) != (args.images is None) or not (args.scenes or args.refcoco):
        parser.error("give --scenes, or --refcoco with --images, or all three")
    return args


def main() -> None:
    args = parse_args()
    names = [FLOAT, *(args.recipe or [name for name in RECIPES if name != FLOAT])]
    args.work.mkdir(parents=True, exist_ok=True)
    convert_all(args.hf_path, args.base_path, args.work, args.dtype, names)
    parameters = count_parameters(folder_of(args.work, FLOAT))
    benchmark = RefCOCO(args.refcoco) if args.refcoco else None
    runs: dict[str, list[dict]] = {}
    for name in names:
        folder = folder_of(args.work, name)
        kept = args.work / "answers" / folder.name
        kept.mkdir(parents=True, exist_ok=True)

        def model(folder: Path = folder) -> tuple:
            return load(folder)

        runs[name] = answer_scenes(kept / "scenes.jsonl", model, range(args.scenes), name)
        if benchmark:
            runs[name] += answer_refcoco(kept / "refcoco", model, benchmark, args.images)
    rows = {
        name: summarise(records, runs[FLOAT], size_of(folder_of(args.work, name), parameters))
        for name, records in runs.items()
    }
    print(table(rows))
    kind = "refcoco" if benchmark else "find"
    print(recommend(rows, kind))
    if args.plot:
        plot(rows, kind, args.plot)
    machine = f"{platform.system()} {platform.machine()}, MLX on {mx.default_device()}"
    print(json.dumps({"scenes": args.scenes, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
