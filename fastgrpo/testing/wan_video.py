"""A tiny Wan from a video: five frames of 16 by 16 pixels, which come as a file each or as one animation."""

import math
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel, WanVideoToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_video2video
from PIL import Image
from torch import Tensor

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.testing import Family
from fastgrpo.testing.pictures import animation, picture
from fastgrpo.testing.tokenizers import t5_tokenizer
from fastgrpo.testing.wan import SIDE, TEXT_TOKENS, tiny_vae, umt5_encoder

FRAMES, STRENGTH = 5, 0.8  # the strength is the stock pipeline's own


def make() -> WanVideoToVideoPipeline:
    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return WanVideoToVideoPipeline(
        transformer=transformer, vae=tiny_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=umt5_encoder(len(tokenizer)), tokenizer=tokenizer,
    )  # fmt: skip


def frames(images: Sequence[Path]) -> list[Image.Image]:
    """The frames of a prompt's video, by Pillow alone."""
    if len(images) > 1:
        return [Image.open(image).convert("RGB") for image in images]
    shown = []
    with Image.open(images[0]) as moving:
        for number in range(FRAMES):
            moving.seek(number)
            shown.append(moving.convert("RGB"))
    return shown


def call(
    pipeline: WanVideoToVideoPipeline, prompts: Sequence[ImagePrompt], latents: Tensor, num_steps: int,
    guidance_scale: float, *, height: int = SIDE, width: int = SIDE, strength: float = STRENGTH,
) -> Tensor:  # fmt: skip
    """Videos (B, T, 3, H, W) of the stock pipeline with these latents as the noise that it adds to each prompt's video."""
    videos = []
    for prompt, noise in zip(prompts, latents.split(1), strict=True):
        with patch.object(pipeline_wan_video2video, "randn_tensor", lambda *args, noise=noise, **options: noise):
            videos.append(pipeline(
                frames(prompt.images), prompt.text, num_inference_steps=math.ceil(num_steps / strength), strength=strength,
                guidance_scale=guidance_scale, max_sequence_length=TEXT_TOKENS, height=height, width=width, output_type="pt",
            ).frames)  # fmt: skip
    return torch.cat(videos)


FILES = tuple(picture(f"wan_video_{i}", (24, 16), "white", "blue", (2 + 3 * i, 3, 9 + 3 * i, 12)) for i in range(FRAMES))
ANIMATION = animation("wan_video", [
    picture(f"wan_animation_{i}", (20, 20), "darkgreen", "yellow", (2, 1 + 2 * i, 15, 8 + 2 * i), "rectangle")
    for i in range(FRAMES)
])  # fmt: skip

FAMILY = Family(
    make=make, call=call,
    settings={"max_text_tokens": TEXT_TOKENS, "height": SIDE, "width": SIDE, "num_frames": FRAMES},
    prompts=(ImagePrompt("the circle turns red", FILES), ImagePrompt("a cat walks on grass", (ANIMATION,))),
)  # fmt: skip
