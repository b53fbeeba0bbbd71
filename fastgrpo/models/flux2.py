"""FLUX.2: dev, whose guidance is distilled into an input of the network, and klein, with true guidance. Text to image only.

Both are one transformer over packed latents, with a token for each square of two by two latents. They differ in the text
encoder, of which three layers are read: dev has Mistral 3, klein has Qwen3. The transformer attends to a prompt's padding
too, so `max_text_tokens` is part of the model: 512 as published.

The klein of 4 steps was distilled without guidance: take `guidance_scale` 1. klein-base, of 50 steps, was published with 4.

Letters: B samples, N = h w image tokens of C channels each, L text tokens, E text width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor
from transformers import ProcessorMixin

from fastgrpo.files import json_value
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.reading import Reading
from fastgrpo.models.settings import cached_by_settings


class TextProcessor(ProcessorMixin):
    """Pixtral's processor of texts and images without its part for images, which cannot be loaded without torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


class Flux2Conditioning(NamedTuple):
    """The tensors that the transformer reads of a prompt."""

    embeds: Tensor  # (B, L, E)


class Flux2(Adapter):
    pipeline_class = "Flux2Pipeline"
    Conditioning = Flux2Conditioning
    takes = frozenset({"distilled_guidance"})
    longest_text = 512  # that it was trained on; the stock pipeline does not refuse more

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        _, reader = json_value((path / "model_index.json").read_bytes())["tokenizer"]
        if not reader.endswith("Processor"):
            return {}
        return {"tokenizer": TextProcessor.from_pretrained(path / "tokenizer", local_files_only=True)}

    def _check_settings(self) -> None:
        super()._check_settings()
        value, reads = self.settings.distilled_guidance, self.transformer.config.guidance_embeds
        if reads and value is None:
            raise ValueError("model.distilled_guidance = None: this transformer reads it; the published value is 4.0")
        if value is not None and not reads:
            raise ValueError(f"model.distilled_guidance = {value}: this transformer has no such input; leave it out")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        # "attn.to_out" alone would also match the lists of layers that have this name in the blocks of two streams.
        single = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.transformer.config.num_single_layers))
        return (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "linear_in", "linear_out", "attn.to_qkv_mlp_proj", *single,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """h and w, the rows and columns of an image's tokens."""
        return self.size[0] // self.pixels_per_token, self.size[1] // self.pixels_per_token

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.grid[0] * self.grid[1], self.transformer.config.in_channels

    def sigmas(self, num_steps: int) -> Tensor:
        scheduler = self.scheduler()
        mu = compute_empirical_mu(self.latent_shape[0], num_steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.cpu()

    def encode_text(self, prompts: Sequence[str]) -> Flux2Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.text_encoders[0].device, max_sequence_length=self.settings.max_text_tokens
        )
        return Flux2Conditioning(embeds.to(self.device))

    def reading(self, text: str) -> Reading:
        processor = self.pipeline.tokenizer
        text = text.replace("[IMG]", "")  # which the pipeline takes out
        (asked,) = format_input([text], system_message=self.pipeline.system_message)
        whole = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        # The template may have the mark of the beginning already.
        marks = not (tokenizer.bos_token and whole.startswith(tokenizer.bos_token))
        return Reading(tokenizer, text, whole, self.settings.max_text_tokens, marks)

    def placeholder(self, batch: int) -> Flux2Conditioning:
        shape = batch, self.settings.max_text_tokens, self.transformer.config.joint_attention_dim
        return Flux2Conditioning(torch.randn(shape, device=self.device, dtype=self.dtype))

    @cached_by_settings
    def positions(self) -> tuple[Tensor, Tensor]:
        """(frame, row, column, place in the text) of all text tokens (L, 4) and image tokens (N, 4).

        They are the same for all samples, so they are no part of the conditioning.
        """

        def numbered(*sizes: int) -> Tensor:
            return torch.cartesian_prod(*(torch.arange(size, device=self.device) for size in sizes))

        return numbered(1, 1, 1, self.settings.max_text_tokens), numbered(1, *self.grid, 1)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Flux2Conditioning) -> Tensor:
        text, image = self.positions
        guidance = self.settings.distilled_guidance
        return self.network(
            # Rounded to the model's dtype before the division, as in the pipeline.
            hidden_states=x, timestep=(sigma * 1000).to(x.dtype) / 1000,
            guidance=None if guidance is None else torch.full_like(sigma, guidance),
            encoder_hidden_states=conditioning.embeds, txt_ids=text, img_ids=image, return_dict=False,
        )[0]  # fmt: skip

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        vae = self.pipeline.vae
        if decoder is vae:  # its data are normalised in squares of two by two; a tiny decoder reads the network's own scale
            std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).to(latents.dtype)
            latents = latents * std + vae.bn.running_mean.to(latents.dtype)
        x = latents.unflatten(2, (-1, 2, 2)).unflatten(1, self.grid)  # (B, h, w, C / 4, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C / 4, 2 h, 2 w)


class Flux2Klein(Flux2):
    pipeline_class = "Flux2KleinPipeline"

    def check_guidance(self, key: str, scale: float) -> None:
        if scale != 1 and self.pipeline.config.is_distilled:
            raise ValueError(
                f"{key} = {scale:g}: this klein was distilled to run without guidance, and its pipeline ignores the scale; "
                "take 1, or klein-base"
            )

    def reading(self, text: str) -> Reading:
        asked, tokenizer = [{"role": "user", "content": text}], self.pipeline.tokenizer
        whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return Reading(tokenizer, text, whole, self.settings.max_text_tokens)
