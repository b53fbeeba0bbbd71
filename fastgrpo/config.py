"""The configuration: YAML into frozen dataclasses, with `--set a.b=c` on top.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fastgrpo import schema
from fastgrpo.after_window import AfterWindow
from fastgrpo.models import MODELS
from fastgrpo.objectives import OBJECTIVES, settings_of
from fastgrpo.offline import DATA
from fastgrpo.rewards import REWARDS, weights_of
from fastgrpo.schedule import group_steps
from fastgrpo.schema import ConfigError
from fastgrpo.sde import SAMPLERS
from fastgrpo.windows import Window, window_size


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 32
    """Rank of the low-rank update of each target."""
    alpha: int = 64
    """Scale of the update: alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the layers to train; none given: the model's own list."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: Path
    """Folder of the pretrained pipeline, in the diffusers format; of BAGEL as published."""
    name: str = "sd3"
    """Model family, see fastgrpo/models."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights and the network's arithmetic; latents and transitions are always float32."""
    architecture: str | None = None
    """Published architecture, see fastgrpo/models/architectures: what `fastgrpo plan` and random_weights build."""
    random_weights: bool = False
    """Run the architecture with random weights and random prompts, to measure speed without a checkpoint."""
    height: int | None = None
    """Of an image, in pixels; left out: what the model was made for."""
    width: int | None = None
    """Likewise."""
    num_frames: int | None = None
    """Of a video, in frames."""
    distilled_guidance: float | None = None
    """Guidance that a distilled model (FLUX.1-dev) takes as an input; it costs nothing."""
    max_text_tokens: int = 256
    """Length of the text sequence, max_sequence_length of the pipeline."""
    tiny_decoder: Path | None = None
    """Folder of an AutoencoderTiny that decodes training images, for rewards that bear it; evaluation never uses it."""
    attention: Literal["native", "flash2", "flash3", "xformers"] = "native"
    """Attention kernels: torch's own, flash-attn 2 or 3, or xformers; all but the first are installed apart."""
    train: Literal["lora", "full"] = "lora"
    """A low-rank update, or every weight of the transformer."""
    compile: bool = False
    """torch.compile each transformer block, once for rollout and update; takes a minute or more at the start."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    train: Path
    """Prompts to train on: a .txt with one a line, or a .jsonl with "prompt" and whatever the reward reads."""
    eval: Path
    """Prompts to evaluate on; none of them may be among the training prompts."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each category ("tag") of the training prompts, say {counting: 2, position: 1}; left out: as in the file."""
    cache: Path | None = None
    """Folder for the embeddings of all prompts, made once; the text encoders then leave the GPU. Left out: in memory."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    train: str | dict[str, float]
    """What is maximised: a name from fastgrpo/rewards or your own `module:function` or `module:Class`; or several with
    their weights, say {tiny_shapes: 1, jpeg_compressibility: 0.01}, and their weighted sum is maximised."""
    eval: str | dict[str, float]
    """What evaluation reports, likewise."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What rewards are made with, by name, say {remote: {urls: ["http://10.0.0.2:8000"]}}."""
    frames: Literal["each", "clip"] = "each"
    """Of a video the mean of its frames' scores, or one score of the whole clip (B, T, 3, H, W)."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_steps: int = 10
    """Denoising steps of a training rollout."""
    sampler: str = "flow_sde"
    """flow_sde, dance_sde, cps or ode; the window decides which steps it takes, the others follow the ODE."""
    noise_level: float = 0.7
    """a of flow_sde, eta of dance_sde and cps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, in rollout and update alike; 1 is none, at half the cost."""
    groups: int = 16
    """Prompts an iteration, over all ranks."""
    group_size: int = 16
    """Images for each prompt: the advantage compares them."""
    batch_size: int = 128
    """Images a forward pass, in rollout and update alike, so that the ratio of the first update is exactly 1."""
    precision: Literal["model", "fp8"] = "model"
    """fp8: frozen layers multiply in 8 bits during rollouts, which are scored again exactly (update.old_velocity)."""
    cuda_graph: bool = True
    """Replay the rollout as one CUDA graph; where there is no GPU it runs eagerly, and says so."""
    window: Window = field(default_factory=Window)
    after_window: AfterWindow = field(default_factory=AfterWindow)
    shared_noise: bool = False
    """A group's images start from the same noise, and are computed once until their window begins: fewer forward passes, and
    less to compare. Flow-GRPO found different noise for each image to train better."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """What `fastgrpo.advantages.group_advantages` takes, under the same names."""

    std: Literal["group", "global"] = "global"
    """Rewards are divided by the standard deviation of their group, or of the whole iteration."""
    adv_clip_max: float = 5.0
    """Advantages are clipped to plus and minus this."""
    combine: Literal["sum", "each"] = "sum"
    """Several rewards: their weighted sum is normalised, or each is before the sum (GDPO, which has std: group)."""
    pairwise: bool = False
    """A reward counts as the share of its group that it beats (Pref-GRPO): of the weighted sum, or of each."""
    keep: int | None = None
    """Of each group only this many images are learned from, half of them the best and half the worst; left out: all."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: str = "clip"
    """Objective, see fastgrpo/objectives/."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The objective's own, say {delta: 1e-6} of dppo: the keyword parameters of its function."""
    offline: bool = False
    """Train sft or dpo on images that are there already: prompts.train then has a "target", or "chosen" and "rejected",
    in each line; or it is a folder of images with captions beside them."""
    clip_range: float = 1e-4
    """Clip of the ratio, quoted for latents of 65,536 elements and scaled by the square root of the size."""
    beta: float = 0.04
    """Weight of the KL to the model before training; 0 saves its forward passes."""
    kl: Literal["paper", "reference"] = "reference"
    """The exact KL of a transition (paper), or the released code's, which leaves out the time step (reference)."""
    log_prob_weight: Literal["exact", "cps_reference"] = "exact"
    """Weight of the log-ratio: 1 / (2 s^2), or 1 as in the released CPS code."""
    step_weight: Literal["uniform", "tempflow", "guard"] | None = None
    """Weight of a step's policy loss: 1; its noise over the mean in the window (TempFlow-GRPO); 1 / |dt| (GRPO-Guard). Left
    out: the objective's own, which is guard for guard and uniform for all others."""


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    learning_rate: float = 3e-4
    """Of AdamW."""
    final_learning_rate: float | None = None
    """Where it falls to, in a straight line over the iterations of the run; left out: it stays."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    steps_per_rollout: int = 2
    """Optimiser steps an iteration, each on its share of the samples; only the first is exactly on-policy."""
    inner_epochs: int = 1
    """Times the samples of an iteration are gone through; more than once asks for a trust region that holds (dppo)."""
    ema_decay: float = 0.9
    """Of the average that is evaluated and saved, once an iteration."""
    micro_batch_size: int | Literal["rollout", "largest"] = "rollout"
    """Transitions a forward pass: the rollout's batch_size, for which the ratio of the first update is exactly 1; a
    number; or the most that GPU memory holds, found by a trial at the start."""
    old_velocity: Literal["rollout", "recompute"] = "rollout"
    """v_old as the rollout left it, or from another forward pass in the update's own shape, where that differs."""
    skip_dead: bool = True
    """Leave out of an optimiser step the batches that would hold only samples of weight 0, whose gradient is 0: groups of
    equal rewards, and what `advantage.keep` leaves out. It saves where a step has several batches."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class OldPolicyConfig:
    limit: float = 0.0
    """A slow average of the trained policy that samples in its place, and that v_old is of: at each iteration it keeps
    min(rate x (iterations so far - start), limit) of itself. 0: the trained policy samples. Published for nft: 0.5."""
    rate: float = 0.001
    """Likewise."""
    start: int = 0
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    num_timesteps: int = 2
    """Noise levels at which an objective of the forward process (nft, awm, dpo, sft) trains each sample."""
    range: tuple[int, int] | None = None
    """[lo, hi) of the rollout's steps whose noise levels are drawn; left out: all."""
    old_policy: OldPolicyConfig = field(default_factory=OldPolicyConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. With LoRA the sharded state is small: 1 is the right choice nearly always."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 20
    """Iterations between evaluations; 0 evaluates only before and after."""
    num_steps: int = 40
    """ODE steps of an evaluation."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of an evaluation."""
    images: int = 400
    """Images of the first and the last evaluation, spread evenly over the prompts' categories."""
    images_between: int = 100
    """Images of the evaluations in between."""
    batch_size: int = 100
    """Images a forward pass."""
    samples: int = 24
    """Images drawn at each evaluation for people to look at: always the same prompts and the same noise."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 20
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig
    prompts: PromptsConfig
    reward: RewardConfig
    output: Path
    """Folder of the run; a run that is already there is resumed."""
    iterations: int = 100
    """Rollouts, each followed by its updates."""
    seed: int = 0
    """Of everything random: the same seed gives the same noise on any number of ranks."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides of the form `a.b=value`, and check the whole."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; the ready ones are in configs/")
    data = _read(path)
    for override in overrides:
        schema.apply_override(data, override)
    # What is still relative came with an override, from the folder where the command is given.
    data = schema.relative_paths(data, Path.cwd())
    config = schema.build(Config, data)
    check(config)
    return config


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
    if OBJECTIVES[config.objective.name].forward:
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
    if OBJECTIVES[name].forward:
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
        group_steps(config.rollout, config.objective, sigmas, 0, config.seed)
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
    if config.update.old_velocity != "recompute":
        way_out = "v_old of an 8-bit network is not the trained policy's: take update.old_velocity=recompute"
        schema.refuse("rollout.precision", "fp8", way_out)
    if config.model.train != "lora":
        schema.refuse("rollout.precision", "fp8", "only frozen weights have an 8-bit copy: take model.train=lora")
    if config.model.dtype == "float16":
        schema.refuse("rollout.precision", "fp8", "the kernels return bfloat16 or float32: take model.dtype=bfloat16")


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
