"""From what an iteration sampled to optimiser steps: what is learned from, from what policy, and in how many batches.

batches, advantages -> experiences -> those worth running -> with v_old -> optimiser steps
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config.derived import recomputes_old
from fastgrpo.config.keys import Config
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.advantages import Advantages
from fastgrpo.learning.batches import ByExpert, experience_of, live_batches, live_count
from fastgrpo.learning.ema import Ema, lagging
from fastgrpo.learning.forward_process import add_noise, noise_levels
from fastgrpo.learning.objectives import OBJECTIVES, effective_clip_range, settings_of
from fastgrpo.learning.pairs import Pairs
from fastgrpo.learning.update import Learner, largest_micro_batch, optimizer_step, recompute_old
from fastgrpo.policy import Model, expert_rule
from fastgrpo.records import FORWARD, Batch, Experience, noise_address


class Updater:
    """The updates of a run; `old` is the policy that lags behind, where the objective has one."""

    def __init__(self, config: Config, model: Model, engine: Engine) -> None:
        self.config, self.model, self.engine = config, model, engine
        self.objective = OBJECTIVES[config.objective.name]
        schedule = config.forward.old_policy
        decay = lagging(schedule.rate, schedule.limit, schedule.start)
        self.old = Ema(engine.trained_state(), decay) if schedule.limit > 0 else None
        self.learners: dict[tuple[int, ...], Learner] = {}  # by the shape of a latent
        self._tried: set[tuple[int, ...]] = set()  # shapes whose largest micro-batch is known

    @property
    def learner(self) -> Learner:
        """That of the model's present size, with which the clip range is scaled."""
        shape = self.model.latent_shape
        if shape not in self.learners:
            self.learners[shape] = self._new_learner()
        return self.learners[shape]

    def _new_learner(self) -> Learner:
        objective, rollout, size = self.config.objective, self.config.rollout, self.config.update.micro_batch_size
        settings, clip_range = settings_of(objective.name, objective.settings), objective.clip_range
        if "adv_clip_max" in settings:  # that of the advantages it is given
            settings["adv_clip_max"] = self.config.advantage.adv_clip_max
        if not self.objective.on_final_images:
            clip_range = effective_clip_range(clip_range, torch.Size(self.model.latent_shape).numel())
        return Learner(
            engine=self.engine,
            objective=partial(self.objective.loss, beta=objective.beta, clip_range=clip_range, **settings),
            reference=self.model.reference if objective.beta > 0 else None,
            guidance_scale=rollout.guidance_scale,
            model_dtype=self.model.dtype,
            micro_batch_size=size if isinstance(size, int) else rollout.batch_size,
            guide=self.model.guide,
            experts=self._experts(),
            mix=settings.get("mix", 1.0) if self.objective.on_final_images else None,
        )

    def _experts(self) -> ByExpert | None:
        rule = expert_rule(self.model)
        if rule is None:
            return None
        transformer: Any = self.model.transformer
        return ByExpert(rule, partial(self.engine.ranks.all_reduce, op="max"), transformer.trained)

    def behaviour(self) -> AbstractContextManager:
        """Puts the policy that samples in the network's place, where it is not the trained one."""
        return nullcontext() if self.old is None else self.engine.swapped(self.old.weights)

    def update(self, iteration: int, batches: list[Batch], advantages: Advantages, pairs: Pairs | None) -> dict[str, Tensor]:
        """The optimiser steps, each on the next part of this rank's batches; metrics of the first and of all.

        bad_losses and bad_gradients have a number for each of the U steps, (U,), see `fastgrpo.guards`; others are scalars.
        """
        experiences = [self._experience(iteration, batch, advantages, pairs) for batch in batches]
        if self.config.update.micro_batch_size == "largest" and self.model.latent_shape not in self._tried:
            self._try_micro_batches(experiences[0])
        size = len(batches) // self.config.update.steps_per_rollout
        parts = []
        for i in range(0, len(batches), size):
            ids = torch.cat([batch.sample_id for batch in batches[i : i + size]])
            sort_key = None if pairs is None else pairs.sort_key[ids.to(self.model.device)]
            parts.append(self._worth_running(experiences[i : i + size], sort_key))
        parts = self._with_old_velocities(parts)
        return self._optimizer_steps(iteration, parts, samples=size * self.config.rollout.batch_size)

    def _optimizer_steps(self, iteration: int, parts: list[list[Experience]], samples: int) -> dict[str, Tensor]:
        self.engine.set_learning_rate(learning_rate(self.config, iteration))
        epochs = range(self.config.update.inner_epochs)
        steps = [optimizer_step(self.learner, part, samples) for _ in epochs for part in parts]
        if self.old is not None:
            self.old.update(self.engine.trained_state())
        every = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}  # (U,) each
        bad = {"bad_losses": every.pop("bad_losses"), "bad_gradients": ~every["grad_norm"].isfinite()}
        mean = {name: values.mean() for name, values in every.items()}
        deviation = torch.maximum((steps[0]["ratio_max"] - 1).abs(), (steps[0]["ratio_min"] - 1).abs())
        return {**mean, "first_ratio_deviation": deviation, **bad}

    def _experience(self, iteration: int, batch: Batch, advantages: Advantages, pairs: Pairs | None) -> Experience:
        mine = batch.sample_id.to(self.model.device)
        values, weight = advantages.values[mine], (advantages.weight if pairs is None else pairs.weight)[mine]
        if not self.objective.on_final_images:
            return experience_of(batch, values, weight)
        forward, rollout, seed = self.config.forward, self.config.rollout, self.config.seed
        choices = range(*(forward.range or (0, rollout.num_steps)))
        levels = noise_levels(len(advantages.values), forward.num_timesteps, choices, iteration, seed).to(mine.device)
        noise_id = mine if pairs is None else pairs.noise_id[mine]
        sigma = self.model.sigmas(rollout.num_steps).to(mine.device)[levels[noise_id]]
        address = noise_address(FORWARD, seed, iteration, noise_id)
        return add_noise(batch.trajectory.final, sigma, address, batch.prompted, values, weight)

    def _worth_running(self, part: list[Experience], sort_key: Tensor | None) -> list[Experience]:
        """Without whole batches of samples that teach nothing; the same number of batches on every rank."""
        count = len(part)
        if self.config.update.skip_dead:
            count = int(self.engine.ranks.all_reduce(live_count(part), "max"))
        return live_batches(part, count, sort_key)

    def _with_old_velocities(self, parts: list[list[Experience]]) -> list[list[Experience]]:
        """v_old of all parts, before the first of them moves the weights."""
        kept = not self.objective.on_final_images and not recomputes_old(self.config, self.learner.micro_batch_size)
        if kept or self.objective.old == "zero":
            return parts
        with self.behaviour() if self.objective.old == "behaviour" else self.model.reference():
            return [[recompute_old(self.learner, experience) for experience in part] for part in parts]

    def _try_micro_batches(self, experience: Experience) -> None:
        """The largest micro-batch of this size that every rank can hold, once and for all."""
        held = torch.tensor([largest_micro_batch(self.learner, experience)], device=self.model.device)
        size, shape = int(self.engine.ranks.all_reduce(held, "min")), self.model.latent_shape
        self.learners[shape] = replace(self.learner, micro_batch_size=size)
        self._tried.add(shape)
        if self.engine.ranks.rank == 0:
            tqdm.write(f"update: {size} transitions a forward pass, the most that memory holds")


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of an iteration, on a straight line from the first to the last: a function of its number alone."""
    first, last = config.update.learning_rate, config.update.final_learning_rate
    if last is None or config.iterations == 1:
        return first
    return first + (last - first) * min(1.0, (iteration - 1) / (config.iterations - 1))
