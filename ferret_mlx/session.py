"""One image, many questions: nothing is encoded or prefilled twice."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import KVCache

from .batch import Answer, answer_questions, prepare_questions
from .conversation import Exchange, Prompt, common_length, fit_prompt, new_exchange, turns_of
from .generation import cache_options, check_options, keyed_sampler, stream_answer
from .image import open_image
from .processor import stack_points
from .prompt import IMAGE_TOKEN_INDEX, without_placeholders
from .prompt_cache import PromptCache

if TYPE_CHECKING:
    import os

    from .image import ImageLike
    from .model import Model
    from .processor import Processor
    from .regions import Region

Chunks: TypeAlias = Generator[GenerationResponse, None, None]


class Session:
    """A conversation about one image.

    The image is encoded once, at the first question. One cache holds the keys and values of the
    template, the image and the turns so far; a question evaluates only what the cache lacks.

    model, processor: from `load`.
    image: path, Pillow image or uint8 array (h, w, 3). Raises FileNotFoundError or ValueError
        when it is not a readable picture.
    """

    def __init__(self, model: Model, processor: Processor, image: ImageLike):
        self.model, self.processor = model, processor
        picture = open_image(image)
        self.image_size = picture.size  # (w, h) of the upright picture in pixels
        self.pixel_values = processor.pixel_values(picture)
        self.features: mx.array | None = None  # (1, rows * columns, C), once they are needed
        # The template up to the image is the same in front of every question.
        _, ids, _ = processor.encode_turns("?")
        self.prefix_ids = ids[: ids.index(IMAGE_TOKEN_INDEX) + 1]
        self.exchanges: list[Exchange] = []
        self.seed, self.rng = 0, np.random.default_rng(0)
        self._open: Chunks | None = None
        self.forget_keys()

    def ask(
        self,
        prompt: str,
        regions: Sequence[Region] = (),
        *,
        max_tokens: int = 512,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        kv_bits: int | None = None,
        drop_oldest: bool = False,
    ) -> Chunks:
        """Ask the next question of the conversation; streams as `stream_generate` does.

        prompt: the question; `[region0]` stands for the first of *its* regions.
        regions: of this question, in pixels of the upright picture.
        kv_bits: another value than before evaluates the conversation anew.
        drop_oldest: where the context would leave less room than `max_tokens`, forget whole
            turns, oldest first, and evaluate the rest anew.
        The other options are those of `stream_generate`. As long as `seed` stays the same and no
        turn is dropped, greedy answers in float32 without `kv_bits` are those of `generate` for
        `turns` and all their regions.

        An answer that is not read to its end (`close`, Ctrl-C, the next question or batch) stays
        in the conversation as far as it was streamed. `prompt_tokens` counts what had to be
        evaluated.

        Raises ValueError for bad input, and when the conversation does not fit the context.
        """
        check_options(max_tokens, temp, top_p, seed)
        options = cache_options(self.model.config, kv_bits)
        self.end_answer()
        rng = copy.deepcopy(self.rng) if seed == self.seed else np.random.default_rng(seed)
        exchanges = [*self.exchanges, new_exchange(prompt, regions, self.image_size, rng)]
        question = fit_prompt(self.processor, exchanges, max_tokens, drop_oldest)
        self._open = self._answer(
            question, rng, seed, max_tokens=min(max_tokens, question.room),
            sampler=keyed_sampler(temp, top_p, seed, self.model.tensor_group), **options,
        )  # fmt: skip
        return self._open

    def ask_many(
        self,
        questions: Sequence[tuple[str, Sequence[Region]]],
        *,
        max_tokens: int = 512,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Iterator[Answer]:
        """Answer many questions about the image together; yields each `Answer` as it ends.

        questions: (prompt, regions) pairs, each asked as if it were the first; the conversation
            stays as it is. The answers are those of `reset` and `ask`, one after the other.
        batch_size: how many are answered at a time. Each holds keys and values of its own, those
            of the image included (`kv_nbytes`; about 325 MB at 7B in float16).
        The other options are those of `ask`.

        Raises ValueError for bad input, before any work.
        """
        check_options(max_tokens, temp, top_p, seed)
        self.end_answer()
        batches = prepare_questions(self, questions, batch_size, max_tokens, seed)
        return chain.from_iterable(
            answer_questions(self, batch, temp, top_p, seed) for batch in batches
        )

    def reset(self) -> None:
        """Forget the turns; the image and its keys and values stay."""
        self.end_answer()
        self.exchanges = []
        self.seed, self.rng = 0, np.random.default_rng(0)
        self.prompt_cache.trim(len(self.prefix_ids))

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as `stream_generate` takes it, its regions counted through."""
        return turns_of(self.exchanges)

    @property
    def tokens(self) -> int:
        """Positions of the context that template, image and the turns that have ended take."""
        return self.prompt_cache.tokens

    @property
    def kv_nbytes(self) -> int:
        """Bytes that the keys and values take in memory."""
        return self.prompt_cache.nbytes

    def __repr__(self) -> str:
        w, h = self.image_size
        return (
            f"Session({w} x {h} pixels, {len(self.exchanges)} turns, {self.tokens} of "
            f"{self.model.config.context} tokens, keys and values {self.kv_nbytes / 1e6:.1f} MB)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write image features, keys and values and turns to an mlx-lm prompt-cache file.

        path: ends in `.safetensors`; an existing file is replaced. Where processes share the
            language model, each saves its own part and needs a path of its own.

        Raises ValueError or OSError.
        """
        from .session_file import save_session

        save_session(self, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where `save` was called, in this or another process, without the vision tower.

        Raises FileNotFoundError, or ValueError when the file is damaged or belongs to another
        model, picture or template; the session is then as it was.
        """
        from .session_file import load_session

        load_session(self, path)

    def prefix_layers(self) -> list[KVCache]:
        """Keys and values of template and image alone, never quantized."""
        self.end_answer()  # it may have been asked since: until its end the layers are its own
        cache = self.prompt_cache if self.prompt_cache.kv_bits is None else self._new_cache()
        self.prefill_prefix(cache)
        return cache.prefix(len(self.prefix_ids))

    def prefill_prefix(self, cache: PromptCache) -> None:
        """Have a cache hold template and image at least."""
        if not cache.ids:
            cache.trim(0)  # of what an interrupt in the middle of this has left
            embeddings = self.model.embed_part(self.prefix_ids, self.encode_image())
            ids = self.model.expand_ids(self.prefix_ids)[None]
            self.model(ids, cache=cache.layers, input_embeddings=embeddings)
            mx.eval([layer.state for layer in cache.layers])
            cache.record(self.prefix_ids)

    def encode_image(self) -> mx.array:
        """(1, rows * columns, C), by the vision tower or from the time before."""
        if self.features is None:
            self.features = self.model.encode_image(self.pixel_values)
        return self.features

    def forget_keys(self, kv_bits: int | None = None) -> None:
        """Start with an empty cache; what it held is evaluated anew when it is needed."""
        self.prompt_cache = self._new_cache(kv_bits)

    def _new_cache(self, kv_bits: int | None = None) -> PromptCache:
        return PromptCache(self.model.make_cache(), self.processor.length, kv_bits)

    def end_answer(self) -> None:
        """Close an answer that is still being streamed."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _answer(
        self, prompt: Prompt, rng: np.random.Generator, seed: int, **options: Any
    ) -> Chunks:
        exchanges, ids = prompt.exchanges, prompt.ids
        kv_bits = options.get("kv_bits")
        if kv_bits != self.prompt_cache.kv_bits:
            self.forget_keys(kv_bits)
        cache = self.prompt_cache
        known = common_length(cache.ids, ids)
        if len(exchanges) <= len(self.exchanges):
            # Turns were dropped: equal ids further on may stand for other regions.
            known = min(known, len(self.prefix_ids))
        cache.trim(known)
        new = ids[known:]
        said: list[int] = []
        self.exchanges = exchanges[:-1]
        chunks = stream_answer(
            self.model, self.processor.tokenizer, self.model.expand_ids(new),
            lambda: self._embed(new, prompt.points), prompt_cache=cache.layers, **options,
        )  # fmt: skip
        whole = False
        try:
            with closing(chunks):
                for chunk in chunks:
                    if not said:
                        self.exchanges, self.seed, self.rng = exchanges, seed, rng
                    said.append(chunk.token)
                    last = exchanges[-1]
                    last.answer = without_placeholders(last.answer + chunk.text)
                    yield chunk
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            if whole:
                cache.record([*ids, *said])
            else:
                # An interrupt inside a step may have left the layers at different positions.
                self.forget_keys(kv_bits)

    def _embed(self, ids: list[int], points: list[np.ndarray]) -> mx.array:
        """(1, L, D) of the last part of a prompt; points: those of the whole prompt."""
        features = self.encode_image()
        vectors = None
        if named := ids.count(self.model.config.region_token_id):
            vectors = self.model.region_sampler(features, mx.array(stack_points(points[-named:])))
        return self.model.embed_part(ids, features, vectors)
