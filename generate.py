"""Ask a Ferret model about a picture: python generate.py --help"""

from ferret_mlx.cli import generate_main

if __name__ == "__main__":
    generate_main()
