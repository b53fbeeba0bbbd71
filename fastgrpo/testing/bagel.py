"""A tiny BAGEL in the published layout, with a second implementation of its equations.

There is no stock pipeline, so `call` is written independently of the model: slow, plain, in float32, one prompt at a time,
without a cache. The whole sequence goes through both kinds of weights, and each token keeps the outcome of its own kind.

S tokens, D width, H heads, K width of a head.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.models.bagel import BagelPipeline
from fastgrpo.models.bagel_folder import MARKS, SCALE, SHIFT, published_name
from fastgrpo.models.bagel_network import BagelTransformer
from fastgrpo.testing import Family
from fastgrpo.testing.tokenizers import qwen_tokenizer

GRID = (4, 4)  # tokens of an image of 16 x 16 pixels
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
}  # fmt: skip


class PublishedFolder:
    """BAGEL's folder with random weights. As in the real one, it also holds weights that making a picture does not need."""

    def save_pretrained(self, folder: Path) -> None:
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = qwen_tokenizer(MARKS)
        sizes = SIZES | {"vocab_size": len(tokenizer)}
        network = BagelTransformer(**sizes, mark_ids=tuple(tokenizer.convert_tokens_to_ids(list(MARKS))))
        weights = {published_name(name): spread(name, tensor) for name, tensor in network.state_dict().items()}
        width = sizes["hidden_size"]
        for name in ("vit_model.vision_model.head.weight", "connector.fc1.weight", "vit_pos_embed.pos_embed"):
            weights[name] = torch.randn(3, width)
        weights["language_model.lm_head.weight"] = torch.randn(len(tokenizer), width)
        weights["language_model.model.norm.weight"] = torch.ones(width)
        save_file(weights, folder / "ema.safetensors")
        save_file(original_names(tiny_autoencoder().state_dict()), folder / "ae.safetensors")
        (folder / "llm_config.json").write_text(json.dumps(sizes), encoding="utf-8")
        tokenizer.save_pretrained(folder)


def spread(name: str, tensor: Tensor) -> Tensor:
    """A weight that shows in the result: norms that differ, and larger layers, as initial ones hardly change their input."""
    if "norm" in name:
        return 1 + 0.2 * torch.randn_like(tensor)
    return 3 * tensor if "_proj" in name else tensor


def tiny_autoencoder() -> AutoencoderKL:
    """Its latents are two times smaller on each side. Its norms have FLUX's 32 groups, which cannot be read off a tensor."""
    return AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16, layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=SCALE, shift_factor=SHIFT,
    ).eval()  # fmt: skip


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an AutoencoderKL under the names under which FLUX's autoencoder was published."""
    top = max(int(n) for n in re.findall(r"decoder\.up_blocks\.(\d+)", " ".join(state)))
    rules = (
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{top - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        pointwise = tensor.ndim == 2  # the published attention is made of 1 x 1 convolutions
        renamed[name] = (tensor[:, :, None, None] if pointwise else tensor).contiguous()
    return renamed


def velocity_ref(
    network: BagelTransformer, text: list[int], latents: Tensor, sigma: float, grid: tuple[int, int] = GRID
) -> Tensor:
    """The velocity (N, 64) at latents (N, 64) for one prompt, given as its tokens. An empty list is no prompt."""
    w = {name: tensor.float() for name, tensor in network.state_dict().items()}
    config = network.config
    image = [config.mark_ids[0], *[None] * len(latents), config.mark_ids[1]]
    made = torch.tensor([False] * len(text) + [token is None for token in image])  # (S,) bool, true for latents
    position = torch.tensor([*range(len(text)), *[len(text)] * len(image)])
    x = torch.zeros(len(made), config.hidden_size)
    x[~made] = torch.stack([w["embed_tokens.weight"][t] for t in [*text, *image] if t is not None])
    places = [r * config.max_latent_size + c for r in range(grid[0]) for c in range(grid[1])]
    x[made] = latents @ w["vae2llm.weight"].T + w["vae2llm.bias"] + _time(w, sigma) + w["latent_pos_embed.pos_embed"][places]
    rows, columns = torch.arange(len(made))[:, None], torch.arange(len(made))
    seen = (columns <= rows) | (rows >= len(text))
    for i in range(config.num_hidden_layers):
        part = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in w.items() if name.startswith(f"layers.{i}.")}
        x = _layer(part, config, x, made, position, seen)
    return _norm(x[made], w["norm_moe_gen.weight"], config.rms_norm_eps) @ w["llm2vae.weight"].T + w["llm2vae.bias"]


def _time(w: dict[str, Tensor], sigma: float) -> Tensor:
    angle = sigma * 10000.0 ** (-torch.arange(128) / 128)
    hidden = torch.cat([angle.cos(), angle.sin()]) @ w["time_embedder.mlp.0.weight"].T + w["time_embedder.mlp.0.bias"]
    return hidden * hidden.sigmoid() @ w["time_embedder.mlp.2.weight"].T + w["time_embedder.mlp.2.bias"]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _layer(w: dict[str, Tensor], config: Any, x: Tensor, made: Tensor, position: Tensor, seen: Tensor) -> Tensor:
    """x (S, D) after a layer; made (S,) bool: by generation weights; seen (S, S) bool: row sees column."""
    eps, width = config.rms_norm_eps, config.hidden_size // config.num_attention_heads

    def own(name: str, y: Tensor) -> Tensor:
        """y through the weights called `name`, each token through those of its own kind."""
        block, _, leaf = name.rpartition(".")
        kinds = [f"{block}_moe_gen.{leaf}" if block == "mlp" else f"{name}_moe_gen", name]
        outcomes = [
            _norm(y, w[f"{kind}.weight"], eps) if "norm" in name
            else y @ w[f"{kind}.weight"].T + w.get(f"{kind}.bias", torch.tensor(0.0)) for kind in kinds
        ]  # fmt: skip
        return torch.where(made.view(-1, *[1] * (y.ndim - 1)), *outcomes)

    def turned(y: Tensor) -> Tensor:
        """y (S, heads, K), taken as complex numbers, rotated by the position of each token."""
        angle = position[:, None, None] * config.rope_theta ** (-torch.arange(0, width, 2) / width)
        z = torch.complex(y[..., : width // 2], y[..., width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    y = own("input_layernorm", x)
    q, k, v = (own(f"self_attn.{n}_proj", y).view(len(x), -1, width) for n in "qkv")
    q, k = turned(own("self_attn.q_norm", q)), turned(own("self_attn.k_norm", k))
    heads = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        scores = (q[:, head] @ k[:, group].T / width**0.5).masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, group])
    x = x + own("self_attn.o_proj", torch.cat(heads, dim=-1))
    y = own("post_attention_layernorm", x)
    gate = own("mlp.gate_proj", y)
    return x + own("mlp.down_proj", gate * gate.sigmoid() * own("mlp.up_proj", y))


@torch.no_grad()
def call(pipeline: BagelPipeline, prompts: Sequence[str], latents: Tensor, num_steps: int, guidance_scale: float) -> Tensor:
    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    opening, closing = (tokenizer.convert_tokens_to_ids(f"<|im_{end}|>") for end in ("start", "end"))
    texts = [[opening, *tokenizer.encode(prompt), closing] for prompt in prompts]

    def guided(text: list[int], x: Tensor, sigma: float) -> Tensor:
        v = velocity_ref(pipeline.transformer, text, x, sigma)
        if guidance_scale == 1:
            return v
        without = velocity_ref(pipeline.transformer, [], x, sigma)
        combined = without + guidance_scale * (v - without)
        return combined * min(1.0, float(v.square().sum().sqrt() / combined.square().sum().sqrt()))

    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        v = torch.stack([guided(text, x, sigma) for text, x in zip(texts, latents, strict=True)])
        latents = scheduler.step(v, timestep, latents, return_dict=False)[0]
    squares = latents.view(len(latents), *GRID, 2, 2, -1)
    image = torch.einsum("bhwpqc->bchpwq", squares).reshape(len(latents), -1, 2 * GRID[0], 2 * GRID[1])
    return (pipeline.vae.decode(image / SCALE + SHIFT, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


FAMILY = Family(
    make=PublishedFolder, call=call, settings={"max_text_tokens": 40, "height": 16, "width": 16},
    tolerance=1e-5, fully_trained="_moe_gen",
)  # fmt: skip
