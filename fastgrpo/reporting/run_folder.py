"""The folder of a run: what its files are called and how they are read. Reading needs no torch.

config.yaml                         the whole configuration; paths in the folder are relative to it, all others absolute
prompts_{train,eval}.jsonl          only where prompts were given to the trainer as objects
inputs.json                         hashes of prompts, weights and code: see `fastgrpo.inputs`
metrics.jsonl   tensorboard/        a line an iteration
evaluations.jsonl                   a line an evaluation; the first is the base model
faults.jsonl                        a line for each time that numbers were not finite; absent where they always were
samples/00040.png, samples/00040/   always the same prompts (samples/prompts.json) and noise: a grid, and each image
checkpoints/                        see `fastgrpo.engine.checkpoint`
pytorch_lora_weights.safetensors    the averaged LoRA, for `load_lora_weights(run)` of any diffusers script
pytorch_lora_weights_2.safetensors  that of a second expert
transformer/   transformer_2/       or the averaged weights of whole transformers
best/                               the weights of the best evaluation, where `checkpoint.keep_best` asks for them
trained.json                        which iteration's these are, and their hashes: see `fastgrpo.trained_files`
lock.json                           while a process trains here, who it is: see `fastgrpo.engine.lock`
summary.json   report.html          at the end
prompts_train.jsonl, ..._eval       prompts that a program handed in instead of naming a file

The files of lines are appended to while a run goes on. A kill can leave half a line at their end: it never counts as
a row. Whoever goes on with a run reads with `read_lines`, which refuses every other damage; the report, which must show
what there is of any run, reads with `readable_lines`, which leaves out what it cannot read and says where.
"""

from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.files import json_value

# The file of a LoRA by diffusers' name of the network that it is of. The first file has diffusers' own name; the second
# is read by `pipeline.load_lora_weights(folder, weight_name=..., load_into_transformer_2=True)`.
LORAS = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}
LAST = 10**9  # iterations of a row: far more than a run may have, and exact in any reader's number


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run lie; none of them has to be there."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def faults(self) -> Path:
        """Numbers that were not finite; no file as long as there were none."""
        return self.path / "faults.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def trained(self) -> dict[str, Path]:
        """The trained weights of each network, a LoRA's file or the network's folder; none before the first checkpoint."""
        places = ((name, self.path / place) for name, lora in LORAS.items() for place in (name, lora))
        return {name: place for name, place in places if place.exists()}

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def inputs(self) -> Path:
        """What the run was made of, by content."""
        return self.path / "inputs.json"

    @property
    def trained_record(self) -> Path:
        """What the trained weights in the folder are of."""
        return self.path / "trained.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def best(self) -> Path:
        """A folder with the trained weights of the best evaluation, where `checkpoint.keep_best` asks for them."""
        return self.path / "best"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def prompts(self) -> Path:
        """The prompts of the samples, in their order."""
        return self.samples / "prompts.json"

    def given_prompts(self, section: str) -> Path:
        """The prompts that a program handed in. section: "train" or "eval"."""
        return self.path / f"prompts_{section}.jsonl"

    def samples_of(self, iteration: int) -> Path:
        """The folder of one iteration's images; the grid of them lies beside it with the suffix .png."""
        return self.samples / f"{iteration:05d}"

    def sample_folders(self) -> dict[int, Path]:
        """The folder of each iteration that has samples, in rising order."""
        folders = (folder for folder in self.samples.glob("*") if folder.is_dir() and folder.name.isdecimal())
        return {int(folder.name): folder for folder in sorted(folders)}


def best_iteration(evaluations: list[dict[str, Any]]) -> int | None:
    """The iteration of the highest overall score after the base, the first of several; None where there is none."""
    scores: dict[int, float] = {}
    for row in evaluations:
        score = row["accuracy"].get("overall") if isinstance(row.get("accuracy"), dict) else None
        if row["iteration"] > 0 and isinstance(score, int | float):
            scores[row["iteration"]] = score
    return max(scores, key=lambda iteration: (scores[iteration], -iteration), default=None)


def missing_iterations(rows: list[dict[str, Any]], needed: range) -> str:
    """Which of the iterations have no line, in words; empty where all have one."""
    there = {row["iteration"] for row in rows}
    missing = [iteration for iteration in needed if iteration not in there]
    if not missing:
        return ""
    some = f"iteration{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:5]))}"
    return f"{some} and {len(missing) - 5} more" if len(missing) > 5 else some


def image_of(folder: Path, number: int) -> Path:
    """One image in a folder of samples."""
    return folder / f"{number:03d}.png"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines, none where there is no file. Damage before the last line raises ValueError."""
    rows, unreadable, count = _parse(path)
    if unreadable and unreadable[0] < count:
        raise ValueError(
            f"{path}:{unreadable[0]}: not JSON with an iteration; remove the line to go on without what it said"
        )
    return rows


def readable_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file of lines, and the numbers of the lines, from 1, that are none."""
    rows, unreadable, _ = _parse(path)
    return rows, unreadable


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int], int]:
    """The rows, the numbers of the lines that are none, and the number of lines."""
    # At line feeds alone, as everywhere; what follows the last one is half a line, or nothing.
    lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n") if path.is_file() else []
    if lines and not lines[-1]:
        lines.pop()
    rows, unreadable = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json_value(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("iteration")) is int and 0 <= row["iteration"] <= LAST:
            rows.append(row)
        else:
            unreadable.append(number)
    return rows, unreadable, len(lines)
