"""The README's conversion table: ``python -m benchmarks.convert --help``.

Peak memory (on Linux VmHWM: resident pages of mapped files count) and time of converting a delta
and its base of random values to 4 bits; beside it, at a number of layers that fits into memory, the
released way: load both whole, add, save, then load the result whole and quantize it. Every step is
a process of its own.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.make_checkpoint import GEOMETRIES, chosen_geometry, make_checkpoint

ROOT = Path(__file__).parents[1]


def peak_memory() -> int:
    """Bytes that this process had resident at most."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make(work: Path, size: str, scale: float, layers: int | None) -> None:
    geometry, limit = chosen_geometry(size, scale, layers)
    make_checkpoint(work / "source", geometry, limit)


def stream(work: Path) -> None:
    """This project's conversion."""
    from ferret_mlx.convert import convert

    convert(
        work / "source" / "delta", work / "streamed", work / "source" / "base", quantize=True
    )  # fmt: skip


def check(work: Path) -> None:
    from ferret_mlx.check import check

    check(work / "streamed")


def merge_whole(work: Path) -> None:
    """The released script's work: both models in memory, sums in place, saved in shards."""
    import torch

    state: dict[str, dict[str, torch.Tensor]] = {"base": {}, "delta": {}}
    for part, tensors in state.items():
        for file in sorted((work / "source" / part).glob("pytorch_model-*.bin")):
            tensors |= torch.load(file)
    for name, base in state["base"].items():
        if not name.endswith("inv_freq"):
            state["delta"][name][: len(base)] += base
    source, merged = work / "source" / "delta", work / "merged"
    shutil.copytree(source, merged, ignore=shutil.ignore_patterns("pytorch_model-*"))
    shutil.copytree(source / "vision_tower", merged / "vision_tower", dirs_exist_ok=True)
    weight_map = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    for shard in sorted(set(weight_map.values())):
        torch.save(
            {name: state["delta"][name] for name, file in weight_map.items() if file == shard},
            merged / shard,
        )


def quantize_whole(work: Path) -> None:
    """mlx-lm's way: the whole model in memory, quantized, saved."""
    import mlx.core as mx
    from mlx_lm.utils import save_config, save_model

    from ferret_mlx.checkpoint import open_checkpoint
    from ferret_mlx.config import FerretConfig
    from ferret_mlx.model import Model
    from ferret_mlx.quantization import Quantization, quantize_model_parts

    merged = work / "merged"
    weights = {}
    for folder in (merged, merged / "vision_tower"):
        with open_checkpoint(folder) as checkpoint:
            weights |= {name: checkpoint.read(name) for name in checkpoint.names()}
    config = FerretConfig.from_folder(merged)
    model = Model(config)
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    del weights
    model.set_dtype(mx.float16)
    quantized_config = quantize_model_parts(model, config.raw, Quantization())
    save_model(work / "whole", model, donate_model=True)
    save_config(quantized_config, work / "whole" / "config.json", keep_vision_config=True)


def compare(work: Path) -> None:
    """Fail unless both ways wrote the same bits."""
    import mlx.core as mx

    from ferret_mlx.checkpoint import open_checkpoint

    with open_checkpoint(work / "streamed") as ours, open_checkpoint(work / "whole") as theirs:
        assert set(ours.names()) == set(theirs.names())
        for name in ours.names():
            assert ours.info(name) == theirs.info(name), name
            for a, b in zip(ours.blocks(name, 4096), theirs.blocks(name, 4096), strict=True):
                assert mx.array_equal(a, b), name


STAGES = {
    stage.__name__: stage for stage in (make, stream, check, merge_whole, quantize_whole, compare)
}


def run(stage: str, work: Path, *arguments: object) -> dict[str, float]:
    """Run a stage in a process of its own; its peak memory in bytes and its seconds."""
    print(f"{stage} in {work} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.convert", "--stage", stage, "--work", str(work)]
    result = subprocess.run(
        [*command, "--arguments", json.dumps(arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{stage} failed with exit status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def run_here(stage: str, work: Path, arguments: list) -> None:
    start = time.perf_counter()
    STAGES[stage](work, *arguments)
    print(json.dumps({"peak": peak_memory(), "seconds": time.perf_counter() - start}))


def measure(work: Path, size: str, scale: float, layers: int | None, beside: bool) -> dict:
    """One job: `beside` measures the released way too and compares the results."""
    folder = work / f"{size}-{layers or 'all'}-layers"
    run("make", folder, size, scale, layers)
    source = sum(file.stat().st_size for file in folder.rglob("*.bin"))
    found = {"size": size, "scale": scale, "layers": layers, "source_bytes": source}
    found["streamed"] = run("stream", folder)
    found["folder_bytes"] = sum(f.stat().st_size for f in (folder / "streamed").iterdir())
    found["check"] = run("check", folder)
    if beside:
        found["merge_whole"] = run("merge_whole", folder)
        found["quantize_whole"] = run("quantize_whole", folder)
        run("compare", folder)
        whole = max(found["merge_whole"]["peak"], found["quantize_whole"]["peak"])
        found["times_less_memory"] = whole / found["streamed"]["peak"]
    shutil.rmtree(folder)
    return found


def table(results: list[dict]) -> str:
    lines = ["| job | read | written | peak memory | time |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        name = result["size"].upper()
        if result["layers"]:
            name += f" cut to {result['layers']} layers"
        if result["scale"] != 1:
            name += f", scaled by {result['scale']}"
        sizes = f"{result['source_bytes'] / 1e9:.1f} GB | {result['folder_bytes'] / 1e9:.1f} GB"
        for way, stages in (
            ("", ("streamed",)),
            (", released way", ("merge_whole", "quantize_whole")),
        ):
            if stages[0] in result:
                peak = max(result[stage]["peak"] for stage in stages) / 1e9
                seconds = sum(result[stage]["seconds"] for stage in stages)
                lines.append(f"| {name}{way} | {sizes} | {peak:.2f} GB | {seconds:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=GEOMETRIES, action="append", help="a true size; may be repeated")
    add("--beside", type=int, default=8, metavar="LAYERS",
        help="of a 7B, for the comparison with the released way (default: 8; 0: none)")  # fmt: skip
    add("--scale", type=float, default=1.0, help="of all widths and depths, to try this out")
    add("--work", type=Path, default=Path("out/benchmark"), help="folder on a disk with space")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)
    add("--arguments", type=json.loads, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        run_here(args.stage, args.work, args.arguments)
        return
    results = []
    if args.beside:
        results.append(measure(args.work, "7b", args.scale, args.beside, beside=True))
    for size in args.size or ():
        results.append(measure(args.work, size, args.scale, None, beside=False))
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    text = json.dumps({"machine": machine, "results": results})
    print(table(results))
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
