"""What `test_engine.py` runs in one or several processes, for all cases of the engine in one launch.

    python tests/support/engine_worker.py train FOLDER     updates, a checkpoint, updates; the last save is killed
    python tests/support/engine_worker.py resume FOLDER    the updates after the checkpoint again, from it
    python tests/support/engine_worker.py elsewhere FOLDER    the same by other ranks and stages; one rank does it in train

Every rank leaves what it saw in FOLDER/COMMAND-WORLD-RANK.pt. `reference` is the same in plain torch.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from fastgrpo.engine import shards
from fastgrpo.engine.checkpoint import Saved, Snapshot, complete, load, write_part
from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.engine.shards import SavedShards, write_shard
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.ema import Ema, warmed_up
from support.helpers import NoSync

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(stage, "float32") for stage in (0, 1, 2, 3)] + [(stage, "bfloat16") for stage in (1, 2, 3)]
# How many ranks go on from the checkpoint of two, and the stages from which and with which they do.
ELSEWHERE = [(1, (0, 2), "float32"), (1, (1, 0), "float32"), (1, (3, 3), "float32"), (1, (2, 1), "bfloat16")]
ELSEWHERE += [(4, (0, 3), "float32"), (4, (2, 2), "float32"), (4, (3, 1), "bfloat16")]
# How many ranks save and load a state without moments.
FRESH = [(1, 0, "float32"), (1, 1, "bfloat16"), (1, 2, "float32"), (1, 3, "float32"), (4, 0, "float32"), (4, 3, "bfloat16")]
BATCH, MICRO_BATCHES, UPDATES, MORE_UPDATES = 4, 2, 5, 3
MAX_GRAD_NORM = 0.04  # below every norm of this run
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.01}
LEARNING_RATE, ADAM_EPS = 2e-3, 1e-4  # an eps that does not hide the scale of the gradient


def make_policy(seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    policy = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    policy.requires_grad_(False)
    # Not the usual start of LoRA, whose zeros would give half of the weights no gradient.
    policy.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return policy


def make_batch(update: int, micro: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * update + micro)
    return {
        "hidden_states": torch.randn(BATCH, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16, generator=draw),
        "pooled_projections": torch.randn(BATCH, 16, generator=draw),
        "timestep": torch.rand(BATCH, generator=draw) * 1000,
        "target": torch.randn(BATCH, 4, 8, 8, generator=draw),
    }


def velocity(policy: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    inputs = {name: batch[name].to(dtype) for name in names}
    return policy(**inputs, timestep=batch["timestep"], return_dict=False)[0].float()


def falling(update: int) -> float:
    """A learning rate of its own for every update."""
    return LEARNING_RATE * 0.8**update


def micro_loss(policy: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return F.mse_loss(velocity(policy, batch, dtype), batch["target"]) / MICRO_BATCHES


def reference(dtype: torch.dtype) -> dict[str, Any]:
    """All updates on the whole batch in plain torch; float32 masters, their gradients summed in float32."""
    policy = make_policy()
    start = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    for p in policy.parameters():  # as DeepSpeed: buffers stay, and masters start from the rounded weights
        p.data = p.data.to(dtype)
    masters = {n: p.detach().float().clone() for n, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, eps=ADAM_EPS, **ADAM)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    losses, norms = [], []
    for update in range(UPDATES):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in range(MICRO_BATCHES):
            loss = micro_loss(policy, make_batch(update, micro), dtype)
            loss.backward()
            losses.append(loss.item())
            for name, p in trained.items():
                masters[name].grad += p.grad.float()
                p.grad = None
        norms.append(nn.utils.clip_grad_norm_(masters.values(), MAX_GRAD_NORM).item())
        optimizer.param_groups[0]["lr"] = falling(update)
        optimizer.step()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(masters[name])
    return {"losses": losses, "norms": norms, "state": masters, "start": start}


def make_engine(
    stage: int, dtype: torch.dtype, ranks: Ranks, *, seed: int = 0, split: bool = True
) -> tuple[Engine, SD3Transformer2DModel]:
    """split: whether stage 3 splits weights that are as small as these."""
    policy = make_policy(seed).to(ranks.device)
    if ranks.rank != 0:  # rank 0's weights count
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(1.0)
    options = EngineOptions(
        zero_stage=stage, dtype=dtype, learning_rate=LEARNING_RATE, adam_eps=ADAM_EPS, **ADAM,
        max_grad_norm=MAX_GRAD_NORM, micro_batch_size=BATCH // ranks.world_size,
        zero_options={"stage3_param_persistence_threshold": 0} if stage == 3 and split else {},
    )  # fmt: skip
    return Engine(policy, ranks, options), policy


def run_updates(engine: Engine, updates: range) -> tuple[list[float], list[float]]:
    """The losses, mean over ranks, and the norms."""
    losses, norms = [], []
    share = BATCH // engine.ranks.world_size
    own = slice(engine.ranks.rank * share, (engine.ranks.rank + 1) * share)
    for update in updates:
        for micro in range(MICRO_BATCHES):
            whole = make_batch(update, micro)
            batch = {name: tensor[own].to(engine.ranks.device) for name, tensor in whole.items()}
            loss = micro_loss(engine, batch, engine.dtype)
            losses.append(engine.ranks.all_reduce(loss).item())
            engine.backward(loss, last=micro + 1 == MICRO_BATCHES)
        engine.set_learning_rate(falling(update))
        norms.append(engine.step().item())
    return losses, norms


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def check_rollout(engine: Engine, policy: SD3Transformer2DModel) -> dict[str, bool]:
    """Between two updates, as all of it must leave no trace in those that follow."""
    checks = {}
    batch = {name: tensor.to(engine.ranks.device) for name, tensor in make_batch(99, 0).items()}
    through_engine = velocity(engine, batch, engine.dtype)
    # Without its hooks stage 3 computes the same, but keeps every weight that it has once gathered.
    offload = getattr(engine.deepspeed.optimizer, "parameter_offload", None)
    hooks = len(offload.forward_hooks) if offload else 0
    assert (hooks > 0) == (engine.zero_stage == 3)

    def sample(times: int = 1) -> Tensor:
        with engine.rollout_policy() as module:
            outputs = [velocity(module, batch, engine.dtype) for _ in range(times)]
        assert all(torch.equal(outputs[0], output) for output in outputs)
        return outputs[0]

    checks["the ranks sample different numbers of times, equal to the engine's forward"] = torch.equal(
        sample(times=1 + 2 * engine.ranks.rank), through_engine
    )
    try:
        with engine.rollout_policy():
            raise KeyError("in the rollout")
    except KeyError:
        pass
    again = velocity(engine, batch, engine.dtype)
    checks["rollout_policy after an exception"] = torch.equal(again, through_engine)
    checks["hooks after an exception"] = not offload or len(offload.forward_hooks) == hooks
    before = engine.trained_state()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    policy.disable_adapters()
    base = sample()
    policy.enable_adapters()
    with engine.swapped(zeros):
        checks["swapped in"] = torch.equal(sample(), base) and not torch.equal(base, through_engine)
    checks["swapped back"] = torch.equal(sample(), through_engine)
    try:
        with engine.swapped(zeros):
            raise KeyError("while swapped")
    except KeyError:
        pass
    checks["swapped back after an exception"] = torch.equal(sample(), through_engine)
    checks["trained_state after swapped"] = same(before, engine.trained_state())
    return checks


@torch.no_grad()
def waits_in_a_rollout(engine: Engine) -> int:
    """How often DeepSpeed waits for the device while what it wraps is sampled from."""
    from deepspeed.accelerator import get_accelerator  # chosen by `start`

    accelerator, waits = get_accelerator(), []
    batch = {name: tensor.to(engine.ranks.device) for name, tensor in make_batch(99, 0).items()}
    accelerator.synchronize = lambda *_, **__: waits.append(1)  # on the instance, in front of the class's own
    try:
        with engine.rollout_policy() as policy, NoSync():
            for _ in range(3):
                velocity(policy, batch, engine.dtype)
    finally:
        del accelerator.synchronize
    return len(waits)


def check_no_host(engine: Engine) -> dict[str, bool]:
    """Over more iterations than DeepSpeed's own timers take to start. In stage 3 nothing is captured, and hooks may wait."""
    waits = []
    for update in range(4):
        waits.append(waits_in_a_rollout(engine) if engine.zero_stage < 3 else 0)
        run_updates(engine, range(update, update + 1))
    return {"no rollout waits for the device": waits == [0, 0, 0, 0]}


def check_not_finite(engine: Engine) -> dict[str, bool]:
    before, skipped = engine.trained_state(), engine.skipped_steps
    batch = {name: tensor[:1].to(engine.ranks.device) for name, tensor in make_batch(99, 1).items()}
    factor = torch.nan if engine.ranks.rank == 0 else 1.0
    engine.backward(micro_loss(engine, batch, engine.dtype) * factor, last=True)
    norm = engine.step().item()
    checks = {
        "not finite: skipped, its norm inf": norm == torch.inf and same(before, engine.trained_state()),
        "what was skipped is counted": engine.skipped_steps == skipped + 1,
    }
    _, norms = run_updates(engine, range(1))
    changed = not same(before, engine.trained_state())
    checks["goes on after it"] = changed and torch.tensor(norms).isfinite().all().item()
    return checks


def check_accumulation(engine: Engine) -> dict[str, bool]:
    """A gradient, and after it 64 times 2^-9 of it, each of which a sum in bfloat16 would round away."""
    engine.set_learning_rate(0.0)  # so that all of them are of the same weights
    batch, norms = {name: tensor[:1].to(engine.ranks.device) for name, tensor in make_batch(99, 1).items()}, []
    for factors in ([1.0], [1.0] + [2.0**-9] * 64):
        for i, factor in enumerate(factors, 1):
            engine.backward(micro_loss(engine, batch, engine.dtype) * factor, last=i == len(factors))
        norms.append(engine.step().item())
    return {"small gradients count": abs(norms[1] / norms[0] - 1.125) < 5e-3}


def check_collectives(ranks: Ranks) -> dict[str, bool]:
    numbers = list(range(ranks.world_size))
    own = torch.tensor([[ranks.rank, 7]], device=ranks.device)
    gathered = ranks.gather(own.expand(2, 2))
    reduced = {op: ranks.all_reduce(own.float(), op)[0, 0].item() for op in ("mean", "sum", "min", "max")}
    wanted = {"mean": sum(numbers) / len(numbers), "sum": sum(numbers), "min": 0, "max": numbers[-1]}
    return {
        "gather": gathered.tolist() == [[rank, 7] for rank in numbers for _ in range(2)],
        "gather of bool": ranks.gather(own > 0).tolist() == [[rank > 0, True] for rank in numbers],
        "all_reduce": reduced == wanted and own[0, 0].item() == ranks.rank,
        "broadcast_object": ranks.broadcast_object({"rank": ranks.rank}) == {"rank": 0},
        "together": raised_together(ranks) == ("mine" if ranks.rank == 0 else "on rank 0: mine"),
    }


def raised_together(ranks: Ranks) -> str:
    """What `together` raises on this rank when rank 0 alone raised inside."""
    try:
        with ranks.together(KeyError), ranks.together(ValueError):
            if ranks.rank == 0:
                raise ValueError("mine")
    except ValueError as error:
        return str(error)
    return "nothing"


def save(engine: Engine, root: Path, iteration: int, ema: Ema) -> None:
    """A whole checkpoint. Collective."""
    first = engine.ranks.rank == 0
    averages, state = (ema.weights, {"updates": ema.updates}) if first else ({}, {})
    write_part(Snapshot(iteration, engine.state(), averages, state), root, engine.ranks)
    if first:
        complete(root, iteration, engine.ranks, give_up=lambda: False)
    engine.ranks.barrier()


def go_on(engine: Engine, root: Path) -> Saved:
    """From the last checkpoint. Collective."""
    saved = load(root, engine.ranks)
    assert saved is not None
    engine.load_state(saved.shards)
    return saved


def save_shard(engine: Engine, folder: Path) -> None:
    """This rank's file alone. Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(engine.state(), folder / f"rank_{engine.ranks.rank:05d}.safetensors")
    engine.ranks.barrier()


def train(case: tuple[int, str], ranks: Ranks, folder: Path) -> dict[str, Any]:
    engine, policy = make_engine(case[0], DTYPES[case[1]], ranks)
    addresses = [p.data_ptr() for p in policy.parameters()]
    losses, norms = run_updates(engine, range(2))
    checks = check_rollout(engine, policy)
    more_losses, more_norms = run_updates(engine, range(2, UPDATES))
    checks["addresses"] = case[0] == 3 or addresses == [p.data_ptr() for p in policy.parameters()]
    state = engine.trained_state("cpu")
    ema = Ema(engine.trained_state(), warmed_up(0.9))
    ema.update({name: tensor + 1 for name, tensor in engine.trained_state().items()})
    save(engine, folder / f"{case[0]}-{case[1]}", UPDATES, ema)
    more, _ = run_updates(engine, range(UPDATES, UPDATES + MORE_UPDATES))
    final = engine.trained_state("cpu")
    checks |= check_no_host(engine) | check_not_finite(engine) | check_collectives(ranks) | check_accumulation(engine)
    engine.close()
    seen = {"losses": losses + more_losses, "norms": norms + more_norms, "state": state}
    return {**seen, "more": more, "final": final, "checks": checks}


def resume(case: tuple[int, str], ranks: Ranks, folder: Path) -> dict[str, Any]:
    engine, _ = make_engine(case[0], DTYPES[case[1]], ranks)
    ema = Ema(engine.trained_state(), warmed_up(0.9))
    saved = go_on(engine, folder / f"{case[0]}-{case[1]}")
    ema.load_state_dict({"updates": saved.state["updates"], "weights": saved.averages})
    loaded = {"iteration": saved.iteration, "ema": ema.weights}
    loaded["state"] = engine.trained_state("cpu")
    more, _ = run_updates(engine, range(UPDATES, UPDATES + MORE_UPDATES))
    final = engine.trained_state("cpu")
    save(engine, folder / f"{case[0]}-{case[1]}", saved.iteration + 1, ema)
    engine.close()
    return {**loaded, "more": more, "final": final}


def elsewhere(stages: tuple[int, int], dtype: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Goes on from two ranks of the first stage with any number of ranks of the second, and saves again at once."""
    engine, policy = make_engine(stages[1], DTYPES[dtype], ranks)
    addresses = [p.data_ptr() for p in policy.parameters()]
    engine.load_state(SavedShards(sorted(saved_by_two(folder, stages[0], dtype).glob("rank_*.safetensors"))))
    save_shard(engine, folder / f"world{ranks.world_size}" / saved_again(stages, dtype))
    state = engine.trained_state("cpu")
    in_place = addresses == [p.data_ptr() for p in policy.parameters()]
    losses, _ = run_updates(engine, range(UPDATES, UPDATES + MORE_UPDATES))
    engine.close()
    return {"state": state, "in place": in_place, "more": losses}


def before_an_update(stage: int, dtype: str, ranks: Ranks, folder: Path) -> dict[str, bool]:
    """A state without moments, loaded into an engine with other weights that has computed with them."""
    engine, _ = make_engine(stage, DTYPES[dtype], ranks)
    place = folder / f"fresh{ranks.world_size}" / f"{stage}-{dtype}"
    save_shard(engine, place)
    wanted = engine.trained_state("cpu")
    for _ in range(ranks.rank):
        engine.state()  # which would hang if it were collective
    engine.close()
    engine, policy = make_engine(stage, DTYPES[dtype], ranks, seed=1, split=False)
    before = held_weights(engine)
    saved = SavedShards(sorted(place.iterdir()))
    checks = {"no moments": {name.split("/")[0] for name in saved.names} == {"master"}}
    numbers, saved.numbers = saved.numbers, {**saved.numbers, "shapes": {}}
    checks["other weights are refused"] = "use the same model and adapter" in refusal(engine, saved)
    saved.numbers = numbers
    checks["and nothing was written"] = same(before, held_weights(engine))
    with torch.no_grad():
        for _ in range(2):  # from the second pass on stage 3 keeps small weights gathered
            velocity(engine, make_batch(0, 0), engine.dtype)
    gathered = [p.numel() > 0 for p in policy.parameters()]
    engine.load_state(saved)
    loaded = {name: p.detach().clone() for name, p in policy.named_parameters()}  # not gathered anew
    checks["the weights are gathered"] = all(gathered)
    checks["masters"] = same(engine.trained_state("cpu"), wanted)
    for name, now in loaded.items():
        trained = name in wanted
        checks[name] = torch.equal(now, wanted[name].to(now.dtype)) if trained else torch.equal(now, before[name])
    run_updates(engine, range(1))
    checks["not into an engine in use"] = "load a state into a new one" in refusal(engine, saved)
    engine.close()
    return checks


def held_weights(engine: Engine) -> dict[str, Tensor]:
    """What the policy computes with. Collective in stage 3."""
    with engine.rollout_policy() as policy:
        return {name: p.detach().clone() for name, p in policy.named_parameters()}


def refusal(engine: Engine, saved: SavedShards) -> str:
    try:
        engine.load_state(saved)
    except ValueError as error:
        return str(error)
    return "loaded"


def saved_by_two(folder: Path, stage: int, dtype: str) -> Path:
    return folder / "world2" / f"{stage}-{dtype}" / f"{UPDATES:05d}"


def saved_again(stages: tuple[int, int], dtype: str) -> str:
    return f"{dtype}-from-{stages[0]}-to-{stages[1]}"


def die_in_a_save(ranks: Ranks, folder: Path) -> None:
    """The last rank is killed half way through its file."""
    engine, _ = make_engine(1, torch.float32, ranks)

    def half_of_it(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    if engine.ranks.rank == engine.ranks.world_size - 1:
        shards.save_file = half_of_it
    save(engine, folder / "1-float32", UPDATES + 1, Ema({}, warmed_up(0.9)))


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    ranks = start()
    rank, world_size = ranks.rank, ranks.world_size
    own = folder / f"world{world_size}"
    runs = {"train": train, "resume": resume}
    results: dict[Any, Any] = {case: runs[command](case, ranks, own) for case in CASES if command in runs}
    if world_size != 2:
        results |= {case: elsewhere(*case[1:], ranks, folder) for case in ELSEWHERE if case[0] == world_size}
        results |= {case: before_an_update(*case[1:], ranks, folder) for case in FRESH if case[0] == world_size}
    torch.save(results, folder / f"{command}-{world_size}-{rank}.pt")
    if command == "train" and world_size > 1:
        die_in_a_save(ranks, own)
    finish()


if __name__ == "__main__":
    main()
