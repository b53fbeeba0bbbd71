"""What a run will need, before a machine is rented: parameters, memory, FLOPs, expected speed.

    fastgrpo plan --config configs/sd3_compressibility.yaml --gpus 8

Nothing is measured on a GPU. The published architecture is built on the meta device, where tensors have shapes and no data;
its FLOPs are counted there, operation by operation, and so is the memory that is live at a time. With F a forward pass of
one image, B its forward and backward pass with what is trained, g = 2 under classifier-free guidance and else 1:

    FLOPs an image = g F (T + S if beta > 0, + S if v_old is recomputed) + g B S + decoding, + g F S with checkpointing
    images a second and GPU = MFU * peak / FLOPs an image

S of the T steps are trained. T is an average where steps are shared by a group or left out after the window. What a rollout
computes once for all its steps, by `Policy.prepared`, is in one of the T forward passes alone.

With `rollout.sizes` FLOPs are the mean over the sizes, as often as each is drawn, and memory is that of the largest.

The peak of memory is what is held all the time and, on top, the most that one phase works with: rollout, decoding or update.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from fastgrpo.commands.arguments import add_set, of_type, path
from fastgrpo.commands.counting import counted, flash_attention
from fastgrpo.config.bounds import Above, AtLeast, AtMost
from fastgrpo.config.sizes import at_size, training_sizes
from fastgrpo.data.images import TARGET_FIELDS
from fastgrpo.engine.options import LARGEST_BUCKET
from fastgrpo.files import json_text
from fastgrpo.learning.objectives import OBJECTIVES, weighting
from fastgrpo.measure import GIB
from fastgrpo.models import model_class
from fastgrpo.models.settings import model_settings
from fastgrpo.policy import Policy, expert_rule
from fastgrpo.records import concatenate
from fastgrpo.sampling.schedule import group_schedule
from fastgrpo.sampling.windows import differ_by_group
from fastgrpo.validation import Config, ConfigError, check_experts, load_config, recomputes_old, trained_steps

GpuCount = Annotated[int, AtLeast(1), AtMost(1_000_000)]
Mfu = Annotated[float, Above(0), AtMost(1)]
Teraflops = Annotated[float, Above(0), AtMost(1_000_000)]
META = torch.device("meta")
ADAM_BYTES = 8  # two float32 moments


@dataclass(frozen=True)
class Counts:
    """The costs of one image at the configuration's size, and the memory that the configuration's batches work with."""

    parameters: int
    trained: int
    buffer_bytes: int  # of what the transformer holds beside its parameters: positions, mostly
    vae_bytes: int  # of the decoder, which need not have the model's dtype
    latent_elements: int
    forward_flops: int
    prepared_flops: int  # of a forward pass, what a rollout does once for all its steps
    train_flops: int  # forward and backward pass, without what checkpointing computes again
    checkpoint_flops: int  # what it computes again of a transition
    decode_flops: int
    conditioning_bytes: int  # what is read of one prompt
    rollout_bytes: int  # live at a time in a forward pass of a rollout's batch
    decode_bytes: int  # live at a time while a batch is decoded
    update_bytes: int  # live at a time in a micro-batch's forward and backward pass: activations and gradients

    def rollout_flops(self, forwards: float, samples: int = 1) -> float:
        """FLOPs of so many forward passes of a rollout, of all its samples together."""
        return forwards * (self.forward_flops - self.prepared_flops) + samples * self.prepared_flops


def count(config: Config) -> Counts:
    """Counts the configuration's architecture, built on the meta device."""
    if config.model.architecture is None:
        raise ConfigError("model.architecture: name the published architecture to plan for, for example sd3.5-medium")
    model = model_class(config.model.name).random(
        config.model.architecture, dtype=getattr(torch, config.model.dtype), device=META, **model_settings(config.model)
    )
    check_experts(config, model)
    return count_model(config, model)


def count_model(config: Config, model: Any) -> Counts:
    """Counts an adapter that has nothing to train yet; only its shapes are left afterwards.

    Of a model of two experts a forward pass is that of one. Both work in an update where a micro-batch may ask for both.
    """
    # As many tokens as the encoders make; without them, or where they read an image too, as many as a prompt may have.
    conditioning = model.placeholder(1) if model.image_conditioned else model.encode([""])
    conditioning = type(conditioning)(*(tensor.to(META) for tensor in conditioning))
    model = type(model)(model.pipeline, dtype=model.dtype, device=META, **vars(model.settings))
    batch, guided = config.rollout.batch_size, passes(config)
    latents = torch.empty(batch, *model.latent_shape, device=META)
    policy, several = Policy(model), expert_rule(model) is not None

    def velocity(rows: int, experts: tuple[int, ...], *, in_rollout: bool = False) -> Callable[[], torch.Tensor]:
        x, sigma = latents[:1].to(model.dtype).repeat_interleave(rows, 0), torch.ones(rows, device=META)
        prompts, asked = concatenate([conditioning] * rows), experts if several else None
        return lambda: policy(x, sigma, policy.prepared(prompts) if in_rollout else prompts, asked)

    with torch.no_grad(), flash_attention():
        forward_flops, rollout_bytes = counted(velocity(guided * batch, (0,), in_rollout=True))
        prepared_flops, _ = counted(lambda: policy.prepared(conditioning))
        decode_flops, decode_bytes = counted(lambda: model.decode(latents))
    if config.model.train == "full":
        model.train_all(keep_reference=False)
    else:
        model.add_lora(rank=config.model.lora.rank, alpha=config.model.lora.alpha, targets=config.model.lora.targets)
    model.transformer.train()
    transitions, trained = guided * micro_batch(config), model.transformer.trained if several else ()
    forward, again = velocity(transitions, trained[:1]), 0
    with flash_attention():
        train_flops, update_bytes = counted(lambda: forward().sum().backward())
        if config.update.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
            checkpointed, update_bytes = counted(lambda: forward().sum().backward())
            again = checkpointed - train_flops
        if len(trained) > 1 and mixes_steps(config):
            _, update_bytes = counted(lambda: velocity(transitions, trained)().sum().backward())
    return Counts(
        parameters=sum(p.numel() for name, p in model.transformer.named_parameters() if "lora_" not in name),
        trained=sum(p.numel() for p in model.transformer.parameters() if p.requires_grad),
        buffer_bytes=sum(b.nbytes for b in model.transformer.buffers()),
        vae_bytes=sum(p.nbytes for p in model.pipeline.vae.parameters()),
        latent_elements=latents[0].numel(),
        forward_flops=forward_flops // (guided * batch),
        prepared_flops=prepared_flops,
        train_flops=train_flops // transitions,
        checkpoint_flops=again // transitions,
        decode_flops=decode_flops // batch,
        conditioning_bytes=sum(tensor.nbytes for tensor in conditioning),
        rollout_bytes=rollout_bytes,
        decode_bytes=decode_bytes,
        update_bytes=update_bytes,
    )


def passes(config: Config) -> int:
    """How often a sample is asked for: twice under classifier-free guidance."""
    return 2 if config.rollout.guidance_scale != 1 else 1


def micro_batch(config: Config) -> int:
    """Transitions a forward pass of the update; of "largest" it is not known here."""
    size = config.update.micro_batch_size
    return size if isinstance(size, int) else config.rollout.batch_size


def prompt_rows(config: Config, gpus: int) -> int:
    """The most rows that a GPU holds of an iteration: one of each prompt, and of what guidance compares it with."""
    rollout, objective = config.rollout, config.objective
    each = len(TARGET_FIELDS[objective.name]) if objective.offline else rollout.group_size  # consecutive samples of a prompt
    share = -(-rollout.groups * rollout.group_size // gpus)
    starts = range(0, share * min(gpus, each), share)  # of the ranks; a later one begins within a group as one of these does
    prompts = max((start + share - 1) // each - start // each + 1 for start in starts)
    if passes(config) == 1:
        return prompts
    return 2 * prompts if model_class(config.model.name).image_conditioned else prompts + 1


def mixes_steps(config: Config) -> bool:
    """Whether a micro-batch may hold transitions of several steps."""
    every_level = OBJECTIVES[config.objective.name].on_final_images
    window, batch = config.rollout.window, config.rollout.batch_size
    return every_level or differ_by_group(window) or batch % micro_batch(config) > 0


def flops_per_image(config: Config, counts: Counts) -> dict[str, float]:
    """FLOPs that an image takes in an iteration, by what they are for."""
    forward, guided = counts.forward_flops, passes(config)
    objective, trained = OBJECTIVES[config.objective.name], trained_steps(config)
    rescored = objective.old != "zero" if objective.on_final_images else recomputes_old(config)
    epochs = config.update.inner_epochs
    return {
        "rollout": 0 if config.objective.offline else guided * counts.rollout_flops(rollout_forwards(config)),
        "decode": counts.decode_flops,
        "update": epochs * guided * trained * counts.train_flops,
        "checkpoints": epochs * guided * trained * counts.checkpoint_flops,
        "reference": epochs * guided * trained * forward * (config.objective.beta > 0),
        "old velocity": guided * trained * forward * rescored,
    }


def rollout_forwards(config: Config) -> float:
    """Forward passes that an image's rollout takes, the mean over a hundred iterations, as a window may move."""
    rollout, iterations = config.rollout, config.iterations
    sigmas = torch.linspace(1, 0, rollout.num_steps + 1, dtype=torch.float64)
    schedules = (
        group_schedule(rollout, sigmas, iteration, config.seed, weighting(config.objective))
        for iteration in range(1, iterations + 1, max(1, iterations // 100))
    )
    return statistics.fmean(schedule.forward_passes(rollout.group_size) for schedule in schedules) / rollout.group_size


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, by what they are for."""

    held: dict[str, float]  # all the time
    phases: dict[str, float]  # on top, at most, in each phase

    @property
    def peak(self) -> float:
        """The most at a time."""
        return sum(self.held.values()) + max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "peak": self.peak}


def memory(config: Config, counts: Counts, gpus: int, stage: int) -> Memory:
    """The memory at a ZeRO stage. `counts` are of this configuration, as they know the size of its batches."""
    width = torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size()
    rollout, full = config.rollout, config.model.train == "full"
    frozen = counts.parameters - (counts.trained if full else 0)
    if config.model.idle_expert == "host" and not mixes_steps(config):
        frozen //= 2  # of two experts of one size
    masters = 0 if config.model.dtype == "float32" else 4
    trained = trained_steps(config)
    images = rollout.groups * rollout.group_size / gpus
    prompt, asked = counts.conditioning_bytes, passes(config) * counts.conditioning_bytes  # asked: for a sample
    # DeepSpeed copies gradients into a bucket, in stage 1 in float32. Without it they are those that autograd makes.
    bucket = min(counts.trained, LARGEST_BUCKET) * (0, 4, width, width)[stage]
    return Memory(
        held={
            "weights": (frozen + counts.trained) * width / (gpus if stage == 3 else 1) + counts.buffer_bytes,
            "reference copy": counts.trained * width * (full and config.objective.beta > 0),
            "8-bit copy": counts.parameters * (rollout.precision == "fp8"),
            "gradients": counts.trained * 4 / (gpus if stage >= 2 else 1) * (stage > 0),
            "optimiser": counts.trained * (ADAM_BYTES + masters) / (gpus if stage >= 1 else 1),
            "average (EMA)": counts.trained * 4,
            "decoder": counts.vae_bytes,
            "prompts": prompt_rows(config, gpus) * prompt,
            "trajectories": images * counts.latent_elements * (4 * (trained + 1) + width * trained),
        },
        phases={
            "rollout": 0 if config.objective.offline else counts.rollout_bytes + rollout.batch_size * asked,
            "decoding": 0 if config.objective.offline else counts.decode_bytes,
            "update": counts.update_bytes + micro_batch(config) * asked + bucket,
        },
    )


def plan(config: Config, gpus: int, mfu: float, peak: float) -> dict[str, Any]:
    """All that is counted and expected. `peak` is the FLOP/s of one GPU in the model's dtype.

    Of several sizes the FLOPs are the mean over iterations, and the memory is that of the hungriest.
    """
    shares = training_sizes(config)
    counts = {size: count(at_size(config, size)) for size in shares}
    flops = {size: flops_per_image(config, one) for size, one in counts.items()}
    largest = max(shares, key=lambda size: counts[size].latent_elements)
    per_image = {name: sum(shares[size] * one[name] for size, one in flops.items()) for name in flops[largest]}
    total = sum(per_image.values())
    images = config.rollout.groups * config.rollout.group_size
    speed = mfu * peak / total
    return {
        "architecture": config.model.architecture, "dtype": config.model.dtype, "gpus": gpus,
        "counts": vars(counts[largest]), "flops_per_image": per_image | {"total": total},
        "sizes": {
            str(size): {"share": share, "flops_per_image": sum(flops[size].values())} for size, share in shares.items()
        } if config.rollout.sizes else {},
        "memory_bytes": {f"stage {stage}": most_memory(config, counts.values(), gpus, stage) for stage in stages(config)},
        "mfu": mfu, "peak_flops": peak, "images_per_second_and_gpu": speed,
        "seconds_per_iteration": images / (speed * gpus),
    }  # fmt: skip


def most_memory(config: Config, counts: Iterable[Counts], gpus: int, stage: int) -> dict[str, Any]:
    """The memory at the size that takes the most. counts: of each size."""
    return max((memory(config, one, gpus, stage) for one in counts), key=lambda one: one.peak).as_dict()


def stages(config: Config) -> list[int]:
    """The ZeRO stages that this configuration could run."""
    return [0, 1, 2, 3] if config.model.dtype == "float32" else [1, 2, 3]


def rate(per_second: float, things: str) -> str:
    """How many there are in the shortest unit of time in which a number of two decimals says two digits of it."""
    units = {"a second": 1, "a minute": 60, "an hour": 3600, "a day": 86_400}
    unit = next((unit for unit, seconds in units.items() if per_second * seconds >= 0.1), "a day")
    number = per_second * units[unit]
    return f"{number:8.2f} {things} {unit}" if number >= 0.1 else f"{number:8.1e} {things} {unit}"


def row(name: str, column: Sequence[float]) -> str:
    return f"  {name:14}" + "".join(f"{value / GIB:10.2f}" for value in column)


def plan_table(result: dict[str, Any], config: Config) -> str:
    """The plan as lines of text."""
    counts, per_image = Counts(**result["counts"]), result["flops_per_image"]
    thing, one = ("video", "a video") if "num_frames" in model_class(config.model.name).takes else ("image", "an image")
    share = counts.trained / (counts.parameters + counts.trained * (config.model.train == "lora"))
    lines = [
        f"{result['architecture']}, {result['dtype']}, {result['gpus']} GPUs",
        "",
        f"transformer     {counts.parameters / 1e9:8.2f} B parameters",
        f"trained         {counts.trained / 1e6:8.2f} M ({share:.1%}, {config.model.train})",
        f"latent          {counts.latent_elements:8,} numbers",
        f"forward pass    {counts.forward_flops / 1e12:8.2f} TFLOP {one}, "
        f"{counts.train_flops / counts.forward_flops:.2f} times that with backward",
        "",
        f"{f'TFLOP {one}':16}" + "   ".join(f"{name} {value / 1e12:.1f}" for name, value in per_image.items() if value),
        *by_size(result["sizes"]),
        f"expected        {rate(result['images_per_second_and_gpu'], f'{thing}s')} and GPU, "
        f"{result['seconds_per_iteration']:.1f} s an iteration, "
        f"at {result['mfu']:.0%} of {result['peak_flops'] / 1e12:.0f} TFLOP/s",
        "",
        "GiB on each GPU " + "".join(f"{stage:>10}" for stage in result["memory_bytes"]),
    ]
    columns = list(result["memory_bytes"].values())
    for part, mark in (("held", ""), ("phases", "+ ")):
        for name in columns[0][part]:
            if any(column[part][name] >= GIB / 200 for column in columns):  # less is 0.00
                lines.append(row(mark + name, [column[part][name] for column in columns]))
    lines.append(row("peak", [column["peak"] for column in columns]))
    lines += [
        "",
        "The peak is all that is held and the largest of the phases, marked +, as one works at a time.",
        "Counted on shapes, not measured. Left out: text encoders (prompts.cache sends them away), the working memory of",
        "the reward, the optimiser and larger batches of an evaluation, workspaces of cuDNN but for the copies it makes,",
        "fragmentation, a captured rollout's inputs and pool, and in stage 3 the weights gathered at a time.",
        "Expected speed leaves out communication, rewards and launches, and is as good as its MFU.",
    ]
    return "\n".join(lines)


def by_size(sizes: dict[str, dict[str, float]]) -> list[str]:
    """The line of what an image of each size takes; none where all have the model's own."""
    if not sizes:
        return []
    each = (f"{name} {one['flops_per_image'] / 1e12:.1f} ({one['share']:.0%})" for name, one in sizes.items())
    return [
        "  by size       " + "   ".join(each),
        "  Above is the mean of the sizes; counts and memory are those of the largest.",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--config", type=path, required=True, metavar="FILE", help="YAML configuration, see configs/")
    add_set(parser, "seed=1")
    parser.add_argument(
        "--gpus", type=of_type(GpuCount), default=8, help="GPUs over which the run is spread (default: %(default)s)"
    )
    parser.add_argument(
        "--mfu", type=of_type(Mfu), default=0.4, help="share of the peak that is reached, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--peak",
        type=of_type(Teraflops),
        default=989,
        help="TFLOP/s of one GPU (default: %(default)s, an H100 or H200 in bfloat16)",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    config = load_config(arguments.config, arguments.set)
    result = plan(config, arguments.gpus, arguments.mfu, arguments.peak * 1e12)
    print(json_text(result) if arguments.json else plan_table(result, config))
    return 0
