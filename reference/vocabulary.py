"""ferret-tiny's SentencePiece vocabulary and files: ``python -m reference.vocabulary DIR``.

A unigram model written down piece by piece, not trained: the words of the template and of the
conversations, every number from 0 to 999 as one piece (so a box costs nine tokens), ", " before a
number as one piece, letters, and bytes for all the rest.
"""

import json
import re
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as pb

from ferret_mlx.prompt import TEMPLATES

from . import conversations as c
from .glyphs import NAMES, plural, with_article

SPACE = "\u2581"
REGION_TOKEN = "<region_fea>"
COMMON = """
    a about all also and any are as at be before behind between big black blue both bottom
    brown but by can center color corner could describe do does down each explain first for
    front from give go good green grey has have here his how i if in inside into is it its
    kind large last left like line little look made many may me middle more most my near new
    next no not number object objects of off old on one only or orange other out over part
    people person picture pink place please purple red right same scene see she shape show
    side small some than thank that the their them then there these they thing things this
    those to top two under up use very was we were what when where which white who why will
    with would yellow yes you your image animal animals food fruit vehicle plant face box
    boxes region coordinates three four five six seven eight purpose detail relationship
    holding wearing biggest smallest
"""
PUNCTUATION = tuple(".,?!:;'\"()[]-/&%+=*#@_<>$")


QUESTIONS = (
    *c.NAME,
    *c.NAME_AND_BOX,
    *c.LIST,
    *c.RELATE,
    *c.FIND,
    *c.ANY,
    *c.IS_IT,
    *c.FIND_ALL,
    *c.COUNT,
)


def _words() -> list[str]:
    """Every word that template, questions and answers may hold, most frequent first."""
    asked = [*c.NAME, *c.NAME_AND_BOX, *c.LIST, *c.RELATE]
    for form, name in product((*c.FIND, *c.ANY, *c.IS_IT), NAMES):
        asked.append(form.format(name))
    for form, name in product((*c.FIND_ALL, *c.COUNT), NAMES):
        asked.append(form.format(plural(name)))
    said = [f"{with_article(n)} {with_article(n).capitalize()} The {n} the {n} is" for n in NAMES]
    said += ["left of right of above below Yes No USER ASSISTANT"] * 50
    said += [n + " " + n.capitalize() for n in c.NUMBERS]
    text = " ".join([*asked, *said, *[TEMPLATES["v1"].system] * 50, COMMON])
    text += " " + COMMON.title()
    return [w for w, _ in Counter(re.findall(r"[A-Za-z]+", text)).most_common()]


def pieces() -> list[tuple[str, float]]:
    """(piece, score) in id order after the specials and bytes; frequent words score higher."""
    found: dict[str, float] = {}
    opening = {form.split()[0] for form in QUESTIONS}  # they follow a line break, not a space
    opening |= {"left", "right", "width", "height", "visuals"}
    for rank, word in enumerate(_words()):
        found[SPACE + word] = -4 - np.log(rank + 1)
        if word in opening:
            found[word] = -8 - np.log(rank + 1)
    for mark in PUNCTUATION:
        found[mark] = -4.0
        found[SPACE + mark] = -5.0
    found["," + SPACE] = -11.0
    found |= {str(n): -9.0 for n in range(1000)}
    found |= {chr(o): -13.0 for o in (*range(65, 91), *range(97, 123))}
    found[SPACE] = -8.0
    return list(found.items())


def build_model() -> bytes:
    """The ``tokenizer.model`` file: settings as LLaMA's (no normalisation, dummy prefix, bytes)."""
    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 0, 1
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    kinds = pb.ModelProto.SentencePiece
    for text, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=text, score=0.0, type=kind)
    for value in range(256):
        model.pieces.add(piece=f"<0x{value:02X}>", score=0.0, type=kinds.BYTE)
    for text, score in pieces():
        model.pieces.add(piece=text, score=float(score), type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def write_tokenizer(folder: Path) -> None:
    """``tokenizer.model`` and the JSON files that transformers' LlamaTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(build_model())
    count = 3 + 256 + len(pieces())
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = {
        f"{n}_token": {"content": t, **mark}
        for n, t in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    typed = {key: {"__type": "AddedToken", **value} for key, value in named.items()}
    settings = {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "legacy": True, "model_max_length": 2048, "pad_token": None, "sp_model_kwargs": {},
        "spaces_between_special_tokens": False, "tokenizer_class": "LlamaTokenizer", **typed,
    }  # fmt: skip
    files = {
        "added_tokens.json": {REGION_TOKEN: count},
        "special_tokens_map.json": {**named, "pad_token": "<unk>"},
        "tokenizer_config.json": settings,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
