"""Numbers that are not finite are named where they are found: what comes after a NaN is no training, its images are black.

with at("iteration 7"):
    check_finite("velocity", v)                 NotFinite: iteration 7: the velocity is not finite in 3 of 4096 numbers
    check_weights("average", ema.weights)       NotFinite: iteration 7: the average of NAME is not finite in ...
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Diverged(ArithmeticError):
    """The training has left what is worth going on from. A run ends with it, and keeps the state before it."""


class NotFinite(Diverged):
    """A number that training or an image depends on is infinite or not a number."""


def check_finite(name: str, value: Tensor | float) -> None:
    """Raises NotFinite where a number, or one in a tensor, is not finite. It waits for the tensor's device."""
    if isinstance(value, Tensor):
        # Tensors on the meta device have no numbers.
        if not value.is_meta and not value.isfinite().all():
            raise NotFinite(f"the {name} is {in_words(value)}")
    elif not math.isfinite(value):
        raise NotFinite(f"the {name} is {value}")


def check_weights(what: str, weights: Mapping[str, Tensor]) -> None:
    """Raises NotFinite that names the first of many tensors that is not finite; it waits for their device once."""
    name = first_not_finite(weights)
    if name is not None:
        raise NotFinite(f"the {what} of {name} is {in_words(weights[name])}")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is not finite, None if there is none. One wait for one device."""
    names = [name for name, tensor in tensors.items() if not tensor.is_meta]
    if not names:
        return None
    home = tensors[names[0]].device
    finite = torch.stack([tensors[name].isfinite().all().to(home) for name in names]).tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def in_words(tensor: Tensor) -> str:
    """How many of a tensor's numbers are not finite."""
    return f"not finite in {int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers"


@contextmanager
def at(place: str) -> Iterator[None]:
    """Inside, Diverged says where it was found."""
    try:
        yield
    except Diverged as error:
        raise type(error)(f"{place}: {error}") from None
