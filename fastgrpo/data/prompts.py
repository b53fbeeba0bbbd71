"""Prompt files, and which prompts an iteration trains on.

A file is text with a prompt a line, or JSON lines with a "prompt" each and whatever else the reward reads.
GenEval's metadata files are read as they are. A folder of images, each with its caption in a .txt of the same name, is read
as such lines too, for training on images.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class ImagePrompt(NamedTuple):
    """What an image-conditioned model is asked: a text about an input image."""

    text: str
    image: Path


INPUT = ("image",)  # what a prompt of an image-conditioned model has besides


def asked(record: dict, images: bool) -> str | ImagePrompt:
    """What a model reads of a prompt's record: the text, for an image-conditioned model with its image."""
    return ImagePrompt(record["prompt"], Path(record["image"])) if images else record["prompt"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the metadata of their lines."""

    prompts: list[str]
    metadata: list[dict]

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(path: Path, images: Sequence[str] = ()) -> PromptSet:
    """Read a .txt or .jsonl file, or a folder of captioned images; what is no prompt is refused with its line's number.

    images: keys that every line must have, each an image's path (relative to the prompt file's folder), which is opened.
    """
    if path.is_dir():
        return _load_folder(path, *images)
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            record = _parse(line, path, number)
            records.append({**record, **{key: _image(record, key, path, number) for key in images}})
    if not records:
        raise ValueError(f"{path}: holds no prompts")
    return PromptSet([record["prompt"] for record in records], records)


def _parse(line: str, path: Path, number: int) -> dict:
    if path.suffix == ".txt":
        return {"prompt": line.strip()}
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error}); a file of plain prompts is called .txt") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{path}:{number}: expected an object with a "prompt", found {line[:80]!r}')
    return record


def _load_folder(folder: Path, *keys: str) -> PromptSet:
    """Images with their captions beside them, by name."""
    if len(keys) != 1:
        raise ValueError(f"{folder}: is a folder, which holds one image a prompt; give a .txt or .jsonl file")
    records = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"{file}: has no caption; write it to {caption.name} beside it")
        _opened(file, str(file))
        records.append({"prompt": caption.read_text().strip(), keys[0]: str(file.resolve())})
    if not records:
        raise ValueError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return PromptSet([record["prompt"] for record in records], records)


def _image(record: dict, key: str, path: Path, number: int) -> str:
    """The absolute path of a record's image, after a look at whether it is one."""
    if not isinstance(record.get(key), str):
        raise ValueError(f'{path}:{number}: every prompt needs an image here: give "{key}", a file, in a .jsonl')
    file = (path.parent / record[key]).resolve()
    _opened(file, f"{path}:{number}: {key} {file}")
    return str(file)


def _opened(file: Path, what: str) -> None:
    if not file.is_file():
        raise ValueError(f"{what}: no such file")
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{what}: cannot be read ({error})") from None


def check_held_out(train: PromptSet, evaluation: PromptSet) -> None:
    """Refuse evaluation prompts that are trained on."""

    def keys(prompts: PromptSet) -> set[tuple[str, str]]:
        return {(p, str(record.get("image", ""))) for p, record in zip(prompts.prompts, prompts.metadata, strict=True)}

    shared = sorted(keys(train) & keys(evaluation))
    if shared:
        raise ValueError(f"{len(shared)} evaluation prompts are also trained on, the first: {shared[0][0]!r}")


def shares(prompts: PromptSet, weights: Mapping[str, float], groups: int) -> np.ndarray | None:
    """The share of each prompt (N,) where categories ("tag") are drawn by weight; None without weights: all alike.

    Flow-GRPO trains GenEval on position, counting, attribution and the rest as 7 : 5 : 3 : 1 : 1 : 0.
    """
    if not weights:
        return None
    tags = [str(record.get("tag", "all")) for record in prompts.metadata]
    counts = Counter(tags)
    for tag in weights:
        if tag not in counts:
            raise ValueError(f"prompts.weights.{tag}: no prompt has this tag; there are {', '.join(counts)}")
    for tag in counts:
        if tag not in weights:
            raise ValueError(f"prompts.weights: {tag} has no weight, and {counts[tag]} prompts; give it 0 to leave it out")
        if not 0 <= weights[tag] < math.inf:
            raise ValueError(f"prompts.weights.{tag} = {weights[tag]}: a weight is finite and not negative")
    share = np.array([weights[tag] / counts[tag] for tag in tags], dtype=np.float64)
    if (share > 0).sum() < groups:
        live = int((share > 0).sum())
        raise ValueError(f"rollout.groups = {groups}: only {live} prompts have a weight above 0, and each is taken once")
    return share / share.sum()


def prompts_of_iteration(
    num_prompts: int, groups: int, iteration: int, seed: int, share: np.ndarray | None = None
) -> np.ndarray:
    """The indices (groups,) of an iteration's prompts: seeded shuffles of all prompts, one after the other.

    With shares (num_prompts,) instead drawn anew for each iteration, a prompt at most once. A function of the iteration
    alone, so every rank has the same, and a resumed run goes on where it stopped.
    """
    if share is not None:
        rng = np.random.Generator(np.random.Philox(key=[seed, iteration]))
        return rng.choice(num_prompts, groups, replace=False, p=share)
    positions = np.arange(iteration * groups, (iteration + 1) * groups)
    shuffles = {epoch: _shuffle(num_prompts, int(epoch), seed) for epoch in np.unique(positions // num_prompts)}
    return np.array([shuffles[p // num_prompts][p % num_prompts] for p in positions])


def _shuffle(num_prompts: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_prompts)
