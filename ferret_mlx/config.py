"""config.json -> frozen dataclasses, parsed once; what the runtime cannot do is refused here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .json_fields import channels, choice, number, read_json, size, text_value

# OpenAI's constants, in every CLIP preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_ACTIVATIONS = ("quick_gelu", "gelu")
_READ_ORDERS = ("released", "upright")
_POOLER_MODES = ("max", "mean")


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP vision transformer (sizes in pixels and channels)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    select_layer: int = -2

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the feature map."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def layers_used(self) -> int:
        """How many encoder layers lie before the hidden state that Ferret reads.

        `mm_vision_select_layer` counts hidden states, of which the first is the embedding:
        -2 is the state before the last layer.
        """
        count = self.num_hidden_layers + 1 + self.select_layer
        return count if self.select_layer < 0 else self.select_layer

    @classmethod
    def from_dict(cls, values: dict[str, Any], select_layer: int = -2) -> VisionConfig:
        config = cls(
            hidden_size=size(values, "hidden_size"),
            intermediate_size=size(values, "intermediate_size"),
            num_hidden_layers=size(values, "num_hidden_layers"),
            num_attention_heads=size(values, "num_attention_heads"),
            image_size=size(values, "image_size"),
            patch_size=size(values, "patch_size"),
            layer_norm_eps=number(values, "layer_norm_eps", 1e-5),
            hidden_act=choice(values, "hidden_act", "quick_gelu", _ACTIVATIONS),
            select_layer=select_layer,
        )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"config.json: vision_config: hidden_size {config.hidden_size} is no multiple of "
                f"num_attention_heads {config.num_attention_heads}."
            )
        if config.image_size < 2 * config.patch_size:
            raise ValueError(
                f"config.json: vision_config: image_size {config.image_size} leaves fewer than "
                f"2 x 2 patches of patch_size {config.patch_size}."
            )
        if isinstance(select_layer, bool) or not isinstance(select_layer, int):
            raise ValueError(
                f"config.json: mm_vision_select_layer is {select_layer!r}, not an integer."
            )
        if not 0 <= config.layers_used <= config.num_hidden_layers:
            raise ValueError(
                f"config.json: mm_vision_select_layer {select_layer} lies outside of the "
                f"{config.num_hidden_layers} vision layers."
            )
        return config


@dataclass(frozen=True)
class SamplerConfig:
    """The spatial-aware visual sampler (paper, section 3.1; sizes fixed in the released code)."""

    pooler_mode: str = "max"
    read_order: str = "released"
    num_points: int = 512
    # (points kept, neighbours pooled) per block
    stages: tuple[tuple[int, int], ...] = ((128, 24), (32, 24))


@dataclass(frozen=True)
class FerretConfig:
    """A whole model. `text` holds the LLaMA fields by their Hugging Face names."""

    text: dict[str, Any]
    vision: VisionConfig
    sampler: SamplerConfig
    region_token_id: int
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    prompt_template: str = "v1"
    use_im_start_end: bool = False
    quantization: dict[str, Any] | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def context(self) -> int:
        """Positions (prompt with expanded image, and answer) that the language model has."""
        return self.text["max_position_embeddings"]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FerretConfig:
        """Parse the config.json of an MLX folder. Raises ValueError naming key and value."""
        _refuse_other_models(values)
        vision_values = values.get("vision_config")
        if not isinstance(vision_values, dict):
            raise ValueError(
                "config.json: no vision_config; convert the checkpoint with convert.py."
            )
        vision = VisionConfig.from_dict(vision_values, values.get("mm_vision_select_layer", -2))
        if size(values, "mm_hidden_size", vision.hidden_size) != vision.hidden_size:
            raise ValueError(
                f"config.json: mm_hidden_size is {values['mm_hidden_size']} but the vision tower "
                f"is {vision.hidden_size} wide; they belong to different models."
            )
        text = _text_fields(values)
        region_token_id = values.get("im_region_fea_token")
        if type(region_token_id) is not int or not 0 <= region_token_id < text["vocab_size"]:
            raise ValueError(
                f"config.json: im_region_fea_token is {region_token_id!r}, "
                f"expected a token id below vocab_size {text['vocab_size']}."
            )
        return cls(
            text=text,
            vision=vision,
            sampler=SamplerConfig(
                pooler_mode=choice(values, "sampler_pooler_mode", "max", _POOLER_MODES),
                read_order=choice(values, "region_read_order", "released", _READ_ORDERS),
            ),
            region_token_id=region_token_id,
            image_mean=channels(values, "image_mean", CLIP_MEAN),
            image_std=channels(values, "image_std", CLIP_STD),
            prompt_template=text_value(values, "prompt_template", "v1"),
            use_im_start_end=bool(values.get("mm_use_im_start_end", False)),
            quantization=_quantization(values),
            raw=values,
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> FerretConfig:
        """Parse the config of a model folder, in the MLX or in the released layout."""
        return cls.from_dict(read_config(folder))


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder as a dict in the MLX form.

    A released folder keeps the vision tower's config and the image constants in
    `vision_tower/`; they are added as `vision_config`, `image_mean` and `image_std`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a Ferret model.")
    values = read_json(folder / "config.json")
    tower = folder / "vision_tower"
    if "vision_config" not in values and (tower / "config.json").is_file():
        values |= vision_entries(tower)
    return values


def vision_entries(tower: str | Path) -> dict[str, Any]:
    """The entries that a CLIP folder adds to Ferret's config (a full CLIP or its vision half)."""
    tower = Path(tower)
    vision = read_json(tower / "config.json")
    vision = vision.get("vision_config", vision)
    entries: dict[str, Any] = {"vision_config": vision}
    if (tower / "preprocessor_config.json").is_file():
        preprocessor = read_json(tower / "preprocessor_config.json")
        entries["image_mean"] = preprocessor.get("image_mean", list(CLIP_MEAN))
        entries["image_std"] = preprocessor.get("image_std", list(CLIP_STD))
    return entries


def _refuse_other_models(values: dict[str, Any]) -> None:
    if values.get("model_type") != "ferret":
        raise ValueError(
            f"config.json: model_type is {values.get('model_type')!r}, expected 'ferret'; "
            "this is not a Ferret model."
        )
    if not values.get("region_geo_sampler", False):
        if values.get("region_fea_adapter"):
            reason = "region features come from a region_fea_adapter (mean of samples)"
        else:
            reason = "region_geo_sampler is not set"
        raise ValueError(
            f"config.json: {reason}; only models with the spatial-aware sampler are read."
        )
    choice(values, "mm_vision_select_feature", "patch", ("patch",))
    choice(values, "mm_projector_type", "linear", ("linear",))
    choice(values, "hidden_act", "silu", ("silu",))


def _text_fields(values: dict[str, Any]) -> dict[str, Any]:
    heads = size(values, "num_attention_heads")
    rope = values.get("rope_parameters") or {}  # transformers 5 puts rope_theta in here
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_parameters is {rope!r}, expected rope_type 'default'.")
    text: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": size(values, "hidden_size"),
        "intermediate_size": size(values, "intermediate_size"),
        "num_hidden_layers": size(values, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": size(values, "num_key_value_heads", heads),
        "vocab_size": size(values, "vocab_size"),
        "max_position_embeddings": size(values, "max_position_embeddings", 2048),
        "rms_norm_eps": number(values, "rms_norm_eps", 1e-6),
        "rope_theta": number(rope | values, "rope_theta", 10000.0),
        "rope_scaling": values.get("rope_scaling"),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "attention_bias": bool(values.get("attention_bias", False)),
        "mlp_bias": bool(values.get("mlp_bias", False)),
    }
    if values.get("head_dim") is not None:
        text["head_dim"] = size(values, "head_dim")
    elif text["hidden_size"] % heads:
        raise ValueError(
            f"config.json: hidden_size {text['hidden_size']} is no multiple of "
            f"num_attention_heads {heads}."
        )
    if heads % text["num_key_value_heads"]:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {text['num_key_value_heads']}."
        )
    return text


def _quantization(values: dict[str, Any]) -> dict[str, Any] | None:
    quantization = values.get("quantization")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ValueError(f"config.json: quantization is {quantization!r}, expected an object.")
    size(quantization, "bits")
    size(quantization, "group_size")
    return quantization
