#!/usr/bin/env python3
"""Ask a Ferret model about a picture: python generate.py --help"""

import sys

if __name__ == "__main__":
    try:
        from ferret_mlx.cli import generate_main

        generate_main()
    except KeyboardInterrupt:  # while modules load; from then on the command handles it
        sys.exit(130)
