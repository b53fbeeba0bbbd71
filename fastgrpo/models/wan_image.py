"""Wan from images: a video that begins with an image, or goes from one to another. Each prompt comes with its images.

How they reach the network differs between the published folders, and is read from their configurations:

    Wan 2.1 I2V      channels beside those of x: a mask of 4, 1 in the frames that are given, and the latents of a video of
                     them with grey between; and the tokens that CLIP makes of the image, before those of the text
    Wan 2.1 FLF2V    the same with two images, the first frame and the last
    Wan 2.2 I2V      the channels alone, of one image or of two
    Wan 2.2 TI2V     the image's latents in the place of x's first frame, whose tokens have timestep 0

In TI2V the first frame of x is never read, and is known from the start: c, the image's latents. `velocity` says there what
leads straight to it, v = (x - c) / sigma, of which the last step makes c, as near as the model's dtype holds v. No weight
has a part in it, so these elements add exactly 0 to log-ratios, divergences and gradients. Each of those is a mean over all
elements of a latent all the same, so that the others count (F - 1) / F of what they would alone.

An image is resized to the output's size, whatever its proportions, as the stock pipeline does.

Letters: B samples, L text tokens, E text width, (C, F, H, W) a latent of F frames, K channels of a condition, I image tokens
of width D.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.data.pictures import load_picture
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.wan import WanFamily
from fastgrpo.records import concatenate

CLIP_TOKENS = 257  # of an image, by the published encoder: 16 x 16 patches and one for all
TEXT_TOKENS = 512  # where diffusers' attention cuts the image's tokens from the text's


class WanImageConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt and its images."""

    embeds: Tensor  # (B, L, E), zero past the prompt
    condition: Tensor  # (B, K, F, H, W), mask and latents; in TI2V (B, C, 1, H, W), the first frame's latents
    image: Tensor  # (B, I, D); where the transformer reads no CLIP, I = 0


class WanImage(WanFamily):
    pipeline_class = "WanImageToVideoPipeline"
    published_as = ("WanPipeline",)  # TI2V-5B's folder, which serves both
    Conditioning = WanImageConditioning
    image_conditioned = True
    input_images = range(1, 3)
    part_dtypes = {**WanFamily.part_dtypes, "image_encoder": torch.float32}  # as diffusers' documentation runs it

    @classmethod
    def check_files(cls, path: Path, **base: Any) -> None:
        super().check_files(path, **base)
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        if index["_class_name"] != cls.pipeline_class and not index.get("expand_timesteps"):
            raise ValueError(f"model.path = {path}: holds a Wan that reads no image; take model.name wan")

    def _check_settings(self) -> None:
        super()._check_settings()
        config, latents = self.transformer.config, self.pipeline.vae.config.z_dim
        reads = latents if self.replaces_first else 2 * latents + self.pipeline.vae_scale_factor_temporal
        if config.in_channels != reads:
            raise ValueError(
                f"model.path: its transformer reads {config.in_channels} channels, and one of images would read {reads}; "
                "for videos from text alone take model.name wan"
            )
        if config.image_dim is not None and self.settings.max_text_tokens != TEXT_TOKENS:
            raise ValueError(
                f"model.max_text_tokens = {self.settings.max_text_tokens}: this transformer also reads CLIP's tokens of an "
                f"image, and diffusers tells them from text by its {TEXT_TOKENS} tokens: take {TEXT_TOKENS}"
            )
        if config.pos_embed_seq_len is not None:
            self.input_images = range(2, 3)
        elif config.image_dim is not None or self.replaces_first:
            self.input_images = range(1, 2)

    @property
    def replaces_first(self) -> bool:
        """Whether the image is the first frame of what the network reads, as in TI2V."""
        return bool(self.pipeline.config.expand_timesteps)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """With CLIP, which reads the images, where there is one."""
        encoder = self.pipeline.image_encoder
        return super().text_encoders if encoder is None else [*super().text_encoders, encoder]

    @property
    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings | {"size": self.size, "num_frames": self.num_frames}

    def encode_text(self, prompts: Sequence[ImagePrompt]) -> WanImageConditioning:
        # One by one, so that the encoding of a prompt does not depend on the others.
        return concatenate([self._read(prompt) for prompt in prompts])

    def _read(self, prompt: ImagePrompt) -> WanImageConditioning:
        if len(prompt.images) not in self.input_images:
            counts = " or ".join(map(str, self.input_images))
            raise ValueError(f"the prompt {prompt.text!r} has {len(prompt.images)} images; this model reads {counts}")
        pictures = [load_picture(path) for path in prompt.images]
        return WanImageConditioning(
            self.encode_words([prompt.text]), self._condition(pictures), self._clip_tokens(pictures)
        )  # fmt: skip

    def _condition(self, pictures: Sequence[Any]) -> Tensor:
        """`WanImageConditioning.condition` of one prompt's pictures, by the pipeline's own function."""
        prepare, nothing = self.pipeline.video_processor.preprocess, torch.empty(0)
        first, *last = (prepare(picture, *self.size).to(self.device, torch.float32) for picture in pictures)
        _, condition, *_ = self.pipeline.prepare_latents(
            first, 1, self.pipeline.vae.config.z_dim, *self.size, self.num_frames, torch.float32, self.device,
            latents=nothing, last_image=last[0] if last else None,
        )  # fmt: skip
        return condition.to(self.dtype)

    def _clip_tokens(self, pictures: Sequence[Any]) -> Tensor:
        """`WanImageConditioning.image` of one prompt's pictures, those of the last frame behind those of the first."""
        if self.transformer.config.image_dim is None:
            return torch.empty(1, 0, 0, device=self.device, dtype=self.dtype)
        tokens = self.pipeline.encode_image(list(pictures), self.device)  # (images, CLIP_TOKENS, D)
        return tokens.to(self.dtype).flatten(0, 1)[None]

    def placeholder(self, batch: int) -> WanImageConditioning:
        config, (channels, frames, *size) = self.transformer.config, self.latent_shape
        beside = (channels, 1) if self.replaces_first else (config.in_channels - channels, frames)
        tokens = config.pos_embed_seq_len or CLIP_TOKENS
        image = (tokens, config.image_dim) if config.image_dim is not None else (0, 0)
        shapes = (self.settings.max_text_tokens, config.text_dim), (*beside, *size), image
        return WanImageConditioning(*(torch.randn(batch, *shape, device=self.device, dtype=self.dtype) for shape in shapes))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: WanImageConditioning) -> Tensor:
        embeds, condition, image = conditioning
        if self.replaces_first:
            return self._velocity_after_first(x, sigma, embeds, condition)
        if self.transformer.config.pos_embed_seq_len is not None:
            image = image.unflatten(1, (2, -1)).flatten(0, 1)  # the transformer takes each image in a row of its own
        return self._run(
            torch.cat([x, condition], dim=1), self.timestep(sigma), encoder_hidden_states=embeds,
            encoder_hidden_states_image=image if image.shape[1] else None,
        )  # fmt: skip

    def _velocity_after_first(self, x: Tensor, sigma: Tensor, embeds: Tensor, first: Tensor) -> Tensor:
        """The network's velocity, and in the first frame the one to `first` (B, C, 1, H, W)."""
        patch = self.transformer.config.patch_size[-1]
        tokens = x.shape[3] * x.shape[4] // patch**2  # of a frame
        timestep = self.timestep(sigma)[:, None].repeat(1, x.shape[2] * tokens)
        timestep[:, :tokens].zero_()
        v = self._run(torch.cat([first, x[:, :, 1:]], dim=2), timestep, encoder_hidden_states=embeds)
        known = (x[:, :, :1].float() - first.float()) / sigma.view(-1, 1, 1, 1, 1)
        return torch.cat([known.to(v.dtype), v[:, :, 1:]], dim=2)
