"""A fast BLAS for MLX's CPU backend on Linux."""

from __future__ import annotations

import ctypes
import functools
import sys

INSTALL_HINT = (
    "OpenBLAS is not installed, so MLX uses a BLAS that is about 60 times slower; "
    "install it with: sudo apt install libopenblas0 (Debian, Ubuntu) or "
    "sudo dnf install openblas (Fedora)"
)


@functools.cache
def preload_openblas() -> bool:
    """Make OpenBLAS answer MLX's BLAS calls; True when it was found.

    MLX's Linux wheel for the CPU is linked against the reference BLAS. Symbols of a library
    that is already loaded globally win, so this has to run before `mlx.core` is imported.
    On other systems MLX brings its own library: nothing is done and the result is False.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
