"""What a reward is given and what it may answer: copies, no autograd, and nothing but a real number for each image."""

from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.rewards import RewardSum
from fastgrpo.rewards.calling import BadScores, RewardError, RewardUnavailable, scores_of

IMAGES = torch.arange(3 * 3 * 4 * 4, dtype=torch.uint8).view(3, 3, 4, 4)
PROMPTS = ["a cat", "a dog", "a cow"]
THIRD = torch.tensor(1 / 3)
TAKEN = {
    "list": [0.0, 0.5, 1.0],
    "tuple of integers and booleans": (0, True, 2),
    "scalars of numpy": [np.float16(0.5), np.int8(-3), np.bool_(True)],
    "items without dimensions": [THIRD, np.array(0.25), torch.tensor(3, dtype=torch.int16)],
    "fractions": [Fraction(1, 4), 0.1, 2**60],
    "float64 of numpy": np.array([0.1, 0.2, 0.3]),
    "integers of numpy": np.array([1, 2, 3], dtype=np.uint16),
    "objects of numpy": np.array([0.5, 1, THIRD], dtype=object),
    "backwards": np.arange(3.0)[::-1],
    "array": array("d", [0.5, 0.25, 0.125]),
    "bfloat16": torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16),
    "booleans of torch": torch.tensor([True, False, True]),
    "float64 of torch": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    "with a graph": torch.tensor([1.0, 2.0, 3.0], requires_grad=True) * 2,
}
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "returned NoneType None: expected a tensor, an array, a list or a tuple"),
    "a scalar": (0.5, "returned float 0.5"),
    "a text": ("123", "returned str '123'"),
    "bytes": (b"abc", "returned bytes"),
    "a dict": ({"a": 1}, "returned dict"),
    "a set": ({1.0, 2.0, 3.0}, "returned set"),
    "a generator": ((x for x in (1.0, 2.0, 3.0)), "returned generator"),
    "complex of torch": (torch.zeros(3, dtype=torch.complex64), "returned Tensor"),
    "complex of numpy": (np.zeros(3, dtype=complex), "returned ndarray"),
    "texts of numpy": (np.array(["1", "2", "3"]), "returned ndarray"),
    "dates": (np.zeros(3, dtype="datetime64[s]"), "returned ndarray"),
    "a text in a list": ([1.0, "2", 3.0], "returned a list with '2' for the prompt 'a dog'"),
    "none in a list": ([1.0, 2.0, None], "a list with None for the prompt 'a cow'"),
    "complex in a list": ([1j, 2.0, 3.0], "a list with 1j for the prompt 'a cat'"),
    "decimals": ([Decimal(1)] * 3, r"a list with Decimal\('1'\) for the prompt 'a cat'"),
    "lists in a list": ([[1.0], [2.0], [3.0]], r"a list with \[1.0\] for the prompt 'a cat'"),
    "vectors in a list": ([torch.zeros(1)] * 3, r"a list with tensor\(\[0\.\]\)"),
    "beyond floats": ([10**400, 0, 0], "a list with 1000"),
    "beyond float32": ([0.0, 1e39, 0.0], r"returned 1e\+39 for the prompt 'a dog', which float32 cannot hold"),
    "too few": ([1.0, 2.0], r"returned shape \(2,\) for 3 images"),
    "too many": (np.zeros(4), r"returned shape \(4,\) for 3 images"),
    "one for all": (torch.tensor(1.0), r"returned shape \(\) for 3 images"),
    "a column": (np.zeros((3, 1)), r"returned shape \(3, 1\) for 3 images"),
    "not a number": ([0.0, float("nan"), 0.0], "returned nan for the prompt 'a dog'"),
    "infinite": (np.array([0.0, 0.0, -np.inf]), "returned -inf for the prompt 'a cow'"),
}


def scored(reward: Callable, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return scores_of(reward, "mine", images, PROMPTS, [{} for _ in PROMPTS])


@pytest.mark.parametrize("answer", TAKEN.values(), ids=TAKEN)
def test_numbers_are_taken_in_whatever_they_come(answer: Any) -> None:
    expected = np.array([float(number) for number in answer], dtype=np.float32)
    found = scored(lambda images, prompts, metadata: answer)
    assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(("answer", "message"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused_by_name(answer: Any, message: str) -> None:
    with pytest.raises(BadScores, match=f"reward 'mine' {message}" if message.startswith("returned") else message) as error:
        scored(lambda images, prompts, metadata: answer)
    assert "'mine'" in str(error.value) and isinstance(error.value, RewardError | ValueError)


def test_scores_are_a_copy_of_what_was_answered() -> None:
    """A reward that answers with the same tensor every time, and two rewards that share it."""
    kept = torch.zeros(3)

    def counting(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        return kept.add_(1)

    both = RewardSum(rewards={"a": counting, "b": counting}, weights={"a": 1.0, "b": 1.0})
    first, second = (both(IMAGES, PROMPTS, [{}] * 3) for _ in range(2))
    assert first[0].tolist() == [1, 2] and second[0].tolist() == [3, 4]


@pytest.mark.parametrize("frames", [0, 2])
def test_what_a_reward_writes_reaches_nobody(frames: int) -> None:
    def writing(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
        seen = [len(record["objects"]) for record in metadata]
        images.zero_()
        prompts.sort(key=len)
        prompts.pop()
        metadata[0]["objects"].append("another")
        metadata.reverse()
        return seen

    images = IMAGES.clone() if not frames else IMAGES[:, None].repeat(1, frames, 1, 1, 1)
    before, record = images.clone(), {"objects": ["cat"]}
    prompts, metadata = list(PROMPTS), [record, record, {"objects": []}]  # of a group the records are one object
    two = RewardSum(rewards={"a": writing, "b": writing}, weights={"a": 1.0, "b": 1.0})
    for _ in range(2):
        assert two(images, prompts, metadata).tolist() == [[1, 1], [1, 1], [0, 0]]
    assert torch.equal(images, before) and prompts == PROMPTS and metadata == [record, record, {"objects": []}]
    assert record == {"objects": ["cat"]}


def test_autograd_is_off_in_every_thread() -> None:
    weight = torch.ones(1, requires_grad=True)
    made = []

    def network(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        made.append(images.float().mean((1, 2, 3)) * weight)
        return made[-1]

    for pool in (ThreadPoolExecutor(1), None):
        pool.submit(scored, network).result() if pool else scored(network)
    assert torch.is_grad_enabled() and len(made) == 2 and not any(one.requires_grad for one in made)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("color"), SystemExit(3), StopIteration()])
def test_an_exception_names_the_reward_and_the_prompts_and_keeps_its_traceback(error: BaseException) -> None:
    def failing(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        raise error

    prompts = [*PROMPTS, "a bee", "a bee", "x" * 200]
    with pytest.raises(RewardError) as raised:
        scores_of(failing, "mine", IMAGES, prompts, [{}] * 6)
    assert str(raised.value) == (
        f"reward 'mine' failed: {type(error).__name__}: {error} (prompts 'a cat', 'a dog', 'a cow' and 2 more)"
    )
    assert raised.value.__cause__ is error and error.__traceback__ is not None
    frames = [error.__traceback__]
    while frames[-1].tb_next:
        frames.append(frames[-1].tb_next)
    assert frames[-1].tb_frame.f_code.co_name == "failing"


def test_a_server_that_is_gone_stays_what_it_is() -> None:
    def gone(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        raise RewardUnavailable("it is gone")

    with pytest.raises(RewardUnavailable, match=r"^it is gone$"):
        scored(gone)
    with pytest.raises(KeyboardInterrupt):
        scored(lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
