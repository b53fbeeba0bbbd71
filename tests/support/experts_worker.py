"""What `test_experts.py` runs on two ranks: updates in which the ranks ask for different experts, at every ZeRO stage.

`main` takes a folder, where every rank leaves its weights as RANK.pt. `plain` is the same on one process, sample by sample.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import finish, start
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.batches import ByExpert, micro_batches
from fastgrpo.models.experts import Experts
from fastgrpo.policy import Policy
from fastgrpo.records import Experience, Prompted
from support.toy import Toy

SIZE, STEPS, SAMPLES, MICRO_BATCH = 6, 2, 3, 2
# sigma of each transition, (ranks, S, B), update by update; from 0.5 up it is the first expert's.
HIGH, LOW = [[0.9, 0.8, 0.7]] * STEPS, [[0.1, 0.2, 0.3]] * STEPS
UPDATES = [
    [HIGH, LOW],
    [[[0.9, 0.2, 0.8], [0.4, 0.6, 0.1]], [[0.3, 0.1, 0.2], [0.9, 0.1, 0.2]]],
    [HIGH, HIGH],
    [LOW, LOW],
    [LOW, [[0.5, 0.499, 0.7], [0.1, 0.6, 0.6]]],
]
ADAM = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.01, "adam_eps": 1e-4}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE + 1, 33), nn.SiLU(), nn.Linear(33, SIZE))

    def forward(self, *, timestep: Tensor, x: Tensor) -> tuple[Tensor]:
        return (self.layers(torch.cat([x, timestep[:, None] / 1000], 1)),)


def make_experts() -> Experts:
    torch.manual_seed(0)
    return Experts(Network(), Network(), 500.0)


def make_policy(experts: Experts) -> Policy:
    model: Any = SimpleNamespace(
        transformer=experts, latent_shape=(SIZE,), dtype=torch.float32, guide=None,
        velocity=lambda x, sigma, conditioning: experts(timestep=sigma * 1000, x=x)[0],
    )  # fmt: skip
    return Policy(model)


def experience(update: int, rank: int) -> Experience:
    sigma = torch.tensor(UPDATES[update][rank])
    draw = torch.Generator().manual_seed(10 * update + rank)
    x, target = (torch.randn(STEPS, SAMPLES, SIZE, generator=draw) for _ in range(2))
    ones = torch.ones(STEPS, SAMPLES)
    return Experience(
        x=x, x_next=target, v_old=target, sigma=sigma, coefficients=ones[..., None].expand(-1, -1, 4), kl_weight=ones,
        loss_weight=ones, prompted=Prompted.of(Toy(torch.zeros(SAMPLES, 1))), advantages=ones[0], weight=ones[0],
    )  # fmt: skip


def trained(stage: int, ranks: Any) -> dict[str, Tensor]:
    """The weights after all updates."""
    experts = make_experts()
    zero_options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}  # so small a network is split as well
    options = EngineOptions(zero_stage=stage, dtype=torch.float32, max_grad_norm=100.0, zero_options=zero_options, **ADAM)
    engine = Engine(make_policy(experts), ranks, options)
    by_expert = ByExpert(experts.expert_of, lambda flags: ranks.all_reduce(flags, "max"), experts.trained)
    for update in range(len(UPDATES)):
        batches = list(micro_batches(experience(update, ranks.rank), MICRO_BATCH, by_expert))
        for number, batch in enumerate(batches, 1):
            velocity = engine(batch.x, batch.sigma, batch.prompted.cond, batch.experts)
            engine.backward((velocity - batch.x_next).square().mean() / len(batches), last=number == len(batches))
        engine.step()
    weights = engine.trained_state()
    engine.close()
    return weights


def plain() -> dict[str, Tensor]:
    """Each sample through the network that its own sigma asks for, and torch's AdamW on the mean over both ranks."""
    experts = make_experts()
    adamw = torch.optim.AdamW(experts.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01, eps=1e-4)
    for update in range(len(UPDATES)):
        losses = []
        for one in (experience(update, rank).transitions(slice(None)) for rank in (0, 1)):
            for x, sigma, target in zip(one.x, one.sigma, one.x_next, strict=True):
                network: Any = experts["transformer" if sigma >= 0.5 else "transformer_2"]
                losses.append((network(timestep=sigma[None] * 1000, x=x[None])[0] - target).square().mean())
        for p in experts.parameters():
            p.grad = torch.zeros_like(p)  # which stays so for an expert that nobody asks for
        torch.stack(losses).mean().backward()
        adamw.step()
    return {f"transformer.{name}": p.detach() for name, p in experts.named_parameters()}


def main(arguments: Sequence[str]) -> None:
    ranks = start()
    torch.save({stage: trained(stage, ranks) for stage in (0, 1, 2, 3)}, Path(arguments[0]) / f"{ranks.rank}.pt")
    finish()
