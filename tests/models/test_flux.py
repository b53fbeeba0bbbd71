"""What is particular to FLUX.1 and FLUX.1 Kontext, against the stock pipelines; test_models.py does the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image
from support.drawing import ode_arguments
from support.files import seen_alike
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.flux import Flux, FluxKontext
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing.flux import FAMILY, KONTEXT, SETTINGS, call, call_kontext, disc, make

STEPS = 3
SHAPES = [(16, 16), (16, 24), (32, 8)]  # height and width
KINDS = {"flux": (Flux, FluxPipeline, FAMILY, call), "kontext": (FluxKontext, FluxKontextPipeline, KONTEXT, call_kontext)}
SIGMA = torch.tensor([0.7317])


def adapter(
    kind: str = "flux", *, guidance_embeds: bool = True, dtype: torch.dtype = torch.float32, **settings: Any
) -> Adapter:
    model, pipeline, *_ = KINDS[kind]
    made = make(pipeline, guidance_embeds).to(dtype)
    made.set_progress_bar_config(disable=True)
    return model(made, dtype=dtype, device=torch.device("cpu"), **{**SETTINGS, **settings})


def latents(model: Adapter, count: int = 1) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(2)).to(model.dtype)


def stock(kind: str, model: Adapter) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The images of the stock pipeline for the first prompt, and the latents and velocities that its scheduler got."""
    *_, family, run = KINDS[kind]
    scheduler, fed = model.pipeline.scheduler, []
    step = scheduler.step

    def record(velocity: Tensor, timestep: Tensor, x: Tensor, **options: Any) -> Any:
        fed.append((x.clone(), velocity.clone()))
        return step(velocity, timestep, x, **options)

    scheduler.step = record
    height, width = model.size
    images = run(model.pipeline, family.prompts[:1], latents(model), STEPS, 1.0, height=height, width=width)
    del scheduler.step
    return images, fed


def check_steps(kind: str, model: Adapter) -> None:
    """Velocities to the last bit at every step, and the sigmas."""
    _, fed = stock(kind, model)
    sigmas, conditioning = model.sigmas(STEPS), model.encode(KINDS[kind][2].prompts[:1])
    assert len(fed) == STEPS and torch.equal(sigmas, model.pipeline.scheduler.sigmas)
    with torch.no_grad():
        for (x, velocity), sigma in zip(fed, sigmas, strict=False):
            assert torch.equal(model.velocity(x, sigma[None], conditioning), velocity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_every_shape_and_dtype_is_the_stock_pipelines(kind: str, dtype: torch.dtype, height: int, width: int) -> None:
    """bfloat16 shows where the pipeline rounds: its time step is divided by 1000 and multiplied again."""
    check_steps(kind, adapter(kind, dtype=dtype, height=height, width=width))


@pytest.mark.parametrize("kind", KINDS)
def test_without_distilled_guidance_the_steps_are_the_stock_pipelines(kind: str) -> None:
    """As schnell is made."""
    check_steps(kind, adapter(kind, guidance_embeds=False, distilled_guidance=None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_images_that_are_not_square_decode_as_the_stock_pipelines(kind: str, height: int, width: int) -> None:
    model = adapter(kind, height=height, width=width)
    images, fed = stock(kind, model)
    x, sigmas = latents(model), model.sigmas(STEPS)
    with torch.no_grad():
        for (_, velocity), sigma, sigma_next in zip(fed, sigmas[:-1], sigmas[1:], strict=True):
            x = x + (sigma_next - sigma) * velocity
    found = model.decode(x)
    assert found.shape == (1, 3, height, width) and images.std() > 0.01
    assert (found.float() - (images * 255).round()).abs().max() <= 1


def test_the_schedule_shifts_with_the_resolution() -> None:
    small, large = adapter(height=16, width=16).sigmas(8), adapter(height=32, width=16).sigmas(8)
    assert small[0] == large[0] == 1 and small[-1] == large[-1] == 0
    assert (large[1:-1] > small[1:-1]).all()  # more tokens, more noise


def test_published_schedules() -> None:
    """exp(mu) / (exp(mu) + 1 / sigma - 1), mu from 0.5 at 256 tokens to 1.15 at 4096; schnell's is a straight line."""

    def sigmas(architecture: str, size: int, **settings: float) -> Tensor:
        return Flux.random(
            architecture, dtype=torch.bfloat16, device=torch.device("meta"), height=size, width=size, **settings
        ).sigmas(4)

    line = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    for size, mu in ((256, 0.5), (1024, 1.15)):
        shift = torch.tensor(mu).exp()
        expected = shift * line / (1 + (shift - 1) * line)
        torch.testing.assert_close(sigmas("flux.1-dev", size, distilled_guidance=3.5), expected)
        assert torch.equal(sigmas("flux.1-schnell", size), line)


@pytest.mark.parametrize(("kind", "published"), [("flux", "3.5"), ("kontext", "2.5")])
def test_distilled_guidance_is_required_where_it_is_read(kind: str, published: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.distilled_guidance is missing: .* published value is {published}"):
        adapter(kind, distilled_guidance=None)


@pytest.mark.parametrize("kind", KINDS)
def test_distilled_guidance_is_refused_where_it_is_not_read(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model\.distilled_guidance = 3\.5: .* leave it out"):
        adapter(kind, guidance_embeds=False)


def test_distilled_guidance_matters() -> None:
    found = []
    for guidance in (1.0, 3.5):
        model = adapter(distilled_guidance=guidance)
        with torch.no_grad():
            found.append(model.velocity(latents(model), SIGMA, model.encode(["a cat"])))
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_rollout_has_no_host_in_it(kind: str, guidance_scale: float) -> None:
    model, prompts = adapter(kind), KINDS[kind][2].prompts
    steps = sampler_steps("cps", model.sigmas(STEPS), 0.8)
    schedule = window_schedule(steps, torch.zeros(2, dtype=torch.int64), 2)
    _, *arguments = ode_arguments(model, prompts, STEPS, guidance_scale)
    with NoSync():
        rollout(Policy(model), schedule, *arguments)


def test_the_input_image_matters() -> None:
    model, prompt = adapter("kontext"), KONTEXT.prompts[0]
    with torch.no_grad():
        v, other = (
            model.velocity(latents(model), SIGMA, model.encode([prompt._replace(images=images)]))
            for images in (prompt.images, KONTEXT.prompts[1].images)
        )
    assert v.shape == (1, *model.latent_shape) and (v - other).abs().max() > 1e-3


def test_an_empty_text_keeps_the_image() -> None:
    model, prompt = adapter("kontext"), KONTEXT.prompts[0]
    with_text, without = model.encode([prompt]), model.encode([prompt._replace(text="")])
    assert torch.equal(with_text.image, without.image) and not torch.equal(with_text.embeds, without.embeds)


def test_input_images_of_any_shape_are_resized_to_the_output(tmp_path: Path) -> None:
    """Also grey ones and those with transparency, so that all rows have as many tokens."""
    Image.new("L", (7, 40), 90).save(tmp_path / "grey.png")
    Image.new("RGBA", (50, 9), (10, 200, 30, 128)).save(tmp_path / "clear.png")
    files = [tmp_path / "grey.png", tmp_path / "clear.png", disc("exact", (24, 16), "white", "red")]
    model = adapter("kontext", height=16, width=24)
    conditioning = model.encode([ImagePrompt("brighter", (file,)) for file in files])
    assert conditioning.image.shape == (3, *model.latent_shape)
    for image, file in zip(conditioning.image, files, strict=True):
        assert torch.equal(image, model.encode_image(file)[0])


def test_an_input_image_is_read_as_people_see_it(tmp_path: Path) -> None:
    model, (plain, hiding) = adapter("kontext"), seen_alike(tmp_path)
    assert torch.equal(model.encode_image(plain), model.encode_image(hiding))


def test_cached_embeddings_of_another_size_are_not_taken() -> None:
    """An image's latents depend on the size that it is resized to, a text's embedding does not."""

    def settings(kind: str, width: int) -> dict:
        return adapter(kind, width=width).encoder_settings

    assert settings("kontext", 16) != settings("kontext", 24) and settings("flux", 16) == settings("flux", 24)
