"""`Guards`, what a trainer asks in every iteration: which samples to leave out, and whether to go on.

    guards.begin(engine.trained_state)
    latents = guards.samples.add(trajectory)            each batch; `guards.samples.look(images)`
    batches, whole = guards.leave_out(iteration, batches, rewards)
    guards.count_updates(iteration, bad_losses, bad_gradients)
    metrics |= guards.after_update(iteration, weights, average)
    guards.check(metrics)
    guards.check_evaluations(rows)                      after an evaluation

Faults are told by `tell`, for faults.jsonl, and by a warning. NotFinite and LimitPassed end the run, on every rank at once,
as what is decided here follows from numbers that all ranks have alike.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config.keys import Config
from fastgrpo.engine.ranks import Ranks
from fastgrpo.finite import NotFinite, first_not_finite
from fastgrpo.guards.collapse import CollapseWatch
from fastgrpo.guards.faults import Fault
from fastgrpo.guards.limits import HALF, check_limits, check_score, score_fall
from fastgrpo.guards.samples import KINDS, Samples, without
from fastgrpo.learning.objectives import OBJECTIVES
from fastgrpo.records import Batch


class Guards:
    """The guards of a run.

    prompts: (iteration, numbers of samples) -> their prompts, each once.
    tell: is told every fault, on every rank.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        prompts: Callable[[int, Sequence[int]], list[str]],
        tell: Callable[[Fault], None],
    ) -> None:
        self.config, self.ranks, self._prompts, self._tell = config, ranks, prompts, tell
        self.samples = Samples(ranks)
        self._seen: dict[str, float] = {}  # the iteration's metrics
        self._norms: Tensor | None = None  # of the trained tensors after the last iteration
        self._in_a_row = 0  # updates that were skipped one after the other
        self._collapse = CollapseWatch(every=config.guard.warn_every, rounding=_rounding(config))

    def begin(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Before an iteration. weights: the trained ones by name; asked for in the first iteration alone."""
        self.samples, self._seen = Samples(self.ranks), {}
        if self._norms is None:
            self._norms = _norms(weights())

    def leave_out(self, iteration: int, batches: list[Batch], rewards: Tensor | None) -> tuple[list[Batch], Tensor | None]:
        """This rank's batches with zeros for samples that are not whole, and which are, of all ranks (N,) bool; None: all.

        rewards: (N,) of all ranks. Raises NotFinite where no sample is whole: the weights would make the next ones so too.
        Collective.
        """
        bad, totals, spread = self.samples.read(rewards, self.config.rollout.group_size)
        if spread is not None:
            self._seen["image_spread"] = spread
        whole = bad.sum(dim=1) == 0 if any(totals) else None
        self._seen["bad_samples"] = 0 if whole is None else int((~whole).sum())
        if whole is None:
            return batches, None
        faults = [
            Fault(iteration=iteration, tensor=kind, count=count, prompts=self._prompts(iteration, _numbers(column)))
            for kind, count, column in zip(KINDS, totals, bad.unbind(dim=1), strict=True) if count
        ]  # fmt: skip
        for fault in faults:
            self._warn(fault, f"{self._seen['bad_samples']} of {len(whole)} samples are left out")
        if self._seen["bad_samples"] == len(whole):
            raise NotFinite(f"no sample is left to learn from; {faults[0]}")
        kept = [whole[batch.sample_id.to(whole.device)] for batch in batches]
        return [
            replace(batch, trajectory=without(batch.trajectory, mine)) for batch, mine in zip(batches, kept, strict=True)
        ], whole

    def count_updates(self, iteration: int, bad_losses: Sequence[float], bad_gradients: Sequence[float]) -> None:
        """After the updates of an iteration, of which the engine has skipped those that were bad.

        bad_losses: of each update in how many forward passes the loss was not finite, a mean over ranks; bad_gradients: 1
        where the gradient's norm was not. Raises NotFinite after guard.bad_updates bad ones in a row.
        """
        self._seen["bad_updates"] = 0
        scaled = self.config.model.dtype == "float16"
        for number, (losses, gradient) in enumerate(zip(bad_losses, bad_gradients, strict=True), 1):
            if not losses and gradient and scaled:
                continue  # skipped to find the scale of the loss; the engine itself stops at the smallest one
            if not losses and not gradient:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            self._seen["bad_updates"] += 1
            fault = Fault(
                iteration=iteration, update=number, tensor="loss" if losses else "gradient",
                count=round(losses * self.ranks.world_size) or None,
                prompts=self._prompts(iteration, self._samples_of(number - 1)),
            )  # fmt: skip
            self._warn(fault, f"the update is skipped, {self._in_a_row} in a row")
            if self._in_a_row >= self.config.guard.bad_updates:
                raise NotFinite(
                    f"{self._in_a_row} updates in a row had to be skipped (guard.bad_updates); {fault}; usually "
                    "update.learning_rate is too high, or a reward or a setting of the objective is out of all bounds"
                )

    def after_update(self, iteration: int, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, float]:
        """After an iteration, its weights by name; returns what the guards saw in it, for metrics.jsonl.

        Raises NotFinite where a weight is not finite, as no skipping could undo that. It waits for the device once.
        """
        before, self._norms = self._norms, _norms(weights)
        change = torch.zeros(()) if before is None else (self._norms - before).abs().max()
        read = torch.stack([change.to(self._norms), *(norms.isfinite().all() for norms in (self._norms, _norms(average)))])
        self._seen["weight_change"], *finite = read.tolist()
        for what, tensors, good in zip(("weights", "average"), (weights, average), finite, strict=True):
            if not good:
                name = first_not_finite(tensors)
                count = int((~tensors[name].isfinite()).sum()) if name else None
                fault = Fault(iteration=iteration, tensor=what, name=name, count=count)
                self._warn(fault, "which cannot be undone")
                raise NotFinite(f"{fault} after the update; usually update.learning_rate or weight_decay is too high")
        return self._seen

    def check(self, row: Mapping) -> None:
        """Raises LimitPassed where an iteration's line is beyond a limit; warns of the signs of a collapse."""
        check_limits(row, self.config.guard)
        for text in self._collapse.warnings(row):
            self._say(row["iteration"], text)

    def check_evaluations(self, rows: Sequence[Mapping]) -> None:
        """rows: of evaluations.jsonl, the newest last. Raises LimitPassed where the score fell too far; warns of half."""
        check_score(rows, self.config.guard)
        fall = score_fall(rows, HALF)
        if fall is not None:
            self._say(rows[-1]["iteration"], fall)

    def _say(self, iteration: int, text: str) -> None:
        if self.ranks.rank == 0:
            tqdm.write(f"warning: iteration {iteration}: {text}", file=sys.stderr)

    def _warn(self, fault: Fault, what_follows: str) -> None:
        self._say(fault.iteration, f"{fault}; {what_follows}")
        self._tell(fault)

    def _samples_of(self, update: int) -> list[int]:
        """The numbers of the samples, over all ranks, that an iteration's update learns from; updates count from 0."""
        rollout, steps = self.config.rollout, self.config.update.steps_per_rollout
        share = rollout.groups * rollout.group_size // self.ranks.world_size
        part = share // steps
        first = update % steps * part
        return [rank * share + i for rank in range(self.ranks.world_size) for i in range(first, first + part)]


def _numbers(column: Tensor) -> list[int]:
    """Where a column is not 0."""
    return column.nonzero().flatten().tolist()


def _norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """The norm of each tensor, (T,) float32, not finite where a number in it is not."""
    return torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors.values()])


def _rounding(config: Config) -> float | None:
    """How far the first ratio of an update may be from 1 by rounding; None where the objective has another old policy.

    It is exactly 1 where rollout and update run the same shapes. Where they do not, the embedded model's was off by 1.7
    times its dtype's relative precision in float32, and by 0.2 times that in bfloat16.
    """
    if OBJECTIVES[config.objective.name].on_final_images:
        return None
    return 4 * torch.finfo(getattr(torch, config.model.dtype)).eps
