"""From what an iteration sampled to optimiser steps: what is learned from, from what policy, and in how many batches.

batches, advantages -> experiences -> those worth running -> with v_old -> optimiser steps
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config.keys import Config
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.advantages import Advantages
from fastgrpo.learning.ema import Ema, lagging
from fastgrpo.learning.forward_process import noise_levels, noised
from fastgrpo.learning.objectives import OBJECTIVES, effective_clip_range, settings_of
from fastgrpo.learning.pairs import Pairs
from fastgrpo.learning.update import Learner, largest_micro_batch, live_batches, live_count, recompute_old, update
from fastgrpo.records import Batch, Experience, experience_of
from fastgrpo.validation import recomputes_old


class Learning:
    """The update of a run; `old` is the policy that lags behind, where the objective has one."""

    def __init__(self, config: Config, model, engine: Engine) -> None:
        self.config, self.model, self.engine = config, model, engine
        self.objective = OBJECTIVES[config.objective.name]
        schedule = config.forward.old_policy
        decay = lagging(schedule.rate, schedule.limit, schedule.start)
        self.old = Ema(engine.trained_state(), decay) if schedule.limit > 0 else None
        self.learner = self._learner()
        self._micro_batch_known = config.update.micro_batch_size != "largest"

    def _learner(self) -> Learner:
        objective, rollout, size = self.config.objective, self.config.rollout, self.config.update.micro_batch_size
        settings, clip_range = settings_of(objective.name, objective.settings), objective.clip_range
        if "adv_clip_max" in settings:  # that of the advantages it is given
            settings["adv_clip_max"] = self.config.advantage.adv_clip_max
        if not self.objective.forward:
            clip_range = effective_clip_range(clip_range, torch.Size(self.model.latent_shape).numel())
        return Learner(
            engine=self.engine,
            objective=partial(self.objective.loss, beta=objective.beta, clip_range=clip_range, **settings),
            reference=self.model.reference if objective.beta > 0 else None,
            guidance_scale=rollout.guidance_scale,
            model_dtype=self.model.dtype,
            micro_batch_size=size if isinstance(size, int) else rollout.batch_size,
            guidance_rule=self.model.guide,
            mix=settings.get("mix", 1.0) if self.objective.forward else None,
        )  # fmt: skip

    def behaviour(self) -> AbstractContextManager:
        """Puts the policy that samples in the network's place, where it is not the trained one."""
        return nullcontext() if self.old is None else self.engine.swapped(self.old.weights)

    def __call__(
        self, iteration: int, batches: list[Batch], advantages: Advantages, pairs: Pairs | None
    ) -> dict[str, Tensor]:
        """The optimiser steps, each on the next part of this rank's batches; metrics of the first and of all."""
        config = self.config
        experiences = [self._experience(iteration, batch, advantages, pairs) for batch in batches]
        if not self._micro_batch_known:
            self._try_micro_batches(experiences[0])
        size = len(batches) // config.update.steps_per_rollout
        parts = []
        for i in range(0, len(batches), size):
            ids = torch.cat([batch.sample_id for batch in batches[i : i + size]])
            place = None if pairs is None else pairs.place[ids.to(self.model.device)]
            parts.append(self._worth_running(experiences[i : i + size], place))
        parts = self._with_old_velocities(parts)
        self.engine.set_learning_rate(learning_rate(config, iteration))
        samples = size * config.rollout.batch_size
        updates = [update(self.learner, part, samples) for _ in range(config.update.inner_epochs) for part in parts]
        if self.old is not None:
            self.old.update(self.engine.trained_state())
        mean = {name: torch.stack([u[name] for u in updates]).mean() for name in updates[0]}
        first = updates[0]
        deviation = torch.maximum((first["ratio_max"] - 1).abs(), (first["ratio_min"] - 1).abs())
        return {**mean, "first_ratio_deviation": deviation}

    def _experience(self, iteration: int, batch: Batch, advantages: Advantages, pairs: Pairs | None) -> Experience:
        mine = batch.sample_id.to(self.model.device)
        values, weight = advantages.values[mine], (advantages if pairs is None else pairs).weight[mine]
        if not self.objective.forward:
            return experience_of(batch.rollout, batch.steps, batch.conditioning, values, weight)
        forward, rollout, seed = self.config.forward, self.config.rollout, self.config.seed
        choices = range(*(forward.range or (0, rollout.num_steps)))
        levels = noise_levels(len(advantages.values), forward.num_timesteps, choices, iteration, seed).to(mine.device)
        noise_id = mine if pairs is None else pairs.noise_id[mine]
        sigma = self.model.sigmas(rollout.num_steps).to(mine.device)[levels[noise_id]]
        return noised(
            batch.rollout.final, sigma, noise_id, batch.conditioning, values, weight, seed=seed, iteration=iteration
        )

    def _worth_running(self, part: list[Experience], place: Tensor | None) -> list[Experience]:
        """Without whole batches of samples that teach nothing; the same number of batches on every rank."""
        count = len(part)
        if self.config.update.skip_dead:
            count = int(self.engine.ranks.all_reduce(live_count(part), "max"))
        return live_batches(part, count, place)

    def _with_old_velocities(self, parts: list[list[Experience]]) -> list[list[Experience]]:
        """v_old of all parts, before the first of them moves the weights."""
        kept = not self.objective.forward and not recomputes_old(self.config, self.learner.micro_batch_size)
        if kept or self.objective.old == "zero":
            return parts
        with self.behaviour() if self.objective.old == "behaviour" else self.model.reference():
            return [[recompute_old(self.learner, experience) for experience in part] for part in parts]

    def _try_micro_batches(self, experience: Experience) -> None:
        """The largest micro-batch that every rank can hold, once and for all."""
        size = torch.tensor([largest_micro_batch(self.learner, experience)], device=self.model.device)
        size = int(self.engine.ranks.all_reduce(size, "min"))
        self.learner, self._micro_batch_known = self.learner._replace(micro_batch_size=size), True
        if self.engine.ranks.rank == 0:
            tqdm.write(f"update: {size} transitions a forward pass, the most that memory holds")


def learning_rate(config: Config, iteration: int) -> float:
    """Of the iterations 1 to n: a straight line from the first to the last, a function of the iteration alone."""
    first, last = config.update.learning_rate, config.update.final_learning_rate
    if last is None or config.iterations == 1:
        return first
    return first + (last - first) * min(1.0, (iteration - 1) / (config.iterations - 1))
