"""A walk over all keys of a configuration."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from fastgrpo.config.keys import Config


def sections(cls: type = Config) -> list[type]:
    """The dataclass of every section, the whole's first."""
    hints = [typing.cast(type, hint) for hint in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(hint)]
    return [cls, *(section for hint in hints for section in sections(hint))]


def keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The path of every key with its type, bounds included."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint
