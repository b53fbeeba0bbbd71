"""Wan 2.1 and 2.2 from text (arXiv 2503.20314): videos, prompts read by UMT5, true guidance.

The noise levels, and the timesteps that the network reads, are those of the folder's own scheduler. In the published folders
that is UniPC, whose timesteps are whole numbers. The steps between the levels are this project's, of first order, where
UniPC itself takes some of second order. Both are as in Flow-GRPO's script. So is guidance,
which compares with the empty prompt, unless model.negative_prompt says Wan's own (docs/models.md).
TI2V-5B draws from text alone here, and from an image in `wan_image`. Its pipeline gives each token a timestep of its own, so
that an input frame could be clean. Without an input frame all of them are equal, and one timestep a sample says the same in
a fraction of the memory.
A14B has two transformers, for high noise and for low (`fastgrpo.models.experts`). Guidance is the same in both.

Letters: B samples, L text tokens, E text width, (C, F, H, W) a latent of F frames, T frames of a video.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.reading import Reading

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


class WanConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E), zero past the prompt


class WanFamily(Adapter):
    """What all Wans do alike, from text and from images."""

    # As Flow-GRPO trains it: both attentions, to the video (attn1) and to the text (attn2), without the feed-forward layers.
    lora_targets = tuple(f"{a}.{layer}" for a in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    takes = frozenset({"num_frames"})
    longest_text = 512  # that it was trained on; the stock pipeline does not refuse more
    part_dtypes = {"vae": torch.float32}  # as Wan's own code and Flow-GRPO run the decoder

    @classmethod
    def check_files(cls, path: Path, **base: Any) -> None:
        super().check_files(path, **base)
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        first, second = (index.get(name, [None])[0] is not None for name in ("transformer", "transformer_2"))
        boundary = index.get("boundary_ratio")
        if not first:
            raise ValueError(f"model.path = {path}: model_index.json names no transformer; take the folder as published")
        if second and (transformer := base.get("transformer")) is not None:
            raise ValueError(
                f"model.transformer = {transformer}: {path} holds two transformers, and this would be the first; leave "
                "the key out, and make a folder of links to the pipeline's parts with this as transformer/ or transformer_2/"
            )
        if second and not (isinstance(boundary, float) and 0 < boundary < 1):
            raise ValueError(
                f"model.path = {path}: holds two transformers, and model_index.json has boundary_ratio = {boundary}, which "
                "says where the second takes over; published are 0.875 (Wan2.2-T2V-A14B) and 0.9 (Wan2.2-I2V-A14B)"
            )

    def _check_settings(self) -> None:
        super()._check_settings()
        self._check_scheduler()
        factor = self.pipeline.vae_scale_factor_temporal
        below = (self.num_frames - 1) // factor * factor + 1
        if below != self.num_frames:
            raise ValueError(
                f"model.num_frames = {self.num_frames}: the decoder makes a first frame and then {factor} at a time; "
                f"take {below} or {below + factor}"
            )

    def _check_scheduler(self) -> None:
        """Refuse a scheduler whose noise levels are not those of a flow, or whose timesteps are not known here."""
        scheduler = self.pipeline.scheduler
        unipc_of_flow = scheduler.config.get("use_flow_sigmas") and isinstance(scheduler, UniPCMultistepScheduler)
        of_flow = unipc_of_flow or isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        if not of_flow:
            raise ValueError(
                f"model.path: its scheduler is a {type(scheduler).__name__} without the noise levels of a flow; take the "
                "published UniPCMultistepScheduler with use_flow_sigmas, or a FlowMatchEulerDiscreteScheduler"
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
        return self.pipeline.vae.config.z_dim, frames, height, width

    @property
    def whole_timesteps(self) -> bool:
        """Whether the folder's scheduler is UniPC, which cuts timesteps to whole numbers."""
        return isinstance(self.pipeline.scheduler, UniPCMultistepScheduler)

    def scheduler(self) -> Any:
        """A fresh scheduler with the class and the settings of the pipeline's."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)

    def sigmas(self, num_steps: int) -> Tensor:
        sigmas = super().sigmas(num_steps)
        if self.whole_timesteps:
            sigmas[0] = 1.0  # UniPC begins a millionth below it, where its own steps would divide by 0
        return sigmas

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network reads for the noise levels `sigma`, of any shape: 1000 sigma, cut as the scheduler cuts it.

        UniPC cuts float64. A float32 just below a whole number of thousandths is cut to one less: with the published shifts
        of 3 and 5 that does not happen at up to 221 steps.
        """
        if not self.whole_timesteps:
            return sigma * 1000
        return (sigma.double() * 1000).floor().clamp(max=999).float()

    def encode_words(self, texts: Sequence[str]) -> Tensor:
        """The text encoder's output (B, L, E), zero past each text."""
        embeds, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.settings.max_text_tokens,
            device=self.text_encoders[0].device,
        )  # fmt: skip
        return embeds.to(self.device, self.dtype)

    def reading(self, text: str) -> Reading:
        return super().reading(prompt_clean(text))

    def _run(self, x: Tensor, timestep: Tensor, **conditioning: Tensor | None) -> Tensor:
        """The transformer on x (B, any, F, H, W), with a timestep a sample, (B,), or a token, (B, N)."""
        v = self.network(hidden_states=x, timestep=timestep, return_dict=False, **conditioning)[0]
        return v.contiguous()  # it is a view where a video is one token wide

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Videos (B, T, 3, H, W) uint8 of latents (B, C, F, H, W)."""
        return super().decode(latents, draft=draft).transpose(1, 2).contiguous()

    # By the pipeline's own arithmetic, so that the bits are the same.

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        mean, inverse = _statistics(latents, decoder)
        return latents / inverse + mean

    def from_vae(self, encoded: Tensor) -> Tensor:
        mean, inverse = _statistics(encoded, self.pipeline.vae)
        return (encoded - mean) * inverse

    def load_tiny_decoder(self, path: Path) -> None:
        raise ValueError(f"model.tiny_decoder = {path}: an AutoencoderTiny draws images, not videos; leave it out")


def _statistics(like: Tensor, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """The mean and the inverse of the deviation of each channel of an autoencoder's latents, (C, 1, 1, 1)."""
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)
        for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return mean, 1 / std


class Wan(WanFamily):
    pipeline_class = "WanPipeline"
    Conditioning = WanConditioning

    def encode_text(self, prompts: Sequence[str]) -> WanConditioning:
        return WanConditioning(self.encode_words(prompts))

    def placeholder(self, batch: int) -> WanConditioning:
        shape = batch, self.settings.max_text_tokens, self.transformer.config.text_dim
        return WanConditioning(torch.randn(shape, device=self.device, dtype=self.dtype))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: WanConditioning) -> Tensor:
        return self._run(x, self.timestep(sigma), encoder_hidden_states=conditioning.embeds)
