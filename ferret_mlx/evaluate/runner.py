"""One loop for all benchmarks: pictures, questions, answers, and where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .answer_log import AnswerLog
from .benchmark import Benchmark, Item, Verdict
from .pictures import read_picture

if TYPE_CHECKING:
    from ..batch import Answer
    from ..model import Model
    from ..processor import Processor


@dataclass(frozen=True)
class Asking:
    """How the questions are asked.

    Attributes:
        batch: questions about one picture that are answered together.
        max_tokens: longest answer.
        seed: of the regions' points.
    """

    batch: int = 8
    max_tokens: int = 1024
    seed: int = 0


def check_pictures(items: Sequence[Item], images: Path) -> None:
    """Raises FileNotFoundError for the first picture that is missing, before any work."""
    seen = set()
    for item in items:
        path = images / item.picture
        if item.picture not in seen and not path.is_file():
            raise FileNotFoundError(
                f"There is no picture {path}, which {item.where} is about; "
                "check --images, or copy the picture there."
            )
        seen.add(item.picture)


def answer_items(
    benchmark: Benchmark,
    items: Sequence[Item],
    images: Path,
    loaded: Callable[[], tuple[Model, Processor]],
    log: AnswerLog,
    asking: Asking,
) -> None:
    """Ask about all items that have no answer yet; each answer is kept as soon as it ends.

    Items about one picture share a session, so that the picture is read once. The pictures are
    split over the processes of ``log.ranks``.

    Args:
        images: folder of the pictures.
        loaded: gives model and processor; not called when nothing is left to ask.

    Raises ValueError, which names the item, for a picture that cannot be read, an empty region
    or a question that does not fit the context. What was answered before is kept.
    """
    texts, ranks = log.texts(), log.ranks
    verdicts = {i.key: benchmark.verdict(i, texts[i.key]) for i in items if i.key in texts}
    left = [item for item in items if item.key not in verdicts]
    groups = list(by_picture(left))[ranks.rank :: ranks.count]
    if not groups:
        return
    check_pictures(left, images)
    model, processor = loaded()
    total = len(verdicts) + sum(len(group) for _, group in groups)
    with tqdm(
        total=total, initial=len(verdicts), desc=benchmark.name, unit=" items",
        disable=not ranks.leads,
    ) as bar:  # fmt: skip
        for picture, group in groups:
            for item, answer in _ask(
                benchmark, group, images / picture, model, processor, asking
            ):  # fmt: skip
                text = benchmark.tidy(answer.text)
                log.append(
                    item.key, text, finish_reason=answer.finish_reason,
                    tokens=answer.generation_tokens,
                )  # fmt: skip
                verdicts[item.key] = benchmark.verdict(item, text)
                bar.set_postfix_str(running_score(verdicts), refresh=False)
                bar.update()


def by_picture(items: Sequence[Item]) -> Iterator[tuple[str, list[Item]]]:
    """Items about the same picture together, pictures in the order of their first item."""
    place: dict[str, int] = {}
    for item in items:
        place.setdefault(item.picture, len(place))
    ordered = sorted(items, key=lambda item: place[item.picture])
    for picture, group in groupby(ordered, key=lambda item: item.picture):
        yield picture, list(group)


def running_score(verdicts: Mapping[str, Verdict]) -> str:
    """``score 53.1 %`` of the answers so far, empty where nothing is counted."""
    count = sum(verdict.count for verdict in verdicts.values())
    hits = sum(verdict.hits for verdict in verdicts.values())
    return f"score {100 * hits / count:.1f} %" if count else ""


def _ask(
    benchmark: Benchmark,
    items: Sequence[Item],
    path: Path,
    model: Model,
    processor: Processor,
    asking: Asking,
) -> Iterator[tuple[Item, Answer]]:
    from ..session import Session

    picture = read_picture(path)
    size = picture.shape[1], picture.shape[0]
    questions = []
    for item in items:
        try:
            question = benchmark.question(item, size)
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from error
        questions.append((question.prompt, question.regions))
    session = Session(model, processor, picture)
    try:
        answers = session.ask_many(
            questions, max_tokens=asking.max_tokens, seed=asking.seed, batch_size=asking.batch
        )
    except ValueError as error:
        raise ValueError(f"{items[0].where} and others about {path.name}: {error}") from error
    for answer in answers:
        yield items[answer.index], answer
