"""Models of two experts, each for a part of the noise levels: rollouts, updates, ranks, and which of them is trained."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import WanTransformer3DModel
from safetensors.torch import load_file
from support import experts_worker
from support.capture import Rerun, equal
from support.drawing import drawn, ode_arguments
from support.experts_worker import make_experts
from support.helpers import distance
from support.learners import learner_of
from support.model_worker import configuration
from support.runs import ForkServer, rows
from torch import Tensor

from fastgrpo.commands.cli import main
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.engine.ranks import OneRank
from fastgrpo.learning.batches import ByExpert, experience_of, micro_batches
from fastgrpo.learning.update import largest_micro_batch, recompute_old, transition_loss
from fastgrpo.models import load_model
from fastgrpo.policy import Policy
from fastgrpo.records import TRAIN, Batch, Experience, noise_address
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule, with_experts
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo.testing import load_family
from fastgrpo.validation import ConfigError, check_experts, dump_config

CPU, FAMILY = torch.device("cpu"), load_family("wan_experts")
PROMPTS = list(FAMILY.prompts)
LORAS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan_experts") / "pipeline"
    FAMILY.save(path)
    return path


def load(folder: Path, boundary: float = 0.95, **settings: Any) -> Any:
    model = load_model("wan", path=folder, dtype=torch.float32, device=CPU, **{**FAMILY.settings, **settings})
    model.transformer.boundary = boundary * 1000
    return model


def tuned(model: Any) -> Any:
    """With a LoRA that has an effect."""
    torch.manual_seed(1)
    model.add_lora(rank=4, alpha=8)
    with torch.no_grad():
        for name, p in model.transformer.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How many samples went through each network, by its id."""
    seen: Counter[int] = Counter()
    forward = WanTransformer3DModel.forward

    def count(self: Any, **inputs: Any) -> Any:
        seen[id(self)] += len(inputs["timestep"])
        return forward(self, **inputs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", count)
    yield seen


def never(*_: object) -> None:
    raise AssertionError("the host looked at a tensor")


def test_the_boundary_itself_is_the_first_experts() -> None:
    experts = make_experts()
    sigma = torch.tensor([1.0, 0.5001, 0.5, 0.4999, 0.0])
    assert experts.expert_of(sigma).tolist() == [0, 0, 0, 1, 1]
    x = torch.randn(5, experts_worker.SIZE)
    (found,) = experts(timestep=sigma * 1000, x=x)
    for row, expected in enumerate([*["transformer"] * 3, *["transformer_2"] * 2]):
        network: Any = experts[expected]
        assert torch.equal(found[row], network(timestep=sigma * 1000, x=x)[0][row])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_rollout_asks_one_expert_a_step_and_never_the_device(folder: Path, scale: float, passes, monkeypatch) -> None:
    model = tuned(load(folder))
    arguments = ode_arguments(model, PROMPTS, 4, scale)
    assert arguments[0].experts == (0, 1, 1, 1)
    for reads in ("tolist", "item", "__bool__"):
        monkeypatch.setattr(Tensor, reads, never)
    rollout(Policy(model), *arguments)
    monkeypatch.undo()
    rows_a_step = len(PROMPTS) * (1 if scale == 1 else 2)
    first, second = model.transformer.values()
    assert (passes[id(first)], passes[id(second)]) in ((rows_a_step, 3 * rows_a_step), (0, 0))


def test_steps_of_other_experts_are_another_graph(folder: Path) -> None:
    captured = CapturedRollout(recorder := Rerun())
    for boundary in (0.95, 0.8, 0.95):
        model = load(folder, boundary)
        arguments = ode_arguments(model, PROMPTS, 4, 1.0)
        assert equal(captured(Policy(model), *arguments), rollout(Policy(model), *arguments))
    model, count = load(folder), recorder.captures
    policy = Policy(model)
    for boundary in (0.95, 0.8, 0.95):
        model.transformer.boundary = boundary * 1000
        arguments = ode_arguments(model, PROMPTS, 4, 1.0)
        assert equal(captured(policy, *arguments), rollout(policy, *arguments))
    assert recorder.captures == count + 2


def test_siblings_share_the_steps_of_both_experts(folder: Path, passes) -> None:
    """Computed once for two samples of one noise until the window begins, and the same as one by one."""
    model = tuned(load(folder, 0.9))
    steps = sampler_steps("flow_sde", model.sigmas(6), 0.7)
    alone = with_experts(window_schedule(steps, torch.full((2,), 3), 1), model)
    prompted = Embeddings(model).prompted([PROMPTS[0]] * 2, 1.0)
    passes.clear()
    arguments = noise_address(TRAIN, 0, 1, torch.tensor([4, 5])), prompted, 1.0
    shared = rollout(Policy(model), alone._replace(siblings=2, prefix=3), *arguments)
    first, second = model.transformer.values()
    assert (passes[id(first)], passes[id(second)]) == (2, 1 + 3 * 2)
    one = rollout(Policy(model), alone, *arguments)
    torch.testing.assert_close(shared.final[0], one.final[0], rtol=1e-4, atol=1e-4)


def straddling(model: Any, scale: float = 1.0) -> Experience:
    """Windows of two steps that begin before and after the boundary, which lies behind the second of six steps."""
    steps = sampler_steps("flow_sde", model.sigmas(6), 0.7)
    schedule = with_experts(window_schedule(steps, torch.tensor([0, 3, 1, 2]), 2), model)
    assert schedule.experts == (0, 0, 1, 1, 1, 1)
    address, prompts = noise_address(TRAIN, 0, 1, torch.arange(4)), [*PROMPTS, *PROMPTS]
    prompted = Embeddings(model).prompted(prompts, scale)
    trajectory = rollout(Policy(model), schedule, address, prompted, scale)
    batch = Batch(sample_id=address.sample_id, prompted=prompted, schedule=schedule, trajectory=trajectory)
    return experience_of(batch, torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4))


def learner(model: Any, scale: float = 1.0, size: int = 4) -> Any:
    by_expert = ByExpert(model.transformer.expert_of, OneRank().all_reduce, model.transformer.trained)
    return replace(learner_of(model, scale, micro_batch_size=size), experts=by_expert)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_first_ratio_is_exactly_1_where_a_micro_batch_holds_steps_of_both(folder: Path, scale: float) -> None:
    model = tuned(load(folder, 0.9))
    experience, one = straddling(model, scale), learner(model, scale)
    batches = list(micro_batches(experience, 4, one.experts))
    assert [batch.experts for batch in batches] == [(0, 1), (1,)]
    assert one.experts.order(experience).tolist() == [0, 2, 4, 1, 3, 5, 6, 7]  # step by step, the first expert's first
    for batch in batches:
        loss = transition_loss(one, batch)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0 and loss.kl.item() > 0
    again = recompute_old(one, experience)
    assert torch.equal(again.v_old, experience.v_old.to(again.v_old.dtype))


def test_the_gradient_of_a_mixed_micro_batch_is_that_of_each_sample_by_its_own_expert(folder: Path) -> None:
    model = tuned(load(folder, 0.9))
    experience = straddling(model)
    one, trained = learner(model), [p for p in model.transformer.parameters() if p.requires_grad]

    def gradient(batches: list[Experience]) -> list[Tensor]:
        total = sum(transition_loss(one, batch).loss / len(batches) for batch in batches)
        return list(torch.autograd.grad(total, trained))

    found = gradient(list(micro_batches(experience, 4, one.experts)))
    alone = gradient([experience.transitions(slice(i, i + 1)) for i in range(8)])  # the model looks at each sigma
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_transitions_of_both_are_in_one_micro_batch_at_most(folder: Path, passes) -> None:
    """Eight transitions, three of them the first expert's: sorted, four go through the first expert."""
    model = tuned(load(folder, 0.9))
    experience, one = straddling(model), learner(model)
    first, second = model.transformer.values()
    passes.clear()
    with torch.no_grad():
        for batch in micro_batches(experience, 4, one.experts):
            one.velocity(batch)
    assert (passes[id(first)], passes[id(second)]) == (4, 8)
    passes.clear()
    assert largest_micro_batch(one, experience) == 8  # for which both are tried, as reference and as policy
    assert passes[id(first)] == passes[id(second)] == 16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_expert_that_waits_on_the_host_computes_the_same(checkpointing: bool, folder: Path) -> None:
    """Rollouts, losses and gradients, bit for bit, of micro-batches of both and of one."""
    seen: dict[str, list[Any]] = {"device": [], "host": []}
    for place, found in seen.items():
        model = tuned(load(folder, 0.9, idle_expert=place))
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        with model.reference():  # the first of all, in which a LoRA requires no gradient
            found.append(drawn(model, PROMPTS, 4, 1.0))
        experience, one = straddling(model), learner(model)
        trained = [p for p in model.transformer.parameters() if p.requires_grad]
        for batch in micro_batches(experience, 4, one.experts):
            loss = transition_loss(one, batch)
            found += [loss.loss, *torch.autograd.grad(loss.loss, trained, allow_unused=True)]
        found.append(experience.v_old)
    assert len(seen["host"]) == len(seen["device"]) > 20
    for a, b in zip(*seen.values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_weights_on_the_host_are_always_the_same_copy(folder: Path) -> None:
    """On a CPU a copy on the host is known by its address alone: back at it means that the other memory was let go."""
    model = tuned(load(folder, idle_expert="host"))
    weight = model.transformer["transformer_2"].blocks[0].attn1.to_q.base_layer.weight
    x, conditioning, places = torch.randn(1, *model.latent_shape), model.encode(PROMPTS[:1]), []
    expected = weight.detach().clone()
    for sigma in (1.0, 0.5, 0.4, 1.0):
        with torch.no_grad():
            model.velocity(x, torch.tensor([sigma]), conditioning)
        places.append(weight.data_ptr())
        assert torch.equal(weight, expected)
    assert places[0] == places[3] != places[1] == places[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.train=full", "rollout.cuda_graph=false"], "only frozen weights .* take model.train=lora"),
        ([], "no address for a graph .* take rollout.cuda_graph=false"),
        (["engine.zero_stage=3", "rollout.cuda_graph=false"], "ZeRO-3 .* take engine.zero_stage=1"),
    ],
)
def test_weights_that_cannot_wait_on_the_host_are_refused(settings: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model.idle_expert = 'host': .*{message}"):
        configuration("wan_experts", tmp_path, tmp_path, "model.idle_expert=host", *settings)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> list[dict[int, dict[str, Tensor]]]:
    output = tmp_path_factory.mktemp("ranks")
    fork_server.run(str(output), program="support.experts_worker:main", ranks=2)
    return [torch.load(output / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_may_ask_for_different_experts(stage: int, ranks) -> None:
    """Five updates: one expert on each rank, mixed micro-batches, an update of one expert alone, and then of the other."""
    weights, start = experts_worker.plain(), {f"transformer.{n}": p for n, p in make_experts().named_parameters()}
    went = distance(weights, start)
    for seen in ranks:
        assert distance(seen[stage], weights) < 1e-4 * went


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["rollout.window={kind: fixed, start: 0, size: 1}"],
            "'both': the high expert alone .* 0 to 0, .* first 1 of 4",
        ),
        (
            ["rollout.window={kind: fixed, start: 1, size: 2}"],
            "'both': .*take model.experts=low, .* rollout.window",
        ),
        (["model.experts=high"], "'high': both experts make .* 0 to 1.*take model.experts=both"),
        (["model.experts=low", "rollout.window={kind: random, size: 1}"], "'low': both experts make .* 0 to 2"),
        (
            ["objective={name: nft, clip_range: 0.1, beta: 0}", "rollout.sampler=ode", "forward.range=[2, 4]"],
            "'both': the low expert alone makes .* 2 to 3.* other steps by forward.range",
        ),
    ],
)
def test_an_expert_that_makes_no_trained_step_is_not_trained(
    settings: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    config = configuration("wan_experts", folder, tmp_path, *settings)
    with pytest.raises(ConfigError, match=f"model.experts = {message}"):
        check_experts(config, load(folder))


@pytest.mark.parametrize("form", ["lora", "full"])
def test_one_expert_alone_is_trained_saved_and_read(form: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder, experts="low")
    before = drawn(model, PROMPTS, 3, 1.0)
    if form == "lora":
        model.add_lora(rank=4, alpha=8)
    else:
        model.train_all(keep_reference=True)
        assert model.untrained["transformer"] is model.transformer["transformer"]  # and takes no memory twice
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("transformer_2.") for name in trained) and model.transformer.trained == (1,)
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn_like(p) * 0.1)
    after = drawn(model, PROMPTS, 3, 1.0)
    with model.reference():
        assert torch.equal(drawn(model, PROMPTS, 3, 1.0), before) and not torch.equal(before, after)
    model.save_trained(tmp_path, {n: p.detach().clone() for n, p in trained.items()})
    assert [file.name for file in tmp_path.iterdir()] == [LORAS[1] if form == "lora" else "transformer_2"]
    fresh = load(folder, experts="low")
    fresh.load_trained(tmp_path)
    assert torch.equal(drawn(fresh, PROMPTS, 3, 1.0), after)


def test_a_file_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    model = tuned(load(folder))
    model.save_trained(tmp_path, {n: p for n, p in model.transformer.named_parameters() if p.requires_grad})
    assert {file.name for file in tmp_path.iterdir()} == set(LORAS)
    (tmp_path / LORAS[1]).unlink()
    with pytest.raises((ValueError, OSError), match=LORAS[1]):
        load(folder).load_trained(tmp_path)


@pytest.mark.processes
def test_a_run_of_one_expert_leaves_its_file_and_is_sampled(folder: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    """In bfloat16, with KL, guidance, and windows that lie in its steps. Another window is refused before anything runs."""
    config = configuration(
        "wan_experts", folder, tmp_path / "run", "iterations=1", "model.dtype=bfloat16", "model.experts=low",
        "objective.beta=0.01", "rollout.group_size=4", "rollout.batch_size=4", "rollout.sampler=flow_sde",
        "rollout.window={kind: random, size: 1, range: [1, 3]}", "rollout.guidance_scale=3", "model.idle_expert=host",
        "rollout.cuda_graph=false",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(config))
    train = ["train", "--config", str(tmp_path / "config.yaml")]
    fork_server.run(*train, "--set", "rollout.window.range=[0, 3]", status=2)
    fork_server.run(*train)
    run = tmp_path / "run"
    trained = {name: tensor for name, tensor in load_file(run / LORAS[1]).items() if "lora_B" in name}
    assert any(tensor.any() for tensor in trained.values()) and not (run / LORAS[0]).exists()
    assert [row["first_ratio_deviation"] for row in rows(run)] == [0]
    sample = ["sample", str(run), "--prompt", "a cat", "--images", "1", "--steps", "2"]
    assert main([*sample, "--output", str(tmp_path / "a.png")]) == 0


@pytest.mark.processes
def test_two_ranks_train_every_weight_at_noise_levels_of_both(folder: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    """NFT draws them for each sample, ZeRO-3 gathers each expert where a rank asks for it, the reference has two as well."""
    config = configuration(
        "wan_experts", folder, tmp_path / "run", "iterations=2", "rollout.groups=4", "rollout.group_size=4",
        "rollout.batch_size=2", "model.train=full", "engine.zero_stage=3", "rollout.cuda_graph=false",
        "objective={name: nft, beta: 0.01, settings: {}}", "rollout.sampler=ode",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump_config(config))
    fork_server.run("train", "--config", str(tmp_path / "config.yaml"), ranks=2)
    found = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in found] == [0, 0] and all(row["grad_norm"] > 0 for row in found)
    assert {"transformer", "transformer_2"} < {file.name for file in (tmp_path / "run").iterdir()}


def index_with(folder: Path, change: Callable[[dict], None], path: Path) -> Path:
    path.mkdir()
    for part in folder.iterdir():
        (path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (path / "model_index.json").unlink()
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(boundary_ratio=None), "boundary_ratio = None, which says where the second takes over"),
        (lambda index: index.update(boundary_ratio=875), "boundary_ratio = 875, .* published are 0.875"),
        (lambda index: index.update(transformer=[None, None]), "model_index.json names no transformer"),
    ],
)
def test_a_folder_of_which_nobody_knows_the_boundary_is_refused(change, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.path = .*{message}"):
        load(index_with(folder, change, tmp_path / "changed"))


def test_one_transformer_does_not_take_the_place_of_two(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.transformer = .*transformer: .* holds two transformers, and this would be the"
    ):
        load(folder, transformer=folder / "transformer")


@pytest.mark.parametrize("setting", [{"experts": "high"}, {"idle_expert": "host"}])
def test_a_model_of_one_network_has_no_expert_to_choose(setting: dict[str, str], tmp_path: Path) -> None:
    family, ((key, value),) = load_family("wan"), setting.items()
    family.save(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.{key} = {value}: this model is one network; leave it out"):
        load_model("wan", path=tmp_path, dtype=torch.float32, device=CPU, **setting, **family.settings)
