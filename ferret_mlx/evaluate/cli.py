"""The command line: python -m ferret_mlx.evaluate NAME --data ... --images ... --output DIR"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import number
from ..distribution import Ranks
from ..errors import ArgumentParser, run_command
from ..terminal import join_ranks, load_model, report, report_loaded
from .answer_log import ANSWER_FILE, AnswerLog, read_log, read_settings
from .benchmark import Benchmark, Item, check_complete
from .ferret_bench import FerretBench
from .flickr import Flickr
from .judge import PUBLISHED_JUDGE, Judge, judge_of, review_answers
from .judged import Judged
from .llava_bench import LLaVABench
from .lvis import FORMATS, LVIS
from .pictures import picture_size
from .point_grid import PointGrid
from .pope import POPE
from .refcoco import RefCOCO
from .results import RESULT_FILE, build_results, table, write_released, write_results
from .runner import Asking, answer_items, check_pictures
from .worst import FOLDER, save_worst

if TYPE_CHECKING:
    from ..model import Model
    from ..processor import Processor

NAMES = ("refcoco", "flickr", "lvis", "pope", "point-grid", "ferret-bench", "llava-bench")

# Flags that other benchmarks have no use for -> those that have.
_JUDGED = ("ferret-bench", "llava-bench")
_BELONGS_TO = {
    "format": ("lvis",), "no_coordinates": ("lvis",), "no_region_feature": ("lvis", "ferret-bench"),
    "entities": ("flickr",), "rules": ("llava-bench",), "judge_model": _JUDGED,
    "judge_url": _JUDGED, "reviews": _JUDGED, "ignore": _JUDGED,
}  # fmt: skip


@run_command
def evaluate_main(argv: Sequence[str] | None = None) -> None:
    """Ask, keep the answers, score them."""
    args = _parser().parse_args(argv)
    ranks = join_ranks()
    with ranks.agree():
        _check_flags(args)
        benchmark = open_benchmark(args)
        items = benchmark.items[: args.limit]
        settings = {} if args.score_only else _settings(args, items)
        judge = _judge(args) if isinstance(benchmark, Judged) and ranks.leads else None
    if args.score_only:
        texts, facts = _read(args, benchmark) if ranks.leads else ({}, {})
    else:
        texts, facts = _ask(args, benchmark, items, settings, ranks)
    if not ranks.leads:
        return
    check_complete(items, texts)
    verdicts = [benchmark.verdict(item, texts[item.key]) for item in items]
    figures = benchmark.figures(verdicts)
    if isinstance(benchmark, Judged):
        figures |= _review(args, benchmark, items, texts, judge)
        if (name := judge_of(_reviews(args))) is not None:
            facts["judge"] = name
    results = build_results(benchmark, verdicts, figures, facts)
    write_results(args.output, results, verdicts)
    print(table(results))
    report(f"Wrote {args.output / RESULT_FILE}.")
    if args.save_images:
        files = save_worst(args.output, benchmark, verdicts, args.images, args.save_images)
        report(f"Drew {len(files)} answers in {args.output / FOLDER}.")


def _check_flags(args: argparse.Namespace) -> None:
    for name, benchmarks in _BELONGS_TO.items():
        if getattr(args, name) and args.name not in benchmarks:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to {' and '.join(benchmarks)}, not to "
                f"{args.name}; leave it out."
            )
    if args.judge_url and args.judge_model is None:
        raise ValueError("--judge-url was given without --judge-model; add the judge's name.")
    if args.save_images and args.images is None and args.name != "point-grid":
        raise ValueError("--save-images needs --images, the folder of the pictures.")
    if args.answers and not args.score_only:
        raise ValueError("--answers names answers to score; add --score-only.")


def open_benchmark(args: argparse.Namespace) -> Benchmark:
    """The benchmark with its data. Raises FileNotFoundError or ValueError."""
    data = args.data
    if args.name == "flickr":
        return Flickr(data, args.entities or data.parent / "flickr30k")
    if args.name == "lvis":
        if args.format is None:
            raise ValueError(f"lvis needs --format: {', '.join(FORMATS)}.")
        return LVIS(data, args.format, not args.no_region_feature, not args.no_coordinates)
    if args.name == "ferret-bench":
        return FerretBench(data, not args.no_region_feature)
    if args.name == "llava-bench":
        return LLaVABench(data, args.rules or data / "rule.json")
    if args.name == "point-grid":
        args.images = data.parent
        return PointGrid(data)
    return RefCOCO(data) if args.name == "refcoco" else POPE(data)


def _read(args: argparse.Namespace, benchmark: Benchmark) -> tuple[dict[str, str], dict[str, Any]]:
    """Answers of this command, with what they were made with, or of the released scripts."""
    path = args.answers or args.output
    own = path / ANSWER_FILE if path.is_dir() else path
    if own.name == ANSWER_FILE and own.is_file() and _is_log(own):
        texts = {key: line["text"] for key, line in read_log(own, benchmark).items()}
        return texts, read_settings(own.parent, benchmark)
    if not path.exists():
        raise FileNotFoundError(f"There are no answers at {path}; name them with --answers.")
    return benchmark.read_answers(path), {}


def _is_log(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline().startswith(b'{"key":')


def _settings(args: argparse.Namespace, items: Sequence[Item]) -> dict[str, Any]:
    """What the answers depend on. Raises ValueError, FileNotFoundError before any work."""
    from ..config import FerretConfig
    from ..hub import bundled_model, find_folder

    if args.images is None:
        raise ValueError("--images is missing; name the folder of the pictures.")
    check_pictures(items, args.images)
    folder = find_folder(args.model or bundled_model(), "--model", weights=False)
    return {
        "model": args.model or "ferret-tiny",
        "quantization": FerretConfig.from_folder(str(folder)).quantization,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
    }


def _ask(
    args: argparse.Namespace,
    benchmark: Benchmark,
    items: Sequence[Item],
    settings: dict[str, Any],
    ranks: Ranks,
) -> tuple[dict[str, str], dict[str, Any]]:
    """All answers, those of an earlier start included, and what they were made with."""
    images = args.images
    log = AnswerLog(args.output, benchmark, settings, ranks)

    def loaded() -> tuple[Model, Processor]:
        model, processor, seconds = load_model(args.model)
        report_loaded(args.model, seconds)
        return model, processor

    asking = Asking(args.batch, args.max_tokens, args.seed)
    try:
        answer_items(benchmark, items, images, loaded, log, asking)
    except KeyboardInterrupt:
        done = sum(item.key in log.answers for item in items)
        report(f"\n{done} of {len(items)} items are answered; the same command goes on from here.")
        raise
    log.merge()
    cut = sum(log.answers[item.key].get("finish_reason") == "length" for item in items)
    sizes = {name: picture_size(images / name) for name in {i.picture for i in items}}
    texts = {item.key: log.answers[item.key]["text"] for item in items}
    if ranks.leads:
        write_released(args.output, benchmark, texts, sizes)
    return texts, {**settings, "cut answers": cut}


def _judge(args: argparse.Namespace) -> Judge | None:
    """Raises ValueError before any work."""
    if args.judge_model is None:
        return None
    return Judge(args.judge_model, args.judge_url, args.judge_retries)


def _reviews(args: argparse.Namespace) -> Path:
    return args.reviews or args.output / "reviews"


def _review(
    args: argparse.Namespace,
    benchmark: Judged,
    items: Sequence[Item],
    texts: dict[str, str],
    judge: Judge | None,
) -> dict[str, float]:
    """Figures of the reviews of these items, those of an earlier start included."""
    folder = _reviews(args)
    if judge is not None:
        review_answers(benchmark, items, texts, folder, judge)
        if judge.model != PUBLISHED_JUDGE:
            report(f"note: published scores are by {PUBLISHED_JUDGE}; others differ.")
    reviews = benchmark.reviews_of(items, texts, folder)
    count = sum(map(len, reviews.values()))
    if args.reviews and not count:
        raise ValueError(f"{folder} holds no reviews of these answers, review_CATEGORY.jsonl.")
    if 0 < count < len(items):
        report(f"note: the scores are of the {count} of {len(items)} answers that are reviewed.")
    return benchmark.review_figures(reviews, args.ignore)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ferret_mlx.evaluate",
        description="Measure a Ferret model on a published benchmark.",
        epilog="An interrupted run goes on when the same command is started again.",
    )
    add = parser.add_argument
    add("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--data", required=True, type=Path, metavar="PATH",
        help="the benchmark's file or folder (point-grid: the picture)")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="folder of the pictures")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of answers and results")
    add("--model", metavar="PATH|HUB_ID", help="converted model (default: the small bundled one)")
    add("--limit", type=number(1, None, int), metavar="N", help="only the first N items")
    add("--batch", type=number(1, None, int), default=8, metavar="N",
        help="questions about one picture answered together (default: %(default)s)")  # fmt: skip
    add("--max-tokens", type=number(1, None, int), default=1024, metavar="N",
        help="longest answer (default: %(default)s, as published)")  # fmt: skip
    add("--seed", type=number(0, 2**63 - 1, int), default=0, metavar="S",
        help="of the points drawn from each region (default: 0)")  # fmt: skip
    add("--score-only", action="store_true", help="ask nothing, score answers that are there")
    add("--answers", type=Path, metavar="PATH",
        help="with --score-only: file or folder of answers, also of the released scripts "
        "(default: --output)")  # fmt: skip
    add("--save-images", type=number(1, None, int), metavar="N", help="draw the N worst answers")
    add("--format", choices=FORMATS, help="lvis: what is said about the object's place")
    add("--no-region-feature", action="store_true", help="lvis, ferret-bench: coordinates only")
    add("--no-coordinates", action="store_true", help="lvis: without coordinates")
    add("--entities", type=Path, metavar="DIR",
        help="flickr: Flickr30k Entities (default: flickr30k beside --data)")  # fmt: skip
    add("--judge-model", metavar="NAME",
        help="ferret-bench, llava-bench: have the answers reviewed by this model")  # fmt: skip
    add("--judge-url", metavar="URL",
        help="OpenAI-compatible server of the judge (default: OpenAI's)")  # fmt: skip
    add("--judge-retries", type=number(0, None, int), default=10, metavar="N",
        help="repetitions of a request that fails (default: %(default)s)")  # fmt: skip
    add("--reviews", type=Path, metavar="DIR",
        help="folder of a judge's review files (default: reviews in --output)")  # fmt: skip
    add("--ignore", type=int, nargs="+", default=[], metavar="ID",
        help="question ids whose reviews do not count")  # fmt: skip
    add("--rules", type=Path, metavar="FILE", help="llava-bench: LLaVA's rule.json")
    return parser
