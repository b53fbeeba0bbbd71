"""What is particular to Wan from a video, against the stock pipeline: the start, the share of the schedule, the videos."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from support.drawing import drawn, noise, ode_arguments
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.config.sizes import Size
from fastgrpo.data.embedding_files import EmbeddingFiles
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt, PromptSet
from fastgrpo.models import load_model
from fastgrpo.models.loading import read_architecture
from fastgrpo.models.wan import Wan
from fastgrpo.models.wan_video import WanVideo
from fastgrpo.parts import check_cut
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.tables import SAMPLERS, sampler_steps
from fastgrpo.testing import load_family
from fastgrpo.testing.wan import make as make_from_text
from fastgrpo.testing.wan import make_experts
from fastgrpo.testing.wan_video import ANIMATION, FILES, FRAMES, call, make

CPU, SETTINGS = torch.device("cpu"), load_family("wan_video").settings
PROMPTS = [ImagePrompt("a cat", FILES), ImagePrompt("", (ANIMATION,)), ImagePrompt("a dog", FILES[::-1])]
STEPS = 3


def adapter(unipc: bool = False, dtype: torch.dtype = torch.float32, **settings: Any) -> WanVideo:
    pipeline = make().to(dtype)
    pipeline.vae.float()
    if unipc:  # as in the published folders
        pipeline.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
    pipeline.set_progress_bar_config(disable=True)
    return WanVideo(pipeline, dtype=dtype, device=CPU, **{**SETTINGS, **settings})


def fed(model: WanVideo, prompt: ImagePrompt) -> list[tuple[Tensor, Tensor]]:
    """The latents and velocities that the stock pipeline hands to its scheduler."""
    scheduler, found = model.pipeline.scheduler, []
    step = scheduler.step

    def record(velocity: Tensor, timestep: Tensor, x: Tensor, **options: Any) -> Any:
        found.append((x.clone(), velocity.clone()))
        return step(velocity, timestep, x, **options)

    scheduler.step = record
    height, width = model.size
    call(model.pipeline, [prompt], noise(model, 1), STEPS, 1.0, height=height, width=width, strength=model.strength)
    del scheduler.step
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize(("unipc", "strength"), [(False, 0.3), (False, 1.0), (True, 0.3), (True, 0.8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_and_the_velocities_are_the_stock_pipelines(unipc: bool, strength: float, dtype: torch.dtype) -> None:
    """To the last bit, not square, of files and of an animation, with a scheduler that adds noise under either name."""
    model = adapter(unipc, dtype, width=32, strength=strength)
    for prompt in PROMPTS:
        conditioning, sigmas = model.encode([prompt]), model.sigmas(STEPS)
        steps = fed(model, prompt)
        assert torch.equal(sigmas, model.pipeline.scheduler.sigmas[-STEPS - 1 :].float())
        assert torch.equal(model.start(noise(model, 1), sigmas[:1], conditioning), steps[0][0])
        for (x, velocity), sigma in zip(steps, sigmas, strict=False):
            with torch.no_grad():
                assert torch.equal(model.velocity(x.to(dtype), sigma[None], conditioning), velocity)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_videos_of_a_batch_are_the_stock_pipelines(scale: float) -> None:
    model = adapter(width=32)
    found = drawn(model, PROMPTS, num_steps=STEPS, guidance_scale=scale)
    expected = call(model.pipeline, PROMPTS, noise(model, 3), STEPS, scale, width=32)
    assert (found.float() - (expected.float() * 255).round()).abs().max() <= 1
    other = [prompt._replace(images=PROMPTS[i - 1].images) for i, prompt in enumerate(PROMPTS)]
    assert not torch.equal(drawn(model, other, num_steps=STEPS, guidance_scale=scale), found)


@pytest.mark.parametrize("strength", [0.01, 0.29, 0.7, 0.8, 1.0])
def test_as_many_steps_are_taken_as_are_asked_for(strength: float) -> None:
    """The last ones of the shortest schedule of which the stock pipeline takes so many."""
    model = adapter(strength=strength)
    for num_steps in (1, 2, 7, 10, 29):
        longer, taken = num_steps, -1
        while taken != num_steps:
            model.pipeline.scheduler.set_timesteps(longer)
            _, taken = model.pipeline.get_timesteps(longer, model.pipeline.scheduler.timesteps, strength, CPU)
            longer += 1
        assert torch.equal(model.sigmas(num_steps), model.pipeline.scheduler.sigmas[-num_steps - 1 :])


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"wan_sde"}))
def test_a_part_of_a_schedule_has_the_steps_of_the_whole(sampler: str) -> None:
    """No sampler takes the first level for 1; the noise of wan_sde is by the second level of what it is given."""
    part, whole = adapter(strength=0.5).sigmas(5), adapter(strength=1.0).sigmas(10)
    assert part[0] < 1 == whole[0]
    found, expected = (sampler_steps(sampler, sigmas, 0.7).coefficients for sigmas in (part, whole))
    assert torch.equal(found, expected[5:])


def test_a_rollout_has_no_host() -> None:
    model = adapter(dtype=torch.bfloat16)
    arguments = ode_arguments(model, PROMPTS[:2], 3, 4.5)
    with NoSync():
        rollout(Policy(model), *arguments)


def test_the_published_folders_are_those_from_text(tmp_path: Path) -> None:
    """Of one transformer that has a timestep a video: others are refused before anything is loaded."""
    made = make()
    parts = {name: getattr(made, name) for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    WanPipeline(**parts).save_pretrained(tmp_path / "t2v")
    WanPipeline(**parts, expand_timesteps=True).save_pretrained(tmp_path / "ti2v")
    make_experts().save_pretrained(tmp_path / "a14b")
    model = load_model("wan_video", path=tmp_path / "t2v", dtype=torch.float32, device=CPU, **SETTINGS)
    assert torch.equal(model.encode(PROMPTS[:1]).video, adapter().encode(PROMPTS[:1]).video)
    for name, holds in (("ti2v", "a transformer with a timestep a token"), ("a14b", "two transformers")):
        with pytest.raises(ValueError, match=rf"model\.path = .*{name}: holds {holds}.*take Wan2\.1-T2V-1\.3B"):
            WanVideo.check_files(tmp_path / name)


def test_it_is_planned_at_the_size_of_the_published_one() -> None:
    name, meta = "wan2.1-t2v-1.3b", torch.device("meta")
    model = WanVideo.random(name, dtype=torch.bfloat16, device=meta, **read_architecture(name)["settings"])
    assert model.latent_shape == (16, 21, 60, 104)
    conditioning = model.placeholder(1)
    x = torch.empty(1, *model.latent_shape, device=meta)
    assert model.start(x, torch.ones(1, device=meta), conditioning).shape == x.shape
    assert model.velocity(x.bfloat16(), torch.ones(1, device=meta), conditioning).shape == x.shape


def test_embeddings_are_of_the_video_and_its_size(tmp_path: Path) -> None:
    def mark(**settings: Any) -> str:
        return EmbeddingFiles(adapter(**settings), tmp_path).fingerprint

    assert len({mark(), mark(width=32), mark(num_frames=9)}) == 3 and mark(strength=0.5) == mark()
    first, turned = (adapter().encode([PROMPTS[0]._replace(images=images)]) for images in (FILES, FILES[::-1]))
    assert torch.equal(first.embeds, turned.embeds) and not torch.equal(first.video, turned.video)


def test_animations_that_begin_alike_have_embeddings_of_their_own(tmp_path: Path) -> None:
    moving = [tmp_path / f"{number}.webp" for number in range(2)]
    frames = [Image.open(file) for file in FILES]
    frames[0].save(moving[0], save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(moving[1], save_all=True, append_images=frames[:0:-1], lossless=True)
    embeddings = Embeddings(adapter(), tmp_path / "cache")
    first, second = embeddings.prompted([ImagePrompt("a cat", (file,)) for file in moving], 1.0).cond.video
    assert not torch.equal(first, second)


# What is refused.


def test_a_video_of_another_length_is_refused_before_training(tmp_path: Path) -> None:
    """By the size that it is read at: an evaluation may have videos of its own length."""
    model, pictures = adapter(), [Image.open(file) for file in FILES[:4]]
    pictures[0].save(short := tmp_path / "short.webp", save_all=True, append_images=pictures[1:], lossless=True)
    for images, count in ((FILES[:4], 4), (FILES[:1], 1), ((*FILES, FILES[0]), 6), ((short,), 4)):
        prompt = ImagePrompt("a cat", images)
        for ask in (model.read_in_part, model.encode):
            with pytest.raises(ValueError, match=rf"{images[0].name}: .* {count} frames, and a video here has {FRAMES} "):
                ask([prompt])
    nine = PromptSet(["a cat"], [{"prompt": "a cat", "image": [str(file) for file in (*FILES, *FILES[:4])]}])
    check_cut(model, (nine, None, [Size(num_frames=9)]))
    with pytest.raises(ValueError, match=r"is the first of 9 frames"):
        check_cut(model, (nine, None, [Size()]))


def test_a_strength_that_is_none_is_refused() -> None:
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"model\.strength = {strength}: is a share of the noise levels"):
            adapter(strength=strength)
    with pytest.raises(ValueError, match=r"model\.strength = 0\.5: Wan has no such input"):
        Wan(make_from_text(), dtype=torch.float32, device=CPU, **SETTINGS, strength=0.5)
