"""Evaluation: who is asked how often, the same images on any number of ranks, and means that are what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import PromptSet
from fastgrpo.engine.ranks import OneRank
from fastgrpo.evaluation import Evaluator
from fastgrpo.policy import Policy
from fastgrpo.reporting.text import score_table, scores_by_reward
from fastgrpo.rewards import RewardSum
from fastgrpo.rewards.scorer import Scorer

PROMPTS = ["a red circle", "two blue squares", "a green square and a circle", "one yellow triangle"]
TAGS = ["single_object", "counting", "two_object", "counting"]


def mean_pixel(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    assert images.dtype == torch.uint8 and [record["prompt"] for record in metadata] == prompts
    return images.float().mean((1, 2, 3))


def evaluator(model, **options) -> Evaluator:
    records = [{"prompt": prompt, "tag": tag} for prompt, tag in zip(PROMPTS, TAGS, strict=True)]
    settings = dict(num_steps=2, guidance_scale=1.0, batch_size=3, seed=0, ranks=OneRank()) | options
    return Evaluator(
        model=model, embeddings=Embeddings(model), prompts=PromptSet(PROMPTS, records),
        reward=RewardSum(rewards={"mean": mean_pixel}, weights={"mean": 1.0}), scorer=Scorer(timeout=60), **settings,
    )  # fmt: skip


def test_categories_get_the_same_number_of_images(tiny_model) -> None:
    order = evaluator(tiny_model).order(9)
    assert np.array_equal(order, [0, 1, 2, 0, 3, 2, 0, 1, 2])


def test_few_images_are_spread_over_a_categorys_prompts(tiny_model) -> None:
    """And with images enough every prompt has its turn, as often as any other."""
    prompts = [f"prompt {i}" for i in range(30)]
    records = [{"prompt": prompt, "tag": "ab"[i % 3 > 0]} for i, prompt in enumerate(prompts)]
    spread = replace(evaluator(tiny_model), prompts=PromptSet(prompts, records))
    few = spread.order(8)
    assert few[0::2].tolist() == [0, 6, 15, 21] and few[1::2].tolist() == [1, 8, 16, 23]
    many = spread.order(80)
    assert sorted(many[0::2].tolist()) == sorted(list(range(0, 30, 3)) * 4)
    assert sorted(many[1::2].tolist()) == sorted([i for i in range(30) if i % 3] * 2)


def test_overall_is_the_mean_of_the_categories(tiny_model) -> None:
    row = evaluator(tiny_model).accuracy(Policy(tiny_model), 7)
    accuracy = row["accuracy"]
    assert list(accuracy) == ["overall", "single_object", "counting", "two_object"] and row["images"] == 7
    assert accuracy["overall"] == pytest.approx(np.mean([accuracy[tag] for tag in list(accuracy)[1:]]))


def test_shares_are_named_where_the_reward_says_so(tiny_model) -> None:
    class Share:
        percent = True

        def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
            return images.float().mean((1, 2, 3)) / 255

    def row(weights: dict[str, float]) -> dict:
        rewards = {"mean": mean_pixel, "share": Share()}
        judged = replace(evaluator(tiny_model), reward=RewardSum(rewards=rewards, weights=weights))
        return judged.accuracy(Policy(tiny_model), 3)

    assert row({"share": 1.0})["percent"] == ["overall", "single_object", "counting", "two_object"]
    assert row({"mean": 1.0})["percent"] == row({"share": 2.0})["percent"] == []
    assert row({"mean": 1.0, "share": 2.0})["percent"] == ["share"]


def test_several_rewards_stand_apart_by_name_and_category(tiny_model) -> None:
    alone = evaluator(tiny_model)
    rewards = {"mean": mean_pixel, "prompt": lambda images, prompts, metadata: torch.tensor([len(p) for p in prompts])}
    both = replace(alone, reward=RewardSum(rewards=rewards, weights={"mean": 0.5, "prompt": 2.0}))
    row, mean = both.accuracy(Policy(tiny_model), 7), alone.accuracy(Policy(tiny_model), 7)["accuracy"]
    accuracy, categories = row["accuracy"], row["categories"]
    assert list(accuracy) == ["overall", "mean", "prompt"] and list(categories) == list(mean)[1:]
    assert {"overall": accuracy["mean"], **{tag: scores["mean"] for tag, scores in categories.items()}} == mean
    assert categories["single_object"]["prompt"] == len(PROMPTS[0])
    assert accuracy["overall"] == pytest.approx(0.5 * accuracy["mean"] + 2 * accuracy["prompt"])


def test_same_result_on_any_number_of_ranks(tiny_model) -> None:
    """Seven images in batches of three: two ranks draw some twice, and count none twice."""
    alone = evaluator(tiny_model).accuracy(Policy(tiny_model), 7)["accuracy"]
    shares: list[Tensor] = []

    class Collecting(OneRank):
        def gather(self, tensor: Tensor) -> Tensor:
            shares.append(tensor)
            return torch.cat(shares + [torch.zeros(12 - 6 * len(shares), 1)])

    for rank in range(2):
        together = evaluator(tiny_model, ranks=Collecting(rank, 2)).accuracy(Policy(tiny_model), 7)
    assert together["accuracy"] == alone


def test_samples_are_always_the_same(tiny_model) -> None:
    first, records = evaluator(tiny_model).samples(Policy(tiny_model), 4)
    again, _ = evaluator(tiny_model).samples(Policy(tiny_model), 4)
    assert torch.equal(first, again) and first.dtype == torch.uint8 and first.shape == (4, 3, 32, 32)
    assert [record["prompt"] for record in records] == [PROMPTS[i] for i in (0, 1, 2, 0)]
    other, _ = evaluator(tiny_model, seed=1).samples(Policy(tiny_model), 4)
    assert not torch.equal(first, other)


def test_a_table_has_a_row_a_prompt_file_and_category_and_a_column_a_reward() -> None:
    several = {"accuracy": {"overall": 3.0, "a": 0.5, "b": 20.0}}
    several["categories"] = {"x": {"a": 0.25, "b": 19.0}, "y": {"a": 0.75, "b": 21.0}}
    plain = {"accuracy": {"overall": 3.0, "a": 1.0, "b": 7.0}, "categories": {"all": {"a": 1.0, "b": 7.0}}}
    rows = [*scores_by_reward("first", several, ["a", "b"]), *scores_by_reward("second", plain, ["a", "b"])]
    assert score_table(rows, ["a"]).splitlines() == [
        "             a   b",
        "first    50.0%  20",
        "  x      25.0%  19",
        "  y      75.0%  21",
        "second  100.0%   7",
    ]
    one = scores_by_reward("first", {"accuracy": {"overall": 0.5, "x": 0.25, "y": 0.75}}, ["a"])
    assert one == [("first", {"a": 0.5}), ("  x", {"a": 0.25}), ("  y", {"a": 0.75})]
