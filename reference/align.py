"""Where the language stage starts: what the released recipe takes from LLaVA's first stage and
from a trained Vicuna, written down instead of learnt.

There a projector is trained until a patch's embedding lies near the words for what it shows. Here
it is solved for: a patch's embedding starts as its object's word plus codes of its box sides. And
there a language model starts that can attend by likeness; here some heads are given that.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import DenseSample, SceneStream, normalise
from .glyphs import NAMES
from .model import Twin
from .vision import IGNORE

WAVES = 16
SIDE_NORM = 0.6  # of each box side's code in a patch's embedding, where its word has norm 1
TEXT_MARK, PATCH_MARK = 0.7, 1.0  # norms of what all words, and all patches, have in common
SLOW_PAIRS = 14  # the rotary pairs that turn least: there likeness counts at any distance


def number_code(values: Tensor) -> Tensor:
    """Values in [0, 1] -> (..., 32) cosines and sines: near values have near codes."""
    waves = torch.arange(1, WAVES + 1) * torch.pi
    return torch.cat(
        [torch.cos(values[..., None] * waves), torch.sin(values[..., None] * waves)], -1
    )


@torch.no_grad()
def init_language(twin: Twin, tokenizer, numbers: range) -> None:
    """Words, projector and attention, in directions of the embedding space that do not mix."""
    width = twin.config.hidden_size
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    marks, sides = basis[:2], basis[2 : 2 + 8 * WAVES].unflatten(0, (4, 2 * WAVES))
    _init_words(twin, numbers, TEXT_MARK * marks[0])
    _init_projector(twin, tokenizer, sides)
    twin.mm_projector.bias += PATCH_MARK * marks[1]
    _init_attention(twin, marks[0])
    _init_look(twin, marks, sides)


def _init_words(twin: Twin, numbers: range, mark: Tensor) -> None:
    """Embeddings of norm about 1; numbers on a smooth curve; the output head starts alike."""
    table = twin.llama.model.embed_tokens.weight
    width = table.shape[1]
    table.normal_(0, width**-0.5)
    mixing = torch.randn(2 * WAVES, width) / (WAVES * width) ** 0.5
    table[numbers.start : numbers.stop] *= 0.2
    table[numbers.start : numbers.stop] += (
        number_code(torch.arange(len(numbers)) / len(numbers)) @ mixing
    )
    twin.llama.lm_head.weight.copy_(0.5 * table)
    table += mark


def _init_projector(twin: Twin, tokenizer, sides: Tensor, scenes: int = 400) -> None:
    """Least squares from a patch's features to its object's word and the codes of its box."""
    size, grid = twin.config.image_size, twin.config.grid
    vocabulary = tokenizer.get_vocab()
    ids = torch.tensor([vocabulary["\u2581" + name] for name in NAMES])
    # The output head's rows: the embeddings without what all words have in common.
    words = 2 * twin.llama.lm_head.weight[ids]
    # Background gets a word of its own, so that its patches are as long as the others.
    words = torch.cat([F.normalize(torch.randn_like(words[:1]), dim=-1), words])
    read, wanted = [], []
    stream = SceneStream("train", 0, DenseSample(size, grid))
    for (pixels, labels, boxes), _ in zip(stream, range(scenes), strict=False):
        features = twin.encode_image(normalise(torch.from_numpy(pixels)[None]))[0]
        labels, boxes = torch.from_numpy(labels), torch.from_numpy(boxes)
        codes = SIDE_NORM / WAVES**0.5 * torch.einsum("nsw,swd->nd", number_code(boxes), sides)
        told = labels != IGNORE
        labels = labels[told]
        read.append(features[told])
        wanted.append(words[labels] + codes[told] * (labels > 0)[:, None])
    read, wanted = torch.cat(read).double(), torch.cat(wanted).double()
    deviation = read.std(0)
    inputs = F.pad(read / deviation, (0, 1), value=1.0)
    gram = inputs.T @ inputs + len(inputs) * 1e-3 * torch.eye(inputs.shape[1]).double()
    # Least squares shrinks what it is unsure of; twice that stands out from the common mark.
    solved = 2 * torch.linalg.solve(gram, inputs.T @ wanted)
    twin.mm_projector.weight.copy_((solved[:-1] / deviation[:, None]).T)
    twin.mm_projector.bias.copy_(solved[-1])


def _slow_rows(head: int) -> list[int]:
    """The rows of a head that rotary positions turn slowest, the slowest pair last."""
    half = head // 2
    first = range(half - SLOW_PAIRS, half)
    return [row for i in first for row in (i, i + half)]


def _init_attention(twin: Twin, mark: Tensor) -> None:
    """Two heads of each layer look for tokens like their own, as trained attention does
    (arXiv 2305.09828), two at the words just before. All pass a part of what they see on, softly:
    a norm stretches embeddings of norm 1 to 16, and what a layer adds must not drown them."""
    width, head = twin.config.hidden_size, twin.config.hidden_size // twin.config.heads
    slow = _slow_rows(head)
    for layer in twin.llama.model.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
                if name.endswith("down_proj.weight"):
                    weight *= 0.05
        attention = layer.self_attn
        alike, passed = (torch.linalg.qr(torch.randn(width, width)).Q for _ in range(2))
        attention.v_proj.weight.copy_(passed)
        attention.o_proj.weight.copy_(0.05 * passed.T)
        for h in range(2):
            rows = slice(h * head, (h + 1) * head)
            look = torch.zeros(head, width)
            look[slow] = 1.4 * alike[h * len(slow) : (h + 1) * len(slow)]
            attention.q_proj.weight[rows] = look
            attention.k_proj.weight[rows] = look
        _look_back(attention, slice(2 * head, 3 * head), mark, distance=1, pairs=range(10))
        _look_back(attention, slice(3 * head, 4 * head), mark, distance=4, pairs=range(4, 14))


def _look_back(attention, rows: slice, mark: Tensor, distance: int, pairs: range) -> None:
    """A head that prefers words ``distance`` tokens back: all words share ``mark``, and rotary
    positions turn it by an angle that says how far apart two of them are."""
    head = rows.stop - rows.start
    query, key = torch.zeros(2, head, len(mark))
    for i in pairs:
        angle = torch.tensor(distance * 10000.0 ** (-2 * i / head))
        key[i] = 0.41 * mark
        query[i] = 0.41 * angle.cos() * mark
        query[i + head // 2] = -0.41 * angle.sin() * mark
    attention.q_proj.weight[rows] = query
    attention.k_proj.weight[rows] = key


def _init_look(twin: Twin, marks: Tensor, sides: Tensor) -> None:
    """In the first layer the two heads look from a word at the patches that show it, and bring
    their box to the word: one head x1 and y1, the other x2 and y2."""
    head = twin.config.hidden_size // twin.config.heads
    *slow, mark, _ = _slow_rows(head)
    attention = twin.llama.model.layers[0].self_attn
    for h in range(2):
        rows = slice(h * head, (h + 1) * head)
        first = torch.arange(rows.start, rows.stop)
        for projection, common in ((attention.q_proj, marks[0]), (attention.k_proj, marks[1])):
            # Likeness is of words: no part of it along the marks or the box sides.
            other = torch.cat([marks, sides.flatten(0, 1)])
            weight = projection.weight
            weight[rows] -= weight[rows] @ other.T @ other
            weight[first[slow]] *= 2.6 / weight[first[slow]].norm(dim=-1, keepdim=True)
            weight[first[[mark, mark + head // 2]]] = torch.stack([0.85 * common, 0 * common])
        carried = sides[2 * h : 2 * h + 2].flatten(0, 1)
        attention.v_proj.weight[rows] = carried[:head]
        attention.o_proj.weight[:, rows] = 0.1 * carried[:head].T
