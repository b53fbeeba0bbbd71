"""The parts of a run: prompts, rewards and a model, from a configuration or handed in as objects.

An object takes the place of what the configuration names, and is recorded there: a reward by its name `module:function`,
prompts as files in the run's folder. So `config.yaml` says what was run, and the commands on a run's folder find it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config.keys import Config
from fastgrpo.data.images import TARGET_FIELDS
from fastgrpo.data.prompts import IMAGE_FIELD, PromptSet, check_held_out, load_prompts
from fastgrpo.files import write_atomically
from fastgrpo.inputs import Inputs, changes, inputs_of
from fastgrpo.models import configured_model, model_class
from fastgrpo.policy import Model
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.rewards import Reward, RewardSum, load_rewards, reward_name, weights_of

Prompts = Sequence[str | dict]  # each a prompt, or its record: {"prompt": ..., and whatever the reward reads}


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects that a user hands in instead of naming them in the configuration; None: loaded as configured."""

    model: Model | None = None
    reward: Reward | None = None
    held_out_reward: Reward | None = None  # None, with a reward: that one
    prompts: Prompts | None = None
    held_out: Prompts | None = None

    def __post_init__(self) -> None:
        given = [reward for reward in (self.reward, self.held_out_reward) if reward is not None]
        if len(given) == 2 and given[0] is not given[1] and reward_name(given[0]) == reward_name(given[1]):
            raise ValueError(
                f"reward and held_out_reward are both called {reward_name(given[0])}, by which a run tells them apart: "
                "hand in two functions, or objects of two classes"
            )

    def naming_them(self, config: Config) -> Config:
        """The configuration that names them."""
        reward, prompts = config.reward, config.prompts
        if self.reward is not None:
            name = reward_name(self.reward)
            reward = replace(reward, train=name, eval=name)
        if self.held_out_reward is not None:
            reward = replace(reward, eval=reward_name(self.held_out_reward))
        if self.reward is not None or self.held_out_reward is not None:
            named = {*weights_of(reward.train), *weights_of(reward.eval)}
            # The settings of a reward that an object has replaced would be those of nothing.
            reward = replace(reward, settings={name: own for name, own in reward.settings.items() if name in named})
        if self.prompts is not None:
            prompts = replace(prompts, train=RunFolder(config.output).given_prompts("train"))
        if self.held_out is not None:
            prompts = replace(prompts, eval=RunFolder(config.output).given_prompts("eval"))
        return replace(config, reward=reward, prompts=prompts)

    def write_prompts(self, config: Config) -> None:
        """Into the files that `naming_them` says."""
        for prompts, path in ((self.prompts, config.prompts.train), (self.held_out, config.prompts.eval)):
            if prompts is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in _records(prompts)))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that is there before anything is trained."""

    image_fields: tuple[str, ...]  # of prompts to train on that bring their images along; (): a run with rollouts
    prompts: PromptSet
    held_out: PromptSet
    reward: RewardSum
    held_out_reward: RewardSum
    model: Model
    inputs: Inputs
    changes: list[str]  # in the inputs since the run began, that it goes on with

    @classmethod
    def of(cls, config: Config, device: torch.device, objects: Objects) -> "Parts":
        """Loads what is configured; refuses what does not go together or cannot be read, with the key's path."""
        family: Any = objects.model or model_class(config.model.name)
        if objects.model is None and not config.model.random_weights:
            family.check_files(config.model.path)
        image_conditioned = family.image_conditioned
        image_fields = TARGET_FIELDS[config.objective.name] if config.objective.offline else ()
        if image_fields and (image_conditioned or "num_frames" in getattr(family, "takes", ())):
            raise ValueError(
                f"objective.offline: {config.model.name} reads input images or makes videos; train it on rollouts"
            )
        given = (IMAGE_FIELD,) if image_conditioned else ()
        prompts = _prompts(objects.prompts, config.prompts.train, image_fields or given)
        held_out = _prompts(objects.held_out, config.prompts.eval, given)
        check_held_out(prompts, held_out)
        inputs = inputs_of(config, prompts, held_out, own_model=objects.model is not None)
        changed = changes(config.output, inputs)
        reward, held_out_reward = _rewards(config, device, objects)
        model = configured_model(config.model, device) if objects.model is None else objects.model
        return cls(
            image_fields=image_fields, prompts=prompts, held_out=held_out, reward=reward,
            held_out_reward=held_out_reward, model=model, inputs=inputs, changes=changed,
        )  # fmt: skip


def _prompts(given: Prompts | None, path: Path, image_fields: Sequence[str]) -> PromptSet:
    if given is None:
        return load_prompts(path, image_fields)
    records = _records(given)
    if not records:
        raise ValueError("no prompts were given: hand in at least one")
    for number, record in enumerate(records):
        for field in ("prompt", *image_fields):
            if not isinstance(record.get(field), str):
                raise ValueError(f'prompt {number} is {record!r}: it needs a text "{field}"')
    return PromptSet([record["prompt"] for record in records], records)


def _records(prompts: Prompts) -> list[dict]:
    return [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]


def _rewards(config: Config, device: torch.device, objects: Objects) -> tuple[RewardSum, RewardSum]:
    """For training and for evaluation; what stands in both is loaded once."""
    given = {reward_name(reward): reward for reward in (objects.reward, objects.held_out_reward) if reward is not None}
    section = config.reward
    train, held_out = load_rewards(
        section.train, section.eval, device=device, settings=section.settings, frames=section.frames, given=given
    )
    return train, held_out
