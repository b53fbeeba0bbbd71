"""Wan from a video: the video that a prompt makes of another one, after diffusers' WanVideoToVideoPipeline.

    x = (1 - s) data + s noise          data the input video's latents, s the first noise level of the steps

Only the start is of the video; the network reads what Wan's from text reads. `model.strength` is the stock pipeline's: of a
schedule of N steps it takes the last int(N strength). Here num_steps are the steps that are taken, so that windows count
them, and N is the least that leaves so many: 25 for 20 steps at 0.8, which stock is called with num_inference_steps=25.

A video is a list of `num_frames` files, one a frame, or one file of an animation (GIF, WebP, APNG) of so many frames,
whatever their durations. Programs that write one leave out a frame that is the same as the one before. Each frame is
resized to the output's size, whatever its proportions, as the stock pipeline does.

Letters: B samples, L text tokens, E text width, (C, F, H, W) a latent of F frames.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.data.pictures import load_picture, load_pictures, picture_count
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.wan import WanFamily
from fastgrpo.records import concatenate

STRENGTH = 0.8  # the stock pipeline's default


class WanVideoConditioning(NamedTuple):
    """What the transformer reads of a prompt, and what a rollout starts from."""

    embeds: Tensor  # (B, L, E), zero past the prompt
    video: Tensor  # (B, C, F, H, W) float32, the input video's latents


class WanVideo(WanFamily):
    pipeline_class = "WanVideoToVideoPipeline"
    published_as = ("WanPipeline",)  # the folders of Wan2.1-T2V serve both
    Conditioning = WanVideoConditioning
    image_conditioned = True
    input_images = range(1, sys.maxsize)  # how many they are follows from the size in force, see `_check_frames`
    takes = WanFamily.takes | {"strength"}

    @classmethod
    def check_files(cls, path: Path, **base: Any) -> None:
        super().check_files(path, **base)
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        two, tokenwise = index.get("transformer_2", [None])[0] is not None, index.get("expand_timesteps")
        if two or tokenwise:
            holds = "two transformers" if two else "a transformer with a timestep a token (TI2V)"
            raise ValueError(
                f"model.path = {path}: holds {holds}, and {cls.pipeline_class} runs one that has a timestep a video; take "
                "Wan2.1-T2V-1.3B or Wan2.1-T2V-14B"
            )

    def _check_settings(self) -> None:
        super()._check_settings()
        if not 0 < self.strength <= 1:
            raise ValueError(f"model.strength = {self.strength}: is a share of the noise levels, above 0 and at most 1")

    @property
    def strength(self) -> float:
        """The share of the stock pipeline's steps that is taken."""
        return STRENGTH if self.settings.strength is None else self.settings.strength

    @property
    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings | {"size": self.size, "num_frames": self.num_frames}

    def sigmas(self, num_steps: int) -> Tensor:
        """The last num_steps steps of the schedule of which they are the strength's share."""
        longer = itertools.count(int(num_steps / self.strength))
        of = next(number for number in longer if int(number * self.strength) >= num_steps)  # as stock rounds it
        return super().sigmas(of)[-num_steps - 1 :]

    def start(self, noise: Tensor, sigma: Tensor, conditioning: WanVideoConditioning) -> Tensor:
        """The input video with noise, (B, C, F, H, W) float32, as the scheduler's add_noise makes it."""
        level = sigma.view(-1, 1, 1, 1, 1)
        return (1 - level) * conditioning.video + level * noise

    def read_in_part(self, prompts: Sequence[ImagePrompt]) -> dict[Any, str]:
        """Also refuses a video of another number of frames: ValueError."""
        for images in dict.fromkeys(prompt.images for prompt in prompts):
            self._check_frames(images)
        return super().read_in_part(prompts)

    def _check_frames(self, images: Sequence[Path]) -> None:
        found = picture_count(images[0]) if len(images) == 1 else len(images)
        if found != self.num_frames:
            has = "has" if len(images) == 1 else "is the first of"
            raise ValueError(
                f"{images[0]}: {has} {found} frames, and a video here has {self.num_frames} (model.num_frames, or that of "
                "rollout.sizes or evaluation); give a list of as many files, or an animation of so many frames, of which "
                "writers leave out those that are the same as the one before"
            )

    def encode_text(self, prompts: Sequence[ImagePrompt]) -> WanVideoConditioning:
        # One by one, so that the encoding of a prompt does not depend on the others.
        return concatenate([
            WanVideoConditioning(self.encode_words([prompt.text]), self._video_latents(prompt.images)) for prompt in prompts
        ])  # fmt: skip

    def _video_latents(self, images: Sequence[Path]) -> Tensor:
        """The latents (1, C, F, H, W) float32 of a video's files."""
        self._check_frames(images)
        frames = load_pictures(images[0]) if len(images) == 1 else [load_picture(image) for image in images]
        vae = self.pipeline.vae
        pixels = self.pipeline.video_processor.preprocess_video(frames, *self.size)  # (1, 3, num_frames, height, width)
        return self.from_vae(vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float())

    def placeholder(self, batch: int) -> WanVideoConditioning:
        text = batch, self.settings.max_text_tokens, self.transformer.config.text_dim
        return WanVideoConditioning(
            torch.randn(text, device=self.device, dtype=self.dtype),
            torch.randn(batch, *self.latent_shape, device=self.device),
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: WanVideoConditioning) -> Tensor:
        return self._run(x, self.timestep(sigma), encoder_hidden_states=conditioning.embeds)
