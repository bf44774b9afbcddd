"""Picture -> pixel array.

Every size here is (w, h) in pixels, as Pillow has it; arrays are (h, w, 3).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from .config import CLIP_MEAN, CLIP_STD

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"

# Pillow reports a damaged file through all of these, depending on the format.
_BROKEN = (OSError, SyntaxError, EOFError, ValueError, TypeError, IndexError, struct.error)


def open_image(image: ImageLike, background: int = 255) -> Image.Image:
    """A picture as upright 8-bit RGB.

    The EXIF orientation is applied, transparent pixels are laid over a plain background, 16-bit
    grey is scaled (not clipped) to 8 bits, and palette, grey and CMYK pictures become RGB.

    Args:
        image: path, Pillow image or uint8 array (h, w, 3).
        background: grey level 0..255 under transparent pixels; white, as a viewer shows them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable picture, or the array is not uint8 (h, w, 3).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"An image array must be uint8 of shape (h, w, 3), got {image.dtype} of shape "
                f"{image.shape}; convert it, or pass a path or a Pillow image."
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _upright_rgb(image, background)
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            f"An image must be a path, a Pillow image or a uint8 array (h, w, 3), "
            f"got {type(image).__name__}."
        )
    path = Path(image)
    if not path.exists():
        raise FileNotFoundError(f"There is no picture at {path}; check the path.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of one picture.")
    try:
        with Image.open(path) as opened:
            opened.load()
            return _upright_rgb(opened, background)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels; scale it down first ({error}).") from error
    except PermissionError as error:
        raise ValueError(f"{path} may not be read; check its permissions.") from error
    except _BROKEN as error:
        raise ValueError(
            f"{path} is not a readable picture ({_one_line(error)}); "
            f"give a whole PNG, JPEG or other file that Pillow reads."
        ) from error


def preprocess(
    image: ImageLike,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> np.ndarray:
    """The pixels the vision tower reads, float32 of shape (size, size, 3).

    The picture is squeezed to a square by bicubic interpolation of its 8-bit pixels, ignoring the
    aspect ratio and without a crop (the released ``preprocessor_config.json`` says otherwise and
    is overridden there), then scaled to 0..1 and normalised per channel.
    """
    # (w, h) -> (S, S) -> (S, S, 3)
    square = open_image(image).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.float32) / np.float32(255)
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _upright_rgb(image: Image.Image, background: int) -> Image.Image:
    if image.getexif().get(0x0112, 1) != 1:  # the EXIF orientation tag
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips everything above 255 to white.
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((deep.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range, save it with 8 or 16 bits")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (background, background, background, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
