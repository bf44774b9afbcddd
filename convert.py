#!/usr/bin/env python3
"""Convert a released Ferret checkpoint to an MLX folder: python convert.py --help"""

import sys

if __name__ == "__main__":
    try:
        from ferret_mlx.cli import convert_main

        convert_main()
    except KeyboardInterrupt:  # while modules load; from then on the command handles it
        sys.exit(130)
