"""A tiny Wan 2.1, and one of two experts as Wan2.2-A14B: nine frames of 16 by 16 pixels."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from fastgrpo.testing import Family
from fastgrpo.testing.tokenizers import t5_tokenizer

TEXT_TOKENS, SIDE, FRAMES = 24, 16, 9
# Of two experts. Between the first two of three or four steps, so that few steps take both; published are 0.875 and 0.9.
BOUNDARY = 0.95


def make() -> WanPipeline:
    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    return WanPipeline(
        transformer=tiny_transformer(),
        vae=tiny_vae(),
        # The published folders hold UniPC instead, whose steps are not the flow's Euler steps.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=umt5_encoder(len(tokenizer)), tokenizer=tokenizer,
    )  # fmt: skip


def make_experts() -> WanPipeline:
    pipeline = make()
    pipeline.register_modules(transformer_2=tiny_transformer())
    pipeline.register_to_config(boundary_ratio=BOUNDARY)
    return pipeline


def tiny_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def tiny_vae() -> AutoencoderKLWan:
    """An autoencoder four times smaller on each side, with one latent frame for the first frame, then for each four."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[4.0, 6.0, 3.0, 5.0], scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()  # fmt: skip


def umt5_encoder(vocabulary: int, width: int = 32) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip


def call(
    pipeline: WanPipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float,
    *, height: int = SIDE, width: int = SIDE, num_frames: int = FRAMES,
) -> Tensor:  # fmt: skip
    """Videos (B, T, 3, H, W) of the stock pipeline."""
    return pipeline(
        list(prompts), num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=latents,
        max_sequence_length=TEXT_TOKENS, height=height, width=width, num_frames=num_frames, output_type="pt",
    ).frames  # fmt: skip


SETTINGS = {"max_text_tokens": TEXT_TOKENS, "height": SIDE, "width": SIDE, "num_frames": FRAMES}
FAMILY = Family(make=make, call=call, settings=SETTINGS)
EXPERTS = Family(make=make_experts, call=call, model="wan", settings=SETTINGS)
