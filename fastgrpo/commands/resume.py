"""Go on with a run that was stopped, from the last checkpoint in its folder, which may have been moved.

fastgrpo resume runs/tiny_shapes
fastgrpo resume runs/tiny_shapes --set iterations=400                               make it longer
torchrun --standalone --nproc_per_node 2 -m fastgrpo resume runs/tiny_shapes        on two processes

The page Configuration says which keys may change. On how many processes a run was before does not matter.
"""

import argparse

from fastgrpo.commands.arguments import add_set, path
from fastgrpo.commands.saved_model import saved_config
from fastgrpo.commands.train import train
from fastgrpo.config.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=path, help="folder of the run")
    add_set(parser, "iterations=400")


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end and prints the result."""
    for override in arguments.set:
        if override.partition("=")[0].strip() == "output":
            raise ConfigError(f"--set {override}: a run goes on in its own folder; move that, and name the new place")
    return train(saved_config(arguments.run, base=True, overrides=arguments.set))
