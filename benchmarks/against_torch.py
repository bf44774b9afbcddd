"""This project and the PyTorch twin side by side: ``python -m benchmarks.against_torch``.

Same weights (the released layout of ferret-tiny), same pixels, points and prompts, both in float32
on the CPU, in turns. For the sampler alone, at full size, see ``benchmarks.sampler``.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch

from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.config import FerretConfig
from ferret_mlx.generation import stream_generate
from ferret_mlx.model import Model
from ferret_mlx.processor import Processor
from ferret_mlx.regions import Box
from reference.layout import read_released

from .measure import alternate, machine_line
from .sampler import defined, draw_points

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "rocket.png"
QUESTION = ("What is [region0]? Give its box.", [Box(233, 95, 316, 165)])


def load_mlx(folder: Path) -> tuple[Model, Processor]:
    """The released tensors in float32, without the way over a converted folder."""
    weights = {}
    for part in (folder, folder / "vision_tower"):
        with open_checkpoint(part) as checkpoint:
            weights |= {name: checkpoint.read(name) for name in checkpoint.names()}
    model = Model(FerretConfig.from_folder(folder))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, Processor.from_folder(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "reference" / "ferret-tiny")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model, processor = load_mlx(args.checkpoint)
    twin = read_released(args.checkpoint)
    print(f"{machine_line()}, PyTorch with {torch.get_num_threads()} threads")

    inputs = processor(PICTURE, *QUESTION)
    pixels = torch.from_numpy(np.array(inputs.pixel_values)).permute(0, 3, 1, 2).contiguous()
    region_points = torch.from_numpy(np.array(inputs.region_points))
    with torch.no_grad():
        torch_features = twin.encode_image(pixels)
    features = model.encode_image(inputs.pixel_values)
    answers: dict[str, list[int]] = {}

    def mlx_answer() -> None:
        chunks = stream_generate(model, processor, PICTURE, *QUESTION, max_tokens=args.tokens)
        tokens = [chunk.token for chunk in chunks]
        answers["MLX"] = [token for token in tokens if token != processor.tokenizer.eos_token_id]

    def torch_answer() -> None:
        answers["PyTorch"] = twin.generate(
            inputs.input_ids, pixels, region_points, max_tokens=args.tokens
        )

    def torch_image() -> None:
        with torch.no_grad():
            twin.encode_image(pixels)

    stages = {
        "image encode": {
            "MLX": lambda: mx.eval(model.encode_image(inputs.pixel_values)),
            "PyTorch": torch_image,
        },
        "whole answer, picture included": {"MLX": mlx_answer, "PyTorch": torch_answer},
    }
    for regions in args.regions:
        points = draw_points(regions)
        own, theirs = mx.array(points), torch.from_numpy(points)

        def folded(theirs=theirs) -> None:
            with torch.no_grad():
                twin.region_geo_sampler(torch_features, theirs)

        stages[f"sampler, {regions} regions"] = {
            "MLX": lambda own=own: mx.eval(model.region_sampler(features, own)),
            "PyTorch": folded,
            "PyTorch, as defined": lambda theirs=theirs: defined(
                twin.region_geo_sampler, torch_features, theirs
            ),
        }
    results = {}
    for stage, sides in stages.items():
        times = alternate(sides, args.repeats)
        results[stage] = {side: timing.as_dict() for side, timing in times.items()}
        for side, timing in times.items():
            factor = timing.median / times["MLX"].median
            print(f"{stage:<32} {side:<20} {timing}   {factor:.2f} x MLX's time", flush=True)
    same = answers["MLX"] == answers["PyTorch"]
    print(f"answers of {len(answers['MLX'])} tokens: {'identical' if same else 'different'}")
    print(json.dumps({"machine": machine_line(), "results": results, "same_answer": same}))


if __name__ == "__main__":
    main()
