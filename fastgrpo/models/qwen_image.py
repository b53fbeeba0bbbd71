"""Qwen-Image and Qwen-Image-Edit (arXiv 2508.02324): Qwen2.5-VL reads the prompt, true guidance keeps the velocity's norm.

Prompts differ in length and a batch has one length, so each prompt is padded to `max_text_tokens`, with a mask for the
transformer's attention. The prompt "" is read as a space, which the published examples take for no prompt.

Letters: B samples, L text tokens, E text width, N latent tokens, C their channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2VLProcessor

from fastgrpo.data.pictures import load_picture
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.reading import Reading
from fastgrpo.records import concatenate


class QwenConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool, False for padding


class QwenEditConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt and of the image to edit."""

    embeds: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool, False for padding
    image: Tensor  # (B, N, C) latents


class MaskedAttention(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' attention, which takes the mask of the text from `attention_kwargs` too.

    From a mask that it is handed in the usual way the transformer makes a tensor of a Python number at every call. That is a
    copy from the host, which no CUDA graph can record.
    """

    def __call__(
        self,
        # Tensors, but diffusers types them as FloatTensor, which a tensor in bfloat16 is not.
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        mask = encoder_hidden_states_mask if attention_mask is None else attention_mask
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask=mask, image_rotary_emb=image_rotary_emb
        )


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor of texts and images without its part for videos, which cannot be loaded without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenFamily(Adapter):
    """The network that Qwen-Image and Qwen-Image-Edit share, and all that they do alike."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    masks = "the padding of prompts"
    longest_text = 1024  # the stock pipeline allows no larger max_sequence_length

    def __init__(self, pipeline: Any, **arguments: Any) -> None:
        super().__init__(pipeline, **arguments)
        self.transformer.set_attn_processor(MaskedAttention())

    @staticmethod
    def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """v_uncond + scale (v - v_uncond), each token rescaled to the norm that it has in v."""
        combined = v_uncond + scale * (v - v_uncond)
        return combined * (torch.norm(v, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of an image's tokens."""
        height, width = self.size
        return 1, height // self.pixels_per_token, width // self.pixels_per_token

    @property
    def latent_shape(self) -> tuple[int, int]:
        _, rows, columns = self.grid
        return rows * columns, self.transformer.config.in_channels

    def sigmas(self, num_steps: int) -> Tensor:
        """The noise levels as the pipeline's scheduler shifts them for an image of this many tokens."""
        return self.shifted_sigmas(np.linspace(1.0, 1 / num_steps, num_steps), self.latent_shape[0])

    def _read(self, text: str, **image: Any) -> QwenConditioning:
        """The text encoder's output (1, L, E), padded with zeros, and which tokens are the prompt's (1, L)."""
        length = self.settings.max_text_tokens
        embeds, _ = self.pipeline.encode_prompt(
            [text or " "], device=self.text_encoders[0].device, max_sequence_length=length, **image
        )
        found = embeds.shape[1]
        if found > length:  # a prompt that may be cut has been cut by the pipeline
            self._refuse(text, found)
        mask = torch.arange(length, device=self.device) < found
        return QwenConditioning(pad(embeds.to(self.device), (0, 0, 0, length - found)), mask[None])

    def _refuse(self, text: str, found: int) -> None:
        length = self.settings.max_text_tokens
        raise ValueError(f"model.max_text_tokens = {length}: {text!r} with its image is {found} tokens; raise it")

    def reading(self, text: str) -> Reading:
        text, room = text or " ", self.settings.max_text_tokens + self.pipeline.prompt_template_encode_start_idx
        return super().reading(text)._replace(text=self.pipeline.prompt_template_encode.format(text), room=room)

    def _random_text(self, batch: int) -> QwenConditioning:
        """Random numbers in place of the text encoder's output, without padding."""
        length, width = self.settings.max_text_tokens, self.transformer.config.joint_attention_dim
        return QwenConditioning(
            torch.randn(batch, length, width, device=self.device, dtype=self.dtype),
            torch.ones(batch, length, device=self.device, dtype=torch.bool),
        )

    def _run(self, tokens: Tensor, sigma: Tensor, embeds: Tensor, mask: Tensor, images: int = 1) -> Tensor:
        """The transformer on tokens (B, images N, C), those of so many images of the output's size."""
        return self.network(
            # Rounded to the model's dtype before the division, as in the pipeline.
            hidden_states=tokens, timestep=(sigma * 1000).to(tokens.dtype) / 1000,
            encoder_hidden_states=embeds, attention_kwargs={"attention_mask": mask},
            img_shapes=[[self.grid] * images] * len(tokens), return_dict=False,
        )[0]  # fmt: skip

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        height, width = self.size
        latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (decoder.config.latents_mean, decoder.config.latents_std)
        )
        return latents * std + mean

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        return super().decode(latents, draft=draft)[:, :, 0]  # the autoencoder is one of videos; this is its one frame

    def load_tiny_decoder(self, path: Path) -> None:
        raise ValueError(f"model.tiny_decoder = {path}: no AutoencoderTiny reads latents of Qwen-Image; leave it out")


class QwenImage(QwenFamily):
    pipeline_class = "QwenImagePipeline"
    Conditioning = QwenConditioning

    def encode_text(self, prompts: Sequence[str]) -> QwenConditioning:
        # One by one, so that the encoding of a prompt does not depend on the others.
        return concatenate([self._read(prompt) for prompt in prompts])

    def placeholder(self, batch: int) -> QwenConditioning:
        return self._random_text(batch)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: QwenConditioning) -> Tensor:
        return self._run(x, sigma, conditioning.embeds, conditioning.mask)


class QwenImageEdit(QwenFamily):
    """Qwen-Image with an image to edit, which the text encoder sees and whose latents follow the noisy ones.

    The image is resized to the output's size, so that all rows of a batch have the same number of tokens. At 1024 x 1024 the
    stock pipeline does the same with a square image. For a smaller output it would still enlarge the input to a megapixel;
    here, as in Flow-GRPO's published script, a training at 512 x 512 reads 512 x 512, at less than half the tokens.

    `max_text_tokens` counts the tokens of the image in the text encoder too: height / 28 times width / 28, each rounded.
    A prompt that is longer is refused, because the stock pipeline cuts none here.
    """

    pipeline_class = "QwenImageEditPipeline"
    Conditioning = QwenEditConditioning
    image_conditioned = True
    cuts_are_known = True  # there are none
    longest_text = 3072  # the table of rotary positions has 4096 rows, and the first are the image's

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        return {"processor": ImageProcessor.from_pretrained(path / "processor", local_files_only=True)}

    @property
    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings | {"size": self.size}

    def read_in_part(self, prompts: Sequence[ImagePrompt]) -> dict[Any, str]:
        """None: a prompt that is longer with its image is refused."""
        if not self.text_encoders:
            return {}
        processor = self.pipeline.processor.image_processor
        image = processor.get_number_of_image_patches(*self.size) // processor.merge_size**2
        for text in dict.fromkeys(prompt.text for prompt in prompts):
            reading = self.reading(text)
            # The template has one token in the place of the image's.
            found = len(reading.tokenizer(reading.text).input_ids) - 1 + image
            if found > reading.room:
                self._refuse(text, found - self.pipeline.prompt_template_encode_start_idx)
        return {}

    def encode_text(self, prompts: Sequence[ImagePrompt]) -> QwenEditConditioning:
        return concatenate([self._read_both(prompt) for prompt in prompts])

    def _read_both(self, prompt: ImagePrompt) -> QwenEditConditioning:
        processor, (height, width) = self.pipeline.image_processor, self.size
        image = processor.resize(load_picture(prompt.images[0]), height, width)
        pixels = processor.preprocess(image, height, width).unsqueeze(2)  # (1, 3, 1, height, width)
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), generator=None)
        packed = self.pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:])
        embeds, mask = self._read(prompt.text, image=image)
        return QwenEditConditioning(embeds, mask, packed)

    def placeholder(self, batch: int) -> QwenEditConditioning:
        image = torch.randn(batch, *self.latent_shape, device=self.device, dtype=self.dtype)
        embeds, mask = self._random_text(batch)
        return QwenEditConditioning(embeds, mask, image)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: QwenEditConditioning) -> Tensor:
        embeds, mask, image = conditioning
        v = self._run(torch.cat([x, image], dim=1), sigma, embeds, mask, images=2)
        return v[:, : x.shape[1]].contiguous()
