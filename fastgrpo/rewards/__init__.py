"""Rewards by name. A reward is a callable `(images, prompts, metadata) -> (B,) float32`; higher scores are better.

    images     (B, 3, H, W) uint8, what a viewer would see; of a clip (B, T, 3, H, W)
    prompts    list of B strings
    metadata   list of B dicts: the prompts' lines of the prompt file

It is a function, or a class that is made once, `Class(device=device, **settings)`, and then called. The parameters of the
class are the keys of its reward.settings, checked against their annotations. Its attributes, where it has them, say more:

    low, high                   the bounds of the scores
    percent                     True: a score is a share, and shown to people in percent
    check(prompts, metadata)    refuses, by a ValueError, what it could not score. Every prompt of a run is checked before
                                anything is loaded, if it is a static or class method; else once the class was made

A new reward is one file here and one line in `REWARDS`; your own needs neither: see `fastgrpo.rewards.finding`.

A run may maximise several rewards: the B scores of R rewards are a tensor (B, R), whose weighted sums are maximised.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config.schema import ConfigError
from fastgrpo.config.settings import settings_from_signature
from fastgrpo.rewards.calling import BadScores, Reward, in_percent, score_range, scores_of
from fastgrpo.rewards.calling import RewardError as RewardError
from fastgrpo.rewards.calling import RewardUnavailable as RewardUnavailable
from fastgrpo.rewards.finding import find_attribute
from fastgrpo.version import __version__

Weights = str | Mapping[str, float]  # one reward, or several by name with their weights
Judged = Sequence[tuple[str, dict]]  # prompts to be scored: where each stands, and its record

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


def find_reward(name: str, folder: Path | None = None) -> Any:
    """What that name stands for in `REWARDS`, or what it spells out as `module:attribute` or `file.py:attribute`.

    folder: of the configuration, where a module or a file is looked for after the working directory.

    Raises ValueError where there is none.
    """
    path = REWARDS.get(name, name)
    if ":" not in path:
        raise ValueError(
            f"reward {name!r}: not one of {', '.join(REWARDS)}, and not of the form module:function or file.py:function"
        )
    found = find_attribute(path, folder)
    if not callable(found):
        raise ValueError(f"reward {name!r}: is a {type(found).__name__}, which cannot be called with images")
    return found


def make_reward(found: Any, name: str, *, device: torch.device | str, settings: Mapping[str, Any] | None = None) -> Reward:
    """What `find_reward` found as a reward: a class is made with the device and its settings, a function has none.

    Raises ConfigError for settings that the class does not take, also by their types where it is annotated.
    """
    path, owner = f"reward.settings.{name}", f"reward {name!r}"
    if not inspect.isclass(found):
        if settings:
            raise ConfigError(f"{path}: {owner} is a function, which has no settings; leave them out")
        return found
    kind: Any = found
    arguments = settings_from_signature(kind, settings or {}, path, owner=owner, passed=["device"])
    if any(p.name == "device" or p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()):
        arguments["device"] = torch.device(device)
    return kind(**arguments)


def load_reward(
    name: str,
    *,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    frames: str = "each",
    folder: Path | None = None,
) -> Reward:
    """The reward of that name: `find_reward` and `make_reward`.

    frames: how videos (B, T, 3, H, W) are scored: each frame, whose mean is the score, or the whole clip.
    """
    reward = make_reward(find_reward(name, folder), name, device=device, settings=settings)
    return _seen_by(reward, name, frames)


def reward_name(reward: Reward) -> str:
    """The name `module:attribute` of a function or of an object's class, as a configuration would spell it out."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _seen_by(reward: Reward, name: str, frames: str, finite: bool = True) -> Reward:
    """The reward as it is given videos: whole, or frame by frame."""
    return reward if frames == "clip" else _MeanOverFrames(reward, name, finite)


def reward_version(name: str, settings: Mapping[str, Any]) -> str:
    """A hash of the reward's name, its settings and this package's version: rewards of one version give equal scores."""
    text = json.dumps([name, settings, __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RewardSum:
    """What a run maximises or reports: rewards by name, whose scores are checked one by one, and their weighted sum."""

    rewards: dict[str, Reward]
    weights: dict[str, float]
    worst: bool = False  # a score that is not finite counts as the worst there is, instead of as an error

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    @property
    def percent(self) -> list[str]:
        """The rewards whose scores are shown in percent; the score of a single one is shown as weighted."""
        weighted = len(self.weights) == 1 and self.weights != dict.fromkeys(self.weights, 1)
        return [name for name in self.weights if in_percent(self.rewards[name]) and not weighted]

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """Each reward's scores (B, R) float32, on the CPU. Where they need not be finite: see `settled`."""
        finite = not self.worst
        columns = [scores_of(self.rewards[name], name, images, prompts, metadata, finite=finite) for name in self.weights]
        return torch.stack(columns, dim=1)

    def settled(self, scores: Tensor) -> Tensor:
        """The scores (N, R) of all images that are compared; one that is not finite becomes its reward's lowest."""
        if not self.worst or scores.isfinite().all():
            return scores
        none = [name for name, column in zip(self.names, scores.unbind(1), strict=True) if not column.isfinite().any()]
        if none:
            raise BadScores(f"reward {none[0]!r} gave no finite score for any of {len(scores)} images")
        lowest = scores.masked_fill(~scores.isfinite(), torch.inf).amin(dim=0)
        return torch.where(scores.isfinite(), scores, lowest)

    def check(self, prompts: Judged) -> None:
        """Refuse prompts that one of the rewards cannot score."""
        for name in self.weights:
            check_prompts(self.rewards[name], name, prompts)

    def total(self, scores: Tensor) -> Tensor:
        """(N, R) -> (N,), the weighted sums."""
        return (scores * torch.tensor(list(self.weights.values()), device=scores.device)).sum(dim=1)


def load_rewards(
    *sums: Weights,
    device: torch.device | str,
    settings: Mapping[str, Mapping[str, Any]],
    frames: str,
    not_finite: str = "error",
    given: Mapping[str, Reward] | None = None,
    folder: Path | None = None,
    prompts: Sequence[Judged] = (),
) -> list[RewardSum]:
    """A `RewardSum` for each of the sums, written as in reward.train; a reward that stands in several is loaded once.

    not_finite: what a score that is not finite counts as, see reward.not_finite.

    given: rewards that are there already, by `reward_name`.
    folder: see `find_reward`.
    prompts: for each of the sums the prompts that it will score, which its rewards check before any of them is made.
    """
    weights = [weights_of(one) for one in sums]
    found = {
        name: given[name] if given and name in given else find_reward(name, folder)
        for name in dict.fromkeys(name for one in weights for name in one)
    }
    judged = [(name, some) for one, some in zip(weights, prompts, strict=False) for name in one]
    for name, some in judged:
        if not _checks_when_made(found[name]):
            check_prompts(found[name], name, some)
    rewards = {
        name: one if given and name in given else make_reward(one, name, device=device, settings=settings.get(name))
        for name, one in found.items()
    }
    for name, some in judged:
        if _checks_when_made(found[name]):
            check_prompts(rewards[name], name, some)
    worst = not_finite == "worst"
    seen = {name: _seen_by(reward, name, frames, finite=not worst) for name, reward in rewards.items()}
    return [RewardSum(rewards=seen, weights=one, worst=worst) for one in weights]


def _checks_when_made(found: Any) -> bool:
    """Whether the check of a class needs an object of it."""
    return inspect.isclass(found) and inspect.isfunction(inspect.getattr_static(found, "check", None))


def check_prompts(reward: Any, name: str, prompts: Judged) -> None:
    """Refuse, with its place, a prompt that the reward's `check` refuses; a reward without one can score any.

    reward: as it is called, or as `find_reward` found it.
    """
    check = getattr(reward, "check", None)
    if check is None:
        return
    for place, record in prompts:
        try:
            check([record["prompt"]], [copy.deepcopy(record)])
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{place}: reward {name!r}: {kind}{error}") from error


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

    def __init__(self, reward: Reward, name: str, finite: bool) -> None:
        self.reward, self.name, self.finite = reward, name, finite
        self.low, self.high = score_range(reward)
        self.check = getattr(reward, "check", None)
        self.percent = in_percent(reward)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Any:
        if images.dim() == 4:
            return self.reward(images, prompts, metadata)
        each = scores_of(self.reward, self.name, *each_frame(images, prompts, metadata), finite=self.finite)
        scores = each.view(images.shape[:2])
        # In double: rounding must not carry a mean out of the range of its scores.
        return scores.double().mean(dim=1).float()
