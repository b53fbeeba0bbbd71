"""Evaluation as published: full-step ODE on held-out prompts, accuracy per category.

Every category gets the same number of images, its prompts taking turns, and the overall accuracy is the mean over
categories as in GenEval: a category of many prompts counts no more than another.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config.sizes import Size
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import PromptSet, as_prompt
from fastgrpo.engine.ranks import Ranks
from fastgrpo.finite import NotFinite
from fastgrpo.policy import Model, Policy, sized
from fastgrpo.records import EVALUATION, SAMPLE, noise_address
from fastgrpo.rewards import RewardError, RewardSum, RewardUnavailable
from fastgrpo.rewards.scorer import Scorer
from fastgrpo.sampling.generate import generate


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """How images are drawn and scored; the same noise at every evaluation, so that two differ by their weights alone."""

    model: Model
    embeddings: Embeddings
    prompts: PromptSet
    reward: RewardSum
    scorer: Scorer
    num_steps: int
    guidance_scale: float
    batch_size: int
    size: Size = Size()  # of an image; what it leaves open is as the model has it
    seed: int
    ranks: Ranks

    def accuracy(self, policy: Policy, images: int, progress: Callable[[], object] = lambda: None) -> dict:
        """Mean score, overall and by category ("tag" of the prompts' metadata), with the number of images and seconds.

        With several rewards: of their weighted sum overall and of each of them by name; "categories" has each one's by tag.
        "percent" has the names in it that are shares, as the rewards say, and are shown to people in percent.
        What is raised on one rank, by a reward for example, is raised on every rank. Collective.
        """
        began = time.perf_counter()
        order = self.order(images)  # prompt of each sample
        # Whole batches only, the same number on every rank: past the end the samples start over, and are not counted.
        share = -(-images // (self.batch_size * self.ranks.world_size)) * self.batch_size  # samples a rank
        first, scores = self.ranks.rank * share, []
        with self.ranks.together(NotFinite, RewardUnavailable, RewardError, Exception):
            for start in range(first, first + share, self.batch_size):
                sample_id = torch.arange(start, start + self.batch_size) % images
                scores.append(self._scores(policy, order[sample_id.numpy()], sample_id))
                progress()
        every = self.reward.settled(self.ranks.gather(torch.cat(scores).to(self.model.device))[:images].cpu())
        tags = np.array([self.prompts.metadata[i].get("tag", "all") for i in order])
        return {**self._means(every, tags), "images": images, "seconds": round(time.perf_counter() - began, 2)}

    def _means(self, scores: Tensor, tags: np.ndarray) -> dict:
        """scores: (images, R); tags: each image's."""
        columns = {"overall": self.reward.total(scores), **dict(zip(self.reward.names, scores.unbind(1), strict=True))}
        names = list(dict.fromkeys(tags.tolist()))
        means = {name: {tag: float(column.numpy()[tags == tag].mean()) for tag in names} for name, column in columns.items()}
        overall = {name: float(np.mean(list(row.values()))) for name, row in means.items()}
        if len(self.reward.names) == 1:
            accuracy = {"overall": overall["overall"], **means["overall"]}
            return {"accuracy": accuracy, "percent": list(accuracy) if self.reward.percent else []}
        categories = {tag: {name: means[name][tag] for name in self.reward.names} for tag in names}
        return {"accuracy": overall, "categories": categories, "percent": self.reward.percent}

    def order(self, images: int) -> np.ndarray:
        """The prompts' indices (images,): categories in turn, and in each its prompts in turn, evenly spaced if not all."""
        by_tag: dict[str, list[int]] = {}
        for i, record in enumerate(self.prompts.metadata):
            by_tag.setdefault(record.get("tag", "all"), []).append(i)
        turns = list(by_tag.values())
        share = -(-images // len(turns))  # of each category

        def prompt(n: int) -> int:
            turn, mine = n // len(turns), turns[n % len(turns)]
            return mine[turn * len(mine) // share if share < len(mine) else turn % len(mine)]

        return np.array([prompt(n) for n in range(images)], dtype=int)

    def records(self, *images: int) -> list[dict]:
        """The records of the prompts that evaluations of so many images draw."""
        drawn = np.unique(np.concatenate([self.order(count) for count in images]))
        return [self.prompts.metadata[i] for i in drawn]

    def _scores(self, policy: Policy, order: np.ndarray, sample_id: Tensor) -> Tensor:
        metadata = [self.prompts.metadata[i] for i in order]
        images = self._draw(policy, metadata, sample_id, EVALUATION)
        return self.scorer.scores([self.scorer.submit(self.reward, images, [one["prompt"] for one in metadata], metadata)])

    def samples(self, policy: Policy, count: int) -> tuple[Tensor, list[dict]]:
        """Images (count, 3, H, W) uint8, or videos (count, T, 3, H, W), to look at, and their records."""
        metadata = [self.prompts.metadata[i] for i in self.order(count)]
        return self._draw(policy, metadata, torch.arange(count), SAMPLE), metadata

    def _draw(self, policy: Policy, metadata: list[dict], sample_id: Tensor, stream: int) -> Tensor:
        prompts = [as_prompt(record, self.model.image_conditioned) for record in metadata]
        with sized(self.model, self.size):
            return generate(
                self.model,
                policy,
                self.embeddings.prompted(prompts, self.guidance_scale),
                noise_address(stream, self.seed, 0, sample_id.to(self.model.device)),
                num_steps=self.num_steps,
                guidance_scale=self.guidance_scale,
            )
