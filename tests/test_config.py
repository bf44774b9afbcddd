import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ferret_mlx.config import FerretConfig, read_config


@pytest.fixture
def values(parity) -> dict:
    return read_config(parity / "checkpoint")


def test_released_folder(parity):
    config = FerretConfig.from_folder(parity / "checkpoint")
    assert config.vision.grid == (8, 8)
    assert config.vision.layers_used == 3
    assert config.text["hidden_size"] == 48
    assert config.context == 2048
    assert config.region_token_id == 32000
    assert config.sampler.read_order == "released"
    assert config.sampler.stages == ((128, 24), (32, 24))
    assert config.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.prompt_template == "v1" and not config.use_im_start_end


def test_mlx_folder_reads_the_same(values, parity, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert FerretConfig.from_folder(tmp_path) == FerretConfig.from_folder(parity / "checkpoint")


def test_output_layer_is_not_tied_unless_said(values):
    """LLaMA configs leave the key out; mlx_lm's own default is a tied output layer."""
    del values["tie_word_embeddings"]
    assert FerretConfig.from_dict(values).text["tie_word_embeddings"] is False


@pytest.mark.parametrize(("select_layer", "used"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (3, 3)])
def test_layers_used(values, select_layer, used):
    config = FerretConfig.from_dict(values | {"mm_vision_select_layer": select_layer})
    assert config.vision.layers_used == used


def test_vision_half_of_a_full_clip_config(values, parity, tmp_path):
    """The Hub's CLIP folder nests the vision config beside the text model's."""
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((parity / "checkpoint" / "vision_tower" / name).read_text())
        if name == "config.json":
            content = {"model_type": "clip", "vision_config": content, "text_config": {}}
        (tmp_path / "vision_tower").mkdir(exist_ok=True)
        (tmp_path / "vision_tower" / name).write_text(json.dumps(content))
    (tmp_path / "config.json").write_bytes((parity / "checkpoint" / "config.json").read_bytes())
    assert FerretConfig.from_folder(tmp_path).vision == FerretConfig.from_dict(values).vision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"region_geo_sampler": False, "region_fea_adapter": True}, "region_fea_adapter"),
        ({"region_geo_sampler": False}, "region_geo_sampler is not set"),
        ({"sampler_pooler_mode": "min"}, "sampler_pooler_mode is 'min'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_vision_select_layer": -6}, "mm_vision_select_layer -6"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer is 'last'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type"),
        ({"region_read_order": "sideways"}, "region_read_order is 'sideways'"),
        ({"im_region_fea_token": 32001}, "im_region_fea_token is 32001"),
        ({"im_region_fea_token": None}, "im_region_fea_token is None"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 50}, "no multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is"),
        ({"rope_parameters": 10000}, "rope_parameters is 10000"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"vision_config": None}, "no vision_config"),
        ({"quantization": {"bits": 4}}, "group_size is None"),
        ({"quantization": 4}, "quantization is 4"),
        ({"prompt_template": 2}, "prompt_template is 2"),
    ],
)
def test_unknown_shapes_and_values_are_refused(values, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        FerretConfig.from_dict(values | changes)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        FerretConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        FerretConfig.from_folder(tmp_path)
    for content in ('{"model_type": ', "[1]", b"\xff\xfe"):
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"config\.json"):
            FerretConfig.from_folder(tmp_path)


def test_import_is_lazy_and_complete():
    """Importing mlx_lm takes two seconds, and host-side modules have to work without MLX."""
    code = """
import sys, ferret_mlx, ferret_mlx.config
heavy = {"mlx", "mlx_lm", "transformers", "torch", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
for name in ferret_mlx.__all__:
    assert callable(getattr(ferret_mlx, name)), name
try:
    ferret_mlx.nothing
except AttributeError:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runtime_does_not_import_torch():
    import ferret_mlx

    for path in Path(ferret_mlx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path
