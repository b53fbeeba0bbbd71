"""What this machine does with a configuration: images a second, share of its peak, memory; of rollouts and whole iterations.

    fastgrpo bench --config configs/sd3_compressibility.yaml --random-weights
    fastgrpo bench --config configs/flux_compressibility.yaml --random-weights --forms eager captured --batches 3 1

First whole iterations of the trainer itself, from prompts to the optimiser's step, with as few groups as make one (or with
those of `--set rollout.groups=N`); the first warms up. Then rollouts alone, in one of these forms each:

    eager                  operation by operation
    captured               one CUDA graph
    compiled               torch.compile of the transformer's blocks
    captured, compiled     both

Speed does not depend on what the weights say, so --random-weights needs no checkpoint. MFU is the model's counted FLOPs as a
share of the device's peak; what is computed twice (checkpointing) counts once. Everything is printed as soon as it is known,
and written as JSON beside the machine it was measured on, to be compared with what others measured.
"""

import argparse
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch

from fastgrpo.commands import plan
from fastgrpo.commands.arguments import add_set, check_file, of_type, path
from fastgrpo.config import schema
from fastgrpo.config.bounds import AtLeast, AtMost
from fastgrpo.config.keys import BatchSize
from fastgrpo.config.sizes import at_size, training_sizes
from fastgrpo.data.prompts import as_prompt
from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.files import json_text, write_atomically
from fastgrpo.learning.objectives import weighting
from fastgrpo.measure import DEVICE, GIB, machine, memory, peak_flops, synchronize, timed
from fastgrpo.models import configured_model
from fastgrpo.records import TRAIN, Prompted, Schedule, noise_address
from fastgrpo.sampling.graph import CapturedRollout, CudaCapture
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import group_schedule, with_experts
from fastgrpo.trainer import Trainer
from fastgrpo.validation import Config, ConfigError, load_config, read_config
from fastgrpo_kernels import NoiseAddress

FORMS = ("eager", "captured", "compiled", "captured, compiled")
FORMAT = 1  # of the JSON file

Say = Callable[..., None]  # (name, **values): called with every measurement as soon as it is there


def bench_config(
    path: str | Path, overrides: Sequence[str], random_weights: bool, output: Path, size: str | None = None
) -> Config:
    """The configuration with the smallest iteration that is whole, and nothing in it that would leave work out.

    size: one of `rollout.sizes`, which all images get; None: the first.
    """
    fixed = [f"output={output}", "update.skip_dead=false"]
    if random_weights:
        fixed += ["model.random_weights=true", "prompts.cache=null"]  # placeholders are not for the disk
    fixed += overrides
    if not any(override.startswith("rollout.groups=") for override in overrides):
        config = read_config(path, fixed)
        images = math.lcm(config.rollout.batch_size * config.update.steps_per_rollout, config.rollout.group_size)
        fixed.append(f"rollout.groups={images // config.rollout.group_size}")
    config = load_config(path, fixed)
    sizes = {str(one): one for one in training_sizes(config)}
    if size not in (None, *sizes):
        known = ", ".join(filter(None, sizes)) or "none, so set model.height and model.width"
        raise ConfigError(f"--size {size}: is not in rollout.sizes; there are {known}")
    return at_size(config, next(iter(sizes.values())) if size is None else sizes[size])


def counts_of(config: Config) -> plan.Counts:
    """Counts the architecture that the configuration names, or else the model in its folder, which is loaded for that."""
    if config.model.architecture is not None:
        return plan.count(config)
    return plan.count_model(config, configured_model(config.model, torch.device("cpu")))


def rollout_row(draw: Callable[[], Any], batch: int, num_steps: int, work: float, rounds: int) -> dict[str, Any]:
    """How fast `batch` images are drawn. work: the seconds that the device's peak would take for all their FLOPs."""
    first = timed(draw, rounds=1, warm_ups=0)["ms"] / 1e3  # compiles, captures
    found = timed(draw, rounds=rounds, warm_ups=1)
    return {
        "ms_per_step": round(found["ms"] / num_steps, 3),
        "launch_ms_per_step": round(found["launch_ms"] / num_steps, 3),
        "spread_ms_per_step": [round(found[end] / num_steps, 3) for end in ("min", "max")],
        "images_per_second": round(1e3 * batch / found["ms"], 3),
        "mfu": round(1e3 * work / found["ms"], 4),
        "first_call_seconds": round(first, 2),
        **memory(),
    }


class Bench:
    """A configuration on this machine: the trainer of a run, and what was counted beforehand."""

    def __init__(self, config: Config, ranks: Ranks, say: Say, counts: plan.Counts | None = None) -> None:
        """`counts` are those of `counts_of`, where they were made before."""
        self.config, self.say, self.counts = config, say, counts or counts_of(config)
        stage = config.engine.zero_stage
        self.plan_gib = plan.memory(config, self.counts, gpus=1, stage=stage).peak / GIB
        flops = plan.flops_per_image(config, self.counts)
        self.flops = sum(flops.values()) - flops["checkpoints"]
        self.peak, self.peak_from = peak_flops(getattr(torch, config.model.dtype))
        memory(reset=True)
        began = time.perf_counter()
        self.trainer = Trainer(config, ranks=ranks)
        synchronize()
        self.compiled: list[Any] = []  # the blocks' compiled calls, once there are any
        say("model", seconds=round(time.perf_counter() - began, 1), parameters=self.counts.parameters,
            trained=self.counts.trained, peak_flops=self.peak, peak_from=self.peak_from, **memory())  # fmt: skip

    @property
    def model(self) -> Any:
        """The trainer's adapter."""
        return self.trainer.model

    def iterations(self, count: int = 2) -> None:
        """Measures whole iterations, of which the first warms up."""
        for n in range(1, count + 1):
            memory(reset=True)
            began = time.perf_counter()
            metrics = self.trainer.iterate(n)
            synchronize()
            self.say(f"iteration {n}", **self._iteration(n, metrics, time.perf_counter() - began))

    def _iteration(self, n: int, metrics: dict, seconds: float) -> dict[str, Any]:
        images, engine = metrics["images"] // n, self.trainer.engine
        rewarding = metrics["seconds"].get("reward", 0.0)  # what was waited for; the rest lies beside the rollouts
        return {
            "warms_up": n == 1,
            "images": images,
            "seconds": round(seconds, 4),
            "phases": {phase: round(s, 4) for phase, s in metrics["seconds"].items()},
            "images_per_second": round(images / seconds, 4),
            "images_per_second_without_reward": round(images / (seconds - rewarding), 4),
            "mfu": round(self.flops * images / (seconds - rewarding) / self.peak, 4),
            "plan_gib": round(self.plan_gib, 2),
            **memory(),
            **{key: metrics[key] for key in ("first_ratio_deviation", "ratio_min", "ratio_max", "grad_norm", "loss")},
            "loss_scale": engine.loss_scale,
            "skipped_steps": engine.skipped_steps,
        }

    def rollouts(self, forms: Sequence[str] = FORMS, batches: Sequence[int] = (8, 1), rounds: int = 3) -> None:
        """Measures rollouts alone, one form after the other, as a graph holds its memory. Failures are reported."""
        for batch in batches:
            for form in forms:
                memory(reset=True)
                try:
                    row = self._rollout(form, batch, rounds)
                except (RuntimeError, ValueError) as error:  # out of memory is one of the former
                    row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                self.say(f"rollout, {form}, batch {batch}", form=form, batch=batch, **row)

    def _rollout(self, form: str, batch: int, rounds: int) -> dict[str, Any]:
        schedule, address, prompted = self._arguments(batch)
        run = CapturedRollout(CudaCapture()) if "captured" in form else rollout

        def draw() -> None:
            with self.trainer.engine.rollout_policy() as policy, self.model.drafting():
                run(policy, schedule, address, prompted, self.config.rollout.guidance_scale)

        work = prompted.passes * self.counts.rollout_flops(schedule.forward_passes(batch), batch) / self.peak
        with self.compiled_blocks("compiled" in form):
            return rollout_row(draw, batch, self.config.rollout.num_steps, work, rounds)

    def _arguments(self, batch: int) -> tuple[Schedule, NoiseAddress, Prompted]:
        """What the trainer would hand to a rollout of `batch` images of one group."""
        config, device = self.config, self.model.device
        sigmas = self.model.sigmas(config.rollout.num_steps)
        schedule = group_schedule(config.rollout, sigmas, 1, config.seed, weighting(config.objective))
        schedule = with_experts(schedule, self.model).to(device)
        prompt = as_prompt(self.trainer.prompts.metadata[0], self.model.image_conditioned)
        prompted = self.trainer.embeddings.prompted([prompt] * batch, config.rollout.guidance_scale)
        address = noise_address(TRAIN, config.seed, 1, torch.arange(batch, device=device))
        return schedule.of(torch.zeros(batch, dtype=torch.int64, device=device)), address, prompted

    @contextmanager
    def compiled_blocks(self, compiled: bool) -> Iterator[None]:
        """Inside, the transformer's blocks are compiled or not, whatever the configuration says."""
        blocks = self.model.blocks
        before = [block._compiled_call_impl for block in blocks]
        if compiled and not self.compiled:
            self.model.compile()
            self.compiled = [block._compiled_call_impl for block in blocks]
        try:
            for block, call in zip(blocks, self.compiled if compiled else [None] * len(blocks), strict=True):
                block._compiled_call_impl = call
            yield
        finally:
            for block, call in zip(blocks, before, strict=True):
                block._compiled_call_impl = call

    def close(self) -> None:
        """Frees the model and the engine."""
        self.trainer.close()
        del self.trainer
        memory(reset=True)


class Record:
    """Prints every measurement as a line, and each time writes all of them so far as a JSON file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.result = path, {"format": FORMAT, **about, "measurements": []}

    def __call__(self, name: str, **values: Any) -> None:
        self.result["measurements"].append({"name": name, **values})
        write_atomically(self.path, json_text(self.result, indent=1) + "\n")
        print(line(name, values), flush=True)


HEADER = f"{'':34}{'images/s':>10}{'MFU':>8}{'ms/step':>10}{'launched':>10}{'GiB':>8}"


def line(name: str, values: dict[str, Any]) -> str:
    """One measurement as a row below `HEADER`; an iteration's phases follow on the next lines."""
    if "error" in values:
        return f"{name:34}{values['error'].splitlines()[0][:88]}"
    if name == "model":
        peak = f"peak {values['peak_flops'] / 1e12:.3g} TFLOP/s, {values['peak_from']}"
        return f"model made in {values['seconds']} s; {peak}\n\n{HEADER}"
    peak = f"{values['peak_gib']:8.1f}" if "peak_gib" in values else f"{'':8}"
    row = f"{name:34}{values['images_per_second']:10.3f}{values['mfu']:8.1%}"
    if "phases" not in values:
        return f"{row}{values['ms_per_step']:10.2f}{values['launch_ms_per_step']:10.2f}{peak}"
    times = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in values["phases"].items())
    return (
        f"{row}{'':20}{peak}\n"
        f"  {values['images']} images{', warming up' * values['warms_up']}: {times}\n"
        f"  {values['images_per_second_without_reward']:.3f} images/s without waiting for the reward; "
        f"first ratio {values['first_ratio_deviation']:g} from 1; {values['plan_gib']:.1f} GiB by plan"
    )


def checked_forms(wanted: Sequence[str] | None) -> Sequence[str]:
    """The forms to measure. The default is all of them; on a CPU only eager, as compiling takes minutes there."""
    gpu = DEVICE.type == "cuda"
    for form in wanted or ():
        if form not in FORMS:
            raise ConfigError(f"--forms {form!r}: unknown; there are {', '.join(repr(known) for known in FORMS)}")
        if "captured" in form and not gpu:
            raise ConfigError(f"--forms {form!r}: a CUDA graph needs a GPU; take eager or compiled")
    return (FORMS if gpu else FORMS[:1]) if wanted is None else wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--config", required=True, type=path, metavar="FILE", help="YAML configuration, see configs/")
    add_set(parser, "seed=1")
    parser.add_argument(
        "--size", metavar="HEIGHTxWIDTH", help="the size of all images, one of rollout.sizes (default: the first of them)"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="take the architecture with random weights, without a checkpoint"
    )
    parser.add_argument(
        "--iterations",
        type=of_type(Annotated[int, AtLeast(0), AtMost(1_000_000)]),
        default=3,
        help="whole iterations to measure, of which the first warms up (default: %(default)s); 0: none",
    )
    parser.add_argument(
        "--forms",
        nargs="*",
        metavar="FORM",
        help="forms of rollouts to measure: eager, captured, compiled, 'captured, compiled' (default: those of this device)",
    )
    parser.add_argument(
        "--batches", type=of_type(BatchSize), nargs="+", help="images of a rollout (default: the configuration's, and 1)"
    )
    parser.add_argument(
        "--rounds",
        type=of_type(Annotated[int, AtLeast(1), AtMost(1_000_000)]),
        default=5,
        help="timed rollouts of each form (default: %(default)s)",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="file to write (default: bench_CONFIGURATION_DEVICE.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measures whole iterations, then rollouts alone."""
    forms = checked_forms(arguments.forms)
    found = machine()
    device = re.sub(r"\W+", "_", found["device"].lower()).strip("_")
    file = arguments.json or Path(f"bench_{arguments.config.stem}_{device}.json")
    check_file("--json", file)
    with tempfile.TemporaryDirectory() as folder:
        config = bench_config(arguments.config, arguments.set, arguments.random_weights, Path(folder), arguments.size)
        print(about(config, arguments.config, found), flush=True)
        keys = schema.plain(config)
        say = Record(file, {"machine": found, "name": arguments.config.stem, "configuration": keys})
        bench = Bench(config, start(), say)
        bench.iterations(arguments.iterations)
        batches = arguments.batches or sorted({config.rollout.batch_size, 1}, reverse=True)
        bench.rollouts(forms, batches, arguments.rounds)
        bench.close()
        finish()
    print(f"\n{file}")
    return 0


def about(config: Config, path: Path, found: dict[str, Any]) -> str:
    """Lines of text: what is measured, and on what."""
    rollout, packages = config.rollout, found["packages"]
    weights = "random weights" if config.model.random_weights else f"weights of {config.model.path}"
    return (
        f"{found['device']}, torch {packages['torch']}, triton {packages['triton']}, deepspeed {packages['deepspeed']}\n"
        f"{path.stem}: {config.model.architecture or config.model.name}, {config.model.dtype}, {weights}; "
        f"{rollout.num_steps} steps, guidance {rollout.guidance_scale:g}, batches of {rollout.batch_size}"
    )
