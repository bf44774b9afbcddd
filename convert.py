"""Convert a released Ferret checkpoint to an MLX folder: python convert.py --help"""

from ferret_mlx.cli import convert_main

if __name__ == "__main__":
    convert_main()
