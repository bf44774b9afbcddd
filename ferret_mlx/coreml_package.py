"""MLX folder -> its vision tower as a Core ML package."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .config import FerretConfig, VisionConfig
from .coreml_tower import (
    FEATURES,
    FINGERPRINT,
    IMAGE,
    PIXELS,
    REVISION,
    SOURCE,
    SUFFIX,
    import_coremltools,
    quiet,
)
from .hub import find_folder
from .json_fields import read_json
from .output import check_disk_space
from .tower_weights import open_tower, tower_fingerprint

PRECISIONS = ("float16", "float32")
BITS = (8, 6, 4)
# Older ones know neither 8-bit weights nor half-precision inputs.
TARGETS = ("macOS13", "macOS14", "macOS15")
# Smaller ones (biases, norms) stay as they are: they weigh little, and coremltools clusters
# fewer numbers with scikit-learn only.
_COMPRESSED_ELEMENTS = 10_000


@dataclass(frozen=True)
class PackageOptions:
    """Checked options. Raises ValueError for what cannot be built.

    precision: float16 or float32, of operations, input and output.
    bits: of the compressed weights: 8 (linear, a scale for each output channel), 6 or 4 (a table
        of 64 or 16 values for each matrix); None leaves them in the precision.
    target: oldest macOS that runs the package, one of TARGETS.
    image_input: read 8-bit pixels and normalise them inside, instead of normalised ones.
    """

    precision: str = "float16"
    bits: int | None = None
    target: str = "macOS15"
    image_input: bool = False

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--coreml-precision", self.precision, PRECISIONS),
            ("--coreml-bits", self.bits, (None, *BITS)),
            ("--deployment-target", self.target, TARGETS),
        ):
            if value not in known:
                expected = ", ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"{flag} is {value!r}, expected one of {expected}.")
        if self.bits is not None and self.precision != "float16":
            raise ValueError(
                f"--coreml-bits {self.bits} needs --coreml-precision float16, "
                f"got {self.precision}; leave one of them out."
            )

    def __str__(self) -> str:
        weights = f", {self.bits}-bit weights" if self.bits else ""
        return f"{self.precision}{weights}, {self.target} or newer"


def convert_vision(
    mlx_path: str | Path, package: str | Path, options: PackageOptions | None = None
) -> None:
    """Write the vision tower of a converted model as a Core ML package.

    mlx_path: MLX folder or Hub id, as for `load`.
    package: path of the result, which ends in .mlpackage and must not exist yet. `load` finds it
        by itself in the model's own folder.

    Runs on Linux, too. Raises FileNotFoundError or ValueError with one line of text; then nothing
    is left at `package`.
    """
    options = options or PackageOptions()
    output = Path(package).expanduser()
    if output.suffix != SUFFIX:
        raise ValueError(f"--coreml {package} is no name of a package; let it end in {SUFFIX}.")
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already; remove it or give another name.")
    coremltools = import_coremltools()
    folder = find_folder(mlx_path, "--mlx-path", weights=False)
    config = FerretConfig.from_dict(read_json(folder / "config.json"))
    folder = find_folder(mlx_path, "--mlx-path")
    with _partial(output, config.vision) as partial:
        model = _build(coremltools, folder, config, options)
        _describe(model, folder, config, options)
        with quiet():
            model.save(str(partial))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    operations = Counter(op.op_type for op in model._mil_program.functions["main"].operations)
    del operations["const"]
    listed = ", ".join(f"{name} {count}" for name, count in sorted(operations.items()))
    print(f"Operations: {listed}.", file=sys.stderr)
    print(f"Wrote {output}: {options}, {size / 1e6:,.1f} MB.", file=sys.stderr)


def _build(coremltools: Any, folder: Path, config: FerretConfig, options: PackageOptions) -> Any:
    from .coreml_program import vision_program

    target = getattr(coremltools.target, options.target)
    constants, inputs = None, None
    if options.image_input:
        constants = (config.image_mean, config.image_std)
        size = config.vision.image_size
        inputs = [coremltools.ImageType(name=IMAGE, shape=(1, 3, size, size))]
    with open_tower(folder, config) as read, quiet():
        program = vision_program(read, config.vision, options.precision, target, constants)
        model = coremltools.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            inputs=inputs,
            minimum_deployment_target=target,
            # The program has its precision already; float16 here would convert it again.
            compute_precision=coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
        return _compress(coremltools, model, options.bits)


def _compress(coremltools: Any, model: Any, bits: int | None) -> Any:
    if bits is None:
        return model
    optimize = coremltools.optimize.coreml
    threshold = {"weight_threshold": _COMPRESSED_ELEMENTS}
    if bits == 8:
        chosen = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", **threshold)
        compress = optimize.linear_quantize_weights
    else:
        chosen = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, **threshold)
        compress = optimize.palettize_weights
    # Class token and positions are added, not multiplied: they stay exact.
    types = {"linear": chosen, "conv": chosen}
    # A row of zeros has the scale 0, and 0 / 0 numbers of no consequence.
    with np.errstate(invalid="ignore"):
        return compress(model, optimize.OptimizationConfig(op_type_configs=types))


def _describe(model: Any, folder: Path, config: FerretConfig, options: PackageOptions) -> None:
    name, revision = _origin(folder)
    fingerprint = tower_fingerprint(folder, config)
    vision = config.vision
    size, (rows, columns) = vision.image_size, vision.grid
    model.short_description = (
        f"The vision tower of {name}, a Ferret model: {vision.layers_used} of "
        f"{vision.num_hidden_layers} layers of a CLIP vision transformer ({options})."
    )
    model.author = f"Converted from {name} by ferret-mlx {__version__}"
    model.license = _license(folder)
    model.version = __version__
    if options.image_input:
        model.input_description[IMAGE] = (
            f"RGB picture, squeezed to {size} x {size} pixels; it is normalised inside."
        )
    else:
        model.input_description[PIXELS] = (
            f"Normalised pixels (1, 3, {size}, {size}), {options.precision}: RGB / 255, less "
            f"{list(config.image_mean)}, divided by {list(config.image_std)}."
        )
    model.output_description[FEATURES] = (
        f"Features (1, {rows * columns}, {vision.hidden_size}), {options.precision}: {rows} rows "
        f"of {columns} patches, without the class token."
    )
    model.user_defined_metadata.update(
        {FINGERPRINT: fingerprint, SOURCE: name, REVISION: revision or f"sha256:{fingerprint}"}
    )


def _origin(folder: Path) -> tuple[str, str | None]:
    """Name of the model, and the commit if it lies in the Hub's cache."""
    parts = folder.resolve().parts[-3:]
    if len(parts) == 3 and parts[1] == "snapshots" and re.fullmatch("[0-9a-f]{40}", parts[2]):
        return parts[0].removeprefix("models--").replace("--", "/"), parts[2]
    return folder.resolve().name, None


def _license(folder: Path) -> str:
    from huggingface_hub import ModelCard

    # Without a card, or with one that cannot be parsed, the terms are not known.
    with suppress(Exception):
        card = ModelCard.load(folder / "README.md")
        if card.data.license:
            return str(card.data.license)
    return "That of the model it was converted from"


@contextmanager
def _partial(output: Path, config: VisionConfig) -> Iterator[Path]:
    """A path beside `output`, which takes its name at the end or is removed with its parents."""
    partial = output.with_name(f".{output.stem}.partial-{os.getpid()}{SUFFIX}")
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{output.parent} is not a folder to write to ({error.strerror}); "
                "give another name."
            ) from None
        check_disk_space(output.parent, 4 * _parameters(config))
        yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _parameters(config: VisionConfig) -> int:
    """About as many as the program has."""
    width, inner = config.hidden_size, config.intermediate_size
    rows, columns = config.grid
    layer = 4 * width * (width + 1) + 2 * width * inner + inner + 5 * width
    return config.layers_used * layer + width * (rows * columns + 3 * config.patch_size**2 + 4)
