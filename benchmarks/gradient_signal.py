"""Where the policy gradient has a signal: by denoising step and by layer, for a configuration, before anything is trained.

    python benchmarks/gradient_signal.py       3 minutes on two cores

Gradients of K independent batches g_1 ... g_K, with respect to every weight of the transformer, tell signal from noise:

    signal^2 = mean over pairs k != l of g_k . g_l        energy = mean over k of g_k . g_k

Their quotient is the expected cosine of two batches: the share of an update's energy that is not noise. A part with cosine c
has moved after n such updates by sqrt(c) n along the signal and by sqrt(n) at random, so parts and steps with a cosine near
0 only add a random walk. The standard error of a cosine that is 0 is sqrt(2 / (K (K - 1))) at most, for a single weight.

Steps are scaled to equal energy before they are added up, so that the last ones, which weigh 1 / (2 s^2), do not decide
alone. Writes results/gradient_signal.{json,png}.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from common import RESULTS, ROOT, pyplot
from torch import Tensor
from tqdm import tqdm

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import PromptSet, load_prompts, prompt_probabilities, prompts_of_iteration
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.learning.objectives import weighting
from fastgrpo.measure import DEVICE
from fastgrpo.models import load_model
from fastgrpo.policy import Policy, prompted_velocity
from fastgrpo.records import TRAIN, Schedule, noise_address
from fastgrpo.rewards import load_reward
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.validation import Config, load_config
from fastgrpo_kernels import transition


class Probe:
    """Draws a batch as training would, with every step but the last stochastic, and takes its gradients step by step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = load_model(
            config.model.name, path=config.model.path, dtype=getattr(torch, config.model.dtype), device=DEVICE,
            max_text_tokens=config.model.max_text_tokens,
        )  # fmt: skip
        self.model.transformer.requires_grad_(True)
        self.named = dict(self.model.transformer.named_parameters())
        self.policy = Policy(self.model)
        self.embeddings = Embeddings(self.model, negative_prompt=config.model.negative_prompt)
        self.prompts: PromptSet = load_prompts(config.prompts.train)
        self.probabilities = prompt_probabilities(self.prompts, config.prompts.weights, config.rollout.groups)
        self.reward = load_reward(config.reward.train)
        self.size = config.rollout.num_steps - 1  # trained steps

    def batch(self, number: int) -> tuple[list[list[Tensor]], float]:
        """One gradient a step, each a list of tensors like the parameters', and the mean reward."""
        config, model = self.config.rollout, self.model
        total = config.groups * config.group_size
        sample_id = torch.arange(total)
        group = sample_id // config.group_size
        chosen = prompts_of_iteration(len(self.prompts), config.groups, number, self.config.seed, self.probabilities)
        records = [self.prompts.metadata[i] for i in chosen[group.numpy()]]
        prompts = [record["prompt"] for record in records]
        schedule = self._schedule(total)
        prompted = self.embeddings.prompted(prompts, config.guidance_scale)
        address = noise_address(TRAIN, self.config.seed, number, sample_id.to(model.device))
        result = rollout(self.policy, schedule, address, prompted, config.guidance_scale)
        rewards = self.reward(model.decode(result.final), prompts, records).to(model.device)
        advantages = group_advantages(
            rewards, group.to(model.device), num_groups=config.groups, **vars(self.config.advantage)
        ).values
        velocity = prompted_velocity(self.policy, prompted, config.guidance_scale, self.policy.guide)
        gradients = []
        for j in range(self.size):
            x = result.latents[j].to(model.dtype)
            v = velocity(x, schedule.sigmas[j].expand(total))
            rows = schedule.table[:, j].contiguous()
            moments = transition(result.latents[j + 1], result.latents[j], v, result.v_old[j], rows)
            log_ratio = rows[:, 3] * (2 * moments.m1 - moments.m2)
            found = torch.autograd.grad((advantages * log_ratio).mean(), list(self.named.values()), allow_unused=True)
            gradients.append([
                torch.zeros_like(p) if g is None else g for p, g in zip(self.named.values(), found, strict=True)
            ])  # fmt: skip
        return gradients, rewards.mean().item()

    def _schedule(self, batch: int) -> Schedule:
        config, start = self.config.rollout, torch.zeros(batch, dtype=torch.int64)
        steps = sampler_steps(config.sampler, self.model.sigmas(config.num_steps), config.noise_level)
        return window_schedule(steps, start, self.size, weighting(self.config.objective)).to(self.model.device)


def cosine(gradients: list[Tensor]) -> float:
    """Of K vectors (K lists entry by entry): signal^2 / energy."""
    stacked = torch.stack(gradients)  # (K, n)
    energy = stacked.square().sum()
    pairs = stacked.sum(0).square().sum() - energy
    return (pairs / (len(gradients) - 1) / energy).item() if energy > 0 else 0.0


def part(name: str) -> str:
    """A layer's name without its block's number: what a LoRA target would be called."""
    return re.sub(r"blocks\.\d+\.", "blocks.", name).removesuffix(".weight")


def analyse(probe: Probe, batches: int) -> dict:
    by_step: list[list[Tensor]] = [[] for _ in range(probe.size)]
    layers = [name for name in probe.named if name.endswith(".weight") and probe.named[name].dim() == 2]
    places = [list(probe.named).index(name) for name in layers]
    rewards = []
    for number in tqdm(range(batches), desc="batches", dynamic_ncols=True):
        gradients, reward = probe.batch(number)
        rewards.append(reward)
        for j, gradient in enumerate(gradients):
            by_step[j].append(torch.cat([gradient[i].flatten() for i in places]).cpu())
    scale = [torch.stack(step).square().sum(1).mean().rsqrt() for step in by_step]
    sizes = [probe.named[name].numel() for name in layers]
    by_part: dict[str, list[list[Tensor]]] = defaultdict(list)
    summed = [sum(scale[j] * by_step[j][k] for j in range(probe.size)) for k in range(batches)]
    pieces = [vector.split(sizes) for vector in summed]
    for i, name in enumerate(layers):
        by_part[part(name)].append([pieces[k][i] for k in range(batches)])
    return {
        "mean_reward": sum(rewards) / batches,
        "steps": [
            {"step": j, "sigma": round(float(probe.model.sigmas(probe.config.rollout.num_steps)[j]), 4),
             "cosine": round(cosine(by_step[j]), 4), "norm": float(1 / scale[j])}
            for j in range(probe.size)
        ],
        "layers": {
            name: round(cosine([torch.cat([block[k] for block in blocks]) for k in range(batches)]), 4)
            for name, blocks in by_part.items()
        },
    }  # fmt: skip


def draw(result: dict, path: Path) -> None:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(2, 3))
    left.bar([row["step"] for row in result["steps"]], [row["cosine"] for row in result["steps"]], color="#2f6fdb")
    left.set(xlabel="denoising step", ylabel="cosine of two batches' gradients", title="By step")
    layers = sorted(result["layers"].items(), key=lambda item: item[1])
    right.barh([name for name, _ in layers], [value for _, value in layers], color="#2f6fdb")
    right.set(xlabel="cosine of two batches' gradients", title="By layer, all steps")
    right.tick_params(axis="y", labelsize=7)
    left.axhline(0, color="#888", linewidth=0.6)
    right.axvline(0, color="#888", linewidth=0.6)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--batches", type=int, default=16, help="independent batches, K")
    arguments = parser.parse_args()
    probe = Probe(load_config(arguments.config, arguments.set))
    result = {"benchmark": "gradient_signal", "batches": arguments.batches, **analyse(probe, arguments.batches)}
    result["images"] = arguments.batches * probe.config.rollout.groups * probe.config.rollout.group_size
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gradient_signal.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, RESULTS / "gradient_signal.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
