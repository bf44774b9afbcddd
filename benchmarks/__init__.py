"""What the README's figures come from. Each module is a command: ``python -m benchmarks.NAME``."""

import ferret_mlx  # noqa: F401  (on Linux OpenBLAS has to be loaded before MLX is imported)
