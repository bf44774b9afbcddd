"""Where the language stage starts: what the released recipe takes from LLaVA's first stage.

There a projector is trained until a patch's embedding lies near the words for what it shows. Here
the pre-training heads already say, linearly, which object and which box a patch belongs to, so the
same start is written down: a patch's embedding is its object's word plus codes of its box sides.
"""

import torch
from torch import Tensor

from .data import SceneStream, normalise, pixels_of
from .glyphs import NAMES
from .model import Twin
from .vision import BINS, DenseHeads

WAVES = 16


def number_code(values: Tensor) -> Tensor:
    """Values in [0, 1] -> (..., 32) cosines and sines: near values have near codes."""
    waves = torch.arange(1, WAVES + 1) * torch.pi
    return torch.cat(
        [torch.cos(values[..., None] * waves), torch.sin(values[..., None] * waves)], -1
    )


def _mixing(width: int) -> Tensor:
    """(32, D): codes into random directions, of norm about 1."""
    return torch.randn(2 * WAVES, width) / (WAVES * width) ** 0.5


@torch.no_grad()
def init_words(twin: Twin, numbers: range) -> None:
    """Embeddings of norm about 1; numbers on a smooth curve; the output head starts alike."""
    table = twin.llama.model.embed_tokens.weight
    width = table.shape[1]
    table.normal_(0, width**-0.5)
    code = number_code(torch.arange(len(numbers)) / len(numbers)) @ _mixing(width)
    table[numbers.start : numbers.stop] *= 0.2
    table[numbers.start : numbers.stop] += code
    twin.llama.lm_head.weight.copy_(0.5 * table)


@torch.no_grad()
def init_attention(twin: Twin) -> None:
    """Weights at the scale of their width, and two heads of each layer that look for tokens like
    their own and pass their content on (as trained attention does; arXiv 2305.09828). The rows
    used are those that rotary positions turn slowest, so that likeness counts at any distance."""
    width, head = twin.config.hidden_size, twin.config.hidden_size // twin.config.heads
    slow = [i for i in range(head) if i % (head // 2) >= head // 2 - 14]
    for layer in twin.llama.model.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight *= (2 * twin.config.layers) ** -0.5
        attention = layer.self_attn
        alike = torch.linalg.qr(torch.randn(width, width)).Q
        passed = torch.linalg.qr(torch.randn(width, width)).Q
        for h in range(2):
            rows = slice(h * head, (h + 1) * head)
            look = torch.zeros(head, width)
            look[slow] = 1.4 * alike[h * len(slow) : (h + 1) * len(slow)]
            attention.q_proj.weight[rows] = look
            attention.k_proj.weight[rows] = look
            attention.v_proj.weight[rows] = passed[rows]
            attention.o_proj.weight[:, rows] = 0.5 * passed[rows].T


def _sample_features(twin: Twin, count: int = 32) -> Tensor:
    stream = SceneStream(
        "train", 0, lambda scene, _: pixels_of(scene.image, twin.config.image_size)
    )
    pixels = [torch.from_numpy(p) for p, _ in zip(stream, range(count), strict=False)]
    return twin.encode_image(normalise(torch.stack(pixels)))


@torch.no_grad()
def init_projector(twin: Twin, heads: DenseHeads, tokenizer) -> None:
    """Folds the heads' norm (its deviation taken as constant) and read-outs into the projector."""
    features = _sample_features(twin).flatten(0, 1)
    width, out = twin.config.vision_width, twin.config.hidden_size
    centre = torch.eye(width) - 1 / width
    deviation = (features @ centre).pow(2).mean(-1).sqrt().mean()
    fold = heads.norm.weight[:, None] / deviation * centre
    words = torch.zeros(len(NAMES) + 1, out)  # background: nothing
    vocabulary = tokenizer.get_vocab()
    table = twin.llama.model.embed_tokens.weight
    for i, name in enumerate(NAMES):
        words[i + 1] = table[vocabulary["\u2581" + name]]
    code = number_code(torch.linspace(0, 1, BINS))
    parts = [(heads.here.weight, heads.here.bias, words)]
    for weight, bias in zip(heads.box.weight.split(BINS), heads.box.bias.split(BINS), strict=True):
        parts.append((weight, bias, code @ _mixing(out)))
    # A little of everything else the features hold, of norm about 0.5.
    noise = torch.randn(out, width) * 0.5 / (deviation * (out * width) ** 0.5)
    weight, bias = noise @ centre, torch.zeros(out)
    for read, offset, directions in parts:
        middle = torch.eye(len(read)) - 1 / len(read)
        map_, constant = middle @ read @ fold, middle @ (read @ heads.norm.bias + offset)
        written = (features @ map_.T + constant) @ directions
        scale = 1 / written.norm(dim=-1).quantile(0.8)
        weight += scale * directions.T @ map_
        bias += scale * directions.T @ constant
    twin.mm_projector.weight.copy_(weight)
    twin.mm_projector.bias.copy_(bias)
