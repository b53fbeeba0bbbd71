"""What the phases that run a network share: SD3.5 Medium, its gradients, graphs, whether rollouts are equal.

In a rehearsal the network is the embedded tiny one, and in place of a graph the rollout runs again.
"""

from collections.abc import Callable

import torch
from common import DEVICE
from gpu_phase import REHEARSE, Phase
from models import conditioning, load
from torch import Tensor, nn

from fastgrpo.measure import memory, synchronize
from fastgrpo.models.adapter import Adapter
from fastgrpo.records import Trajectory
from fastgrpo.sampling.graph import CudaCapture

CUDA = DEVICE.type == "cuda"
HALF = "float32" if REHEARSE else "float16"  # what the recipes of SD3.5 run in
PARTS = ("latents", "v_old", "log_prob", "final")  # of a rollout


def sd3(phase: Phase, dtype: str) -> Adapter:
    """SD3.5 Medium at 512 px with random weights and a LoRA that has an effect."""
    torch.manual_seed(1)
    model = load("tiny" if REHEARSE else "sd3.5-medium", 512, getattr(torch, dtype), max_text_tokens=128)
    model.add_lora(rank=32, alpha=64)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    synchronize()
    phase.record("model made", dtype=str(model.dtype), **memory())
    return model


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def gradients(policy: nn.Module, x: Tensor, sigma: Tensor, rows: tuple) -> tuple[Tensor, ...]:
    """Of a loss that every output enters; zeros where a weight has no part in them."""
    return torch.autograd.grad(policy(x, sigma, rows).float().square().mean(), trained(policy), materialize_grads=True)


def transition_inputs(model: Adapter, batch: int) -> tuple[Tensor, Tensor, tuple]:
    """x (B, *D), sigma (B,) and the conditioning of one forward pass."""
    x = torch.randn(batch, *model.latent_shape, device=DEVICE).to(model.dtype)
    return x, torch.full((batch,), 0.7, device=DEVICE), conditioning(model, batch)


class Rerun:
    """On a CPU in place of a graph."""

    def __call__(self, run: Callable[[], Trajectory]) -> tuple[Trajectory, Callable[[], None]]:
        result = run()

        def replay() -> None:
            again = run()
            for name in PARTS:
                getattr(result, name).copy_(getattr(again, name))

        return result, replay


def capture() -> Callable[[Callable[[], Trajectory]], tuple[Trajectory, Callable[[], None]]]:
    return CudaCapture() if CUDA else Rerun()


def differences(a: Trajectory, b: Trajectory) -> dict[str, str]:
    """Of two rollouts, of each part that is not equal to the last bit: how many numbers differ, by how much, and the NaN."""
    found = {}
    for name in PARTS:
        x, y = getattr(a, name).float(), getattr(b, name).float()
        if not torch.equal(x, y):
            share, largest = (x != y).float().mean().item(), (x - y).abs().max().item()
            nan = f"nan {int(x.isnan().sum())} and {int(y.isnan().sum())}"
            found[name] = f"{share:.1%} differ, by {largest:.1e} at most, {nan}"
    return found
