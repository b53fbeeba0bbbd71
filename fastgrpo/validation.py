"""The configuration: YAML into the dataclasses of `keys.py`, with `--set a.b=c` on top.

What is not understood is refused, never repaired.

    config = load_config("configs/tiny_shapes.yaml", ["rollout.num_steps=8"])

Every error names the key's full path, the value, and the nearest valid choice. A path that starts with `./` or `../` is
relative to the file it stands in.

A file may start from another, named relative to itself, which may do so in turn:

    extends: ../../tiny_shapes.yaml
    rollout: {guidance_scale: 2.0, window: {kind: all_but_last}}

Sections go key by key, nested ones too, and the later file wins. Whatever is one value replaces the earlier one whole: a
number or a list, a free mapping of names (prompts.weights, reward.settings), and a section that names its `kind`, whose
other keys belong to that kind (rollout.window).
"""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import torch
import yaml

from fastgrpo.config import schema
from fastgrpo.config.derived import recomputes_old
from fastgrpo.config.keys import Config, RewardConfig
from fastgrpo.config.schema import ConfigError
from fastgrpo.data.images import DATA
from fastgrpo.learning.objectives import OBJECTIVES, settings_of, weighting
from fastgrpo.models import MODELS
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.rewards import REWARDS, weights_of
from fastgrpo.sampling.schedule import group_schedule
from fastgrpo.sampling.tables import SAMPLERS
from fastgrpo.sampling.windows import window_size


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides of the form `a.b=value`, and check the whole."""
    config = read_config(path, overrides)
    check(config)
    return config


def read_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The same, each key checked by itself and not the whole: to choose some keys by others before that."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; the ready ones are in configs/")
    data = _read(path)
    for override in overrides:
        schema.apply_override(data, override)
    # What is still relative came with an override, from the folder where the command is given.
    data = schema.relative_paths(data, Path.cwd())
    return schema.build(Config, data)


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file and of what it extends, with absolute paths; `heirs` are the files that led here."""
    data = schema.parse_yaml(path.read_text(), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {data!r}")
    named = data.pop("extends", None)
    data = schema.relative_paths(data, path.parent)
    if named is None:
        return data
    parent, heirs = path.parent / str(named), (*heirs, path.resolve())
    if not parent.is_file():
        schema.refuse(f"{path}: extends", named, f"{parent.resolve()} is no file; name one relative to this one's folder")
    if parent.resolve() in heirs:
        way = " -> ".join(str(file) for file in (*heirs[heirs.index(parent.resolve()) :], parent.resolve()))
        schema.refuse(f"{path}: extends", named, f"a circle ({way}); let one of these files extend nothing")
    return schema.merge(Config, _read(parent, heirs), data)


def dump_config(config: Config) -> str:
    """The configuration as YAML with every path absolute, which `load_config` reads back to an equal one.

    Whole: what it extends is part of it.
    """
    return yaml.safe_dump(schema.plain(config), sort_keys=False)


def differences(before: Config, after: Config, but: typing.Sequence[str] = ()) -> list[str]:
    """The keys in which two configurations differ, except those in `but`, as "key: before -> after"."""
    old, new = schema.flat(schema.plain(before)), schema.flat(schema.plain(after))
    rows = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in {**old, **new} if key not in but}
    return [f"{key}: {before} -> {after}" for key, (before, after) in rows.items() if before != after]


def check_folder(config: Config) -> None:
    """Refuse a folder that holds a run of another configuration; only the number of iterations may have changed."""
    path = RunFolder(config.output).config
    changed = differences(load_config(path), config, but=("iterations",)) if path.exists() else []
    if changed:
        raise ConfigError(
            f"output = {config.output}: holds a run of another configuration ({'; '.join(changed)}); "
            "choose another folder with --set output=... or remove it"
        )


def check(config: Config) -> None:
    """Refuse what each key allows but the whole cannot run; the number of processes enters in `check_ranks`."""
    rollout = config.rollout
    _positive(config)
    schema.choice("model.name", config.model.name, MODELS)
    schema.choice("rollout.sampler", rollout.sampler, SAMPLERS)
    schema.choice("objective.name", config.objective.name, OBJECTIVES)
    _check_rewards(config.reward)
    if rollout.group_size < 2:
        schema.refuse("rollout.group_size", rollout.group_size, "advantages compare the images of a group: take at least 2")
    _check_keep(config.advantage.keep, rollout.group_size)
    if rollout.num_steps < 2:
        schema.refuse("rollout.num_steps", rollout.num_steps, "the last step is never trained: take at least 2")
    _check_objective(config)
    _check_steps(config)
    _check_division(config, world_size=1)
    if config.engine.zero_stage == 0 and config.model.dtype != "float32":
        schema.refuse(
            "engine.zero_stage", 0, f"no float32 masters are kept for {config.model.dtype} weights at stage 0: take 1"
        )
    if rollout.cuda_graph and config.engine.zero_stage == 3:
        schema.refuse(
            "rollout.cuda_graph",
            True,
            "ZeRO-3 moves the weights, which a graph reads by address: take rollout.cuda_graph=false",
        )
    if config.model.random_weights and config.model.architecture is None:
        schema.refuse("model.random_weights", True, "of what? name a model.architecture, for example sd3.5-medium")
    if rollout.precision == "fp8":
        _check_fp8(config)
    _check_micro_batch(config)
    if config.evaluation.samples > config.evaluation.batch_size:
        schema.refuse(
            "evaluation.samples",
            config.evaluation.samples,
            f"at most evaluation.batch_size = {config.evaluation.batch_size}",
        )


def _check_keep(keep: int | None, group_size: int) -> None:
    if keep is not None and (keep % 2 or not 2 <= keep <= group_size):
        way_out = f"half the best and half the worst of a group: an even number from 2 to group_size = {group_size}"
        schema.refuse("advantage.keep", keep, way_out)


def _check_rewards(reward: RewardConfig) -> None:
    used = dict.fromkeys([*REWARDS, *weights_of(reward.train), *weights_of(reward.eval)])
    for key, asked in (("reward.train", reward.train), ("reward.eval", reward.eval)):
        if not asked:
            schema.refuse(key, asked, f"name at least one; choices: {', '.join(REWARDS)}")
        for name, weight in weights_of(asked).items():
            if ":" not in name:
                schema.choice(key, name, REWARDS)
            if not math.isfinite(weight):
                schema.refuse(f"{key}.{name}", weight, "a weight must be finite")
    for name in reward.settings:
        if name not in used:
            raise ConfigError(f"reward.settings.{name}: no such reward; {schema.nearest(name, used)}")


def check_ranks(config: Config, world_size: int) -> None:
    """Refuse a number of processes over which an optimiser step does not divide into whole batches."""
    _check_division(config, world_size)


def trained_steps(config: Config) -> int:
    """S, how often each sample is trained on: the steps of the window, or noise levels of the forward process."""
    if OBJECTIVES[config.objective.name].on_final_images:
        return config.forward.num_timesteps
    return window_size(config.rollout.window, config.rollout.num_steps)


def _check_objective(config: Config) -> None:
    """What an objective takes, and what it would leave unread."""
    objective, name, lag = config.objective, config.objective.name, config.forward.old_policy.limit
    settings_of(name, objective.settings)
    if "adv_clip_max" in objective.settings:
        way_out = "it is that of the advantages: set advantage.adv_clip_max"
        schema.refuse("objective.settings.adv_clip_max", objective.settings["adv_clip_max"], way_out)
    if name == "guard" and objective.log_prob_weight != "exact":
        schema.refuse("objective.log_prob_weight", objective.log_prob_weight, "guard normalises the exact one: take exact")
    if objective.offline and name not in DATA:
        schema.refuse("objective.offline", True, f"only {' and '.join(DATA)} learn from images that are there already")
    if objective.offline and config.prompts.weights:
        schema.refuse("prompts.weights", config.prompts.weights, "given images are all taken alike: leave it out")
    if OBJECTIVES[name].on_final_images:
        _check_forward(config)
    elif lag > 0:
        way_out = "takes the transitions of the trained policy; only objectives of the forward process have another"
        schema.refuse("forward.old_policy.limit", lag, f"{name} {way_out}")


def _check_forward(config: Config) -> None:
    """What the forward process cannot run, or would leave unread."""
    forward, rollout, name = config.forward, config.rollout, config.objective.name
    if rollout.sampler != "ode":
        schema.refuse("rollout.sampler", rollout.sampler, f"{name} trains on what the ODE ends with: take ode")
    lo, hi = forward.range or (0, rollout.num_steps)
    if not 0 <= lo < hi <= rollout.num_steps:
        schema.refuse("forward.range", (lo, hi), f"must lie in [0, {rollout.num_steps}], the rollout's steps")
    if forward.num_timesteps > hi - lo:
        schema.refuse("forward.num_timesteps", forward.num_timesteps, f"there are {hi - lo} noise levels to draw from")
    if OBJECTIVES[name].pairs and rollout.batch_size % (2 if config.objective.offline else rollout.group_size):
        way_out = f"{name} compares samples of a group, which must lie in one batch: take a multiple of"
        schema.refuse("rollout.batch_size", rollout.batch_size, f"{way_out} {rollout.group_size}")


def _check_steps(config: Config) -> None:
    """The sampler's and the window's own rules, tried on the first iteration's windows with evenly spaced sigmas."""
    sigmas = torch.linspace(1, 0, config.rollout.num_steps + 1, dtype=torch.float64)
    try:
        group_schedule(config.rollout, sigmas, 0, config.seed, weighting(config.objective))
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None


def _check_division(config: Config, world_size: int) -> None:
    rollout, steps = config.rollout, config.update.steps_per_rollout
    images, share = rollout.groups * rollout.group_size, rollout.batch_size * steps * world_size
    if images % share:
        schema.refuse(
            "rollout.batch_size",
            rollout.batch_size,
            f"groups x group_size = {images} images an iteration do not divide into {steps} optimiser steps of whole "
            f"batches on {world_size} process{'es' * (world_size > 1)}: {images} must be a multiple of {share}",
        )


def _check_fp8(config: Config) -> None:
    if not recomputes_old(config):
        way_out = "v_old of an 8-bit network is not the trained policy's: take update.old_velocity=recompute"
        schema.refuse("rollout.precision", "fp8", way_out)
    if config.model.train != "lora":
        schema.refuse("rollout.precision", "fp8", "only frozen weights have an 8-bit copy: take model.train=lora")


def _check_micro_batch(config: Config) -> None:
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


def describe() -> str:
    """Every key with its type, default and meaning, for `--help`."""
    extends = "  extends (Path, default None)\n      Another file, relative to this one, on top of which these keys go."
    return "\n".join([extends, *schema.describe(Config)])


def _positive(section: Any, prefix: str = "") -> None:
    may_be_zero = {
        "seed",
        "start",
        "beta",
        "weight_decay",
        "every",
        "zero_stage",
        "ema_decay",
        "samples",
        "range",
        "betas",
        "limit",
        "final_learning_rate",
        "decay",
        "decay_from",
    }
    for f in dataclasses.fields(section):
        value, path = getattr(section, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            _positive(value, path + ".")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if value < 0 or (value == 0 and f.name not in may_be_zero) or value != value:
                schema.refuse(path, value, "must be positive" if f.name not in may_be_zero else "must not be negative")
