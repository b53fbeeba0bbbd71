"""The numbers of an iteration and of a whole run. Names are those of metrics.jsonl and summary.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.ranks import Ranks
from fastgrpo.learning.advantages import Advantages
from fastgrpo.records import Batch
from fastgrpo.reporting.run_folder import RunFolder, read_lines
from fastgrpo.rewards import RewardSum


def means_over_ranks(ranks: Ranks, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """What lies on the device as numbers, and (n,) as lists, means over ranks. Collective, and one wait for the device."""
    reduced = ranks.all_reduce(torch.cat([value.double().flatten() for value in values.values()]))
    parts = reduced.cpu().split([value.numel() for value in values.values()])
    return {name: part.view(value.shape).tolist() for (name, value), part in zip(values.items(), parts, strict=True)}


def forward_passes(batches: Sequence[Batch]) -> int:
    """How often a rank's rollouts asked the network for a sample's velocity; under guidance each time counts twice."""
    return sum(
        batch.schedule.forward_passes(len(batch.sample_id)) * batch.prompted.passes
        for batch in batches if batch.schedule is not None
    )  # fmt: skip


def reward_metrics(
    reward: RewardSum, scores: Tensor, advantages: Advantages, group_size: int, whole: Tensor | None = None
) -> dict:
    """scores (N, R): where there are several rewards, each one's mean stands apart, before its weight.

    whole: (N,) bool, False for samples that were left out, of which nothing is counted here; None: none was.
    """
    rewards = reward.total(scores)
    groups = rewards.view(-1, group_size)
    spreads = groups.std(dim=1, correction=0)
    alive = advantages.weight.view_as(groups).amax(dim=1)
    if whole is not None:
        kept = whole.view_as(groups)
        spreads = torch.stack([g[k].std(correction=0) for g, k in zip(groups, kept, strict=True) if k.any()])
        rewards, scores = rewards[whole], scores[whole]
    several = dict(zip(reward.names, scores.mean(dim=0).tolist(), strict=True)) if len(reward.names) > 1 else None
    return {
        "reward": rewards.mean().item(),
        **({} if several is None else {"rewards": several}),
        "reward_range": (rewards.max() - rewards.min()).item(),
        "reward_std": spreads.mean().item(),
        "zero_groups": 1 - alive.mean().item(),
    }


def run_summary(folder: Path, **about: object) -> dict:
    """The first evaluation against the last, from a run's files, and `about` the run."""
    # By iteration: one whose line was lost is made again, and stands behind later ones.
    rows = sorted(read_lines(RunFolder(folder).evaluations), key=lambda row: row["iteration"])
    base, final = rows[0]["accuracy"], rows[-1]["accuracy"]
    return {
        "base_accuracy": base["overall"],
        "final_accuracy": final["overall"],
        "base": {tag: value for tag, value in base.items() if tag != "overall"},
        "final": {tag: value for tag, value in final.items() if tag != "overall"},
        "percent": rows[-1].get("percent", []),
        "status": "finished",
        **about,
    }
