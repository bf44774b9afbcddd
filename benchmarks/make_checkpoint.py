"""Released-layout folders with random values: ``python -m benchmarks.make_checkpoint --help``.

`OUT/delta` is a Ferret delta with CLIP-L as its vision tower, `OUT/base` the Vicuna that it is a
delta to: geometry, dtype and sharding of the released 7B or 13B. Written value by value, so the
memory it takes does not depend on the size.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.torch_writer import write_torch_file

# Tokenizer files with the real LLaMA vocabulary, and a config to fill in.
TEMPLATE = Path(__file__).parents[1] / "tests" / "data" / "parity" / "delta"
SHARD_BYTES = 10e9  # transformers' limit when the released files were made
BLOCK = 1 << 22  # values made at a time
BASE_VOCABULARY, VOCABULARY = 32000, 32001

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Geometry:
    """Widths and depths of a Ferret; of the vision tower those of CLIP-L."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_hidden: int = 1024
    vision_layers: int = 24

    def scaled(self, factor: float) -> "Geometry":
        """Widths and depths times `factor`, rounded to what heads and quantization groups need."""
        hidden = max(1, round(self.hidden * factor / 128)) * 128
        return Geometry(
            hidden=hidden,
            intermediate=max(1, round(self.intermediate * factor / 64)) * 64,
            layers=max(2, round(self.layers * factor)),
            heads=hidden // 128,
            vision_hidden=max(1, round(self.vision_hidden * factor / 64)) * 64,
            vision_layers=max(2, round(self.vision_layers * factor)),
        )


GEOMETRIES = {"7b": Geometry(4096, 11008, 32, 32), "13b": Geometry(5120, 13824, 40, 40)}


def language_shapes(g: Geometry, vocabulary: int) -> tuple[Shapes, Shapes]:
    """Released names -> shapes of a LLaMA, in the order of its files: the body and its head."""
    body: Shapes = {"model.embed_tokens.weight": (vocabulary, g.hidden)}
    for i in range(g.layers):
        layer = f"model.layers.{i}."
        for name in "qkvo":
            body[f"{layer}self_attn.{name}_proj.weight"] = (g.hidden, g.hidden)
        body[f"{layer}self_attn.rotary_emb.inv_freq"] = (g.hidden // g.heads // 2,)
        body[f"{layer}mlp.gate_proj.weight"] = (g.intermediate, g.hidden)
        body[f"{layer}mlp.down_proj.weight"] = (g.hidden, g.intermediate)
        body[f"{layer}mlp.up_proj.weight"] = (g.intermediate, g.hidden)
        body[f"{layer}input_layernorm.weight"] = (g.hidden,)
        body[f"{layer}post_attention_layernorm.weight"] = (g.hidden,)
    body["model.norm.weight"] = (g.hidden,)
    return body, {"lm_head.weight": (vocabulary, g.hidden)}


def added_shapes(g: Geometry) -> Shapes:
    """What Ferret adds to the language model: projector and region sampler."""
    c, local = g.vision_hidden, g.vision_hidden + 2
    shapes: Shapes = {
        "model.mm_projector.weight": (g.hidden, c),
        "model.mm_projector.bias": (g.hidden,),
    }
    sampler = "model.region_geo_sampler."
    for i in range(2):
        shapes[f"{sampler}diff_projector_list.{i}.weight"] = (local, local)
        shapes[f"{sampler}diff_projector_list.{i}.bias"] = (local,)
        shapes[f"{sampler}agg_projector_list.{i}.net.0.weight"] = (c, 2 * local, 1)
        for name in ("net.0.bias", "norm.weight", "norm.bias"):
            shapes[f"{sampler}agg_projector_list.{i}.{name}"] = (c,)
    shapes[f"{sampler}flatten_projector.weight"] = (c, 32 * c)
    shapes[f"{sampler}flatten_projector.bias"] = (c,)
    shapes[f"{sampler}dim_projector.weight"] = (g.hidden, c)
    shapes[f"{sampler}dim_projector.bias"] = (g.hidden,)
    return shapes


def vision_shapes(g: Geometry) -> Shapes:
    """A CLIPVisionModel of 336 pixels in patches of 14."""
    c = g.vision_hidden
    names: Shapes = {
        "embeddings.class_embedding": (c,),
        "embeddings.patch_embedding.weight": (c, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, c),
        "pre_layrnorm.weight": (c,),
        "pre_layrnorm.bias": (c,),
    }
    for i in range(g.vision_layers):
        layer = f"encoder.layers.{i}."
        for name, (rows, columns) in (
            *((f"self_attn.{part}_proj", (c, c)) for part in ("k", "v", "q", "out")),
            ("mlp.fc1", (4 * c, c)),
            ("mlp.fc2", (c, 4 * c)),
        ):
            names[f"{layer}{name}.weight"] = (rows, columns)
            names[f"{layer}{name}.bias"] = (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            names[f"{layer}{name}.weight"] = names[f"{layer}{name}.bias"] = (c,)
    names["post_layernorm.weight"] = names["post_layernorm.bias"] = (c,)
    return {f"vision_model.{name}": shape for name, shape in names.items()}


def values(name: str, shape: tuple[int, ...], is_delta: bool, seed: int) -> Iterator[np.ndarray]:
    """Random float16 values in blocks: small in a delta, norm weights around 1 elsewhere."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), is_delta])
    added = "mm_projector" in name or "region_geo_sampler" in name
    scale = 0.002 if is_delta and not added else 0.02
    mean = 1.0 if "norm" in name and name.endswith("weight") and scale == 0.02 else 0.0
    left = prod(shape)
    while left:
        block = rng.standard_normal(min(left, BLOCK), np.float32)
        yield (block * np.float32(scale) + np.float32(mean)).astype(np.float16)
        left -= len(block)


def write_random_file(path: Path, shapes: Shapes, is_delta: bool, seed: int) -> None:
    write_torch_file(path, shapes, lambda name: values(name, shapes[name], is_delta, seed))


def write_sharded(folder: Path, shapes: Shapes, limit: float, is_delta: bool, seed: int) -> None:
    """Shards of at most `limit` bytes, filled in order as transformers does, and their index."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * prod(shape)
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        write_random_file(folder / file, shard, is_delta, seed)
        weight_map |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(2 * prod(shape) for shape in shapes.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


def make_checkpoint(out: Path, geometry: Geometry, limit: float = SHARD_BYTES, seed: int = 0):
    """Write `out`/base and `out`/delta, neither of which may exist. `limit`: bytes of a shard."""
    sizes = {
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.heads,
    }
    for folder, vocabulary in (("base", BASE_VOCABULARY), ("delta", VOCABULARY)):
        is_delta = folder == "delta"
        (out / folder).mkdir(parents=True)
        for file in (TEMPLATE / folder).iterdir():
            if file.is_file() and not file.name.startswith("pytorch_model"):
                shutil.copyfile(file, out / folder / file.name)
        config = json.loads((TEMPLATE / folder / "config.json").read_text()) | sizes
        config |= {"vocab_size": vocabulary}
        if is_delta:
            config |= {"mm_hidden_size": geometry.vision_hidden}
        (out / folder / "config.json").write_text(json.dumps(config, indent=2))
        body, head = language_shapes(geometry, vocabulary)
        shapes = body | (added_shapes(geometry) if is_delta else {}) | head
        write_sharded(out / folder, shapes, limit, is_delta, seed)

    tower = out / "delta" / "vision_tower"
    tower.mkdir()
    template = TEMPLATE / "delta" / "vision_tower"
    vision = json.loads((template / "config.json").read_text()) | {
        "hidden_size": geometry.vision_hidden,
        "intermediate_size": 4 * geometry.vision_hidden,
        "num_hidden_layers": geometry.vision_layers,
        "num_attention_heads": geometry.vision_hidden // 64,
        "image_size": 336,
        "patch_size": 14,
    }
    (tower / "config.json").write_text(json.dumps(vision, indent=2))
    preprocessor = json.loads((template / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (tower / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    write_random_file(tower / "pytorch_model.bin", vision_shapes(geometry), False, seed)


def chosen_geometry(size: str, scale: float = 1.0, layers: int | None = None):
    """(geometry, bytes of a shard): scaled shards keep the number that the true size has."""
    true = GEOMETRIES[size]
    geometry = true if scale == 1.0 else true.scaled(scale)
    if layers is not None:
        geometry = replace(geometry, layers=layers)
    totals = [
        sum(prod(shape) for part in language_shapes(g, VOCABULARY) for shape in part.values())
        for g in (geometry, true)
    ]
    return geometry, SHARD_BYTES * totals[0] / totals[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for base/ and delta/")
    parser.add_argument("--size", choices=GEOMETRIES, default="7b")
    parser.add_argument("--scale", type=float, default=1.0, help="of all widths and depths")
    parser.add_argument("--layers", type=int, help="of the language model, at its full width")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    geometry, limit = chosen_geometry(args.size, args.scale, args.layers)
    make_checkpoint(args.out, geometry, limit, args.seed)
    for file in sorted(args.out.rglob("*.bin")):
        print(f"{file.stat().st_size / 1e9:8.3f} GB  {file}")


if __name__ == "__main__":
    main()
