"""What `test_equality.py` compares: the same updates by DeepSpeed, by DistributedDataParallel and by a plain loop.

    python -m torch.distributed.run --nproc_per_node 2 tests/support/equality_worker.py FOLDER

Every rank leaves what it saw in FOLDER/RANK.pt. `plain` and `plain_climb` are the loop of one process, in plain torch.
"""

import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import OneRank, Ranks, finish, start
from fastgrpo.engine.shards import SavedShards
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.batches import experience_of
from fastgrpo.learning.ema import Ema, warmed_up
from fastgrpo.learning.objectives import clip
from fastgrpo.learning.update import Learner, optimizer_step
from fastgrpo.records import TRAIN, Batch, noise_address
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from support import engine_worker
from support.learners import PlainEngine
from support.toy import SHAPE, Toy, ToyPolicy, toy_prompts

DTYPES = engine_worker.DTYPES
KINDS = ("lora", "full")
CASES = [(kind, *case) for kind in KINDS for case in engine_worker.CASES]
STAGES = (0, 1, 2, 3)
UPDATES, BATCH = 20, 4
COUNTS = (1, 3, 2, 4)  # micro-batches of one update after the other, and again
MAX_GRAD_NORM = 0.04  # below every norm of these runs
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-4}  # an eps that does not hide the scale of the gradient
LEARNING_RATE = 3e-3
SAMPLES, NUM_STEPS, WINDOW = 16, 4, 2  # of the climb
CLIMB_LEARNING_RATE, CLIP_RANGE = 1e-2, 1e-2


class Network(nn.Module):
    """A velocity of which all weights are trained, in sizes that no number of ranks divides."""

    latent_shape, guide, start = SHAPE, None, ToyPolicy.start

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.dtype = dtype
        self.layers = nn.Sequential(nn.Linear(size + 2, 33), nn.LayerNorm(33), nn.SiLU(), nn.Linear(33, size))

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        inputs = torch.cat([x.flatten(1), sigma[:, None], conditioning.offset.flatten(1)], 1)
        return self.layers(inputs.to(self.dtype)).view(x.shape)

    def prepared(self, conditioning: Toy) -> Toy:
        return conditioning


def make_policy(kind: str, dtype: torch.dtype) -> Any:
    if kind == "lora":
        return engine_worker.make_policy()
    torch.manual_seed(0)
    return Network(dtype)


def make_batch(kind: str, update: int, micro: int) -> dict[str, Tensor]:
    if kind == "lora":
        return engine_worker.make_batch(update, micro)
    draw = torch.Generator().manual_seed(100 * update + micro)
    x, target = (torch.randn(BATCH, *SHAPE, generator=draw) for _ in range(2))
    return {"x": x, "target": target, "sigma": torch.rand(BATCH, generator=draw), "offset": x[:, :1, :1, :1].cos()}


def share_of(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    size = BATCH // world_size
    return {name: tensor[rank * size : (rank + 1) * size] for name, tensor in batch.items()}


def loss_of(kind: str, policy: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    if kind == "lora":
        velocity = engine_worker.velocity(policy, batch, dtype)
    else:
        velocity = policy(batch["x"], batch["sigma"], Toy(batch["offset"])).float()
    return F.mse_loss(velocity, batch["target"])


def learning_rate(update: int) -> float:
    """Rises over five updates and then falls along a cosine."""
    return LEARNING_RATE * min((update + 1) / 5, 1) * (1 + math.cos(math.pi * update / UPDATES)) / 2


def plain(kind: str, dtype: torch.dtype, shares: int) -> dict[str, Any]:
    """One process, float32 masters of which the gradient is summed in float32. Each batch goes through in `shares` parts."""
    policy = make_policy(kind, dtype)
    for p in policy.parameters():  # as DeepSpeed: buffers stay, and masters start from the rounded weights
        p.data = p.data.to(dtype)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone() for name, p in trained.items()}
    adamw, ema = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, **ADAM), Ema(masters, warmed_up(0.9))
    losses, norms = [], []
    for update in range(UPDATES):
        count, loss = COUNTS[update % len(COUNTS)], 0.0
        sums = [{name: torch.zeros_like(master) for name, master in masters.items()} for _ in range(shares)]
        for micro in range(count):
            for rank, gradients in enumerate(sums):
                part = loss_of(kind, policy, share_of(make_batch(kind, update, micro), rank, shares), dtype) / count
                part.backward()
                loss += part.item() / shares
                for name, p in trained.items():
                    gradients[name] += p.grad.float()
                    p.grad = None
        for name, master in masters.items():
            master.grad = sum(gradients[name] for gradients in sums) / shares
        norms.append(nn.utils.clip_grad_norm_(masters.values(), MAX_GRAD_NORM).item())
        adamw.param_groups[0]["lr"] = learning_rate(update)
        adamw.step()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(masters[name])
        ema.update(masters)
        losses.append(loss)
    return seen(losses, norms, masters, ema, {name: adamw.state[master] for name, master in masters.items()})


def by_ddp(kind: str, ranks: Ranks) -> dict[str, Any]:
    """DistributedDataParallel in float32: it would sum gradients of bfloat16 in bfloat16."""
    policy = make_policy(kind, torch.float32)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    wrapped = DistributedDataParallel(policy)
    adamw, ema = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, **ADAM), Ema(trained, warmed_up(0.9))
    losses, norms = [], []
    for update in range(UPDATES):
        count, loss = COUNTS[update % len(COUNTS)], torch.zeros(())
        for micro in range(count):
            batch = share_of(make_batch(kind, update, micro), ranks.rank, ranks.world_size)
            with nullcontext() if micro + 1 == count else wrapped.no_sync():
                part = loss_of(kind, wrapped, batch, torch.float32) / count
                part.backward()
            loss += part.detach()
        norms.append(nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM).item())
        adamw.param_groups[0]["lr"] = learning_rate(update)
        adamw.step()
        adamw.zero_grad()
        ema.update(trained)
        losses.append(ranks.all_reduce(loss).item())
    return seen(losses, norms, trained, ema, {name: adamw.state[p] for name, p in trained.items()})


def by_engine(kind: str, stage: int, dtype: torch.dtype, ranks: Ranks, folder: Path) -> dict[str, Any]:
    engine = make_engine(make_policy(kind, dtype), stage, dtype, ranks, MAX_GRAD_NORM)
    ema, losses, norms = Ema(engine.trained_state(), warmed_up(0.9)), [], []
    for update in range(UPDATES):
        count, loss = COUNTS[update % len(COUNTS)], torch.zeros(())
        for micro in range(count):
            part = (
                loss_of(kind, engine, share_of(make_batch(kind, update, micro), ranks.rank, ranks.world_size), dtype) / count
            )
            engine.backward(part, last=micro + 1 == count)
            loss += part.detach()
        engine.set_learning_rate(learning_rate(update))
        norms.append(engine.step().item())
        ema.update(engine.trained_state())
        losses.append(ranks.all_reduce(loss).item())
    weights = engine.trained_state()
    engine_worker.save_shard(engine, folder / f"{kind}-{stage}-{dtype}")
    engine.close()
    saved = SavedShards(sorted((folder / f"{kind}-{stage}-{dtype}").iterdir()))
    moments = {
        name: {moment: saved.read(f"{moment}/{name}", 0, p.numel()).view(p.shape) for moment in ("exp_avg", "exp_avg_sq")}
        for name, p in weights.items()
    }
    return seen(losses, norms, weights, ema, moments)


def make_engine(policy: nn.Module, stage: int, dtype: torch.dtype, ranks: Ranks, max_grad_norm: float) -> Engine:
    options = EngineOptions(
        zero_stage=stage, dtype=dtype, learning_rate=LEARNING_RATE, betas=ADAM["betas"], adam_eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"], max_grad_norm=max_grad_norm,
        zero_options={"stage3_param_persistence_threshold": 0} if stage == 3 else {},  # so small a network is split as well
    )  # fmt: skip
    return Engine(policy, ranks, options)


def seen(losses: list[float], norms: list[float], weights: Any, ema: Ema, states: Any) -> dict[str, Any]:
    return {
        "loss": losses,
        "norm": norms,
        "weights": {name: tensor.detach().clone() for name, tensor in weights.items()},
        "average": ema.weights,
        "exp_avg": {name: state["exp_avg"] for name, state in states.items()},
        "exp_avg_sq": {name: state["exp_avg_sq"] for name, state in states.items()},
    }


class PlainAdamW(PlainEngine):
    """An engine of plain torch, for float32."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self.adamw = torch.optim.AdamW(policy.parameters(), lr=CLIMB_LEARNING_RATE, **ADAM)

    def step(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm


def climb(engine: Any, ranks: Ranks) -> dict[str, list[float]]:
    """Online RL: images towards one colour, two clipped optimiser steps on each rollout."""
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1)
    ids = torch.arange(SAMPLES).view(ranks.world_size, -1)[ranks.rank]
    schedule = window_schedule(sampler_steps("flow_sde", sigmas, 0.7), torch.ones_like(ids), WINDOW)
    learner = Learner(
        engine=engine, objective=partial(clip, clip_range=CLIP_RANGE, beta=0.0), reference=None, guidance_scale=1.0,
        model_dtype=torch.float32, micro_batch_size=len(ids),
    )  # fmt: skip
    curves: dict[str, list[float]] = {"reward": [], "norm": [], "clipped": []}
    for iteration in range(UPDATES):
        address = noise_address(TRAIN, 0, iteration, ids)
        prompted = toy_prompts(torch.zeros(len(ids), 1, 1, 1))
        with engine.rollout_policy() as policy:
            trajectory = rollout(policy, schedule, address, prompted, 1.0)
        rewards = -(trajectory.final - 1.0).square().flatten(1).mean(1)
        every = ranks.gather(rewards)
        batch = Batch(sample_id=ids, prompted=prompted, schedule=schedule, trajectory=trajectory)
        experience = experience_of(batch, (rewards - every.mean()) / every.std(), torch.ones_like(rewards))
        metrics = [optimizer_step(learner, [experience]) for _ in range(2)][-1]
        curves["reward"].append(every.mean().item())
        curves["norm"].append(metrics["grad_norm"].item())
        curves["clipped"].append(ranks.all_reduce(metrics["clip_fraction"]).item())
    return curves


def plain_climb() -> dict[str, list[float]]:
    return climb(PlainAdamW(make_policy("full", torch.float32)), OneRank())


def engine_climb(stage: int, ranks: Ranks) -> dict[str, list[float]]:
    engine = make_engine(make_policy("full", torch.float32), stage, torch.float32, ranks, MAX_GRAD_NORM)
    engine.set_learning_rate(CLIMB_LEARNING_RATE)
    try:
        return climb(engine, ranks)
    finally:
        engine.close()


def main() -> None:
    ranks, folder = start(), Path(sys.argv[1])
    results: dict[Any, Any] = {case: by_engine(*case[:2], DTYPES[case[2]], ranks, folder) for case in CASES}
    results |= {("ddp", kind): by_ddp(kind, ranks) for kind in KINDS}
    results |= {("climb", stage): engine_climb(stage, ranks) for stage in STAGES}
    torch.save(results, folder / f"{ranks.rank}.pt")
    finish()


if __name__ == "__main__":
    main()
