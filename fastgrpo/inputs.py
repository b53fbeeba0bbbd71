"""What a run is made of, known by content: prompts with their images, weights, tokenizers, code of rewards, releases.

    inputs = inputs_of(config, prompts, held_out)
    for change in changes(folder, inputs): ...      ValueError where the change is of what is trained

`inputs.json` in a run's folder holds a hash of each. A run that went on from a checkpoint with other prompts or weights
would be two runs in one: it is refused. A mended reward or a newer release is taken, and said. A file's name, place and time
are no part of it, so that a run and its files may be moved.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.config.keys import Config, ModelConfig
from fastgrpo.data.images import TARGET_FIELDS
from fastgrpo.data.prompts import IMAGE_FIELD, PromptSet, files_of
from fastgrpo.engine.checkpoint_folders import latest_checkpoint
from fastgrpo.files import json_text, json_value, write_atomically
from fastgrpo.models.lora_file import lora_files
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.rewards import reward_version, weights_of
from fastgrpo.version import __version__

Inputs = dict[str, str]  # the path of a key, or what else it is -> a hash, or a release

IMAGES = (IMAGE_FIELD, *(field for fields in TARGET_FIELDS.values() for field in fields))
READ = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")  # endings of the files that a model is read from
WHOLE = 2**24  # bytes up to which a file is read whole; of a larger one 64 blocks are, evenly spaced
BLOCK, BLOCKS = 2**16, 64
RELEASES = ("torch", "diffusers", "transformers", "peft", "deepspeed")
TRAINED = ("prompts", "model")  # what may not change, by the beginning of the name


def inputs_of(config: Config, prompts: PromptSet, held_out: PromptSet, *, own_model: bool = False) -> Inputs:
    """The hash of each input. own_model: the model was handed in, and is not the one that the configuration names."""
    inputs = {"prompts.train": prompts_hash(prompts), "prompts.eval": prompts_hash(held_out)}
    if not own_model and not config.model.random_weights:
        inputs |= _model_hashes(config.model)
    if config.model.tiny_decoder:
        inputs |= _folder_hashes("model.tiny_decoder", config.model.tiny_decoder)
    if config.model.lora.path:
        files = lora_files(config.model.lora.path)
        inputs["model.lora.path"] = hashlib.sha256(" ".join(map(_file_hash, files)).encode()).hexdigest()
    for name in dict.fromkeys([*weights_of(config.reward.train), *weights_of(config.reward.eval)]):
        inputs[f"reward {name}"] = _reward_hash(name, config)
    inputs |= {f"release of {name}": importlib.metadata.version(name) for name in RELEASES}
    return inputs | {"release of fastgrpo": __version__}


def changes(folder: Path, inputs: Inputs) -> list[str]:
    """What is another than in the run that the folder holds, in words; ValueError where such a run cannot go on.

    Before its first checkpoint nothing of a run is left that a change could mix with.
    """
    file = RunFolder(folder).inputs
    if latest_checkpoint(RunFolder(folder).checkpoints) is None or not file.is_file():
        return []
    try:
        before: Inputs = dict(json_value(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); remove it to go on without knowing what changed") from None
    changed = [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
    refused = [name for name in changed if name.startswith(TRAINED)]
    if refused:
        raise ValueError(
            f"output = {folder}: its run was trained with another content of {', '.join(refused)}; restore that, or choose "
            "another folder with --set output=..."
        )
    return [f"{name} changed since the run began" for name in changed]


def write_inputs(folder: Path, inputs: Inputs) -> None:
    """Into a run's folder."""
    write_atomically(RunFolder(folder).inputs, json_text(inputs, indent=1) + "\n")


def prompts_hash(prompts: PromptSet) -> str:
    """A hash of the records in their order, with the content of an image in place of its path."""
    digest, content = hashlib.sha256(), functools.cache(_file_hash)  # an image may stand in many records
    for record in prompts.metadata:
        images = {
            field: [content(Path(file)) for file in files] if isinstance(record[field], list) else content(Path(files[0]))
            for field in IMAGES
            if all(map(_is_file, files := files_of(record.get(field))))
        }
        digest.update(json.dumps({**record, **images}, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _is_file(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file()


def _model_hashes(model: ModelConfig) -> Inputs:
    """Those of the files that the model is read from."""
    inputs = _folder_hashes("model.path", model.path)
    if model.transformer is None:
        return inputs
    inputs.pop("model.path/transformer", None)  # of which no weights are read
    if model.transformer.is_dir():
        return inputs | _folder_hashes("model.transformer", model.transformer)
    return inputs | {"model.transformer": _file_hash(model.transformer)}


def _folder_hashes(name: str, folder: Path) -> Inputs:
    """A hash of each part of a model: of the files in each folder of its folder, and of those beside them."""
    parts: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if file.suffix in READ and file.is_file() and not any(part.startswith(".") for part in place.parts):
            parts.setdefault("/".join([name, *place.parts[:-1]][:2]), []).append(file)
    return {part: _together(folder, files) for part, files in parts.items()}


def _together(folder: Path, files: Sequence[Path]) -> str:
    lines = (f"{file.relative_to(folder)} {_file_hash(file)}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _reward_hash(name: str, config: Config) -> str:
    """Of its version, the code of a module of the user's own, and the files that its settings name."""
    settings = config.reward.settings.get(name) or {}
    said = [reward_version(name, settings)]
    found = importlib.util.find_spec(name.partition(":")[0]) if ":" in name and not name.startswith("__main__:") else None
    named = [found.origin] if found is not None else []
    for path in (Path(str(value)) for value in (*named, *settings.values()) if value):
        if path.is_dir():
            said += _folder_hashes("", path).values()
        elif path.is_file():
            said.append(_file_hash(path))
    return hashlib.sha256(" ".join(said).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    """Of the size and the content, as far as `WHOLE` says: 64 blocks differ between any two trainings of one network."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= WHOLE:
            digest.update(opened.read())
        else:
            for i in range(BLOCKS):
                opened.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()
