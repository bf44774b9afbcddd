"""Text <-> token ids: the slow, legacy SentencePiece tokenizer of the first LLaMA models.

Newer tokenizer implementations give other ids around added tokens, so this one calls
``sentencepiece`` itself. It also offers the few names that mlx-lm's ``SPMStreamingDetokenizer``
asks of a tokenizer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .json_fields import read_json
from .prompt import REGION_TOKEN

_SPACE = "\u2581"


class Tokenizer:
    """Reads ``tokenizer.model`` and ``added_tokens.json`` of a checkpoint folder.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: one of them is damaged, or the added tokens lack ``<region_fea>``.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._pieces = _load_pieces(Path(folder) / "tokenizer.model")
        self._added = _load_added(Path(folder) / "added_tokens.json")
        sp = self._pieces
        self.bos_token_id: int = sp.bos_id()
        self.eos_token_id: int = sp.eos_id()
        self.eos_token_ids: set[int] = {self.eos_token_id}
        self.bos_token: str = sp.id_to_piece(self.bos_token_id)
        self.eos_token: str = sp.id_to_piece(self.eos_token_id)
        self.region_token_id: int = self._added[REGION_TOKEN]

        self.vocab: dict[str, int] = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
        self.vocab.update(self._added)
        self._tokens = [""] * (max(self.vocab.values()) + 1)
        for token, index in self.vocab.items():
            self._tokens[index] = token
        self._special = {
            token: self.vocab[token]
            for token in (sp.id_to_piece(sp.unk_id()), self.bos_token, self.eos_token, *self._added)
        }
        self.all_special_ids: set[int] = set(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def __len__(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocab)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text part, BOS first.

        The text is split at special and added tokens, and each piece between them is encoded on
        its own, with a leading space of its own. White space next to an added token is dropped,
        so that ``] <region_fea>?`` becomes "]", the region token and " ?"; next to ``<s>``,
        ``</s>`` and ``<unk>`` it stays, as in transformers 4.33.

        Raises ValueError for half a character, as words that are not UTF-8 have on a command line.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds {text[error.start]!r}, which is no character; write it in UTF-8."
            ) from None
        ids = [self.bos_token_id] if add_special_tokens else []
        # With one capturing group, the odd entries are the special tokens.
        parts = self._split(text)
        for position, part in enumerate(parts):
            if position % 2:
                ids.append(self._special[part])
                continue
            if position > 0 and parts[position - 1] in self._added:
                part = part.lstrip()
            if position < len(parts) - 1 and parts[position + 1] in self._added:
                part = part.rstrip()
            if part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids, without the leading space; as mlx-lm's streaming decoder has it."""
        skipped = self.all_special_ids if skip_special_tokens else ()
        data = b"".join(_token_bytes(self._token(i)) for i in ids if int(i) not in skipped)
        return data.decode("utf-8", "replace").removeprefix(" ")

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._token(i) for i in ids]

    def _token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else ""


def _token_bytes(token: str) -> bytes:
    # Byte-fallback pieces are spelled <0xNN>.
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _load_pieces(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; the folder is not a Ferret checkpoint.")
    try:
        pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model; download or copy it again."
        ) from error
    return pieces


def _load_added(path: Path) -> dict[str, int]:
    added = read_json(path)
    if (
        not all(type(index) is int and index >= 0 for index in added.values())
        or REGION_TOKEN not in added
    ):
        raise ValueError(
            f"{path} must map token texts to ids and hold {REGION_TOKEN}; copy it again."
        )
    return added
