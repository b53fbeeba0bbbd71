"""Flow-GRPO as a straightforward script trains it, to hold fastgrpo's speed against. Written from the published algorithm.

As the released script does: embeddings made again for every batch, the schedule looked up on the host, every step of the
trajectory kept with its log-prob, one forward a time step with the log-probs subtracted, another with the adapter off for
the KL, rewards waited for. With `drop_dead` it also leaves out of the update, as that script does, the samples of groups
whose rewards are all equal. Model, prompts, reward, batches and optimiser steps are those of the run it is compared with.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.config.keys import Config
from fastgrpo.data.prompts import PromptSet, prompts_of_iteration
from fastgrpo.models.sd3 import SD3
from fastgrpo.rewards import load_reward


@dataclass
class Sample:
    """What one batch leaves for the update."""

    embeds: Tensor
    pooled: Tensor
    latents: list[Tensor]  # of every step, T + 1
    log_probs: list[Tensor]  # T
    rewards: Tensor  # wherever the reward made them
    groups: Tensor  # on the host


class Released:
    """One process, plain AdamW."""

    def __init__(self, config: Config, model: SD3, prompts: PromptSet, *, drop_dead: bool = False) -> None:
        self.config, self.model, self.prompts, self.drop_dead = config, model, prompts, drop_dead
        self.reward = load_reward(config.reward.train)
        self.trained = [p for p in model.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.update.learning_rate, weight_decay=1e-4)
        self.sigmas = model.sigmas(config.rollout.num_steps).to(model.device)
        self.timesteps = self.sigmas[:-1] * 1000
        self.guided = config.rollout.guidance_scale != 1

    def iterate(self, iteration: int) -> None:
        rollout = self.config.rollout
        chosen = prompts_of_iteration(len(self.prompts), rollout.groups, iteration, self.config.seed)
        samples = []
        for start in range(0, rollout.groups * rollout.group_size, rollout.batch_size):
            groups = torch.arange(start, start + rollout.batch_size) // rollout.group_size
            samples.append(self.sample([self.prompts.metadata[i] for i in chosen[groups.numpy()]], groups))
        rewards = torch.cat([sample.rewards for sample in samples]).cpu()  # on the host, as that script compares them
        groups = torch.cat([sample.groups for sample in samples])
        advantages = torch.zeros_like(rewards)
        for group in groups.unique():
            mine = rewards[groups == group]
            advantages[groups == group] = (mine - mine.mean()) / (rewards.std() + 1e-4)
        parts = advantages.split(rollout.batch_size)
        share = len(samples) // self.config.update.steps_per_rollout
        for n, (sample, advantage) in enumerate(zip(samples, parts, strict=True), 1):
            live = advantage.nonzero().flatten() if self.drop_dead else torch.arange(len(advantage))
            if len(live):
                self.backward(self.only(sample, live), advantage[live].clamp(-5, 5).to(self.model.device), share)
            if n % share == 0:
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def only(self, sample: Sample, live: Tensor) -> Sample:
        """Those rows of a batch; under guidance, of the empty prompt too. live: on the host."""
        mine = live.to(self.model.device)
        rows = torch.cat([mine, mine + len(sample.groups)]) if self.guided else mine
        return Sample(
            sample.embeds[rows], sample.pooled[rows], [x[mine] for x in sample.latents],
            [log_prob[mine] for log_prob in sample.log_probs], sample.rewards[live], sample.groups[live],
        )  # fmt: skip

    @torch.no_grad()
    def sample(self, records: list[dict], groups: Tensor) -> Sample:
        prompts = [record["prompt"] for record in records]
        embeds, pooled = self.encode(prompts)
        x = torch.randn(len(prompts), *self.model.latent_shape, device=self.model.device)
        latents, log_probs = [x], []
        for t in self.timesteps:
            v = self.velocity(x, t.expand(len(x)), embeds, pooled)
            x, log_prob, _, _ = self.step(x, v, t.expand(len(x)))
            latents.append(x)
            log_probs.append(log_prob)
        rewards = self.reward(self.model.decode(x), prompts, records)
        return Sample(embeds, pooled, latents, log_probs, rewards, groups)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        conditioning = self.model.encode(prompts)
        if not self.guided:
            return conditioning.embeds, conditioning.pooled
        empty = self.model.encode([""] * len(prompts))
        return torch.cat([empty.embeds, conditioning.embeds]), torch.cat([empty.pooled, conditioning.pooled])

    def velocity(self, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        v = self.model.transformer(
            hidden_states=x.to(self.model.dtype), timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip
        if self.guided:
            v_uncond, v = v.chunk(2)
            v = v_uncond + self.config.rollout.guidance_scale * (v - v_uncond)
        return v

    def step(self, x: Tensor, v: Tensor, t: Tensor, x_next: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x', its log-prob, the mean and the diffusion g of one Flow-SDE step; a given x' is only scored."""
        x, v = x.float(), v.float()
        index = [(self.timesteps == each).nonzero()[0].item() for each in t]
        sigma = self.sigmas[index].view(-1, 1, 1, 1)
        sigma_next = self.sigmas[[i + 1 for i in index]].view(-1, 1, 1, 1)
        dt, second = sigma_next - sigma, self.sigmas[1].item()
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, second, sigma))) * self.config.rollout.noise_level
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        s = g * torch.sqrt(-dt)
        if x_next is None:
            x_next = mean + s * torch.randn_like(x)
        log_prob = -((x_next.detach() - mean) ** 2) / (2 * s**2) - torch.log(s) - math.log(math.sqrt(2 * math.pi))
        return x_next, log_prob.mean(dim=(1, 2, 3)), mean, g

    def backward(self, sample: Sample, advantages: Tensor, batches: int) -> None:
        objective, last = self.config.objective, self.config.rollout.num_steps - 1
        for j in range(last):
            t = self.timesteps[j].expand(len(advantages))
            v = self.velocity(sample.latents[j], t, sample.embeds, sample.pooled)
            _, log_prob, mean, g = self.step(sample.latents[j], v, t, sample.latents[j + 1])
            ratio = torch.exp(log_prob - sample.log_probs[j])
            clipped = ratio.clamp(1 - objective.clip_range, 1 + objective.clip_range)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
            if objective.beta > 0:
                with torch.no_grad(), self.model.reference():
                    v = self.velocity(sample.latents[j], t, sample.embeds, sample.pooled)
                    _, _, mean_ref, _ = self.step(sample.latents[j], v, t, sample.latents[j + 1])
                loss = loss + objective.beta * ((mean - mean_ref) ** 2 / (2 * g**2)).mean()
            (loss / (last * batches)).backward()
