"""Questions and answers about one image -> turns and token ids with placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .prompt import build_prompt, name_regions
from .regions import Region, describe_regions, sample_points
from .shapes import Size

if TYPE_CHECKING:
    from .processor import Processor


@dataclass
class Exchange:
    """A question, its regions, and the answer so far.

    Attributes:
        question: names all its regions, counted from 0 within this question.
        region_texts: their coordinates on the prompt's canvas.
        points: float32 (512, 2) of each region, (x, y) in [0, 1).
        answer: as it was streamed, without the tokens that stand for pixels.
    """

    question: str
    region_texts: list[str]
    points: list[np.ndarray]
    answer: str = ""


@dataclass(frozen=True)
class Prompt:
    """A conversation whose last question is to be answered.

    Attributes:
        exchanges: those that are still in it, the last one without its answer.
        ids: with placeholders.
        points: of all their regions, in text order.
        room: tokens that the context leaves for the answer.
    """

    exchanges: list[Exchange]
    ids: list[int]
    points: list[np.ndarray]
    room: int


def new_exchange(
    prompt: str, regions: Sequence[Region], size: Size, rng: np.random.Generator
) -> Exchange:
    """A question about a picture of this size (w, h); `rng` draws the regions' points.

    Raises ValueError for a prompt that is no str or does not fit its regions, and for a region
    outside of the picture.
    """
    if not isinstance(prompt, str):
        raise ValueError(
            f"The prompt is a {type(prompt).__name__}, expected the next question as a str; "
            "the session keeps the earlier turns."
        )
    texts, masks = describe_regions(regions, size)
    build_prompt(prompt, texts)  # refuses an empty one, which the names of its regions would fill
    question = name_regions(prompt, len(texts))
    return Exchange(question, texts, [sample_points(mask, rng) for mask in masks])


def turns_of(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    """User and assistant turns as `Processor` takes them, the regions counted through."""
    turns, first = [], 0
    for exchange in exchanges:
        count = len(exchange.region_texts)
        question = name_regions(exchange.question, count, first)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": exchange.answer})
        first += count
    return turns


def encode_exchanges(
    processor: Processor, exchanges: Sequence[Exchange]
) -> tuple[list[int], list[np.ndarray]]:
    """The ids of a prompt that ends with the last question, and the points in text order."""
    texts = [text for exchange in exchanges for text in exchange.region_texts]
    points = [points for exchange in exchanges for points in exchange.points]
    _, ids, order = processor.encode_turns(turns_of(exchanges)[:-1], texts)
    return ids, [points[index] for index in order]


def fit_prompt(
    processor: Processor, exchanges: Sequence[Exchange], max_tokens: int, drop_oldest: bool
) -> Prompt:
    """The conversation in the model's context; see `Session.ask` for the options.

    Raises ValueError when there is no room for an answer.
    """
    exchanges = list(exchanges)
    ids, points = encode_exchanges(processor, exchanges)
    while drop_oldest and len(exchanges) > 1 and processor.room(ids) < max_tokens:
        exchanges = exchanges[1:]
        ids, points = encode_exchanges(processor, exchanges)
    room = processor.room(ids)
    if room < 1:
        why = processor.no_room(ids)
        if len(exchanges) == 1:
            raise ValueError(f"The question {why}; shorten it.")
        raise ValueError(
            f"The conversation {why}; start again with reset(), or ask with drop_oldest=True "
            "to forget the oldest turns."
        )
    return Prompt(exchanges, ids, points, room)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share from the start."""
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)
