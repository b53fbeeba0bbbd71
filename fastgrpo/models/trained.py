"""The trained weights of a model: a LoRA beside its layers or every weight, the model before training, saving and reading.

model.add_lora(rank=32, alpha=64)            or model.train_all(keep_reference=True)
with model.reference(): ...                  the model before training
model.save_trained(folder, weights)          in the diffusers format
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from fastgrpo.models.loading import LoadedPipeline, check_numbers
from fastgrpo.models.lora import lora_config
from fastgrpo.models.lora_file import read_lora
from fastgrpo.policy import EXPERTS
from fastgrpo.tensor_files import read_tensors

# The file of a LoRA by the network that it is of. The first has diffusers' own name; of the second,
# `pipeline.load_lora_weights(folder, weight_name=..., load_into_transformer_2=True)` reads the one that is named here.
LORAS = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}


class Trainable(LoadedPipeline):
    """A pipeline whose transformer can be trained. `network` is the transformer that a velocity comes from."""

    untrained: Any = None  # full fine-tuning: the transformer before it, frozen
    _in_reference = False

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the layers that a LoRA goes beside, unless a configuration names others; a family defines them."""
        raise NotImplementedError

    @property
    def network(self) -> Any:
        """The transformer that `velocity` runs: the trained one, or inside `reference` the one before training."""
        return self.untrained if self._in_reference and self.untrained is not None else self.transformer

    @property
    def has_lora(self) -> bool:
        """Whether `add_lora` was called or a LoRA was read."""
        return bool(self._adapted)

    @property
    def _adapted(self) -> list[Any]:
        """The networks with a LoRA."""
        return [network for network in self.transformers.values() if hasattr(network, "peft_config")]

    @property
    def trained(self) -> dict[str, Any]:
        """Those of `transformers` that are trained: of two, the ones that model.experts names."""
        chosen = self.settings.experts
        networks = zip(EXPERTS, self.transformers.items(), strict=False)
        return dict(item for name, item in networks if chosen in ("both", name))

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        """Put a trainable low-rank update beside each target layer. Until it is trained it has no effect."""
        chosen = list(targets or self.lora_targets)
        for network in self.trained.values():
            layers = [f".{name}" for name, _ in network.named_modules()]
            for target in chosen:  # PEFT complains only if none of them is there
                if not any(layer.endswith(f".{target}") for layer in layers):
                    name = type(network).__name__
                    raise ValueError(f"model.lora.targets: {name} has no layer {target!r}; leave it out")
            network.add_adapter(lora_config(rank=rank, alpha=alpha, targets=chosen))

    def train_all(self, *, keep_reference: bool) -> None:
        """Make every weight of the transformer trainable. keep_reference: keep a frozen copy for `reference` too."""
        trained = self.trained
        if keep_reference:  # which shares a network that is not trained
            shared = {id(network): network for name, network in self.transformers.items() if name not in trained}
            self.untrained = copy.deepcopy(self.transformer, shared)
        for network in trained.values():
            network.requires_grad_(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `velocity` is that of the model before training: its LoRA is off, or its frozen copy runs."""
        adapted = self._adapted
        if not adapted and self.untrained is None:
            raise RuntimeError("no copy of the untrained transformer was kept: see train_all")
        for network in adapted:
            network.disable_adapters()
        self._in_reference = True
        try:
            yield
        finally:
            self._in_reference = False
            for network in adapted:
                network.enable_adapters()

    def save_trained(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write the trained weights in the diffusers format. trained: parameter name in `transformer` -> float32 value.

        A LoRA has the same strength in every reader, with alpha = rank. `pipeline.load_lora_weights(folder)` reads it in any
        script; its class's `from_pretrained(folder, subfolder="transformer")` a whole transformer, in the model's dtype.
        Of two experts each has a file (`LORAS`) or a folder of its own.
        """
        for name, network in self.trained.items():
            prefix = "" if network is self.transformer else f"{name}."
            own = {n.removeprefix(prefix): value for n, value in trained.items() if n.startswith(prefix)}
            if self.has_lora:
                self._save_lora(folder / LORAS[name], network, own)
            else:
                self._save_full(folder / name, network, own)

    def _save_full(self, folder: Path, network: Any, trained: Mapping[str, Tensor]) -> None:
        state = network.state_dict() | {name: tensor.to(self.dtype) for name, tensor in trained.items()}
        # save_pretrained would write the weights that the transformer holds now, whatever it is handed.
        network.save_config(folder)
        save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")

    def _save_lora(self, file: Path, network: Any, trained: Mapping[str, Tensor]) -> None:
        # Readers that know no metadata take alpha = rank, and apply B A as it is. So alpha / rank goes into B, and the
        # metadata says alpha = rank too. Its sets become sorted lists: their order differs from process to process.
        config = network.peft_config["default"]
        folded = {n: value * (config.lora_alpha / config.r) if "lora_B" in n else value for n, value in trained.items()}
        metadata = config.to_dict() | {"lora_alpha": config.r}
        metadata |= {key: sorted(value) for key, value in metadata.items() if isinstance(value, set)}
        type(self.pipeline).save_lora_weights(
            file.parent,
            transformer_lora_layers=get_peft_model_state_dict(network, state_dict=folded),
            transformer_lora_adapter_metadata=metadata,
            weight_name=file.name,
        )
        sort_metadata(file)

    def load_trained(self, folder: Path) -> None:
        """Read the weights that `save_trained` wrote. ValueError names the file that is not of this transformer."""
        for name, network in self.trained.items():
            if (folder / name).is_dir():
                state: dict[str, Tensor] = {}
                for file in sorted((folder / name).glob("*.safetensors")):
                    state |= read_tensors(file, self.device)[0]
                check_state(folder / name, state, network)
                network.load_state_dict(state)
            else:
                weights, settings = read_lora(folder / LORAS[name], network)
                network.load_lora_adapter(weights, prefix="transformer", metadata=settings)
            check_numbers(f"{folder}: the trained {name}", network)


def check_state(folder: Path, state: Mapping[str, Tensor], network: nn.Module) -> None:
    """Refuse weights that are not all of the network's and nothing else: ValueError."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    read = {name: tuple(tensor.shape) for name, tensor in state.items()}
    other = [name for name in {**own, **read} if own.get(name) != read.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"{folder}: {name} is {read.get(name, 'missing')} there and {own.get(name, 'missing')} in "
            f"{type(network).__name__}, and {len(other) - 1} more; take the folder that a run of this model wrote"
        )


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which are ordered by chance: so that equal weights are equal files."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # what follows stays aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
