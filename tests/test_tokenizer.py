"""Token ids of the slow, legacy LLaMA tokenizer."""

import json
import shutil

import pytest
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

from ferret_mlx.tokenizer import Tokenizer

# Computed with LlamaTokenizer of transformers 4.33.3 on the parity checkpoint: white space next
# to <region_fea> goes, next to <s>, </s> and <unk> it stays.
AROUND_SPECIAL_TOKENS = {
    "</s>    ?": [1, 2, 268, 1577],
    "日<s><s>  ": [1, 29871, 30325, 1, 1, 1678],
    "?aword  \n  </s>": [1, 1577, 1450, 536, 259, 13, 259, 2],
    "<s>\xa0<unk></s><region_fea>\n  ": [1, 1, 20246, 0, 2, 32000],
    "</s>.<region_fea><s>\t": [1, 2, 869, 32000, 1, 29871, 12],
}


@pytest.fixture(scope="module")
def tokenizer(parity) -> Tokenizer:
    return Tokenizer(parity / "checkpoint")


@pytest.fixture(scope="module")
def token_texts(parity) -> list[dict]:
    return json.loads((parity / "golden" / "tokens.json").read_text())


def test_all_texts_as_released(tokenizer, token_texts):
    assert len(token_texts) == 39
    for text in token_texts:
        assert tokenizer.encode(text["text"]) == text["ids"], text["text"]


@pytest.mark.parametrize("text", AROUND_SPECIAL_TOKENS)
def test_white_space_around_special_tokens(tokenizer, text):
    assert tokenizer.encode(text) == AROUND_SPECIAL_TOKENS[text]


def test_half_a_character_is_an_error(tokenizer):
    """sentencepiece ends with a RuntimeError about C++ types."""
    with pytest.raises(ValueError, match=r"'\\udce9', which is no character"):
        tokenizer.encode("caf\udce9")


def test_special_ids(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.region_token_id == 32000
    assert len(tokenizer) == 32001
    assert tokenizer.get_vocab()["<region_fea>"] == 32000
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


def test_decode_gives_the_answers_back(parity, manifest, tokenizer):
    import numpy as np

    for case in manifest:
        ids = np.load(parity / "golden" / f"{case['name']}.npz")["generated"].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == case["text"].strip()


def test_decode_as_the_streaming_detokenizer(tokenizer, token_texts):
    """Streamed and whole answers have to be the same text, bytes and emoji included."""
    streaming = SPMStreamingDetokenizer(tokenizer)
    for text in token_texts:
        ids = text["ids"][1:]
        streaming.reset()
        for index in ids:
            streaming.add_token(index)
        streaming.finalize()
        assert tokenizer.decode(ids) == streaming.text
    assert tokenizer.decode(tokenizer.encode("🙂 naïve [1, 2]")[1:]) == "🙂 naïve [1, 2]"


def test_bad_folders(parity, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(tmp_path)
    shutil.copy(parity / "checkpoint" / "tokenizer.model", tmp_path)
    with pytest.raises(FileNotFoundError, match="added_tokens.json"):
        Tokenizer(tmp_path)
    for text, message in {"{": "not readable JSON", "{}": "<region_fea>", "[]": "list"}.items():
        (tmp_path / "added_tokens.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)
