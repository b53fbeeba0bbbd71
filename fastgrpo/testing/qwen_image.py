"""A tiny Qwen-Image and a tiny Qwen-Image-Edit."""

from collections.abc import Sequence
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from diffusers.utils import load_image
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.qwen_image import ImageProcessor
from fastgrpo.testing import Family
from fastgrpo.testing.pictures import picture
from fastgrpo.testing.tokenizers import qwen_tokenizer

SIZE = 16  # pixels on each side
BOX = (3, 4, 11, 12)  # where a picture's shape is
# A letter is a token of the tiny tokenizer, and the templates of the pipelines are long.
TEXT_TOKENS, EDIT_TOKENS = 192, 320
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make() -> QwenImagePipeline:
    return QwenImagePipeline(**parts())


def make_edit() -> QwenImageEditPipeline:
    shared = parts()
    pixels = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1 << 20)
    pipeline = QwenImageEditPipeline(**shared, processor=ImageProcessor(pixels, shared["tokenizer"]))
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as in a downloaded folder
    return pipeline


def parts() -> dict:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(VISION)
    return {
        "transformer": QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ),
        # Its latents are two times smaller on each side.
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.5, 0.8, 1.0, 1.2],
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=0.9,
            base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02,
        ),
        "text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer,
    }  # fmt: skip


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "window_size": 16,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )).eval()  # fmt: skip


def padded(pipeline: QwenImagePipeline, prompts: Sequence[str], length: int, **image: object) -> tuple[Tensor, Tensor]:
    """The pipeline's own embeddings, padded to the model's length, as another length would be rounded differently."""
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=length, **image)
    mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
    missing = length - embeds.shape[1]
    return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing))


def call(
    pipeline: QwenImagePipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float,
    height: int = SIZE, width: int = SIZE,
) -> Tensor:  # fmt: skip
    embeds, mask = padded(pipeline, prompts, TEXT_TOKENS)
    negative, negative_mask = padded(pipeline, [" "] * len(prompts), TEXT_TOKENS)
    return pipeline(
        prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask, num_inference_steps=num_steps, true_cfg_scale=guidance_scale,
        latents=latents, height=height, width=width, output_type="pt",
    ).images  # fmt: skip


def call_edit(
    pipeline: QwenImageEditPipeline, prompts: Sequence[ImagePrompt], latents: Tensor, num_steps: int, guidance_scale: float
) -> Tensor:
    """The stock pipeline, kept from enlarging the images to a megapixel."""
    images, texts = [load_image(str(p.images[0])) for p in prompts], [p.text for p in prompts]
    embeds, mask = padded(pipeline, texts, EDIT_TOKENS, image=images)
    negative, negative_mask = padded(pipeline, [" "] * len(prompts), EDIT_TOKENS, image=images)
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (SIZE, SIZE, None)):
        return pipeline(
            image=images, prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
            negative_prompt_embeds_mask=negative_mask, num_inference_steps=num_steps, true_cfg_scale=guidance_scale,
            latents=latents, height=SIZE, width=SIZE, output_type="pt",
        ).images  # fmt: skip


SETTINGS = {"height": SIZE, "width": SIZE}
FAMILY = Family(make=make, call=call, settings=SETTINGS | {"max_text_tokens": TEXT_TOKENS})
EDIT = Family(
    make=make_edit,
    call=call_edit,
    settings=SETTINGS | {"max_text_tokens": EDIT_TOKENS},
    prompts=(
        ImagePrompt("make it blue", (picture("disc", (SIZE, SIZE), "white", "red", BOX),)),
        ImagePrompt("add a green circle", (picture("square", (SIZE, SIZE), "navy", "yellow", BOX, "rectangle"),)),
    ),
)
