"""Facts that follow from a configuration, for the places that have to agree on them."""

from fastgrpo.config.keys import Config


def recomputes_old(config: Config, micro_batch_size: int | None = None) -> bool:
    """Whether the update makes v_old again, as is asked for, or else where its forward passes are not the rollout's.

    micro_batch_size: what `largest` turned out to be, once that is known.
    """
    if config.update.old_velocity is not None:
        return config.update.old_velocity == "recompute"
    rollout = config.rollout
    size = micro_batch_size or config.update.micro_batch_size
    return rollout.precision != "model" or size not in ("rollout", rollout.batch_size)
