"""Write the report of a run, report.html in its folder, from the run's files.

fastgrpo report runs/tiny_shapes
python -m fastgrpo.report runs/tiny_shapes      the same
"""

import argparse

from fastgrpo.commands.arguments import path
from fastgrpo.reporting.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=path, help="folder of the run")


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    print(write_report(arguments.run))
    return 0
