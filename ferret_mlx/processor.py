"""Image + turns + regions -> what the model reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .config import FerretConfig
from .image import ImageLike, open_image, preprocess
from .prompt import Turn, build_prompt, tokenize_prompt
from .regions import POINTS_PER_REGION, Region, describe_regions, sample_points
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """One question, ready for ``Model.embed_inputs``.

    Attributes:
        text: the whole prompt, with ``<image>`` and ``<region_fea>``.
        input_ids: its token ids, -200 for the image.
        pixel_values: float32 (1, S, S, 3), normalised.
        region_points: float32 (R, 512, 2), (x, y) in [0, 1), one row per ``<region_fea>`` in
            text order.
        region_order: for each of those rows the index of its region.
        image_size: (w, h) of the upright picture in pixels.
        region_texts: the regions' coordinates, in the order in which they were given.
    """

    text: str
    input_ids: list[int]
    pixel_values: mx.array
    region_points: mx.array
    region_order: list[int]
    image_size: tuple[int, int]
    region_texts: list[str]


class Processor:
    """Prepares inputs for one model.

    Raises:
        ValueError: the tokenizer and the config give ``<region_fea>`` different ids.
    """

    def __init__(self, config: FerretConfig, tokenizer: Tokenizer):
        if tokenizer.region_token_id != config.region_token_id:
            raise ValueError(
                f"The tokenizer gives <region_fea> the id {tokenizer.region_token_id}, the config "
                f"{config.region_token_id}; they belong to different models."
            )
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Processor:
        """Read config and tokenizer of a model folder, without its weights."""
        return cls(FerretConfig.from_folder(os.fspath(path)), Tokenizer(path))

    def __call__(
        self,
        image: ImageLike,
        prompt: str | Sequence[Turn],
        regions: Sequence[Region] = (),
        seed: int = 0,
    ) -> Inputs:
        """Prepare one question.

        Args:
            image: path, Pillow image or uint8 array (h, w, 3).
            prompt: a question, or turns ``{"role": "user" | "assistant", "content": str}`` ending
                with a user turn; see ``build_prompt`` for how it names regions.
            regions: in pixels of the upright picture; ``[region0]`` names the first.
            seed: decides which points of each region are drawn.

        Raises:
            FileNotFoundError: there is no such picture.
            ValueError: a broken picture, a region outside of it, a malformed prompt, or one that
                is longer than the model's context.
        """
        picture = open_image(image)
        size = picture.size
        texts, masks = describe_regions(regions, size)
        text, order = build_prompt(
            prompt, texts, self.config.prompt_template, self.config.use_im_start_end
        )
        if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
            raise ValueError("The prompt must end with a user turn; add the question to answer.")
        input_ids = tokenize_prompt(text, self.tokenizer)
        self._check_length(len(input_ids))

        rng = np.random.default_rng(seed)
        points = [sample_points(mask, rng) for mask in masks]
        rows = [points[index] for index in order]
        pixels = preprocess(
            picture, self.config.vision.image_size, self.config.image_mean, self.config.image_std
        )
        return Inputs(
            text=text,
            input_ids=input_ids,
            pixel_values=mx.array(pixels[None]),
            region_points=mx.array(
                np.stack(rows) if rows else np.zeros((0, POINTS_PER_REGION, 2), np.float32)
            ),
            region_order=order,
            image_size=size,
            region_texts=texts,
        )

    def _check_length(self, ids: int) -> None:
        rows, columns = self.config.vision.grid
        length = ids - 1 + rows * columns
        if length + 1 > self.config.context:
            raise ValueError(
                f"The prompt takes {length} tokens, {rows * columns} of them for the picture, and "
                f"the model's context of {self.config.context} has to hold at least one more; "
                f"shorten the prompt or drop earlier turns."
            )
