"""Turns of a conversation -> the whole prompt -> token ids with placeholders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200
REGION_TOKEN = "<region_fea>"
_NAMED_REGION = re.compile(r"\[region([0-9]+)\]")


@dataclass(frozen=True)
class Template:
    """The fixed text around the turns; ``system`` is followed by one more space."""

    system: str
    user: str = "USER: {} "
    assistant: str = "ASSISTANT: {}</s>"
    open_turn: str = "ASSISTANT:"


TEMPLATES = {
    "v1": Template(
        system=(
            "A chat between a human and an AI that understands visuals. "
            "In images, [x, y] denotes points: top-left [0, 0], "
            "bottom-right [width-1, height-1]. Increasing x moves right; y moves down. "
            "Bounding box: [x1, y1, x2, y2]. Image size: 1000x1000. Follow instructions. "
        )
    ),
}

Turn = Mapping[str, str]


def build_prompt(
    turns: str | Sequence[Turn],
    region_texts: Sequence[str] = (),
    template: str = "v1",
    use_im_start_end: bool = False,
) -> tuple[str, list[int]]:
    """The whole prompt and the order in which the regions appear in it.

    ``[region0]`` in a user text becomes ``region_texts[0] <region_fea>``. When no user text names
    a region, all are appended to the last one, after a space and joined by ", ". Apart from that
    user texts and earlier answers are taken verbatim.

    Args:
        turns: a question, or turns ``{"role": "user" | "assistant", "content": str}`` that
            alternate and start with the user. After a last user turn the prompt ends with the
            open answer; a conversation that ends with an answer (training) ends after it.
        region_texts: each region's coordinates, ``"[X, Y]"`` or ``"[X1, Y1, X2, Y2]"``.
        template: a name in ``TEMPLATES``.
        use_im_start_end: wrap the image in ``<im_start>`` and ``<im_end>``
            (``mm_use_im_start_end`` of the checkpoint's config).

    Returns:
        The prompt, with ``<image>`` and ``<region_fea>`` in it, and for each ``<region_fea>`` in
        text order the index of its region.

    Raises:
        ValueError: unknown template; malformed turns; an empty user text; a placeholder token in
            a text; a region that is named but not given, or given but not named while others are.
    """
    if template not in TEMPLATES:
        raise ValueError(f"Unknown prompt template {template!r}; known: {', '.join(TEMPLATES)}.")
    form = TEMPLATES[template]
    checked = _check_turns(turns)
    users = [text for role, text in checked if role == "user"]
    order = [int(index) for text in users for index in _NAMED_REGION.findall(text)]
    _check_names(order, len(region_texts))
    if region_texts and not order:
        order = list(range(len(region_texts)))
        last = max(i for i, (role, _) in enumerate(checked) if role == "user")
        checked[last] = ("user", name_regions(checked[last][1], len(region_texts)))

    def coordinates(match: re.Match[str]) -> str:
        return f"{region_texts[int(match[1])]} {REGION_TOKEN}"

    image = f"<im_start>{IMAGE_TOKEN}<im_end>" if use_im_start_end else IMAGE_TOKEN
    prompt = form.system + " "
    for position, (role, text) in enumerate(checked):
        if role == "user":
            text = _NAMED_REGION.sub(coordinates, text)
            prompt += form.user.format(f"{image}\n{text}" if position == 0 else text)
        else:
            prompt += form.assistant.format(text)
    return prompt + (form.open_turn if checked[-1][0] == "user" else ""), order


def name_regions(text: str, count: int, first: int = 0) -> str:
    """A user text that names each of its ``count`` regions, counted from ``first`` on.

    A text that names none gets all of them appended. Raises ValueError for a region that is
    named but not given, or given but not named while others are.
    """
    named = [int(index) for index in _NAMED_REGION.findall(text)]
    _check_names(named, count)
    if count and not named:
        text = f"{text} {', '.join(f'[region{index}]' for index in range(count))}"
    return _NAMED_REGION.sub(lambda match: f"[region{int(match[1]) + first}]", text)


def without_placeholders(text: str) -> str:
    """An answer as a turn may hold it: without the tokens that stand for pixels."""
    while any(token in text for token in (IMAGE_TOKEN, REGION_TOKEN)):
        text = text.replace(IMAGE_TOKEN, "").replace(REGION_TOKEN, "")
    return text


def tokenize_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids, with -200 for the image.

    The parts before and after ``<image>`` are tokenized on their own and only the first keeps its
    BOS, as in the released code.
    """
    parts = text.split(IMAGE_TOKEN)
    if len(parts) != 2:
        raise ValueError(f"A prompt must hold {IMAGE_TOKEN} once, got it {len(parts) - 1} times.")
    before, after = (tokenizer.encode(part) for part in parts)
    return [*before, IMAGE_TOKEN_INDEX, *after[1:]]


def _check_turns(turns: str | Sequence[Turn]) -> list[tuple[str, str]]:
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not turns:
        raise ValueError("There is no turn; give a question.")
    checked = []
    for position, turn in enumerate(turns):
        expected = "assistant" if position % 2 else "user"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise ValueError(
                f"Turn {position} must be a dict with 'role' and 'content', got {turn!r}."
            )
        role, text = turn["role"], turn["content"]
        if role != expected:
            raise ValueError(
                f"Turn {position} has the role {role!r}, expected {expected!r}; "
                f"turns alternate and start with the user."
            )
        if not isinstance(text, str):
            raise ValueError(f"The content of turn {position} must be a str, got {text!r}.")
        if role == "user" and not text.strip():
            raise ValueError("The prompt is empty; ask something about the picture.")
        for token in (IMAGE_TOKEN, REGION_TOKEN):
            if token in text:
                raise ValueError(
                    f"The {role} text holds {token}, which stands for pixels; leave it out, "
                    f"and name regions as [region0], [region1], ..."
                )
        checked.append((role, text))
    return checked


def _check_names(named: Sequence[int], count: int) -> None:
    unknown = sorted(set(named) - set(range(count)))
    if unknown:
        given = "no region was given" if count == 0 else f"{count} given, counted from 0"
        raise ValueError(f"The prompt names [region{unknown[0]}], but {given}; fix one of the two.")
    missing = sorted(set(range(count)) - set(named))
    if named and missing:
        raise ValueError(
            f"The prompt names some regions but not [region{missing[0]}]; "
            f"name all {count} or none (then they are appended)."
        )
