"""The arguments, the configuration and the model of a saved run, which several commands share."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo.commands.arguments import add_set, of_type, path
from fastgrpo.config.keys import Guidance, StepCount
from fastgrpo.config.sizes import named_sizes
from fastgrpo.measure import DEVICE
from fastgrpo.models import configured_model
from fastgrpo.policy import Model, check_sizes
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.validation import Config, ConfigError, load_config


def add_run_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """example: of a key that the command reads, for the help of --set."""
    parser.add_argument("run", type=path, help="folder of the run")
    parser.add_argument("--base", action="store_true", help="take the model that the run started from")
    parser.add_argument("--steps", type=of_type(StepCount), help="number of ODE steps (default: the run's own)")
    parser.add_argument("--guidance", type=of_type(Guidance), help="guidance scale (default: the run's own)")
    add_set(parser, example)


def saved_config(run: Path, base: bool, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run whose weights are there, those it started from where `base`."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run}: not the folder of a run: it holds no {folder.config.name}")
    if not base and folder.trained is None:
        raise ConfigError(
            f"{run}: holds no trained weights, as the run has saved no checkpoint yet; take --base for the model that it "
            "started from"
        )
    # Where it is now: it may have been moved.
    return replace(load_config(folder.config, overrides), output=run.absolute())


def saved_model(config: Config, run: Path, base: bool) -> Model:
    """The model on this machine's device: the trained one, or the one that the run started from."""
    model = configured_model(config.model, DEVICE)
    check_sizes(model, named_sizes(config))
    if not base:
        model.load_trained(run)
    return model
