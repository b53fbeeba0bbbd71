import inspect
from pathlib import Path

import pytest
import yaml
from support.helpers import ROOT

from fastgrpo.config.keys import Window
from fastgrpo.config.reference import describe
from fastgrpo.data.prompts import IMAGE_FIELD, check_held_out, load_prompts
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.learning.objectives import effective_clip_range
from fastgrpo.models import model_class
from fastgrpo.models.loading import read_architecture
from fastgrpo.validation import (
    Config,
    ConfigError,
    check_ranks,
    differences,
    dump_config,
    load_config,
    recomputes_old,
)

TINY = ROOT / "configs" / "tiny_shapes_grpo.yaml"


@pytest.mark.parametrize("path", sorted(TINY.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, Config)
    fields = (IMAGE_FIELD,) if model_class(config.model.name).image_conditioned else ()
    check_held_out(load_prompts(config.prompts.train, fields), load_prompts(config.prompts.eval, fields))
    if config.model.architecture is not None:
        family, published = model_class(config.model.name), read_architecture(config.model.architecture)["model"]
        # Two families may read one folder.
        assert published == config.model.name or model_class(published).pipeline_class in family.published_as


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_step=8", r"rollout\.num_step: unknown key; did you mean 'num_steps'"),
        ("rolout.num_steps=8", r"rolout: unknown key; did you mean 'rollout'"),
        ("rollout.window.strat=1", r"rollout\.window\.strat: unknown key; did you mean 'start'"),
        ("rollout.num_steps=8.5", r"rollout\.num_steps = 8.5: expected int, found float"),
        ("rollout.num_steps=true", r"rollout\.num_steps = True: expected int"),
        ("rollout=3", r"rollout = 3: expected a section"),
        ("model.path=3", r"model\.path = 3: expected Path"),
        ("update.betas=[0.9]", r"update\.betas = \[0.9\]: expected 2 values"),
        ("rollout.sampler=flow", r"rollout\.sampler = 'flow': did you mean 'flow_sde'"),
        ("rollout.window.kind=rndom", r"rollout\.window\.kind = 'rndom': did you mean 'random'"),
        ("objective.kl=papr", r"objective\.kl = 'papr': did you mean 'paper'"),
        ("objective.name=gard", r"objective\.name = 'gard': did you mean 'guard'"),
        ("reward.train=tiny_shape", r"reward\.train = 'tiny_shape': did you mean 'tiny_shapes'"),
        ("reward.train={tiny_shape: 1}", r"reward\.train = 'tiny_shape': did you mean 'tiny_shapes'"),
        ("reward.train={tiny_shapes: much}", r"reward\.train\.tiny_shapes = 'much': expected float, found str"),
        ("reward.eval={tiny_shapes: .inf}", r"reward\.eval\.tiny_shapes = inf: must be a finite number"),
        ("reward.eval={}", r"reward\.eval = \{\}: name at least one; choices: tiny_shapes"),
        ("reward.eval=3", r"reward\.eval = 3: expected str, found int"),
        ("reward.settings={tiny_shape: {a: 1}}", r"reward\.settings\.tiny_shape: no such .* did you mean 'tiny_shapes'"),
        ("reward.settings={tiny_shapes: 1}", r"reward\.settings\.tiny_shapes = 1: expected a mapping of names to Any"),
        ("model.name=sd4", r"model\.name = 'sd4': did you mean 'sd3'"),
        ("prompts.weights=3", r"prompts\.weights = 3: expected a mapping"),
        ("prompts.weights={counting: many}", r"prompts\.weights\.counting = 'many': expected float, found str"),
        ("update.micro_batch_size=100", r"update\.micro_batch_size = 100: a batch of .* images has .* take a divisor"),
        ("update.micro_batch_size=largst", r"update\.micro_batch_size = 'largst': did you mean 'largest'"),
        ("model.attention=xformer", r"model\.attention = 'xformer': did you mean 'xformers'"),
        ("engine.zero_stage=3", r"rollout\.cuda_graph = True: ZeRO-3 moves the weights.*rollout\.cuda_graph=false"),
        ("engine.zero_stage=1.0", r"engine\.zero_stage = 1.0: .*choices: 0, 1, 2, 3"),
        ("engine.zero_stage=true", r"engine\.zero_stage = True: choices: 0, 1, 2, 3"),
        ("engine.zero_stage=4", r"engine\.zero_stage = 4: choices: 0, 1, 2, 3"),
        ("model.dtype=bf16", r"model\.dtype = 'bf16': did you mean 'bfloat16'"),
        ("rollout.group_size=1", r"rollout\.group_size = 1: .* at least 2"),
        ("advantage.keep=7", r"advantage\.keep = 7: half the best .* an even number from 2 to group_size = 16"),
        ("advantage.keep=18", r"advantage\.keep = 18: .* an even number from 2 to group_size = 16"),
        ("advantage.keep=1", r"advantage\.keep = 1: must be at least 2 and at most 10000"),
        ("advantage.keep=0", r"advantage\.keep = 0: must be at least 2"),
        ("advantage.keep=4.0", r"advantage\.keep = 4.0: expected int, found float"),
        ("advantage.combine=all", r"advantage\.combine = 'all': choices: sum, each"),
        ("advantage.std=batch", r"advantage\.std = 'batch': choices: group, global"),
        ("advantage.pairwise=1", r"advantage\.pairwise = 1: expected bool, found int"),
        ("advantage.adv_clip_max=0", r"advantage\.adv_clip_max = 0.0: must be above 0"),
        ("objective.advantage_std=group", r"objective\.advantage_std: unknown key"),
        ("rollout.num_steps=1", r"rollout\.num_steps = 1: .* at least 2"),
        ("rollout.sampler=ode", r"rollout: sampler 'ode' .* no noise"),
        (
            "rollout.guidance_scale=0",
            r"rollout\.guidance_scale = 0.0: .*Z-Image's cards say 0: that is 1 here$",
        ),
        ("rollout.noise_level=0", r"rollout\.noise_level = 0.0: must be above 0 and at most 10"),
        ("rollout.window={kind: fixed, size: 10}", r"rollout: a window of 10 steps from step 0"),
        ("rollout.window={kind: random, size: 3, range: [8, 12]}", r"rollout: "),
        ("rollout.window={kind: random, size: 3, shared: 1}", r"rollout\.window\.shared = 1: expected bool"),
        (
            "rollout.window={kind: progressive, size: 2, decay: -1}",
            r"rollout\.window\.decay = -1.0: must be at least 0 and at most 100",
        ),
        ("rollout.after_window.solver=dpmpp", r"rollout\.after_window\.solver = 'dpmpp': did you mean 'dpmpp_2m'"),
        (
            "rollout.after_window.compress_ratio=0",
            r"rollout\.after_window\.compress_ratio = 0.0: must be above 0 and at most 1",
        ),
        (
            "rollout.after_window.compress_ratio=1.5",
            r"rollout\.after_window\.compress_ratio = 1.5: must be above 0 and at most 1",
        ),
        ("objective.step_weight=tempflw", r"objective\.step_weight = 'tempflw': did you mean 'tempflow'"),
        ("rollout.batch_size=100", r"rollout\.batch_size = 100: .* must be a multiple of 200"),
        ("update.learning_rate=-1", r"update\.learning_rate = -1.0: must be above 0 and at most 1"),
        ("update.learning_rate=.nan", r"update\.learning_rate = nan: must be a finite number"),
        ("evaluation.samples=1000", r"evaluation\.samples = 1000: at most"),
        ("rollout.num_steps", r"--set rollout\.num_steps: expected key\.path=value"),
        ("seed.a=1", r"'seed' is a value, not a section"),
        ("seed=[", r"not valid YAML"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(override: str, message: str) -> None:
    base = ["rollout.groups=16", "rollout.group_size=16", "rollout.batch_size=128", "update.steps_per_rollout=2"]
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [*base, override])


def test_what_needs_one_window_for_all_groups() -> None:
    window = "rollout.window={kind: random, size: 3}"
    settings = {"rollout.shared_noise=true": "shared_noise", "rollout.after_window.compress_ratio=0.5": "ratio 0.5"}
    for setting, key in settings.items():
        with pytest.raises(ConfigError, match=rf"rollout: .*{key} needs the same window.*window\.shared=true"):
            load_config(TINY, [window, setting])
        load_config(TINY, ["rollout.window={kind: random, size: 3, shared: true}", setting])
    sizes = ["rollout.groups=16", "rollout.group_size=8", "rollout.batch_size=4", "update.steps_per_rollout=2"]
    with pytest.raises(ConfigError, match="rollout: shared_noise with batch_size 4: take a multiple of group_size 8"):
        load_config(TINY, [*sizes, "rollout.shared_noise=true"])


def test_stage_0_needs_float32() -> None:
    with pytest.raises(ConfigError, match=r"engine\.zero_stage = 0: .*bfloat16.* take 1"):
        load_config(TINY, ["model.dtype=bfloat16", "engine.zero_stage=0"])


def test_ranks_must_divide_the_images() -> None:
    small = ["rollout.groups=4", "rollout.group_size=4", "rollout.batch_size=4", "update.steps_per_rollout=2"]
    config = load_config(TINY, small)
    check_ranks(config, 2)
    with pytest.raises(ConfigError, match="on 3 processes: 16 must be a multiple of 24"):
        check_ranks(config, 3)


def test_numbers_and_overrides() -> None:
    window = "rollout.window={kind: fixed, size: 2}"
    config = load_config(TINY, ["update.learning_rate=1e-4", "objective.beta=1", "seed=7", window])
    assert config.update.learning_rate == 1e-4 and config.objective.beta == 1.0 and config.seed == 7
    assert (config.rollout.window.kind, config.rollout.window.size, config.rollout.window.start) == ("fixed", 2, 0)


def test_the_advantage_section_is_what_the_function_takes() -> None:
    """Its keys are passed on by name, so a published recipe reads as it is written."""
    config = load_config(TINY, ["advantage={std: group, combine: each, pairwise: true, keep: 16}"])
    assert vars(config.advantage) == {
        "std": "group", "adv_clip_max": 5.0, "combine": "each", "pairwise": True, "keep": 16
    }  # fmt: skip
    taken = inspect.signature(group_advantages).parameters
    assert all(name in taken for name in vars(config.advantage))
    defaults = vars(load_config(TINY).advantage)
    assert all(taken[name].default == defaults[name] for name in ("combine", "pairwise", "keep"))


def test_missing_key_and_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("output: runs/a\n")
    with pytest.raises(ConfigError, match="model: missing"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "b.yaml")


def test_dump_reads_back_equal_from_anywhere(tmp_path: Path) -> None:
    config = load_config(TINY, ["output=" + str(tmp_path), "rollout.window={kind: random, size: 2, range: [0, 5]}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config and differences(config, again) == []
    other = load_config(TINY, ["output=" + str(tmp_path), "objective.beta=0.5"])
    assert any(row.startswith("objective.beta: ") for row in differences(config, other))


RECIPES = TINY.parent / "recipes"
NAMES = ["flow_grpo", "flow_grpo_fast", "mixgrpo", "mixgrpo_flash", "guard", "dppo_cps", "nft", "awm"]
ALGORITHM = ("rollout", "advantage", "objective", "forward", "update")
# What the recipes of a model share: batches, the averaging, and in the tiny world the learning rate.
SHARED = {"rollout.groups", "rollout.group_size", "rollout.batch_size", "update.ema_decay", "update.learning_rate"}

FORWARD = {"forward.num_timesteps", "forward.range"}
UNREAD = {  # what a recipe's objective does not ask for
    "clip": FORWARD,
    "guard": FORWARD,
    "dppo": {"objective.clip_range", *FORWARD},
    "nft": {"rollout.noise_level", "rollout.window", "objective.clip_range", "objective.log_prob_weight"},
    "awm": {"rollout.noise_level", "rollout.window", "objective.log_prob_weight"},
}


def set_keys(path: Path) -> dict[str, set[str]]:
    """The keys of the algorithm's sections that a file sets, and each file that it extends, nearest first."""
    data = yaml.safe_load(path.read_text())
    keys = {f"{section}.{key}" for section in ALGORITHM for key in data.get(section, {})}
    below = set_keys((path.parent / data["extends"]).resolve()) if "extends" in data else {}
    return {path.name: keys, **below}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", ["tiny", "sd3"])
def test_a_recipe_is_its_own_on_the_same_base(world: str, name: str) -> None:
    """It loads, differs from what it extends in nothing but the algorithm, and says itself whatever that tunes of it."""
    path = RECIPES / world / f"{name}.yaml"
    config = load_config(path)
    *own, (base, tuned) = set_keys(path).items()
    base_config = load_config(TINY.parent / base)
    for change in differences(base_config, config, but=("output",)):
        assert change.startswith((*(f"{section}." for section in ALGORITHM), "evaluation.guidance_scale")), change
    assert config.output == Path("runs") / "recipes" / world / name
    said = set().union(*(keys for _, keys in own))
    free = SHARED | UNREAD[config.objective.name]
    assert tuned - said <= free, f"{path.name} takes over what {base} tuned"
    if world == "tiny":
        assert not said & SHARED
    assert sorted(file.stem for file in (RECIPES / world).iterdir()) == sorted(NAMES)


def test_the_published_numbers_of_flow_grpo() -> None:
    for world, guidance in (("tiny", 2.0), ("sd3", 4.5)):
        config = load_config(RECIPES / world / "flow_grpo.yaml")
        rollout, objective, update = config.rollout, config.objective, config.update
        assert (rollout.sampler, rollout.num_steps, rollout.noise_level) == ("flow_sde", 10, 0.7)
        assert rollout.window == Window(kind="all_but_last")
        assert rollout.guidance_scale == config.evaluation.guidance_scale == guidance
        assert (objective.clip_range, objective.beta, objective.kl) == (1e-4, 0.04, "reference")
        assert objective.log_prob_weight == "exact"
        assert (update.steps_per_rollout, update.ema_decay, update.max_grad_norm) == (2, 0.9, 1.0)
    assert (rollout.groups, rollout.group_size, update.learning_rate) == (48, 24, 3e-4)


def test_the_published_numbers_of_flow_grpo_for_wan() -> None:
    """config/grpo.py, general_ocr_wan2_1: 20 steps, all but the last trained, clip 1e-3 at 240 x 416 x 33 pixels."""
    config = load_config(RECIPES / "wan" / "flow_grpo.yaml")
    model, rollout, objective, update = config.model, config.rollout, config.objective, config.update
    assert (rollout.sampler, rollout.num_steps, rollout.noise_level) == ("wan_sde", 20, 1.0)
    assert rollout.window == Window(kind="all_but_last") and (rollout.guidance_scale, rollout.group_size) == (4.5, 4)
    assert (model.height, model.width, model.num_frames) == (240, 416, 33)
    elements = 16 * 9 * (240 // 8) * (416 // 8)
    assert effective_clip_range(objective.clip_range, elements) == pytest.approx(1e-3, rel=1e-4)
    assert (objective.beta, objective.kl, objective.log_prob_weight) == (0.004, "paper", "exact")
    assert (update.learning_rate, update.steps_per_rollout, update.max_grad_norm) == (1e-4, 2, 1.0)
    assert (config.advantage.std, config.advantage.adv_clip_max) == ("group", 5.0)
    base = load_config(TINY.parent / "wan_compressibility.yaml")
    for change in differences(base, config, but=("output",)):
        assert change.startswith(tuple(f"{section}." for section in ALGORITHM)), change
    assert config.output == Path("runs") / "recipes" / "wan" / "flow_grpo"


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    """Through two folders: the last file wins key by key, and an override wins over all."""
    middle = f"extends: {TINY}\noutput: {tmp_path}\nseed: 3\nobjective: {{beta: 0.5, clip_range: 1e-5}}\n"
    middle = written(tmp_path, "family/middle.yaml", middle)
    path = written(tmp_path, "last.yaml", "extends: family/middle.yaml\nobjective: {beta: 0}\nmodel: {lora: {rank: 4}}\n")
    config, base = load_config(path), load_config(TINY)
    assert differences(base, config, but=("output",)) == [
        "model.lora.rank: 16 -> 4", "seed: 0 -> 3", "objective.clip_range: 0.001 -> 1e-05", "objective.beta: 0.3 -> 0.0",
    ]  # fmt: skip
    assert load_config(path, ["objective.beta=0.7"]).objective.beta == 0.7
    assert load_config(middle).objective.beta == 0.5
    dumped = written(tmp_path, "elsewhere/config.yaml", dump_config(config))
    assert "extends:" not in dumped.read_text() and load_config(dumped) == config


def test_what_is_one_value_is_replaced_whole(tmp_path: Path) -> None:
    """A free mapping, and a section that names its kind; without it, its keys merge like any section's."""
    rewards = "prompts: {weights: {counting: 1}}\nreward: {train: {tiny_shapes: 2}}\n"
    text = f"extends: {TINY}\nrollout: {{window: {{size: 2}}}}\n{rewards}"
    config = load_config(written(tmp_path, "a.yaml", text))
    assert config.rollout.window == Window(kind="fixed", start=1, size=2)
    assert config.prompts.weights == {"counting": 1.0} and config.reward.train == {"tiny_shapes": 2.0}
    rewards = "prompts: {weights: {}}\nreward: {train: tiny_shapes}\n"
    text = f"extends: a.yaml\nrollout: {{window: {{kind: all_but_last}}}}\n{rewards}"
    config = load_config(written(tmp_path, "b.yaml", text))
    assert config.rollout.window == Window(kind="all_but_last")
    assert config.prompts.weights == {} and config.reward.train == "tiny_shapes"


def test_paths_are_relative_to_the_file_they_stand_in(tmp_path: Path) -> None:
    base = f"extends: {TINY}\nmodel: {{path: ./weights}}\nprompts: {{cache: ../cache}}\n"
    written(tmp_path, "base/base.yaml", base)
    path = written(tmp_path, "deep/er/recipe.yaml", "extends: ../../base/base.yaml\noutput: ./run\n")
    config = load_config(path)
    assert config.model.path == tmp_path / "base" / "weights" and config.prompts.cache == tmp_path / "cache"
    assert config.output == tmp_path / "deep" / "er" / "run"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "extends: a.yaml"}, r"a\.yaml: extends = 'a\.yaml': a circle \(\S*a\.yaml -> \S*a\.yaml\); let one"),
        (
            {"a": "extends: b.yaml", "b": "extends: sub/../c.yaml", "c": "extends: b.yaml"},
            r"c\.yaml: extends = 'b\.yaml': a circle \(\S*b\.yaml -> \S*c\.yaml -> \S*b\.yaml\); let one",
        ),
        ({"a": "extends: missing.yaml"}, r"a\.yaml: extends = 'missing\.yaml': \S*missing\.yaml is no file; name one"),
        ({"a": "extends: [b.yaml]"}, r"a\.yaml: extends = \['b\.yaml'\]: .* is no file"),
        ({"a": "extends: b.yaml", "b": "- 1"}, r"b\.yaml: expected a mapping of keys, found \[1\]"),
        ({"a": "extends: b.yaml\nrollout: 3", "b": f"extends: {TINY}"}, r"rollout = 3: expected a section"),
        ({"a": "extends: b.yaml", "b": f"extends: {TINY}\nrollout: {{num_step: 3}}"}, r"rollout\.num_step: unknown key"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in texts.items():
        written(tmp_path, f"{name}.yaml", text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


def test_several_rewards_and_their_settings(tmp_path: Path) -> None:
    """A path in the file is relative to it, a path in an override to the working directory; the dump keeps both."""
    text = (TINY.parent / "tiny_shapes.yaml").read_text()
    text = text.replace("../", f"{TINY.parent}/../").replace(
        "  train: tiny_shapes\n",
        """
  train: {tiny_shapes: 1, "mine:Class": 0.5}
  settings: {"mine:Class": {path: ./weights, nested: {path: ../b, names: [a, 1]}}}
""",
    )
    (tmp_path / "a.yaml").write_text(text)
    config = load_config(tmp_path / "a.yaml", ["reward.settings.tiny_shapes={path: ./here}", f"output={tmp_path}"])
    assert config.reward.train == {"tiny_shapes": 1.0, "mine:Class": 0.5} and config.reward.eval == "tiny_shapes"
    nested = {"path": str(tmp_path.parent / "b"), "names": ["a", 1]}
    assert config.reward.settings == {
        "mine:Class": {"path": str(tmp_path / "weights"), "nested": nested},
        "tiny_shapes": {"path": str(Path.cwd() / "here")},
    }
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert differences(config, load_config(tmp_path / "dump.yaml")) == []
    other = load_config(TINY, [f"output={tmp_path}"])
    assert "reward.train: absent -> tiny_shapes" in differences(config, other)


def test_help_describes_every_key() -> None:
    text = describe()
    for key in ("rollout.window.kind", "objective.clip_range", "update.learning_rate", "model.lora.rank", "seed"):
        assert f"  {key} (" in text
    assert all(line.strip() for line in text.splitlines()), "a key without a description"


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ([], False),
        (["model.compile=true", "model.dtype=bfloat16"], False),  # a rollout runs the update's program
        (["model.dtype=bfloat16"], False),
        (["rollout.precision=fp8"], True),
        (["update.micro_batch_size=64"], False),  # the rollout's own
        (["update.micro_batch_size=32"], True),
        (["update.micro_batch_size=largest"], True),
        (["update.old_velocity=recompute"], True),
    ],
)
def test_v_old_is_made_again_where_the_update_rounds_in_another_way(settings: list[str], again: bool) -> None:
    assert recomputes_old(load_config(TINY, settings)) == again


def test_the_largest_micro_batch_may_be_the_rollouts_own() -> None:
    config = load_config(TINY, ["update.micro_batch_size=largest"])
    assert not recomputes_old(config, micro_batch_size=64) and recomputes_old(config, micro_batch_size=128)


def test_a_negative_prompt_that_nothing_is_compared_with_is_refused() -> None:
    """Guidance of the evaluation alone is enough."""
    load_config(TINY, ["model.negative_prompt=blurred", "evaluation.guidance_scale=2"])
    with pytest.raises(ConfigError, match=r"model\.negative_prompt = 'blurred': .* nothing is compared with it; raise"):
        load_config(TINY, ["model.negative_prompt=blurred", "evaluation.guidance_scale=1"])
