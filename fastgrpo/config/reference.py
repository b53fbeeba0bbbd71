"""The reference of all keys, as `--help` prints it: type, bounds, default, and the docstring under each field."""

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Iterator

from fastgrpo.config.keys import Config
from fastgrpo.config.schema import type_name


def describe() -> str:
    """Every key of a configuration file."""
    extends = "  extends (Path, default None)\n      Another file, relative to this one, on top of which these keys go."
    return "\n".join([extends, *describe_section(Config)])


def describe_section(cls: type, prefix: str = "") -> Iterator[str]:
    """Each key of a section and of the sections in it."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from describe_section(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            default = "required"
            if f.default is not dataclasses.MISSING:
                default = f"default {f.default}" if f.default != "" else 'default ""'
            elif f.default_factory is not dataclasses.MISSING:
                default = f"default {f.default_factory()}"
            yield f"  {prefix}{f.name} ({type_name(hint)}, {default})\n      {docs.get(f.name, '')}"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, read from the source: dataclasses do not keep them."""
    body = next(n for n in _module(cls.__module__).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__).body
    docs = {}
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[typing.cast(ast.Name, node.target).id] = " ".join(str(after.value.value).split())
    return docs


@functools.cache
def _module(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))
