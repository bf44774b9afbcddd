"""Released Ferret folder (+ base) -> MLX folder, quantized or not."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.utils import save_config

from . import __version__
from .hub import find_folder, upload_folder
from .model_card import write_model_card
from .output import check_disk_space, refuse_existing, working_folder, write_json
from .plan import Plan, make_plan
from .quantization import Quantization
from .report import table
from .source import Source
from .writing import bytes_to_write, write_shards

_COPIED = (
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
)
_SMALL_FILES = 8 << 20  # bytes, of everything beside the weights


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
    dequantize: bool = False,
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
    dequantize: `hf_path` is a quantized MLX folder; restore its weights.

    Tensors are read, added, quantized and written in blocks of rows, so the memory does not grow
    with the model. Killed or interrupted, the same call goes on from the finished shards.

    Raises FileNotFoundError or ValueError with one line of text; then nothing is left at
    `mlx_path`. The one exception is a failed upload, which keeps the finished folder.
    """
    output = Path(mlx_path).expanduser()
    options = None
    if quantize:
        options = Quantization(q_bits, q_group_size, q_mode, quant_predicate, quantize_vision)
    if dtype is not None and dtype not in MODEL_CONVERSION_DTYPES:
        expected = ", ".join(MODEL_CONVERSION_DTYPES)
        raise ValueError(f"--dtype is {dtype!r}, expected one of {expected}.")
    if dequantize and (quantize or base_path is not None):
        raise ValueError("--dequantize goes with neither -q nor --base-path; leave them out.")
    refuse_existing(output)

    folder = find_folder(hf_path, "--hf-path")
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} lacks tokenizer.model; copy it from the original model.")
    merged = base_path is not None
    with Source(folder, base_path, vision_tower, dequantize) as source:
        _check_norm(source, merged)
        # A merge is float16 whatever the files held.
        dtype = dtype or ("float16" if merged else _stored_dtype(source))
        plan = make_plan(source, options, dtype)
        with working_folder(output, _job(source, plan)) as work:
            check_disk_space(work.path, bytes_to_write(plan, work) + _SMALL_FILES)
            reports = write_shards(source, plan, work)
            write_json(work.model / "model.safetensors.index.json", plan.index())
            save_config(plan.config, work.model / "config.json", keep_vision_config=True)
            for file in _COPIED:
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, work.model / file)
            write_model_card(
                work.model,
                folder,
                name=upload_repo or output.resolve().name,
                base_model=str(hf_path) if not Path(hf_path).expanduser().exists() else None,
                command=_command(
                    hf_path, base_path, vision_tower, output, options, dtype, dequantize
                ),
                precision=", ".join(str(part) for part in (options, dtype) if part),
                is_merge=merged,
            )
    print(f"{table(reports)}\nWrote {output}.", file=sys.stderr)
    if upload_repo is not None:
        upload_folder(output, upload_repo)


def _job(source: Source, plan: Plan) -> dict[str, Any]:
    """All that the shards depend on: the source files as they are now, and the plan."""
    files = [(path.resolve(), path.stat()) for path in source.files]
    return {
        "version": __version__,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files],
        "config": plan.config,
        "shards": {
            shard.file: {
                name: [list(info.shape), str(info.dtype)] for name, info in shard.tensors.items()
            }
            for shard in plan.shards
        },
    }


def _check_norm(source: Source, merged: bool) -> None:
    """Norm weights lie around 1 in a model, and around 0 in a difference of two."""
    mean = source.mean_of_norm()
    if merged and mean > 0.2:
        raise ValueError(
            f"{source.folder} is not a delta: its norm weights are not near 0; "
            "if it is a whole model, leave --base-path out."
        )
    if not merged and mean < 0.2:
        print(
            f"note: {source.folder} looks like a delta (its norm weights are near 0); "
            "if it is one, give its base with --base-path",
            file=sys.stderr,
        )


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
    dequantize: bool,
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
    if dequantize:
        words.append("--dequantize")
    if dtype:
        words.append(f"--dtype {dtype}")
    return " ".join(words)
