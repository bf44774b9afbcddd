"""The vision tower run from a package: Core ML's part is taken by the interpreter."""

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest

from ferret_mlx import Session, coreml_tower, generate, load
from ferret_mlx.cli import generate_main
from ferret_mlx.coreml_package import PackageOptions
from ferret_mlx.hub import find_folder
from tests.coreml_packages import PICTURE, relative
from tests.mil_interpreter import Interpreter

QUESTION = "Where is the clock?"


@pytest.fixture
def macos(monkeypatch):
    """As on macOS, with the interpreter as Core ML; the compute units that were asked for."""
    asked = []

    def open_model(coremltools, package, compute_units):
        asked.append(compute_units)
        return Interpreter(package)

    monkeypatch.setattr(coreml_tower, "_on_macos", lambda: True)
    monkeypatch.setattr(coreml_tower, "_open_model", open_model)
    return asked


@pytest.fixture
def folder(mlx_folders, packages, tmp_path) -> Path:
    """ferret-tiny with its package in the folder."""
    copy = Path(shutil.copytree(mlx_folders["ferret-tiny"], tmp_path / "ferret-tiny"))
    package = packages("ferret-tiny", PackageOptions("float32"))
    shutil.copytree(package, copy / "vision.mlpackage")
    return copy


def test_features_and_answer(folder, macos):
    model, processor = load(folder)
    other, _ = load(folder, vision="coreml", coreml_compute_units="CPU_AND_NE")
    assert macos == ["CPU_AND_NE"]
    pixels = processor.pixel_values(PICTURE)
    features, found = model.encode_image(pixels), other.encode_image(pixels)
    assert found.dtype == features.dtype and found.shape == features.shape
    assert relative(np.array(found), np.array(features)) <= 1e-5
    answers = [generate(m, processor, PICTURE, QUESTION, max_tokens=24) for m in (model, other)]
    assert answers[0] == answers[1] and answers[0]


def test_its_weights_are_not_kept(folder, macos):
    model, _ = load(folder, vision="coreml")
    assert not model.vision_tower.parameters()
    model.set_dtype(mx.float16)
    assert model.mm_projector.weight.dtype == mx.float16


def test_package_that_reads_pictures(mlx_folders, packages, macos):
    """The 8-bit pixels are restored exactly from the normalised ones."""
    package = packages("ferret-tiny", PackageOptions("float32", image_input=True))
    model, processor = load(vision=package)
    pixels = processor.pixel_values(PICTURE)
    features = load()[0].encode_image(pixels)
    assert relative(np.array(model.encode_image(pixels)), np.array(features)) <= 1e-5
    seen = []
    model.vision_tower._model = type(
        "Seen", (), {"predict": lambda _, inputs: seen.append(inputs)}
    )()
    with pytest.raises(TypeError):
        model.encode_image(pixels)
    from ferret_mlx.image import open_image

    size = model.config.vision.image_size
    square = open_image(PICTURE).resize((size, size), 3)
    assert np.array_equal(np.array(seen[0]["image"]), np.array(square))


def test_several_pictures(folder, macos):
    model, processor = load(folder, vision="coreml")
    pixels = processor.pixel_values(PICTURE)
    both = model.vision_tower(mx.concatenate([pixels, pixels * 0]))
    assert both.shape[0] == 2
    assert mx.array_equal(both[:1], model.vision_tower(pixels))
    assert not mx.array_equal(both[0], both[1])
    with pytest.raises(ValueError, match=r"expected \(B, 140, 140, 3\)"):
        model.encode_image(mx.zeros((1, 3, 140, 140)))


def test_sessions_tell_packages_apart(folder, packages, macos, tmp_path):
    """A saved picture belongs to what encoded it."""
    file = tmp_path / "saved.safetensors"
    model, processor = load(folder, vision="coreml")
    Session(model, processor, PICTURE).save(file)
    Session(model, processor, PICTURE).load(file)
    half = packages("ferret-tiny", PackageOptions("float16"))
    for other in (load(folder)[0], load(folder, vision=half)[0]):
        with pytest.raises(ValueError, match="another model"):
            Session(other, processor, PICTURE).load(file)


def test_command_line(folder, macos, capsys):
    command = ["--image", str(PICTURE), "--prompt", QUESTION, "--model", str(folder)]
    generate_main(command)
    expected = capsys.readouterr().out
    generate_main([*command, "--vision", "coreml", "--coreml-compute-units", "CPU_ONLY"])
    assert capsys.readouterr().out == expected
    generate_main([*command[:-2], "--vision", str(folder / "vision.mlpackage")])
    assert capsys.readouterr().out == expected
    assert macos == ["CPU_ONLY", "ALL"]


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as exit:
        generate_main(["--image", str(PICTURE), "--prompt", QUESTION, *map(str, arguments)])
    output, errors = capsys.readouterr()
    assert exit.value.code == 2 and output == ""
    assert errors.endswith("\n") and errors.count("\n") == 1 and ": error: " in errors
    return errors


def test_elsewhere_than_on_macos(monkeypatch, folder, capsys):
    monkeypatch.setattr(coreml_tower, "_on_macos", lambda: False)
    message = "--vision coreml needs Core ML, which only macOS has.*use --vision mlx"
    with pytest.raises(ValueError, match=message):
        load(folder, vision="coreml")
    assert "only macOS" in refused(capsys, "--model", folder, "--vision", "coreml")


def test_without_coremltools(monkeypatch, folder, macos, capsys):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    line = refused(capsys, "--model", folder, "--vision", "coreml")
    assert "pip install 'ferret-mlx[coreml]'" in line


def test_wrong_arguments(folder, macos, capsys):
    options = ["--model", folder, "--vision"]
    assert "expected mlx, coreml or the path" in refused(capsys, *options, "metal")
    line = refused(capsys, *options, "coreml", "--coreml-compute-units", "NPU")
    assert "'NPU', expected one of ALL, CPU_AND_NE, CPU_AND_GPU, CPU_ONLY" in line
    assert "There is no Core ML package at" in refused(capsys, *options, "/none/p.mlpackage")


def test_no_package_or_several(folder, macos, capsys):
    options = ["--model", folder, "--vision", "coreml"]
    shutil.copytree(folder / "vision.mlpackage", folder / "other.mlpackage")
    line = refused(capsys, *options)
    assert "other.mlpackage, vision.mlpackage; name one of them" in line
    shutil.rmtree(folder / "other.mlpackage")
    (folder / "vision.mlpackage").rename(folder / ".vision.partial-1.mlpackage")
    assert f"convert.py --mlx-path {folder} --coreml" in refused(capsys, *options)


def test_package_of_another_model(folder, macos, packages, capsys):
    """One that has one weight of the tower different, and one of another architecture."""
    options = ["--vision", "coreml", "--model", folder]
    file = str(folder / "model.safetensors")
    weights = {name: mx.array(value) for name, value in mx.load(file).items()}
    mx.eval(weights)
    name = "vision_tower.encoder.layers.3.mlp.fc2.bias"
    weights[name][7] += 1
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    line = refused(capsys, *options)
    assert "does not belong to the model" in line and "made from ferret-tiny" in line
    other = packages("parity", PackageOptions("float32"))
    capsys.readouterr()
    assert "made from parity" in refused(capsys, "--vision", other)


def test_other_parts_do_not_matter(folder, macos):
    """A package stays valid when the language model is quantized anew."""
    file = str(folder / "model.safetensors")
    weights = {name: mx.array(value) for name, value in mx.load(file).items()}
    mx.eval(weights)
    weights["language_model.model.norm.weight"] += 1
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    assert load(folder, vision="coreml")[0].vision_tower.identity


@pytest.mark.parametrize("damage", ["empty", "truncated", "without metadata"])
def test_damaged_package(folder, macos, capsys, damage):
    program = folder / "vision.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    if damage == "empty":
        shutil.rmtree(folder / "vision.mlpackage")
        (folder / "vision.mlpackage").mkdir()
    elif damage == "truncated":
        program.write_bytes(program.read_bytes()[:5000])
    else:
        program.write_bytes(program.read_bytes().replace(b"ferret_mlx.fingerprint", b"x" * 22))
    line = refused(capsys, "--model", folder, "--vision", "coreml")
    expected = "does not belong" if damage == "without metadata" else "not a readable Core ML"
    assert expected in line


def test_fetched_with_its_package(monkeypatch, tmp_path, macos):
    """From the Hub, and only where it is asked for."""
    held = ["config.json", "model.safetensors", "vision.mlpackage/Data/com.apple.CoreML/x.bin"]
    fetched = set()

    def snapshot_download(hub_id, allow_patterns):
        fetched.update(n for n in held if any(fnmatch(n, p) for p in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, _: held)
    find_folder("owner/ferret", "the model")
    assert fetched == set(held[:2])
    find_folder("owner/ferret", "the model", packages=True)
    assert fetched == set(held)
