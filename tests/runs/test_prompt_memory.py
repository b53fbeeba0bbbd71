"""What a run holds of its prompts: a row a prompt on the device, what it will draw on disk, the next ones read ahead."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.plain_trainer import BATCH, CONFIG, GROUPS, SIZE, SMALL, trainer_of

from fastgrpo.commands.plan import Counts, memory, prompt_rows
from fastgrpo.config.schema import ConfigError
from fastgrpo.data.prompts import prompts_of_iteration, prompts_of_run
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

FEW = ("iterations=2", "evaluation.images=5", "evaluation.images_between=5", "evaluation.num_steps=2")


def batches_of(trainer: Trainer) -> list:
    """The batches that an iteration to come will update on."""
    found, update = [], trainer.updater.update

    def record(iteration, batches, advantages, pairs):
        found.extend(batches)
        return update(iteration, batches, advantages, pairs)

    trainer.updater.update = record
    return found


def nbytes(conditioning: tuple) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in conditioning)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scale", [1, 3])
def test_the_plan_counts_what_a_trainer_holds_of_its_prompts(scale: int, rank: int, tmp_path: Path) -> None:
    """Two ranks with one and a half prompts each: the rows of an iteration, and what the network reads in a pass."""
    trainer = trainer_of(tmp_path, f"rollout.guidance_scale={scale}", rank=rank, ranks=2)
    batches, read = batches_of(trainer), {False: 0, True: 0}  # whether in the update -> the most bytes in a pass

    def look(network: torch.nn.Module, arguments: tuple) -> None:
        read[torch.is_grad_enabled()] = max(read[torch.is_grad_enabled()], nbytes(arguments[2]))

    trainer.engine.policy.register_forward_pre_hook(look)
    trainer.iterate(1)
    tables = {id(batch.prompted.rows): batch.prompted.rows for batch in batches}
    assert len(batches) == GROUPS * SIZE // 2 // BATCH == 2 and len(tables) == 1
    (rows,) = tables.values()
    assert len(rows[0]) == 2 + (scale != 1)  # one and a half prompts are of two

    one = sum(tensor.nbytes for tensor in trainer.model.encode([""]))
    counts = Counts(**dict.fromkeys(Counts.__dataclass_fields__, 0) | {"conditioning_bytes": one})
    planned = memory(trainer.config, counts, gpus=2, stage=1)
    assert planned.held["prompts"] == nbytes(rows)
    assert (planned.phases["rollout"], planned.phases["update"]) == (read[False], read[True])


@pytest.mark.parametrize(
    ("settings", "gpus", "rows"),
    [
        ([], 1, GROUPS),
        ([], GROUPS, 1),
        ([], 4, 2),  # three samples each, of groups of four
        (["rollout.guidance_scale=3"], 1, GROUPS + 1),
        (["model.name=flux_kontext", "model.distilled_guidance=2.5", "rollout.guidance_scale=3"], 1, 2 * GROUPS),
    ],
)
def test_rows_of_an_iteration(settings: list[str], gpus: int, rows: int) -> None:
    assert prompt_rows(load_config(CONFIG, [*SMALL, *settings]), gpus) == rows


@pytest.mark.parametrize(("name", "gpus", "rows"), [("sft", 1, GROUPS * SIZE), ("dpo", 4, 2)])
def test_rows_of_an_iteration_of_images_that_are_there(name: str, gpus: int, rows: int) -> None:
    """Each image has a prompt of its own, and the two of a pair have one."""
    config = load_config(CONFIG, SMALL)
    assert prompt_rows(replace(config, objective=replace(config.objective, name=name, offline=True)), gpus) == rows


def test_what_a_run_draws_is_what_its_iterations_draw() -> None:
    for probabilities in (None, torch.tensor([0.0] + [1 / 19] * 19).double().numpy()):
        for last in (1, 3, 50):
            found = prompts_of_run(20, 3, range(last), 7, probabilities)
            each = [set(prompts_of_iteration(20, 3, i, 7, probabilities)) for i in range(last)]
            assert found.tolist() == sorted(set().union(*each))
    assert len(prompts_of_run(20, 3, range(50), 7)) == 20


def test_the_cache_holds_what_the_run_draws_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is encoded once the run has begun; the images are those of a run without a cache."""
    cached = trainer_of(tmp_path / "a", *FEW, f"prompts.cache={tmp_path / 'cache'}", "rollout.guidance_scale=3")
    plain = trainer_of(tmp_path / "b", *FEW, "rollout.guidance_scale=3")
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    drawn = {record["prompt"] for i in (1, 2) for record in cached.draws.records(i)}
    held_out = {cached.parts.held_out.prompts[i] for count in (5, 2) for i in cached.evaluator.order(count)}
    assert len(files) == len(drawn | held_out | {""}) < len(cached.prompts)
    monkeypatch.setattr(cached.model, "encode", None)
    for iteration in (1, 2):
        rows = [trainer.iterate(iteration) for trainer in (cached, plain)]
        assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}
    cached.evaluate(2)


def test_the_next_prompts_are_read_beside_the_update(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a", *FEW, f"prompts.cache={tmp_path / 'cache'}")
    trainer.iterate(1)
    trainer.embeddings.wait()
    assert {record["prompt"] for record in trainer.draws.records(2)} <= {key.prompt for key in trainer.embeddings.in_memory}


def test_a_cache_for_which_there_is_no_room_is_refused_before_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1e3}))
    with pytest.raises(ConfigError, match=r"prompts\.cache = .*cache: embeddings of \d+ prompts take about .* GB are free"):
        trainer_of(tmp_path / "a", *FEW, f"prompts.cache={tmp_path / 'cache'}")
