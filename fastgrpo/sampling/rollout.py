"""The reduced-step rollout: noise, or what a model makes of it and an input, to latents, without a host in the loop.

    for each step i:   v = network(x, sigma_i)        x' = c_x[i] x + c_v[i] v + s[i] eps[i]

A multistep solver adds c_p[i] D_prev, with D_prev the data predicted at the step before. Samples that start from the same
noise are one sample until their window begins, and go through the network once.

Coefficients and noise addresses lie in device tensors, and what is trained on is written to fixed places, so nothing here
waits for the device. Evaluation is the same loop with the ODE's table and nothing to train.
"""

import math

import torch
from torch import Tensor

from fastgrpo.policy import Policy, prompted_velocity
from fastgrpo.records import Prompted, Schedule, Trajectory
from fastgrpo.sampling.schedule import prefix_schedule
from fastgrpo_kernels import INITIAL_STEP, NoiseAddress, SdeStep, normal, sde_step


@torch.no_grad()
def rollout(
    policy: Policy,
    schedule: Schedule,
    address: NoiseAddress,  # of B samples
    prompted: Prompted,
    guidance_scale: float,  # read where `prompted` is guided
) -> Trajectory:
    """Denoise B samples, keeping of the trajectory what is trained on."""
    velocity = prompted_velocity(policy, prompted, guidance_scale, policy.guide, policy.prepared)
    x = _initial_latents(policy, schedule, address, prompted, guidance_scale)
    x_model = x.to(policy.dtype)
    # Without guidance by the kernel the velocity is what the network returned, and is kept in its dtype.
    recorder = _Recorder(schedule, x, torch.float32 if prompted.guided and policy.guide is None else policy.dtype)
    data = None if schedule.history is None else torch.zeros_like(x)  # predicted at the step before
    indices = torch.arange(schedule.num_steps, device=x.device)

    for i in range(schedule.prefix, schedule.num_steps):
        asked = () if schedule.experts is None else (schedule.experts[i : i + 1],)
        v = velocity(x_model, schedule.sigmas[i].expand(len(x)), *asked)
        # c_x (x + c_p / c_x D_prev) = c_x x + c_p D_prev; exactly c_x x where c_p = 0, so in the window too.
        remembering = x if data is None or schedule.history is None else x + _column(schedule.history, i, x) * data
        step = sde_step(remembering, v, schedule.table, indices[i : i + 1], address, model_dtype=policy.dtype)
        recorder.write(i, x, step)
        if data is not None:
            data = x - schedule.sigmas[i] * step.v.to(x.dtype)
        x, x_model = step.x_next, step.x_next_model
    return recorder.trajectory(x)


class _Recorder:
    """Writes what is trained on to fixed places.

    Each sample's window starts where its group's does, so a step's place in it differs by sample; steps that are not
    trained on are written to one place past the end, which is cut off.
    """

    def __init__(self, schedule: Schedule, x: Tensor, v_dtype: torch.dtype) -> None:
        self.start, self.size = schedule.start, schedule.size
        self.rows = torch.arange(len(x), device=x.device)
        self.latents = x.new_empty(self.size + 2, *x.shape)
        self.v_old = x.new_empty(self.size + 1, *x.shape, dtype=v_dtype)
        self.log_prob = x.new_empty(self.size + 1, len(x))

    def write(self, i: int, x: Tensor, step: SdeStep) -> None:
        """Step i from x."""
        offset = i - self.start  # (B,) from the first trained step
        before = (offset >= 0) & (offset <= self.size)
        trained = (offset >= 0) & (offset < self.size)
        self.latents[torch.where(before, offset, self.size + 1), self.rows] = x
        self.v_old[torch.where(trained, offset, self.size), self.rows] = step.v
        self.log_prob[torch.where(trained, offset, self.size), self.rows] = step.log_prob

    def trajectory(self, final: Tensor) -> Trajectory:
        size = self.size
        return Trajectory(self.latents[: size + 1], self.v_old[:size], self.log_prob[:size], final)


def _column(rows: Tensor, i: int, x: Tensor) -> Tensor:
    """Column i of (B, T), shaped to multiply x."""
    return rows[:, i].view(-1, *[1] * (x.dim() - 1))


def _initial_latents(
    policy: Policy, schedule: Schedule, address: NoiseAddress, prompted: Prompted, guidance_scale: float
) -> Tensor:
    """The latents (B, *D) that the loop starts from: the policy's start, or for siblings the first one's, at the window."""
    batch, siblings = address.sample_id.numel(), schedule.siblings
    if siblings == 1:
        noise = normal(address, INITIAL_STEP, math.prod(policy.latent_shape)).view(batch, *policy.latent_shape)
        return policy.start(noise, schedule.sigmas[0].expand(batch), prompted)
    if batch % siblings:
        raise ValueError(f"a batch of {batch} does not hold whole groups of {siblings} siblings")
    first = torch.arange(0, batch, siblings, device=address.sample_id.device)
    firsts = address._replace(sample_id=address.sample_id[first])
    shared = rollout(policy, prefix_schedule(schedule, first), firsts, prompted.take(first), guidance_scale)
    return shared.final.repeat_interleave(siblings, dim=0)
