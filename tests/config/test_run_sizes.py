"""`rollout.sizes` and `evaluation.height`: how they are written, and which size an iteration has."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.helpers import ROOT

from fastgrpo.config.reading import dump_config
from fastgrpo.config.resuming import forbidden_changes
from fastgrpo.config.sizes import Size, at_size, evaluation_size, iteration_size, training_sizes
from fastgrpo.validation import ConfigError, load_config

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
THREE = "rollout.sizes=[[16, 32], {height: 32, width: 16, weight: 2}, {height: 32, width: 32, num_frames: 9, weight: 0.5}]"


def test_sizes_are_read_in_either_form_and_written_so_that_they_read_back(tmp_path: Path) -> None:
    config = load_config(CONFIG, [THREE, f"output={tmp_path}"])
    shares = {Size(16, 32): 1 / 3.5, Size(32, 16): 2 / 3.5, Size(32, 32, 9): 0.5 / 3.5}
    assert training_sizes(config) == pytest.approx(shares) and list(training_sizes(config)) == list(shares)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert [str(size) for size in shares] == ["16x32", "32x16", "32x32x9"]


def test_without_sizes_every_iteration_has_the_models_own() -> None:
    config = load_config(CONFIG)
    assert {iteration_size(config, i) for i in range(1, 50)} == {Size()} == {evaluation_size(config)}
    assert at_size(config, Size()) == config


def test_one_size_alone_is_the_models_own() -> None:
    config = load_config(CONFIG, [THREE, "model.num_frames=5"])
    sized = at_size(config, Size(16, 32))
    assert (sized.model.height, sized.model.width, sized.model.num_frames, sized.rollout.sizes) == (16, 32, 5, ())
    assert at_size(config, Size(32, 32, 9)).model.num_frames == 9


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_any_stretch_of_iterations_has_each_size_as_often_as_its_weight_says(seed: int) -> None:
    """A draw of its own for each iteration would be off by sqrt(100 x 2/7 x 5/7) = 4.5 in a hundred, and often by 10."""
    config = load_config(CONFIG, [THREE, f"seed={seed}"])
    for first in (1, 777, 9_999_000):
        found = Counter(iteration_size(config, i) for i in range(first, first + 100))
        for size, share in training_sizes(config).items():
            assert found[size] == pytest.approx(100 * share, abs=2.5)


def test_a_size_follows_from_the_seed_and_the_iteration_alone() -> None:
    config = load_config(CONFIG, [THREE])
    forth = [iteration_size(config, i) for i in range(1, 40)]
    assert forth == [iteration_size(load_config(CONFIG, [THREE, "iterations=7"]), i) for i in range(39, 0, -1)][::-1]
    assert forth != [iteration_size(replace(config, seed=1), i) for i in range(1, 40)]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rollout.sizes=[[512]]", r"rollout\.sizes\[0\] = \[512\]: expected 2 values"),
        ("rollout.sizes=[512, 768]", r"rollout\.sizes\[0\] = 512: expected a list"),
        ("rollout.sizes=[[512, 0]]", r"rollout\.sizes\[0\]\[1\] = 0: must be at least 1"),
        ("rollout.sizes=[{height: 512}]", r"rollout\.sizes\[0\]\.width: missing"),
        ("rollout.sizes=[{height: 8, width: 8, wieght: 2}]", r"sizes\[0\]\.wieght: unknown key; did you mean 'weight'"),
        ("rollout.sizes=[{height: 8, width: 8, weight: 0}]", r"rollout\.sizes\[0\]\.weight = 0.*: must be above 0"),
        ("rollout.sizes=[[8, 16], {height: 8, width: 16, weight: 2}]", r"sizes = \['8x16'\]: 2 sizes, and one .* twice"),
        ("evaluation.height=0", r"evaluation\.height = 0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_sizes_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(CONFIG, [setting])


@pytest.mark.parametrize(
    ("setting", "key"),
    [("rollout.sizes=[[16, 32]]", "rollout.sizes"), ("evaluation.height=16", "evaluation.height")],
)
def test_a_run_goes_on_with_the_sizes_that_it_began_with(setting: str, key: str) -> None:
    """Another size is another computation; images of another evaluation cannot be compared with the first one's."""
    (change,) = forbidden_changes(load_config(CONFIG), load_config(CONFIG, [setting]))
    assert change.startswith(f"{key}: ")
