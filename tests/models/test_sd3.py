"""The SD3 adapter against the stock diffusers pipeline, on the embedded weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.drawing import drawn
from support.helpers import ROOT
from support.tiny_model import TINY_WEIGHTS, load_tiny_model, load_tuned_model

from fastgrpo.models import load_model
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.validation import load_config
from fastgrpo_kernels import INITIAL_STEP, normal

RECIPE = ROOT / "configs" / "tiny_shapes.yaml"
PROMPTS = ["a red circle", "two blue squares", "a green square left of a yellow circle"]


def stock() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(TINY_WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(model, count: int) -> torch.Tensor:
    address = noise_address(SAMPLE, 0, 0, torch.arange(count))
    return normal(address, INITIAL_STEP, 256).view(count, *model.latent_shape)


def stock_images(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, guidance_scale: float, steps: int) -> np.ndarray:
    images = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, latents=latents, max_sequence_length=1,
        output_type="np",
    ).images  # fmt: skip
    return (images * 255).round().astype(np.int64)


def own_images(model, guidance_scale: float, steps: int) -> np.ndarray:
    images = drawn(model, PROMPTS, num_steps=steps, guidance_scale=guidance_scale)
    return images.permute(0, 2, 3, 1).numpy().astype(np.int64)


@pytest.mark.parametrize("num_steps", [1, 10, 40])
def test_sigmas_are_the_schedulers(tiny_model, num_steps: int) -> None:
    scheduler = stock().scheduler
    scheduler.set_timesteps(num_steps)
    sigmas = tiny_model.sigmas(num_steps)
    assert torch.equal(sigmas, scheduler.sigmas) and sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert torch.equal(sigmas[:-1] * 1000, scheduler.timesteps)


@pytest.mark.parametrize("num_steps", [1, 10, 40])
def test_sigmas_of_a_dynamic_shift_are_the_stock_pipelines(tiny_model, num_steps: int, tmp_path: Path) -> None:
    """Which computes it of the number of tokens, with the settings of the scheduler."""
    folder = Path(shutil.copytree(TINY_WEIGHTS, tmp_path / "dynamic"))
    file = folder / "scheduler" / "scheduler_config.json"
    said = {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 1.3, "base_image_seq_len": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS[:1], num_inference_steps=num_steps, latents=noise(tiny_model, 1), max_sequence_length=1)
    model = load_model("sd3", path=folder, dtype=torch.float32, device=torch.device("cpu"), max_text_tokens=1)
    assert torch.equal(model.sigmas(num_steps), pipeline.scheduler.sigmas)
    assert num_steps == 1 or not torch.equal(model.sigmas(num_steps), tiny_model.sigmas(num_steps))


def test_velocity_is_what_the_stock_pipeline_feeds_its_scheduler(tiny_model) -> None:
    """To the last bit, at every step, for the conditioning that the pipeline made."""
    pipeline, seen = stock(), []
    step = pipeline.scheduler.step

    def recording(velocity: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor, **options: object) -> object:
        seen.append((velocity.clone(), x.clone()))
        return step(velocity, timestep, x, **options)

    pipeline.scheduler.step = recording
    pipeline(PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=noise(tiny_model, 3), max_sequence_length=1)
    conditioning, sigmas = tiny_model.encode(PROMPTS), tiny_model.sigmas(4)
    assert len(seen) == 4
    for i, (velocity, x) in enumerate(seen):
        with torch.no_grad():
            assert torch.equal(tiny_model.velocity(x, sigmas[i].expand(3), conditioning), velocity)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_the_stock_pipelines(tiny_model, guidance_scale: float) -> None:
    """Prompts are encoded one by one here and together there, which may move a pixel to the next integer."""
    expected = stock_images(stock(), noise(tiny_model, 3), guidance_scale, 10)
    found = own_images(tiny_model, guidance_scale, 10)
    assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 1e-3


@pytest.mark.parametrize("targets", [None, load_config(RECIPE).model.lora.targets], ids=["attention", "recipe"])
def test_saved_lora_in_the_stock_pipeline_gives_the_same_images(targets, tmp_path: Path) -> None:
    """Also in a fresh adapter, which is how `fastgrpo sample` reads a run. The base's images are others."""
    tuned_model = load_tuned_model(targets)
    trained = {n: p.detach().clone() for n, p in tuned_model.transformer.named_parameters() if p.requires_grad}
    tuned_model.save_trained(tmp_path, trained)
    pipeline = stock()
    latents = noise(tuned_model, 3)
    base = stock_images(pipeline, latents, 1.0, 10)
    pipeline.load_lora_weights(tmp_path)
    expected = stock_images(pipeline, latents, 1.0, 10)
    fresh = load_tiny_model()
    fresh.load_trained(tmp_path)
    for found in (own_images(tuned_model, 1.0, 10), own_images(fresh, 1.0, 10)):
        assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 1e-3
    assert (base != expected).mean() > 0.05


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (3, 7), (5, 2)])
def test_a_saved_lora_has_its_strength_without_metadata(rank: int, alpha: int, tmp_path: Path) -> None:
    """Against float64: the base weight plus alpha / rank B A. Also by the product alone, as readers without PEFT do it."""
    model = load_tiny_model()
    model.add_lora(rank=rank, alpha=alpha)
    trained = {n: torch.randn_like(p) * 0.1 for n, p in model.transformer.named_parameters() if p.requires_grad}
    model.save_trained(tmp_path, trained)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    saved = load_file(file)
    pipeline = stock()
    layer = "transformer_blocks.0.attn.to_q"
    base = pipeline.transformer.get_submodule(layer).weight.detach().double()
    a, b = (trained[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
    expected = base + alpha / rank * b @ a
    by_hand = base + (saved[f"transformer.{layer}.lora_B.weight"] @ saved[f"transformer.{layer}.lora_A.weight"]).double()
    torch.testing.assert_close(by_hand, expected, rtol=1e-5, atol=1e-6)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    fused = pipeline.transformer.get_submodule(layer).get_base_layer().weight.detach().double()
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


def test_a_lora_whose_metadata_holds_alpha_is_still_read(tuned_model, tmp_path: Path) -> None:
    """As earlier releases wrote it: B as trained, and alpha beside it."""
    trained = {n: p.detach().clone() for n, p in tuned_model.transformer.named_parameters() if p.requires_grad}
    tuned_model.save_trained(tmp_path, trained)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    content = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["attn.to_q"]}
    unfolded = {name: tensor / (2 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(unfolded, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(content)})
    fresh = load_tiny_model()
    fresh.load_trained(tmp_path)
    assert np.array_equal(own_images(fresh, 1.0, 4), own_images(tuned_model, 1.0, 4))


def test_reference_is_the_untouched_base(tuned_model, tiny_model) -> None:
    x, sigma, conditioning = (
        torch.randn(2, *tiny_model.latent_shape),
        torch.tensor([0.9, 0.2]),
        tiny_model.encode(PROMPTS[:2]),
    )
    with torch.no_grad():
        base, tuned = tiny_model.velocity(x, sigma, conditioning), tuned_model.velocity(x, sigma, conditioning)
        with pytest.raises(KeyError), tuned_model.reference():
            assert torch.equal(tuned_model.velocity(x, sigma, conditioning), base)
            raise KeyError
        assert torch.equal(tuned_model.velocity(x, sigma, conditioning), tuned) and not torch.equal(tuned, base)


def test_equal_weights_are_equal_files(tuned_model, tmp_path: Path) -> None:
    """Also in what safetensors would order anew at each writing, by chance."""
    trained = {name: p.detach().float() for name, p in tuned_model.transformer.named_parameters() if p.requires_grad}
    written = []
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        tuned_model.save_trained(tmp_path / str(number), trained)
        (file,) = (tmp_path / str(number)).iterdir()
        written.append(file.read_bytes())
    assert len(set(written)) == 1
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in load_file(file).items())


def test_only_the_lora_is_trained(tuned_model) -> None:
    trained = [n for n, p in tuned_model.transformer.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    targets = {name.split(".lora_")[0].split(".", 2)[2] for name in trained}
    assert targets == set(tuned_model.lora_targets)


@pytest.mark.slow
def test_blocks_are_compiled_for_each_shape_by_itself(monkeypatch) -> None:
    """A batch that was there before costs nothing; no program is for sizes that vary, and each shape has as many."""
    model, compiled, module_compile = load_tuned_model(), [], torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        symbolic = any(isinstance(size, torch.SymInt) for x in inputs for size in (x.shape if torch.is_tensor(x) else [x]))
        compiled.append("any shape" if symbolic else max(x.shape[0] for x in inputs if torch.is_tensor(x) and x.dim() == 3))
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: module_compile(self, **how, backend=backend))
    model.compile()
    conditioning = model.encode(["a red circle"] * 7)
    found = []
    for batch in (2, 3, 7, 3, 2):
        x, rows = torch.zeros(batch, *model.latent_shape), type(conditioning)(*(t[:batch] for t in conditioning))
        with torch.no_grad():
            model.velocity(x, torch.full((batch,), 0.5), rows)
        found.append(compiled.copy())
        compiled.clear()
    assert found[0] and set(found[0]) == {2}
    assert found[1:] == [[3] * len(found[0]), [7] * len(found[0]), [], []]


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path = .*model_index\.json"):
        load_model("sd3", path=tmp_path, dtype=torch.float32, device=torch.device("cpu"), max_text_tokens=1)


def test_a_tiny_decoder_draws_the_drafts_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "good")
    model, latents = load_tiny_model(), torch.randn(2, 4, 8, 8)
    before = model.decode(latents)
    assert torch.equal(model.decode(latents, draft=True), before)  # without one, the full decoder
    model.load_tiny_decoder(tmp_path / "good")
    assert torch.equal(model.decode(latents), before)
    with torch.no_grad():
        expected = tiny.decode(latents).sample.div(2).add(0.5).clamp(0, 1).mul(255).round()
    draft = model.decode(latents, draft=True)
    assert draft.shape == before.shape and draft.dtype == torch.uint8 and not torch.equal(draft, before)
    assert (draft.float() - expected).abs().max() <= 1
    with pytest.raises(ValueError, match=r"model\.tiny_decoder = .*config\.json"):
        model.load_tiny_decoder(tmp_path)
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="reads latents of 16 channels, this model's have 4"):
        model.load_tiny_decoder(tmp_path / "wide")


def test_float32_is_not_tf32_in_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default for them on a GPU, in which a tenth of a percent is lost."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    load_tiny_model(dtype=torch.bfloat16)
    assert torch.backends.cudnn.allow_tf32
    load_tiny_model()
    assert not torch.backends.cudnn.allow_tf32
