"""Flow-GRPO (arXiv 2505.05470) from prompts to a better model, as it flows:

    prompts -> conditioning -> rollout -> images -> rewards -> advantages -> objective -> engine step -> metrics

Every rank runs the same lines on its share of the samples. A sample is numbered by its place in the iteration, group by
group, whatever the number of ranks, and its noise and its place in the batch follow from that number alone.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo import sde
from fastgrpo.advantages import Advantages, group_advantages
from fastgrpo.checkpoint import load_checkpoint, save_checkpoint
from fastgrpo.config import Config, check_ranks
from fastgrpo.ema import Ema
from fastgrpo.engine import Engine
from fastgrpo.evaluation import Evaluator
from fastgrpo.generation import Embeddings, without_text
from fastgrpo.graph import captured_or_eager
from fastgrpo.models import configured_model, model_class
from fastgrpo.objectives import OBJECTIVES, effective_clip_range
from fastgrpo.prompts import ImagePrompt, PromptSet, asked, check_held_out, load_prompts, prompts_of_iteration, shares
from fastgrpo.report import write_report
from fastgrpo.rewards import RewardSum, RewardUnavailable, load_rewards
from fastgrpo.rollout import Policy
from fastgrpo.runlog import RunLog, read_lines
from fastgrpo.scores import are_shares, score_text
from fastgrpo.trajectory import TRAIN, Experience, Rollout, Steps, noise_address
from fastgrpo.update import Learner, largest_micro_batch, recompute_old, update


class Trainer:
    """A run: what it is made of in `__init__`, what happens in `run`, one iteration in `iterate`."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        check_ranks(config, world_size)
        torch.manual_seed(config.seed)
        self.config = config
        images = model_class(config.model.name).image_conditioned
        self.prompts = load_prompts(config.prompts.train, images)
        held_out = load_prompts(config.prompts.eval, images)
        check_held_out(self.prompts, held_out)
        self.shares = shares(self.prompts, config.prompts.weights, config.rollout.groups)
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
        self.ema = Ema(self.engine.trained_state(), config.update.ema_decay)
        self._embed([asked(record, images) for record in (*self.prompts.metadata, *held_out.metadata)])
        self.rollout, self.rollout_kind = captured_or_eager(config.rollout.cuda_graph, self.model.device)
        self.scorer = ThreadPoolExecutor(1, "reward")
        self.learner, self._micro_batch_known = self._learner(), config.update.micro_batch_size != "largest"
        self.evaluator = self._evaluator(held_out, held_out_reward)

    def _add_trained(self) -> None:
        lora = self.config.model.lora
        if self.config.model.train == "full":
            self.model.train_all(keep_reference=self.config.objective.beta > 0)
        else:
            self.model.add_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)

    def _learner(self) -> Learner:
        objective, rollout, size = self.config.objective, self.config.rollout, self.config.update.micro_batch_size
        elements = torch.Size(self.model.latent_shape).numel()
        return Learner(
            engine=self.engine,
            objective=partial(
                OBJECTIVES[objective.name], beta=objective.beta,
                clip_range=effective_clip_range(objective.clip_range, elements),
            ),
            reference=self.model.reference if objective.beta > 0 else None,
            guidance_scale=rollout.guidance_scale,
            model_dtype=self.model.dtype,
            micro_batch_size=size if isinstance(size, int) else rollout.batch_size,
            guidance_rule=self.model.guide,
        )  # fmt: skip

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
        config, clock = self.config, Stopwatch(self.model.device)
        groups, size, batch = config.rollout.groups, config.rollout.group_size, config.rollout.batch_size
        share = groups * size // self.engine.world_size
        chosen = prompts_of_iteration(len(self.prompts), groups, iteration - 1, config.seed, self.shares)
        tables = self._tables(iteration)
        rollouts: list[tuple[Tensor, Steps, tuple, Rollout]] = []
        waiting = []
        first = self.engine.rank * share
        for start in range(first, first + share, batch):
            sample_id = torch.arange(start, start + batch)
            group = sample_id // size
            records = [self.prompts.metadata[i] for i in chosen[group.numpy()]]
            prompts = [record["prompt"] for record in records]
            with clock("rollout"):
                asking = [asked(record, self.model.image_conditioned) for record in records]
                conditioning = self.embeddings(asking, guidance_scale=config.rollout.guidance_scale)
                steps = self._steps(tables, group)
                result = self._rollout(iteration, sample_id, steps, conditioning)
            with clock("decode"):
                images = self.model.decode(result.final, draft=True)
            # Beside the next batch's rollout: only what is not done by its end is waited for.
            waiting.append(self.scorer.submit(self.reward, images, prompts, records))
            rollouts.append((sample_id, steps, conditioning, result))
        with clock("reward"), self.engine.together(RewardUnavailable):
            scores = torch.cat([score.result() for score in waiting])
        with clock("update"):
            scores = self.engine.gather(scores.to(self.model.device))
            advantages = self._advantages(scores)
            metrics = self._update(rollouts, advantages)
        with clock("other"):
            self.ema.update(self.engine.trained_state())
        return self._metrics(iteration, scores, advantages, metrics, clock)

    def _tables(self, iteration: int) -> dict[str, Tensor]:
        """The coefficients of each group's rollout, (G, T, 4), and where its window starts, (G,)."""
        rollout, objective = self.config.rollout, self.config.objective
        sigmas = self.model.sigmas(rollout.num_steps)
        groups = torch.arange(rollout.groups)
        start = sde.window_starts(rollout.window, rollout.num_steps, iteration, groups, self.config.seed)
        size = sde.window_size(rollout.window, rollout.num_steps)
        table = sde.window_tables(rollout.sampler, sigmas, rollout.noise_level, start, size, objective.log_prob_weight)
        kl_weight = sde.kl_weights(rollout.sampler, sigmas, rollout.noise_level, objective.kl).float()
        tensors = {"sigmas": sigmas, "table": table, "start": start, "kl_weight": kl_weight}
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    def _steps(self, tables: dict[str, Tensor], group: Tensor) -> Steps:
        group = group.to(self.model.device)
        size = sde.window_size(self.config.rollout.window, self.config.rollout.num_steps)
        return Steps(tables["sigmas"], tables["table"][group], tables["start"][group], size, tables["kl_weight"])

    def _rollout(self, iteration: int, sample_id: Tensor, steps: Steps, conditioning: tuple) -> Rollout:
        with self.engine.rollout_policy() as policy, self.model.drafting():
            return self.rollout(
                policy, steps, noise_address(TRAIN, self.config.seed, iteration, sample_id.to(self.model.device)),
                conditioning, guidance_scale=self.config.rollout.guidance_scale,
                latent_shape=self.model.latent_shape, model_dtype=self.model.dtype,
                guidance_rule=self.model.guide,
            )  # fmt: skip

    def _advantages(self, scores: Tensor) -> Advantages:
        """Of the scores of the whole iteration (N, R), the same bits on every rank."""
        rollout, advantage = self.config.rollout, self.config.advantage
        group = torch.arange(len(scores), device=scores.device) // rollout.group_size
        weights = list(self.reward.weights.values())
        return group_advantages(scores, group, num_groups=rollout.groups, weights=weights, **vars(advantage))

    def _update(self, rollouts: list, advantages: Advantages) -> dict[str, Tensor]:
        """The optimiser steps, each on the next part of this rank's batches; metrics of the first and of all."""
        experiences = []
        for sample_id, steps, conditioning, result in rollouts:
            mine = sample_id.to(self.model.device)
            weight = advantages.weight[mine]
            experiences.append(Experience(result, conditioning, steps, advantages.values[mine], weight))
        if not self._micro_batch_known:
            self._try_micro_batches(experiences[0])
        if self.config.update.old_velocity == "recompute":
            experiences = [recompute_old(self.learner, experience) for experience in experiences]
        part = len(experiences) // self.config.update.steps_per_rollout
        updates = [update(self.learner, experiences[i : i + part]) for i in range(0, len(experiences), part)]
        mean = {name: torch.stack([u[name] for u in updates]).mean() for name in updates[0]}
        first = updates[0]
        deviation = torch.maximum((first["ratio_max"] - 1).abs(), (first["ratio_min"] - 1).abs())
        return {**mean, "first_ratio_deviation": deviation}

    def _try_micro_batches(self, experience: Experience) -> None:
        """The largest micro-batch that every rank can hold, once and for all."""
        size = torch.tensor([largest_micro_batch(self.learner, experience)], device=self.model.device)
        size = int(self.engine.all_reduce(size, "min"))
        self.learner, self._micro_batch_known = self.learner._replace(micro_batch_size=size), True
        if self.engine.rank == 0:
            tqdm.write(f"update: {size} transitions a forward pass, the most that memory holds")

    def _metrics(
        self, iteration: int, scores: Tensor, advantages: Advantages, metrics: dict[str, Tensor], clock: "Stopwatch"
    ) -> dict:
        """One line of metrics.jsonl, means over ranks. The only place where numbers leave the device.

        scores (N, R): of several rewards each one's mean stands apart, before its weight.
        """
        values = self.engine.all_reduce(torch.stack([value.double() for value in metrics.values()]))
        row = dict(zip(metrics, values.tolist(), strict=True))
        rewards, names = self.reward.total(scores), self.reward.names
        groups = rewards.view(-1, self.config.rollout.group_size)
        return {
            "iteration": iteration,
            "reward": rewards.mean().item(),
            **({"rewards": dict(zip(names, scores.mean(dim=0).tolist(), strict=True))} if len(names) > 1 else {}),
            "reward_std": groups.std(dim=1, correction=0).mean().item(),
            "zero_groups": 1 - advantages.weight.view_as(groups).amax(dim=1).mean().item(),
            **row,
            "images": iteration * len(rewards),
            "seconds": clock.seconds,
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
            samples = self.evaluator.samples(policy, self.config.evaluation.samples)
        bar.close()
        if self.log:
            self.log.evaluation(row)
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
        return iteration, state["seconds"]

    def _save(self, iteration: int, seconds: float) -> None:
        # Prompts and noise follow from the iteration, so there is no other position or random state to keep.
        state = {"seconds": seconds, "ema": self.ema.state_dict()}
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
            "device": device_name(self.model.device),
            "rollout": self.rollout_kind,
        }
        self.log.summary(summary)
        self.log.close()
        write_report(folder)
        return summary


class Stopwatch:
    """Seconds by phase. On a GPU a phase ends when its work is done: a handful of waits an iteration, none in a loop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def progress(metrics: dict) -> str:
    """The end of the progress bar."""
    times = " ".join(f"{phase} {seconds:.1f}s" for phase, seconds in metrics["seconds"].items())
    return f"reward {metrics['reward']:.3f} kl {metrics['kl']:.1e} clip {metrics['clip_fraction']:.0%} | {times}"


def accuracy_line(accuracy: dict[str, float]) -> str:
    shares = are_shares(accuracy.values())
    return "  ".join(f"{tag} {score_text(value, shares)}" for tag, value in accuracy.items())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
