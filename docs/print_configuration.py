"""The reference page of all configuration keys, printed from the code, so that it says what the code does.

python docs/print_configuration.py          writes docs/configuration.md; `make docs` does the same

The keys come from `fastgrpo.config.reference.describe`, which `fastgrpo train --help` shows. The names that some keys choose
from come from the tables in which they are registered.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastgrpo.config.reference import describe
from fastgrpo.config.resuming import MAY_CHANGE
from fastgrpo.learning.objectives import OBJECTIVES, settings_of
from fastgrpo.models import MODELS
from fastgrpo.rewards import REWARDS
from fastgrpo.sampling.tables import SAMPLERS

PAGE = Path(__file__).resolve().parent / "configuration.md"
ENTRY = re.compile(r"  (?P<path>[\w.]+) \((?P<kind>.+), (?P<default>required|default .*)\)\n +(?P<meaning>.*)", re.DOTALL)
NUMBER = r"-?[\d.]+(?:e[+-]?\d+)?"
BOUNDS = re.compile(rf" (?:at least|at most|above|below) {NUMBER}(?: and (?:at most|below) {NUMBER})?")

HEAD = """\
# Configuration

<!-- Written by docs/print_configuration.py from the code. Change the code, then run that script. -->

A run is described by one YAML file. `fastgrpo train --help` prints the keys below, and `--set KEY=VALUE` changes one on
the command line:

```bash
fastgrpo train --config configs/tiny_shapes.yaml --set rollout.num_steps=8 --set output=runs/eight_steps
```

- A key that does not exist, a value of the wrong type and a combination that cannot run are refused before anything heavy
  is loaded, with the key, the value and the nearest valid choice. Nothing is silently repaired.
- Numbers, booleans and text are those of YAML 1.2: `1e-4` and `012` (twelve) are numbers, `1_000` and `12:30` are text,
  and `true` and `false` are the only booleans. A key that is given twice in one place is refused; of several `--set` for
  one key the last counts.
- A path that starts with `./` or `../` is relative to the file that it stands in, and one that starts with `~` to the home
  folder. Any other path is relative to the folder in which the command is given. Environment variables are not replaced.
- `extends` names another file on top of which the keys of this one go, section by section. A value replaces the earlier
  value whole. So does a section that names its `kind`, because its other keys belong to that kind.
- The folder of a run holds its whole configuration as `config.yaml`, with absolute paths.

```yaml
extends: ../../tiny_shapes.yaml
rollout: {sampler: flow_sde, guidance_scale: 2.0, window: {kind: all_but_last}}
objective: {name: clip, clip_range: 1e-4, beta: 0.04}
```

## Names

Some keys choose from a table in the code. [Extending](extending.md) shows how to add a row.
"""
RESUMING = """\
## What may change when a run goes on

A run that was stopped goes on when its command is given again. These keys may have other values then. Any other change is
refused with the key and both values, unless no iteration was finished yet: such a run is begun anew as it is now configured.

"""
TABLES = {
    "model.name": ("fastgrpo.models.MODELS", MODELS),
    "rollout.sampler": ("fastgrpo.sampling.tables.SAMPLERS", SAMPLERS),
    "objective.name": ("fastgrpo.learning.objectives.OBJECTIVES", OBJECTIVES),
    "reward.train": ("fastgrpo.rewards.REWARDS", REWARDS),
}


class Key(NamedTuple):
    """One key as `describe` prints it."""

    path: str
    kind: str  # type, with the bounds of its numbers
    default: str  # "required", or "default ..."
    meaning: str


def parsed(text: str) -> list[Key]:
    """The keys in the text of `describe`, in its order."""
    entries = re.split(r"\n(?=  [\w.]+ \()", text)
    found = [ENTRY.fullmatch(entry) for entry in entries]
    if not all(found):
        odd = next(entry for entry, match in zip(entries, found, strict=True) if match is None)
        raise ValueError(
            f"fastgrpo.config.reference.describe printed {odd!r}; expected '  KEY (TYPE, DEFAULT)' and its meaning"
        )
    return [Key(*(" ".join(part.split()) for part in match.groups())) for match in found if match]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def row(key: Key) -> tuple[str, str, str, str, str]:
    kind = re.sub(r"\s*\|\s*", " or ", BOUNDS.sub("", key.kind)).replace("pathlib.Path", "Path").replace("None", "none")
    ranges = ", ".join(dict.fromkeys(shortened(bounds.strip()) for bounds in BOUNDS.findall(key.kind)))
    default = key.default.removeprefix("default ")
    default = default if default in ("required", "None") else code(yaml_text(default))
    return code(key.path), kind, ranges, default.lower() if default == "None" else default, key.meaning


def shortened(bounds: str) -> str:
    """`at least 1 and at most 10000` as `1 to 10,000`."""
    bounds = re.sub(r"\d{4,}", lambda digits: f"{int(digits[0]):,}", bounds)
    return re.sub(r"^at least (\S+) and at most (\S+)$", r"\1 to \2", bounds)


def yaml_text(value: str) -> str:
    """A default as a configuration spells it, from how Python does."""
    return re.sub(r"^\((.*)\)$", r"[\1]", {"True": "true", "False": "false"}.get(value, value))


def sections(keys: list[Key]) -> Iterator[str]:
    """A heading and a table for each section; the keys outside of sections come first."""
    groups: dict[str, list[Key]] = {"": []}
    for key in keys:
        groups.setdefault(key.path.rpartition(".")[0], []).append(key)
    for name, members in groups.items():
        heading = "## The run" if not name else f"{'##' if '.' not in name else '###'} `{name}`"
        yield f"{heading}\n\n" + table(("key", "type", "range", "default", "meaning"), map(row, members))


def names() -> str:
    rows = ((f"`{key}`", ", ".join(map(code, made)), code(place)) for key, (place, made) in TABLES.items())
    return table(("key", "names", "table"), rows)


def resuming() -> str:
    """What a run that goes on may change."""
    return RESUMING + table(("key", "why it may change"), ((code(key), reason) for key, reason in MAY_CHANGE.items()))


def objective_settings() -> str:
    rows = []
    for name in OBJECTIVES:
        # adv_clip_max is a parameter of an objective, but its value is that of the advantages.
        own = {key: value for key, value in settings_of(name, {}).items() if key != "adv_clip_max"}
        settings = [code(f"{key}: {value}") for key, value in own.items()]
        rows.append((code(name), ", ".join(settings) or "none"))
    return table(("objective", "`objective.settings`, with defaults"), rows)


def reward_settings() -> str:
    """Every reward that is a class, with the parameters that `reward.settings` gives it."""
    rows = []
    for name, place in REWARDS.items():
        module, _, attribute = place.partition(":")
        reward = getattr(importlib.import_module(module), attribute)
        if inspect.isclass(reward):
            parameters = [p for p in inspect.signature(reward).parameters.values() if p.name != "device"]
            rows.append((code(name), ", ".join(map(setting, parameters))))
    return table(("reward", "`reward.settings`, with defaults"), rows)


def setting(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"{code(parameter.name)} (required)"
    default = "null" if parameter.default is None else parameter.default
    return code(f"{parameter.name}: {repr(default) if default == '' else default}")


def page() -> str:
    own = "## Settings of objectives\n\n" + objective_settings(), "## Settings of rewards\n\n" + reward_settings()
    return "\n".join([HEAD, names(), *sections(parsed(describe())), resuming(), *own])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
