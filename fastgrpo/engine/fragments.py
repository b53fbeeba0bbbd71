"""Which stretch of every trained weight this rank steps, and in which tensor, however DeepSpeed has split them.

    stage 0       every parameter itself, whole, on every rank
    stage 1, 2    the parameters one behind the other, cut into W equal pieces: AdamW steps a float32 copy of one
    stage 3       each parameter cut into W equal pieces, the last one padded; AdamW steps a float32 copy of one of each,
                  these one behind the other

Beside each tensor that AdamW steps, its state holds the two moments in that tensor's shape, from the first step on.
`deepspeed` is DeepSpeed's engine, whose `basic_optimizer` is AdamW.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine.shards import SavedShards

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A stretch of one trained weight."""

    name: str  # of the weight
    start: int  # where in the flattened weight it begins
    count: int  # elements
    stepped: Tensor  # the tensor that AdamW steps, which holds it; either flat, or the weight itself
    offset: int  # where in `stepped` it begins

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the stretch in `stepped`, or in a moment of it."""
        whole = self.count == tensor.numel()  # and then of any shape and in any order in memory
        return tensor.detach() if whole else tensor.detach()[self.offset : self.offset + self.count]


def fragments_of(trained: Mapping[str, Any], deepspeed: Any, rank: int) -> Iterator[Fragment]:
    """The stretches that this rank steps."""
    optimizer, stage = deepspeed.optimizer, deepspeed.zero_optimization_stage()
    for name, p in trained.items():
        if stage == 0:
            yield Fragment(name, 0, p.numel(), p, 0)
        elif stage < 3:
            link = p._hp_mapping
            if link is not None:
                (flat,) = optimizer.param_groups[link.param_group_index]["params"]
                here, there = link.lp_fragment_address, link.hp_fragment_address
                yield Fragment(name, here.start, here.numel, flat, there.start)
        else:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            count = min(size, p.ds_numel - rank * size)
            if count > 0:
                yield Fragment(name, rank * size, count, optimizer.fp32_partitioned_groups_flat[group], offset)


def views_of(fragments: Iterable[Fragment], deepspeed: Any) -> dict[str, tuple[int, Tensor]]:
    """Key of a shard -> start and view of the stretch of a master or, from the first step on, of a moment."""
    views = {}
    for one in fragments:
        state = deepspeed.basic_optimizer.state.get(one.stepped, {})
        for kind, tensor in {MASTER: one.stepped, **state}.items():
            if kind in (MASTER, *MOMENTS):
                views[f"{kind}/{one.name}"] = one.start, one.of(tensor)
    return views


def steps_of(deepspeed: Any) -> int:
    """How often AdamW has stepped."""
    return max((int(state["step"]) for state in deepspeed.basic_optimizer.state.values()), default=0)


def make_state(deepspeed: Any, steps: int) -> None:
    """Gives AdamW the state that it would make itself at its first step, as after `steps` of them, with moments of 0."""
    adamw = deepspeed.basic_optimizer
    stepped = [tensor for group in adamw.param_groups for tensor in group["params"]]
    if deepspeed.zero_optimization_stage() == 3:  # which shows AdamW one of its tensors at a time
        stepped = deepspeed.optimizer.fp32_partitioned_groups_flat
    for tensor in stepped if steps > 0 else ():
        moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        adamw.state[tensor] = {"step": torch.tensor(float(steps)), **moments}


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, flattened, on the CPU; from CUDA through pinned memory, with one wait at the end for all."""
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return {name: copy.flatten() for name, copy in copies.items()}


def load_policy(trained: Mapping[str, Any], views: Mapping[str, tuple[int, Tensor]], saved: SavedShards) -> None:
    """Rounds the masters into the policy itself, in place, as DeepSpeed does after a step."""
    for name, p in trained.items():
        key = f"{MASTER}/{name}"
        if key in views and hasattr(p, "ds_tensor"):
            _, master = views[key]
            p.ds_tensor[: master.numel()].copy_(master.flatten())
        # In stage 3 a weight itself is there only while it is gathered, as small ones are for good.
        if p.numel() == getattr(p, "ds_numel", p.numel()):
            p.copy_(saved.read(key, 0, p.numel()).view(p.shape))
