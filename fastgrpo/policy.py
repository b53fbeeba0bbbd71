"""A model as a policy: what an engine wraps, a rollout samples from, and an update trains.

v = network(x, sigma, conditioning)          under guidance one pass over both conditionings of each sample

A model may have several experts, each for a part of the noise levels. Then a network takes a fourth argument: the numbers of
those that the batch asks for, known on the host. Without it the model looks at sigma, and its device is waited for.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgrpo.config.schema import ConfigError
from fastgrpo.config.sizes import Size
from fastgrpo.records import Prompted
from fastgrpo_kernels import Guided

EXPERTS = ("high", "low")  # of the noise that each is for, by the number of the expert
# (x (B, *D) in the model's dtype, sigma (B,) float32, conditioning, and where it has several its experts) -> v (B, *D)
Network = Callable[..., Tensor]
# (noise (B, *D), sigma (B,) float32, conditioning) -> x (B, *D), all latents float32
Start = Callable[[Tensor, Tensor, Any], Tensor]
# (v, v_uncond, scale) -> v: guidance that is more than v_uncond + scale (v - v_uncond)
GuidanceRule = Callable[[Tensor, Tensor, float], Tensor]


class Model(Protocol):
    """An image or video model as sampling and training see it.

    Every `fastgrpo.models.adapter.Adapter` is one, and so is any object of your own that has these members. A conditioning
    is a NamedTuple of tensors with the batch first: what the transformer reads of a prompt.
    B samples, *D the shape of a latent, (H, W) the size of an image, T frames of a video.
    """

    @property
    def transformer(self) -> nn.Module:
        """The network that makes velocities. Its trainable parameters are the ones that a run trains."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which `velocity` takes x and returns v."""

    @property
    def device(self) -> torch.device:
        """Where the transformer is and where `velocity` takes its arguments."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """*D, the shape of one latent."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), the size of an image in pixels."""

    @property
    def image_conditioned(self) -> bool:
        """Whether prompts are `fastgrpo.data.prompts.ImagePrompt`, a text about input images, instead of str."""

    @property
    def Conditioning(self) -> Any:
        """The class of conditionings, called with a tensor for each of its fields."""

    def encode(self, prompts: Sequence[Any]) -> Any:
        """The conditioning of B prompts. The prompt "" stands for no prompt in classifier-free guidance."""

    @property
    def encoders(self) -> Sequence[nn.Module]:
        """The networks that a conditioning is made by; a cache of conditionings is valid for their weights alone."""

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """The settings that a conditioning depends on, besides the prompt and the weights of `encoders`."""

    def release_encoders(self) -> None:
        """Make room on the device: all prompts have been encoded. `encode` may be slow from here on."""

    def sigmas(self, num_steps: int) -> Tensor:
        """The noise levels of a schedule of so many steps, falling to 0: (num_steps + 1,) float32 on the CPU.

        They begin at 1, or lower where the model has a `start`, see `Policy.start`.
        """

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """v = noise - data at x (B, *D) in `dtype` and sigma (B,) float32, in x's shape and dtype."""

    @property
    def guide(self) -> GuidanceRule | None:
        """The model's own rule of guidance; None if that is v_uncond + scale (v - v_uncond)."""

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        """Images (B, 3, H, W) or videos (B, T, 3, H, W) uint8 of latents (B, *D). draft: faster and rougher, if possible."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, *D) float32 of images (B, 3, H, W) uint8, for training on images that are there already."""

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        """Add a trainable LoRA to the transformer, which has no effect at first. targets: layers; None: the usual ones."""

    def continue_lora(self, path: Path, *, rank: int, alpha: int, reference: str) -> None:
        """Train the LoRA at a path further, for model.lora.path. reference: "base" or "start", what `reference` is then."""

    def train_all(self, *, keep_reference: bool) -> None:
        """Make every weight of the transformer trainable. keep_reference: `reference` will be asked for."""

    @property
    def has_lora(self) -> bool:
        """Whether a LoRA is trained, so that `reference` costs no memory."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `velocity` is that of the model before training, or without the LoRA that training went on from."""

    def save_trained(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write trained weights. trained: parameter name in `transformer` -> float32 value."""

    def load_trained(self, folder: Path) -> None:
        """Read the weights that `save_trained` wrote."""

    def use_attention(self, name: str) -> None:
        """Run on the attention kernels that model.attention names; called with "native" too, which changes nothing."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that `compile` compiles."""

    def compile(self) -> None:
        """torch.compile what takes time, the blocks above all, in place, for model.compile."""

    def load_tiny_decoder(self, path: Path) -> None:
        """Load the decoder that `decode(draft=True)` uses, for model.tiny_decoder."""

    def prepare_drafts(self) -> None:
        """Make ready for `drafting`, once the trained weights are in place, for rollout.precision=fp8."""

    def drafting(self) -> AbstractContextManager[None]:
        """Inside, `velocity` may be rougher and faster if `prepare_drafts` was called. Entered for every rollout."""


# Members that a model may have besides, each with what holds of an object without it: as they are in
# `fastgrpo.models.adapter.Adapter`.
OPTIONAL: dict[str, Any] = {
    "takes": frozenset(),  # which settings of `fastgrpo.models.settings` it has a use for: one with num_frames makes videos
    "input_images": range(1, 2),  # how many images a prompt may have, if `image_conditioned`
    "empty_is_no_prompt": False,  # whether "" cannot be drawn, as it stands for a context without a prompt
    "other_length": "",  # what a run says once where the length of the text is not the stock pipeline's
    "check_guidance": None,  # (key, scale): refuses a scale of guidance that the model was not made for, by ValueError
    "read_in_part": None,  # (prompts) -> those of them that are cut, each with the part of its text that is read
    "sized": None,  # (size): see `sized`
    "prepared": None,  # (conditioning): see `Policy.prepared`
    "start": None,  # (noise, sigma, conditioning): see `Policy.start`
}


def optional(model: Any, name: str) -> Any:
    """A member of `OPTIONAL` of a model or of its family."""
    return getattr(model, name, OPTIONAL[name])


class Policy(nn.Module):
    """A model's network as a module, with what a rollout needs to know of it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.velocity = lambda *args: model.velocity(*args)  # as it is at the time: `compile` replaces it
        self._prepared = lambda: optional(model, "prepared")
        self._shapes = lambda: (model.latent_shape, model.size)  # as they are at the time too
        self.dtype: torch.dtype = model.dtype  # of what the network reads
        self.guide: GuidanceRule | None = model.guide  # the model's own guidance, where it has one
        self._start: Start | None = optional(model, "start")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """*D, the shape of one latent."""
        return self._shapes()[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), the size of an image in pixels; latents of one shape may be of several."""
        return self._shapes()[1]

    def prepared(self, conditioning: Any) -> Any:
        """What `forward` may read in place of a conditioning (B, ...) as long as the weights do not change.

        It gives the same velocities to the last bit, and holds what no step changes, so that this is made once a rollout.
        Of a model without a method `prepared` it is the conditioning itself.
        """
        prepared = self._prepared()
        return conditioning if prepared is None else prepared(conditioning)

    def start(self, noise: Tensor, sigma: Tensor, prompted: Prompted) -> Tensor:
        """What a rollout begins with, (B, *D) float32, at its first noise level sigma (B,).

        It is the noise, unless the model has a method `start(noise, sigma, conditioning)`, as one has that begins with a
        noised input. `conditioning` is that of the prompts, also under guidance. It is captured: no host may be waited for.
        """
        return noise if self._start is None else self._start(noise, sigma, prompted.cond)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: tuple, experts: tuple[int, ...] | None = None) -> Tensor:
        """The velocity v = noise - data at x (B, *D) and sigma (B,)."""
        if experts is None:
            return self.velocity(x, sigma, conditioning)
        transformer: Any = self.transformer
        with transformer.asking(experts):
            return self.velocity(x, sigma, conditioning)


def expert_rule(model: Model) -> Callable[[Tensor], Tensor] | None:
    """What says which expert makes the velocity at sigma (*), as its number, int64; None where the model is one network."""
    return getattr(model.transformer, "expert_of", None)


def sized(model: Model, size: Size) -> AbstractContextManager[None]:
    """Inside, the model's images are of a size, as far as it says one. ValueError: the model makes none of that size.

    An object of your own needs the method `sized(size)`, such a context, only where a run has other sizes than its own.
    """
    resizable: Any = model
    return resizable.sized(size) if size.given else nullcontext()


def check_sizes(model: Model, sizes: Mapping[str, Size]) -> None:
    """Refuse sizes that the model cannot make: ConfigError. sizes: each by the key that asks for it."""
    for key, size in sizes.items():
        if optional(model, "sized") is None:
            raise ConfigError(
                f"{key} = {size}: {type(model).__name__} has no method `sized`, see fastgrpo.policy.sized, so all its "
                "images have its own size; leave the key out, or give it that method"
            )
        try:
            with sized(model, size):
                pass
        except ValueError as error:
            raise ConfigError(f"{key} = {size}, in place of the model's own size: {error}") from None


def prompted_velocity(
    network: Network,
    prompted: Prompted,
    guidance_scale: float = 1.0,
    guide: GuidanceRule | None = None,
    prepared: Callable[[Any], Any] | None = None,
) -> Callable[..., Guided]:
    """The network under these prompts, a function of x (B, *D), sigma (B,) and the experts, where the model has several.

    It returns the velocity with and without the prompt.

    The kernels combine the two. By a rule of the model's own, `guide`, they are combined here, and there is one.
    prepared: `Policy.prepared`, for a function that is called several times with the same weights.
    """
    asked = prompted.asked if prepared is None else prepared(prompted.asked)
    if not prompted.guided:
        return lambda x, sigma, *experts: Guided(network(x, sigma, asked, *experts))

    def velocity(x: Tensor, sigma: Tensor, *experts: tuple[int, ...]) -> Guided:
        v_uncond, v = network(torch.cat([x, x]), torch.cat([sigma, sigma]), asked, *experts).chunk(2)
        return Guided(v, v_uncond, guidance_scale) if guide is None else Guided(guide(v, v_uncond, guidance_scale))

    return velocity
