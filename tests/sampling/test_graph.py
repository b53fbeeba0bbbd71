"""Captured rollouts. Without a GPU the bookkeeping is tested with a stand-in that runs again what it recorded, in place."""

import pytest
import torch
from support.capture import Rerun, capture, equal
from support.helpers import DEVICE, needs_gpu
from support.toy import NUM_STEPS, SIZE, Toy, ToyPolicy, toy_prompts
from torch import Tensor, nn

from fastgrpo.records import TRAIN, Prompted, Schedule, noise_address
from fastgrpo.sampling.graph import CapturedRollout, captured_or_eager
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo_kernels import NoiseAddress

pytestmark = pytest.mark.gpu


class Weighted(ToyPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device=DEVICE))

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        return self.weight * super().forward(x, sigma, conditioning)


def arguments(
    batch: int = 3, iteration: int = 1, offset: float = 0.3, guidance_scale: float = 1.0
) -> tuple[Schedule, NoiseAddress, Prompted, float]:
    """A rollout's arguments of the same shapes for any iteration: windows, noise and prompts of its own."""
    start = torch.arange(batch) % (NUM_STEPS - SIZE - 1) + iteration % 2
    schedule = window_schedule(sampler_steps("flow_sde", torch.linspace(1, 0, NUM_STEPS + 1), 0.7), start, SIZE).to(DEVICE)
    address = noise_address(TRAIN, 5, iteration, torch.arange(batch, device=DEVICE) + 10 * iteration)
    offsets = torch.linspace(-offset, offset, batch).view(-1, 1, 1, 1).to(DEVICE)
    return schedule, address, toy_prompts(offsets, 0.0 if guidance_scale != 1 else None), guidance_scale


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_every_replay_is_the_eager_rollout_of_its_own_arguments(guidance_scale: float) -> None:
    """New noise, windows and prompts each time, the weights updated in place in between; earlier results stay."""
    policy, captured = Weighted(), CapturedRollout(capture())
    found, expected = [], []
    for iteration in range(4):
        positional = arguments(iteration=iteration, offset=0.1 + iteration, guidance_scale=guidance_scale)
        found.append(captured(policy, *positional))
        expected.append(rollout(policy, *positional))
        with torch.no_grad():
            policy.weight.mul_(0.9)
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(equal(found[0], other) for other in found[1:])


def test_one_capture_a_shape() -> None:
    recorder, policy = Rerun(), Weighted()
    captured = CapturedRollout(recorder)
    for batch, guidance_scale in ((3, 1.0), (3, 1.0), (2, 1.0), (3, 2.0), (2, 1.0), (3, 1.0)):
        positional = arguments(batch, guidance_scale=guidance_scale)
        captured(policy, *positional)
    assert (recorder.captures, recorder.replays) == (3, 6)
    captured(Weighted(), *positional)  # another policy has weights at other places
    assert recorder.captures == 4


def test_every_schedule_of_steps_has_a_graph_of_its_own() -> None:
    """A window that moves changes where siblings branch and, where steps are left out, how many there are."""
    captured, policy = CapturedRollout(recorder := capture()), Weighted()
    schedule, address, prompted, scale = arguments(batch=4)
    plain = schedule._replace(start=torch.full_like(schedule.start, 2))
    memory = torch.rand(4, NUM_STEPS, device=DEVICE)
    schedules = [
        plain, plain._replace(siblings=2), plain._replace(siblings=2, prefix=2), plain._replace(siblings=4, prefix=2),
        plain._replace(history=memory), plain._replace(history=memory, siblings=2, prefix=2),
        plain._replace(loss_weight=None),  # the loop does not read it, but places are of all tensors
        plain._replace(sigmas=plain.sigmas[1:], table=plain.table[:, 1:], kl_weight=plain.kl_weight[1:]),
    ]  # fmt: skip
    for again in (False, True):
        for schedule in schedules:
            if again and schedule.history is not None:
                schedule = schedule._replace(history=memory / 2)
            found = captured(policy, schedule, address, prompted, scale)
            assert equal(found, rollout(policy, schedule, address, prompted, scale))
        assert len(captured.graphs) == len(schedules)
    if isinstance(recorder, Rerun):
        assert (recorder.captures, recorder.replays) == (len(schedules), 2 * len(schedules))


def test_a_table_shared_by_all_samples_is_captured_too() -> None:
    """Expanded rows have stride 0, into which nothing can be copied."""
    schedule, address, prompted, scale = arguments()
    schedule = schedule._replace(table=schedule.table[:1].expand(3, -1, -1))
    found = CapturedRollout(capture())(ToyPolicy(), schedule, address, prompted, scale)
    assert equal(found, rollout(ToyPolicy(), schedule, address, prompted, scale))


def test_what_runs_is_said() -> None:
    assert captured_or_eager(False, torch.device("cpu")) == (rollout, "eager (rollout.cuda_graph is false)")
    function, kind = captured_or_eager(True, torch.device("cpu"))
    assert function is rollout and "need a GPU" in kind


@needs_gpu
def test_on_a_gpu_it_is_a_graph() -> None:
    function, kind = captured_or_eager(True, torch.device("cuda"))
    assert isinstance(function, CapturedRollout) and kind.startswith("captured")
