"""The forward process: samples noised again, to train on by matching velocities. Only what a rollout ends with is kept.

    x_t = (1 - t) x0 + t eps        v* = eps - x0        t a noise level of the rollout's schedule

What DiffusionNFT (arXiv 2509.16117), AWM (2509.25050), Diffusion-DPO (2311.12908) and fine-tuning on data train on. As a
row of the table it is c_x = 0, c_v = 1 with v* in the place of x': the residual is then e = v* - v_old, and

    mean((v - v*)^2) = mean(e e) - 2 m1 + m2

so that objectives are functions of the same moments as those of a denoising transition. B samples, S noise levels each.
"""

import math

import torch
from torch import Tensor

from fastgrpo.learning.objectives import Moments, TargetMoments
from fastgrpo.records import Experience, Prompted, numpy_generator
from fastgrpo_kernels import NoiseAddress, normal


@torch.no_grad()
def target_moments(moments: Moments, target: Tensor, v: Tensor, v_old: Tensor, mix: float) -> TargetMoments:
    """The moments of a transition, and what the distance to the target needs besides.

    v, v_old, target: (B, *D), guided. mix: how far NFT's implicit policies lie from the old one.
    """
    e, d = (target - v_old).flatten(1), (v.float() - v_old).flatten(1)
    return TargetMoments(
        m1=moments.m1,
        m2=moments.m2,
        m3=moments.m3,
        m0=e.square().mean(1),
        abs_plus=(e - mix * d).abs().mean(1),
        abs_minus=(e + mix * d).abs().mean(1),
    )


def noise_levels(samples: int, size: int, choices: range, iteration: int, seed: int) -> Tensor:
    """For every sample of an iteration `size` different steps of the schedule, (N, S) int64: the same on every rank."""
    if not 1 <= size <= len(choices):
        raise ValueError(f"forward.num_timesteps {size}: there are {len(choices)} noise levels in forward.range")
    drawn = numpy_generator(seed, iteration).random((samples, len(choices))).argsort(axis=1)[:, :size]
    return torch.from_numpy(choices.start + drawn)


def add_noise(
    x0: Tensor,  # (B, *D) float32
    sigma: Tensor,  # (B, S) float32
    address: NoiseAddress,  # of each sample's noise
    prompted: Prompted,
    advantages: Tensor,  # (B,)
    weight: Tensor,  # (B,)
) -> Experience:
    """A batch of samples at S noise levels each, to learn from; v_old is 0 until `recompute_old` has made it."""
    shape = x0.shape
    noise = torch.stack([normal(address, s, math.prod(shape[1:])).view(shape) for s in range(sigma.shape[1])])
    sigma = sigma.T.contiguous()  # (S, B)
    t = sigma.view(*sigma.shape, *[1] * (x0.dim() - 1))
    ones = torch.ones_like(sigma)
    return Experience(
        x=(1 - t) * x0 + t * noise,
        x_next=noise - x0,
        v_old=torch.zeros_like(noise),
        sigma=sigma,
        coefficients=torch.stack([torch.zeros_like(sigma), ones, sigma, ones], dim=-1),
        kl_weight=ones,
        loss_weight=ones,
        prompted=prompted,
        advantages=advantages,
        weight=weight,
    )
