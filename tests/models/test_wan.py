"""What is particular to Wan: frames, the published scheduler, float32 parts in a bfloat16 run, folders that are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.models import WanTransformer3DModel
from PIL import Image
from support.drawing import drawn, ode_arguments
from support.helpers import ROOT, NoSync
from support.model_worker import configuration
from support.runs import ForkServer

from fastgrpo.commands.cli import main
from fastgrpo.models import load_model
from fastgrpo.models.wan import Wan
from fastgrpo.policy import Policy
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.reporting.pictures import as_pictures
from fastgrpo.rewards import load_reward
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.tables import coefficient_table, kl_weights, sampler_steps
from fastgrpo.testing import load_family
from fastgrpo.testing.wan import TEXT_TOKENS
from fastgrpo.validation import dump_config, load_config
from fastgrpo_kernels import INITIAL_STEP, normal

CPU, FAMILY = torch.device("cpu"), load_family("wan")
PROMPTS = list(FAMILY.prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan") / "pipeline"
    FAMILY.save(path)
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings):
    return load_model("wan", path=folder, dtype=dtype, device=CPU, **{**FAMILY.settings, **settings})


def noise(model, count: int = 1) -> torch.Tensor:
    address = noise_address(SAMPLE, 0, 0, torch.arange(count))
    return normal(address, INITIAL_STEP, torch.Size(model.latent_shape).numel()).view(count, *model.latent_shape)


def own_videos(model, prompts: list[str], num_steps: int = 3, scale: float = 1.0) -> torch.Tensor:
    return drawn(model, prompts, num_steps=num_steps, guidance_scale=scale)


def stock_videos(pipeline: WanPipeline, model, num_steps: int = 3) -> torch.Tensor:
    """(1, T, 3, H, W), 0 to 255, of the first prompt in the size of `model`."""
    pipeline.set_progress_bar_config(disable=True)
    height, width = model.size
    frames = pipeline(
        PROMPTS[:1], latents=noise(model), num_inference_steps=num_steps, guidance_scale=1.0, output_type="pt",
        max_sequence_length=TEXT_TOKENS, height=height, width=width, num_frames=model.num_frames,
    ).frames  # fmt: skip
    return (frames.float() * 255).round()


@pytest.mark.parametrize(("asked", "nearest"), [(8, "5 or 9"), (2, "1 or 5"), (12, "9 or 13")])
def test_a_number_of_frames_that_cannot_be_decoded_is_refused(folder: Path, asked: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.num_frames = {asked}: .*take {nearest}$"):
        load(folder, num_frames=asked)


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_size_that_is_no_whole_number_of_tokens_is_refused(folder: Path, side: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{side} = 20: must be a multiple of 8"):
        load(folder, **{side: 20})


def test_left_out_the_size_is_the_pipelines_own(folder: Path) -> None:
    model = load(folder, height=None, width=None, num_frames=None)
    assert (*model.size, model.num_frames) == (480, 832, 81) and model.latent_shape == (4, 21, 120, 208)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (13, 4)])
def test_other_lengths_and_shapes_are_the_stock_pipelines(folder: Path, frames: int, latents: int) -> None:
    model = load(folder, num_frames=frames, height=16, width=48)
    assert model.latent_shape == (4, latents, 4, 12)
    found = own_videos(model, PROMPTS[:1])
    assert found.shape == (1, frames, 3, 16, 48) and found.dtype == torch.uint8
    assert (found - stock_videos(model.pipeline, model)).abs().max() <= 1


def test_text_is_of_one_length_and_zero_past_the_prompt(folder: Path) -> None:
    model = load(folder)
    short, long = model.encode(["ab"]).embeds, model.encode([PROMPTS[1] * 3]).embeds
    assert short.shape == long.shape == (1, TEXT_TOKENS, 32) == model.placeholder(1).embeds.shape
    assert (short[:, 4:] == 0).all() and (short[:, :4] != 0).any(-1).all() and (long != 0).any(-1).all()


def first_of_all(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """A reward of the first pixel, the prompt and the record that came with it."""
    assert images.dtype == torch.uint8 and len(images) == len(prompts) == len(metadata)
    extra = [len(prompt) + record["bonus"] for prompt, record in zip(prompts, metadata, strict=True)]
    return images.flatten(1)[:, 0].float() + torch.tensor(extra)


def test_rewards_see_each_frame_or_the_whole_clip(folder: Path) -> None:
    videos = own_videos(load(folder), PROMPTS)
    records = [{"bonus": 100.0}, {"bonus": 200.0}]
    found = load_reward("test_wan:first_of_all")(videos, PROMPTS, records)
    extra = torch.tensor([len(p) + r["bonus"] for p, r in zip(PROMPTS, records, strict=True)])
    assert videos[0, :, 0, 0, 0].unique().numel() > 1
    assert torch.allclose(found, videos[:, :, 0, 0, 0].float().mean(1) + extra)
    clip = load_reward("support.model_worker:frames_seen", frames="clip")(videos, PROMPTS, records)
    assert torch.equal(clip, 9 + videos[:, -1, 0, 0, 0].float())


@pytest.fixture(scope="module")
def published(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with the scheduler of the published folders."""
    path = tmp_path_factory.mktemp("wan") / "unipc"
    shutil.copytree(folder, path)
    pipeline = WanPipeline.from_pretrained(path)
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipeline.save_pretrained(path)
    return path


def test_a_published_folder_has_the_noise_levels_and_timesteps_of_unipc(folder: Path, published: Path) -> None:
    """Up to the first, which UniPC keeps a millionth below 1, and what the network reads to the last bit."""
    model = load(published)
    assert isinstance(model.pipeline.scheduler, UniPCMultistepScheduler)
    assert [round(sigma, 4) for sigma in model.sigmas(10)[-4:].tolist()] == [0.5633, 0.4298, 0.2519, 0]
    for shift in (3.0, 5.0, 16.0):
        unipc = UniPCMultistepScheduler.from_config(model.pipeline.scheduler.config, flow_shift=shift)
        model.pipeline.scheduler = unipc
        for num_steps in (1, 2, 4, 9, 10, 20, 28, 50, 100):
            unipc.set_timesteps(num_steps)
            sigmas = model.sigmas(num_steps)
            assert sigmas[0] == 1 and unipc.sigmas[0] > 1 - 2e-6
            assert torch.equal(sigmas[1:], unipc.sigmas[1:])
            assert torch.equal(model.timestep(sigmas[:-1]), unipc.timesteps.float()), (shift, num_steps)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(7)
    assert torch.equal(load(folder).sigmas(7), euler.sigmas)
    assert torch.equal(load(folder).timestep(euler.sigmas[:-1]), euler.timesteps)


def test_velocities_are_those_that_unipc_is_fed(published: Path) -> None:
    model, stock = load(published), WanPipeline.from_pretrained(published)
    fed, step = [], stock.scheduler.step

    def record(velocity, timestep, sample, **options):
        fed.append((sample.clone(), velocity.clone()))
        return step(velocity, timestep, sample, **options)

    stock.scheduler.step = record
    unipc = stock_videos(stock, model, num_steps=4)
    conditioning = model.encode(PROMPTS[:1])
    for (x, velocity), sigma in zip(fed, model.sigmas(4), strict=False):
        with torch.no_grad():
            assert torch.equal(model.velocity(x, sigma[None], conditioning), velocity)
    assert len(fed) == 4 and not torch.equal(own_videos(model, PROMPTS[:1], num_steps=4).float(), unipc)  # other steps


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler(), DDIMScheduler()])
def test_a_scheduler_that_is_of_no_flow_is_refused(scheduler) -> None:
    pipeline = FAMILY.make()
    pipeline.scheduler = scheduler
    name = type(scheduler).__name__
    with pytest.raises(ValueError, match=rf"model\.path: its scheduler is a {name} without .*; take the published UniPC"):
        Wan(pipeline, dtype=torch.float32, device=CPU, **FAMILY.settings)


def test_the_published_recipe_is_the_released_step_in_float64(published: Path) -> None:
    """Flow-GRPO's sde_step_with_logprob of Wan, and its KL, on UniPC's own levels, against the recipe's table."""
    rule = load_config(ROOT / "configs" / "recipes" / "wan" / "flow_grpo.yaml")
    rollout, sigmas = rule.rollout, load(published).sigmas(rule.rollout.num_steps).double()
    steps = sampler_steps(rollout.sampler, sigmas, rollout.noise_level)
    generator = torch.Generator().manual_seed(0)
    x, v, v_ref, eps = torch.randn(4, 1000, generator=generator, dtype=torch.float64)
    table = coefficient_table(steps)
    for i, ((c_x, c_v, s, w), kl_weight) in enumerate(zip(table, kl_weights(steps, "paper"), strict=True)):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        std = sigmas[1] * sigma
        mean, mean_ref = (
            x * (1 + std**2 / (2 * sigma) * dt) + u * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt for u in (v, v_ref)
        )
        assert torch.allclose(c_x * x + c_v * v, mean, rtol=1e-12)
        scale = std * (-dt).sqrt()
        log_prob = (-((mean + scale * eps - mean_ref) ** 2) / (2 * scale**2) - scale.log()).mean()
        own_mean = c_x * x + c_v * v_ref
        own = (-((c_x * x + c_v * v + s * eps - own_mean) ** 2) * w - s.log()).mean()
        assert torch.allclose(own, log_prob, rtol=1e-12)
        kl = ((mean - mean_ref) ** 2 / (2 * scale**2)).mean()
        assert torch.allclose(kl_weight * ((c_v * (v - v_ref)) ** 2).mean(), kl, rtol=1e-12)
    assert [round(steps.s[i].item(), 3) for i in (0, 1, 17, 18)] == [0.129, 0.131, 0.106, 0.083]


def test_a_timestep_a_token_is_one_a_sample_without_an_input_frame() -> None:
    """Wan2.2-TI2V-5B: the stock pipeline's velocities, whose VAE also folds pixels into channels."""
    torch.manual_seed(0)
    pipeline = FAMILY.make()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    parts = {name: getattr(pipeline, name) for name in ("tokenizer", "text_encoder", "transformer", "scheduler")}
    pipeline = WanPipeline(**parts, vae=vae, expand_timesteps=True)
    model = Wan(pipeline, dtype=torch.float32, device=CPU, **{**FAMILY.settings, "height": 32, "width": 16})
    assert model.latent_shape == (4, 3, 4, 2)
    seen, forward = [], WanTransformer3DModel.forward

    def record(self, **inputs):
        (velocity,) = forward(self, **inputs)
        seen.append((inputs["hidden_states"], inputs["timestep"], velocity))
        return (velocity,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "forward", record)
        expected = stock_videos(pipeline, model)
    conditioning, sigmas = model.encode(PROMPTS[:1]), model.sigmas(3)
    for (x, timestep, velocity), sigma in zip(seen, sigmas, strict=False):
        assert timestep.shape == (1, 6) and (timestep == sigma * 1000).all()
        with torch.no_grad():
            assert torch.allclose(model.velocity(x, sigma[None], conditioning), velocity, atol=1e-5)
    assert (own_videos(model, PROMPTS[:1]) - expected).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_a_rollout_has_no_host(folder: Path, scale: float, dtype: torch.dtype) -> None:
    model = load(folder, dtype)
    model.add_lora(rank=4, alpha=8)
    arguments = ode_arguments(model, PROMPTS, 3, scale)
    with NoSync():
        rollout(Policy(model), *arguments)


def test_in_bfloat16_the_decoder_and_the_modulation_stay_float32(folder: Path) -> None:
    model = load(folder, torch.bfloat16)
    assert model.transformer.dtype == torch.bfloat16 and model.pipeline.vae.dtype == torch.float32
    assert model.transformer.scale_shift_table.dtype == torch.float32
    stock = WanPipeline.from_pretrained(folder, dtype={"default": torch.bfloat16, "vae": torch.float32})
    found = own_videos(model, PROMPTS[:1])
    # The stock Euler step rounds the latents of each step to the velocity's dtype.
    assert (found - stock_videos(stock, model)).abs().max() <= 8 and found.float().std() > 5
    latents = noise(model, 2)
    assert torch.equal(model.decode(latents), load(folder).decode(latents))


def test_a_tiny_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.tiny_decoder = .*images, not videos; leave it out"):
        load(folder).load_tiny_decoder(tmp_path)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A whole guided run in bfloat16 with KL and the embeddings on disk, as the recipe's."""
    output = tmp_path_factory.mktemp("runs") / "wan"
    config = configuration(
        "wan", folder, output, "iterations=2", "model.dtype=bfloat16", "objective.beta=0.004", "rollout.guidance_scale=4.5",
        "rollout.sampler=flow_sde", "rollout.noise_level=0.7", "rollout.window={kind: all_but_last}",
        "rollout.group_size=4", "rollout.batch_size=4", "reward.train=support.model_worker:frames_seen",
        "reward.eval=support.model_worker:frames_seen", "reward.frames=clip", f"prompts.cache={output / 'cache'}",
        "update.gradient_checkpointing=true", "evaluation.every=1", "evaluation.guidance_scale=4.5",
    )  # fmt: skip
    (output / "config_in.yaml").write_text(dump_config(config))
    fork_server.run("train", "--config", str(output / "config_in.yaml"))
    return output


@pytest.mark.processes
def test_a_run_leaves_frames_side_by_side_and_a_report(finished: Path) -> None:
    prompts = json.loads((finished / "samples" / "prompts.json").read_text())
    for iteration in ("00000", "00001", "00002"):
        for number in range(2):
            assert Image.open(finished / "samples" / iteration / f"{number:03d}.png").size == (4 * 16, 16)
    report = (finished / "report.html").read_text()
    assert report.count("data:image/png") >= 4 and all(record["prompt"] in report for record in prompts)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["first_ratio_deviation"] for row in rows] == [0, 0] and all(row["reward"] >= 9 for row in rows)


@pytest.mark.processes
def test_a_bfloat16_run_starts_from_the_stock_network(folder: Path, finished: Path) -> None:
    """DeepSpeed would round the weights that Wan keeps in float32; the first samples show that they are as loaded."""
    model = load(folder, torch.bfloat16)
    prompts = [record["prompt"] for record in json.loads((finished / "samples" / "prompts.json").read_text())]
    expected = as_pictures(own_videos(model, prompts, num_steps=2, scale=4.5)).permute(0, 2, 3, 1).numpy()
    found = [np.asarray(Image.open(finished / "samples" / "00000" / f"{i:03d}.png")) for i in range(len(prompts))]
    assert np.array_equal(np.stack(found), expected)


@pytest.mark.processes
def test_a_run_is_sampled_and_evaluated(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    arguments = ["sample", str(finished), "--prompt", "a cat", "--images", "2", "--steps", "2", "--output", str(picture)]
    assert main(arguments) == 0
    assert Image.open(picture).size == ((2 * 66 + 2) * 2, 20 * 2)
    assert main(["eval", str(finished), "--images", "2", "--steps", "2", "--trust"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]["overall"] >= 9
