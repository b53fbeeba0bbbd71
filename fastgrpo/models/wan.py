"""Wan 2.1 text-to-video, Wan2.2-TI2V-5B and Wan2.2-T2V-A14B (arXiv 2503.20314): videos, prompts read by UMT5, true guidance.

The published folders sample with UniPC. Here the schedule is that of the Euler scheduler with the same shift, because the
steps of this project's samplers are the Euler steps of the flow. Guidance compares with the empty prompt, as Flow-GRPO does:
the long negative prompt that Wan publishes would be one more thing that training has to undo.
TI2V-5B draws from text alone here. Its pipeline gives each token a timestep of its own, so that an input frame could be
clean. Without an input frame all of them are equal, and one timestep a sample says the same in a fraction of the memory.
A14B has two transformers, for high noise and for low (`fastgrpo.models.experts`). Guidance is the same in both.

Letters: B samples, L text tokens, E text width, (C, F, H, W) a latent of F frames, T frames of a video.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.reading import Reading

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


class WanConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E), zero past the prompt


class Wan(Adapter):
    pipeline_class = "WanPipeline"
    Conditioning = WanConditioning
    # As Flow-GRPO trains it: both attentions, to the video (attn1) and to the text (attn2), without the feed-forward layers.
    lora_targets = tuple(f"{a}.{layer}" for a in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    takes = frozenset({"num_frames"})
    vae_dtype = torch.float32  # as Wan's own code and Flow-GRPO run the decoder

    @classmethod
    def check_files(cls, path: Path) -> None:
        super().check_files(path)
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        first, second = (index.get(name, [None])[0] is not None for name in ("transformer", "transformer_2"))
        boundary = index.get("boundary_ratio")
        if not first:
            raise ValueError(f"model.path = {path}: model_index.json names no transformer; take the folder as published")
        if second and not (isinstance(boundary, float) and 0 < boundary < 1):
            raise ValueError(
                f"model.path = {path}: holds two transformers, and model_index.json has boundary_ratio = {boundary}, which "
                "says where the second takes over; published are 0.875 (Wan2.2-T2V-A14B) and 0.9 (Wan2.2-I2V-A14B)"
            )

    def _check_settings(self) -> None:
        super()._check_settings()
        factor = self.pipeline.vae_scale_factor_temporal
        below = (self.num_frames - 1) // factor * factor + 1
        if below != self.num_frames:
            raise ValueError(
                f"model.num_frames = {self.num_frames}: the decoder makes a first frame and then {factor} at a time; "
                f"take {below} or {below + factor}"
            )

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.transformer.config.patch_size[-1]

    @property
    def size(self) -> tuple[int, int]:
        return self.settings.height or HEIGHT, self.settings.width or WIDTH

    @property
    def num_frames(self) -> int:
        return self.settings.num_frames or FRAMES

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        frames = (self.num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        height, width = (side // self.pipeline.vae_scale_factor_spatial for side in self.size)
        return self.transformer.config.in_channels, frames, height, width

    def scheduler(self) -> Any:
        config = self.pipeline.scheduler.config  # UniPC's name of the shift is flow_shift
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=config.get("flow_shift", config.get("shift")))

    def encode_text(self, prompts: Sequence[str]) -> WanConditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.settings.max_text_tokens,
            device=self.text_encoders[0].device,
        )  # fmt: skip
        return WanConditioning(embeds.to(self.device, self.dtype))

    def reading(self, text: str) -> Reading:
        return super().reading(prompt_clean(text))

    def placeholder(self, batch: int) -> WanConditioning:
        shape = batch, self.settings.max_text_tokens, self.transformer.config.text_dim
        return WanConditioning(torch.randn(shape, device=self.device, dtype=self.dtype))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: WanConditioning) -> Tensor:
        v = self.network(
            hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=conditioning.embeds, return_dict=False
        )[0]
        return v.contiguous()  # it is a view where a video is one token wide

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Videos (B, T, 3, H, W) uint8 of latents (B, C, F, H, W)."""
        return super().decode(latents, draft=draft).transpose(1, 2).contiguous()

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(-1, 1, 1, 1)
            for values in (decoder.config.latents_mean, decoder.config.latents_std)
        )
        return latents / (1 / std) + mean  # the pipeline's own arithmetic, so that the bits are the same

    def load_tiny_decoder(self, path: Path) -> None:
        raise ValueError(f"model.tiny_decoder = {path}: an AutoencoderTiny draws images, not videos; leave it out")
