"""What rank 0 writes into the folder of a run while it goes on. `fastgrpo.reporting.run_folder` says what lies there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastgrpo.files import json_text, write_atomically, writing_to
from fastgrpo.reporting.pictures import as_pictures, save_grid
from fastgrpo.reporting.run_folder import RunFolder, image_of, read_lines


class RunLog:
    """Appends to the files of a run after `iteration`; what a killed run wrote after its last checkpoint is dropped.

    Iteration 0 is the model before training, and -1 drops what was written of that too.

    What the system refuses to write, on a full disk for example, ends no run. Lines are kept and written with the next ones;
    pictures and curves are left out, which is said once.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder = RunFolder(folder)
        if iteration < 0:
            shutil.rmtree(self.folder.samples, ignore_errors=True)
        self.folder.samples.mkdir(parents=True, exist_ok=True)
        for path in (self.folder.metrics, self.folder.evaluations):
            _keep_until(path, iteration)
        self._waiting: dict[Path, str] = {}  # lines that are not written yet
        self._said: set[str] = set()
        self._tensorboard = SummaryWriter(str(self.folder.tensorboard), purge_step=iteration + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        """Appends one iteration's numbers; nested ones become a/b in TensorBoard."""
        self._append(self.folder.metrics, row)
        self._scalars("train", {key: value for key, value in row.items() if key != "iteration"}, row["iteration"])

    def evaluation(self, row: dict[str, Any]) -> None:
        """Appends one evaluation: the iteration and what `fastgrpo.evaluation.Evaluator.accuracy` returned."""
        self._append(self.folder.evaluations, row)
        self._scalars("accuracy", row["accuracy"], row["iteration"])

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """Inside, what the system refuses is said, for each thing once, and no error."""
        try:
            yield
        except OSError as error:
            if what not in self._said:
                print(f"warning: {what} could not be written: {error}", flush=True)
            self._said.add(what)

    def samples(
        self,
        iteration: int,
        images: Tensor,  # (N, 3, H, W) uint8, or videos (N, T, 3, H, W)
        records: list[dict[str, Any]],  # the N prompts' lines of the prompt file
    ) -> None:
        """Writes the images one by one and as a grid, and their prompts."""
        arrays = as_pictures(images).permute(0, 2, 3, 1).cpu().numpy()
        folder = self.folder.samples_of(iteration)
        prompts = [{"prompt": record["prompt"], "tag": record.get("tag", "all")} for record in records]
        with self.may_fail(f"samples of iteration {iteration}"), writing_to(folder):
            folder.mkdir(exist_ok=True)
            for number, array in enumerate(arrays):
                Image.fromarray(array).save(image_of(folder, number))
            save_grid(folder.with_suffix(".png"), arrays)
            write_atomically(self.folder.prompts, json_text(prompts, indent=1))

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes the summary, by which the run counts as finished."""
        write_atomically(self.folder.summary, json_text(summary, indent=1) + "\n")

    def close(self) -> None:
        """Writes what waits; OSError if that still cannot be."""
        with self.may_fail("TensorBoard's file"), writing_to(self.folder.tensorboard):
            self._tensorboard.close()
        for path in list(self._waiting):
            self._write(path)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        self._waiting[path] = self._waiting.get(path, "") + json_text(row) + "\n"
        with self.may_fail(path.name):
            self._write(path)

    def _write(self, path: Path) -> None:
        """The lines that wait for a file, whole or not at all."""
        end = path.stat().st_size if path.exists() else 0
        try:
            with writing_to(path), path.open("a", encoding="utf-8") as file:
                file.write(self._waiting[path])
        except OSError:
            with suppress(OSError):  # half a line would join the next one
                os.truncate(path, end)
            raise
        del self._waiting[path]

    def _scalars(self, prefix: str, row: dict[str, Any], iteration: int) -> None:
        for key, value in row.items():
            if isinstance(value, dict):
                self._scalars(f"{prefix}/{key}", value, iteration)
            else:
                with self.may_fail("TensorBoard's file"), writing_to(self.folder.tensorboard):
                    self._tensorboard.add_scalar(f"{prefix}/{key}", value, iteration)


def _keep_until(path: Path, iteration: int) -> None:
    if path.exists():
        kept = [row for row in read_lines(path) if row["iteration"] <= iteration]
        write_atomically(path, "".join(json_text(row) + "\n" for row in kept))
