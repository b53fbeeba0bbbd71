"""The training loop that kernels/README.md shows is one that trains."""

import re

import pytest
import torch
from support.helpers import ROOT

README = (ROOT / "kernels" / "README.md").read_text()
LINES = 20


@pytest.fixture
def loop() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return found


def test_the_loop_is_short(loop: str) -> None:
    lines = [line for line in loop.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= LINES


def test_the_loop_trains(loop: str) -> None:
    """At first the reward is that of noise, about -1.7; and the ratio of the very first update is 1."""
    once = loop.replace("range(50)", "range(1)").replace("zip(xs, ", "zip(xs[:1], ")
    assert once.count("range(1)") == once.count("zip(xs[:1], ") == 1
    before, after = {}, {}
    for source, names in ((once, before), (loop, after)):
        torch.manual_seed(0)
        exec(source, names)
    assert torch.equal(before["ratio"], torch.ones(before["B"]))
    assert before["reward"].mean() < -1.4 and after["reward"].mean() > -0.9
    assert after["iteration"] == 49
