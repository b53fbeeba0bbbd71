"""Every number of a configuration has its bounds beside it: what is beyond them is refused by name, what is within runs."""

import dataclasses
import math
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from support.helpers import ROOT, environment
from support.keys import keys

from fastgrpo.config import schema
from fastgrpo.config.bounds import Above, AtLeast, AtMost, Below
from fastgrpo.config.keys import Window
from fastgrpo.config.reference import describe_section
from fastgrpo.config.settings import settings_from_signature
from fastgrpo.data.prompts import prompts_of_iteration
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.learning.ema import lagging
from fastgrpo.learning.forward_process import noise_levels
from fastgrpo.records import EVALUATION, FORWARD, SAMPLE, TRAIN, noise_address
from fastgrpo.sampling.windows import window_starts
from fastgrpo.validation import ConfigError, load_config
from fastgrpo_kernels import normal

TINY = ROOT / "configs" / "tiny_shapes_grpo.yaml"
VALUES = [0, -1, math.nan, math.inf, -math.inf, 10**30, 1e300]
# What stands beside the element of a tuple that is tried, and the name of the entry of a mapping.
PAIRS = {"update.betas": [0.9, 0.999], "rollout.window.range": [0, 4], "forward.range": [0, 4]}
ENTRIES = {"reward.train": "tiny_shapes", "reward.eval": "tiny_shapes", "prompts.weights": "counting"}
# The values above that a key takes; each key that is not here refuses all of them.
ACCEPTED = {
    "seed": [0],
    "prompts.weights.counting": [0],
    "reward.train.tiny_shapes": [0, -1],
    "reward.eval.tiny_shapes": [0, -1],
    "rollout.window.start": [0],
    "rollout.window.range[0]": [0],
    "rollout.window.range[1]": [0],  # a fixed window reads no range
    "rollout.window.decay": [0],
    "rollout.window.decay_from": [0],
    "advantage.adv_clip_max": [10**30, 1e300],  # no clip
    "objective.clip_range": [10**30, 1e300],  # no clip
    "objective.beta": [0],
    "forward.range[0]": [0],
    "forward.range[1]": [0],  # clip reads no range
    "forward.old_policy.limit": [0],
    "forward.old_policy.rate": [10**30, 1e300],  # at once as slow as the limit
    "forward.old_policy.start": [0],
    "update.final_learning_rate": [0],
    "update.betas[0]": [0],
    "update.betas[1]": [0],
    "update.weight_decay": [0],
    "update.max_grad_norm": [10**30, 1e300],  # no clip
    "update.ema_decay": [0],
    "engine.zero_stage": [0],
    "evaluation.every": [0],
    "evaluation.samples": [0],
    "guard.max_kl": [10**30, 1e300],  # no limit
    "guard.max_drift": [10**30, 1e300],  # no limit
}


def numbers(path: str, hint: Any) -> Iterator[tuple[str, str]]:
    """Each number that a key holds: its path in an error, and the override that sets it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from numbers(path, arguments[0])
    elif origin in (types.UnionType, typing.Union):
        for argument in arguments:
            yield from numbers(path, argument)
    elif origin is tuple:
        for i, argument in enumerate(arguments):
            if path in PAIRS and list(numbers(path, argument)):
                items = [str(item) for item in PAIRS[path]]
                yield f"{path}[{i}]", f"{path}=[{', '.join([*items[:i], '%s', *items[i + 1 :]])}]"
    elif origin is dict and list(numbers(path, arguments[1])):
        yield f"{path}.{ENTRIES[path]}", f"{path}={{{ENTRIES[path]}: %s}}"
    elif hint in (int, float) or origin is Literal and all(type(choice) is int for choice in arguments):
        yield path, f"{path}=%s"


NUMBERS = [number for path, hint in keys() for number in numbers(path, hint)]


def yaml(value: float) -> str:
    """As YAML writes it."""
    return str(value) if math.isfinite(value) else f"{'-' * (value < 0)}.{str(value).removeprefix('-')}"


def test_the_walk_finds_every_kind_of_key() -> None:
    found = dict(NUMBERS)
    assert len(found) > 50 and set(ACCEPTED) <= set(found)
    assert {"seed", "update.betas[1]", "model.lora.rank", "model.height", "update.micro_batch_size"} <= set(found)


@pytest.mark.parametrize("value", VALUES, ids=yaml)
@pytest.mark.parametrize(("path", "override"), NUMBERS, ids=[path for path, _ in NUMBERS])
def test_a_number_is_refused_by_its_path_or_known_to_work(path: str, override: str, value: float) -> None:
    if value in ACCEPTED.get(path, []):
        load_config(TINY, [override % yaml(value)])
    else:
        with pytest.raises(ConfigError) as refusal:
            load_config(TINY, [override % yaml(value)])
        assert str(refusal.value).startswith(f"{path} = ")


@pytest.mark.parametrize("text", ["1e400", "9" * 400, "9" * 5000, "-1e400"])
def test_numbers_beyond_those_of_python_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"max_grad_norm( = -?(inf|9+): must be a finite number|=9+: not valid YAML)"):
        load_config(TINY, [f"update.max_grad_norm={text}"])
    with pytest.raises(ConfigError, match=r"(seed = -?(inf|9+): (expected int|must be at least 0)|seed=9+: not valid YAML)"):
        load_config(TINY, [f"seed={text}"])


def free_settings(*, width: float, **others: object) -> None:
    """A plug-in that takes settings of any name."""


@pytest.mark.parametrize(
    "settings", [{"width": math.inf}, {"width": 1, "a": math.nan}, {"width": 1, "a": [{"b": -math.inf}]}]
)
def test_no_setting_of_a_plug_in_is_infinite(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.(width|a|a\[0\]\.b) = (-?inf|nan): must be a finite number"):
        settings_from_signature(free_settings, settings, "mine", owner="mine")


@pytest.mark.parametrize("huge", [1e300, float(10**30)])
def test_huge_clips_are_no_clips(huge: float) -> None:
    """Of advantages, and of the lag of the old policy; tests/runs/test_extremes.py has those of ratios and gradients."""
    scores, group = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.zeros(4, dtype=torch.int64)
    free, wide = (group_advantages(scores, group, num_groups=1, std="group", adv_clip_max=m) for m in (huge, 10.0))
    assert torch.equal(free.values, wide.values) and free.values[3] > 1
    decay = lagging(huge, 0.5, 10_000_000)
    assert (decay(0), decay(10_000_000), decay(10_000_001)) == (0.0, 0.0, 0.5)


STREAMS = (TRAIN, EVALUATION, SAMPLE, FORWARD)
# Small ones, those at the edges of 32, 34 and 63 bits, and a date with its time.
SEEDS = (
    0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 3 << 32 | 7, 2**34, 20261128093000,
    2**62, 2**63 - 2, 2**63 - 1,
)  # fmt: skip


def noise(stream: int, seed: int) -> tuple[float, ...]:
    address = noise_address(stream, seed, 1, torch.zeros(1, dtype=torch.int64))
    return tuple(normal(address, torch.tensor([0]), 4)[0].tolist())


def test_streams_of_noise_never_meet_within_the_seeds_bounds() -> None:
    assert len({noise(stream, seed) for stream, seed in product(STREAMS, SEEDS)}) == len(STREAMS) * len(SEEDS)
    for seed in SEEDS:
        assert load_config(TINY, [f"seed={seed}"]).seed == seed
    for seed in (-1, 2**63, 2**64):
        with pytest.raises(ConfigError, match=rf"seed = {seed}: must be at least 0 and at most 9223372036854775807"):
            load_config(TINY, [f"seed={seed}"])


def test_seeds_of_32_bits_keep_their_noise() -> None:
    """The address that runs were made with: the stream above the seed."""
    for stream, seed in product(STREAMS, SEEDS[:4]):
        assert noise_address(stream, seed, 1, torch.zeros(1)).seed.item() == stream * 2**32 + seed


def test_every_use_of_a_seed_takes_all_its_bits() -> None:
    """What a seed draws differs from what its low and its high half draw, and 32 bits draw what they always did."""
    window = Window(kind="random", size=2, range=(0, 999))
    for seed in (2**32 + 5, 5 << 32, 2**62 + 5, 2**63 - 1):
        others = {seed % 2**32, seed >> 32, seed - 1, 0}
        for draw in (
            lambda s: prompts_of_iteration(1000, 8, 0, s).tolist(),
            lambda s: prompts_of_iteration(1000, 8, 0, s, np.full(1000, 1e-3)).tolist(),
            lambda s: noise_levels(8, 4, range(1000), 1, s).tolist(),
            lambda s: window_starts(window, 1000, 1, torch.arange(8), s).tolist(),
        ):
            assert all(draw(seed) != draw(other) for other in others)
        torch.manual_seed(seed)
    generator = np.random.Generator(np.random.Philox(key=[7, 2]))
    assert prompts_of_iteration(1000, 8, 250, 7).tolist() == generator.permutation(1000)[:8].tolist()
    word = np.random.SeedSequence([7, 3, 0]).generate_state(1)[0]
    assert window_starts(window, 1000, 3, torch.arange(1), 7).item() == int(word) % 998


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested:
    pair: tuple[Annotated[float, AtLeast(0), Below(1)], ...] = ()
    """Fractions."""
    limit: Annotated[int, Above(2), AtMost(5)] | Literal["none"] = "none"
    """A number or none."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pair": [0, 0.5, 1]}, r"a\.pair\[2\] = 1\.0: must be at least 0 and below 1$"),
        ({"pair": [0.5, -0.1]}, r"a\.pair\[1\] = -0\.1: must be at least 0 and below 1$"),
        ({"limit": 2}, r"a\.limit = 2: must be above 2 and at most 5$"),
        ({"limit": 6}, r"a\.limit = 6: must be above 2 and at most 5$"),
        ({"limit": "nome"}, r"a\.limit = 'nome': did you mean 'none'"),
    ],
)
def test_bounds_reach_into_tuples_and_unions(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema.build(Nested, data, "a.")


def test_bounds_hold_at_their_ends_and_help_prints_them() -> None:
    assert schema.build(Nested, {"pair": [0, 0.999], "limit": 5}) == Nested(pair=(0.0, 0.999), limit=5)
    assert schema.build(Nested, {"limit": 3}).limit == 3
    assert list(describe_section(Nested)) == [
        "  pair (tuple[float at least 0 and below 1, ...], default ())\n      Fractions.",
        "  limit (int above 2 and at most 5 | none, default none)\n      A number or none.",
    ]


@pytest.mark.processes
def test_the_keys_are_read_without_torch() -> None:
    """`--help` and the check of one's own file need not wait for it."""
    code = "import sys, fastgrpo.config.reading, fastgrpo.config.reference; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)
