"""What is particular to Qwen-Image-2.1; what it shares with other families is in test_models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVLayerCache
from PIL import Image
from support.capture import Rerun, equal
from support.drawing import drawn, noise, ode_arguments
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.commands.counting import counted
from fastgrpo.models import load_model
from fastgrpo.models.qwen_image_21 import QwenImage21, on_white
from fastgrpo.policy import Policy, prompted_velocity
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing import load_family
from fastgrpo_kernels import guided_velocity

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


def test_a_model_from_a_folder_reads_prompts_as_the_stock_pipeline(tmp_path: Path) -> None:
    """Without the tokens of the template's system message, though its processor is set after it was made."""
    FAMILY.save(tmp_path)
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), **FAMILY.settings}
    conditioning = load_model("qwen_image_21", path=tmp_path, **settings).encode([PROMPTS[1]])
    expected = FAMILY.make().encode_prompt([PROMPTS[1]])[0]
    assert torch.equal(conditioning.embeds[conditioning.mask][None], expected)


def test_what_lies_in_the_padding_is_never_read() -> None:
    model = load()
    conditioning = model.encode(PROMPTS)
    poisoned = conditioning._replace(embeds=conditioning.embeds.masked_fill(~conditioning.mask[..., None], 1e3))
    x, sigma = noise(model, 3), torch.tensor([0.9, 0.5, 0.2])
    with torch.no_grad():
        assert torch.equal(model.velocity(x, sigma, poisoned), model.velocity(x, sigma, conditioning))


# Keys and values of the text, once a rollout


def trained(dtype: torch.dtype = torch.float32) -> Any:
    """A model whose LoRA, in the text's part too, has an effect."""
    model = load(dtype)
    model.add_lora(rank=4, alpha=8)
    for name, p in model.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def of_window(model: Any, scale: float) -> tuple[Any, ...]:
    """A rollout's arguments: 5 steps, of which two are trained, other ones for each sample."""
    schedule = window_schedule(sampler_steps("cps", model.sigmas(5), 0.8), torch.tensor([0, 2]), 2)
    return schedule, *ode_arguments(model, PROMPTS[:2], 5, scale)[1:]


def anew(model: Any) -> Policy:
    """A policy that makes them anew at every step."""
    policy = Policy(model)
    policy.prepared = lambda conditioning: conditioning  # type: ignore[method-assign]
    return policy


def test_they_are_those_of_the_stock_pipelines_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[tuple[Tensor, Tensor]] = []
    store = QwenImage21KVLayerCache.store

    def record(cache: QwenImage21KVLayerCache, k: Tensor, v: Tensor) -> None:
        stored.append((k, v))
        store(cache, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(QwenImage21KVLayerCache, "store", record)
        stock(prompt=PROMPTS[1], num_inference_steps=2)
    model = load()
    prefix = model.prepared(model.encode(PROMPTS[:2]))
    assert len(stored) == len(prefix.keys) == len(model.blocks) == 2
    for expected, found in zip(stored, zip(prefix.keys, prefix.values, strict=True), strict=True):
        for one, both in zip(expected, found, strict=True):
            torch.testing.assert_close(both[1:, : one.shape[1]], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_that_makes_them_once_is_the_same_and_so_is_the_update(dtype: torch.dtype, scale: float) -> None:
    """To the last bit: the ratio of the first update is 1."""
    model = trained(dtype)
    schedule, address, prompted, _ = arguments = of_window(model, scale)
    policy, found = Policy(model), []
    flops = [counted(lambda by=by: found.append(rollout(by, *arguments)))[0] for by in (policy, anew(model))]  # type: ignore
    with torch.no_grad():
        once, _ = counted(lambda: model.prepared(prompted.asked))
    assert equal(*found) and flops[1] - flops[0] == 4 * once > 0

    weights, gradients = [p for p in model.transformer.parameters() if p.requires_grad], []
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        velocity = prompted_velocity(policy, prompted, scale, policy.guide)
        for j in range(2):
            v = velocity(found[0].latents[j].to(dtype), schedule.sigmas[schedule.start + j])
            assert torch.equal(guided_velocity(v), found[0].v_old[j].float())
        gradients.append(torch.autograd.grad(v.v.square().sum(), weights))
    assert all(g.abs().max() > 0 for g in gradients[0]) and all(map(torch.equal, *gradients))


def test_the_gradient_goes_through_them() -> None:
    """As the finite difference along a direction in the weights of the LoRA, of which most is lost without them."""
    model = trained(torch.float64)
    conditioning, x, sigma = model.encode(PROMPTS[:2]), noise(model, 2).double(), torch.tensor([0.5, 0.9])
    weights = [p for p in model.transformer.parameters() if p.requires_grad]
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in weights]

    def loss() -> Tensor:
        return model.velocity(x, sigma, conditioning).square().sum()

    def moved(distance: float) -> float:
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=distance)
            found = loss().item()
            torch._foreach_add_(weights, direction, alpha=-distance)
        return found

    along = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), weights), direction, strict=True))
    assert along.item() == pytest.approx((moved(1e-4) - moved(-1e-4)) / 2e-4, rel=1e-3)


def test_a_captured_rollout_makes_them_of_the_weights_of_the_moment() -> None:
    model = trained()
    policy, captured, found = Policy(model), CapturedRollout(Rerun()), []
    for _ in range(2):
        found.append(captured(policy, *of_window(model, 4.0)))
        assert equal(found[-1], rollout(anew(model), *of_window(model, 4.0)))
        with torch.no_grad():
            for p in model.transformer.parameters():
                p.mul_(1.1)
    assert len(captured.graphs) == 1 and not equal(*found)


def test_a_network_that_tells_text_the_noise_level_makes_them_at_every_step() -> None:
    pipeline = FAMILY.make()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_to_config(causal_condition=False)
    model = QwenImage21(pipeline, dtype=torch.float32, device=torch.device("cpu"), **FAMILY.settings)
    conditioning = model.encode(PROMPTS[:1])
    assert model.prepared(conditioning) is conditioning
    found = rollout(Policy(model), *ode_arguments(model, PROMPTS[:1], 3, 1.0)).final
    expected = pipeline(
        PROMPTS[0], height=64, width=64, num_inference_steps=3, latents=noise(model, 1), output_type="latent"
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    untold = rollout(Policy(load()), *ode_arguments(model, PROMPTS[:1], 3, 1.0)).final
    assert (found - untold).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_loop_has_no_host(scale: float) -> None:
    model = load()
    schedule = window_schedule(sampler_steps("cps", model.sigmas(4), 0.8), torch.zeros(2, dtype=torch.int64), 2)
    _, *arguments = ode_arguments(model, PROMPTS[:2], 4, scale)
    with NoSync():
        result = rollout(Policy(model), schedule, *arguments)
    assert result.final.isfinite().all()


def test_times_are_rounded_as_the_pipeline_rounds_them() -> None:
    """In bfloat16, which counts in fours near 1000. Text is modulated as at 0, in the stock pipeline's last row."""
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
    found = [torch.cat([image, text]) for image, text in zip(read[::2], read[1::2], strict=True)]
    assert len(found) == 4 and all(map(torch.equal, found, expected))


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
