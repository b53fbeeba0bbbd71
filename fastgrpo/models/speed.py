"""Four ways to run a model faster, each asked for by a key of the configuration.

model.attention          `use_attention`        other attention kernels, see `fastgrpo.models.attention`
model.compile            `compile`              torch.compile of each transformer block and of the decoder
rollout.precision fp8    `prepare_drafts`       rollouts in 8-bit numbers, see `fastgrpo.models.fp8`
model.tiny_decoder       `load_tiny_decoder`    a distilled decoder for training images
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from fastgrpo.models.attention import use_attention
from fastgrpo.models.compiled import CompiledVelocity, Prepared, Velocity
from fastgrpo.models.folder import check_network, readable
from fastgrpo.models.fp8 import Fp8Linear, drafting, prepare_fp8
from fastgrpo.models.loading import LoadedPipeline, check_numbers
from fastgrpo.quiet import quiet


class Accelerated(LoadedPipeline):
    """A pipeline with the ways to run it faster."""

    # The tokens that the family's attention has to leave out, in words; None where it attends to all of them.
    masks: ClassVar[str | None] = None
    velocity: Velocity
    prepared: Prepared
    tiny_decoder: Any = None  # the AutoencoderTiny, once one was loaded
    _drafted: Sequence[Fp8Linear] = ()  # the layers that can multiply 8-bit numbers

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer's blocks: the modules of which it has many alike."""
        return [block for transformer in self.transformers.values() for block in blocks_of(transformer)]

    def compile(self) -> None:
        """torch.compile each of the transformer's blocks, see `fastgrpo.models.compiled`, and an image's decoder."""
        self.refuse_quantized("model.compile = true", "take false, or the plain weights")
        # There is a program for each shape and each kind of block, with and without its adapter. The compiler's own limit is
        # lower, and past it blocks would run eagerly with no more than a line in the log.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        compiled = CompiledVelocity(
            self.velocity, self.prepared, list(self.transformers.values()), self.blocks,
            drafting=lambda: any(layer.drafting for layer in self._drafted),
        )  # fmt: skip
        self.velocity, self.prepared = compiled, compiled.prepared
        of_images = isinstance(self.pipeline.vae, AutoencoderKL)
        if of_images:  # that of a video decodes frame by frame, with a memory
            self.pipeline.vae.decoder.compile(dynamic=False)

    def use_attention(self, name: str) -> None:
        """Run the transformer on the attention kernels called `name`; ValueError if they cannot serve this model here."""
        # flash-attn takes no mask, diffusers hands xformers the true and false of a mask as scores of one and zero, and
        # cuDNN's gradient under a mask can be NaN (pytorch issue 196678).
        if name != "native" and self.masks:
            raise ValueError(f"model.attention = {name!r}: {type(self).__name__} has to mask {self.masks}; take native")
        for transformer in self.transformers.values():
            use_attention(transformer, name)

    def prepare_drafts(self) -> None:
        """Make ready for `drafting`, once the trained weights are in place."""
        self.refuse_quantized("rollout.precision = 'fp8'", "take model, or the plain weights")
        self._drafted = prepare_fp8(self.blocks)

    def drafting(self) -> AbstractContextManager[None]:
        """Inside, frozen layers multiply in 8 bits if `prepare_drafts` was called; without it nothing changes."""
        return drafting(self._drafted)

    def load_tiny_decoder(self, path: Path) -> None:
        """Load a distilled decoder for `decode(draft=True)`: for SD3 the one called taesd3, for FLUX taef1."""
        if not (path / "config.json").is_file():
            raise ValueError(f"model.tiny_decoder = {path}: holds no config.json, so it is no AutoencoderTiny folder")
        with readable(where := f"model.tiny_decoder = {path}"):
            check_network(path, path, AutoencoderTiny, where)
        with quiet("diffusers", "transformers"):
            decoder = AutoencoderTiny.from_pretrained(path, torch_dtype=self.dtype, local_files_only=True)
        channels = self.pipeline.vae.config.latent_channels
        if decoder.config.latent_channels != channels:
            raise ValueError(
                f"model.tiny_decoder = {path}: reads latents of {decoder.config.latent_channels} channels, "
                f"this model's have {channels}"
            )
        check_numbers(f"model.tiny_decoder = {path}", decoder)
        self.tiny_decoder = decoder.to(self.device).eval().requires_grad_(False)


def blocks_of(transformer: Any) -> list[torch.nn.Module]:
    """The blocks of one network of diffusers."""
    # SD3 names them only where diffusers asks which modules must not be split between devices.
    names = transformer._repeated_blocks or transformer._no_split_modules
    found = [module for module in transformer.modules() if any(kind.__name__ in names for kind in type(module).__mro__)]
    if not found:
        raise ValueError(f"{type(transformer).__name__} names no blocks, which model.compile and fp8 work on")
    return found
