"""What two processes of one run do, each for itself; started by test_sharding.py.

Writes what happened to FOLDER/RANK.json.
"""

import io
import json
import sys
from contextlib import redirect_stderr
from pathlib import Path

import mlx.core as mx

from ferret_mlx import Box, Point, Session, generate, load
from ferret_mlx.cli import generate_main
from ferret_mlx.distribution import Ranks

PICTURE = "examples/rocket.png"
QUESTION = "What is [region0]? Give its box."


def refused(words: list) -> tuple[int, str]:
    """Exit status and errors of the command line."""
    errors = io.StringIO()
    with redirect_stderr(errors):
        try:
            generate_main([str(word) for word in words])
        except SystemExit as stop:
            return stop.code, errors.getvalue()
    return 0, errors.getvalue()


def main(folder: Path) -> None:
    ranks = Ranks()
    found: dict = {}
    model, processor = load(tensor_group=ranks.group)
    found["heads"] = model.layers[0].self_attn.n_heads
    question = (model, processor, PICTURE, QUESTION, [Point(275, 135)])
    found["sampled"] = generate(*question, temp=1.0, seed=3)
    session = Session(model, processor, PICTURE)
    first = "".join(chunk.text for chunk in session.ask(QUESTION, [Box(16, 189, 139, 313)]))
    found["turns"] = [first, "".join(chunk.text for chunk in session.ask("Where is the clock?"))]

    if ranks.rank == 1:  # its own tokens would be others
        head = model.language_model.lm_head
        head.weight = -head.weight
    found["disturbed"] = generate(*question)
    asked = [(QUESTION, [Point(275, 135)]), ("Where is the clock?", [])]
    answers = Session(model, processor, PICTURE).ask_many(asked)
    found["disturbed many"] = [a.text for a in sorted(answers, key=lambda a: a.index)]
    found["disturbed sampled"] = generate(*question, temp=1.0, seed=3)

    # Their words differ where it says so, as files on two machines may.
    other = ranks.rank == 1
    missing, fox, mask = folder / "missing.png", "examples/fox.png", "examples/masks/"
    question = ["--prompt", "What is [region0]?", "--point", "275,135"]
    for name, words in {
        "missing here": ["--image", PICTURE if other else missing, *question],
        "missing there": ["--image", missing if other else PICTURE, *question],
        "no model there": [
            "--image", PICTURE, *question, *(["--model", folder] if other else []),
        ],
        "other picture": ["--image", fox if other else PICTURE, *question],
        "other mask": [
            "--image", "examples/umbrella.png", "--prompt", "What is this?",
            "--mask", mask + ("cat.png" if other else "umbrella.png"),
        ],
        "other model": [
            "--image", PICTURE, *question, *(["--model", sys.argv[2]] if other else []),
        ],
        "narrow heads": ["--image", PICTURE, *question, "--model", sys.argv[3], "--kv-bits", 8],
        "stdin": ["--image", PICTURE, "--regions", "-", "--prompt", "What?"],
        "files": ["--image", PICTURE, *question, "--save-image", folder / f"{ranks.rank}.png"],
    }.items():  # fmt: skip
        found[name] = refused(words)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    mx.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
