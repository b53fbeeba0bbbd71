"""What a computation takes: FLOPs, and memory while it runs. Also on the meta device, where tensors have shapes and no data.

    flops, working_bytes = counted(lambda: network(x).sum().backward())

Every operation passes by a dispatch mode of torch, which sees its tensors and when they are gone.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def counted(function: Callable[[], Any]) -> tuple[int, int]:
    """The FLOPs of a function, and the most bytes that are live at a time of what it makes.

    Of what an operation needs only while it runs, the copies of cuDNN's convolutions count, and nothing else is known.
    """
    with Counter() as counter:
        function()
    return counter.flops, counter.peak


class Counter(TorchDispatchMode):
    """Counts operations, and follows each storage that one of them makes until nothing holds it.

    torch's own FlopCounterMode follows modules too, by hooks that keep tensors which checkpointing lets go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result, workspace = func(*args, **kwargs), 0
        if func is torch.ops.aten.convolution.default:
            result, workspace = of_cudnn(args[0], args[1], result)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        given = {storage._cdata for storage in storages((args, kwargs))}  # a view or what is written in place is not new
        for storage in storages(result):
            if storage._cdata not in given | self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now + workspace)
        return result

    def _freed(self, storage: int, nbytes: int) -> None:
        self._alive.remove(storage)
        self._now -= nbytes


def of_cudnn(x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """A convolution's output y as cuDNN returns it in 16 bits, and the bytes of its workspace.

    It computes with channels last. Where x is not so, it copies x, the weight and the output in its workspace: on an H200, a
    profile of SD3.5's decoder shows it (nchwToNhwcKernel). Where x is so, y is as well, which the meta device does not tell.
    """
    if y.element_size() != 2:
        return y, 0
    if x.dim() == 4 and not x.is_contiguous():
        return y.contiguous(memory_format=torch.channels_last), 0
    return y, x.nbytes + weight.nbytes + y.nbytes


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Makes attention flash attention on the meta device.

    There torch would take attention apart and keep a matrix of tokens by tokens, which no run on a GPU keeps.
    """
    functional = torch.nn.functional
    stock = functional.scaled_dot_product_attention

    # Named as torch names them: some call it by keyword.
    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
        # A mask changes neither FLOPs nor what is kept; heads that share keys are as many products as others.
        if key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]

    functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
