"""Image + turns + regions -> what the model reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from .config import FerretConfig
from .image import ImageLike, open_image, preprocess
from .prompt import IMAGE_TOKEN_INDEX, Turn, build_prompt, tokenize_prompt
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
        texts, masks = describe_regions(regions, picture.size)
        text, input_ids, order = self.encode_turns(prompt, texts)
        if self.room(input_ids) < 1:
            raise ValueError(
                f"The prompt {self.no_room(input_ids)}; shorten the prompt or drop earlier turns."
            )
        rng = np.random.default_rng(seed)
        points = stack_points([sample_points(mask, rng) for mask in masks])
        return Inputs(
            text=text,
            input_ids=input_ids,
            pixel_values=self.pixel_values(picture),
            region_points=mx.array(points[order]),
            region_order=order,
            image_size=picture.size,
            region_texts=texts,
        )

    def encode_turns(
        self, turns: str | Sequence[Turn], region_texts: Sequence[str] = ()
    ) -> tuple[str, list[int], list[int]]:
        """The prompt, its ids, and for each ``<region_fea>`` in text order the region's index.

        Raises ValueError as ``build_prompt`` does, and when the last turn is not a user's.
        """
        text, order = build_prompt(
            turns, region_texts, self.config.prompt_template, self.config.use_im_start_end
        )
        if not isinstance(turns, str) and turns[-1]["role"] != "user":
            raise ValueError("The prompt must end with a user turn; add the question to answer.")
        return text, tokenize_prompt(text, self.tokenizer), order

    def pixel_values(self, picture: Image.Image) -> mx.array:
        """float32 (1, S, S, 3), normalised, of an upright picture."""
        config = self.config
        pixels = preprocess(picture, config.vision.image_size, config.image_mean, config.image_std)
        return mx.array(pixels[None])

    def length(self, input_ids: Sequence[int]) -> int:
        """The positions that (part of) a prompt takes, those of the expanded image included."""
        rows, columns = self.config.vision.grid
        return len(input_ids) + (rows * columns - 1) * (IMAGE_TOKEN_INDEX in input_ids)

    def room(self, input_ids: Sequence[int]) -> int:
        """Tokens that the context has left for the answer to such a prompt."""
        return self.config.context - self.length(input_ids)

    def no_room(self, input_ids: Sequence[int]) -> str:
        """Why a prompt that is too long cannot be answered."""
        rows, columns = self.config.vision.grid
        return (
            f"takes {self.length(input_ids)} tokens, {rows * columns} of them for the picture, and "
            f"the model's context of {self.config.context} has to hold at least one more"
        )


def stack_points(points: Sequence[np.ndarray]) -> np.ndarray:
    """(512, 2) of each region -> float32 (R, 512, 2), also for no region."""
    return np.stack(points) if len(points) else np.zeros((0, POINTS_PER_REGION, 2), np.float32)
