"""FLOPs and live memory: against torch's own counter, its allocator on the CPU, and by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_model import load_tiny_model
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo.commands.counting import counted, flash_attention

BATCH = 4


def allocated(function: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had given out at a time, by its profiler."""
    with profile(profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert len(events) > 100 and now == 0
    return peak


def test_live_bytes_by_hand() -> None:
    x = torch.empty(1000, device="meta")

    def steps() -> None:
        y = x.view(10, 100) * 2  # 4000 bytes; a view is none
        z = y + 1  # 8000
        y.mul_(2)  # in place
        del y
        w = torch.cat([z, z])  # 4000 + 8000
        del z
        w.sum()  # 8000 + 4

    assert counted(steps) == (0, 12_000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_the_tiny_model(checkpointing: bool) -> None:
    """With checkpointing a few operations of a block make what only they see, which is not counted."""
    model = load_tiny_model("cpu")
    model.add_lora(rank=4, alpha=8, targets=None)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.transformer.train()
    conditioning, x = model.encode(["a red circle"] * BATCH), torch.randn(BATCH, *model.latent_shape)

    def update() -> None:
        model.velocity(x, torch.ones(BATCH), conditioning).sum().backward()

    update()  # whose gradients stay
    flops, live = counted(update)
    assert live == pytest.approx(allocated(update), rel=0.03 if checkpointing else 0.001)
    with FlopCounterMode(display=False) as counter:
        update()
    assert flops == counter.get_total_flops() > 0


def test_a_decoders_working_memory() -> None:
    """On a CPU convolutions copy as well, but other parts."""
    model = load_tiny_model("cpu")
    x = torch.randn(BATCH, *model.latent_shape)
    _, live = counted(lambda: model.decode(x))
    assert live < allocated(lambda: model.decode(x)) < 1.4 * live


def test_copies_of_a_convolution() -> None:
    """In 16 bits: of input, weight and output, unless the input has its channels last."""
    x, weight = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(6, 4, 3, 3, device="meta")
    output, copied = 2 * 6 * 8 * 8, 2 * 4 * 8 * 8 + 6 * 4 * 3 * 3 + 2 * 6 * 8 * 8

    def live(x: torch.Tensor) -> int:
        return counted(lambda: torch.nn.functional.conv2d(x, weight.to(x.dtype), padding=1))[1]

    assert live(x) == 4 * output
    half = x.half()
    assert live(half) == 2 * (weight.numel() + output + copied)
    last = half.contiguous(memory_format=torch.channels_last)
    assert live(last) < 2 * (weight.numel() + 2 * output + 1)
    found = []
    counted(lambda: found.append(torch.nn.functional.conv2d(last, weight.half(), padding=1)))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_counting_leaves_attention_as_it_was() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), flash_attention():
        raise RuntimeError
    assert torch.nn.functional.scaled_dot_product_attention is before
