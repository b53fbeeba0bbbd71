"""YAML as version 1.2 means it: https://yaml.org/spec/1.2.2, section 10.3.2 has the table of what a scalar is."""

import math
from pathlib import Path

import pytest
from support.helpers import ROOT

from fastgrpo.config import yaml12
from fastgrpo.validation import ConfigError, load_config

TINY = ROOT / "configs" / "tiny_shapes_grpo.yaml"
VALUES = {
    "3": 3, "-0": 0, "+12": 12, "012": 12, "08": 8, "0o17": 15, "0xfF": 255,
    "1e-4": 1e-4, "2E+5": 2e5, "1.": 1.0, "-.5": -0.5, "6.02e23": 6.02e23, "1e400": math.inf, "-.INF": -math.inf,
    "true": True, "False": False, "~": None, "Null": None, "": None,
    "yes": "yes", "No": "No", "on": "on", "off": "off", "y": "y", "tRUE": "tRUE",
    "1_000": "1_000", "12:30": "12:30", "190:20:30": "190:20:30", "0b11": "0b11", "-0x1": "-0x1", "1e": "1e", "0o8": "0o8",
    "2026-11-28": "2026-11-28", "2026-11-28T09:30:00Z": "2026-11-28T09:30:00Z", "=": "=", ".": ".",
    "'5'": "5", "!!str 5": "5",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_a_scalar_is_what_the_core_schema_says(text: str) -> None:
    value = yaml12.load(text)
    assert type(value) is type(VALUES[text]) and value == VALUES[text]
    assert math.isnan(yaml12.load(".NaN"))


@pytest.mark.parametrize(
    "value", [*VALUES, *VALUES.values(), "<<", "a: b", "é\u2028", {"yes": [1, {"08": "1e4"}]}], ids=repr
)
def test_what_is_written_reads_back_the_same(value: object) -> None:
    again = yaml12.load(yaml12.dump({"key": value}))["key"]
    assert type(again) is type(value) and again == value


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands in lines 1 and 3"),
        ("a:\n  b: 1\n  c:\n  - {d: 1}\n  b: 2\n", "line 5: the key 'b' stands in lines 2 and 5"),
        ("a: [{b: 1, 'b': 2}]\n", "the key 'b' stands twice in line 1"),
        ("a: {1: x, 01: y}\n", "the key '01' stands twice in line 1"),
        ("x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\n", "the key 'b' stands twice in line 2"),
        ("? [a]\n: 1\n", "a key is a name or a number"),
        ("a: !!int 1_000\n", "line 1: '1_000' is no int"),
        ("a: !!timestamp 2026-11-28\n", "!!timestamp is no type of YAML's core schema"),
        ("a: !!python/name:os.system\n", "is no type of YAML's core schema"),
        ("a: [1,\n", "line 2: "),
        ("a: !!float {b: 1}\n", "line 1: a mapping is no float"),
        ("a: !!bool [b]\n", "line 1: a sequence is no bool"),
        ("a:\n- " + "[" * 5000, "line 2: lists and mappings in one another more than 100 deep"),
        ("a: &a\n- b\n- *a\n", "line 3: the alias *a stands inside of what it names"),
        (LAUGHS, "line 5: aliases make it more than 100000 values or 100 deep"),
        ("a: 0x" + "f" * 5000, "line 1: a whole number of more than 1000 digits"),
        ("a: \x01\n", "special characters are not allowed"),
    ],
)
def test_what_would_be_lost_or_cannot_be_read_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        yaml12.load(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_is_merged_in_may_be_given_again() -> None:
    """Wherever the mapping stands that is merged: it is not the same key twice."""
    text = "base: &base {a: 1, b: 2}\nx: {deep: &deep {<<: *base, b: 3}}\ny: {<<: *deep, a: 4}\n"
    assert yaml12.load(text)["y"] == {"a": 4, "b": 3}


def test_a_key_that_is_given_twice_is_refused_in_every_file_and_override(tmp_path: Path) -> None:
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text(f"extends: {TINY}\nrollout:\n  num_steps: 4\n  groups: 2\n  num_steps: 6\n")
    above.write_text(f"extends: {below}\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"below\.yaml: not valid YAML: line 5: the key 'num_steps' .* lines 3 and 5"):
        load_config(above)
    with pytest.raises(ConfigError, match=r"--set update=.*: the key 'betas' stands twice in line 1"):
        load_config(TINY, ["update={betas: [0, 0], betas: [0.5, 0.5]}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.compile=yes", r"model\.compile = 'yes': expected bool, found str; write true or false"),
        ("update.skip_dead=off", r"update\.skip_dead = 'off': expected bool, found str; write true or false"),
        ("iterations=1_000", r"iterations = '1_000': expected int, found str; write a whole number such as 8"),
        ("iterations=12:30", r"iterations = '12:30': expected int, found str"),
        ("update.learning_rate='1e-4'", r"update\.learning_rate = '1e-4': expected float, found str; write a number"),
        ("output=2026", r"output = 2026: expected Path, found int; put it in quotes"),
        ("output=''", "a path is empty"),
        ("prompts.weights={1: 2}", r"prompts\.weights\.1 = 2: the name 1 is no text: put it in quotes"),
        ("reward.settings={jpeg_compressibility: {a: [{b: -.inf}]}}", r"jpeg_compressibility\.a\[0\]\.b = -inf: .* finite"),
        ("objective.settings={delta: 1e400}", r"objective\.settings\.delta = inf: must be a finite number"),
    ],
)
def test_what_only_looks_like_the_type_is_refused_with_the_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [override])


def test_numbers_of_a_configuration_are_as_they_look() -> None:
    config = load_config(TINY, ["iterations=012", "seed=0x10", "update.learning_rate=5E-5"])
    assert (config.iterations, config.seed, config.update.learning_rate) == (12, 16, 5e-5)


def test_an_alias_repeats_what_it_names() -> None:
    assert yaml12.load("a: &x [1, {b: 2}]\nc: [*x, *x]") == {"a": [1, {"b": 2}], "c": [[1, {"b": 2}]] * 2}
