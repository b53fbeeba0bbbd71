"""The settings of a plug-in, an objective or a reward, as a section whose keys are the parameters of its function.

    def dppo(moments, ..., *, beta: float, delta: float = 1e-7)        objective.settings: {delta: 1e-6}

The signature is the whole declaration: names, types, bounds (`retries: Annotated[int, AtLeast(0)] = 5`) and defaults.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastgrpo.config import schema


def settings_from_signature(
    function: Callable, settings: Mapping[str, Any], path: str, *, owner: str, passed: Collection[str] = ()
) -> dict[str, Any]:
    """The settings as keyword arguments of a function or a class, those left out at their defaults.

    path: of the settings in the configuration, to begin an error with. owner: what the error calls the function.
    passed: parameters that the caller itself passes.

    Raises ConfigError for what the function does not take, for what is missing, and for a value of another type than the
    annotation. What has no annotation, or one that YAML cannot say, is not checked; **kwargs take any name.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in passed]
    own = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = {p.name for p in own}
    others: dict[str, Any] = {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        others = {key: schema.convert(value, Any, f"{path}.{key}") for key, value in settings.items() if key not in names}
    for key in settings:
        if not own and key not in others:
            raise schema.ConfigError(f"{path}.{key}: {owner} has no settings of its own; leave it out")
    hints = _hints(function)
    fields = [(p.name, hints.get(p.name, Any), _default(p)) for p in own]
    section = dataclasses.make_dataclass("Settings", fields, kw_only=True)
    known = {key: value for key, value in settings.items() if key not in others}
    return vars(schema.build(section, known, f"{path}.")) | others


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return dataclasses.field()
    return dataclasses.field(default_factory=lambda: parameter.default)  # a dataclass refuses a list as a default


def _hints(function: Callable) -> dict[str, Any]:
    """The parameters' types that can be checked."""
    annotated = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(annotated, include_extras=True)
    except NameError:  # an annotation that only a type checker can read
        return {}
    return {name: hint for name, hint in hints.items() if _in_yaml(hint)}


def _in_yaml(hint: Any) -> bool:
    """Whether YAML can say a value of this type, so that `schema.build` can check it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return True
    if origin is Annotated:
        return _in_yaml(arguments[0])
    if origin in (types.UnionType, typing.Union, tuple, list, dict, Sequence):
        return all(argument is Ellipsis or _in_yaml(argument) for argument in arguments)
    return hint in (str, int, float, bool, list, dict, Path, type(None), Any) or dataclasses.is_dataclass(hint)
