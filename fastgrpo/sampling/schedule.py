"""An iteration's rollout as tables: the model's sigmas, the sampler, the window and what follows it, for every group.

sigmas -> fewer after the window -> sampler in the window, ODE outside -> second order after it
"""

import torch
from torch import Tensor

from fastgrpo.config.keys import ObjectiveConfig, RolloutConfig
from fastgrpo.learning.objectives import OBJECTIVES
from fastgrpo.records import Steps
from fastgrpo.sampling import tables as sde
from fastgrpo.sampling.after_window import compressed, dpmpp_2m
from fastgrpo.sampling.windows import differ_by_group, trained_steps, window_size, window_starts


def group_steps(
    rollout: RolloutConfig,
    objective: ObjectiveConfig,
    sigmas: Tensor,  # (rollout.num_steps + 1,)
    iteration: int,
    seed: int,
) -> Steps:
    """The steps of each group, on the CPU, for `Steps.of`; T differs between iterations where steps are left out."""
    if OBJECTIVES[objective.name].forward:
        return _without_window(rollout, sigmas)
    _check(rollout)
    groups = torch.arange(rollout.groups)
    start = window_starts(rollout.window, rollout.num_steps, iteration, groups, seed)
    size = window_size(rollout.window, rollout.num_steps)
    if rollout.after_window.compress_ratio != 1:
        sigmas = compressed(sigmas, int(start[0]) + size, rollout.after_window.compress_ratio)
    sampler, noise_level = rollout.sampler, rollout.noise_level
    step_weight = objective.step_weight or OBJECTIVES[objective.name].step_weight
    trained = trained_steps(start, size, sigmas.numel() - 1)
    steps = Steps(
        sigmas=sigmas,
        table=sde.window_tables(sampler, sigmas, noise_level, start, size, objective.log_prob_weight),
        start=start,
        size=size,
        kl_weight=sde.kl_weights(sampler, sigmas, noise_level, objective.kl).float(),
        loss_weight=sde.step_weights(step_weight, sampler, sigmas, noise_level, trained).float(),
        siblings=rollout.group_size if rollout.shared_noise else 1,
        prefix=int(start[0]) if rollout.shared_noise else 0,
    )
    return _second_order(steps) if rollout.after_window.solver == "dpmpp_2m" else steps


def _without_window(rollout: RolloutConfig, sigmas: Tensor) -> Steps:
    """The ODE alone, of which only the end is trained on."""
    if rollout.shared_noise or rollout.after_window.compress_ratio != 1:
        raise ValueError(
            "shared_noise and after_window.compress_ratio belong to a window, without which a group's images would all be "
            "the same: leave them out, and take fewer num_steps"
        )
    table = sde.coefficient_table("ode", sigmas, 0.0).float()
    steps = Steps(
        sigmas=sigmas,
        table=table.expand(rollout.groups, -1, -1),
        start=torch.zeros(rollout.groups, dtype=torch.int64),
        size=0,
        kl_weight=torch.zeros(len(table)),
    )
    return _second_order(steps) if rollout.after_window.solver == "dpmpp_2m" else steps


def _second_order(steps: Steps) -> Steps:
    """The same with DPM-Solver++(2M) after the window."""
    c_x, c_v, c_p = dpmpp_2m(steps.sigmas).unbind(-1)  # (T,) each
    after = torch.arange(len(c_x)) >= steps.start[:, None] + steps.size  # (G, T)
    table = steps.table.clone()
    table[..., 0] = torch.where(after, c_x.float(), table[..., 0])
    table[..., 1] = torch.where(after, c_v.float(), table[..., 1])
    return steps._replace(table=table, history=torch.where(after, c_p / c_x, 0.0).float())


def _check(rollout: RolloutConfig) -> None:
    """What needs one window for all groups, and whole groups in a batch."""
    one_window = {
        f"after_window.compress_ratio {rollout.after_window.compress_ratio}": rollout.after_window.compress_ratio != 1,
        "shared_noise": rollout.shared_noise,
    }
    for key, asked in one_window.items():
        if asked and differ_by_group(rollout.window):
            raise ValueError(
                f"{key} needs the same window for all groups of an iteration, and window.kind 'random' draws one for each: "
                "take window.shared=true, or another kind"
            )
    if rollout.shared_noise and rollout.batch_size % rollout.group_size:
        raise ValueError(
            f"shared_noise with batch_size {rollout.batch_size}: take a multiple of group_size {rollout.group_size}, "
            "as a group's first steps are computed once for all of it"
        )
