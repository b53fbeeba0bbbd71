"""The rules over several keys of a configuration; those of a single key stand beside it in `fastgrpo/config/keys.py`.

    config = load_config("configs/tiny_shapes.yaml", ["rollout.num_steps=8"])

What cannot run is refused, never repaired, and so is a key that would be left unread where that could mislead. Every error
names the key's full path, the value and the way out.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import schema
from fastgrpo.config.derived import recomputes_old
from fastgrpo.config.keys import AdvantageConfig, Config, EvaluationConfig, ModelConfig, RewardConfig
from fastgrpo.config.reading import build_config, differences, dump_config, read_config
from fastgrpo.config.resuming import MAY_CHANGE, forbidden_changes
from fastgrpo.config.schema import ConfigError
from fastgrpo.config.sizes import training_sizes
from fastgrpo.data.images import TARGET_FIELDS
from fastgrpo.engine.checkpoint_folders import complete_checkpoints
from fastgrpo.files import inside
from fastgrpo.learning.objectives import OBJECTIVES, settings_of, weighting
from fastgrpo.models import MODELS
from fastgrpo.policy import EXPERTS, Model, expert_rule
from fastgrpo.reporting.run_folder import RunFolder, readable_lines
from fastgrpo.rewards import REWARDS, weights_of
from fastgrpo.sampling.schedule import group_schedule
from fastgrpo.sampling.tables import SAMPLERS
from fastgrpo.sampling.windows import trainable_steps, window_size

__all__ = [
    "Config", "ConfigError", "changes_of_run", "check", "check_experts", "check_folder", "check_ranks", "config_of",
    "differences",
    "dump_config", "has_trained", "load_config", "read_config", "recomputes_old", "trained_steps",
]  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides of the form `a.b=value`, and check the whole."""
    config = read_config(path, overrides)
    check(config)
    return config


def config_of(data: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a mapping as a YAML file would hold it, checked as a whole."""
    config = build_config(data, Path.cwd(), overrides)
    check(config)
    return config


def check_folder(config: Config) -> None:
    """Refuse a folder that cannot be written, and one that holds a run of another configuration.

    `fastgrpo.config.resuming` says what may have changed. A run that has trained nothing yet may be corrected.
    """
    folder = config.output
    if folder.resolve() == folder.resolve().parent:
        schema.refuse("output", str(folder), "is the root of the file system; name a folder in it")
    _check_writable("output", folder)
    if config.model.lora.path is not None and inside(config.model.lora.path, folder):
        schema.refuse("model.lora.path", str(config.model.lora.path), "the run would write over it: choose another output")
    if config.prompts.cache is not None:
        _check_writable("prompts.cache", config.prompts.cache)
    changed = changes_of_run(config) if has_trained(folder) else []
    if changed:
        raise ConfigError(
            f"output = {folder}: holds a run of another configuration ({'; '.join(changed)}); to go on with that run give "
            "these keys their earlier values, to start another choose another folder with --set output=... What may change "
            f"when a run goes on (docs/configuration.md has the table with reasons): {', '.join(MAY_CHANGE)}"
        )


def has_trained(folder: Path) -> bool:
    """Whether the run in a folder has finished an iteration."""
    run = RunFolder(folder)
    return bool(complete_checkpoints(run.checkpoints) or readable_lines(run.metrics)[0])


def changes_of_run(config: Config) -> list[str]:
    """What may not change and differs from the run in the configuration's folder; nothing where there is no run."""
    kept = RunFolder(config.output).config
    return forbidden_changes(load_config(kept), config) if kept.exists() else []


def _check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written into."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        schema.refuse(key, str(folder), f"{there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        schema.refuse(key, str(folder), f"{there} cannot be written by this user; name another folder")


def check(config: Config) -> None:
    """Refuse what each key allows but the whole cannot run; the number of processes enters in `check_ranks`."""
    _check_model(config.model)
    _check_lora(config)
    _check_rewards(config.reward)
    _check_rollout(config)
    _check_guidance(config)
    _check_sizes(config)
    _check_advantage(config.advantage, config.rollout.group_size)
    _check_objective(config)
    _check_window(config)
    check_ranks(config, world_size=1)
    _check_update(config)
    _check_engine(config)
    _check_evaluation(config.evaluation)
    _check_guard(config)


def check_ranks(config: Config, world_size: int) -> None:
    """Refuse a number of processes over which an optimiser step does not divide into whole batches."""
    rollout, steps = config.rollout, config.update.steps_per_rollout
    images, multiple = rollout.groups * rollout.group_size, rollout.batch_size * steps * world_size
    if images % multiple:
        schema.refuse(
            "rollout.batch_size",
            rollout.batch_size,
            f"groups x group_size = {images} images an iteration do not divide into {steps} optimiser steps of whole "
            f"batches on {world_size} process{'es' * (world_size > 1)}: {images} must be a multiple of {multiple}",
        )


def trained_steps(config: Config) -> int:
    """S, how often each sample is trained on: the steps of the window, or noise levels of the forward process."""
    if OBJECTIVES[config.objective.name].on_final_images:
        return config.forward.num_timesteps
    return window_size(config.rollout.window, config.rollout.num_steps)


def check_experts(config: Config, model: Model) -> None:
    """Refuse to train other experts of a model than those that make the trained steps.

    An expert that makes none would only be decayed, and from the steps of one that is not trained nothing would be learned.
    """
    rule, rollout, forward = expert_rule(model), config.rollout, config.forward
    if rule is None:
        return
    experts = [EXPERTS[number] for number in rule(model.sigmas(rollout.num_steps)[:-1]).tolist()]  # of each step
    steps, key = trainable_steps(rollout.window, rollout.num_steps), "rollout.window"
    if OBJECTIVES[config.objective.name].on_final_images:
        steps, key = range(*(forward.range or (0, rollout.num_steps))), "forward.range"
    making = set(experts[steps.start : steps.stop])
    fitting = "both" if len(making) == 2 else making.pop()
    if config.model.experts != fitting:
        who = "both experts make" if fitting == "both" else f"the {fitting} expert alone makes"
        way_out = (
            f"{who} the steps that are trained, {steps.start} to {steps.stop - 1}, as the high expert's are the first "
            f"{experts.count('high')} of {len(experts)}: take model.experts={fitting}, or other steps by {key}"
        )
        schema.refuse("model.experts", config.model.experts, way_out)


def _check_model(model: ModelConfig) -> None:
    schema.choice("model.name", model.name, MODELS)
    if model.random_weights and model.architecture is None:
        schema.refuse("model.random_weights", True, "name the model.architecture to build, for example sd3.5-medium")
    if model.idle_expert == "host" and model.train == "full":
        schema.refuse("model.idle_expert", "host", "only frozen weights can wait on the host: take model.train=lora")
    for key in ("transformer", "variant"):
        if model.random_weights and getattr(model, key) is not None:
            schema.refuse(
                f"model.{key}", str(getattr(model, key)), "model.random_weights reads no weights: leave one of them out"
            )


def _check_lora(config: Config) -> None:
    """Refuse what does not go with a LoRA to go on from."""
    lora = config.model.lora
    if lora.path is None:
        if lora.reference == "start":
            schema.refuse("model.lora.reference", "start", "a new LoRA has no effect at first: take base, or name its path")
        return
    if config.model.train == "full":
        schema.refuse("model.lora.path", str(lora.path), "model.train = full trains no LoRA: export it as merged first")
    if lora.targets is not None:
        schema.refuse("model.lora.targets", lora.targets, "the LoRA at model.lora.path has its own layers: leave it out")


def _check_rewards(reward: RewardConfig) -> None:
    used = dict.fromkeys([*REWARDS, *weights_of(reward.train), *weights_of(reward.eval)])
    for key, rewards in (("reward.train", reward.train), ("reward.eval", reward.eval)):
        if not rewards:
            schema.refuse(key, rewards, f"name at least one; choices: {', '.join(REWARDS)}")
        for name in weights_of(rewards):
            if ":" not in name:
                schema.choice(key, name, REWARDS)
    for name in reward.settings:
        if name not in used:
            raise ConfigError(f"reward.settings.{name}: no such reward; {schema.nearest(name, used)}")


def _check_guidance(config: Config) -> None:
    if config.model.negative_prompt and config.rollout.guidance_scale == config.evaluation.guidance_scale == 1:
        schema.refuse(
            "model.negative_prompt", config.model.negative_prompt,
            "rollout.guidance_scale and evaluation.guidance_scale are 1, so that nothing is compared with it; raise one of "
            "them, or leave it out",
        )  # fmt: skip


def _check_rollout(config: Config) -> None:
    schema.choice("rollout.sampler", config.rollout.sampler, SAMPLERS)
    if config.rollout.precision != "fp8":
        return
    if not recomputes_old(config):
        way_out = "v_old of an 8-bit network is not the trained policy's: take update.old_velocity=recompute"
        schema.refuse("rollout.precision", "fp8", way_out)
    if config.model.train != "lora":
        schema.refuse("rollout.precision", "fp8", "only frozen weights have an 8-bit copy: take model.train=lora")


def _check_sizes(config: Config) -> None:
    """Refuse a size that is listed twice, whose weight would be anybody's guess; the model refuses what it cannot make."""
    if config.rollout.sizes and len(sizes := training_sizes(config)) < len(config.rollout.sizes):
        way_out = f"{len(config.rollout.sizes)} sizes, and one stands there twice: list each once, with its weight"
        schema.refuse("rollout.sizes", [str(size) for size in sizes], way_out)


def _check_advantage(advantage: AdvantageConfig, group_size: int) -> None:
    keep = advantage.keep
    if keep is not None and (keep % 2 or keep > group_size):
        way_out = f"half the best and half the worst of a group: an even number from 2 to group_size = {group_size}"
        schema.refuse("advantage.keep", keep, way_out)


def _check_objective(config: Config) -> None:
    """Refuse what the objective does not take, and what it would leave unread."""
    objective, name, limit = config.objective, config.objective.name, config.forward.old_policy.limit
    schema.choice("objective.name", name, OBJECTIVES)
    settings_of(name, objective.settings)
    if "adv_clip_max" in objective.settings:
        way_out = "it is that of the advantages: set advantage.adv_clip_max"
        schema.refuse("objective.settings.adv_clip_max", objective.settings["adv_clip_max"], way_out)
    if name == "guard" and objective.log_prob_weight != "exact":
        schema.refuse("objective.log_prob_weight", objective.log_prob_weight, "guard normalises the exact one: take exact")
    if objective.offline:
        _check_offline(config)
    if OBJECTIVES[name].on_final_images:
        _check_forward(config)
    elif limit > 0:
        way_out = f"{name} takes the transitions of the trained policy; only an objective of the forward process has another"
        schema.refuse("forward.old_policy.limit", limit, way_out)


def _check_offline(config: Config) -> None:
    if config.objective.name not in TARGET_FIELDS:
        schema.refuse("objective.offline", True, f"only {' and '.join(TARGET_FIELDS)} learn from existing images")
    if config.prompts.weights:
        schema.refuse("prompts.weights", config.prompts.weights, "existing images are drawn equally often: leave it out")


def _check_forward(config: Config) -> None:
    """Refuse what an objective of the forward process cannot train on."""
    forward, rollout, name = config.forward, config.rollout, config.objective.name
    if rollout.sampler != "ode":
        schema.refuse("rollout.sampler", rollout.sampler, f"{name} trains on what the ODE ends with: take ode")
    first, end = forward.range or (0, rollout.num_steps)
    if not first < end <= rollout.num_steps:
        schema.refuse("forward.range", (first, end), f"must lie in [0, {rollout.num_steps}], the rollout's steps")
    if forward.num_timesteps > end - first:
        schema.refuse("forward.num_timesteps", forward.num_timesteps, f"there are {end - first} noise levels to draw from")
    if OBJECTIVES[name].pairs and rollout.batch_size % (2 if config.objective.offline else rollout.group_size):
        way_out = f"{name} compares samples of a group, which must lie in one batch: take a multiple of"
        schema.refuse("rollout.batch_size", rollout.batch_size, f"{way_out} {rollout.group_size}")


def _check_window(config: Config) -> None:
    """The sampler's and the window's own rules, tried on the first iteration's windows with evenly spaced sigmas."""
    sigmas = torch.linspace(1, 0, config.rollout.num_steps + 1, dtype=torch.float64)
    try:
        group_schedule(config.rollout, sigmas, 0, config.seed, weighting(config.objective))
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None


def _check_update(config: Config) -> None:
    size, rollout = config.update.micro_batch_size, config.rollout
    transitions = trained_steps(config) * rollout.batch_size
    if isinstance(size, int) and transitions % size:
        schema.refuse(
            "update.micro_batch_size",
            size,
            f"a batch of {rollout.batch_size} images has {transitions} trained transitions: take a divisor of that",
        )
    if size == "largest" and config.engine.zero_stage == 3:
        schema.refuse("update.micro_batch_size", size, "the trial needs whole weights, which ZeRO-3 shards: give a number")


def _check_engine(config: Config) -> None:
    stage, dtype = config.engine.zero_stage, config.model.dtype
    if stage == 0 and dtype != "float32":
        schema.refuse("engine.zero_stage", 0, f"no float32 masters are kept for {dtype} weights at stage 0: take 1")
    if stage == 3 and config.rollout.cuda_graph:
        way_out = "ZeRO-3 moves the weights, which a graph reads by address: take rollout.cuda_graph=false"
        schema.refuse("rollout.cuda_graph", True, way_out)
    if config.model.idle_expert == "host" and config.rollout.cuda_graph:
        way_out = "weights that come and go have no address for a graph to read: take rollout.cuda_graph=false"
        schema.refuse("model.idle_expert", "host", way_out)
    if config.model.idle_expert == "host" and stage == 3:
        schema.refuse("model.idle_expert", "host", "ZeRO-3 shards the weights by itself: take engine.zero_stage=1")


def _check_guard(config: Config) -> None:
    """Refuse a limit of what is never measured."""
    guard, objective = config.guard, config.objective
    if guard.max_kl is not None and objective.beta == 0:
        schema.refuse("guard.max_kl", guard.max_kl, "objective.beta = 0 measures no KL: set beta above 0, or leave it out")
    if guard.max_drift is not None and OBJECTIVES[objective.name].old == "zero":
        schema.refuse("guard.max_drift", guard.max_drift, f"{objective.name} has no old policy to drift from: leave it out")
    if guard.score_drop is not None and config.evaluation.every == 0:
        way_out = "evaluation.every = 0 evaluates only before the first and after the last iteration: set evaluation.every"
        schema.refuse("guard.score_drop", guard.score_drop, way_out)


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    if evaluation.samples > evaluation.batch_size:
        way_out = f"at most evaluation.batch_size = {evaluation.batch_size}"
        schema.refuse("evaluation.samples", evaluation.samples, way_out)
