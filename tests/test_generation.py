from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.generation import generate, keyed_sampler, stream_generate
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.regions import Box, Point

QUESTION = "What is [region0]?"
REGION = [Box(20, 10, 90, 80)]
SAMPLED = {"temp": 1.0, "max_tokens": 8}


@pytest.fixture(scope="module")
def processor(parity) -> Processor:
    return Processor.from_folder(parity / "checkpoint")


@pytest.fixture(scope="module")
def image(parity):
    return parity / "cases" / "wide.png"


@pytest.fixture
def ask(parity_model, processor, image):
    def run(**options):
        return list(stream_generate(parity_model, processor, image, QUESTION, REGION, **options))

    return run


def wide_headed(parity, head_dim: int) -> Model:
    """Random weights, two heads of the given width."""
    values = read_config(parity / "checkpoint")
    values |= {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 2}
    mx.random.seed(0)
    model = Model(FerretConfig.from_dict(values))
    mx.eval(model.parameters())
    return model


def test_answer_of_a_case_without_regions(parity, parity_model, processor, golden, manifest):
    """The whole way from picture and question to text, as the released implementation goes."""
    case = next(case for case in manifest if case["name"] == "grounding")
    image = parity / "cases" / case["image"]
    chunks = list(
        stream_generate(parity_model, processor, image, case["turns"][0]["user"], max_tokens=24)
    )
    assert [chunk.token for chunk in chunks] == golden["grounding"]["generated"].tolist()
    assert "".join(chunk.text for chunk in chunks).strip() == case["text"].strip()


def test_text_of_the_chunks_is_the_decoded_answer(ask, processor):
    """A leading space, or half of a multi-byte character, must not leak into the stream."""
    for seed in range(4):
        chunks = ask(temp=3.0, max_tokens=40, seed=seed)
        text = "".join(chunk.text for chunk in chunks)
        ids = [chunk.token for chunk in chunks if chunk.token != processor.tokenizer.eos_token_id]
        assert text == processor.tokenizer.decode(ids)


def test_generate_is_the_joined_stream(ask, parity_model, processor, image):
    text = generate(parity_model, processor, image, QUESTION, REGION, max_tokens=6)
    assert text == "".join(chunk.text for chunk in ask(max_tokens=6))


def test_fields(ask, processor, image):
    chunks = ask(max_tokens=5)
    inputs = processor(image, QUESTION, REGION)
    assert [chunk.generation_tokens for chunk in chunks] == [1, 2, 3, 4, 5]
    assert {chunk.prompt_tokens for chunk in chunks} == {len(inputs.input_ids) + 63}
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert chunks[0].logprobs.shape == (32001,)
    assert all(chunk.prompt_tps > 0 and chunk.generation_tps > 0 for chunk in chunks)


def test_one_token(ask):
    (chunk,) = ask(max_tokens=1)
    assert chunk.finish_reason == "length" and chunk.text


def test_end_of_answer(ask, processor):
    """`</s>` ends the stream and is not part of the text."""
    third = ask(max_tokens=3)[2].token
    processor.tokenizer.eos_token_ids.add(third)
    try:
        chunks = ask(max_tokens=20)
    finally:
        processor.tokenizer.eos_token_ids.discard(third)
    assert len(chunks) == 3
    assert chunks[-1].finish_reason == "stop" and chunks[-1].token == third
    text = "".join(chunk.text for chunk in chunks)
    assert text == processor.tokenizer.decode([chunk.token for chunk in chunks[:2]])


def test_answer_ends_with_the_context(parity_model, processor, image, monkeypatch):
    length = len(processor(image, QUESTION, REGION).input_ids) + 63
    config = parity_model.config
    text = config.text | {"max_position_embeddings": length + 3}
    monkeypatch.setattr(parity_model, "config", replace(config, text=text))
    chunks = list(stream_generate(parity_model, processor, image, QUESTION, REGION))
    assert len(chunks) == 3 and chunks[-1].finish_reason == "length"


def test_prompt_longer_than_the_context(parity_model, processor, image):
    with pytest.raises(ValueError, match="context"):
        stream_generate(parity_model, processor, image, "word " * 2100)


def test_equal_seeds_give_equal_answers(ask):
    first = [chunk.token for chunk in ask(**SAMPLED, seed=3)]
    mx.random.uniform()  # what others draw does not matter
    assert [chunk.token for chunk in ask(**SAMPLED, seed=3)] == first
    assert [chunk.token for chunk in ask(**SAMPLED, seed=4)] != first


def test_seed_of_generate(parity_model, processor, image):
    args = (parity_model, processor, image, QUESTION, REGION)
    answers = [generate(*args, **SAMPLED, top_p=0.9, seed=seed) for seed in (5, 5, 6)]
    assert answers[0] == answers[1] != answers[2]


def test_seed_draws_the_points(processor, image):
    points = [processor(image, QUESTION, REGION, seed=seed).region_points for seed in (0, 0, 1)]
    assert mx.array_equal(points[0], points[1])
    assert not mx.array_equal(points[0], points[2])


def test_answers_in_progress_do_not_disturb_each_other(parity_model, processor, image, ask):
    alone = [chunk.token for chunk in ask(**SAMPLED, seed=3)]
    args = (parity_model, processor, image, QUESTION, REGION)
    streams = [stream_generate(*args, **SAMPLED, seed=seed) for seed in (3, 9)]
    together = [first.token for first, _ in zip(*streams, strict=True)]
    assert together == alone


def test_sampling_leaves_the_global_state_alone(ask):
    mx.random.seed(11)
    before = mx.random.state[0].tolist()
    ask(**SAMPLED, top_p=0.9)
    assert mx.random.state[0].tolist() == before


def test_top_p_and_temperature():
    probabilities = mx.array([[0.5, 0.3, 0.15, 0.05]])
    logprobs = mx.log(probabilities)

    def shares(temp, top_p):
        sample = keyed_sampler(temp, top_p, seed=1)
        drawn = [sample(logprobs).item() for _ in range(2000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    assert np.abs(shares(1.0, 1.0) - np.array(probabilities[0])).max() < 0.04
    assert np.abs(shares(1.0, 0.75) - np.array([0.625, 0.375, 0, 0])).max() < 0.04
    assert shares(0.1, 1.0)[0] > 0.95
    assert shares(0, 1.0)[0] == 1


def test_low_temperature_of_half_floats():
    """1 / temp is beyond float16, and all products were infinite: tokens at random."""
    logprobs = mx.log(mx.array([[0.2, 0.3, 0.5]])).astype(mx.float16)
    for seed in range(20):
        assert keyed_sampler(1e-5, 1.0, seed)(logprobs).item() == 2


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("kv_bits", [4, 8])
def test_quantized_cache(parity, processor, image, head_dim, kv_bits):
    """Close to the full cache, but not equal to it, from the first token on."""
    model = wide_headed(parity, head_dim)
    options = {"max_tokens": 3}
    full, quantized = (
        list(stream_generate(model, processor, image, QUESTION, REGION, **options, kv_bits=bits))
        for bits in (None, kv_bits)
    )
    difference = mx.abs(mx.exp(full[0].logprobs) - mx.exp(quantized[0].logprobs)).sum().item()
    assert 0 < difference < (0.3 if kv_bits == 4 else 0.03)


def test_quantized_cache_needs_wide_heads(ask):
    with pytest.raises(ValueError, match="multiple of 32, this model's are 12 wide"):
        ask(kv_bits=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"temp": -0.1}, "temp is -0.1"),
        ({"temp": float("nan")}, "temp is nan"),
        ({"temp": "hot"}, "temp is 'hot'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": None}, "top_p is None"),
        ({"seed": -1}, "seed is -1"),
        ({"kv_bits": 5}, "kv_bits is 5"),
        ({"kv_bits": True}, "kv_bits is True"),
    ],
)
def test_options_are_checked_before_any_work(parity_model, processor, options, message):
    """Not at the first `next`, and before the picture is opened."""
    with pytest.raises(ValueError, match=message):
        stream_generate(parity_model, processor, "no-such.png", QUESTION, REGION, **options)


def test_closing_an_answer_early(parity_model, processor, image, ask):
    stream = stream_generate(parity_model, processor, image, QUESTION, [Point(40, 60)])
    next(stream)
    stream.close()
    assert len(ask(max_tokens=2)) == 2
