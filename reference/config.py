"""Sizes of ferret-tiny and the config files of the released layout."""

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
POINTS = 512
STAGES = ((128, 24), (32, 24))  # (points kept, neighbours) of the sampler's two blocks


@dataclass(frozen=True)
class TwinConfig:
    """What the twin needs to know; ``vision_layers`` counts the last layer that is never run."""

    vocab_size: int
    region_token_id: int
    image_size: int = 140
    patch_size: int = 14
    vision_width: int = 192
    vision_mlp: int = 768
    vision_layers: int = 6
    vision_heads: int = 3
    hidden_size: int = 256
    mlp: int = 512
    layers: int = 5
    heads: int = 4
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    pooler_mode: str = "max"

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def clip(self, layers: int) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_mlp,
            num_hidden_layers=layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            layer_norm_eps=self.layer_norm_eps,
            hidden_act=self.hidden_act,
            projection_dim=self.vision_width,
            attn_implementation="eager",
        )

    def llama(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.max_positions,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )

    def released(self) -> dict:
        """``config.json`` of the released layout."""
        return {
            "architectures": ["FERRETLlamaForCausalLM"],
            "model_type": "ferret",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.max_positions,
            "initializer_range": 0.02,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
            "torch_dtype": "float16",
            "transformers_version": "4.33.3",
            "im_region_fea_token": self.region_token_id,
            "mm_hidden_size": self.vision_width,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "vision_tower",
            "region_geo_sampler": True,
            "sampler_pooler_mode": self.pooler_mode,
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
        }

    def released_vision(self) -> dict:
        """``vision_tower/config.json`` of the released layout."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "attention_dropout": 0.0,
            "hidden_act": self.hidden_act,
            "hidden_size": self.vision_width,
            "image_size": self.image_size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": self.vision_mlp,
            "layer_norm_eps": self.layer_norm_eps,
            "num_attention_heads": self.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": self.vision_layers,
            "patch_size": self.patch_size,
            "projection_dim": self.vision_width,
            "torch_dtype": "float16",
            "transformers_version": "4.33.3",
        }

    @classmethod
    def from_released(cls, config: dict, vision: dict) -> "TwinConfig":
        return cls(
            vocab_size=config["vocab_size"],
            region_token_id=config["im_region_fea_token"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_mlp=vision["intermediate_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            hidden_size=config["hidden_size"],
            mlp=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            max_positions=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            layer_norm_eps=vision["layer_norm_eps"],
            hidden_act=vision["hidden_act"],
            pooler_mode=config["sampler_pooler_mode"],
        )
