"""Phases of the GPU suite that run whole iterations of the trainer, from prompts to the optimiser's step.

    update      SD3.5 Medium in float16; do its gradients survive float16? and with checkpointing
    qwen        Qwen-Image with its guidance, beside what another trainer has published
    flux        FLUX.1-dev
    models      one stochastic step each of models at full size: do they run, and in what memory?
    compiled    SD3.5 Medium and Qwen-Image with torch.compile

The recipes are those of configs/, with random weights and as few groups as make an iteration. In a rehearsal the models are
the tiny ones of `fastgrpo.testing`.
"""

import gc
import importlib
import math
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_phase import REHEARSE, ROOT, Phase, main
from torch import Tensor, nn

from fastgrpo.commands import plan
from fastgrpo.commands.bench import Bench, bench_config, counts_of
from fastgrpo.engine.ranks import start
from fastgrpo.testing import load_family
from fastgrpo.validation import Config, load_config

# verl-omni's Qwen-Image LoRA recipe, images a second and GPU (H800), with the reward on the same GPUs and without it.
COMPILED = "model.compile=true"
VERL_OMNI = {"images_per_second": 0.305, "images_per_second_without_reward": 0.355}


@dataclass(frozen=True)
class Run:
    name: str
    recipe: str  # configs/RECIPE_compressibility.yaml
    settings: tuple[str, ...] = ()
    iterations: int = 2  # the first warms up
    published: dict[str, float] = field(default_factory=dict)  # what others have for a value of an iteration
    then: Callable[[Phase, Bench], None] | None = None


def step_of(name: str, recipe: str, batch: int) -> Run:
    """Two steps, the first stochastic and trained, of one batch that is one group."""
    window = "rollout.window={kind: fixed, start: 0, size: 1}"
    sizes = ("rollout.groups=1", f"rollout.group_size={batch}", f"rollout.batch_size={batch}")
    return Run(name, recipe, ("rollout.num_steps=2", window, *sizes, "update.steps_per_rollout=1"))


def loss_scales(phase: Phase, bench: Bench) -> None:
    """Of one transition's gradient in float16 what is lost at each scale of the loss, against float32."""
    with phase.step("loss scales"):
        model, batch = bench.model, 2
        rows = model.encode(["a red circle"] * batch)
        x, noise = (torch.randn(batch, *model.latent_shape, device=model.device) for _ in range(2))
        sigma = torch.full((batch,), 0.8, device=model.device)
        # A published iteration's gradient at the velocity: c_v 2 s advantage / (D transitions an update).
        upstream = noise * (0.1 * 2 * 0.8 / math.prod(model.latent_shape) / (768 * 3 / 2))
        with bench.trainer.engine.rollout_policy() as policy:
            scales = {k: gradient(policy, model.dtype, x, sigma, rows, upstream, 2.0**k) for k in (0, 8, 16, 20, 24)}
            model.transformer.float()  # the last use of this model
            exact = gradient(policy, torch.float32, x, sigma, rows, upstream, 2.0**24)
        for k, found in scales.items():
            lost = ((found == 0) & (exact != 0)).float().mean().item()
            phase.record(
                f"gradient at scale 2^{k}", cosine=round(nn.functional.cosine_similarity(found, exact, dim=0).item(), 6),
                norm_ratio=round((found.norm() / exact.norm()).item(), 4), lost=f"{lost:.2%}",
                finite=bool(found.isfinite().all()), largest_scaled=float(f"{found.abs().max().item() * 2.0**k:.2e}"),
            )  # fmt: skip


def gradient(
    policy: nn.Module, dtype: torch.dtype, x: Tensor, sigma: Tensor, rows: tuple, upstream: Tensor, scale: float
) -> Tensor:
    """Of all trained weights in one row (P,) float64, scaled on its way and back."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    v = policy(x.to(dtype), sigma, type(rows)(*(tensor.to(dtype) for tensor in rows)))
    found = torch.autograd.grad(v, trained, (upstream * scale).to(v.dtype), materialize_grads=True)
    return torch.cat([part.double().flatten() for part in found]) / scale


RUNS = {
    "update": (
        Run("SD3.5-M", "sd3", iterations=3, then=loss_scales),
        # Without a graph there is nothing to warm up but kernels.
        Run("SD3.5-M, checkpointed", "sd3", ("update.gradient_checkpointing=true", "rollout.cuda_graph=false"), 1),
    ),
    "qwen": (Run("Qwen-Image", "qwen_image", published=VERL_OMNI),),
    "flux": (Run("FLUX.1-dev", "flux"),),
    "models": (
        step_of("Z-Image", "z_image", 4), step_of("Wan2.1-1.3B", "wan", 4), step_of("BAGEL", "bagel", 4),
        step_of("FLUX.1-dev", "flux", 3),
    ),
    "compiled": (
        Run("SD3.5-M, compiled", "sd3", (COMPILED,), 3),
        # Without checkpointing it takes nearly all the memory of an H200.
        Run("Qwen-Image, compiled", "qwen_image", (COMPILED, "update.gradient_checkpointing=false"), published=VERL_OMNI),
        Run("SD3.5-M, compiled, attention by cuDNN", "sd3", (COMPILED, "model.attention=cudnn")),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A run with all that can be made without the GPU."""

    run: Run
    config: Config
    counts: plan.Counts

    @classmethod
    def of(cls, run: Run) -> "Prepared":
        config = configuration(run, Path(tempfile.mkdtemp()))
        return cls(run, config, counts_of(config))  # takes a CPU seconds

    def measure(self, phase: Phase) -> None:
        bench = Bench(self.config, start(), partial(self._say, phase), self.counts)
        try:
            bench.iterations(self.run.iterations)
            if self.run.then is not None:
                self.run.then(phase, bench)
        finally:
            bench.close()

    def _say(self, phase: Phase, name: str, **values: Any) -> None:
        """In the phase's results, beside what others have published."""
        beside: dict[str, float] = {}
        for key, published in self.run.published.items():
            if key in values:
                beside |= {f"published_{key}": published, f"share_of_published_{key}": round(values[key] / published, 3)}
        phase.record(f"{self.run.name}: {name}", **beside, **values)


def configuration(run: Run, folder: Path) -> Config:
    recipe = ROOT / "configs" / f"{run.recipe}_compressibility.yaml"
    settings = [*run.settings, *(tiny_settings(recipe, folder / "model") if REHEARSE else [])]
    return bench_config(recipe, settings, random_weights=not REHEARSE, output=folder / "run")


def tiny_settings(recipe: Path, folder: Path) -> list[str]:
    """What makes a recipe one of its family's tiny pipeline, which is saved here, with as little to do as there can be."""
    family = load_family(load_config(recipe).model.name)
    family.save(folder)
    sizes = dict.fromkeys(("height", "width", "num_frames", "distilled_guidance"), "null")
    model = {**sizes, **family.settings, "path": folder, "architecture": "null", "dtype": "float32"}
    small = [
        "model.attention=native",
        "prompts.cache=null",
        "rollout.groups=1",
        "rollout.group_size=4",
        "rollout.batch_size=2",
    ]
    return [*(f"model.{key}={value}" for key, value in model.items()), *small]


if __name__ == "__main__":
    importlib.import_module("deepspeed")  # now, as it takes seconds
    with ThreadPoolExecutor(1) as pool:  # what goes wrong here is raised in the step that it is for
        prepared = {run.name: pool.submit(Prepared.of, run) for run in RUNS[sys.argv[1]]}

    def measured(phase: Phase) -> None:
        for name, ready in prepared.items():
            with phase.step(name):
                ready.result().measure(phase)
            gc.collect()  # before the next model

    main(dict.fromkeys(RUNS, measured))
