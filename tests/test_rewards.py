from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgrpo.rewards import load_reward
from fastgrpo.tiny.render import render
from fastgrpo.tiny.world import sample_scene, split_prompts
from fastgrpo.trainer import checked


@pytest.mark.parametrize("name", ["tiny_shapes", "tiny_shapes_graded"])
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
    assert load_reward("operator:add", frames="clip") is __import__("operator").add
    with pytest.raises(ValueError, match="'colour': not one of tiny_shapes"):
        load_reward("colour")


def mean_red(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """0 to 1, plus a number from the prompt's metadata; a clip counts as its last frame."""
    assert len(images) == len(prompts) == len(metadata)
    frames = images if images.dim() == 4 else images[:, -1]
    return frames[:, 0].float().mean((1, 2)) / 255 + torch.tensor([float(record["bonus"]) for record in metadata])


def test_videos_are_scored_by_frame_or_as_clips() -> None:
    videos = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)  # 2 videos of 3 frames
    videos[0, 2, 0], videos[1, 0, 0] = 255, 51
    records = [{"bonus": 1}, {"bonus": 2}]
    name = f"{__name__}:mean_red"
    torch.testing.assert_close(load_reward(name)(videos, ["a", "b"], records), torch.tensor([1 + 1 / 3, 2 + 0.2 / 3]))
    torch.testing.assert_close(load_reward(name, "clip")(videos, ["a", "b"], records), torch.tensor([2.0, 2.0]))
    images = load_reward(name)(videos[:, 2], ["a", "b"], records)
    torch.testing.assert_close(images, torch.tensor([2.0, 2.0]))


def test_jpeg_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (3, 40, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.full((3, 40, 24), 128, dtype=torch.uint8), noise])
    sizes = load_reward("jpeg_incompressibility")(images, ["", ""], [{}, {}])
    for image, size in zip(images, sizes.tolist(), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=95)
        assert (tmp_path / "a.jpg").stat().st_size == pytest.approx(1000 * size)
    assert sizes[1] > 2 * sizes[0] and sizes.dtype == torch.float32
    assert torch.equal(load_reward("jpeg_compressibility")(images, ["", ""], [{}, {}]), -sizes)


def test_bad_scores_name_the_reward_and_the_prompt() -> None:
    with pytest.raises(ValueError, match="reward 'mine' returned nan for the prompt 'b'"):
        checked(torch.tensor([0.0, float("nan")]), "mine", ["a", "b"])
    with pytest.raises(ValueError, match=r"reward 'mine' returned shape \(2, 1\) for 2 images"):
        checked(torch.zeros(2, 1), "mine", ["a", "b"])
    assert checked(torch.tensor([0, 1]), "mine", ["a", "b"]).dtype == torch.float32
