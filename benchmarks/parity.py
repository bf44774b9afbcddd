"""The README's parity table: ``python -m benchmarks.parity``.

Largest difference over the eight cases of tests/data/parity between the released implementation's
numbers and this one's, for the MLX side and for the PyTorch twin.
"""

import json
import platform
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step

from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.config import FerretConfig
from ferret_mlx.image import open_image, preprocess
from ferret_mlx.model import Model
from reference.layout import read_released

DATA = Path(__file__).parents[1] / "tests" / "data" / "parity"


def relative(ours, released: np.ndarray) -> float:
    """Norm of the difference over the norm of the released values."""
    return float(np.linalg.norm(np.array(ours) - released) / np.linalg.norm(released))


def load_mlx() -> Model:
    weights = {}
    for folder in (DATA / "checkpoint", DATA / "checkpoint" / "vision_tower"):
        with open_checkpoint(folder) as checkpoint:
            weights |= {name: checkpoint.read(name) for name in checkpoint.names()}
    model = Model(FerretConfig.from_folder(DATA / "checkpoint"))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.set_dtype(mx.float32)
    return model


def region_inputs(numbers: dict, array, neighbors: bool) -> dict:
    """The stored points and starts, with or without the stored neighbours, for either side."""
    if "points_xy" not in numbers:
        return {}
    given = {
        "region_points": array(numbers["points_xy"]),
        "starts": [array(numbers[f"fps_idx_stage{s}"][:, 0]) for s in (0, 1)],
    }
    if neighbors:
        given["neighbors"] = [array(numbers[f"knn_idx_stage{s}"]) for s in (0, 1)]
    return given


def compare_mlx(model: Model, case: dict, numbers: dict) -> dict[str, float]:
    config = model.config
    size = config.vision.image_size
    picture = open_image(DATA / "cases" / case["image"])
    pixels = preprocess(picture, size, config.image_mean, config.image_std)
    released = numbers["pixel_values"].transpose(1, 2, 0)
    found = {"pixel values, max abs": float(np.abs(pixels - released).max())}
    given = mx.array(released)[None]
    features = model.encode_image(given)
    found["vision features"] = relative(features[0], numbers["image_features"])
    found["projected features"] = relative(model.mm_projector(features)[0], numbers["projected"])
    ids = numbers["input_ids"].tolist()
    for label, neighbors in (("released neighbours", True), ("own neighbours", False)):
        regions = region_inputs(numbers, mx.array, neighbors)
        if regions:
            vectors = model.region_sampler(features, **regions)
            found[f"region vectors, {label}"] = relative(vectors, numbers["region_embeddings"])
        embeddings = model.embed_inputs(ids, given, **regions)
        logits = model(model.expand_ids(ids)[None], input_embeddings=embeddings)[0]
        found[f"logits, {label}"] = relative(logits[-1], numbers["prompt_logits_last"])
    steps = generate_step(
        model.expand_ids(ids), model, input_embeddings=embeddings[0], max_tokens=24
    )
    found["greedy answers that differ"] = float(
        [token for token, _ in steps] != numbers["generated"].tolist()
    )
    return found


@torch.no_grad()
def compare_twin(twin, numbers: dict) -> dict[str, float]:
    def array(values):
        return torch.from_numpy(np.ascontiguousarray(values))

    pixels = array(numbers["pixel_values"])[None]
    features = twin.encode_image(pixels)
    found = {
        "vision features": relative(features[0], numbers["image_features"]),
        "projected features": relative(twin.mm_projector(features)[0], numbers["projected"]),
    }
    for label, neighbors in (("released neighbours", True), ("own neighbours", False)):
        regions = region_inputs(numbers, array, neighbors)
        if regions:
            points = regions.pop("region_points")
            vectors = twin.region_geo_sampler(features, points, **regions)
            found[f"region vectors, {label}"] = relative(vectors, numbers["region_embeddings"])
    regions = region_inputs(numbers, array, neighbors=False)
    answer = twin.generate(numbers["input_ids"], pixels, **regions, max_tokens=24)
    found["greedy answers that differ"] = float(answer != numbers["generated"].tolist())
    return found


def main() -> None:
    model, twin = load_mlx(), read_released(DATA / "checkpoint")
    worst: dict[str, dict[str, float]] = {"MLX": {}, "PyTorch twin": {}}
    for case in json.loads((DATA / "golden" / "manifest.json").read_text()):
        numbers = dict(np.load(DATA / "golden" / f"{case['name']}.npz"))
        sides = {
            "MLX": compare_mlx(model, case, numbers),
            "PyTorch twin": compare_twin(twin, numbers),
        }
        for side, found in sides.items():
            for what, value in found.items():
                add = what.startswith("greedy")
                before = worst[side].get(what, 0.0)
                worst[side][what] = before + value if add else max(before, value)
    print("| what | MLX | PyTorch twin |\n| --- | --- | --- |")
    for what in worst["MLX"]:
        cells = (f"{worst[s][what]:.1g}" if what in worst[s] else "" for s in worst)
        print(f"| {what} | {' | '.join(cells)} |")
    machine = f"{platform.system()} {platform.machine()}, MLX on {mx.default_device()}"
    print(json.dumps({"machine": machine, "worst": worst}))


if __name__ == "__main__":
    main()
