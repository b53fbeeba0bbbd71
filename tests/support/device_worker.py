"""A child of test_device: the tiny network under the engine, in a group of one process; what it saw as a line of JSON.

python tests/support/device_worker.py DTYPE
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.update import optimizer_step
from fastgrpo.policy import Policy
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from support.capture import capture, equal
from support.helpers import distance
from support.learners import PlainEngine, experience_from, learner_of, rollout_arguments
from support.tiny_model import load_tuned_model

UPDATES, MAX_GRAD_NORM = 6, 1e-3  # which clips every update; in float16 the first few overflow
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.01}
LEARNING_RATE, ADAM_EPS = 2e-3, 1e-4  # an eps that does not hide the scale of the gradient


class AdamW(PlainEngine):
    """An engine of plain torch, for float32."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, eps=ADAM_EPS, **ADAM)

    def step(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def updates(model, engine: Engine | AdamW, experience: Any) -> list[dict[str, float]]:
    learner = replace(learner_of(model, 1.0), engine=engine)
    steps = [optimizer_step(learner, [experience]) for _ in range(UPDATES)]
    return [{name: value.item() for name, value in metrics.items()} for metrics in steps]


def under_engine(dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
    model = load_tuned_model(device=str(ranks.device), dtype=dtype)
    options = EngineOptions(
        zero_stage=1, dtype=dtype, learning_rate=LEARNING_RATE, adam_eps=ADAM_EPS, **ADAM, max_grad_norm=MAX_GRAD_NORM
    )
    engine = Engine(Policy(model), ranks, options)
    before = engine.trained_state()
    captured, checks = CapturedRollout(capture()), {}
    arguments, guided = rollout_arguments(model, 1.0), rollout_arguments(model, 4.5)
    with engine.rollout_policy() as policy:
        first = captured(policy, *arguments)
        checks["captured before an update"] = equal(first, rollout(policy, *arguments))
    experience = experience_from(first, arguments)
    metrics = updates(model, engine, experience)
    with engine.rollout_policy() as policy:
        later = captured(policy, *arguments)
        checks["replayed after updates"] = equal(later, rollout(policy, *arguments))
        checks["a replay follows the updates"] = not equal(later, first)
        other = captured(policy, *guided)
        checks["a new shape captured after updates"] = equal(other, rollout(policy, *guided))
        checks["two graphs"] = len(captured.graphs) == 2
    seen = {"checks": checks, "metrics": metrics, "skipped": engine.skipped_steps, "loss_scale": engine.loss_scale or 1.0}
    if dtype == torch.float32:
        plain_model = load_tuned_model(device=str(ranks.device))
        plain = AdamW(Policy(plain_model))
        seen["plain_metrics"] = updates(plain_model, plain, experience)
        state = {name: p.detach() for name, p in plain.trained.items()}
        seen |= {"distance": distance(engine.trained_state(), state), "went": distance(before, state)}
    engine.close()
    return seen


def main() -> None:
    print(json.dumps(under_engine(getattr(torch, sys.argv[1]), start())), flush=True)
    finish()


if __name__ == "__main__":
    main()
