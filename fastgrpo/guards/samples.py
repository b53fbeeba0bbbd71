"""Samples whose numbers are not all finite, and how alike the images of a group are: seen on the device, read once.

    samples = Samples(ranks)
    for trajectory in ...:                          a batch each
        latents = samples.add(trajectory)           what to decode
        samples.look(decode(latents))
    bad, spread = samples.read(rewards, group_size)

A sample is whole if all its velocities, latents, log-probabilities and its reward are finite. One that is not is left out:
its group is compared without it, its weight is 0, and zeros stand for its numbers, as 0 times NaN would be NaN in the
gradient of the others.

Letters: N samples of all ranks, B of a batch, S trained steps, *D the shape of a latent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.engine.ranks import Ranks
from fastgrpo.records import Trajectory

KINDS = ("velocities", "latents", "log-probabilities", "rewards")
GRID = 16  # pixels that are compared along each side of an image


class Seen(NamedTuple):
    """What was seen of all ranks' samples."""

    bad: Tensor  # (N, 4) int64: how many numbers of each of `KINDS` are not finite, on the device
    totals: list[int]  # of each kind
    spread: float | None  # of images, see `spread_of`; None where none were decoded


class Samples:
    """The samples of an iteration on this rank. Only `read` waits for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._bad: list[Tensor] = []
        self._pixels: list[Tensor] = []

    def add(self, trajectory: Trajectory) -> Tensor:
        """Counts a batch; returns its final latents (B, *D) with zeros for those of samples that are not whole."""
        self._bad.append(bad_numbers(trajectory))
        return _zeroed(trajectory.final[None], self._bad[-1].sum(dim=1) == 0)[0]

    def look(self, images: Tensor) -> None:
        """images: of a batch that was added, (B, 3, H, W) uint8, or videos (B, T, 3, H, W)."""
        self._pixels.append(pixels_of(images))

    def read(self, rewards: Tensor | None, group_size: int) -> Seen:
        """rewards: (N,) of all ranks; None: nothing scored the images. Collective, and it waits for the device once."""
        bad = self.ranks.gather(torch.cat(self._bad))  # (N, 3)
        scored = torch.zeros_like(bad[:, 0]) if rewards is None else (~rewards.isfinite()).long()
        bad = torch.cat([bad, scored[:, None]], dim=1)
        if not self._pixels:
            return Seen(bad, bad.sum(dim=0).tolist(), None)
        spread = spread_of(self.ranks.gather(torch.cat(self._pixels)), group_size)
        *totals, read = torch.cat([bad.sum(dim=0).double(), spread.double()[None]]).tolist()
        return Seen(bad, [int(total) for total in totals], read)


def bad_numbers(trajectory: Trajectory) -> Tensor:
    """How many velocities, latents and log-probabilities of each sample are not finite, (B, 3) int64."""
    latents = _by_sample(trajectory.latents) + _by_sample(trajectory.final[None])
    return torch.stack([_by_sample(trajectory.v_old), latents, _by_sample(trajectory.log_prob)], dim=1)


def without(trajectory: Trajectory, whole: Tensor) -> Trajectory:
    """The trajectory with zeros for the numbers of samples that are not whole; whole: (B,) bool."""
    latents, v_old, log_prob = (_zeroed(t, whole) for t in (trajectory.latents, trajectory.v_old, trajectory.log_prob))
    return Trajectory(latents, v_old, log_prob, _zeroed(trajectory.final[None], whole)[0])


def pixels_of(images: Tensor) -> Tensor:
    """Some 16 x 16 pixels of each image, of a video's first frame, (B, P) uint8: enough to see whether two are alike."""
    images = images[:, 0] if images.dim() == 5 else images
    down, across = (max(1, side // GRID) for side in images.shape[-2:])
    return images[..., ::down, ::across].flatten(1)


def spread_of(pixels: Tensor, group_size: int) -> Tensor:
    """The standard deviation of a pixel over the images of its group, of 255 levels, its mean over pixels and groups, ()."""
    return pixels.view(-1, group_size, pixels.shape[1]).float().std(dim=1, correction=0).mean()


def _by_sample(values: Tensor) -> Tensor:
    """(S, B, ...) -> how many are not finite, (B,)."""
    return (~values.isfinite()).transpose(0, 1).flatten(1).sum(dim=1)


def _zeroed(values: Tensor, whole: Tensor) -> Tensor:
    """(S, B, ...) with zeros where `whole` (B,) is false."""
    return torch.where(whole.view(1, -1, *[1] * (values.dim() - 2)), values, 0)
