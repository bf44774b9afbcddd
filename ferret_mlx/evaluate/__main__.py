"""``python -m ferret_mlx.evaluate``"""

import sys

from .cli import evaluate_main

if __name__ == "__main__":
    sys.argv[0] = "ferret_mlx.evaluate"  # errors begin with it
    evaluate_main()
