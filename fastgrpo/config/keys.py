"""Every key of a configuration: its type, its bounds, its default and what it means, a frozen dataclass a section.

`fastgrpo train --help` prints them. `schema.py` builds them from YAML and refuses what is out of bounds; the rules over
several keys are in `fastgrpo/validation.py`. An upper bound stands where a larger number can only be a mistake.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastgrpo.config.bounds import Above, AtLeast, AtMost, Below

StepCount = Annotated[int, AtLeast(1), AtMost(1000)]
StepIndex = Annotated[int, AtLeast(0), AtMost(1000)]
IterationCount = Annotated[int, AtLeast(1), AtMost(10_000_000)]  # an iteration is one 32-bit word of a noise address
BatchSize = Annotated[int, AtLeast(1), AtMost(10_000)]
ImageCount = Annotated[int, AtLeast(1), AtMost(1_000_000)]
Pixels = Annotated[int, AtLeast(1), AtMost(16_384)]
# v_uncond + scale (v - v_uncond), so that 1 is without guidance.
Guidance = Annotated[float, Above(0, "1 is without guidance; Z-Image's cards say 0: that is 1 here"), AtMost(1000)]
FrameCount = Annotated[int, AtLeast(1), AtMost(10_000)]
Decay = Annotated[float, AtLeast(0), Below(1)]
Seed = Annotated[int, AtLeast(0), AtMost(2**63 - 1)]  # an int64, as JSON's readers and torch's tensors have it
Weight = Annotated[float, AtLeast(-1_000_000), AtMost(1_000_000)]

KLForm = Literal["paper", "reference"]
LogProbWeight = Literal["exact", "cps_reference"]
StepWeight = Literal["uniform", "tempflow", "guard"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank update of the transformer's weights."""

    path: Path | None = None
    """A LoRA that training goes on from: its file, or the folder of a run or of PEFT that holds it. Iteration 0 is its own
    score. Left out: a new one, which has no effect at first."""
    reference: Literal["base", "start"] = "base"
    """What the KL holds to where training goes on from the LoRA at `path`: the model without a LoRA (base), or with that one
    (start)."""
    rank: Annotated[int, AtLeast(1), AtMost(10_000)] = 32
    """Rank of the low-rank update of each layer, that of the LoRA at `path` if there is one."""
    alpha: Annotated[int, AtLeast(1), AtMost(1_000_000)] = 64
    """The low-rank update is scaled by alpha / rank. A LoRA at `path` begins as strong as it is, whatever stands here."""
    targets: tuple[str, ...] | None = None
    """Names of the layers to train. Left out: the list of the model family, or the layers of the LoRA at `path`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained, and how it computes."""

    path: Path
    """Folder of the pretrained pipeline in the diffusers format, or of BAGEL as published."""
    name: str = "sd3"
    """The model's family, one of those in fastgrpo/models."""
    transformer: Path | None = None
    """Weights that take the place of the pipeline's transformer: a folder with a config.json, as full fine-tuning writes it,
    or one .safetensors or .gguf file, under the names of diffusers or of the model's own code. Left out: the pipeline's."""
    variant: str | None = None
    """Read the files of this variant where a part of the pipeline has them, for example fp16 for model.fp16.safetensors.
    Left out: the files without one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights and of the network's arithmetic; float32 is without TF32. Latents and transitions are float32
    whatever stands here."""
    architecture: str | None = None
    """A published architecture from fastgrpo/models/architectures, which `fastgrpo plan` and random_weights build."""
    random_weights: bool = False
    """Run the architecture with random weights and random prompts, to measure speed without a checkpoint."""
    height: Pixels | None = None
    """Height of an image in pixels. Left out: the size that the model was made for."""
    width: Pixels | None = None
    """Width of an image in pixels. Left out: the size that the model was made for."""
    input_size: Pixels | Literal["output"] | None = None
    """Size of an input image that Qwen-Image-Edit reads: the side in pixels of the square that has its area, whatever its
    proportions, or `output`, which stretches it to the size of the output. Left out: 1024, as in the published pipelines."""
    num_frames: FrameCount | None = None
    """Number of frames of a video. Left out: the number that the model was made for."""
    strength: Annotated[float, AtLeast(0.01), AtMost(1)] | None = None
    """How far a model that reads a video goes from it: its steps are the last of a schedule of num_steps / strength steps,
    and begin with the video and as much noise as their first level says. At 1 they begin with noise alone. Left out: 0.8, as
    in the stock pipeline."""
    distilled_guidance: Annotated[float, Above(0), AtMost(1000)] | None = None
    """Guidance scale that a distilled model such as FLUX.1-dev takes as an input. It needs no second forward pass."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts are trained, where a model has one for high noise and one for low, as Wan2.2-A14B has. They must be the
    ones that make the steps of rollout.window, or the noise levels of forward.range."""
    idle_expert: Literal["device", "host"] = "device"
    """Where the frozen weights wait of an expert that makes no velocity at the moment, where a model has two. On the host,
    in pinned memory, they take none of the GPU's, and are copied back each time that the other expert has its turn."""
    max_text_tokens: Annotated[int, AtLeast(1), AtMost(100_000)] | None = None
    """Length of the text sequence, called max_sequence_length in the diffusers pipelines. Left out: the stock
    pipeline's default, to which Qwen-Image-Edit adds the tokens of its input images in the text encoder."""
    negative_prompt: str = ""
    """Text that classifier-free guidance compares a prompt with, in rollouts, updates and evaluations alike; the input
    images stay the same. Left empty: no text."""
    tiny_decoder: Path | None = None
    """Folder of an AutoencoderTiny that decodes training images, for rewards that tolerate it. Evaluation never uses it."""
    attention: Literal["native", "cudnn", "flash2", "flash3", "xformers"] = "native"
    """Attention kernels: native is torch's own without cuDNN, and cudnn is cuDNN's on a GPU. flash2, flash3 and xformers
    are packages of their own, which have to be installed."""
    train: Literal["lora", "full"] = "lora"
    """Train a low-rank update (lora), or every weight of the transformer (full)."""
    compile: bool = False
    """Compile each transformer block with torch.compile, as one program for rollout and update, and the decoder of images.
    Each shape takes a minute or more."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The prompts to train and to evaluate on."""

    train: Path
    """Prompts to train on: a .txt with one a line, or a .jsonl with "prompt" and whatever the reward reads in each line."""
    eval: Path
    """Prompts to evaluate on. None of them may be among the training prompts."""
    images_outside: bool = False
    """Take images that lie outside of the folder of the prompt file that names them: by an absolute path, by .., or by a
    link. Left out: such a line is refused, as a prompt file from somebody else could name any file of this machine."""
    weights: dict[str, Annotated[float, AtLeast(0), AtMost(1_000_000)]] = field(default_factory=dict)
    """How often prompts of each category ("tag") are drawn, relative to the other categories, for example
    {counting: 2, position: 1}. Left out: every prompt equally often."""
    cache: Path | None = None
    """Folder for the embeddings of the prompts that the run draws, which are made once, before it begins; the text encoders
    then leave the GPU. Left out: prompts are encoded when they are drawn, and again when they have left the memory."""
    in_memory: Annotated[float, Above(0), AtMost(100_000)] = 4.0
    """GiB of the host's memory, for each process, in which the embeddings of the latest prompts are kept. On the GPU are
    those of one iteration, each prompt's once."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is maximised, and what is reported."""

    train: str | dict[str, Weight]
    """The reward to maximise: a name from fastgrpo/rewards, or your own `module:function`, `module:Class` or
    `path/to/file.py:function`. Several with their weights, for example {tiny_shapes: 1, jpeg_compressibility: 0.01}, are
    maximised as their weighted sum."""
    eval: str | dict[str, Weight]
    """The reward that evaluation reports, or several with their weights, written as in reward.train."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The settings of each reward by its name, for example {remote: {urls: ["http://10.0.0.2:8000"]}}."""
    frames: Literal["each", "clip"] = "each"
    """How a video is scored: as the mean of the scores of its frames (each), or once as a clip (B, T, 3, H, W)."""
    folder: Path | None = None
    """Where a reward of your own is looked for, after the installed packages and the working directory. Left out: where the
    configuration is, if that names a reward of your own."""
    timeout: Annotated[float, Above(0), AtMost(1_000_000)] = 1200.0
    """Seconds that a batch's scores are waited for; then the run saves its state and stops."""
    not_finite: Literal["error", "worst"] = "error"
    """A score that is not finite stops the run (error), or counts as the worst score of the iteration (worst)."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which steps of a rollout are stochastic and trained: S consecutive ones, the same for a whole group.

    One window a group and not one a sample: noise that differs within a group is mistaken for advantage.
    """

    kind: Literal["all_but_last", "fixed", "random", "progressive"] = "all_but_last"
    """The window holds every step but the last (all_but_last), always begins at `start` (fixed), is drawn anew in every
    iteration (random), or slides from the first steps to the last (progressive, of MixGRPO)."""
    size: StepCount | None = None
    """Number S of trained steps. Left out: for all_but_last, which has all steps but one; the other kinds need it."""
    start: StepIndex = 0
    """Index of the first trained step of a fixed window."""
    range: tuple[StepIndex, StepIndex] | None = None
    """Steps [first, end) in which a random or progressive window lies whole. Left out: all steps but the last."""
    stride: StepCount = 1
    """Number of steps by which a progressive window slides at once."""
    every: IterationCount = 25
    """Number of iterations after which a progressive window slides (tau of MixGRPO)."""
    decay: Annotated[float, AtLeast(0), AtMost(100)] = 0.0
    """With a decay a progressive window slides ever faster: each step takes exp(-decay) times the iterations of the one
    before, rounded up (MixGRPO: 0.1)."""
    decay_from: StepIndex = 0
    """Index of the step from which on `decay` counts (MixGRPO: 13 of 25 steps)."""
    shared: bool = False
    """Draw one random window for all groups of an iteration (MixGRPO) instead of one for each group (Flow-GRPO-Fast)."""


@dataclass(frozen=True, kw_only=True)
class AfterWindow:
    """How the steps after the window are taken. Those before it stay: the window's noise would amplify their errors."""

    solver: Literal["euler", "dpmpp_2m"] = "euler"
    """Solver of the ODE after the window: Euler's first-order step, or DPM-Solver++(2M), which remembers one prediction."""
    compress_ratio: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Fraction of the schedule's steps after the window that are taken, at least one step (MixGRPO-Flash: 0.4, or 0.2)."""


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """One of the sizes of `rollout.sizes`, with how often it is drawn."""

    height: Pixels
    """Height of an image in pixels."""
    width: Pixels
    """Width of an image in pixels."""
    num_frames: FrameCount | None = None
    """Number of frames of a video. Left out: that of the model."""
    weight: Annotated[float, Above(0), AtMost(1_000_000)] = 1.0
    """How many iterations have this size, relative to the other sizes."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How training images are drawn."""

    num_steps: Annotated[int, AtLeast(2), AtMost(1000)] = 10
    """Number of denoising steps of a training rollout. The last is never trained, so there are at least two."""
    sampler: str = "flow_sde"
    """Sampler of the steps in the window: flow_sde, dance_sde, wan_sde, cps or ode. All other steps follow the ODE."""
    sizes: tuple[tuple[Pixels, Pixels] | SizeConfig, ...] = ()
    """Sizes of training images, of which each iteration has one: [height, width], or {height, width, num_frames, weight}
    with the frames of a video and how many iterations have this size, relative to the others. Left out: all images have
    the model's own size (model.height, model.width, model.num_frames)."""
    noise_level: Annotated[float, Above(0), AtMost(10)] = 0.7
    """Noise of the sampler, called a in flow_sde and eta in dance_sde and cps. wan_sde is as released at 1."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance of rollout and update alike. At 1 there is none, which halves the cost."""
    groups: Annotated[int, AtLeast(1), AtMost(10_000)] = 16
    """Number of prompts in an iteration, over all ranks."""
    group_size: Annotated[int, AtLeast(2), AtMost(10_000)] = 16
    """Number of images for each prompt, at least two, as the advantage compares them."""
    batch_size: BatchSize = 128
    """Number of images in a forward pass of rollout and update alike, so that the ratio of the first update is exactly 1."""
    precision: Literal["model", "fp8"] = "model"
    """With fp8 the frozen layers multiply in 8 bits during rollouts, which are scored again exactly (update.old_velocity).
    It pays only with model.compile, as each layer rounds its input in eight launches: on an H200 a rollout of SD3.5-M was
    1.45 times slower without it and 1.11 times faster with it."""
    cuda_graph: bool = True
    """Replay the rollout as one CUDA graph. Without a GPU the rollout runs eagerly, and says so."""
    window: Window = field(default_factory=Window)
    after_window: AfterWindow = field(default_factory=AfterWindow)
    shared_noise: bool = False
    """Start all images of a group from the same noise, and compute them once until their window begins: fewer forward
    passes, and less to compare. Flow-GRPO found different noise for each image to train better."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """What `fastgrpo.learning.advantages.group_advantages` takes, under the same names."""

    std: Literal["group", "global"] = "global"
    """Rewards are divided by the standard deviation of their group (group), or of the whole iteration (global)."""
    adv_clip_max: Annotated[float, Above(0)] = 5.0
    """Advantages are clipped to plus and minus this number."""
    combine: Literal["sum", "each"] = "sum"
    """With several rewards, normalise their weighted sum (sum), or each reward before the sum (each). GDPO is each with
    advantage.std: group."""
    pairwise: bool = False
    """Replace a reward by the fraction of its group that it beats (Pref-GRPO): the weighted sum, or each reward, as
    advantage.combine says."""
    keep: Annotated[int, AtLeast(2), AtMost(10_000)] | None = None
    """Learn from only this many images of each group, half of them the best and half the worst. Left out: from all."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the update minimises."""

    name: str = "clip"
    """The objective, one of those in fastgrpo/learning/objectives."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of this objective alone, the keyword parameters of its function, for example {delta: 1e-6} for dppo."""
    offline: bool = False
    """Train sft or dpo on existing images instead of rollouts. Each line of prompts.train then has a "target", or "chosen"
    and "rejected"; or prompts.train is a folder of images with captions beside them."""
    clip_range: Annotated[float, Above(0)] = 1e-4
    """Clip range of the ratio, quoted for latents of 65,536 elements and scaled by the square root of the size."""
    beta: Annotated[float, AtLeast(0), AtMost(1_000_000)] = 0.04
    """Weight of the KL to the model before training. At 0 its forward passes are saved."""
    kl: KLForm = "reference"
    """The exact KL of a transition (paper), or that of the released code, which leaves out the time step (reference)."""
    log_prob_weight: LogProbWeight = "exact"
    """Weight of the log-ratio: 1 / (2 s^2) (exact), or 1 as in the released CPS code (cps_reference)."""
    step_weight: StepWeight | None = None
    """Weight of a step's policy loss: 1 (uniform), its noise over the mean in the window (tempflow, of TempFlow-GRPO), or
    1 / |dt| (guard, of GRPO-Guard). Left out: the objective's own, which is guard for guard and uniform for all others."""


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How the weights are updated."""

    learning_rate: Annotated[float, Above(0), AtMost(1000)] = 3e-4
    """Learning rate of the optimiser, AdamW."""
    final_learning_rate: Annotated[float, AtLeast(0), AtMost(1000)] | None = None
    """Learning rate of the last iteration, to which it changes in a straight line. Left out: it stays the same."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay of the averages of the gradient and of its square."""
    weight_decay: Annotated[float, AtLeast(0), AtMost(100)] = 1e-4
    """AdamW's weight decay, by which learning_rate times the weights is subtracted in each step."""
    max_grad_norm: Annotated[float, Above(0)] = 1.0
    """Gradients of a larger norm are scaled down to this one."""
    steps_per_rollout: Annotated[int, AtLeast(1), AtMost(10_000)] = 2
    """Number of optimiser steps in an iteration, each on an equal part of its samples. Only the first is on-policy."""
    inner_epochs: Annotated[int, AtLeast(1), AtMost(1000)] = 1
    """How often the samples of an iteration are gone through. More than once asks for a trust region that holds (dppo)."""
    ema_decay: Decay = 0.9
    """Decay of the moving average of the weights, which is updated once an iteration and is what is evaluated and saved."""
    micro_batch_size: Annotated[int, AtLeast(1), AtMost(10_000_000)] | Literal["rollout", "largest"] = "rollout"
    """Number of transitions in a forward pass of the update. It is the rollout's batch_size (rollout), for which the ratio
    of the first update is exactly 1; or a number; or the most that GPU memory holds, found by a trial at the start
    (largest)."""
    old_velocity: Literal["rollout", "recompute"] | None = None
    """Take v_old as the rollout left it (rollout), or from another forward pass as the update makes it (recompute). Left
    out: rollout, but recompute where the update's passes round in another way, so that the first ratio would not be exactly
    1: with rollout.precision fp8, and with another micro_batch_size than the rollout's."""
    skip_dead: bool = True
    """Leave out of an optimiser step the batches that would hold only samples of weight 0, whose gradient is 0: groups of
    equal rewards, and what `advantage.keep` leaves out. It saves time where a step has several batches."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which takes less memory and more time."""


@dataclass(frozen=True, kw_only=True)
class OldPolicyConfig:
    """The slow average of the trained policy that samples in its place, as in DiffusionNFT.

    At each iteration it keeps min(rate x (iterations so far - start), limit) of itself.
    """

    limit: Decay = 0.0
    """Most that the sampling policy keeps of itself in an iteration; it is a slow average of the trained policy, and v_old
    is its velocity. At 0 the trained policy samples. DiffusionNFT has 0.5."""
    rate: Annotated[float, Above(0)] = 0.001
    """How much more of itself the sampling policy keeps with each iteration, until it keeps forward.old_policy.limit."""
    start: Annotated[int, AtLeast(0), AtMost(10_000_000)] = 0
    """Number of iterations in which the sampling policy keeps nothing of itself, before forward.old_policy.rate counts."""


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How objectives of the forward process noise the final images again."""

    num_timesteps: StepCount = 2
    """Number of noise levels at which an objective of the forward process (nft, awm, dpo, sft) trains each sample."""
    range: tuple[StepIndex, StepIndex] | None = None
    """Steps [first, end) of the rollout's schedule whose noise levels are drawn. Left out: all steps."""
    old_policy: OldPolicyConfig = field(default_factory=OldPolicyConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed divides the work over ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of DeepSpeed's ZeRO. With LoRA the sharded state is small, so 1 is nearly always the right choice."""
    lost_after: Annotated[float, AtLeast(5), AtMost(1_000_000)] = 120.0
    """Seconds without a sign of life after which a rank counts as lost, and the others end."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the averaged weights are scored on held-out prompts."""

    every: Annotated[int, AtLeast(0), AtMost(10_000_000)] = 20
    """Number of iterations between evaluations. At 0 only the first and the last are left."""
    num_steps: StepCount = 40
    """Number of ODE steps for each image of an evaluation."""
    height: Pixels | None = None
    """Height of an evaluation's images in pixels. Left out: model.height."""
    width: Pixels | None = None
    """Width of an evaluation's images in pixels. Left out: model.width."""
    num_frames: FrameCount | None = None
    """Number of frames of an evaluation's videos. Left out: model.num_frames."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance of an evaluation. At 1 there is none, which halves the cost."""
    images: ImageCount = 400
    """Number of images of the first and the last evaluation, spread evenly over the categories of the prompts."""
    images_between: ImageCount = 100
    """Number of images of each evaluation in between."""
    batch_size: BatchSize = 100
    """Number of images in a forward pass of an evaluation."""
    samples: Annotated[int, AtLeast(0), AtMost(10_000)] = 24
    """Number of images drawn at each evaluation for people to look at, always of the same prompts and the same noise. At 0
    none are drawn."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved."""

    every: IterationCount = 20
    """Number of iterations between checkpoints. There is one after the last iteration whatever stands here."""
    keep: Annotated[int, AtLeast(1), AtMost(1_000_000)] = 2
    """Number of checkpoints that are kept; older ones are removed."""
    keep_best: bool = False
    """Keep the checkpoint of the best evaluation too, and its weights in the folder best/ of the run's."""
    in_memory: bool = True
    """Keep a copy of the state in host memory after every iteration, which is saved whatever ends the run. Without it an
    ending leaves the last checkpoint."""
    grace: Annotated[float, AtLeast(1), AtMost(1_000_000)] = 20.0
    """Seconds from SIGTERM or Ctrl-C to the end of the process, by which the state is saved. Kubernetes, Slurm, torchrun and
    deepspeed kill after 30."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What ends a run before it spoils what it has learned. The limits are off unless they are set: what is normal depends
    on the objective, its form of the KL and the noise of an evaluation."""

    bad_updates: Annotated[int, AtLeast(1), AtMost(10_000)] = 3
    """Number of updates in a row whose loss or gradient is not finite after which the run stops. Fewer are skipped and
    written to faults.jsonl. Steps that float16 skips to find the scale of its loss do not count."""
    max_kl: Annotated[float, Above(0)] | None = None
    """Highest KL to the model before training, the metric `kl`, that an iteration may have; the run stops above it. It is
    measured only where objective.beta is above 0. Left out: no limit."""
    max_drift: Annotated[float, Above(0)] | None = None
    """Highest distance of the policy from the one that sampled, the metric `drift`, that an iteration may have; the run
    stops above it. Left out: no limit."""
    score_drop: Annotated[float, Above(0), AtMost(1)] | None = None
    """The run stops when the held-out score falls below best - score_drop x max(|best|, |base|), where best is the highest
    of all evaluations so far: for scores from 0 up, 0.5 is a fall to half of the best. Left out: no limit, as a low score of
    few images falls by half by chance."""
    warn_every: IterationCount = 100
    """Number of iterations after which the same warning of a collapse may be printed again."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig
    prompts: PromptsConfig
    reward: RewardConfig
    output: Path
    """Folder of the run. A run that is already there is resumed."""
    iterations: IterationCount = 100
    """Number of rollouts, each followed by its updates."""
    seed: Seed = 0
    """Seed of everything that is random: the same seed gives the same noise on any number of ranks."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
