"""Command lines of every command, run as a person runs them up to where a model would be loaded or a server would start."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import ODD_NUMBERS, check_refusal, count, not_hanging, odd_texts
from support.helpers import ROOT

from fastgrpo.commands import cli
from fastgrpo.config.schema import ConfigError
from fastgrpo.validation import dump_config, load_config

TINY = str(ROOT / "configs" / "tiny_shapes.yaml")
# What each command takes besides --set: its arguments, and a word for each that is good.
OPTIONS = {
    "train": {"--config": TINY, "--local_rank": "0"},
    "plan": {"--config": TINY, "--gpus": "8", "--mfu": "0.3", "--peak": "900"},
    "bench": {"--config": TINY, "--iterations": "2", "--forms": "eager", "--json": "bench.json"},
    "eval": {"--steps": "2", "--guidance": "2", "--images": "4", "--seed": "1", "--prompts": "none.txt", "--reward": "ocr"},
    "sample": {"--prompt": "a cat", "--steps": "2", "--guidance": "2", "--images": "4", "--seed": "1", "--input": "a.png",
               "--output": "a.png"},
    "export": {"--format": "peft", "--output": "exported"},
    "push": {"--folder": "card", "--base-model": "a/b"},
    "report": {},
    "serve-reward": {"--reward": "tiny_shapes", "--port": "8000", "--host": "127.0.0.1", "--max-images": "8"},
    "make-prompts": {"--count": "5", "--seed": "1", "--output": "a.jsonl", "--mix": "counting=1", "--exclude": "none.jsonl"},
}  # fmt: skip
# Where the work begins that takes long or has no end.
WORK = {
    "train": ("fastgrpo.engine.ranks", "start"),
    "plan": ("fastgrpo.commands.plan", "count"),
    "bench": ("fastgrpo.commands.bench", "bench_config"),
    "eval": ("fastgrpo.commands.evaluate", "load_rewards"),
    "sample": ("fastgrpo.commands.sample", "saved_model"),
    "export": ("fastgrpo.commands.export", "export"),
    "push": ("fastgrpo.commands.push", "faults_of_trained"),
    "serve-reward": ("fastgrpo.rewards.serving.service", "make_service"),
}
FLAGS = ("--base", "--json", "--table", "--trust", "--random-weights", "--help", "--nothing", "-", "--")


def reached(*_: object, **__: object) -> NoReturn:
    raise ConfigError("reached the work")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, as far as its weights."""
    run = tmp_path_factory.mktemp("run")
    config = load_config(TINY, [f"output={run}"])
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (run / "pytorch_lora_weights.safetensors").touch()
    return run


@pytest.fixture(autouse=True, scope="module")
def up_to_the_work(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name in WORK.values():
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, reached))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            yield


# No word leads out of the folder: what is written must stay in it.
numbers = st.sampled_from(ODD_NUMBERS[:-1]).map(lambda number: str(number)[:400])
words = numbers | odd_texts.filter(lambda word: not word.startswith(("/", "~")) and ".." not in word)


def lines(command: str, folder: Path) -> st.SearchStrategy[list[str]]:
    """Arguments most of which are good."""
    options = {option: st.just(good) | words for option, good in OPTIONS[command].items()}
    given = [st.tuples(st.just(option), value).map(list) for option, value in options.items()]
    change = st.tuples(st.just("--set"), st.sampled_from(("seed=1", "model.dtype=float16", "evaluation.images=3")) | words)
    some = st.lists(st.one_of(*given, change.map(list), st.sampled_from(FLAGS).map(lambda flag: [flag])), max_size=4)
    place = {"make-prompts": st.sampled_from(("geneval", "ocr"))}.get(command, st.just(str(folder)) | words)
    first = {"train", "plan", "bench", "serve-reward"}
    needed = ("--config", "--reward", "--prompt", "--count", "--output")
    whole = [word for option in needed if option in OPTIONS[command] for word in (option, OPTIONS[command][option])]
    return st.tuples(some, st.just([]) if command in first else place.map(lambda one: [one])).map(
        lambda pair: [*whole, *pair[1], *(word for part in pair[0] for word in part)]
    )


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_line_runs_or_is_refused(command: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    @given(line=lines(command, folder))
    def runs_or_is_refused(line: list[str]) -> None:
        check(command, line, capsys.readouterr)

    runs_or_is_refused()


def check(command: str, line: list[str], printed: Callable) -> None:
    with not_hanging():
        try:
            status = cli.main([command, *line])
        except SystemExit as stopped:
            status = stopped.code
    shown = printed().err.strip()
    count(f"status {status}")
    assert status in (0, 2), (status, shown)
    if status == 2 and shown.startswith("error: "):
        check_refusal(shown)
