"""From noise to images by the ODE, for evaluation and for people to look at.

Both draw their images through here, so they agree on what a prompt, a seed and a sample number mean.
"""

from torch import Tensor

from fastgrpo.policy import Model, Policy
from fastgrpo.records import Prompted
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import ode_schedule, with_experts
from fastgrpo_kernels import NoiseAddress


def generate(
    model: Model,
    policy: Policy,
    prompted: Prompted,  # of B samples
    address: NoiseAddress,
    *,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Images (B, 3, H, W) uint8, or videos (B, T, 3, H, W)."""
    schedule = with_experts(ode_schedule(model.sigmas(num_steps), address.sample_id.numel()), model)
    return model.decode(rollout(policy, schedule.to(model.device), address, prompted, guidance_scale).final)
