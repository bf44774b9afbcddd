"""Pixels -> features: CLIP's vision transformer up to the hidden state that Ferret reads."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .config import VisionConfig

_ACTIVATIONS = {"quick_gelu": nn.gelu_fast_approx, "gelu": nn.gelu}


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        rows, columns = config.grid
        self.class_embedding = mx.zeros((config.hidden_size,))
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(rows * columns + 1, config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        # (B, S, S, 3) -> (B, rows, columns, C) -> (B, rows * columns, C)
        patches = self.patch_embedding(pixel_values).flatten(1, 2)
        class_token = mx.broadcast_to(
            self.class_embedding, (patches.shape[0], 1, patches.shape[-1])
        )
        return mx.concatenate([class_token, patches], axis=1) + self.position_embedding.weight


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        # (B, L, C) -> (B, heads, L, C / heads)
        queries, keys, values = (
            mx.unflatten(project(x), -1, (self.heads, -1)).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        return self.out_proj(mixed.transpose(0, 2, 1, 3).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.layers_used)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """CLIP ViT without what Ferret never reads: the last layer and the final layer norm.

    Parameters carry the names of Hugging Face's CLIPVisionModel after `vision_model.`.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.embeddings = VisionEmbeddings(config)
        # "layrnorm" is how the checkpoints spell it.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """(B, S, S, 3) normalised pixels -> (B, rows * columns, C), without the class token.

        Raises ValueError for pixels of another shape.
        """
        check_pixels(pixel_values, self.image_size)
        pixel_values = pixel_values.astype(self.pre_layrnorm.weight.dtype)
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))[:, 1:]


def check_pixels(pixel_values: mx.array, size: int) -> None:
    """Raises ValueError for anything but the pixels of square pictures of `size`."""
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != (size, size, 3):
        raise ValueError(
            f"pixel_values have shape {pixel_values.shape}, expected (B, {size}, {size}, 3)."
        )
