"""Configurations: those that the project ships, with damage to their bytes, their values and their structure, and --set."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import ODD_TEXTS, as_json, damaged, damages, odd_json, odd_texts, scalars, works_or_is_refused
from support.helpers import ROOT

from fastgrpo.config import schema, yaml12
from fastgrpo.config.keys import Config
from fastgrpo.config.reading import differences, dump_config, read_config
from fastgrpo.validation import load_config

SHIPPED = sorted(file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml"))


def keys_of(cls: type, prefix: str = "") -> list[str]:
    """Every key and every section, dotted."""
    hints = schema.typing.get_type_hints(cls)
    nested = [keys_of(hint, f"{prefix}{name}.") for name, hint in hints.items() if schema.dataclasses.is_dataclass(hint)]
    return [prefix + name for name in hints] + [key for keys in nested for key in keys]


KEYS = keys_of(Config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of configs/, as the files extend each other."""
    place = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(ROOT / "configs", place / "configs")
    return place


def check(file: Path, overrides: list[str], *named: object) -> None:
    """It is read and checked, or refused; and what was taken is written as a file that reads as the same."""
    config = works_or_is_refused(lambda: load_config(file, overrides), *named)
    if config is not None:
        file.write_text(dump_config(config), encoding="utf-8")
        assert not differences(config, read_config(file)), "written and read again it is another"


@given(shipped=st.sampled_from(SHIPPED), damage=damages)
def test_bytes_of_a_configuration(shipped: Path, damage: list, folder: Path) -> None:
    file = folder / shipped.with_name("damaged.yaml")
    file.write_bytes(damaged((ROOT / shipped).read_bytes(), damage))
    check(file, [])


@given(shipped=st.sampled_from(SHIPPED), data=st.data())
def test_values_and_structure_of_a_configuration(shipped: Path, data: st.DataObject, folder: Path) -> None:
    content = yaml12.load((ROOT / shipped).read_text(encoding="utf-8"))
    file = folder / shipped.with_name("odd.yaml")
    for _ in range(data.draw(st.integers(1, 3))):
        content = odd_json(data, content)
    file.write_bytes(as_json(content))  # YAML holds all of JSON
    check(file, [])


@given(key=st.sampled_from(KEYS) | odd_texts, value=scalars.map(lambda one: one if isinstance(one, str) else yaml_of(one)))
def test_overrides(key: str, value: str, folder: Path) -> None:
    file = folder / "configs" / "overridden.yaml"
    shutil.copy(ROOT / "configs" / "tiny_shapes.yaml", file)
    check(file, [f"{key}={value}"])


def yaml_of(value: Any) -> str:
    return yaml12.dump(value).removesuffix("...\n").strip()


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("key", ["output", "model.path", "prompts.train", "model.name", "reward.train", "extends"])
def test_odd_texts_where_a_path_or_a_name_is_meant(key: str, text: str, folder: Path) -> None:
    content: dict[str, Any] = {"extends": str(ROOT / "configs" / "tiny_shapes.yaml")}
    *sections, last = key.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = text
    file = folder / "configs" / "one.yaml"
    file.write_bytes(as_json(content))
    check(file, [])
