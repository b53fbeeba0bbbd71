"""fastgrpo: online reinforcement learning for flow-matching generators.

    import fastgrpo

    config = fastgrpo.load_config("configs/tiny_shapes.yaml", ["iterations=10"])
    trainer = fastgrpo.Trainer(config, reward=my_reward)
    summary = trainer.run()

The names below are imported when they are first used: `import fastgrpo` alone loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastgrpo.version import __version__

if TYPE_CHECKING:
    from fastgrpo.callbacks import Callback as Callback
    from fastgrpo.models import load_model as load_model
    from fastgrpo.rewards import load_reward as load_reward
    from fastgrpo.sampling.rollout import rollout as rollout
    from fastgrpo.trainer import Trainer as Trainer
    from fastgrpo.validation import load_config as load_config

PUBLIC = {
    "Callback": "fastgrpo.callbacks",
    "Trainer": "fastgrpo.trainer",
    "load_config": "fastgrpo.validation",
    "load_model": "fastgrpo.models",
    "load_reward": "fastgrpo.rewards",
    "rollout": "fastgrpo.sampling.rollout",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
