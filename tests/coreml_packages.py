"""What the tests of Core ML packages compare."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from ferret_mlx import load
from tests.mil_interpreter import Interpreter

PICTURE = Path(__file__).parents[1] / "examples" / "rocket.png"


def mlx_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1, 3, S, S) of the picture and MLX's features of it, in float32."""
    model, processor = load(folder)
    pixels = processor.pixel_values(PICTURE)
    features = model.encode_image(pixels).astype(mx.float32)
    return np.array(pixels).transpose(0, 3, 1, 2), np.array(features)


def relative(found: np.ndarray, features: np.ndarray) -> float:
    difference = found.astype(np.float64) - features
    return float(np.linalg.norm(difference) / np.linalg.norm(features))


def error_of(package: Path | Interpreter, pixels: np.ndarray, features: np.ndarray) -> float:
    """The relative difference of a package's features."""
    interpreter = package if isinstance(package, Interpreter) else Interpreter(package)
    found = interpreter.predict({"pixel_values": pixels})["features"]
    assert found.shape == features.shape
    return relative(found, features)
