"""Streamed quantization against mlx-lm's on a whole model, the way back, and the check of both."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

import ferret_mlx.plan
from ferret_mlx import load
from ferret_mlx.check import check
from ferret_mlx.cli import convert_main
from ferret_mlx.config import FerretConfig
from ferret_mlx.convert import convert
from ferret_mlx.loading import quantize_layers
from ferret_mlx.model import Model
from ferret_mlx.quantization import Quantization, quantize_model_parts

OPTIONS = [
    *(dict(bits=bits, group_size=32) for bits in (2, 3, 4, 5, 6, 8)),
    dict(bits=4, group_size=32, vision=True),
    dict(bits=4, group_size=64),
    *(dict(mode=mode) for mode in ("mxfp4", "nvfp4", "mxfp8")),
    dict(mode="nvfp4", vision=True),
    *(
        dict(group_size=32, recipe=recipe)
        for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    ),
]


def weights(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def quantized(parity: Path, out: Path, **options) -> Path:
    names = {"bits": "q_bits", "group_size": "q_group_size", "mode": "q_mode"}
    names |= {"recipe": "quant_predicate", "vision": "quantize_vision"}
    flags = {names[name]: value for name, value in options.items()}
    convert(parity / "checkpoint", out, quantize=True, **flags)
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_as_mlx_lm(parity, parity_weights, tmp_path, monkeypatch, options):
    """Catches other layers, other bits and other values than mlx_lm.utils.quantize_model has on
    the whole model, also where blocks of rows meet."""
    model = Model(FerretConfig.from_folder(parity / "checkpoint"))
    model.load_weights(list(model.sanitize(parity_weights).items()), strict=True)
    model.set_dtype(mx.float16)
    config = quantize_model_parts(model, {}, Quantization(**options))
    expected = dict(tree_flatten(model.parameters()))

    monkeypatch.setattr(ferret_mlx.plan, "BLOCK_ELEMENTS", 1000)
    out = quantized(parity, tmp_path / "out", **options)
    found = weights(out)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and mx.array_equal(found[name], value), name
    written = json.loads((out / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"] == config["quantization"]


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[9], OPTIONS[-1]], ids=str)
def test_dequantize(parity, tmp_path, options):
    """The same values as mlx-lm's dequantize_model; the folder is a plain one again."""
    packed = quantized(parity, tmp_path / "packed", **options)
    convert(packed, tmp_path / "plain", dequantize=True)
    config = FerretConfig.from_folder(packed)
    model = Model(config)
    stored = weights(packed)
    quantize_layers(model, config.quantization, stored)
    model.load_weights(list(stored.items()), strict=True)
    expected = dict(tree_flatten(dequantize_model(model).parameters()))
    found = weights(tmp_path / "plain")
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == mx.float16
        assert mx.array_equal(value, expected[name].astype(mx.float16)), name
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    load(tmp_path / "plain")


def test_dequantize_needs_a_quantized_folder(parity, tmp_path):
    with pytest.raises(ValueError, match="not quantized"):
        convert(parity / "checkpoint", tmp_path / "out", dequantize=True)
    with pytest.raises(ValueError, match="neither -q nor --base-path"):
        convert(parity / "checkpoint", tmp_path / "out", dequantize=True, quantize=True)


def test_table(parity, tmp_path, capsys):
    out = quantized(parity, tmp_path / "out", bits=4, group_size=32)
    lines = capsys.readouterr().err.splitlines()
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["projector"] == ["projector", "2", "0.0", "M", "16.00", "0.0", "MB", "-"]
    data = weights(out)
    size = sum(value.nbytes for name, value in data.items() if name.startswith("language_model."))
    assert cells["language model"][-4:] == [f"{size / 1e6:,.1f}", "MB", "8.20", "%"]
    total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert total["total_size"] == sum(value.nbytes for value in data.values())


def test_check_against_the_source(parity, tmp_path, capsys):
    out = quantized(parity, tmp_path / "out", bits=4, group_size=32)
    capsys.readouterr()
    reports = check(out, parity / "checkpoint")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[-1] for line in lines if line.startswith(("0.000e+00", "8."))]
    assert sorted(names) == sorted(report.name for report in reports)
    errors = {report.name: report.error for report in reports if report.error is not None}
    scales = {name for name in weights(out) if name.endswith(".scales")}
    assert {name.replace("weight", "scales") for name in errors} == scales
    assert all(0.07 < error < 0.09 for error in errors.values())


def fails(capsys, *flags) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        convert_main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.err.count("\n") == 1, captured.err
    return captured.err


DOWN = "language_model.model.layers.1.mlp.down_proj"


def put(name, change):
    """Change one tensor of the folder's file."""

    def damage(folder):
        data = dict(weights(folder))
        data[name] = change(data[name])
        mx.save_safetensors(str(folder / "model.safetensors"), data, {"format": "mlx"})

    return damage


def rename(folder):
    data = dict(weights(folder))
    data["mm_projector.offset"] = data.pop("mm_projector.bias")
    mx.save_safetensors(str(folder / "model.safetensors"), data, {"format": "mlx"})


def change_config(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


FAULTS = {
    "nan": (put("mm_projector.bias", lambda x: x * float("nan")), "mm_projector.bias holds NaN"),
    "nan scale": (put(f"{DOWN}.scales", lambda x: x / 0), f"{DOWN}.scales holds NaN"),
    "dtype": (put(f"{DOWN}.weight", lambda x: x.view(mx.int32)), f"{DOWN}.weight holds mlx"),
    "shape": (put("mm_projector.bias", lambda x: x[1:]), "mm_projector.bias has shape"),
    "name": (rename, "mm_projector"),
    "stray shard": (
        lambda f: mx.save_safetensors(
            str(f / "model-00001-of-00002.safetensors"), {"x": mx.zeros(1)}, {"format": "mlx"}
        ),
        "model-00001-of-00002.safetensors: x",
    ),
    "not for mlx": (
        lambda f: mx.save_safetensors(str(f / "model.safetensors"), dict(weights(f))),
        "no metadata format: mlx",
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "index.json"),
    "no shard": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "vocabulary": (change_config(vocab_size=100, im_region_fea_token=99), "tokenizer has"),
    "bits": (
        change_config(quantization={"bits": 8, "group_size": 32, "mode": "affine"}),
        DOWN.replace("1", "0"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(parity, tmp_path, capsys, fault):
    out = quantized(parity, tmp_path / "out", bits=4, group_size=32)
    convert_main(["--check", str(out)])
    damage, message = FAULTS[fault]
    damage(out)
    assert message in fails(capsys, "--check", out)


@pytest.mark.parametrize("name", ["mm_projector.bias", f"{DOWN}.biases", f"{DOWN}.weight"])
def test_check_finds_changed_values(parity, tmp_path, capsys, name):
    """Finite values of the right shape, which only the source can tell from the right ones."""
    out = quantized(parity, tmp_path / "out", bits=4, group_size=32)
    put(name, lambda x: mx.concatenate([x[1:], x[:1]]))(out)
    convert_main(["--check", str(out)])
    layer = name.replace(".biases", ".weight")
    error = fails(capsys, "--check", out, "--against", parity / "checkpoint")
    assert f"{layer} differs from" in error and "pytorch_model.bin" in error


def test_check_of_a_merge(parity, tmp_path, capsys):
    delta, base = parity / "delta" / "delta", parity / "delta" / "base"
    convert(delta, tmp_path / "out", base)
    against = ("--check", tmp_path / "out", "--against", delta)
    convert_main([str(flag) for flag in (*against, "--base-path", base)])
    assert "differs from" in fails(capsys, *against)
    other = ("--check", tmp_path / "out", "--against", parity / "checkpoint")
    assert "is only in one of" in fails(capsys, *other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--check", "x", "-q"], "--quantize does not go with --check"),
        (["--check", "x", "--base-path", "y"], "needs --against"),
        (["--against", "x"], "add --check"),
        (["--hf-path", "x"], "--mlx-path is missing"),
        (["--mlx-path", "x"], "--hf-path is missing"),
        (["--check", "./nowhere"], "no folder ./nowhere for --check"),
    ],
)
def test_flags(capsys, flags, message):
    assert message in fails(capsys, *flags)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_and_bfloat16_sources(parity, tmp_path, dtype):
    """A delta and a base of any float type are added in float16, as the released code does."""
    import torch

    folders = {}
    for folder in ("delta", "base"):
        folders[folder] = tmp_path / folder
        shutil.copytree(parity / "delta" / folder, folders[folder])
        for file in folders[folder].glob("*.bin"):
            tensors = torch.load(file)
            torch.save({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, file)
    convert(folders["delta"], tmp_path / "out", folders["base"])
    found = weights(tmp_path / "out")
    merged = {}
    for file in folders["delta"].glob("pytorch*.bin"):
        merged |= {name: tensor.half() for name, tensor in torch.load(file).items()}
    for file in folders["base"].glob("pytorch*.bin"):
        for name, tensor in torch.load(file).items():
            merged[name][: len(tensor)] += tensor.half()
    for name, tensor in merged.items():
        ours = f"language_model.{name}"
        if ours in found:
            assert np.array_equal(np.array(found.pop(ours)), tensor.numpy()), name
    assert not any(name.startswith("language_model.") for name in found)


def test_lazy_load(parity, tmp_path, monkeypatch):
    """Nothing of the weights is brought in before it is used, as a 13B may not fit into memory."""
    out = quantized(parity, tmp_path / "out", bits=4, group_size=32)
    expected = dict(tree_flatten(load(out, dequantize=False)[0].parameters()))
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", lambda *args: pytest.fail("evaluated"))
        model, _ = load(out, dequantize=False, lazy=True)
    found = dict(tree_flatten(model.parameters()))
    assert set(found) == set(expected)
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())
