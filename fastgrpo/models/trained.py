"""The trained weights of a model: a LoRA beside its layers or every weight, the model before training, saving and reading.

model.add_lora(rank=32, alpha=64)            or model.continue_lora(path, ...), or model.train_all(keep_reference=True)
with model.reference(): ...                  the model that the KL holds to, as a rule the one before training
model.save_trained(folder, weights)          in the diffusers format
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from fastgrpo.models.loading import LoadedPipeline, check_numbers
from fastgrpo.models.lora import lora_config, put_lora, running
from fastgrpo.models.lora_file import NOISE, Lora, find_expert_lora, read_lora, write_lora
from fastgrpo.models.lora_formats import Factors
from fastgrpo.models.quantized import hide
from fastgrpo.policy import EXPERTS
from fastgrpo.reporting.run_folder import LORAS
from fastgrpo.tensor_files import read_tensors

START = "start"  # the name of a second, frozen LoRA: the one that training went on from


class Trainable(LoadedPipeline):
    """A pipeline whose transformer can be trained. `network` is the transformer that a velocity comes from."""

    untrained: Any = None  # full fine-tuning: the transformer before it, frozen
    _in_reference = False
    _reference_is_start = False

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
        self._hide_quantized()

    def _hide_quantized(self) -> None:
        """Quantised layers have no dtype that PEFT could take for the LoRA, and no weights that an engine could hold."""
        if not self.quantized:
            return
        hide(self.transformer)
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)

    def train_all(self, *, keep_reference: bool) -> None:
        """Make every weight of the transformer trainable. keep_reference: keep a frozen copy for `reference` too."""
        self.refuse_quantized("model.train = 'full'", "take lora, or the plain weights")
        trained = self.trained
        if keep_reference:  # which shares a network that is not trained
            shared = {id(network): network for name, network in self.transformers.items() if name not in trained}
            self.untrained = copy.deepcopy(self.transformer, shared)
        for network in trained.values():
            network.requires_grad_(True)

    def continue_lora(self, path: Path, *, rank: int, alpha: int, reference: str) -> None:
        """Train the LoRA at a path further. At first it is as strong as in its file: its B is divided by alpha / r.

        reference: `reference` is then the model without any LoRA (base), or with this one as it is now (start).
        ValueError: the file is no LoRA of this model, or its rank is another than `rank`.
        """
        for name in self.transformers.keys() - self.trained.keys():
            if (file := find_expert_lora(path, name)) is not None:
                raise ValueError(
                    f"model.experts = {self.settings.experts}: {file} is of the other expert, which would run without it; "
                    "take both, or let model.lora.path name the one file"
                )
        for name, network in self.trained.items():
            lora = read_lora(self._lora_at(path, name), network)
            if rank != lora.rank:
                raise ValueError(f"model.lora.rank = {rank}: the LoRA at {path} has rank {lora.rank}; set the key to that")
            self.check_trainable(lora.layers)
            put_lora(network, lora.layers, rank=lora.rank, alpha=alpha)
            if reference == START:
                put_lora(network, lora.layers, rank=lora.rank, alpha=alpha, name=START)
                network.set_adapter("default")
        self._hide_quantized()
        self._reference_is_start = reference == START

    def _lora_at(self, path: Path, name: str) -> Path:
        """Where a network's LoRA is read from: of two experts its own in a folder; that of the only trained one is any."""
        own = find_expert_lora(path, name) if len(self.transformers) > 1 else None
        if own is None and len(self.trained) > 1:
            raise ValueError(
                f"{path}: holds no LoRA of the expert {name}; name a folder with those of both, called "
                f"{' and '.join(LORAS.values())} or with {' and '.join(NOISE.values())} in their names, or train one expert "
                "(model.experts)"
            )
        return own or path

    def check_trainable(self, layers: Iterable[str]) -> None:
        """Refuse layers of which a LoRA cannot be trained: ValueError. A family that has some overrides it."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `velocity` is that of the model before training: its LoRA is off, or its frozen copy runs."""
        if self._reference_is_start:
            with running(self.transformer, START):
                yield
            return
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
        # Readers that know no alpha apply B A as it is, so alpha / rank goes into B.
        config, end = network.peft_config["default"], ".default.weight"
        scale = config.lora_alpha / config.r
        layers = {
            layer: Factors(trained[f"{layer}.lora_A{end}"], trained[f"{layer}.lora_B{end}"] * scale)
            for layer in (name.removesuffix(f".lora_A{end}") for name in trained if name.endswith(f".lora_A{end}"))
        }
        write_lora(file.parent, "diffusers", Lora(config.r, layers), network, weight_name=file.name)

    def load_trained(self, folder: Path) -> None:
        """Read the weights that `save_trained` wrote. ValueError names the file that is not of this transformer."""
        for name, network in self.trained.items():
            if (folder / name / "config.json").is_file():
                state: dict[str, Tensor] = {}
                for file in sorted((folder / name).glob("*.safetensors")):
                    state |= read_tensors(file, self.device)[0]
                check_state(folder / name, state, network)
                network.load_state_dict(state)
                check_numbers(f"{folder}: the trained {name}", network)
            else:
                lora = read_lora(self._lora_at(folder, name), network)
                put_lora(network, lora.layers, rank=lora.rank, alpha=lora.rank)
        self._hide_quantized()


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
