"""Two hundred damaged copies of the parity delta and its base: refused in one line that names the
file and tensor, or converted to the right weights; never a traceback, never a wrong model.
"""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from safetensors.torch import save_file

from ferret_mlx.cli import convert_main
from ferret_mlx.convert import convert

BINS = [
    *(f"delta/pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
    *(f"base/pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
    "delta/vision_tower/pytorch_model.bin",
]
SAFETENSORS = [
    path.replace("pytorch_model", "model").replace(".bin", ".safetensors") for path in BINS
]
COUNTS = {
    "truncated": 28,
    "flipped value": 40,
    "flipped anywhere": 30,
    "flipped directory": 14,
    "flipped header": 30,
    "swapped shards": 8,
    "wrong shape": 14,
    "wrong dtype": 10,
    "missing tensor": 12,
    "missing shard": 6,
    "foreign pickle": 8,
    "not finite": 10,
    "other base": 6,
}
CASES = [(kind, seed) for kind, count in COUNTS.items() for seed in range(count)]


@pytest.fixture(scope="module")
def pristine(parity, tmp_path_factory) -> Path:
    """delta/ and base/ as they come, and safetensors/ with the same two in that format."""
    root = tmp_path_factory.mktemp("pristine")
    shutil.copytree(parity / "delta" / "delta", root / "delta")
    shutil.copytree(parity / "delta" / "base", root / "base")
    for bin_name, name in zip(BINS, SAFETENSORS, strict=True):
        path = root / "safetensors" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(torch.load(root / bin_name), path, {"format": "pt"})
    for folder in ("delta", "base"):
        for file in (root / folder).iterdir():
            if file.is_file() and file.suffix != ".bin" and "index" not in file.name:
                shutil.copyfile(file, root / "safetensors" / folder / file.name)
        index = (root / folder / "pytorch_model.bin.index.json").read_text()
        index = index.replace("pytorch_model-", "model-").replace(".bin", ".safetensors")
        (root / "safetensors" / folder / "model.safetensors.index.json").write_text(index)
    for file in ("config.json", "preprocessor_config.json"):
        path = Path("delta") / "vision_tower" / file
        shutil.copyfile(root / path, root / "safetensors" / path)
    return root


@pytest.fixture(scope="module")
def expected(pristine, tmp_path_factory) -> dict[str, mx.array]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(pristine / "delta", out, pristine / "base")
    return mx.load(str(out / "model.safetensors"))


def copy(source: Path, target: Path) -> None:
    """Links instead of copies: a case replaces the file that it damages."""
    for folder in ("delta", "base"):
        shutil.copytree(source / folder, target / folder, copy_function=os.symlink)


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def flip(data: bytes, at: int, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def storages(path: Path) -> Iterator[tuple[int, int]]:
    """Where the values of each storage lie, first byte and length."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                header = data[entry.header_offset :][:30]
                names = int.from_bytes(header[26:28], "little")
                names += int.from_bytes(header[28:30], "little")
                yield entry.header_offset + 30 + names, entry.file_size


def read_by_the_model(name: str) -> bool:
    unused = ("encoder.layers.2.", "post_layernorm", "inv_freq", "position_ids")
    return not any(part in name for part in unused)


def change_tensor(root: Path, rng: random.Random, change, files=BINS) -> tuple[str, str]:
    """Put something else into a place of one file's dict; returns the file's and tensor's names."""
    file = rng.choice(files)
    tensors = dict(torch.load(root / file))
    name = rng.choice([name for name in tensors if read_by_the_model(name)])
    change(tensors, name)
    (root / file).unlink()
    torch.save(tensors, root / file)
    return Path(file).name, name


def truncated(root, rng):
    file = rng.choice(BINS)
    data = (root / file).read_bytes()
    replace(root / file, data[: rng.randrange(len(data))])
    return [Path(file).name]


def flipped_value(root, rng):
    file = rng.choice(BINS)
    start, length = rng.choice([place for place in storages(root / file) if place[1]])
    data = (root / file).read_bytes()
    replace(root / file, flip(data, start + rng.randrange(length), rng))
    return [Path(file).name, "CRC-32 of the storage of"]


def flipped_anywhere(root, rng):
    file = rng.choice(BINS)
    data = (root / file).read_bytes()
    replace(root / file, flip(data, rng.randrange(len(data)), rng))
    return [Path(file).name]


def flipped_directory(root, rng):
    file = rng.choice(BINS)
    data = (root / file).read_bytes()
    replace(root / file, flip(data, rng.randrange(data.index(b"PK\x01\x02"), len(data)), rng))
    return [Path(file).name]


def flipped_header(root, rng):
    file = rng.choice(SAFETENSORS)
    data = (root / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    replace(root / file, flip(data, rng.randrange(end), rng))
    return [Path(file).parent.name]


def swapped_shards(root, rng):
    first, second = rng.sample(BINS[:6], 2)
    data = [(root / file).read_bytes() for file in (first, second)]
    replace(root / first, data[1])
    if rng.random() < 0.5:
        replace(root / second, data[0])
    return [".bin"]


def wrong_shape(root, rng):
    def change(tensors, name):
        value = tensors[name]
        other = [value[:-1], value[None], value.flatten()[:-1], torch.cat([value, value])]
        tensors[name] = rng.choice(other).clone()

    return change_tensor(root, rng, change)


def wrong_dtype(root, rng):
    def change(tensors, name):
        kind = rng.choice([torch.int8, torch.int16, torch.int64, torch.uint8, torch.bool])
        tensors[name] = tensors[name].to(kind)

    return change_tensor(root, rng, change)


def missing_tensor(root, rng):
    file, name = change_tensor(root, rng, lambda tensors, name: tensors.pop(name))
    index = root / "delta" / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    if name in weight_map and rng.random() < 0.5:
        # Left out of the index as well: only the model still knows that it belongs there.
        del weight_map[name]
        replace(index, json.dumps({"weight_map": weight_map}).encode())
        return [name.removeprefix("model.").removeprefix("region_geo_sampler.")]
    return [name.removeprefix("vision_model.")]


def missing_shard(root, rng):
    file = BINS[rng.randrange(len(BINS))]
    (root / file).unlink()
    return ["vision_tower" if "vision_tower" in file else Path(file).name]


class Command:
    """Pickles to a call that makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


def foreign_pickle(root, rng):
    file = rng.choice(BINS)
    command = Command(root / "was-run")
    with zipfile.ZipFile(root / file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    protocol = rng.choice([0, 2, 4])
    records[pickled] = pickle.dumps(rng.choice([command, {"x": command}, [command]]), protocol)
    (root / file).unlink()
    with zipfile.ZipFile(root / file, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return [Path(file).name, "its pickle names"]


def not_finite(root, rng):
    def change(tensors, name):
        value = tensors[name].clone()
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("-inf")])
        tensors[name] = value

    return change_tensor(root, rng, change)


def other_base(root, rng):
    """Another width, another depth, or another model's names."""
    kind = rng.randrange(3)
    names = []
    for file in BINS[3:6]:
        tensors = torch.load(root / file)
        if kind == 0:
            tensors = {name: value[..., :-1].clone() for name, value in tensors.items()}
        elif kind == 1:
            tensors |= {
                name.replace(".0.", ".7."): value
                for name, value in tensors.items()
                if ".0." in name
            }
        else:
            tensors = {name.replace("model.", "gpt."): value for name, value in tensors.items()}
        (root / file).unlink()
        torch.save(tensors, root / file)
        names += [(name, Path(file).name) for name in tensors]
    index = root / "base" / "pytorch_model.bin.index.json"
    replace(index, json.dumps({"weight_map": dict(names)}).encode())
    return ["base"]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_damaged(pristine, expected, tmp_path, capsys, kind, seed):
    root, out = tmp_path / "in", tmp_path / "out"
    copy(pristine / "safetensors" if kind == "flipped header" else pristine, root)
    told = globals()[kind.replace(" ", "_")](root, random.Random(f"{kind} {seed}"))
    flags = ["--hf-path", str(root / "delta"), "--base-path", str(root / "base")]
    try:
        convert_main([*flags, "--mlx-path", str(out)])
    except SystemExit as exit:
        error = capsys.readouterr().err
        assert exit.code == 2 and error.count("\n") == 1, error
        assert all(part in error for part in told), (told, error)
        assert os.listdir(tmp_path) == ["in"]
    else:
        # Damage in bytes that mean nothing, as dates and padding do.
        assert kind.startswith(("flipped anywhere", "flipped dir", "flipped header", "swapped"))
        result = mx.load(str(out / "model.safetensors"))
        assert set(result) == set(expected)
        assert all(mx.array_equal(result[name], expected[name]) for name in expected)
    assert not (root / "was-run").exists()


@pytest.mark.parametrize("layout", ["bin", "safetensors", "both"])
def test_undamaged(pristine, expected, tmp_path, layout):
    """The refusals above would prove nothing if these were refused too."""
    delta = pristine / "safetensors" / "delta" if layout == "safetensors" else pristine / "delta"
    base = pristine / "base" if layout == "bin" else pristine / "safetensors" / "base"
    convert(delta, tmp_path / "out", base)
    result = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert set(result) == set(expected)
    assert all(mx.array_equal(result[name], expected[name]) for name in expected)
