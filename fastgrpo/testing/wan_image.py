"""Tiny Wans from images, one of each published kind: nine frames of 16 by 16 pixels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.utils import load_image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.testing import Family
from fastgrpo.testing.pictures import picture
from fastgrpo.testing.tokenizers import t5_tokenizer
from fastgrpo.testing.wan import BOUNDARY, FRAMES, SIDE, tiny_vae, umt5_encoder

TEXT_TOKENS = 512  # the attention of Wan with CLIP knows no other number
CLIP_SIDE, CLIP_WIDTH, CLIP_TOKENS = 8, 24, 5  # two by two patches and one token for all
CLIP = {"image_dim": CLIP_WIDTH, "added_kv_proj_dim": 48}
BESIDE = {"in_channels": 12}  # 4 of x, 4 of a mask, 4 of the images' latents
# What the transformer of each published kind reads.
KINDS: dict[str, dict[str, Any]] = {
    "i2v": CLIP | BESIDE,
    "flf2v": CLIP | BESIDE | {"pos_embed_seq_len": 2 * CLIP_TOKENS},
    "i2v_without_clip": BESIDE,
    "ti2v": {"in_channels": 4},
}


def make(kind: str = "i2v") -> WanImageToVideoPipeline:
    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    transformer = tiny_transformer(kind)
    if kind == "flf2v":
        torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)  # it begins as zeros
    clip = "image_dim" in KINDS[kind]
    return WanImageToVideoPipeline(
        transformer=transformer, vae=tiny_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=umt5_encoder(len(tokenizer)), tokenizer=tokenizer, expand_timesteps=kind == "ti2v",
        image_encoder=clip_vision() if clip else None, image_processor=clip_processor() if clip else None,
    )  # fmt: skip


def tiny_transformer(kind: str) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2,
        rope_max_seq_len=32, **KINDS[kind],
    )  # fmt: skip


def make_experts() -> WanImageToVideoPipeline:
    """As Wan2.2-I2V-A14B."""
    pipeline = make("i2v_without_clip")
    pipeline.register_modules(transformer_2=tiny_transformer("i2v_without_clip"))
    pipeline.register_to_config(boundary_ratio=BOUNDARY)
    return pipeline


def clip_vision() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=CLIP_SIDE,
        patch_size=CLIP_SIDE // 2,
    )).eval()  # fmt: skip


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIDE}, crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE}
    )  # fmt: skip


def call(
    pipeline: WanImageToVideoPipeline, prompts: Sequence[ImagePrompt], latents: Tensor, num_steps: int,
    guidance_scale: float, height: int = SIDE, width: int = SIDE,
) -> Tensor:  # fmt: skip
    """One video after the other: the stock pipeline takes one image for all of its prompts."""
    videos = []
    for prompt, x in zip(prompts, latents.split(1), strict=True):
        first, *last = (load_image(str(path)) for path in prompt.images)
        videos.append(pipeline(
            first, prompt.text, last_image=last[0] if last else None, num_inference_steps=num_steps,
            guidance_scale=guidance_scale, latents=x, max_sequence_length=TEXT_TOKENS, height=height, width=width,
            num_frames=FRAMES, output_type="pt",
        ).frames)  # fmt: skip
    return torch.cat(videos)


WIDE = picture("wan_wide", (40, 24), "white", "blue", box=(4, 2, 20, 21))
TALL = picture("wan_tall", (20, 45), "darkgreen", "yellow", box=(2, 2, 17, 30), shape="rectangle")

FAMILY = Family(
    make=make, call=call,
    settings={"max_text_tokens": TEXT_TOKENS, "height": SIDE, "width": SIDE, "num_frames": FRAMES},
    prompts=(ImagePrompt("the circle turns red", (WIDE,)), ImagePrompt("a cat walks into the picture", (TALL,))),
)  # fmt: skip
EXPERTS = replace(FAMILY, make=make_experts, model="wan_image")
