"""Qwen-Image-2.1 from text: one stream of text and image tokens with the same weights, prompts read by Qwen3-VL.

    attention    a text token attends to those before it, an image token to all text and to the whole image
    modulation   of image tokens by the noise level, of text tokens as at a level of 0
    positions    text token i of n at (i, i, i), image token at row h and column w at (n, h - H / 2, w - W / 2)

The stock transformer reads positions and masks of the first sample on the host, and counts padding as text: an image's place
would depend on the longest prompt in its batch. `velocity` runs its layers on prompts that are padded to `max_text_tokens`,
with n in a tensor: a sample depends on no other, and nothing in a rollout waits for the device.

The text's keys and values depend neither on the image nor on the noise level, but on the weights that are trained:

    prefix = the blocks on the text alone            once a rollout (`prepared`), and in each pass of an update
    v = the blocks on the image, given the prefix    at every step

An update multiplies text and image apart too, as other shapes would round differently: the first ratio is exactly 1.

The autoencoder decodes colours and opacity; images are shown on white. The stock pipeline cuts no prompt, so one that is
longer than `max_text_tokens` is refused. Its image-conditioned mode is not supported.

Letters: B samples, L text tokens, E text width, N = H W image tokens, S = L + N, C channels of a latent, K width of a head.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import QwenImage21Pipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21KVLayerCache,
    QwenImage21TransformerBlock,
)
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen3VLProcessor

from fastgrpo.models.blocks import run
from fastgrpo.models.qwen_image import QwenConditioning, QwenFamily
from fastgrpo.models.reading import Reading
from fastgrpo.records import concatenate


class Processor(Qwen3VLProcessor):
    """Qwen3-VL's processor of texts and images without its part for videos, which cannot be loaded without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class _NoProcessor:
    """What the stock pipeline asks of its processor when it is made."""

    tokenizer: Any = property(lambda self: self)

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[]]

    def encode(self, _: str) -> list[int]:
        return [0]


class Pipeline(QwenImage21Pipeline):
    """The stock pipeline, whose processor may come later, or never, for placeholders in the place of prompts."""

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, processor: Any, transformer: Any, sample_sigmas: Any = None
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, processor or _NoProcessor(), transformer, sample_sigmas)
        self.processor = processor

    def register_modules(self, **parts: Any) -> None:
        own: Any = self
        stock: Any = super()
        stock.register_modules(**parts)
        if set(parts) == {"processor"}:  # what the stock pipeline asks of its processor when it is made
            stock.__init__(**own.components, sample_sigmas=own.config.sample_sigmas)


class QwenPrefix(NamedTuple):
    """What a prompt's text is to the image, in every block: its keys and values. It holds for the weights of the moment."""

    mask: Tensor  # (B, L) bool, False for padding
    keys: tuple[Tensor, ...]  # (B, L, heads, K) a block
    values: tuple[Tensor, ...]  # (B, L, heads, K) a block


class Block(QwenImage21TransformerBlock):
    """The stock block, and one for `velocity`, of text or of an image, with positions of their own for each sample."""

    def forward(
        self, hidden_states: Tensor, modulation: Tensor, rotary_emb: Any = None, attention_mask: Any = None,
        *prefix: Any, **stock: Any,
    ) -> Any:  # fmt: skip
        """Of text: its tokens, keys and values, so that they are outputs to a checkpoint and to torch.compile. Else tokens.

        attention_mask and prefix: of an image, see `BlockCausalAttention`, and the text's keys and values.
        """
        if rotary_emb.dim() == 2:
            return super().forward(hidden_states, modulation, rotary_emb, attention_mask, *prefix, **stock)
        text = QwenImage21KVLayerCache()
        if prefix:
            text.store(*prefix)
        tokens = super().forward(hidden_states, modulation, rotary_emb, attention_mask, None, text)
        return tokens if prefix else (tokens, *text.get())


class BlockCausalAttention(QwenImage21AttnProcessor):
    """The stock attention, and one for `Block`."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Any = None, rotary_emb: Any = None, layer_cache: Any = None,
        *rest: Any, **stock: Any,
    ) -> Any:  # fmt: skip
        """hidden_states: (B, n, heads K), the tokens of a text or of an image. rotary_emb: (B or 1, n, K / 2) complex.

        attention_mask: of an image (B, 1, 1, S) bool, what it attends to; None for a text. layer_cache: the text's keys and
        values, which a text writes and its image reads.
        """
        if rotary_emb.dim() == 2:
            return super().__call__(attn, hidden_states, attention_mask, rotary_emb, layer_cache, *rest, **stock)
        layers = attn.to_q, attn.to_k, attn.to_v
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers)  # (B, n, heads, K)
        q, k = (rotated(norm(x).to(v.dtype), rotary_emb) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        if attention_mask is None:
            layer_cache.store(k, v)
            # Padding stands behind the text, so that no token of a prompt sees it.
            found = dispatch_attention_fn(q, k, v, is_causal=True)
        else:
            k, v = (torch.cat(both, dim=1) for both in zip(layer_cache.get(), (k, v), strict=True))
            found = dispatch_attention_fn(q, k, v, attn_mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](found.flatten(2)))


class QwenImage21(QwenFamily):
    pipeline_class = "QwenImage21Pipeline"
    Conditioning = QwenConditioning
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    )  # fmt: skip
    cuts_are_known = True  # there are none
    longest_text = 8191  # the table of rotary positions has 8192 rows for those from 0 on, and the image follows the text

    def __init__(self, pipeline: Any, **arguments: Any) -> None:
        super().__init__(pipeline, **arguments)
        self.transformer.set_attn_processor(BlockCausalAttention())
        for block in self.transformer.transformer_blocks:
            block.__class__ = Block
        # On the device once, as the stock module moves them at its first call: one table (positions, K' / 2) an axis.
        self._turns = [table.to(self.device) for table in self.transformer.pos_embed.freqs]

    @classmethod
    def part_class(cls, name: str) -> Any:
        return Pipeline if name == cls.pipeline_class else super().part_class(name)

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        return {"processor": Processor.from_pretrained(path / "processor", local_files_only=True)}

    @property
    def default_size(self) -> int:
        return 1024  # the pipeline's default, which it keeps in no attribute

    @property
    def grid(self) -> tuple[int, int, int]:
        height, width = self.size
        return 1, height // self.pipeline.vae_scale_factor, width // self.pipeline.vae_scale_factor

    def sigmas(self, num_steps: int) -> Tensor:
        """The author's own noise levels where they are published for so many steps, else evenly spaced; shifted by size."""
        own = self.pipeline.config.sample_sigmas
        spaced = own if own and len(own) == num_steps else np.linspace(1.0, 1 / num_steps, num_steps)
        return self.shifted_sigmas(spaced, self.latent_shape[0])

    def reading(self, text: str) -> Reading:
        text = text or " "
        room = self.settings.max_text_tokens + self.pipeline._drop_idx
        return Reading(self.pipeline.processor.tokenizer, text, self.pipeline.prompt_template_t2i.format(text), room)

    def read_in_part(self, prompts: Sequence[str]) -> dict[Any, str]:
        """None: a prompt that is longer is refused."""
        for prompt in dict.fromkeys(prompts) if self.text_encoders else ():
            reading = self.reading(prompt)
            found = len(reading.tokenizer(reading.text).input_ids)
            if found > reading.room:
                self._refuse(prompt, found - self.pipeline._drop_idx)
        return {}

    def encode_text(self, prompts: Sequence[str]) -> QwenConditioning:
        # One by one, so that the encoding of a prompt does not depend on the others.
        device = self.text_encoders[0].device
        return concatenate([self._padded(text, self.pipeline.encode_prompt([text], device=device)[0]) for text in prompts])

    def placeholder(self, batch: int) -> QwenConditioning:
        return self._random_text(batch, self.transformer.config.context_in_dim)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: QwenConditioning | QwenPrefix) -> Tensor:
        network = self.network
        # Rounded to the model's dtype before the division, as in the pipeline.
        time = (sigma * 1000).to(x.dtype) / 1000
        tokens = network.img_in(x)
        temb = network.time_text_embed(time, tokens)
        seen = pad(conditioning.mask, (0, tokens.shape[1]), value=True)[:, None, None]
        image = network.modulation(temb), self._image_rotations(conditioning.mask), seen
        if isinstance(conditioning, QwenPrefix):
            for block, k, v in zip(network.transformer_blocks, conditioning.keys, conditioning.values, strict=True):
                tokens = run(network, block, tokens, *image, k, v)
        else:
            texts, text = self._text(conditioning, time)
            for block in network.transformer_blocks:
                texts, tokens = run(network, partial(both, block), texts, text, tokens, image)
        return network.proj_out(network.norm_out(tokens, temb))

    def prepared(self, conditioning: QwenConditioning) -> QwenConditioning | QwenPrefix:
        """The text's keys and values. In a network without `causal_condition` they depend on the noise level: no change."""
        network = self.network
        if not network.config.causal_condition:
            return conditioning
        texts, text = self._text(conditioning, conditioning.embeds.new_zeros(1))
        keys, values = [], []
        for block in network.transformer_blocks:
            texts, k, v = run(network, block, texts, *text)
            keys.append(k)
            values.append(v)
        return QwenPrefix(conditioning.mask, tuple(keys), tuple(values))

    def _text(self, conditioning: QwenConditioning, time: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A text's tokens (B, L, heads K), and their modulation and rotations.

        time: (B,), by which a network without `causal_condition` modulates text; others do as without noise, at 0.
        """
        network, (embeds, mask) = self.network, conditioning
        if network.config.causal_condition:
            time = time.new_zeros(1)
        tokens, place = network.txt_in(embeds), torch.arange(mask.shape[1], device=mask.device)
        rotations = torch.cat([table[place] for table in self._turns], dim=-1)[None]  # (1, L, K / 2)
        return tokens, (network.modulation(network.time_text_embed(time, tokens)), rotations)

    def _image_rotations(self, mask: Tensor) -> Tensor:
        """The rotations of an image's tokens (B, N, K / 2) complex. mask: (B, L), of the text before it."""
        batch, (_, rows, columns) = len(mask), self.grid
        row = (torch.arange(rows, device=mask.device) - (rows - rows // 2)).repeat_interleave(columns)
        column = (torch.arange(columns, device=mask.device) - (columns - columns // 2)).repeat(rows)
        frame = mask.sum(dim=1, keepdim=True).expand(-1, rows * columns)  # (B, N)
        frames, heights, widths = self._turns
        grid = torch.cat([heights[row], widths[column]], dim=-1)  # (N, ...); negative ones count from the table's end
        return torch.cat([frames[frame], grid.expand(batch, -1, -1)], dim=-1)

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        return on_white(super().decode(latents, draft=draft))

    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(torch.cat([images, torch.full_like(images[:, :1], 255)], dim=1))


def both(block: Any, texts: Tensor, text: tuple, tokens: Tensor, image: tuple) -> tuple[Tensor, Tensor]:
    """Tokens of text and image behind a block, in one function: a checkpoint then keeps no keys and values."""
    texts, k, v = block(texts, *text)
    return texts, block(tokens, *image, k, v)


def rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """x (B, n, heads, K) with each pair of neighbours turned by its token's rotations (B or 1, n, K / 2) complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(2)).flatten(3).type_as(x)


def on_white(images: Tensor) -> Tensor:
    """Images (B, 4, H, W) uint8 of colours and opacity as (B, 3, H, W) on a white ground."""
    colours, opacity = images[:, :3].int(), images[:, 3:].int()
    return (255 - ((255 - colours) * opacity + 127) // 255).to(torch.uint8)
