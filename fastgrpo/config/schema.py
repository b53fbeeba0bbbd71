"""YAML into frozen dataclasses of any kind: what is not understood is refused with its path and the nearest valid choice.

data = parse_yaml(text, "recipe.yaml")
apply_override(data, "rollout.num_steps=8")
config = build(Config, data)                    every key known, every value of its field's type and within its bounds

A field's bounds stand beside its type: `every: Annotated[int, AtLeast(1), AtMost(1000)] = 20`. Numbers are always finite.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastgrpo.config import yaml12
from fastgrpo.config.bounds import Bound

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of Linux


class ConfigError(ValueError):
    """A configuration that cannot be run, with the key's path and the way out."""


def choice(path: str, value: str, choices: typing.Collection[str]) -> None:
    """Refuse a name that is not among the choices."""
    if value not in choices:
        refuse(path, value, nearest(value, choices))


def nearest(value: object, choices: typing.Iterable[Any]) -> str:
    """The way out of a name that is not among the choices: the one that was probably meant, and all of them."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"choices: {', '.join(names)}"


def refuse(path: str, value: object, way_out: str) -> typing.NoReturn:
    """Raise the one kind of error there is: which key, what it was, what would do."""
    raise ConfigError(f"{path} = {value!r}: {way_out}")


def parse_yaml(text: str, where: str) -> Any:
    """The YAML in a text; `where` names the text in the error."""
    try:
        return yaml12.load(text)
    except ValueError as error:  # also of a number of more digits than Python reads
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def absolute_paths(data: Any, folder: Path) -> Any:
    """Strings that start with `./` or `../` as absolute paths from `folder`, those with `~/` from the home folder."""
    if isinstance(data, dict):
        return {key: absolute_paths(value, folder) for key, value in data.items()}
    if isinstance(data, list):
        return [absolute_paths(value, folder) for value in data]
    if isinstance(data, str) and data.startswith(("./", "../")):
        return str((folder / data).resolve())
    if isinstance(data, str) and data.startswith("~/"):
        return str(to_path(data))
    return data


def to_path(text: str) -> Path:
    """A path as it is typed, `~` and `~user` being home folders; environment variables are left as they are.

    Raises ConfigError for what no file system can have as a path: later it would be an error of whatever looks there first.
    """
    if not text:
        raise ConfigError("a path is empty; leave it out, or name a file or a folder")
    try:
        path = Path(text).expanduser()
        encoded = os.fsencode(path)
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}; write the whole path") from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} is no path: {error.reason}; write whole characters") from None
    if b"\0" in encoded or len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        limits = f"has no NUL, at most {LONGEST_PATH} bytes, and {LONGEST_NAME} between two slashes"
        raise ConfigError(f"{text!r} is no path, which {limits}; name a file or a folder")
    return path


def apply_override(data: dict, override: str, option: str = "--set") -> None:
    """Put `a.b=value` into the mapping; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{option} {override}: expected key.path=value, for example rollout.num_steps=8")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{option} {override}: {section!r} is a value, not a section")
    data[key] = parse_yaml(text, f"{option} {override}")


def merge(cls: type, below: dict, above: dict) -> dict:
    """The mapping for a `cls` in which `above` wins: sections key by key, whatever is one value as a whole.

    A mapping is one value where the field is no section, and where it names its `kind`: the rest are that kind's settings.
    """
    hints, merged = typing.get_type_hints(cls), dict(below)
    for key, value in above.items():
        section = dataclasses.is_dataclass(hints.get(key)) and isinstance(value, dict) and isinstance(below.get(key), dict)
        if section and "kind" not in value:
            value = merge(hints[key], below[key], value)
        merged[key] = value
    return merged


def build(cls: type, data: Any, prefix: str = "") -> Any:
    """A `cls` of the mapping `data`, sections included."""
    if not isinstance(data, dict):
        refuse(
            prefix.rstrip("."),
            data,
            "expected a section with the keys " + ", ".join(f.name for f in dataclasses.fields(cls)),
        )
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key; {nearest(key, fields)}")
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    return cls(**{key: convert(value, hints[key], prefix + key) for key, value in data.items()})


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, or a refusal; int to float, list to tuple and str to Path are the only conversions."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path + ".")
    if origin is Annotated:
        return _within(convert(value, arguments[0], path), arguments[1:], path)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, arguments, path)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):  # True == 1 == 1.0
            refuse(path, value, nearest(value, arguments))
        return value
    if origin in (tuple, list, Sequence):
        return _convert_list(value, origin, arguments, path)
    if origin is dict:
        if not isinstance(value, dict):
            refuse(path, value, f"expected a mapping of names to {type_name(arguments[1])}")
        for key in value:
            if not isinstance(key, str):
                refuse(f"{path}.{key}", value[key], f"the name {key!r} is no text: put it in quotes")
        return {key: convert(v, arguments[1], f"{path}.{key}") for key, v in value.items()}
    if hint is Any:
        return _convert_any(value, path)
    if hint is float and type(value) in (int, float):
        return _finite(value, path)
    if hint is Path and isinstance(value, str):
        try:
            return to_path(value)
        except ConfigError as error:
            refuse(path, value, str(error))
    if type(value) is not hint:
        way_out = f"; {WAYS_OUT[hint]}" if hint in WAYS_OUT else ""
        refuse(path, value, f"expected {type_name(hint)}, found {type(value).__name__}{way_out}")
    return value


WAYS_OUT: dict[Any, str] = {
    bool: "write true or false",
    int: "write a whole number such as 8 or 1000, digits alone",
    float: "write a number such as 0.5 or 1e-4, without quotes",
    str: "put it in quotes",
    Path: "put it in quotes",
}


def _convert_any(value: Any, path: str) -> Any:
    """A value of a type that nobody has said; its numbers are finite all the same."""
    if isinstance(value, dict):
        return {key: _convert_any(one, f"{path}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [_convert_any(one, f"{path}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, float):
        _finite(value, path)
    return value


def _within(value: Any, bounds: tuple[Bound, ...], path: str) -> Any:
    if not all(bound.holds(value) for bound in bounds):
        hints = [f"; {bound.hint}" for bound in bounds if bound.hint and not bound.holds(value)]
        refuse(path, value, "".join([f"must be {_in_words(bounds)}", *hints]))
    return value


def _finite(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse(path, value, "must be a finite number")
    return number


def _convert_list(value: Any, origin: Any, arguments: tuple[Any, ...], path: str) -> Any:
    """A list as the tuple or list of the type, each item converted to its own type."""
    if not isinstance(value, list | tuple):
        refuse(path, value, "expected a list")
    alike = origin is not tuple or arguments[-1] is Ellipsis
    item_hints = [arguments[0]] * len(value) if alike else list(arguments)
    if len(item_hints) != len(value):
        refuse(path, value, f"expected {len(item_hints)} values")
    items = [convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, item_hints, strict=True))]
    return tuple(items) if origin is tuple else items


def _convert_union(value: Any, hints: tuple[Any, ...], path: str) -> Any:
    """`value` as the first of the types that takes it; else the refusal of the one that was probably meant."""
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    for hint in hints:
        try:
            return convert(value, hint, path)
        except ConfigError:
            continue
    mappings = [hint for hint in hints if _is_mapping(hint) and isinstance(value, dict)]
    names = [hint for hint in hints if typing.get_origin(hint) is Literal and isinstance(value, str)]
    single = [hint for hint in hints if not _is_mapping(hint)]
    return convert(value, (*mappings, *names, *single, *hints)[0], path)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint)


def plain(value: Any) -> Any:
    """A dataclass as what YAML can write, paths absolute."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value.resolve())
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def flat(data: dict, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in data.items():
        rows.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return rows


def type_name(hint: Any) -> str:
    """A type as `--help` prints it, say `int at least 1 | None`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin is Annotated:
        return f"{type_name(arguments[0])} {_in_words(arguments[1:])}"
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_name(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if a is Ellipsis else type_name(a) for a in arguments)}]"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _in_words(bounds: tuple[Bound, ...]) -> str:
    return " and ".join(str(bound) for bound in bounds)
