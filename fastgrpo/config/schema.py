"""YAML into frozen dataclasses of any kind: what is not understood is refused with its path and the nearest valid choice.

data = parse_yaml(text, "recipe.yaml")
apply_override(data, "rollout.num_steps=8")
config = build(Config, data)                    every key known, every value of its field's type
"""

import ast
import dataclasses
import difflib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be run, with the key's path and the way out."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads `1e-4` as a string, which would surprise every user once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def choice(path: str, value: str, choices: typing.Iterable[str]) -> None:
    """Refuse a name that is not among the choices."""
    if value not in choices:
        refuse(path, value, nearest(value, choices))


def nearest(value: object, choices: typing.Iterable[Any]) -> str:
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"choices: {', '.join(names)}"


def refuse(path: str, value: object, way_out: str) -> typing.NoReturn:
    """Raise the one kind of error there is: which key, what it was, what would do."""
    raise ConfigError(f"{path} = {value!r}: {way_out}")


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def relative_paths(data: Any, folder: Path) -> Any:
    """Strings that start with `./` or `../` as absolute paths from `folder`."""
    if isinstance(data, dict):
        return {key: relative_paths(value, folder) for key, value in data.items()}
    if isinstance(data, str) and data.startswith(("./", "../")):
        return str((folder / data).resolve())
    return data


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
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key; {nearest(key, fields)}")
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in data.items()})


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, or a refusal; only int to float and list to tuple are conversions."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path + ".")
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, arguments, path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            refuse(path, value, nearest(value, arguments))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            refuse(path, value, "expected a list")
        item_hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(item_hints) != len(value):
            refuse(path, value, f"expected {len(item_hints)} values")
        return tuple(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, item_hints, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            refuse(path, value, f"expected a mapping of names to {_type_name(arguments[1])}")
        return {str(k): _convert(v, arguments[1], f"{path}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        refuse(path, value, f"expected {_type_name(hint)}, found {type(value).__name__}")
    return value


def _convert_union(value: Any, hints: tuple[Any, ...], path: str) -> Any:
    """X | None takes null or an X; int | Literal[...] a number or one of the names; X | dict[...] a mapping or an X."""
    if value is None and type(None) in hints:
        return None
    mappings = [hint for hint in hints if typing.get_origin(hint) is dict]
    if isinstance(value, dict) and mappings:
        return _convert(value, mappings[0], path)
    hints = tuple(hint for hint in hints if hint is not type(None))
    names = [hint for hint in hints if typing.get_origin(hint) is Literal]
    return _convert(value, names[0] if names and isinstance(value, str) else hints[0], path)


def plain(value: Any) -> Any:
    """A dataclass as what YAML can write, paths absolute."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value


def flat(data: dict, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    rows = {}
    for key, value in data.items():
        rows.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return rows


def describe(cls: type, prefix: str = "") -> typing.Iterator[str]:
    """Each key with its type, default and the docstring under its field."""
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from describe(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            default = "required"
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING:
                default = f"default {f.default_factory() if f.default is dataclasses.MISSING else f.default}"
            yield f"  {prefix}{f.name} ({_type_name(hint)}, {default})\n      {docs.get(f.name, '')}"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, read from the source: dataclasses do not keep them."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    docs = {}
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[typing.cast(ast.Name, node.target).id] = " ".join(str(after.value.value).split())
    return docs
