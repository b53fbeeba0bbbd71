"""Prompt files, and which prompts an iteration trains on.

A file is text with a prompt a line, or JSON lines with a "prompt" each and whatever else the reward reads, as GenEval's
metadata files have it. A folder of images, each with its caption in a .txt of the same name, is read as such lines too, for
offline training. Every line is looked at before anything else is loaded, those that a program hands in too.
"""

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.data.captions import ALLOW_OUTSIDE, captioned_images
from fastgrpo.data.json_records import NotJSON, check_record, is_json, parse_json
from fastgrpo.data.pictures import load_picture
from fastgrpo.files import inside, write_atomically
from fastgrpo.normal_form import compared
from fastgrpo.records import numpy_generator
from fastgrpo.text_files import numbered_lines, read_text


class ImagePrompt(NamedTuple):
    """A prompt of an image-conditioned model: a text about one input image, or about several in their order."""

    text: str
    images: tuple[Path, ...]


OVERALL = "overall"  # the mean over categories, which stands among them in an evaluation
ONE_A_LINE = "write one object a line, for example with jq -c '.[]' for a list"
IMAGE_FIELD = "image"  # the input image in a line of prompts for an image-conditioned model


def as_prompt(record: dict, with_image: bool) -> str | ImagePrompt:
    """The prompt in a line's record: its text, and for an image-conditioned model its input images too."""
    return ImagePrompt(record["prompt"], tuple(map(Path, files_of(record[IMAGE_FIELD])))) if with_image else record["prompt"]


def files_of(value: Any) -> list[str]:
    """The files that a field of a record names: one, or a list of them."""
    return list(value) if isinstance(value, list) else [value]


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


def load_prompts(path: Path, image_fields: Sequence[str] = (), images_outside: bool = False) -> PromptSet:
    """Read a .txt or .jsonl file, or a folder of captioned images; what is no prompt is refused with its line's number.

    image_fields: fields that every line must have, each the path of an image, relative to the folder of the prompt file.
    Each image is opened once, so that one that cannot be read is found before training.
    images_outside: take images that are not in that folder, see `prompts.images_outside`.
    """
    if path.is_dir():
        return _checked(_in_folder(path, image_fields, images_outside), path, image_fields, images_outside)
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file")
    lines = [(f"{path}:{number}", line) for number, line in numbered_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompts")
    if _is_plain(path):
        return _checked([(place, {"prompt": line.strip()}) for place, line in lines], path.parent, image_fields)
    records = [(place, _parse(line, place, path)) for place, line in lines]
    return _checked(records, path.parent, image_fields, images_outside)


def given_prompts(prompts: Sequence[str | dict], image_fields: Sequence[str] = ()) -> PromptSet:
    """Prompts from a program instead of a file, each a text or a record, under the same rules.

    Images are relative to this folder, and may lie anywhere.
    """
    # A text or a mapping would pass as a list, of its letters or its keys.
    records = [] if isinstance(prompts, str | Mapping) else list(prompts)
    if not records:
        raise ValueError("no prompts were given: hand in a list with at least one")
    records = [{"prompt": one} if isinstance(one, str) else one for one in records]
    return _checked([(f"prompt {number}", record) for number, record in enumerate(records)], Path.cwd(), image_fields, True)


def write_prompts(path: Path, records: Iterable[dict]) -> None:
    """Write records as the JSON lines that `load_prompts` reads."""
    if _is_plain(path):
        raise ValueError(f"{path}: JSON lines are written, and a .txt is read as plain prompts; call it .jsonl")
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _is_plain(path: Path) -> bool:
    """Whether each line is a prompt by itself."""
    return path.suffix.lower() == ".txt"


def _parse(line: str, place: str, path: Path) -> Any:
    try:
        record = parse_json(line)
    except NotJSON as error:
        if is_json(read_text(path)):
            raise ValueError(f"{place}: one value of JSON over several lines; {ONE_A_LINE}") from None
        raise ValueError(f"{place}: not JSON ({error}); {ONE_A_LINE}; a file of plain prompts is called .txt") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if isinstance(record, list):
        raise ValueError(f"{place}: a list; {ONE_A_LINE}")
    return record


def _in_folder(folder: Path, image_fields: Sequence[str], images_outside: bool) -> list[tuple[str, dict]]:
    if len(image_fields) != 1:
        raise ValueError(f"{folder}: is a folder, which holds one image a prompt; give a .txt or .jsonl file")
    found = captioned_images(folder, links_out=images_outside)
    return [(str(file), {"prompt": text, image_fields[0]: str(file.absolute())}) for file, text in found]


def _checked(
    entries: Iterable[tuple[str, Any]], folder: Path, image_fields: Sequence[str], images_outside: bool = False
) -> PromptSet:
    """The prompts of records with their places, once each is a record and its images, relative to `folder`, are readable."""
    places, records = [], []
    for place, record in entries:
        try:
            check_record(record)
            records.append({**record, **{field: _images(record, field, folder, images_outside) for field in image_fields}})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        places.append(place)
    return PromptSet([record["prompt"] for record in records], records, places)


def _images(record: dict, field: str, folder: Path, outside: bool) -> str | list[str]:
    """The absolute path of a record's image, or of each of its input images, which are checked to be images."""
    value = record.get(field)
    if field == IMAGE_FIELD and isinstance(value, list) and value:
        return [_image(one, field, folder, outside) for one in value]
    return _image(value, field, folder, outside)


def _image(name: Any, field: str, folder: Path, outside: bool) -> str:
    if not isinstance(name, str):
        raise ValueError(f'every prompt needs an image here: give "{field}", a file, in a .jsonl')
    try:
        file = (folder / os.path.expanduser(name)).resolve()
        if not outside and not inside(file, folder):
            raise ValueError(f"leads out of {folder}, to {file}; {ALLOW_OUTSIDE}")
        load_picture(file)
    except (ValueError, RuntimeError) as error:  # of a name that no file has, or of links in a circle
        raise ValueError(f"{field} = {name[:200]!r}: {error}") from None
    return str(file)


def check_input_images(prompts: PromptSet, counts: range, family: str) -> None:
    """Refuse a prompt with more or fewer input images than the model family reads. counts: numbers that it reads."""
    for place, record in prompts.judged:
        found = len(files_of(record[IMAGE_FIELD]))
        if found not in counts:
            reads = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
            raise ValueError(f'{place}: "{IMAGE_FIELD}" has {found} images, and {family} reads {reads}')


def check_not_empty(prompts: PromptSet, family: str) -> None:
    """Refuse a prompt without a text, for families that take one for no prompt at all."""
    for place, record in prompts.judged:
        if not record["prompt"]:
            raise ValueError(f"{place}: the prompt is empty, which {family} reads as no prompt at all; write a text")


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


def check_tags(evaluation: PromptSet) -> None:
    """Refuse a category ("tag") of evaluation prompts under whose name an evaluation reports something else."""
    for prompt, record in zip(evaluation.prompts, evaluation.metadata, strict=True):
        if record.get("tag") == OVERALL:
            raise ValueError(
                f"the prompt {prompt!r} has the tag {OVERALL!r}, which is what the mean over all tags is called: rename it"
            )


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
        return numpy_generator(seed, iteration).choice(num_prompts, groups, replace=False, p=probabilities)
    positions = np.arange(iteration * groups, (iteration + 1) * groups)
    shuffles = {epoch: _shuffle(num_prompts, int(epoch), seed) for epoch in np.unique(positions // num_prompts)}
    return np.array([shuffles[p // num_prompts][p % num_prompts] for p in positions])


def prompts_of_run(
    num_prompts: int, groups: int, iterations: range, seed: int, probabilities: np.ndarray | None = None
) -> np.ndarray:
    """The indices, in order, of all prompts that `prompts_of_iteration` gives these iterations."""
    drawn = np.zeros(num_prompts, dtype=bool)
    possible = num_prompts if probabilities is None else int((probabilities > 0).sum())
    for iteration in iterations:
        drawn[prompts_of_iteration(num_prompts, groups, iteration, seed, probabilities)] = True
        if drawn.sum() == possible:
            break
    return drawn.nonzero()[0]


@functools.lru_cache(maxsize=2)  # an iteration may end one epoch and begin the next
def _shuffle(num_prompts: int, epoch: int, seed: int) -> np.ndarray:
    return numpy_generator(seed, epoch).permutation(num_prompts)
