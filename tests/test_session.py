"""Follow-up questions: the answers of fresh runs, from new tokens alone."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.llama import LlamaModel
from PIL import Image

import ferret_mlx
from ferret_mlx import session as session_module
from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.generation import stream_generate
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.regions import Box, FreeForm, Point
from ferret_mlx.session import Session

EXACT = Box(10, 20, 41, 35)  # 32 x 16 pixels: all 512 points, whatever the seed


@pytest.fixture(scope="module")
def processor(parity) -> Processor:
    return Processor.from_folder(parity / "checkpoint")


@pytest.fixture(scope="module")
def image(parity):
    return parity / "cases" / "wide.png"


@pytest.fixture
def session(parity_model, processor, image) -> Session:
    return Session(parity_model, processor, image)


@pytest.fixture
def fresh(parity_model, processor, image):
    """Tokens of an answer to whole turns, by a run that knows nothing."""

    def run(turns, regions=(), **options):
        chunks = stream_generate(parity_model, processor, image, turns, regions, **options)
        return [chunk.token for chunk in chunks]

    return run


@pytest.fixture
def work(monkeypatch) -> dict:
    """How many images are encoded and positions evaluated."""
    counted = {"images": 0, "calls": []}
    encode, call = Model.encode_image, LlamaModel.__call__

    def counting_encode(self, *args):
        counted["images"] += 1
        return encode(self, *args)

    def counting_call(self, inputs, *args, **options):
        counted["calls"].append(inputs.shape[1])
        return call(self, inputs, *args, **options)

    monkeypatch.setattr(Model, "encode_image", counting_encode)
    monkeypatch.setattr(LlamaModel, "__call__", counting_call)
    return counted


@pytest.fixture
def says(monkeypatch):
    """Make the model say given tokens; everything else runs as ever."""

    def script(*tokens):
        def sampler(*_):
            rest = iter(tokens)
            return lambda logprobs: mx.array([next(rest, tokens[-1])])

        monkeypatch.setattr(session_module, "keyed_sampler", sampler)

    return script


def tokens_of(chunks) -> list[int]:
    return [chunk.token for chunk in chunks]


def test_follow_ups_are_those_of_a_fresh_run(session, fresh):
    """Regions are counted within their question, and their points drawn as in one conversation.

    The random model says pieces that its own tokenizer would not choose, so part of every answer
    has to be evaluated in the tokens of its text.
    """
    asked = [
        ("What is [region0]?", [Box(20, 10, 90, 80)]),
        ("Is [region1] like [region0]?", [Point(40, 60), EXACT]),
        ("And now?", []),
        ("What is this?", [Box(100, 5, 180, 140)]),
    ]
    regions = []
    for number, (prompt, given) in enumerate(asked):
        answer = tokens_of(session.ask(prompt, given, max_tokens=7))
        regions += given
        turns = session.turns
        assert len(turns) == 2 * number + 2 and turns[-1]["role"] == "assistant"
        assert answer == fresh(turns[:-1], regions, max_tokens=7)
    assert [turn["content"] for turn in session.turns[::2]] == [
        "What is [region0]?", "Is [region2] like [region1]?", "And now?", "What is this? [region3]",
    ]  # fmt: skip


def test_a_follow_up_evaluates_its_new_tokens_only(session, processor, says, work):
    tokenizer = processor.tokenizer
    answer = "A dog [10, 20, 773, 884] here."
    said = tokenizer.encode("ASSISTANT: " + answer)[len(tokenizer.encode("ASSISTANT:")) :]
    says(*said, tokenizer.eos_token_id)
    chunks = list(session.ask("What is [region0]?", [Box(20, 10, 90, 80)]))
    assert chunks[-1].finish_reason == "stop" and session.turns[1]["content"] == answer
    assert work["images"] == 1

    before, work["calls"][:] = session.tokens, []
    chunks = list(session.ask("Where is [region0]?", [Point(40, 60)]))
    whole = processor.encode_turns(session.turns[:3], ["[100, 66, 450, 533]", "[200, 400]"])[1]
    new = whole[len(whole) - work["calls"][0] :]
    # From the first token after </s>, which the cache holds.
    assert whole[-len(new) - 1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in new
    assert before + len(new) == processor.length(whole)
    assert chunks[0].prompt_tokens == len(new) < 40
    assert work == {"images": 1, "calls": [len(new)] + [1] * (len(work["calls"]) - 1)}
    assert len(work["calls"]) == len(chunks) + 1


def test_a_cut_answer_continues_as_its_text(session, fresh, work):
    """Closed by hand, by the next question, or never read."""
    stream = session.ask("What is this?", max_tokens=50)
    for _ in range(4):
        next(stream)
    stream.close()
    assert session.turns[1]["content"]
    assert tokens_of(session.ask("Sure?", max_tokens=4)) == fresh(session.turns[:3], max_tokens=4)

    stream = session.ask("Why?", max_tokens=50)
    next(stream)
    unread = session.ask("Who?", max_tokens=50)
    assert len(session.turns) == 6 and list(stream) == []
    answer = tokens_of(session.ask("When?", max_tokens=4))
    assert list(unread) == []
    assert [turn["content"] for turn in session.turns[::2]] == [
        "What is this?", "Sure?", "Why?", "When?",
    ]  # fmt: skip
    work["calls"].clear()
    assert answer == fresh(session.turns[:-1], max_tokens=4)
    assert work["calls"][0] == session.tokens - 4


@pytest.mark.parametrize("calls", [1, 4])
def test_interrupt_in_the_middle_of_a_step(session, fresh, monkeypatch, calls):
    """Ctrl-C between two layers leaves their caches at different positions."""
    layer = session.model.layers[1]
    run, left = type(layer).__call__, [3 * calls - 2]

    def interrupted(self, *args, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return run(self, *args, **options)

    tokens_of(session.ask("What is this?", max_tokens=3))
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(session.ask("Sure?", max_tokens=9))
    said = [turn["content"] for turn in session.turns]
    assert len(said) == (2 if calls == 1 else 4) and said[-1]
    answer = tokens_of(session.ask("Why?", max_tokens=4))
    assert answer == fresh(session.turns[:-1], max_tokens=4)


def test_reset_keeps_the_image(session, work):
    first = tokens_of(session.ask("What is [region0]?", [Box(20, 10, 90, 80)], max_tokens=5))
    tokens_of(session.ask("Sure?", max_tokens=5))
    session.reset()
    assert session.turns == [] and session.tokens == session.processor.length(session.prefix_ids)
    work["calls"].clear()
    again = session.ask("What is [region0]?", [Box(20, 10, 90, 80)], max_tokens=5)
    assert tokens_of(again) == first
    assert work["images"] == 1 and work["calls"][0] < 60


def test_other_seeds_draw_other_points(session):
    def points(seed):
        list(session.ask("What?", [Box(0, 0, 199, 149)], seed=seed, max_tokens=1))
        return session.exchanges[-1].points[0]

    drawn = [points(0), points(0), points(1), points(1)]
    assert len({array.tobytes() for array in drawn}) == 4
    session.reset()
    assert np.array_equal(points(0), drawn[0])


def test_answers_that_hold_placeholders(session, processor, fresh, says, monkeypatch):
    """A turn may not hold them, so they are left out when the conversation goes on."""
    tokenizer = processor.tokenizer
    piece = tokenizer.vocab["▁dog"]
    with monkeypatch.context():
        says(piece, tokenizer.region_token_id, piece, tokenizer.eos_token_id)
        list(session.ask("What is [region0]?", [EXACT]))
    monkeypatch.undo()
    assert session.turns[1]["content"] == "dog dog"
    answer = tokens_of(session.ask("Sure?", max_tokens=4))
    assert answer == fresh(session.turns[:-1], [EXACT], max_tokens=4)


@pytest.fixture
def small_context(parity_model, processor, monkeypatch):
    def make(context: int) -> Processor:
        config = parity_model.config
        config = replace(config, text=config.text | {"max_position_embeddings": context})
        monkeypatch.setattr(parity_model, "config", config)
        return Processor(config, processor.tokenizer)

    return make


def test_conversation_at_the_context_limit(parity_model, image, small_context):
    session = Session(parity_model, small_context(250), image)
    list(session.ask("a " * 40, max_tokens=8))
    turns, tokens = session.turns, session.tokens
    with pytest.raises(
        ValueError, match=r"^The conversation takes 2\d\d tokens, 64.* of 250.*reset"
    ):
        session.ask("b " * 40)
    with pytest.raises(ValueError, match="^The question takes .* shorten"):
        session.ask("b " * 200, drop_oldest=True)
    assert session.turns == turns and session.tokens == tokens
    # The answer ends with the context.
    chunks = list(session.ask("b", max_tokens=200))
    assert chunks[-1].finish_reason == "length" and session.tokens == 250


def test_oldest_turns_are_dropped_when_asked(parity_model, processor, image, small_context, work):
    """Two regions alike in the text: the first one's keys must not stand in for the second's."""
    bars = []
    for rows in (
        [*range(20, 28), *range(68, 76)],
        [*range(20, 24), *range(40, 48), *range(72, 76)],
    ):
        mask = np.zeros((150, 200), bool)
        mask[rows, 10:42] = True  # 512 pixels
        bars.append([FreeForm(mask)])
    options = {"max_tokens": 3, "drop_oldest": True}

    def two_turns(processor):
        session = Session(parity_model, processor, image)
        for region in bars:
            list(session.ask("What is [region0]?", region, **options))
        return session

    limit = two_turns(processor).tokens + 12
    session = two_turns(small_context(limit))
    assert len(session.turns) == 4
    work["images"] = 0
    answer = list(session.ask("Sure?", **options))
    assert len(session.turns) == 4 and session.tokens <= limit and work["images"] == 0
    expected = list(
        stream_generate(
            parity_model, session.processor, image, session.turns[:-1], bars[1], max_tokens=3
        )
    )
    for ours, theirs in zip(answer, expected, strict=True):
        assert ours.token == theirs.token
        assert mx.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "regions", "options", "message"),
    [
        (" ", [], {}, "empty"),
        (" ", [EXACT], {}, "empty"),
        ([{"role": "user", "content": "a"}], [], {}, "is a list, expected the next question"),
        ("[region1]?", [EXACT], {}, r"\[region1\], but 1 given"),
        ("What?", [Point(200, 1)], {}, "outside the picture"),
        ("<image>", [], {}, "<image>"),
        ("What?", [], {"max_tokens": 0}, "max_tokens is 0"),
        ("What?", [], {"kv_bits": 8}, "kv_bits needs"),
    ],
)
def test_refused_questions_change_nothing(session, prompt, regions, options, message):
    list(session.ask("What is [region0]?", [EXACT], max_tokens=2))
    turns, tokens = session.turns, session.tokens
    with pytest.raises(ValueError, match=message):
        session.ask(prompt, regions, **options)
    assert session.turns == turns and session.tokens == tokens


def test_refused_pictures(parity_model, processor, tmp_path):
    with pytest.raises(FileNotFoundError):
        Session(parity_model, processor, tmp_path / "missing.png")


def wide_headed(parity) -> Model:
    """Random weights, heads wide enough for a quantized cache."""
    values = read_config(parity / "checkpoint")
    values |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    mx.random.seed(0)
    model = Model(FerretConfig.from_dict(values))
    mx.eval(model.parameters())
    return model


def test_quantized_keys_and_values(parity, processor, image, work):
    model = wide_headed(parity)
    session = Session(model, processor, image)
    first = list(session.ask("What?", max_tokens=4, kv_bits=8))
    fresh = list(stream_generate(model, processor, image, "What?", max_tokens=4, kv_bits=8))
    for ours, expected in zip(first, fresh, strict=True):
        assert mx.allclose(ours.logprobs, expected.logprobs, atol=1e-5)
    assert all(isinstance(layer, QuantizedKVCache) for layer in session.prompt_cache.layers)
    small = session.kv_nbytes
    work["calls"].clear()
    list(session.ask("Sure?", max_tokens=2, kv_bits=8))
    assert sum(work["calls"]) < 64  # less than the image
    list(session.ask("Sure?", max_tokens=2))
    assert not any(isinstance(layer, QuantizedKVCache) for layer in session.prompt_cache.layers)
    assert session.kv_nbytes > 2 * small and work["images"] == 2


def test_session_is_public():
    assert ferret_mlx.Session is Session and "Session" in ferret_mlx.__all__


def test_what_a_session_shows(session):
    assert session.tokens == 0 and session.kv_nbytes == 0
    list(session.ask("What?", max_tokens=2))
    length = session.processor.length(session.prompt_cache.ids)
    assert session.tokens == length == session.prompt_cache.layers[0].offset
    # Three layers, keys and values, 256 places of 48 numbers in float32.
    assert session.kv_nbytes == 3 * 2 * 256 * 48 * 4
    assert repr(session) == (
        f"Session(200 x 150 pixels, 1 turns, {length} of 2048 tokens, keys and values 0.3 MB)"
    )


def test_saved_session_skips_the_image(session, parity_model, processor, image, tmp_path, work):
    """Turns, regions and the draw of further points go on as if nothing had happened."""
    list(session.ask("What is [region0]?", [Box(20, 10, 90, 80)], max_tokens=6))
    session.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    question = ("Is [region0] one?", [Box(100, 5, 180, 140)])
    expected = tokens_of(session.ask(*question, max_tokens=6))
    other = Session(parity_model, processor, Image.open(image))
    other.load(tmp_path / "state.safetensors")
    assert other.turns == session.turns[:2]
    assert tokens_of(other.ask(*question, max_tokens=6)) == expected
    assert other.turns == session.turns and work["images"] == 1
    # The points of saved regions are there when turns are evaluated anew.
    other.forget_keys()
    session.forget_keys()
    assert tokens_of(other.ask("Sure?", max_tokens=6)) == tokens_of(
        session.ask("Sure?", max_tokens=6)
    )


def test_a_session_saved_before_its_first_question(
    session, parity_model, processor, image, tmp_path, work
):
    session.save(tmp_path / "state.safetensors")
    expected = tokens_of(session.ask("What?", max_tokens=5))
    other = Session(parity_model, processor, image)
    other.load(tmp_path / "state.safetensors")
    work["calls"].clear()
    assert tokens_of(other.ask("What?", max_tokens=5)) == expected
    assert work["images"] == 1 and work["calls"][0] < 20


def test_saved_quantized_session(parity, processor, image, tmp_path):
    model = wide_headed(parity)
    session = Session(model, processor, image)
    list(session.ask("What?", max_tokens=3, kv_bits=8))
    session.save(tmp_path / "state.safetensors")
    other = Session(model, processor, image)
    other.load(tmp_path / "state.safetensors")
    sure = [list(s.ask("Sure?", max_tokens=3, kv_bits=8)) for s in (session, other)]
    assert tokens_of(sure[0]) == tokens_of(sure[1])
    assert sure[0][0].prompt_tokens == sure[1][0].prompt_tokens < 40


def test_saved_sessions_of_something_else(
    session, parity, parity_model, processor, image, tmp_path
):
    path = tmp_path / "state.safetensors"
    session.save(path)
    picture = np.array(Image.open(image).convert("RGB"))
    picture[:75] //= 2
    with pytest.raises(ValueError, match="state.safetensors was saved with another picture"):
        Session(parity_model, processor, picture).load(path)
    wide = Session(wide_headed(parity), processor, image)
    with pytest.raises(ValueError, match="another model"):
        wide.load(path)
    wrapped = Processor(replace(processor.config, use_im_start_end=True), processor.tokenizer)
    with pytest.raises(ValueError, match="another template"):
        Session(parity_model, wrapped, image).load(path)
    bias = parity_model.mm_projector.bias
    parity_model.mm_projector.bias = bias + 1
    try:
        with pytest.raises(ValueError, match="another model"):
            session.load(path)
    finally:
        parity_model.mm_projector.bias = bias
    session.load(path)


def test_files_that_are_no_session(session, tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved session"):
        session.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="end in .safetensors"):
        session.save(tmp_path / "state.npz")
    (tmp_path / "text.safetensors").write_text("no tensors")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    session.save(tmp_path / "keyless.safetensors")
    values, metadata = mx.load(str(tmp_path / "keyless.safetensors"), return_metadata=True)
    name = next(name for name in metadata if name.endswith("ferret"))
    metadata[name] = json.dumps(json.loads(metadata[name]) | {"key": "none"})
    mx.save_safetensors(str(tmp_path / "keyless.safetensors"), values, metadata)
    for name in ("text", "other", "keyless"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is not a saved session"):
            session.load(tmp_path / f"{name}.safetensors")
    with pytest.raises((ValueError, OSError)):
        session.save(tmp_path / "missing" / "state.safetensors")
    assert not (tmp_path / "missing").exists()
    assert session.turns == []
