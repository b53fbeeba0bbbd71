"""A model at several sizes in turn: each velocity, schedule and image is the stock pipeline's of that size."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.capture import Rerun, equal
from support.drawing import ode_arguments
from support.runs import ForkServer

from fastgrpo.config.schema import ConfigError
from fastgrpo.config.sizes import Size
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import PromptSet
from fastgrpo.engine.ranks import OneRank
from fastgrpo.models import load_model
from fastgrpo.parts import check_cut
from fastgrpo.policy import Policy, check_sizes, sized
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from fastgrpo.testing import load_family
from fastgrpo_kernels import INITIAL_STEP, normal

CPU = torch.device("cpu")
IMAGES = [Size(16, 16), Size(16, 24), Size(24, 16)]  # a wide one and a tall one have latents of one shape where packed
SIZES = {
    "sd3": IMAGES, "flux": IMAGES, "flux_kontext": IMAGES, "qwen_image": IMAGES,
    "wan": [Size(16, 16, 9), Size(16, 32, 5), Size(32, 16, 9)],
}  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """One object for all sizes, with the name and the folder of its family."""
    family = load_family(request.param)
    folder = tmp_path_factory.mktemp("family") / request.param
    family.save(folder)
    model = load_model(request.param, path=folder, dtype=torch.float32, device=CPU, **family.settings)
    model.name, model.folder = request.param, folder
    return model


def fed_to_the_scheduler(model, size: Size) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Of the stock pipeline at a size: (x, velocity) of each step, the noise levels and the images."""
    scheduler, fed = model.pipeline.scheduler, []
    step = scheduler.step

    def record(velocity: torch.Tensor, timestep, sample, **options):
        fed.append((sample.clone(), velocity.clone()))
        return step(velocity, timestep, sample, **options)

    family = load_family(model.name)
    model.pipeline.set_progress_bar_config(disable=True)
    scheduler.step = record
    try:
        images = family.call(model.pipeline, family.prompts[:1], noise(model), STEPS, 1.0, **size.given)
    finally:
        scheduler.step = step
    return fed, scheduler.sigmas.cpu().float(), images


def noise(model) -> torch.Tensor:
    shape = model.latent_shape
    return normal(noise_address(SAMPLE, 0, 0, torch.arange(1)), INITIAL_STEP, torch.Size(shape).numel()).view(1, *shape)


def test_velocities_schedules_and_images_are_the_stock_pipelines_at_each_size_in_turn(model) -> None:
    """Twice around, so that nothing of one size is left for another; a conditioning may hold an image of the size."""
    prompts, embeddings = load_family(model.name).prompts[:1], Embeddings(model)
    own = model.size, model.latent_shape
    for size in SIZES[model.name] * 2:
        with torch.no_grad(), sized(model, size):
            assert model.size == size[:2]
            fed, levels, images = fed_to_the_scheduler(model, size)
            sigmas, conditioning = model.sigmas(STEPS), embeddings.prompted(prompts, 1.0).cond
            assert torch.equal(sigmas, levels) and len(fed) == STEPS
            for (x, expected), sigma in zip(fed, sigmas, strict=False):
                assert torch.equal(model.velocity(x, sigma[None], conditioning), expected)
            final = rollout(Policy(model), *ode_arguments(model, prompts, STEPS, 1.0)).final
            assert (model.decode(final).float() - (images.float() * 255).round()).abs().max() <= 1
    assert (model.size, model.latent_shape) == own


def test_each_size_is_a_graph_and_every_replay_is_the_eager_rollout(model) -> None:
    """Also where the latents of a wide image and of a tall one have the same shape."""
    captured, policy = CapturedRollout(recorder := Rerun()), Policy(model)
    prompts = load_family(model.name).prompts
    for size in SIZES[model.name] * 2:
        with sized(model, size):
            arguments = ode_arguments(model, prompts, STEPS, 1.0)
            assert equal(captured(policy, *arguments), rollout(policy, *arguments))
    assert (recorder.captures, recorder.replays) == (3, 6)


def test_images_are_encoded_at_each_size(model) -> None:
    """The way from the autoencoder's latents to the network's is the inverse of the way back."""
    if model.name == "wan":
        pytest.skip("videos are not encoded")
    for size in SIZES[model.name]:
        with sized(model, size):
            assert model.encode_images(torch.zeros(1, 3, *model.size, dtype=torch.uint8)).shape[1:] == model.latent_shape


def test_embeddings_on_disk_are_of_their_size(model, tmp_path: Path) -> None:
    """A text's are the same at every size, and are made once; an input image's are not."""
    prompts = load_family(model.name).prompts
    for _ in range(2):
        for size in SIZES[model.name]:
            with sized(model, size):
                Embeddings(model, tmp_path).prepare(prompts, OneRank(device=CPU))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(prompts) * (3 if model.image_conditioned else 1)
    embeddings = Embeddings(model, tmp_path)
    for size in SIZES[model.name]:
        with sized(model, size):
            found, expected = embeddings.prompted(prompts, 1.0).cond, Embeddings(model).prompted(prompts, 1.0).cond
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (Size(18, 16), r"rollout\.sizes\[1\] = 18x16, in place of the model's own size: .*height = 18: must be a multiple"),
        (Size(16, 20, 4), r"rollout\.sizes\[1\] = 16x20x4.*(num_frames = 4: (SD3|Flux\w*|Qwen\w*) has no such|width = 20)"),
    ],
)
def test_a_size_that_the_model_cannot_make_is_refused_and_leaves_it_as_it_was(model, size: Size, reason: str) -> None:
    own = model.settings
    with pytest.raises(ConfigError, match=reason):
        check_sizes(model, {"rollout.sizes[0]": SIZES[model.name][0], "rollout.sizes[1]": size})
    assert model.settings is own


@pytest.mark.processes
@pytest.mark.parametrize("model", ["flux_kontext", "wan"], indirect=True)
def test_each_iteration_of_a_run_is_that_of_a_run_at_its_size_alone(model, tmp_path: Path, fork_server: ForkServer) -> None:
    """Four iterations over three sizes, with a step so small that the weights stay; each row is the other run's, bitwise."""
    arguments = model.name, str(model.folder), str(tmp_path), json.dumps(SIZES[model.name])
    printed = fork_server.run(*arguments, program="support.size_worker:main")
    result = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert len(result["rows"]) == 4
    for row, alone in zip(result["rows"], result["alone"], strict=True):
        assert {side: row.pop(side) for side in alone["size"]} == alone.pop("size")
        assert row == alone and row["grad_norm"] > 0 and row["first_ratio_deviation"] == 0
    assert result["sizes"] == 3
    rewards = [row["reward"] for row in result["rows"]]
    assert all(first != second for first, second in pairwise(rewards))


def test_a_text_that_has_no_room_beside_the_image_of_one_size_is_refused_at_the_start(tmp_path: Path) -> None:
    """Qwen-Image-Edit's encoder reads the input image at the output's size, as 4 tokens of 16 x 16 and 400 of 160 x 160."""
    family = load_family("qwen_image_edit")
    family.save(tmp_path / "edit")
    settings = family.settings | {"input_size": "output"}
    model = load_model("qwen_image_edit", path=tmp_path / "edit", dtype=torch.float32, device=CPU, **settings)
    records = [{"prompt": one.text, "image": [str(file) for file in one.images]} for one in family.prompts]
    prompts = PromptSet([one.text for one in family.prompts], records, ["a", "b"])
    check_cut(model, (prompts, None, [Size(16, 16)]), (prompts, None, [Size()]))
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 320: .* with its images is \d+ tokens; raise it"):
        check_cut(model, (prompts, None, [Size(16, 16), Size(160, 160)]))
    assert model.size == (16, 16)
