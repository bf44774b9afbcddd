"""Prompts: the released template, the order of regions, and what is refused."""

import numpy as np
import pytest

from ferret_mlx.prompt import (
    IMAGE_TOKEN_INDEX,
    build_prompt,
    name_regions,
    tokenize_prompt,
    without_placeholders,
)
from ferret_mlx.tokenizer import Tokenizer


def as_turns(case: dict) -> list[dict]:
    turns = []
    for turn in case["turns"]:
        turns.append({"role": "user", "content": turn["user"]})
        if "assistant" in turn:
            turns.append({"role": "assistant", "content": turn["assistant"]})
    return turns


def question(text: str, *region_texts: str) -> str:
    """The user text as it stands in the prompt."""
    prompt, _ = build_prompt(text, region_texts)
    return prompt.split("<image>\n")[1].removesuffix(" ASSISTANT:")


def test_prompts_and_ids_as_released(parity, manifest):
    tokenizer = Tokenizer(parity / "checkpoint")
    for case in manifest:
        prompt, order = build_prompt(as_turns(case), case["region_texts"])
        assert prompt == case["prompt"]
        assert order == case["region_order"]
        ids = tokenize_prompt(prompt, tokenizer)
        golden = np.load(parity / "golden" / f"{case['name']}.npz")["input_ids"]
        assert ids == golden.tolist() and len(ids) == case["n_input_ids"]
        assert ids.count(IMAGE_TOKEN_INDEX) == 1


def test_unnamed_regions_are_appended_to_the_last_user_text():
    assert question("What is this?", "[1, 2]") == "What is this? [1, 2] <region_fea>"
    assert question("Compare", "[1, 2]", "[3, 4]") == (
        "Compare [1, 2] <region_fea>, [3, 4] <region_fea>"
    )
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi [region0]"},
        {"role": "user", "content": "And?"},
    ]
    prompt, order = build_prompt(turns, ["[1, 2]"])
    # Earlier answers stay verbatim: only user texts name regions.
    assert prompt.endswith(
        "USER: <image>\nHello ASSISTANT: Hi [region0]</s>USER: And? [1, 2] <region_fea> ASSISTANT:"
    )
    assert order == [0]


def test_regions_in_text_order_and_repeated():
    prompt, order = build_prompt("[region1] [region0] [region1]", ["[1, 1]", "[2, 2]"])
    assert order == [1, 0, 1]
    assert "[2, 2] <region_fea> [1, 1] <region_fea> [2, 2] <region_fea>" in prompt


def test_user_text_is_verbatim():
    text = "  {braces} \\1 \t[region] [regionx] é  "
    assert question(text) == text


def test_image_wrapped_in_start_and_end():
    prompt, _ = build_prompt("What?", use_im_start_end=True)
    assert "USER: <im_start><image><im_end>\nWhat?" in prompt


def test_whole_conversation_for_training():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    assert build_prompt(turns)[0].endswith("USER: <image>\nHi ASSISTANT: Yes.</s>")


@pytest.mark.parametrize(
    ("turns", "regions", "message"),
    [
        ("", [], "empty"),
        (" \n", [], "empty"),
        ([], [], "no turn"),
        ("[region3]?", ["[1, 2]", "[3, 4]"], r"\[region3\], but 2 given"),
        ("[region0]?", [], "no region was given"),
        ("[region1]?", ["[1, 2]", "[3, 4]"], r"not \[region0\]"),
        ("an <image>", [], "<image>"),
        ("a <region_fea>", ["[1, 2]"], "<region_fea>"),
        ([{"role": "assistant", "content": "x"}], [], "expected 'user'"),
        ([{"role": "user", "content": "x"}] * 2, [], "expected 'assistant'"),
        ([{"role": "user", "content": 3}], [], "must be a str"),
        ([{"role": "user"}], [], "'content'"),
        (["What?"], [], "dict"),
    ],
)
def test_bad_prompts(turns, regions, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_prompt(turns, regions)
    assert "\n" not in str(caught.value)


def test_unknown_template():
    with pytest.raises(ValueError, match="known: v1"):
        build_prompt("What?", template="v9")


def test_named_regions_counted_from_elsewhere():
    """A later question's regions come after those of the conversation."""
    assert name_regions("Is [region1] like [region0]?", 2, 3) == "Is [region4] like [region3]?"
    assert name_regions("Compare", 2, 9) == "Compare [region9], [region10]"
    assert name_regions("Why?", 0, 9) == "Why?"
    with pytest.raises(ValueError, match=r"\[region1\], but 1 given"):
        name_regions("[region1]", 1, 1)
    with pytest.raises(ValueError, match=r"not \[region1\]"):
        name_regions("[region0]", 2)


def test_answers_lose_their_placeholders():
    assert without_placeholders("A dog <region_fea> [1, 2]<image>.") == "A dog  [1, 2]."
    # What is left must not make a new one.
    assert without_placeholders("<im<region_fea>age>") == ""
