"""What the bounds of the configuration's keys allow at their ends, tests/config/test_bounds.py, also runs."""

import json
import math
from pathlib import Path

import pytest
from support.runs import command, rows, run

pytestmark = pytest.mark.processes


def test_the_extremes_of_the_keys_train_together(tmp_path: Path) -> None:
    """No samples, no clips, no decay, the largest seed: the run ends with its report."""
    settings = [
        f"seed={2**32 - 1}", "iterations=2", "evaluation.samples=0", "evaluation.every=0", "checkpoint.every=10000000",
        "advantage.adv_clip_max=1e300", "objective.clip_range=1e300", "update.max_grad_norm=1e300", "objective.beta=0",
        "update.betas=[0, 0]", "update.weight_decay=0", "update.ema_decay=0", "update.final_learning_rate=0",
        "engine.zero_stage=0",
    ]  # fmt: skip
    run(command(tmp_path, *settings))
    trained = rows(tmp_path)
    assert len(trained) == 2 and all(math.isfinite(row["loss"]) and row["clip_fraction"] == 0 for row in trained)
    assert [row["iteration"] for row in rows(tmp_path, "evaluations.jsonl")] == [0, 2]
    assert "There are no samples." in (tmp_path / "report.html").read_text()
    assert not list((tmp_path / "samples").iterdir())
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
