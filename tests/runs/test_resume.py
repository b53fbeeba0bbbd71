"""Going on: on any number of processes, from another place, with what may change, and from what is damaged."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from support.runs import ForkServer, options, rows

pytestmark = pytest.mark.processes

QUICK = [
    "iterations=3", "checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=0", "evaluation.images=6",
    "evaluation.samples=0", "reward.eval=jpeg_compressibility", "update.steps_per_rollout=1",
]  # fmt: skip
# What an update's sums over ranks may round; all else comes from rollouts.
ROUNDED = ("grad_norm", "weight_change", "drift", "kl", "loss", "policy")
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """Three iterations of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    fork_server.train(folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """The same of two."""
    folder = tmp_path_factory.mktemp("two") / "run"
    fork_server.train(folder, *QUICK, ranks=2)
    return folder


def after_two(run: Path, folder: Path) -> Path:
    """A copy as if the run had ended after its second iteration; the run stays where it is."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "00003")
    for file, kept in (("metrics.jsonl", 2), ("evaluations.jsonl", 1)):
        lines = (folder / file).read_text().splitlines(keepends=True)
        (folder / file).write_text("".join(lines[:kept]))
    (folder / "summary.json").unlink()
    return folder


def flip(file: Path, where: float = 0.7) -> None:
    """One bit of a file, that far into it."""
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def assert_same_end(folder: Path, run: Path) -> None:
    assert rows(folder) == rows(run) and rows(folder, "evaluations.jsonl") == rows(run, "evaluations.jsonl")
    assert (folder / LORA).read_bytes() == (run / LORA).read_bytes()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (4, 0)])
def test_a_run_of_two_goes_on_with_any_number_and_any_stage(
    ranks: int, stage: int, pair: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The next iteration draws the same images to the last bit; what is summed over ranks agrees to float32's rounding."""
    folder = after_two(pair, tmp_path / "run")
    fork_server.train(folder, *QUICK, f"engine.zero_stage={stage}", ranks=ranks)
    expected, found = rows(pair)[2], rows(folder)[2]
    assert found.keys() == expected.keys() and found["reward"] > 0
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-5, abs=1e-9) if key in ROUNDED else value), key
    assert rows(folder)[:2] == rows(pair)[:2]


def test_full_fine_tuning_with_sharded_weights_goes_on_with_one_rank(tmp_path: Path, fork_server: ForkServer) -> None:
    full = [
        *QUICK, "model.train=full", "engine.zero_stage=3", "objective.beta=0", "rollout.cuda_graph=false", "iterations=2",
        "update.learning_rate=1e-4",
    ]  # fmt: skip
    fork_server.train(tmp_path / "two", *full, ranks=2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "00002")
    (tmp_path / "one" / "metrics.jsonl").write_text((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    fork_server.train(tmp_path / "one", *full)
    expected, found = rows(tmp_path / "two")[1], rows(tmp_path / "one")[1]
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-5, abs=1e-9) if key in ROUNDED else value), key


def test_resume_goes_on_bitwise_in_a_copy_from_an_archive(
    undisturbed: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The first place is still there, and is left as it is; `eval`, `sample` and `report` read the copy."""
    assert str(undisturbed) not in (undisturbed / "config.yaml").read_text()
    before = {file: file.read_bytes() for file in undisturbed.rglob("*") if file.is_file()}
    stopped = after_two(undisturbed, tmp_path / "stopped")
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(stopped, "somewhere/run")
    shutil.rmtree(stopped)
    with tarfile.open(tmp_path / "run.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "somewhere" / "run"
    fork_server.run("resume", str(folder), "--set", "checkpoint.keep=1")
    assert_same_end(folder, undisturbed)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00003"]
    assert "output: ./" in (folder / "config.yaml").read_text()
    assert {file: file.read_bytes() for file in undisturbed.rglob("*") if file.is_file()} == before
    fork_server.run("eval", str(folder), "--set", "evaluation.images=2")
    fork_server.run("sample", str(folder), "--prompt", "a red circle", "--output", str(tmp_path / "a.png"))
    (folder / "report.html").unlink()
    fork_server.run("report", str(folder))
    assert (tmp_path / "a.png").is_file() and (folder / "report.html").is_file()
    fork_server.run("verify", str(folder))


def test_a_change_of_what_is_computed_is_refused_with_the_list_of_what_may(
    undisturbed: Path, fork_server: ForkServer
) -> None:
    printed = fork_server.run("resume", str(undisturbed), "--set", "seed=1", status=2)
    assert "seed: 0 -> 1" in printed and "Traceback" not in printed
    assert "docs/configuration.md" in printed and "iterations, output, model.path" in printed
    printed = fork_server.run("resume", str(undisturbed), "--set", "output=/elsewhere", status=2)
    assert "error: --set output=/elsewhere: a run goes on in its own folder" in printed


def test_a_moved_run_of_prompts_that_were_handed_in_takes_them_along(tmp_path: Path, fork_server: ForkServer) -> None:
    settings = {"prompts": ["a red circle", "two blue squares"], "held_out": ["a green triangle"]}
    overrides = [*QUICK, "prompts.weights={}", "iterations=1", "reward.train=jpeg_compressibility"]
    arguments = [json.dumps(settings), *options(tmp_path / "first", *overrides)]
    fork_server.run(*arguments, program="support.saving_worker:main")
    moved = (tmp_path / "first").rename(tmp_path / "second")
    config = (moved / "config.yaml").read_text()
    assert "train: ./prompts_train.jsonl" in config and "eval: ./prompts_eval.jsonl" in config
    fork_server.run("resume", str(moved), "--set", "iterations=2")
    assert len(rows(moved)) == 2 and not (tmp_path / "first").exists()
    assert "2 prompts, the hash agrees" in fork_server.run("verify", str(moved))


def test_from_a_damaged_checkpoint_and_with_lost_lines_a_run_ends_with_the_same_numbers(
    undisturbed: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The newest one is set aside and the older one taken; the lines that are gone are said, and only those are missing."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    flip(folder / "checkpoints" / "00003" / "rank_00000.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[1:]))
    printed = fork_server.run("resume", str(folder))
    assert "warning: a damaged checkpoint was set aside as" in printed and "00003.damaged" in printed
    assert "metrics.jsonl has no line of iteration 1: their numbers are lost" in printed
    assert rows(folder) == rows(undisturbed)[1:]
    assert (folder / LORA).read_bytes() == (undisturbed / LORA).read_bytes()
    said = fork_server.run("verify", str(folder), status=1)
    assert "no line of iteration 1" in said and "checkpoints/00003.damaged" in said and said.count("FAULT") == 2


def test_a_finished_run_whose_lines_are_lost_says_so_and_keeps_its_summary(
    undisturbed: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The evaluation of the base is made again, and is that of the base wherever its line stands."""
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "evaluations.jsonl").write_text("".join(lines[1:]))
    printed = fork_server.run("resume", str(tmp_path / "run"))
    assert "metrics.jsonl has no line of iterations 1, 2, 3: their numbers are lost" in printed
    summaries = [json.loads((run / "summary.json").read_text()) for run in (undisturbed, tmp_path / "run")]
    assert summaries[0] == summaries[1]
