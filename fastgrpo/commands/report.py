"""Write the report of a run, report.html in its folder, from the run's files.

fastgrpo report runs/tiny_shapes
python -m fastgrpo.report runs/tiny_shapes      the same
"""

import argparse
import sys
from pathlib import Path

from fastgrpo.reporting.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("run", type=Path, help="folder of the run")


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and prints its path; 1 where the folder holds no run."""
    try:
        print(write_report(arguments.run))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
