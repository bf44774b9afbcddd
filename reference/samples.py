"""A scene and its conversation as one training sample: ids, loss mask, turn numbers, points.

The picture is encoded once for many turns. In most samples the turns do not see each other (each
is a first question, and no answer gives another away); in the rest they are one conversation.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ferret_mlx.prompt import IMAGE_TOKEN_INDEX, build_prompt, tokenize_prompt
from ferret_mlx.regions import sample_points
from ferret_mlx.tokenizer import Tokenizer

from .conversations import TURN_KINDS, Turn, converse
from .data import cell_shares, own_cells, pixels_of
from .glyphs import NAMES
from .scenes import Scene, SceneObject


@dataclass
class Sample:
    pixels: np.ndarray  # uint8 (S, S, 3)
    ids: np.ndarray  # (T,) tokens after the image
    answer: np.ndarray  # (T,) bool: the token belongs to an answer and is learnt
    turn: np.ndarray  # (T,) from 1; 0 is the image
    kind: np.ndarray  # (T,) index into TURN_KINDS
    position: np.ndarray  # (T,) counted from the end of the image
    points: np.ndarray  # (R, 512, 2), in the order of the region tokens
    named: np.ndarray  # (R,) index into NAMES of what each region shows
    look: np.ndarray  # (T,) row of ``cells`` that the state at a token should look at; -1: free
    cells: np.ndarray  # (K, N) bool: patches of an object; all False: it is not in the picture
    chained: bool  # turns see the earlier ones


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids before the image, the same in every prompt."""
    ids = tokenize_prompt(build_prompt("?")[0], tokenizer)
    return ids[: ids.index(IMAGE_TOKEN_INDEX)]


class ConversationSample:
    def __init__(
        self, tokenizer_folder, image_size: int, grid: int, turns: int, budget: int, chained: float
    ):
        self.folder, self.image_size, self.grid = tokenizer_folder, image_size, grid
        self.turns, self.budget, self.chained = turns, budget, chained
        self._tokenizer: Tokenizer | None = None

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Sample:
        if self._tokenizer is None:  # made in the worker process
            self._tokenizer = Tokenizer(self.folder)
            zero = self._tokenizer.get_vocab()["0"]
            self._numbers = range(zero, zero + 1000)
        own = own_cells(cell_shares(scene, self.grid))
        cells: list[np.ndarray] = []
        look: list[int] = []
        chained = rng.random() < self.chained
        ids, answer, number, kind, position = [], [], [], [], []
        points: list[np.ndarray] = []
        named: list[int] = []
        for turn in converse(scene, rng, self.turns):
            first = not chained or not ids
            asked, said = self.tokens(turn, scene.size, first)
            if len(ids) + len(asked) + len(said) > self.budget:
                continue
            start = len(ids) if chained else 0
            index = max(number, default=0) + 1
            length = len(asked) + len(said)
            ids += asked + said
            answer += [False] * len(asked) + [True] * len(said)
            number += [index] * length
            kind += [TURN_KINDS.index(turn.kind)] * length
            position += range(start, start + length)
            order = self._order(turn)
            points += [sample_points(turn.regions[i].mask(scene.size), rng) for i in order]
            named += [NAMES.index(turn.targets[i].name) for i in order]
            look += [-1] * length
            for at, objects in self._looks(turn, said):
                look[len(ids) - len(said) + at - 1] = len(cells)  # the token before predicts it
                mine = [any(o is other for other in objects) for o in scene.objects]
                cells.append(own[mine].any(0))
        return Sample(
            pixels_of(scene.image, self.image_size),
            np.array(ids, np.int64),
            np.array(answer, bool),
            np.array(number, np.int64),
            np.array(kind, np.int64),
            np.array(position, np.int64),
            np.array(points, np.float32).reshape(-1, 512, 2),
            np.array(named, np.int64),
            np.array(look, np.int64),
            np.array(cells, bool).reshape(-1, self.grid**2),
            chained,
        )

    def _looks(self, turn: Turn, said: list[int]) -> list[tuple[int, tuple[SceneObject, ...]]]:
        """(index into the answer's tokens, objects to look at for it): a box's numbers and its
        object, yes or no and what was asked for."""
        if turn.sought is not None:
            return [(0, turn.sought)]
        numbers = [i for i, token in enumerate(said) if token in self._numbers]
        return [(i, (turn.boxed[n // 4],)) for n, i in enumerate(numbers)]

    @staticmethod
    def _order(turn: Turn) -> list[int]:
        texts = ["[0, 0]"] * len(turn.regions)
        return build_prompt(turn.question, texts)[1]

    def tokens(self, turn: Turn, size, first: bool) -> tuple[list[int], list[int]]:
        """Ids of a turn's question (open answer included) and of its answer with ``</s>``."""
        texts = [region.text(size) for region in turn.regions]
        prompt = build_prompt(turn.question, texts)[0]
        tail = prompt.split("<image>")[1]
        if not first:
            tail = "USER: " + tail.removeprefix("\n")
        asked = self._tokenizer.encode(tail)
        whole = self._tokenizer.encode(f"{tail} {turn.answer}</s>")
        return asked[1:], whole[len(asked) :]


def _stacked(tables: list[np.ndarray]) -> np.ndarray:
    """(K, N) tables of different K -> (B, K', N), filled up with False."""
    rows = max(1, *(len(table) for table in tables)) if tables else 1
    return np.stack([np.pad(table, ((0, rows - len(table)), (0, 0))) for table in tables])


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pads with turn -1; region points of the whole batch in one array with their picture."""
    # Few different lengths, so that compiled code is seldom compiled again.
    length = -(-max(len(s.ids) for s in samples) // 80) * 80

    def padded(values, fill):
        rows = [np.pad(v, (0, length - len(v)), constant_values=fill) for v in values]
        return torch.from_numpy(np.stack(rows))

    return {
        "pixels": torch.from_numpy(np.stack([s.pixels for s in samples])),
        "ids": padded([s.ids for s in samples], 0),
        "answer": padded([s.answer for s in samples], False),
        "turn": padded([s.turn for s in samples], -1),
        "kind": padded([s.kind for s in samples], -1),
        "position": padded([s.position for s in samples], 0),
        "chained": torch.tensor([s.chained for s in samples]),
        "points": torch.from_numpy(np.concatenate([s.points for s in samples])),
        "named": torch.from_numpy(np.concatenate([s.named for s in samples])),
        "picture": torch.from_numpy(
            np.repeat(np.arange(len(samples)), [len(s.points) for s in samples])
        ),
        "look": padded([s.look for s in samples], -1),
        "cells": torch.from_numpy(_stacked([s.cells for s in samples])),
    }
