"""The arguments and the model of a saved run, which several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgrpo.models import configured_model
from fastgrpo.policy import Model
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.validation import Config, load_config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--base", action="store_true", help="take the model that the run started from")
    parser.add_argument("--steps", type=int, help="number of ODE steps (default: the run's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the run's own)")


def load_run(run: Path, base: bool, overrides: Sequence[str] = ()) -> tuple[Config, Model]:
    """A run's configuration, and its model on this machine's device: the trained one, or the one it started from."""
    config = load_config(RunFolder(run).config, overrides)
    model = configured_model(config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not base:
        model.load_trained(run)
    return config, model
