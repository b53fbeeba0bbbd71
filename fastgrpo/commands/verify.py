"""Check that everything in a run's folder is what was written, and fits together.

fastgrpo verify runs/tiny_shapes
"""

import argparse

from fastgrpo.commands.arguments import path
from fastgrpo.config.schema import ConfigError
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.text_files import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=path, help="folder of the run")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each thing; the exit status is 1 where something is wrong."""
    if not RunFolder(arguments.run).config.is_file():
        raise ConfigError(f"{arguments.run}: not the folder of a run: it holds no config.yaml")
    from fastgrpo.verification import verify

    faults = 0
    for finding in verify(arguments.run):
        faults += bool(finding.fault)
        said = f"{'FAULT' if finding.fault else 'ok':5}  {finding.what:20}  {finding.fault or finding.about}"
        print(one_line(said), flush=True)
    return 1 if faults else 0
