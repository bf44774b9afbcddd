"""A Core ML package with one thing wrong is told from the right one."""

import re
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from coremltools.proto import Model_pb2

from ferret_mlx.coreml_package import PackageOptions, convert_vision
from tests.coreml_packages import error_of, mlx_features
from tests.mil_interpreter import Interpreter

BOUND = {"float32": 1e-5, "float16": 5e-3}


class Mutant:
    """A copy of a package whose files are changed."""

    def __init__(self, package: Path, copy: Path):
        self.path = Path(shutil.copytree(package, copy))
        self.data = self.path / "Data" / "com.apple.CoreML"
        self.spec = Model_pb2.Model.FromString((self.data / "model.mlmodel").read_bytes())
        (block,) = self.spec.mlProgram.functions["main"].block_specializations.values()
        self.operations = {op.outputs[0].name: op for op in block.operations}

    def constant(self, operation: str, argument: str):
        """The value of an operation's argument, which may be changed."""
        name = self.operations[operation].inputs[argument].arguments[0].name
        return self.operations[name].attributes["val"]

    def change(self, operation: str, argument: str, values: list) -> None:
        """Other values for an argument that stands in the program itself."""
        tensor = self.constant(operation, argument).immediateValue.tensor
        field = getattr(tensor, tensor.WhichOneof("value"))
        assert list(field.values) != values
        field.values[:] = values

    def negate(self, operation: str, argument: str) -> None:
        """The other sign for the largest number of a weight, in the file of weights."""
        blob = self.constant(operation, argument).blobFileValue
        file = self.data / blob.fileName.removeprefix("@model_path/")
        content = bytearray(file.read_bytes())
        # Each blob starts with a mark, its type, its size in bytes and where its numbers are.
        _, _, size, start = struct.unpack_from("<IIQQ", content, blob.offset)
        numbers = np.frombuffer(content, np.float32, size // 4, start)
        numbers[np.abs(numbers).argmax()] *= -1
        file.write_bytes(content)

    def save(self) -> Path:
        (self.data / "model.mlmodel").write_bytes(self.spec.SerializeToString())
        return self.path


MUTATIONS = {
    "a weight of the convolution": [("negate", "patch_embedding", "weight")],
    "a weight of the queries": [("negate", "layer0_self_attn_q_proj", "weight")],
    "a weight of the last layer": [("negate", "layer2_mlp_fc2", "weight")],
    "axis of a softmax": [("change", "layer1_self_attn_shares", "axis", [-2])],
    "axis of the last softmax": [("change", "layer2_self_attn_shares", "axis", [2])],
    "activation": [("change", "layer0_mlp_activation", "mode", ["EXACT"])],
    "activation of the last layer": [("change", "layer2_mlp_activation", "mode", ["EXACT"])],
    "scale of the scores": [("change", "layer1_self_attn_q_scaled", "y", [0.25])],
    "the last token left out instead of the first": [
        ("change", "features", "begin", [0, 0, 0]),
        ("change", "features", "end", [1, 64, 32]),
    ],
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_package(packages, picture_features, tmp_path, mutation):
    package = packages("parity", PackageOptions("float32"))
    assert error_of(package, *picture_features("parity")) <= BOUND["float32"]
    mutant = Mutant(package, tmp_path / "mutant.mlpackage")
    for how, *arguments in MUTATIONS[mutation]:
        getattr(mutant, how)(*arguments)
    assert error_of(mutant.save(), *picture_features("parity")) > 10 * BOUND["float32"]


@pytest.fixture(scope="module")
def small(mlx_folders, tmp_path_factory) -> Path:
    """The parity model with a residual stream so small that every epsilon counts."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(mlx_folders["parity"], folder)
    file = str(folder / "model.safetensors")
    weights = {name: mx.array(value) for name, value in mx.load(file).items()}
    mx.eval(weights)
    for name in weights:
        if re.search(r"vision_tower\.(embeddings|pre_layrnorm|.*(out_proj|fc2)\.)", name):
            weights[name] = weights[name] / 100
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    return folder


@pytest.mark.parametrize("precision", BOUND)
def test_epsilons(small, tmp_path, precision):
    """Each of them, wrong by a factor of ten."""
    package = tmp_path / "package.mlpackage"
    convert_vision(small, package, PackageOptions(precision))
    pixels, features = mlx_features(small)
    interpreter = Interpreter(package)
    assert error_of(interpreter, pixels, features) <= BOUND[precision]
    names = [name for name in interpreter.constants if "epsilon" in name]
    assert len(names) == 7
    for name in names:
        right = interpreter.constants[name]
        interpreter.constants[name] = right * right.dtype.type(10)
        assert error_of(interpreter, pixels, features) > 2 * BOUND[precision], name
        interpreter.constants[name] = right


def test_every_weight(packages, picture_features):
    """Each tensor counts: all of its numbers a tenth larger is more than the bound allows."""
    interpreter = Interpreter(packages("parity", PackageOptions("float32")))
    pixels, features = picture_features("parity")
    seen = 0
    for name, right in list(interpreter.constants.items()):
        # Softmax takes no notice of what is the same for all keys.
        if right.dtype != np.float32 or not right.ndim or "k_proj_bias" in name:
            continue
        interpreter.constants[name] = right * np.float32(1.1)
        assert error_of(interpreter, pixels, features) > BOUND["float32"], name
        interpreter.constants[name] = right
        seen += 1
    assert seen == 50
