"""Flow-GRPO (arXiv 2505.05470) from prompts to a better model, as it flows:

    prompts -> conditioning -> rollout -> images -> rewards -> advantages -> objective -> engine step -> metrics

Every rank runs the same lines on its share of the samples. A sample is numbered by its place in the iteration, group by
group, whatever the number of ranks, and its noise and its place in the batch follow from that number alone.
"""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.data.embeddings import Embeddings, without_text
from fastgrpo.data.images import TARGET_FIELDS, image_records, load_targets
from fastgrpo.data.prompts import (
    IMAGE_FIELD,
    ImagePrompt,
    PromptSet,
    as_prompt,
    check_held_out,
    load_prompts,
    prompt_probabilities,
    prompts_of_iteration,
)
from fastgrpo.engine.checkpoint import load_checkpoint, save_checkpoint
from fastgrpo.engine.zero import Engine
from fastgrpo.evaluation import Evaluator
from fastgrpo.learning.advantages import Advantages, group_advantages, offline_advantages
from fastgrpo.learning.ema import Ema, warmed_up
from fastgrpo.learning.iteration import Learning
from fastgrpo.learning.pairs import Pairs, pairs_of_groups
from fastgrpo.measure import device_name
from fastgrpo.models import configured_model, model_class
from fastgrpo.policy import Policy
from fastgrpo.records import TRAIN, Batch, Rollout, Steps, noise_address, only_final
from fastgrpo.reporting.progress import Stopwatch, accuracy_line, progress
from fastgrpo.reporting.report import write_report
from fastgrpo.reporting.runlog import RunLog, read_lines
from fastgrpo.rewards import RewardSum, RewardUnavailable, load_rewards
from fastgrpo.sampling.graph import captured_or_eager
from fastgrpo.sampling.schedule import group_steps
from fastgrpo.validation import Config, check_ranks


class Trainer:
    """A run: what it is made of in `__init__`, what happens in `run`, one iteration in `iterate`."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        check_ranks(config, world_size)
        torch.manual_seed(config.seed)
        self.config = config
        family = model_class(config.model.name)
        images = family.image_conditioned
        # Of training on images that are there already: what they are called in the prompts' lines.
        self.keys = TARGET_FIELDS[config.objective.name] if config.objective.offline else ()
        if self.keys and (images or "num_frames" in family.takes):
            raise ValueError(f"objective.offline: {config.model.name} is of input images or videos; train it on rollouts")
        self.prompts = load_prompts(config.prompts.train, self.keys or ((IMAGE_FIELD,) if images else ()))
        held_out = load_prompts(config.prompts.eval, (IMAGE_FIELD,) if images else ())
        check_held_out(self.prompts, held_out)
        self.probabilities = prompt_probabilities(self.prompts, config.prompts.weights, config.rollout.groups)
        reward = config.reward
        self.reward, held_out_reward = load_rewards(
            reward.train, reward.eval, device=device, settings=reward.settings, frames=reward.frames
        )
        self.model = configured_model(config.model, device)
        self.model.use_attention(config.model.attention)
        if config.model.tiny_decoder:
            self.model.load_tiny_decoder(config.model.tiny_decoder)
        self._add_trained()
        if config.update.gradient_checkpointing:
            self.model.transformer.enable_gradient_checkpointing()
        if config.rollout.precision == "fp8":
            self.model.prepare_drafts()
        if config.model.compile:
            self.model.compile_blocks()
        self.embeddings = Embeddings(self.model, config.prompts.cache)
        self.engine = Engine(
            Policy(self.model), zero_stage=config.engine.zero_stage, dtype=self.model.dtype,
            learning_rate=config.update.learning_rate, betas=config.update.betas,
            weight_decay=config.update.weight_decay, max_grad_norm=config.update.max_grad_norm,
            micro_batch_size=config.rollout.batch_size,
        )  # fmt: skip
        self.ema = Ema(self.engine.trained_state(), warmed_up(config.update.ema_decay))
        self._embed([as_prompt(record, images) for record in (*self.prompts.metadata, *held_out.metadata)])
        self.rollout, self.rollout_kind = captured_or_eager(config.rollout.cuda_graph, self.model.device)
        self.scorer = ThreadPoolExecutor(1, "reward")
        self.learning = Learning(config, self.model, self.engine)
        self.evaluator = self._evaluator(held_out, held_out_reward)

    def _add_trained(self) -> None:
        lora = self.config.model.lora
        if self.config.model.train == "full":
            self.model.train_all(keep_reference=self.config.objective.beta > 0)
        else:
            self.model.add_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)

    def _embed(self, prompts: list[str | ImagePrompt]) -> None:
        """Every prompt's embeddings on disk, each rank its share; then the text encoders may leave the device."""
        if self.config.prompts.cache is None:
            return
        prompts = [*prompts, *{without_text(prompt): None for prompt in prompts}]
        self.embeddings.prepare(prompts[self.engine.rank :: self.engine.world_size], show=self.engine.rank == 0)
        self.engine.barrier()
        self.model.release_encoders()

    def _evaluator(self, held_out: PromptSet, reward: RewardSum) -> Evaluator:
        evaluation = self.config.evaluation
        return Evaluator(
            model=self.model, embeddings=self.embeddings, prompts=held_out, reward=reward, num_steps=evaluation.num_steps,
            guidance_scale=evaluation.guidance_scale, batch_size=evaluation.batch_size, seed=self.config.seed,
            rank=self.engine.rank, world_size=self.engine.world_size, gather=self.engine.gather,
            together=partial(self.engine.together, RewardUnavailable),
        )  # fmt: skip

    def run(self) -> dict:
        """Train from the last checkpoint, or from the start, to the end; returns the summary."""
        self.done, self.seconds = self._resume()
        self.saved = self.done
        self.log = RunLog(self.config.output, self.done) if self.engine.rank == 0 else None
        if self.log:
            print(f"rollout: {self.rollout_kind}", flush=True)
        try:
            self._train()
        except RewardUnavailable:
            # Raised on all ranks (`Engine.together`) and never within an update: the state is that of the last iteration.
            self.scorer.shutdown(wait=False, cancel_futures=True)
            if self.done > self.saved:
                self._save(self.done, self.seconds)
            raise
        return self._finish(self.seconds)

    def _train(self) -> None:
        config = self.config
        for iteration in dict.fromkeys((0, self.done)):  # the base, and one before which the run was stopped
            self._evaluate_if_due(iteration)
        bar = tqdm(
            range(self.done + 1, config.iterations + 1), desc="training", initial=self.done, total=config.iterations,
            disable=self.engine.rank != 0, dynamic_ncols=True,
        )  # fmt: skip
        for iteration in bar:
            began = time.perf_counter()
            metrics = self.iterate(iteration)
            self.done, self.seconds = iteration, self.seconds + time.perf_counter() - began
            bar.set_postfix_str(progress(metrics))
            if self.log:
                self.log.metrics(metrics)
            self._evaluate_if_due(iteration)
            if iteration == config.iterations or iteration % config.checkpoint.every == 0:
                self._save(self.done, self.seconds)

    def iterate(self, iteration: int) -> dict:
        """One rollout and its updates."""
        clock = Stopwatch(self.model.device)
        if self.keys:
            batches, scores = self._data(iteration, clock), None
        else:
            batches, scores = self._rollouts(iteration, clock)
        with clock("update"):
            advantages, pairs = self._advantages(scores)
            metrics = self.learning(iteration, batches, advantages, pairs)
        with clock("other"):
            self.ema.update(self.engine.trained_state())
        return self._metrics(iteration, batches, scores, advantages, metrics, clock)

    def _rollouts(self, iteration: int, clock: Stopwatch) -> tuple[list[Batch], Tensor]:
        """This rank's batches, and the scores of all ranks' images (N, R)."""
        config = self.config
        groups, size = config.rollout.groups, config.rollout.group_size
        chosen = prompts_of_iteration(len(self.prompts), groups, iteration - 1, config.seed, self.probabilities)
        groups_steps = self._groups_steps(iteration)
        batches, waiting = [], []
        for sample_id in self._sample_ids():
            group = sample_id // size
            records = [self.prompts.metadata[i] for i in chosen[group.numpy()]]
            prompts = [record["prompt"] for record in records]
            with clock("rollout"):
                asking = [as_prompt(record, self.model.image_conditioned) for record in records]
                conditioning = self.embeddings(asking, guidance_scale=config.rollout.guidance_scale)
                steps = groups_steps.of(group.to(self.model.device))
                result = self._rollout(iteration, sample_id, steps, conditioning)
            with clock("decode"):
                images = self.model.decode(result.final, draft=True)
            # Beside the next batch's rollout: only what is not done by its end is waited for.
            waiting.append(self.scorer.submit(self.reward, images, prompts, records))
            batches.append(Batch(sample_id, conditioning, steps, result))
        with clock("reward"), self.engine.together(RewardUnavailable):
            scores = torch.cat([score.result() for score in waiting])
        return batches, self.engine.gather(scores.to(self.model.device))

    def _data(self, iteration: int, clock: Stopwatch) -> list[Batch]:
        """This rank's batches of images that are there already, encoded."""
        config, guidance = self.config, self.config.rollout.guidance_scale
        lines = config.rollout.groups * config.rollout.group_size // len(self.keys)
        chosen = prompts_of_iteration(len(self.prompts), lines, iteration - 1, config.seed)
        records = image_records([self.prompts.metadata[i] for i in chosen], self.keys)
        batches = []
        for sample_id in self._sample_ids():
            mine = [records[i] for i in sample_id]
            with clock("data"):
                x0 = self.model.encode_images(load_targets(mine, self.model.size))
                conditioning = self.embeddings([record["prompt"] for record in mine], guidance_scale=guidance)
            batches.append(Batch(sample_id, conditioning, None, only_final(x0)))
        return batches

    def _sample_ids(self) -> Iterable[Tensor]:
        """The samples of each of this rank's batches, numbered over all ranks."""
        rollout = self.config.rollout
        share = rollout.groups * rollout.group_size // self.engine.world_size
        return torch.arange(self.engine.rank * share, (self.engine.rank + 1) * share).split(rollout.batch_size)

    def _groups_steps(self, iteration: int) -> Steps:
        """The steps of every group's rollout."""
        rollout, objective = self.config.rollout, self.config.objective
        sigmas = self.model.sigmas(rollout.num_steps)
        return group_steps(rollout, objective, sigmas, iteration, self.config.seed).to(self.model.device)

    def _rollout(self, iteration: int, sample_id: Tensor, steps: Steps, conditioning: tuple) -> Rollout:
        with self.learning.behaviour(), self.engine.rollout_policy() as policy, self.model.drafting():
            return self.rollout(
                policy, steps, noise_address(TRAIN, self.config.seed, iteration, sample_id.to(self.model.device)),
                conditioning, guidance_scale=self.config.rollout.guidance_scale,
                latent_shape=self.model.latent_shape, model_dtype=self.model.dtype,
                guidance_rule=self.model.guide,
            )  # fmt: skip

    def _advantages(self, scores: Tensor | None) -> tuple[Advantages, Pairs | None]:
        """Of the scores of the whole iteration (N, R), the same bits on every rank; without scores, of given images."""
        rollout, settings = self.config.rollout, vars(self.config.advantage)
        if scores is None:
            return offline_advantages(rollout.groups * rollout.group_size, self.keys, self.model.device)
        group = torch.arange(len(scores), device=scores.device) // rollout.group_size
        weights = list(self.reward.weights.values())
        paired, keep = self.learning.objective.pairs, settings["keep"]
        settings = settings | {"keep": None if paired else keep}  # pairs select for themselves
        advantages = group_advantages(scores, group, num_groups=rollout.groups, weights=weights, **settings)
        return advantages, pairs_of_groups(advantages.values, rollout.group_size, (keep or 2) // 2) if paired else None

    def _metrics(
        self, iteration: int, batches: list[Batch], scores: Tensor | None, advantages: Advantages,
        metrics: dict[str, Tensor], clock: Stopwatch,
    ) -> dict:  # fmt: skip
        """One line of metrics.jsonl, means over ranks. The only place where numbers leave the device."""
        values = self.engine.all_reduce(torch.stack([value.double() for value in metrics.values()]))
        forwards = sum(batch.steps.forwards(len(batch.conditioning[0])) for batch in batches if batch.steps is not None)
        return {
            "iteration": iteration,
            **({} if scores is None else self._reward_metrics(scores, advantages)),
            "rollout_forwards": forwards * self.engine.world_size,
            **dict(zip(metrics, values.tolist(), strict=True)),
            "images": iteration * len(advantages.values),
            "seconds": clock.seconds,
        }

    def _reward_metrics(self, scores: Tensor, advantages: Advantages) -> dict:
        """scores (N, R): of several rewards each one's mean stands apart, before its weight."""
        rewards, names = self.reward.total(scores), self.reward.names
        groups = rewards.view(-1, self.config.rollout.group_size)
        return {
            "reward": rewards.mean().item(),
            **({"rewards": dict(zip(names, scores.mean(dim=0).tolist(), strict=True))} if len(names) > 1 else {}),
            "reward_std": groups.std(dim=1, correction=0).mean().item(),
            "zero_groups": 1 - advantages.weight.view_as(groups).amax(dim=1).mean().item(),
        }

    def _evaluate_if_due(self, iteration: int) -> None:
        """The evaluation that belongs to an iteration, unless the run has it already."""
        evaluation, last = self.config.evaluation, iteration == self.config.iterations
        if not (iteration == 0 or last or (evaluation.every and iteration % evaluation.every == 0)):
            return
        # Rank 0 looks for all: the others could see the file appear.
        rows = read_lines(self.config.output / "evaluations.jsonl")
        if self.engine.broadcast_object(iteration not in {row["iteration"] for row in rows}):
            images = evaluation.images if iteration == 0 or last else evaluation.images_between
            self.evaluate(iteration, images, base=iteration == 0)

    def evaluate(self, iteration: int, images: int, base: bool = False) -> None:
        """Accuracy on held-out prompts and samples to look at, with the averaged weights."""
        batches = -(-images // (self.config.evaluation.batch_size * self.engine.world_size))
        bar = tqdm(total=batches, desc="evaluating", leave=False, disable=self.engine.rank != 0, dynamic_ncols=True)
        with self._averaged(base), self.engine.rollout_policy() as policy:
            row = {"iteration": iteration, **self.evaluator.accuracy(policy, images, bar.update)}
            count = self.config.evaluation.samples
            samples = self.evaluator.samples(policy, count) if count else None
        bar.close()
        if self.log:
            self.log.evaluation(row)
            if samples is not None:
                self.log.samples(iteration, *samples)
            tqdm.write(f"iteration {iteration}: {accuracy_line(row['accuracy'])}")

    @contextmanager
    def _averaged(self, base: bool) -> Iterator[None]:
        """The averaged weights in the network; before training they are the base's."""
        with self.model.reference() if base and self.model.has_lora else self.engine.swapped(self.ema.weights):
            yield

    def _resume(self) -> tuple[int, float]:
        """Iterations done, and the seconds they took."""
        loaded = load_checkpoint(self.engine, self.config.output / "checkpoints")
        if loaded is None:
            return 0, 0.0
        iteration, state = loaded
        self.ema.load_state_dict(state["ema"])
        if self.learning.old is not None:
            self.learning.old.load_state_dict(state["old"])
        return iteration, state["seconds"]

    def _save(self, iteration: int, seconds: float) -> None:
        # Prompts and noise follow from the iteration, so there is no other position or random state to keep.
        state = {"seconds": seconds, "ema": self.ema.state_dict()}
        if self.learning.old is not None:
            state["old"] = self.learning.old.state_dict()
        folder = self.config.output
        save_checkpoint(self.engine, folder / "checkpoints", iteration, state, keep=self.config.checkpoint.keep)
        self.saved = iteration
        if self.engine.rank == 0:
            self.model.save_trained(folder, {name.removeprefix("transformer."): v for name, v in self.ema.weights.items()})
            if self.log:
                write_report(folder)

    def _finish(self, seconds: float) -> dict:
        """The summary: first against last evaluation."""
        folder = self.config.output
        if self.engine.rank != 0:
            return {}
        rows = read_lines(folder / "evaluations.jsonl")
        base, final = rows[0]["accuracy"], rows[-1]["accuracy"]
        last = read_lines(folder / "metrics.jsonl")[-1]
        summary = {
            "base_accuracy": base["overall"],
            "final_accuracy": final["overall"],
            "base": {tag: value for tag, value in base.items() if tag != "overall"},
            "final": {tag: value for tag, value in final.items() if tag != "overall"},
            "train_seconds": round(seconds, 1),
            "images": last["images"],
            "iterations": last["iteration"],
            "seed": self.config.seed,
            "status": "finished",
            "world_size": self.engine.world_size,
            "device": device_name(),
            "rollout": self.rollout_kind,
        }
        self.log.summary(summary)
        self.log.close()
        write_report(folder)
        return summary
