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
    assert f"stopped by {number.name}: the state after iteration {done} is saved; the same command goes on" in printed
    assert state_of(tmp_path) == ([f"{done:05d}"], done)
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize(("reward", "ranks"), [("alone", 0), ("on_rank_1", 2)])
def test_an_error_of_a_reward_saves_what_is_done(reward: str, ranks: int, tmp_path: Path, fork_server: ForkServer) -> None:
    """Of whatever kind, also where one rank alone has it; the mended reward goes on."""
    train = f"reward.train=support.failing_rewards:{reward}"
    printed = fork_server.train(tmp_path, *RARE, train, "update.steps_per_rollout=1", ranks=ranks, status=1)
    assert "the state after iteration 2 is saved" in printed
    assert state_of(tmp_path) == (["00002"], 2) and len(rows(tmp_path)) == 2


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
