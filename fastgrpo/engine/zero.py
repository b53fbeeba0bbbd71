"""The engine: DeepSpeed around the trained weights of a policy, from one CPU process to many nodes.

One update is one step of AdamW on

    g = 1/W sum over W ranks of (sum over the rank's micro-batches of grad(loss)),  clipped to `max_grad_norm`

summed in float32. ZeRO splits over the ranks, beside the data (arXiv 1910.02054):

    stage 0   nothing                            float32 only
    stage 1   optimiser state, float32 masters   LoRA; addresses of the parameters stay, as CUDA graphs need
    stage 2   and gradients                      the same
    stage 3   and parameters                     full fine-tuning; they move, so nothing can be captured

In a low-precision policy AdamW steps float32 masters, made from the rounded weights and rounded into them
after each step. An update whose gradient is not finite is skipped on all ranks, and its norm is inf.

    ranks = start()
    engine = Engine(policy.to(ranks.device), ranks, zero_stage=1, dtype=torch.float32, ...)
    with torch.no_grad(), engine.rollout_policy() as policy: ...
    for n, batch in enumerate(batches):
        engine.backward(loss(engine(batch)) / len(batches), last=n + 1 == len(batches))
    grad_norm = engine.step()
    engine.close()
    finish()

A method marked collective must be called by all ranks.
"""

import gc
import io
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.engine.ranks import Ranks, load_deepspeed

State = dict[str, Tensor]


class Engine:
    """A policy under DeepSpeed: its forward pass, its update, its trained weights."""

    def __init__(
        self,
        policy: nn.Module,  # on the ranks' device; what requires a gradient is trained
        ranks: Ranks,
        *,
        zero_stage: int,
        dtype: torch.dtype,  # float32 leaves the policy as it is, also a frozen base of lower precision
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        adam_eps: float = 1e-8,
        max_grad_norm: float = 1.0,  # 0 does not clip
        micro_batch_size: int = 1,  # for DeepSpeed's books only
        zero_options: dict[str, Any] | None = None,  # more of DeepSpeed's `zero_optimization` section
    ) -> None:
        self.ranks = ranks
        self.zero_stage, self.dtype, self.max_grad_norm = zero_stage, dtype, max_grad_norm
        # Kept, because while an adapter is switched off its parameters do not require a gradient.
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        _check(zero_stage, dtype, self._trained)
        self._shapes = {name: list(p.shape) for name, p in self._trained.items()}
        parameters = list(self._trained.values())
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=adam_eps)
        size = sum(p.numel() for p in parameters)
        config = _config(zero_stage, dtype, max_grad_norm, micro_batch_size, size, zero_options or {})
        kept = [(p, p.data) for p in _kept_in_float32(policy)] if zero_stage < 3 else []  # stage 3 has shards of one dtype
        with redirect_stdout(io.StringIO()):  # it prints its memory
            self._engine, *_ = load_deepspeed().initialize(
                model=policy, optimizer=optimizer, model_parameters=parameters, config=config
            )
        for p, data in kept:
            p.data = data.to(p.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's forward for the update. Collective in stage 3."""
        return self._engine(*args, **kwargs)

    @contextmanager
    def rollout_policy(self) -> Iterator[nn.Module]:
        """The policy to sample from, without gradients: each rank may call it as often as it likes.

        Collective in stage 3, where every rank holds all the weights for as long as the context is open.
        """
        if self.zero_stage < 3:
            yield self._engine.module
            return
        error = None
        with load_deepspeed().zero.unwrap_model_for_generation(self._engine) as unwrapped:
            try:
                yield unwrapped.module
            # Held back until DeepSpeed has put its hooks on again: it has no `finally` for that.
            except BaseException as raised:
                error = raised
        if error is not None:
            raise error

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of one micro-batch; `last` of an update also sums over the ranks, collectively.

        The caller has divided the loss by the number of micro-batches, which may differ between updates.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next step on."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> Tensor:
        """Updates the weights; returns the norm of the gradient before clipping, (). Collective."""
        if self.zero_stage > 0:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            return torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device)
        # DeepSpeed has no norm for us in stage 0 and would step on a gradient that is not finite.
        parameters = self._trained.values()
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or torch.inf)
        if not norm.isfinite():
            norm = torch.full_like(norm, torch.inf)
            for p in parameters:
                p.grad = None  # AdamW passes it over
        self._engine.step()
        return norm

    @property
    def loss_scale(self) -> float | None:
        """What DeepSpeed multiplies float16 losses with; None at any other dtype."""
        return float(self._engine.optimizer.loss_scale) if self.dtype == torch.float16 else None

    @property
    def skipped_steps(self) -> int:
        """Updates that were left out because a gradient was not finite."""
        return self._engine.skipped_steps

    @torch.no_grad()
    def trained_state(self, device: torch.device | str | None = None) -> State:
        """Copies of the trained weights by name, whole and float32, from the masters if any. Collective.

        On the engine's device unless another is given, to which they are moved one by one. The adapter must
        be switched on: else stage 3 knows no masters.
        """
        device = device or self.ranks.device
        if self.zero_stage == 3 or self.dtype != torch.float32:
            full = load_deepspeed().utils.safe_get_full_fp32_param
            return {name: full(p).to(device, copy=True) for name, p in self._trained.items()}
        # Masters of float32 weights are equal to them, and nothing has to be sent.
        return {name: p.detach().to(device, copy=True) for name, p in self._trained.items()}

    @contextmanager
    def swapped(self, state: State) -> Iterator[None]:
        """Puts other trained weights, an average say, into the policy, and back on leaving. Collective.

        Only for looking: no backward or step inside. Written in place, so that captured graphs see them. To
        sample with them, open `rollout_policy` inside: stage 3 cannot write a policy while it is gathered.
        """
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        _check_same("the given weights", shapes, self._shapes)
        with self._gathered():
            saved = {name: p.detach().clone() for name, p in self._trained.items()}
        try:
            self._write(state)
            yield
        finally:
            self._write(saved)

    @torch.no_grad()
    def _write(self, state: State) -> None:
        with self._gathered(modifier_rank=0):
            for name, p in self._trained.items():
                p.copy_(state[name])

    def _gathered(self, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        if self.zero_stage < 3:
            return nullcontext()
        return load_deepspeed().zero.GatheredParameters(list(self._trained.values()), modifier_rank=modifier_rank)

    def save(self, folder: Path, client_state: dict[str, Any] | None = None) -> None:
        """Writes the trained weights and the optimiser's state, to go on from exactly. Collective.

        Every rank writes its part into `folder`, which all nodes must share. A crash leaves a part of it: see
        `fastgrpo.engine.checkpoint`, which makes it complete or absent.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0:
            (folder / "engine.json").write_text(json.dumps(self._identity()))
        state = {"client": client_state or {}}
        self._engine.save_checkpoint(str(folder), "deepspeed", state, save_latest=False, exclude_frozen_parameters=True)
        self.ranks.barrier()

    def load(self, folder: Path) -> dict[str, Any]:
        """Goes on from `save`, with a new engine like the saved one; returns the client state. Collective.

        Unpickles DeepSpeed's files: load only what you trust.
        """
        saved, own = json.loads((folder / "engine.json").read_text()), self._identity()
        for key, fix in (
            ("world_size", "start that many processes"),
            ("zero_stage", "set that stage"),
            ("dtype", "set that dtype"),
        ):
            if saved[key] != own[key]:
                raise ValueError(f"{folder} has {key} {saved[key]}, this run has {own[key]}; {fix}")
        _check_same(str(folder), saved["trained"], own["trained"])
        with redirect_stdout(io.StringIO()):  # it prints its keys
            # Not strict, because the frozen weights are not in it; the trained ones were just checked.
            loaded, state = self._engine.load_checkpoint(str(folder), "deepspeed", load_module_strict=False)
        if loaded is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint of DeepSpeed")
        return state["client"]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the split state of the optimiser to fit."""
        return {
            "world_size": self.ranks.world_size,
            "zero_stage": self.zero_stage,
            "dtype": str(self.dtype).removeprefix("torch."),
            "trained": self._shapes,
        }

    def close(self) -> None:
        """Frees what DeepSpeed holds; the engine is of no use afterwards."""
        self._engine.destroy()
        self._trained.clear()
        del self._engine
        gc.collect()


def _check(zero_stage: int, dtype: torch.dtype, trained: dict[str, nn.Parameter]) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage {zero_stage} is unknown; use 0, 1, 2 or 3")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype} is not for training; use float32, bfloat16 or, on CUDA, float16")
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise ValueError("dtype float16 needs CUDA; on a CPU use float32 or bfloat16")
    if dtype != torch.float32 and zero_stage == 0:
        # Its masters are made by a step of AdamW on zero gradients: one weight decay and one count too many.
        raise ValueError(f"zero_stage 0 with {dtype} is not plain AdamW in DeepSpeed; use 1, or float32")
    if not trained:
        raise ValueError("no parameter of the policy requires a gradient; add an adapter or unfreeze some")
    for name, p in trained.items():
        if dtype == torch.float32 and p.dtype != torch.float32:
            raise ValueError(
                f"{name} is trained in {p.dtype}, which float32 training would step without float32 masters; "
                f"make it float32, or set dtype to {p.dtype}"
            )


def _kept_in_float32(policy: nn.Module) -> list[nn.Parameter]:
    """Frozen weights that a network of diffusers keeps in float32 whatever it is loaded in, and DeepSpeed would cast."""
    networks: list[Any] = [m for m in policy.modules() if getattr(m, "_keep_in_fp32_modules", None)]
    return [
        p for network in networks for name, p in network.named_parameters()
        if p.dtype == torch.float32 and not p.requires_grad
        and any(part in name for part in network._keep_in_fp32_modules)
    ]  # fmt: skip


def _check_same(what: str, theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{what}: {name} has shape {theirs.get(name)}, that of the policy {ours.get(name)}; "
                "use the same model and adapter"
            )


def _config(
    zero_stage: int,
    dtype: torch.dtype,
    max_grad_norm: float,
    micro_batch_size: int,
    size: int,  # number of trained weights
    zero_options: dict[str, Any],
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # `backward` says itself which one is the last
        "gradient_clipping": max_grad_norm if zero_stage > 0 else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # By itself DeepSpeed times every forward from the third update on, and waits for the device before each: in rollouts
        # too, which then run only as fast as the host can launch, and whose capture as a graph it would end.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": zero_stage,
            # DeepSpeed allocates a whole bucket, of 5e8 elements by itself.
            "reduce_bucket_size": min(size, 500_000_000),
            # Stage 3 would replace torch's linear in the whole process, also for encoders and rewards.
            "memory_efficient_linear": False,
            **zero_options,
        },
    }
