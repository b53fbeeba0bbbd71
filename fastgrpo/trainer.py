"""Flow-GRPO (arXiv 2505.05470) from prompts to a better model, as it flows:

    prompts -> conditioning -> rollout -> images -> rewards -> advantages -> objective -> engine step -> metrics

    trainer = Trainer(load_config("configs/tiny_shapes.yaml"), reward=my_reward)
    summary = trainer.run()

Every rank runs the same lines on its share of the samples. A sample is numbered by its place in the iteration, group by
group, whatever the number of ranks, and its noise and its place in the batch follow from that number alone.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.callbacks import Callback, FolderLog
from fastgrpo.config.keys import Config
from fastgrpo.config.sizes import Size, evaluation_size, iteration_size, training_sizes
from fastgrpo.data.draws import Draws
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.images import load_targets
from fastgrpo.data.prompts import ImagePrompt, as_prompt
from fastgrpo.engine.lock import held
from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import Ranks, start
from fastgrpo.engine.zero import Engine
from fastgrpo.evaluation import Evaluator
from fastgrpo.files import remove_partial
from fastgrpo.finite import Diverged, at
from fastgrpo.guards import Fault, Guards
from fastgrpo.learning.advantages import Advantages, group_advantages, offline_advantages
from fastgrpo.learning.ema import Ema, warmed_up
from fastgrpo.learning.objectives import weighting
from fastgrpo.learning.pairs import Pairs, pairs_of_groups
from fastgrpo.learning.updater import Updater
from fastgrpo.lifeline import Lifeline
from fastgrpo.measure import device_name
from fastgrpo.metrics import forward_passes, means_over_ranks, reward_metrics, run_summary
from fastgrpo.parts import Objects, Parts, Prompts
from fastgrpo.policy import Model, Policy, sized
from fastgrpo.records import TRAIN, Batch, Prompted, Schedule, noise_address, only_final
from fastgrpo.reporting.progress import Stopwatch, accuracy_line, progress
from fastgrpo.reporting.run_folder import RunFolder, best_iteration, read_lines
from fastgrpo.rewards import Reward, RewardError, RewardUnavailable
from fastgrpo.rewards.scorer import Scorer
from fastgrpo.sampling.graph import captured_or_eager
from fastgrpo.sampling.schedule import group_schedule, with_experts
from fastgrpo.saving import EMA, Saving
from fastgrpo.validation import check_experts, check_folder, check_ranks


class Trainer:
    """A run: what it is made of in `__init__`, what happens in `run`, one iteration in `iterate`.

    What is handed in as an object takes the place of what the configuration names; the configuration then names it too.

    config: from `load_config`.
    ranks: the processes of the run, from `fastgrpo.engine.ranks.start`; left out: this process starts them.
    model: fulfils `fastgrpo.policy.Model`; `config.model` then says only how it is trained.
    reward: (images (B, 3, H, W) uint8, prompts, their records) -> (B,) scores, to be raised.
    held_out_reward: what evaluations report; left out: `reward`.
    prompts, held_out: texts, or records with a "prompt" and whatever the reward reads; no prompt may be in both.
    callbacks: called with what happens, in order, on every rank.

    Raises ValueError for what cannot be run, with the key's path or the argument.
    """

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks | None = None,
        model: Model | None = None,
        reward: Reward | None = None,
        held_out_reward: Reward | None = None,
        prompts: Prompts | None = None,
        held_out: Prompts | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.ranks = ranks or start()
        check_ranks(config, self.ranks.world_size)
        torch.manual_seed(config.seed)
        objects = Objects(model=model, reward=reward, held_out_reward=held_out_reward, prompts=prompts, held_out=held_out)
        self.config, self.objects = objects.naming_them(config), objects
        self.parts = Parts.of(self.config, self.ranks.device, objects)
        self.model, self.prompts, self.reward = self.parts.model, self.parts.prompts, self.parts.reward
        self.parts.check_texts(config, show=self.ranks.rank == 0)
        self.callbacks = [FolderLog(), *callbacks]
        self.draws = Draws(self.prompts, config, self.parts.image_fields)
        check_experts(config, self.model)
        prepare(self.model, config)
        options = EngineOptions(
            zero_stage=config.engine.zero_stage, dtype=self.model.dtype,
            learning_rate=config.update.learning_rate, betas=config.update.betas,
            weight_decay=config.update.weight_decay, max_grad_norm=config.update.max_grad_norm,
            micro_batch_size=config.rollout.batch_size,
        )  # fmt: skip
        self.engine = Engine(Policy(self.model), self.ranks, options)
        self.ema = Ema(self.engine.trained_state(), warmed_up(config.update.ema_decay))
        self.updater = Updater(config, self.model, self.engine)
        self.guards = Guards(config, self.ranks, self._prompts_of, self._tell)
        self.embeddings = Embeddings(
            self.model, config.prompts.cache, negative_prompt=config.model.negative_prompt,
            in_memory=config.prompts.in_memory,
        )  # fmt: skip
        self.scorer = Scorer(config.reward.timeout, check=lambda: self.lifeline.stop_if_asked(within=True))
        self.evaluator = Evaluator(
            model=self.model, embeddings=self.embeddings, prompts=self.parts.held_out, reward=self.parts.held_out_reward,
            scorer=self.scorer, num_steps=config.evaluation.num_steps, guidance_scale=config.evaluation.guidance_scale,
            batch_size=config.evaluation.batch_size, size=evaluation_size(config), seed=config.seed, ranks=self.ranks,
        )  # fmt: skip
        self._embed()
        self.run_rollout, self.rollout_form = captured_or_eager(config.rollout.cuda_graph, self.model.device)
        self.iteration, self.seconds = 0, 0.0  # done so far, and how long they took
        averages = {EMA: self.ema} | ({} if self.updater.old is None else {"old": self.updater.old})
        self.saving = Saving(self.config, self.ranks, self.engine, self.model, averages)
        self.lifeline = Lifeline(self.config, self.ranks, self.saving)

    def run(self) -> dict:
        """Train from the last checkpoint, or from the start, to the end; returns the summary, on rank 0.

        Whatever ends it before, and on whichever rank, the state after the last whole iteration is saved first, and the
        error's notes say so: see `fastgrpo.lifeline`. Stopped: by SIGTERM, by Ctrl-C, or because the launcher is gone. Where
        this thread does not end the run within half of `checkpoint.grace`, another saves the state and ends the process.
        Diverged: numbers are not finite, or beyond a limit of `guard`. ConfigError: another process has the folder.
        """
        with self._folder() as lock:
            self.resume()
            for callback in self.callbacks:
                callback.on_start(self)
            with self.lifeline.watched(release=lock.close, tell=self._tell_of_stop):
                self._train()
                summary = self._summary() if self.ranks.rank == 0 else {}
                for callback in self.callbacks:
                    callback.on_end(self, summary)
        return summary

    @property
    def saved(self) -> int:
        """The iteration of the last checkpoint, 0 if there is none."""
        return self.saving.saved

    @contextmanager
    def _folder(self) -> Iterator[ExitStack]:
        """Inside, the run's folder belongs to this run; refused on every rank if it is another's."""
        check_folder(self.config)
        with ExitStack() as lock:
            with self.ranks.together(ValueError):
                if self.ranks.rank == 0:
                    lock.enter_context(held(self.config.output))
                    run = RunFolder(self.config.output)
                    remove_partial(run.path, run.best, run.samples)
            yield lock

    def _tell_of_stop(self, error: BaseException) -> None:
        self.scorer.close()
        for callback in self.callbacks:
            with suppress(Exception):  # it is this error that is to be seen
                callback.on_stop(self, error)

    def _train(self) -> None:
        config = self.config
        for iteration in sorted({0, self.iteration}):  # the base, and one before which the run was stopped
            if self._evaluate_if_due(iteration):
                self.begin_to_save()
                if iteration == config.iterations:  # nothing comes beside which it could be written
                    self._end_saving()
        bar = tqdm(
            range(self.iteration + 1, config.iterations + 1), desc="training", initial=self.iteration,
            total=config.iterations, disable=self.ranks.rank != 0, dynamic_ncols=True,
        )  # fmt: skip
        for iteration in bar:
            with at(f"iteration {iteration}"):
                bar.set_postfix_str(progress(self.iterate(iteration)))
            self.lifeline.stop_if_asked()
            best = self._evaluate_if_due(iteration)
            if iteration == config.iterations:
                self.save()
            elif iteration % config.checkpoint.every == 0 or best or self.saving.owed:
                self.begin_to_save()
            elif self.saving.settle():
                self._tell_of_checkpoint()

    def _summary(self) -> dict:
        images = self.iteration * self.config.rollout.groups * self.config.rollout.group_size
        return run_summary(
            self.config.output, iterations=self.iteration, images=images, train_seconds=round(self.seconds, 1),
            seed=self.config.seed, world_size=self.ranks.world_size, device=device_name(), rollout=self.rollout_form,
        )  # fmt: skip

    def iterate(self, iteration: int) -> dict:
        """One rollout and its updates; returns the iteration's metrics."""
        began = time.perf_counter()
        with sized(self.model, iteration_size(self.config, iteration)):
            metrics = self._iterate(iteration)
        self.guards.check(metrics)
        self.iteration, self.seconds = iteration, self.seconds + time.perf_counter() - began
        for callback in self.callbacks:
            callback.on_iteration(self, metrics)
        if self.config.checkpoint.in_memory:  # last: an iteration of which something is missing is done anew
            self.saving.keep(self.iteration, self.seconds)
        return metrics

    def _iterate(self, iteration: int) -> dict:
        clock = Stopwatch(self.model.device)
        self.guards.begin(self.engine.trained_state)
        batches, scores = self._sample(iteration, clock) if not self.parts.image_fields else self._read(iteration, clock)
        self.lifeline.stop_if_asked()
        group_size, rewards = self.config.rollout.group_size, None if scores is None else self.reward.total(scores)
        batches, whole = self.guards.leave_out(iteration, batches, rewards)
        if iteration < self.config.iterations:
            with sized(self.model, iteration_size(self.config, iteration + 1)):
                self.embeddings.read_ahead(self._asked(iteration + 1), self.config.rollout.guidance_scale)
        with clock("update"):
            advantages, pairs = self._advantages(scores, whole)
            updates = means_over_ranks(self.ranks, self.updater.update(iteration, batches, advantages, pairs))
        self.guards.count_updates(iteration, updates.pop("bad_losses"), updates.pop("bad_gradients"))
        with clock("other"):
            weights = self.engine.trained_state()
            self.ema.update(weights)
            seen = self.guards.after_update(iteration, weights, self.ema.weights)
        return {
            "iteration": iteration,
            **iteration_size(self.config, iteration).given,
            **({} if scores is None else reward_metrics(self.reward, scores, advantages, group_size, whole)),
            "rollout_forwards": forward_passes(batches) * self.ranks.world_size,
            **updates,
            "skipped_steps": self.engine.skipped_steps,
            **({} if self.engine.loss_scale is None else {"loss_scale": self.engine.loss_scale}),
            **seen,
            "images": iteration * len(advantages.values),
            "seconds": clock.seconds,
        }

    def close(self) -> None:
        """Frees the engine and the model; the trainer is of no use afterwards."""
        self.scorer.close()
        self.engine.close()

    def _sample(self, iteration: int, clock: Stopwatch) -> tuple[list[Batch], Tensor]:
        """This rank's batches by rollouts, and the scores (N, R) of all ranks' images."""
        records, schedules = self.draws.records(iteration), self._group_schedules(iteration)
        batches, waiting = [], []
        with clock("rollout"):
            prompted = self._prompted(iteration)
        for sample_id, its_prompts in zip(self._sample_ids(), prompted, strict=True):
            mine, group = [records[i] for i in sample_id], sample_id // self.config.rollout.group_size
            with clock("rollout"):
                batch = self._rollout(iteration, sample_id, its_prompts, schedules.of(group.to(self.model.device)))
            with clock("decode"):
                images = self.model.decode(self.guards.samples.add(batch.trajectory), draft=True)
                self.guards.samples.look(images)
            # Beside the next batch's rollout: only what is not done by its end is waited for.
            prompts = [record["prompt"] for record in mine]
            waiting.append(self.scorer.submit(self.reward, images, prompts, mine))
            batches.append(batch)
            self.lifeline.stop_if_asked(within=True)
        with clock("reward"), self.ranks.together(RewardUnavailable, RewardError, Exception):
            scores = self.scorer.scores(waiting)
        return batches, self.reward.settled(self.ranks.gather(scores.to(self.model.device)))

    def _rollout(self, iteration: int, sample_id: Tensor, prompted: Prompted, schedule: Schedule) -> Batch:
        address = noise_address(TRAIN, self.config.seed, iteration, sample_id.to(self.model.device))
        with self.updater.behaviour(), self.engine.rollout_policy() as policy, self.model.drafting():
            trajectory = self.run_rollout(policy, schedule, address, prompted, self.config.rollout.guidance_scale)
        return Batch(sample_id=sample_id, prompted=prompted, schedule=schedule, trajectory=trajectory)

    def _read(self, iteration: int, clock: Stopwatch) -> tuple[list[Batch], None]:
        """This rank's batches of images that are there already, encoded; nothing scores them."""
        records, batches = self.draws.records(iteration), []
        with clock("data"):
            prompted = self._prompted(iteration)
        for sample_id, its_prompts in zip(self._sample_ids(), prompted, strict=True):
            with clock("data"):
                targets = load_targets([records[i] for i in sample_id], self.model.size)
                trajectory = only_final(self.model.encode_images(targets))
                self.guards.samples.add(trajectory)
            batches.append(Batch(sample_id=sample_id, prompted=its_prompts, schedule=None, trajectory=trajectory))
        return batches, None

    def _prompted(self, iteration: int) -> list[Prompted]:
        """The conditioning of this rank's batches, which share the row of a prompt."""
        settings = self.config.rollout
        return self.embeddings.prompted(self._asked(iteration), settings.guidance_scale).split(settings.batch_size)

    def _asked(self, iteration: int) -> list[str | ImagePrompt]:
        """The prompts of this rank's samples, as the model reads them."""
        records = self.draws.records(iteration)
        return self._as_prompts(records[i] for sample_id in self._sample_ids() for i in sample_id)

    def _as_prompts(self, records: Iterable[dict]) -> list[str | ImagePrompt]:
        return [as_prompt(record, self.model.image_conditioned) for record in records]

    def _sample_ids(self) -> Iterable[Tensor]:
        """The samples of each of this rank's batches, numbered over all ranks."""
        settings, ranks = self.config.rollout, self.ranks
        share = settings.groups * settings.group_size // ranks.world_size
        return torch.arange(ranks.rank * share, (ranks.rank + 1) * share).split(settings.batch_size)

    def _group_schedules(self, iteration: int) -> Schedule:
        """The schedule of every group's rollout, a row each."""
        settings, sigmas = self.config.rollout, self.model.sigmas(self.config.rollout.num_steps)
        schedule = group_schedule(settings, sigmas, iteration, self.config.seed, weighting(self.config.objective))
        return with_experts(schedule, self.model).to(self.model.device)

    def _advantages(self, scores: Tensor | None, whole: Tensor | None) -> tuple[Advantages, Pairs | None]:
        """Advantages and, for pairwise objectives, pairs from all ranks' scores (N, R); bitwise equal on every rank.

        Without scores: those of an offline run. whole: (N,) bool, the samples to learn from; None: all.
        """
        size, groups, settings = self.config.rollout.group_size, self.config.rollout.groups, vars(self.config.advantage)
        if scores is None:
            advantages, pairs = offline_advantages(groups * size, self.parts.image_fields, self.model.device)
            return advantages.only(whole), None if pairs is None else pairs.only(whole)
        paired, keep = self.updater.objective.pairs, settings["keep"]
        settings = settings | {"keep": None if paired else keep}  # pairs select for themselves
        number = torch.arange(len(scores), device=scores.device)
        kept = number if whole is None else number[whole]
        advantages = group_advantages(
            scores[kept], kept // size, num_groups=groups, weights=list(self.reward.weights.values()), **settings,
        ).spread(kept, len(scores))  # fmt: skip
        pairs = pairs_of_groups(advantages.values, size, (keep or 2) // 2).only(whole) if paired else None
        return advantages, pairs

    def evaluate(self, iteration: int | None = None, images: int | None = None) -> dict:
        """Accuracy on held-out prompts and samples to look at, with the averaged weights. Collective.

        iteration: 0 stands for the model before training; left out: the iterations done.
        images: left out: `evaluation.images`.
        """
        settings, iteration = self.config.evaluation, self.iteration if iteration is None else iteration
        images = images or settings.images
        batches = -(-images // (settings.batch_size * self.ranks.world_size))
        bar = tqdm(total=batches, desc="evaluating", leave=False, disable=self.ranks.rank != 0, dynamic_ncols=True)

        def drawn() -> None:
            bar.update()
            self.lifeline.stop_if_asked(within=True)

        with self._averaged(base=iteration == 0), self.engine.rollout_policy() as policy:
            row = {"iteration": iteration, **self.evaluator.accuracy(policy, images, drawn)}
            samples = self.evaluator.samples(policy, settings.samples) if settings.samples else None
        bar.close()
        if self.ranks.rank == 0:
            tqdm.write(f"iteration {iteration}: {accuracy_line(row)}")
        for callback in self.callbacks:
            callback.on_evaluation(self, row, samples)
        return row

    def _evaluate_if_due(self, iteration: int) -> bool:
        """The evaluation that belongs to an iteration, unless the run has it already; whether it is a new best."""
        settings, last = self.config.evaluation, iteration == self.config.iterations
        if not (iteration == 0 or last or (settings.every and iteration % settings.every == 0)):
            return False
        # Rank 0 looks for all: the others could see the file appear.
        rows = self.ranks.broadcast_object(read_lines(RunFolder(self.config.output).evaluations))
        if iteration in {row["iteration"] for row in rows}:
            return False
        with at(f"evaluation after iteration {iteration}"):
            rows.append(self.evaluate(iteration, settings.images if iteration == 0 or last else settings.images_between))
            try:
                self.guards.check_evaluations(rows)
            except Diverged:  # what is saved already is better than this
                self.saving.newest = None
                raise
        return self.config.checkpoint.keep_best and best_iteration(rows) == iteration

    def _tell(self, fault: Fault) -> None:
        for callback in self.callbacks:
            callback.on_fault(self, fault)

    def _prompts_of(self, iteration: int, samples: Sequence[int]) -> list[str]:
        """The prompts that an iteration drew samples for, each once; samples: their numbers over all ranks."""
        records = self.draws.records(iteration)
        return list(dict.fromkeys(records[sample]["prompt"] for sample in samples))

    @contextmanager
    def _averaged(self, base: bool) -> Iterator[None]:
        """The averaged weights in the network; before training they are the base's, or of the LoRA that was handed in."""
        untouched = base and self.model.has_lora and self.config.model.lora.path is None
        with self.model.reference() if untouched else self.engine.swapped(self.ema.weights):
            yield

    def resume(self) -> int:
        """Go on from the last whole checkpoint in the run's folder, if any; returns the iterations done. Collective."""
        self.iteration, self.seconds = self.saving.resume()
        return self.iteration

    def begin_to_save(self) -> None:
        """Begin a checkpoint of the last iteration, which is written beside what comes next. Collective."""
        if self.saving.settle(wait=True):
            self._tell_of_checkpoint()
        if self.saving.newest is None or self.saving.newest.iteration != self.iteration:
            self.saving.keep(self.iteration, self.seconds)
        self.saving.begin()

    def save(self) -> Path:
        """Write a checkpoint, and the averaged weights into the run's folder, which is returned. Collective.

        OSError where the system refuses to write.
        """
        self.begin_to_save()
        self._end_saving()
        return self.config.output

    def _end_saving(self) -> None:
        if not self.saving.settle(wait=True):
            raise self.saving.failure
        self._tell_of_checkpoint()

    def _tell_of_checkpoint(self) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(self, self.config.output)

    def _embed(self) -> None:
        """The embeddings of what the run draws on disk; then the text encoders may leave the device."""
        config = self.config
        if config.prompts.cache is None:
            return
        trained = self.embeddings.asked(self._as_prompts(self.draws.of_run()), config.rollout.guidance_scale)
        settings = config.evaluation
        between = settings.images_between if 0 < settings.every < config.iterations else 0
        held_out = self.evaluator.records(settings.images, between, settings.samples)
        evaluated = self.embeddings.asked(self._as_prompts(held_out), settings.guidance_scale)
        drawn = [*((size, trained) for size in training_sizes(config)), (evaluation_size(config), evaluated)]
        if not self.model.image_conditioned:  # a text is read alike for every size
            drawn = [(Size(), [*trained, *evaluated])]
        for size, prompts in drawn:
            with sized(self.model, size):
                self.embeddings.prepare(prompts, self.ranks)
        self.model.release_encoders()


def prepare(model: Model, config: Config) -> None:
    """Applies what the configuration asks of a model, in the only order that works, before an engine wraps it."""
    model.use_attention(config.model.attention)
    if config.model.tiny_decoder:
        model.load_tiny_decoder(config.model.tiny_decoder)
    lora = config.model.lora
    if config.model.train == "full":
        model.train_all(keep_reference=config.objective.beta > 0)
    elif lora.path is not None:
        model.continue_lora(lora.path, rank=lora.rank, alpha=lora.alpha, reference=lora.reference)
    else:
        model.add_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    if config.update.gradient_checkpointing:
        transformer: Any = model.transformer  # of diffusers
        transformer.enable_gradient_checkpointing()
    if config.rollout.precision == "fp8":
        model.prepare_drafts()
    if config.model.compile:
        model.compile()
