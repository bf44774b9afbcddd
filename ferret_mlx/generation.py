"""Image, regions and question -> the answer, streamed."""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import UnionType
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, wired_limit
from mlx_lm.sample_utils import apply_top_p, make_sampler
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

from .model import Model
from .sharding import agreed

if TYPE_CHECKING:
    from .config import FerretConfig
    from .processor import Processor
    from .tokenizer import Tokenizer

KV_BITS = (2, 4, 8)
KV_GROUP_SIZES = (64, 32)


def stream_generate(
    model: Model,
    processor: Processor,
    image: Any,
    prompt: str | list[dict[str, str]],
    regions: Sequence[Any] = (),
    *,
    max_tokens: int = 512,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    kv_bits: int | None = None,
) -> Iterator[GenerationResponse]:
    """Answer a question about an image and regions of it, piece by piece.

    image, prompt, regions: see `Processor`.
    max_tokens: at most so many tokens are made, fewer where the model's context ends.
    temp: 0 takes the likeliest token; the released demo samples at 0.2 with `top_p` 0.7.
    top_p: keep the likeliest tokens that hold this share of the probability, before `temp`.
    seed: decides the regions' points and the samples; equal seeds give equal answers.
    kv_bits: 2, 4 or 8 quantize the key-value cache from the first token on.

    Yields mlx_lm's GenerationResponse. `prompt_tokens` counts the expanded image, `prompt_tps`
    includes encoding it. The last one has `finish_reason` "stop" (end of the answer, `token` is
    `</s>`) or "length". Raises ValueError or FileNotFoundError for bad input, before any work.
    """
    check_options(max_tokens, temp, top_p, seed)
    options = cache_options(model.config, kv_bits)
    inputs = processor(image, prompt, regions, seed=seed)
    ids = model.expand_ids(inputs.input_ids)
    room = model.config.context - ids.size  # the processor leaves one at least
    return stream_answer(
        model,
        processor.tokenizer,
        ids,
        lambda: model.embed_inputs(inputs.input_ids, inputs.pixel_values, inputs.region_points),
        max_tokens=min(max_tokens, room),
        sampler=keyed_sampler(temp, top_p, seed, model.tensor_group),
        prompt_cache=model.make_cache(),
        **options,
    )


def generate(
    model: Model,
    processor: Processor,
    image: Any,
    prompt: str | list[dict[str, str]],
    regions: Sequence[Any] = (),
    **options: Any,
) -> str:
    """The whole answer as text. Arguments and errors: see `stream_generate`."""
    chunks = stream_generate(model, processor, image, prompt, regions, **options)
    return "".join(chunk.text for chunk in chunks)


def keyed_sampler(
    temp: float, top_p: float, seed: int, group: mx.distributed.Group | None = None
) -> Callable[[mx.array], mx.array]:
    """A sampler for `generate_step` with a random key of its own; `group`: see `agreed`.

    mlx_lm's draw from MLX's global state, where two answers in progress disturb each other.
    """
    if temp == 0:
        return agreed(make_sampler(temp=0.0), group)
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, subkey = mx.random.split(key)
        logprobs = logprobs.astype(mx.float32)  # half floats would end at 1 / temp = 65504
        if top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        return mx.random.categorical(logprobs * (1 / temp), key=subkey)

    return agreed(sample, group)


def stream_answer(
    model: Model,
    tokenizer: Tokenizer,
    ids: mx.array,
    embed: Callable[[], mx.array],
    *,
    max_tokens: int,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """The answer to a prompt, or to the part of it that its cache does not hold yet.

    ids: (L,) as `Model.expand_ids` gives them; embed: makes the (1, L, D) embeddings, on the clock.
    options: sampler, prompt_cache and what `cache_options` returns.
    """
    detokenizer = streaming_detokenizer(tokenizer)
    with generating(model):
        start = time.perf_counter()
        steps = _answer_steps(model, ids, embed(), max_tokens=max_tokens, **options)
        for count, (token, logprobs) in enumerate(steps, start=1):
            if count == 1:
                prompt_tps = ids.size / (time.perf_counter() - start)
                start = time.perf_counter()
            finish_reason = None
            if token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            else:
                detokenizer.add_token(token)
                if count == max_tokens:
                    finish_reason = "length"
            if finish_reason:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=False,
                prompt_tokens=ids.size,
                prompt_tps=prompt_tps,
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason:
                break


@contextmanager
def generating(model: Model) -> Iterator[None]:
    """The frame of everything that runs in mlx_lm's generation stream."""
    with ExitStack() as stack:
        if model.tensor_group is not None:
            # The step that is always begun ahead talks to the other processes. What is said to them
            # in another stream meanwhile would mix with it.
            stack.callback(mx.synchronize, generation_stream)
        with redirect_stdout(sys.stderr):  # its warning is not part of the answer
            stack.enter_context(wired_limit(model, [generation_stream]))
        yield


def _answer_steps(
    model: Model,
    ids: mx.array,
    embeddings: mx.array,
    *,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
    prompt_cache: list[Any],
    **quantization: Any,
) -> Iterator[tuple[int, mx.array]]:
    """Tokens and log-probabilities, as `generate_step` yields them.

    `generate_step` reads all weights once for the prompt but its last token and once more for
    that one. Only quantizing the cache in between needs the two passes; one pass makes the
    answer to a short follow-up start up to twice as early.
    """
    if quantization:
        yield from generate_step(
            ids, model, input_embeddings=embeddings[0], max_tokens=max_tokens, sampler=sampler,
            prompt_cache=prompt_cache, **quantization,
        )  # fmt: skip
        return
    with mx.stream(generation_stream):
        logits = model.next_logits(ids[None], prompt_cache, embeddings)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs)
    yield cast(int, token.item()), logprobs[0]
    if max_tokens > 1:
        yield from generate_step(
            token, model, max_tokens=max_tokens - 1, sampler=sampler, prompt_cache=prompt_cache
        )


def streaming_detokenizer(tokenizer: Tokenizer) -> SPMStreamingDetokenizer:
    detokenizer = copy.copy(_vocabulary_detokenizer(tokenizer))
    detokenizer.reset()
    return detokenizer


@functools.lru_cache(maxsize=2)
def _vocabulary_detokenizer(tokenizer: Tokenizer) -> SPMStreamingDetokenizer:
    # Goes through the whole vocabulary: as long as some answers take to start.
    return SPMStreamingDetokenizer(tokenizer)


def check_options(max_tokens: int, temp: float, top_p: float, seed: int) -> None:
    """Raises ValueError for an option of `stream_generate` that makes no sense."""
    if not _is_number(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, expected a whole number of at least 1.")
    if not _is_number(temp, int | float) or not 0 <= temp < float("inf"):
        raise ValueError(f"temp is {temp!r}, expected 0 (greedy) or a positive number.")
    if not _is_number(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}, expected a number above 0 and at most 1.")
    if not _is_number(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected a whole number of at least 0.")


def _is_number(value: Any, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def cache_options(config: FerretConfig, kv_bits: int | None) -> dict[str, int]:
    """The options of `generate_step` that quantize its cache from the first token on."""
    if kv_bits is None:
        return {}
    if not _is_number(kv_bits, int) or kv_bits not in KV_BITS:
        raise ValueError(f"kv_bits is {kv_bits!r}, expected one of {KV_BITS} or None.")
    text = config.text
    head_dim = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    for group_size in KV_GROUP_SIZES:
        if head_dim % group_size == 0:
            return {"kv_bits": kv_bits, "kv_group_size": group_size, "quantized_kv_start": 0}
    raise ValueError(
        f"kv_bits needs attention heads whose width is a multiple of {KV_GROUP_SIZES[-1]}, "
        f"this model's are {head_dim} wide; leave kv_bits out."
    )
