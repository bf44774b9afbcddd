"""The twin's vision tower (transformers' CLIP) and its pre-training on dense per-patch labels.

The released tower is CLIP, pre-trained on captions. The small one is pre-trained on what Ferret
needs of it: at each cell of the grid the object there, its box, and the object at the transposed
cell, because that is where the released sampler reads (row x, column y).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from .config import TwinConfig
from .glyphs import NAMES

BINS = 25  # per box side; a side is read off as the mean of its distribution
IGNORE = -100


def build_tower(config: TwinConfig) -> CLIPVisionModel:
    """Only the layers that Ferret runs (``mm_vision_select_layer = -2`` drops the last)."""
    return CLIPVisionModel(config.clip(config.vision_layers - 1))


def tower_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, n*n, C): the last run layer's states, no class token, no final norm."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:]


def _place_code(n: int) -> Tensor:
    """(n, 16): cosines and sines of an index; inner products peak at equal indices."""
    index = torch.arange(n)[:, None]
    wave = torch.arange(1, 9)[None] * math.pi / n
    return torch.cat([torch.cos(index * wave), torch.sin(index * wave)], -1)


@torch.no_grad()
def init_tower(tower: CLIPVisionModel, grid: int) -> None:
    """Positions start as codes of row and column, and one head of each of the last two layers as a
    look at the transposed cell. Training is free to change both; it finds the transposed cell in
    minutes instead of hours."""
    inner = getattr(tower, "vision_model", tower)
    width = inner.embeddings.patch_embedding.weight.shape[0]
    code = _place_code(grid)
    rows = code[:, None].expand(grid, grid, 16).reshape(-1, 16)
    columns = code[None].expand(grid, grid, 16).reshape(-1, 16)
    positions = inner.embeddings.position_embedding.weight
    positions[1:, :32] = torch.cat([rows, columns], -1)
    positions[0, :32] = 0
    inner.embeddings.patch_embedding.weight[:32] = 0
    for layer in inner.encoder.layers[-2:]:
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        last = slice(width - 64, width)
        q.weight[last], k.weight[last] = 0, 0
        eye = torch.eye(32) * 1.5
        q.weight[width - 64 : width - 32, :32] = eye
        k.weight[width - 64 : width - 32, :32] = eye.roll(16, 0)


class DenseHeads(nn.Module):
    """Linear read-outs used in pre-training only: what the features must make plain."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.here = nn.Linear(width, len(NAMES) + 1)
        self.transposed = nn.Linear(width, len(NAMES) + 1)
        self.box = nn.Linear(width, 4 * BINS)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> two (B, N, classes) and (B, N, 4, BINS) logits, in float32."""
        f = self.norm(features.float())
        with torch.autocast(f.device.type, enabled=False):
            box = self.box(f).unflatten(-1, (4, BINS))
            return self.here(f), self.transposed(f), box


def soft_bins(values: Tensor) -> Tensor:
    """Values in [0, 1] -> (..., BINS): weight on the two nearest of evenly spaced bins."""
    at = values.clamp(0, 1) * (BINS - 1)
    low = at.floor().clamp(max=BINS - 2)
    share = (at - low)[..., None]
    low = F.one_hot(low.long(), BINS)
    return low * (1 - share) + low.roll(1, -1) * share


def read_bins(logits: Tensor) -> Tensor:
    """(..., BINS) -> (...): the mean of the distribution, in [0, 1]."""
    return logits.softmax(-1) @ torch.linspace(0, 1, BINS, device=logits.device)


def dense_loss(outputs, labels: Tensor, boxes: Tensor, grid: int) -> tuple[Tensor, dict]:
    """labels (B, N) with 0 = background, boxes (B, N, 4) in [0, 1] -> loss and running figures."""
    here, transposed, box = outputs
    flipped = labels.unflatten(1, (grid, grid)).transpose(1, 2).flatten(1)
    loss_here = F.cross_entropy(here.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss_flip = F.cross_entropy(transposed.flatten(0, 1), flipped.flatten(), ignore_index=IGNORE)
    on_object = labels > 0
    loss_box = -(soft_bins(boxes[on_object]) * box[on_object].log_softmax(-1)).sum(-1).mean()
    with torch.no_grad():
        found = flipped > 0
        figures = {
            "here": (here.argmax(-1) == labels)[on_object].float().mean().item(),
            "transposed": (transposed.argmax(-1) == flipped)[found].float().mean().item(),
            "iou": _iou(read_bins(box[on_object]), boxes[on_object]).mean().item(),
        }
    return loss_here + loss_flip + loss_box, figures


def _iou(a: Tensor, b: Tensor) -> Tensor:
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    shared = size.prod(-1)
    total = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1)
    return shared / (total - shared).clamp(min=1e-6)
