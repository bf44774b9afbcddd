"""The model card of the trained checkpoint: ``python -m reference.card FOLDER --facts FILE``.

FILE is JSON: ``{"date": "YYYY-MM-DD", "state": TEXT, "data": TEXT (both optional), "stages":
[{"name", "device", "hours", "steps", "pictures"}, ...]}``, one entry per run in the order of
training; ``state`` says what is still missing.
``--accuracy`` takes what ``benchmarks.accuracy`` printed. ``convert.py`` carries license, tags and
text of the card over into the card of the MLX folder.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from ferret_mlx.errors import ArgumentParser, run_command

from .glyphs import NAMES, with_article
from .layout import read_released

STAGE_KEYS = ("name", "device", "hours", "steps", "pictures")
COLUMNS = {
    "point": "by point",
    "box": "by box",
    "silhouette": "by silhouette",
    "find@0.5": "found, IoU >= 0.5",
    "yes_no": "yes / no",
    "pair": "overlapping pair",
    "same answers": "same answers as the first row",
    "same words": "same but for boxes",
    "box shift": "box numbers differ by, of 1000",
}
DATA = (
    "Only drawn scenes: up to 7 glyphs of Noto Color Emoji on procedural backgrounds, with "
    "questions and answers written by templates (`reference/scenes.py`, "
    "`reference/conversations.py`). Training, test and example scenes come from different "
    "random streams."
)

FRONT = """\
---
language: en
license: mit
library_name: mlx
pipeline_tag: image-text-to-text
tags:
- ferret
- mlx
- referring
- grounding
---
"""
INTRODUCTION = """\
# ferret-tiny

A Ferret of {millions:.1f} M parameters: the architecture, prompt and checkpoint layout of
[apple/ml-ferret](https://github.com/apple/ml-ferret) at small widths, trained from scratch for
ferret-mlx. It is there to try the code and to test it. It holds no weights of Apple, LLaMA or CLIP.

| part | size |
| --- | --- |
| picture | {size} x {size} pixels, {grid} x {grid} patches |
| vision tower (CLIP ViT) | {vision_layers} layers of width {vision_width}, the last never run |
| language model (LLaMA) | {layers} layers of width {hidden}, {heads} heads, {vocabulary} tokens |

## What it can and cannot do

It names and finds these {count} drawn objects, counts them, lists them with boxes, tells where
one lies from another and answers yes or no, in the wording of its training questions:
{names}.

It has never seen a photograph or any other object, and answers in these words whatever it is
shown. Boxes are as fine as {size} pixels allow. Most questions of its training were first
questions; in about one picture of seven they formed one conversation.
"""


def model_card(folder: Path, facts: dict, accuracy: dict | None = None) -> str:
    """The card's text. ``accuracy``: the JSON object that ``benchmarks.accuracy`` prints last.

    Raises ValueError when a fact is missing.
    """
    _check(facts)
    twin = read_released(folder)
    config = twin.config
    text = INTRODUCTION.format(
        millions=sum(p.numel() for p in twin.parameters()) / 1e6,
        size=config.image_size,
        grid=config.grid,
        vision_layers=config.vision_layers,
        vision_width=config.vision_width,
        layers=config.layers,
        hidden=config.hidden_size,
        heads=config.heads,
        vocabulary=config.vocab_size,
        count=len(NAMES),
        names=", ".join(with_article(name) for name in NAMES),
    )
    sections = [text.strip()]
    if facts.get("state"):
        sections += ["## State", facts["state"]]
    sections += ["## Training", facts.get("data", DATA), _stages(facts["stages"])]
    hours = sum(stage["hours"] for stage in facts["stages"])
    sections.append(f"{hours:.1f} hours in all; finished on {facts['date']}.")
    if accuracy is not None:
        sections += ["## Accuracy", _accuracy(accuracy)]
    sections += [
        "## License",
        "MIT. The glyphs of the training scenes are Noto Color Emoji (Google), SIL Open Font "
        "License 1.1; no glyph is part of the weights.",
    ]
    return FRONT + "\n\n".join(sections) + "\n"


def _check(facts: dict) -> None:
    if not isinstance(facts, dict) or not facts.get("date") or not facts.get("stages"):
        raise ValueError("the facts must be a JSON object with 'date' and a list of 'stages'")
    for number, stage in enumerate(facts["stages"]):
        if missing := [key for key in STAGE_KEYS if key not in stage]:
            raise ValueError(f"stage {number} of the facts lacks {', '.join(missing)}")


def _stages(stages: list[dict]) -> str:
    lines = ["| stage | device | hours | steps | pictures |", "| --- | --- | --- | --- | --- |"]
    for stage in stages:
        lines.append(
            f"| {stage['name']} | {stage['device']} | {stage['hours']:.1f} | "
            f"{stage['steps']:,} | {stage['pictures']:,} |"
        )
    return "\n".join(lines)


def _accuracy(accuracy: dict) -> str:
    rows = accuracy["rows"]
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| % | " + " | ".join(COLUMNS[key] for key in keys) + " |"]
    lines.append("| --- " * (len(keys) + 1) + "|")
    for label, row in rows.items():
        cells = [str(row.get(key, "")) for key in keys]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    intro = f"On {accuracy['scenes']:,} unseen scenes ({accuracy['machine']}), measured by "
    return intro + "`python -m benchmarks.accuracy`:\n\n" + "\n".join(lines)


def _read(path: Path, last_line: bool = False):
    text = path.read_text()
    try:
        return json.loads(text.strip().splitlines()[-1] if last_line else text)
    except (json.JSONDecodeError, IndexError):
        raise ValueError(f"{path} is not JSON{' in its last line' if last_line else ''}") from None


@run_command
def main(argv=None) -> None:
    parser = ArgumentParser(description="Write the model card of a trained checkpoint.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="released-layout folder")
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument(
        "--accuracy", type=Path, metavar="FILE", help="what benchmarks.accuracy printed"
    )
    args = parser.parse_args(argv)
    accuracy = _read(args.accuracy, last_line=True) if args.accuracy else None
    text = model_card(args.folder, _read(args.facts), accuracy)
    ModelCard(text)  # refuses front matter that the Hub would not read
    (args.folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
