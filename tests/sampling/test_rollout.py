"""The rollout against a plain loop, sample by sample, and its promises: no host, the same noise whatever the batch."""

from collections.abc import Callable

import pytest
import torch
from support.capture import capture, equal
from support.helpers import DEVICE, NoSync
from support.toy import NUM_STEPS, SHAPE, SIZE, Toy, ToyPolicy, toy_prompts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.policy import prompted_velocity
from fastgrpo.records import EVALUATION, TRAIN, Prompted, Schedule, Trajectory, noise_address
from fastgrpo.sampling.after_window import dpmpp_2m
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import ode_schedule, window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo_kernels import INITIAL_STEP, normal

pytestmark = pytest.mark.gpu


def schedule_of(start: Tensor, sampler: str = "flow_sde", size: int = SIZE) -> Schedule:
    return window_schedule(sampler_steps(sampler, torch.linspace(1, 0, NUM_STEPS + 1), 0.7), start, size).to(DEVICE)


def offsets(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE).view(-1, 1, 1, 1)


def run(
    sample_id: Tensor, start: Tensor, prompted: Prompted, guidance_scale: float = 1.0, stream: int = TRAIN,
    policy: nn.Module | None = None, schedule: Schedule | None = None,
) -> Trajectory:  # fmt: skip
    address = noise_address(stream, 5, 3, sample_id.to(DEVICE))
    return rollout(policy or ToyPolicy(), schedule or schedule_of(start), address, prompted, guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_equals_a_plain_loop(guidance_scale: float) -> None:
    sample_id, start = torch.tensor([4, 9, 11]), torch.tensor([0, 3, 1])
    offset, unconditional = offsets(0.1, -0.3, 0.6), 0.05
    result = run(sample_id, start, toy_prompts(offset, unconditional if guidance_scale != 1 else None), guidance_scale)

    policy, sigmas = ToyPolicy(), schedule_of(start).sigmas.double()
    for b in range(3):
        address = noise_address(TRAIN, 5, 3, sample_id[b : b + 1].to(DEVICE))
        table = schedule_of(start[b : b + 1]).table[0].double()
        x = normal(address, INITIAL_STEP, 30).view(1, *SHAPE).double()
        for i in range(NUM_STEPS):
            j = i - int(start[b])
            if 0 <= j <= SIZE:
                torch.testing.assert_close(result.latents[j, b], x[0].float(), rtol=1e-5, atol=1e-6)
            v = policy(x, sigmas[i : i + 1], Toy(offset[b : b + 1].double()))
            if guidance_scale != 1:
                v_uncond = policy(x, sigmas[i : i + 1], Toy(offsets(unconditional).double()))
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
    offset = torch.linspace(-1, 1, 6, device=DEVICE).view(-1, 1, 1, 1)
    whole = run(sample_id, start, toy_prompts(offset))
    halves = [run(sample_id[h], start[h], toy_prompts(offset[h])) for h in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole.latents, torch.cat([half.latents for half in halves], dim=1))
    assert torch.equal(whole.final, torch.cat([half.final for half in halves]))


def test_streams_of_noise_do_not_meet() -> None:
    sample_id, start, prompted = torch.arange(2), torch.zeros(2, dtype=torch.int64), toy_prompts(offsets(0.0, 0.0))
    train = run(sample_id, start, prompted).latents[0]
    evaluation = run(sample_id, start, prompted, stream=EVALUATION).latents[0]
    assert (train - evaluation).abs().min() > 0


def test_no_window_is_an_ode() -> None:
    """With nothing to train the records are empty, and only the starting noise is drawn."""
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1)
    schedule, prompted = ode_schedule(sigmas, 2).to(DEVICE), toy_prompts(offsets(1.0, 1.0))
    address = noise_address(EVALUATION, 0, 0, torch.arange(2, device=DEVICE))
    result = rollout(ToyPolicy(), schedule, address, prompted, 1.0)
    x = normal(address, INITIAL_STEP, 30).view(2, *SHAPE)
    for i in range(NUM_STEPS):
        x = x + (sigmas[i + 1] - sigmas[i]) * ToyPolicy()(x, schedule.sigmas[i].expand(2), prompted.cond)
    torch.testing.assert_close(result.final, x)
    assert result.v_old.shape == (0, 2, *SHAPE) and result.latents.shape == (1, 2, *SHAPE)


def test_guided_and_plain_velocities_share_one_forward() -> None:
    calls = []

    class Counting(ToyPolicy):
        def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
            calls.append(len(x))
            return super().forward(x, sigma, conditioning)

    x, sigma, offset = torch.randn(3, *SHAPE, device=DEVICE), torch.full((3,), 0.5, device=DEVICE), offsets(0.2, -0.7, 1.1)
    v, nothing, _ = prompted_velocity(Counting(), toy_prompts(offset))(x, sigma)
    guided, v_uncond, scale = prompted_velocity(Counting(), toy_prompts(offset, 0.0), 3.0)(x, sigma)
    assert calls == [3, 6] and nothing is None and scale == 3.0
    assert torch.equal(v, guided) and torch.equal(v_uncond, ToyPolicy()(x, sigma, Toy(torch.zeros_like(offset))))


def test_a_rule_of_the_models_own_combines_the_two() -> None:
    x, sigma, prompted = (
        torch.randn(1, *SHAPE, device=DEVICE),
        torch.full((1,), 0.5, device=DEVICE),
        toy_prompts(offsets(0.2), 0.1),
    )
    plain = prompted_velocity(ToyPolicy(), prompted, 3.0)(x, sigma)
    ruled = prompted_velocity(ToyPolicy(), prompted, 3.0, lambda v, v_uncond, scale: v - scale * v_uncond)(x, sigma)
    assert torch.equal(ruled.v, plain.v - 3.0 * plain.v_uncond) and ruled.v_uncond is None


@pytest.mark.parametrize("guided", [False, True])
def test_the_loop_has_no_host(device_model, guided: bool) -> None:
    """Nothing between the first step and the last waits for the device or copies to it, the real network included."""
    from fastgrpo.data.embeddings import Embeddings
    from fastgrpo.policy import Policy

    scale = 2.0 if guided else 1.0
    prompted = Embeddings(device_model).prompted(["a red circle", "two blue squares"], scale)
    schedule = schedule_of(torch.tensor([0, 2]))
    address = noise_address(TRAIN, 0, 0, torch.arange(2, device=DEVICE))
    with NoSync():
        rollout(Policy(device_model), schedule, address, prompted, scale)


def operations(
    start: Tensor, seed: int, change: Callable[[Schedule], Schedule] = lambda schedule: schedule
) -> list[list[tuple]]:
    """Every operation of a rollout with the shapes it makes, step by step: what a captured graph would hold."""
    steps: list[list[tuple]] = [[]]

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, (tuple, list)) else (result,)
            steps[-1].append((function.name(), *(tuple(t.shape) for t in made if isinstance(t, Tensor))))
            return result

    policy, prompted = ToyPolicy(), toy_prompts(torch.randn(len(start), 1, 1, 1, device=DEVICE))
    policy.register_forward_pre_hook(lambda *_: steps.append([]))
    address, schedule = noise_address(TRAIN, seed, 3, torch.arange(len(start), device=DEVICE)), change(schedule_of(start))
    with Record():
        rollout(policy, schedule, address, prompted, 1.0)
    return steps


def test_every_step_is_the_same_operations_whatever_the_data() -> None:
    """So one graph serves every window, prompt and noise: nothing is allocated by what the numbers are."""
    one, other = operations(torch.tensor([0, 3, 1]), seed=5), operations(torch.tensor([2, 2, 0]), seed=6)
    assert one == other and len(one) == NUM_STEPS + 1
    assert all(step == one[1] for step in one[2:-1]) and len(one[1]) > 10


def test_a_memory_is_the_same_operations_at_every_step_too() -> None:
    one, other = (operations(start, 5, second_order) for start in (torch.tensor([0, 3, 1]), torch.tensor([2, 2, 0])))
    assert one == other and all(step == one[1] for step in one[2:-1])
    assert len(one[1]) > len(operations(torch.tensor([0, 3, 1]), 5)[1])


def second_order(schedule: Schedule) -> Schedule:
    """The same with DPM-Solver++(2M) after each row's window."""
    c_x, c_v, c_p = dpmpp_2m(schedule.sigmas).float().to(DEVICE).unbind(-1)
    after = torch.arange(NUM_STEPS, device=DEVICE) >= schedule.start[:, None] + schedule.size
    rows = torch.stack([c_x, c_v, torch.zeros_like(c_x), torch.zeros_like(c_x)], dim=-1)
    table = torch.where(after[..., None], rows, schedule.table)
    return schedule._replace(table=table, history=torch.where(after, c_p / c_x, 0.0))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_second_order_steps_are_the_published_ones(guidance_scale: float) -> None:
    """DPM-Solver++(2M) in its own words, lambda, h and r0, with the window's last prediction as the first memory."""
    sample_id, start = torch.tensor([4, 9, 11]), torch.tensor([0, 3, 1])
    prompted, schedule = guided_prompts(3, guidance_scale), second_order(schedule_of(start))
    plain = run(sample_id, start, prompted, guidance_scale)
    result = run(sample_id, start, prompted, guidance_scale, schedule=schedule)
    for name in ("latents", "v_old", "log_prob"):
        assert torch.equal(getattr(result, name), getattr(plain, name)), name
    assert not torch.equal(result.final, plain.final)

    sigmas = schedule.sigmas.double()
    for b in range(3):
        rows = [toy.offset[b].double() for toy in (prompted.uncond, prompted.cond) if toy is not None]

        def data(x: Tensor, i: int, rows: list[Tensor] = rows) -> Tensor:
            v = [ToyPolicy()(x, sigmas[i : i + 1], Toy(row[None])) for row in rows]
            return x - sigmas[i] * (v[0] if len(v) == 1 else v[0] + guidance_scale * (v[1] - v[0]))

        end = int(start[b]) + SIZE
        x = plain.latents[SIZE, b][None].double()
        previous = data(plain.latents[SIZE - 1, b][None].double(), end - 1)
        for i in range(end, NUM_STEPS):
            now = data(x, i)
            if i < NUM_STEPS - 1:
                lambdas = torch.log((1 - sigmas[i - 1 : i + 2]) / sigmas[i - 1 : i + 2])
                h, r0 = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
                growth = (1 - sigmas[i + 1]) * (torch.exp(-h) - 1)
                x = sigmas[i + 1] / sigmas[i] * x - growth * now - 0.5 * growth * (now - previous) / r0
            else:
                x = now
            previous = now
        torch.testing.assert_close(result.final[b], x[0].float(), rtol=1e-5, atol=1e-5)


class Counting(ToyPolicy):
    """Notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        assert len(x) == len(sigma) == len(conditioning.offset)
        self.rows += len(x)
        return super().forward(x, sigma, conditioning)


def guided_prompts(batch: int, guidance_scale: float, siblings: int = 1) -> Prompted:
    offset = torch.linspace(-0.4, 0.6, batch // siblings, device=DEVICE).repeat_interleave(siblings).view(-1, 1, 1, 1)
    return toy_prompts(offset, 0.05 if guidance_scale != 1 else None)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_shared_prefix_is_computed_once(start: int, guidance_scale: float, memory: bool) -> None:
    """What each sample would have computed by itself, in exactly fewer rows; noise inside the window is each one's own."""
    sample_id, starts = torch.arange(6, 12), torch.full((6,), start)
    prompted = guided_prompts(6, guidance_scale, siblings=3)
    schedule = second_order(schedule_of(starts)) if memory else schedule_of(starts)
    branching, once, each = schedule._replace(siblings=3, prefix=start), Counting(), Counting()
    shared = run(sample_id, starts, prompted, guidance_scale, policy=once, schedule=branching)
    whole = run(sample_id, starts, prompted, guidance_scale, policy=each, schedule=schedule._replace(siblings=3))
    for name in ("latents", "v_old", "log_prob", "final"):
        torch.testing.assert_close(getattr(shared, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    guided = 2 if guidance_scale != 1 else 1
    assert each.rows == guided * 6 * NUM_STEPS == guided * schedule.forward_passes(6)
    assert once.rows == guided * (2 * start + 6 * (NUM_STEPS - start))
    assert once.rows == guided * branching.forward_passes(6)

    own = run(sample_id, starts, prompted, guidance_scale, schedule=schedule)
    assert torch.equal(shared.log_prob, own.log_prob)  # the noise is that of the sample's own address
    first = own.latents[0, ::3].repeat_interleave(3, dim=0)
    torch.testing.assert_close(shared.latents[0], first, rtol=1e-6, atol=1e-6)
    assert not torch.equal(shared.latents[1, 0], shared.latents[1, 1])


@pytest.mark.parametrize("guided", [False, True])
def test_a_shared_prefix_and_a_memory_have_no_host_either(device_model, guided: bool) -> None:
    from fastgrpo.data.embeddings import Embeddings
    from fastgrpo.policy import Policy

    prompts, scale = ["a red circle"] * 2 + ["two blue squares"] * 2, 2.0 if guided else 1.0
    prompted = Embeddings(device_model).prompted(prompts, scale)
    address = noise_address(TRAIN, 0, 0, torch.arange(4, device=DEVICE))
    schedule = second_order(schedule_of(torch.full((4,), 2)))._replace(siblings=2, prefix=2)
    with NoSync():
        rollout(Policy(device_model), schedule, address, prompted, scale)


class Starting(ToyPolicy):
    """Begins with its prompt's offset, and as much noise as the first level says."""

    def start(self, noise: Tensor, sigma: Tensor, prompted: Prompted) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        return (1 - level) * prompted.cond.offset + level * noise


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_rollout_begins_where_its_policy_starts(guidance_scale: float, prefix: int) -> None:
    """At the schedule's first level, from the prompt's own row under guidance too, once for siblings, captured or not."""
    prompted, starts = guided_prompts(6, guidance_scale, siblings=3), torch.full((6,), prefix)
    address, captured = noise_address(TRAIN, 5, 3, torch.arange(6, 12, device=DEVICE)), CapturedRollout(capture())
    policy = Starting()
    for level in (0.75, 0.5):
        sigmas = torch.linspace(level, 0, NUM_STEPS + 1)
        schedule = window_schedule(sampler_steps("flow_sde", sigmas, 0.7), starts, SIZE).to(DEVICE)
        schedule = schedule._replace(siblings=3, prefix=prefix)
        found = rollout(policy, schedule, address, prompted, guidance_scale)
        assert equal(captured(policy, schedule, address, prompted, guidance_scale), found)
        first = address._replace(sample_id=address.sample_id[::3].repeat_interleave(3))
        noise = normal(first, INITIAL_STEP, 30).view(6, *SHAPE)
        x = (1 - level) * prompted.cond.offset + level * noise
        for i in range(prefix):
            rows = [row for row in (prompted.uncond, prompted.cond) if row is not None]
            v = [policy(x, sigmas[i].to(DEVICE).expand(6), row) for row in rows]
            x = x + (sigmas[i + 1] - sigmas[i]) * (v[0] if len(v) == 1 else v[0] + guidance_scale * (v[1] - v[0]))
        torch.testing.assert_close(found.latents[0], x, rtol=1e-5, atol=1e-6)


def test_a_batch_of_broken_groups_is_refused() -> None:
    starts = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a batch of 4 does not hold whole groups of 3 siblings"):
        run(torch.arange(4), starts, toy_prompts(offsets(*[0.0] * 4)), schedule=schedule_of(starts)._replace(siblings=3))


def test_the_sync_detector_detects() -> None:
    with pytest.raises(AssertionError, match="host sync"), NoSync():
        torch.ones(3, device=DEVICE).sum().item()
