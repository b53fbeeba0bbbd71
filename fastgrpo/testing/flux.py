"""A tiny FLUX.1 and a tiny FLUX.1 Kontext."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import load_image
from torch import Tensor
from transformers import CLIPTextModel

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.testing import Family
from fastgrpo.testing.pictures import picture
from fastgrpo.testing.sd3 import clip_encoder, t5_encoder, tiny_vae
from fastgrpo.testing.tokenizers import clip_tokenizer, t5_tokenizer

T5_TOKENS = 24
SIZE = 16  # pixels
GUIDANCE = 3.5
SETTINGS = {"max_text_tokens": T5_TOKENS, "height": SIZE, "width": SIZE, "distilled_guidance": GUIDANCE}


def make(pipeline: type = FluxPipeline, guidance_embeds: bool = True) -> FluxPipeline | FluxKontextPipeline:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return pipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
        ),
        vae=tiny_vae(channels=4),
        # It expects a hundred times fewer tokens than the published one, so that the shift differs between tiny sizes too.
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=40
        ),
        text_encoder=CLIPTextModel(clip_encoder(len(clip)).config).eval(), tokenizer=clip,
        text_encoder_2=t5_encoder(len(t5)), tokenizer_2=t5,
    )  # fmt: skip


def call(
    pipeline: FluxPipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float,
    height: int = SIZE, width: int = SIZE, **options,
) -> Tensor:  # fmt: skip
    return pipeline(
        prompt=list(prompts), negative_prompt=[""] * len(prompts), true_cfg_scale=guidance_scale, guidance_scale=GUIDANCE,
        num_inference_steps=num_steps, latents=latents, max_sequence_length=T5_TOKENS, height=height, width=width,
        output_type="pt", **options,
    ).images  # fmt: skip


def call_kontext(
    pipeline: FluxKontextPipeline, prompts: Sequence[ImagePrompt], latents: Tensor, num_steps: int, guidance_scale: float,
    height: int = SIZE, width: int = SIZE,
) -> Tensor:  # fmt: skip
    images = [pipeline.image_processor.resize(load_image(str(prompt.images[0])), height, width) for prompt in prompts]
    return call(
        pipeline, [prompt.text for prompt in prompts], latents, num_steps, guidance_scale, height, width,
        image=images, max_area=height * width, _auto_resize=False,
    )  # fmt: skip


def disc(name: str, size: tuple[int, int], background: str, colour: str) -> Path:
    """The file of a picture (width, height) with a disc in its left half."""
    return picture(name, size, background, colour, box=(2, 1, size[0] // 2, size[1] - 3))


FAMILY = Family(make=make, call=call, settings=SETTINGS)

KONTEXT = Family(
    make=functools.partial(make, FluxKontextPipeline), call=call_kontext, settings=SETTINGS,
    prompts=(
        ImagePrompt("make the circle red", (disc("wide", (23, 15), "white", "blue"),)),
        ImagePrompt("add two squares", (disc("tall", (13, 29), "darkgreen", "yellow"),)),
    ),
)  # fmt: skip
