"""Bounds of a number, to stand beside its type: `every: Annotated[int, AtLeast(1), AtMost(1000)] = 20`."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Bound:
    """A limit that a number must keep to; `str` says it in words."""

    limit: float
    hint: str = ""  # what a refusal adds
    words: ClassVar[str]

    def holds(self, value: float) -> bool:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.words} {self.limit}"


class AtLeast(Bound):
    words = "at least"

    def holds(self, value: float) -> bool:
        return value >= self.limit


class Above(Bound):
    words = "above"

    def holds(self, value: float) -> bool:
        return value > self.limit


class AtMost(Bound):
    words = "at most"

    def holds(self, value: float) -> bool:
        return value <= self.limit


class Below(Bound):
    words = "below"

    def holds(self, value: float) -> bool:
        return value < self.limit
