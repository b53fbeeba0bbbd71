"""torch.compile of a transformer's blocks, as one program for rollouts and updates.

With gradients and without, a block is compiled to two programs, which keep other values in full precision: below float32
they round differently, and the first ratio would only be near 1. So a velocity without gradients is made by the program with
them, which lets go, block by block, of what it keeps for a backward pass that never comes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Of an `fastgrpo.models.adapter.Adapter`.
Velocity = Callable[[Tensor, Tensor, Any], Tensor]
Prepared = Callable[[Any], Any]


class CompiledVelocity:
    """A model's velocity with its blocks compiled in place, one program for each shape; alike blocks share the programs."""

    def __init__(
        self, velocity: Velocity, prepared: Prepared, transformers: Sequence[Any], blocks: Sequence[nn.Module],
        drafting: Callable[[], bool],
    ) -> None:  # fmt: skip
        """transformers: that the blocks are of. drafting: whether these multiply in 8 bits, which has no gradient."""
        self.velocity, self._prepared = velocity, prepared
        self.transformers, self.blocks, self.drafting = transformers, blocks, drafting
        self._cuts = False  # whether the graph is cut behind each block
        for block in blocks:
            # Left to itself, the compiler would answer a second shape with one program for all shapes to come.
            block.compile(dynamic=False)
            program: Any = block._compiled_call_impl
            block._compiled_call_impl = partial(self._run_block, program)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        with self._as_in_an_update():
            v = self.velocity(x, sigma, conditioning)
        return v if torch.is_grad_enabled() else v.detach()

    def prepared(self, conditioning: Any) -> Any:
        """The model's `prepared`. Where a program depends on its tensors having a gradient, they still say so."""
        with self._as_in_an_update():
            return self._prepared(conditioning)

    @contextmanager
    def _as_in_an_update(self) -> Iterator[None]:
        """Inside, blocks run the program with gradients, whether anybody asks for them or not."""
        compiled = self.blocks[0]._compiled_call_impl is not None  # a benchmark takes the programs out for a while
        if torch.is_grad_enabled() or self.drafting() or not compiled:
            yield
            return
        with torch.enable_grad(), self._without_graph():
            yield

    @contextmanager
    def _without_graph(self) -> Iterator[None]:
        """Inside, blocks are called as in an update, but nothing is kept behind a block or at a checkpoint."""
        checkpoints = [getattr(transformer, "_gradient_checkpointing_func", None) for transformer in self.transformers]
        self._cuts = True
        for transformer in self.transformers:
            transformer._gradient_checkpointing_func = _call
        try:
            yield
        finally:
            self._cuts = False
            for transformer, checkpoint in zip(self.transformers, checkpoints, strict=True):
                transformer._gradient_checkpointing_func = checkpoint

    def _run_block(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = program(*args, **kwargs)
        return tree_map_only(Tensor, _leaf, found) if self._cuts else found


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpoint that is none."""
    return function(*args, **kwargs)


def _leaf(tensor: Tensor) -> Tensor:
    """The same numbers without what they were made of; still with a gradient, where a program depends on there being one."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
