"""The objects of the training scenes: 52 glyphs of Noto Color Emoji with plain English names.

The sprites are shipped as one picture (``data/glyphs.png``, a grid of 128-px cells), so that scenes
are the same on every machine; ``python -m reference.glyphs FONT`` draws it again from the font.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHEET = Path(__file__).parent / "data" / "glyphs.png"
CELL = 128
COLUMNS = 13
FONT_SIZE = 109  # the one bitmap size that the font holds

GLYPHS = {
    "dog": "🐶", "cat": "🐱", "lion": "🦁", "pig": "🐷", "frog": "🐸", "panda": "🐼", "fox": "🦊",
    "rabbit": "🐰", "cow": "🐮", "penguin": "🐧", "owl": "🦉", "bee": "🐝", "butterfly": "🦋",
    "turtle": "🐢", "octopus": "🐙", "crab": "🦀", "fish": "🐠", "elephant": "🐘", "zebra": "🦓",
    "apple": "🍎", "pear": "🍐", "banana": "🍌", "watermelon": "🍉", "grapes": "🍇",
    "strawberry": "🍓", "pineapple": "🍍", "carrot": "🥕", "broccoli": "🥦", "mushroom": "🍄",
    "pizza": "🍕", "burger": "🍔", "cake": "🎂", "car": "🚗", "bus": "🚌", "tractor": "🚜",
    "rocket": "🚀", "balloon": "🎈", "ball": "⚽", "guitar": "🎸", "camera": "📷", "clock": "⏰",
    "umbrella": "☂", "crown": "👑", "shoe": "👟", "gift": "🎁", "robot": "🤖", "ghost": "👻",
    "flower": "🌸", "tree": "🌳", "cactus": "🌵", "house": "🏠", "cup": "☕",
}  # fmt: skip
NAMES = list(GLYPHS)
IRREGULAR_PLURALS = {
    "butterfly": "butterflies", "octopus": "octopuses", "fish": "fish", "grapes": "grapes",
    "strawberry": "strawberries", "broccoli": "broccoli", "bus": "buses", "cactus": "cacti",
}  # fmt: skip
NO_ARTICLE = {"grapes", "broccoli"}


def plural(name: str) -> str:
    return IRREGULAR_PLURALS.get(name, name + "s")


def with_article(name: str) -> str:
    """``a dog``, ``an owl``, ``grapes``."""
    if name in NO_ARTICLE:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@cache
def sprites() -> dict[str, Image.Image]:
    """Name -> RGBA sprite, cropped to its visible pixels (alpha > 127)."""
    sheet = Image.open(SHEET).convert("RGBA")
    found = {}
    for i, name in enumerate(NAMES):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        solid = np.asarray(cell)[..., 3] > 127
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        found[name] = cell.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return found


def draw_sheet(font_path: str) -> Image.Image:
    font = ImageFont.truetype(font_path, FONT_SIZE)
    rows = -(-len(NAMES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, name in enumerate(NAMES):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), GLYPHS[name], font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        glyph.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        sheet.paste(glyph, (x + (CELL - glyph.width) // 2, y + (CELL - glyph.height) // 2))
    return sheet


if __name__ == "__main__":
    SHEET.parent.mkdir(exist_ok=True)
    draw_sheet(sys.argv[1]).save(SHEET, optimize=True)
