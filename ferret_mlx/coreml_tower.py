"""The vision tower as a Core ML package, run on macOS: pixels -> features."""

from __future__ import annotations

import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from .config import FerretConfig
from .tower_weights import tower_fingerprint
from .vision import check_pixels

SUFFIX = ".mlpackage"
# Names of the inputs and of the output of a package.
PIXELS, IMAGE, FEATURES = "pixel_values", "image", "features"
# Keys of its metadata.
FINGERPRINT, SOURCE, REVISION = (
    f"ferret_mlx.{key}" for key in ("fingerprint", "source", "source_revision")
)
COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")


class CoreMLTower(nn.Module):
    """Takes the place of `vision.VisionTower`. Has no parameters.

    model: has coremltools' `predict`.
    image_input: whether it reads 8-bit pictures instead of normalised pixels.
    identity: tells packages apart whose features differ.
    """

    def __init__(self, model: Any, config: FerretConfig, image_input: bool, identity: str):
        super().__init__()
        self.image_size, self.grid = config.vision.image_size, config.vision.grid
        self.identity, self.dtype = identity, mx.float32
        self._model, self._image_input = model, image_input
        self._mean = np.array(config.image_mean, np.float64)
        self._std = np.array(config.image_std, np.float64)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """(B, S, S, 3) normalised pixels -> (B, rows * columns, C) in `dtype`, one at a time.

        Raises ValueError for pixels of another shape.
        """
        check_pixels(pixel_values, self.image_size)
        encoded = [self._encode(pixels) for pixels in np.array(pixel_values.astype(mx.float32))]
        return mx.array(np.concatenate(encoded)).astype(self.dtype)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        inputs: dict[str, Any]
        if self._image_input:
            # They were 8-bit numbers before they were normalised, and become the same again.
            restored = np.rint(255 * (pixels * self._std + self._mean)).clip(0, 255)
            inputs = {IMAGE: Image.fromarray(restored.astype(np.uint8))}
        else:
            # (S, S, 3) -> (1, 3, S, S)
            inputs = {PIXELS: np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]}
        return np.asarray(self._model.predict(inputs)[FEATURES], np.float32)


def check_runtime(vision: str | Path, compute_units: str) -> None:
    """Raises ValueError where `load` cannot have the vision tower run as these arguments say.

    vision: `mlx`, `coreml` or the path of a package; compute_units: one of COMPUTE_UNITS.
    """
    if vision == "mlx":
        return
    if vision != "coreml" and Path(vision).suffix != SUFFIX:
        raise ValueError(
            f"--vision is {str(vision)!r}, expected mlx, coreml or the path of an {SUFFIX}."
        )
    if compute_units not in COMPUTE_UNITS:
        raise ValueError(
            f"--coreml-compute-units is {compute_units!r}, expected one of "
            f"{', '.join(COMPUTE_UNITS)}."
        )
    if not _on_macos():
        raise ValueError(
            f"--vision {vision} needs Core ML, which only macOS has; "
            f"this is {sys.platform}: use --vision mlx."
        )
    import_coremltools()


def open_package(
    vision: str | Path, folder: Path, config: FerretConfig, compute_units: str = "ALL"
) -> CoreMLTower:
    """The tower of a package. Raises FileNotFoundError or ValueError where there is none, where it
    is damaged, or where its fingerprint is not that of the model in `folder`.

    vision: `coreml` for the package in `folder`, or the path of one.
    """
    package = _find_package(vision, folder)
    coremltools = import_coremltools()
    try:
        spec = coremltools.utils.load_spec(str(package))
        metadata = dict(spec.description.metadata.userDefined)
        image_input = spec.description.input[0].type.WhichOneof("Type") == "imageType"
    # Protobuf, coremltools' own library and the file system all have errors of their own.
    except Exception as error:
        raise ValueError(
            f"{package} is not a readable Core ML package ({type(error).__name__}); make it again."
        ) from None
    if metadata.get(FINGERPRINT) != tower_fingerprint(folder, config):
        origin = metadata.get(SOURCE)
        raise ValueError(
            f"{package} does not belong to the model in {folder} (it was made from "
            f"{origin or 'something else'}); make one with convert.py --mlx-path {folder} "
            f"--coreml OUT{SUFFIX}."
        )
    identity = hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()
    model = _open_model(coremltools, package, compute_units)
    return CoreMLTower(model, config, image_input, identity)


def import_coremltools() -> Any:
    """The module, without its remarks on stderr. Raises ValueError where it is not installed."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with quiet():
            import coremltools
            import coremltools.optimize
    except ImportError:
        raise ValueError(
            "coremltools is not installed; run pip install 'ferret-mlx[coreml]'."
        ) from None
    return coremltools


@contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and remarks off stderr."""
    with redirect_stderr(io.StringIO()):
        yield


def _find_package(vision: str | Path, folder: Path) -> Path:
    if vision != "coreml":
        package = Path(vision).expanduser()
        if not package.is_dir():
            raise FileNotFoundError(f"There is no Core ML package at {package}; check the path.")
        return package
    # Those that are still being written start with a dot.
    found = sorted(p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no {SUFFIX}; make one with convert.py --mlx-path {folder} "
            f"--coreml {folder}/vision{SUFFIX}."
        )
    if len(found) > 1:
        names = ", ".join(package.name for package in found)
        raise ValueError(f"{folder} holds {names}; name one of them by its path in --vision.")
    return found[0]


def _on_macos() -> bool:
    return sys.platform == "darwin"


def _open_model(coremltools: Any, package: Path, compute_units: str) -> Any:
    try:
        return coremltools.models.MLModel(
            str(package), compute_units=coremltools.ComputeUnit[compute_units]
        )
    # What the system refuses, a package for a newer macOS for one, comes as several types.
    except Exception as error:
        raise ValueError(
            f"Core ML cannot load {package} ({' '.join(str(error).split())}); "
            "make it for this macOS with --deployment-target."
        ) from None
