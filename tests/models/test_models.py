"""Every model family on its tiny pipeline, against the stock diffusers pipeline and through whole runs under DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch
from support.drawing import drawn
from support.runs import ForkServer

from fastgrpo.data.embeddings import compared_with
from fastgrpo.models import MODELS, load_model, model_class
from fastgrpo.models.loading import ARCHITECTURES, read_architecture
from fastgrpo.models.sd3 import SD3
from fastgrpo.records import SAMPLE, concatenate, noise_address
from fastgrpo.testing import FAMILIES, load_family
from fastgrpo_kernels import INITIAL_STEP, Guided, guided_velocity, normal

pytestmark = pytest.mark.slow  # every test for every family
CPU = torch.device("cpu")
STEPS = 3  # 1000 sigma is then no integer in any family: a rounded timestep shows
# Runs that train the network of another family, and read nothing that a third one does not read.
TRAINED_AS_OTHERS = {"flux2_klein", "qwen_image_edit_plus", "wan_image_experts"}
SCALES = [(name, scale) for name in FAMILIES for scale in load_family(name).guidance]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny pipeline of every family."""
    base = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        load_family(name).save(base / name)
    return {name: base / name for name in FAMILIES}


def load(name: str, folders: dict[str, Path]):
    family = load_family(name)
    return load_model(family.model, path=folders[name], dtype=torch.float32, device=CPU, **family.settings)


def noise(model, count: int) -> torch.Tensor:
    shape = model.latent_shape
    address = noise_address(SAMPLE, 0, 0, torch.arange(count))
    return normal(address, INITIAL_STEP, torch.Size(shape).numel()).view(count, *shape)


def own_images(name: str, model, scale: float) -> torch.Tensor:
    prompts = load_family(name).prompts
    return drawn(model, prompts, num_steps=STEPS, guidance_scale=scale)


def test_every_model_has_a_tiny_family() -> None:
    assert {load_family(name).model for name in FAMILIES} == MODELS.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("name", [name for name in FAMILIES if not load_family(name).model.startswith("wan")])
def test_images_are_encoded_to_what_they_are_decoded_from(name: str, folders) -> None:
    """The way from the autoencoder's latents to the network's is the inverse of the way back, in every packing."""
    model = load(name, folders)
    latents = noise(model, 2)
    found = model.from_vae(model.vae_latents(latents, model.pipeline.vae))
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
    images = model.decode(latents)
    encoded = model.encode_images(images)
    assert encoded.shape == latents.shape and encoded.dtype == torch.float32 and encoded.isfinite().all()
    assert not torch.equal(encoded[0], encoded[1])


def test_a_family_whose_latents_are_mixed_is_told_that_images_cannot_be_encoded(folders) -> None:
    """Adapter.from_vae inverts a reordering with a scale and a shift for each number. Here each number is a sum of two."""

    class Mixing(SD3):
        def vae_latents(self, latents, decoder):
            return super().vae_latents(latents + 0.5 * latents.flip(-1), decoder)

    model = Mixing.load(folders["sd3"], dtype=torch.float32, device=CPU, **load_family("sd3").settings)
    images = torch.zeros(2, 3, *model.size, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match=r"Mixing\.vae_latents .* a from_vae of its own"):
        model.encode_images(images)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_velocities_are_what_the_stock_pipeline_feeds_its_scheduler(name: str, scale: float, folders) -> None:
    """Step by step, to the last bit unless the family says otherwise, one prompt at a time as the embeddings are made."""
    model, family = load(name, folders), load_family(name)
    prompt, latents = family.prompts[0], noise(model, 1)
    fed = fed_to_the_scheduler(model, lambda pipeline: family.call(pipeline, [prompt], latents, STEPS, scale))
    check_velocities(model, family, fed, prompt, None if scale == 1 else compared_with(prompt), scale)


@pytest.mark.parametrize("name", ["sd3", "wan", "qwen_image"])
def test_velocities_under_a_negative_prompt_are_the_stock_pipelines(name: str, folders) -> None:
    """By the pipeline's own negative_prompt. That of Qwen-Image is padded like the prompt, for the same rounding."""
    model, family, negative = load(name, folders), load_family(name), "a blurred dog"
    prompt, latents = family.prompts[0], noise(model, 1)

    class Negative:
        def __getattr__(self, member: str):
            return getattr(model.pipeline, member)

        def encode_prompt(self, texts: list[str], **options):
            return model.pipeline.encode_prompt([negative] if texts == [" "] else texts, **options)

        def __call__(self, *prompts: list[str], **options):
            told = {} if "negative_prompt_embeds" in options else {"negative_prompt": [negative]}
            return model.pipeline(*prompts, **options, **told)

    fed = fed_to_the_scheduler(model, lambda _: family.call(Negative(), [prompt], latents, STEPS, 3.0))
    check_velocities(model, family, fed, prompt, compared_with(prompt, negative), 3.0)
    with pytest.raises(AssertionError):
        check_velocities(model, family, fed, prompt, compared_with(prompt), 3.0)


def fed_to_the_scheduler(model, run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the stock pipeline hands to its scheduler in each step of `run`, (x, velocity)."""
    scheduler = model.pipeline.scheduler
    fed, step = [], scheduler.step

    def record(velocity: torch.Tensor, timestep, sample, **options):
        fed.append((sample.clone(), velocity.clone()))
        return step(velocity, timestep, sample, **options)

    scheduler.step = record
    model.pipeline.set_progress_bar_config(disable=True)
    run(model.pipeline)
    assert len(fed) == STEPS
    return fed


@torch.no_grad()
def check_velocities(model, family, fed, prompt, compared, scale: float) -> None:
    conditioning, sigmas = model.encode([prompt]), model.sigmas(STEPS)
    without = None if compared is None else model.encode([compared])
    assert torch.equal(sigmas, model.pipeline.scheduler.sigmas[-STEPS - 1 :].cpu().float())
    for (x, expected), sigma in zip(fed, sigmas, strict=False):
        found = guided(model, x, sigma[None], conditioning, without, scale, family.guided_together)
        assert found.shape == expected.shape and (found - expected).abs().max() <= family.tolerance


def guided(model, x, sigma, conditioning, without, scale, together):
    """With and without the prompt in one forward pass or in two, as the stock pipeline of the family does it."""
    if without is None:
        return model.velocity(x, sigma, conditioning)
    if together:
        both = concatenate([without, conditioning])
        v_uncond, v = model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    else:
        v_uncond, v = model.velocity(x, sigma, without), model.velocity(x, sigma, conditioning)
    return model.guide(v, v_uncond, scale) if model.guide else guided_velocity(Guided(v, v_uncond, scale))


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_images_are_the_stock_pipelines(name: str, scale: float, folders) -> None:
    model = load(name, folders)
    found = own_images(name, model, scale)
    for i in range(len(found)):
        latents = noise(model, len(found))[i : i + 1]
        family = load_family(name)
        model.pipeline.set_progress_bar_config(disable=True)
        images = family.call(model.pipeline, [family.prompts[i]], latents, STEPS, scale)
        expected = (images.float() * 255).round()
        assert images.std() > 0.01  # a picture, not a blank
        assert (found[i : i + 1].float() - expected).abs().max() <= 1


def load_in_stock(pipeline, folder: Path) -> None:
    """The LoRA that was saved in a folder, of each of the networks."""
    for file, of in zip(sorted(folder.iterdir()), ({}, {"load_into_transformer_2": True}), strict=False):
        pipeline.load_lora_weights(folder, weight_name=file.name, **of)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_lora_in_the_stock_pipeline_gives_the_same_images(name: str, folders, tmp_path: Path) -> None:
    model = load(name, folders)
    torch.manual_seed(1)
    before = own_images(name, model, 1.0)
    model.add_lora(rank=4, alpha=8)
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)
    assert torch.equal(own_images(name, model, 1.0), before)  # no effect at first
    with torch.no_grad():
        for n, parameter in trained.items():
            if "lora_B" in n:
                parameter.normal_(std=0.3)
    after = own_images(name, model, 1.0)
    assert not torch.equal(after, before)
    with model.reference():
        assert torch.equal(own_images(name, model, 1.0), before)
    model.save_trained(tmp_path, {n: p.detach().clone() for n, p in trained.items()})
    stock, fresh = load(name, folders), load(name, folders)
    load_in_stock(stock.pipeline, tmp_path)
    fresh.load_trained(tmp_path)
    assert torch.equal(own_images(name, stock, 1.0), after) and torch.equal(own_images(name, fresh, 1.0), after)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_goes_on_from_a_lora_as_strong_as_the_stock_pipeline_reads_it(name: str, folders, tmp_path: Path) -> None:
    first, stock, model = load(name, folders), load(name, folders), load(name, folders)
    before = own_images(name, first, 1.0)
    first.add_lora(rank=4, alpha=8)
    values = {n: torch.randn_like(p) * 0.3 for n, p in first.transformer.named_parameters() if p.requires_grad}
    first.save_trained(tmp_path, values)
    load_in_stock(stock.pipeline, tmp_path)
    expected = own_images(name, stock, 1.0)
    assert not torch.equal(expected, before)
    for reference in ("base", "start"):
        model = load(name, folders)
        model.continue_lora(tmp_path, rank=4, alpha=32, reference=reference)
        assert torch.equal(own_images(name, model, 1.0), expected)
        trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
        assert trained.keys() == values.keys()
        with torch.no_grad():
            for parameter in trained.values():
                parameter.mul_(1.5)
        after = own_images(name, model, 1.0)
        with model.reference():
            assert torch.equal(own_images(name, model, 1.0), expected if reference == "start" else before)
        assert torch.equal(own_images(name, model, 1.0), after) and not torch.equal(after, expected)
        assert all(p.requires_grad == (n in trained) for n, p in model.transformer.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_transformer_is_saved_and_read_back(name: str, folders, tmp_path: Path) -> None:
    model = load(name, folders)
    before = own_images(name, model, 1.0)
    model.train_all(keep_reference=True)
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, _ in model.transformer.named_parameters() if load_family(name).fully_trained in n}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    after = own_images(name, model, 1.0)
    with model.reference():
        assert torch.equal(own_images(name, model, 1.0), before)
    assert torch.equal(own_images(name, model, 1.0), after) and not torch.equal(after, before)
    average = {n: p.detach().clone() for n, p in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()  # what is handed over is saved, not what the network holds
    model.save_trained(tmp_path, average)
    fresh = load(name, folders)
    fresh.load_trained(tmp_path)
    assert torch.equal(own_images(name, fresh, 1.0), after)


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TRAINED_AS_OTHERS])
def test_a_few_updates_under_deepspeed_raise_a_reward(name: str, folders, tmp_path: Path, fork_server: ForkServer) -> None:
    """LoRA and every weight, with checkpointing and without, first ratio 1; stopped and gone on with, bit for bit."""
    printed = fork_server.run(name, str(folders[name]), str(tmp_path), program="support.model_worker:main")
    result = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    for form in ("lora", "full"):
        rewards = result[form]["rewards"]
        assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + result[form]["spread"], (form, result[form])
        assert result[form]["first_ratio_deviation"] == 0
        # With checkpointing the same numbers, up to the rounding of a recomputed forward pass.
        assert result[form]["checkpointed"] == pytest.approx(rewards[:2], abs=1e-4)
    assert result["lora"]["resumed"] == result["lora"]["rewards"]
    assert result["bfloat16"] == 0  # the first ratio, though the network rounds


@pytest.mark.parametrize("architecture", sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
def test_full_size_architectures_are_the_published_ones(architecture: str) -> None:
    """On the meta device: parameter counts, LoRA targets by name, shapes from placeholder to velocity."""
    published = read_architecture(architecture)
    model = model_class(published["model"]).random(
        architecture, dtype=torch.bfloat16, device=torch.device("meta"), **published.get("settings", {})
    )
    assert sum(p.numel() for p in model.transformer.parameters()) == published["transformer_parameters"]
    model.add_lora(rank=8, alpha=16)
    adapted = {n.split(".lora_A")[0] for n, p in model.transformer.named_parameters() if "lora_A" in n}
    for target in model.lora_targets:
        assert any(n == target or n.endswith("." + target) for n in adapted), target
    x = torch.empty(2, *model.latent_shape, dtype=torch.bfloat16, device="meta")
    v = model.velocity(x, torch.ones(2, device="meta"), model.placeholder(2))
    assert v.shape == x.shape
