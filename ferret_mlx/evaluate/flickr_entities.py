"""The Flickr30k Entities folder: which phrases a sentence has and where their objects are."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

from .records import read_text

Box = tuple[int, int, int, int]

_PHRASE = re.compile(r"\[/EN#([^/\s]+)((?:/[^/\s]+)*)\s+([^\]]*)\]")


@dataclass(frozen=True)
class Phrase:
    """A phrase of a sentence: its text, the id of its entity, the entity's categories."""

    text: str
    entity: str
    types: tuple[str, ...]


class FlickrEntities:
    """Reads ``SUBSET.txt``, ``Annotations/ID.xml`` and ``Sentences/ID.txt`` of a folder.

    Raises FileNotFoundError when the folder or the subset's list is missing.
    """

    def __init__(self, folder: Path, subset: str):
        listed = folder / f"{subset}.txt"
        if not listed.is_file():
            raise FileNotFoundError(
                f"There is no {listed}; give the Flickr30k Entities folder with --entities."
            )
        self.folder, self.listed = folder, listed
        self.pictures = set(read_text(listed).split())
        self.boxes = lru_cache(64)(self._boxes)
        self.sentences = lru_cache(64)(self._sentences)

    def phrases(self, picture: str, sentence: int) -> list[Phrase]:
        """The phrases of a sentence whose entity has a box. Raises ValueError as ``boxes``."""
        sentences = self.sentences(picture)
        if not 0 <= sentence < len(sentences):
            raise ValueError(
                f"{self.folder / 'Sentences' / picture}.txt has {len(sentences)} sentences, but "
                f"the data asks about sentence {sentence}."
            )
        boxes = self.boxes(picture)
        return [phrase for phrase in sentences[sentence] if phrase.entity in boxes]

    def _boxes(self, picture: str) -> dict[str, list[Box]]:
        """Boxes (x1, y1, x2, y2) in pixels by entity. Raises ValueError or FileNotFoundError."""
        if picture not in self.pictures:
            raise ValueError(f"Picture {picture} is not in {self.listed}.")
        path = self.folder / "Annotations" / f"{picture}.xml"
        boxes = defaultdict(list)
        try:
            for thing in ElementTree.parse(path).getroot().iter("object"):
                for box in thing.findall("bndbox")[:1]:
                    x1, y1, x2, y2 = (
                        int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")
                    )
                    for name in thing.findall("name"):
                        boxes[name.text or ""].append((x1, y1, x2, y2))
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again.") from None
        return dict(boxes)

    def _sentences(self, picture: str) -> list[list[Phrase]]:
        path = self.folder / "Sentences" / f"{picture}.txt"
        return [
            [
                Phrase(" ".join(text.split()), entity, tuple(types.split("/")[1:]))
                for entity, types, text in _PHRASE.findall(sentence)
            ]
            for sentence in read_text(path).split("\n")
            if sentence
        ]


def enclosing_box(boxes: list[Box]) -> Box:
    """The smallest box around all of them."""
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)
