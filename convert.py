"""Convert a released Ferret checkpoint to an MLX folder: python convert.py --help"""

from ferret_mlx.convert import main

if __name__ == "__main__":
    main()
