"""Schedules, and data whose marginals are known."""

import torch


def schedule(num_steps, shift=1.0, last=0.0):
    """Sigmas (T + 1,): uniform from 1 to `last`, shifted as SD3 does, then 0 at the end."""
    t = torch.linspace(1, last, num_steps + (last == 0), dtype=torch.float64)
    sigmas = shift * t / (1 + (shift - 1) * t)
    return sigmas if last == 0 else torch.cat([sigmas, sigmas.new_zeros(1)])


# diffusers' FlowMatchEulerDiscreteScheduler for SD3.5: 1000 training steps, their shifted ends as the range.
SD3 = schedule(10, shift=3.0, last=3 * 0.001 / (1 + 2 * 0.001))


MU, SPREAD = 0.6, 0.8  # of the data, N(MU, SPREAD^2)


def velocity(x, sigma, mu=MU, spread=SPREAD):
    """E[x1 - x0 | x_t = x] for x_t = (1 - t) x0 + t x1, x0 ~ N(mu, spread^2), x1 ~ N(0, 1), t = sigma."""
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    return -mu + (sigma - (1 - sigma) * spread**2) / variance * (x - (1 - sigma) * mu)


def marginal(sigma, mu=MU, spread=SPREAD):
    return (1 - sigma) * mu, ((1 - sigma) ** 2 * spread**2 + sigma**2).sqrt()
