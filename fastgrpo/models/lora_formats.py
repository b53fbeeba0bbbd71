"""How LoRA files name the layers of a transformer.

    diffusers   transformer.LAYER.lora_A.weight (r, in)            lora_B.weight (out, r)        y += x A^T B^T
    peft        base_model.model.LAYER.lora_A.weight               lora_B.weight
    comfyui     diffusion_model.MODULE.lora_A.weight               lora_B.weight
    kohya       lora_unet_MODULE.lora_down.weight                  lora_up.weight, and .alpha    y += alpha / r x A^T B^T

LAYER is a name in diffusers. MODULE is one in the code that the network was published with, or for kohya in the trainers
sd-scripts and musubi-tuner, with _ for its dots. There one module may be several layers, whose rows follow one another:
attn.qkv is attn.to_q, attn.to_k and attn.to_v. Then A has the rows of all their A, and B is block by block.

    layers = read_layers(weights, network)                layer -> (A, B), whichever of these names the weights have
    weights = written("kohya", layers, network)           ValueError: the format has no name for one of the layers

diffusers' own converters read some of this for some families. They leave out what they do not know, FLUX's have the
published widths written into them, and none of them writes: so one table, `fastgrpo.models.lora_names`, serves both ways.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.models.lora_names import COMFYUI, KOHYA, modules_of


class Factors(NamedTuple):
    """The update B A of one layer's weight."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)


Layers = dict[str, Factors]  # by the layer's name in the transformer of diffusers

FORMATS = ("diffusers", "peft", "comfyui", "kohya")
PREFIX = re.compile(
    r"(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_)+"
)
WEIGHT = re.compile(r"(.+?)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.default)?\.weight")
LARGEST_ALPHA = 1e9
TEXT_ENCODERS = ("lora_te", "text_encoder", "lora_prior_te")
# How a key ends that is of no plain LoRA of a linear layer -> what it is of.
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector(\..+)?": "a DoRA", r"hada_\w+": "a LoHa", r"lokr_\w+": "a LoKr", r"oft_\w+": "an OFT",
    r"lora_mid\.weight": "a LoCon", r"diff|diff_b|[wb]_norm|set_weight": "a difference of whole weights",
    r"lora_\w+\.bias": "a LoRA with biases",
}  # fmt: skip


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a transformer by name, below a LoRA too."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            found[name.removesuffix(".base_layer")] = module
    return found


def read_layers(weights: Mapping[str, Tensor], network: nn.Module, alpha: float | None = None) -> Layers:
    """The factors of each layer in float32, with alpha / r in B. alpha: of modules that say none; None: their rank.

    Raises ValueError with the key that is of no plain LoRA of this network's linear layers.
    """
    layers, kind = linear_layers(network), type(network).__name__
    known: dict[str, tuple[str, ...]] = {name: (name,) for name in layers}
    for table in (COMFYUI, KOHYA):
        known |= modules_of(table[kind], layers) if kind in table else {}
    known |= {name.replace(".", "_"): parts for name, parts in known.items()}
    read: Layers = {}
    for name, (a, b, own_alpha) in _modules(weights).items():
        module = PREFIX.sub("", name, count=1) if PREFIX.match(name) else name
        if module not in known:
            raise ValueError(f"{kind} has no linear layer {module[:200]!r}")
        widths = [layers[part].out_features for part in known[module]]
        _check_shape(name, "A", a, layers[known[module][0]].in_features)
        _check_shape(name, "B", b, sum(widths))
        if len(a) != b.shape[1]:
            raise ValueError(f"{name[:200]!r} has rank {len(a)} on one side and {b.shape[1]} on the other")
        scale = (own_alpha or alpha or len(a)) / len(a)
        for part, factors in zip(known[module], _apart(a.float(), b.float() * scale, widths), strict=True):
            if part in read:
                raise ValueError(f"{name[:200]!r} is a second update of {part}")
            if len(widths) == 1 or factors.a.any() or factors.b.any():  # such a block stands for a layer that has none
                read[part] = factors
    return read


def written(form: str, layers: Layers, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file in one of the `FORMATS`, by name. ValueError: it has no name for one of the layers."""
    if form in ("diffusers", "peft"):
        prefix = {"diffusers": "transformer.", "peft": "base_model.model."}[form]
        return _named({f"{prefix}{layer}": factors for layer, factors in layers.items()}, "lora_A", "lora_B")
    kind, table = type(network).__name__, {"comfyui": COMFYUI, "kohya": KOHYA}[form]
    if kind not in table:
        raise ValueError(f"there is no {form} format for {kind}; take diffusers, peft or merged")
    linears = linear_layers(network)
    modules = modules_of(table[kind], linears)
    nameless = sorted(layers.keys() - {part for parts in modules.values() for part in parts})
    if nameless:
        raise ValueError(f"the {form} format has no name for {kind}'s {nameless[0]}; take diffusers, peft or merged")
    whole = {module: _together(parts, layers, linears) for module, parts in modules.items() if layers.keys() & set(parts)}
    if form == "comfyui":
        return _named({f"diffusion_model.{module}": factors for module, factors in whole.items()}, "lora_A", "lora_B")
    flat = {f"lora_unet_{module.replace('.', '_')}": factors for module, factors in whole.items()}
    alphas = {f"{name}.alpha": torch.tensor(float(len(factors.a))) for name, factors in flat.items()}
    return _named(flat, "lora_down", "lora_up") | alphas


def _named(factors: Layers, a: str, b: str) -> dict[str, Tensor]:
    """The tensors of a file, the two of a layer under names that end in a and b."""
    pairs = ((name, side, one) for name, both in factors.items() for side, one in zip((a, b), both, strict=True))
    return {f"{name}.{side}.weight": tensor.contiguous() for name, side, tensor in pairs}


def _together(parts: tuple[str, ...], layers: Layers, linears: Mapping[str, nn.Linear]) -> Factors:
    """The update of a module that is several layers. A layer without one is a block of zeros, as read."""
    if len(parts) == 1:
        return layers[parts[0]]
    rank = next(len(layers[part].a) for part in parts if part in layers)

    def factors(part: str) -> Factors:
        linear = linears[part]
        return layers.get(part) or Factors(torch.zeros(rank, linear.in_features), torch.zeros(linear.out_features, rank))

    every = [factors(part) for part in parts]
    return Factors(torch.cat([one.a for one in every]), torch.block_diag(*(one.b for one in every)))


def _apart(a: Tensor, b: Tensor, widths: list[int]) -> list[Factors]:
    """The reverse of `_together`. Where the layers of a module share their A, as trained, each has all of it."""
    rows, count = b.split(widths), len(widths)
    if count > 1 and len(a) % count == 0:
        blocks = [row.chunk(count, dim=1) for row in rows]
        if not any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            return [Factors(part, blocks[i][i]) for i, part in enumerate(a.chunk(count))]
    return [Factors(a, row) for row in rows]


def _modules(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """Module as the file names it -> A, B and its alpha, None where it says none."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        _refuse_other_kinds(key)
        match = WEIGHT.fullmatch(key)
        if match is None and not key.endswith(".alpha"):
            raise ValueError(f"{key[:200]!r} is no weight of a LoRA")
        module, side = (match[1], "A" if match[2] else "B") if match else (key.removesuffix(".alpha"), "alpha")
        if side in sides.setdefault(module, {}):
            raise ValueError(f"{key[:200]!r} is there under two names")
        sides[module][side] = tensor
    for module, found in sides.items():
        if "A" not in found or "B" not in found:
            raise ValueError(f"the {' and '.join(found)} of {module[:200]!r} stands without its other half")
    return {module: (found["A"], found["B"], _alpha(module, found.get("alpha"))) for module, found in sides.items()}


def _refuse_other_kinds(key: str) -> None:
    if key.startswith(TEXT_ENCODERS):
        raise ValueError(f"{key[:200]!r} is of a text encoder, and only LoRAs of the transformer are read")
    kind = next((kind for ending, kind in OTHER_KINDS.items() if re.fullmatch(rf".+\.({ending})", key)), None)
    if kind is not None:
        raise ValueError(f"{key[:200]!r} is of {kind}, and plain LoRAs of linear layers are read here")


def _alpha(module: str, tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    alpha = float(tensor) if tensor.numel() == 1 and tensor.dtype != torch.bool else math.nan
    if not 0 < alpha < LARGEST_ALPHA:
        raise ValueError(f"the alpha of {module[:200]!r} is {tensor.dtype} {tuple(tensor.shape)}, and no number above 0")
    return alpha


def _check_shape(module: str, side: str, tensor: Tensor, width: int) -> None:
    axis = 1 if side == "A" else 0
    if tensor.dim() != 2 or tensor.shape[axis] != width or not tensor.shape[1 - axis] or not tensor.is_floating_point():
        raise ValueError(
            f"the {side} of {module[:200]!r} is {tensor.dtype} {tuple(tensor.shape)}, and the layer has {width} values on "
            "that side"
        )
