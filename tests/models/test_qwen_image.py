"""What is particular to Qwen-Image and its family; what they share with other families is in test_models.

What the models that edit images do with those is in test_qwen_image_edit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drawing import drawn, noise, ode_arguments
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.models import load_model
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing import load_family
from fastgrpo.testing.qwen_image import TEXT_TOKENS

NAMES = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
PROMPTS = load_family("qwen_image").prompts
LONG = "a cat " * 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("qwen")
    for name in NAMES:
        load_family(name).save(base / name)
    return {name: base / name for name in NAMES}


@pytest.fixture(scope="module")
def load(folders):
    def load(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        settings = load_family(name).settings | settings
        model = load_model(name, path=folders[name], dtype=dtype, device=torch.device("cpu"), **settings)
        model.pipeline.set_progress_bar_config(disable=True)
        return model

    return load


def fed_by(model: Any, run: Callable[[], Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What a run of the stock pipeline feeds its scheduler, (x, v) a step; and its image."""
    scheduler, fed = model.pipeline.scheduler, []
    step = type(scheduler).step

    def record(velocity: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        fed.append((sample.clone(), velocity.clone()))
        return step(scheduler, velocity, timestep, sample, **options)

    scheduler.step = record
    return fed, run()


def stock(model: Any, prompt: str, scale: float) -> Tensor:
    """The image of a text as users write it."""
    height, width = model.size
    return model.pipeline(
        prompt, negative_prompt=" ", true_cfg_scale=scale, num_inference_steps=4, latents=noise(model, 1),
        height=height, width=width, output_type="pt",
    ).images  # fmt: skip


def velocity(model: Any, x: Tensor, sigma: Tensor, prompt: Any, scale: float = 1.0) -> Tensor:
    with torch.no_grad():
        v = model.velocity(x, sigma, model.encode([prompt]))
        if scale == 1:
            return v
        nothing = "" if isinstance(prompt, str) else prompt._replace(text="")
        return model.guide(v, model.velocity(x, sigma, model.encode([nothing])), scale)


# Guidance


def test_guidance_keeps_the_norm_of_each_token() -> None:
    v, v_uncond = (torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    combined = -3 * v_uncond + 4 * v
    expected = combined * (v.square().sum(-1, keepdim=True) / combined.square().sum(-1, keepdim=True)).sqrt()
    found = QwenImage.guide(v, v_uncond, 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=-1), v.norm(dim=-1))
    assert (found - combined).abs().max() > 0.1  # and is not plain guidance
    torch.autograd.gradcheck(lambda a, b: QwenImage.guide(a, b, 4.0), (v, v_uncond))
    found.square().sum().backward()
    assert v.grad.abs().max() > 0
    # A velocity of zero has a gradient too, not NaN: the norm's is zero there.
    zero = torch.zeros(1, 2, 4, requires_grad=True)
    QwenImage.guide(zero, torch.ones(1, 2, 4), 4.0).sum().backward()
    assert zero.grad.isfinite().all()


# Prompts


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_padded_prompt_has_the_velocity_of_the_stock_pipelines_unpadded_one(load, scale: float) -> None:
    model = load("qwen_image")
    assert model.encode([PROMPTS[0]]).mask.sum() < TEXT_TOKENS - 20
    fed, _ = fed_by(model, lambda: stock(model, PROMPTS[0], scale))
    assert len(fed) == 4
    for (x, expected), sigma in zip(fed, model.sigmas(4), strict=False):
        torch.testing.assert_close(velocity(model, x, sigma[None], PROMPTS[0], scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_in_the_padding_is_never_read(load, name: str) -> None:
    model = load(name)
    conditioning = model.encode(list(load_family(name).prompts))
    poisoned = conditioning._replace(embeds=conditioning.embeds.masked_fill(~conditioning.mask[..., None], 1e3))
    x, sigma = noise(model, 2), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        expected = model.velocity(x, sigma, conditioning)
        assert torch.equal(model.velocity(x, sigma, poisoned), expected)
        seen = conditioning._replace(mask=torch.ones_like(conditioning.mask))
        assert not torch.equal(model.velocity(x, sigma, seen), expected)


def test_a_row_does_not_depend_on_the_other_prompts(load) -> None:
    model = load("qwen_image")
    together = model.encode([*PROMPTS, ""])
    for i, prompt in enumerate([*PROMPTS, " "]):  # no prompt is a space
        for row, alone in zip(together, model.encode([prompt]), strict=True):
            assert torch.equal(row[i : i + 1], alone)
    assert together.mask.sum(1).unique().numel() == 3


def test_a_long_prompt_is_cut_as_the_stock_pipeline_cuts_it(load) -> None:
    model = load("qwen_image")
    with torch.no_grad():
        expected, _ = model.pipeline.encode_prompt(LONG, max_sequence_length=TEXT_TOKENS)
        assert model.pipeline.encode_prompt(LONG)[0].shape[1] > TEXT_TOKENS
    found = model.encode([LONG])
    assert torch.equal(found.embeds, expected) and found.mask.all()


def test_settings_that_cannot_be_are_refused(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 1025: QwenImage reads at most 1024"):
        load("qwen_image", max_text_tokens=1025)
    model = load("qwen_image")
    model.use_attention("native")
    for name in ("flash2", "flash3", "xformers"):
        with pytest.raises(ValueError, match=rf"model\.attention = '{name}': .* take native"):
            model.use_attention(name)
    with pytest.raises(ValueError, match=r"model\.tiny_decoder = .*: .* leave it out"):
        model.load_tiny_decoder(tmp_path)


# Schedule, sizes, arithmetic


@pytest.mark.parametrize("size", [(16, 16), (64, 32)])
def test_the_schedule_is_the_pipelines_at_every_size(load, size: tuple[int, int]) -> None:
    model = load("qwen_image", height=size[0], width=size[1])
    stock(model, PROMPTS[0], 1.0)
    sigmas = model.sigmas(4)
    assert torch.equal(sigmas, model.pipeline.scheduler.sigmas)
    assert sigmas[0] == 1 and sigmas[-2] == pytest.approx(0.02) and sigmas[-1] == 0


def test_the_schedule_depends_on_the_size(load) -> None:
    small, large = (load("qwen_image", height=side, width=side).sigmas(4) for side in (16, 256))
    assert (large[1:3] > small[1:3] + 0.01).all()


def test_an_image_that_is_no_square(load) -> None:
    model = load("qwen_image", height=24, width=16)
    assert model.latent_shape == (24, 16) and model.grid == (1, 6, 4)
    found = drawn(model, PROMPTS[:1], num_steps=4, guidance_scale=4.0)
    image = stock(model, PROMPTS[0], 4.0)
    assert found.shape == (1, 3, 24, 16)
    assert (found.float() - (image * 255).round()).abs().max() <= 1


def test_times_are_rounded_as_the_pipeline_rounds_them(load) -> None:
    """In bfloat16, to the last bit."""
    model, call = load("qwen_image", torch.bfloat16), load_family("qwen_image").call
    fed, _ = fed_by(model, lambda: call(model.pipeline, PROMPTS[:1], noise(model, 1), 4, 4.0))
    for (x, expected), sigma in zip(fed, model.sigmas(4), strict=False):
        assert x.dtype == torch.bfloat16
        assert torch.equal(velocity(model, x, sigma[None], PROMPTS[0], 4.0), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_loop_has_no_host(load, name: str, scale: float) -> None:
    model = load(name)
    steps = sampler_steps("cps", model.sigmas(4), 0.8)
    schedule = window_schedule(steps, torch.zeros(2, dtype=torch.int64), 2)
    _, *arguments = ode_arguments(model, load_family(name).prompts, 4, scale)
    with NoSync():
        result = rollout(Policy(model), schedule, *arguments)
    assert result.final.isfinite().all()
