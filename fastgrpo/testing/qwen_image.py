"""A tiny Qwen-Image, a tiny Qwen-Image-Edit and a tiny Qwen-Image-Edit-Plus."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.utils import load_image
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.qwen_image_edit import ImageProcessor
from fastgrpo.testing import Family
from fastgrpo.testing.pictures import picture
from fastgrpo.testing.tokenizers import qwen_tokenizer

SIZE = 16  # pixels on each side
INPUT = 32  # and of an input image: no side of one is shorter
BOX = (3, 4, 11, 12)  # where a picture's shape is
# A letter is a token of the tiny tokenizer, and the templates of the pipelines are long.
TEXT_TOKENS, EDIT_TOKENS, EDIT_PLUS_TOKENS = 192, 320, 400
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make() -> QwenImagePipeline:
    return QwenImagePipeline(**parts())


def make_edit() -> QwenImageEditPipeline:
    return _editing(QwenImageEditPipeline, parts())


def make_edit_plus() -> QwenImageEditPlusPipeline:
    """As published in 2511: input images are modulated as at a noise level of 0."""
    return _editing(QwenImageEditPlusPipeline, parts(zero_cond_t=True))


def _editing(kind: Any, shared: dict) -> Any:
    pixels = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=1 << 20)
    pipeline = kind(**shared, processor=ImageProcessor(pixels, shared["tokenizer"]))
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as in a downloaded folder
    return pipeline


def parts(**transformer: Any) -> dict:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(VISION)
    return {
        "transformer": QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **transformer,
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
    (prompt,) = prompts
    with smaller_inputs(INPUT):
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, 1.0)
        image = pipeline.image_processor.resize(load_image(str(prompt.images[0])), height, width)
        return _call_with_images(pipeline, prompt.text, image, EDIT_TOKENS, latents, num_steps, guidance_scale)


def call_edit_plus(
    pipeline: QwenImageEditPlusPipeline,
    prompts: Sequence[ImagePrompt],
    latents: Tensor,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    (prompt,) = prompts
    with smaller_inputs(INPUT):
        images = [pipeline.image_processor.resize(load_image(str(image)), INPUT, INPUT) for image in prompt.images]
        return _call_with_images(pipeline, prompt.text, images, EDIT_PLUS_TOKENS, latents, num_steps, guidance_scale)


def _call_with_images(
    pipeline: Any, text: str, image: Any, tokens: int, latents: Tensor, num_steps: int, guidance_scale: float
) -> Tensor:
    embeds, mask = padded(pipeline, [text], tokens, image=image)
    negative, negative_mask = padded(pipeline, [" "], tokens, image=image)
    return pipeline(
        image=image, prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask, num_inference_steps=num_steps, true_cfg_scale=guidance_scale,
        latents=latents, height=SIZE, width=SIZE, output_type="pt",
    ).images  # fmt: skip


@contextmanager
def smaller_inputs(side: int) -> Iterator[None]:
    """Inside, the stock pipelines scale input images to the area of this square instead of a megapixel."""
    dimensions, plus = pipeline_qwenimage_edit.calculate_dimensions, pipeline_qwenimage_edit_plus
    with (
        patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: dimensions(side * side, ratio)),
        patch.object(plus, "VAE_IMAGE_SIZE", side * side),
        patch.object(plus, "CONDITION_IMAGE_SIZE", side * side),
    ):
        yield


SETTINGS = {"height": SIZE, "width": SIZE}
DISC = picture("disc", (SIZE, SIZE), "white", "red", BOX)
SQUARE = picture("square", (SIZE, SIZE), "navy", "yellow", BOX, "rectangle")
FAMILY = Family(make=make, call=call, settings=SETTINGS | {"max_text_tokens": TEXT_TOKENS})
EDIT = Family(
    make=make_edit,
    call=call_edit,
    settings=SETTINGS | {"max_text_tokens": EDIT_TOKENS, "input_size": INPUT},
    prompts=(ImagePrompt("make it blue", (DISC,)), ImagePrompt("add a green circle", (SQUARE,))),
)
EDIT_PLUS = Family(
    make=make_edit_plus,
    call=call_edit_plus,
    settings=SETTINGS | {"max_text_tokens": EDIT_PLUS_TOKENS, "input_size": INPUT},
    prompts=(ImagePrompt("put one into the other", (DISC, SQUARE)), ImagePrompt("make both green", (SQUARE, DISC))),
)
