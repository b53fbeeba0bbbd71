"""`fastgrpo plan`: its counts against formulas and figures from elsewhere; and random weights, of the same architectures."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.drawing import drawn
from support.helpers import ROOT, environment

from fastgrpo.commands.bench import bench_config
from fastgrpo.commands.cli import main
from fastgrpo.commands.plan import Counts, count, count_model, flops_per_image, memory, plan_table, rate
from fastgrpo.measure import GIB
from fastgrpo.models import load_model, loading, model_class
from fastgrpo.testing import FAMILIES, load_family
from fastgrpo.validation import ConfigError, load_config

CONFIG = ROOT / "configs" / "sd3_compressibility.yaml"
TINY = {
    "model": "sd3", "source": "none", "transformer_parameters": 0,
    "parts": {
        "transformer": {
            "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32,
            "caption_projection_dim": 32, "pooled_projection_dim": 64, "pos_embed_max_size": 8,
        },
        "vae": {
            "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "shift_factor": 0.0,
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    },
}  # fmt: skip
COUNTS = Counts(
    parameters=1000, trained=100, buffer_bytes=40, vae_bytes=100, latent_elements=64, forward_flops=10, prepared_flops=0,
    train_flops=21, checkpoint_flops=0, decode_flops=3, conditioning_bytes=9, rollout_bytes=500, decode_bytes=600,
    update_bytes=7000,
)  # fmt: skip


@pytest.fixture
def tiny_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(loading, "ARCHITECTURES", tmp_path)


@pytest.fixture
def four_blocks_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published architectures at full width with four blocks of a kind: a count takes its time by the operation."""
    for path in loading.ARCHITECTURES.glob("*.json"):
        architecture = json.loads(path.read_text())
        for name in architecture["parts"].keys() & {"transformer", "transformer_2"}:
            transformer = architecture["parts"][name]
            depths = transformer.keys() & {"num_layers", "num_single_layers", "num_hidden_layers", "n_layers"}
            assert depths, f"{path.stem} does not say how many blocks it has"
            transformer.update(dict.fromkeys(depths, 4))
        (tmp_path / path.name).write_text(json.dumps(architecture))
    monkeypatch.setattr(loading, "ARCHITECTURES", tmp_path)


@cache
def counts_of(recipe: str, *settings: str) -> Counts:
    """Of configs/RECIPE_compressibility.yaml; takes seconds."""
    return count(load_config(CONFIG.parent / f"{recipe}_compressibility.yaml", settings))


@pytest.fixture
def medium() -> Counts:
    return counts_of("sd3")


@pytest.mark.slow
def test_stable_diffusion_35_medium_is_as_counted_elsewhere(medium: Counts) -> None:
    """2.22 TFLOP forward at 512 px with 205 text tokens, 2.24 B parameters, 18.8 M of LoRA at rank 32."""
    assert medium.parameters == 2_243_171_520
    assert medium.trained == 18_776_064
    assert medium.latent_elements == 16 * 64 * 64
    assert medium.forward_flops == pytest.approx(2.22e12, rel=0.005)
    assert 2.0 < medium.train_flops / medium.forward_flops < 2.3  # frozen weights have no gradient of their own


@pytest.mark.slow
def test_flops_of_the_blocks_follow_from_their_shapes(medium: Counts) -> None:
    """Two per weight and token, and attention's two products: within a few percent of the count of every operation."""
    image, text, width = 32 * 32, 77 + 128, 1536
    block = 12 * width**2 * (image + text) + 2 * 2 * width * (image + text) ** 2 / 2
    dual = 4 * width**2 * image + 2 * 2 * width * image**2 / 2
    assert medium.forward_flops == pytest.approx(2 * (24 * block + 13 * dual), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {"rollout": 100, "decode": 3, "update": 63}),
        (["objective.beta=0.1"], {"rollout": 100, "decode": 3, "update": 63, "reference": 30}),
        (["rollout.guidance_scale=4"], {"rollout": 200, "decode": 3, "update": 126}),
        (["model.compile=true"], {"rollout": 100, "decode": 3, "update": 63}),
        (["update.old_velocity=recompute"], {"rollout": 100, "decode": 3, "update": 63, "old velocity": 30}),
        (["rollout.window={kind: all_but_last}"], {"rollout": 100, "decode": 3, "update": 189}),
    ],
)  # fmt: skip
def test_flops_of_an_image_by_recipe(settings: list[str], expected: dict[str, int]) -> None:
    config = load_config(CONFIG, settings)
    for again, more in ((0, {}), (8, {"checkpoints": 8 / 21 * expected["update"]})):
        found = flops_per_image(config, replace(COUNTS, checkpoint_flops=again))
        assert {name: flops for name, flops in found.items() if flops} == pytest.approx(expected | more)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        (["rollout.window={kind: fixed, start: 4, size: 2}"], 10),
        (["rollout.window={kind: fixed, start: 4, size: 2}", "rollout.after_window.compress_ratio=0.5"], 8),
        (["rollout.window={kind: fixed, start: 4, size: 2}", "rollout.shared_noise=true"], 6 + 4 / 24),
        # Iterations 1 to 4 have windows at 0, 1, 1 and 2.
        (["rollout.window={kind: progressive, size: 2, every: 2}", "iterations=4", "rollout.shared_noise=true"], 9 + 1 / 24),
    ],
)
def test_a_rollouts_forward_passes(settings: list[str], forwards: float) -> None:
    whole_groups = ["rollout.group_size=24", "rollout.groups=32", "rollout.batch_size=24"]
    found = flops_per_image(load_config(CONFIG, [*whole_groups, *settings]), COUNTS)
    assert found["rollout"] == pytest.approx(forwards * COUNTS.forward_flops)
    once = replace(COUNTS, prepared_flops=4)  # which each image needs at one step alone
    found = flops_per_image(load_config(CONFIG, [*whole_groups, *settings]), once)
    assert found["rollout"] == pytest.approx(forwards * 6 + 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_of_lora_by_stage(stage: int) -> None:
    """768 images over 4 GPUs, windows of 3, float16."""
    found = memory(load_config(CONFIG), COUNTS, gpus=4, stage=stage)
    assert found.held == {
        "weights": 1100 * 2 / (4 if stage == 3 else 1) + 40,
        "reference copy": 0, "8-bit copy": 0,
        "gradients": 400 / (4 if stage >= 2 else 1),
        "optimiser": 100 * 12 / 4, "average (EMA)": 400, "decoder": 100, "prompts": 8 * 9,
        "trajectories": 192 * 64 * (4 * 4 + 2 * 3),
    }  # fmt: skip
    asked = 8 * 9  # the conditioning of a batch
    update = 7000 + asked + 100 * (4 if stage == 1 else 2)
    assert found.phases == {"rollout": 500 + asked, "decoding": 600, "update": update}
    assert found.peak == sum(found.held.values()) + found.phases["update"]


def test_memory_of_full_fine_tuning() -> None:
    settings = ["model.train=full", "objective.beta=0.1", "model.dtype=float32", "rollout.guidance_scale=2"]
    counts = Counts(**{**vars(COUNTS), "trained": 1000})
    found = memory(load_config(CONFIG, settings), counts, gpus=1, stage=0)
    assert found.held["weights"] == 4040 and found.held["reference copy"] == 4000 and found.held["optimiser"] == 8000
    assert found.held["gradients"] == 0 and found.phases["update"] == 7000 + 2 * 8 * 9  # in which they are


def test_the_peak_is_that_of_the_hungriest_phase() -> None:
    counts = Counts(**{**vars(COUNTS), "decode_bytes": 10_000})
    found = memory(load_config(CONFIG), counts, gpus=4, stage=1)
    assert found.peak == sum(found.held.values()) + 10_000


# Of one H200, torch.cuda.max_memory_allocated in GiB: benchmarks/results/h200/results.jsonl.
MEASURED = [
    ("sd3", (), 21.25),
    ("sd3", ("update.gradient_checkpointing=true",), 9.67),
    ("flux", (), 43.12),
    ("qwen_image", (), 52.67),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings", "measured"), MEASURED)
def test_peaks_that_a_gpu_has_measured(recipe: str, settings: tuple[str, ...], measured: float) -> None:
    """Of whole iterations by `fastgrpo bench`, with random weights and as few groups as make one."""
    path = CONFIG.parent / f"{recipe}_compressibility.yaml"
    config = bench_config(path, settings, random_weights=True, output=Path("unused"))
    found = memory(config, counts_of(recipe, *settings), gpus=1, stage=config.engine.zero_stage)
    assert found.peak / GIB == pytest.approx(measured, rel=0.1)
    assert max(found.phases, key=found.phases.__getitem__) == ("decoding" if recipe == "sd3" and settings else "update")


@pytest.mark.slow
def test_checkpointing_keeps_less_and_computes_more(four_blocks_deep: None) -> None:
    small = ["model.height=256", "model.width=256"]
    plain = count(load_config(CONFIG, small))
    again = count(load_config(CONFIG, [*small, "update.gradient_checkpointing=true"]))
    assert again.update_bytes < plain.update_bytes / 2  # of four blocks, one at a time
    assert again.train_flops == plain.train_flops and plain.checkpoint_flops == 0
    assert again.checkpoint_flops == pytest.approx(plain.forward_flops, rel=0.1)


def test_the_command_prints_a_table_or_json(tiny_architecture: None, capsys: pytest.CaptureFixture) -> None:
    options = ["--set", "model.architecture=tiny", "--set", "model.height=16", "--set", "model.width=16"]
    assert main(["plan", "--config", str(CONFIG), *options]) == 0
    printed = capsys.readouterr().out
    assert "TFLOP an image" in printed and "stage 3" in printed and "peak" in printed
    assert main(["plan", "--config", str(CONFIG), *options, "--gpus", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    stage = result["memory_bytes"]["stage 1"]
    assert stage["peak"] == sum(stage["held"].values()) + max(stage["phases"].values())
    total = result["flops_per_image"]["total"]
    assert result["images_per_second_and_gpu"] == pytest.approx(0.4 * 989e12 / total)
    assert result["seconds_per_iteration"] == pytest.approx(768 / 2 / result["images_per_second_and_gpu"])


@pytest.mark.parametrize(
    ("per_second", "said"),
    [(13.0, "13.00 videos a second"), (0.1, "0.10 videos a second"), (0.09, "5.40 videos a minute"),
     (0.0016, "5.76 videos an hour"), (2e-5, "1.73 videos a day"), (1e-9, "8.6e-05 videos a day")],
)  # fmt: skip
def test_a_rate_is_said_in_a_unit_that_shows_it(per_second: float, said: str) -> None:
    assert rate(per_second, "videos").strip() == said


def test_what_is_made_of_frames_is_called_a_video() -> None:
    """Of the table alone, with counts that make its speed a thousandth of an image a second. A row of zeros is left out."""
    config = load_config(CONFIG.parent / "wan_compressibility.yaml")
    counts = replace(COUNTS, forward_flops=10**12, train_flops=3 * 10**12, decode_bytes=2**31)
    table = plan_table(
        {"architecture": "wan", "dtype": "bfloat16", "gpus": 8, "counts": vars(counts), "mfu": 0.4, "peak_flops": 989e12,
         "flops_per_image": {"total": 4e17}, "images_per_second_and_gpu": 0.001, "seconds_per_iteration": 1.0,
         "memory_bytes": {"stage 1": memory(config, counts, 8, 1).as_dict()}, "sizes": {}}, config,
    )  # fmt: skip
    assert "+ decoding          2.00" in table and "decoder" not in table
    assert "3.60 videos an hour and GPU" in table and "TFLOP a video" in table and "image" not in table


def test_several_sizes_are_planned_at_their_mean_cost_and_the_memory_of_the_largest(
    tiny_architecture: None, capsys: pytest.CaptureFixture
) -> None:
    """As plans of each size alone say; neither the first nor the last listed is the largest."""
    options = ["plan", "--config", str(CONFIG), "--set", "model.architecture=tiny"]

    def planned(*settings: str) -> dict:
        assert main([*options, *(part for one in settings for part in ("--set", one)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    shares = {"16x16": 0.25, "32x24": 0.5, "16x24": 0.25}
    alone = {size: planned(*map("model.{}={}".format, ("height", "width"), size.split("x"))) for size in shares}
    sizes = "rollout.sizes=[[16, 16], {height: 32, width: 24, weight: 2}, [16, 24]]"
    found = planned(sizes)
    for name, flops in found["flops_per_image"].items():
        assert flops == pytest.approx(sum(share * alone[size]["flops_per_image"][name] for size, share in shares.items()))
    assert found["memory_bytes"] == alone["32x24"]["memory_bytes"] and found["counts"] == alone["32x24"]["counts"]
    expected = {size: {"share": s, "flops_per_image": alone[size]["flops_per_image"]["total"]} for size, s in shares.items()}
    assert found["sizes"] == expected and alone["16x16"]["sizes"] == {}
    assert "32x24 0.0 (50%)" in plan_table(found, load_config(CONFIG, [sizes]))


CONFIGS = sorted(path.stem for path in CONFIG.parent.glob("*_compressibility.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_can_be_planned(name: str, four_blocks_deep: None) -> None:
    """At full width: a forward pass costs about two FLOPs a parameter and token, more where tokens meet in attention."""
    counts = count(load_config(CONFIG.parent / f"{name}.yaml"))
    assert counts.trained > 1e6 and counts.update_bytes > counts.rollout_bytes > 1e6 and counts.decode_bytes > 1e6
    # Twice, with checkpointing three times, a forward pass, and flash attention's backward is 2.5 of its forwards.
    assert 2 < counts.train_flops / counts.forward_flops < 3.6
    assert 0.1 < counts.forward_flops / (2 * counts.parameters * 1024) < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_of_every_family_can_be_counted(name: str, tmp_path: Path) -> None:
    """By its shapes alone: on the meta device, where not one number of it is left."""
    family = load_family(name)
    family.save(tmp_path)
    model = load_model(family.model, path=tmp_path, dtype=torch.float32, device=torch.device("cpu"), **family.settings)
    parameters = sum(p.numel() for p in model.transformer.parameters())
    counts = count_model(load_config(CONFIG), model)
    assert (counts.parameters, counts.latent_elements) == (parameters, math.prod(model.latent_shape))
    assert counts.trained > 0 and counts.train_flops > counts.forward_flops > 0
    assert counts.update_bytes > counts.rollout_bytes > 0 and counts.decode_bytes > 0
    assert (0 < counts.prepared_flops < counts.forward_flops) == (name == "qwen_image_21")


def test_a_decoder_has_the_dtype_that_it_runs_in(tmp_path: Path) -> None:
    """Wan's is float32 beside any model, as its own code runs it."""
    family = load_family("wan")
    family.save(tmp_path)
    config = load_config(CONFIG.parent / "wan_compressibility.yaml")
    model = load_model("wan", path=tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"), **family.settings)
    numbers = sum(p.numel() for p in model.pipeline.vae.parameters())
    assert config.model.dtype == "bfloat16"
    assert memory(config, count_model(config, model), gpus=8, stage=3).held["decoder"] == 4 * numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.architecture=sd9"], "'sd9': unknown; there are .*sd3.5-medium"),
        (["--set", "model.architecture=null"], "name the published architecture"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", str(CONFIG), *arguments]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_random_weights_need_no_checkpoint(tiny_architecture: None) -> None:

    torch.manual_seed(0)
    model = model_class("sd3").random("tiny", dtype=torch.float32, device=torch.device("cpu"), max_text_tokens=4)
    prompts = ["anything", "at all"]
    images = drawn(model, prompts, num_steps=2, guidance_scale=3.0)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8


@pytest.mark.processes
def test_a_whole_run_with_random_weights(tiny_architecture: None, tmp_path: Path) -> None:
    """`--random-weights` from the command on: no checkpoint is looked for, and the run ends with a LoRA and a report."""
    settings = [
        "model.architecture=tiny", "model.height=16", "model.width=16", "model.dtype=float32", "prompts.cache=null",
        "iterations=1", "rollout.groups=4", "rollout.group_size=4", "rollout.num_steps=6", "evaluation.num_steps=2",
        "evaluation.images=8", f"output={tmp_path / 'run'}", f"model.path={tmp_path / 'nowhere'}",
    ]  # fmt: skip
    options = ["--config", str(CONFIG), "--random-weights", *(part for one in settings for part in ("--set", one))]
    program = (
        "import sys; from pathlib import Path; from fastgrpo.models import loading; from fastgrpo.train import main; "
        f"loading.ARCHITECTURES = Path({str(loading.ARCHITECTURES)!r}); sys.exit(main({options!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "run" / "report.html").is_file()


def test_random_weights_of_nothing_are_refused() -> None:
    tiny_shapes = CONFIG.parent / "tiny_shapes_grpo.yaml"
    with pytest.raises(ConfigError, match=r"model\.random_weights = True.*model\.architecture"):
        load_config(tiny_shapes, ["model.random_weights=true"])
