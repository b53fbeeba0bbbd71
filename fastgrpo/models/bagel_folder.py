"""BAGEL's folder as it is published, which is not in the diffusers format, and how it is read:

ema.safetensors    the network; only the generation path is read of it, and not the vision tower or the text head
ae.safetensors     FLUX's autoencoder under its original names
llm_config.json    sizes of the language model
tokenizer files    Qwen2's tokenizer
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Tokenizer

from fastgrpo.files import json_value
from fastgrpo.models.bagel_network import BagelTransformer
from fastgrpo.models.folder import check_file, readable
from fastgrpo.models.loading import build

NETWORK, AUTOENCODER, SIZES = "ema.safetensors", "ae.safetensors", "llm_config.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either of them
MARKS = ("<|vision_start|>", "<|vision_end|>")
SIZE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rope_theta", "rms_norm_eps",
)  # fmt: skip
TEXT = "language_model.model."  # the prefix of the language model's published names
BESIDE_TEXT = ("time_embedder.", "latent_pos_embed.", "vae2llm.", "llm2vae.")
# Tensors that are not read: they serve to understand images and to write text, and a picture needs neither.
NOT_READ = ("vit_model.", "connector.", "vit_pos_embed.", "language_model.lm_head.", TEXT + "norm.")
SCALE, SHIFT = 0.3611, 0.1159  # the autoencoder's scaling_factor and shift_factor
GROUPS = 32  # groups of its norms


def check_bagel_folder(path: Path) -> None:
    """Refuse a folder in which a file is missing or not whole, before anything is loaded: ValueError."""
    shards = path / f"{NETWORK}.index.json"
    if shards.is_file() and not (path / NETWORK).is_file():
        raise ValueError(
            f"model.path = {path}: {NETWORK} is in shards ({shards.name}); save it as the one file of that name"
        )
    lists = min(TOKENIZERS, key=lambda names: len(_absent(path, names)))
    absent = _absent(path, (SIZES, NETWORK, AUTOENCODER, *lists))
    if absent:
        raise ValueError(
            f"model.path = {path}: {', '.join(absent)} missing or empty; BAGEL is read from the folder that is published as "
            "ByteDance-Seed/BAGEL-7B-MoT: was the download cut?"
        )
    with readable(where := f"model.path = {path}"):
        # The tokenizer reads more files of JSON than it needs.
        read = {path / name for name in (SIZES, NETWORK, AUTOENCODER, *lists)} | set(path.glob("*.json"))
        for file in sorted(read):
            check_file(file, path, where)


def _absent(path: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not (path / name).is_file() or not (path / name).stat().st_size]


def published_name(name: str) -> str:
    """The key under which ema.safetensors holds the parameter `name` of `BagelTransformer`."""
    return name if name.startswith(BESIDE_TEXT) else TEXT + name


def read_tokenizer(path: Path) -> Qwen2Tokenizer:
    """The tokenizer in the folder; ValueError if it lacks one of BAGEL's marks."""
    tokenizer = Qwen2Tokenizer.from_pretrained(path, local_files_only=True)
    known = tokenizer.get_vocab()
    for mark in ("<|im_start|>", "<|im_end|>", *MARKS):
        if mark not in known:
            raise ValueError(f"model.path = {path}: its tokenizer has no token {mark}, so it is not BAGEL's")
    return tokenizer


def empty_network(path: Path, tokenizer: Qwen2Tokenizer) -> BagelTransformer:
    """The network of the folder's sizes on the meta device."""
    sizes = json_value((path / SIZES).read_bytes())
    sizes = {**(sizes.get("rope_parameters") or {}), **sizes}  # where transformers 5 puts rope_theta
    absent = [key for key in SIZE_KEYS if key not in sizes]
    if absent:
        raise ValueError(f"model.path = {path}: {SIZES} lacks {', '.join(absent)}")
    ids = tokenizer.get_vocab()
    with torch.device("meta"):
        return BagelTransformer(**{key: sizes[key] for key in SIZE_KEYS}, mark_ids=tuple(ids[mark] for mark in MARKS))


def read_network(path: Path, tokenizer: Qwen2Tokenizer, dtype: torch.dtype, device: torch.device) -> BagelTransformer:
    """The generation path of ema.safetensors; each tensor is read straight to its device."""
    network = empty_network(path, tokenizer)
    names = {published_name(name): name for name in network.state_dict()}
    with safe_open(path / NETWORK, "pt", device=str(device)) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        _check_shapes(path, found, {key: tuple(network.get_parameter(name).shape) for key, name in names.items()})
        network.load_state_dict({name: file.get_tensor(key).to(dtype) for key, name in names.items()}, assign=True)
    return network.eval()


def _check_shapes(path: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    where = f"model.path = {path}: {NETWORK}"
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]}, one of {len(missing)} tensors of the generation path")
    unknown = [key for key in found if key not in expected and not key.startswith(NOT_READ)]
    if unknown:
        raise ValueError(f"{where} holds {unknown[0]}, one of {len(unknown)} tensors that BAGEL as {SIZES} has it does not")
    for key, shape in expected.items():
        if found[key] != shape:
            raise ValueError(f"{where}: {key} is {found[key]}, where {SIZES} makes it {shape}")


def read_autoencoder(path: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """FLUX's autoencoder in the folder; ValueError if ae.safetensors holds another."""
    state = load_file(path / AUTOENCODER, device=str(device))
    try:
        config = autoencoder_config(state)
        autoencoder = build(AutoencoderKL, config, dtype, device)
        autoencoder.load_state_dict(convert_ldm_vae_checkpoint(state, config))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"model.path = {path}: {AUTOENCODER} is not FLUX's autoencoder: {error}") from None
    return autoencoder


def autoencoder_config(state: dict[str, Tensor]) -> dict[str, object]:
    """The config of FLUX's autoencoder, with sizes taken from its tensors."""
    firsts = sorted(key for key in state if key.startswith("encoder.down.") and key.endswith(".block.0.conv1.weight"))
    blocks = [key for key in state if key.startswith("encoder.down.0.block.") and key.endswith(".conv1.weight")]
    return {
        "block_out_channels": tuple(state[key].shape[0] for key in firsts), "layers_per_block": len(blocks),
        "down_block_types": ("DownEncoderBlock2D",) * len(firsts), "up_block_types": ("UpDecoderBlock2D",) * len(firsts),
        "latent_channels": state["decoder.conv_in.weight"].shape[1], "norm_num_groups": GROUPS,
        "scaling_factor": SCALE, "shift_factor": SHIFT, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip
