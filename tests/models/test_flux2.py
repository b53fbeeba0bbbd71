"""FLUX.2 dev and klein beside what every model is tested for: positions, sizes, schedule, distilled guidance, errors."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from support.drawing import ode_arguments
from support.helpers import NoSync

from fastgrpo.models import model_class
from fastgrpo.parts import check_guidance
from fastgrpo.policy import Policy
from fastgrpo.sampling.rollout import rollout
from fastgrpo.testing import load_family
from fastgrpo.testing.flux2 import TEXT_TOKENS

CPU = torch.device("cpu")
NAMES = ["flux2", "flux2_klein"]
PROMPTS = ["", "a red circle", "two blue squares left of a cat", "z" * 90]


def adapter(name: str, pipeline=None, **settings):
    family = load_family(name)
    return model_class(name)(
        pipeline or family.make(), dtype=torch.float32, device=torch.device("cpu"), **family.settings | settings
    )


@pytest.fixture(scope="module")
def models() -> dict:
    return {name: adapter(name) for name in NAMES}


def recorded(pipeline, prompt: str, **options) -> tuple[list[tuple], torch.Tensor]:
    """(latents, velocity) of each step of a stock run, and its images."""
    fed, step = [], pipeline.scheduler.step

    def record(velocity, timestep, sample, **options):
        fed.append((sample.clone(), velocity.clone()))
        return step(velocity, timestep, sample, **options)

    pipeline.scheduler.step = record
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt=prompt, max_sequence_length=TEXT_TOKENS, **{"output_type": "pt", **options}).images
    del pipeline.scheduler.step
    return fed, images


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_any_lengths_share_a_batch(name: str, models) -> None:
    model = models[name]
    torch.manual_seed(1)
    x, sigma = torch.randn(4, *model.latent_shape), torch.linspace(0.95, 0.05, 4)
    conditioning = model.encode(PROMPTS)
    assert conditioning.embeds.shape == model.placeholder(4).embeds.shape
    with torch.no_grad():
        together = model.velocity(x, sigma, conditioning)
        for i, prompt in enumerate(PROMPTS):
            alone = model.velocity(x[i : i + 1], sigma[i : i + 1], model.encode([prompt]))
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)
    assert (together[1:] - together[:-1]).abs().max() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_images_need_not_be_square(name: str, height: int, width: int) -> None:
    """Velocities and pictures: rows and columns would be swapped in either if positions or packing were."""
    model = adapter(name, height=height, width=width)
    guidance = {"guidance_scale": 4.0 if name == "flux2" else 1.0}
    generator = torch.Generator().manual_seed(1)
    fed, images = recorded(
        model.pipeline, PROMPTS[1], height=height, width=width, num_inference_steps=2, generator=generator, **guidance
    )
    sigmas, conditioning = model.sigmas(2), model.encode(PROMPTS[1:2])
    with torch.no_grad():
        for (x, velocity), sigma in zip(fed, sigmas, strict=False):
            assert x.shape[1:] == model.latent_shape
            assert torch.equal(model.velocity(x, sigma[None], conditioning), velocity)
    final = fed[-1][0] + (sigmas[2] - sigmas[1]) * fed[-1][1]
    decoded = model.decode(final)
    assert decoded.shape == (1, 3, height, width)
    assert (decoded.float() - images.float() * 255).abs().max() <= 1


def test_the_decoder_reads_what_the_pipeline_gives_it(models) -> None:
    model = models["flux2_klein"]
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    (((x, velocity),), expected) = recorded(model.pipeline, PROMPTS[1], **options)
    torch.testing.assert_close(model.vae_latents(x - velocity, model.pipeline.vae), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_is_the_pipelines(name: str, height: int, width: int, num_steps: int) -> None:
    """Its shift follows the image's size and the number of steps."""
    model = adapter(name, height=height, width=width)
    recorded(model.pipeline, "a red circle", height=height, width=width, num_inference_steps=num_steps, guidance_scale=1.0)
    assert torch.equal(model.sigmas(num_steps), model.pipeline.scheduler.sigmas)
    other = adapter(name, model.pipeline, height=32, width=32).sigmas(num_steps)
    assert not torch.equal(other, model.sigmas(num_steps))


@pytest.mark.parametrize(("name", "guidance_scale"), [("flux2", 1.0), ("flux2_klein", 1.0), ("flux2_klein", 3.0)])
def test_the_loop_has_no_host(name: str, guidance_scale: float, models) -> None:
    model = models[name]
    arguments = ode_arguments(model, PROMPTS[1:3], 2, guidance_scale)
    with NoSync():
        rollout(Policy(model), *arguments)


def test_positions_are_made_once(models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["flux2_klein"]
    text, image = model.positions
    assert torch.equal(text, model.pipeline._prepare_text_ids(torch.empty(1, TEXT_TOKENS, 1))[0])
    assert torch.equal(image, model.pipeline._prepare_latent_ids(torch.empty(1, 1, *model.grid))[0])
    monkeypatch.setattr(torch, "cartesian_prod", None)
    with torch.no_grad():
        model.velocity(torch.randn(1, *model.latent_shape), torch.ones(1), model.placeholder(1))


def test_distilled_guidance_reaches_the_network(models) -> None:
    model = models["flux2"]
    other = adapter("flux2", model.pipeline, distilled_guidance=2.5)
    inputs = torch.randn(1, *model.latent_shape), torch.ones(1), model.encode(PROMPTS[:1])
    with torch.no_grad():
        assert not torch.equal(model.velocity(*inputs), other.velocity(*inputs))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flux2", {"distilled_guidance": None}, r"model\.distilled_guidance = None: .* published value is 4\.0"),
        ("flux2_klein", {"distilled_guidance": 4.0}, r"model\.distilled_guidance = 4\.0: .* no such input; leave it out"),
        ("flux2_klein", {"num_frames": 5}, r"model\.num_frames = 5: Flux2Klein has no such input; leave it out"),
        ("flux2", {"width": 18}, r"model\.width = 18: must be a multiple of 4"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter(name, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_lora_lies_beside_every_projection_of_the_blocks(name: str) -> None:
    model = adapter(name)
    model.add_lora(rank=2, alpha=4)
    adapted = {n.split(".lora_A")[0] for n, _ in model.transformer.named_parameters() if ".lora_A" in n}
    linear = {n for n, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear) and "lora" not in n}
    assert adapted == {n.removesuffix(".base_layer") for n in linear if "transformer_blocks." in n}


def test_a_tiny_decoder_reads_latents_on_the_networks_own_scale(models, tmp_path) -> None:
    """As the one called taef2 does: unpacked, with no normalisation to undo."""
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path)
    model = models["flux2_klein"]
    model.load_tiny_decoder(tmp_path)
    packed = torch.randn(2, *model.latent_shape)
    unpacked = model.pipeline._unpatchify_latents(packed.transpose(1, 2).unflatten(2, model.grid))
    assert torch.equal(model.vae_latents(packed, model.tiny_decoder), unpacked)
    assert model.decode(packed, draft=True).shape == model.decode(packed).shape


def test_guidance_of_a_distilled_klein_is_refused() -> None:
    """Its pipeline ignores the scale, so that images of the stock pipeline would be others than those that are trained."""
    for distilled in (True, False):
        pipeline = load_family("flux2_klein").make()
        pipeline.register_to_config(is_distilled=distilled)
        model = adapter("flux2_klein", pipeline)
        check_guidance(model, "rollout.guidance_scale", 1.0)
        if distilled:
            with pytest.raises(ValueError, match=r"^rollout\.guidance_scale = 4: this klein was distilled .*; take 1, or"):
                check_guidance(model, "rollout.guidance_scale", 4.0)
        else:
            check_guidance(model, "rollout.guidance_scale", 4.0)


def test_dev_is_read_as_published_without_torchvision(tmp_path: Path) -> None:
    """Its processor of texts and images makes of a text what the tokenizer in it does."""
    load_family("flux2").save(tmp_path)
    plain = model_class("flux2").load(tmp_path, dtype=torch.float32, device=CPU, **load_family("flux2").settings)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    said = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, "image_token": "[IMG]"}
    (tmp_path / "tokenizer" / "processor_config.json").write_text(json.dumps(said))
    images = {"image_processor_type": "PixtralImageProcessorFast", "processor_class": "PixtralProcessor"}
    (tmp_path / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(images))
    model = model_class("flux2").load(tmp_path, dtype=torch.float32, device=CPU, **load_family("flux2").settings)
    for prompt in (*PROMPTS, "[IMG] twice"):
        assert torch.equal(model.encode([prompt]).embeds, plain.encode([prompt]).embeds)
    assert model.readers_hash == model.readers_hash and model.read_in_part(PROMPTS).keys() == {PROMPTS[-1]}
