"""BAGEL's network as far as it makes images (arXiv 2505.14683): Qwen2 as a mixture of two transformers.

Each layer holds its weights twice: the understanding weights, for text and for the two marks around an image, and the
generation weights (`_moe_gen`), for latents. All tokens meet in one attention.

    prompt  <|im_start|> text <|im_end|>               causal; `read` returns its keys and values, once for all steps
    step    <|vision_start|> latents <|vision_end|>    sees the prompt and itself in both directions, at one rope position

    x = vae2llm(latents) + time(sigma) + position,   v = llm2vae(norm(layers(x)))

Tokens at one rope position that all see each other have no order. Here the marks come before the latents, so that each kind
of weights gets one slice. Parameters are named as published, without the prefix `language_model.model.`.

Letters: B samples, L prompt tokens, N latents, S tokens, D width, H heads, G heads of keys and values, K width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn

GEN = "_moe_gen"
EXPERTS = ("", GEN)
PATCH = 2  # a token is a square of 2 x 2 latents
FREQUENCIES = 256  # numbers that represent a noise level

Rotation = tuple[Tensor, Tensor]  # cos and sin, (B, 1, S, K); S is 1 where all tokens are at one position


def rotation(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Rotary embedding (arXiv 2104.09864) of positions (B, S), rounded to the network's dtype as in the published model."""
    frequency = theta ** (-torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width)
    angle = (position[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x (B, heads, S, K) rotated. The first half of K holds the real parts, the second half the imaginary parts."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * by[0] + torch.cat([-imaginary, real], dim=-1) * by[1]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, S, H, K) of q (B, H, S, K) to k and v (B, G, any, K); causal if there is no mask."""
    # Keys are repeated, because under a mask torch's fast kernels want as many heads of keys as of queries.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


class BagelAttention(nn.Module):
    """The projections of both kinds of weights. Keys and queries are normed head by head (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.head_width = width // heads
        kv_width = kv_heads * self.head_width
        for expert in EXPERTS:
            self.add_module(f"q_proj{expert}", nn.Linear(width, width))
            self.add_module(f"k_proj{expert}", nn.Linear(width, kv_width))
            self.add_module(f"v_proj{expert}", nn.Linear(width, kv_width))
            self.add_module(f"o_proj{expert}", nn.Linear(width, width, bias=False))
            self.add_module(f"q_norm{expert}", nn.RMSNorm(self.head_width, eps))
            self.add_module(f"k_norm{expert}", nn.RMSNorm(self.head_width, eps))

    def project(self, x: Tensor, expert: str, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, S, K), k and v (B, G, S, K) of tokens x (B, S, D), by one kind of weights."""
        part = self.get_submodule
        q, k, v = (part(f"{n}_proj{expert}")(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for n in "qkv")
        return rotate(part(f"q_norm{expert}")(q), by), rotate(part(f"k_norm{expert}")(k), by), v


class BagelMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BagelLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = BagelAttention(width, heads, kv_heads, eps)
        for expert in EXPERTS:
            self.add_module(f"mlp{expert}", BagelMLP(width, inner))
            self.add_module(f"input_layernorm{expert}", nn.RMSNorm(width, eps))
            self.add_module(f"post_attention_layernorm{expert}", nn.RMSNorm(width, eps))

    def forward(
        self,
        marks: Tensor,  # (B, 2, D)
        latents: Tensor,  # (B, N, D)
        keys: Tensor,  # (B, G, L, K) of the prompt
        values: Tensor,  # (B, G, L, K)
        mask: Tensor,  # (B, 1, 1, L + 2 + N) bool, false for the padding of prompts
        by: Rotation,
    ) -> tuple[Tensor, Tensor]:
        of_marks, of_latents = self._project(marks, "", by), self._project(latents, GEN, by)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_marks, of_latents, strict=True))
        seen = attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), mask)
        return self._finish(marks, seen[:, :2], ""), self._finish(latents, seen[:, 2:], GEN)

    def read(self, text: Tensor, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """The text for the next layer (B, L, D), and this layer's keys and values of it (B, G, L, K)."""
        q, k, v = self._project(text, "", by)
        return self._finish(text, attend(q, k, v, None), ""), k, v

    def _project(self, x: Tensor, expert: str, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.get_submodule(f"input_layernorm{expert}")(x), expert, by)

    def _finish(self, x: Tensor, seen: Tensor, expert: str) -> Tensor:
        # Contiguous, because a linear layer would multiply a slice of the sequence sample by sample.
        x = x + self.self_attn.get_submodule(f"o_proj{expert}")(seen.flatten(2).contiguous())
        return x + self.get_submodule(f"mlp{expert}")(self.get_submodule(f"post_attention_layernorm{expert}")(x))


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedding (B, D) of sigma (B,), which runs from 0 to 1 and not from 0 to 1000."""
        waves = get_timestep_embedding(sigma, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(dtype))


class PositionTable(nn.Module):
    """Sines and cosines of row and column, published with the weights and never trained."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        table = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        self.pos_embed = nn.Parameter(table.to(torch.get_default_dtype()), requires_grad=False)  # (side^2, D)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The embedding (N, D) of the positions in a grid of rows and columns, row by row."""
        return self.pos_embed.unflatten(0, (self.side, self.side))[: grid[0], : grid[1]].flatten(0, 1)


class BagelTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The generation path of BAGEL. diffusers expects `_repeated_blocks` and the mixins of a transformer."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["BagelLayer"]
    config: Any  # the arguments of __init__ as attributes
    layers: Any  # nn.ModuleList of BagelLayer

    @register_to_config
    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        vocab_size: int,
        rope_theta: float,
        rms_norm_eps: float,
        mark_ids: tuple[int, int],  # of <|vision_start|> and <|vision_end|>
        latent_channels: int = 16,
        max_latent_size: int = 64,  # tokens a side
    ) -> None:
        super().__init__()
        layer = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps)
        patch_width = PATCH**2 * latent_channels
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(BagelLayer(*layer) for _ in range(num_hidden_layers))
        self.norm_moe_gen = nn.RMSNorm(hidden_size, rms_norm_eps)
        self.time_embedder = TimeEmbedding(hidden_size)
        self.latent_pos_embed = PositionTable(max_latent_size, hidden_size)
        self.vae2llm = nn.Linear(patch_width, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, patch_width)
        self.gradient_checkpointing = False

    @property
    def head_width(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def understanding(self) -> nn.ModuleList:
        """The modules that read a prompt: BAGEL's text encoder. They are the transformer's own, not copies."""
        kinds = (nn.Embedding, nn.Linear, nn.RMSNorm)
        return nn.ModuleList(
            module for name, module in self.named_modules()
            if name.startswith(("embed_tokens", "layers.")) and GEN not in name and isinstance(module, kinds)
        )  # fmt: skip

    def read(self, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, layers, G, L, K) of prompts ids (B, L), zero beyond their lengths (B,)."""
        position = torch.arange(ids.shape[1], device=ids.device)
        text, pairs = self.embed_tokens(ids), []
        by = rotation(position[None], self.head_width, self.config.rope_theta, text.dtype)
        for layer in self.layers:
            text, k, v = layer.read(text, by)
            pairs.append((k, v))
        known = (position < length[:, None])[:, None, None, :, None]
        # Not times 0, which would leave negative zeros, and those are no padding.
        keys, values = (torch.where(known, torch.stack(side, dim=1), 0) for side in zip(*pairs, strict=True))
        return keys, values

    def forward(
        self,
        latents: Tensor,  # (B, N, 4 C), C channels
        sigma: Tensor,  # (B,)
        keys: Tensor,  # (B, layers, G, L, K)
        values: Tensor,  # (B, layers, G, L, K)
        length: Tensor,  # (B,) int64, tokens of the prompt
        grid: tuple[int, int],  # rows and columns of the N tokens
    ) -> Tensor:
        """The velocity (B, N, 4 C), noise - data."""
        time = self.time_embedder(sigma, latents.dtype)[:, None]
        latents = self.vae2llm(latents) + time + self.latent_pos_embed(grid)
        marks = torch.stack([self.embed_tokens.weight[i] for i in self.config.mark_ids]).expand(len(latents), -1, -1)
        of_prompt = torch.arange(keys.shape[3], device=keys.device) < length[:, None]
        mask = F.pad(of_prompt, (0, marks.shape[1] + latents.shape[1]), value=True)[:, None, None]
        by = rotation(length[:, None], self.head_width, self.config.rope_theta, latents.dtype)
        for i, layer in enumerate(self.layers):
            inputs = (marks, latents, keys[:, i], values[:, i], mask, by)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                marks, latents = self._gradient_checkpointing_func(layer, *inputs)
            else:
                marks, latents = layer(*inputs)
        return self.llm2vae(self.norm_moe_gen(latents))
