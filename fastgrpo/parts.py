"""The parts of a run: prompts, rewards and a model, from a configuration or handed in as objects.

An object takes the place of what the configuration names, and is recorded there: a reward by its name `module:function`,
prompts as files in the run's folder. So `config.yaml` says what was run, and the commands on a run's folder find it.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config.keys import Config
from fastgrpo.config.sizes import Size, evaluation_size, named_sizes, training_sizes
from fastgrpo.data.embeddings import compared_with
from fastgrpo.data.images import TARGET_FIELDS
from fastgrpo.data.prompts import (
    IMAGE_FIELD,
    ImagePrompt,
    PromptSet,
    as_prompt,
    check_held_out,
    check_input_images,
    check_not_empty,
    check_tags,
    given_prompts,
    load_prompts,
    write_prompts,
)
from fastgrpo.inputs import Inputs, changes, inputs_of
from fastgrpo.models import base_of, configured_model, model_class
from fastgrpo.models.reading import cut_line
from fastgrpo.policy import Model, check_sizes, optional, sized
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.rewards import Judged, Reward, RewardSum, load_rewards, reward_name, weights_of

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
        if self.prompts is not None or self.held_out is not None:
            # The files that are written of them name their images by whole paths.
            prompts = replace(prompts, images_outside=True)
        return replace(config, reward=reward, prompts=prompts)

    def write_prompts(self, config: Config, prompts: PromptSet, held_out: PromptSet) -> None:
        """Those that were handed in, as they were read, into the files that `naming_them` says."""
        for given, read, path in (
            (self.prompts, prompts, config.prompts.train),
            (self.held_out, held_out, config.prompts.eval),
        ):
            if given is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_prompts(path, read.metadata)


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
            family.check_files(config.model.path, **base_of(config.model))
        image_conditioned = family.image_conditioned
        image_fields = TARGET_FIELDS[config.objective.name] if config.objective.offline else ()
        if image_fields and (image_conditioned or "num_frames" in optional(family, "takes")):
            raise ValueError(
                f"objective.offline: {config.model.name} reads input images or makes videos; train it on rollouts"
            )
        given = (IMAGE_FIELD,) if image_conditioned else ()
        outside = config.prompts.images_outside
        prompts = _prompts(objects.prompts, config.prompts.train, image_fields or given, outside)
        held_out = _prompts(objects.held_out, config.prompts.eval, given, outside)
        if image_conditioned:
            _check_images(family, config.model.name, prompts, held_out)
        if optional(family, "empty_is_no_prompt"):
            for one in (prompts, held_out):
                check_not_empty(one, config.model.name)
        check_held_out(prompts, held_out)
        check_tags(held_out)
        scored = (() if image_fields else prompts.judged, held_out.judged)
        reward, held_out_reward = _rewards(config, device, objects, scored)
        inputs = inputs_of(config, prompts, held_out, own_model=objects.model is not None)
        changed = changes(config.output, inputs)
        model = configured_model(config.model, device) if objects.model is None else objects.model
        check_sizes(model, named_sizes(config))
        check_guidance(model, "rollout.guidance_scale", config.rollout.guidance_scale)
        check_guidance(model, "evaluation.guidance_scale", config.evaluation.guidance_scale)
        if image_conditioned:  # a loaded model may read fewer than its family
            _check_images(model, config.model.name, prompts, held_out)
        return cls(
            image_fields=image_fields, prompts=prompts, held_out=held_out, reward=reward,
            held_out_reward=held_out_reward, model=model, inputs=inputs, changes=changed,
        )  # fmt: skip

    def check_texts(self, config: Config, show: bool) -> None:
        """`check_cut` of all its prompts, with their rewards and sizes; and say it where their length is another's."""
        trained = self.prompts, None if self.image_fields else self.reward, training_sizes(config)
        held_out = self.held_out, self.held_out_reward, [evaluation_size(config)]
        check_cut(self.model, trained, held_out, negative_prompt=config.model.negative_prompt, show=show)
        if show and (line := optional(self.model, "other_length")):
            print(line, file=sys.stderr)


def check_guidance(model: Model, key: str, scale: float) -> None:
    """Refuse a guidance scale that the model was not made for, if it says so: ValueError."""
    ask = optional(model, "check_guidance")
    if ask is not None:
        ask(key, scale)


def check_cut(
    model: Any,
    *scored: tuple[PromptSet, RewardSum | None, Iterable[Size]],
    negative_prompt: str = "",
    show: bool = True,
) -> None:
    """Say how many prompts the model reads in part; refuse those of which a reward judges what the model does not read.

    scored: prompts, with the rewards that score their images, None where nothing does, and the sizes of the images: a model
    that reads an input image may have less room for text beside a larger one.
    """
    ask = optional(model, "read_in_part")
    if ask is None:
        return
    max_text_tokens = model.settings.max_text_tokens
    first, _, first_sizes = scored[0]
    compared = compared_with(as_prompt(first.metadata[0], model.image_conditioned), negative_prompt)
    with sized(model, next(iter(first_sizes))):  # of which its input images are
        part = ask([compared])
    if part:
        raise ValueError(
            f"model.negative_prompt = {negative_prompt!r}: model.max_text_tokens = {max_text_tokens} cuts it after "
            f"{part[compared]!r}; shorten it, or raise model.max_text_tokens"
        )
    cut: dict[str | ImagePrompt, str] = {}
    for prompts, reward, sizes in scored:
        asked = [as_prompt(record, model.image_conditioned) for record in prompts.metadata]
        found: dict[str | ImagePrompt, str] = {}
        for size in sizes:
            with sized(model, size):
                found |= ask(asked)
        cut |= found
        read = [
            (f"{place}: model.max_text_tokens = {max_text_tokens} cuts this prompt", {**record, "prompt": found[prompt]})
            for prompt, (place, record) in zip(asked, prompts.judged, strict=True) if prompt in found
        ]  # fmt: skip
        if reward is not None:
            reward.check(read)
    if cut and show:
        print(cut_line(cut, sum(len(prompts) for prompts, *_ in scored), max_text_tokens), file=sys.stderr)


def _prompts(given: Prompts | None, path: Path, image_fields: Sequence[str], outside: bool) -> PromptSet:
    if given is not None:
        return given_prompts(given, image_fields)
    return load_prompts(path, image_fields, images_outside=outside)


def _check_images(model: Any, name: str, *prompts: PromptSet) -> None:
    """Refuse prompts with another number of input images than the model, or its family, reads."""
    for one in prompts:
        check_input_images(one, optional(model, "input_images"), name)


def _rewards(
    config: Config, device: torch.device, objects: Objects, prompts: Sequence[Judged]
) -> tuple[RewardSum, RewardSum]:
    """For training and for evaluation; what stands in both is loaded once. prompts: that each of the two will score."""
    given = {reward_name(reward): reward for reward in (objects.reward, objects.held_out_reward) if reward is not None}
    section = config.reward
    train, held_out = load_rewards(
        section.train, section.eval, device=device, settings=section.settings, frames=section.frames, given=given,
        not_finite=section.not_finite, folder=section.folder, prompts=prompts,
    )  # fmt: skip
    return train, held_out
