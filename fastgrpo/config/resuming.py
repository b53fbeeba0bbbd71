"""What may change in a configuration when a run goes on from its last checkpoint.

A run is what it computes. So the places of its files may change, how often they are written, when it ends and how it is
split over machines; and the learning rate, with which a run that diverged is brought back. Everything else may not.
`docs/configuration.md` prints the table.
"""

from fastgrpo.config.keys import Config
from fastgrpo.config.reading import differences

# Key -> why it may change.
MAY_CHANGE = {
    "update.learning_rate": "a run that diverged goes on from before with a smaller one",
    "update.final_learning_rate": "as update.learning_rate",
    "iterations": "a run may be made longer; a line of learning rates then ends at the new last iteration",
    "output": "the run's folder may be moved or renamed",
    "model.path": "a place: the weights in it count, not where they lie",
    "model.transformer": "as model.path",
    "model.variant": "as model.path",
    "model.lora.path": "a place: the LoRA in it counts, not where it lies",
    "model.idle_expert": "where weights wait, which has no effect on what they compute",
    "reward.folder": "a place: where a reward of one's own is looked for",
    "prompts.train": "a place: the prompts in it count",
    "prompts.eval": "a place: the prompts in it count",
    "prompts.images_outside": "a place: the images count, not where they lie",
    "prompts.cache": "a place; embeddings that are not there are made again",
    "prompts.in_memory": "how many embeddings are kept; others are read or made again, with the same bits",
    "checkpoint.every": "how often the state is saved",
    "checkpoint.keep": "how many checkpoints stay",
    "checkpoint.keep_best": "how many checkpoints stay",
    "checkpoint.in_memory": "where the state is copied to",
    "checkpoint.grace": "how long a signal leaves for saving",
    "engine.zero_stage": "how the state is split over the ranks; sums over them round in another way",
    "engine.lost_after": "how long a silent rank is waited for",
    "evaluation.every": "how often is evaluated, which has no effect on the training",
    "reward.timeout": "how long scores are waited for",
    "guard.bad_updates": "when the run stops, which has no effect on what it computes until then",
    "guard.max_kl": "when the run stops",
    "guard.max_drift": "when the run stops",
    "guard.score_drop": "when the run stops",
    "guard.warn_every": "how often is warned",
    "reward.settings.remote.urls": "where the servers are",
    "reward.settings.remote.token_env": "what opens the servers",
    "reward.settings.remote.ca_file": "whose servers are trusted",
    "reward.settings.remote.timeout": "how long a server is waited for",
    "reward.settings.remote.total_timeout": "how long all servers are waited for",
    "reward.settings.remote.retries": "how often the servers are asked again",
    "reward.settings.remote.pause": "how soon the servers are asked again",
    "reward.settings.remote.max_images": "how many images a request holds",
    "reward.settings.vlm_judge.url": "where the endpoint is",
    "reward.settings.vlm_judge.api_key_env": "what opens the endpoint",
    "reward.settings.vlm_judge.timeout": "how long the endpoint is waited for",
    "reward.settings.vlm_judge.retries": "how often the endpoint is asked again",
    "reward.settings.vlm_judge.backoff": "how soon the endpoint is asked again",
    "reward.settings.vlm_judge.concurrency": "how many images are judged at a time",
}


def forbidden_changes(before: Config, after: Config) -> list[str]:
    """The keys that differ and may not, as "key: before -> after"."""
    return differences(before, after, but=tuple(MAY_CHANGE))
