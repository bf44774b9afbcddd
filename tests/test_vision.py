from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ferret_mlx.vision import VisionTower


def test_only_the_layers_that_are_read_exist(parity_model):
    names = [name for name, _ in tree_flatten(parity_model.vision_tower.parameters())]
    assert any(name.startswith("encoder.layers.2.") for name in names)
    assert not any(name.startswith("encoder.layers.3.") for name in names)
    assert not any("post_layernorm" in name for name in names)


def test_images_of_a_batch_are_independent(parity_model, golden):
    pixels = np.stack([golden[case]["pixel_values"] for case in ("point", "box")])
    pixels = mx.array(pixels.transpose(0, 2, 3, 1))
    together = parity_model.vision_tower(pixels)
    assert together.shape == (2, 64, 32)
    for row in range(2):
        alone = parity_model.vision_tower(pixels[row : row + 1])
        assert mx.allclose(together[row], alone[0], atol=1e-5)


def test_features_follow_the_weights_dtype(parity_model):
    config = parity_model.config.vision
    tower = VisionTower(config)
    tower.update(parity_model.vision_tower.parameters())
    tower.set_dtype(mx.bfloat16)
    assert tower(mx.zeros((1, 112, 112, 3))).dtype == mx.bfloat16


def test_activation_follows_the_config(parity_model, golden):
    config = replace(parity_model.config.vision, hidden_act="gelu")
    tower = VisionTower(config)
    tower.update(parity_model.vision_tower.parameters())
    pixels = mx.array(golden["point"]["pixel_values"].transpose(1, 2, 0))[None]
    quick = parity_model.vision_tower(pixels)
    assert mx.abs(tower(pixels) - quick).max().item() > 1e-4


@pytest.mark.parametrize("shape", [(1, 3, 112, 112), (112, 112, 3), (1, 336, 336, 3)])
def test_pixels_of_another_shape_are_refused(parity_model, shape):
    with pytest.raises(ValueError, match=r"expected \(B, 112, 112, 3\)"):
        parity_model.encode_image(mx.zeros(shape))
