"""What all model adapters share. A family adds what is particular to it; the shortest to read is `fastgrpo.models.sd3`.

    class Family(Adapter):
        pipeline_class = "..."                      its pipeline in diffusers, which loads the weights and encodes prompts
        Conditioning = ...                          what its transformer reads of a prompt, a NamedTuple, the batch first
        lora_targets = (...)
        latent_shape, encode_text, velocity, placeholder, and vae_latents, sigmas where they differ
        guide                                       only if classifier-free guidance is more than a straight line

Latents are whatever the stock pipeline hands to its scheduler: packed where that is packed. B samples, *D a latent.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import save_torch_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.attention import use_attention
from fastgrpo.models.folder import check_folder
from fastgrpo.models.fp8 import drafting, prepare_fp8
from fastgrpo.models.lora import lora_config
from fastgrpo.quiet import quiet

ARCHITECTURES = Path(__file__).parent / "architectures"
PROMPT_PARTS = ("text_", "token", "processor")  # how a pipeline's parts that read prompts are called
FULL = "transformer"  # where a fully trained transformer lies in a run's folder, as in a pipeline's


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is used, beside its weights; a family refuses what it knows nothing of."""

    max_text_tokens: int = 256
    height: int | None = None  # pixels; None is the size the transformer was made for
    width: int | None = None
    num_frames: int | None = None  # of a video
    distilled_guidance: float | None = None  # the guidance that a distilled model takes as an input


def take_no_shortcuts(dtype: torch.dtype) -> None:
    """Switch off what torch does by itself on a GPU for speed, and what exactness does not survive.

    In the whole process: torch has no switch that is narrower and holds outside a `with`, which all who call attention, the
    encoders and the processors of diffusers, would have to enter.
    """
    # On Hopper torch 2.11 and later prefer cuDNN's attention, whose plans for training and for inference are two: the first
    # ratio need not be exactly 1. model.attention "cudnn" asks for it at each call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == torch.float32:
        # cuDNN convolves float32 with TF32's 10 bits, the transformer's patches too, and nothing else in torch does: a GPU's
        # numbers would lie a thousand times further from a CPU's than rounding.
        torch.backends.cudnn.allow_tf32 = False


class Adapter:
    """A model family: its network, schedule, encoders and decoder, and the way its trained weights go in and out."""

    pipeline_class: ClassVar[str]
    Conditioning: ClassVar[type]
    lora_targets: ClassVar[tuple[str, ...]]
    takes: ClassVar[frozenset[str]] = frozenset()  # of num_frames, distilled_guidance
    image_conditioned: ClassVar[bool] = False  # prompts come with an input image
    masks: ClassVar[str | None] = None  # tokens that its attention has to leave out, which only torch's own can
    vae_dtype: ClassVar[torch.dtype | None] = None  # of the decoder, where it is not the model's
    # (v, v_uncond, scale) -> v, where the stock pipeline does more than v_uncond + scale (v - v_uncond)
    guide: ClassVar[Callable[[Tensor, Tensor, float], Tensor] | None] = None

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: torch.device, **settings: Any) -> None:
        self.pipeline = pipeline.to(device)
        self.dtype, self.device, self.settings = dtype, device, Settings(**settings)
        self._check_settings()
        take_no_shortcuts(dtype)
        self.tiny_decoder: AutoencoderTiny | None = None
        self._frozen: torch.nn.Module | None = None  # of full fine-tuning: the transformer before it
        self._in_reference = False
        self._drafted: list[torch.nn.Module] = []  # layers that can multiply in 8 bits
        for module in (self.transformer, self.pipeline.vae, *self.text_encoders):
            module.requires_grad_(False)

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype, device: torch.device, **settings: Any) -> "Adapter":
        """From a folder in the diffusers format; nothing is downloaded."""
        check_folder(path, cls.pipeline_class)
        dtypes = {"default": dtype, "vae": cls.vae_dtype or dtype}
        with quiet("diffusers", "transformers"):
            kind = cls.part_class(cls.pipeline_class)
            pipeline = kind.from_pretrained(path, dtype=dtypes, local_files_only=True, **cls.own_parts(path))
        return cls(pipeline, dtype=dtype, device=device, **settings)

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        """Parts of the pipeline in the folder that are not to be loaded the stock way, by name."""
        return {}

    @classmethod
    def random(cls, architecture: str, *, dtype: torch.dtype, device: torch.device, **settings: Any) -> "Adapter":
        """A published architecture with random weights and no text encoders: prompts are placeholders.

        On the meta device it has shapes only.
        """
        dtypes = {"vae": cls.vae_dtype or dtype}
        parts = {
            name: build(cls.part_class(config["_class_name"]), config, dtypes.get(name, dtype), device)
            for name, config in read_architecture(architecture)["parts"].items()
        }
        kind = cls.part_class(cls.pipeline_class)
        absent = {name: None for name in inspect.signature(kind.__init__).parameters if name.startswith(PROMPT_PARTS)}
        return cls(kind(**{**absent, **parts}), dtype=dtype, device=device, **settings)

    @classmethod
    def part_class(cls, name: str) -> type:
        """The class of a pipeline or of one of its parts; a family overrides it for what diffusers does not have."""
        return getattr(diffusers, name)

    def _check_settings(self) -> None:
        for name in ("num_frames", "distilled_guidance"):
            value = getattr(self.settings, name)
            if value is not None and name not in self.takes:
                raise ValueError(f"model.{name} = {value}: {type(self).__name__} has no such input; leave it out")
        for name, value in (("height", self.settings.height), ("width", self.settings.width)):
            if value is not None and value % self.pixels_per_token:
                raise ValueError(f"model.{name} = {value}: must be a multiple of {self.pixels_per_token}")

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipeline.transformer

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer's blocks, of which there are many alike."""
        # SD3 names them only where diffusers asks what must not be split between devices.
        names = self.transformer._repeated_blocks or self.transformer._no_split_modules
        found = [module for module in self.transformer.modules() if type(module).__name__ in names]
        if not found:
            raise ValueError(f"{type(self.transformer).__name__} names no blocks, which model.compile and fp8 work on")
        return found

    @property
    def network(self) -> torch.nn.Module:
        """The transformer that `velocity` runs: the trained one, or inside `reference` the one before training."""
        return self._frozen if self._in_reference and self._frozen is not None else self.transformer

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels that is one token of the transformer."""
        return self.pipeline.vae_scale_factor * 2

    @property
    def default_size(self) -> int:
        """Height and width in pixels, where none is asked for."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.settings.height or self.default_size, self.settings.width or self.default_size

    # What a family defines.

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """*D, the shape of one latent."""
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[str | ImagePrompt]) -> tuple:
        """Their Conditioning by the text encoders, with the image's where the model edits images."""
        raise NotImplementedError

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor:
        """v = noise - data at x (B, *D) and sigma (B,) float32, in the model's dtype."""
        raise NotImplementedError

    def placeholder(self, batch: int) -> tuple:
        """A Conditioning of random numbers, of as many tokens as a prompt may have: for measurements without weights."""
        raise NotImplementedError

    # What they share.

    @torch.no_grad()
    def encode(self, prompts: Sequence[str | ImagePrompt]) -> tuple:
        """The Conditioning of prompts; "" stands for no prompt in classifier-free guidance."""
        return self.encode_text(prompts) if self.text_encoders else self.placeholder(len(prompts))

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The Euler scheduler of the pipeline's own settings."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def sigmas(self, num_steps: int) -> Tensor:
        """The noise levels of the pipeline's own scheduler, falling from 1 to 0: (num_steps + 1,) float32."""
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    def shifted_sigmas(self, spaced: Sequence[float], tokens: int) -> Tensor:
        """`sigmas` of pipelines that shift spaced ones (num_steps,) towards noise, the more tokens an image has the more."""
        scheduler = self.scheduler()
        config = scheduler.config
        scheduler.set_timesteps(sigmas=spaced, mu=calculate_shift(
            tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        ))  # fmt: skip
        return scheduler.sigmas.cpu()

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        parts = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        return [part for part in parts if part is not None]

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """What embeddings depend on besides prompt and weights."""
        return {"max_text_tokens": self.settings.max_text_tokens}

    def release_encoders(self) -> None:
        """Take the text encoders off the GPU; `encode` still works, more slowly."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    @torch.no_grad()
    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Images (B, 3, H, W) uint8 of latents (B, *D), rounded as the pipeline's output is.

        draft: by the tiny decoder, if there is one.
        """
        decoder = self.tiny_decoder if draft and self.tiny_decoder is not None else self.pipeline.vae
        return to_pixels(decoder.decode(self.vae_latents(latents.to(decoder.dtype), decoder), return_dict=False)[0])

    def vae_latents(self, latents: Tensor, decoder: torch.nn.Module) -> Tensor:
        """Latents as the decoder reads them: unpacked, and at the scale of its own data."""
        return latents / decoder.config.scaling_factor + decoder.config.shift_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, *D) float32 of images (B, 3, H, W) uint8 of the model's size: what `decode` makes them of again."""
        vae = self.pipeline.vae
        pixels = images.to(self.device, vae.dtype) / 127.5 - 1
        video = self.vae_latents(self._full(1, 0.0), vae).dim() == 5  # an autoencoder of videos: one frame
        return self.from_vae(vae.encode(pixels[:, :, None] if video else pixels).latent_dist.mode().float())

    def from_vae(self, encoded: Tensor) -> Tensor:
        """The inverse of `vae_latents`, of whatever family: that is a reordering, then a scale and a shift each."""
        vae = self.pipeline.vae
        with torch.enable_grad():
            latents = self._full(len(encoded), 0.0).requires_grad_()
            shift = self.vae_latents(latents, vae)
            scale = (self.vae_latents(self._full(1, 1.0), vae) - shift[:1]).detach()
            # The transpose puts things back in order and scales once more.
            (found,) = torch.autograd.grad(shift, latents, (encoded - shift.detach()) / scale.square())
        return found.contiguous()

    def _full(self, batch: int, value: float) -> Tensor:
        return torch.full((batch, *self.latent_shape), value, device=self.device)

    def load_tiny_decoder(self, path: Path) -> None:
        """A distilled decoder for `decode(draft=True)`: for SD3 the one called taesd3, for FLUX taef1."""
        if not (path / "config.json").is_file():
            raise ValueError(f"model.tiny_decoder = {path}: holds no config.json, so it is no AutoencoderTiny folder")
        with quiet("diffusers", "transformers"):
            decoder = AutoencoderTiny.from_pretrained(path, torch_dtype=self.dtype, local_files_only=True)
        channels = self.pipeline.vae.config.latent_channels
        if decoder.config.latent_channels != channels:
            raise ValueError(
                f"model.tiny_decoder = {path}: reads latents of {decoder.config.latent_channels} channels, "
                f"this model's have {channels}"
            )
        self.tiny_decoder = decoder.to(self.device).eval().requires_grad_(False)

    def compile_blocks(self) -> None:
        """torch.compile each transformer block in place, for each shape by itself; they are alike, and share it."""
        # A block is compiled for each shape, with gradients and without, adapter on and off: more often than the compiler
        # allows by itself, which would go on in eager mode with a line in the log.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for block in self.blocks:
            # By itself the compiler would take the second shape for one of many, and make one program for all from there on.
            block.compile(dynamic=False)

    def prepare_drafts(self) -> None:
        """Make ready for `drafting`; after the trained weights are in place."""
        self._drafted = prepare_fp8(self.blocks)

    def drafting(self) -> AbstractContextManager[None]:
        """Inside, the transformer multiplies in 8 bits where it is frozen, see `fastgrpo.models.fp8`; else as always."""
        return drafting(self._drafted)

    def use_attention(self, name: str) -> None:
        """Which attention kernels the transformer runs on, see `fastgrpo.models.attention`."""
        # flash-attn takes no mask, diffusers hands xformers the true and false of one as scores of one and zero, and
        # cuDNN's gradient under a mask can be NaN (pytorch issue 196678).
        if name != "native" and self.masks:
            raise ValueError(f"model.attention = {name!r}: {type(self).__name__} has to mask {self.masks}; take native")
        use_attention(self.transformer, name)

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        """Put a trainable low-rank update, at first without effect, beside each target layer."""
        chosen = list(targets or self.lora_targets)
        layers = [f".{name}" for name, _ in self.transformer.named_modules()]
        for target in chosen:  # PEFT minds only if none of them is there
            if not any(layer.endswith(f".{target}") for layer in layers):
                name = type(self.transformer).__name__
                raise ValueError(f"model.lora.targets: {name} has no layer {target!r}; leave it out")
        self.transformer.add_adapter(lora_config(rank=rank, alpha=alpha, targets=chosen))

    def train_all(self, *, keep_reference: bool) -> None:
        """Make every weight of the transformer trainable; `reference` then needs the frozen copy that is kept here."""
        if keep_reference:
            self._frozen = copy.deepcopy(self.transformer)
        self.transformer.requires_grad_(True)

    @property
    def has_lora(self) -> bool:
        return hasattr(self.transformer, "peft_config")

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model before training: inside, its LoRA is off, or its frozen copy runs."""
        if self.has_lora:
            self.transformer.disable_adapters()
        elif self._frozen is None:
            raise RuntimeError("no copy of the untrained transformer was kept: see train_all")
        self._in_reference = True
        try:
            yield
        finally:
            self._in_reference = False
            if self.has_lora:
                self.transformer.enable_adapters()

    def save_trained(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write what was trained, in the diffusers format. trained: parameter name in `transformer` -> float32 value.

        A LoRA is read by `pipeline.load_lora_weights(folder)` in any script; a whole transformer, in the model's dtype, by
        its class's `from_pretrained(folder, subfolder="transformer")`.
        """
        if self.has_lora:
            self._save_lora(folder, trained)
            return
        state = self.transformer.state_dict()
        state |= {name: tensor.to(self.dtype) for name, tensor in trained.items()}
        # Not by save_pretrained, which writes the weights of the moment, whatever it is handed.
        self.transformer.save_config(folder / FULL)
        save_torch_state_dict(state, folder / FULL, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")

    def _save_lora(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        # The metadata carries alpha: without it diffusers takes alpha = rank on load, in silence. Its sets become
        # lists in a fixed order, where Python would hand over another one in each process.
        metadata = self.transformer.peft_config["default"].to_dict()
        metadata |= {key: sorted(value) for key, value in metadata.items() if isinstance(value, set)}
        type(self.pipeline).save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, state_dict=dict(trained)),
            transformer_lora_adapter_metadata=metadata,
        )

    def load_trained(self, folder: Path) -> None:
        """Read what `save_trained` wrote."""
        if not (folder / FULL).is_dir():
            self.pipeline.load_lora_weights(folder)
            return
        state: dict[str, Tensor] = {}
        for file in sorted((folder / FULL).glob("*.safetensors")):
            state |= load_file(file, device=str(self.device))
        self.transformer.load_state_dict(state)


def read_architecture(name: str) -> dict[str, Any]:
    """A published architecture: its parts' configs, and what was published about it."""
    file = ARCHITECTURES / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        raise ValueError(f"model.architecture = {name!r}: unknown; there are {known}")
    return json.loads(file.read_text())


def build(kind: Any, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """One part of a pipeline from its class and config: a scheduler, or a random network."""
    before = torch.get_default_dtype()
    if not issubclass(kind, torch.nn.Module):
        return kind.from_config(dict(config))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind.from_config(dict(config)).eval()
    finally:
        torch.set_default_dtype(before)


def to_pixels(images: Tensor) -> Tensor:
    """A decoder's output, -1 to 1, as uint8."""
    return ((images / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)


def to_tuple(sizes: Sequence[int] | int) -> tuple[int, int]:
    """(height, width) of a transformer's sample_size."""
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[1])
