"""The pictures in ``examples/``: ``python -m reference.examples examples/`` writes them again.

Scenes of the split "examples", which neither training nor the benchmarks draw from, larger than
those: sides of 320 to 480 pixels. Prints what is where, in pixels.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import SceneObject, compose

SIDES = (320, 480)
# Chosen by eye: what the file is called -> number of the scene.
SCENES = {"rocket": 46, "umbrella": 41, "pears": 16, "fox": 18, "clocks": 14}
# Visible silhouettes of the overlapping pair: its boxes nearly coincide, only a mask tells which.
MASKS = {"umbrella": ("umbrella", "cat")}


def inner_point(target: SceneObject) -> tuple[int, int]:
    """The visible pixel (x, y) that is nearest to the middle of the visible ones."""
    rows, columns = np.nonzero(target.mask)
    off = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    return int(columns[off.argmin()]), int(rows[off.argmin()])


def write_examples(folder: Path) -> None:
    """Writes NAME.png, and in ``masks/`` the silhouettes, white on black; prints the objects."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for name, number in SCENES.items():
        scene = compose("examples", number, sides=SIDES)
        scene.image.save(folder / f"{name}.png", optimize=True)
        print(f"{name}.png {scene.size[0]} x {scene.size[1]}")
        for target in scene.objects:
            (x, y), box = inner_point(target), ",".join(map(str, target.box))
            print(f"  {target.name:<12} --box {box:<16} --point {x},{y}")
            if target.name in MASKS.get(name, ()):
                mask = Image.fromarray(np.uint8(target.mask) * 255)
                mask.save(folder / "masks" / f"{target.name}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_examples(parser.parse_args().folder)
