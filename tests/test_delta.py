"""The delta merge against what the released code computes, and bases that do not belong."""

import numpy as np
import pytest
import torch

from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.delta import MergedCheckpoint


def save(folder, **tensors):
    folder.mkdir()
    tensors = {name.replace("__", "."): value for name, value in tensors.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return open_checkpoint(folder)


def test_merge_equals_the_released_one(parity):
    """Catches an addition in float32, skipped tensors and a shift of the added tokens' rows."""
    expected = np.load(parity / "delta" / "applied_sample.npz")
    with (
        open_checkpoint(parity / "delta" / "delta") as delta,
        open_checkpoint(parity / "delta" / "base") as base,
    ):
        merged = MergedCheckpoint(delta, base)
        assert set(merged.names()) == {n for n in expected.files if not n.startswith("sum::")}
        for name in merged.names():
            value = np.array(merged.read(name))
            assert value.dtype == np.float16 and value.shape == merged.info(name).shape
            assert np.array_equal(value.ravel()[:4096].astype(np.float32), expected[name]), name
            value = value.astype(np.float64)
            assert np.array_equal([value.sum(), np.abs(value).sum()], expected["sum::" + name])


def test_added_rows_and_added_tensors_are_taken_as_they_are(tmp_path):
    delta = save(
        tmp_path / "delta",
        lm_head__weight=torch.ones(5, 2),
        model__mm_projector__weight=torch.full((2, 2), 7.0),
        model__vision_tower__x=torch.full((1,), 8.0),
        model__region_geo_sampler__x=torch.full((1,), 9.0),
    )
    base = save(tmp_path / "base", lm_head__weight=torch.full((3, 2), 10.0))
    merged = MergedCheckpoint(delta, base)
    assert np.array(merged.read("lm_head.weight"))[:, 0].tolist() == [11, 11, 11, 1, 1]
    for name, value in (("mm_projector.weight", 7), ("vision_tower.x", 8)):
        assert np.array(merged.read("model." + name)).ravel()[0] == value


def test_buffers_do_not_matter(tmp_path):
    """Vicuna's files hold `inv_freq`, a delta made by newer transformers does not."""
    buffer = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    weight, base_weight = ({"model__norm__weight": torch.full((2,), x)} for x in (0.1, 1.0))
    for i, (ours, theirs) in enumerate(((buffer, {}), ({}, buffer))):
        delta = save(tmp_path / f"d{i}", **weight, **ours)
        base = save(tmp_path / f"b{i}", **base_weight, **theirs)
        assert MergedCheckpoint(delta, base).names() == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("delta", "base", "message"),
    [
        # the base lacks a tensor of the language model
        (dict(model__norm__weight=2, lm_head__weight=2), dict(lm_head__weight=2), "lacks model.no"),
        # the base holds more
        (dict(lm_head__weight=2), dict(lm_head__weight=2, model__norm__weight=2), "holds model.no"),
        # only the first dimension of embeddings and output layer may be larger
        (dict(model__norm__weight=3), dict(model__norm__weight=2), r"\(2,\) in .* \(3,\) in"),
        (dict(lm_head__weight=2), dict(lm_head__weight=3), "lm_head.weight is"),
        (dict(lm_head__weight=(3, 3)), dict(lm_head__weight=(2, 2)), "lm_head.weight is"),
        (dict(lm_head__weight=(3, 2)), dict(lm_head__weight=(2,)), "lm_head.weight is"),
        (dict(model__mm_projector__weight=3), dict(model__mm_projector__weight=2), "mm_projector"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path, delta, base, message):
    delta = save(tmp_path / "delta", **{name: torch.zeros(shape) for name, shape in delta.items()})
    base = save(tmp_path / "base", **{name: torch.zeros(shape) for name, shape in base.items()})
    with pytest.raises(ValueError, match=message) as error:
        MergedCheckpoint(delta, base)
    assert "\n" not in str(error.value)


def test_a_shard_in_the_wrong_folder(tmp_path):
    """Names and shapes fit when a middle shard of the base lies in the delta's folder."""
    norm = {"model__layers__3__input_layernorm__weight": torch.full((4,), 0.9)}
    delta, base = save(tmp_path / "delta", **norm), save(tmp_path / "base", **norm)
    with pytest.raises(ValueError, match=r"layers\.3\.input_layernorm\.weight is the same in"):
        MergedCheckpoint(delta, base)


def test_blocks_are_the_tensor(tmp_path):
    """Catches rows that are added to others' where a block ends, or the base does."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(n, 3, generator=generator).half() for n in (10, 7))
    delta = save(tmp_path / "delta", lm_head__weight=ours)
    merged = MergedCheckpoint(delta, save(tmp_path / "base", lm_head__weight=theirs))
    ours[:7] += theirs
    for rows in (1, 2, 3, 4, 7, 8, 10, 100):
        blocks = [np.array(block) for block in merged.blocks("lm_head.weight", rows)]
        assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
        assert np.array_equal(np.concatenate(blocks), ours.numpy())
