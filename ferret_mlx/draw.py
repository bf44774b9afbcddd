"""The answer's boxes and the question's regions, drawn into the picture.

Boxes of the answer have solid lines and strong colours, one for each; regions of the question
have dashed lines and pale colours, and are called region0, region1, ... as in the prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .boxes import LabelledBox
from .image import ImageLike, open_image
from .regions import Box, FreeForm, Point, Region

Rectangle = tuple[int, int, int, int]
Color = tuple[int, int, int]

BOX_COLORS: tuple[Color, ...] = (
    (214, 40, 57),
    (38, 94, 220),
    (24, 132, 60),
    (196, 86, 0),
    (128, 36, 168),
    (0, 118, 128),
    (200, 34, 128),
    (116, 78, 28),
)
REGION_COLORS: tuple[Color, ...] = (
    (255, 221, 51),
    (112, 214, 255),
    (255, 168, 226),
    (186, 240, 98),
)
_DARK: Color = (20, 20, 20)
_WHITE: Color = (255, 255, 255)
_SMALL_WORDS = re.compile(r"^(?:and|or|with)\s+|\s+(?:at|in|is|are|and|located at)$|\s*:$", re.I)


@dataclass
class _Tag:
    text: str
    anchor: Rectangle
    ink: Color
    paper: Color


def draw_answer(
    image: ImageLike, boxes: Sequence[LabelledBox] = (), regions: Sequence[Region] = ()
) -> Image.Image:
    """A copy of the upright picture, of the same size, with boxes and regions drawn in.

    Args:
        image: path, Pillow image or uint8 array (h, w, 3).
        boxes: as ``parse_boxes`` returns them, in pixels.
        regions: of the question, in pixels.

    Raises:
        FileNotFoundError, ValueError: as ``open_image``; or a region outside the picture.
    """
    picture = open_image(image).copy()
    size = picture.size
    line = max(2, round(max(size) / 320))
    font = ImageFont.load_default(size=max(11, round(max(size) / 36)))
    tags: list[_Tag] = []
    for index, region in enumerate(regions):
        color = REGION_COLORS[index % len(REGION_COLORS)]
        around = _draw_region(picture, region, color, line)
        tags.append(_Tag(f"region{index}", around, _DARK, color))
    for index, (label, box, _) in enumerate(boxes):
        color = BOX_COLORS[index % len(BOX_COLORS)]
        around = _inside(box, size)
        _outline(picture, around, color, line)
        if text := short_label(label):
            tags.append(_Tag(text, around, _WHITE, color))
    _draw_tags(picture, tags, font, line)
    return picture


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture under its name only once it is whole. Raises ValueError as ``check_target``.

    The format follows from the file's ending.
    """
    target = check_target(path)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        picture.save(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, if a picture can be written there; FileNotFoundError or ValueError if not."""
    target = Path(path)
    formats = Image.registered_extensions()
    if formats.get(target.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"{target} has no ending of a picture format; name it like answer.png or answer.jpg."
        )
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file to write.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent}; create it first.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"The folder {target.parent} may not be written to; choose another.")
    return target


def short_label(label: str, longest: int = 40) -> str:
    """A label without the small words around the name, at most ``longest`` characters."""
    text = " ".join(label.split())
    while (shorter := _SMALL_WORDS.sub("", text)) != text:
        text = shorter
    return text if len(text) <= longest else text[: longest - 3].rstrip() + "..."


def _draw_region(picture: Image.Image, region: Region, color: Color, line: int) -> Rectangle:
    """Draw one region; returns the rectangle around it."""
    mask = region.mask(picture.size)
    if isinstance(region, Point):
        x, y, radius = int(region.x), int(region.y), 4 * line
        _draw_ring(picture, x, y, radius, color, line)
        return _inside((x - radius, y - radius, x + radius, y + radius), picture.size)
    columns, rows = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    around = int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
    if isinstance(region, Box):
        _outline(picture, around, color, line, dash=4 * line)
    elif isinstance(region, FreeForm):
        _draw_mask(picture, mask.T, around, color, line)
    return around


def _draw_ring(picture: Image.Image, x: int, y: int, radius: int, color: Color, line: int) -> None:
    # Pillow does not smooth circles: draw four times as large, scale down.
    scale, half = 4, radius + 2 * line
    mark = Image.new("RGBA", (2 * half * scale + scale,) * 2)
    draw = ImageDraw.Draw(mark)
    center = mark.width / 2
    for extra, ink in ((line / 2, _DARK), (0, color)):
        for middle, thickness in ((radius, line), (0, 2 * line)):
            outer = (middle + thickness / 2 + extra) * scale
            hole = round((thickness + 2 * extra) * scale)
            corners = (center - outer, center - outer, center + outer, center + outer)
            if middle:
                draw.ellipse(corners, outline=(*ink, 255), width=hole)
            else:
                draw.ellipse(corners, fill=(*ink, 255))
    mark = mark.resize((2 * half + 1,) * 2, Image.Resampling.LANCZOS)
    picture.paste(mark.convert("RGB"), (x - half, y - half), mark.getchannel("A"))


def _draw_mask(
    picture: Image.Image, mask: np.ndarray, around: Rectangle, color: Color, line: int
) -> None:
    """Tint the (h, w) mask and draw the inner side of its edge."""
    x1, y1, x2, y2 = around
    part = mask[y1 : y2 + 1, x1 : x2 + 1]
    padded = np.pad(part, line)
    h, w = part.shape
    inner = part.copy()
    for dy in (0, line, 2 * line):
        for dx in (0, line, 2 * line):
            inner &= padded[dy : dy + h, dx : dx + w]
    alpha = np.where(inner, 96, np.where(part, 255, 0)).astype(np.uint8)
    picture.paste(Image.new("RGB", (w, h), color), (x1, y1), Image.fromarray(alpha))


def _outline(
    picture: Image.Image, box: Rectangle, color: Color, line: int, dash: int | None = None
) -> None:
    """A rectangle in ``color`` on a thin dark one, which keeps it visible on any background."""
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(picture)
    edge = max(1, line // 3)
    halo = (x1 - edge, y1 - edge, x2 + edge, y2 + edge)
    draw.rectangle(halo, outline=_DARK, width=line + 2 * edge)
    if dash is None:
        draw.rectangle(box, outline=color, width=line)
        return
    for x in range(x1, x2 + 1, 2 * dash):
        end = min(x + dash, x2)
        draw.rectangle((x, y1, end, min(y1 + line - 1, y2)), fill=color)
        draw.rectangle((x, max(y2 - line + 1, y1), end, y2), fill=color)
    for y in range(y1, y2 + 1, 2 * dash):
        end = min(y + dash, y2)
        draw.rectangle((x1, y, min(x1 + line - 1, x2), end), fill=color)
        draw.rectangle((max(x2 - line + 1, x1), y, x2, end), fill=color)


def _draw_tags(
    picture: Image.Image,
    tags: Sequence[_Tag],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line: int,
) -> None:
    draw = ImageDraw.Draw(picture)
    taken: list[Rectangle] = []
    for tag in tags:
        left, top, right, bottom = (round(v) for v in draw.textbbox((0, 0), tag.text, font=font))
        w, h = right - left + 3 * line, bottom - top + 3 * line
        place = _free_place(tag.anchor, w, h, picture.size, taken)
        taken.append(place)
        draw.rounded_rectangle(place, radius=line, fill=tag.paper)
        inset = 3 * line // 2
        draw.text(
            (place[0] + inset - left, place[1] + inset - top), tag.text, fill=tag.ink, font=font
        )


def _free_place(
    anchor: Rectangle, w: int, h: int, size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """A w x h rectangle at the anchor, inside the picture, if possible on no other tag."""
    x1, y1, x2, y2 = anchor
    rows = (y1 - h, y2 + 1, y1, y2 - h)
    places = []
    for y in rows:
        for x in (x1, x2 - w):
            x, y = max(0, min(x, size[0] - w - 1)), max(0, min(y, size[1] - h - 1))
            places.append((x, y, x + w, y + h))
    for step in range(1, 5):
        places += [
            (x, y + step * (h + 1), x + w, y + step * (h + 1) + h) for x, y, *_ in places[:2]
        ]
    for place in places:
        inside = place[3] < size[1]
        if inside and not any(_overlap(place, other) for other in taken):
            return place
    return places[0]


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _inside(box: Rectangle, size: tuple[int, int]) -> Rectangle:
    x1, y1, x2, y2 = box
    w, h = size
    return (
        max(0, min(x1, w - 1)),
        max(0, min(y1, h - 1)),
        max(0, min(x2, w - 1)),
        max(0, min(y2, h - 1)),
    )
