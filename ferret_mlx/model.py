"""The parts joined: vision tower, projector, region sampler and mlx_lm's llama."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from .checkpoint import is_buffer
from .config import FerretConfig
from .prompt import IMAGE_TOKEN_INDEX
from .region_sampler import RegionSampler
from .vision import VisionTower

# Released prefix -> ours; the first that fits counts.
_PREFIXES = (
    ("vision_model.", "vision_tower."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.", "mm_projector."),
    ("model.region_geo_sampler.", "region_sampler."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


class Model(nn.Module):
    """Ferret. Runs in mlx_lm's `generate_step` like its own models.

    Parameters: `language_model.*`, `mm_projector.*`, `region_sampler.*`, `vision_tower.*`.
    `tensor_group`: the processes that share the language model, None for this one alone.
    """

    tensor_group: mx.distributed.Group | None = None

    def __init__(self, config: FerretConfig):
        super().__init__()
        self.config = config
        self.model_type = "ferret"
        vision_width, text_width = config.vision.hidden_size, config.text["hidden_size"]
        self.vision_tower: nn.Module = VisionTower(config.vision)
        self.mm_projector = nn.Linear(vision_width, text_width)
        self.region_sampler = RegionSampler(
            vision_width, text_width, config.vision.grid, config.sampler
        )
        self.language_model = llama.Model(llama.ModelArgs.from_dict(config.text))

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """(1, L) ids, or (1, L, D) embeddings that take their place -> (1, L, V) logits."""
        return self.language_model(inputs, cache, input_embeddings)

    def next_logits(self, inputs: mx.array, cache: list[Any], embeddings: mx.array) -> mx.array:
        """(1, V) logits of what follows the last position; see `__call__`.

        Those of all positions of a prompt would take tens of megabytes and be thrown away.
        """
        text = self.language_model
        last = text.model(inputs, cache, embeddings)[:, -1]
        return text.model.embed_tokens.as_linear(last) if self.is_tied else text.lm_head(last)

    @property
    def is_tied(self) -> bool:
        """Whether the word embeddings are the output layer, too."""
        return self.config.text["tie_word_embeddings"]

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def encode_image(self, pixel_values: mx.array) -> mx.array:
        """(1, S, S, 3) normalised pixels -> (1, rows * columns, C) features."""
        return self.vision_tower(pixel_values)

    def embed_inputs(
        self,
        input_ids: Sequence[int],
        pixel_values: mx.array,
        region_points: mx.array | None = None,
        starts: Sequence[mx.array] | None = None,
        neighbors: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Prompt ids, image and regions -> (1, L, D), where the image takes rows * columns places.

        input_ids: one -200 for the image and a `<region_fea>` for each region after it.
        pixel_values, region_points, starts, neighbors: see `encode_image` and `RegionSampler`.

        Raises ValueError when image, regions and placeholders do not fit together.
        """
        self._check_image(input_ids)
        named = list(input_ids).count(self.config.region_token_id)
        region_count = 0 if region_points is None else region_points.shape[0]
        if named != region_count:
            raise ValueError(
                f"The prompt has {named} <region_fea> but region_points hold "
                f"{region_count} regions."
            )
        features = self.encode_image(pixel_values)
        vectors = None
        if region_points is not None and region_count:
            vectors = self.region_sampler(features, region_points, starts, neighbors)
        return self.embed_part(input_ids, features, vectors)

    def embed_part(
        self,
        input_ids: Sequence[int],
        features: mx.array,
        region_vectors: mx.array | None = None,
    ) -> mx.array:
        """Any part of a prompt, its image encoded already -> (1, L, D).

        input_ids: with or without the image's -200.
        features: (1, rows * columns, C) of `encode_image`.
        region_vectors: (R, D), one for each `<region_fea>` of this part, in text order.
        """
        ids = np.array(input_ids, dtype=np.int32)
        rows = self.language_model.model.embed_tokens(
            mx.array(np.where(ids == IMAGE_TOKEN_INDEX, 0, ids))
        )
        regions_at = np.flatnonzero(ids == self.config.region_token_id)
        if region_vectors is not None and regions_at.size:
            rows[mx.array(regions_at)] = region_vectors.astype(rows.dtype)
        if image_at := np.flatnonzero(ids == IMAGE_TOKEN_INDEX).tolist():
            image = self.mm_projector(features)[0].astype(rows.dtype)
            rows = mx.concatenate([rows[: image_at[0]], image, rows[image_at[0] + 1 :]])
        return rows[None]

    def expand_ids(self, input_ids: Sequence[int]) -> mx.array:
        """(L,) ids, one for each row of `embed_part`; the image's are 0 (they are not read)."""
        rows, columns = self.config.vision.grid
        ids = np.array(input_ids, dtype=np.int32)
        places = np.where(ids == IMAGE_TOKEN_INDEX, rows * columns, 1)
        return mx.array(np.repeat(np.where(ids == IMAGE_TOKEN_INDEX, 0, ids), places))

    @staticmethod
    def _check_image(input_ids: Sequence[int]) -> None:
        ids = np.array(input_ids)
        count = np.count_nonzero(ids == IMAGE_TOKEN_INDEX)
        if ids.ndim != 1 or count != 1:
            raise ValueError(
                f"input_ids hold {count} image placeholders ({IMAGE_TOKEN_INDEX}), "
                "expected a flat list with one."
            )

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """mlx_lm quantizes what this says: the language model only, unless asked otherwise."""
        return lambda path, _: path.startswith("language_model.")

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Released names and layouts -> ours; weights that already are ours pass unchanged.

        Dropped: buffers, the vision layers after the one that is read, a tied output layer, and
        the vision tower inside the main file when one of its own is given. Names that are not
        known are kept, so that a strict load reports them.
        """
        own_tower = any(name.startswith("vision_model.") for name in weights)
        sanitized = {}
        for name, value in weights.items():
            if is_buffer(name) or (own_tower and name.startswith("model.vision_tower.")):
                continue
            prefix, ours = next(((p, o) for p, o in _PREFIXES if name.startswith(p)), ("", ""))
            new_name = ours + name.removeprefix(prefix)
            if self._is_unused(new_name):
                continue
            # Layouts change only together with names, so a second pass finds nothing to do.
            if prefix and new_name.endswith("patch_embedding.weight"):
                value = value.transpose(0, 2, 3, 1)  # (C, 3, k, k) -> (C, k, k, 3)
            elif prefix and new_name.endswith("net.0.weight"):
                value = value.squeeze(-1)  # 1x1 Conv1d (C, 2(C+2), 1) -> Linear
            sanitized[new_name] = value
        return sanitized

    def _is_unused(self, name: str) -> bool:
        if name.startswith("vision_tower.post_layernorm."):
            return True
        if name == "language_model.lm_head.weight":
            return self.is_tied
        layer = name.removeprefix("vision_tower.encoder.layers.")
        return layer != name and int(layer.split(".")[0]) >= self.config.vision.layers_used


def check_weights(
    model: nn.Module, weights: dict[str, mx.array], folder: str | os.PathLike[str], advice: str
) -> None:
    """Compare the names and shapes of sanitized weights with the model's, before a strict load.

    Raises ValueError naming `folder`, the first tensor that does not fit, and what to do.
    """
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(set(expected) - set(weights)):
        raise ValueError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors are missing); "
            f"{advice}."
        )
    if extra := sorted(set(weights) - set(expected)):
        raise ValueError(
            f"{folder} holds {extra[0]}, which Ferret does not have ({len(extra)} such tensors); "
            f"{advice}."
        )
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{folder}: {name} has shape {weights[name].shape}, config.json says "
                f"{value.shape}; {advice}."
            )
