"""The training objective: answers only, many turns of one picture in one sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from .conversations import TURN_KINDS
from .model import Twin

GUIDED_HEADS = 2  # of the middle layer


def turn_mask(turn: Tensor, chained: Tensor, image: int, prefix: int) -> Tensor:
    """(B, T) turn numbers (-1 = padding) -> additive (B, 1, N + T, P + N + T) attention mask.

    A token sees the prefix, the image, and what precedes it in its own turn; in chained samples
    all that precedes it.
    """
    turn = F.pad(turn, (image, 0), value=0)
    same = (turn[:, None, :] == turn[:, :, None]) | (turn[:, None, :] == 0) | chained[:, None, None]
    causal = torch.ones(turn.shape[1], turn.shape[1], dtype=torch.bool, device=turn.device).tril()
    seen = F.pad(same & causal, (prefix, 0), value=True)
    return torch.zeros(seen.shape, device=turn.device).masked_fill(~seen, -1e9)[:, None]


@dataclass(frozen=True)
class States:
    """``hidden`` (M, D): the states that predict the answers' tokens ``targets`` (M,);
    ``gaze``: what ``gaze_loss`` of this batch came to."""

    hidden: Tensor
    targets: Tensor
    gaze: Tensor


def answer_states(
    twin: Twin, batch: dict, features: Tensor, vectors: Tensor, prefix: Tensor
) -> States:
    ids, count = batch["ids"], features.shape[1]
    text = twin.embed_tokens(ids)
    rows, columns = (ids == twin.config.region_token_id).nonzero(as_tuple=True)
    text = text.index_put((rows, columns), vectors.to(text.dtype))
    image = twin.mm_projector(features)
    states = torch.cat([image.to(text.dtype), text], 1)
    # The words before the image are the same in every sample: one pass serves the whole batch.
    cache = DynamicCache(config=twin.llama.config)
    twin.llama.model(inputs_embeds=twin.embed_tokens(prefix)[None], past_key_values=cache)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    order = torch.arange(count, device=ids.device).expand(len(ids), -1)
    position = torch.cat([order, batch["position"] + count], 1) + len(prefix)
    mask = turn_mask(batch["turn"], batch["chained"], count, len(prefix))
    # A middle layer: before it a token learns what is asked, after it what was seen becomes words.
    middle = len(twin.llama.model.layers) // 2
    guided = twin.llama.model.layers[middle]
    entered: dict = {}

    def keep(layer, args, kwargs):
        entered.update(states=args[0], rotary=kwargs["position_embeddings"])

    with guided.register_forward_pre_hook(keep, with_kwargs=True):
        hidden = twin.llama.model(
            inputs_embeds=states, attention_mask=mask, position_ids=position, past_key_values=cache
        ).last_hidden_state
    keys = cache.layers[middle].keys
    gaze = gaze_loss(guided, batch, **entered, keys=keys, mask=mask, image=count)
    learnt = F.pad(batch["answer"], (count, 0))
    return States(hidden[:, :-1][learnt[:, 1:]], ids[batch["answer"]], gaze)


def gaze_loss(layer, batch: dict, states, rotary, keys, mask, image: int) -> Tensor:
    """How little the first ``GUIDED_HEADS`` heads of a layer look at what an answer is about
    (supervised attention, arXiv 1609.04186): the patches of the object whose box is being given
    or that was asked for, or, where the picture shows none, the words before the image.

    ``states`` (B, N + T, D) enter the layer, ``rotary``: cosines and sines for them; ``keys``
    (B, H, P + N + T, E) rotated; ``mask`` as of ``turn_mask``.
    """
    rows, at = (batch["look"] >= 0).nonzero(as_tuple=True)
    if not len(rows):
        return states.sum() * 0
    cells = batch["cells"][rows, batch["look"][rows, at]]
    at = at + image
    heads = slice(0, GUIDED_HEADS)
    width = keys.shape[-1]
    attention = layer.self_attn
    query = attention.q_proj(layer.input_layernorm(states[rows, at])).unflatten(-1, (-1, width))
    cos, sin = (part.expand(len(states), -1, -1)[rows, at][:, None] for part in rotary)
    query = query[:, heads] * cos + rotate_half(query[:, heads]) * sin
    scores = torch.einsum("mhe,bhke->mbhk", query, keys[:, heads])  # small: few rows, few heads
    scores = scores[torch.arange(len(rows)), rows].float() * attention.scaling
    scores = scores + mask[rows, 0, at][:, None]
    before = keys.shape[2] - states.shape[1]
    wanted = F.pad(cells, (before, states.shape[1] - image))
    wanted[:, :before] = ~cells.any(-1, keepdim=True)
    seen = scores.masked_fill(~wanted[:, None], -torch.inf).logsumexp(-1) - scores.logsumexp(-1)
    return -seen.mean()


def region_loss(vectors: Tensor, named: Tensor, words: Tensor) -> Tensor:
    """How far region vectors (R, D) are from the embedding of what they show: ``named`` (R,)
    indices into ``words`` (names, D). It gives the sampler a signal before the LLM reads it."""
    if not len(vectors):
        return vectors.sum()
    likeness = F.normalize(vectors.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
    return F.cross_entropy(10 * likeness, named)


def token_loss(logits: Tensor, targets: Tensor, numbers: range, spread: float) -> Tensor:
    """Cross-entropy; a number's target is spread over its neighbours (normal, in canvas units),
    since a coordinate that is a little off is a little wrong, not wrong altogether."""
    logp = logits.float().log_softmax(-1)
    is_number = (targets >= numbers.start) & (targets < numbers.stop)
    plain = -logp[~is_number].gather(1, targets[~is_number][:, None]).sum()
    if spread <= 0 or not is_number.any():
        return (plain - logp[is_number].gather(1, targets[is_number][:, None]).sum()) / len(targets)
    value = torch.arange(len(numbers), device=logits.device)
    distance = (value[None] - (targets[is_number] - numbers.start)[:, None]) / spread
    share = torch.softmax(-0.5 * distance.square(), -1)
    near = -(share * logp[is_number][:, numbers.start : numbers.stop]).sum()
    return (plain + near) / len(targets)


@torch.no_grad()
def figures(logits: Tensor, targets: Tensor, batch: dict, numbers: range) -> dict[str, float]:
    """Per kind of turn the share of answers whose every word is right, and how far its numbers
    are off on the mean, in canvas units (earlier words and numbers of the answer being given)."""
    best, answer = logits.argmax(-1), batch["answer"]
    row = torch.arange(len(answer), device=answer.device)[:, None]
    turn, kind = (row * 1000 + batch["turn"])[answer], batch["kind"][answer]
    is_number = (targets >= numbers.start) & (targets < numbers.stop)
    right = (best == targets) | is_number
    off = (best - targets).abs().clamp(max=1000).float()
    found = {}
    for index, name in enumerate(TURN_KINDS):
        mine = kind == index
        if mine.any():
            count = len(turn[mine].unique())
            found[name] = 1 - len(turn[mine & ~right].unique()) / count
        if (mine & is_number).any():
            found[f"{name}_off"] = off[mine & is_number].mean().item()
    return found
