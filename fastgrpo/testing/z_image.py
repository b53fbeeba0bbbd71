"""A tiny Z-Image."""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from fastgrpo.testing import Family
from fastgrpo.testing.sd3 import tiny_vae
from fastgrpo.testing.tokenizers import qwen_tokenizer

TEXT_TOKENS = 64
SIDE = 16  # pixels


def make() -> ZImagePipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # zeros would be no token at all
    # With torch's initial weights the last layer hardly changes the image, whatever the layers before it learn.
    transformer.all_final_layer["2-1"].linear.weight.data.mul_(8)
    return ZImagePipeline(
        transformer=transformer, vae=tiny_vae(channels=4), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen3(Qwen3Model, len(tokenizer), layers=3), tokenizer=tokenizer,
    )  # fmt: skip


def qwen3(kind: type, vocabulary: int, layers: int, width: int = 32) -> torch.nn.Module:
    """A tiny Qwen3. kind: Qwen3Model or Qwen3ForCausalLM."""
    return kind(Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )).eval()  # fmt: skip


def call(pipeline: ZImagePipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float) -> Tensor:
    return pipeline(
        list(prompts), num_inference_steps=num_steps, guidance_scale=guidance_scale - 1, latents=latents,
        max_sequence_length=TEXT_TOKENS, height=SIDE, width=SIDE, output_type="pt",
    ).images  # fmt: skip


FAMILY = Family(
    make=make, call=call, settings={"max_text_tokens": TEXT_TOKENS, "height": SIDE, "width": SIDE}, guided_together=True
)
