"""The embedded model, through the adapter that loads SD3.5."""

import torch

from support.helpers import ROOT

TINY_WEIGHTS = ROOT / "fastgrpo" / "tiny" / "weights"


def load_tiny_model(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """The embedded pipeline, through the adapter that loads SD3.5."""
    from fastgrpo.models import load_model

    return load_model("sd3", path=TINY_WEIGHTS, dtype=dtype, device=torch.device(device), max_text_tokens=1)


def load_tuned_model(targets: tuple[str, ...] | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """The embedded pipeline with a LoRA that has an effect."""
    model = load_tiny_model(device, dtype)
    torch.manual_seed(1)
    model.add_lora(rank=4, alpha=8, targets=targets)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model
