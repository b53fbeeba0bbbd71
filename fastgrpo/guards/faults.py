"""A fault: numbers of a run that were not finite, as a line of faults.jsonl and as a warning say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 8  # prompts in a line


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was not finite in an iteration, and where as far as that is known."""

    iteration: int
    tensor: str  # velocities, latents, log-probabilities, rewards, loss, gradient, weights, average
    count: int | None  # how many numbers; of the loss how many forward passes; None where nobody counted them
    update: int | None = None  # which optimiser step of the iteration, from 1; None: outside of them
    name: str | None = None  # of the parameter
    prompts: Sequence[str] = ()  # those that it may have come from, each once

    def row(self) -> dict[str, Any]:
        """The line of faults.jsonl."""
        return {
            "iteration": self.iteration, "update": self.update, "tensor": self.tensor, "name": self.name,
            "count": self.count, "prompts": list(self.prompts[:SHOWN]), "num_prompts": len(self.prompts),
        }  # fmt: skip

    def __str__(self) -> str:
        """In words, without the iteration."""
        many = f"{self.count} {'forward passes' if self.tensor == 'loss' else 'numbers'} of " if self.count else ""
        words = f"not finite: {many}the {self.tensor}" + (f" of {self.name}" if self.name else "")
        words = words if self.update is None else f"update {self.update}: {words}"
        if not self.prompts:
            return words
        more = f" and {len(self.prompts) - SHOWN} more" if len(self.prompts) > SHOWN else ""
        return f"{words} (prompts: {', '.join(map(repr, self.prompts[:SHOWN]))}{more})"
