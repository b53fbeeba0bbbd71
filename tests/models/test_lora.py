"""The lean LoRA layer against PEFT's own, and 8-bit drafts against the exact layer."""

import re

import pytest
import torch
from peft import LoraConfig
from support.helpers import DEVICE
from support.tiny_model import TINY_WEIGHTS, load_tiny_model, load_tuned_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.models.fp8 import Fp8Linear, drafting, prepare_fp8
from fastgrpo.models.lora import LeanLinear, lora_config
from fastgrpo.validation import ConfigError, load_config, recomputes_old

pytestmark = pytest.mark.gpu
SHAPES = [(5, 24), (3, 7, 24), (2, 3, 5, 24)]


def skip_without_row_scales(dtype: torch.dtype) -> None:
    """Where 8-bit products cannot have a scale a row and a bias of this dtype; on a GPU bfloat16 has to."""
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA adds no bias to a float32 result")
    x, scale = torch.zeros(16, 16, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(16, 1, device=DEVICE)
    try:
        torch._scaled_mm(x, x.T, scale_a=scale, scale_b=scale.T, bias=scale[:, 0].to(dtype), out_dtype=dtype)
    except (RuntimeError, ValueError) as error:
        if DEVICE == "cuda":
            raise
        pytest.skip(f"torch {torch.__version__} has no scales a row on a CPU: {error}")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def nets(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """One with the lean layer, one with PEFT's, of the same weights."""
    from peft import inject_adapter_in_model

    made = []
    for config in (
        lora_config(rank=4, alpha=12, targets=["layer"]),
        LoraConfig(r=4, lora_alpha=12, init_lora_weights="gaussian", target_modules=["layer"]),
    ):
        torch.manual_seed(0)
        net = inject_adapter_in_model(config, Net().to(DEVICE, dtype).requires_grad_(False))
        with torch.no_grad():
            net.layer.lora_B["default"].weight.normal_()
        made.append(net)
    assert isinstance(made[0].layer, LeanLinear) and not isinstance(made[1].layer, LeanLinear)
    return made[0], made[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_float64(shape: tuple[int, ...]) -> None:
    lean, _ = nets()
    x = torch.randn(*shape, device=DEVICE, requires_grad=True)
    weight = torch.randn(*shape[:-1], 40, device=DEVICE)
    (lean(x) * weight).sum().backward()
    layer = lean.layer
    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A.default.weight, layer.lora_B.default.weight))
    base = x64 @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
    expected = base + (x64 @ a.T @ b.T) * 3  # alpha / rank
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(lean(x).double(), expected, rtol=1e-5, atol=1e-5)
    found = (x.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad)
    for gradient, reference in zip(found, (x64.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-4)
    assert layer.base_layer.weight.grad is None


def test_a_slice_is_as_good_as_its_copy() -> None:
    lean, _ = nets()
    x = torch.randn(3, 9, 24, device=DEVICE)
    # torch may multiply the two in different ways.
    torch.testing.assert_close(lean(x[:, 2:7]), lean(x[:, 2:7].contiguous()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["off", "dropout", "other dtype", "second adapter"])
def test_whatever_else_peft_can_do_is_left_to_peft(change: str) -> None:
    lean, stock = nets()
    x = torch.randn(4, 24, device=DEVICE)
    for net in (lean, stock):
        if change == "off":
            net.layer.enable_adapters(False)
        elif change == "dropout":
            net.layer.lora_dropout["default"] = nn.Dropout(0.5)
        elif change == "other dtype":
            net.layer.base_layer.double()
        else:
            torch.manual_seed(3)
            net.layer.update_layer("second", r=2, lora_alpha=2, config=LoraConfig(init_lora_weights=False))
            net.layer.set_adapter(["default", "second"])
    if change == "other dtype":
        x = x.double()
    outputs = []
    for net in (lean, stock):
        torch.manual_seed(5)
        outputs.append(net(x))
    assert torch.equal(*outputs)


def operations(net: nn.Module, x: Tensor) -> int:
    """Kernels that a forward pass launches: every operation that is no view."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal count
            result = function(*args, **(kwargs or {}))
            count += not function.is_view and not function.name().startswith("aten::_unsafe_view")
            return result

    with torch.no_grad(), Count():
        net(x)
    return count


def test_it_launches_three_operations_where_peft_launches_five() -> None:
    lean, stock = nets()
    x = torch.randn(4, 24, device=DEVICE)
    assert operations(lean, x) == 3 and operations(stock, x) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_are_near_and_only_inside(dtype: torch.dtype) -> None:
    skip_without_row_scales(dtype)
    model = load_tuned_model(device=DEVICE, dtype=dtype)
    x, sigma = torch.randn(3, *model.latent_shape, device=DEVICE).to(dtype), torch.full((3,), 0.7, device=DEVICE)
    conditioning = model.encode(["a red circle"] * 3)
    with torch.no_grad():
        exact = model.velocity(x, sigma, conditioning)
        model.prepare_drafts()
        with model.drafting():
            draft = model.velocity(x, sigma, conditioning)
        assert torch.equal(model.velocity(x, sigma, conditioning), exact)
    error = (draft - exact).float().norm() / exact.float().norm()
    assert 1e-4 < error < 0.1  # e4m3 has 3 bits of mantissa: a few percent a product, some of which cancel
    assert all(p.dtype == dtype for p in model.transformer.parameters())
    assert model.transformer.state_dict().keys() == load_tuned_model().transformer.state_dict().keys()


def test_which_layers_are_drafted() -> None:
    """The frozen ones of the blocks, base layers of a LoRA included; neither the LoRA's own nor what is outside."""
    skip_without_row_scales(torch.bfloat16)
    model = load_tuned_model(device=DEVICE, dtype=torch.bfloat16)
    count = len(prepare_fp8(model.blocks))
    drafted = {name for name, m in model.transformer.named_modules() if isinstance(m, Fp8Linear)}
    assert len(drafted) == count and all(name.startswith("transformer_blocks.") for name in drafted)
    assert "transformer_blocks.0.attn.to_q.base_layer" in drafted and not any("lora_" in name for name in drafted)
    frozen = sum(type(m) is nn.Linear and not m.weight.requires_grad for b in model.blocks for m in b.modules())
    assert frozen == 0  # none was left out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_is_its_rounded_weights(dtype: torch.dtype) -> None:
    skip_without_row_scales(dtype)
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(5, 3, 64, device=DEVICE).to(dtype)
    rows, weight = x.float(), layer.weight.float()
    a, b = (t.abs().amax(-1, keepdim=True) / 448 for t in (rows, weight))
    x8, w8 = (rows / a).to(torch.float8_e4m3fn).double(), (weight / b).to(torch.float8_e4m3fn).double()
    expected = (x8 * a) @ (w8 * b).T + layer.bias
    Fp8Linear.convert(layer)
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    with drafting([layer]):
        torch.testing.assert_close(layer(x).double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_nothing_to_draft_and_half_drafts_are_refused() -> None:
    model = load_tiny_model()
    model.train_all(keep_reference=False)
    with pytest.raises(ValueError, match="no frozen linear layer"):
        model.prepare_drafts()
    config = TINY_WEIGHTS.parent.parent.parent / "configs" / "tiny_shapes_grpo.yaml"
    assert recomputes_old(load_config(config, ["rollout.precision=fp8"]))
    with pytest.raises(ConfigError, match=r"rollout\.precision = 'fp8'.*update\.old_velocity=recompute"):
        load_config(config, ["rollout.precision=fp8", "update.old_velocity=rollout"])
    with pytest.raises(ConfigError, match=r"model\.train=lora"):
        load_config(config, ["rollout.precision=fp8", "model.train=full"])


def test_every_dtype_may_ask_for_fp8() -> None:
    """What a device multiplies is found out on it, not written down in the configuration."""
    config = TINY_WEIGHTS.parent.parent.parent / "configs" / "sd3_ocr.yaml"
    for dtype in ("float32", "bfloat16", "float16"):
        settings = ["rollout.precision=fp8", f"model.dtype={dtype}"]
        assert load_config(config, settings).model.dtype == dtype


def test_each_kind_of_layer_multiplies_once_at_the_start(monkeypatch) -> None:
    seen = []

    def product(x: Tensor, w: Tensor, *, bias: Tensor | None, out_dtype: torch.dtype, **_: object) -> Tensor:
        seen.append((w.T.shape, out_dtype, bias is None))
        return torch.zeros(len(x), w.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    layers = prepare_fp8(load_tuned_model().blocks)
    kinds = {(layer.weight.shape, torch.float32, layer.bias is None) for layer in layers}
    assert len(seen) == len(kinds) < len(layers) and set(seen) == kinds
    assert not any(layer.drafting for layer in layers)


# What torch says on a GPU, of a bias in float32; on a CPU, in its release 2.11; on a GPU without 8-bit units.
REFUSALS = (
    (ValueError, "Bias is not supported when out_dtype is set to Float32", torch.float32),
    (RuntimeError, "Now _scaled_mm only supports per-tensor scaling for CPU backend.", torch.float32),
    (NotImplementedError, "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9", torch.bfloat16),
)


@pytest.mark.parametrize("kind, message, dtype", REFUSALS)
def test_a_product_that_the_device_refuses_is_told_at_the_start(monkeypatch, kind, message, dtype) -> None:
    def product(*_: Tensor, bias: Tensor | None, **__: object) -> Tensor:
        if bias is not None:
            raise kind(message + "\nException raised from somewhere in C++")
        return torch.zeros(1, 32)

    def block(bias: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 32, bias=bias)).to(dtype).requires_grad_(False)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    name = str(dtype).removeprefix("torch.")
    take = "rollout.precision=model" if dtype == torch.bfloat16 else "model.dtype=bfloat16, or rollout.precision=model"
    expected = rf"'fp8': the CPU multiplies no .* model\.dtype={name} \({re.escape(message)}\); take {re.escape(take)}$"
    with pytest.raises(ValueError, match=expected):
        prepare_fp8([block(bias=True)])
    assert len(prepare_fp8([block(bias=False)])) == 2
