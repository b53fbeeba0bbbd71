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

from fastgrpo.models.loading import TRANSFORMER, LoadedPipeline, check_numbers
from fastgrpo.models.lora import lora_config, put_lora, running
from fastgrpo.models.lora_file import Lora, read_lora, write_lora
from fastgrpo.models.lora_formats import Factors
from fastgrpo.models.quantized import hide
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
        return hasattr(self.transformer, "peft_config")

    def add_lora(self, *, rank: int, alpha: int, targets: tuple[str, ...] | None = None) -> None:
        """Put a trainable low-rank update beside each target layer. Until it is trained it has no effect."""
        chosen = list(targets or self.lora_targets)
        layers = [f".{name}" for name, _ in self.transformer.named_modules()]
        for target in chosen:  # PEFT complains only if none of them is there
            if not any(layer.endswith(f".{target}") for layer in layers):
                name = type(self.transformer).__name__
                raise ValueError(f"model.lora.targets: {name} has no layer {target!r}; leave it out")
        self.transformer.add_adapter(lora_config(rank=rank, alpha=alpha, targets=chosen))
        if self.quantized:  # whose layers have no dtype that PEFT could take for the LoRA
            hide(self.transformer)
            for parameter in self.transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(self.dtype)

    def train_all(self, *, keep_reference: bool) -> None:
        """Make every weight of the transformer trainable. keep_reference: keep a frozen copy for `reference` too."""
        self.refuse_quantized("model.train = 'full'", "take lora, or the plain weights")
        if keep_reference:
            self.untrained = copy.deepcopy(self.transformer)
        self.transformer.requires_grad_(True)

    def continue_lora(self, path: Path, *, rank: int, alpha: int, reference: str) -> None:
        """Train the LoRA at a path further. At first it is as strong as in its file: its B is divided by alpha / r.

        reference: `reference` is then the model without any LoRA (base), or with this one as it is now (start).
        ValueError: the file is no LoRA of this model, or its rank is another than `rank`.
        """
        lora = read_lora(path, self.transformer)
        if rank != lora.rank:
            raise ValueError(f"model.lora.rank = {rank}: the LoRA at {path} has rank {lora.rank}; set the key to that")
        self.check_trainable(lora.layers)
        put_lora(self.transformer, lora.layers, rank=lora.rank, alpha=alpha)
        if reference == START:
            put_lora(self.transformer, lora.layers, rank=lora.rank, alpha=alpha, name=START)
            self.transformer.set_adapter("default")
        self._reference_is_start = reference == START

    def check_trainable(self, layers: Iterable[str]) -> None:
        """Refuse layers of which a LoRA cannot be trained: ValueError. A family that has some overrides it."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `velocity` is that of the model before training: its LoRA is off, or its frozen copy runs."""
        if self._reference_is_start:
            with running(self.transformer, START):
                yield
            return
        if self.has_lora:
            self.transformer.disable_adapters()
        elif self.untrained is None:
            raise RuntimeError("no copy of the untrained transformer was kept: see train_all")
        self._in_reference = True
        try:
            yield
        finally:
            self._in_reference = False
            if self.has_lora:
                self.transformer.enable_adapters()

    def save_trained(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write the trained weights in the diffusers format. trained: parameter name in `transformer` -> float32 value.

        A LoRA has the same strength in every reader, with alpha = rank. `pipeline.load_lora_weights(folder)` reads it in any
        script; its class's `from_pretrained(folder, subfolder="transformer")` a whole transformer, in the model's dtype.
        """
        if self.has_lora:
            self._save_lora(folder, trained)
            return
        state = self.transformer.state_dict()
        state |= {name: tensor.to(self.dtype) for name, tensor in trained.items()}
        # save_pretrained would write the weights that the transformer holds now, whatever it is handed.
        self.transformer.save_config(folder / TRANSFORMER)
        save_torch_state_dict(state, folder / TRANSFORMER, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")

    def _save_lora(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        # Readers that know no alpha apply B A as it is, so alpha / rank goes into B.
        config, end = self.transformer.peft_config["default"], ".default.weight"
        scale = config.lora_alpha / config.r
        layers = {
            layer: Factors(trained[f"{layer}.lora_A{end}"], trained[f"{layer}.lora_B{end}"] * scale)
            for layer in (name.removesuffix(f".lora_A{end}") for name in trained if name.endswith(f".lora_A{end}"))
        }
        write_lora(folder, "diffusers", Lora(config.r, layers), self.transformer)

    def load_trained(self, folder: Path) -> None:
        """Read the weights that `save_trained` wrote. ValueError names the file that is not of this transformer."""
        if not (folder / TRANSFORMER).is_dir():
            lora = read_lora(folder, self.transformer)
            put_lora(self.transformer, lora.layers, rank=lora.rank, alpha=lora.rank)
            return
        state: dict[str, Tensor] = {}
        for file in sorted((folder / TRANSFORMER).glob("*.safetensors")):
            state |= read_tensors(file, self.device)[0]
        check_state(folder / TRANSFORMER, state, self.transformer)
        self.transformer.load_state_dict(state)
        check_numbers(f"{folder}: the trained transformer", self.transformer)


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
