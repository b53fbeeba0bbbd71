import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pytest
import torch
from PIL import Image
from support.helpers import ROOT, environment

from fastgrpo.config.bounds import AtLeast
from fastgrpo.config.schema import ConfigError
from fastgrpo.rewards import REWARDS, RewardSum, each_frame, load_reward, load_rewards, reward_version, score_range
from fastgrpo.rewards.calling import checked
from fastgrpo.rewards.retry import Tries
from fastgrpo.tiny.render import render
from fastgrpo.tiny.world import sample_scene, split_prompts


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
    assert score_range(load_reward(name)) == (0, 1)


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
    torch.testing.assert_close(load_reward(name, frames="clip")(videos, ["a", "b"], records), torch.tensor([2.0, 2.0]))
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
    with pytest.raises(ValueError, match=r"'mine' returned 1\.5 for the prompt 'b', outside of its range \[0, 1\]"):
        checked(torch.tensor([0.0, 1.5]), "mine", ["a", "b"], 0, 1)
    with pytest.raises(ValueError, match=r"'mine' returned -1\.0 for the prompt 'a', outside of its range \[0, inf\]"):
        checked(torch.tensor([-1.0, 1.5]), "mine", ["a", "b"], low=0)
    assert checked(torch.tensor([0.1]), "mine", ["a"], 0, 0.1).item() == pytest.approx(0.1)
    assert checked(torch.tensor([0, 1]), "mine", ["a", "b"]).dtype == torch.float32


class Brightness:
    """A reward that is made once; `made` counts."""

    low, high = 0.0, 0.1
    made = 0

    def __init__(self, *, device: torch.device, scale: float, offset: float = 0.0) -> None:
        Brightness.made += 1
        self.device, self.scale, self.offset = device, scale, offset

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        return images.float().mean((1, 2, 3)) / 255 * self.scale + self.offset


MINE = f"{__name__}:Brightness"


def test_a_class_is_made_once_with_the_device_and_its_settings() -> None:
    before = Brightness.made
    both = load_rewards(MINE, {MINE: 3.0}, device="cpu", settings={MINE: {"scale": 0.1}}, frames="clip")
    assert Brightness.made == before + 1 and both[0].rewards[MINE] is both[1].rewards[MINE]
    reward = both[0].rewards[MINE]
    assert reward.device == torch.device("cpu") and (reward.scale, reward.offset) == (0.1, 0.0)


def test_settings_that_a_reward_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Brightness\.scal: unknown key; did you mean 'scale'\? choices: scale, offset"):
        load_reward(MINE, settings={"scal": 1})
    with pytest.raises(ValueError, match=r"Brightness\.scale: missing; it has no default"):
        load_reward(MINE)
    with pytest.raises(ValueError, match=r"tiny_shapes: reward 'tiny_shapes' is a function, which has no settings"):
        load_reward("tiny_shapes", settings={"path": "a"})
    with pytest.raises(ValueError, match="'no.such.module:f': No module named"):
        load_reward("no.such.module:f")


class Plain:
    """Without annotations, and with settings of any name."""

    def __init__(self, device, size, names=[], **more) -> None:  # noqa: B006
        self.settings = {"size": size, "names": names, **more}


class Typed:
    """With types that YAML can say, and one that it cannot."""

    def __init__(
        self,
        device: torch.device,
        *,
        size: Annotated[int, AtLeast(1)],
        folder: Path | None = None,
        weights: dict[str, float] | float = 1.0,
        names: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = {"size": size, "folder": folder, "weights": weights, "names": names, "dtype": dtype}


def made(reward: type, **settings: object) -> dict:
    return load_reward(f"{__name__}:{reward.__name__}", settings=settings, frames="clip").settings


def test_settings_are_checked_by_type_where_a_class_says_one() -> None:
    assert made(Plain, size="any", other=[1]) == {"size": "any", "names": [], "other": [1]}
    assert made(Typed, size=2) == {"size": 2, "folder": None, "weights": 1.0, "names": (), "dtype": torch.float32}
    found = made(Typed, size=1, folder="a/b", weights={"x": 1}, names=["y"], dtype="float16")
    assert found == {"size": 1, "folder": Path("a/b"), "weights": {"x": 1.0}, "names": ["y"], "dtype": "float16"}
    assert made(Typed, size=1, weights=2)["weights"] == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size = 0: must be at least 1"),
        ({"size": "a"}, r"size = 'a': expected int, found str"),
        ({"size": True}, r"size = True: expected int, found bool"),
        ({"size": 1, "folder": 3}, r"folder = 3: expected Path, found int"),
        ({"size": 1, "names": "y"}, r"names = 'y': expected a list"),
        ({"size": 1, "names": ["y", 1]}, r"names\[1\] = 1: expected str, found int"),
        ({"size": 1, "weights": {"x": "y"}}, r"weights\.x = 'y': expected float, found str"),
        ({"size": 1, "weights": float("nan")}, r"weights = nan: must be a finite number"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.settings\.{__name__}:Typed\.{message}"):
        made(Typed, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vlm_judge", {"url": 5, "model": "x"}, r"url = 5: expected str, found int"),
        ("vlm_judge", {"url": "x", "model": "x", "retries": -1}, r"retries = -1: must be at least 0"),
        ("vlm_judge", {"url": "x"}, r"model: missing; it has no default"),
        ("geneval", {"detector": 3, "clip": "x"}, r"detector = 3: expected Path, found int"),
        ("remote", {"urls": ["http://x"], "retries": "x"}, r"retries = 'x': expected int, found str"),
        ("remote", {"urls": "http://x"}, r"urls = 'http://x': expected a list"),
        ("remote", {"urls": ["http://x"], "form": "jpeg"}, r"form = 'jpeg': .*choices: raw, png"),
        ("aesthetic", {"path": 5}, r"path = 5: expected str, found int"),
        ("clip_score", {"batch_size": 0}, r"batch_size = 0: must be at least 1"),
        ("ocr", {"engine": 1}, r"engine = 1: .*choices: rapid, paddle"),
    ],
)
def test_settings_of_our_own_rewards_are_refused_by_name(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.settings\.{name}\.{message}"):
        load_reward(name, settings=settings)


@pytest.mark.processes
def test_rewards_need_no_libraries_of_the_models() -> None:
    """A server of rewards has neither: every module of a reward is imported where these cannot be."""
    modules = sorted({path.partition(":")[0] for path in REWARDS.values()})
    code = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('diffusers', 'peft', 'deepspeed')))  # to import one is an error\n"
        f"for module in {modules}: importlib.import_module(module)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)


def test_pauses_double_differ_and_leave_the_random_numbers_of_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    random.seed(0)
    expected, before = random.Random(0).random(), len(waits)
    assert list(Tries(3, 1.0)) == [0, 1, 2, 3] and before == 0
    assert random.random() == expected
    assert all(middle / 2 <= wait <= middle * 3 / 2 for wait, middle in zip(waits, [1, 2, 4], strict=True))
    assert list(Tries(0, 1.0)) == [0] and len(waits) == 3
    assert max(wait for _ in [*Tries(2000, 0.5)] for wait in waits) <= 45  # doubled 2000 times, no float would hold it


def test_each_frame_keeps_its_prompt() -> None:
    videos = torch.arange(2 * 3).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    frames, prompts, records = each_frame(videos, ["a", "b"], [{"n": 0}, {"n": 1}])
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert prompts == ["a"] * 3 + ["b"] * 3 and [record["n"] for record in records] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("frames", ["each", "clip"])
def test_a_sum_checks_each_reward_and_keeps_it_apart(frames: str) -> None:
    weights = {MINE: 10.0, "jpeg_incompressibility": -0.5}
    (total,) = load_rewards(weights, device="cpu", settings={MINE: {"scale": 0.1}}, frames=frames)
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    scores = total(white, ["a", "b"], [{}, {}])
    assert scores.shape == (2, 2) and scores.dtype == torch.float32 and scores[0, 0].item() == pytest.approx(0.1)
    torch.testing.assert_close(total.total(scores), 10 * scores[:, 0] - 0.5 * scores[:, 1])
    (bad,) = load_rewards(weights, device="cpu", settings={MINE: {"scale": 0.2}}, frames=frames)
    with pytest.raises(ValueError, match=r"Brightness' returned 0\.2.* prompt 'a', outside of its range \[0, 0\.1\]"):
        bad(white, ["a", "b"], [{}, {}])


def test_one_reward_of_weight_one_is_itself_to_the_bit() -> None:
    one = RewardSum(rewards={"a": lambda images, prompts, metadata: images[:, 0]}, weights={"a": 1.0})
    scores = one(torch.rand(100, 1, generator=torch.Generator().manual_seed(0)), [""] * 100, [{}] * 100)
    assert torch.equal(one.total(scores), scores[:, 0])


def test_a_version_says_name_settings_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    version = reward_version("a", {"x": 1, "y": 2})
    assert version == reward_version("a", {"y": 2, "x": 1})
    assert len({version, reward_version("b", {"x": 1, "y": 2}), reward_version("a", {"x": 1, "y": 3})}) == 3
    monkeypatch.setattr("fastgrpo.rewards.__version__", "9.9")
    assert reward_version("a", {"x": 1, "y": 2}) != version
