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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from ferret_mlx import load
from ferret_mlx.convert import convert
from ferret_mlx.distribution import Ranks
from ferret_mlx.evaluate.answer_log import AnswerLog
from ferret_mlx.evaluate.refcoco import RefCOCO
from ferret_mlx.evaluate.runner import Asking, answer_items
from ferret_mlx.quantization import RECIPES

from .accuracy import table
from .bootstrap import Difference, paired_difference
from .scene_answers import answer_scenes, canvas_error
from .scene_questions import NAMING

BARS = (0.5, 0.75, 0.9)
TEXT = "language_model."
WITHIN = 0.5  # points at IoU 0.5 that the recommended recipe may lose
DEFAULT_BITS = 4  # of convert.py -q
FLOAT = "float16"  # the baseline; also what quantized models keep unquantized
BITS = {f"{bits} bits": {"q_bits": bits} for bits in (8, 6, 5, 4)}
QUANTIZED = {
    **BITS,
    "4 bits, groups of 32": {"q_bits": 4, "q_group_size": 32},
    **{recipe: {"quant_predicate": recipe} for recipe in RECIPES},
}
# Name -> options of `convert`.
CONVERSIONS: dict[str, dict] = {
    FLOAT: {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    **{
        name + suffix: {"quantize": True, "dtype": "float16", **options, **ends}
        for name, options in QUANTIZED.items()
        for suffix, ends in (("", {}), (", ends kept", {"q_keep_ends": True}))
    },
}


@dataclass(frozen=True)
class Size:
    """bytes: of the weight files. bits: of them for each parameter of the model, and text_bits for
    each of the language model."""

    bytes: int
    bits: float
    text_bits: float


def convert_all(source: str, base: str | None, work: Path, names: list[str]) -> None:
    """Write a folder for each conversion that is not there yet."""
    for name in names:
        if not folder_of(work, name).exists():
            convert(source, folder_of(work, name), base, **CONVERSIONS[name])


def check_source(work: Path, source: dict[str, str | None]) -> None:
    """Models and answers that are kept in `work` must come from the same checkpoint."""
    path = work / "source.json"
    if path.exists() and (before := json.loads(path.read_text())) != source:
        raise SystemExit(f"{work} is about {before}, not {source}; give another --work.")
    path.write_text(json.dumps(source))


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace(", ", "-").replace(" ", "-")


def size_of(folder: Path, parameters: dict[str, int]) -> Size:
    """parameters: of the model's tensors, as ``count_parameters`` gives them."""
    total = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    text = sum(value.nbytes for name, value in tensors(folder) if name.startswith(TEXT))
    text_parameters = sum(size for name, size in parameters.items() if name.startswith(TEXT))
    return Size(total, 8 * total / sum(parameters.values()), 8 * text / text_parameters)


def count_parameters(folder: Path) -> dict[str, int]:
    """Of each tensor of a model that is not quantized."""
    return {name: value.size for name, value in tensors(folder)}


def tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    for file in folder.glob("model*.safetensors"):
        yield from mx.load(str(file)).items()


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
    row: dict[str, object] = {
        "MB": round(size.bytes / 1e6, 1),
        "bits": round(size.bits, 2),
        "language model": round(size.text_bits, 2),
    }
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
    for bar in (BARS[0], BARS[-1]):
        row[f"{kind}@{bar} - float"] = paired_difference(
            100 * (overlaps >= bar), 100 * (before >= bar)
        )
    return row


def recommend(rows: dict[str, dict], kind: str, least: int = 0) -> str:
    """The smallest recipe that loses at most half a point at IoU 0.5, or why there is none.

    least: bits that each quantized layer has.
    """
    column = f"{kind}@0.5 - float"
    within = {
        name: row
        for name, row in rows.items()
        if row[column].mean >= -WITHIN and (lowest_bits(name) or 0) >= max(least, 1)
    }
    which = f"recipe of at least {least} bits" if least else "recipe"
    if not within:
        return f"No {which} stays within {WITHIN} points of float at IoU 0.5."
    name = min(within, key=lambda name: within[name]["bits"])
    return (
        f"The smallest {which} within {WITHIN} points of float at IoU 0.5 is {name}: "
        f"{within[name][column]} points, {within[name]['language model']} bits per weight of the "
        "language model."
    )


def lowest_bits(name: str) -> int | None:
    """Of the layers that a conversion quantizes; None for a float one."""
    options = CONVERSIONS[name]
    if "quant_predicate" in options:  # mixed_3_6: 3 bits for most layers, 6 for some
        return int(options["quant_predicate"].split("_")[1])
    return options.get("q_bits")


def plot(rows: dict[str, dict], kind: str, path: Path) -> None:
    """Differences to float at IoU 0.5 and 0.9 with intervals, a line for each recipe, the largest
    on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted((name for name in rows if name != FLOAT), key=lambda name: rows[name]["bits"])
    figure, panels = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 1 + 0.3 * len(names)), layout="constrained"
    )
    for axes, bar in zip(panels, (BARS[0], BARS[-1]), strict=True):
        axes.axvline(0, color="0.6", linewidth=1)
        if bar == BARS[0]:
            axes.axvline(-WITHIN, color="0.6", linewidth=1, linestyle="dashed")
        for place, name in enumerate(names):
            found: Difference = rows[name][f"{kind}@{bar} - float"]
            around = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(found.mean, place, xerr=around, fmt="o", capsize=3, color="tab:blue")
        axes.set_xlabel(f"{kind}: points won or lost at IoU {bar}")
    labels = [f"{name} ({rows[name]['language model']})" for name in names]
    panels[0].set_yticks(range(len(names)), labels)
    figure.suptitle(
        "Against float, 95 % intervals; bits per weight of the language model", fontsize="medium"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", default="reference/ferret-tiny", help="released-layout folder")
    parser.add_argument("--base-path", help="the language model that --hf-path is a delta to")
    parser.add_argument("--scenes", type=int, default=1000, help="0: none")
    parser.add_argument(
        "--refcoco", type=Path, help="RefCOCO's JSON, as ferret_mlx.evaluate has it"
    )
    parser.add_argument("--images", type=Path, help="folder of RefCOCO's pictures")
    parser.add_argument("--recipe", action="append", choices=[n for n in CONVERSIONS if n != FLOAT],
                        help="may be repeated; default: all")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("out/quantization"))
    parser.add_argument("--plot", type=Path, help="write a PNG")
    args = parser.parse_args()
    if (args.refcoco is None) != (args.images is None) or not (args.scenes or args.refcoco):
        parser.error("give --scenes, or --refcoco with --images, or all three")
    return args


def main() -> None:
    args = parse_args()
    names = [FLOAT, *(args.recipe or [name for name in CONVERSIONS if name != FLOAT])]
    args.work.mkdir(parents=True, exist_ok=True)
    check_source(args.work, {"hf_path": args.hf_path, "base_path": args.base_path})
    convert_all(args.hf_path, args.base_path, args.work, names)
    parameters = count_parameters(folder_of(args.work, FLOAT))
    benchmark = RefCOCO(args.refcoco) if args.refcoco else None
    runs: dict[str, list[dict]] = {}
    for name in names:
        folder = folder_of(args.work, name)
        kept = args.work / "answers" / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        numbers = range(args.scenes)
        runs[name] = answer_scenes(kept / "scenes.jsonl", folder, numbers, name, args.workers)
        if benchmark:
            model = partial(load, folder)
            runs[name] += answer_refcoco(kept / "refcoco", model, benchmark, args.images)
    rows = {
        name: summarise(records, runs[FLOAT], size_of(folder_of(args.work, name), parameters))
        for name, records in runs.items()
    }
    print(table(rows))
    kind = "refcoco" if benchmark else "find"
    print(recommend(rows, kind))
    print(recommend(rows, kind, least=DEFAULT_BITS))
    if args.plot:
        plot(rows, kind, args.plot)
    machine = f"{platform.system()} {platform.machine()}, MLX on {mx.default_device()}"
    print(json.dumps({"scenes": args.scenes, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
