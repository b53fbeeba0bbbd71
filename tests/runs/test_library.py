"""fastgrpo as a library: what is handed in as an object is what runs, and is on record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT, environment
from support.runs import SMALL, rows

import fastgrpo
from fastgrpo.data.prompts import load_prompts
from fastgrpo.validation import load_config

pytestmark = pytest.mark.processes

PROMPTS = ["a red circle", {"prompt": "two blue squares", "tag": "counting"}]
HELD_OUT = ["a green triangle"]
USER = f"""
import json, sys, torch
import fastgrpo
from fastgrpo.models import load_model

def redness(images, prompts, metadata):
    seen.update(prompts)
    pixels = images.float() / 255
    return pixels[:, 0].mean((1, 2)) - pixels[:, 1:].mean((1, 2, 3))

class Watch(fastgrpo.Callback):
    def on_start(self, trainer): events.append(["start", trainer.iteration])
    def on_iteration(self, trainer, metrics): events.append(["iteration", metrics["iteration"]])
    def on_evaluation(self, trainer, row, samples): events.append(["evaluation", row["iteration"], len(samples[0])])
    def on_checkpoint(self, trainer, folder): events.append(["checkpoint", trainer.saved])
    def on_end(self, trainer, summary): events.append(["end", summary["iterations"]])

folder, iterations = sys.argv[1], int(sys.argv[2])
overrides = {SMALL!r} + ["output=" + folder, "prompts.weights={{}}", "rollout.groups=2", f"iterations={{iterations}}"]
config = fastgrpo.load_config("configs/tiny_shapes_grpo.yaml", overrides)
model = load_model("sd3", path=config.model.path, dtype=torch.float32, device=torch.device("cpu"), max_text_tokens=1)
seen, events = set(), []
trainer = fastgrpo.Trainer(
    config, model=model, reward=redness, prompts={PROMPTS!r}, held_out={HELD_OUT!r}, callbacks=[Watch()]
)
assert trainer.model is model and (trainer.iteration, trainer.saved) == (0, 0)
base = trainer.evaluate(0, images=4)["accuracy"]["overall"]
events.clear()
summary = trainer.run()
trainer.close()
print(json.dumps({{"events": events, "summary": summary, "seen": sorted(seen), "base": base}}))
"""


def use(program: str, *arguments: object, status: int = 0) -> str:
    """What a user's program prints last, or the last line of its error."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == status, done.stderr
    return (done.stderr if status else done.stdout).splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("library") / "run"
    return folder, json.loads(use(USER, folder, 2))


def test_objects_are_what_runs(run: tuple[Path, dict]) -> None:
    folder, said = run
    assert said["seen"] == ["a green triangle", "a red circle", "two blue squares"]
    assert said["summary"]["iterations"] == 2 and [row["iteration"] for row in rows(folder)] == [1, 2]
    assert -1 <= said["base"] <= 1


def test_callbacks_hear_of_everything_in_order(run: tuple[Path, dict]) -> None:
    assert run[1]["events"] == [
        ["start", 0], ["evaluation", 0, 6], ["iteration", 1], ["iteration", 2], ["evaluation", 2, 6], ["checkpoint", 2],
        ["end", 2],
    ]  # fmt: skip


def test_the_folder_names_what_was_handed_in(run: tuple[Path, dict]) -> None:
    """So that the commands on a run's folder, and the same program again, find it."""
    config = load_config(run[0] / "config.yaml")
    assert config.reward.train == config.reward.eval == "__main__:redness"
    assert load_prompts(config.prompts.train).metadata == [{"prompt": "a red circle"}, PROMPTS[1]]
    assert load_prompts(config.prompts.eval).prompts == HELD_OUT


def test_the_same_program_goes_on_and_another_reward_is_refused(run: tuple[Path, dict]) -> None:
    folder, _ = run
    again = json.loads(use(USER, folder, 3))
    assert again["events"][:2] == [["start", 2], ["iteration", 3]]
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3]
    refused = use(USER.replace("redness", "blueness"), folder, 3, status=1)
    assert "reward.train: __main__:redness -> __main__:blueness" in refused


REFUSED = f"""
import json, sys
import fastgrpo

overrides = {SMALL!r} + ["output=" + sys.argv[1], "prompts.weights={{}}", "rollout.groups=2"]
config = fastgrpo.load_config("configs/tiny_shapes_grpo.yaml", overrides)
said = []
for objects in (
    dict(prompts=[dict(text="a red circle")]),
    dict(prompts=["a red circle"], held_out=["a red circle"]),
    dict(prompts=[]),
    dict(reward=lambda *given: 0, held_out_reward=lambda *given: 1),
):
    try:
        fastgrpo.Trainer(config, **objects)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_objects_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """A run tells its rewards apart by their names: one would silently take the other's place."""
    without_text, on_both_sides, none, one_name = json.loads(use(REFUSED, tmp_path))
    assert without_text == "prompt 0: expected an object with a text as its \"prompt\", found {'text': 'a red circle'}"
    assert on_both_sides == "1 evaluation prompts are also trained on, the first: 'a red circle'"
    assert none == "no prompts were given: hand in a list with at least one"
    assert one_name.startswith("reward and held_out_reward are both called __main__:<lambda>")


def test_importing_it_loads_nothing_heavy() -> None:
    program = "import fastgrpo, sys; print(sorted({'torch', 'diffusers', 'deepspeed', 'yaml'} & set(sys.modules)))"
    assert use(program) == "[]"


def test_every_public_name_is_there() -> None:
    for name in fastgrpo.__all__:
        assert getattr(fastgrpo, name) is not None and name in dir(fastgrpo)
    with pytest.raises(AttributeError, match="module 'fastgrpo' has no attribute 'trainer_'; it has .*Trainer"):
        fastgrpo.trainer_  # noqa: B018
