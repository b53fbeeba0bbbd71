"""The benchmarks measure what they say: the model of noise by sampling, the rival by its mathematics."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.helpers import ROOT, environment
from support.tiny_model import load_tuned_model

sys.path.insert(0, str(ROOT / "benchmarks"))

from kernel_speed import SIGMAS, usual_step
from kl_hacking import (
    Evaluation,
    at_reward,
    by_category,
    change,
    distance,
    diversity,
    prompts_of_each_tag,
    true_images,
)
from released import Released, Sample
from scaling import communication, launch
from scored_runs import BASELINE, DEFAULT, GRPO, RUNGS, Run, configuration, due, finished, reached
from time_to_score import Spent, mean, speed_up, until
from tradeoff import excess_noise, window

from fastgrpo.data.prompts import load_prompts
from fastgrpo.learning.batches import experience_of
from fastgrpo.learning.update import Learner, optimizer_step
from fastgrpo.records import TRAIN, Batch, concatenate, noise_address
from fastgrpo.rewards import tiny
from fastgrpo.sampling import tables as sde
from fastgrpo.tiny.render import BACKGROUND, render
from fastgrpo.tiny.world import COLORS, SHAPES, Shape, sample_scene, split_prompts
from fastgrpo.validation import differences, load_config

CONFIG = ROOT / "configs" / "tiny_shapes.yaml"


@pytest.mark.parametrize("sampler, noise_level", [("flow_sde", 0.7), ("flow_sde", 1.2), ("cps", 0.9)])
def test_excess_noise_is_that_of_samples(sampler: str, noise_level: float) -> None:
    """400,000 samples through the table, with the velocity of Gaussian data in closed form."""
    first, size = window(10)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[first : first + size] = True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=generator, dtype=torch.float64)
    sigmas = SIGMAS.double()
    table = sde.coefficient_table(sde.sampler_steps(sampler, sigmas, noise_level), mask)
    for sigma, (c_x, c_v, s, _) in zip(sigmas, table, strict=False):
        x0 = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * x  # E[data | x]
        x1 = sigma / ((1 - sigma) ** 2 + sigma**2) * x  # E[noise | x]
        x = c_x * x + c_v * (x1 - x0) + s * torch.randn(len(x), generator=generator, dtype=torch.float64)
    assert excess_noise(sampler, sigmas, noise_level) == pytest.approx(x.std().item() - 1, abs=4e-3)


def test_an_all_reduce_costs_nothing_alone_and_its_bytes_twice_among_many() -> None:
    assert communication(1, 1.0, 1.0, 100.0) == 0
    assert communication(2, 0.5, 10.0, 100.0) == pytest.approx(2 * 0.5 + 100 / 10)
    assert communication(1024, 0.0, 10.0, 100.0) == pytest.approx(2 * 100 / 10, rel=1e-2)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_straightforward_loop_computes_the_same_update(guidance_scale: float) -> None:
    """Its step is a row of our table, and on the same trajectory its gradient is ours: only the way there is another."""
    settings = [
        f"rollout.guidance_scale={guidance_scale}", "rollout.window={kind: all_but_last}", "objective.beta=0.1",
        "rollout.noise_level=0.7", "rollout.num_steps=4",
    ]  # fmt: skip
    config = load_config(CONFIG, settings)
    model = load_tuned_model()
    rival = Released(config, model, load_prompts(config.prompts.train))
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    experience, result, learner = own_update(model, prompts, guidance_scale, config)

    x, x_next, v = experience.x[1], experience.x_next[1], experience.v_old[1]
    c_x, c_v, s, _ = experience.coefficients[1, 0].double()
    _, log_prob, mean, _ = rival.step(x, v, rival.timesteps[1].expand(3), x_next)
    torch.testing.assert_close(mean.double(), c_x * x.double() + c_v * v.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob, result.log_prob[1], rtol=1e-4, atol=1e-4)
    assert usual_step(x, v, rival.timesteps[1].expand(3), rival.timesteps, rival.sigmas)[0].shape == x.shape

    optimizer_step(learner, [experience])
    own = {n: p.grad.clone() for n, p in model.transformer.named_parameters() if p.grad is not None}
    model.transformer.zero_grad()
    latents = [result.latents[i] for i in range(4)]
    log_probs = [result.log_prob[j] for j in range(3)]
    both = [rows for rows in (experience.prompted.uncond, experience.prompted.cond) if rows is not None]
    embeds, pooled = concatenate(both)
    sample = Sample(embeds, pooled, latents, log_probs, torch.zeros(3), torch.zeros(3))
    rival.backward(sample, experience.advantages, batches=1)
    for name, gradient in own.items():
        other = model.transformer.get_parameter(name).grad
        scale = gradient.abs().max().item()
        torch.testing.assert_close(other, gradient, rtol=0.02, atol=2e-3 * scale + 1e-9)
    assert len(own) > 10


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("drop_dead", [False, True])
def test_the_straightforward_loop_updates_on_the_models_device(monkeypatch, drop_dead: bool, guidance_scale: float) -> None:
    """With rewards on the host, as the tiny worlds' are. The meta device stands for a GPU: it holds shapes only."""
    settings = [
        f"rollout.guidance_scale={guidance_scale}", "rollout.groups=2", "rollout.group_size=4", "rollout.batch_size=4",
        "update.steps_per_rollout=1", "objective.beta=0.1",
    ]  # fmt: skip
    config, model = load_config(CONFIG, settings), load_tuned_model()
    model.device = torch.device("meta")
    rival = Released(config, model, load_prompts(config.prompts.train), drop_dead=drop_dead)
    rewards = {0: torch.tensor([0.0, 1.0, 1.0, 1.0]), 1: torch.tensor([1.0, 1.0, 1.0, 1.0])}
    handed, both = [], 2 if guidance_scale != 1 else 1

    def sample(records: list[dict], groups: torch.Tensor) -> Sample:
        assert len(records) == 4 and groups.unique().numel() == 1
        on = dict(device="meta")
        embeds, pooled = torch.zeros(4 * both, 1, 8, **on), torch.zeros(4 * both, 8, **on)
        x, log_prob = torch.zeros(4, *model.latent_shape, **on), torch.zeros(4, **on)
        return Sample(embeds, pooled, [x] * 3, [log_prob] * 2, rewards[int(groups[0])], groups)

    monkeypatch.setattr(rival, "sample", sample)
    monkeypatch.setattr(rival, "backward", lambda *arguments: handed.append(arguments))
    rival.iterate(1)
    assert len(handed) == (1 if drop_dead else 2)
    for batch, advantages, _ in handed:
        for tensor, rows in (
            (advantages, 4), (batch.embeds, 4 * both), (batch.pooled, 4 * both),
            *((t, 4) for t in (*batch.latents, *batch.log_probs)),
        ):  # fmt: skip
            assert tensor.is_meta and len(tensor) == rows


def evaluations(*accuracies: float) -> list[dict]:
    return [{"iteration": 3 * n, "accuracy": accuracy} for n, accuracy in enumerate(accuracies)]


def test_a_score_is_reached_where_two_evaluations_agree() -> None:
    rows = evaluations(0.6, 0.91, 0.89, 0.9, 0.95, 0.94)
    assert reached(rows, 0.9) == 9 and reached(rows, 0.95) is None
    assert (until(rows, 0.9), until(rows, 0.95)) == (Spent(9, True), Spent(15, False))
    assert reached(evaluations(0.9, 0.9), 0.9) is None, "the base was not trained"
    assert reached(evaluations(0.9, 0.9, 0.9), 0.9) == 3


def test_a_speed_up_over_what_never_arrived_is_a_bound() -> None:
    assert speed_up(Spent(80, True), Spent(20, True)) == {"times": 4.0, "text": "4.00x"}
    assert speed_up(Spent(80, False), Spent(20, True))["text"] == "> 4.00x"
    assert speed_up(Spent(80, True), Spent(100, False))["text"] == "< 0.80x"
    assert speed_up(Spent(80, False), Spent(100, False))["times"] is None
    assert mean([Spent(10, True), Spent(20, False)]) == Spent(15, False)


def run_of(folder: Path, seconds: float = 1.0, **changes) -> Run:
    return Run("a", 0, folder, seconds, **{"budget": 700.0, "score": 0.9, "every": 20.0} | changes)


def test_all_recipes_are_evaluated_at_the_same_times(tmp_path: Path) -> None:
    """Within half an iteration of each other, whatever an iteration takes; first evenly, then 8% apart."""
    fine = due(run_of(tmp_path, 0.01))
    for seconds in (3.7, 11.0):
        coarse = [iteration * seconds for iteration in due(run_of(tmp_path, seconds))]
        assert len(coarse) == len(fine) and coarse[0] == 0
        assert all(abs(at - 0.01 * n) <= seconds / 2 + 0.01 for at, n in zip(coarse, fine, strict=True))
    gaps = [0.01 * (after - before) for before, after in zip(fine, fine[1:-1], strict=False)]
    assert fine[-1] == 70_000 and gaps[:13] == pytest.approx([20] * 13) and gaps[-1] > 40
    assert due(run_of(tmp_path, 300.0)) == [0, 1, 2]


def test_a_run_ends_at_its_score_or_at_a_multiple_of_what_the_default_took(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", seconds=2.0)
    run = run_of(tmp_path, first=first, multiple=5.0)
    low = evaluations(0.5, 0.6, 0.7, 0.8, 0.85)  # iteration 12, second 12
    assert not finished(run, []) and not finished(run, low) and finished(run, evaluations(0.5, 0.9, 0.9))
    assert finished(run, [*low, {"iteration": 700, "accuracy": 0.8}])
    first.folder.mkdir()
    lines = evaluations(0.5, 0.9, 0.95)  # reached at iteration 3, second 6: the other may take 30
    (first.folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert not finished(run, [*low, {"iteration": 29, "accuracy": 0.8}])
    assert finished(run, [*low, {"iteration": 30, "accuracy": 0.8}])


def test_the_ladder_leads_from_the_baseline_to_the_default_one_cause_at_a_time() -> None:
    configs = [configuration(name) for name in (BASELINE, *RUNGS, DEFAULT)]
    assert configs[-1] == load_config(CONFIG)
    for below, above, keys in zip(configs, configs[1:], RUNGS.values(), strict=False):
        assert (changed := differences(below, above)) and all(row.startswith(tuple(keys)) for row in changed)
    assert differences(configs[-2], load_config(CONFIG.parent / GRPO), but=("output",)) == []


WHOLE = """
import sys
sys.path.insert(0, "benchmarks")
from pathlib import Path
import common
common.RESULTS = Path(sys.argv[1])
import time_to_score
options = sys.argv[2:]
for budget in ("2", "4"):
    sys.argv[1:] = [*options, "--budget", budget]
    time_to_score.main()
"""


@pytest.mark.processes
def test_time_to_score_as_a_whole(tmp_path: Path) -> None:
    """Two small recipes to a score that any model has and one that none can have; then the same runs go on."""
    small = [
        "rollout.groups=2", "rollout.group_size=2", "rollout.batch_size=2", "rollout.num_steps=4",
        "rollout.window={kind: fixed, start: 0, size: 3}", "model.lora={rank: 2, alpha: 4}",
    ]  # fmt: skip
    options = [
        "--recipes", "flow_grpo", "+guidance", "--seeds", "7", "--scores", "0", "1.1", "--images", "5", "--steps", "2",
        "--every", "0.8", "--rounds", "1", "--workers", "1", "--work", str(tmp_path / "work"),
    ]  # fmt: skip
    settings = [part for setting in small for part in ("--set", setting)]
    command = [sys.executable, "-c", WHOLE, str(tmp_path), *options, *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert after == json.loads((tmp_path / "time_to_score_cpu.json").read_text())
    assert (tmp_path / "time_to_score_cpu.png").exists()
    # Rollout, update with its backward, reference: 4 images, 4 steps, 3 of them trained; twice all that under guidance.
    forwards = [row["image_forwards_per_iteration"] for row in after["results"]]
    assert forwards == [2 * (4 * 4 + 4 * 3 * 3 + 4 * 3), 4 * 4 + 4 * 3 * 3 + 4 * 3]
    for short, long in zip(before["results"], after["results"], strict=True):
        any_score, no_score = long["scores"]["0"], long["scores"]["1.1"]
        assert any_score["reached"] and not no_score["reached"]
        assert no_score["by_seed"] == {"7": "not reached in 4 seconds"} and no_score["speed_up"]["seconds"]["times"] is None
        assert any_score["seconds"] == pytest.approx(any_score["iterations"] * long["seconds_per_iteration"], abs=0.06)
        assert long["curves"]["7"][: len(short["curves"]["7"])] == short["curves"]["7"], "evaluated anew"
        assert len(long["curves"]["7"]) > len(short["curves"]["7"]) > 2
    assert after["results"][0]["scores"]["0"]["speed_up"]["seconds"]["text"] == "1.00x"


@pytest.mark.processes
def test_ranks_see_the_packages_of_the_callers_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packages"  # not beside the script, where a rank looks anyway
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (folder / "carried.py").write_text("")
    (tmp_path / "rank.py").write_text("import carried, fastgrpo; print(carried.__file__, fastgrpo.__file__)")
    carried, own = launch(1, [str(tmp_path / "rank.py")]).split()
    assert Path(carried).parent == folder and Path(own).is_relative_to(ROOT)


def own_update(model, prompts: list[str], guidance_scale: float, config):
    from support.learners import PlainEngine

    from fastgrpo.data.embeddings import Embeddings
    from fastgrpo.learning.objectives import clip
    from fastgrpo.policy import Policy
    from fastgrpo.sampling.rollout import rollout
    from fastgrpo.sampling.schedule import Weighting, window_schedule
    from fastgrpo.sampling.tables import sampler_steps

    steps, start = sampler_steps("flow_sde", model.sigmas(4), 0.7), torch.zeros(len(prompts), dtype=torch.int64)
    sample_id, prompted = torch.arange(len(prompts)), Embeddings(model).prompted(prompts, guidance_scale)
    schedule = window_schedule(steps, start, 3, Weighting(kl="reference"))
    result = rollout(Policy(model), schedule, noise_address(TRAIN, 0, 1, sample_id), prompted, guidance_scale)
    batch = Batch(sample_id=sample_id, prompted=prompted, schedule=schedule, trajectory=result)
    experience = experience_of(batch, torch.tensor([1.0, -1.0, 0.5]), torch.ones(3))
    learner = Learner(
        engine=PlainEngine(Policy(model)), reference=model.reference, guidance_scale=guidance_scale,
        objective=partial(clip, clip_range=config.objective.clip_range, beta=config.objective.beta),
        model_dtype=model.dtype, micro_batch_size=len(prompts),
    )  # fmt: skip
    return experience, result, learner


def drawings(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    _, records = split_prompts()
    scenes = [sample_scene(records[i], rng) for i in rng.integers(len(records), size=count)]
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)


def test_drawings_are_near_the_world_and_noise_leads_away_from_it() -> None:
    """Noise of s levels is s away: the few numbers of the nearest drawing explain next to nothing of it."""
    images = drawings(30)
    assert distance(images).max() < 4  # half a step of the grid of centres and radii
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    means = [distance((images + level * noise).round().clamp(0, 255)).mean().item() for level in (5, 10, 20, 40)]
    assert means == sorted(means)
    assert 9 < means[1] < 11 and 16 < means[2] < 20


def test_the_distance_is_that_of_the_nearest_drawing() -> None:
    """Against the search over all pairs, written out for one cell; on the grid, a drawing is 0 away but for rounding."""
    on_grid = [Shape("triangle", "green", 8.0, 8.0, 5.4), Shape("circle", "red", 8.15, 7.85, 4.8)]
    patches = [render([shape])[:16, :16].astype(np.float64) for shape in on_grid]
    empty = render([])
    images = np.stack([empty.copy() for _ in range(3)])
    for image, patch in zip(images, patches, strict=False):
        image[:16, :16] = patch
    blend = images[2]
    blend[:16, :16] = np.round(0.7 * patches[0] + 0.3 * np.float64(BACKGROUND))  # a pale triangle
    found = distance(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert found[:2].max() < 0.5

    candidates = [
        render([Shape(name, color, 8 + x, 8 + y, radius)])[:16, :16].astype(np.float64)
        for name in SHAPES for color in COLORS for x in np.linspace(-0.3, 0.3, 5) for y in np.linspace(-0.3, 0.3, 5)
        for radius in np.linspace(4.8, 6, 9)
    ]  # fmt: skip
    nearest = min(((blend[:16, :16] - patch) ** 2).sum() for patch in candidates)
    assert found[2].item() == pytest.approx((nearest / blend.size) ** 0.5, rel=0.02)
    assert found[2] > 5


def test_true_images_show_what_was_asked_as_well_as_the_autoencoder_can() -> None:
    records = split_prompts()[1][::40]
    images = true_images(SimpleNamespace(config=SimpleNamespace(seed=0), model=load_tuned_model()), records)
    assert tiny.shapes(images, [record["prompt"] for record in records], records).tolist() == [1.0] * len(records)
    assert 2 < distance(images).mean() < 4


def test_diversity_is_the_mean_over_pairs() -> None:
    """Three flat images at levels 0, 10 and 40 differ by 10, 30 and 40; three alike by nothing."""
    levels = torch.tensor([[0, 10, 40], [7, 7, 7]], dtype=torch.uint8)
    groups = levels[:, :, None, None, None].expand(2, 3, 3, 32, 32)
    torch.testing.assert_close(diversity(groups), torch.tensor([80 / 3, 0.0]))


def test_runs_are_compared_at_the_nearest_reward_and_against_the_base() -> None:
    def evaluation(iteration: int, reward: float, distances: list[float]) -> Evaluation:
        values = {"reward": torch.full((3,), reward), "distance": torch.tensor(distances)}
        return Evaluation(iteration, torch.zeros(0), values)

    base = evaluation(0, 2.0, [4.0, 5.0, 6.0])
    run = [base, evaluation(5, 1.0, [4.0] * 3), evaluation(10, 2.4, [5.0, 6.0, 7.0]), evaluation(15, 3.1, [9.0, 5.0, 7.0])]
    assert at_reward(run, 2.1) is run[2]
    assert at_reward(run, 9.0) is run[3]
    assert change(run[2], base, "distance") == {"relative": 0.2, "error": 0.0}  # each prompt moved alike
    error = np.std([5.0, 0.0, 1.0], ddof=1) / 3**0.5 / 5
    assert change(run[3], base, "distance") == {"relative": 0.4, "error": pytest.approx(error, abs=1e-4)}


def test_categories_are_means_over_their_own_prompts() -> None:
    values = {name: torch.tensor([1.0, 5.0, 3.0]) * factor for name, factor in
              (("accuracy", 0.1), ("distance", 1.0), ("diversity", 10.0))}  # fmt: skip
    assert by_category(Evaluation(0, torch.zeros(0), values), ["a", "b", "a"]) == {
        "a": {"accuracy": 0.2, "distance": 2.0, "diversity": 20.0},
        "b": {"accuracy": 0.5, "distance": 5.0, "diversity": 50.0},
    }


def test_evaluated_prompts_are_even_over_the_categories() -> None:
    records = [{"tag": tag, "n": n} for tag, count in (("a", 10), ("b", 2), ("c", 5)) for n in range(count)]
    chosen = [(record["tag"], record["n"]) for record in prompts_of_each_tag(records, 6)]
    assert chosen == [("a", 0), ("a", 5), ("b", 0), ("b", 1), ("c", 0), ("c", 2)]
