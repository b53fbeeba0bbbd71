"""What a run leaves in its folder, for people and for its report. Rank 0 writes; the files say everything there is.

config.yaml                         the whole configuration, every path absolute
metrics.jsonl   tensorboard/        a line an iteration
evaluations.jsonl                   a line an evaluation; the first is the base model
samples/00040.png, samples/00040/   always the same prompts (samples/prompts.json) and noise: a grid, and each image
checkpoints/                        see `fastgrpo.engine.checkpoint`
pytorch_lora_weights.safetensors    the averaged LoRA, for `load_lora_weights(run)` of any diffusers script
transformer/                        or the averaged weights of a whole transformer
summary.json   report.html          at the end
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

SCALE_BELOW = 128  # pixels: smaller images are enlarged in the grid, so that a person can see them


class RunLog:
    """Appends to the files of a run, from `iteration` on: what a killed run wrote after its last checkpoint is dropped."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder = folder
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            _keep_until(folder / name, iteration)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def metrics(self, row: dict) -> None:
        """One iteration's numbers; nested ones become a/b in TensorBoard."""
        _append(self.folder / "metrics.jsonl", row)
        self._scalars("train", row, row["iteration"])

    def evaluation(self, row: dict) -> None:
        _append(self.folder / "evaluations.jsonl", row)
        self._scalars("accuracy", row["accuracy"], row["iteration"])

    def samples(self, iteration: int, images: Tensor, records: list[dict]) -> None:
        """images: (N, 3, H, W) uint8, or videos (N, T, 3, H, W)."""
        arrays = as_pictures(images).permute(0, 2, 3, 1).cpu().numpy()
        folder = self.folder / "samples" / f"{iteration:05d}"
        folder.mkdir(exist_ok=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f"{i:03d}.png")
        save_grid(folder.with_suffix(".png"), arrays)
        text = json.dumps([{"prompt": r["prompt"], "tag": r.get("tag", "all")} for r in records], indent=1)
        (self.folder / "samples" / "prompts.json").write_text(text)

    def summary(self, summary: dict) -> None:
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")

    def close(self) -> None:
        self._tensorboard.close()

    def _scalars(self, prefix: str, row: dict, iteration: int) -> None:
        for key, value in row.items():
            if isinstance(value, dict):
                self._scalars(f"{prefix}/{key}", value, iteration)
            elif key != "iteration":
                self._tensorboard.add_scalar(f"{prefix}/{key}", value, iteration)


def as_pictures(images: Tensor, frames: int = 4) -> Tensor:
    """Images as they are; of videos (N, T, 3, H, W) a few frames, evenly spaced and side by side: (N, 3, H, frames W)."""
    if images.dim() == 4:
        return images
    places = [round(i * (images.shape[1] - 1) / max(1, frames - 1)) for i in range(frames)]
    return torch.cat([images[:, place] for place in places], dim=-1)


def save_grid(path: Path, images: np.ndarray, gap: int = 2) -> None:
    """images (N, H, W, 3) uint8 as one picture, rows from left to right."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count * 1.5))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (place * (side + gap) + gap for place, side in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = image
    factor = max(1, SCALE_BELOW // max(height, width))
    Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(path)


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; the last one may be cut short by a kill, and is then left out."""
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON") from None
    return rows


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _keep_until(path: Path, iteration: int) -> None:
    if path.exists():
        kept = [row for row in read_lines(path) if row["iteration"] <= iteration]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
