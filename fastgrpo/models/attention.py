"""Attention kernels by name, for any transformer of diffusers."""

import importlib.util
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

# name -> diffusers' name, the module that must be importable, how to install that
BACKENDS = {
    "native": ("native", "torch", ""),
    "cudnn": ("_native_cudnn", "torch", ""),
    "flash2": ("flash", "flash_attn", "pip install flash-attn"),
    "flash3": ("_flash_3", "flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention"),
    "xformers": ("xformers", "xformers", "pip install xformers"),
}


def use_attention(transformer: Any, name: str) -> None:
    """Route the attention of every block to the kernels called `name`; ValueError if they cannot run here."""
    if name == "native":
        return
    backend, module, install = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"model.attention = {name!r}: {module} is not installed ({install}); take native")
    if name == "cudnn" and not torch.cuda.is_available():
        raise ValueError(f"model.attention = {name!r}: there is no GPU here for cuDNN to run on; take native")
    if name == "cudnn" and transformer.dtype not in (torch.bfloat16, torch.float16):
        dtype = str(transformer.dtype).removeprefix("torch.")
        raise ValueError(f"model.attention = {name!r}: cuDNN has none in {dtype}; take model.dtype=bfloat16, or native")
    _route(transformer, backend)


def _route(transformer: Any, backend: str) -> None:
    processors = transformer.attn_processors
    if all(hasattr(processor, "_attention_backend") for processor in processors.values()):
        transformer.set_attention_backend(backend)
        return
    # SD3's processor in diffusers knows torch's attention only.
    unknown = {type(p).__name__ for p in processors.values()} - {JointAttnProcessor2_0.__name__}
    if unknown:
        raise ValueError(f"model.attention: {', '.join(sorted(unknown))} can use torch's own attention only; take native")
    transformer.set_attn_processor(JointAttention(backend))


class JointAttention:
    """diffusers' `JointAttnProcessor2_0`, with a choice of kernels.

    B samples, N image tokens, L text tokens, H heads, K width of a head.
    """

    def __init__(self, backend: str) -> None:
        self.backend = AttentionBackendName(backend)

    def __call__(
        self,
        attn: Any,  # diffusers' Attention
        hidden_states: Tensor,  # (B, N, H K)
        encoder_hidden_states: Tensor | None = None,  # (B, L, H K)
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: torch.nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1))  # (B, tokens, H, K)
            return x if norm is None else norm(x)

        q, k = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        v = heads(attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            q = torch.cat([q, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=1)
            k = torch.cat([k, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=1)
            v = torch.cat([v, heads(attn.add_v_proj(text), None)], dim=1)
        out = dispatch_attention_fn(q, k, v, backend=self.backend).flatten(2)
        tokens = hidden_states.shape[1]
        # Contiguous, because a linear layer would multiply a slice sample by sample.
        image = attn.to_out[1](attn.to_out[0](out[:, :tokens].contiguous()))
        if encoder_hidden_states is None:
            return image
        text = out[:, tokens:].contiguous()
        return image, text if attn.context_pre_only else attn.to_add_out(text)
