"""Every schedule of a rollout: the model's sigmas, the sampler, the window and what follows it, for every group.

sigmas -> fewer after the window -> sampler in the window, ODE outside -> second order after it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.config.keys import KLForm, LogProbWeight, RolloutConfig, StepWeight
from fastgrpo.policy import Model, expert_rule
from fastgrpo.records import Schedule
from fastgrpo.sampling.after_window import compress_schedule, dpmpp_2m
from fastgrpo.sampling.tables import (
    SamplerSteps,
    coefficient_table,
    kl_weights,
    sampler_steps,
    step_weights,
    window_tables,
)
from fastgrpo.sampling.windows import differ_by_group, trained_steps, window_size, window_starts


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How an objective of stochastic transitions weighs each step."""

    log_prob: LogProbWeight = "exact"
    kl: KLForm = "paper"
    step: StepWeight = "uniform"


def group_schedule(
    rollout: RolloutConfig,
    sigmas: Tensor,  # (rollout.num_steps + 1,)
    iteration: int,
    seed: int,
    weighting: Weighting | None,  # None: trained on are the final images, and no step
) -> Schedule:
    """The steps of each group, on the CPU, for `Schedule.of`; T differs between iterations where steps are left out."""
    if weighting is None:
        _check_no_window(rollout)
        schedule = ode_schedule(sigmas, rollout.groups)
        return _second_order(schedule) if rollout.after_window.solver == "dpmpp_2m" else schedule
    _check_window(rollout)
    start = window_starts(rollout.window, rollout.num_steps, iteration, torch.arange(rollout.groups), seed)
    size = window_size(rollout.window, rollout.num_steps)
    if rollout.after_window.compress_ratio != 1:
        sigmas = compress_schedule(sigmas, int(start[0]) + size, rollout.after_window.compress_ratio)
    steps = sampler_steps(rollout.sampler, sigmas, rollout.noise_level)
    schedule = window_schedule(steps, start, size, weighting)
    if rollout.shared_noise:
        schedule = schedule._replace(siblings=rollout.group_size, prefix=int(start[0]))
    return _second_order(schedule) if rollout.after_window.solver == "dpmpp_2m" else schedule


def window_schedule(
    steps: SamplerSteps,
    start: Tensor,  # (B,) int64, first trained step of each row
    size: int,
    weighting: Weighting | None = None,
) -> Schedule:
    """Stochastic and trained in the window, the ODE outside of it."""
    weighting = weighting or Weighting()
    trained = trained_steps(start, size, len(steps.s))
    return Schedule(
        sigmas=steps.sigmas.float(),
        table=window_tables(steps, start, size, weighting.log_prob),
        start=start,
        size=size,
        kl_weight=kl_weights(steps, weighting.kl).float(),
        loss_weight=step_weights(steps, trained, weighting.step).float(),
    )


def ode_schedule(sigmas: Tensor, rows: int) -> Schedule:
    """The ODE alone, of which no step is trained on; all rows are alike."""
    table = coefficient_table(sampler_steps("ode", sigmas, 0.0)).float()
    return Schedule(
        sigmas=sigmas,
        table=table.expand(rows, -1, -1),
        start=torch.zeros(rows, dtype=torch.int64),
        size=0,
        kl_weight=torch.zeros(len(table)),
    )


def prefix_schedule(schedule: Schedule, rows: Tensor) -> Schedule:
    """The steps of some rows (n,) before the window, which are an ODE."""
    return Schedule(
        sigmas=schedule.sigmas[: schedule.prefix + 1],
        table=schedule.table[rows, : schedule.prefix],
        start=schedule.start[rows],
        size=0,
        kl_weight=schedule.kl_weight,
        experts=None if schedule.experts is None else schedule.experts[: schedule.prefix],
    )


def with_experts(schedule: Schedule, model: Model) -> Schedule:
    """The same with the expert of each step, where the model has several, so that a rollout need not ask the device."""
    rule = expert_rule(model)
    return schedule if rule is None else schedule._replace(experts=tuple(rule(schedule.sigmas[:-1].cpu()).tolist()))


def _second_order(schedule: Schedule) -> Schedule:
    """The same with DPM-Solver++(2M) after the window."""
    c_x, c_v, c_p = dpmpp_2m(schedule.sigmas).unbind(-1)  # (T,) each
    after = torch.arange(len(c_x)) >= schedule.start[:, None] + schedule.size  # (G, T)
    table = schedule.table.clone()
    table[..., 0] = torch.where(after, c_x.float(), table[..., 0])
    table[..., 1] = torch.where(after, c_v.float(), table[..., 1])
    return schedule._replace(table=table, history=torch.where(after, c_p / c_x, 0.0).float())


def _check_no_window(rollout: RolloutConfig) -> None:
    if rollout.shared_noise or rollout.after_window.compress_ratio != 1:
        raise ValueError(
            "shared_noise and after_window.compress_ratio belong to a window, without which a group's images would all be "
            "the same: leave them out, and take fewer num_steps"
        )


def _check_window(rollout: RolloutConfig) -> None:
    """Refuses what needs one window for all groups where each has its own, and batches that break groups."""
    one_window = {
        f"after_window.compress_ratio {rollout.after_window.compress_ratio}": rollout.after_window.compress_ratio != 1,
        "shared_noise": rollout.shared_noise,
    }
    for key, wanted in one_window.items():
        if wanted and differ_by_group(rollout.window):
            raise ValueError(
                f"{key} needs the same window for all groups of an iteration, and window.kind 'random' draws one for each: "
                "take window.shared=true, or another kind"
            )
    if rollout.shared_noise and rollout.batch_size % rollout.group_size:
        raise ValueError(
            f"shared_noise with batch_size {rollout.batch_size}: take a multiple of group_size {rollout.group_size}, "
            "as a group's first steps are computed once for all of it"
        )
