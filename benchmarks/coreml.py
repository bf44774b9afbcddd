"""Cost of the Core ML package at full size: ``python -m benchmarks.coreml [--bits 8]``.

Builds the vision tower of the released models, CLIP ViT-L/14 at 336 pixels, with random weights,
once for each precision in a process of its own. Prints time, peak memory (largest resident set)
and the size of the package; JSON in the last line. ``--verify`` interprets each package in NumPy
and tells how far its features are from MLX's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ferret_mlx.coreml_package import BITS, PackageOptions, convert_vision
from ferret_mlx.coreml_tower import FEATURES, PIXELS
from ferret_mlx.vision import VisionTower
from tests.mil_interpreter import Interpreter

from .convert import peak_memory
from .measure import machine_line
from .random_model import random_tower_folder


def build(folder: Path, package: Path, bits: int | None, target: str) -> dict[str, float]:
    """Run in a process of its own, since memory is counted for a whole process."""
    command = [sys.executable, "-m", "benchmarks.coreml", "--build", str(folder), str(package)]
    command += ["--target", target] + (["--bits", str(bits)] if bits else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def build_here(folder: Path, package: Path, bits: int | None, target: str) -> dict[str, float]:
    start = time.perf_counter()
    convert_vision(folder, package, PackageOptions(bits=bits, target=target))
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    return {
        "seconds": round(seconds, 1),
        "peak memory (GB)": round(peak_memory() / 1e9, 2),
        "package (MB)": round(size / 1e6, 1),
    }


def difference(tower: VisionTower, package: Path) -> float:
    """Relative, of the features of one random picture; MLX computes them in float32."""
    size = tower.image_size
    tower.set_dtype(mx.float32)
    pixels = mx.random.normal((1, size, size, 3), key=mx.random.key(1))
    features = np.array(tower(pixels))
    found = Interpreter(package).predict({PIXELS: np.array(pixels).transpose(0, 3, 1, 2)})
    return float(np.linalg.norm(found[FEATURES] - features) / np.linalg.norm(features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--bits", type=int, choices=BITS, action="append", help="also with such weights; repeatable"
    )
    add("--target", default="macOS15", help="oldest macOS of the packages (default: %(default)s)")
    add("--out", type=Path, help="folder to keep the packages in; default: they are removed")
    add("--verify", action="store_true", help="compare features with MLX; 4 GB of memory")
    add("--build", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        folder, package = args.build
        print(json.dumps(build_here(folder, package, (args.bits or [None])[0], args.target)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "model", args.out or Path(temporary)
        tower = random_tower_folder(folder)
        count = sum(value.size for _, value in tree_flatten(tower.parameters()))
        print(f"CLIP ViT-L/14 at 336 pixels, {count / 1e6:.1f} M parameters, {machine_line()}")
        for bits in (None, *(args.bits or [8])):
            name = f"float16, {bits}-bit weights" if bits else "float16"
            package = out / f"vision-{bits or 16}.mlpackage"
            results[name] = build(folder, package, bits, args.target)
            if args.verify:
                results[name]["relative difference"] = difference(tower, package)
            figures = ", ".join(f"{key} {value}" for key, value in results[name].items())
            print(f"{name:<24} {figures}", flush=True)
    print(json.dumps({"machine": machine_line(), "parameters": count, "results": results}))


if __name__ == "__main__":
    main()
