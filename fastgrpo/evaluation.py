"""Evaluation as published: full-step ODE on held-out prompts, accuracy per category.

Every category gets the same number of images, its prompts taking turns, and the overall accuracy is the mean over
categories as in GenEval: a category of many prompts counts no more than another.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import PromptSet, as_prompt
from fastgrpo.records import EVALUATION, SAMPLE
from fastgrpo.rewards import RewardSum
from fastgrpo.sampling.generate import generate


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """How images are drawn and scored; the same noise at every evaluation, so that two differ by their weights alone."""

    model: object  # any adapter of fastgrpo.models
    embeddings: Embeddings
    prompts: PromptSet
    reward: RewardSum
    num_steps: int
    guidance_scale: float
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)
    together: Callable[[], AbstractContextManager] = nullcontext  # what a reward raises on one rank, all do

    def accuracy(self, policy: nn.Module, images: int, progress: Callable[[], None] = lambda: None) -> dict:
        """Mean score, overall and by category ("tag" of the prompts' metadata), with the number of images and seconds.

        With several rewards: of their weighted sum overall and of each of them by name; "categories" has each one's by tag.
        """
        began = time.perf_counter()
        order = self._order(images)  # prompt of each sample
        # Whole batches only, the same number on every rank: past the end the samples start over, and are not counted.
        share = -(-images // (self.batch_size * self.world_size)) * self.batch_size  # samples a rank
        scores = []
        with self.together():
            for start in range(self.rank * share, (self.rank + 1) * share, self.batch_size):
                sample_id = torch.arange(start, start + self.batch_size) % images
                scores.append(self._scores(policy, order[sample_id.numpy()], sample_id))
                progress()
        scores = self.gather(torch.cat(scores).to(self.model.device))[:images].cpu()
        tags = np.array([self.prompts.metadata[i].get("tag", "all") for i in order])
        return {**self._means(scores, tags), "images": images, "seconds": round(time.perf_counter() - began, 2)}

    def _means(self, scores: Tensor, tags: np.ndarray) -> dict:
        """Of scores (images, R) and each image's tag."""
        columns = {"overall": self.reward.total(scores), **dict(zip(self.reward.names, scores.unbind(1), strict=True))}
        names, means = dict.fromkeys(tags.tolist()), {}
        for name, column in columns.items():
            means[name] = {tag: float(column.numpy()[tags == tag].mean()) for tag in names}
        overall = {name: float(np.mean(list(row.values()))) for name, row in means.items()}
        if len(self.reward.names) == 1:
            return {"accuracy": {"overall": overall["overall"], **means["overall"]}}
        categories = {tag: {name: means[name][tag] for name in self.reward.names} for tag in names}
        return {"accuracy": overall, "categories": categories}

    def _order(self, images: int) -> np.ndarray:
        """The prompts' indices (images,): categories in turn, and in each its prompts in turn, evenly spaced if not all."""
        by_tag: dict[str, list[int]] = {}
        for i, record in enumerate(self.prompts.metadata):
            by_tag.setdefault(record.get("tag", "all"), []).append(i)
        turns = list(by_tag.values())
        share = -(-images // len(turns))  # of each category

        def prompt(n: int) -> int:
            turn, mine = n // len(turns), turns[n % len(turns)]
            return mine[turn * len(mine) // share if share < len(mine) else turn % len(mine)]

        return np.array([prompt(n) for n in range(images)])

    def _scores(self, policy: nn.Module, order: np.ndarray, sample_id: Tensor) -> Tensor:
        metadata = [self.prompts.metadata[i] for i in order]
        images = self._generate(policy, metadata, sample_id, EVALUATION)
        return self.reward(images, [record["prompt"] for record in metadata], metadata)

    def samples(self, policy: nn.Module, count: int) -> tuple[Tensor, list[dict]]:
        """Images (count, 3, H, W) uint8, or videos (count, T, 3, H, W), to look at, and their records."""
        metadata = [self.prompts.metadata[i] for i in self._order(count)]
        images = self._generate(policy, metadata, torch.arange(count), SAMPLE)
        return images, metadata

    def _generate(self, policy: nn.Module, metadata: list[dict], sample_id: Tensor, stream: int) -> Tensor:
        return generate(
            self.model, policy, self.embeddings, [as_prompt(r, self.model.image_conditioned) for r in metadata], sample_id,
            stream=stream, seed=self.seed, num_steps=self.num_steps, guidance_scale=self.guidance_scale,
        )  # fmt: skip
