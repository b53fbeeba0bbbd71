"""Every key of a configuration: its type, its default and what it means, a frozen dataclass a section.

`fastgrpo train --help` prints them; `config.py` reads them from YAML and checks what they are together.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
    """Of the weights and the network's arithmetic (float32 without TF32); latents and transitions are always float32."""
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
    attention: Literal["native", "cudnn", "flash2", "flash3", "xformers"] = "native"
    """Attention kernels: torch's own without cuDNN, cuDNN's on a GPU, or flash-attn 2, 3 or xformers, installed apart."""
    train: Literal["lora", "full"] = "lora"
    """A low-rank update, or every weight of the transformer."""
    compile: bool = False
    """torch.compile each transformer block, once for rollout and update; takes a minute or more for each shape."""
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
class Window:
    """Which steps of a rollout are stochastic and trained: S consecutive ones, the same for a whole group.

    One window a group and not one a sample: noise that differs within a group is mistaken for advantage.
    """

    kind: Literal["all_but_last", "fixed", "random", "progressive"] = "all_but_last"
    """Every step but the last; always at `start`; drawn anew in every iteration; sliding (MixGRPO)."""
    size: int | None = None
    """S, the number of trained steps; left out for `all_but_last`."""
    start: int = 0
    """First trained step of `fixed`."""
    range: tuple[int, int] | None = None
    """[lo, hi): where `random` and `progressive` windows lie, whole; None is every step but the last."""
    stride: int = 1
    """How many steps `progressive` slides at once."""
    every: int = 25
    """After how many iterations `progressive` slides (MixGRPO's tau)."""
    decay: float = 0.0
    """With it `progressive` slides ever faster: by exp(-decay) fewer iterations a step, rounded up (MixGRPO: 0.1)."""
    decay_from: int = 0
    """First step from which `decay` counts (MixGRPO: 13 of 25 steps)."""
    shared: bool = False
    """`random`: one draw for all groups of an iteration (MixGRPO), and not one for each (Flow-GRPO-Fast)."""


@dataclass(frozen=True, kw_only=True)
class AfterWindow:
    """How the steps after the window are taken. Those before it stay: the window's noise would amplify their errors."""

    solver: Literal["euler", "dpmpp_2m"] = "euler"
    """The ODE's first-order step, or DPM-Solver++(2M)'s, which remembers one prediction."""
    compress_ratio: float = 1.0
    """Share of the schedule's steps after the window that are taken, at least one (MixGRPO-Flash: 0.4, or 0.2)."""


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
    """fp8: frozen layers multiply in 8 bits during rollouts, which are scored again exactly (update.old_velocity). It should
    pay only with model.compile: each layer rounds its input in eight launches. An estimate, no GPU has run it."""
    cuda_graph: bool = True
    """Replay the rollout as one CUDA graph; where there is no GPU it runs eagerly, and says so."""
    window: Window = field(default_factory=Window)
    after_window: AfterWindow = field(default_factory=AfterWindow)
    shared_noise: bool = False
    """A group's images start from the same noise, and are computed once until their window begins: fewer forward passes, and
    less to compare. Flow-GRPO found different noise for each image to train better."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """What `fastgrpo.learning.advantages.group_advantages` takes, under the same names."""

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
    old_velocity: Literal["rollout", "recompute"] | None = None
    """v_old as the rollout left it, or from another forward pass, as the update makes it. Left out: rollout, but recompute
    where the update's passes round in another way, so that the first ratio would not be exactly 1: with rollout.precision
    fp8, with another micro_batch_size than the rollout's, and with model.compile below float32."""
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
