"""Attention by name: our joint attention against diffusers' own, and a clear error for what is not installed."""

import importlib.util

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from support.tiny_model import load_tiny_model

from fastgrpo.models import MODELS, model_class
from fastgrpo.models.attention import BACKENDS, JointAttention, use_attention


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    """What a choice changes in the process is put back: torch's switch, and the backend that diffusers takes by itself."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch has it
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_joint_attention_is_diffusers(tiny_model) -> None:
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


def test_native_leaves_the_network_alone(tiny_model) -> None:
    before = dict(tiny_model.transformer.attn_processors)
    tiny_model.use_attention("native")
    assert tiny_model.transformer.attn_processors == before


def test_a_model_that_is_loaded_leaves_cudnn_out() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    load_tiny_model()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_is_asked_for_at_each_call(monkeypatch) -> None:
    """Of a GPU only the look is needed: SD3's blocks go through our processor, FLUX's through diffusers' own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = load_tiny_model()
    model.transformer.bfloat16()
    model.use_attention("cudnn")
    assert {processor.backend.value for processor in model.transformer.attn_processors.values()} == {"_native_cudnn"}
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 4),
    ).bfloat16()  # fmt: skip
    use_attention(flux, "cudnn")
    backends = [processor._attention_backend for processor in flux.attn_processors.values()]
    assert backends == [AttentionBackendName._NATIVE_CUDNN] * 2
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "everything else goes without"


def test_cudnn_where_it_cannot_run_is_refused(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn': there is no GPU here .*take native"):
        tiny_model.use_attention("cudnn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn': .* none in float32; take model\.dtype=bfloat16"):
        tiny_model.use_attention("cudnn")


@pytest.mark.parametrize("name", [name for name in MODELS if model_class(name).masks])
@pytest.mark.parametrize("kernels", [name for name in BACKENDS if name != "native"])
def test_families_that_mask_take_torchs_own_only(name: str, kernels: str) -> None:
    """Refused before anything is asked of the network: a family needs none of its weights for it."""
    model = object.__new__(model_class(name))
    with pytest.raises(ValueError, match=rf"model\.attention = '{kernels}': {model_class(name).__name__} .* take native"):
        model.use_attention(kernels)


def test_which_families_mask() -> None:
    assert {name for name in MODELS if model_class(name).masks} == {
        "qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "qwen_image_21", "z_image", "bagel",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("native", "cudnn")])
def test_what_is_not_installed_is_told(tiny_model, name: str) -> None:
    if importlib.util.find_spec(BACKENDS[name][1]):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ValueError, match=rf"model\.attention = '{name}': .* is not installed .*take native"):
        use_attention(tiny_model.transformer, name)
