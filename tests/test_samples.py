"""Training samples: token by token what the processor makes of the same conversation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ferret_mlx.prompt import IMAGE_TOKEN_INDEX, build_prompt, tokenize_prompt
from ferret_mlx.regions import Box, FreeForm, Point
from reference import samples as samples_module
from reference.conversations import TURN_KINDS, Turn, converse
from reference.data import cell_shares, own_cells
from reference.glyphs import NAMES
from reference.samples import ConversationSample, Sample, collate, prefix_ids
from reference.scenes import Scene, compose

TURNS = 10
SIZE, GRID = 28, 2


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose("validation", number) for number in range(16)]  # 15: one of few with find_all


def sample(
    tokenizer_folder, scene: Scene, seed: int, chained: bool, budget: int = 10_000
) -> Sample:
    make = ConversationSample(tokenizer_folder, SIZE, GRID, TURNS, budget, chained=float(chained))
    return make(scene, np.random.default_rng(seed))


def turns_of(scene: Scene, seed: int) -> list[Turn]:
    """The turns that a sample of this seed is made of."""
    rng = np.random.default_rng(seed)
    rng.random()
    return converse(scene, rng, TURNS)


def dialogue(turns: list[Turn], scene: Scene) -> tuple[list[dict], list[str]]:
    """The turns as ferret_mlx takes them: regions counted through, every one named."""
    said, texts = [], []
    for turn in turns:
        question = turn.question
        if turn.regions and "[region0]" not in question:
            question += " [region0]"
        for i in reversed(range(len(turn.regions))):
            question = question.replace(f"[region{i}]", f"[region{len(texts) + i}]")
        texts += [region.text(scene.size) for region in turn.regions]
        said += [{"role": "user", "content": question}]
        said += [{"role": "assistant", "content": turn.answer}]
    return said, texts


def whole_ids(turns, scene, tokenizer) -> list[int]:
    return tokenize_prompt(build_prompt(*dialogue(turns, scene))[0], tokenizer)


def after_image(ids: list[int]) -> list[int]:
    return ids[ids.index(IMAGE_TOKEN_INDEX) + 1 :]


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "chained"])
def made(request, tokenizer_folder, scenes):
    """(chained, [(scene, turns, sample)])"""
    chained = request.param
    return chained, [
        (scene, turns_of(scene, seed), sample(tokenizer_folder, scene, seed, chained))
        for seed, scene in enumerate(scenes)
    ]


def test_prefix(tokenizer, scenes):
    ids = whole_ids(turns_of(scenes[0], 0)[:1], scenes[0], tokenizer)
    prefix = prefix_ids(tokenizer)
    assert ids[: len(prefix) + 1] == [*prefix, IMAGE_TOKEN_INDEX]
    assert prefix[0] == tokenizer.bos_token_id


def test_ids_are_those_of_the_whole_prompt(made, tokenizer):
    """Else training teaches another text than inference asks with: a space, a line break, a
    doubled BOS, or another role word after an answer."""
    chained, all_made = made
    for scene, turns, s in all_made:
        assert s.chained == chained
        if chained:
            assert s.ids.tolist() == after_image(whole_ids(turns, scene, tokenizer))
            continue
        for number, turn in enumerate(turns, 1):
            expected = after_image(whole_ids([turn], scene, tokenizer))
            assert s.ids[s.turn == number].tolist() == expected


def test_questions_are_those_of_inference(made, tokenizer):
    """Without its answer, a first turn is the prompt that generation starts from."""
    for scene, turns, s in made[1]:
        texts = [region.text(scene.size) for region in turns[0].regions]
        prompt = build_prompt(turns[0].question, texts)[0]
        asked = s.ids[(s.turn == 1) & ~s.answer].tolist()
        assert asked == after_image(tokenize_prompt(prompt, tokenizer))


def test_answer_mask(made, tokenizer):
    """Exactly the answers are learnt, their </s> included."""
    for _, turns, s in made[1]:
        for number, turn in enumerate(turns, 1):
            own = s.turn == number
            assert tokenizer.decode(s.ids[own & s.answer].tolist()) == f"{turn.answer}</s>"
            said = s.answer[own]
            assert not said[: -said.sum()].any()  # in one piece, at the end of the turn
            asked = tokenizer.decode(s.ids[own & ~s.answer].tolist())
            assert asked.endswith("ASSISTANT:")


def test_turn_numbers_and_positions(made):
    chained, all_made = made
    for _, turns, s in all_made:
        assert np.unique(s.turn).tolist() == list(range(1, len(turns) + 1))
        assert (np.diff(s.turn) >= 0).all()
        assert [TURN_KINDS[k] for k in s.kind] == [turns[n - 1].kind for n in s.turn]
        if chained:
            assert s.position.tolist() == list(range(len(s.ids)))
            continue
        for number in range(1, len(turns) + 1):
            own = s.position[s.turn == number]
            assert own.tolist() == list(range(len(own)))


def inside(points: np.ndarray, region, size) -> bool:
    """Whether all (512, 2) points are pixels of the region."""
    x, y = np.rint(points * size).astype(int).T
    return bool(region.mask(size)[x, y].all())


def test_one_row_of_points_per_region_token(made, tokenizer):
    for scene, turns, s in made[1]:
        regions = [region for turn in turns for region in turn.regions]
        assert s.points.shape == (len(regions), 512, 2) and s.points.dtype == np.float32
        assert (s.ids == tokenizer.region_token_id).sum() == len(regions)
        for points, region in zip(s.points, regions, strict=True):
            assert inside(points, region, scene.size)


@pytest.mark.parametrize("chained", [False, True])
def test_points_are_in_token_order(tokenizer_folder, scenes, monkeypatch, chained):
    """A question may name its second region first; its points then come first."""
    scene = scenes[0]
    w, h = scene.size
    corner = np.zeros((h, w), bool)
    corner[-20:, -20:] = True
    regions = (Box(0, 0, 20, 20), Point(w - 20, 20), FreeForm(corner))
    kinds = ("dog", "cat", "cup")
    shown = tuple(replace(scene.objects[0], name=kind) for kind in kinds)
    turns = [
        Turn("relate", "Is [region1] left of [region0]?", "No.", regions[:2], shown[:2]),
        Turn("name", "What is this?", "A dog.", regions[2:], shown[2:]),
    ]
    monkeypatch.setattr(samples_module, "converse", lambda *_: turns)
    s = sample(tokenizer_folder, scene, 0, chained)
    for points, region in zip(s.points, (regions[1], regions[0], regions[2]), strict=True):
        assert inside(points, region, scene.size)
    assert [NAMES[i] for i in s.named] == ["cat", "dog", "cup"]


def test_looks(made, tokenizer, scenes):
    """The token before each number of a box looks at the patches of that box's object, the one
    before yes or no at those of what was asked for; nothing else is told where to look."""
    asked = set()
    for scene, turns, s in made[1]:
        own = own_cells(cell_shares(scene, GRID))
        for number, turn in enumerate(turns, 1):
            start = int(np.flatnonzero(s.turn == number)[0])
            said = np.flatnonzero((s.turn == number) & s.answer)
            if turn.sought is not None:
                wanted = {said[0] - 1: own[[o in turn.sought for o in scene.objects]].any(0)}
            else:
                pieces = [tokenizer.decode([i]) for i in s.ids[said].tolist()]
                numbers = said[[piece.isdigit() for piece in pieces]]
                assert len(numbers) == 4 * len(turn.boxed)
                rows = [scene.objects.index(turn.boxed[n // 4]) for n in range(len(numbers))]
                wanted = dict(zip((numbers - 1).tolist(), own[rows], strict=True))
            asked |= {turn.kind} if wanted else set()
            for at in range(start, said[-1] + 1):
                if at not in wanted:
                    assert s.look[at] == -1
                else:
                    assert np.array_equal(s.cells[s.look[at]], wanted[at])
    assert asked == {"find", "yes_no", "name_box", "list", "find_all"}


def test_budget_drops_whole_turns(tokenizer_folder, tokenizer, scenes):
    """A turn that does not fit is left out with its points; shorter ones after it may still fit."""
    dropped = 0
    for seed, scene in enumerate(scenes):
        for chained in (False, True):
            s = sample(tokenizer_folder, scene, seed, chained, budget=90)
            turns = turns_of(scene, seed)
            assert len(s.ids) <= 90
            assert len(s.points) == (s.ids == tokenizer.region_token_id).sum()
            numbers = np.unique(s.turn).tolist()
            assert numbers == list(range(1, len(numbers) + 1))
            answers = [tokenizer.decode(s.ids[(s.turn == n) & s.answer]) for n in numbers]
            rest = iter(f"{turn.answer}</s>" for turn in turns)
            assert all(answer in rest for answer in answers)  # in order
            dropped += len(turns) - len(numbers)
    assert dropped > 10


def test_share_of_chained_samples(tokenizer_folder, scenes):
    make = ConversationSample(tokenizer_folder, SIZE, GRID, 1, 100, chained=0.2)
    drawn = [make(scenes[0], np.random.default_rng(seed)).chained for seed in range(300)]
    assert 0.13 < np.mean(drawn) < 0.27


def test_same_seed_same_sample(tokenizer_folder, scenes):
    one, other = (sample(tokenizer_folder, scenes[1], 4, False) for _ in range(2))
    assert np.array_equal(one.ids, other.ids) and np.array_equal(one.points, other.points)


def test_collate(tokenizer_folder, scenes, monkeypatch):
    """Padding belongs to no turn and to no answer; points keep the order of their pictures."""
    parts = [
        sample(tokenizer_folder, scene, seed, seed == 1, 150)
        for seed, scene in enumerate(scenes[:4])
    ]
    no_region = Turn("yes_no", "Is there a dog in the image?", "No.", sought=())
    monkeypatch.setattr(samples_module, "converse", lambda *_: [no_region])
    parts[2] = sample(tokenizer_folder, scenes[2], 2, False)
    batch = collate(parts)
    longest = max(len(s.ids) for s in parts)
    assert batch["ids"].shape[1] % 16 == 0 and 0 <= batch["ids"].shape[1] - longest < 16
    assert batch["pixels"].shape == (4, SIZE, SIZE, 3) and batch["pixels"].dtype == torch.uint8
    assert batch["chained"].tolist() == [False, True, False, False]
    assert batch["ids"].dtype == batch["position"].dtype == torch.int64
    assert batch["answer"].dtype == torch.bool
    for row, s in enumerate(parts):
        n = len(s.ids)
        for name in ("ids", "answer", "turn", "kind", "position", "look"):
            assert batch[name][row, :n].tolist() == getattr(s, name).tolist(), name
        assert not batch["answer"][row, n:].any()
        assert (batch["turn"][row, n:] == -1).all() and (batch["look"][row, n:] == -1).all()
        assert np.array_equal(batch["cells"][row, : len(s.cells)].numpy(), s.cells)
        assert not batch["cells"][row, len(s.cells) :].any()
        assert np.array_equal(batch["points"][batch["picture"] == row].numpy(), s.points)
    assert (batch["picture"].diff() >= 0).all()
