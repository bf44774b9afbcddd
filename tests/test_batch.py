"""Many questions at once: the answers of asking one after the other."""

import numpy as np
import pytest
from mlx_lm.models.llama import LlamaModel

from ferret_mlx.batch import Answer
from ferret_mlx.generation import generate
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.regions import Box, FreeForm, Point
from ferret_mlx.session import Session

QUESTIONS = [
    ("What is [region0]?", [Box(20, 10, 90, 80)]),
    ("Is [region1] like [region0], or is it something else?", [Point(40, 60), Point(150, 100)]),
    ("Hm?", []),
    ("What is this?", [FreeForm.from_polygon([(0, 0), (50, 0), (0, 50)], (200, 150))]),
    ("What is [region0]?", [Box(100, 5, 180, 140)]),
]


@pytest.fixture(scope="module")
def processor(parity) -> Processor:
    return Processor.from_folder(parity / "checkpoint")


@pytest.fixture
def session(parity_model, processor, parity) -> Session:
    return Session(parity_model, processor, parity / "cases" / "wide.png")


def one_by_one(session, questions, **options) -> list[Answer]:
    answers = []
    for index, (prompt, regions) in enumerate(questions):
        session.reset()
        chunks = list(session.ask(prompt, regions, **options))
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        new = last.prompt_tokens
        answers.append(Answer(index, text, last.finish_reason, new, last.generation_tokens))
    session.reset()
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("options", [{}, {"temp": 0.7, "top_p": 0.9, "seed": 3}])
def test_answers_are_those_of_asking_one_by_one(session, batch_size, options):
    list(session.ask_many([], max_tokens=6))
    session.prefill_prefix(session.prompt_cache)
    expected = one_by_one(session, QUESTIONS, max_tokens=6, **options)
    together = session.ask_many(QUESTIONS, max_tokens=6, batch_size=batch_size, **options)
    assert sorted(together, key=lambda answer: answer.index) == expected


def test_each_answer_comes_as_it_ends(session, processor, monkeypatch):
    """A token that some answers reach early stands for </s>."""
    texts = {}
    for index, (prompt, regions) in enumerate(QUESTIONS):
        session.reset()
        texts[index] = [chunk.token for chunk in session.ask(prompt, regions, max_tokens=9)]
    stop = texts[2][4]
    monkeypatch.setattr(processor.tokenizer, "eos_token_ids", {stop})
    expected = one_by_one(session, QUESTIONS, max_tokens=9)
    answers = list(session.ask_many(QUESTIONS, max_tokens=9))
    lengths = [answer.generation_tokens for answer in answers]
    assert lengths == sorted(lengths) and lengths[0] <= 5
    assert answers[0].finish_reason == "stop" and answers[-1].finish_reason == "length"
    assert sorted(answers, key=lambda answer: answer.index) == expected


def test_one_image_and_one_pass_over_the_questions(session, monkeypatch):
    calls = []
    encode, call = Model.encode_image, LlamaModel.__call__

    def counting(self, inputs, *args, **options):
        calls.append(tuple(inputs.shape))
        return call(self, inputs, *args, **options)

    monkeypatch.setattr(Model, "encode_image", lambda *args: calls.append("image") or encode(*args))
    monkeypatch.setattr(LlamaModel, "__call__", counting)
    answers = list(session.ask_many(QUESTIONS, max_tokens=3))
    longest = max(answer.prompt_tokens for answer in answers)
    prefix = session.processor.length(session.prefix_ids)
    assert calls[:3] == ["image", (1, prefix), (5, longest - 1)]
    assert set(calls[3:]) == {(5, 1)}
    calls.clear()
    list(session.ask_many(QUESTIONS[:1], max_tokens=2))
    assert "image" not in calls and (1, prefix) not in calls


def test_the_conversation_stays_as_it_is(session):
    list(session.ask("What is [region0]?", [Point(40, 60)], max_tokens=5))
    turns, tokens, points = session.turns, session.tokens, session.rng.bit_generator.state
    expected = [chunk.token for chunk in session.ask("Sure?", max_tokens=4)]
    other = Session(session.model, session.processor, np.zeros((150, 200, 3), np.uint8))
    other.pixel_values = session.pixel_values
    list(other.ask("What is [region0]?", [Point(40, 60)], max_tokens=5))
    many = list(other.ask_many(QUESTIONS, max_tokens=4))
    assert other.turns == turns and other.tokens == tokens
    assert other.rng.bit_generator.state == points
    assert [chunk.token for chunk in other.ask("Sure?", max_tokens=4)] == expected
    assert sorted(many, key=lambda answer: answer.index) == one_by_one(
        other, QUESTIONS, max_tokens=4
    )


def test_interrupted_before_the_first_answer(session, monkeypatch):
    """Ctrl-C between two layers: what the first have taken in must not be there twice."""
    expected = one_by_one(session, QUESTIONS, max_tokens=4)
    session.forget_keys()
    layer = type(session.model.layers[0])
    run, calls = layer.__call__, []

    def interrupted(*args, **options):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.ask_many(QUESTIONS, max_tokens=4))
    texts = [answer.text for answer in expected]
    many = sorted(session.ask_many(QUESTIONS, max_tokens=4), key=lambda answer: answer.index)
    assert [answer.text for answer in many] == texts


def test_a_question_asked_before_the_answers_are_read(session, parity_model, processor, parity):
    """The first one of a session: its keys and values are not known to be there before its end."""
    image = parity / "cases" / "wide.png"
    answers = session.ask_many(QUESTIONS[:1], max_tokens=4)
    stream = session.ask("What is this?", max_tokens=9)
    next(stream)
    (many,) = answers
    assert many.text == generate(parity_model, processor, image, *QUESTIONS[0], max_tokens=4)
    assert list(stream) == []  # ended, as by any other question
    said = "".join(chunk.text for chunk in session.ask("Sure?", max_tokens=4))
    assert said == generate(parity_model, processor, image, session.turns[:-1], max_tokens=4)


def test_answer_ends_with_the_context(session, monkeypatch):
    (whole,) = session.ask_many([("What?", [])], max_tokens=9)
    config = session.processor.config
    length = session.processor.length(session.prefix_ids) + whole.prompt_tokens
    monkeypatch.setitem(config.text, "max_position_embeddings", length + 3)
    (cut,) = session.ask_many([("What?", [])], max_tokens=9)
    assert cut.generation_tokens == 3 and cut.finish_reason == "length"
    monkeypatch.setitem(config.text, "max_position_embeddings", length)
    with pytest.raises(ValueError, match="^Question 1: It takes .* shorten it"):
        session.ask_many([("a", []), ("What?", [])])


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ([("What?", []), (" ", [])], {}, "^Question 1: The prompt is empty"),
        ([("What?", [Point(200, 1)])], {}, r"^Question 0: \[region0\].*outside"),
        (["What?"], {}, r"^Question 0: got 'What\?', expected a pair"),
        ([("What?", [])], {"batch_size": 0}, "batch_size is 0"),
        ([("What?", [])], {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_refused_before_any_work(session, questions, options, message):
    with pytest.raises(ValueError, match=message):
        session.ask_many(questions, **options)
    assert session.features is None
