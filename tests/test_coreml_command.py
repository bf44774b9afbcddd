"""``convert.py --coreml``: its options, what it writes beside the program, what it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from coremltools.models.utils import load_spec

from ferret_mlx import __version__
from ferret_mlx.cli import convert_main
from ferret_mlx.config import FerretConfig
from ferret_mlx.coreml_package import PackageOptions, convert_vision
from ferret_mlx.tower_weights import tower_fingerprint
from tests.mil_interpreter import Interpreter

ROOT = Path(__file__).parents[1]


def metadata(package: Path):
    return load_spec(str(package)).description.metadata


def test_options(mlx_folders, tmp_path, capsys):
    out = tmp_path / "deep" / "er" / "vision.mlpackage"
    convert_main(
        ["--mlx-path", str(mlx_folders["ferret-tiny"]), "--coreml", str(out), "--coreml-bits", "8"]
        + ["--deployment-target", "macOS13", "--coreml-image-input"]
    )
    errors = capsys.readouterr().err
    assert re.search(r"Operations: .*conv 1, gelu 5,", errors)
    assert re.search(rf"Wrote {out}: float16, 8-bit weights, macOS13 or newer, 2\.5 MB", errors)
    interpreter = Interpreter(out)
    assert list(interpreter.inputs) == ["image"] and interpreter.spec.specificationVersion == 7
    assert any(op.type == "constexpr_affine_dequantize" for op in interpreter.operations)
    assert [path.name for path in out.parent.iterdir()] == ["vision.mlpackage"]


def test_defaults(mlx_folders, tmp_path):
    out = tmp_path / "vision.mlpackage"
    convert_main(["--mlx-path", str(mlx_folders["parity"]), "--coreml", str(out)])
    interpreter = Interpreter(out)
    assert list(interpreter.inputs) == ["pixel_values"]
    assert interpreter.spec.specificationVersion == 9  # macOS15
    assert not any(op.type.startswith("constexpr") for op in interpreter.operations)


def test_metadata(mlx_folders, packages):
    folder = mlx_folders["ferret-tiny"]
    description = load_spec(str(packages("ferret-tiny", PackageOptions()))).description
    found = description.metadata
    fingerprint = tower_fingerprint(folder, FerretConfig.from_folder(folder))
    assert found.author == f"Converted from ferret-tiny by ferret-mlx {__version__}"
    assert found.license == "mit" and found.versionString == __version__
    assert "5 of 6 layers" in found.shortDescription and "float16" in found.shortDescription
    own = {name: value for name, value in found.userDefined.items() if "ferret_mlx" in name}
    assert own == {
        "ferret_mlx.fingerprint": fingerprint,
        "ferret_mlx.source": "ferret-tiny",
        "ferret_mlx.source_revision": f"sha256:{fingerprint}",
    }
    assert "(1, 3, 140, 140)" in description.input[0].shortDescription
    assert "0.48145466" in description.input[0].shortDescription
    assert "(1, 100, 192)" in description.output[0].shortDescription


def test_revision_of_the_hub(mlx_folders, tmp_path):
    """A model in the Hub's cache has a name and a commit; without a card its license is open."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--owner--ferret" / "snapshots" / commit
    shutil.copytree(mlx_folders["parity"], folder)
    (folder / "README.md").unlink()
    convert_vision(folder, tmp_path / "p.mlpackage")
    found = metadata(tmp_path / "p.mlpackage")
    assert found.userDefined["ferret_mlx.source"] == "owner/ferret"
    assert found.userDefined["ferret_mlx.source_revision"] == commit
    assert found.license == "That of the model it was converted from"


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as exit:
        convert_main([*map(str, arguments)])
    output, errors = capsys.readouterr()
    assert exit.value.code == 2 and output == ""
    assert errors.endswith("\n") and errors.count("\n") == 1 and ": error: " in errors
    return errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--coreml", "x.mlpackage"], "--coreml needs --mlx-path"),
        (["--coreml-bits", "8"], "--coreml-bits was given without --coreml"),
        (["--coreml-image-input"], "--coreml-image-input was given without --coreml"),
        (["--deployment-target", "macOS14"], "--deployment-target was given without --coreml"),
        (["--coreml", "x.mlpackage", "--hf-path", "y"], "--hf-path does not go with --coreml"),
        (["--coreml", "x.mlpackage", "-q"], "--quantize does not go with --coreml"),
        (["--coreml", "x.mlpackage", "--check", "y"], "--check does not go with --coreml"),
        (["--coreml", "x.mlpackage", "--coreml-bits", "3"], "invalid choice: 3"),
        (["--coreml", "x.mlpackage", "--deployment-target", "iOS9"], "invalid choice: 'iOS9'"),
    ],
)
def test_refused_arguments(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_refused_options(mlx_folders, tmp_path, capsys):
    start = ["--mlx-path", mlx_folders["parity"], "--coreml"]
    assert "let it end in .mlpackage" in refused(capsys, *start, tmp_path / "vision")
    options = ["--coreml-precision", "float32", "--coreml-bits", "8"]
    line = refused(capsys, *start, tmp_path / "p.mlpackage", *options)
    assert "needs --coreml-precision float16" in line
    (tmp_path / "p.mlpackage").mkdir()
    assert "exists already" in refused(capsys, *start, tmp_path / "p.mlpackage")
    (tmp_path / "file").touch()
    line = refused(capsys, *start, tmp_path / "file" / "p.mlpackage")
    assert "not a folder to write to" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p.mlpackage"]
    with pytest.raises(ValueError, match="--coreml-bits is 5, expected one of 8, 6, 4"):
        PackageOptions(bits=5)


def test_without_coremltools(monkeypatch, mlx_folders, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    line = refused(
        capsys, "--mlx-path", mlx_folders["parity"], "--coreml", tmp_path / "p.mlpackage"
    )
    assert "pip install 'ferret-mlx[coreml]'" in line


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), "layers.2.mlp.fc2.weight holds NaN or infinity"),
        (1e5, "layers.2.mlp.fc2.weight has values beyond float16; use --coreml-precision float32"),
        (None, "lacks encoder.layers.2.mlp.fc2.weight"),
    ],
)
def test_nothing_is_left_of_a_bad_model(mlx_folders, tmp_path, capsys, value, message):
    folder = Path(shutil.copytree(mlx_folders["parity"], tmp_path / "model"))
    file = str(folder / "model.safetensors")
    weights = {name: mx.array(value) for name, value in mx.load(file).items()}
    mx.eval(weights)
    name = "vision_tower.encoder.layers.2.mlp.fc2.weight"
    changed = weights.pop(name).astype(mx.float32)
    if value is not None:
        changed[3, 5] = value
        weights[name] = changed
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink()
    target = tmp_path / "deep" / "p.mlpackage"
    assert message in refused(capsys, "--mlx-path", folder, "--coreml", target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_released_folder(parity, tmp_path, capsys):
    source = parity / "checkpoint"
    line = refused(capsys, "--mlx-path", source, "--coreml", tmp_path / "p.mlpackage")
    assert "convert" in line and not list(tmp_path.iterdir())


def test_torch_is_not_needed(mlx_folders, tmp_path):
    """In a process that cannot import it; nothing but the two lines is printed."""
    program = (
        "import sys; sys.modules['torch'] = None; from ferret_mlx.cli import convert_main; "
        "convert_main(sys.argv[1:])"
    )
    out = tmp_path / "p.mlpackage"
    command = [sys.executable, "-c", program, "--mlx-path", mlx_folders["parity"]]
    done = subprocess.run(
        [*map(str, command), "--coreml", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and out.is_dir() and done.stdout == ""
    assert len(done.stderr.splitlines()) == 2, done.stderr
