"""Conversion of the parity checkpoint and delta: what is written, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import ferret_mlx.convert
from ferret_mlx import load
from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.cli import convert_main as main
from ferret_mlx.convert import convert
from ferret_mlx.delta import MergedCheckpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def checkpoint(parity, tmp_path) -> Path:
    """A copy of the parity checkpoint, free to be changed."""
    shutil.copytree(parity / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change) -> None:
    path = folder / "pytorch_model.bin"
    tensors = dict(torch.load(path))
    change(tensors)
    torch.save(tensors, path)


def weights(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a
    )


def released_name(name: str) -> str:
    for ours, theirs in (
        ("language_model.", ""),
        ("mm_projector.", "model.mm_projector."),
        ("region_sampler.", "model.region_geo_sampler."),
        ("vision_tower.", "vision_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def test_weights_are_the_released_ones(parity, tmp_path):
    """Catches tensors that are dropped, renamed to another's place, cast or transposed wrongly."""
    convert(parity / "checkpoint", tmp_path / "out")
    theirs = {}
    for file in ("pytorch_model.bin", "vision_tower/pytorch_model.bin"):
        theirs |= torch.load(parity / "checkpoint" / file)
    ours = weights(tmp_path / "out")
    for name, value in ours.items():
        tensor = theirs.pop(released_name(name))
        if name.endswith("patch_embedding.weight"):
            tensor = tensor.permute(0, 2, 3, 1)
        assert value.dtype == mx.float16
        assert np.array_equal(np.array(value), tensor.squeeze(-1).numpy().reshape(value.shape))
    # The last encoder layer and the final norm are never used.
    unused = ("vision_model.encoder.layers.3.", "vision_model.post_layernorm.", "inv_freq", "_ids")
    assert all(any(part in name for part in unused) for name in theirs)


def test_files_of_the_folder(parity, tmp_path):
    out = tmp_path / "new" / "out"
    convert(str(parity / "checkpoint"), str(out))
    tokenizer_files = {"added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
    expected = {"README.md", "config.json", "generation_config.json", "tokenizer.model"}
    expected |= tokenizer_files | {"model.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert os.listdir(tmp_path / "new") == ["out"]
    for name in tokenizer_files | {"tokenizer.model"}:
        assert (out / name).read_bytes() == (parity / "checkpoint" / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    released = json.loads((parity / "checkpoint" / "config.json").read_text())
    assert released.items() <= config.items()
    assert config["vision_config"]["hidden_size"] == 32
    assert config["region_read_order"] == "released"
    assert len(config["image_mean"]) == len(config["image_std"]) == 3
    card = (out / "README.md").read_text()
    assert "library_name: mlx" in card and "float16" in card
    assert "CC BY-NC" not in card  # not known to be a merge of Ferret's weights
    assert str(parity) not in card


def test_load_reads_the_result(parity, tmp_path):
    convert(parity / "checkpoint", tmp_path / "out")
    model, _ = load(tmp_path / "out")
    ours = dict(tree_flatten(model.parameters()))
    stored = weights(tmp_path / "out")
    assert set(ours) == set(stored)
    assert all(mx.array_equal(ours[name], stored[name].astype(mx.float32)) for name in ours)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(parity, tmp_path, dtype):
    convert(parity / "checkpoint", tmp_path / "out", dtype=dtype)
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {getattr(mx, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_delta(parity, tmp_path):
    delta, base = parity / "delta" / "delta", parity / "delta" / "base"
    convert(delta, tmp_path / "out", base)
    ours = weights(tmp_path / "out")
    merged = MergedCheckpoint(open_checkpoint(delta), open_checkpoint(base))
    for name, value in ours.items():
        if not name.startswith("vision_tower."):
            expected = merged.read(released_name(name))
            assert mx.array_equal(value, expected.reshape(value.shape)), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "CC BY-NC 4.0" in card and "LLaMA" in card


def test_a_delta_without_its_base_is_pointed_out(parity, tmp_path, capsys):
    convert(parity / "delta" / "delta", tmp_path / "delta")
    assert "--base-path" in capsys.readouterr().err
    convert(parity / "checkpoint", tmp_path / "checkpoint")
    assert "--base-path" not in capsys.readouterr().err


def test_a_whole_model_is_not_merged_again(parity, tmp_path, capsys):
    """Catches a base that is added to a model which has it already."""
    model, base = tmp_path / "model", parity / "delta" / "base"
    shutil.copytree(parity / "delta" / "delta", model)
    for file in sorted(base.glob("*.bin")):
        tensors = torch.load(model / file.name)
        for name, value in torch.load(file).items():
            if name in tensors:
                tensors[name][: len(value)] += value
        torch.save(tensors, model / file.name)
    args = ("--hf-path", model, "--base-path", base, "--mlx-path", tmp_path / "out")
    assert "is not a delta" in fails(capsys, *args)
    convert(model, tmp_path / "out")


def tower_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "vision_tower" / "pytorch_model.bin")


def test_tower_inside_the_main_file(checkpoint, tmp_path):
    """Its config then comes from config.json (a `vision_config`), or from --vision-tower."""
    convert(checkpoint, tmp_path / "expected")
    prefix = "model.vision_tower.vision_tower."
    inside = {prefix + name: value for name, value in tower_tensors(checkpoint).items()}
    change_tensors(checkpoint, lambda tensors: tensors.update(inside))
    convert(checkpoint, tmp_path / "both")
    vision_config = json.loads((checkpoint / "vision_tower" / "config.json").read_text())
    shutil.rmtree(checkpoint / "vision_tower")
    change_config(checkpoint, vision_config=vision_config)
    convert(checkpoint, tmp_path / "inside")
    for out in ("both", "inside"):
        assert equal(weights(tmp_path / out), weights(tmp_path / "expected"))


def test_own_tower_goes_before_the_one_inside(checkpoint, tmp_path):
    prefix = "model.vision_tower.vision_tower."
    zeros = {prefix + n: torch.zeros_like(t) for n, t in tower_tensors(checkpoint).items()}
    convert(checkpoint, tmp_path / "expected")
    change_tensors(checkpoint, lambda tensors: tensors.update(zeros))
    convert(checkpoint, tmp_path / "out")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "expected"))


def test_tower_named_on_the_command_line(checkpoint, tmp_path):
    """A full CLIP checkpoint: its config is nested, and the text model in it does not count."""
    convert(checkpoint, tmp_path / "expected")
    clip = tmp_path / "clip"
    shutil.move(checkpoint / "vision_tower", clip)
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    change_tensors(clip, lambda tensors: tensors.update({"text_model.x": torch.zeros(3)}))
    main(
        [
            "--hf-path",
            str(checkpoint),
            "--vision-tower",
            str(clip),
            "--mlx-path",
            str(tmp_path / "out"),
        ]
    )
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "expected"))


def test_quantized_language_model(parity, tmp_path):
    """Vision tower, projector and sampler keep their precision unless asked."""
    convert(parity / "checkpoint", tmp_path / "plain")
    convert(parity / "checkpoint", tmp_path / "out", quantize=True, q_bits=8, q_group_size=32)
    ours, plain = weights(tmp_path / "out"), weights(tmp_path / "plain")
    quantized = {name.removesuffix(".scales") for name in ours if name.endswith(".scales")}
    # Of the checkpoint's widths (48 and 128) only 128 is a multiple of 32.
    assert quantized == {f"language_model.model.layers.{i}.mlp.down_proj" for i in range(3)}
    rest = {name for name in ours if name.rpartition(".")[0] not in quantized}
    assert all(mx.array_equal(ours[name], plain[name]) for name in rest)
    for layer in quantized:
        parts = (ours[f"{layer}.{part}"] for part in ("weight", "scales", "biases"))
        restored = mx.dequantize(*parts, group_size=32, bits=8)
        assert mx.abs(restored - plain[f"{layer}.weight"]).max() < 0.01
    model, _ = load(tmp_path / "out")
    layer = model.language_model.model.layers[0].mlp.down_proj.weight
    assert mx.abs(layer - plain["language_model.model.layers.0.mlp.down_proj.weight"]).max() < 0.01


def test_quantized_vision(parity, tmp_path):
    out = tmp_path / "out"
    flags = ["-q", "--q-group-size", "32", "--quantize-vision", "--dtype", "bfloat16"]
    main(["--hf-path", str(parity / "checkpoint"), "--mlx-path", str(out), *flags])
    quantized = {name for name in weights(out) if name.endswith(".scales")}
    for part in ("vision_tower.encoder", "mm_projector", "region_sampler.dim_projector"):
        assert any(name.startswith(part) for name in quantized), part
    load(out)


def test_recipe(parity, tmp_path):
    out = tmp_path / "out"
    convert(parity / "checkpoint", out, quantize=True, q_group_size=32, quant_predicate="mixed_3_6")
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    bits = {value["bits"] for value in quantization.values() if isinstance(value, dict)}
    assert bits == {3, 6}
    load(out)


def run(*args) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, "convert.py", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout, result.stderr


def test_command_line(parity, tmp_path):
    assert run("--hf-path", parity / "checkpoint", "--mlx-path", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    code, stdout, stderr = run("--hf-path", parity / "checkpoint", "--mlx-path", tmp_path / "out")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "exists already" in stderr


def fails(capsys, *args) -> str:
    """Run the command line, expect exit status 2 and return its one line."""
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    return captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-q", "--q-bits", "7"], "--q-bits is 7"),
        (["-q", "--q-bits", "many"], "--q-bits"),
        (["-q", "--q-group-size", "48"], "--q-group-size is 48"),
        (["-q", "--q-mode", "mxfp4", "--q-group-size", "64"], "mode mxfp4 has: 32"),
        (["-q", "--q-mode", "mxfp4", "--quant-predicate", "mixed_3_6"], "affine"),
        (["-q", "--q-group-size", "128", "--q-mode", "mxfp8"], "mode mxfp8"),
        (["-q", "--q-mode", "other"], "--q-mode"),
        (["-q", "--quant-predicate", "mixed_9_9"], "--quant-predicate"),
        (["--q-bits", "4"], "add -q"),
        (["--dtype", "int8"], "--dtype"),
        (["--base-path", "./nowhere"], "no folder ./nowhere"),
        (["--vision-tower", "./nowhere"], "no folder ./nowhere"),
        (["--vision-tower", "some/clip"], "could not be fetched from the Hub"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_options(parity, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert message in fails(capsys, "--hf-path", parity / "checkpoint", "--mlx-path", out, *flags)
    assert os.listdir(tmp_path) == []


def test_no_layer_fits_the_group_size(parity, tmp_path, capsys):
    delta, base = parity / "delta" / "delta", parity / "delta" / "base"
    args = ("--hf-path", delta, "--base-path", base, "--mlx-path", tmp_path / "new" / "out")
    error = fails(capsys, *args, "-q", "--q-group-size", "128")
    assert "No layer's width is a multiple of 128 (--q-group-size 128)" in error
    assert os.listdir(tmp_path) == []


def test_output_that_exists(parity, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        args = ("--hf-path", parity / "checkpoint", "--mlx-path", tmp_path / name)
        assert "exists already" in fails(capsys, *args)
    assert (tmp_path / "file").read_text() == "kept" and os.listdir(tmp_path / "empty") == []
    below = ("--hf-path", parity / "checkpoint", "--mlx-path", tmp_path / "file" / "out")
    assert "not a folder" in fails(capsys, *below)


def drop(folder, name):
    (folder / name).unlink()


def truncate(folder, name, keep=0.5):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])


def flip_tensor_bits(folder):
    path = folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0x10
    path.write_bytes(data)


def reshape(name):
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1)})


BREAKAGES = {
    "no config": (lambda f: drop(f, "config.json"), "config.json"),
    "unreadable config": (lambda f: truncate(f, "config.json"), "not readable JSON"),
    "empty config": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "other model": (lambda f: change_config(f, model_type="llama"), "not a Ferret model"),
    "adapter": (
        lambda f: change_config(f, region_geo_sampler=None, region_fea_adapter=True),
        "region_fea_adapter",
    ),
    "quantized": (lambda f: change_config(f, quantization={"bits": 4}), "quantized already"),
    "other width": (lambda f: change_config(f, intermediate_size=256), "config.json says"),
    "fewer layers": (lambda f: change_config(f, num_hidden_layers=2), "does not have"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=4), "lacks language_model"),
    "no tokenizer": (lambda f: drop(f, "tokenizer.model"), "tokenizer.model"),
    "no weights": (lambda f: drop(f, "pytorch_model.bin"), "holds no checkpoint"),
    "truncated": (lambda f: truncate(f, "pytorch_model.bin", 0.9), "pytorch_model.bin is trunc"),
    "damaged": (flip_tensor_bits, "wrong CRC-32"),
    "not a checkpoint": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"<html>"),
        "not a PyTorch checkpoint",
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop("model.mm_projector.bias")),
        "lacks mm_projector.bias",
    ),
    "extra tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"model.other": torch.zeros(2)})),
        "model.other",
    ),
    "wrong shape": (lambda f: change_tensors(f, reshape("lm_head.weight")), "lm_head.weight has"),
    "wrong rank": (
        lambda f: change_tensors(
            f, reshape("model.region_geo_sampler.agg_projector_list.0.net.0.weight")
        ),
        "rank",
    ),
    "no tower anywhere": (lambda f: shutil.rmtree(f / "vision_tower"), "give --vision-tower"),
    "no tower named": (
        lambda f: [shutil.rmtree(f / "vision_tower"), change_config(f, mm_vision_tower=None)],
        "give --vision-tower",
    ),
    "tower without config": (lambda f: drop(f / "vision_tower", "config.json"), "config.json"),
    "truncated tower": (lambda f: truncate(f, "vision_tower/pytorch_model.bin"), "truncated"),
    "no tower in the tower's file": (
        lambda f: change_tensors(
            f / "vision_tower",
            lambda t: (
                [t.update({"text_model.x": torch.zeros(1)})]
                + [t.pop(name) for name in list(t) if name.startswith("vision_model.")]
            ),
        ),
        "no vision_model",
    ),
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_broken_checkpoints(checkpoint, tmp_path, capsys, case):
    """Each ends with one line, and with nothing where the output would have been."""
    change, message = BREAKAGES[case]
    change(checkpoint)
    args = ("--hf-path", checkpoint, "--mlx-path", tmp_path / "new" / "out")
    assert message in fails(capsys, *args)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_base_that_does_not_fit(parity, tmp_path, capsys):
    args = ("--base-path", parity / "delta" / "base", "--mlx-path", tmp_path / "out")
    error = fails(capsys, "--hf-path", parity / "checkpoint", *args)
    assert "is not the base of" in error and "pytorch_model.bin" in error
    assert os.listdir(tmp_path) == []


def test_sources_that_are_not_there(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (
        "./nowhere",
        "/nowhere/at/all",
        "nowhere",
        "a/b/c",
        "some/model",
        tmp_path / "file",
    ):
        error = fails(capsys, "--hf-path", path, "--mlx-path", tmp_path / "out")
        assert "--hf-path" in error and str(path) in error
    assert os.listdir(tmp_path) == ["file"]


def test_ctrl_c_leaves_no_output(parity, tmp_path, monkeypatch):
    """It comes here when all but the model card is written; that stays for the next run."""

    def interrupted(folder, *args, **kwargs):
        assert (folder / "model.safetensors").is_file()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ferret_mlx.convert, "write_model_card", interrupted)
    out = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as exit:
        main(["--hf-path", str(parity / "checkpoint"), "--mlx-path", str(out)])
    assert exit.value.code == 130
    assert os.listdir(tmp_path / "new") == [".out.partial"]


def test_an_output_that_appears_meanwhile_is_not_replaced(parity, tmp_path, monkeypatch):
    original = ferret_mlx.convert.write_model_card

    def slow(*args, **kwargs):
        (tmp_path / "out").mkdir()
        original(*args, **kwargs)

    monkeypatch.setattr(ferret_mlx.convert, "write_model_card", slow)
    with pytest.raises(ValueError, match="exists already"):
        convert(parity / "checkpoint", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


def test_the_card_of_the_source_is_kept(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("---\nlicense: mit\ntags: [toy]\n---\n# Toy\n\nA toy.\n")
    convert(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "- toy" in card and "- mlx" in card and "A toy." in card
    (checkpoint / "README.md").write_text("---\nlicense: [\n---\nStill a card.\n")
    convert(checkpoint, tmp_path / "again")
    assert "Still a card." in (tmp_path / "again" / "README.md").read_text()


def test_no_torch(parity, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; from ferret_mlx.convert import convert; "
        "convert(*sys.argv[1:])"
    )
    args = [str(parity / "checkpoint"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_failed_upload_keeps_the_folder(parity, tmp_path, capsys):
    args = ("--hf-path", parity / "checkpoint", "--mlx-path", tmp_path / "out")
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in (*args, "--upload-repo", "someone/ferret")])
    *_, wrote, error = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and wrote.startswith("Wrote ")
    assert "is written, but the upload to someone/ferret failed" in error
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_converted_folder_can_be_quantized_later(parity, tmp_path):
    """Catches a second transpose of layouts, and a lost vision config."""
    convert(parity / "checkpoint", tmp_path / "plain")
    for source, out in ((parity / "checkpoint", "at once"), (tmp_path / "plain", "later")):
        convert(source, tmp_path / out, quantize=True, q_group_size=32)
    assert equal(weights(tmp_path / "at once"), weights(tmp_path / "later"))
