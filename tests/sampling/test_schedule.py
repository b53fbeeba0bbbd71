"""An iteration's steps for all groups, from configurations: what each key changes, and what it leaves as it was."""

from dataclasses import replace

import pytest
import torch
from support.schedules import SD3, schedule

from fastgrpo.config.keys import AfterWindow, ObjectiveConfig, RolloutConfig, Window
from fastgrpo.learning.objectives import weighting
from fastgrpo.records import Schedule
from fastgrpo.sampling import tables as sde
from fastgrpo.sampling.after_window import compress_schedule, dpmpp_2m
from fastgrpo.sampling.schedule import group_schedule
from fastgrpo.sampling.windows import window_starts

ROLLOUT = RolloutConfig(
    num_steps=10, groups=6, group_size=4, batch_size=8, sampler="cps", noise_level=0.8,
    window=Window(kind="progressive", size=3, every=2),
)  # fmt: skip
SIGMAS = SD3.float()


def schedule_of(iteration: int = 5, objective: ObjectiveConfig | None = None, **keys: object) -> Schedule:
    return group_schedule(replace(ROLLOUT, **keys), SIGMAS, iteration, 3, weighting(objective or ObjectiveConfig()))


def test_plain_settings_are_the_tables_of_each_group() -> None:
    window = Window(kind="random", size=3, range=(0, 7))
    steps = schedule_of(window=window)
    start = window_starts(window, 10, 5, torch.arange(6), 3)
    assert torch.equal(steps.start, start) and start.unique().numel() > 1
    assert torch.equal(steps.table, sde.window_tables(sde.sampler_steps("cps", SIGMAS, 0.8), start, 3))
    assert torch.equal(steps.sigmas, SIGMAS) and steps.size == 3
    assert torch.equal(steps.kl_weight, sde.kl_weights(sde.sampler_steps("cps", SIGMAS, 0.8), "reference").float())
    assert steps.history is None and (steps.siblings, steps.prefix) == (1, 0) and steps.forward_passes(8) == 80
    inside = steps.table[..., 2] > 0
    assert torch.equal(steps.loss_weight, inside.float())


def test_rows_of_groups_become_rows_of_samples() -> None:
    steps = schedule_of(window=Window(kind="random", size=3), after_window=AfterWindow(solver="dpmpp_2m"))
    group = torch.tensor([4, 4, 0, 5])
    rows = steps.of(group)
    for name in ("table", "start", "loss_weight", "history"):
        assert torch.equal(getattr(rows, name), getattr(steps, name)[group])
    assert rows.sigmas is steps.sigmas and rows.kl_weight is steps.kl_weight and rows.size == 3
    assert schedule_of().of(group).history is None


@pytest.mark.parametrize("name", ["tempflow", "guard"])
def test_step_weights_are_each_groups_own(name: str) -> None:
    steps = schedule_of(objective=ObjectiveConfig(step_weight=name), window=Window(kind="random", size=3))
    for row, table in zip(steps.loss_weight, steps.table, strict=True):
        expected = sde.step_weights(sde.sampler_steps("cps", SIGMAS, 0.8), table[:, 2] > 0, name).float()
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


def test_a_step_weight_left_out_is_the_objectives_own() -> None:
    for name, own in {"clip": "uniform", "dppo": "uniform", "guard": "guard"}.items():
        left_out, named = (schedule_of(objective=ObjectiveConfig(name=name, step_weight=w)) for w in (None, own))
        assert torch.equal(left_out.loss_weight, named.loss_weight)
    uniform = schedule_of(objective=ObjectiveConfig(name="guard", step_weight="uniform"))
    assert not torch.equal(left_out.loss_weight, uniform.loss_weight)


@pytest.mark.parametrize("window", [Window(kind="random", size=3, range=(0, 8)), ROLLOUT.window, Window()])
def test_second_order_after_the_window_and_only_there(window: Window) -> None:
    plain, steps = schedule_of(window=window), schedule_of(window=window, after_window=AfterWindow(solver="dpmpp_2m"))
    columns = dpmpp_2m(SIGMAS).float()
    for g, start in enumerate(steps.start.tolist()):
        end = start + steps.size
        assert torch.equal(steps.table[g, :end], plain.table[g, :end]) and (steps.history[g, :end] == 0).all()
        assert torch.equal(steps.table[g, end:, :2], columns[end:, :2]) and (steps.table[g, end:, 2:] == 0).all()
        torch.testing.assert_close(steps.history[g, end:] * columns[end:, 0], columns[end:, 2])
    assert torch.equal(steps.sigmas, plain.sigmas) and torch.equal(steps.loss_weight, plain.loss_weight)


def test_fewer_steps_after_the_window() -> None:
    """Its own transitions stay to the bit, wherever it is; as it moves on, less is left to leave out."""
    lengths = []
    for iteration in (0, 4, 8, 100):
        plain, steps = schedule_of(iteration), schedule_of(iteration, after_window=AfterWindow(compress_ratio=0.5))
        end = int(plain.start[0]) + 3
        assert torch.equal(steps.start, plain.start) and torch.equal(steps.sigmas, compress_schedule(SIGMAS, end, 0.5))
        for name in ("table", "loss_weight"):
            assert torch.equal(getattr(steps, name)[:, :end], getattr(plain, name)[:, :end])
        assert torch.equal(steps.kl_weight[:end], plain.kl_weight[:end])
        torch.testing.assert_close(steps.table[0, end:, 1].double(), steps.sigmas[end:].double().diff())
        assert steps.table.shape == (6, len(steps.sigmas) - 1, 4) and steps.kl_weight.shape == steps.table.shape[1:2]
        lengths.append(steps.table.shape[1])
    assert lengths == [7, 8, 9, 10]


def test_shared_noise_shares_what_comes_before_the_window() -> None:
    steps = schedule_of(shared_noise=True, after_window=AfterWindow(compress_ratio=0.5))
    assert steps.start.eq(2).all() and (steps.siblings, steps.prefix) == (4, 2) and len(steps.sigmas) - 1 == 8
    assert steps.forward_passes(8) == 8 * 6 + 2 * 2 and steps.forward_passes(16) == 2 * steps.forward_passes(8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"after_window": AfterWindow(compress_ratio=0.5)}, "compress_ratio 0.5 needs the same window.*window.shared=true"),
        ({"shared_noise": True}, "shared_noise needs the same window.*window.shared=true"),
    ],
)
def test_windows_of_their_own_are_refused_where_groups_go_together(keys: dict, message: str) -> None:
    window = Window(kind="random", size=3)
    with pytest.raises(ValueError, match=message):
        schedule_of(window=window, **keys)
    assert schedule_of(window=replace(window, shared=True), **keys).start.unique().numel() == 1
    assert schedule_of(window=window, after_window=AfterWindow(solver="dpmpp_2m")).start.unique().numel() > 1


def test_shared_noise_needs_whole_groups_in_a_batch() -> None:
    with pytest.raises(ValueError, match="shared_noise with batch_size 6: take a multiple of group_size 4"):
        schedule_of(shared_noise=True, batch_size=6)
    assert schedule_of(batch_size=6).prefix == 0


def test_sigmas_of_float64_are_taken_too() -> None:
    rollout = replace(ROLLOUT, after_window=AfterWindow(solver="dpmpp_2m", compress_ratio=0.4))
    steps = group_schedule(rollout, schedule(10), 0, 0, weighting(ObjectiveConfig()))
    assert steps.table.dtype == steps.history.dtype == steps.sigmas.dtype == torch.float32
