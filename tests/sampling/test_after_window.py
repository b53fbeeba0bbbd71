"""DPM-Solver++(2M) against diffusers' scheduler and against the order that it promises; schedules with fewer steps."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from support.schedules import SD3, marginal, schedule, velocity
from torch import Tensor

from fastgrpo.sampling.after_window import compress_schedule, dpmpp_2m


def solve(x: Tensor, sigmas: Tensor, columns: Tensor) -> Tensor:
    previous = torch.zeros_like(x)
    for (c_x, c_v, c_p), sigma in zip(columns, sigmas[:-1], strict=True):
        v = velocity(x, sigma)
        x, previous = c_x * x + c_v * v + c_p * previous, x - sigma * v
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 21])
def test_is_the_scheduler_of_diffusers(num_steps: int, shift: float) -> None:
    """The whole trajectory, on the exact velocity of Gaussian data. The scheduler computes in float32."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double()
    start = torch.linspace(-3, 3, 31, dtype=torch.float64)
    x = start
    for i, step in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[i]), step, x).prev_sample
    torch.testing.assert_close(solve(start, sigmas, dpmpp_2m(sigmas)), x.double(), rtol=1e-5, atol=1e-5)


def error(sigmas: Tensor, columns: Tensor) -> float:
    """Against the exact map of N(0, 1) noise to Gaussian data: the flow keeps each sample's quantile."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    mean, std = marginal(sigmas[0])
    data_mean, data_std = marginal(sigmas[-1])
    exact = data_mean + data_std * x
    return (solve(mean + std * x, sigmas, columns) - exact).abs().max().item()


def test_error_is_of_second_order() -> None:
    """From sigma 0.9 to 0.1: halving the steps' length quarters the error. Euler's only halves."""
    second, first = [], []
    for num_steps in (20, 40, 80, 160):
        sigmas = torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64)
        columns = dpmpp_2m(torch.cat([sigmas, sigmas.new_zeros(1)]))[:-1]  # or its last step would be Euler's
        euler = torch.stack([torch.ones(num_steps), sigmas.diff(), torch.zeros(num_steps)], dim=-1)
        x = torch.linspace(-3, 3, 31, dtype=torch.float64)
        (mean, std), (mean_end, std_end) = marginal(sigmas[0]), marginal(sigmas[-1])
        exact = mean_end + std_end * x
        for errors, solver in ((second, columns), (first, euler)):
            errors.append((solve(mean + std * x, sigmas, solver) - exact).abs().max().item())
    orders = [torch.tensor(errors).log2().diff().neg() for errors in (second, first)]
    assert ((orders[0] - 2).abs() < 0.15).all(), orders
    assert ((orders[1] - 1).abs() < 0.15).all(), orders
    assert second[-1] < first[-1] / 50


@pytest.mark.parametrize(
    ("sigmas", "gain"), [(schedule(8), 10), (schedule(8, 3.0), 1.5), (SD3, 1.5)], ids=["even", "shifted", "SD3.5"]
)
def test_is_nearer_than_eulers_on_whole_schedules(sigmas: Tensor, gain: float) -> None:
    """SD3.5's own, too, whose last step but one is so long in lambda that a memory not cut would double Euler's error."""
    euler = torch.stack([torch.ones(len(sigmas) - 1), sigmas.diff(), torch.zeros(len(sigmas) - 1)], dim=-1)
    assert error(sigmas, dpmpp_2m(sigmas)) < error(sigmas, euler) / gain


def test_how_far_a_memory_reaches() -> None:
    """q = -c_p / (1 - r): below 0.86 on evenly spaced schedules whatever their shift, and cut at 1."""
    for sigmas in (schedule(3), schedule(10, 3.0), schedule(400, 0.5), schedule(50, 7.0)):
        q = -dpmpp_2m(sigmas)[:-1, 2] / (1 - sigmas[1:-1] / sigmas[:-2])
        assert q.max() < 0.86
    columns = dpmpp_2m(SD3)
    torch.testing.assert_close(columns[8, 2], SD3[9] / SD3[8] - 1)
    torch.testing.assert_close(columns[8, 0], 2 - SD3[9] / SD3[8])


@pytest.mark.parametrize("sigmas", [SD3, schedule(10, 3.0), schedule(2), schedule(1)], ids=len)
def test_first_second_and_last_step(sigmas: Tensor) -> None:
    """Euler's where nothing is remembered, where what is remembered was at sigma = 1, and where lambda is infinite."""
    columns = dpmpp_2m(sigmas.float())
    assert columns.isfinite().all() and columns.dtype == torch.float64
    for i in {0, min(1, len(columns) - 1), len(columns) - 1}:
        expected = torch.tensor([1.0, sigmas[i + 1] - sigmas[i], 0.0], dtype=torch.float64)
        torch.testing.assert_close(columns[i], expected, rtol=1e-6, atol=1e-6)
    assert (columns[2:-1, 2] < 0).all()


def test_compressed_schedules() -> None:
    sigmas = schedule(25, 3.0).float()
    assert torch.equal(compress_schedule(sigmas, 4, 1.0), sigmas)
    # Published: 25 steps, a fixed window of 4, ratio 0.2: 8 network evaluations.
    flash = compress_schedule(sigmas, 4, 0.2)
    assert len(flash) - 1 == 8 and torch.equal(flash[:5], sigmas[:5]) and flash[-1] == 0
    # Where the steps can be left out whole, the others are the schedule's own.
    assert torch.equal(compress_schedule(sigmas, 5, 0.25), torch.cat([sigmas[:5], sigmas[5::4]]))
    for end in range(1, 25):
        for ratio in (0.01, 0.3, 0.77):
            found = compress_schedule(sigmas, end, ratio)
            assert len(found) - 1 == end + max(1, math.floor(ratio * (25 - end) + 0.5))
            assert (found.diff() < 0).all() and torch.equal(found[: end + 1], sigmas[: end + 1]) and found[-1] == 0


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_bad_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"after_window\.compress_ratio .* at most 1"):
        compress_schedule(SD3, 3, ratio)
