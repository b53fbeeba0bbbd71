"""Qwen-Image-Edit, and Qwen-Image-Edit-Plus, published as 2509 and 2511, which reads one to three input images.

The text encoder sees the input images, and their latents follow the noisy ones. An image keeps its proportions and is scaled
to an area, each side then rounded to a multiple of 32:

                         latents                text encoder
    Qwen-Image-Edit      input_size squared     the same picture
    Plus                 input_size squared     the same picture, or 384 x 384 where that is smaller

`model.input_size` is 1024 if it is left out, as in the stock pipelines, whatever the size of the output: less costs fewer
tokens, and the model then reads another picture than the stock pipelines will show it. "output" scales every image to the
size of the output, whatever its proportions.

Samples of a batch have the same number of tokens. So all prompts of a run have as many input images, and the first ones, the
second and the third ones each come to one size; others are refused.

`max_text_tokens` counts the tokens of the images in the text encoder too, of 28 x 28 pixels each: 1369 for 1024 x 1024 and
196 for 384 x 384. Left out, it holds 512 tokens of text and as many square images as the model reads. A longer prompt is
refused, because the stock pipelines cut none here.

Letters: as in `fastgrpo.models.qwen_image`; an image is h rows of w tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL.Image import Image
from torch import Tensor
from transformers import Qwen2VLProcessor

from fastgrpo.data.pictures import load_picture, picture_size
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.qwen_image import DoubleStream
from fastgrpo.models.settings import cached_by_settings
from fastgrpo.records import concatenate

PUBLISHED_SIDE = 1024  # of the square whose area an input image has
SMALLEST_SIDE = 32  # both sides are multiples of it
PUBLISHED_TOKEN = 28  # side in pixels of the square that is one token of the text encoder


class QwenEditConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt and of the image to edit."""

    embeds: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool, False for padding
    image: Tensor  # (B, h, w, C) latents


class QwenEditPlusConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt and of its input images."""

    embeds: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool, False for padding
    image: Tensor  # (B, h, w, C) latents
    second: Tensor  # (B, h, w, C); where there is none h = w = 0
    third: Tensor  # (B, h, w, C); where there is none h = w = 0


class Sizes(NamedTuple):
    """Heights and widths in pixels at which one input image is read."""

    latents: tuple[int, int]
    shown: tuple[int, int]  # to the text encoder


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor of texts and images without its part for videos, which cannot be loaded without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenImageEdit(DoubleStream):
    pipeline_class = "QwenImageEditPipeline"
    Conditioning: ClassVar[Any] = QwenEditConditioning
    image_conditioned = True
    takes = frozenset({"input_size"})
    cuts_are_known = True  # there are none
    longest_text = 3072  # the table of rotary positions has 4096 rows, and the first are the images'
    shown_area: ClassVar[float] = math.inf  # pixels of an image that the text encoder sees at most

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        return {"processor": ImageProcessor.from_pretrained(path / "processor", local_files_only=True)}

    def _check_settings(self) -> None:
        super()._check_settings()
        side = self.settings.input_size
        if isinstance(side, int) and side < SMALLEST_SIDE:
            raise ValueError(f"model.input_size = {side}: must be at least {SMALLEST_SIDE}, or 'output'")

    @property
    def encoder_settings(self) -> dict[str, Any]:
        side = self.settings.input_size
        return super().encoder_settings | {"input_size": self.size if side == "output" else side or PUBLISHED_SIDE}

    @cached_by_settings
    def _first(self) -> list[tuple[ImagePrompt, list[Sizes]]]:
        """The prompt that was looked at first, and the sizes of its images, which all others share; empty before."""
        return []

    @property
    def default_text_tokens(self) -> int:
        """The stock pipeline's for the text, and those of the most images that a prompt may have, as squares."""
        images = self.input_images[-1] * self._image_tokens(self._sizes(1, 1))
        return min(self.stock_text_tokens + images, self.longest_text)

    def _image_tokens(self, size: Sizes) -> int:
        """The tokens of one input image in the text encoder."""
        if self.pipeline.processor is None:  # of a model with random weights
            return math.prod(round(side / PUBLISHED_TOKEN) for side in size.shown)
        processor = self.pipeline.processor.image_processor
        return processor.get_number_of_image_patches(*size.shown) // processor.merge_size**2

    def _sizes(self, width: int, height: int) -> Sizes:
        """At which an image of so many pixels is read."""
        side = self.settings.input_size
        if side == "output":
            latents, area, ratio = self.size, math.prod(self.size), self.size[1] / self.size[0]
        else:
            area, ratio = (side or PUBLISHED_SIDE) ** 2, width / height
            latents = scaled(area, ratio)
        return Sizes(latents, latents if area <= self.shown_area else scaled(self.shown_area, ratio))

    def _checked_sizes(self, prompt: ImagePrompt, sizes: Sequence[tuple[int, int]]) -> list[Sizes]:
        """At which a prompt's images of these widths and heights are read. ValueError: those of other prompts differ."""
        found = [self._sizes(*size) for size in sizes]
        if not self._first:
            self._first.append((prompt, found))
        first, shared = self._first[0]
        if found != shared:
            images, others = (", ".join(map(str, one.images)) for one in (prompt, first))
            raise ValueError(
                f"{images}: read at {_in_words(found)}, and {others} at {_in_words(shared)}; all prompts of a run "
                "have as many input images, of the same sizes in the same order: crop them to the same proportions, or set "
                "model.input_size: output, which stretches each to the size of the output"
            )
        return found

    def _written(self, text: str, images: int) -> str:
        """The text that stands in the template."""
        return text or " "

    def read_in_part(self, prompts: Sequence[ImagePrompt]) -> dict[Any, str]:
        """None: a prompt that is longer with its images is refused."""
        if not self.text_encoders:
            return {}
        sizes = [self._checked_sizes(prompt, [picture_size(one) for one in prompt.images]) for prompt in prompts][0]
        tokens = sum(map(self._image_tokens, sizes))
        for text in dict.fromkeys(prompt.text for prompt in prompts):
            reading = self.reading(self._written(text, len(sizes)))
            # The template has one token in the place of each image's.
            found = len(reading.tokenizer(reading.text).input_ids) - len(sizes) + tokens
            if found > reading.room:
                self._refuse(text, found - self.pipeline.prompt_template_encode_start_idx)
        return {}

    def encode_text(self, prompts: Sequence[ImagePrompt]) -> Any:
        return concatenate([self._read_all(prompt) for prompt in prompts])

    def _read_all(self, prompt: ImagePrompt) -> Any:
        pictures = [load_picture(image) for image in prompt.images]
        sizes = self._checked_sizes(prompt, [picture.size for picture in pictures])
        resize = self.pipeline.image_processor.resize
        shown = [resize(picture, *size.shown) for picture, size in zip(pictures, sizes, strict=True)]
        embeds, mask = self._read(prompt.text, image=shown)
        latents = [self._latents(picture, *size.latents) for picture, size in zip(pictures, sizes, strict=True)]
        return self._with_images(embeds, mask, latents)

    def _latents(self, picture: Image, height: int, width: int) -> Tensor:
        """The latents (1, h, w, C) of a picture, read at a size in pixels."""
        pixels = self.pipeline.image_processor.preprocess(picture, height, width).unsqueeze(2)  # (1, 3, 1, height, width)
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), generator=None)
        packed = self.pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:])
        return packed.unflatten(1, (height // self.pixels_per_token, width // self.pixels_per_token))

    def _with_images(self, embeds: Tensor, mask: Tensor, images: Sequence[Tensor]) -> Any:
        """The conditioning of a text and of as many images as a prompt has; those that it lacks have no rows."""
        none = embeds.new_zeros(len(embeds), 0, 0, self.latent_shape[1])
        return self.Conditioning(embeds, mask, *images, *[none] * (self.input_images[-1] - len(images)))

    def placeholder(self, batch: int) -> Any:
        height, width = self._sizes(1, 1).latents
        grid = height // self.pixels_per_token, width // self.pixels_per_token
        shape = batch, *grid, self.latent_shape[1]
        images = [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in self.input_images]
        embeds, mask = super().placeholder(batch)
        return self._with_images(embeds, mask, images)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        embeds, mask, *images = conditioning
        return self._run(x, sigma, embeds, mask, [image for image in images if image.shape[1]])


class QwenImageEditPlus(QwenImageEdit):
    pipeline_class = "QwenImageEditPlusPipeline"
    Conditioning = QwenEditPlusConditioning
    input_images = range(1, 4)
    shown_area = 384 * 384

    def _written(self, text: str, images: int) -> str:
        numbered = (f"Picture {number}: <|vision_start|><|image_pad|><|vision_end|>" for number in range(1, images + 1))
        return "".join(numbered) + super()._written(text, images)


def scaled(area: float, ratio: float) -> tuple[int, int]:
    """Height and width of an image of this area and ratio of width to height, as the stock pipelines round them."""
    width, height, _ = calculate_dimensions(area, ratio)
    if not width or not height:
        raise ValueError(
            f"model.input_size = {math.isqrt(int(area))}: an input image {ratio:.3g} times as wide as high has no row or no "
            f"column of {SMALLEST_SIDE} pixels at this area; raise it"
        )
    return height, width


def _in_words(sizes: Sequence[Sizes]) -> str:
    return " and ".join(f"{width} x {height}" for (height, width), _ in sizes)
