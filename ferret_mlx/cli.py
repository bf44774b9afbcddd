"""The command lines: ``generate.py``, which asks, and the entry of ``convert.py``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from .arguments import (
    STROKE_WIDTH,
    add_sampling_options,
    add_vision_options,
    join_negative,
    number,
    region_type,
    sampling_options,
    vision_options,
)
from .errors import INTERRUPTED, ArgumentParser, run_command
from .terminal import join_ranks, load_model, read_processor, report, report_loaded

# Everything else is imported where it is used: --help and bad arguments must not wait for it.
if TYPE_CHECKING:
    from PIL import Image

    from .regions import Region


@dataclass
class Answer:
    """What was said, also when it was cut short."""

    text: str = ""
    last: Any = None  # the last GenerationResponse
    first_token: float = math.nan
    seconds: float = math.nan
    interrupted: bool = False


@run_command
def generate_main(argv: Sequence[str] | None = None) -> None:
    """Answer about a picture as the arguments say; exits with 2 on bad input, 130 on Ctrl-C.

    Under `mlx.launch` all processes answer together, each with a part of the language model.
    """
    args = _parser().parse_args(join_negative(sys.argv[1:] if argv is None else argv))
    ranks = join_ranks()
    if args.questions is not None:
        from .many_cli import answer_file

        answer_file(args, ranks)
        return
    with ranks.agree():
        if args.prompt is None:
            raise ValueError("the following arguments are required: --prompt.")
        if not ranks.leads:
            args.save_image = None
        image, regions, texts = _check_inputs(args)
    ranks.require_same("picture", lambda: [image.size, crc32(image.tobytes())])
    ranks.require_same("mask", texts)
    model, processor, loading = load_model(args.model, ranks, **vision_options(args))
    from .generation import stream_generate

    start = time.perf_counter()
    with ranks.agree():
        chunks = stream_generate(
            model, processor, image, args.prompt, regions, **sampling_options(args)
        )
    # Only now nothing can be refused any more: an error is a single line.
    report_loaded(args.model, loading)
    answer = _stream(chunks, start, echo=not args.json)
    _finish(args, image, regions, texts, answer, loading)
    if answer.interrupted:
        sys.exit(INTERRUPTED)


@run_command
def convert_main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint as the arguments say; exits with 2 on bad input, 130 on Ctrl-C."""
    # Imports mlx_lm, which takes seconds: inside, so that Ctrl-C ends it without a traceback.
    from .convert_command import main

    main(argv)


def _check_inputs(args: argparse.Namespace) -> tuple[Image.Image, list[Region], list[str]]:
    """All that can be refused without the model, which takes seconds to load."""
    from .image import open_image
    from .prompt import build_prompt
    from .regions import describe_regions

    if args.save_image is not None:
        from .draw import check_target

        target = check_target(args.save_image)
        if target.exists() and Path(args.image).exists() and target.samefile(args.image):
            raise ValueError(f"--save-image {target} would overwrite --image; choose another name.")
    image = open_image(args.image)
    regions = []
    for index, flag in enumerate(args.regions):
        try:
            regions.append(flag.build(image.size, args.stroke_width))
        except ValueError as error:
            raise ValueError(f"[region{index}] (--{flag.kind}): {error}") from error
    texts, _ = describe_regions(regions, image.size)
    build_prompt(args.prompt, texts)
    read_processor(args.model)(image, args.prompt, regions)
    return image, regions, texts


def _stream(chunks: Iterable[Any], start: float, echo: bool) -> Answer:
    answer = Answer()
    try:
        for chunk in chunks:
            if answer.last is None:
                answer.first_token = time.perf_counter() - start
            answer.last = chunk
            answer.text += chunk.text
            if echo:
                print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        answer.interrupted = True
    answer.seconds = time.perf_counter() - start
    if echo:
        print(flush=True)
    return answer


def _finish(
    args: argparse.Namespace,
    image: Image.Image,
    regions: list[Region],
    texts: list[str],
    answer: Answer,
    loading: float,
) -> None:
    from .boxes import parse_boxes

    boxes = parse_boxes(answer.text, image.size)
    if answer.interrupted:
        report("Interrupted; this is what was said so far.")
    if args.save_image is not None:
        from .draw import draw_answer, save_picture

        save_picture(draw_answer(image, boxes, regions), args.save_image)
        plural = "" if len(boxes) == 1 else "es"
        report(f"Saved {args.save_image} with {len(boxes)} box{plural} of the answer.")
    timings = _timings(answer, loading)
    if args.json:
        result = {
            "text": answer.text,
            "boxes": [{"label": label, "box": list(box)} for label, box, _ in boxes],
            "regions": [
                {"kind": flag.kind, "text": text}
                for flag, text in zip(args.regions, texts, strict=True)
            ],
            "prompt_tokens": getattr(answer.last, "prompt_tokens", 0),
            "generation_tokens": getattr(answer.last, "generation_tokens", 0),
            "timings": timings,
        }
        print(json.dumps(result), flush=True)
    if args.verbose:
        for name, value in timings.items():
            report(f"{name:>22}  {value}")


def _timings(answer: Answer, loading: float) -> dict[str, float | None]:
    """Seconds, and tokens per second. None: there was no token."""
    values: dict[str, float | None] = {"load_s": loading, "first_token_s": None}
    if answer.last is not None:
        values["first_token_s"] = answer.first_token
    values["answer_s"] = answer.seconds
    for name in ("prompt_tps", "generation_tps", "peak_memory"):
        values[f"{name}_gb" if name == "peak_memory" else name] = getattr(answer.last, name, None)
    return {name: value and round(value, 4) for name, value in values.items()}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Ask a Ferret model about a picture and regions of it.",
        epilog="Region flags may be repeated and mixed. In the prompt, [region0], [region1], ... "
        "count them in the order given; a prompt that names none gets them appended.",
    )
    add = parser.add_argument
    add("--image", required=True, metavar="FILE", help="picture to ask about")
    add(
        "--prompt",
        metavar="TEXT",
        help="question, for instance 'What is [region0]?'",
    )
    add("--model", metavar="PATH|HUB_ID", help="converted model (default: the small bundled one)")
    add(
        "--regions",
        dest="questions",
        metavar="FILE.json",
        help="answer many questions at once, from a JSON list (- for stdin); prints JSON lines",
    )
    add_vision_options(parser)
    regions = parser.add_argument_group("regions, in pixels of the upright picture")
    for kind, form, what in (
        ("point", "X,Y", "a point"),
        ("box", "X1,Y1,X2,Y2", "a box"),
        ("mask", "FILE", "a picture of the same size, white inside the region"),
        ("polygon", '"X,Y X,Y X,Y ..."', "a filled polygon"),
        ("stroke", '"X,Y X,Y ..."', "a pen stroke"),
    ):
        regions.add_argument(
            f"--{kind}", dest="regions", action="append", type=region_type(kind, form),
            metavar=form, default=[], help=what,
        )  # fmt: skip
    regions.add_argument(
        "--stroke-width", type=number(1, None), default=STROKE_WIDTH, metavar="N",
        help="of all strokes, in pixels (default: %(default)g)",
    )  # fmt: skip
    add_sampling_options(parser)
    add("--save-image", metavar="OUT.png", help="write the picture with boxes and regions drawn in")
    add("--json", action="store_true", help="print one JSON object instead of the bare text")
    add("--verbose", action="store_true", help="print timings")
    return parser
