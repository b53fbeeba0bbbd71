"""However a run ends, its last whole iteration is on the disk, and nothing of a broken one: as a user meets it."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.helpers import ROOT
from support.runs import ForkServer, options, rows, rows_so_far, start

pytestmark = pytest.mark.processes

RARE = ["checkpoint.every=1000", "evaluation.every=0", "evaluation.images=6", "reward.eval=jpeg_compressibility"]
WEIGHTS = ROOT / "fastgrpo" / "tiny" / "weights"
# The child of a process that ignores SIGINT ignores it too, as what a shell runs in the background does.
KEEPING_SIGINT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastgrpo.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


def state_of(folder: Path) -> tuple[list[str], int]:
    """The checkpoints, and the iteration that the LoRA in the folder says to be of."""
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return checkpoints, json.loads((folder / "trained.json").read_text())["iteration"]


def wait_for_lines(process, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(rows_so_far(folder)) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_is_done(number: signal.Signals, tmp_path: Path) -> None:
    """One line, and the status that shells give for the signal."""
    process = start([sys.executable, "-c", KEEPING_SIGINT, "train", *options(tmp_path, *RARE, "iterations=1000")])
    wait_for_lines(process, tmp_path, 2)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=100)
    done = len(rows(tmp_path))
    assert process.returncode == 128 + number and "Traceback" not in printed
    assert f"stopped by {number.name}; the state after iteration {done} is saved; the same command goes on" in printed
    assert state_of(tmp_path) == ([f"{done:05d}"], done)
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "lock.json").exists()


FAILING = "support.failing_rewards:Failing"


def failing(kind: str, rank: int | None = None, calls: int = 8) -> list[str]:
    settings = json.dumps({FAILING: {"kind": kind, "rank": rank, "calls": calls}})
    return [*RARE, f"reward.train={FAILING}", f"reward.settings={settings}", "update.steps_per_rollout=1"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "returned nan for the prompt '"), ("infinite", "returned inf for the prompt '"),
        ("none", "returned NoneType None"),
        ("strings", "returned a list with '0.5' for the prompt '"), ("few", "returned shape (3,) for 4 images, not (B,)"),
        ("error", "failed: ZeroDivisionError: division by zero"), ("memory", "failed: RuntimeError: "),
        ("exit", "failed: SystemExit: 0"), ("hang", "gave no scores for 4 images within reward.timeout = 1 s"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_costs_nothing_that_was_learned(
    kind: str, words: str, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Of whatever kind: one line names it with the prompts, and the state after the last whole iteration is saved."""
    printed = fork_server.train(tmp_path, *failing(kind), "reward.timeout=1", status=70)
    told = [line for line in printed.splitlines() if line.startswith("error: reward")]
    assert len(told) == 1 and told[0].startswith(f"error: reward '{FAILING}' {words}") and "prompt" in told[0]
    assert told[0].endswith("; the state after iteration 2 is saved; when the reward is mended, the same command goes on")
    # The traceback is of the reward's own code, and there is one only where that raised.
    assert ("failing_rewards.py" in printed) == (kind in ("error", "memory", "exit")) and "trainer.py" not in printed
    assert state_of(tmp_path) == (["00002"], 2) and len(rows(tmp_path)) == 2
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "lock.json").exists()


def test_an_error_of_a_reward_on_one_rank_is_that_of_all(tmp_path: Path, fork_server: ForkServer) -> None:
    printed = fork_server.train(tmp_path, *failing("error", rank=1, calls=4), ranks=2, status=70)
    assert printed.count("the state after iteration 2 is saved") == 1
    assert state_of(tmp_path) == (["00002"], 2) and len(rows(tmp_path)) == 2


def test_scores_that_are_not_finite_can_count_as_the_worst(tmp_path: Path, fork_server: ForkServer) -> None:
    fork_server.train(tmp_path, *failing("nan"), "reward.not_finite=worst", "iterations=3")
    assert len(rows(tmp_path)) == 3 and all(row["reward"] > 0 for row in rows(tmp_path))
    printed = fork_server.train(
        tmp_path / "all", *failing("infinite", calls=0), "reward.not_finite=worst", "iterations=1", status=70
    )
    assert "gave no finite score for any of 16 images" in printed


@pytest.mark.parametrize(
    ("kind", "ranks", "status", "words"),
    [
        ("hang", 0, 143, "stopped by SIGTERM; the state after iteration 2 is saved"),
        ("in the update", 0, 1, "ZeroDivisionError: division by zero"),
        ("exit", 0, 1, "RuntimeError: sys.exit(0) was called in a run that is not finished"),
        ("out of memory", 0, 71, "error: CUDA out of memory. Tried to allocate 2.00 GiB.; the state after iteration 2 is"),
        ("out of memory", 2, 71, "error: CUDA out of memory. Tried to allocate 2.00 GiB. (on rank 1); the state after"),
        ("code", 2, 1, "error: on rank 1: KeyError: 'nothing'; the state after iteration 2 is saved"),
        ("hang", 2, 143, "stopped by SIGTERM (on rank 1); the state after iteration 2 is saved"),
    ],
)  # fmt: skip
def test_every_ending_saves_the_last_whole_iteration(
    kind: str, ranks: int, status: int, words: str, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Also in the middle of an update, where the thread of the run cannot end it, and where the other rank only waits."""
    train = [kind, *options(tmp_path, *RARE, "checkpoint.grace=6", "engine.lost_after=5")]
    printed = fork_server.run(*train, program="support.ending_worker:main", ranks=ranks, status=status)
    assert words in printed and "the state after iteration 2 is saved" in printed
    assert state_of(tmp_path) == (["00002"], 2) and len(rows(tmp_path)) == 2
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize(("kind", "status"), [("stop", 76), ("kill", -9)])
def test_a_rank_that_is_lost_ends_the_others_in_time_and_leaves_the_last_checkpoint(
    kind: str, status: int, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Its part of the optimiser's state is lost with it."""
    settings = [*RARE, "engine.lost_after=5", "checkpoint.every=1"]
    printed = fork_server.run(
        kind, *options(tmp_path, *settings), program="support.ending_worker:main", ranks=2, status=status
    )
    words = "rank 1 of 2 gives no sign of life for 5 s" if kind == "stop" else "the link to another rank broke"
    assert f"error: {words}" in printed
    done = state_of(tmp_path)[1]  # the checkpoint of the second iteration was being written
    assert done in (1, 2) and f"the state after iteration {done} is saved" in printed


def test_a_full_disk_ends_no_run_and_the_state_is_saved_when_there_is_room(tmp_path: Path, fork_server: ForkServer) -> None:
    settings = [*RARE, "checkpoint.every=2", "iterations=6"]
    train = ["no room for an iteration", *options(tmp_path, *settings)]
    printed = fork_server.run(*train, program="support.ending_worker:main")
    assert "warning: the state after iteration 4 is not saved: [Errno 27] File too large" in printed
    assert state_of(tmp_path)[0][-1] == "00006" and len(rows(tmp_path)) == 6
    assert (tmp_path / "report.html").stat().st_size > 20_000


def test_a_disk_that_stays_full_is_named_and_the_older_checkpoint_is_whole(tmp_path: Path, fork_server: ForkServer) -> None:
    train = ["no room", *options(tmp_path, *RARE, "checkpoint.every=2", "iterations=4")]
    printed = fork_server.run(*train, program="support.ending_worker:main", status=74)
    assert "error: [Errno 27] File too large" in printed and "the state after iteration 2 is saved" in printed
    assert state_of(tmp_path) == (["00002"], 2)
    fork_server.train(tmp_path, *RARE, "checkpoint.every=2", "iterations=4")
    assert state_of(tmp_path) == (["00002", "00004"], 4) and len(rows(tmp_path)) == 4


def with_nan(folder: Path, part: str, name: str) -> Path:
    """The embedded model with one weight that is no number."""
    shutil.copytree(WEIGHTS, folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "name"),
    [("transformer", "proj_out.weight"), ("vae", "decoder.conv_out.weight"), ("text_encoder", "text_projection.weight")],
)
def test_a_base_with_numbers_that_are_none_is_refused(part: str, name: str, tmp_path: Path, fork_server: ForkServer) -> None:
    """Before anything is trained or drawn: the part and the parameter are named."""
    model = with_nan(tmp_path / "model", part, name)
    printed = fork_server.train(tmp_path / "run", *RARE, f"model.path={model}", status=2)
    assert f"error: model.path = {model}: {part}: {name} is not finite in 1 of " in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_run_in_a_folder_is_refused_and_the_first_is_undisturbed(tmp_path: Path, fork_server: ForkServer) -> None:
    process = start([sys.executable, "-m", "fastgrpo", "train", *options(tmp_path, *RARE, "iterations=1000")])
    try:
        wait_for_lines(process, tmp_path, 1)
        printed = fork_server.train(tmp_path, *RARE, "iterations=1000", status=2)
        assert f"error: output = {tmp_path}: in use by process {process.pid} on " in printed and "Traceback" not in printed
        before = len(rows(tmp_path))
        wait_for_lines(process, tmp_path, before + 1)
    finally:
        process.kill()
        process.communicate()
    found = [row["iteration"] for row in rows(tmp_path)]
    assert found == list(range(1, len(found) + 1))


def test_other_prompts_are_refused_and_other_weights_are_written_again(tmp_path: Path, fork_server: ForkServer) -> None:
    prompts = tmp_path / "p.txt"
    settings = [*RARE, f"prompts.train={prompts}", "prompts.weights={}", "reward.train=jpeg_compressibility"]
    prompts.write_text("a\nb\nc\nd\n")
    fork_server.train(tmp_path / "run", *settings, "iterations=1")
    prompts.write_text("a\nb\nc\ne\n")
    printed = fork_server.train(tmp_path / "run", *settings, "iterations=2", status=2)
    assert "its run was trained with another content of prompts.train" in printed
    prompts.write_text("a\n\nb\nc\nd\n")  # the same prompts
    fork_server.train(tmp_path / "run", *settings, "iterations=2")
    assert len(rows(tmp_path / "run")) == 2 and state_of(tmp_path / "run") == (["00001", "00002"], 2)
    # As after a kill between a checkpoint and what is handed out.
    lora = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    whole = lora.read_bytes()
    lora.write_bytes(whole[:-8] + bytes(8))
    fork_server.train(tmp_path / "run", *settings, "iterations=2")
    assert lora.read_bytes() == whole
