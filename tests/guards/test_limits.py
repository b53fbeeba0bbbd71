"""Limits and signs of a collapse follow from the lines of a run's files alone."""

import pytest

from fastgrpo.config.keys import GuardConfig
from fastgrpo.finite import Diverged, at
from fastgrpo.guards.collapse import IN_A_ROW, LIKELY_CAUSES, CollapseWatch, signs
from fastgrpo.guards.faults import SHOWN, Fault
from fastgrpo.guards.limits import LimitPassed, check_limits, check_score, score_fall
from fastgrpo.validation import ConfigError, load_config

HEALTHY = {
    "reward_range": 0.7, "zero_groups": 0.25, "image_spread": 20.0, "first_ratio_deviation": 0.0, "skipped_steps": 1,
    "weight_change": 1e-3, "loss_scale": 1024.0,
}  # fmt: skip


def evaluations(*scores: float) -> list[dict]:
    return [{"iteration": i, "accuracy": {"overall": score}} for i, score in enumerate(scores)]


def test_a_value_above_its_limit_ends_the_run_and_one_at_it_does_not() -> None:
    guard = GuardConfig(max_kl=0.5, max_drift=0.1)
    check_limits({"kl": 0.5, "drift": 0.1}, guard)
    check_limits({"kl": 1e9, "drift": 1e9}, GuardConfig())
    with (
        pytest.raises(LimitPassed, match=r"^iteration 7: the kl is 0\.51, above guard\.max_kl = 0\.5; .*beta"),
        at("iteration 7"),
    ):
        check_limits({"kl": 0.51, "drift": 0.1}, guard)
    with pytest.raises(Diverged, match=r"^the drift is 0\.11, above guard\.max_drift = 0\.1; "):
        check_limits({"kl": 0.5, "drift": 0.11}, guard)


@pytest.mark.parametrize(
    ("scores", "drop", "fallen"),
    [
        ([0.3], 0.5, False),
        ([0.3, 0.8, 0.41], 0.5, False),
        ([0.3, 0.8, 0.39], 0.5, True),  # half of its best, though above the base
        ([0.8, 0.39], 0.5, True),  # the base is the best
        ([0.3, 0.8, 0.39, 0.7], 0.5, False),  # the newest counts
        ([-50.0, -20.0, -44.0], 0.5, False),
        ([-50.0, -20.0, -46.0], 0.5, True),  # by more than half of what the base had
        ([0.0, 0.0, 0.0], 0.5, False),
        ([20.0, 22.0, 19.0], 0.1, True),
    ],
)
@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_a_held_out_score_may_not_fall_too_far(scores: list[float], drop: float, fallen: bool, unit: float) -> None:
    """In whatever unit it is."""
    rows = evaluations(*(score * unit for score in scores))
    assert (score_fall(rows, drop) is not None) == fallen
    check_score(rows, GuardConfig())
    if fallen:
        with pytest.raises(LimitPassed, match=r"the held-out score is .*; the base had .*\(guard\.score_drop = 0"):
            check_score(rows, GuardConfig(score_drop=drop))
    else:
        check_score(rows, GuardConfig(score_drop=drop))


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"reward_range": 0, "zero_groups": 1}, "constant reward"),
        ({"zero_groups": 1}, "no group with spread"),
        ({"image_spread": 0.5}, "images alike"),
        ({"first_ratio_deviation": 1e-3}, "ratio off 1"),
        ({"weight_change": 0}, "weights at rest"),
        ({"loss_scale": 512.0}, "loss scale falls"),
    ],
)
def test_each_sign_is_read_from_a_line(change: dict, sign: str) -> None:
    assert signs(HEALTHY, HEALTHY, 1e-6) == set()
    assert signs(HEALTHY | change, HEALTHY, 1e-6) == {sign} and sign in LIKELY_CAUSES


def test_what_has_another_reason_is_no_sign() -> None:
    """A ratio that need not be 1, weights of a skipped step, and the lines of an offline run."""
    assert signs(HEALTHY | {"first_ratio_deviation": 0.5}, HEALTHY, None) == set()
    assert signs(HEALTHY | {"weight_change": 0, "skipped_steps": 2}, HEALTHY, 1e-6) == set()
    assert signs({"first_ratio_deviation": 0.0, "skipped_steps": 0, "weight_change": 1.0}, None, 1e-6) == set()


def test_a_sign_that_lasts_is_told_once_and_again_after_a_while() -> None:
    watch, dead = CollapseWatch(every=10, rounding=1e-6), {**HEALTHY, "zero_groups": 1}
    told = [i for i in range(1, 31) if watch.warnings({**dead, "iteration": i})]
    assert told == [IN_A_ROW, IN_A_ROW + 10, IN_A_ROW + 20]
    assert watch.warnings({**HEALTHY, "iteration": 31}) == [] == watch.warnings({**dead, "iteration": 32})
    (text,) = [text for i in range(40, 40 + IN_A_ROW) for text in watch.warnings({**dead, "iteration": i})]
    assert text.startswith(f"for {IN_A_ROW} iterations now in every group all images score the same")


def test_a_fault_says_what_where_and_of_which_prompts() -> None:
    prompts = [f"prompt {i}" for i in range(SHOWN + 2)]
    fault = Fault(iteration=3, update=2, tensor="loss", count=4, prompts=prompts)
    assert str(fault).startswith("update 2: not finite: 4 forward passes of the loss (prompts: 'prompt 0', ")
    assert str(fault).endswith("and 2 more)")
    row = fault.row()
    assert row["prompts"] == prompts[:SHOWN] and row["num_prompts"] == SHOWN + 2 and row["update"] == 2
    assert str(Fault(iteration=3, tensor="weights", count=1, name="a.b")) == "not finite: 1 numbers of the weights of a.b"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["guard.max_kl=1", "objective.beta=0"], r"guard\.max_kl = 1\.0: objective\.beta = 0 measures no KL"),
        (
            ["guard.max_drift=1", "objective.name=sft", "rollout.sampler=ode"],
            r"guard\.max_drift = 1\.0: sft has no old policy",
        ),
        (["guard.score_drop=0.5", "evaluation.every=0"], r"guard\.score_drop = 0\.5: evaluation\.every = 0"),
    ],
)
def test_a_limit_of_what_is_never_measured_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("configs/tiny_shapes_grpo.yaml", settings)
