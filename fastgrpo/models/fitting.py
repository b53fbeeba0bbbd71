"""Whether weights fit the network that is to read them, told from the heads of their files before anything is loaded.

The network is built from its config.json on the meta device, where tensors have shapes and no data. The libraries' own rules
then bring the files' names to the network's: diffusers' for its older layouts and for the checkpoints of other programs,
transformers' for all that its loader knows.

A tensor that is missing would be left without a value, or be random; one of another shape ends the loading, with gigabytes
read already; and 8-bit weights whose scales diffusers does not know would be read as other numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from fastgrpo.models.headers import Header
from fastgrpo.quiet import quiet, without_warnings

META = torch.device("meta")
# How the names of the scales end that other programs keep beside weights of 8 bits.
SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "scale_input", "input_scale", "scaled_fp8")
Misshapen = tuple[str, Sequence[int], Sequence[int]]  # name, shape, expected shape


def network_class(library: str, kind: str) -> Any:
    """The class of a network that model_index.json names. ValueError: the installed library does not have it."""
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(module, kind, None)
    if found is None:
        raise ValueError(f"is a {kind} of {library}, which the installed release does not have: `pip install -U {library}`")
    return found


def is_of_diffusers(kind: Any) -> bool:
    """Whether a network's class is of diffusers, and not of transformers."""
    return issubclass(kind, diffusers.ModelMixin)


def check_fit(kind: Any, folder: Path, held: Header, *, single_file: bool = False) -> None:
    """Refuse weights that are not all of the network's, and of its shapes: ValueError that begins with a verb.

    kind: the network's class. folder: where its config.json is. single_file: the names may be another program's.
    """
    scale = next((name for name in held if name.endswith(SCALES)), None)
    if scale is not None:
        raise ValueError(
            f"holds weights of 8 bits with their scales ({scale}), which would be read without them, as other numbers; take "
            "the weights in bfloat16, or a .gguf"
        )
    state = {name: torch.empty(one.shape, device=META) for name, one in held.items()}
    with quiet("diffusers", "transformers"), without_warnings("diffusers", "transformers"):
        if is_of_diffusers(kind):
            missing, misshapen = _in_diffusers(kind, folder, state, single_file)
        else:
            missing, misshapen = _in_transformers(kind, folder, state)
    if missing:
        raise ValueError(
            f"lacks {missing[0]}, one of {len(missing)} missing tensors of a {kind.__name__} as its config.json describes it"
        )
    if misshapen:
        name, found, expected = misshapen[0]
        raise ValueError(
            f"holds {name} as {tuple(found)}, where its config.json makes it {tuple(expected)}, and {len(misshapen) - 1} "
            "more of another shape; take the config.json and the weights of one model"
        )


def _in_diffusers(kind: Any, folder: Path, state: dict[str, Tensor], single_file: bool) -> tuple[list[str], list[Misshapen]]:
    """The names that are missing; the names, shapes and expected shapes of those that are not of the network's shape."""
    config = _made(kind.load_config, folder)
    with torch.device(META):
        network = _made(kind.from_config, config)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if single_file and own.keys() != state.keys():  # as diffusers decides it
        state = _converted(kind, config, state, own)
    network._fix_state_dict_keys_on_load(state)
    # A buffer that is not there keeps the value that the network was built with.
    missing = [name for name, _ in network.named_parameters() if name not in state]
    return missing, [
        (name, state[name].shape, own[name]) for name in own if name in state and state[name].shape != own[name]
    ]


def _in_transformers(kind: Any, folder: Path, state: dict[str, Tensor]) -> tuple[list[str], list[Misshapen]]:
    """As `_in_diffusers`, by the loader itself, which tells what it missed."""
    _, told = kind.from_pretrained(
        None, config=_made(kind.config_class.from_pretrained, folder), state_dict=state, device_map=META,
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    return sorted(told["missing_keys"]), sorted(told["mismatched_keys"])


def _made(make: Any, config: Any) -> Any:
    try:
        return make(config)
    except Exception as error:  # whatever the libraries make of a config that is none of theirs
        raise ValueError(f"has a config.json that makes no network ({type(error).__name__}: {error})") from None


def _converted(kind: Any, config: Mapping[str, Any], state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint of another program under diffusers' names, or as they are where those fit better."""
    rule: Any = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if rule is None:
        raise ValueError(f"is one file, which diffusers does not read into a {kind.__name__}; take a folder")
    more = [name for name in state if name not in own]
    if own.keys() <= state.keys():
        raise ValueError(f"holds {more[0]}, one of {len(more)} tensors that a {kind.__name__} does not have; take them out")
    try:
        found = dict(rule["checkpoint_mapping_fn"](checkpoint=dict(state), config=dict(config)))
    except Exception as error:  # it looks for the names that it knows, and says nothing better
        if len(more) > len(state) / 2:
            raise ValueError(f"holds no weights of a {kind.__name__} ({type(error).__name__}: {error})") from None
        return state
    return max(found, state, key=lambda names: len(own.keys() & names.keys()))
