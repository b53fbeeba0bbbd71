"""FLUX.1 (dev, schnell), and FLUX.1 Kontext, which edits an image. Prompts are read by T5 and, pooled, by CLIP.

Guidance is distilled into an input of the network: dev and Kontext read `distilled_guidance`, schnell has no such input.
Classifier-free guidance with the empty prompt, the pipeline's true_cfg_scale, is possible on top, at twice the cost.

Letters: B samples, L text tokens, E text width, P pooled width, N latent tokens of K numbers (2 x 2 latent pixels each).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgrpo.data.pictures import load_picture
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.settings import cached_by_settings


class FluxConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)
    pooled: Tensor  # (B, P)


class KontextConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt and of the image to edit."""

    embeds: Tensor  # (B, L, E)
    pooled: Tensor  # (B, P)
    image: Tensor  # (B, N, K)


class FluxFamily(Adapter):
    """The network that FLUX.1 and Kontext share, and all that they do alike."""

    takes = frozenset({"distilled_guidance"})
    longest_text = 512
    lora_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    published_guidance: ClassVar[float] = 3.5

    def __init__(self, pipeline: Any, **arguments: Any) -> None:
        super().__init__(pipeline, **arguments)
        self.text_ids = torch.zeros(self.settings.max_text_tokens, 3, device=self.device, dtype=self.dtype)  # (L, 3)
        guidance = self.settings.distilled_guidance
        self.guidance = None if guidance is None else torch.full([1], guidance, device=self.device)  # (1,) float32

    def _check_settings(self) -> None:
        super()._check_settings()
        guidance, read = self.settings.distilled_guidance, self.transformer.config.guidance_embeds
        if read and guidance is None:
            raise ValueError(
                "model.distilled_guidance is missing: this transformer takes its guidance as an input; "
                f"the published value is {self.published_guidance}"
            )
        if guidance is not None and not read:
            raise ValueError(
                f"model.distilled_guidance = {guidance}: this transformer (FLUX.1-schnell?) has no such input; leave it out"
            )

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the N latent tokens."""
        height, width = self.size
        return height // self.pixels_per_token, width // self.pixels_per_token

    @property
    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self.token_grid
        return rows * columns, self.transformer.config.in_channels

    @cached_by_settings
    def latent_ids(self) -> Tensor:
        """The position of each token, the same for all samples and steps: 0, row, column. (N, 3), for Kontext (2 N, 3)."""
        return self.pipeline._prepare_latent_image_ids(1, *self.token_grid, self.device, self.dtype)

    def sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's noise levels. A scheduler that shifts dynamically takes more noise for more tokens."""
        return self.shifted_sigmas(np.linspace(1.0, 1 / num_steps, num_steps), self.latent_shape[0])

    def _read(self, texts: Sequence[str]) -> FluxConditioning:
        """The text encoders' output."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(texts), max_sequence_length=self.settings.max_text_tokens, device=self.text_encoders[0].device
        )
        return FluxConditioning(embeds.to(self.device), pooled.to(self.device))

    def _random_text(self, batch: int) -> FluxConditioning:
        """Random numbers in place of the text encoders' output."""
        config, tokens = self.transformer.config, self.settings.max_text_tokens
        return FluxConditioning(
            torch.randn(batch, tokens, config.joint_attention_dim, device=self.device, dtype=self.dtype),
            torch.randn(batch, config.pooled_projection_dim, device=self.device, dtype=self.dtype),
        )

    def _run(self, tokens: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """The transformer on tokens (B, any, K)."""
        return self.network(
            # Rounded to the model's dtype before the division, as in the pipeline. The transformer multiplies by 1000 again.
            hidden_states=tokens, timestep=(sigma * 1000).to(tokens.dtype) / 1000,
            guidance=None if self.guidance is None else self.guidance.expand(len(tokens)),
            pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=self.text_ids, img_ids=self.latent_ids, return_dict=False,
        )[0]  # fmt: skip

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        """Latents (B, N, K) unpacked to (B, C, H, W), at the scale of the decoder's data."""
        return super().vae_latents(
            self.pipeline._unpack_latents(latents, *self.size, self.pipeline.vae_scale_factor), decoder
        )


class Flux(FluxFamily):
    pipeline_class = "FluxPipeline"
    Conditioning = FluxConditioning

    def encode_text(self, prompts: Sequence[str]) -> FluxConditioning:
        return self._read(prompts)

    def placeholder(self, batch: int) -> FluxConditioning:
        return self._random_text(batch)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: FluxConditioning) -> Tensor:
        return self._run(x, sigma, conditioning.embeds, conditioning.pooled)


class FluxKontext(FluxFamily):
    """FLUX.1 with an input image: its latents follow the sample's as N more tokens, whose prediction is thrown away.

    An input image is resized to the output's size, whatever its proportions, as in Flow-GRPO, because all samples of a batch
    must have the same number of tokens. The stock pipeline does the same when it is called with an image of the output's
    size, `max_area` = height x width and `_auto_resize=False`. By default it would choose the nearest of its own sizes of
    about a million pixels, for the input image and for the output.
    """

    pipeline_class = "FluxKontextPipeline"
    Conditioning = KontextConditioning
    image_conditioned = True
    lora_targets = (*FluxFamily.lora_targets, "proj_mlp")
    published_guidance = 2.5

    @cached_by_settings
    def latent_ids(self) -> Tensor:
        """The positions of the sample's tokens, then of the input image's, which begin with 1 instead of 0."""
        ids = super().latent_ids
        image_ids = ids.clone()
        image_ids[:, 0].fill_(1)
        return torch.cat([ids, image_ids])

    @property
    def encoder_settings(self) -> dict[str, Any]:
        return {**super().encoder_settings, "size": self.size}

    def encode_text(self, prompts: Sequence[ImagePrompt]) -> KontextConditioning:
        embeds, pooled = self._read([prompt.text for prompt in prompts])
        return KontextConditioning(embeds, pooled, torch.cat([self.encode_image(prompt.images[0]) for prompt in prompts]))

    def encode_image(self, path: Path) -> Tensor:
        """The latents (1, N, K) of an image file."""
        pixels = self.pipeline.image_processor.preprocess(load_picture(path), *self.size)
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), None)
        return self.pipeline._pack_latents(latents, *latents.shape)

    def placeholder(self, batch: int) -> KontextConditioning:
        image = torch.randn(batch, *self.latent_shape, device=self.device, dtype=self.dtype)
        embeds, pooled = self._random_text(batch)
        return KontextConditioning(embeds, pooled, image)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: KontextConditioning) -> Tensor:
        embeds, pooled, image = conditioning
        v = self._run(torch.cat([x, image], dim=1), sigma, embeds, pooled)
        return v[:, : x.shape[1]].contiguous()
