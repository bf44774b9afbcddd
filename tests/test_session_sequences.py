"""Anything done to a session in any order: the next answer is that of a run that knows nothing."""

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.llama import TransformerBlock
from test_session import wide_headed

from ferret_mlx.conversation import encode_exchanges
from ferret_mlx.generation import generate, keyed_sampler, stream_answer, stream_generate
from ferret_mlx.processor import Processor, stack_points
from ferret_mlx.regions import Box, FreeForm, Point
from ferret_mlx.session import Session

STEPS = 40
CONTEXT = 330  # 64 of them for the picture: some turns fill it
PROMPTS = ("What is this?", "Sure?", "a " * 30)


def bars(*rows: tuple[int, int]) -> FreeForm:
    mask = np.zeros((150, 200), bool)
    for first, last in rows:
        mask[first:last, 10:42] = True
    return FreeForm(mask)


# The first two have the same coordinates, all 512 points, and so the same tokens.
REGIONS = (
    bars((20, 28), (68, 76)),
    bars((20, 24), (40, 48), (72, 76)),
    Box(20, 10, 90, 80),
    Point(40, 60),
)


@pytest.fixture(scope="module")
def model(parity):
    made = wide_headed(parity)
    text = made.config.text | {"max_position_embeddings": CONTEXT}
    made.config = replace(made.config, text=text)
    return made


@pytest.fixture(scope="module")
def processor(parity, model) -> Processor:
    return Processor(model.config, Processor.from_folder(parity / "checkpoint").tokenizer)


def assert_same(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert own.token == other.token
        assert mx.allclose(own.logprobs, other.logprobs, atol=1e-5)


class Doings:
    """One session, what is done to it, and what has to hold afterwards."""

    def __init__(self, model, processor, image, folder, monkeypatch, seed):
        self.model, self.processor, self.image = model, processor, image
        self.file, self.monkeypatch = folder / "state.safetensors", monkeypatch
        self.rng = np.random.default_rng(seed)
        self.session = Session(model, processor, image)
        # Of the whole conversation, or None where no single run could draw its points.
        self.seed: int | None = None
        self.regions: list = []
        self.saved = None
        self.compared = {"anew": 0, "generate": 0, "many": 0, "interrupted": 0, "dropped": 0}

    def question(self):
        regions = self.rng.choice(len(REGIONS), self.rng.integers(0, 3))
        return str(self.rng.choice(PROMPTS)), [REGIONS[index] for index in regions]

    def begin(self, seed=0, **options):
        """Ask; None where the context is full. Nothing has changed then."""
        prompt, regions = self.question()
        drop = bool(self.rng.integers(2))
        before = self.session.turns
        options |= {"seed": seed, "max_tokens": int(self.rng.integers(1, 7)), "drop_oldest": drop}
        try:
            chunks = self.session.ask(prompt, regions, **options)
        except ValueError as error:
            assert "drop_oldest=True" in str(error) and not drop
            assert self.session.turns == before
            self.reset()
            return None
        return chunks, len(before) // 2, regions, seed

    def asked(self, begun):
        """After the first token the question belongs to the conversation."""
        _, turns, regions, seed = begun
        dropped = turns + 1 - len(self.session.exchanges)
        self.compared["dropped"] += dropped > 0
        self.seed = seed if turns == 0 or (not dropped and seed == self.seed) else None
        self.regions += regions

    def ask(self, seed=0, cut=None, **options):
        if (begun := self.begin(seed, **options)) is None:
            return
        said = []
        for chunk in begun[0]:
            said.append(chunk)
            if len(said) == cut:
                begun[0].close()
        self.asked(begun)
        if "kv_bits" in options:
            return
        session = self.session
        ids, points = encode_exchanges(self.processor, session.exchanges)
        points = mx.array(stack_points(points))
        expected = stream_answer(
            self.model, self.processor.tokenizer, self.model.expand_ids(ids),
            lambda: self.model.embed_inputs(ids, session.pixel_values, points),
            max_tokens=len(said), sampler=keyed_sampler(0, 1, 0),
            prompt_cache=self.model.make_cache(),
        )  # fmt: skip
        assert_same(said, expected)
        self.compared["anew"] += 1
        if self.seed is not None:
            expected = stream_generate(
                self.model, self.processor, self.image, session.turns[:-1], self.regions,
                seed=self.seed, max_tokens=len(said),
            )  # fmt: skip
            assert_same(said, expected)
            self.compared["generate"] += 1

    def cut(self):
        self.ask(cut=1)

    def other_seed(self):
        self.ask(seed=1)

    def quantized(self):
        self.ask(kv_bits=8)

    def unread(self):
        self.begin()

    def left_open(self):
        if begun := self.begin():
            next(begun[0])
            self.asked(begun)

    def reset(self):
        self.session.reset()
        self.seed, self.regions = None, []

    def save(self):
        self.session.save(self.file)
        self.saved = (self.seed, list(self.regions))

    def load(self):
        if self.saved is None:
            return
        if self.rng.integers(2):
            self.session = Session(self.model, self.processor, self.image)
        self.session.load(self.file)
        self.seed, self.regions = self.saved[0], list(self.saved[1])

    def ask_many(self):
        questions = [self.question() for _ in range(3)]
        before = self.session.turns
        answers = self.session.ask_many(questions, max_tokens=3, batch_size=2)
        if self.rng.integers(2):
            self.session.forget_keys()
        if self.rng.integers(2):
            self.left_open()
            before = self.session.turns
        for answer in answers:
            question = (self.model, self.processor, self.image, *questions[answer.index])
            assert answer.text == generate(*question, max_tokens=3)
            self.compared["many"] += 1
        assert self.session.turns == before

    def interrupted(self):
        """Ctrl-C between two layers, in the first pass or a later one."""
        left, run = int(self.rng.integers(1, 12)), TransformerBlock.__call__

        def count_down(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return run(*args, **options)

        what = self.rng.choice(["ask", "ask_many", "save"])
        if self.rng.integers(2):
            self.session.forget_keys()
        begun = self.begin() if what == "ask" else None
        turns, said = self.session.turns, False
        with self.monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(TransformerBlock, "__call__", count_down)
            if what == "save":
                self.saved = None
                self.session.save(self.file)
                self.saved = (self.seed, list(self.regions))
            elif what == "ask_many":
                list(self.session.ask_many([self.question()], max_tokens=3))
            elif begun:
                for _ in begun[0]:
                    said = True
        if said:
            self.asked(begun)
        elif self.session.turns != turns:
            self.seed = None  # the oldest were dropped for a question that came to nothing
        self.compared["interrupted"] += left <= 0


@pytest.mark.parametrize("seed", [2, 4, 9, 12, 32])
def test_any_sequence(model, processor, parity, tmp_path, monkeypatch, seed):
    """Together the seeds notice each of: keys of a dropped turn's region kept, points drawn from a
    generator that an unread question has advanced, keys kept after an interrupt, and an answer
    that is still open while many are asked.
    """
    image = parity / "cases" / "wide.png"
    doings = Doings(model, processor, image, tmp_path, monkeypatch, seed)
    names = ["ask"] * 6 + [
        "cut", "other_seed", "quantized", "unread", "left_open", "reset", "save", "load",
        "ask_many", "interrupted",
    ]  # fmt: skip
    for name in doings.rng.choice(names, STEPS):
        getattr(doings, name)()
    assert min(doings.compared[kind] for kind in ("anew", "generate", "many", "dropped")) > 0
