"""The class that every model family derives from. A family adds only what is particular to it, in about 60 to 200 lines.

    class Family(Adapter):
        pipeline_class = "..."                      its pipeline in diffusers, which loads the weights and encodes prompts
        Conditioning = FamilyConditioning           the tensors that its transformer reads of a prompt, a NamedTuple
        lora_targets = (...)                        names of the layers to train
        latent_shape, encode_text, velocity, placeholder            always
        prepared, vae_latents, sigmas, guide, own_parts, ...                  where the family differs from what is here

A model's size changes while it is used (`sized`): what a family makes of it is a property, or `cached_by_settings`.
The shortest family to read is `fastgrpo.models.sd3`. How a model is loaded is in `loading`, how it is trained and saved in
`trained`, what makes it faster in `speed`. Outside of this folder it is known as a `fastgrpo.policy.Model`.

Latents have the form in which the stock pipeline hands them to its scheduler: packed into tokens where that packs them.
B samples, *D the shape of a latent.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fastgrpo.finite import check_finite
from fastgrpo.models.reading import Reading, cut_line, part_read
from fastgrpo.models.settings import cached_by_settings
from fastgrpo.models.speed import Accelerated
from fastgrpo.models.trained import Trainable
from fastgrpo.policy import GuidanceRule
from fastgrpo.quiet import without_warnings
from fastgrpo.version import __version__


class Adapter(Trainable, Accelerated):
    """A model family: its network, schedule, encoders and decoder."""

    Conditioning: ClassVar[Any]
    takes: ClassVar[frozenset[str]] = frozenset()  # which of the settings below it has a use for
    image_conditioned: ClassVar[bool] = False  # whether its prompts come with input images
    input_images: range = range(1, 2)  # how many, if so; a loaded model may say it more narrowly than its family
    longest_text: ClassVar[int | None] = None  # the most max_text_tokens that it reads; None: its weights tell, or nothing
    empty_is_no_prompt: ClassVar[bool] = False  # whether "" cannot be drawn, as it stands for a context without a prompt
    # (v, v_uncond, scale) -> v, where the stock pipeline does more than v_uncond + scale (v - v_uncond)
    guide: GuidanceRule | None = None
    cuts_are_known = False  # whether anybody was told that prompts are cut

    # What a family defines.

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """*D, the shape of one latent."""
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[Any]) -> Any:
        """The Conditioning of prompts by the text encoders. prompts: str, or `ImagePrompt` if `image_conditioned`."""
        raise NotImplementedError

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """v = noise - data at x (B, *D) and sigma (B,) float32, in the model's dtype."""
        raise NotImplementedError

    def prepared(self, conditioning: Any) -> Any:
        """What `velocity` may read in its place at every step of a rollout, whose weights do not change: made once."""
        return conditioning

    def placeholder(self, batch: int) -> Any:
        """A Conditioning of random numbers with as many tokens as a prompt may have, for measurements without weights."""
        raise NotImplementedError

    # What all families share: sizes and settings.

    def _check_settings(self) -> None:
        tokens = self.settings.max_text_tokens
        if self.longest_text is not None and tokens > self.longest_text:
            raise ValueError(
                f"model.max_text_tokens = {tokens}: {type(self).__name__} reads at most {self.longest_text}; lower it"
            )
        for name in ("num_frames", "strength", "distilled_guidance", "input_size"):
            value = getattr(self.settings, name)
            if value is not None and name not in self.takes:
                raise ValueError(f"model.{name} = {value}: {type(self).__name__} has no such input; leave it out")
        for name, default in (("experts", "both"), ("idle_expert", "device")):
            value = getattr(self.settings, name)
            if value != default and len(self.transformers) == 1:
                raise ValueError(f"model.{name} = {value}: this model is one network; leave it out")
        for name, value in (("height", self.settings.height), ("width", self.settings.width)):
            if value is not None and value % self.pixels_per_token:
                raise ValueError(f"model.{name} = {value}: must be a multiple of {self.pixels_per_token}")
        for name, value, most in zip(("height", "width"), self.size, self.largest_size or self.size, strict=True):
            if value > most:
                raise ValueError(f"model.{name} = {value}: this model's positions end at {most}; take at most that")

    def check_guidance(self, key: str, scale: float) -> None:
        """Refuse a scale of true guidance that the model was not made for: ValueError. key: that names the scale."""

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels that is one token of the transformer."""
        return self.pipeline.vae_scale_factor * 2

    @property
    def default_size(self) -> int:
        """Height and width in pixels where the settings name none."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.settings.height or self.default_size, self.settings.width or self.default_size

    @property
    def largest_size(self) -> tuple[int, int] | None:
        """The most height and width in pixels, where the network has a table of positions; None: there is no end."""
        return None

    # Prompts.

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Any:
        """The Conditioning of prompts. The prompt "" stands for no prompt in classifier-free guidance.

        Warns of a prompt that is cut, once, unless `read_in_part` has told before.
        """
        if not self.text_encoders:
            return self.placeholder(len(prompts))
        if not self.cuts_are_known and (cut := self.read_in_part(prompts)):
            warnings.warn(cut_line(cut, len(prompts), self.settings.max_text_tokens), stacklevel=3)
        with without_warnings("diffusers", "transformers"):  # diffusers shows what it cuts, a screen for each prompt
            return self.encode_text(prompts)

    def read_in_part(self, prompts: Sequence[Any]) -> dict[Any, str]:
        """The prompts that the text encoders cut, each with the part of its text that they read."""
        if not self.text_encoders:
            return {}
        cut = {}
        for prompt in dict.fromkeys(prompts):
            reading = self.reading(prompt if isinstance(prompt, str) else prompt.text)
            if (part := part_read(reading)) != reading.prompt:
                cut[prompt] = part
        self.cuts_are_known = self.cuts_are_known or bool(cut)
        return cut

    @property
    def other_length(self) -> str:
        """What a run says where the length of the text is part of the model and not the stock pipeline's; else ""."""
        tokens, stock = self.settings.max_text_tokens, self.stock_text_tokens
        if tokens == stock or self.masks or not self.text_encoders:
            return ""
        return (
            f"model.max_text_tokens = {tokens}: another sequence than the stock pipeline reads, which pads to {stock} "
            f"tokens and attends to the padding; draw from the trained model with max_sequence_length={tokens}"
        )

    def reading(self, text: str) -> Reading:
        """How a prompt's text comes to its tokenizer; here as it is, and to the last of several, which reads the most."""
        tokenizers = (getattr(self.pipeline, name, None) for name in ("tokenizer_3", "tokenizer_2", "tokenizer"))
        tokenizer = next(one for one in tokenizers if one is not None)
        return Reading(tokenizer, text, text, self.settings.max_text_tokens)

    @property
    def encoders(self) -> list[torch.nn.Module]:
        """The networks that a Conditioning is made by; an input image goes through the autoencoder."""
        return [*self.text_encoders, self.pipeline.vae] if self.image_conditioned else self.text_encoders

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """What a Conditioning depends on besides the prompt and the weights of `encoders`.

        The tokenizers and processors by content, and the releases that hold the code and the templates around them.
        """
        return {
            "max_text_tokens": self.settings.max_text_tokens, "readers": self.readers_hash, "fastgrpo": __version__,
            "diffusers": diffusers.__version__, "transformers": transformers.__version__,
        }  # fmt: skip

    def release_encoders(self) -> None:
        """Move the text encoders off the GPU. `encode` still works, more slowly."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    # The schedule.

    def scheduler(self) -> Any:
        """A fresh FlowMatchEulerDiscreteScheduler with the settings of the pipeline's scheduler."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def sigmas(self, num_steps: int) -> Tensor:
        """The noise levels of the pipeline's own scheduler, falling from 1 to 0: (num_steps + 1,) float32."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    def shifted_sigmas(self, spaced: Any, tokens: int) -> Tensor:
        """`sigmas` of pipelines that shift evenly spaced ones towards noise, further for images of more tokens.

        spaced: (num_steps,) numbers from 1 down, an array or a list; or num_steps alone, for the scheduler's own spacing.
        """
        scheduler = self.scheduler()
        config = scheduler.config
        how = {"num_inference_steps": spaced} if isinstance(spaced, int) else {"sigmas": spaced}
        scheduler.set_timesteps(**how, mu=calculate_shift(
            tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        ))  # fmt: skip
        return scheduler.sigmas.cpu()

    # Images.

    @torch.no_grad()
    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Images (B, 3, H, W) uint8 of latents (B, *D), rounded as the pipeline's output is.

        draft: use the tiny decoder, if one is loaded.
        """
        decoder = self.tiny_decoder if draft and self.tiny_decoder is not None else self.pipeline.vae
        return to_pixels(decoder.decode(self.vae_latents(latents.to(decoder.dtype), decoder), return_dict=False)[0])

    def vae_latents(self, latents: Tensor, decoder: Any) -> Tensor:
        """Latents as the decoder reads them: unpacked, and at the scale of its own data."""
        return latents / decoder.config.scaling_factor + decoder.config.shift_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, *D) float32 of images (B, 3, H, W) uint8 of the model's size, the reverse of `decode`."""
        vae = self.pipeline.vae
        pixels = images.to(self.device, vae.dtype) / 127.5 - 1
        video = self.vae_latents(self._full(1, 0.0), vae).dim() == 5  # an autoencoder of videos reads one frame
        return self.from_vae(vae.encode(pixels[:, :, None] if video else pixels).latent_dist.mode().float())

    def from_vae(self, encoded: Tensor) -> Tensor:
        """The inverse of `vae_latents`, for any family in which that reorders the numbers, then scales and shifts each.

        The first call at a size tries it on random numbers. NotImplementedError: this family's `vae_latents` does something
        else.
        """
        if not self._inverse_holds:
            raise NotImplementedError(
                f"{type(self).__name__}.vae_latents does more than reorder numbers and scale and shift each, so "
                f"Adapter.from_vae does not invert it: give {type(self).__name__} a from_vae of its own"
            )
        return self._inverse(encoded)

    @cached_by_settings
    def _inverse_holds(self) -> bool:
        like = self.vae_latents(self._full(1, 0.0), self.pipeline.vae)
        numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
        return torch.allclose(self.vae_latents(self._inverse(numbers), self.pipeline.vae), numbers, rtol=1e-3, atol=1e-3)

    def _inverse(self, encoded: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with torch.enable_grad():
            latents = self._full(len(encoded), 0.0).requires_grad_()
            shift = self.vae_latents(latents, vae)
            scale = (self.vae_latents(self._full(1, 1.0), vae) - shift[:1]).detach()
            # The gradient is the map's transpose, which undoes the order, but scales once more where it should divide.
            (found,) = torch.autograd.grad(shift, latents, (encoded - shift.detach()) / scale.square())
        return found.contiguous()

    def _full(self, batch: int, value: float) -> Tensor:
        return torch.full((batch, *self.latent_shape), value, device=self.device)


def to_pixels(images: Tensor) -> Tensor:
    """A decoder's output, from -1 to 1, as uint8. NotFinite: a NaN, which as uint8 would be black."""
    check_finite("decoder's output", images)
    return ((images / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
