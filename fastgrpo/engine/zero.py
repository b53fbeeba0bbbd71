"""The engine: DeepSpeed around the trained weights of a policy, from one CPU process to many nodes.

One update is one step of AdamW on

    g = 1/W sum over W ranks of (sum over the rank's micro-batches of grad(loss)),  clipped to `max_grad_norm`

summed in float32. Beside the data, ZeRO splits over the ranks (arXiv 1910.02054):

    stage 0   nothing                            for float32 only
    stage 1   optimiser state, float32 masters   for LoRA: the parameters keep their addresses, as CUDA graphs need
    stage 2   gradients as well                  the same
    stage 3   parameters as well                 for full fine-tuning: they move, so nothing can be captured

A low-precision policy has float32 masters, made from its rounded weights. AdamW steps the masters, which are rounded into
the policy after each step. An update whose gradient is not finite is skipped on all ranks, and its norm is inf.

    ranks = start()
    engine = Engine(policy.to(ranks.device), ranks, EngineOptions(zero_stage=1, dtype=torch.float32, learning_rate=1e-4))
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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastgrpo.engine.fragments import fragments_of, load_policy, make_state, steps_of, to_host, views_of
from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import Ranks, load_deepspeed
from fastgrpo.engine.shards import SavedShards, Shard
from fastgrpo.finite import NotFinite

State = dict[str, Tensor]
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes in DeepSpeed's moving loss scale
SCALE_AT_MINIMUM = "loss scale already at minimum"
PolicyType = TypeVar("PolicyType", bound=nn.Module)


class Engine(Generic[PolicyType]):
    """A policy under DeepSpeed: its forward pass, its update, its trained weights. `deepspeed` is DeepSpeed's own engine."""

    def __init__(
        self,
        policy: PolicyType,  # on the ranks' device; the parameters that require a gradient are trained
        ranks: Ranks,
        options: EngineOptions,
    ) -> None:
        self.ranks, self.zero_stage, self.dtype = ranks, options.zero_stage, options.dtype
        self._max_grad_norm = options.max_grad_norm
        self.steps_begun = 0  # calls of `step`: between two of them the weights are as the first left them
        # Kept, because while an adapter is switched off its parameters do not require a gradient.
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        options.check(self._trained)
        self._shapes = {name: list(p.shape) for name, p in self._trained.items()}
        parameters = list(self._trained.values())
        # Stage 3 has shards of one dtype.
        kept = [(p, p.data) for p in _kept_in_float32(policy)] if self.zero_stage < 3 else []
        with redirect_stdout(io.StringIO()):  # it prints its memory
            self.deepspeed, *_ = load_deepspeed().initialize(
                model=policy,
                optimizer=options.optimizer(parameters),
                model_parameters=parameters,
                config=options.deepspeed_config(parameters),
            )
        for p, data in kept:
            p.data = data.to(p.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the policy's forward pass for the update. Collective in stage 3."""
        return self.deepspeed(*args, **kwargs)

    @contextmanager
    def rollout_policy(self) -> Iterator[PolicyType]:
        """Opens the policy for sampling without gradients; each rank may call it as often as it likes.

        Collective in stage 3, where every rank holds all the weights for as long as the context is open.
        """
        if self.zero_stage < 3:
            yield self.deepspeed.module
            return
        error = None
        with load_deepspeed().zero.unwrap_model_for_generation(self.deepspeed) as unwrapped:
            try:
                yield unwrapped.module
            # An error is held back until DeepSpeed has put its hooks on again: it has no `finally` for that.
            except BaseException as raised:
                error = raised
        if error is not None:
            raise error

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of one micro-batch; the last one of an update is collective and sums over the ranks.

        The caller has divided the loss by the number of micro-batches, which may differ between updates.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next step and those after it."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> Tensor:
        """Updates the weights; returns the norm of the gradient before clipping, (). Collective.

        The gradient of a weight that no loss reached, as of an expert that no sample asked for, is 0.
        Raises NotFinite where a float16 gradient overflows at the smallest scale too: scaling cannot be the reason then.
        """
        self.steps_begun += 1
        if self.zero_stage > 0:
            try:
                self.deepspeed.step()
            except Exception as error:
                if SCALE_AT_MINIMUM not in str(error):  # which DeepSpeed raises as a bare Exception
                    raise
                raise NotFinite("the gradient is not finite at any scale of the loss") from error
            norm = self.deepspeed.get_global_grad_norm()
            if self.zero_stage == 3:  # or a weight that the next update does not reach would have this one's gradient again
                self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
            return torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device)
        # DeepSpeed has no norm for us in stage 0 and would step on a gradient that is not finite.
        parameters = self._trained.values()
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm or torch.inf)
        if not norm.isfinite():
            norm = torch.full_like(norm, torch.inf)
            self.deepspeed.skipped_steps += 1
            for p in parameters:
                p.grad = None  # AdamW passes it over
        self.deepspeed.step()
        return norm

    @property
    def loss_scale(self) -> float | None:
        """The factor that DeepSpeed multiplies float16 losses with; None for any other dtype."""
        return float(self.deepspeed.optimizer.loss_scale) if self.dtype == torch.float16 else None

    @property
    def skipped_steps(self) -> int:
        """The number of updates of the run that were left out because a gradient was not finite."""
        return self.deepspeed.skipped_steps

    @torch.no_grad()
    def trained_state(self, device: torch.device | str | None = None) -> State:
        """Copies the trained weights by name, whole and in float32, from the masters if there are any. Collective.

        The copies are on the ranks' device, or on `device`, to which they are moved one by one. The adapter must be
        switched on: while it is off, stage 3 knows no masters.
        """
        device = device or self.ranks.device
        if self.zero_stage == 3 or self.dtype != torch.float32:
            full = load_deepspeed().utils.safe_get_full_fp32_param
            return {name: full(p).to(device, copy=True) for name, p in self._trained.items()}
        # Masters of float32 weights are equal to them, and nothing has to be sent.
        return {name: p.detach().to(device, copy=True) for name, p in self._trained.items()}

    @contextmanager
    def swapped(self, state: State) -> Iterator[None]:
        """Puts other weights, an average for example, in place of the trained ones until the block ends. Collective.

        Inside, only forward passes are allowed, no `backward` or `step`. The weights are written in place, so that captured
        graphs see them. To sample with them open `rollout_policy` inside: stage 3 cannot write a policy that is gathered.
        """
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        check_shapes("the given weights", shapes, self._shapes)
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

    @torch.no_grad()
    def state(self) -> Shard:
        """Copies what this rank has of the masters and of AdamW's state, from which `load_state` goes on, to the CPU.

        Between two updates, at any time, also before the first. The device's memory is not used for it.
        """
        # In stage 0 all ranks hold the same.
        views = self._views() if self.zero_stage > 0 or self.ranks.rank == 0 else {}
        starts = {key: start for key, (start, _) in views.items()}
        numbers = {
            "shapes": self._shapes,
            "optimizer_steps": steps_of(self.deepspeed),
            "steps": self.deepspeed.global_steps,
            "skipped_steps": self.deepspeed.skipped_steps,
            "loss_scaler": scaler_state(self._loss_scaler),
        }
        return Shard(to_host({key: view for key, (_, view) in views.items()}), starts, numbers)

    @torch.no_grad()
    def load_state(self, saved: SavedShards) -> None:
        """Makes a new engine go on from what the ranks of another one had in `state`.

        It may have had another world size, ZeRO stage or dtype: masters and moments are the same bit for bit. Everything is
        written in place, and frozen weights stay as they are. ValueError where the trained weights are others.
        """
        check_shapes("the saved state", saved.numbers["shapes"], self._shapes)
        if self.steps_begun > 0:
            raise ValueError("this engine has made updates already; load a state into a new one")
        make_state(self.deepspeed, saved.numbers["optimizer_steps"])
        views = self._views()
        for key, (start, view) in views.items():
            view.copy_(saved.read(key, start, view.numel()).view(view.shape))
        load_policy(self._trained, views, saved)
        self.deepspeed.global_steps = saved.numbers["steps"]
        self.deepspeed.skipped_steps = saved.numbers["skipped_steps"]
        load_scaler_state(self._loss_scaler, saved.numbers["loss_scaler"])

    def _views(self) -> dict[str, tuple[int, Tensor]]:
        return views_of(fragments_of(self._trained, self.deepspeed, self.ranks.rank), self.deepspeed)

    @property
    def _loss_scaler(self) -> Any:
        """DeepSpeed's; None where it has none."""
        return getattr(self.deepspeed.optimizer, "loss_scaler", None)

    def close(self) -> None:
        """Frees what DeepSpeed holds; the engine is of no use afterwards."""
        self.deepspeed.destroy()
        self._trained.clear()
        del self.deepspeed
        gc.collect()


def _kept_in_float32(policy: nn.Module) -> list[nn.Parameter]:
    """The frozen weights that diffusers keeps in float32 whatever a network is loaded in, and that DeepSpeed would cast."""
    networks: list[Any] = [m for m in policy.modules() if getattr(m, "_keep_in_fp32_modules", None)]
    return [
        p for network in networks for name, p in network.named_parameters()
        if p.dtype == torch.float32 and not p.requires_grad
        and any(part in name for part in network._keep_in_fp32_modules)
    ]  # fmt: skip


def scaler_state(scaler: Any) -> dict[str, float]:
    """What DeepSpeed's loss scale goes on from; empty unless it moves, which it does for float16 only."""
    return {key: getattr(scaler, key) for key in SCALER} if getattr(scaler, "dynamic", False) else {}


def load_scaler_state(scaler: Any, state: dict[str, float]) -> None:
    """Sets it; without one, as that of another dtype, the scale starts afresh."""
    if getattr(scaler, "dynamic", False):
        for key, value in state.items():
            setattr(scaler, key, value)


def check_shapes(what: str, theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    """Raises ValueError for the first name whose shape differs: `theirs` are those of `what`, `ours` the policy's."""
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{what}: {name} has shape {theirs.get(name)}, that of the policy {ours.get(name)}; "
                "use the same model and adapter"
            )
