"""What a run's folder may do to whoever evaluates it: nothing that a person did not name, unless they trust the folder.

    config = trusted(config, arguments.run, trust=arguments.trust, named=arguments.reward, overrides=arguments.set)

A reward of one's own, `module:function` or `file.py:function`, is code, which the folder may bring along. A reward on a
server gets the images, and from its settings the token in an environment variable of this machine. Where the configuration
of the run names such a reward, a person at a terminal is asked; elsewhere `--trust` is the answer.
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo.config.keys import Config
from fastgrpo.config.schema import ConfigError
from fastgrpo.rewards import weights_of


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="import the code, and ask the servers, that the run names as its rewards"
    )


def trusted(config: Config, run: Path, *, trust: bool, named: Collection[str], overrides: Sequence[str]) -> Config:
    """The configuration, once what it names may be used. ConfigError: it may not.

    named: rewards that the command line names; their code is looked for only where this person is, not where the run says.
    overrides: what --set changed.
    """
    asked = list(_risks(config, named, overrides))
    if trust or (asked and _agreed(run, asked)):
        return config
    if asked:
        raise ConfigError(
            f"{run}: its configuration {' and '.join(asked)}; give --trust if you trust whoever made this folder, or name a "
            "reward with --reward"
        )
    return replace(config, reward=replace(config.reward, folder=None))


def _risks(config: Config, named: Collection[str], overrides: Sequence[str]) -> Iterator[str]:
    """What the run asks for that the person did not, in words."""
    given = {override.partition("=")[0] for override in overrides}
    for name in weights_of(config.reward.eval):
        settings = config.reward.settings.get(name) or {}
        if ":" in name and name not in named and "reward.eval" not in given:
            yield f"has the reward {name!r}, which is code"
        for key in ("url", "urls"):
            places = {"reward.settings", f"reward.settings.{name}", f"reward.settings.{name}.{key}"}
            if key in settings and not places & given:
                tokens = [str(value) for setting, value in settings.items() if setting.endswith("_env") and value]
                also = f", and the content of {' and '.join(tokens)} of this machine's environment" if tokens else ""
                yield f"sends the images{also} to {settings[key]}"


def _agreed(run: Path, asked: Sequence[str]) -> bool:
    """What a person at a terminal answers; False where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{run}: its configuration {' and '.join(asked)}. Do you trust whoever made it? [y/N] ", end="", file=sys.stderr)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
