"""The ODE steps after the window: fewer of them, and of second order (MixGRPO-Flash, arXiv 2507.21802).

Nothing is trained there, so any solver will do. DPM-Solver++(2M), midpoint (2211.01095), in rectified flow, where
D = x - sigma v is the predicted data and lambda = log((1 - sigma) / sigma), is affine like every other step:

    x' = r x + (1 - r) [D + q (D - D_prev)]            r = sigma_next / sigma,  q = h / (2 h_prev),  h = diff of lambda
       = c_x x + c_v v + c_p D_prev

D_prev is of the step before; at the first step after the window it is the window's last, as in the released code. With
q = 0 the step is Euler's: so are the last one, where h is infinite, and one whose D_prev was at sigma = 1.

q is cut at 1. Evenly spaced schedules stay below 0.86 whatever their shift, but SD3.5's ends 0.28, 0.009, 0 with a q of 2.3:
extrapolated that far, its error at 10 steps is twice Euler's on Gaussian data, and cut half of it. So is the first step
after the window where many steps were left out.
"""

import torch
from torch import Tensor


def compress_schedule(sigmas: Tensor, end: int, ratio: float) -> Tensor:
    """The schedule up to step `end`, then its rest in fewer steps, evenly spaced on the schedule's own curve."""
    if not 0 < ratio <= 1:
        raise ValueError(f"after_window.compress_ratio {ratio} must be above 0 and at most 1, which takes every step")
    last = sigmas.numel() - 1
    steps = max(1, int(ratio * (last - end) + 0.5))
    position = torch.linspace(end, last, steps + 1, dtype=torch.float64)
    left = position.long().clamp(max=last - 1)
    rest = torch.lerp(sigmas[left].double(), sigmas[left + 1].double(), position - left).to(sigmas)
    return torch.cat([sigmas[:end], rest])


def dpmpp_2m(sigmas: Tensor) -> Tensor:
    """Columns c_x, c_v and c_p of each step, (T + 1,) -> (T, 3) float64; the first step has no D_prev."""
    sigmas = sigmas.detach().to("cpu", torch.float64)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    h = torch.log((1 - sigmas) / sigmas).diff()
    q = torch.zeros_like(sigma)
    q[1:-1] = (h[1:-1] / (2 * h[:-2])).clamp(max=1.0)
    r = sigma_next / sigma
    return torch.stack([1 + (1 - r) * q, -(1 - r) * (1 + q) * sigma, -(1 - r) * q], dim=-1)
