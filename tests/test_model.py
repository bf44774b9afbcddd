import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.model import Model

TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def case(golden) -> dict:
    numbers = golden["mixed3"]
    return {
        "input_ids": numbers["input_ids"].tolist(),
        "pixel_values": mx.array(numbers["pixel_values"].transpose(1, 2, 0))[None],
        "region_points": mx.array(numbers["points_xy"]),
    }


def test_sanitize_gives_the_documented_names(parity_model, parity_weights):
    sanitized = parity_model.sanitize(parity_weights)
    assert sanitized.keys() == dict(tree_flatten(parity_model.parameters())).keys()
    assert sanitized["vision_tower.embeddings.patch_embedding.weight"].shape == (32, 14, 14, 3)
    assert sanitized["region_sampler.agg_projector_list.1.net.0.weight"].shape == (32, 68)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in sanitized
    assert "language_model.lm_head.weight" in sanitized
    assert "mm_projector.bias" in sanitized


def test_sanitize_twice_changes_nothing(parity_model, parity_weights):
    """The converter writes sanitized weights and loading sanitizes them again."""
    once = parity_model.sanitize(parity_weights)
    twice = parity_model.sanitize(once)
    assert all(twice[name] is once[name] for name in once) and len(once) == len(twice)


def test_sanitize_drops_buffers_and_keeps_unknown_names(parity_model):
    weights = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(6),
        "vision_model.embeddings.position_ids": mx.zeros((1, 65)),
        "model.something_new.weight": mx.zeros(1),
    }
    assert list(parity_model.sanitize(weights)) == ["language_model.model.something_new.weight"]


def test_sanitize_takes_the_tower_of_the_main_file_only_without_another(parity_model):
    name = "vision_model.pre_layrnorm.weight"
    inside, own = mx.zeros(32), mx.ones(32)
    key = "vision_tower.pre_layrnorm.weight"
    assert parity_model.sanitize({TOWER + name: inside}) == {key: inside}
    for weights in ({TOWER + name: inside, name: own}, {name: own, TOWER + name: inside}):
        assert parity_model.sanitize(weights)[key] is own


def test_sanitize_drops_a_tied_output_layer(parity):
    values = read_config(parity / "checkpoint") | {"tie_word_embeddings": True}
    model = Model(FerretConfig.from_dict(values))
    assert model.sanitize({"lm_head.weight": mx.zeros((32001, 48))}) == {}


def test_every_row_of_the_embeddings(parity_model, case):
    ids = case["input_ids"]
    rows = parity_model.embed_inputs(**case)[0]
    features = parity_model.encode_image(case["pixel_values"])
    vectors = parity_model.region_sampler(features, case["region_points"])
    table = parity_model.language_model.model.embed_tokens.weight
    expected, region = [], 0
    for token in ids:
        if token == -200:
            expected.extend(parity_model.mm_projector(features)[0])
        elif token == 32000:
            expected.append(vectors[region])
            region += 1
        else:
            expected.append(table[token])
    assert region == 3
    assert rows.shape == (len(ids) + 63, 48)
    assert mx.allclose(rows, mx.stack(expected), atol=1e-6)
    assert parity_model.expand_ids(ids).size == len(rows)


def test_regions_go_where_their_token_stands(parity_model, case):
    """Exchanging two regions' points exchanges two rows and nothing else."""
    positions = np.flatnonzero(np.array(case["input_ids"]) == 32000) + 63
    order = [1, 0, 2]
    rows = np.array(parity_model.embed_inputs(**case)[0])
    other = np.array(
        parity_model.embed_inputs(**(case | {"region_points": case["region_points"][order]}))[0]
    )
    expected = rows.copy()
    expected[positions] = rows[positions[order]]
    assert np.abs(rows[positions[0]] - rows[positions[1]]).max() > 1e-3
    assert np.allclose(other, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_points": None}, "has 3 <region_fea> but region_points hold 0"),
        ({"region_points": mx.zeros((2, 512, 2))}, "region_points hold 2"),
        ({"input_ids": [1, 2, 3]}, "0 image placeholders"),
        ({"input_ids": [1, -200, 5, -200]}, "2 image placeholders"),
    ],
)
def test_parts_that_do_not_fit_together(parity_model, case, changes, message):
    with pytest.raises(ValueError, match=message):
        parity_model.embed_inputs(**(case | changes))


def test_mlx_lm_drives_the_model(parity_model, case):
    """Prefill in steps, with the model's own cache, equals one pass over everything."""
    ids, rows = parity_model.expand_ids(case["input_ids"]), parity_model.embed_inputs(**case)
    cache = make_prompt_cache(parity_model)
    assert len(cache) == len(parity_model.layers) == 3
    steps = generate_step(
        ids,
        parity_model,
        input_embeddings=rows[0],
        max_tokens=3,
        prompt_cache=cache,
        prefill_step_size=16,
    )
    tokens = [token for token, _ in steps]
    table = parity_model.language_model.model.embed_tokens
    for token in tokens:
        logits = parity_model(ids[None], input_embeddings=rows)
        assert logits.shape == (1, rows.shape[1], 32001)
        assert logits[0, -1].argmax().item() == token
        ids = mx.concatenate([ids, mx.array([token], dtype=ids.dtype)])
        rows = mx.concatenate([rows, table(mx.array([[token]]))], axis=1)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_last_position(parity, parity_model, case, tied):
    model = parity_model
    if tied:
        values = read_config(parity / "checkpoint") | {"tie_word_embeddings": True}
        mx.random.seed(0)
        model = Model(FerretConfig.from_dict(values))
    ids, rows = model.expand_ids(case["input_ids"])[None], model.embed_inputs(**case)
    logits = model.next_logits(ids, make_prompt_cache(model), rows)
    assert logits.shape == (1, 32001)
    assert mx.allclose(logits, model(ids, input_embeddings=rows)[:, -1], atol=1e-4)


def test_mlx_lm_quantizes_the_language_model_only(parity):
    values = read_config(parity / "checkpoint") | {"hidden_size": 64}
    model = Model(FerretConfig.from_dict(values))
    quantize_model(model, {}, group_size=32, bits=8)
    quantized = [name for name, module in model.named_modules() if hasattr(module, "bits")]
    assert "language_model.lm_head" in quantized
    assert "language_model.model.embed_tokens" in quantized
    assert all(name.startswith("language_model.") for name in quantized)


def test_region_sampler_can_be_replaced_by_a_function(parity_model, case):
    """How benchmarks ask what region vectors are worth; MLX modules treat attributes specially."""
    plain = parity_model.embed_inputs(**case)
    sampler = parity_model.region_sampler
    parity_model.region_sampler = lambda *inputs: mx.zeros_like(sampler(*inputs))
    try:
        zeroed = parity_model.embed_inputs(**case)
    finally:
        parity_model.region_sampler = sampler
    changed = np.array(mx.any(plain != zeroed, axis=-1)[0])
    assert changed.sum() == 3 and not np.array(zeroed[0])[changed].any()
    assert mx.array_equal(parity_model.embed_inputs(**case), plain)
