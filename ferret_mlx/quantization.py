"""Which layers of a Ferret model are quantized, and how: mlx-lm's rules and recipes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from .model import Model

# mode -> (group sizes, bits) that MLX has, the first of each being the default
_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}
MODES = tuple(_MODES)
RECIPES = tuple(QUANT_RECIPES)

Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


@dataclass(frozen=True)
class Quantization:
    """Checked options. Raises ValueError for what MLX does not have.

    recipe: name of a mixed recipe for the language model, which then chooses the bits there.
    vision: quantize vision tower, projector and region sampler too.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    vision: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"--q-mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        group_sizes, bits = _MODES[self.mode]
        for flag, value, known in (
            ("--q-group-size", self.group_size, group_sizes),
            ("--q-bits", self.bits, bits),
        ):
            if value is not None and value not in known:
                choices = ", ".join(str(n) for n in sorted(known))
                raise ValueError(f"{flag} is {value}, mode {self.mode} has: {choices}.")
        if self.recipe is not None:
            if self.recipe not in RECIPES:
                raise ValueError(
                    f"--quant-predicate is {self.recipe!r}, expected one of {', '.join(RECIPES)}."
                )
            if self.mode != "affine":
                raise ValueError(
                    f"--quant-predicate {self.recipe} works in mode affine only, --q-mode is "
                    f"{self.mode!r}; leave one of them out."
                )
        # The dataclass is frozen: this is how its own defaults are filled in.
        object.__setattr__(self, "group_size", self.group_size or group_sizes[0])
        object.__setattr__(self, "bits", self.bits or bits[0])

    @property
    def width(self) -> int:
        """What a layer's width has to be a multiple of."""
        # MLX packs nvfp4's groups of 16 in pairs, and fails where one is left over.
        return max(self.group_size or 0, 32)

    def flags(self) -> str:
        """The options on the command line of convert.py."""
        words = ["-q"]
        words.append(f"--quant-predicate {self.recipe}" if self.recipe else f"--q-bits {self.bits}")
        words.append(f"--q-group-size {self.group_size}")
        if self.mode != "affine":
            words.append(f"--q-mode {self.mode}")
        return " ".join([*words, *(["--quantize-vision"] if self.vision else [])])

    def __str__(self) -> str:
        what = self.recipe or f"{self.bits} bits, {self.mode}"
        parts = "all parts" if self.vision else "the language model only"
        return f"{what}, groups of {self.group_size}; {parts}"


def quantize_model_parts(
    model: Model, config: dict[str, Any], options: Quantization
) -> dict[str, Any]:
    """Quantize the model in place and return the config that says so.

    Layers whose width is no multiple of `options.width` stay as they are. Raises ValueError when
    that leaves none.
    """
    predicate = _predicate(model, options)
    fits, skipped = 0, []
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized") and predicate(path, module):
            if module.weight.shape[-1] % options.width:
                skipped.append(path)
            else:
                fits += 1
    if not fits:
        raise ValueError(
            f"No layer's width is a multiple of {options.width} (--q-group-size "
            f"{options.group_size}); choose a smaller one, or convert without -q."
        )
    if skipped:
        print(
            f"note: {len(skipped)} layers stay unquantized, their width is no multiple of "
            f"{options.width} ({skipped[0]}, ...)",
            file=sys.stderr,
        )
    with redirect_stdout(StringIO()):  # its line on bits per weight: the table at the end says it
        _, config = quantize_model(
            model,
            config,
            options.group_size,
            options.bits,
            mode=options.mode,
            quant_predicate=lambda path, module: (
                module.weight.shape[-1] % options.width == 0 and predicate(path, module)
            ),
        )
    return config


def _predicate(model: Model, options: Quantization) -> Predicate:
    in_language_model: Predicate = lambda path, module: True  # noqa: E731
    if options.recipe is not None:
        in_language_model = mixed_quant_predicate_builder(
            options.recipe, model.language_model, options.group_size
        )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        inner = path.removeprefix("language_model.")
        if inner != path:
            return in_language_model(inner, module)
        # Used as plain arrays: positions are added, not looked up, and the sampler splits the maps
        # of its blocks (whose odd width C + 2 would hardly ever fit a group anyway).
        plain = path.endswith("position_embedding") or "_projector_list." in path
        return options.vision and not plain

    return predicate
