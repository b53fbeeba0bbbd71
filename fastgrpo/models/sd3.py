"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), through the stock diffusers pipeline.

Letters: B samples, L text tokens, E text width, P pooled width, (C, H, W) a latent.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fastgrpo.models.attention import use_attention


class Conditioning(NamedTuple):
    """What the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)
    pooled: Tensor  # (B, P)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers, of which a run would print a dozen."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in (diffusers_logging, transformers_logging):
            logging.enable_progress_bar()


class SD3:
    """The adapter: `transformer`, `sigmas`, `encode`, `velocity`, `decode`, and the LoRA's way in and out."""

    Conditioning = Conditioning
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, *, dtype: torch.dtype, device: torch.device, max_text_tokens: int
    ) -> None:
        self.pipeline = pipeline.to(device)
        self.dtype, self.device, self.max_text_tokens = dtype, device, max_text_tokens
        self.tiny_decoder: AutoencoderTiny | None = None
        for module in (self.transformer, self.pipeline.vae, *self.text_encoders):
            module.requires_grad_(False)

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype, **settings: Any) -> "SD3":
        """From a folder in the diffusers format; nothing is downloaded."""
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model.path = {path}: holds no model_index.json, so it is no diffusers pipeline folder")
        with quiet():
            pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, local_files_only=True)
        return cls(pipeline, dtype=dtype, **settings)

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipeline.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) at the size the transformer was made for."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def sigmas(self, num_steps: int) -> Tensor:
        """The noise levels of the pipeline's own scheduler, falling from 1 to 0: (num_steps + 1,) float32."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [encoder for name in names if (encoder := getattr(self.pipeline, name)) is not None]

    @property
    def encoder_settings(self) -> dict[str, int]:
        """What embeddings depend on besides prompt and weights."""
        return {"max_text_tokens": self.max_text_tokens}

    def release_encoders(self) -> None:
        """Take the text encoders off the GPU; `encode` still works, more slowly."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """The embeddings of prompts; "" stands for no prompt in classifier-free guidance."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_text_tokens,
            device=self.text_encoders[0].device,
        )  # fmt: skip
        return Conditioning(embeds.to(self.device), pooled.to(self.device))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """v = noise - data at x (B, C, H, W) and sigma (B,) float32, in the model's dtype."""
        return self.transformer(
            hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=conditioning.embeds,
            pooled_projections=conditioning.pooled, return_dict=False,
        )[0]  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Images (B, 3, 8H, 8W) uint8 of latents (B, C, H, W), rounded as the pipeline's output is.

        draft: by the tiny decoder, if there is one.
        """
        decoder = self.tiny_decoder if draft and self.tiny_decoder is not None else self.pipeline.vae
        config = decoder.config
        latents = (latents.to(self.dtype) / config.scaling_factor) + config.shift_factor
        images = decoder.decode(latents, return_dict=False)[0]
        return ((images / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)

    def load_tiny_decoder(self, path: Path) -> None:
        """A distilled decoder for `decode(draft=True)`: for SD3 the one called taesd3."""
        if not (path / "config.json").is_file():
            raise ValueError(f"model.tiny_decoder = {path}: holds no config.json, so it is no AutoencoderTiny folder")
        with quiet():
            decoder = AutoencoderTiny.from_pretrained(path, torch_dtype=self.dtype, local_files_only=True)
        channels = self.transformer.config.in_channels
        if decoder.config.latent_channels != channels:
            raise ValueError(
                f"model.tiny_decoder = {path}: reads latents of {decoder.config.latent_channels} channels, "
                f"this model's have {channels}"
            )
        self.tiny_decoder = decoder.to(self.device).eval().requires_grad_(False)

    def compile_blocks(self) -> None:
        """torch.compile each transformer block in place: they are alike, so that the compiler works once for all."""
        for block in self.transformer.transformer_blocks:
            block.compile()

    def use_attention(self, name: str) -> None:
        """Which attention kernels the transformer runs on, see `fastgrpo.models.attention`."""
        use_attention(self.transformer, name)

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        """Put a trainable low-rank update, at first without effect, beside each target layer."""
        names = list(targets or self.lora_targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names)
        self.transformer.add_adapter(config)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model before training: its LoRA is off inside."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def save_lora(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write the LoRA in the diffusers format: `pipeline.load_lora_weights(folder)` reads it in any script.

        trained: parameter name in `transformer` -> float32 value.
        """
        # The metadata carries alpha: without it diffusers takes alpha = rank on load, in silence. Its sets become
        # lists in a fixed order, where Python would hand over another one in each process.
        metadata = self.transformer.peft_config["default"].to_dict()
        metadata |= {key: sorted(value) for key, value in metadata.items() if isinstance(value, set)}
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, state_dict=dict(trained)),
            transformer_lora_adapter_metadata=metadata,
        )

    def load_lora(self, folder: Path) -> None:
        """Read what `save_lora` wrote."""
        self.pipeline.load_lora_weights(folder)
