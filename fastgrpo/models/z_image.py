"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): one stream of image and text tokens, prompts read by Qwen3.

The stock transformer takes captions as lists of tensors of different lengths, and makes masks and positions of the lengths
on the host. `velocity` runs its layers on padded captions instead, with the lengths in a tensor: a batch has one shape
whatever its prompts, a sample's result depends on no other sample's length, and nothing in a rollout waits for the device.

A caption has n tokens. The network's own pad token follows up to p, the next multiple of 32, and masked tokens up to P:

    sequence    image tokens 0..N, text tokens 0..n, pad token n..p, masked p..P
    positions   text token i at (1 + i, 0, 0), image token at row h and column w at (1 + p, h, w)

The stock pipeline adds G (v - v_uncond) to v, so its guidance_scale of G is a scale of 1 + G here, where 1 means no guidance
as with every other model. The published values are G = 0 for Z-Image-Turbo and 3 to 5 for Z-Image.

Letters: B samples, (C, H, W) a latent, N image tokens, padded to a multiple of 32, P text tokens, E text width, K width of a
head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.blocks import run
from fastgrpo.models.reading import Reading

PATCH = "2-1"  # the key of the layers for patches of two by two pixels and one frame; no others are published


class ZImageConditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, P, E), zeros from n on
    length: Tensor  # (B,) int64, n


class ZImage(Adapter):
    pipeline_class = "ZImagePipeline"
    Conditioning = ZImageConditioning
    lora_targets = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    masks = "the padding of captions"

    def _check_settings(self) -> None:
        super()._check_settings()
        # Beyond the ends of its tables of rotations the network would read out of bounds, which ends the process on a GPU.
        most = (self.transformer.config.axes_lens[0] - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
        if (tokens := self.settings.max_text_tokens) > most:
            raise ValueError(f"model.max_text_tokens = {tokens}: this model's positions end at {most}; take at most that")

    @property
    def default_size(self) -> int:
        return 1024  # the pipeline's default, which it keeps in no attribute

    @property
    def largest_size(self) -> tuple[int, int]:
        _, rows, columns = self.transformer.config.axes_lens
        return rows * self.pixels_per_token, columns * self.pixels_per_token

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = (side // self.pipeline.vae_scale_factor for side in self.size)
        return self.transformer.config.in_channels, height, width

    @property
    def text_tokens(self) -> int:
        """P, the number of text tokens: max_text_tokens, rounded up to a multiple of 32."""
        return -(-self.settings.max_text_tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF

    def sigmas(self, num_steps: int) -> Tensor:
        return self.shifted_sigmas(get_default_z_image_sigmas(num_steps), self.latent_shape[1] * self.latent_shape[2] // 4)

    def encode_text(self, prompts: Sequence[str]) -> ZImageConditioning:
        captions, _ = self.pipeline.encode_prompt(
            list(prompts), self.text_encoders[0].device, do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_text_tokens,
        )  # fmt: skip
        embeds = torch.stack([pad(caption, (0, 0, 0, self.text_tokens - len(caption))) for caption in captions])
        length = torch.tensor([len(caption) for caption in captions])
        return ZImageConditioning(embeds.to(self.device), length.to(self.device))

    def reading(self, text: str) -> Reading:
        asked, tokenizer = [{"role": "user", "content": text}], self.pipeline.tokenizer
        whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return Reading(tokenizer, text, whole, self.settings.max_text_tokens)

    def placeholder(self, batch: int) -> ZImageConditioning:
        width, tokens = self.transformer.config.cap_feat_dim, self.settings.max_text_tokens
        embeds = torch.randn(batch, tokens, width, device=self.device, dtype=self.dtype)
        return ZImageConditioning(
            pad(embeds, (0, 0, 0, self.text_tokens - tokens)), torch.full((batch,), tokens, device=self.device)
        )

    @staticmethod
    def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """v_uncond + scale (v - v_uncond), added up in the pipeline's order, so that the last bit is the same."""
        exact = v.float()
        return (exact + (scale - 1) * (exact - v_uncond.float())).to(v.dtype)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: ZImageConditioning) -> Tensor:
        network, (embeds, length) = self.network, conditioning
        # 1 - sigma, rounded as the pipeline rounds it on the way from the scheduler's timesteps.
        time = network.t_embedder((1000 - sigma * 1000) / 1000 * network.t_scale).type_as(x)
        real = torch.arange(embeds.shape[1], device=x.device)[None] < length[:, None]  # (B, P)
        rotations, text_mask = positions(network, x, conditioning)
        image_rotations, text_rotations = rotations.split([rotations.shape[1] - embeds.shape[1], embeds.shape[1]], dim=1)

        image = pad_image(network.all_x_embedder[PATCH](patches(x)), network.x_pad_token)
        for block in network.noise_refiner:
            image = run(network, block, image, None, image_rotations, time)
        text = torch.where(real[..., None], network.cap_embedder(embeds), network.cap_pad_token)
        for block in network.context_refiner:
            text = run(network, block, text, text_mask, text_rotations)
        both, mask = torch.cat([image, text], dim=1), pad(text_mask, (image.shape[1], 0), value=True)
        for block in network.layers:
            both = run(network, block, both, mask, rotations, time)
        return -images(network.all_final_layer[PATCH](both, c=time), x)  # the network's own sign is data - noise


def patches(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C). Within a token the pixel comes first, then its channel."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, H * W // 4, 4 * C)


def images(tokens: Tensor, x: Tensor) -> Tensor:
    """The inverse of `patches` on the first H W / 4 tokens (B, N, 4 C), in the shape of x (B, C, H, W)."""
    B, C, H, W = x.shape
    tokens = tokens[:, : H * W // 4].view(B, H // 2, W // 2, 2, 2, C)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def pad_image(tokens: Tensor, token: Tensor) -> Tensor:
    """Image tokens, followed by the network's own pad token up to a multiple of 32: (B, N, width)."""
    B, count, width = tokens.shape
    return torch.cat([tokens, token.expand(B, -count % SEQ_MULTI_OF, width)], dim=1)


def positions(network: Any, x: Tensor, conditioning: ZImageConditioning) -> tuple[Tensor, Tensor]:
    """The rotations of all tokens (B, N + P, K / 2) complex, and which text tokens are attended to (B, P) bool."""
    (B, _, H, W), device = x.shape, x.device
    text = torch.arange(conditioning.embeds.shape[1], device=device)  # (P,)
    padded = (conditioning.length + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF  # (B,) p
    grid = torch.cartesian_prod(*(torch.arange(side // 2, device=device) for side in (H, W)))  # (H W / 4, 2)
    image_ids = torch.cat([(1 + padded).view(B, 1, 1).expand(-1, len(grid), -1), grid.expand(B, -1, -1)], dim=2)
    image_ids = pad(image_ids, (0, 0, 0, -len(grid) % SEQ_MULTI_OF))  # the pad token at (0, 0, 0)
    text_ids = pad(1 + text[:, None], (0, 2)).expand(B, -1, -1)
    ids = torch.cat([image_ids, text_ids], dim=1)  # (B, N + P, 3)
    return network.rope_embedder(ids.flatten(0, 1)).view(*ids.shape[:2], -1), text < padded[:, None]
