"""Reviews of answers by a judge behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answer_log import drop_cut_line, write_whole
from .benchmark import Item
from .judged import Judged
from .records import read_json
from .review import SYSTEM

PUBLISHED_JUDGE = "gpt-4-0314"
TEMPERATURE, MAX_TOKENS = 0.2, 1024
JUDGE_FILE = "judge.json"


class Judge:
    """Asks a model through the ``openai`` client, which repeats a request that fails.

    Args:
        model: as the server calls it; the published scores come from gpt-4-0314.
        url: of the server, such as ``http://localhost:8080/v1``; OpenAI's when left out. The key
            is that of the environment variable OPENAI_API_KEY.
        retries: so often a request is repeated, after waits that grow from half a second to eight
            seconds, or as long as the server asks.

    Raises ValueError when the client is not installed or has no key for OpenAI's server, or when
    the server's address is none.
    """

    def __init__(self, model: str, url: str | None = None, retries: int = 10):
        try:
            import openai
        except ImportError:
            raise ValueError(
                "Reviews need the openai client; install it: pip install 'ferret-mlx[judge]'."
            ) from None
        key = os.environ.get("OPENAI_API_KEY") or (url and "none")
        if not key:
            raise ValueError("OPENAI_API_KEY is not set; set it, or name a server: --judge-url.")
        self.model, self.url = model, url
        self._errors = openai.OpenAIError
        try:
            self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries)
        except Exception as error:  # InvalidURL of httpx or httpx2, as openai's version has it
            raise ValueError(f"--judge-url {url} is not an address: {error}.") from error

    def ask(self, message: str) -> str:
        """The judge's reply. Raises ValueError when it cannot be had."""
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": message},
                ],
                temperature=TEMPERATURE,
                max_tokens=MAX_TOKENS,
            )
            return response.choices[0].message.content or ""
        except (self._errors, IndexError, TypeError, AttributeError, ValueError) as error:
            where = self.url or "OpenAI"
            raise ValueError(f"The judge {self.model} at {where} gave no reply: {error}") from error


def review_answers(
    benchmark: Judged, items: Sequence[Item], texts: Mapping[str, str], folder: Path, judge: Judge
) -> None:
    """Have all answers reviewed that are not yet; each review is kept as soon as it is there.

    Args:
        texts: the answers by the key of their item.
        folder: of the review files, ``review_CATEGORY.jsonl``; created.

    Raises ValueError when the judge cannot be reached, or when the folder holds reviews by
    another judge or of other answers. What was reviewed before is kept.
    """
    _check_judge(folder, judge)
    paths = {c: folder / f"review_{c}.jsonl" for c in benchmark.categories()}
    for path in paths.values():
        drop_cut_line(path)
    done = {
        f"{category}/{row['question_id']}"
        for category, rows in benchmark.reviews_of(items, texts, folder).items()
        for row in rows
    }
    left = [item for item in items if item.key not in done]
    bar = tqdm(left, desc=f"review by {judge.model}", initial=len(items) - len(left),
               total=len(items), unit=" answers")  # fmt: skip
    for item in bar:
        text = texts[item.key]
        line = benchmark.review_line(item, text, judge.ask(benchmark.message(item, text)))
        with paths[item.record["category"]].open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def judge_of(folder: Path) -> str | None:
    """Who wrote the reviews of a folder, where it is known. Raises ValueError."""
    path = folder / JUDGE_FILE
    known = read_json(path) if path.exists() else {}
    return known.get("model") if isinstance(known, dict) else None


def _check_judge(folder: Path, judge: Judge) -> None:
    path = folder / JUDGE_FILE
    settings: dict[str, Any] = {"model": judge.model, "temperature": TEMPERATURE}
    if path.exists():
        if (before := read_json(path)) != settings:
            raise ValueError(
                f"{folder} holds reviews by {json.dumps(before)}, not by {judge.model}, and scores "
                "of two judges cannot be compared; give another --output."
            )
    elif any(folder.glob("review_*.jsonl")):
        raise ValueError(f"{folder} holds reviews by an unknown judge; give another --output.")
    else:
        write_whole(path, json.dumps(settings) + "\n")
