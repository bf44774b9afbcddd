"""Pictures of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..image import open_image


def read_picture(path: Path) -> np.ndarray:
    """uint8 (h, w, 3), converted to RGB and not turned by EXIF, as the released scripts read it.

    The annotations of the benchmarks refer to the pixels as they are stored.

    Raises FileNotFoundError, or ValueError when the file is not a readable picture.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception:
        open_image(path)  # says what is wrong
        raise


def picture_size(path: Path) -> tuple[int, int]:
    """(w, h) in pixels as stored, from the file's head."""
    with Image.open(path) as picture:
        return picture.size
