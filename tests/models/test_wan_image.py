"""What is particular to Wan from images, against the stock pipeline: how each published kind reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from support.drawing import drawn, ode_arguments
from support.helpers import NoSync
from torch import Tensor

from fastgrpo.data.embedding_files import EmbeddingFiles
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models import load_model
from fastgrpo.models.loading import read_architecture
from fastgrpo.models.wan_image import WanImage
from fastgrpo.policy import Policy
from fastgrpo.records import SAMPLE, concatenate, noise_address
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing import load_family
from fastgrpo.testing.wan_image import KINDS, TALL, TEXT_TOKENS, WIDE, call, make
from fastgrpo_kernels import INITIAL_STEP, normal

CPU, SETTINGS = torch.device("cpu"), load_family("wan_image").settings
LONG = "a cat, then a dog, then a house with a red roof " * 20
PROMPTS = ["a cat", "", LONG]
STEPS = 3
# The numbers of images that a kind reads, and the sizes that are not square.
COUNTS = {"i2v": (1,), "flf2v": (2,), "i2v_without_clip": (1, 2), "ti2v": (1,)}
CASES = [(kind, count) for kind, counts in COUNTS.items() for count in counts]


def adapter(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> WanImage:
    pipeline = make(kind).to(dtype)
    for name in ("vae", "image_encoder"):
        if getattr(pipeline, name) is not None:
            getattr(pipeline, name).float()
    pipeline.set_progress_bar_config(disable=True)
    return WanImage(pipeline, dtype=dtype, device=CPU, **{**SETTINGS, **settings})


def asked(count: int, text: str = PROMPTS[0], turned: bool = False) -> ImagePrompt:
    images = (WIDE, TALL)[:: -1 if turned else 1]
    return ImagePrompt(text, images[:count])


def latents(model: WanImage, count: int = 1) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(4))


def fed(model: WanImage, prompt: ImagePrompt) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The video of the stock pipeline, and the latents and velocities that its scheduler got."""
    scheduler, found = model.pipeline.scheduler, []
    step = scheduler.step

    def record(velocity: Tensor, timestep: Tensor, x: Tensor, **options: Any) -> Any:
        found.append((x.clone(), velocity.clone()))
        return step(velocity, timestep, x, **options)

    scheduler.step = record
    video = call(model.pipeline, [prompt], latents(model), STEPS, 1.0, *model.size)
    del scheduler.step
    assert len(found) == STEPS
    return video, found


@pytest.mark.parametrize(("kind", "count"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_has_the_velocities_of_the_stock_pipeline(kind: str, count: int, dtype: torch.dtype) -> None:
    """To the last bit, not square, without text and with more than is read; in TI2V but for the frame that is given."""
    model = adapter(kind, dtype, width=32)
    given = 1 if kind == "ti2v" else 0
    for text in PROMPTS:
        prompt = asked(count, text, turned=True)
        conditioning = model.encode([prompt])
        for (x, velocity), sigma in zip(fed(model, prompt)[1], model.sigmas(STEPS), strict=False):
            with torch.no_grad():
                found = model.velocity(x.to(dtype), sigma[None], conditioning)
            assert found.dtype == dtype and found.is_contiguous()
            assert torch.equal(found[:, :, given:], velocity[:, :, given:])


@pytest.mark.parametrize(("kind", "count"), CASES)
def test_the_videos_of_a_batch_are_the_stock_pipelines(kind: str, count: int) -> None:
    """Of three prompts with different images; that of the frame that is given too."""
    model = adapter(kind, width=32)
    prompts = [asked(count, text, turned=bool(i % 2)) for i, text in enumerate(PROMPTS)]
    found = drawn(model, prompts, num_steps=STEPS, guidance_scale=1.0)
    address = noise_address(SAMPLE, 0, 0, torch.arange(len(prompts)))
    x = normal(address, INITIAL_STEP, torch.Size(model.latent_shape).numel()).view(len(prompts), *model.latent_shape)
    expected = call(model.pipeline, prompts, x, STEPS, 1.0, *model.size)
    assert expected.std() > 0.01 and not torch.equal(found[0], found[1])
    assert (found.float() - (expected.float() * 255).round()).abs().max() <= 1
    if kind == "ti2v":  # as near to the picture as this autoencoder comes
        first = model.pipeline.vae.encode(_pixels(model, prompts[0])).latent_dist.mode()
        own = model.pipeline.vae.decode(first).sample[:, :, 0]
        assert (found[:1, 0].float() - (own / 2 + 0.5).clamp(0, 1) * 255).abs().max() <= 1


def _pixels(model: WanImage, prompt: ImagePrompt) -> Tensor:
    with Image.open(prompt.images[0]) as picture:
        return model.pipeline.video_processor.preprocess(picture, *model.size).unsqueeze(2)


def test_prompts_with_one_image_and_with_two_go_together() -> None:
    """In a batch each has the mask of its own frames, as the stock pipeline makes it."""
    model = adapter("i2v_without_clip")
    both = model.encode([asked(1), asked(2)])
    mask = both.condition[:, :4]
    assert mask[0, :, 0].eq(1).all() and mask[0, :, 1:].eq(0).all()
    assert mask[1, :, 0].eq(1).all() and mask[1, 3, -1].eq(1).all() and mask[1, :3, -1].eq(0).all()
    assert both.image.shape == (2, 0, 0)
    x, sigma = latents(model, 2), torch.tensor([0.7, 0.7])
    with torch.no_grad():
        found = model.velocity(x, sigma, both)
        for i, count in enumerate((1, 2)):
            alone = model.velocity(x[i : i + 1], sigma[:1], model.encode([asked(count)]))
            assert torch.allclose(found[i : i + 1], alone, atol=1e-5)
    again = concatenate([model.encode([asked(1)]), model.encode([asked(2)])])
    assert all(map(torch.equal, again, both))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_has_no_host(kind: str) -> None:
    model = adapter(kind, torch.bfloat16)
    arguments = ode_arguments(model, [asked(COUNTS[kind][0])] * 2, 3, 4.5)
    with NoSync():
        rollout(Policy(model), *arguments)


# TI2V: the first frame is given.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["cps", "flow_sde"])
def test_the_frame_that_is_given_is_never_noise_that_is_learnt_from(sampler: str, dtype: torch.dtype) -> None:
    """Its velocity is of no weight and of no text, the network never sees it, and its latents end as the image's."""
    model = adapter("ti2v", dtype)
    prompts = [asked(1), asked(1, "a dog")]
    prompted = Embeddings(model).prompted(prompts, 1.0)
    steps = sampler_steps(sampler, model.sigmas(4), 0.8)
    schedule = window_schedule(steps, torch.zeros(2, dtype=torch.int64), 3)
    address = noise_address(SAMPLE, 0, 0, torch.arange(2))
    before = rollout(Policy(model), schedule, address, prompted, 1.0)
    first = prompted.cond.condition[:, :, 0].float()
    assert (before.final[:, :, 0] - first).abs().max() <= (1e-6 if dtype == torch.float32 else 0.03)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for i in range(3):
            x, sigma = before.latents[i].to(dtype), steps.sigmas[i].float().expand(2)
            v = model.velocity(x, sigma, prompted.cond)
            assert torch.equal(v[:, :, 0], before.v_old[i][:, :, 0])
            assert not torch.equal(v[:, :, 1:], before.v_old[i][:, :, 1:])
            other = torch.cat([torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2)
            assert torch.equal(model.velocity(other, sigma, prompted.cond)[:, :, 1:], v[:, :, 1:])
    x = latents(model, 2).to(dtype).requires_grad_()
    model.transformer.requires_grad_(True)
    model.velocity(x, torch.tensor([0.5, 0.5]), prompted.cond)[:, :, 0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.transformer.parameters())


@pytest.mark.parametrize("expand_timesteps", [True, False])
def test_the_published_folder_of_ti2v_names_the_pipeline_from_text(tmp_path: Path, expand_timesteps: bool) -> None:
    made = make("ti2v")
    parts = {name: getattr(made, name) for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    WanPipeline(**parts, expand_timesteps=expand_timesteps).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "WanPipeline"

    def load(name: str) -> Any:
        return load_model(name, path=tmp_path, dtype=torch.float32, device=CPU, **SETTINGS)

    assert not load("wan").image_conditioned
    if expand_timesteps:
        assert load("wan_image").replaces_first
        return
    with pytest.raises(ValueError, match=r"model\.path = .*: holds a Wan that reads no image; take model\.name wan"):
        load("wan_image")


def test_ti2v_is_planned_from_an_image_as_from_text() -> None:
    """At its own size on the meta device: 31 frames of 880 tokens, each with a timestep."""
    name, meta = "wan2.2-ti2v-5b", torch.device("meta")
    model = WanImage.random(name, dtype=torch.bfloat16, device=meta, **read_architecture(name)["settings"])
    assert model.latent_shape == (48, 31, 44, 80) and model.replaces_first
    conditioning = model.placeholder(1)
    assert conditioning.condition.shape == (1, 48, 1, 44, 80)
    x = torch.empty(1, *model.latent_shape, dtype=torch.bfloat16, device="meta")
    assert model.velocity(x, torch.ones(1, device="meta"), conditioning).shape == x.shape


# What is refused.


@pytest.mark.parametrize(
    ("kind", "count", "reads"), [("i2v", 2, "1"), ("flf2v", 1, "2"), ("i2v_without_clip", 3, "1 or 2"), ("ti2v", 2, "1")]
)
def test_another_number_of_images_is_refused(kind: str, count: int, reads: str) -> None:
    model, prompt = adapter(kind), ImagePrompt("a cat", (WIDE, TALL, WIDE)[:count])
    assert count not in model.input_images and WanImage.input_images == range(1, 3)
    with pytest.raises(ValueError, match=rf"the prompt 'a cat' has {count} images; this model reads {reads}$"):
        model.encode([prompt])


def test_other_texts_than_diffusers_can_tell_from_images_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"model\.max_text_tokens = 256: .*take {TEXT_TOKENS}$"):
        adapter("i2v", max_text_tokens=256)
    assert adapter("ti2v", max_text_tokens=256).encode([asked(1)]).embeds.shape[1] == 256


def test_a_transformer_that_reads_no_image_is_refused(tmp_path: Path) -> None:
    """One of text alone in a folder that calls itself a pipeline of images."""
    pipeline = make("i2v_without_clip")
    pipeline.transformer = make("ti2v").transformer
    with pytest.raises(ValueError, match=r"reads 4 channels, and one of images would read 12; .*model\.name wan"):
        WanImage(pipeline, dtype=torch.float32, device=CPU, **SETTINGS)


def test_embeddings_are_of_the_images_their_sizes_and_the_processor(tmp_path: Path) -> None:
    """What a cached embedding depends on: all that can change it."""
    other = tmp_path / "other.png"
    shutil.copy(TALL, other)
    model = adapter("i2v")
    first, second = model.encode([asked(1)]), model.encode([ImagePrompt(PROMPTS[0], (other,))])
    assert torch.equal(first.embeds, second.embeds)
    assert not torch.equal(first.condition, second.condition) and not torch.equal(first.image, second.image)
    sizes = (model, adapter("i2v", width=32), adapter("i2v", num_frames=5))
    changed = adapter("i2v")
    changed.pipeline.image_processor.image_mean = [0.0, 0.0, 0.0]
    encoder = adapter("i2v")
    torch.nn.init.zeros_(encoder.pipeline.image_encoder.get_input_embeddings().weight)
    assert len({EmbeddingFiles(one, tmp_path).fingerprint for one in (*sizes, changed, encoder)}) == 5


def test_published_kinds_are_all_here() -> None:
    assert COUNTS.keys() == KINDS.keys()
