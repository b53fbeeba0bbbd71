"""The engine against plain torch, in one and in two processes: one launch of `engine_worker.py` runs all."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import engine_worker
from support.engine_worker import CASES, DTYPES, ELSEWHERE, FRESH, MAX_GRAD_NORM, MORE_UPDATES, UPDATES
from support.helpers import distance, environment
from torch import nn

from fastgrpo.engine import ranks as ranks_module
from fastgrpo.engine import zero as engine_module
from fastgrpo.engine.checkpoint import check_files
from fastgrpo.engine.checkpoint_folders import latest_checkpoint
from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import OneRank
from fastgrpo.engine.shards import SavedShards
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.ema import Ema, warmed_up

# Relative: of a loss, of a norm of the gradient, of the distance that the weights went in all updates.
# bfloat16: half a batch sums in another order, and a rounding error in one weight of a block feeds the next.
TOLERANCE = {"float32": (1e-6, 1e-6, 3e-6), "bfloat16": (2e-4, 3e-3, 5e-3)}
WORKER = Path(engine_worker.__file__)
RUNS = [(world_size, *case) for world_size in (1, 2) for case in CASES]


def launch(world_size: int, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One process is started plainly, without a launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *(torchrun if world_size > 1 else []), str(WORKER), *args]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, list[dict[Any, Any]]]:
    """What the ranks saw, by world size."""
    killed = launch(2, "train", str(folder))
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr[-3000:]
    # No compiler, no ninja, nothing that was compiled before.
    alone = launch(1, "train", str(folder), PATH="/none", TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert alone.stdout == "" and not (folder / "extensions").exists(), alone.stdout
    return {
        world_size: [torch.load(folder / f"train-{world_size}-{rank}.pt") for rank in range(world_size)]
        for world_size in (1, 2)
    }


@pytest.fixture(scope="module")
def unfinished(folder: Path, trained: Any) -> dict[str, Any]:
    """What lies there after a rank was killed in a save, before anything is loaded or saved again."""
    root = folder / "world2" / "1-float32"
    return {"names": sorted(path.name for path in root.iterdir()), "latest": latest_checkpoint(root)}


@pytest.fixture(scope="module")
def resumed(folder: Path, unfinished: Any) -> list[dict[Any, Any]]:
    done = launch(2, "resume", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"resume-2-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def elsewhere(folder: Path, trained: Any) -> dict[int, list[dict[Any, Any]]]:
    """What one rank and what four saw that went on from the checkpoint of two, by world size."""
    done = launch(4, "elsewhere", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return {1: trained[1], 4: [torch.load(folder / f"elsewhere-4-{rank}.pt") for rank in range(4)]}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {name: engine_worker.reference(dtype) for name, dtype in DTYPES.items()}


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank_*.safetensors"))


def relative(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("world_size, stage, dtype", RUNS)
def test_equals_plain_torch(world_size: int, stage: int, dtype: str, trained: Any, references: Any) -> None:
    reference = references[dtype]
    of_loss, of_norm, of_weights = TOLERANCE[dtype]
    assert min(reference["norms"]) > MAX_GRAD_NORM, "nothing is clipped"
    for seen in (rank[stage, dtype] for rank in trained[world_size]):
        assert relative(seen["losses"], reference["losses"]) < of_loss
        assert relative(seen["norms"], reference["norms"]) < of_norm
        went = distance(reference["state"], reference["start"])
        assert distance(seen["state"], reference["state"]) < of_weights * went
        assert all(tensor.dtype == torch.float32 for tensor in seen["state"].values())


@pytest.mark.processes
@pytest.mark.parametrize("world_size, stage, dtype", RUNS)
def test_rollout_swapping_and_collectives(world_size: int, stage: int, dtype: str, trained: Any) -> None:
    for rank in trained[world_size]:
        checks = rank[stage, dtype]["checks"]
        assert len(checks) == 18 and not [name for name, passed in checks.items() if not passed]


@pytest.mark.processes
@pytest.mark.parametrize("stage, dtype", CASES)
def test_goes_on_exactly(stage: int, dtype: str, trained: Any, resumed: Any) -> None:
    for before, after in zip(trained[2], resumed, strict=True):
        uninterrupted, continued = before[stage, dtype], after[stage, dtype]
        assert continued["iteration"] == UPDATES
        assert engine_worker.same(continued["state"], uninterrupted["state"])
        assert len(continued["more"]) == MORE_UPDATES * engine_worker.MICRO_BATCHES
        assert continued["more"] == uninterrupted["more"]
        assert engine_worker.same(continued["final"], uninterrupted["final"])
        assert distance(continued["final"], continued["state"]) > 0
        for name, average in continued["ema"].items():
            torch.testing.assert_close(average, uninterrupted["state"][name] + 0.9)


@pytest.mark.processes
@pytest.mark.parametrize("world_size, stages, dtype", ELSEWHERE)
def test_goes_on_with_other_ranks_and_stages(
    world_size: int, stages: tuple[int, int], dtype: str, trained: Any, elsewhere: Any, folder: Path
) -> None:
    uninterrupted = trained[2][0][stages[0], dtype]
    for rank in elsewhere[world_size]:
        seen = rank[world_size, stages, dtype]
        assert engine_worker.same(seen["state"], uninterrupted["state"])
        assert seen["in place"] or stages[1] == 3
        assert relative(seen["more"], uninterrupted["more"]) < TOLERANCE[dtype][0]
    before = SavedShards(shards_in(engine_worker.saved_by_two(folder, stages[0], dtype)))
    after = SavedShards(shards_in(folder / f"world{world_size}" / engine_worker.saved_again(stages, dtype)))
    assert before.numbers == after.numbers and after.numbers["optimizer_steps"] == UPDATES
    for name, shape in before.numbers["shapes"].items():
        for key in (f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq")):
            values = before.read(key, 0, math.prod(shape))
            assert torch.equal(values, after.read(key, 0, math.prod(shape))) and values.count_nonzero() > 0


@pytest.mark.processes
@pytest.mark.parametrize("world_size, stage, dtype", FRESH)
def test_a_state_from_before_the_first_update(world_size: int, stage: int, dtype: str, elsewhere: Any) -> None:
    for rank in elsewhere[world_size]:
        checks = rank[world_size, stage, dtype]
        assert len(checks) > 60 and not [name for name, passed in checks.items() if not passed]


@pytest.mark.processes
def test_a_rank_killed_in_a_save(unfinished: Any, resumed: Any, folder: Path) -> None:
    killed, complete = f"{UPDATES + 1:05d}", f"{UPDATES:05d}"
    assert unfinished["names"] == [complete, f"{killed}.partial"] and unfinished["latest"].name == complete
    root = folder / "world2" / "1-float32"
    assert sorted(path.name for path in root.iterdir()) == [complete, killed]
    check_files(root / killed)


OPTIONS = {"zero_stage": 1, "dtype": torch.float32, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"zero_stage": 4}, "zero_stage 4 is unknown; use 0, 1, 2 or 3"),
        ({"dtype": torch.float64}, "float64 is not for training; use float32"),
        ({"zero_stage": 0, "dtype": torch.bfloat16}, "not plain AdamW in DeepSpeed; use 1, or float32"),
    ],
)
def test_options_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(nn.Linear(2, 2), OneRank(), EngineOptions(**OPTIONS | changed))


def test_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the policy requires a gradient"):
        Engine(nn.Linear(2, 2).requires_grad_(False), OneRank(), EngineOptions(**OPTIONS))
    with pytest.raises(ValueError, match="weight is trained in torch.bfloat16.*make it float32"):
        Engine(nn.Linear(2, 2).bfloat16(), OneRank(), EngineOptions(**OPTIONS))


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="float16 needs CUDA; on a CPU use float32 or bfloat16"):
        Engine(nn.Linear(2, 2), OneRank(), EngineOptions(**OPTIONS | {"dtype": torch.float16}))


def test_float16_starts_at_2_to_the_24_and_each_overflow_halves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By DeepSpeed's own reading of its configuration, and its own scaler."""
    ranks_module.load_deepspeed()
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    options = EngineOptions(**OPTIONS | {"dtype": torch.float16})
    read = DeepSpeedFP16Config(**options.deepspeed_config([nn.Parameter(torch.zeros(2))])["fp16"])
    assert read.enabled and read.loss_scale == 0  # which stands for a scale that moves
    scaler = loss_scaler.CreateLossScaler(torch.float16, 0, True, read.dynamic_loss_scale_args())
    scales = [scaler.loss_scale]
    for overflow in (True, True, False, True):
        scaler.update_scale(overflow)
        scales.append(scaler.loss_scale)
    assert scales == [2.0**24, 2.0**23, 2.0**22, 2.0**22, 2.0**21]
    for _ in range(1001):
        scaler.update_scale(False)
    assert scaler.loss_scale == 2.0**22


def test_a_deepspeed_without_the_switch_is_told() -> None:
    with pytest.warns(UserWarning, match="it may compile it now"):
        ranks_module.disable_shm_op(SimpleNamespace(ops=SimpleNamespace(), __version__="1"))


def test_other_weights_are_told_by_name() -> None:
    with pytest.raises(ValueError, match=r"here: b has shape \[4\], that of the policy \[2\]; use the same"):
        engine_module.check_shapes("here", {"a": [1], "b": [4]}, {"a": [1], "b": [2]})
    with pytest.raises(ValueError, match=r"b has shape None, that of the policy \[2\]"):
        engine_module.check_shapes("here", {"a": [1]}, {"a": [1], "b": [2]})


def test_ema() -> None:
    """Against the sum written out: the first decays are 1/10, 2/11, 3/12, then 0.3."""
    values = [torch.randn(3, dtype=torch.float64) for _ in range(6)]
    ema = Ema({"w": values[0].float()}, warmed_up(0.3))
    wanted = values[0]
    for value, decay in zip(values[1:], (0.1, 2 / 11, 0.25, 0.3, 0.3), strict=True):
        ema.update({"w": value.to(torch.float32)})
        wanted = decay * wanted + (1 - decay) * value
    torch.testing.assert_close(ema.weights["w"].double(), wanted, rtol=1e-6, atol=1e-6)
    again = Ema({"w": torch.zeros(3)}, warmed_up(0.3))
    again.load_state_dict(ema.state_dict())
    again.update({"w": values[0].float()})
    ema.update({"w": values[0].float()})
    assert torch.equal(again.weights["w"], ema.weights["w"]) and again.updates == 6
    with pytest.raises(ValueError, match="decay 1.0 must be at least 0 and below 1"):
        warmed_up(1.0)
