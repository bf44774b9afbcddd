"""Training: the objective sees what inference computes, and both stages learn, stop and resume."""

import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ferret_mlx.prompt import IMAGE_TOKEN_INDEX
from ferret_mlx.tokenizer import Tokenizer
from reference import align, pretrain, train
from reference import samples as samples_module
from reference.config import TwinConfig
from reference.conversations import TURN_KINDS, Turn, region_of
from reference.data import dense_labels, normalise, pixels_of
from reference.glyphs import NAMES
from reference.layout import read_released, write_released
from reference.model import Twin
from reference.objective import answer_states, figures, region_loss, token_loss, turn_mask
from reference.pretrain import schedule
from reference.samples import ConversationSample, collate, prefix_ids
from reference.scenes import compose
from reference.vision import (
    BINS,
    IGNORE,
    DenseHeads,
    build_tower,
    dense_loss,
    init_tower,
    read_bins,
    soft_bins,
    tower_features,
)

IMAGE = 42
GRID, CELLS = 3, 9


@pytest.fixture(scope="module")
def numbers(tokenizer) -> range:
    zero = tokenizer.get_vocab()["0"]
    return range(zero, zero + 1000)


def tiny_config(tokenizer, **changes) -> TwinConfig:
    sizes = dict(vision_width=64, vision_mlp=96, vision_layers=3, vision_heads=1)
    sizes |= dict(hidden_size=128, mlp=192, layers=2, heads=2, image_size=IMAGE)
    return TwinConfig(
        vocab_size=len(tokenizer), region_token_id=tokenizer.region_token_id, **sizes | changes
    )


def tiny_twin(tokenizer) -> Twin:
    torch.manual_seed(0)
    twin = Twin(tiny_config(tokenizer)).eval()
    with torch.no_grad():  # as drawn, hidden states hardly depend on what came before
        for name, value in twin.llama.named_parameters():
            if "norm" not in name:
                value.normal_(0, 0.2)
    return twin


@pytest.fixture(scope="module")
def twin(tokenizer) -> Twin:
    return tiny_twin(tokenizer)


@pytest.fixture(scope="module")
def prefix(tokenizer) -> torch.Tensor:
    return torch.tensor(prefix_ids(tokenizer))


def make_batch(tokenizer_folder, chained=(False, True, False), turns=5, budget=200) -> dict:
    """Scenes of different lengths, the second one conversation."""
    return collate(
        [
            ConversationSample(tokenizer_folder, IMAGE, GRID, turns, budget, float(c))(
                compose("validation", n), np.random.default_rng(n)
            )
            for n, c in enumerate(chained)
        ]
    )


@pytest.fixture(scope="module")
def batch(tokenizer_folder) -> dict:
    return make_batch(tokenizer_folder)


def features_of(twin, batch) -> torch.Tensor:
    return twin.encode_image(normalise(batch["pixels"]))


def run_states(twin, batch, features, prefix):
    vectors = twin.region_geo_sampler(features, batch["points"], batch["picture"])
    return answer_states(twin, batch, features, vectors, prefix)


# What a token sees.


def test_turn_mask_by_brute_force():
    turn = torch.tensor([[1, 1, 2, 2, 3, -1], [1, 2, 2, 3, 3, 3]])
    chained = torch.tensor([False, True])
    image, prefix = 3, 2
    mask = turn_mask(turn, chained, image, prefix)
    assert mask.shape == (2, 1, image + 6, prefix + image + 6)
    for b in range(2):
        numbers = [0] * image + turn[b].tolist()
        for query, asks in enumerate(numbers):
            for key in range(-prefix, len(numbers)):
                sees = key < 0 or (key <= query and (numbers[key] in (0, asks) or bool(chained[b])))
                assert (mask[b, 0, query, key + prefix] == 0) == sees, (b, query, key)
    assert set(mask.unique().tolist()) == {0.0, -1e9}


@torch.no_grad()
@pytest.mark.parametrize("chained", [False, True], ids=["separate", "chained"])
def test_turns_are_isolated_unless_chained(twin, tokenizer_folder, prefix, chained):
    """Else an earlier answer gives a later one away, or a conversation cannot refer back."""
    batch = make_batch(tokenizer_folder, chained=(chained,), turns=6)
    features = features_of(twin, batch)
    states = run_states(twin, batch, features, prefix).hidden
    other = {**batch, "ids": batch["ids"].clone()}
    words = (batch["turn"] == 2) & (batch["ids"] != twin.config.region_token_id)
    other["ids"][words] = (batch["ids"][words] + 7) % 1000
    changed = run_states(twin, other, features, prefix).hidden
    difference = (states - changed).abs().amax(-1)
    turn = batch["turn"][batch["answer"]]
    assert turn.unique().tolist() == [1, 2, 3, 4, 5]
    assert difference[turn == 1].max() < 1e-5
    assert difference[turn == 2].min() > 1e-2
    if chained:
        assert difference[turn > 2].min() > 1e-3
    else:
        assert difference[turn > 2].max() < 1e-5


def plain_states(twin, batch, row, number, prefix) -> torch.Tensor:
    """Hidden states that predict a turn's answer, from the whole prompt as inference runs it."""
    turn = batch["turn"][row]
    upto = turn == number
    if batch["chained"][row]:
        upto = (turn >= 1) & (turn <= number)
    ids = batch["ids"][row][upto].tolist()
    regions = (batch["ids"][row] == twin.config.region_token_id).nonzero().flatten()
    wanted = upto[regions]
    points = batch["points"][batch["picture"] == row][wanted]
    prompt = [*prefix.tolist(), IMAGE_TOKEN_INDEX, *ids]
    pixels = normalise(batch["pixels"][row : row + 1])
    embedded = twin.embed_inputs(prompt, pixels, points)
    hidden = twin.llama.model(inputs_embeds=embedded).last_hidden_state[0]
    answers = int((batch["answer"][row] & (turn == number)).sum())
    return hidden[-answers - 1 : -1]


@torch.no_grad()
def test_training_sees_what_inference_computes(twin, batch, prefix):
    """The shared prefix, the packed turns, their positions and the padded batch give, for every
    answer of every sample, the states of its own plain prompt."""
    found = run_states(twin, batch, features_of(twin, batch), prefix)
    states, targets = found.hidden, found.targets
    rows = torch.arange(len(batch["ids"]))[:, None].expand_as(batch["ids"])[batch["answer"]]
    turns = batch["turn"][batch["answer"]]
    compared = 0
    for row in range(len(batch["ids"])):
        for number in turns[rows == row].unique().tolist():
            own = (rows == row) & (turns == number)
            expected = plain_states(twin, batch, row, number, prefix)
            assert (states[own] - expected).abs().max() < 1e-4, (row, number)
            assert targets[own][-1] == 2  # </s>
            compared += 1
    assert compared >= 12
    assert batch["chained"].tolist() == [False, True, False]
    assert states.std() > 0.1


def test_gradients_are_those_of_the_plain_prompt(tokenizer, tokenizer_folder, prefix, monkeypatch):
    """One question with a region, trained both ways. Would catch a prefix that is kept out of the
    gradient, or region vectors written in a way that cuts theirs."""
    twin = tiny_twin(tokenizer)
    scene = compose("validation", 0)
    region = region_of("silhouette", scene.objects[0], np.random.default_rng(0))
    turn = Turn("name", "What is [region0]?", "A dog.", (region,), (scene.objects[0],))
    monkeypatch.setattr(samples_module, "converse", lambda *_: [turn])
    batch = make_batch(tokenizer_folder, chained=(False,))
    states = run_states(twin, batch, features_of(twin, batch), prefix)
    found = gradients(twin, states.hidden, states.targets)
    expected = gradients(twin, plain_states(twin, batch, 0, 1, prefix), states.targets)
    assert set(found) == set(expected)
    assert {"tower", "mm_projector", "region_geo_sampler", "llama"} == {
        name.split(".")[0] for name in found
    }
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-6)
        assert (found[name] - value).abs().max() < 2e-3 * scale + 1e-6, name


def gradients(twin, states, targets) -> dict[str, torch.Tensor]:
    twin.zero_grad()
    F.cross_entropy(twin.llama.lm_head(states), targets).backward()
    return {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}


# Where heads look.


def attention_of(twin, tokens, layer, monkeypatch) -> torch.Tensor:
    """(1, H, L, L) weights of a layer for a whole plain prompt, as transformers computes them."""
    monkeypatch.setattr(twin.llama.config, "_attn_implementation", "eager")
    out = twin.llama.model(inputs_embeds=tokens, output_attentions=True)
    return out.attentions[layer]


@torch.no_grad()
def test_gaze_loss_reads_the_attention_of_inference(twin, tokenizer_folder, prefix, monkeypatch):
    """Against the weights that transformers gives for the plain prompt of one question: the share
    on the object's patches, and for an absent object that on the words before the image."""

    def find(target):
        return Turn("find", f"Where is the {target.name}?", "[1, 2, 3, 4]", boxed=(target,))

    def is_there(target):
        return Turn("yes_no", f"Is there a {target.name}?", "Yes.", sought=(target,))

    def is_not(target):
        return Turn("yes_no", "Is there a boat?", "No.", sought=())

    found = []
    for maker in (find, is_there, is_not):
        monkeypatch.setattr(
            samples_module, "converse", lambda scene, *_, ask=maker: [ask(scene.unique()[0])]
        )
        batch = make_batch(tokenizer_folder, chained=(False,))
        gaze = run_states(twin, batch, features_of(twin, batch), prefix).gaze
        own = batch["turn"][0] == 1
        prompt = [*prefix.tolist(), IMAGE_TOKEN_INDEX, *batch["ids"][0][own].tolist()]
        tokens = twin.embed_inputs(prompt, normalise(batch["pixels"]))
        weights = attention_of(twin, tokens, 1, monkeypatch)[0]
        at = (batch["look"][0] >= 0).nonzero().flatten()
        assert len(at) == (4 if maker is find else 1)
        shares = weights[:, len(prefix) + CELLS + at]
        if maker is is_not:
            seen = shares[..., : len(prefix)]
        else:
            cells = batch["cells"][0, batch["look"][0, at[0]]]
            assert 0 < cells.sum() < CELLS
            seen = shares[..., len(prefix) : len(prefix) + CELLS][..., cells]
        expected = -seen.sum(-1).log().mean()
        assert gaze.item() == pytest.approx(expected.item(), rel=1e-4)
        found.append(gaze.item())
    assert max(found) > 1.1 * min(found)


def test_gaze_loss_teaches_to_look(tokenizer, tokenizer_folder, prefix):
    """A few steps on it alone move the heads' attention; without questions that look it is 0."""
    twin = tiny_twin(tokenizer)
    batch = make_batch(tokenizer_folder)
    features = features_of(twin, batch).detach()
    optimizer = torch.optim.AdamW(twin.llama.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = run_states(twin, batch, features, prefix).gaze
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    batch["look"] = torch.full_like(batch["look"], -1)
    assert run_states(twin, batch, features, prefix).gaze == 0


# The loss.


def random_logits(numbers, targets, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(targets), numbers.stop + 5, generator=generator)


def test_token_loss_without_spread_is_cross_entropy(numbers):
    targets = torch.tensor([3, numbers.start, numbers.stop - 1, numbers.stop, 2, numbers[500]])
    logits = random_logits(numbers, targets)
    expected = F.cross_entropy(logits, targets)
    assert token_loss(logits, targets, numbers, 0.0).item() == pytest.approx(expected.item())
    assert token_loss(logits, targets, numbers, 0.05).item() == pytest.approx(expected.item())
    words = torch.tensor([3, 2, numbers.stop, numbers.start - 1])
    logits = random_logits(numbers, words)
    plain = F.cross_entropy(logits, words).item()
    assert token_loss(logits, words, numbers, 5.0).item() == pytest.approx(plain)


def test_region_loss_is_least_at_the_word():
    """It looks at directions only, and at no regions at all it is zero."""
    words = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    named = torch.tensor([3, 0])
    right = region_loss(3 * words[named], named, words)
    assert right == pytest.approx(region_loss(words[named], named, words).item(), rel=1e-5)
    assert right < region_loss(words[named] + words[[1, 2]], named, words)
    assert right < 0.05 < 2 < region_loss(words[[1, 2]], named, words)
    assert region_loss(torch.zeros(0, 16), named[:0], words) == 0


def test_token_loss_spreads_numbers():
    """Against a target distribution written out; weights sum to one at the canvas border too."""
    numbers, spread = range(10, 1010), 4.0
    targets = torch.tensor([10, 510, 1009, 3])
    logits = random_logits(numbers, targets)
    wanted = np.zeros(logits.shape)
    for row, target in enumerate(targets.tolist()):
        if target < 10:
            wanted[row, target] = 1
            continue
        for n in numbers:
            wanted[row, n] = math.exp(-((n - target) ** 2) / (2 * spread**2))
    wanted /= wanted.sum(1, keepdims=True)
    expected = -(wanted * logits.double().log_softmax(-1).numpy()).sum(1).mean()
    assert token_loss(logits, targets, numbers, spread).item() == pytest.approx(expected, rel=1e-5)


def test_near_numbers_cost_less_than_far_ones_and_words():
    numbers = range(10, 1010)
    target = torch.tensor([510])

    def cost(token):
        return token_loss(F.one_hot(torch.tensor([token]), 1020) * 12.0, target, numbers, 4.0)

    assert cost(510) < cost(513) < cost(560)
    assert cost(560) <= cost(3) + 1e-4


def test_figures():
    """Two pictures: in the first a name that is right, a name of which one word is wrong, and a
    box whose numbers are off; in the second a name that is right. Turn numbers repeat."""
    numbers = range(10, 1010)
    name, find = TURN_KINDS.index("name"), TURN_KINDS.index("find")
    batch = {
        "answer": torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
        > 0,
        "turn": torch.tensor(
            [[1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 1, -1, -1, -1, -1, -1, -1, -1, -1]]
        ),
        "kind": torch.tensor([[name] * 6 + [find] * 4, [name] * 2 + [-1] * 8]),
    }
    targets = torch.tensor([5, 2, 6, 2, 110, 210, 2, 5, 2])
    logits = F.one_hot(torch.tensor([5, 2, 7, 2, 113, 205, 2, 5, 2]), 1020).float()
    found = figures(logits, targets, batch, numbers)
    assert found == pytest.approx({"name": 2 / 3, "find": 1.0, "find_off": (3 + 5) / 2})


# Learning.


def test_a_few_steps_learn_a_batch(tokenizer, tokenizer_folder, prefix, numbers):
    torch.manual_seed(0)
    twin = Twin(tiny_config(tokenizer))
    align.init_words(twin, numbers)
    batch = make_batch(tokenizer_folder, chained=(False, True), turns=3)
    features = features_of(twin, batch).detach()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        states = run_states(twin, batch, features, prefix)
        loss = token_loss(twin.llama.lm_head(states.hidden), states.targets, numbers, 2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_schedule():
    rates = [schedule(step, 1000, warmup=100, floor=0.02) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == rates[100] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert schedule(5000, 1000, warmup=100, floor=0.02) == pytest.approx(0.02)


# The vision tower's stage.


def perfect_outputs(labels, boxes, grid):
    """Logits of heads that know everything."""
    flipped = labels.unflatten(1, (grid, grid)).transpose(1, 2).flatten(1)
    classes = len(NAMES) + 1
    here, transposed = (F.one_hot(v.clamp(min=0), classes) * 50.0 for v in (labels, flipped))
    return here, transposed, soft_bins(boxes).clamp(min=1e-9).log()


@pytest.fixture(scope="module")
def dense() -> tuple[torch.Tensor, torch.Tensor, int]:
    grid = 10
    made = [dense_labels(compose("validation", n), grid) for n in range(3)]
    labels = torch.from_numpy(np.stack([labels for labels, _ in made]))
    return labels, torch.from_numpy(np.stack([boxes for _, boxes in made])), grid


def test_dense_loss_of_perfect_heads(dense):
    labels, boxes, grid = dense
    assert (labels == IGNORE).any()
    here, transposed, box = perfect_outputs(*dense)
    loss, found = dense_loss((here, transposed, box), labels, boxes, grid)
    soft = soft_bins(boxes[labels > 0])
    entropy = -(soft * soft.clamp(min=1e-9).log()).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-3)
    assert found["here"] == found["transposed"] == 1
    assert found["iou"] > 0.999
    # Heads that do not transpose, and ones that swap x and y, are found out.
    wrong, seen = dense_loss((here, here, box), labels, boxes, grid)
    assert wrong > loss + 1 and seen["transposed"] < 0.7 and seen["here"] == 1
    swapped = perfect_outputs(labels, boxes[..., [1, 0, 3, 2]], grid)[2]
    wrong, seen = dense_loss((here, transposed, swapped), labels, boxes, grid)
    assert wrong > loss + 1 and seen["iou"] < 0.7


def test_dense_loss_passes_over_slivers_and_background_boxes(dense):
    labels, boxes, grid = dense
    here, transposed, box = perfect_outputs(*dense)
    loss, _ = dense_loss((here, transposed, box), labels, boxes, grid)
    slivers = labels == IGNORE
    here = here.clone()
    here[slivers] = torch.randn_like(here[slivers])
    box = box.clone()
    box[labels <= 0] = 0
    again, _ = dense_loss((here, transposed, box), labels, boxes, grid)
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)
    background = here.clone()
    background[labels == 0] = background[labels == 0].roll(1, -1)
    assert dense_loss((background, transposed, box), labels, boxes, grid)[0] > loss + 1


def test_bins():
    values = torch.tensor([0.0, 1.0, 0.5, 0.123, 0.9999, 1 / (BINS - 1), 1.2, -0.1])
    weights = soft_bins(values)
    assert weights.shape == (len(values), BINS)
    assert torch.allclose(weights.sum(-1), torch.ones(len(values)))
    assert (weights > 0).sum(-1).max() <= 2 and weights.min() >= 0
    read = read_bins(weights.clamp(min=1e-12).log())
    assert torch.allclose(read, values.clamp(0, 1), atol=1e-5)


@torch.no_grad()
def test_tower_starts_with_a_look_at_the_transposed_cell():
    """By positions alone, the last head of the last two layers attends from (row, column) most to
    (column, row): where the released sampler reads."""
    grid = 6
    config = TwinConfig(
        vocab_size=0, region_token_id=0, image_size=14 * grid, vision_width=128, vision_heads=2
    )
    torch.manual_seed(0)
    tower = build_tower(config)
    init_tower(tower, grid)
    inner = getattr(tower, "vision_model", tower)
    places = inner.embeddings.position_embedding.weight[1:].clone()
    places[:, 32:] = 0
    index = torch.arange(grid * grid).view(grid, grid)
    assert len(inner.encoder.layers) == config.vision_layers - 1
    for layer in inner.encoder.layers[-2:]:
        attention = layer.self_attn
        query, key = (project(places)[:, -64:] for project in (attention.q_proj, attention.k_proj))
        assert torch.equal((query @ key.T).argmax(-1), index.T.flatten())
    pixels = torch.randn(1, 3, 14 * grid, 14 * grid)
    patches = inner.embeddings.patch_embedding(pixels)
    assert patches[:, :32].abs().max() == 0 and patches[:, 32:].abs().min() > 0


def test_a_few_steps_of_the_vision_stage(dense):
    """A few steps of the first stage on one batch."""
    labels, boxes, grid = dense
    torch.manual_seed(0)
    config = TwinConfig(
        vocab_size=0, region_token_id=0, vision_width=64, vision_mlp=96, vision_layers=3,
        vision_heads=1,
    )  # fmt: skip
    tower, heads = build_tower(config), DenseHeads(64)
    init_tower(tower, grid)
    scenes = [compose("validation", n) for n in range(3)]
    pixels = torch.from_numpy(np.stack([pixels_of(s.image, config.image_size) for s in scenes]))
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=3e-3)
    losses = []
    for _ in range(12):
        outputs = heads(tower_features(tower, normalise(pixels)))
        loss, _ = dense_loss(outputs, labels, boxes, grid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


# Where the language stage starts.


def test_words_start_apart_and_numbers_on_a_curve(tokenizer, numbers):
    torch.manual_seed(0)
    twin = Twin(tiny_config(tokenizer, hidden_size=256))
    align.init_words(twin, numbers)
    table = twin.llama.model.embed_tokens.weight
    likeness = F.cosine_similarity(table, twin.llama.lm_head.weight, dim=-1)
    assert likeness.min() > 0.999  # the output head starts alike
    assert table.norm(dim=-1).min() > 0.6 and table.norm(dim=-1).max() < 1.6
    unit = F.normalize(table.detach(), dim=-1)
    inside = unit[numbers.start : numbers.stop]
    near, far = ((inside[:-gap] * inside[gap:]).sum(-1) for gap in (3, 300))
    assert near.min() > 0.7 and near.mean() > far.mean() + 0.5
    words = torch.tensor([tokenizer.get_vocab()["\u2581" + name] for name in NAMES])
    alike = unit[words] @ unit[words].T - torch.eye(len(words))
    assert alike.abs().max() < 0.4


@torch.no_grad()
def test_projector_starts_at_the_names(tokenizer, numbers, monkeypatch):
    """Features and heads where each object has its own direction, and each box side another four:
    a projected patch is nearest to the name of its object, whatever its box."""
    torch.manual_seed(0)
    width = 128
    twin = Twin(tiny_config(tokenizer, hidden_size=512, vision_width=width, vision_heads=2))
    align.init_words(twin, numbers)
    # Directions that do not touch the mean, which the heads' norm takes away.
    mean = torch.ones(width, 1)
    frame = torch.linalg.qr(torch.cat([mean, torch.randn(width, width - 1)], 1))[0].T[1:]
    kinds, sides = frame[: len(NAMES) + 1], frame[60:64]
    labels = torch.arange(len(NAMES) + 1).repeat(8)
    boxes = torch.rand(len(labels), 4)
    features = 10 * kinds[labels] + 4 * (boxes - 0.5) @ sides + 0.3 * torch.randn(1, width)
    heads = DenseHeads(width)
    heads.norm.weight.uniform_(0.8, 1.2)
    heads.norm.bias.normal_(0, 0.1)
    heads.here.weight.copy_(kinds)
    bins = torch.linspace(-1, 1, BINS)
    heads.box.weight.copy_((sides[:, None] * bins[:, None]).flatten(0, 1))
    monkeypatch.setattr(align, "_sample_features", lambda twin: features[None])
    align.init_projector(twin, heads, tokenizer)
    assert (heads(features)[0].argmax(-1) == labels).all()

    vocabulary = tokenizer.get_vocab()
    table = twin.llama.model.embed_tokens.weight
    names = table[torch.tensor([vocabulary["\u2581" + name] for name in NAMES])]
    embedded = twin.mm_projector(features)
    likeness = F.normalize(embedded, dim=-1) @ F.normalize(names, dim=-1).T
    of_object = labels > 0
    assert (likeness.argmax(-1) + 1 == labels)[of_object].float().mean() > 0.97
    own = likeness[of_object].gather(1, labels[of_object][:, None] - 1)
    assert own.mean() > 0.4
    assert likeness[~of_object].max() < own.mean() / 2  # background is near no name
    assert 0.5 < embedded.norm(dim=-1).median() < 3


# The two programs: what they write, and that they go on where they stopped.


def run(monkeypatch, program, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    program.main()


def steps_of(log) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_vision_stage_resumes_and_feeds_the_language_stage(tmp_path, monkeypatch, tokenizer):
    out = tmp_path / "vision"
    options = ["--out", out, "--batch", 2, "--workers", 1, "--save-every", 1]
    run(monkeypatch, pretrain, *options, "--steps", 1)
    first = torch.load(out / "state.pt", weights_only=True)
    run(monkeypatch, pretrain, *options, "--steps", 2)
    second = torch.load(out / "state.pt", weights_only=True)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["seconds"] >= first["seconds"]
    assert {int(s["step"]) for s in second["optimizer"]["state"].values()} == {2}
    assert steps_of(out / "log.jsonl") == [0]
    zero = tokenizer.get_vocab()["0"]
    args = Namespace(init=None, vision=out / "state.pt")
    twin = train.build(args, tokenizer, range(zero, zero + 1000))
    for name, value in twin.tower.state_dict().items():
        assert torch.equal(value, second["parts"][f"0.{name}"]), name
    assert twin.config.vocab_size == len(tokenizer)


def test_language_stage_resumes(tmp_path, monkeypatch, tokenizer_folder, tokenizer):
    """Would catch a resumed run that starts over, loses the optimizer, or reads from --init."""
    torch.manual_seed(0)
    twin = Twin(tiny_config(tokenizer))
    write_released(twin, tmp_path / "init", tokenizer_folder, torch.float32)
    out = tmp_path / "out"
    options = ["--init", tmp_path / "init", "--out", out, "--batch", 2, "--turns", 3]
    options += ["--workers", 1, "--save-every", 1, "--lr", 1e-2]
    run(monkeypatch, train, *options, "--steps", 1)
    first = torch.load(out / "state.pt", weights_only=True)
    run(monkeypatch, train, *options, "--steps", 3)
    second = torch.load(out / "state.pt", weights_only=True)
    assert (first["step"], second["step"]) == (1, 3)
    assert {int(s["step"]) for s in second["optimizer"]["state"].values()} == {3}
    head = "llama.lm_head.weight"
    assert not torch.equal(second["twin"][head], first["twin"][head])
    frozen = {n: v for n, v in twin.state_dict().items() if n.startswith("tower.")}
    assert all(torch.equal(second["twin"][n], v) for n, v in frozen.items())
    written = read_released(out / "released")
    for name, value in second["twin"].items():
        assert torch.equal(written.state_dict()[name], value.half().float()), name
    assert len(Tokenizer(out / "released")) == len(tokenizer)
