"""The operations of online RL for flow matching that deserve a kernel: addressed noise, one denoising transition, the
moments of a stored transition, and the guided velocity of both. Triton on CUDA and ROCm, a torch reference elsewhere."""

# Importing it is what registers the operations with torch.
from fastgrpo_kernels import registered as registered
from fastgrpo_kernels.guidance import Guided, guided_velocity, guided_velocity_ref, guided_velocity_triton
from fastgrpo_kernels.philox import INITIAL_STEP, NoiseAddress, normal, normal_ref, normal_triton
from fastgrpo_kernels.sde_step import SdeStep, sde_step, sde_step_ref, sde_step_triton
from fastgrpo_kernels.transition import Moments, transition, transition_ref, transition_triton

__all__ = [
    "INITIAL_STEP",
    "Guided",
    "Moments",
    "NoiseAddress",
    "SdeStep",
    "guided_velocity",
    "guided_velocity_ref",
    "guided_velocity_triton",
    "normal",
    "normal_ref",
    "normal_triton",
    "sde_step",
    "sde_step_ref",
    "sde_step_triton",
    "transition",
    "transition_ref",
    "transition_triton",
]
