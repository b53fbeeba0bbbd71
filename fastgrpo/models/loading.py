"""How a model's pipeline comes to be: read from a folder in the diffusers format, or built with random weights.

Random weights serve to measure speed and to plan: they follow one of the published architectures in architectures/.
"""

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch

from fastgrpo.config.sizes import Size
from fastgrpo.finite import first_not_finite, in_words
from fastgrpo.models.experts import experts_of
from fastgrpo.models.folder import check_folder, check_weights
from fastgrpo.models.quantized import method_of, quantization
from fastgrpo.models.settings import Settings
from fastgrpo.models.sources import check_transformer, load_transformer
from fastgrpo.quiet import quiet

TRANSFORMER = "transformer"  # the folder of a pipeline's transformer, within its own
ARCHITECTURES = Path(__file__).parent / "architectures"
PROMPT_READERS = ("token", "processor", "image_processor")  # how the names of parts begin that turn a prompt into numbers
PROMPT_PARTS = ("text_", *PROMPT_READERS)  # and of all parts that a pipeline reads prompts with
PASSING = ("truncation", "padding", "name_or_path", "local_files_only", "is_local")


class LoadedPipeline:
    """A pipeline of diffusers on a device, nothing in it trainable, with the dtype and the settings that it runs with."""

    pipeline_class: ClassVar[str]
    published_as: ClassVar[tuple[str, ...]] = ()  # other classes that a folder of the family may name
    part_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}  # of parts of the pipeline, where it is not the model's
    stock_text_tokens: ClassVar[int] = 512  # the default of the stock pipeline's max_sequence_length

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: torch.device, **settings: Any) -> None:
        self.pipeline = pipeline.to(device)
        self.dtype, self.device = dtype, device
        tokens = settings.get("max_text_tokens")
        self.settings = Settings(**settings | {"max_text_tokens": self.stock_text_tokens if tokens is None else tokens})
        self._experts = experts_of(pipeline, idle_on_host=self.settings.idle_expert == "host")
        self._check_settings()
        if tokens is None:
            self.settings = replace(self.settings, max_text_tokens=self.default_text_tokens)
        take_no_shortcuts(dtype)
        for module in (self.transformer, self.pipeline.vae, *self.text_encoders):
            module.requires_grad_(False)

    @property
    def default_text_tokens(self) -> int:
        """max_text_tokens where the settings name none."""
        return self.stock_text_tokens

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        transformer: Path | None = None,
        variant: str | None = None,
        **settings: Any,
    ) -> Self:
        """The model in a folder in the diffusers format. Nothing is downloaded.

        transformer: a folder or a file that takes the place of the folder's own, see `fastgrpo.models.sources`. variant: the
        ending of the files to read, such as fp16, where a part has them. settings: see `Settings`.
        """
        cls.check_files(path, transformer=transformer, variant=variant)
        dtypes = {"default": dtype, **cls.part_dtypes}
        with quiet("diffusers", "transformers"):
            own = cls.own_parts(path)
            parts = dict.fromkeys(own)  # set later: diffusers asks that a part is of the class that the folder names
            if transformer is not None:
                parts["transformer"] = load_transformer(transformer, path, dtype=dtype, variant=variant)
            kind = cls.part_class(cls.pipeline_class)
            pipeline = kind.from_pretrained(path, dtype=dtypes, variant=variant, local_files_only=True, **parts)
            pipeline.register_modules(**own)
        return cls(pipeline, dtype=dtype, device=device, **settings)

    @classmethod
    def check_files(cls, path: Path, *, transformer: Path | None = None, variant: str | None = None) -> None:
        """Refuse what `load` could not read: ValueError. It reads no weights."""
        check_folder(
            path, cls.pipeline_class, cls.published_as, variant=variant, elsewhere=("transformer",) if transformer else ()
        )
        if transformer is not None:
            check_transformer(transformer, path, variant)

    @classmethod
    def random(cls, architecture: str, *, dtype: torch.dtype, device: torch.device, **settings: Any) -> Self:
        """A published architecture with random weights and without text encoders: its prompts are placeholders.

        On the meta device its tensors have shapes and no data.
        """
        published = read_architecture(architecture)
        parts = {
            name: build(cls.part_class(config["_class_name"]), config, cls.part_dtypes.get(name, dtype), device)
            for name, config in published["parts"].items()
        }
        kind = cls.part_class(cls.pipeline_class)
        absent = {name: None for name in inspect.signature(kind).parameters if name.startswith(PROMPT_PARTS)}
        own = published.get("pipeline", {})  # settings of the pipeline itself
        return cls(kind(**{**absent, **parts, **own}), dtype=dtype, device=device, **settings)

    @classmethod
    def skeleton(cls, path: Path, network: str = TRANSFORMER) -> Any:
        """The transformer in the folder on the meta device: its layers' names and shapes, and no weights.

        network: the name of its folder; of two experts the second has another.
        """
        config = json.loads((path / network / "config.json").read_text(encoding="utf-8"))
        return build(cls.part_class(config["_class_name"]), config, torch.float32, torch.device("meta"))

    @classmethod
    def weight_files(
        cls, path: Path, network: str = TRANSFORMER, *, transformer: Path | None = None, variant: str | None = None
    ) -> dict[Path, Path]:
        """The files that `load` reads a transformer's weights from, by their places in a pipeline's folder.

        ValueError: they are no plain numbers in a network's folder.
        """
        folder = transformer or path / network
        where = f"model.{'path' if transformer is None else 'transformer'} = {folder}"
        if folder.is_file():
            raise ValueError(
                f"{where}: is one file, into which nothing is merged; take another format, or if every weight was trained "
                f"the run's own {network}/"
            )
        if method := quantization(folder):
            raise ValueError(f"{where}: is quantised ({method}), and nothing is merged into that; take another format")
        return {Path(network) / file.name: file for file in check_weights(folder, folder, where, variant)}

    @staticmethod
    def weight_name(name: str) -> str:
        """What these files call a parameter of the transformer."""
        return name

    @classmethod
    def part_class(cls, name: str) -> Any:
        """The class of a pipeline, or of one of its parts. A family overrides this for classes that diffusers lacks."""
        return getattr(diffusers, name)

    @classmethod
    def own_parts(cls, path: Path) -> dict[str, Any]:
        """Those parts of the pipeline in the folder, by name, that a family loads in its own way."""
        return {}

    @property
    def transformer(self) -> Any:
        """The network that makes velocities, an nn.Module: the pipeline's, or both of them as one."""
        return self.pipeline.transformer if self._experts is None else self._experts

    @property
    def transformers(self) -> dict[str, Any]:
        """The networks of diffusers that `transformer` consists of, by the names of their folders: one, or two experts."""
        return {"transformer": self.transformer} if self._experts is None else dict(self._experts.items())

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The networks that read a prompt; none where prompts are placeholders."""
        parts = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        return [part for part in parts if part is not None]

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The transformer, the autoencoder and the text encoders, by the names of the pipeline's parts."""
        parts = {name: vars(self.pipeline).get(name) for name in self.pipeline.config if not name.startswith("_")}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    @property
    def quantized(self) -> str | None:
        """The method by which the transformer's weights are quantised, such as gguf; None: they are plain numbers."""
        return next(filter(None, map(method_of, self.transformers.values())), None)

    def refuse_quantized(self, asked: str, way_out: str) -> None:
        """Refuse what no quantised transformer can do: ValueError. asked: the key and its value."""
        if self.quantized:
            raise ValueError(f"{asked}: the transformer's weights are quantised ({self.quantized}); {way_out}")

    @contextmanager
    def sized(self, size: Size) -> Iterator[None]:
        """Inside, images are of another size, as far as it says one. ValueError: the model makes none of that size."""
        before = self.settings
        try:
            self.settings = replace(before, **size.given)
            self._check_settings()
            yield
        finally:
            self.settings = before

    def check_numbers(self, where: str) -> None:
        """Refuse weights that are not finite: ValueError with the part and the parameter. where: how the message begins.

        It goes over them once, on their device, and waits for that once for each part.
        """
        for part, network in self.networks.items():
            check_numbers(f"{where}: {part}", network)

    @cached_property
    def readers_hash(self) -> str:
        """A hash of the tokenizers and processors, as they would be saved."""
        digest = hashlib.sha256()
        names = sorted(name for name in self.pipeline.config if name.startswith(PROMPT_READERS))
        for name, reader in ((name, getattr(self.pipeline, name, None)) for name in names):
            if reader is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                reader.save_pretrained(folder)
                for file in sorted(Path(folder).rglob("*")):
                    if file.is_file():
                        digest.update(f"{name}/{file.relative_to(folder)} ".encode() + _content(file))
        return digest.hexdigest()

    def _check_settings(self) -> None:
        """Refuse settings that the model cannot run with: ValueError."""


def _content(file: Path) -> bytes:
    """Of a reader's file, without what it remembers of the last text and of the place that it was read from."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    return json.dumps({key: value for key, value in content.items() if key not in PASSING}, sort_keys=True).encode()


def check_numbers(where: str, network: torch.nn.Module) -> None:
    """Refuse a network with weights that are not finite: ValueError. where: how the message begins, its part at the end."""
    # Quantised weights are codes of another layout, in whole numbers or in tensors of their package's own class.
    weights = {name: p for name, p in network.named_parameters() if type(p.data) is torch.Tensor and p.is_floating_point()}
    name = first_not_finite(weights)
    if name is not None:
        raise ValueError(f"{where}: {name} is {in_words(weights[name])}: was the file damaged? Get it again")


def take_no_shortcuts(dtype: torch.dtype) -> None:
    """Switch off the fast paths that torch takes by itself on a GPU and that would cost exactness.

    This holds for the whole process. torch has narrower switches only as a `with`, and all who call attention, the encoders
    and the processors of diffusers would have to enter it.
    """
    # On Hopper torch 2.11 and later prefer cuDNN's attention, which plans training and inference differently: the first
    # ratio need not be exactly 1 then. model.attention "cudnn" asks for it at each call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == torch.float32:
        # cuDNN computes float32 convolutions, the transformer's patches among them, with TF32's 10 bits, and nothing else in
        # torch does: numbers of a GPU would differ from those of a CPU a thousand times more than by rounding.
        torch.backends.cudnn.allow_tf32 = False


def read_architecture(name: str) -> dict[str, Any]:
    """A published architecture: the configs of its parts, and the numbers that were published about it."""
    file = ARCHITECTURES / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        raise ValueError(f"model.architecture = {name!r}: unknown; there are {known}")
    return json.loads(file.read_text(encoding="utf-8"))


def build(kind: Any, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """One part of a pipeline from its class and config: a scheduler, or a network with random weights."""
    before = torch.get_default_dtype()
    if not issubclass(kind, torch.nn.Module):
        return kind.from_config(dict(config))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind.from_config(dict(config)).eval()
    finally:
        torch.set_default_dtype(before)
