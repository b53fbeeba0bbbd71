"""Rewards by name. A reward is a callable `(images, prompts, metadata) -> (B,) float32`; higher scores are better.

    images     (B, 3, H, W) uint8, what a viewer would see; of a clip (B, T, 3, H, W)
    prompts    list of B strings
    metadata   list of B dicts: the prompts' lines of the prompt file

It is a function, or a class that is made once, `Class(device=device, **settings)`, and then called. The parameters of the
class are the keys of its reward.settings, checked against their annotations. Attributes `low` and `high`, where it has them,
bound the scores. A new reward is one file here and one line in `REWARDS`; your own needs neither: name it
`package.module:function` or `package.module:Class`.

A run may maximise several rewards: the B scores of R rewards are a tensor (B, R), whose weighted sums are maximised.
"""

import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config.schema import ConfigError
from fastgrpo.config.settings import settings_from_signature
from fastgrpo.version import __version__

Reward = Callable[[Tensor, list[str], list[dict]], Tensor]
Weights = str | Mapping[str, float]  # one reward, or several by name with their weights

REWARDS = {
    "tiny_shapes": "fastgrpo.rewards.tiny:shapes",
    "tiny_shapes_graded": "fastgrpo.rewards.tiny:shapes_graded",
    "tiny_text": "fastgrpo.rewards.tiny:text",
    "tiny_text_graded": "fastgrpo.rewards.tiny:text_graded",
    "jpeg_compressibility": "fastgrpo.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "fastgrpo.rewards.jpeg:incompressibility",
    "clip_score": "fastgrpo.rewards.networks.clip:ClipScore",
    "pickscore": "fastgrpo.rewards.networks.clip:PickScore",
    "hpsv2": "fastgrpo.rewards.networks.hpsv2:HPSv2",
    "aesthetic": "fastgrpo.rewards.networks.aesthetic:Aesthetic",
    "image_reward": "fastgrpo.rewards.networks.image_reward:ImageReward",
    "vlm_judge": "fastgrpo.rewards.judge:VLMJudge",
    "ocr": "fastgrpo.rewards.ocr:OCR",
    "video_ocr": "fastgrpo.rewards.ocr:VideoOCR",
    "geneval": "fastgrpo.rewards.geneval:GenEval",
    "geneval_graded": "fastgrpo.rewards.geneval:GenEvalGraded",
    "remote": "fastgrpo.rewards.serving.remote:Remote",
}


class RewardUnavailable(RuntimeError):
    """The server of a reward is gone and did not come back. The run saves its state and stops: no score may be made up."""


def load_reward(
    name: str,
    *,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    frames: str = "each",
) -> Reward:
    """The reward of that name from `REWARDS`, or the `module:attribute` that it spells out.

    device, settings: the arguments of a class. A function has no settings.
    frames: how videos (B, T, 3, H, W) are scored: each frame, whose mean is the score, or the whole clip.

    Raises ConfigError for settings that the class does not take, also by their types where it is annotated.
    """
    module, colon, attribute = REWARDS.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"reward {name!r}: not one of {', '.join(REWARDS)}, and not of the form module:function")
    try:
        reward: Any = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    path, owner = f"reward.settings.{name}", f"reward {name!r}"
    is_class = inspect.isclass(reward)
    if is_class:
        arguments = settings_from_signature(reward, settings or {}, path, owner=owner, passed=["device"])
        reward = reward(device=torch.device(device), **arguments)
    elif settings:
        raise ConfigError(f"{path}: {owner} is a function, which has no settings; leave them out")
    return _seen_by(reward, frames)


def reward_name(reward: Reward) -> str:
    """The name `module:attribute` of a function or of an object's class, as a configuration would spell it out."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _seen_by(reward: Reward, frames: str) -> Reward:
    """The reward as it is given videos: whole, or frame by frame."""
    return reward if frames == "clip" else _MeanOverFrames(reward)


def score_range(reward: Reward) -> tuple[float, float]:
    """The lowest and the highest score that a reward can give; infinite where it does not say."""
    return float(getattr(reward, "low", -math.inf)), float(getattr(reward, "high", math.inf))


def reward_version(name: str, settings: Mapping[str, Any]) -> str:
    """A hash of the reward's name, its settings and this package's version: rewards of one version give equal scores."""
    text = json.dumps([name, settings, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checked(rewards: Tensor, name: str, prompts: Sequence[str], low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Rewards (B,) as float32 on the CPU, or an error that names the reward, the prompt and the value."""
    if rewards.shape != (len(prompts),):
        raise ValueError(f"reward {name!r} returned shape {tuple(rewards.shape)} for {len(prompts)} images, not (B,)")
    scores = rewards.detach().float().cpu()
    # As float32, like the scores: 0.1 is less than the float32 nearest to it.
    bottom, top = torch.tensor([low, high], dtype=torch.float32)
    bad = (~torch.isfinite(scores) | (scores < bottom) | (scores > top)).nonzero().flatten().tolist()
    if bad:
        value, where = rewards[bad[0]].item(), f"for the prompt {prompts[bad[0]]!r}"
        outside = f", outside of its range [{low:g}, {high:g}]" if math.isfinite(value) else ""
        raise ValueError(f"reward {name!r} returned {value} {where}{outside}")
    return scores


@dataclass(frozen=True, kw_only=True)
class RewardSum:
    """What a run maximises or reports: rewards by name, whose scores are checked one by one, and their weighted sum."""

    rewards: dict[str, Reward]
    weights: dict[str, float]

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Each reward's scores (B, R) float32, on the CPU."""
        columns = []
        for name in self.weights:
            reward = self.rewards[name]
            columns.append(checked(reward(images, prompts, metadata), name, prompts, *score_range(reward)))
        return torch.stack(columns, dim=1)

    def total(self, scores: Tensor) -> Tensor:
        """(N, R) -> (N,), the weighted sums."""
        return (scores * torch.tensor(list(self.weights.values()), device=scores.device)).sum(dim=1)


def load_rewards(
    *sums: Weights,
    device: torch.device | str,
    settings: Mapping[str, Mapping[str, Any]],
    frames: str,
    given: Mapping[str, Reward] | None = None,
) -> list[RewardSum]:
    """A `RewardSum` for each of the sums, written as in reward.train; a reward that stands in several is loaded once.

    given: rewards that are there already, by `reward_name`.
    """
    weights = [weights_of(one) for one in sums]
    rewards = {
        name: _seen_by(given[name], frames)
        if given and name in given
        else load_reward(name, device=device, settings=settings.get(name), frames=frames)
        for name in dict.fromkeys(name for one in weights for name in one)
    }
    return [RewardSum(rewards=rewards, weights=one) for one in weights]


def weights_of(rewards: Weights) -> dict[str, float]:
    """Rewards by name with their weights; the weight of a single reward is 1."""
    return {rewards: 1.0} if isinstance(rewards, str) else dict(rewards)


def each_frame(
    videos: Tensor,  # (B, T, 3, H, W)
    prompts: list[str],
    metadata: list[dict],
) -> tuple[Tensor, list[str], list[dict]]:
    """The frames of videos as images (B T, 3, H, W), each with its video's prompt and metadata."""
    count = videos.shape[1]
    return videos.flatten(0, 1), [p for p in prompts for _ in range(count)], [m for m in metadata for _ in range(count)]


class _MeanOverFrames:
    """An image reward that scores a video too, by the mean of its frames' scores."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.low, self.high = score_range(reward)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        if images.dim() == 4:
            return self.reward(images, prompts, metadata)
        scores = self.reward(*each_frame(images, prompts, metadata)).view(images.shape[:2])
        # In double: rounding must not carry a mean out of the range of its scores.
        return scores.double().mean(dim=1).float()
