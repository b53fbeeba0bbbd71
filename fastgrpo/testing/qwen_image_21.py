"""A tiny Qwen-Image-2.1."""

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from fastgrpo.models.qwen_image_21 import Processor
from fastgrpo.testing import Family
from fastgrpo.testing.qwen_image import VISION
from fastgrpo.testing.tokenizers import qwen_tokenizer

SIZE = 64  # pixels on each side, of which 16 are a token's
TEXT_TOKENS = 128  # a letter is a token of the tiny tokenizer
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def make() -> QwenImage21Pipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(VISION)
    pixels = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1 << 20)
    pipeline = QwenImage21Pipeline(
        transformer=QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.5, 0.8, 1.0, 1.2],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=0.9,
            base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02,
        ),
        text_encoder=text_encoder(len(tokenizer), *tokenizer.convert_tokens_to_ids(list(VISION))),
        processor=Processor(pixels, tokenizer, chat_template=CHAT),
    )  # fmt: skip
    pipeline.register_to_config(processor=("transformers", "Qwen3VLProcessor"))  # as in a downloaded folder
    return pipeline


def text_encoder(words: int, start: int, end: int, image: int, video: int) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config={
            "vocab_size": words, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
            "deepstack_visual_indexes": [], "num_position_embeddings": 64,
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )).eval()  # fmt: skip


def call(
    pipeline: QwenImage21Pipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float
) -> Tensor:
    """The stock pipeline on one prompt as it is, without padding, and the image on white."""
    (prompt,) = prompts
    images = pipeline(
        prompt, negative_prompt=" ", num_inference_steps=num_steps, true_cfg_scale=guidance_scale, latents=latents,
        height=SIZE, width=SIZE, output_type="pt",
    ).images  # fmt: skip
    colours, opacity = images[:, :3], images[:, 3:]
    return colours * opacity + 1 - opacity


FAMILY = Family(
    make=make,
    call=call,
    settings={"height": SIZE, "width": SIZE, "max_text_tokens": TEXT_TOKENS},
    tolerance=2e-6,  # the stock pipeline pads no prompt and caches the text's keys and values
)
