"""The keys as reference documentation, and their choices: each is one that the code behind the key knows."""

import itertools
import re
import typing

import pytest
import torch
from support.helpers import ROOT
from support.keys import keys, sections

from fastgrpo.config.reference import field_docs
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.models.attention import BACKENDS
from fastgrpo.sampling.windows import WINDOWS
from fastgrpo.validation import load_config

TINY = ROOT / "configs" / "tiny_shapes_grpo.yaml"
CHOICES = [
    (path, choice)
    for path, hint in keys()
    for part in (hint, *typing.get_args(hint))
    if typing.get_origin(part) is typing.Literal
    for choice in typing.get_args(part)
]
NEEDS = {  # what a choice asks of other keys
    ("model.lora.reference", "start"): ["model.lora.path=/a/lora", "model.lora.targets=null"],
    ("engine.zero_stage", 3): ["rollout.cuda_graph=false"],
    ("model.idle_expert", "host"): ["rollout.cuda_graph=false"],
    ("objective.log_prob_weight", "cps_reference"): ["rollout.sampler=cps"],
    ("rollout.window.kind", "all_but_last"): ["rollout.window.size=null"],
}


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_the_docstring_of_a_key_stands_alone(section: type) -> None:
    """`--help` shows one key below the other, and people look up one: no docstring may lean on that of another key."""
    docs = field_docs(section)
    for key, hint in typing.get_type_hints(section).items():
        if hint in sections():
            continue
        assert len(docs.get(key, "").split()) >= 5, f"{key}: {docs.get(key)}"
        assert re.match(r"[A-Z]", docs[key]) and docs[key].endswith("."), f"{key} is no sentence: {docs[key]}"
        assert not re.search(r"likewise|^Of ", docs[key], re.IGNORECASE), f"{key} leans on another: {docs[key]}"


@pytest.mark.parametrize(("path", "choice"), CHOICES, ids=lambda value: str(value))
def test_each_choice_loads(path: str, choice: object) -> None:
    """It makes the first iteration's schedule, which reads kind, solver, kl, log_prob_weight and step_weight."""
    load_config(TINY, [f"{path}={choice}", *NEEDS.get((path, choice), [])])


def test_the_choices_of_advantages_are_those_of_the_function() -> None:
    scores, group = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]), torch.zeros(4, dtype=torch.int64)
    for std, combine in itertools.product(("group", "global"), ("sum", "each")):
        advantage = load_config(TINY, [f"advantage={{std: {std}, combine: {combine}}}"]).advantage
        found = group_advantages(scores, group, num_groups=1, weights=[1.0, 1.0], **vars(advantage))
        assert found.values.isfinite().all() and found.weight.all()


def test_no_choice_of_the_code_lacks_its_name_in_the_keys() -> None:
    named = {path: {choice for other, choice in CHOICES if other == path} for path, _ in CHOICES}
    assert named["rollout.window.kind"] == set(WINDOWS)
    assert named["model.attention"] == set(BACKENDS)
