import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgrpo.callbacks import FolderLog
from fastgrpo.reporting.pictures import save_grid
from fastgrpo.reporting.run_folder import read_lines
from fastgrpo.reporting.runlog import RunLog


def test_what_came_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    """A killed run wrote iterations 3 and half of 4 after the checkpoint of 2."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2, 3)) + '{"iter')
    log = RunLog(tmp_path, 2)
    log.metrics({"iteration": 3, "reward": 0.5, "seconds": {"rollout": 1.0}})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"iteration": 1},
        {"iteration": 2},
        {"iteration": 3, "reward": 0.5, "seconds": {"rollout": 1.0}},
    ]


def test_every_category_has_its_curve(tmp_path: Path) -> None:
    """Also one that is called as a field of the row is."""
    log = RunLog(tmp_path, 0)
    log.evaluation({"iteration": 0, "accuracy": {"overall": 0.5, "iteration": 0.25}})
    log.metrics({"iteration": 1, "reward": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["accuracy/iteration", "accuracy/overall", "train/reward"]
    assert [event.value for event in events.Scalars("accuracy/iteration")] == [0.25]


@pytest.mark.parametrize(("count", "size"), [(1, 32), (7, 32), (6, 200)])
def test_grid_shows_every_image_in_order(tmp_path: Path, count: int, size: int) -> None:
    images = np.stack([np.full((size, size, 3), 10 * (i + 1), np.uint8) for i in range(count)])
    save_grid(tmp_path / "a.png", images)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    values = picture[picture[..., 0] != 255][:, 0]
    factor = 4 if size == 32 else 1
    assert {int(v): int((values == v).sum()) for v in np.unique(values)} == {
        10 * (i + 1): (size * factor) ** 2 for i in range(count)
    }


def test_samples_are_kept_one_by_one(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    log = RunLog(tmp_path, 0)
    log.samples(20, images, [{"prompt": f"p{i}", "tag": "a", "include": []} for i in range(3)])
    log.close()
    saved = np.asarray(Image.open(tmp_path / "samples" / "00020" / "001.png"))
    assert np.array_equal(saved, images[1].permute(1, 2, 0).numpy())
    prompts = json.loads((tmp_path / "samples" / "prompts.json").read_text())
    assert prompts[2] == {"prompt": "p2", "tag": "a"} and (tmp_path / "samples" / "00020.png").exists()


def test_what_is_not_finite_is_null_and_read_again(tmp_path: Path) -> None:
    """In the lines that a later run keeps, too."""
    log = RunLog(tmp_path, 0)
    log.metrics({"iteration": 1, "grad_norm": math.inf, "rewards": {"a": math.nan}})
    log.evaluation({"iteration": 1, "accuracy": {"overall": math.nan}})
    log.summary({"final_accuracy": math.nan})
    log.close()
    RunLog(tmp_path, 1).close()
    for name in ("metrics.jsonl", "evaluations.jsonl", "summary.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"iteration": 1, "grad_norm": None, "rewards": {"a": None}}]


def test_reports_of_a_run_cost_no_more_than_in_proportion_to_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoints have one each; later ones come ever less often, and the sum of their lengths is linear."""
    lengths: list[int] = []
    monkeypatch.setattr("fastgrpo.callbacks.write_report", lambda folder: lengths.append(run.iteration))
    callback, run = FolderLog(), SimpleNamespace(iteration=0)
    callback.log = RunLog(tmp_path, 0)
    for run.iteration in range(20, 20_001, 20):
        callback.on_checkpoint(run, tmp_path)  # type: ignore[arg-type]
    assert lengths[:20] == list(range(20, 401, 20)) and sum(lengths) < 25 * 20_000
    assert all(later <= 1.05 * earlier + 20 for earlier, later in zip(lengths, lengths[1:], strict=False))
