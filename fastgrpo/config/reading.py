"""The configuration from and to YAML files, with `--set a.b=c` on top. Each key is checked by itself, and not the whole.

    config = read_config("configs/tiny_shapes.yaml", ["rollout.num_steps=8"])

Every error names the key's full path, the value, and the nearest valid choice: what is not understood is refused, never
repaired. A path that starts with `./` or `../` is relative to the file it stands in, and `~` is the home folder. Numbers
and booleans are those of YAML 1.2, and a key that is given twice is refused.

A file may start from another, named relative to itself, which may do so in turn:

    extends: ../../tiny_shapes.yaml
    rollout: {guidance_scale: 2.0, window: {kind: all_but_last}}

Sections go key by key, nested ones too, and the later file wins. Whatever is one value replaces the earlier one whole: a
number or a list, a free mapping of names (prompts.weights, reward.settings), and a section that names its `kind`, whose
other keys belong to that kind (rollout.window).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config import schema, yaml12
from fastgrpo.config.keys import Config
from fastgrpo.config.schema import ConfigError
from fastgrpo.text_files import read_text


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides of the form `a.b=value`. `fastgrpo.validation.check` checks the whole."""
    path = schema.to_path(str(path))
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; the ready ones are in configs/")
    return build_config(_read(path), path.parent, overrides)


def build_config(data: dict[str, Any], folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a mapping that stands in a folder, with overrides."""
    for override in overrides:
        schema.apply_override(data, override)
    # What is still relative came with an override, from the folder where the command is given.
    data = schema.absolute_paths(data, Path.cwd())
    _say_where_rewards_are(data, folder)
    return schema.build(Config, data)


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file and of what it extends, with absolute paths; `heirs` are the files that led here."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    data = schema.parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {data!r}")
    named = data.pop("extends", None)
    data = schema.absolute_paths(data, path.parent)
    _say_where_rewards_are(data, path.parent)
    if named is None:
        return data
    parent, heirs = path.parent / schema.to_path(str(named)), (*heirs, path.resolve())
    if not parent.is_file():
        schema.refuse(f"{path}: extends", named, f"{parent.resolve()} is no file; name one relative to this one's folder")
    if parent.resolve() in heirs:
        way = " -> ".join(str(file) for file in (*heirs[heirs.index(parent.resolve()) :], parent.resolve()))
        schema.refuse(f"{path}: extends", named, f"a circle ({way}); let one of these files extend nothing")
    return schema.merge(Config, _read(parent, heirs), data)


def _names(rewards: Any) -> list[str]:
    """One reward by its name, or several with their weights; what is neither is refused later."""
    return [rewards] if isinstance(rewards, str) else [str(name) for name in rewards] if isinstance(rewards, dict) else []


def _say_where_rewards_are(data: dict[str, Any], folder: Path) -> None:
    """Sets reward.folder to that of the file in which a reward of one's own is named."""
    section = data.get("reward")
    if isinstance(section, dict):
        names = [name for key in ("train", "eval") for name in _names(section.get(key))]
        if any(":" in name for name in names):
            section.setdefault("folder", str(folder.resolve()))


def dump_config(config: Config, folder: Path | None = None) -> str:
    """The configuration as YAML, with what it extends and with every path absolute; it reads back to an equal one.

    folder: where the file will lie. Paths in it are written relative to it, so that it can be moved.
    """
    data = schema.plain(config)
    return yaml12.dump(data if folder is None else _relative(data, str(folder.resolve())))


def _relative(data: Any, folder: str) -> Any:
    """Strings that are paths in a folder as they are written in it."""
    if isinstance(data, dict):
        return {key: _relative(value, folder) for key, value in data.items()}
    if isinstance(data, list):
        return [_relative(value, folder) for value in data]
    inside = isinstance(data, str) and (data == folder or data.startswith(folder + os.sep))
    return f"./{data[len(folder) + 1 :]}" if inside else data


def differences(before: Config, after: Config, but: Sequence[str] = ()) -> list[str]:
    """The keys in which two configurations differ, except those in `but`, as "key: before -> after"."""
    old, new = schema.flat(schema.plain(before)), schema.flat(schema.plain(after))
    rows = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in {**old, **new} if key not in but}
    return [f"{key}: {before} -> {after}" for key, (before, after) in rows.items() if before != after]
