"""ferret-tiny's written-down vocabulary: what a word, a number and a box cost."""

import json
import re
import string

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from ferret_mlx.prompt import TEMPLATES, build_prompt, tokenize_prompt
from ferret_mlx.tokenizer import Tokenizer
from reference.conversations import converse
from reference.glyphs import NAMES, plural, with_article
from reference.scenes import compose
from reference.vocabulary import REGION_TOKEN, build_model, pieces, write_tokenizer

SPACE = "\u2581"
TEXTS = (
    "",
    "What is the object at the top left?",
    "A dog [12, 345, 600, 999], an owl [0, 7, 88, 999].",
    "  two  spaces and a trailing one ",
    "line\nbreak\ttab",
    "Zyzzyva qu1xotic 1000x1000 [1000, 1001]",
    "naïve café 日本語 🐶 \u00a0 \u200b",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


def texts_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text)[1:])


def test_size_and_special_ids(folder, tokenizer):
    count = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    assert 1000 <= count <= 2000
    assert tokenizer.region_token_id == count == len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == [
        *("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")
    ]


def test_pieces_are_distinct():
    """SentencePiece refuses a model that holds a piece twice, or reads it differently."""
    found = [text for text, _ in pieces()]
    assert len(set(found)) == len(found)
    assert build_model() == build_model()


def test_numbers_are_single_pieces_in_a_row(tokenizer):
    """Training takes the 1,000 ids from that of "0" on as the numbers 0 to 999."""
    zero = tokenizer.get_vocab()["0"]
    for number in range(1000):
        assert tokenizer.convert_ids_to_tokens([zero + number]) == [str(number)]
        assert tokenizer.encode(f"[{number}]")[2] == zero + number
        assert texts_of(tokenizer, f"[7, {number}]") == [
            f"{SPACE}[",
            "7",
            f",{SPACE}",
            str(number),
            "]",
        ]


def test_a_box_costs_nine_tokens(tokenizer):
    box = ["12", f",{SPACE}", "345", f",{SPACE}", "600", f",{SPACE}", "999", "]"]
    assert texts_of(tokenizer, "[12, 345, 600, 999]") == [f"{SPACE}[", *box]
    assert texts_of(tokenizer, "A dog [12, 345, 600, 999].")[2:] == [f"{SPACE}[", *box, "."]


def test_names_are_single_pieces(tokenizer):
    for name in NAMES:
        assert texts_of(tokenizer, f"the {name}.") == [f"{SPACE}the", SPACE + name, "."]
        assert texts_of(tokenizer, f"the {plural(name)}?")[1:] == [SPACE + plural(name), "?"]
        answer = with_article(name).capitalize()
        assert texts_of(tokenizer, answer) == [SPACE + word for word in answer.split()]


def test_ids_are_sentencepiece_ids(folder, tokenizer):
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (*TEXTS, TEMPLATES["v1"].system):
        assert tokenizer.encode(text) == [1, *reference.encode(text)]


def test_unknown_text_round_trips(tokenizer):
    """Through bytes: no text becomes <unk>, none is normalised, no space is lost."""
    for text in TEXTS:
        ids = tokenizer.encode(text)[1:]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    every = string.printable + "".join(map(chr, range(160, 0x2000, 37)))
    assert tokenizer.decode(tokenizer.encode(every)[1:]) == every


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_json_files_say_what_the_released_ones_say(folder, parity, name):
    """transformers reads these; a stray value there gives other ids than the ones trained on."""
    ours, released = (json.loads((f / name).read_text()) for f in (folder, parity / "checkpoint"))
    for key in ours.keys() & released.keys() - {"model_max_length"}:
        assert content(ours[key]) == content(released[key]), key
    assert len(ours.keys() & released.keys()) > 3


def content(value):
    return value["content"] if isinstance(value, dict) and value.get("content") else value


def test_template_is_short(tokenizer):
    """Words of the template are whole pieces: the prefix of every prompt."""
    ids = tokenize_prompt(build_prompt("What is this?")[0], tokenizer)
    tokens = [t for t in tokenizer.convert_ids_to_tokens(ids[1:]) if t]
    spelled = {t for t in tokens if re.fullmatch("[A-Za-z]", t)}
    assert spelled <= {"x", "y"}
    assert len(ids) < 110


def test_conversations_need_no_spelling(tokenizer):
    """Every word of questions and answers is a piece: none is spelled in letters or bytes."""
    for number in range(40):
        scene = compose("validation", number)
        for turn in converse(scene, np.random.default_rng(number), 15):
            texts = [region.text(scene.size) for region in turn.regions]
            tail = build_prompt(turn.question, texts)[0].split("<image>")[1]
            for text in (f"{tail} {turn.answer}", f"USER: {tail[1:]} {turn.answer}"):
                tokens = texts_of(tokenizer, text.replace("\n", " "))
                spelled = [t for t in tokens if re.fullmatch(r"[A-Za-z]|<0x..>", t)]
                assert not spelled, (text, spelled)
                first = texts_of(tokenizer, tail)
                assert first[:2] == [SPACE, "<0x0A>"] and not re.fullmatch("[A-Za-z]", first[2])


def test_region_token(tokenizer):
    ids = tokenizer.encode(f"What is [1, 2] {REGION_TOKEN}?")
    assert ids.count(tokenizer.region_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(ids[-3:]) == ["]", REGION_TOKEN, f"{SPACE}?"]
