"""What may change in a configuration when a run goes on from its last checkpoint: that on which none of its numbers hang.

A run is what it computes. So the places of its files and how often they are written may change, and everything else may
not. `docs/configuration.md` prints the table.
"""

from fastgrpo.config.keys import Config
from fastgrpo.config.reading import differences

# Key, in which * stands for any text -> why it may change.
MAY_CHANGE = {
    "iterations": "a run may be made longer; a line of learning rates then ends at the new last iteration",
    "output": "the run's folder may be moved or renamed",
    "model.path": "a place: the weights in it count, not where they lie",
    "model.tiny_decoder": "a place, as model.path",
    "prompts.train": "a place: the prompts in it count",
    "prompts.eval": "a place: the prompts in it count",
    "prompts.cache": "a place; embeddings that are not there are made again",
    "checkpoint.every": "how often the state is saved",
    "checkpoint.keep": "how many checkpoints stay",
    "evaluation.every": "how often is evaluated; no evaluation has an effect on the training",
    "reward.settings.*.url": "where a server is",
    "reward.settings.*.urls": "where servers are",
    "reward.settings.*.token_env": "a name for what opens a server",
    "reward.settings.*.api_key_env": "a name for what opens a server",
    "reward.settings.*.timeout": "how long a server is waited for",
    "reward.settings.*.retries": "how often a server is asked again",
    "reward.settings.*.backoff": "how soon a server is asked again",
    "reward.settings.*.pause": "how soon a server is asked again",
    "reward.settings.*.concurrency": "how many questions a server has at a time",
}


def forbidden_changes(before: Config, after: Config) -> list[str]:
    """The keys that differ and may not, as "key: before -> after"."""
    return differences(before, after, but=tuple(MAY_CHANGE))
