"""Source tensors -> finished shards, a block of rows at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .dequantization import dequantize_float32
from .output import WorkingFolder
from .plan import Layer, Plan, Shard
from .report import RelativeError, TensorReport
from .shard_writer import ShardWriter
from .source import Source

# Bits of the exponent: all of them set is an infinity or NaN.
_EXPONENT = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}


def write_shards(source: Source, plan: Plan, folder: WorkingFolder) -> list[TensorReport]:
    """Write what is not finished yet. Raises ValueError naming file and tensor for bad values."""
    finished = {shard.file: folder.report(shard.file) for shard in plan.shards}
    sizes = {layer.name: source.info(layer.name).nbytes for layer in plan.layers}
    reports: list[TensorReport] = []
    with tqdm(
        total=sum(sizes.values()),
        # What is done already must not make the rest look fast.
        initial=sum(sizes[report["name"]] for known in finished.values() for report in known or []),
        unit="B", unit_scale=True, desc="converting", file=sys.stderr, disable=None,
    ) as bar:  # fmt: skip
        for shard in plan.shards:
            known = finished[shard.file]
            if known is None:
                written = []
                for report in _write_shard(source, shard, folder, bar):
                    written.append(report)
                    done = len(reports) + len(written)
                    bar.set_postfix_str(f"{done}/{len(sizes)} tensors", refresh=False)
                known = [asdict(report) for report in written]
                folder.finish(shard.file, known)
            reports += [TensorReport(**report) for report in known]
    return reports


def bytes_to_write(plan: Plan, folder: WorkingFolder) -> int:
    return sum(
        layer.bytes
        for shard in plan.shards
        if folder.report(shard.file) is None
        for layer in shard.layers
    )


def cast_blocks(source: Source, layer: Layer) -> Iterator[mx.array]:
    """The source's values in the layer's dtype. Raises ValueError for NaN and infinity."""
    for block in source.blocks(layer.name, layer.rows):
        block = block.astype(layer.dtype)
        if not is_finite(block):
            dtype = str(layer.dtype).removeprefix("mlx.core.")
            raise ValueError(
                f"{source.location(layer.name)} holds NaN or infinity as {dtype}; "
                "copy the files again, or use another --dtype."
            )
        yield block


def is_finite(block: mx.array) -> bool:
    """Whether a float block holds neither NaN nor infinity."""
    # By bits: MLX's isfinite takes longer on a CPU than the quantization.
    dtype, exponent = _EXPONENT[block.dtype]
    bits = np.array(block.view(dtype))
    return not bool(((bits & exponent) == exponent).any())


def _write_shard(
    source: Source, shard: Shard, folder: WorkingFolder, bar: tqdm
) -> Iterator[TensorReport]:
    with ShardWriter(folder.temporary(shard.file), shard.tensors) as writer:
        for layer in shard.layers:
            options = layer.quantization
            error = RelativeError() if options is not None else None
            for block in cast_blocks(source, layer):
                parts = [block]
                if options is not None:
                    parts = list(mx.quantize(block, **options))
                    mx.eval(parts)
                for name, part in zip(layer.written, parts, strict=True):
                    writer.append(name, part)
                if options is not None and error is not None:
                    error.add(block, dequantize_float32(parts, options))
                bar.update(block.size * source.info(layer.name).dtype.size)
            yield TensorReport(
                layer.name, layer.parameters, layer.bytes, error.value if error else None
            )
        writer.finish()
