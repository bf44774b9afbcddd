"""Released Ferret folder (+ base) -> MLX folder, quantized or not."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.utils import save_config, save_model

from .errors import ArgumentParser
from .hub import find_folder, reason
from .model_card import write_model_card
from .output import new_folder, refuse_existing
from .quantization import MODES, RECIPES, Quantization, quantize_model_parts
from .source import Source

_COPIED = (
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    base_path: str | Path | None = None,
    vision_tower: str | Path | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    upload_repo: str | None = None,
    quantize_vision: bool = False,
) -> None:
    """Write the folder `mlx_path`, which `ferret_mlx.load` reads.

    hf_path: a Ferret checkpoint in the released layout, folder or Hub id.
    base_path: the language model (Vicuna) that `hf_path` is a delta to, folder or Hub id.
    vision_tower: a CLIP checkpoint to use instead of the one that belongs to `hf_path`.
    quantize, q_bits, q_group_size, q_mode, quant_predicate: as in mlx-lm (4 bits in groups of
        64), for the language model only.
    dtype: float32, float16 or bfloat16 for what is not quantized; default: the checkpoint's.
    upload_repo: Hub repository to upload the folder to.
    quantize_vision: quantize vision tower, projector and region sampler too.

    Raises FileNotFoundError or ValueError with one line of text; then nothing is left at
    `mlx_path`. The one exception is a failed upload, which keeps the finished folder.
    """
    output = Path(mlx_path).expanduser()
    refuse_existing(output)
    options = None
    if quantize:
        options = Quantization(q_bits, q_group_size, q_mode, quant_predicate, quantize_vision)
    if dtype is not None and dtype not in MODEL_CONVERSION_DTYPES:
        expected = ", ".join(MODEL_CONVERSION_DTYPES)
        raise ValueError(f"--dtype is {dtype!r}, expected one of {expected}.")

    folder = find_folder(hf_path, "--hf-path")
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} lacks tokenizer.model; copy it from the original model.")
    merged = base_path is not None
    with Source(folder, base_path, vision_tower) as source, new_folder(output) as partial:
        if not merged and source.looks_like_delta():
            print(
                f"note: {folder} looks like a delta (its norm weights are near 0); "
                "if it is one, give its base with --base-path",
                file=sys.stderr,
            )
        # A merge is float16 whatever the files held.
        dtype = dtype or ("float16" if merged else _stored_dtype(source))
        _write_model(partial, source, options, dtype)
        for file in _COPIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, partial / file)
        write_model_card(
            partial,
            folder,
            name=upload_repo or output.resolve().name,
            base_model=str(hf_path) if not Path(hf_path).expanduser().exists() else None,
            command=_command(hf_path, base_path, vision_tower, output, options, dtype),
            precision=", ".join(str(part) for part in (options, dtype) if part),
            is_merge=merged,
        )
    if upload_repo is not None:
        _upload(output, upload_repo)
    print(f"Wrote {output}.", file=sys.stderr)


def _write_model(
    folder: Path, source: Source, options: Quantization | None, dtype: str | None
) -> None:
    model = source.load_model(getattr(mx, dtype) if dtype else None)
    config = dict(source.config.raw)
    config["region_read_order"] = source.config.sampler.read_order
    config["image_mean"] = list(source.config.image_mean)
    config["image_std"] = list(source.config.image_std)
    if dtype:
        config["torch_dtype"] = dtype
    if options is not None:
        config = quantize_model_parts(model, config, options)
    try:
        save_model(folder, model, donate_model=True)
    except RuntimeError as error:
        raise ValueError(f"Could not write the weights: {error}") from None
    save_config(config, folder / "config.json", keep_vision_config=True)


def _stored_dtype(source: Source) -> str | None:
    """The dtype that the config names; None leaves every tensor as it is."""
    stored = source.config.raw.get("torch_dtype") or source.config.raw.get("dtype")
    return stored if stored in MODEL_CONVERSION_DTYPES else None


def _command(
    hf_path: str | Path,
    base_path: str | Path | None,
    vision_tower: str | Path | None,
    output: Path,
    options: Quantization | None,
    dtype: str | None,
) -> str:
    """The command line that repeats the conversion, with local folders by their last name."""
    words = ["python convert.py"]
    folders = {"--hf-path": hf_path, "--base-path": base_path, "--vision-tower": vision_tower}
    for flag, value in folders.items():
        if value is not None:
            local = Path(value).expanduser()
            name = local.resolve().name if local.exists() else str(value)
            words.append(f"{flag} {shlex.quote(name)}")
    words.append(f"--mlx-path {shlex.quote(output.resolve().name)}")
    if options is not None:
        words.append(options.flags())
    if dtype:
        words.append(f"--dtype {dtype}")
    return " ".join(words)


def _upload(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_large_folder(folder_path=folder, repo_id=repo, repo_type="model")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is written, but the upload to {repo} failed: {reason(error)}."
        ) from None
    print(f"Uploaded to {repo}.", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    result = ArgumentParser(description="Convert a Ferret checkpoint to an MLX folder.")
    add = result.add_argument
    add("--hf-path", required=True, metavar="DIR|HUB_ID", help="checkpoint in the released layout")
    add("--base-path", metavar="DIR|HUB_ID", help="the Vicuna model that --hf-path is a delta to")
    add("--vision-tower", metavar="DIR|HUB_ID", help="CLIP checkpoint to use instead of its own")
    add("--mlx-path", required=True, metavar="OUT", help="folder to write; must not exist yet")
    add("-q", "--quantize", action="store_true", help="quantize the language model")
    add("--q-bits", type=int, metavar="N", help="bits per weight (default: 4)")
    add("--q-group-size", type=int, metavar="N", help="weights that share a scale (default: 64)")
    add("--q-mode", choices=MODES, help="quantization mode (default: affine)")
    add("--quant-predicate", choices=RECIPES, metavar="RECIPE",
        help=f"mixed bits: {', '.join(RECIPES)}")  # fmt: skip
    add("--quantize-vision", action="store_true",
        help="quantize vision tower, projector and region sampler too")  # fmt: skip
    add("--dtype", choices=MODEL_CONVERSION_DTYPES,
        help="of everything not quantized (default: the checkpoint's)")  # fmt: skip
    add("--upload-repo", metavar="REPO", help="upload the result to this Hub repository")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """What `cli.convert_main` runs."""
    args = parser().parse_args(argv)
    asked = (args.q_bits, args.q_group_size, args.q_mode, args.quant_predicate)
    if not args.quantize and (args.quantize_vision or any(value is not None for value in asked)):
        raise ValueError("Quantization options were given without -q; add -q.")
    args.q_mode = args.q_mode or "affine"
    convert(**vars(args))
