"""Prompt files, and which prompts an iteration trains on.

A file is text with a prompt a line, or JSON lines with a "prompt" each and whatever else the reward reads, as GenEval's
metadata files have it. A folder of images, each with its caption in a .txt of the same name, is read as such lines too, for
offline training.
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

from fastgrpo.normal_form import compared

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class ImagePrompt(NamedTuple):
    """A prompt of an image-conditioned model: a text about an input image."""

    text: str
    image: Path


IMAGE_FIELD = "image"  # the input image in a line of prompts for an image-conditioned model


def as_prompt(record: dict, with_image: bool) -> str | ImagePrompt:
    """The prompt in a line's record: its text, and for an image-conditioned model its input image too."""
    return ImagePrompt(record["prompt"], Path(record[IMAGE_FIELD])) if with_image else record["prompt"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts, the record of each one's line as metadata, and where each stands: `file:line`, or what a message says."""

    prompts: list[str]
    metadata: list[dict]
    places: Sequence[str] = ()  # of each prompt; (): not known

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def judged(self) -> list[tuple[str, dict]]:
        """Where each prompt stands, and its record, for rewards that look at them before the run."""
        return list(zip(self.places or map(repr, self.prompts), self.metadata, strict=True))


def load_prompts(path: Path, image_fields: Sequence[str] = ()) -> PromptSet:
    """Read a .txt or .jsonl file, or a folder of captioned images; what is no prompt is refused with its line's number.

    image_fields: fields that every line must have, each the path of an image, relative to the folder of the prompt file.
    Each image is opened once, so that one that cannot be read is found before training.
    """
    if path.is_dir():
        return _load_folder(path, image_fields)
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file")
    records, places = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            record = _parse(line, path, number)
            places.append(f"{path}:{number}")
            records.append({**record, **{field: _image(record, field, path, number) for field in image_fields}})
    if not records:
        raise ValueError(f"{path}: holds no prompts")
    return PromptSet([record["prompt"] for record in records], records, places)


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


def _load_folder(folder: Path, image_fields: Sequence[str]) -> PromptSet:
    """Images with their captions beside them, in the order of their names."""
    if len(image_fields) != 1:
        raise ValueError(f"{folder}: is a folder, which holds one image a prompt; give a .txt or .jsonl file")
    records = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"{file}: has no caption; write it to {caption.name} beside it")
        _check_image(file, str(file))
        records.append({"prompt": caption.read_text().strip(), image_fields[0]: str(file.resolve())})
    if not records:
        raise ValueError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return PromptSet([record["prompt"] for record in records], records)


def _image(record: dict, field: str, path: Path, number: int) -> str:
    """The absolute path of a record's image, which is checked to be one."""
    if not isinstance(record.get(field), str):
        raise ValueError(f'{path}:{number}: every prompt needs an image here: give "{field}", a file, in a .jsonl')
    file = (path.parent / record[field]).resolve()
    _check_image(file, f"{path}:{number}: {field} {file}")
    return str(file)


def _check_image(file: Path, what: str) -> None:
    if not file.is_file():
        raise ValueError(f"{what}: no such file")
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{what}: cannot be read ({error})") from None


def check_held_out(train: PromptSet, evaluation: PromptSet) -> None:
    """Refuse evaluation prompts that are trained on, whatever their case, spaces and ways to write a character."""

    def lines(prompts: PromptSet) -> dict[tuple[str, str], tuple[str, str]]:
        placed = reversed([*zip(prompts.prompts, prompts.judged, strict=True)])  # of equal ones the first is kept
        return {(compared(p), str(record.get(IMAGE_FIELD, ""))): (place, p) for p, (place, record) in placed}

    trained, held_out = lines(train), lines(evaluation)
    shared = [one for one in reversed(held_out) if one in trained]
    if shared:
        (place, prompt), (same_place, same) = held_out[shared[0]], trained[shared[0]]
        more = "" if prompt == same else f" at {place}, as {same!r} at {same_place}"
        raise ValueError(f"{len(shared)} evaluation prompts are also trained on, the first: {prompt!r}{more}")


def prompt_probabilities(prompts: PromptSet, weights: Mapping[str, float], groups: int) -> np.ndarray | None:
    """The probability of each prompt (N,) where categories ("tag") are drawn by weight; None without weights.

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
    probabilities = np.array([weights[tag] / counts[tag] for tag in tags], dtype=np.float64)
    if (probabilities > 0).sum() < groups:
        live = int((probabilities > 0).sum())
        raise ValueError(f"rollout.groups = {groups}: only {live} prompts have a weight above 0, and each is taken once")
    return probabilities / probabilities.sum()


def prompts_of_iteration(
    num_prompts: int, groups: int, iteration: int, seed: int, probabilities: np.ndarray | None = None
) -> np.ndarray:
    """The indices (groups,) of an iteration's prompts, taken in turn from seeded shuffles of all prompts.

    With probabilities (num_prompts,) they are drawn anew for each iteration instead, each prompt at most once. The indices
    depend on seed and iteration alone: every rank has the same, and a resumed run goes on where it stopped.
    """
    if probabilities is not None:
        rng = np.random.Generator(np.random.Philox(key=[seed, iteration]))
        return rng.choice(num_prompts, groups, replace=False, p=probabilities)
    positions = np.arange(iteration * groups, (iteration + 1) * groups)
    shuffles = {epoch: _shuffle(num_prompts, int(epoch), seed) for epoch in np.unique(positions // num_prompts)}
    return np.array([shuffles[p // num_prompts][p % num_prompts] for p in positions])


def _shuffle(num_prompts: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_prompts)
