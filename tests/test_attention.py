"""Attention by name: our joint attention against diffusers' own, and a clear error for what is not installed."""

import importlib.util

import pytest
import torch
from conftest import load_tiny_model

from fastgrpo.models.attention import BACKENDS, JointAttention, use_attention


def test_joint_attention_is_diffusers(tiny_model) -> None:  # noqa: ANN001
    """The whole network, forward and gradient, with the kernels of both being torch's."""
    model = load_tiny_model()
    conditioning = model.encode(["a red circle", "two blue squares"])
    sigma = torch.tensor([0.9, 0.2])
    results = []
    for processor in (None, JointAttention("native")):
        if processor is not None:
            model.transformer.set_attn_processor(processor)
        x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        v = model.velocity(x, sigma, conditioning)
        results.append((v.detach(), torch.autograd.grad(v.square().sum(), x)[0]))
    (v, grad), (own_v, own_grad) = results
    torch.testing.assert_close(own_v, v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_grad, grad, rtol=1e-4, atol=1e-4)


def test_native_leaves_the_network_alone(tiny_model) -> None:  # noqa: ANN001
    before = dict(tiny_model.transformer.attn_processors)
    use_attention(tiny_model.transformer, "native")
    assert tiny_model.transformer.attn_processors == before


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "native"])
def test_what_is_not_installed_is_told(tiny_model, name: str) -> None:  # noqa: ANN001
    if importlib.util.find_spec(BACKENDS[name][1]):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ValueError, match=rf"model\.attention = '{name}': .* is not installed .*take native"):
        use_attention(tiny_model.transformer, name)
