"""A tiny FLUX.2 dev and a tiny klein. This dev has a tokenizer, the published one a processor of texts and images."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3ForCausalLM,
)

from fastgrpo.testing import Family
from fastgrpo.testing.tokenizers import qwen_tokenizer
from fastgrpo.testing.z_image import qwen3

TEXT_TOKENS = 64
SIDE = 16  # pixels
GUIDANCE = 4.0
WIDTH, LAYERS = 16, 31  # the text encoders are deep, because layer 30 is read, and therefore narrow

# It leaves out the system's turn, whose two hundred letters would all be tokens of the tiny tokenizer.
USER = (
    "{% for message in messages if message['role'] == 'user' %}<|im_start|>"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)


def make_dev() -> Flux2Pipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(special=("[IMG]",))
    tokenizer.chat_template = USER
    return Flux2Pipeline(**common(guidance_embeds=True), text_encoder=mistral3(len(tokenizer)), tokenizer=tokenizer)


def make_klein() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = qwen3(Qwen3ForCausalLM, len(tokenizer), layers=LAYERS, width=WIDTH)
    return Flux2KleinPipeline(**common(guidance_embeds=False), text_encoder=encoder, tokenizer=tokenizer)


def common(guidance_embeds: bool) -> dict[str, Any]:
    """The parts that both pipelines have."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer(guidance_embeds), "vae": vae(), "scheduler": scheduler}


def transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    made = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    # With torch's initial weights the gates let hardly anything through, and the last layer hardly changes the image.
    for gates in (made.double_stream_modulation_img, made.double_stream_modulation_txt, made.single_stream_modulation):
        gates.linear.weight.data.mul_(8)
    made.proj_out.weight.data.mul_(4)
    return made


def vae() -> AutoencoderKLFlux2:
    """Its latents are two times smaller on each side. Norms have one group: more would hide most of a latent's colour."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=1, layers_per_block=1,
    ).eval()  # fmt: skip
    made.bn.running_mean.normal_(std=0.5)  # the initial 0 and 1 would be no normalisation
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def mistral3(vocabulary: int) -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        head_dim=8,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=vocabulary - 1)
    ).eval()


def call(
    pipeline: Flux2Pipeline | Flux2KleinPipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance: float
) -> Tensor:
    B, _, C = latents.shape
    side = SIDE // 4  # tokens
    return pipeline(
        prompt=list(prompts), num_inference_steps=num_steps, guidance_scale=guidance, max_sequence_length=TEXT_TOKENS,
        latents=latents.transpose(1, 2).reshape(B, C, side, side), height=SIDE, width=SIDE, output_type="pt",
    ).images  # fmt: skip


def call_dev(
    pipeline: Flux2Pipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float
) -> Tensor:
    """`call` at the distilled guidance, whatever guidance_scale is."""
    return call(pipeline, prompts, latents, num_steps, GUIDANCE)


SETTINGS = {"max_text_tokens": TEXT_TOKENS, "height": SIDE, "width": SIDE}
DEV = Family(make=make_dev, call=call_dev, settings={**SETTINGS, "distilled_guidance": GUIDANCE}, guidance=(1.0,))
KLEIN = Family(make=make_klein, call=call, settings=SETTINGS)
