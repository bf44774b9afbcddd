"""Ferret, a language model that sees a picture and points into it, on MLX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blas import preload_openblas

if TYPE_CHECKING:
    from .boxes import parse_boxes
    from .generation import generate, stream_generate
    from .loading import load
    from .regions import Box, FreeForm, Point
    from .session import Session

__version__ = "0.1.0"

__all__ = [
    "Box",
    "FreeForm",
    "Point",
    "Session",
    "generate",
    "load",
    "parse_boxes",
    "stream_generate",
]

# Imported on first use: mlx_lm alone takes two seconds, and the host-side modules (regions,
# boxes, prompt, ...) have to work where MLX is not installed.
_MODULES = {
    "Box": "regions",
    "FreeForm": "regions",
    "Point": "regions",
    "Session": "session",
    "generate": "generation",
    "load": "loading",
    "parse_boxes": "boxes",
    "stream_generate": "generation",
}

# Only effective before the first import of mlx.core, so it cannot wait for `load`.
preload_openblas()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
