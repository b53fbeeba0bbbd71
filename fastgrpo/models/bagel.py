"""BAGEL (arXiv 2505.14683): one model that reads text and makes images, here as far as it makes images of text.

It is not in diffusers, so its network is `fastgrpo.models.bagel_network`, and its folder is read as published by
`fastgrpo.models.bagel_folder`. Its text encoder is one half of its transformer, the understanding weights. They stay as they
are, so they read each prompt once and their keys and values are kept. The other half, the generation weights, is trained, as
in Flow-GRPO (arXiv 2505.05470).

Letters: B samples, L text tokens, G heads of keys and values, K width of a head, N image tokens, C channels of a latent.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import Qwen2Tokenizer

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.bagel_folder import (
    NETWORK,
    check_bagel_folder,
    empty_network,
    published_name,
    read_autoencoder,
    read_network,
    read_tokenizer,
)
from fastgrpo.models.bagel_network import GEN, PATCH, BagelTransformer
from fastgrpo.models.loading import TRANSFORMER
from fastgrpo.models.reading import Reading
from fastgrpo.quiet import quiet

SHIFT = 3.0  # how far the noise levels are shifted towards noise


class BagelConditioning(NamedTuple):
    """A prompt as the generation path sees it: its keys and values in every layer, zero beyond its length.

    Each of the L tokens takes 57 kB in bfloat16 at full size.
    """

    keys: Tensor  # (B, layers, G, L, K)
    values: Tensor  # (B, layers, G, L, K)
    length: Tensor  # (B,) int64, 0 for no prompt


class BagelPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """The parts of BAGEL under diffusers' names, with the loader of diffusers that reads a transformer's LoRA alone."""

    def __init__(
        self,
        transformer: BagelTransformer,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer: Qwen2Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.default_sample_size = transformer.config.max_latent_size * PATCH


class Bagel(Adapter):
    pipeline_class = "BagelPipeline"
    Conditioning = BagelConditioning
    stock_text_tokens = 256  # BAGEL's own code pads nothing, so that the number is of no consequence
    empty_is_no_prompt = True
    lora_targets = (
        "self_attn.q_proj_moe_gen", "self_attn.k_proj_moe_gen", "self_attn.v_proj_moe_gen", "self_attn.o_proj_moe_gen",
        "mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj",
    )  # fmt: skip
    masks = "the end of short prompts"

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        transformer: Path | None = None,
        variant: str | None = None,
        **settings: Any,
    ) -> Self:
        """The model in the published folder. Nothing is downloaded."""
        cls.check_files(path, transformer=transformer, variant=variant)
        with quiet("diffusers", "transformers"):
            tokenizer = read_tokenizer(path)
            pipeline = BagelPipeline(
                read_network(path, tokenizer, dtype, device), read_autoencoder(path, dtype, device),
                FlowMatchEulerDiscreteScheduler(shift=SHIFT), tokenizer,
            )  # fmt: skip
        return cls(pipeline, dtype=dtype, device=device, **settings)

    @classmethod
    def check_files(cls, path: Path, *, transformer: Path | None = None, variant: str | None = None) -> None:
        for key, value in (("transformer", transformer), ("variant", variant)):
            if value is not None:
                raise ValueError(f"model.{key} = {value}: BAGEL is read from its published folder alone; leave it out")
        check_bagel_folder(path)

    @classmethod
    def part_class(cls, name: str) -> Any:
        own = {kind.__name__: kind for kind in (BagelPipeline, BagelTransformer)}
        return own.get(name) or super().part_class(name)

    @classmethod
    def skeleton(cls, path: Path, network: str = TRANSFORMER) -> Any:
        return empty_network(path, read_tokenizer(path))

    @classmethod
    def weight_files(cls, path: Path, network: str = TRANSFORMER, **base: Any) -> dict[Path, Path]:
        return {Path(NETWORK): path / NETWORK}

    weight_name = staticmethod(published_name)

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.settings.max_text_tokens < 3:
            raise ValueError(
                f"model.max_text_tokens = {self.settings.max_text_tokens}: two are the prompt's marks; take more"
            )

    @property
    def largest_size(self) -> tuple[int, int]:
        return self.default_size, self.default_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        height, width = (side // self.pixels_per_token for side in self.size)
        return height, width

    @property
    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows * columns, PATCH**2 * self.pipeline.vae.config.latent_channels

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        return [] if self.pipeline.tokenizer is None else [self.transformer.understanding()]

    def release_encoders(self) -> None:
        """Do nothing: every step needs the understanding weights too, for the marks around the latents."""

    def encode_text(self, prompts: Sequence[str]) -> BagelConditioning:
        """The keys and values of prompts. A prompt that is too long is cut before its closing mark."""
        if not self.transformer.embed_tokens.weight.numel():
            raise ValueError("engine.zero_stage = 3: shards the weights that BAGEL reads prompts with; take 1 or 2")
        tokenizer, room = self.pipeline.tokenizer, self.settings.max_text_tokens
        opening, closing = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        texts = [[opening, *tokenizer.encode(text)[: room - 2], closing] if text else [] for text in prompts]
        ids = torch.tensor([[*text, *[closing] * (room - len(text))] for text in texts], device=self.device)
        length = torch.tensor([len(text) for text in texts], device=self.device)
        keys, values = self.transformer.read(ids, length)
        return BagelConditioning(keys, values, length)

    def reading(self, text: str) -> Reading:
        return super().reading(text)._replace(room=self.settings.max_text_tokens - 2)  # two are the prompt's marks

    def placeholder(self, batch: int) -> BagelConditioning:
        config, tokens = self.transformer.config, self.settings.max_text_tokens
        shape = (batch, config.num_hidden_layers, config.num_key_value_heads, tokens, self.transformer.head_width)
        keys, values = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        return BagelConditioning(keys, values, torch.full((batch,), tokens, device=self.device))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: BagelConditioning) -> Tensor:
        return self.network(x, sigma, conditioning.keys, conditioning.values, conditioning.length, self.grid)

    @staticmethod
    def guide(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """Guidance that never makes a sample's velocity longer than v (cfg_renorm "global", between 0 and 1).

        v_uncond was made without any text. Guidance holds at every sigma, as in Flow-GRPO; the published demo guides only
        where sigma > 0.4.
        """
        plain, without = v.float(), v_uncond.float()
        guided = without + scale * (plain - without)
        dims = tuple(range(1, v.ndim))
        ratio = plain.norm(dim=dims, keepdim=True) / (guided.norm(dim=dims, keepdim=True) + 1e-8)
        return (guided * ratio.clamp(max=1)).to(v.dtype)

    def sigmas(self, num_steps: int) -> Tensor:
        """s t / (1 + (s - 1) t) at evenly spaced t, with s = SHIFT: as published with num_timesteps = num_steps + 1."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
        return scheduler.sigmas.cpu()

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        """The image of latents (B, C, H, W), at the decoder's scale. A token is its square row by row, channels last."""
        rows, columns = self.grid
        squares = latents.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, 2, 2, C)
        image = squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return super().vae_latents(image, decoder)

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        names = [name for name, _ in self.transformer.named_modules()]
        self.check_trainable(name for name in names if any(name == t or name.endswith("." + t) for t in targets or ()))
        super().add_lora(rank=rank, alpha=alpha, targets=targets)

    def check_trainable(self, layers: Iterable[str]) -> None:
        """Refuse the understanding weights, because prompts are read once and their keys and values kept."""
        reading = set(self.transformer.understanding())
        for name in layers:
            if self.transformer.get_submodule(name) in reading:
                raise ValueError(
                    f"model.lora: {name} reads the prompt and is not trained; name generation weights, such as "
                    f"{', '.join(self.lora_targets[:2])}"
                )

    def train_all(self, *, keep_reference: bool) -> None:
        """Make the generation weights of the layers trainable, as published. The copy for `reference` shares all others."""
        fixed = {id(p): p for name, p in self.transformer.named_parameters() if GEN not in name}
        if keep_reference:
            self.untrained = copy.deepcopy(self.transformer, fixed)
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(GEN in name)
