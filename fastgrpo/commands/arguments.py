"""What the commands' arguments may be, by the rules of the configuration's keys, and where their files may go.

parser.add_argument("--steps", type=of_type(StepCount))       a whole number within the bounds that the type states
parser.add_argument("--output", type=path)                    with ~ as the home folder
check_file("--output", arguments.output)                      before the work that ends in writing it
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config import schema
from fastgrpo.config.schema import ConfigError


def of_type(hint: Any) -> Callable[[str], Any]:
    """Reads an argument as a key of that type is read: YAML 1.2, finite, within its bounds."""

    def read(text: str) -> Any:
        try:
            return schema.convert(schema.parse_yaml(text, repr(text)), hint, "")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(" = ")) from None

    return read


def path(text: str) -> Path:
    """A path as it is typed, with `~` as the home folder."""
    try:
        return schema.to_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_set(parser: argparse.ArgumentParser, example: str) -> None:
    """The option --set, which changes keys of the configuration that a command reads; of one key the last counts."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key of the configuration, e.g. {example}",
    )


def check_set(overrides: Sequence[str], read: Sequence[str], command: str) -> None:
    """Refuse a key that the command would leave unread. read: the keys and sections that it reads."""
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == known or key.startswith(f"{known}.") for known in read):
            raise ConfigError(f"--set {override}: {command} does not read this key; it reads {', '.join(read)}")


def check_file(option: str, file: Path) -> None:
    """Refuse a file that could not be written when the work is done."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {file}: there is no folder {folder}; make it, or name another file")
    if file.is_dir():
        raise ConfigError(f"{option} {file}: is a folder; name a file in it")
    if file.exists() and not file.is_file():  # a finished file takes the place of what is there, which may be /dev/null
        raise ConfigError(f"{option} {file}: is a device or a pipe; name a file")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"{option} {file}: cannot be written by this user; name another file")
