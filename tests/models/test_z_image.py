"""Z-Image's own forward pass over padded captions, against the stock transformer over lists of captions."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.drawing import ode_arguments
from support.helpers import NoSync

from fastgrpo.models import model_class
from fastgrpo.policy import Policy
from fastgrpo.records import concatenate
from fastgrpo.sampling.rollout import rollout
from fastgrpo.testing import load_family

FAMILY = load_family("z_image")
# The chat's own marks and words are 19 tokens and every letter is one: captions on both sides of 32 tokens, at it, and cut.
PROMPTS = ["", "a red circle", "x" * 13, "y" * 14, "two blue squares left of a cat", "z" * 90]
LENGTHS = [19, 31, 32, 33, 49, 64]


def adapter(height: int = 16, width: int = 16, pipeline=None, **settings):
    settings = FAMILY.settings | {"height": height, "width": width} | settings
    return model_class("z_image")(pipeline or FAMILY.make(), dtype=torch.float32, device=torch.device("cpu"), **settings)


@pytest.fixture(scope="module")
def model():
    return adapter()


def stock_velocity(model, x, sigma, conditioning) -> torch.Tensor:
    """By the stock transformer, as its pipeline calls it: captions of their own lengths."""
    captions = [embeds[:n] for embeds, n in zip(conditioning.embeds, conditioning.length.tolist(), strict=True)]
    time = (1000 - sigma * 1000) / 1000
    found = model.transformer(list(x.unsqueeze(2)), time, captions, return_dict=False)[0]
    return -torch.stack(found).squeeze(2)


def example(model, count: int = len(PROMPTS)) -> tuple:
    torch.manual_seed(1)
    return torch.randn(count, *model.latent_shape), torch.linspace(0.95, 0.05, count), model.encode(PROMPTS[:count])


# 16 and 24 image tokens end in pad tokens, 32 do not.
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (32, 16)])
def test_any_mix_of_lengths_gives_each_prompt_the_velocity_it_has_alone(height: int, width: int) -> None:
    model = adapter(height, width)
    x, sigma, conditioning = example(model)
    assert conditioning.length.tolist() == LENGTHS and conditioning.embeds.shape == (6, 64, 32)
    with torch.no_grad():
        together = model.velocity(x, sigma, conditioning)
        torch.testing.assert_close(together, stock_velocity(model, x, sigma, conditioning), rtol=1e-5, atol=1e-5)
        for i in range(len(x)):
            part, row = slice(i, i + 1), type(conditioning)(*(t[i : i + 1] for t in conditioning))
            torch.testing.assert_close(model.velocity(x[part], sigma[part], row), together[part], rtol=1e-5, atol=1e-5)
            alone = stock_velocity(model, x[part], sigma[part], model.encode(PROMPTS[part]))
            torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=1e-5)


def test_what_lies_past_a_caption_is_not_read(model) -> None:
    x, sigma, conditioning = example(model)
    past = torch.arange(64) >= conditioning.length[:, None]
    noisy = torch.where(past[..., None], torch.randn_like(conditioning.embeds), conditioning.embeds)
    with torch.no_grad():
        expected = model.velocity(x, sigma, conditioning)
        assert torch.equal(model.velocity(x, sigma, conditioning._replace(embeds=noisy)), expected)
        shorter = model.velocity(x, sigma, conditioning._replace(length=conditioning.length - 1))
    assert ((shorter - expected).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_stock_transformers(checkpointing: bool) -> None:
    model = adapter()
    model.train_all(keep_reference=False)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    parameters = dict(model.transformer.named_parameters())
    x, sigma, conditioning = example(model)
    direction, gradients, blocks = torch.randn_like(x), [], []
    model.transformer.layers[0].register_forward_pre_hook(lambda *_: blocks.append(None))
    for velocity in (model.velocity, lambda *inputs: stock_velocity(model, *inputs)):
        loss = (velocity(x, sigma, conditioning) * direction).sum()
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    assert len(blocks) == (4 if checkpointing else 2)  # run again in the backward pass
    for name, found, expected in zip(parameters, *gradients, strict=True):
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 32)])
def test_the_schedule_is_the_pipelines(height: int, width: int, dynamic: bool) -> None:
    """Published are fixed shifts; a pipeline whose shift follows the image's size is handled as it does it."""
    pipeline = FAMILY.make()
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic))
    pipeline.set_progress_bar_config(disable=True)
    model = adapter(height, width, pipeline)
    pipeline("a red circle", height=height, width=width, num_inference_steps=5, guidance_scale=0, max_sequence_length=64)
    assert torch.equal(model.sigmas(5), pipeline.scheduler.sigmas)
    other = adapter(16, 32, pipeline).sigmas(5)
    assert torch.equal(other, model.sigmas(5)) != dynamic


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_loop_has_no_host(model, guidance_scale: float) -> None:
    arguments = ode_arguments(model, PROMPTS[1:3], 2, guidance_scale)
    with NoSync():
        rollout(Policy(model), *arguments)


def test_one_shape_whatever_the_prompts(model) -> None:
    """So that one captured graph serves all of them."""
    rows = concatenate([model.encode([prompt]) for prompt in PROMPTS])
    assert rows.embeds.shape == model.placeholder(6).embeds.shape and rows.length.shape == model.placeholder(6).length.shape
    odd = adapter(max_text_tokens=50)
    conditioning, longest = odd.encode(PROMPTS), odd.placeholder(1)
    assert conditioning.embeds.shape[1] == longest.embeds.shape[1] == 64
    assert conditioning.length.max() == longest.length == 50


def test_guidance_is_the_straight_line_in_the_models_dtype(model) -> None:
    v, v_uncond = torch.randn(2, 2, 3).bfloat16()
    guided = model.guide(v, v_uncond, 4.0)
    assert guided.dtype == torch.bfloat16
    expected = v_uncond.double() + 4 * (v.double() - v_uncond.double())
    torch.testing.assert_close(guided.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 18}, r"model\.height = 18: must be a multiple of 4"),
        ({"height": 132}, r"model\.height = 132: .* end at 128; take at most that"),
        ({"width": 132}, r"model\.width = 132: .* end at 128; take at most that"),
        ({"max_text_tokens": 225}, r"model\.max_text_tokens = 225: .* end at 224; take at most that"),
        ({"distilled_guidance": 3.5}, r"model\.distilled_guidance = 3\.5: ZImage has no such input; leave it out"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter(**settings)


def test_the_largest_sizes_have_positions() -> None:
    model = adapter(128, 128, max_text_tokens=224)
    with torch.no_grad():
        v = model.velocity(torch.randn(1, *model.latent_shape), torch.ones(1), model.placeholder(1))
    assert v.shape == (1, 4, 64, 64) and v.isfinite().all()


def test_attention_kernels_without_masks_are_refused(model) -> None:
    model.use_attention("native")
    with pytest.raises(ValueError, match=r"model\.attention = 'flash2': .* take native"):
        model.use_attention("flash2")
