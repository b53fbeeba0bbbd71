"""Every pitfall of online RL on flow models that was published, and the test that fails when it is put back.

Sources: flow_grpo, DanceGRPO, DiffusionNFT, Flow-Factory, verl-omni and their issues. What other files test is listed in
`TESTS`; the rest is tested here, in the same order, on a trainer of the embedded model whose ranks are `OneRank`.
"""

import ast
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import ROOT
from support.plain_trainer import BATCH, GROUPS, SIZE, STEPS, brightness, networks_of, trainer_of
from support.toy import Toy, ToyPolicy, toy_prompts
from torch import Tensor, nn

from fastgrpo.config.keys import Window
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.learning.objectives import effective_clip_range
from fastgrpo.models.adapter import to_pixels
from fastgrpo.records import TRAIN, noise_address
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.sampling.windows import window_starts
from fastgrpo.trainer import Trainer
from fastgrpo_kernels import normal

TESTS = {
    # What a step is
    "late steps outweigh early ones 31 to 1": [
        "test_objectives.py::test_guard_centres_the_ratio_at_every_noise_level",
        "test_objectives.py::test_the_step_weight_is_of_the_policy_and_the_kl_has_its_own",
        "test_tables.py::test_guard_and_uniform_weights",
        "test_pitfalls.py::test_late_steps_outweigh_early_ones",
    ],
    "Euler-Maruyama leaves 27 times the scheduled noise": [
        "test_tables.py::test_flow_sde_leaves_excess_noise_at_few_steps",
        "test_tables.py::test_cps_keeps_the_noise_schedule_at_few_steps",
    ],
    "sigma = 1 divides by zero": [
        "test_tables.py::test_sd3_coefficients",
        "test_tables.py::test_bad_tables_are_refused",
    ],
    "the last step is trained": [
        "test_tables.py::test_bad_masks_are_refused",
        "test_windows.py::test_bad_windows_are_refused",
        "test_windows.py::test_window_kinds",
    ],
    "steps without noise have a log-prob of 0/0": [
        "test_sde_step.py::test_ode_row_ignores_noise",
        "test_objectives.py::test_steps_without_noise_are_harmless",
    ],
    "the CPS code drops the variance": [
        "test_objectives.py::test_weight_of_the_released_cps_code",
        "test_tables.py::test_log_prob_weight_of_the_released_cps_code",
    ],
    # How it is computed
    "the step is taken in bfloat16": [
        "test_sde_step.py::test_against_float64_distribution",
        "test_transition.py::test_forward_equals_float64",
    ],
    "latents are rounded after they are scored": ["test_pitfalls.py::test_latents_rounded_after_they_are_scored"],
    "half precision is worse the less noise there is": [
        "test_transition.py::test_on_policy_is_exactly_zero",
        "test_pitfalls.py::test_half_precision_under_guidance",
    ],
    "log-probs are summed": [
        "test_sde_step.py::test_against_float64_distribution",
        "test_objectives.py::test_guard_is_the_published_formula_sample_by_sample",
    ],
    "the clip is of another size of latent": [
        "test_objectives.py::test_effective_clip_range",
        "test_pitfalls.py::test_clip_of_another_size_of_latent",
    ],
    "log-probs are subtracted": ["test_transition.py::test_difference_form_is_accurate"],
    "ratios are rounded to float32": ["test_objectives.py::test_ratios_are_finer_than_float32"],
    "sums in whatever order they arrive": [
        "test_kernel_compile.py::test_no_atomics",
        "test_transition.py::test_repeats_bit_for_bit",
        "test_advantages.py::test_samples_take_their_bits_along",
        "test_advantages.py::test_the_batch_std_is_the_same_bits_in_any_order",
    ],
    # What rollout and update must share
    "the update has another batch size": ["test_pitfalls.py::test_update_in_another_batch_size"],
    "other attention kernels, a merged LoRA or dropout": ["test_update.py::test_first_ratio_is_exactly_1"],
    "text is padded to the longest of a batch": [
        "test_qwen_image.py::test_a_row_does_not_depend_on_the_other_prompts",
        "test_z_image.py::test_one_shape_whatever_the_prompts",
    ],
    "old log-probs of another network are not made again": [
        "test_lora.py::test_nothing_to_draft_and_half_drafts_are_refused",
        "test_update.py::test_recomputed_old_velocity_makes_any_fold_exact",
    ],
    "samples of a prompt have different windows": ["test_pitfalls.py::test_windows_within_a_prompt"],
    "a window drawn by rank stays for ever": ["test_windows.py::test_random_windows_are_the_same_on_every_rank"],
    "noise is seeded by rank": ["test_pitfalls.py::test_noise_seeded_by_rank"],
    "a captured rollout repeats its noise": ["test_graph.py::test_every_replay_is_the_eager_rollout_of_its_own_arguments"],
    "guidance in the rollout alone": ["test_pitfalls.py::test_guidance_in_the_rollout_alone"],
    "guidance without the gradient of its second branch": ["test_update.py::test_gradient_is_that_of_the_published_formula"],
    # What is learned
    "groups that hardly differ": [
        "test_advantages.py::test_published_advantages",
        "test_advantages.py::test_dead_groups_get_nothing",
        "test_advantages.py::test_a_group_is_dead_by_its_rewards_and_not_by_a_float_std",
    ],
    "dead samples are dropped, and shapes change": [
        "test_update.py::test_batches_of_dead_samples_are_not_run_and_not_missed"
    ],
    "the average is late": ["test_engine.py::test_ema"],
    "the average is not what is evaluated": ["test_pitfalls.py::test_evaluation_of_the_last_weights"],
    "the KL has no gradient": ["test_objectives.py::test_loss_and_gradient_of_the_direct_formula"],
    "integer timesteps": ["test_models.py::test_velocities_are_what_the_stock_pipeline_feeds_its_scheduler"],
    "a cast whose result is dropped": ["test_pitfalls.py::test_cast_whose_result_is_dropped"],
    # What copies of the code got wrong
    "sigma is computed twice": ["test_pitfalls.py::test_sigma_computed_twice"],
    "the KL with dt in one place and without in another": [
        "test_tables.py::test_kl_weights",
        "test_objectives.py::test_reference_kl_is_that_of_the_released_code",
        "test_pitfalls.py::test_kl_without_dt",
    ],
    "Guard's correction is a mean over the batch": [
        "test_objectives.py::test_guard_is_the_published_formula_sample_by_sample"
    ],
    "groups are told by the text of their prompts": ["test_pitfalls.py::test_groups_told_by_text"],
    "ids are packed into float32": ["test_pitfalls.py::test_ids_packed_into_float32"],
    "a LoRA that binds nothing": ["test_pitfalls.py::test_lora_that_binds_nothing"],
    "prompts depend on when they are fetched": ["test_prompts.py::test_order_is_a_function_of_seed_and_iteration"],
    "gradients are summed in bfloat16": ["test_engine.py::test_rollout_swapping_and_collectives"],
    "accumulated gradients do not count the steps": ["test_update.py::test_gradient_is_that_of_the_published_formula"],
    "scores that come late are another sample's": ["test_pitfalls.py::test_scores_that_come_late"],
    "pixels are cut off": ["test_pitfalls.py::test_pixels_cut_off"],
    "images are decoded in tiles": ["test_pitfalls.py::test_images_decoded_in_tiles"],
}


def rollouts_of(trainer: Trainer) -> list[tuple]:
    """Of each rollout to come the schedule, the noise's address and the result."""
    found, run = [], trainer.run_rollout

    def record(policy, schedule, address, prompted, guidance_scale):
        result = run(policy, schedule, address, prompted, guidance_scale)
        found.append((schedule, address, result))
        return result

    trainer.run_rollout = record
    return found


def losses_of(trainer: Trainer) -> list[tuple]:
    """Of each micro-batch to come the rows of its steps and its advantages."""
    found, learner = [], trainer.updater.learner

    def record(moments, step, advantages, weight):
        found.append((step, advantages))
        return learner.objective(moments, step, advantages, weight)

    trainer.updater.learners[trainer.model.latent_shape] = replace(learner, objective=record)
    return found


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[tuple], list[tuple], dict]:
    """An iteration in bfloat16 under guidance: the trainer, what the network was given, and the metrics."""
    trainer = trainer_of(tmp_path_factory.mktemp("guided"), "model.dtype=bfloat16", "rollout.guidance_scale=3")
    in_rollout, in_update = networks_of(trainer)
    return trainer, in_rollout, in_update, trainer.iterate(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple], list[tuple]]:
    """The rollouts of an iteration by one rank, and by two with the second prompt's samples on both."""
    found = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        trainer = trainer_of(tmp_path_factory.mktemp("rank"), rank=rank, ranks=world_size)
        found.append(rollouts_of(trainer))
        trainer.iterate(1)
    return found[0], found[1] + found[2]


def test_every_pitfall_has_its_test() -> None:
    """And every test of this file its pitfall."""
    folder, here = ROOT / "tests", Path(__file__).name
    named = {test for tests in TESTS.values() for test in tests}
    there = {
        f"{file.name}::{node.name}"
        for file in folder.rglob("test_*.py") for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }  # fmt: skip
    assert all(TESTS.values()) and sorted(named - there) == []
    mine = {test for test in there if test.startswith(f"{here}::")}
    assert sorted(mine - named) == [f"{here}::test_every_pitfall_has_its_test"]


def test_late_steps_outweigh_early_ones(tmp_path: Path) -> None:
    """The gradient's scale |c_v| / s grows 31 times along SD3.5's 10 steps: Guard's 1 / |dt| must reach the loss."""
    window = "rollout.window={kind: fixed, start: 1, size: 2}"
    trainer = trainer_of(tmp_path, "objective.name=guard", window)
    losses = losses_of(trainer)
    trainer.iterate(1)
    dt = -trainer.model.sigmas(STEPS).double().diff()
    for i, (step, _) in enumerate(losses):  # of each batch the first step and the second
        torch.testing.assert_close(step.loss_weight.double(), (1 / dt[1 + i % 2]).expand(BATCH), rtol=1e-6, atol=0)


def test_latents_rounded_after_they_are_scored() -> None:
    """flow_grpo's FLUX and Qwen, verl-omni: bfloat16 latents move the mean log-prob by 1e-5 to 6e-5, so 12% are clipped."""

    class Half(ToyPolicy):
        latent_shape, dtype = (16, 15, 17), torch.bfloat16

        def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
            return super().forward(x.float(), sigma, conditioning).bfloat16()

    sigmas, start = torch.linspace(1, 0, STEPS + 1), torch.tensor([0, 1])
    schedule, address = (
        window_schedule(sampler_steps("flow_sde", sigmas, 0.7), start, 3),
        noise_address(TRAIN, 5, 3, torch.arange(2)),
    )
    result = rollout(Half(), schedule, address, toy_prompts(torch.zeros(2, 1, 1, 1)), 1.0)

    def error(latents: Tensor) -> float:
        errors = []
        for b in range(2):
            for j in range(3):
                c_x, c_v, s, _ = schedule.table[b, start[b] + j].double()
                mean = c_x * latents[j, b].double() + c_v * result.v_old[j, b].double()
                again = torch.distributions.Normal(mean, s).log_prob(latents[j + 1, b].double()).mean()
                errors.append((again - result.log_prob[j, b]).abs().item())
        return max(errors)

    assert result.latents.dtype == torch.float32
    assert error(result.latents) < 1e-6 < 1e-5 < error(result.latents.bfloat16())


@pytest.mark.slow
def test_half_precision_under_guidance(guided: tuple) -> None:
    """flow_grpo's FAQ and issue 204: rounding moves the ratio from 1, most where s is small. Its v_old is rounded too."""
    assert guided[3]["first_ratio_deviation"] == 0.0


def test_clip_of_another_size_of_latent(tmp_path: Path) -> None:
    """Clips are quoted at D = 65,536; a latent of 262,144 (FLUX at 1024 px) spreads the ratio half as much."""
    trainer = trainer_of(tmp_path, "objective.clip_range=1e-4")
    elements = torch.Size(trainer.model.latent_shape).numel()
    assert elements != 65_536
    assert trainer.updater.learner.objective.keywords["clip_range"] == effective_clip_range(1e-4, elements)


def test_update_in_another_batch_size(guided: tuple) -> None:
    """A network rounds by its shape: flow_grpo demands equal batches, DanceGRPO, of ratio 0.98 (issue 57), batches of 1."""
    _, in_rollout, in_update, _ = guided
    assert {x.shape for x, _, _ in in_update} == {x.shape for x, _, _ in in_rollout} and in_update


def test_windows_within_a_prompt(ranks: tuple) -> None:
    """verl-omni: a window for each request gave rewards 4 times the spread, and BAGEL collapsed within 28 steps."""
    for rollouts in ranks:
        start = torch.cat([schedule.start for schedule, _, _ in rollouts]).view(GROUPS, SIZE)
        assert (start == start[:, :1]).all() and start.unique().numel() > 1
        noisy = torch.cat([schedule.table[..., 2] for schedule, _, _ in rollouts]).view(GROUPS, SIZE, STEPS) > 0
        assert (noisy == noisy[:, :1]).all()


def test_noise_seeded_by_rank(ranks: tuple) -> None:
    """flow_grpo seeds each process: another number of GPUs is another run, and two of one seed draw the same noise."""
    alone, shared = (torch.cat([result.final for _, _, result in rollouts]) for rollouts in ranks)
    assert torch.equal(alone, shared)
    assert len({tuple(row) for row in alone.flatten(1).tolist()}) == GROUPS * SIZE


def test_guidance_in_the_rollout_alone(guided: tuple) -> None:
    """The policy that samples is the guided one: without guidance in the update, another one's ratio is taken."""
    _, in_rollout, in_update, metrics = guided
    assert {rows for _, _, rows in [*in_rollout, *in_update]} == {2 * BATCH}
    assert metrics["first_ratio_deviation"] == 0.0


def test_evaluation_of_the_last_weights(tmp_path: Path) -> None:
    """flow_grpo evaluates and saves the average; the last weights alone swing with every update."""
    trainer, seen = trainer_of(tmp_path), []
    trainer.iterate(1)

    class Looks:
        def accuracy(self, policy: nn.Module, images: int, progress: Any) -> dict:
            seen.append(trainer.engine.trained_state())
            return {"accuracy": {"overall": 0.0}, "percent": []}

        def samples(self, policy: nn.Module, count: int) -> tuple:
            seen.append(trainer.engine.trained_state())
            return ()

    trainer.evaluator = Looks()
    trainer.evaluate(1, 2)
    last, average = trainer.engine.trained_state(), trainer.ema.weights
    assert len(seen) == 2 and any(not torch.equal(last[name], average[name]) for name in last)
    assert all(torch.equal(state[name], average[name]) for state in seen for name in average)


def test_cast_whose_result_is_dropped(guided: tuple) -> None:
    """DanceGRPO's `z.to(bfloat16)`, in seven files: the network reads float32 where the other phase gives it bfloat16."""
    _, in_rollout, in_update, _ = guided
    assert {x.dtype for x, _, _ in [*in_rollout, *in_update]} == {torch.bfloat16}


def test_sigma_computed_twice(guided: tuple) -> None:
    """Flow-Factory passes the next timestep on, as its sigma drifts when it is computed again in lower precision."""
    trainer, in_rollout, in_update, _ = guided
    schedule = set(trainer.model.sigmas(STEPS)[:-1].tolist())
    for passes in (in_rollout, in_update):
        assert all(sigma.dtype == torch.float32 for _, sigma, _ in passes)
    assert {value for _, sigma, _ in in_rollout for value in sigma.tolist()} == schedule
    assert {value for _, sigma, _ in in_update for value in sigma.tolist()} <= schedule


@pytest.mark.parametrize("kl", ["paper", "reference"])
def test_kl_without_dt(tmp_path: Path, kl: str) -> None:
    """flow_grpo divides by 2 g^2 for images and by 2 s^2 for videos, 4 to 25 times more: issues 22 and 78."""
    window = "rollout.window={kind: fixed, start: 1, size: 2}"
    trainer = trainer_of(tmp_path, "objective.beta=0.04", f"objective.kl={kl}", window)
    losses = losses_of(trainer)
    metrics = trainer.iterate(1)
    dt = -trainer.model.sigmas(STEPS).double().diff()
    assert len(losses) == GROUPS * SIZE // BATCH * 2 and metrics["kl"] > 0
    for i, (step, _) in enumerate(losses):  # of each batch the first step and the second
        expected = 1.0 if kl == "paper" else dt[1 + i % 2].item()
        torch.testing.assert_close(2 * step.s.double().square() * step.kl_weight, torch.full((BATCH,), expected).double())


def test_groups_told_by_text(tmp_path: Path) -> None:
    """flow_grpo finds a sample's group by its prompt's text: of two lines with one text it makes one group."""
    (tmp_path / "prompts.txt").write_text("a blue square and a circle\n" * 2)
    prompts = [f"prompts.train={tmp_path / 'prompts.txt'}", "prompts.weights={}", "rollout.groups=2", "rollout.batch_size=4"]
    trainer = trainer_of(tmp_path / "out", *prompts)
    losses = losses_of(trainer)
    trainer.iterate(1)
    advantages = torch.stack([advantages for _, advantages in losses[::2]])  # (G, K)
    assert advantages.abs().amin(dim=1).min() > 0
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(2), rtol=0, atol=1e-5)


def test_ids_packed_into_float32() -> None:
    """Flow-Factory gathers 64-bit ids as float32, in which 2^24 and 2^24 + 1 are one number, and so one group."""
    ids = 2**24 + torch.arange(64)
    noise = normal(noise_address(TRAIN, 0, 2**24 + 1, ids), 0, 4)
    assert len({tuple(row) for row in noise.tolist()}) == 64
    assert not torch.equal(noise, normal(noise_address(TRAIN, 0, 2**24, ids), 0, 4))
    starts = window_starts(Window(kind="random", size=2), 10, 0, ids, 0)
    assert (starts[::2] != starts[1::2]).sum() > 20


def test_lora_that_binds_nothing(tiny_model) -> None:
    """verl-omni issue 552: no module's name fitted, nothing was trained, and nothing said so."""
    before = sum(parameter.numel() for parameter in tiny_model.transformer.parameters())
    with pytest.raises(ValueError, match=r"model\.lora\.targets: SD3Transformer2DModel has no layer 'attn\.to_quay'"):
        tiny_model.add_lora(rank=4, alpha=8, targets=("attn.to_k", "attn.to_quay"))
    assert before == sum(parameter.numel() for parameter in tiny_model.transformer.parameters())


def test_scores_that_come_late(tmp_path: Path) -> None:
    """A reward that runs beside the rollout: a score belongs to its sample whenever it comes."""
    trainer, decoded = trainer_of(tmp_path), []
    losses, decode = losses_of(trainer), trainer.model.decode

    def record(latents: Tensor, **options: Any) -> Tensor:
        decoded.append(decode(latents, **options))
        return decoded[-1]

    def slow_at_first(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        time.sleep(0.5 if images is decoded[0] else 0.0)
        return brightness(images, prompts, metadata)

    trainer.model.decode = record
    trainer.reward = replace(trainer.reward, rewards=dict.fromkeys(trainer.reward.names, slow_at_first))
    trainer.iterate(1)
    rewards, group = brightness(torch.cat(decoded), [], []), torch.arange(GROUPS * SIZE) // SIZE
    expected = group_advantages(rewards, group, num_groups=GROUPS, std="global", adv_clip_max=5.0).values
    assert torch.equal(torch.cat([advantages for _, advantages in losses[::2]]), expected)


def test_pixels_cut_off() -> None:
    """What a reward sees is what the pipeline would save: rounded, where a cast alone cuts off, half a level darker."""
    levels = torch.arange(256)
    values = (levels[:, None] + torch.tensor([-0.49, 0.0, 0.49])) / 255 * 2 - 1
    assert np.array_equal(to_pixels(values), levels[:, None].expand(-1, 3))
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_images_decoded_in_tiles(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """DanceGRPO issue 117: with tiling on, the seams are what a vision-language reward comes to judge."""
    latents = torch.randn(1, *tiny_model.latent_shape)
    whole, vae = tiny_model.decode(latents), tiny_model.pipeline.vae
    edge = tiny_model.latent_shape[-1] // 2
    monkeypatch.setattr(vae, "tile_latent_min_size", edge)
    monkeypatch.setattr(vae, "tile_sample_min_size", edge * tiny_model.pipeline.vae_scale_factor)
    assert torch.equal(tiny_model.decode(latents), whole)
    monkeypatch.setattr(vae, "use_tiling", True)
    assert not torch.equal(tiny_model.decode(latents), whole)
