"""``generate.py --regions FILE.json``: many questions about one picture, JSON lines out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

from .arguments import vision_options
from .boxes import parse_boxes
from .errors import INTERRUPTED
from .image import open_image
from .questions import Question, read_questions
from .regions import describe_regions
from .terminal import load_model, read_processor, report, report_loaded

if TYPE_CHECKING:
    import argparse

    from .distribution import Ranks

_ONE_ANSWER = ("regions", "save_image", "kv_bits")


def answer_file(args: argparse.Namespace, ranks: Ranks) -> None:
    """Print one JSON object per answer, as each ends. Raises ValueError, FileNotFoundError."""
    with ranks.agree():
        _check_flags(args, ranks)
        image = open_image(args.image)
        questions = read_questions(args.questions, args.prompt, image.size, args.stroke_width)
        texts = _check(questions, image.size, args.model)
    ranks.require_same("picture", lambda: [image.size, crc32(image.tobytes())])
    ranks.require_same("list of questions", [[q.prompt for q in questions], texts])
    model, processor, loading = load_model(args.model, ranks, **vision_options(args))
    from .session import Session

    start = time.perf_counter()
    session = Session(model, processor, image)
    answers = session.ask_many(
        [(question.prompt, question.regions) for question in questions],
        max_tokens=args.max_tokens, temp=args.temp, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    report_loaded(args.model, loading)
    count = tokens = 0
    try:
        for answer in answers:
            question = questions[answer.index]
            boxes = parse_boxes(answer.text, image.size)
            line: dict[str, Any] = {
                "index": answer.index,
                "prompt": question.prompt,
                "text": answer.text,
                "boxes": [{"label": label, "box": list(box)} for label, box, _ in boxes],
                "regions": [
                    {"kind": kind, "text": text}
                    for kind, text in zip(question.kinds, texts[answer.index], strict=True)
                ],
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "generation_tokens": answer.generation_tokens,
            }
            print(json.dumps(line), flush=True)
            count, tokens = count + 1, tokens + answer.generation_tokens
    except KeyboardInterrupt:
        report(f"Interrupted; {count} of {len(questions)} questions are answered.")
        sys.exit(INTERRUPTED)
    if args.verbose:
        seconds = time.perf_counter() - start
        report(f"{count} answers, {tokens} tokens in {seconds:.2f} s.")


def _check_flags(args: argparse.Namespace, ranks: Ranks) -> None:
    for name in _ONE_ANSWER:
        if getattr(args, name):
            flag = f"--{args.regions[0].kind}" if name == "regions" else f"--{name}"
            raise ValueError(
                f"{flag.replace('_', '-')} does not go with --regions, which answers many "
                "questions at once; leave one of the two out."
            )
    if args.questions == "-" and ranks.count > 1:
        raise ValueError("--regions - would never end, mlx.launch keeps stdin open; name a file.")


def _check(
    questions: Sequence[Question], size: tuple[int, int], model: str | None
) -> list[list[str]]:
    """All that can be refused without the weights; the texts of each question's regions."""
    processor = read_processor(model)
    texts = []
    for index, question in enumerate(questions):
        try:
            own, _ = describe_regions(question.regions, size)
            _, ids, _ = processor.encode_turns(question.prompt, own)
            if processor.room(ids) < 1:
                raise ValueError(f"It {processor.no_room(ids)}; shorten it.")
        except ValueError as error:
            raise ValueError(f"Question {index}: {error}") from error
        texts.append(own)
    return texts
