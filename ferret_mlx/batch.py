"""Many questions about one image, answered together over the image's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import (
    GenerationBatch,
    StopSequences,
    generation_stream,
    greedy_sampler,
)

from .conversation import encode_exchanges, new_exchange
from .generation import generating, keyed_sampler
from .processor import stack_points

if TYPE_CHECKING:
    from .regions import Region
    from .session import Session


@dataclass(frozen=True)
class Answer:
    """One whole answer of `Session.ask_many`.

    Attributes:
        index: of its question.
        text: without `</s>`.
        finish_reason: "stop", or "length" when `max_tokens` or the context cut it.
        prompt_tokens: evaluated for this question, those of template and image not counted.
        generation_tokens: made, `</s>` included.
    """

    index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class Question:
    """What follows the prefix: its ids, its points in text order, the room for its answer."""

    index: int
    ids: list[int]
    points: list[np.ndarray]
    max_tokens: int


def prepare_questions(
    session: Session,
    questions: Sequence[tuple[str, Sequence[Region]]],
    batch_size: int,
    max_tokens: int,
    seed: int,
) -> list[list[Question]]:
    """The batches. Raises ValueError, naming the question, for all that `Session.ask` refuses."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, expected a whole number above 0.")
    prepared = []
    for index, asked in enumerate(questions):
        try:
            if not isinstance(asked, tuple | list) or len(asked) != 2:
                raise ValueError(f"got {asked!r}, expected a pair (prompt, regions).")
            prompt, regions = asked
            # As if each were the first question of a session.
            rng = np.random.default_rng(seed)
            exchange = new_exchange(prompt, regions, session.image_size, rng)
            ids, points = encode_exchanges(session.processor, [exchange])
            room = session.processor.room(ids)
            if room < 1:
                raise ValueError(f"It {session.processor.no_room(ids)}; shorten it.")
        except ValueError as error:
            raise ValueError(f"Question {index}: {error}") from error
        new = ids[len(session.prefix_ids) :]
        prepared.append(Question(index, new, points, min(max_tokens, room)))
    return [prepared[i : i + batch_size] for i in range(0, len(prepared), batch_size)]


def answer_questions(
    session: Session, questions: Sequence[Question], temp: float, top_p: float, seed: int
) -> Iterator[Answer]:
    """Answer one batch; each answer comes as soon as it ends."""
    tokenizer = session.processor.tokenizer
    with generating(session.model):
        stop = StopSequences([(token,) for token in tokenizer.eos_token_ids])
        count = len(questions)
        # One greedy sampler serves all rows in one call; others have a key of their own.
        group = session.model.tensor_group
        shared = keyed_sampler(temp, top_p, seed, group) if temp == 0 else None
        with mx.stream(generation_stream):
            batch = GenerationBatch(
                model=session.model,
                uids=list(range(count)),
                inputs=mx.array([question.ids[-1] for question in questions]),
                prompt_cache=_prefill(session, questions),
                tokens=[[] for _ in questions],
                samplers=[shared or keyed_sampler(temp, top_p, seed, group) for _ in questions],
                fallback_sampler=greedy_sampler,
                logits_processors=[[] for _ in questions],
                stop_sequences=[stop] * count,
                max_tokens=[question.max_tokens for question in questions],
            )
        said: list[list[int]] = [[] for _ in questions]
        while len(batch):
            with mx.stream(generation_stream):
                responses = batch.next()
            for response in responses:
                question, tokens = questions[response.uid], said[response.uid]
                tokens.append(response.token)
                if response.finish_reason is None:
                    continue
                text = tokens[:-1] if response.finish_reason == "stop" else tokens
                yield Answer(
                    index=question.index,
                    text=tokenizer.decode(text),
                    finish_reason=response.finish_reason,
                    prompt_tokens=len(question.ids),
                    generation_tokens=len(tokens),
                )


def _prefill(session: Session, questions: Sequence[Question]) -> list[Any]:
    """A cache whose rows hold template, image and a question each, but for its last token."""
    # One row of keys and values each: mlx_lm's attention reads them from one array.
    caches = [layer.merge([layer] * len(questions)) for layer in session.prefix_layers()]
    lengths = [len(question.ids) - 1 for question in questions]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    ids = mx.zeros((len(questions), longest), dtype=mx.int32)
    session.model(ids, cache=caches, input_embeddings=_embed(session, questions, longest))
    for cache in caches:
        cache.finalize()
    mx.eval([cache.state for cache in caches])
    mx.clear_cache()
    return caches


def _embed(session: Session, questions: Sequence[Question], longest: int) -> mx.array:
    """(B, longest, D): the questions without their last tokens, padded on the right."""
    features = session.encode_image()
    points = [points for question in questions for points in question.points]
    vectors = session.model.region_sampler(features, mx.array(stack_points(points)))
    ids = [index for question in questions for index in question.ids]
    rows = session.model.embed_part(ids, features, vectors)[0]
    padded, first = [], 0
    for question in questions:
        length = len(question.ids)
        own = rows[first : first + length - 1]
        padded.append(mx.pad(own, [(0, longest - length + 1), (0, 0)]))
        first += length
    return mx.stack(padded)
