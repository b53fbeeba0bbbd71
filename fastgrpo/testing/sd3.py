"""A tiny Stable Diffusion 3."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fastgrpo.testing import Family
from fastgrpo.testing.tokenizers import clip_tokenizer, t5_tokenizer

T5_TOKENS = 24
SIZE = 16  # pixels


def make() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        vae=tiny_vae(channels=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_encoder(len(clip)), tokenizer=clip, text_encoder_2=clip_encoder(len(clip)), tokenizer_2=clip,
        text_encoder_3=t5_encoder(len(t5)), tokenizer_3=t5,
    )  # fmt: skip


def tiny_vae(channels: int, **options) -> AutoencoderKL:
    """An autoencoder whose latents are two times smaller on each side."""
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5, shift_factor=0.06, **options,
    ).eval()  # fmt: skip


def clip_encoder(vocabulary: int, width: int = 32) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )).eval()  # fmt: skip


def t5_encoder(vocabulary: int, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip


def call(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float,
    height: int = SIZE, width: int = SIZE,
) -> Tensor:  # fmt: skip
    return pipeline(
        list(prompts), num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=latents,
        max_sequence_length=T5_TOKENS, height=height, width=width, output_type="pt",
    ).images  # fmt: skip


FAMILY = Family(make=make, call=call, settings={"max_text_tokens": T5_TOKENS}, guided_together=True)
