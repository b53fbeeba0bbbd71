"""Numbers that are not finite end a run: what comes after a NaN is no training, and the images of one are black.

with at("iteration 7"):
    check_finite("velocity", v)         NotFinite: iteration 7: the velocity is not finite
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class NotFinite(ArithmeticError):
    """A number that training or an image depends on is infinite or not a number."""


def check_finite(name: str, value: Tensor | float) -> None:
    """Raises NotFinite where a number, or one in a tensor, is not finite. It waits for the tensor's device."""
    if isinstance(value, Tensor):
        # Tensors on the meta device have no numbers.
        if not value.is_meta and not value.isfinite().all():
            raise NotFinite(f"the {name} is not finite in {int((~value.isfinite()).sum())} of {value.numel()} numbers")
    elif not math.isfinite(value):
        raise NotFinite(f"the {name} is {value}")


@contextmanager
def at(place: str) -> Iterator[None]:
    """Inside, NotFinite says where it was found."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{place}: {error}") from None
