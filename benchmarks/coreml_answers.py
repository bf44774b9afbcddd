"""Answers with Core ML's features in place of MLX's: ``python -m benchmarks.coreml_answers``.

The package is interpreted in NumPy (``tests/mil_interpreter.py``), so this runs without macOS: each
operation is rounded to the package's precision, as Core ML does at the least. Prints the share of
questions that both towers answer with the same text, and the relative difference of the features;
JSON in the last line.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ferret_mlx import generate, load
from ferret_mlx.coreml_package import BITS, PRECISIONS, PackageOptions, convert_vision
from ferret_mlx.coreml_tower import CoreMLTower
from ferret_mlx.hub import bundled_model
from reference.scenes import compose
from tests.mil_interpreter import Interpreter

from .accuracy import MAX_TOKENS
from .measure import machine_line
from .scene_questions import questions


def asked(first_scene: int):
    """(scene, number of the question in its scene, question), without end."""
    number = first_scene
    while True:
        scene = compose("test", number)
        for order, question in enumerate(questions(scene, number)):
            yield scene, order, question
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="MLX folder; default: the bundled model")
    add("--questions", type=int, default=200)
    add("--first-scene", type=int, default=0)
    add("--precision", choices=PRECISIONS, default="float16")
    add("--bits", type=int, choices=BITS, help="compress the weights")
    args = parser.parse_args()
    folder = args.model or bundled_model()
    options = PackageOptions(args.precision, args.bits)
    model, processor = load(folder)
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "vision.mlpackage"
        convert_vision(folder, package, options)
        # Reads its weights at once.
        tower = CoreMLTower(Interpreter(package), model.config, False, "")
    towers = {"mlx": model.vision_tower, "interpreted": tower}
    answers = {name: [] for name in towers}
    errors = []
    chosen = islice(asked(args.first_scene), args.questions)
    for scene, order, question in tqdm(chosen, total=args.questions, mininterval=5):
        pixels = processor.pixel_values(scene.image)
        features, found = (np.array(encode(pixels)) for encode in towers.values())
        errors.append(np.linalg.norm(found - features) / np.linalg.norm(features))
        for name, encode in towers.items():
            model.vision_tower = encode
            text = generate(
                model, processor, scene.image, question.text, question.regions,
                seed=order, max_tokens=MAX_TOKENS,
            )  # fmt: skip
            answers[name].append(text)
    pairs = zip(*answers.values(), strict=True)
    same = round(100 * float(np.mean([a == b for a, b in pairs])), 2)
    print(f"{options}: {same} % of {args.questions} answers are the same")
    print(f"features: relative difference {np.median(errors):.1e}, at most {max(errors):.1e}")
    results = {"same": same, "questions": args.questions, "largest difference": float(max(errors))}
    print(json.dumps({"machine": machine_line(), "package": str(options), "results": results}))


if __name__ == "__main__":
    main()
