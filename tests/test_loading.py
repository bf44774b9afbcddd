import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from ferret_mlx import hub, loading
from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.loading import load
from ferret_mlx.model import Model

TOKENIZER_FILES = ("tokenizer.model", "added_tokens.json")


def write_folder(folder: Path, parity: Path, values: dict, weights: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    for name in TOKENIZER_FILES:
        shutil.copy(parity / "checkpoint" / name, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


@pytest.fixture
def folder(parity, parity_model, parity_weights, tmp_path) -> Path:
    values = read_config(parity / "checkpoint")
    return write_folder(tmp_path / "mlx", parity, values, parity_model.sanitize(parity_weights))


def rewrite(folder: Path, change) -> None:
    file = str(folder / "model.safetensors")
    weights = {name: mx.array(value) for name, value in mx.load(file).items()}
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(file, weights)


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_weights_are_float32_on_the_cpu(folder, parity_model):
    model, processor = load(folder)
    expected = parameters(parity_model)
    assert parameters(model).keys() == expected.keys()
    on_cpu = mx.default_device() == mx.cpu
    for name, value in parameters(model).items():
        assert value.dtype == (mx.float32 if on_cpu else mx.float16)
        assert mx.array_equal(value.astype(mx.float32), expected[name]), name
    assert processor.tokenizer.region_token_id == 32000


def test_answers_like_the_checkpoint(folder, parity, golden, manifest):
    from ferret_mlx import stream_generate

    case = next(case for case in manifest if case["name"] == "grounding")
    chunks = stream_generate(
        *load(str(folder)),
        parity / "cases" / case["image"],
        case["turns"][0]["user"],
        max_tokens=24,
    )
    assert [chunk.token for chunk in chunks] == golden["grounding"]["generated"].tolist()


def test_sharded_folder(folder, parity_model):
    weights = mx.load(str(folder / "model.safetensors"))
    names, weight_map = sorted(weights), {}
    for shard, part in enumerate((names[:40], names[40:]), start=1):
        file = f"model-0000{shard}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    model, _ = load(folder)
    assert parameters(model).keys() == parameters(parity_model).keys()

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="model-00002-of-00002"):
        load(folder)


@pytest.fixture(params=["uniform", "per layer"])
def quantized(request, parity, tmp_path) -> tuple[Path, Model]:
    """A wider model, quantized and saved as the converter does it."""
    values = read_config(parity / "checkpoint")
    values |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    mx.random.seed(1)
    model = Model(FerretConfig.from_dict(values))
    predicate = None
    if request.param == "per layer":

        def predicate(path, module):
            if not path.startswith("language_model."):
                return path == "mm_projector"
            return {"bits": 8, "group_size": 64} if "down_proj" in path else "up_proj" not in path

    model, values = quantize_model(model, values, 32, 4, quant_predicate=predicate)
    folder = write_folder(tmp_path / "quantized", parity, values, parameters(model))
    return folder, model


def test_quantized_layers_are_kept_on_request(quantized):
    folder, saved = quantized
    model, _ = load(folder, dequantize=False)

    def options(model):
        return {
            name: (module.bits, module.group_size)
            for name, module in model.named_modules()
            if hasattr(module, "bits")
        }

    assert options(model) == options(saved)
    assert len(set(options(model).values())) >= 1 and "language_model.lm_head" in options(model)
    for name, value in parameters(model).items():
        assert mx.array_equal(value, parameters(saved)[name]), name


@pytest.mark.parametrize("limit", [loading.DEQUANTIZED_LIMIT, 1000])
def test_dequantized_on_the_cpu_within_a_limit(quantized, limit, monkeypatch):
    folder, saved = quantized
    monkeypatch.setattr(loading, "DEQUANTIZED_LIMIT", limit)
    model, _ = load(folder)
    packed = [name for name, module in model.named_modules() if hasattr(module, "bits")]
    expected = limit > 1000 and mx.default_device() == mx.cpu
    assert (not packed) == expected
    ids = mx.array([[1, 2, 3, 4]])
    assert mx.allclose(model(ids), saved(ids), atol=1e-4)


@pytest.mark.parametrize("mode", [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_other_quantization_modes(parity, tmp_path, mode):
    name, group_size, bits = mode
    values = read_config(parity / "checkpoint") | {"hidden_size": 64}
    model, values = quantize_model(
        Model(FerretConfig.from_dict(values)), values, group_size, bits, mode=name
    )
    folder = write_folder(tmp_path / "quantized", parity, values, parameters(model))
    loaded, _ = load(folder)
    ids = mx.array([[1, 2, 3, 4]])
    assert mx.allclose(loaded(ids), model(ids), atol=1e-3)


def test_size_counts_what_dequantizing_will_take(quantized):
    folder, _ = quantized
    packed, _ = load(folder, dequantize=False)
    plain = Model(FerretConfig.from_folder(folder))
    assert loading._parameter_count(packed) == sum(v.size for v in parameters(plain).values())


def test_missing_extra_and_misshapen_tensors(folder):
    name = "mm_projector.weight"
    rewrite(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match="lacks mm_projector.weight"):
        load(folder)
    rewrite(folder, lambda weights: weights.update({name: mx.zeros((48, 33))}))
    with pytest.raises(ValueError, match=r"mm_projector.weight has shape \(48, 33\)"):
        load(folder)
    rewrite(folder, lambda weights: weights.update({name: mx.zeros((48, 32)), "x.y": mx.zeros(1)}))
    with pytest.raises(ValueError, match=r"holds x\.y, which Ferret does not have"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 500, -100])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder)


def test_foreign_weights(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not the file you wanted</html>" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder)


def test_released_folders_have_to_be_converted(parity, folder, parity_weights):
    with pytest.raises(ValueError, match=r"convert it first .python convert\.py --hf-path"):
        load(parity / "checkpoint")
    mx.save_safetensors(str(folder / "model.safetensors"), parity_weights)
    with pytest.raises(ValueError, match="convert it first"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "added_tokens.json"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\*\.safetensors"):
        load(folder)


def test_quantization_that_does_not_fit_the_weights(folder):
    values = json.loads((folder / "config.json").read_text())
    values["quantization"] = {
        "bits": 8,
        "group_size": 16,
        "language_model.lm_head": {"bits": 8, "group_size": 7},
    }
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_tokenizer_of_another_model(folder):
    added = folder / "added_tokens.json"
    added.write_text(json.dumps(json.loads(added.read_text()) | {"<more>": 32001}))
    with pytest.raises(ValueError, match="tokenizer has 32002 tokens, the model 32001"):
        load(folder)


@pytest.mark.parametrize("name", ["./model", "../owner/name", "/owner/name", "~/no/model", "x"])
def test_paths_never_go_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", lambda *_: pytest.fail("asked the Hub"))
    for given in (name, Path("owner/name")):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            load(given)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load("owner/name")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        load("file")


def test_hub_that_cannot_be_reached(tmp_path):
    """The Hub's own errors are long and of many kinds."""
    code = """
from ferret_mlx import load
try:
    load("owner/name")
except FileNotFoundError as error:
    assert "owner/name" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_bundled_model_that_is_missing(monkeypatch):
    monkeypatch.setattr(hub, "BUNDLED_MODEL", "models/none")
    with pytest.raises(FileNotFoundError, match="bundled model is missing"):
        load()
