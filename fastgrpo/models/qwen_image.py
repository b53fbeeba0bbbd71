"""Qwen-Image (arXiv 2508.02324), also as Qwen-Image-2512: Qwen2.5-VL reads the prompt, true guidance keeps a token's norm.

Prompts differ in length and a batch has one length, so each prompt is padded to `max_text_tokens`, with a mask for the
transformer's attention. The prompt "" is read as a space, which the published examples take for no prompt. Those of the
family that edit images are in `fastgrpo.models.qwen_image_edit`.

`_run` calls the layers of the stock transformer itself, in their order. The stock `forward` makes tensors of Python numbers
at every call, for the mask and for which tokens are an input image's: copies from the host, which no CUDA graph can record.

Letters: B samples, L text tokens, E text width, N latent tokens, C their channels.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.blocks import run
from fastgrpo.models.reading import Reading
from fastgrpo.records import concatenate


class QwenConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool, False for padding


class QwenFamily(Adapter):
    """What all Qwen-Image models do alike."""

    masks = "the padding of prompts"

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

    def _padded(self, text: str, embeds: Tensor) -> QwenConditioning:
        """The text encoder's output (1, n, E), padded with zeros to L tokens, and which of them are the prompt's."""
        length, found = self.settings.max_text_tokens, embeds.shape[1]
        if found > length:  # a prompt that may be cut has been cut by the pipeline
            self._refuse(text, found)
        mask = torch.arange(length, device=self.device) < found
        return QwenConditioning(pad(embeds.to(self.device), (0, 0, 0, length - found)), mask[None])

    def _refuse(self, text: str, found: int) -> None:
        length, whole = self.settings.max_text_tokens, " with its images" if self.image_conditioned else ""
        raise ValueError(f"model.max_text_tokens = {length}: {text!r}{whole} is {found} tokens; raise it")

    def _random_text(self, batch: int, width: int) -> QwenConditioning:
        """Random numbers in place of the text encoder's output, which is E = width wide, without padding."""
        length = self.settings.max_text_tokens
        return QwenConditioning(
            torch.randn(batch, length, width, device=self.device, dtype=self.dtype),
            torch.ones(batch, length, device=self.device, dtype=torch.bool),
        )

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


class DoubleStream(QwenFamily):
    """The network that Qwen-Image and those that edit images share: text and image have weights of their own."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    longest_text = 1024  # the stock pipeline allows no larger max_sequence_length

    def __init__(self, pipeline: Any, **arguments: Any) -> None:
        super().__init__(pipeline, **arguments)
        for encoder in self.text_encoders:
            encoder.register_forward_pre_hook(tell_images_from_text, with_kwargs=True)

    @staticmethod
    def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """v_uncond + scale (v - v_uncond), each token rescaled to the norm that it has in v."""
        combined = v_uncond + scale * (v - v_uncond)
        return combined * (torch.norm(v, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))

    def reading(self, text: str) -> Reading:
        text, room = text or " ", self.settings.max_text_tokens + self.pipeline.prompt_template_encode_start_idx
        return super().reading(text)._replace(text=self.pipeline.prompt_template_encode.format(text), room=room)

    def _read(self, text: str, **image: Any) -> QwenConditioning:
        """What the text encoder makes of a prompt and, where there are any, of its images."""
        length, device = self.settings.max_text_tokens, self.text_encoders[0].device
        return self._padded(
            text, self.pipeline.encode_prompt([text or " "], device=device, max_sequence_length=length, **image)[0]
        )

    def placeholder(self, batch: int) -> Any:
        return self._random_text(batch, self.transformer.config.joint_attention_dim)

    def _run(
        self, x: Tensor, sigma: Tensor, embeds: Tensor, mask: Tensor, images: Sequence[Tensor] = ()
    ) -> Tensor:  # fmt: skip
        """The transformer's prediction for x (B, N, C), beside latents of input images (B, rows, columns, C)."""
        network, grids = self.network, [self.grid, *((1, *image.shape[1:3]) for image in images)]
        # Rounded to the model's dtype before the division, as in the pipeline.
        time = (sigma * 1000).to(x.dtype) / 1000
        tokens = network.img_in(torch.cat([x, *(image.flatten(1, 2) for image in images)], dim=1))
        text = network.txt_in(network.txt_norm(embeds))
        of_images = None
        if network.config.zero_cond_t:  # Qwen-Image-Edit-2511: an input image is modulated as one without noise
            time = torch.cat([time, torch.zeros_like(time)])
            of_images = (torch.arange(tokens.shape[1], device=x.device) >= x.shape[1]).expand(len(x), -1)
        temb = network.time_text_embed(time, tokens)
        rotations = network.pos_embed([grids], max_txt_seq_len=embeds.shape[1], device=x.device)
        for block in network.transformer_blocks:
            text, tokens = run(network, block, tokens, text, mask, temb, rotations, None, of_images)
        v = network.proj_out(network.norm_out(tokens, temb[: len(x)]))
        return v[:, : x.shape[1]].contiguous()


class QwenImage(DoubleStream):
    pipeline_class = "QwenImagePipeline"
    Conditioning = QwenConditioning

    def encode_text(self, prompts: Sequence[str]) -> QwenConditioning:
        # One by one, so that the encoding of a prompt does not depend on the others.
        return concatenate([self._read(prompt) for prompt in prompts])

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: QwenConditioning) -> Tensor:
        return self._run(x, sigma, conditioning.embeds, conditioning.mask)


def tell_images_from_text(encoder: Any, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of Qwen2.5-VL: adds `mm_token_type_ids`, 1 for the tokens of an image, where its caller does not.

    From version 5 on transformers gives tokens of images their positions by row and column only if it is handed them, and
    diffusers' pipelines (issue 14194) do not hand them over. Images would have the positions of a text.
    """
    known = "mm_token_type_ids" in inspect.signature(encoder.forward).parameters
    if known and named.get("mm_token_type_ids") is None and named.get("image_grid_thw") is not None:
        named["mm_token_type_ids"] = (named["input_ids"] == encoder.config.image_token_id).int()
    return arguments, named
