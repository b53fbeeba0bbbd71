"""Every objective through a trainer under DeepSpeed, in one child process, and what a configuration refuses of them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT, environment
from support.objective_worker import ITERATIONS, RUNS

from fastgrpo.config.schema import ConfigError
from fastgrpo.learning.updater import learning_rate
from fastgrpo.testing import load_family
from fastgrpo.validation import load_config

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
ODE = ["rollout.sampler=ode"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("objectives")
    load_family("sd3").save(folder / "sd3")
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "objective_worker.py"),
        str(folder / "sd3"),
        str(folder / "out"),
        *RUNS,
    ]
    env = environment(ROOT / "tests")
    child = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stderr[-3000:]
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in found}


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_it_trains(runs: dict[str, dict], name: str) -> None:
    rows = runs[name]["rows"]
    assert len(rows) == ITERATIONS and runs[name]["moved"] > 1e-3
    for row in rows:
        assert all(math.isfinite(row[key]) for key in ("loss", "kl", "grad_norm", "ratio_mean"))
        assert row["grad_norm"] > 0 and ("reward" in row) == ("offline" not in name)


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("nft", "dpo", "dpo offline")])
def test_the_first_update_of_every_rollout_is_exactly_on_policy(runs: dict[str, dict], name: str) -> None:
    assert [row["first_ratio_deviation"] for row in runs[name]["rows"]] == [0.0] * ITERATIONS


@pytest.mark.processes
def test_the_old_policy_lags_behind(runs: dict[str, dict]) -> None:
    """It is the trained one at first, by the schedule; from then on it samples, and is not the trained one any more."""
    deviations = [row["first_ratio_deviation"] for row in runs["nft"]["rows"]]
    assert deviations[:2] == [0.0, 0.0] and min(deviations[2:]) > 0
    assert 0 < runs["nft"]["lag"] < runs["nft"]["moved"]


@pytest.mark.processes
def test_dpo_starts_from_the_reference(runs: dict[str, dict]) -> None:
    """There all pairs are even, -log sigmoid(0); here 4 of each group's 8 possible pairs are compared."""
    first = runs["dpo"]["rows"][0]
    assert first["first_ratio_deviation"] == 0.0 and first["loss"] < math.log(2)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["sft offline", "dpo offline"])
def test_given_images_are_learned(runs: dict[str, dict], name: str) -> None:
    losses = [row["loss"] for row in runs[name]["rows"]]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.name=nft"], r"rollout\.sampler = 'flow_sde': nft trains on what the ODE ends with"),
        (["objective.name=awm", *ODE, "forward.num_timesteps=4"], r"forward\.num_timesteps = 4: there are 2"),
        (["objective.name=awm", *ODE, "forward.range=[3, 12]"], r"forward\.range = \(3, 12\): must lie in \[0, 6\]"),
        (["objective.offline=true"], r"objective\.offline = True: only sft and dpo learn"),
        (["objective.name=sft", *ODE, "objective.offline=true"], r"weights = .* existing images are drawn equally often"),
        (["objective.name=nft", *ODE, "objective.offline=true"], r"objective\.offline = True: only sft and dpo learn"),
        (["objective.name=dpo", *ODE, "rollout.batch_size=8"], r"rollout\.batch_size = 8: dpo compares samples of a group"),
        (["forward.old_policy.limit=0.5"], r"forward\.old_policy\.limit = 0\.5: clip takes the transitions of the trained"),
        (["objective.settings={delta: 1}"], r"objective\.settings\.delta: objective 'clip' has no settings"),
        (["objective.name=dppo", "objective.settings={dleta: 1}"], r"objective\.settings\.dleta: unknown key; did you mean"),
        (["objective.name=guard", "rollout.sampler=cps", "objective.log_prob_weight=cps_reference"], "guard normalises"),
        (["objective.name=nft", *ODE, "objective.settings={adv_clip_max: 1}"], r"set advantage\.adv_clip_max"),
        ([*ODE, "objective.name=nft", "rollout.shared_noise=true"], r"a group's images would all be the same"),
        (["update.inner_epochs=0"], r"update\.inner_epochs = 0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, settings)


def test_the_learning_rate_falls_in_a_straight_line() -> None:
    config = load_config(CONFIG, ["iterations=5", "update.learning_rate=1e-3", "update.final_learning_rate=2e-4"])
    found = [learning_rate(config, iteration) for iteration in range(1, 6)]
    assert found == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    same = load_config(CONFIG, ["update.learning_rate=3e-4", "update.final_learning_rate=null"])
    assert learning_rate(same, 3) == 3e-4


def test_offline_data_is_looked_at_first(tmp_path: Path) -> None:
    from fastgrpo.data.prompts import load_prompts

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "chosen": "a.png"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:1: chosen .*a\.png: no such file"):
        load_prompts(tmp_path / "data.jsonl", ("chosen", "rejected"))
    with pytest.raises(ValueError, match=r"holds no images \(\.png"):
        load_prompts(tmp_path, ("target",))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: has no caption; write it to a\.txt beside it"):
        load_prompts(tmp_path, ("target",))
    (tmp_path / "a.txt").write_text("a circle\n")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        load_prompts(tmp_path, ("target",))
