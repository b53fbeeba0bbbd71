"""`fastgrpo.policy.Model`: the family adapters have all of it, and an object of one's own with these members is a model."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.policy import Model, Policy
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.sampling.generate import generate
from fastgrpo_kernels import INITIAL_STEP, normal


class Rates(NamedTuple):
    rate: Tensor  # (B, 1)


class Decay:
    """Velocity rate * x, so that Euler steps multiply by 1 + rate * dt. It derives from nothing and has no `pipeline`."""

    dtype, device, latent_shape, size = torch.float32, torch.device("cpu"), (6,), (1, 6)
    image_conditioned, guide, Conditioning, encoder_settings = False, None, Rates, {}

    def __init__(self) -> None:
        self.transformer, self.encoders, self.encoded = nn.Linear(1, 1), [nn.Linear(1, 1)], 0

    def encode(self, prompts: list[str]) -> Rates:
        self.encoded += 1
        return Rates(torch.tensor([[float(len(prompt))] for prompt in prompts]))

    def sigmas(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Rates) -> Tensor:
        return conditioning.rate * x

    def decode(self, latents: Tensor, *, draft: bool = False) -> Tensor:
        return (latents * 100 + 128).clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 6).expand(-1, 3, -1, -1)


def test_a_family_adapter_has_every_member(tiny_model) -> None:
    members = [name for name in vars(Model) if not name.startswith("_")]
    assert len(members) > 20 and not [name for name in members if not hasattr(tiny_model, name)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_object_of_ones_own_is_sampled_from(scale: float, tmp_path: Path) -> None:
    """Guided, the rate is scale times the prompt's, as the empty prompt's is 0. The embeddings on disk are read back."""
    prompts, number = ["a", "bcd"], torch.arange(2)
    model = Decay()
    for _ in range(2):
        prompted = Embeddings(model, tmp_path).prompted(prompts, scale)
        address = noise_address(SAMPLE, 0, 0, number)
        found = generate(model, Policy(model), prompted, address, num_steps=4, guidance_scale=scale)
    assert model.encoded == (2 if scale == 1 else 3)
    noise = normal(noise_address(SAMPLE, 0, 0, number), INITIAL_STEP, 6).view(2, 6).double()
    shrunk = noise * (1 - scale * torch.tensor([[1.0], [3.0]]) / 4) ** 4
    expected = (shrunk * 100 + 128).clamp(0, 255)
    assert found.shape == (2, 3, 1, 6) and (found[:, 0, 0].double() - expected).abs().max() <= 1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_object_of_ones_own_may_say_what_its_images_begin_with(scale: float) -> None:
    """Of its prompt, with guidance too, and at a first noise level below 1."""

    class Started(Decay):
        def sigmas(self, num_steps: int) -> Tensor:
            return super().sigmas(num_steps) / 2

        def start(self, noise: Tensor, sigma: Tensor, conditioning: Rates) -> Tensor:
            return conditioning.rate / 4 + sigma[:, None] * noise

    model, address = Started(), noise_address(SAMPLE, 0, 0, torch.arange(2))
    prompted = Embeddings(model).prompted(["a", "bcd"], scale)
    found = generate(model, Policy(model), prompted, address, num_steps=4, guidance_scale=scale)
    rates = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    x = rates / 4 + normal(address, INITIAL_STEP, 6).view(2, 6).double() / 2
    expected = (x * (1 - scale * rates / 8) ** 4 * 100 + 128).clamp(0, 255)
    assert (found[:, 0, 0].double() - expected).abs().max() <= 1
