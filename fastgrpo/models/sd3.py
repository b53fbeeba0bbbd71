"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): prompts are read by two CLIPs and T5, guidance is true guidance.

Letters: B samples, L text tokens, E text width, P pooled width, (C, H, W) a latent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.reading import Reading

CLIP_TOKENS = 77


class SD3Conditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)
    pooled: Tensor  # (B, P)


class SD3(Adapter):
    pipeline_class = "StableDiffusion3Pipeline"
    Conditioning = SD3Conditioning
    stock_text_tokens, longest_text = 256, 512
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    @property
    def largest_size(self) -> tuple[int, int]:
        side = self.transformer.config.pos_embed_max_size * self.pixels_per_token
        return side, side

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = (side // self.pipeline.vae_scale_factor for side in self.size)
        return self.transformer.config.in_channels, height, width

    def sigmas(self, num_steps: int) -> Tensor:
        """The scheduler's own; one that shifts dynamically takes more noise for more tokens."""
        height, width = (side // self.transformer.config.patch_size for side in self.latent_shape[1:])
        return self.shifted_sigmas(num_steps, height * width)

    def encode_text(self, prompts: Sequence[str]) -> SD3Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_text_tokens, device=self.text_encoders[0].device,
        )  # fmt: skip
        return SD3Conditioning(embeds.to(self.device), pooled.to(self.device))

    def reading(self, text: str) -> Reading:
        """To T5. Without T5, or with one that has no token for the text, as the embedded model's, CLIP reads the most."""
        t5 = self.pipeline.tokenizer_3
        if t5 is not None and t5.tokenize(text):
            return super().reading(text)
        return Reading(self.pipeline.tokenizer, text, text, CLIP_TOKENS)

    def placeholder(self, batch: int) -> SD3Conditioning:
        config, tokens = self.transformer.config, CLIP_TOKENS + self.settings.max_text_tokens
        return SD3Conditioning(
            torch.randn(batch, tokens, config.joint_attention_dim, device=self.device, dtype=self.dtype),
            torch.randn(batch, config.pooled_projection_dim, device=self.device, dtype=self.dtype),
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: SD3Conditioning) -> Tensor:
        return self.network(
            hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=conditioning.embeds,
            pooled_projections=conditioning.pooled, return_dict=False,
        )[0]  # fmt: skip
