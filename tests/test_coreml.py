"""Core ML packages, interpreted in NumPy, against MLX's features."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ferret_mlx import load
from ferret_mlx.convert import convert
from ferret_mlx.coreml_package import PackageOptions, convert_vision
from tests.coreml_packages import PICTURE, error_of, mlx_features, relative
from tests.mil_interpreter import Interpreter

BOUND = {"float32": 1e-5, "float16": 5e-3}
FOLDERS = ("parity", "ferret-tiny")
# Core ML has Neural Engine kernels for all of them; constexpr_* are unpacked when it loads.
OPERATIONS = {
    *("add", "cast", "concat", "const", "conv", "gelu", "layer_norm", "linear", "matmul", "mul"),
    *("reshape", "slice_by_index", "softmax", "sub", "transpose"),
}
# The two forms that a table of values has, of which the newer systems read both.
TABLES = [(6, "macOS13"), (4, "macOS15")]


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("name", FOLDERS)
def test_features(packages, picture_features, name, precision):
    package = packages(name, PackageOptions(precision))
    assert error_of(package, *picture_features(name)) <= BOUND[precision]


@pytest.mark.parametrize("precision", BOUND)
def test_released_features(packages, golden, precision):
    interpreter = Interpreter(packages("parity", PackageOptions(precision)))
    for numbers in golden.values():
        pixels, features = numbers["pixel_values"][None], numbers["image_features"][None]
        assert error_of(interpreter, pixels, features) <= BOUND[precision]


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("name", FOLDERS)
def test_picture_as_input(packages, picture_features, name, precision):
    """The same features from 8-bit pixels: the normalisation inside is that of the model."""
    pixels, features = picture_features(name)
    size = pixels.shape[-1]
    picture = Image.open(PICTURE).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    package = packages(name, PackageOptions(precision, image_input=True))
    found = Interpreter(package).predict({"image": picture})["features"]
    assert relative(found, features) <= BOUND[precision]


def test_other_image_constants(mlx_folders, picture_features, tmp_path):
    """Catches constants of CLIP where the model has its own."""
    folder = shutil.copytree(mlx_folders["parity"], tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("0.48145466", "0.3").replace("0.268", "0.5"))
    model, processor = load(folder)
    size = model.config.vision.image_size
    assert model.config.image_mean[0] == 0.3 and model.config.image_std[0] > 0.5
    convert_vision(folder, tmp_path / "p.mlpackage", PackageOptions("float32", image_input=True))
    picture = Image.open(PICTURE).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    found = Interpreter(tmp_path / "p.mlpackage").predict({"image": picture})["features"]
    features = np.array(model.encode_image(processor.pixel_values(PICTURE)))
    assert relative(found, features) <= 1e-5
    assert relative(found, picture_features("parity")[1]) > 1e-2


@pytest.mark.parametrize("image_input", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_operations_and_shapes(packages, bits, image_input):
    """The interpreter refuses dynamic shapes; here the types of what goes in and out."""
    interpreter = Interpreter(
        packages("parity", PackageOptions("float16", bits, "macOS15", image_input))
    )
    used = {op.type for op in interpreter.operations if not op.type.startswith("constexpr_")}
    assert used <= OPERATIONS and ("cast" in used) == image_input
    (given,), (output,) = interpreter.spec.description.input, interpreter.spec.description.output
    if image_input:
        assert (given.type.imageType.width, given.type.imageType.height) == (112, 112)
        assert given.type.imageType.colorSpace == 20  # RGB
    else:
        assert list(given.type.multiArrayType.shape) == [1, 3, 112, 112]
    assert list(output.type.multiArrayType.shape) == [1, 64, 32]
    half = 65552  # ArrayDataType.FLOAT16
    assert output.type.multiArrayType.dataType == half


@pytest.mark.parametrize("target", ["macOS13", "macOS15"])
def test_eight_bits(packages, target):
    """Each weight lies within half a step of its row's scale; the small ones are untouched."""
    whole = Interpreter(packages("ferret-tiny", PackageOptions()))
    packed = Interpreter(packages("ferret-tiny", PackageOptions("float16", 8, target)))
    restored = unpacked(packed)
    assert len(restored) == 31
    for name, value in whole.constants.items():
        if name not in restored:
            if value.dtype == np.float16:
                assert np.array_equal(packed.constants[name], value), name
            continue
        rows = value.reshape(len(value), -1).astype(np.float64)
        step = np.abs(rows).max(1, keepdims=True) / 127
        difference = np.abs(restored[name].reshape(rows.shape) - rows)
        assert (difference <= 0.502 * step + 1e-3 * np.abs(rows)).all(), name


@pytest.mark.parametrize("bits, target", TABLES)
def test_tables(packages, bits, target):
    """As many values per matrix as the bits allow, each weight the nearest of them."""
    whole = Interpreter(packages("ferret-tiny", PackageOptions()))
    packed = Interpreter(packages("ferret-tiny", PackageOptions("float16", bits, target)))
    restored = unpacked(packed)
    assert len(restored) == 31
    for name, value in restored.items():
        table = np.unique(value.astype(np.float64))
        assert len(table) == 2**bits
        exact = whole.constants[name].astype(np.float64).reshape(-1)
        at = np.searchsorted(table, exact).clip(1, len(table) - 1)
        below, above = table[at - 1], table[at]
        nearest = np.minimum(np.abs(exact - below), np.abs(exact - above))
        found = np.abs(exact - value.reshape(-1))
        # Chosen before the table was rounded to float16.
        rounding = 2**-11 * (np.abs(below) + np.abs(above))
        assert (found <= nearest + rounding).all(), name


def unpacked(interpreter: Interpreter) -> dict[str, np.ndarray]:
    """The compressed weights as the program has them, by the names of the plain ones."""
    values = {}
    for op in interpreter.operations:
        if op.type.startswith("constexpr_"):
            name = op.outputs[0].name.removesuffix("_quantized").removesuffix("_palettized")
            values[name] = interpreter.evaluate(op, interpreter.constants)
    return values


def test_compressed_sizes_and_features(packages, picture_features):
    sizes, errors = [], []
    for bits, target in [(None, "macOS15"), (8, "macOS15"), *TABLES]:
        package = packages("ferret-tiny", PackageOptions("float16", bits, target))
        sizes.append(sum(file.stat().st_size for file in package.rglob("*") if file.is_file()))
        errors.append(error_of(package, *picture_features("ferret-tiny")))
    shares = np.array(sizes[1:]) / sizes[0]
    assert (shares < [0.54, 0.42, 0.30]).all(), shares
    assert errors == sorted(errors) and errors[1] < 0.02 and errors[2] < 0.05, errors


def test_quantized_tower(parity, tmp_path):
    """Weights that the MLX folder holds quantized are restored first."""
    folder = tmp_path / "packed"
    options = dict(quantize=True, q_bits=8, q_group_size=32, quantize_vision=True)
    convert(parity / "checkpoint", folder, **options)
    convert_vision(folder, tmp_path / "p.mlpackage", PackageOptions("float32"))
    assert error_of(tmp_path / "p.mlpackage", *mlx_features(folder)) <= 1e-5


def test_activation_and_layer_of_the_config(mlx_folders, picture_features, tmp_path):
    folder = shutil.copytree(mlx_folders["parity"], tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("quick_gelu", "gelu"))
    convert_vision(folder, tmp_path / "p.mlpackage", PackageOptions("float32"))
    assert error_of(tmp_path / "p.mlpackage", *mlx_features(folder)) <= 1e-5
    assert error_of(tmp_path / "p.mlpackage", *picture_features("parity")) > 1e-4
