"""Flickr30k Entities: the locations of all phrases of a sentence.

Data: JSON with one image record per sentence, and the Flickr30k Entities folder. Source: the
released ``model_flickr.py`` and ``eval_flickr_entities.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .benchmark import Benchmark, Item, Question, Size, Verdict
from .flickr_entities import FlickrEntities, Phrase, enclosing_box
from .overlap import box_iou
from .records import Line, read_json, take, take_size
from .refcoco import IOU, NO_BOX
from .released_text import EntityBox, decode_boxes, normalise_phrase

RANKS = (1, 5, 10, -1)  # -1: all boxes


class Flickr(Benchmark):
    """Grounding of phrases.

    Args:
        data: JSON file; ``_test.json`` in its name says that its pictures are those of
            ``test.txt``, otherwise they are in ``val.txt``.
        entities: the Flickr30k Entities folder.
        merge: an entity's boxes count as the one around them, as published; otherwise a hit on
            any of them counts.

    Raises FileNotFoundError, or ValueError when the data is not of this form or the Entities
    folder lacks one of its phrases.
    """

    name = "flickr"

    def __init__(self, data: Path, entities: Path, merge: bool = True):
        self.options = {}
        self.merge = merge
        self.entities = FlickrEntities(entities, "test" if "_test.json" in data.name else "val")
        self.set_items(_items(data))
        for item in self.items:
            for phrase in item.record["phrases"]:
                self._annotated(item, phrase)

    def question(self, item: Item, size: Size) -> Question:
        """size is not used: the data has its own."""
        phrases = [phrase.lower().replace(",", "").strip() for phrase in item.record["phrases"]]
        prompt = f"What are the locations of {', '.join(phrases)}?"
        return Question(prompt, released=prompt)

    def answer_line(self, item: Item, size: Size, text: str) -> dict[str, Any]:
        """``image_id`` is Flickr's id of the picture."""
        record = item.record
        w, h = record["size"]
        return {
            "image_id": record["image_id"], "sentence_id": record["sentence_id"],
            "file_name": item.picture, "prompt": self.question(item, size).released, "text": text,
            "width": w, "height": h,
        }  # fmt: skip

    def answer_key(self, line: Line) -> str:
        picture = take(line.record, "image_id", int, line.where)
        return f"{picture}/{take(line.record, 'sentence_id', int, line.where)}"

    def verdict(self, item: Item, text: str) -> Verdict:
        """Per phrase, whether one of its first 1, 5, 10 or of all its boxes is a hit."""
        try:
            found, unparsable = decode_boxes(text, item.record["size"]), False
        except ValueError:
            found, unparsable = [], True
        phrases, truths, overlaps = [], [], []
        for text_of_phrase in item.record["phrases"]:
            phrase = self._annotated(item, text_of_phrase)
            truth = self._truth(str(item.record["image_id"]), phrase)
            overlap = box_iou(_boxes_of(phrase, found), np.array(truth), np.float64)
            hits = {k: bool(overlap[: None if k < 0 else k].max() >= IOU) for k in RANKS}
            phrases.append({"phrase": text_of_phrase, "types": phrase.types, "hit": hits})
            truths += truth
            overlaps.append(float(np.nan_to_num(overlap[0]).max()))
        return Verdict(
            item, text, hits=sum(phrase["hit"][1] for phrase in phrases), count=len(phrases),
            quality=float(np.mean(overlaps)) if overlaps else 1.0, unparsable=unparsable,
            truth=tuple(truths), boxes=tuple(box for _, box in found),
            details={"phrases": phrases},
        )  # fmt: skip

    def figures(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """``Recall@1_all`` is the published number; a phrase counts in each of its types."""
        phrases = [phrase for verdict in verdicts for phrase in verdict.details["phrases"]]
        categories = sorted({"all"} | {name for phrase in phrases for name in phrase["types"]})
        figures = {}
        for k in RANKS:
            for category in categories:
                hits = [p["hit"][k] for p in phrases if category in ("all", *p["types"])]
                name = f"Recall@{k}" if k > 0 else "Upper_bound"
                figures[f"{name}_{category}"] = sum(hits) / len(hits) if hits else 0.0
        return figures

    def _annotated(self, item: Item, text: str) -> Phrase:
        phrases = self.entities.phrases(
            str(item.record["image_id"]), int(item.record["sentence_id"])
        )
        for phrase in phrases:
            # A phrase that occurs twice counts as its first entity both times, as released.
            if phrase.text == text:
                return phrase
        raise ValueError(
            f"{item.where}: the phrase {text!r} has no box in {self.entities.folder}; "
            "data and Entities folder do not belong together."
        )

    def _truth(self, picture: str, phrase: Phrase) -> list[tuple[int, int, int, int]]:
        boxes = self.entities.boxes(picture)[phrase.entity]
        return [enclosing_box(boxes)] if self.merge else boxes


def _boxes_of(phrase: Phrase, found: Sequence[EntityBox]) -> np.ndarray:
    wanted = normalise_phrase(phrase.text)
    boxes = [box for entity, box in found if normalise_phrase(entity) == wanted]
    return np.array(boxes or [NO_BOX])


def _items(data: Path) -> Iterator[Item]:
    content = read_json(data)
    if not isinstance(content, dict):
        raise ValueError(f"{data} holds a list, expected an object with images.")
    for index, image in enumerate(take(content, "images", list, str(data))):
        where = f"{data}, image {index}"
        caption = take(image, "caption", str, where)
        spans = take(image, "tokens_positive_eval", list, where)
        try:
            phrases = [caption[start:end] for (start, end), *_ in spans]
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: 'tokens_positive_eval' must hold lists of [start, end] pairs."
            ) from None
        record = {
            "image_id": take(image, "original_img_id", int, where),
            "sentence_id": take(image, "sentence_id", int, where),
            "phrases": phrases,
            "size": take_size(image, where),
        }
        key = f"{record['image_id']}/{record['sentence_id']}"
        yield Item(key, take(image, "file_name", str, where), where, record)
