import pytest
import torch

from fastgrpo.rewards import REWARDS, load_reward
from fastgrpo.tiny.render import render
from fastgrpo.tiny.world import sample_scene, split_prompts
from fastgrpo.trainer import checked


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_tiny_shapes_scores_true_and_false_images(name: str) -> None:
    """A rendered truth scores 1, the image of another prompt less."""
    import numpy as np

    records = split_prompts()[0][::40]
    rng = np.random.default_rng(0)
    images = torch.stack([torch.from_numpy(render(sample_scene(r, rng))).permute(2, 0, 1) for r in records])
    prompts = [record["prompt"] for record in records]
    scores = load_reward(name)(images, prompts, records)
    assert scores.dtype == torch.float32 and scores.shape == (len(records),) and (scores == 1).all()
    wrong = load_reward(name)(images.roll(1, 0), prompts, records)
    assert (wrong < 1).all() and (wrong >= 0).all()


def test_a_reward_of_ones_own_needs_no_registration() -> None:
    assert load_reward("operator:add") is __import__("operator").add
    with pytest.raises(ValueError, match="'colour': not one of tiny_shapes"):
        load_reward("colour")


def test_bad_scores_name_the_reward_and_the_prompt() -> None:
    with pytest.raises(ValueError, match="reward 'mine' returned nan for the prompt 'b'"):
        checked(torch.tensor([0.0, float("nan")]), "mine", ["a", "b"])
    with pytest.raises(ValueError, match=r"reward 'mine' returned shape \(2, 1\) for 2 images"):
        checked(torch.zeros(2, 1), "mine", ["a", "b"])
    assert checked(torch.tensor([0, 1]), "mine", ["a", "b"]).dtype == torch.float32
