"""The common part of rewards by a published network: a complete folder, weights that all fit, images in small batches.

Nothing is downloaded. `path` is a folder on disk; where a file is missing, the error says which repository holds it.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastgrpo.config.bounds import AtLeast
from fastgrpo.quiet import quiet

BatchSize = Annotated[int, AtLeast(1)]
TOKENIZER = "tokenizer.json or merges.txt"  # of CLIP: the whole tokenizer, or its merges beside vocab.json


class NetworkReward:
    """Scores in float32, `batch_size` images at a time; a subclass fills in `build` and `score`."""

    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    name: ClassVar[str]
    needs: ClassVar[dict[str, str]]  # file, or "one or other", of the folder -> the Hugging Face repository that has it

    def __init__(
        self,
        device: torch.device,
        *,
        path: str = "",  # the folder with the files of `needs`
        batch_size: BatchSize = 32,  # images that go through the network at once
    ) -> None:
        self.device, self.batch_size = device, batch_size
        self.build(checked_folder(self.name, path, self.needs))

    def build(self, folder: Path) -> None:
        raise NotImplementedError

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (b, 3, H, W) uint8 -> (b,), on any device."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B,) float32 on the CPU."""
        starts = range(0, len(images), self.batch_size)
        parts = [self.score(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        return torch.cat(parts).float().cpu()


def checked_folder(reward: str, path: str, needs: dict[str, str]) -> Path:
    """The folder, or an error that names the key, its value and the repository of what it lacks."""
    key, folder = f"reward.settings.{reward}.path", Path(path)
    if not path:
        wanted = "; ".join(f"{file} of {repository}" for file, repository in needs.items())
        raise ValueError(f"{key} is not set: it is the folder with {wanted}")
    if not folder.is_dir():
        repositories = " and ".join(dict.fromkeys(needs.values()))
        raise ValueError(f"{key} = {path}: no such folder; get {repositories} from Hugging Face")
    for file, repository in needs.items():
        if not any((folder / name).is_file() for name in file.split(" or ")):
            raise ValueError(f"{key} = {path}: {file} is missing; get it from {repository} on Hugging Face")
    return folder


def load_network(kind: type[PreTrainedModel], device: torch.device, source: Path, **how: Any) -> Any:
    """A network of transformers for inference: from the folder `source`, or from `config` and `state_dict`, read from there.

    transformers fills a missing weight with random numbers and only warns; here that is an error.
    """
    with quiet("transformers"):
        loaded: Any = kind.from_pretrained(
            None if "state_dict" in how else source, dtype=torch.float32, local_files_only=True,
            output_loading_info=True, **how,
        )  # fmt: skip
    network, report = loaded
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise ValueError(f"{source}: no {kind.__name__}: {lacking[0]} is missing, and {len(lacking) - 1} more weights")
    return network.to(device).eval().requires_grad_(False)


def rename_weights(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The weights by new names: each rule in turn replaces a pattern; a name that no rule meets stays."""
    names = {}
    for name, tensor in weights.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        names[new] = tensor
    return names


def mlp_head(width: int) -> torch.nn.ModuleDict:
    """The head of both LAION's aesthetic predictor and ImageReward: five linear maps, and no activation between them.

    Published as `layers.0`, `layers.2`, `layers.4`, `layers.6`, `layers.7`; between them are dropouts, idle here.
    """
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = torch.nn.Sequential(
        linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2),
        linear(128, 64), dropout(0.1), linear(64, 16), linear(16, 1),
    )  # fmt: skip
    head = torch.nn.ModuleDict({"layers": layers})
    head.eval().requires_grad_(False)
    return head
