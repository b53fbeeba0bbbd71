"""What the documentation says is true of the code: links, names, keys, commands and code blocks, read from the pages."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import yaml
from support.helpers import ROOT, environment
from support.pages import PAGES, anchor, blocks, prose, section, text
from support.shell_lines import Parsed, check_command, commands

from fastgrpo.config import schema
from fastgrpo.config.reference import describe
from fastgrpo.learning.objectives import OBJECTIVES
from fastgrpo.models import MODELS
from fastgrpo.sampling.tables import SAMPLERS
from fastgrpo.validation import read_config

PRINTED = ROOT / "docs" / "configuration.md"
LONGEST = 150  # characters of a line
LONG_LINES = (PRINTED, ROOT / "benchmarks" / "README.md")
SMALL = [
    "iterations=1", "rollout.groups=2", "rollout.group_size=2", "rollout.batch_size=2", "rollout.num_steps=3",
    "update.steps_per_rollout=1", "evaluation.images=5", "evaluation.batch_size=5", "evaluation.num_steps=2",
    "evaluation.samples=2", "evaluation.guidance_scale=1.0", "prompts.weights={}",
]  # fmt: skip
# Runs a page's blocks in one namespace, every run in them cut down to a second or two.
PRELUDE = """
import json, sys
import fastgrpo
load_config, small = fastgrpo.load_config, json.loads(sys.argv[1])
fastgrpo.load_config = lambda path, overrides=(): load_config(path, [*overrides, *small])
"""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@each_page
def test_relative_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", text(file), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target}"


@each_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    roots = "fastgrpo|kernels|benchmarks|configs|tests|docs"
    for path in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./-]*)", re.sub(r"\]\([^)]*\)", "", text(page))):
        assert (ROOT / path.rstrip(".")).exists(), f"{page.name}: {path}"


@each_page
def test_named_tests_exist(page: Path) -> None:
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text(page)):
        assert f"def {name}(" in text(ROOT / file), f"{page.name}: {file}::{name}"


def resolved(name: str) -> object:
    """What a dotted name stands for: a module, or what is inside of one."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def dotted_names() -> list[str]:
    found = {name for page in PAGES for name in re.findall(r"(?<![\w./-])fastgrpo(?:_kernels)?(?:\.\w+)+", text(page))}
    return sorted(name for name in found if not name.endswith((".py", ".md", ".yaml")))


@pytest.mark.parametrize("name", dotted_names())
def test_dotted_names_exist(name: str) -> None:
    assert resolved(name) is not None


@cache
def known_keys() -> dict[str, object]:
    """Every key and every section, from the dataclasses of the configuration."""
    lines = re.findall(r"^  ([\w.]+) \(", describe(), flags=re.MULTILINE)
    return {key: True for line in lines for key in (line, *(line.rsplit(".", n)[0] for n in range(1, line.count(".") + 1)))}


def is_key(name: str) -> bool:
    """Whether it is a key, or a name inside of a key that is a free mapping."""
    free = ("prompts.weights.", "reward.settings.", "reward.train.", "reward.eval.", "objective.settings.")
    return name in known_keys() or name.startswith(free)


@each_page
def test_keys_exist(page: Path) -> None:
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)(?=[:`= ])", prose(page))
    named += re.findall(r"--set '?([a-z][\w.]*)=", text(page))
    for block in (block for _, block in blocks(text(page), "yaml")):
        data = yaml.safe_load(block)
        named += [key for key in schema.flat(data) if key != "extends"]
    assert [name for name in named if not is_key(name) and not name.endswith(".py")] == []


def test_there_is_something_to_check() -> None:
    """The patterns of this file find what they look for."""
    assert len(dotted_names()) > 10 and len(known_keys()) > 80 and len(list(commands())) > 20
    assert not is_key("rollout.steps") and is_key("rollout.num_steps") and is_key("rollout.window")
    assert [name for name, _ in blocks(section(ROOT / "docs" / "extending.md", "A reward"), "python")] == [
        "my_rewards.py",
        "",
    ]


@pytest.mark.parametrize("line", commands(), ids=lambda line: line[:60])
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = line.split()[0]
    if program in ("make", "pip", "bash"):
        check_command(line)
    elif "--help" in line:
        with pytest.raises(SystemExit, match="0"):
            check_command(line)
    else:
        with pytest.raises(Parsed):
            check_command(line)


@pytest.mark.parametrize("line", ["make nothing", "pip install 'fastgrpo[nothing]'", "fastgrpo train --confg x", "rm x"])
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)


@each_page
def test_python_is_python(page: Path) -> None:
    for _, block in blocks(text(page), "python"):
        compile(block, str(page), "exec")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's to code which only reads."""
    for name in ("configs", "fastgrpo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def code_of(content: str, folder: Path) -> list[str]:
    """The python blocks of a text in order; those with a file's name are written to it."""
    code = []
    for name, block in blocks(content, "python"):
        if name:
            (folder / name).write_text(block)
        else:
            code.append(block)
    assert code
    return code


@pytest.mark.parametrize("heading", ["A reward", "A model", "A sampler", "An objective"])
def test_extensions_work(heading: str, workshop: Path) -> None:
    with mock.patch.dict(MODELS), mock.patch.dict(SAMPLERS), mock.patch.dict(OBJECTIVES):
        namespace = {"__name__": "page"}
        for block in code_of(section(ROOT / "docs" / "extending.md", heading), workshop):
            exec(compile(block, heading, "exec"), namespace)
    for name in ("my_rewards", "my_family"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("where", ["README.md: Your own model and reward", "docs/extending.md: The Python API"])
def test_training_from_python_works(where: str, workshop: Path) -> None:
    page, heading = where.split(": ")
    script = workshop / "page.py"
    script.write_text("\n".join([PRELUDE, *code_of(section(ROOT / page, heading), workshop)]))
    result = subprocess.run(
        [sys.executable, str(script), json.dumps(SMALL)], cwd=workshop, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(workshop.glob("runs/*/pytorch_lora_weights.safetensors"))


def test_the_configuration_page_is_what_the_code_prints() -> None:
    printed = runpy.run_path(str(ROOT / "docs" / "print_configuration.py"))["page"]()
    assert text(PRINTED) == printed, "run: python docs/print_configuration.py"


def test_every_key_is_on_the_configuration_page() -> None:
    shown = set(re.findall(r"^\| `([\w.]+)` \|", text(PRINTED), flags=re.MULTILINE))
    keys = set(schema.flat(schema.plain(read_config(ROOT / "configs" / "tiny_shapes.yaml"))))
    assert {key for key in keys if not key.startswith("prompts.weights.")} <= shown


def test_the_readme_is_read_at_once() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= 160


@each_page
def test_lines_are_short(page: Path) -> None:
    if page not in LONG_LINES:
        assert [line for line in text(page).splitlines() if len(line) > LONGEST] == []


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_table_of_results_is_what_was_measured(page: str) -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "tiny_shapes.json").read_text())["runs"]
    rows = re.findall(r"^\| (base|trained), seed (\d) \| (.*) \|$", text(ROOT / page), flags=re.MULTILINE)
    assert len(rows) == 2 * len(runs)
    for name, seed, cells in rows:
        (run,) = [run for run in runs if run["seed"] == int(seed)]
        kind = "base" if name == "base" else "final"
        measured = [*run[kind].values(), run[f"{kind}_accuracy"]]
        shown = [float(cell.strip(" *%")) for cell in cells.split("|")]
        assert shown == pytest.approx([100 * value for value in measured], abs=0.051), (name, seed)


def test_the_description_on_a_package_index_has_no_dead_link() -> None:
    said: dict[str, str] = {}
    with mock.patch("setuptools.setup", lambda **options: said.update(options)):
        runpy.run_path(str(ROOT / "setup.py"))
    shown = said["long_description"]
    links = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert links and all(link.startswith("https://") for link in links)
    assert "*The same prompts and the same noise, before training (above) and after it (below)*" in shown
    assert "| Architecture | " in shown and len(shown.splitlines()) == len(text(ROOT / "README.md").splitlines())


@pytest.mark.slow
@pytest.mark.processes
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    # Not with --quiet: strict counts the warnings that are shown.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        html = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//[^\"]*", html), page.name
        assert not re.findall(r"<link[^>]* rel=\"(?:stylesheet|preconnect|icon)\"[^>]* href=\"(?:https?:)?//", html), (
            page.name
        )
        for picture in re.findall(r"<img[^>]* src=\"([^\"]*)\"", html):
            assert (page.parent / picture).is_file(), (page.name, picture)
