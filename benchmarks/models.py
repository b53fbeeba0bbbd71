"""The models that benchmarks run: the embedded tiny one, and Stable Diffusion 3.5 Medium at full size with random weights.

Speed does not depend on what the weights say, so no checkpoint is needed.
"""

from typing import Any

import torch
from common import ROOT
from peft import LoraConfig

from fastgrpo.measure import DEVICE
from fastgrpo.models import load_model, model_class


def load(name: str, resolution: int, dtype: torch.dtype = torch.bfloat16, max_text_tokens: int = 256) -> Any:
    """The adapter, on this machine's device. Of the tiny one all but the name is its own."""
    if name == "tiny":
        weights = ROOT / "fastgrpo" / "tiny" / "weights"
        return load_model("sd3", path=weights, dtype=torch.float32, device=DEVICE, max_text_tokens=1)
    size = {"height": resolution, "width": resolution}
    return model_class("sd3").random(name, dtype=dtype, device=DEVICE, max_text_tokens=max_text_tokens, **size)


def add_stock_lora(model: Any, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
    """PEFT's own LoRA layers, which is what others train with."""
    names = list(targets or model.lora_targets)
    model.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names))


def conditioning(model: Any, batch: int) -> tuple:
    """Random embeddings of the right shapes."""
    if not model.text_encoders:
        torch.manual_seed(0)
        return model.placeholder(batch)
    return model.encode(["a red circle"] * batch)
