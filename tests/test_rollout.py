"""The rollout against a plain loop, sample by sample, and its promises: no host, the same noise whatever the batch."""

from typing import NamedTuple

import pytest
import torch
from helpers import NoSync
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import sde
from fastgrpo.rollout import rollout, velocities, with_unconditional
from fastgrpo.trajectory import EVALUATION, TRAIN, Rollout, Steps, noise_address
from fastgrpo_kernels import INITIAL_STEP, normal

SHAPE = (2, 3, 5)  # an odd number of elements
NUM_STEPS, SIZE = 6, 2


class Toy(NamedTuple):
    offset: Tensor  # (B, 1, 1, 1)


class ToyPolicy(nn.Module):
    """A velocity that depends on everything it is given, element by element."""

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        return torch.tanh(x) * sigma.view(-1, 1, 1, 1) + conditioning.offset


def steps_of(start: Tensor, sampler: str = "flow_sde", size: int = SIZE) -> Steps:
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1)
    table = sde.window_tables(sampler, sigmas, 0.7, start, size)
    return Steps(sigmas, table, start, size, torch.zeros(NUM_STEPS))


def run(
    sample_id: Tensor, start: Tensor, conditioning: Toy, guidance_scale: float = 1.0, stream: int = TRAIN
) -> Rollout:
    return rollout(
        ToyPolicy(), steps_of(start), noise_address(stream, 5, 3, sample_id), conditioning,
        guidance_scale=guidance_scale, latent_shape=SHAPE, model_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_equals_a_plain_loop(guidance_scale: float) -> None:
    sample_id, start = torch.tensor([4, 9, 11]), torch.tensor([0, 3, 1])
    offset = torch.tensor([0.1, -0.3, 0.6]).view(-1, 1, 1, 1)
    unconditional = Toy(torch.full((1, 1, 1, 1), 0.05))
    conditioning = with_unconditional(Toy(offset), unconditional if guidance_scale != 1 else None)
    result = run(sample_id, start, conditioning, guidance_scale)

    policy, sigmas = ToyPolicy(), torch.linspace(1, 0, NUM_STEPS + 1)
    for b in range(3):
        address = noise_address(TRAIN, 5, 3, sample_id[b : b + 1])
        table = sde.window_tables("flow_sde", sigmas, 0.7, start[b : b + 1], SIZE)[0].double()
        x = normal(address, INITIAL_STEP, 30).view(1, *SHAPE).double()
        for i in range(NUM_STEPS):
            j = i - int(start[b])
            if 0 <= j <= SIZE:
                torch.testing.assert_close(result.latents[j, b], x[0].float(), rtol=1e-5, atol=1e-6)
            v = policy(x, sigmas[i : i + 1].double(), Toy(offset[b : b + 1].double()))
            if guidance_scale != 1:
                v_uncond = policy(x, sigmas[i : i + 1].double(), Toy(unconditional.offset.double()))
                v = v_uncond + guidance_scale * (v - v_uncond)
            eps = normal(address, i, 30).view(1, *SHAPE).double()
            c_x, c_v, s, _ = table[i]
            if 0 <= j < SIZE:
                torch.testing.assert_close(result.v_old[j, b], v[0].float(), rtol=1e-5, atol=1e-6)
                expected = torch.distributions.Normal(0.0, s).log_prob(s * eps).mean()
                torch.testing.assert_close(result.log_prob[j, b].double(), expected, rtol=1e-5, atol=1e-6)
            x = c_x * x + c_v * v + s * eps
        torch.testing.assert_close(result.final[b], x[0].float(), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(result.latents).all() and torch.isfinite(result.log_prob).all()


def test_same_bits_however_samples_are_batched() -> None:
    sample_id, start = torch.arange(6), torch.tensor([0, 0, 2, 2, 3, 3])
    conditioning = Toy(torch.linspace(-1, 1, 6).view(-1, 1, 1, 1))
    whole = run(sample_id, start, conditioning)
    halves = [run(sample_id[h], start[h], Toy(conditioning.offset[h])) for h in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole.latents, torch.cat([half.latents for half in halves], dim=1))
    assert torch.equal(whole.final, torch.cat([half.final for half in halves]))


def test_streams_of_noise_do_not_meet() -> None:
    sample_id, start, conditioning = torch.arange(2), torch.zeros(2, dtype=torch.int64), Toy(torch.zeros(2, 1, 1, 1))
    train = run(sample_id, start, conditioning).latents[0]
    evaluation = run(sample_id, start, conditioning, stream=EVALUATION).latents[0]
    assert (train - evaluation).abs().min() > 0


def test_no_window_is_an_ode() -> None:
    """With nothing to train the records are empty, and only the starting noise is drawn."""
    start = torch.zeros(2, dtype=torch.int64)
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1)
    table = sde.coefficient_table("ode", sigmas, 0.0).float()
    steps = Steps(sigmas, table.expand(2, -1, -1), start, 0, torch.zeros(NUM_STEPS))
    address = noise_address(EVALUATION, 0, 0, torch.arange(2))
    conditioning = Toy(torch.ones(2, 1, 1, 1))
    result = rollout(
        ToyPolicy(), steps, address, conditioning, guidance_scale=1.0, latent_shape=SHAPE, model_dtype=torch.float32
    )
    x = normal(address, INITIAL_STEP, 30).view(2, *SHAPE)
    for i in range(NUM_STEPS):
        x = x + (sigmas[i + 1] - sigmas[i]) * ToyPolicy()(x, sigmas[i].expand(2), conditioning)
    torch.testing.assert_close(result.final, x)
    assert result.v_old.shape == (0, 2, *SHAPE) and result.latents.shape == (1, 2, *SHAPE)


def test_guided_and_plain_velocities_share_one_forward() -> None:
    calls = []

    class Counting(ToyPolicy):
        def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
            calls.append(len(x))
            return super().forward(x, sigma, conditioning)

    x, sigma, conditioning = torch.randn(3, *SHAPE), torch.full((3,), 0.5), Toy(torch.randn(3, 1, 1, 1))
    v, nothing = velocities(Counting(), x, sigma, conditioning)
    guided, v_uncond = velocities(Counting(), x, sigma, with_unconditional(conditioning, Toy(torch.zeros(1, 1, 1, 1))))
    assert calls == [3, 6] and nothing is None
    assert torch.equal(v, guided) and torch.equal(v_uncond, ToyPolicy()(x, sigma, Toy(torch.zeros(3, 1, 1, 1))))


@pytest.mark.parametrize("guided", [False, True])
def test_the_loop_has_no_host(tiny_model, guided: bool) -> None:  # noqa: ANN001
    """Nothing between the first step and the last waits for the device or copies to it, the real network included."""
    from fastgrpo.generation import Embeddings
    from fastgrpo.rollout import Policy

    conditioning = Embeddings(tiny_model)(["a red circle", "two blue squares"], guidance_scale=2.0 if guided else 1.0)
    steps = steps_of(torch.tensor([0, 2]))
    address = noise_address(TRAIN, 0, 0, torch.arange(2))
    with NoSync():
        rollout(
            Policy(tiny_model), steps, address, conditioning, guidance_scale=2.0 if guided else 1.0,
            latent_shape=tiny_model.latent_shape, model_dtype=torch.float32,
        )  # fmt: skip


def operations(start: Tensor, seed: int) -> list[list[tuple]]:
    """Every operation of a rollout with the shapes it makes, step by step: what a captured graph would hold."""
    steps: list[list[tuple]] = [[]]

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, (tuple, list)) else (result,)
            steps[-1].append((function.name(), *(tuple(t.shape) for t in made if isinstance(t, Tensor))))
            return result

    policy, conditioning = ToyPolicy(), Toy(torch.randn(len(start), 1, 1, 1))
    policy.register_forward_pre_hook(lambda *_: steps.append([]))
    address, coefficients = noise_address(TRAIN, seed, 3, torch.arange(len(start))), steps_of(start)
    with Record():
        rollout(
            policy, coefficients, address, conditioning,
            guidance_scale=1.0, latent_shape=SHAPE, model_dtype=torch.float32,
        )  # fmt: skip
    return steps


def test_every_step_is_the_same_operations_whatever_the_data() -> None:
    """So one graph serves every window, prompt and noise: nothing is allocated by what the numbers are."""
    one, other = operations(torch.tensor([0, 3, 1]), seed=5), operations(torch.tensor([2, 2, 0]), seed=6)
    assert one == other and len(one) == NUM_STEPS + 1
    assert all(step == one[1] for step in one[2:-1]) and len(one[1]) > 10


def test_the_sync_detector_detects() -> None:
    with pytest.raises(AssertionError, match="host sync"), NoSync():
        torch.ones(3).sum().item()
