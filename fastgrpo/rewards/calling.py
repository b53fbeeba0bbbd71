"""How a reward is called, and what it may answer: the one door between a run and code that others wrote.

    scores_of(reward, name, images, prompts, metadata) -> (B,) float32 on the CPU, checked

A reward gets copies, so that what it writes into its arguments reaches nobody, and runs without autograd in whatever thread
it is called. It may answer with a real number for each image, in a tensor, an array, a list or a tuple. Everything else, and
every exception, becomes a `RewardError` that names the reward and the prompts.
"""

import copy
import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Reward = Callable[[Tensor, list[str], list[dict]], Any]
SHOWN = 3  # prompts in a message, of those that were scored together


class RewardError(RuntimeError):
    """A reward failed or gave no scores. The run saves its state and stops: no score may be made up."""


class BadScores(RewardError, ValueError):
    """What a reward returned is not one score for each image."""


class RewardTimeout(RewardError):
    """A reward took longer than `reward.timeout`."""


class RewardUnavailable(RewardError):
    """The server of a reward is gone and did not come back; when it is there again, the same run can go on."""


def score_range(reward: Reward) -> tuple[float, float]:
    """The lowest and the highest score that a reward can give; infinite where it does not say."""
    return float(getattr(reward, "low", -math.inf)), float(getattr(reward, "high", math.inf))


def in_percent(reward: Reward) -> bool:
    """Whether a reward says that its scores are shares, which people read in percent."""
    return bool(getattr(reward, "percent", False))


@torch.no_grad()
def scores_of(
    reward: Reward, name: str, images: Tensor, prompts: list[str], metadata: list[dict], *, finite: bool = True
) -> Tensor:
    """A reward's scores (B,) float32, on the CPU. finite: False lets pass a score that is not finite.

    Raises RewardError, with the reward's own exception as its cause if there was one.
    """
    # The current GPU belongs to a thread, and code that says "cuda" without a number means the one of its images.
    place = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
    try:
        with place:
            answer = reward(images.clone(), list(prompts), [copy.deepcopy(record) for record in metadata])
    except RewardError:
        raise  # it names itself already
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {error} ({named(prompts)})") from error
    return checked(answer, name, prompts, *score_range(reward), finite=finite)


def checked(
    answer: Any,
    name: str,
    prompts: Sequence[str],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    finite: bool = True,
) -> Tensor:
    """What a reward answered as scores (B,) float32 on the CPU, a copy, or `BadScores` with the prompt and the value."""
    numbers = _numbers(answer, name, prompts)
    if numbers.shape != (len(prompts),):
        raise BadScores(f"reward {name!r} returned shape {tuple(numbers.shape)} for {len(prompts)} images, not (B,)")
    scores = numbers.detach().to("cpu", torch.float32, copy=True)
    # As float32, like the scores: 0.1 is less than the float32 nearest to it.
    bottom, top = torch.tensor([low, high], dtype=torch.float32)
    not_finite = ~torch.isfinite(scores)
    bad = (not_finite if finite else torch.zeros_like(not_finite)) | ((scores < bottom) | (scores > top)) & ~not_finite
    bad = bad.nonzero().flatten().tolist()
    if bad:
        value, where = numbers[bad[0]].item(), f"for the prompt {prompts[bad[0]]!r}"
        fault = "" if not math.isfinite(value) else f", outside of its range [{low:g}, {high:g}]"
        if fault and not math.isfinite(scores[bad[0]]):
            fault = ", which float32 cannot hold"
        raise BadScores(f"reward {name!r} returned {value} {where}{fault}")
    return scores


def _numbers(answer: Any, name: str, prompts: Sequence[str]) -> Tensor:
    """The answer as a real tensor of the shape it has."""
    if isinstance(answer, Tensor):
        if answer.is_complex():
            raise _refused(answer, name, prompts)
        return answer
    if isinstance(answer, list | tuple):
        items = list(answer)
    elif hasattr(answer, "__array__") or isinstance(answer, array):
        values = np.asarray(answer)
        if values.dtype.kind in "biuf":
            return torch.from_numpy(values.astype(np.float64))
        if values.dtype.kind != "O" or values.ndim != 1:
            raise _refused(answer, name, prompts)
        items = values.tolist()
    else:
        raise _refused(answer, name, prompts)
    return torch.tensor([_number(item, i, answer, name, prompts) for i, item in enumerate(items)], dtype=torch.float64)


def _number(item: Any, index: int, answer: Any, name: str, prompts: Sequence[str]) -> float:
    """A number of a list: Python's, numpy's, or one in a tensor or an array without dimensions."""
    if getattr(item, "shape", None) == () and hasattr(item, "item"):
        item = item.item()
    try:
        if isinstance(item, Real):
            return float(item)
    except OverflowError:
        pass
    where = f" for the prompt {prompts[index]!r}" if index < len(prompts) else ""
    raise BadScores(
        f"reward {name!r} returned a {type(answer).__name__} with {_shown(item)}{where}: expected a real number for each of "
        f"{len(prompts)} images"
    )


def _refused(answer: Any, name: str, prompts: Sequence[str]) -> BadScores:
    kind = f"{type(answer).__name__} {_shown(answer)}"
    return BadScores(
        f"reward {name!r} returned {kind}: expected a tensor, an array, a list or a tuple with a real number for each of "
        f"{len(prompts)} images ({named(prompts)})"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(prompts: Sequence[str]) -> str:
    """The prompts that were scored together, as an error names them."""
    different = list(dict.fromkeys(prompts))
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return f"prompt{'s' * (len(different) > 1)} {', '.join(map(_shown, different[:SHOWN]))}{more}"
