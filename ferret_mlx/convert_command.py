"""The command line ``convert.py``: convert a checkpoint, check it, or package its vision tower."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mlx_lm.convert import MODEL_CONVERSION_DTYPES

from .check import check
from .convert import convert
from .coreml_package import BITS, PRECISIONS, TARGETS, PackageOptions, convert_vision
from .errors import ArgumentParser
from .quantization import MODES, RECIPES

# Flag -> option of a Core ML package.
_PACKAGE_OPTIONS = {
    "coreml_precision": "precision",
    "coreml_bits": "bits",
    "deployment_target": "target",
    "coreml_image_input": "image_input",
}


def main(argv: Sequence[str] | None = None) -> None:
    """What `cli.convert_main` runs."""
    args = vars(_parser().parse_args(argv))
    package, checked, against = args.pop("coreml"), args.pop("check"), args.pop("against")
    package_options = {name: args.pop(flag) for flag, name in _PACKAGE_OPTIONS.items()}
    if package is not None:
        _convert_vision(package, package_options, args | {"check": checked, "against": against})
        return
    for flag, name in _PACKAGE_OPTIONS.items():
        if package_options[name]:
            raise ValueError(f"{_flag(flag)} was given without --coreml; add --coreml OUT.")
    if checked is not None:
        _check(checked, against, args)
        return
    if against is not None:
        raise ValueError("--against was given without --check; add --check MLX_DIR.")
    for flag in ("hf_path", "mlx_path"):
        if args[flag] is None:
            raise ValueError(f"{_flag(flag)} is missing; a conversion needs it.")
    asked = (args["q_bits"], args["q_group_size"], args["q_mode"], args["quant_predicate"])
    switches = args["quantize_vision"] or args["q_keep_ends"]
    if not args["quantize"] and (switches or any(v is not None for v in asked)):
        raise ValueError("Quantization options were given without -q; add -q.")
    args["q_mode"] = args["q_mode"] or "affine"
    convert(**args)


def _check(folder: str, against: str | None, args: dict[str, Any]) -> None:
    sources = {name: args.pop(name) for name in ("base_path", "vision_tower")}
    for name, value in args.items():
        if value:
            raise ValueError(f"{_flag(name)} does not go with --check; leave it out.")
    if against is None and any(sources.values()):
        raise ValueError("--check needs --against HF_DIR beside --base-path or --vision-tower.")
    check(folder, against, **sources)


def _convert_vision(package: str, options: dict[str, Any], others: dict[str, Any]) -> None:
    folder = others.pop("mlx_path")
    for name, value in others.items():
        if value:
            raise ValueError(f"{_flag(name)} does not go with --coreml; leave it out.")
    if folder is None:
        raise ValueError("--coreml needs --mlx-path MLX_DIR, the converted model it is made from.")
    given = {name: value for name, value in options.items() if value is not None}
    convert_vision(folder, package, PackageOptions(**given))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    result = ArgumentParser(
        description="Convert a Ferret checkpoint to an MLX folder, or check such a folder.",
        epilog="A conversion that was interrupted goes on when the same command is run again.",
    )
    add = result.add_argument
    add("--hf-path", metavar="DIR|HUB_ID", help="checkpoint in the released layout")
    add("--base-path", metavar="DIR|HUB_ID", help="the Vicuna model that --hf-path is a delta to")
    add("--vision-tower", metavar="DIR|HUB_ID", help="CLIP checkpoint to use instead of its own")
    add(
        "--mlx-path",
        metavar="OUT",
        help="folder to write; must not exist yet (with --coreml: to read)",
    )
    add("-q", "--quantize", action="store_true", help="quantize the language model")
    add("--q-bits", type=int, metavar="N", help="bits per weight (default: 4)")
    add("--q-group-size", type=int, metavar="N", help="weights that share a scale (default: 64)")
    add("--q-mode", choices=MODES, help="quantization mode (default: affine)")
    add("--quant-predicate", choices=RECIPES, metavar="RECIPE",
        help=f"mixed bits: {', '.join(RECIPES)}")  # fmt: skip
    add("--quantize-vision", action="store_true",
        help="quantize vision tower, projector and region sampler too")  # fmt: skip
    add("--q-keep-ends", action="store_true",
        help="leave word embeddings and output head unquantized")  # fmt: skip
    add("-d", "--dequantize", action="store_true",
        help="restore the weights of --hf-path, a quantized MLX folder")  # fmt: skip
    add("--dtype", choices=MODEL_CONVERSION_DTYPES,
        help="of everything not quantized (default: the checkpoint's)")  # fmt: skip
    add("--upload-repo", metavar="REPO", help="upload the result to this Hub repository")
    add("--check", metavar="MLX_DIR", help="verify a converted folder instead of converting")
    add("--against", metavar="DIR|HUB_ID",
        help="with --check: what it was converted from (a delta together with --base-path), "
        "to tell the error of every tensor")  # fmt: skip
    package = result.add_argument_group(
        "the vision tower of --mlx-path, a converted model, for Core ML"
    )
    add = package.add_argument
    add("--coreml", metavar="OUT.mlpackage", help="package to write; must not exist yet")
    add("--coreml-precision", choices=PRECISIONS, help="default: float16, for the Neural Engine")
    add("--coreml-bits", type=int, choices=BITS, help="compress the weights")
    add("--deployment-target", choices=TARGETS, help="oldest macOS to run it (default: macOS15)")
    add("--coreml-image-input", action="store_true",
        help="read 8-bit pictures and normalise them inside")  # fmt: skip
    return result
