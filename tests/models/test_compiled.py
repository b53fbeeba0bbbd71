"""model.compile: rollouts and updates run one program, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_model import load_tuned_model
from torch import nn

from fastgrpo.models import load_model
from fastgrpo.testing import FAMILIES, load_family

CPU = torch.device("cpu")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What was compiled so far, to run as it was traced."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        found.append(graph)
        return graph

    compiles = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiles(self, **how, backend=backend))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wan_video"])  # whose network is that of wan
@pytest.mark.slow
def test_a_rollout_runs_the_program_of_the_update(name: str, programs: list, tmp_path: Path) -> None:
    """Nothing is compiled for the first pass with gradients that was not there for one without, checkpoints or none."""
    family = load_family(name)
    family.save(tmp_path)
    model = load_model(family.model, path=tmp_path, dtype=torch.float32, device=CPU, **family.settings)
    model.add_lora(rank=4, alpha=8)
    model.compile()
    conditioning, batch = model.encode(list(family.prompts)), len(family.prompts)
    x, sigma = torch.randn(batch, *model.latent_shape), torch.full((batch,), 0.5)
    with torch.no_grad():
        of_rollout = model.velocity(x, sigma, conditioning)
        prepared = model.velocity(x, sigma, model.prepared(conditioning))
    count = len(programs)
    of_update = model.velocity(x, sigma, conditioning)
    model.transformer.enable_gradient_checkpointing()
    checkpointed = model.velocity(x, sigma, conditioning)
    with torch.no_grad():
        again = model.velocity(x, sigma, conditioning)
    assert 0 < count == len(programs)
    assert all(torch.equal(of_rollout, other) for other in (prepared, of_update, checkpointed, again))
    assert [v.requires_grad for v in (of_rollout, of_update, checkpointed, again)] == [False, True, True, False]
    checkpointed.square().mean().backward()


def test_a_rollout_keeps_nothing_behind_a_block(programs: list) -> None:
    model, seen = load_tuned_model(), []
    model.compile()
    # What the last block returned.
    model.transformer.norm_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    arguments = torch.zeros(1, *model.latent_shape), torch.full((1,), 0.5), model.encode(["a red circle"])
    with torch.no_grad():
        model.velocity(*arguments)
    model.velocity(*arguments)
    assert programs and [x.requires_grad for x in seen] == [True, True] and [x.is_leaf for x in seen] == [True, False]


def test_the_decoder_of_images_is_compiled(programs: list) -> None:
    model, latents = load_tuned_model(), torch.randn(2, 4, 8, 8)
    expected = model.decode(latents)
    model.compile()
    assert not programs and torch.equal(model.decode(latents), expected) and len(programs) == 1
