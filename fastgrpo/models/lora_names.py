"""What the modules of a network are called where it was published, and which layers of diffusers' network they are.

    modules_of(COMFYUI["FluxTransformer2DModel"], layers)["double_blocks.0.img_attn.qkv"]        its to_q, to_k and to_v

LoRA files of other programs name these modules. ComfyUI runs the networks as they were published. kohya's trainers
(sd-scripts, and musubi-tuner for all but SD3 and FLUX.1) do too, but for Z-Image.
"""

import re
from collections.abc import Mapping

Names = Mapping[str, tuple[str, ...]]  # module -> the layers that it is, in the order of their rows; # is a block's number

SAME: Names = {}  # the modules are diffusers' layers
QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _each(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def _one_by_one(module: str, layer: str, pairs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {f"{module}.{outside}": (f"{layer}.{inside}",) for outside, inside in pairs.items()}


SD3: Names = {
    "joint_blocks.#.x_block.attn.qkv": _each("transformer_blocks.#.attn", QKV),
    "joint_blocks.#.x_block.attn2.qkv": _each("transformer_blocks.#.attn2", QKV),
    "joint_blocks.#.context_block.attn.qkv": _each("transformer_blocks.#.attn", ADDED),
    **_one_by_one("joint_blocks.#.x_block", "transformer_blocks.#", {
        "attn.proj": "attn.to_out.0", "attn2.proj": "attn2.to_out.0", "adaLN_modulation.1": "norm1.linear",
        "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    }),
    **_one_by_one("joint_blocks.#.context_block", "transformer_blocks.#", {
        "attn.proj": "attn.to_add_out", "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
    }),
}  # fmt: skip
_FLUX_ATTENTION: Names = {
    "double_blocks.#.img_attn.qkv": _each("transformer_blocks.#.attn", QKV),
    "double_blocks.#.txt_attn.qkv": _each("transformer_blocks.#.attn", ADDED),
    **_one_by_one("double_blocks.#", "transformer_blocks.#", {
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    }),
    "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
}  # fmt: skip
FLUX: Names = {
    **_FLUX_ATTENTION,
    **_one_by_one("double_blocks.#", "transformer_blocks.#", {
        "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "img_mod.lin": "norm1.linear",
        "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2", "txt_mod.lin": "norm1_context.linear",
    }),
    "single_blocks.#.linear1": (*_each("single_transformer_blocks.#.attn", QKV), "single_transformer_blocks.#.proj_mlp"),
    **_one_by_one("single_blocks.#", "single_transformer_blocks.#", {
        "linear2": "proj_out", "modulation.lin": "norm.linear",
    }),
}  # fmt: skip
FLUX2: Names = {
    **_FLUX_ATTENTION,
    **_one_by_one("double_blocks.#", "transformer_blocks.#", {
        "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
    }),
    **_one_by_one("single_blocks.#", "single_transformer_blocks.#.attn", {
        "linear1": "to_qkv_mlp_proj", "linear2": "to_out",
    }),
}  # fmt: skip
WAN: Names = {
    **_one_by_one("blocks.#.self_attn", "blocks.#.attn1", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}),
    **_one_by_one("blocks.#.cross_attn", "blocks.#.attn2", {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj",
    }),
    **_one_by_one("blocks.#.ffn", "blocks.#.ffn.net", {"0": "0.proj", "2": "2"}),
}  # fmt: skip
Z_IMAGE: Names = {
    name: layers
    for block in ("layers.#", "noise_refiner.#", "context_refiner.#")
    for name, layers in {
        f"{block}.attention.qkv": _each(f"{block}.attention", QKV),
        f"{block}.attention.out": (f"{block}.attention.to_out.0",),
        **_one_by_one(block, block, {f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)}),
        f"{block}.adaLN_modulation.0": (f"{block}.adaLN_modulation.0",),
    }.items()
}
# The class of a transformer -> its modules. One that is missing has no such format.
COMFYUI: dict[str, Names] = {
    "SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX, "Flux2Transformer2DModel": FLUX2,
    "QwenImageTransformer2DModel": SAME, "WanTransformer3DModel": WAN, "ZImageTransformer2DModel": Z_IMAGE,
}  # fmt: skip
KOHYA: dict[str, Names] = {**COMFYUI, "ZImageTransformer2DModel": SAME}


def modules_of(names: Names, layers: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Module -> layers, with the numbers of the blocks that a transformer of these layers has."""
    if names is SAME:
        return {layer: (layer,) for layer in layers}
    found = {}
    for module, parts in names.items():
        pattern = re.compile(re.escape(parts[0]).replace(r"\#", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, layers)):
            number = match[1] if match.groups() else ""
            found[module.replace("#", number)] = tuple(part.replace("#", number) for part in parts)
    return found
