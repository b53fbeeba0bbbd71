"""What is particular to Qwen-Image-2.1; what it shares with other families is in test_models."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawing import drawn, noise, ode_arguments
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.models.qwen_image_21 import QwenImage21, on_white
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing import load_family

FAMILY = load_family("qwen_image_21")
PROMPTS = ("a cat", "two blue squares left of a cat", "")


def load(dtype: torch.dtype = torch.float32, sample_sigmas: Any = None, **settings: Any) -> Any:
    pipeline = FAMILY.make()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(sample_sigmas=sample_sigmas)
    if dtype != torch.float32:
        pipeline.to(dtype)
    return QwenImage21(
        pipeline, dtype=dtype, device=torch.device("cpu"), **{**FAMILY.settings, **settings}
    )  # fmt: skip


def stock(**options: Any) -> Tensor:
    """Latents of the stock pipeline, whose transformer has its own processors."""
    pipeline = FAMILY.make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(height=64, width=64, output_type="latent", **options).images


def test_a_sample_is_the_stock_pipelines_whatever_prompts_are_beside_it() -> None:
    """Its image follows its own text: the stock pipeline puts it behind the longest prompt of a batch."""
    model = load()
    conditioning = model.encode(PROMPTS)
    assert conditioning.mask.sum(1).unique().numel() == 3 and not conditioning.mask.all(1).any()
    x, sigma = noise(model, 3), model.sigmas(2)
    with torch.no_grad():
        for step in range(2):
            v = model.velocity(x, sigma[step].expand(3), conditioning)
            x = x + (sigma[step + 1] - sigma[step]) * v
        for i, prompt in enumerate(PROMPTS):
            expected = stock(prompt=prompt, num_inference_steps=2, latents=noise(model, 3)[i : i + 1])
            torch.testing.assert_close(x[i : i + 1], expected, rtol=1e-5, atol=1e-5)
        # The text is read: another prompt's is another velocity.
        swapped = type(conditioning)(*(tensor.flip(0) for tensor in conditioning))
        moved = (model.velocity(x, sigma[1].expand(3), swapped) - model.velocity(x, sigma[1].expand(3), conditioning)).abs()
        assert moved[0].max() > 1e-3 and moved[1].max() == 0


def test_what_lies_in_the_padding_is_never_read() -> None:
    model = load()
    conditioning = model.encode(PROMPTS)
    poisoned = conditioning._replace(embeds=conditioning.embeds.masked_fill(~conditioning.mask[..., None], 1e3))
    x, sigma = noise(model, 3), torch.tensor([0.9, 0.5, 0.2])
    with torch.no_grad():
        assert torch.equal(model.velocity(x, sigma, poisoned), model.velocity(x, sigma, conditioning))


def test_what_the_text_becomes_does_not_depend_on_the_noise_nor_on_the_image() -> None:
    """The stock pipeline keeps it from the first step on."""
    model, kept = load(), []
    model.transformer.transformer_blocks[-1].register_forward_hook(lambda _, __, out: kept.append(out))
    conditioning = model.encode(PROMPTS[:1])
    with torch.no_grad():
        for level in (0.9, 0.2):
            model.velocity(level * noise(model, 1), torch.tensor([level]), conditioning)
    texts = FAMILY.settings["max_text_tokens"]
    assert torch.equal(kept[0][:, :texts], kept[1][:, :texts]) and not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_loop_has_no_host(scale: float) -> None:
    model = load()
    schedule = window_schedule(sampler_steps("cps", model.sigmas(4), 0.8), torch.zeros(2, dtype=torch.int64), 2)
    _, *arguments = ode_arguments(model, PROMPTS[:2], 4, scale)
    with NoSync():
        result = rollout(Policy(model), schedule, *arguments)
    assert result.final.isfinite().all()


def test_times_are_rounded_as_the_pipeline_rounds_them() -> None:
    """In bfloat16, which counts in fours near 1000."""
    model = load(torch.bfloat16)
    read: list[Tensor] = []
    model.transformer.time_text_embed.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    model.pipeline("a cat", height=64, width=64, num_inference_steps=4, output_type="latent")
    expected, sigmas = list(read), model.sigmas(4)
    read.clear()
    conditioning = model.encode(["a cat"])
    with torch.no_grad():
        for sigma in sigmas[:-1]:
            model.velocity(noise(model, 1).to(torch.bfloat16), sigma[None], conditioning)
    assert len(read) == 4 and all(map(torch.equal, read, expected))


def test_the_authors_noise_levels_are_taken_for_their_number_of_steps() -> None:
    own = [1.0, 0.7, 0.2]
    model = load(sample_sigmas=own)
    assert torch.equal(model.sigmas(4), load().sigmas(4))
    assert not torch.equal(model.sigmas(3), load().sigmas(3))
    model.pipeline("a cat", height=64, width=64, output_type="latent")
    assert torch.equal(model.sigmas(3), model.pipeline.scheduler.sigmas)


def test_an_image_that_is_no_square() -> None:
    model = load(height=32, width=96)
    assert model.grid == (1, 2, 6) and model.latent_shape == (12, 4)
    found = drawn(model, PROMPTS[:1], num_steps=2, guidance_scale=1.0)
    image = model.pipeline(
        PROMPTS[0], height=32, width=96, num_inference_steps=2, latents=noise(model, 1), output_type="pil"
    ).images[0]  # fmt: skip
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(white).astype(int)).max() <= 2


def test_what_is_transparent_is_white() -> None:
    images = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[0, 3], images[1, 3, :4] = 255, 0
    exact = 255 - (255 - images[:, :3].double()) * images[:, 3:].double() / 255
    assert torch.equal(on_white(images), exact.round().to(torch.uint8))
    assert torch.equal(on_white(images)[0], images[0, :3]) and (on_white(images)[1, :, :4] == 255).all()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 8192: QwenImage21 reads at most 8191; lower it"):
        load(max_text_tokens=8192)
    with pytest.raises(ValueError, match=r"model\.height = 48: must be a multiple of 32"):
        load(height=48)
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 20: 'a cat a.* is \d+ tokens; raise it"):
        load(max_text_tokens=20).encode(["a cat a dog a bird"])
