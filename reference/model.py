"""The PyTorch twin of Ferret: CLIP and LLaMA from transformers, the rest written here.

Independent of ferret_mlx's device side on purpose: the two are compared number by number.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ferret_mlx.prompt import IMAGE_TOKEN_INDEX

from .config import TwinConfig
from .sampler import RegionSampler
from .vision import build_tower, tower_features

EOS = 2


class Twin(nn.Module):
    def __init__(self, config: TwinConfig):
        super().__init__()
        self.config = config
        self.tower = build_tower(config)
        self.mm_projector = nn.Linear(config.vision_width, config.hidden_size)
        self.region_geo_sampler = RegionSampler(
            config.vision_width, config.hidden_size, config.grid, config.pooler_mode
        )
        self.llama = LlamaForCausalLM(config.llama())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, n*n, C)."""
        return tower_features(self.tower, pixels)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.llama.model.embed_tokens(ids)

    def embed_inputs(
        self, input_ids, pixels, region_points=None, starts=None, neighbors=None
    ) -> Tensor:
        """One prompt (list of ids, -200 for the image) -> (1, L, D)."""
        ids = torch.as_tensor(input_ids)
        features = self.encode_image(pixels)
        at = int((ids == IMAGE_TOKEN_INDEX).nonzero())
        text = self.embed_tokens(ids.clamp(min=0)).clone()
        wanted = (ids == self.config.region_token_id).nonzero().flatten()
        if len(wanted):
            vectors = self.region_geo_sampler(features, region_points, None, starts, neighbors)
            if len(vectors) != len(wanted):
                raise ValueError(
                    f"{len(wanted)} region tokens in the prompt, {len(vectors)} regions"
                )
            text[wanted] = vectors.to(text.dtype)
        return torch.cat([text[:at], self.mm_projector(features)[0], text[at + 1 :]])[None]

    @torch.no_grad()
    def generate(
        self, input_ids, pixels, region_points=None, starts=None, neighbors=None, max_tokens=64
    ):
        """Greedy ids up to and without ``</s>``."""
        step = self.embed_inputs(input_ids, pixels, region_points, starts, neighbors)
        cache, ids = None, []
        for _ in range(max_tokens):
            out = self.llama(inputs_embeds=step, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
            step = self.embed_tokens(torch.tensor([[token]]))
        return ids
