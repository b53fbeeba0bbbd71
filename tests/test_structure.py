"""The house: floors with names, no circle, arrows that only run down, and no door but the front ones. From the ground up."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Rooms on one floor do not know each other. The longest name that fits a module is its room.
FLOORS = {
    "kernels": ["fastgrpo_kernels"],
    "ground": [
        "fastgrpo", "fastgrpo.daemon_pool", "fastgrpo.edit_distance", "fastgrpo.files", "fastgrpo.finite",
        "fastgrpo.interpreter", "fastgrpo.measure", "fastgrpo.normal_form", "fastgrpo.processes", "fastgrpo.quiet",
        "fastgrpo.records", "fastgrpo.stopping", "fastgrpo.tensor_files", "fastgrpo.text_files", "fastgrpo.version",
    ],
    "what may be said": ["fastgrpo.config"],
    "what is seen": ["fastgrpo.data.pictures"],
    "what a model is": ["fastgrpo.policy", "fastgrpo.tiny", "fastgrpo.engine", "fastgrpo.reporting"],
    "prompts": ["fastgrpo.data"],
    "what makes and judges images": ["fastgrpo.models", "fastgrpo.rewards", "fastgrpo.sampling"],
    "what learns": ["fastgrpo.learning"],
    "what the whole needs": [
        "fastgrpo.validation", "fastgrpo.endings", "fastgrpo.evaluation", "fastgrpo.guards", "fastgrpo.inputs",
        "fastgrpo.metrics", "fastgrpo.testing", "fastgrpo.trained_files",
    ],
    "what a run is made of": ["fastgrpo.parts", "fastgrpo.saving", "fastgrpo.verification"],
    "what ends a run": ["fastgrpo.lifeline"],
    "what a run tells": ["fastgrpo.callbacks"],
    "the trainer": ["fastgrpo.trainer"],
    "commands": ["fastgrpo.commands"],
    "doors": ["fastgrpo.__main__", "fastgrpo.train", "fastgrpo.report", "fastgrpo.rewards.make_prompts"],
}  # fmt: skip
# Libraries that one place alone may know, so that the rest does not depend on them.
HOMES = {
    "deepspeed": ["fastgrpo.engine.ranks"],
    "diffusers": ["fastgrpo.models", "fastgrpo.testing", "fastgrpo.tiny.pretrain"],
    "transformers": ["fastgrpo.models", "fastgrpo.rewards", "fastgrpo.testing", "fastgrpo.tiny.pretrain"],
    "httpx2": ["fastgrpo.rewards.client"],
    "peft": ["fastgrpo.models"],
    "triton": ["fastgrpo_kernels.optional_triton"],
    "fastapi": ["fastgrpo.rewards.serving.service"],
    "uvicorn": ["fastgrpo.rewards.serving.server"],
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages by name."""
    found = {}
    for base, package in ((ROOT, "fastgrpo"), (ROOT / "kernels", "fastgrpo_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


class Imports(ast.NodeVisitor):
    """What a file imports when it runs, functions included; `from a import b` counts as a and as a.b."""

    def __init__(self, path: Path) -> None:
        self.names: set[str] = set()
        self.path = path
        self.visit(tree_of(path))

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0 and node.module, f"{self.path} has a relative import"
        self.names.add(node.module)
        self.names.update(f"{node.module}.{alias.name}" for alias in node.names)


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules of the project that it imports. `from package import module` is an arrow to the module alone."""
    known = modules()
    graph = {}
    for name, path in known.items():
        targets = Imports(path).names & known.keys() - {name}
        graph[name] = {t for t in targets if not any(other.startswith(t + ".") for other in targets)}
    return graph


def within(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def room(name: str) -> str:
    """The longest of the rooms' names that fits; "fastgrpo" is the room of its own file alone."""
    rooms = [place for places in FLOORS.values() for place in places]
    fitting = [place for place in rooms if name == place or (place != "fastgrpo" and name.startswith(place + "."))]
    assert fitting, f"{name} has no room: give it one in FLOORS"
    return max(fitting, key=len)


def floor(name: str) -> int:
    return next(i for i, places in enumerate(FLOORS.values()) if room(name) in places)


def test_arrows_never_run_up_nor_sideways() -> None:
    astray = [
        f"{a} -> {b}" for a, targets in arrows().items() for b in targets
        if floor(b) > floor(a) or (floor(b) == floor(a) and room(a) != room(b) and floor(a) > 1)
    ]  # fmt: skip
    assert not astray


def test_every_room_is_there() -> None:
    rooms = {room(name) for name in modules()}
    assert rooms == {place for places in FLOORS.values() for place in places}


def test_there_is_no_circle() -> None:
    graph, done = arrows(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_heavy_libraries_have_one_home() -> None:
    astray = []
    for name, path in modules().items():
        for imported in Imports(path).names:
            homes = HOMES.get(imported.split(".")[0])
            if homes and not within(name, homes):
                astray.append(f"{name} imports {imported}")
    assert not astray


@cache
def private_names() -> set[str]:
    """Every function, class, method and attribute of the two packages whose name says that it is nobody else's."""
    found = set()
    for path in modules().values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    public = {"_replace", "_asdict", "_fields"}  # in a NamedTuple
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - public


def own_of(tree: ast.AST) -> set[str]:
    """The private names that a file defines itself."""
    nodes = list(ast.walk(tree))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return defined | {
        node.attr for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }  # fmt: skip


def used_by(path: Path) -> set[str]:
    tree = tree_of(path)
    nodes = list(ast.walk(tree))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastgrpo")
        for alias in node.names
    }  # fmt: skip
    attributes = {
        node.attr for node in nodes
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }  # fmt: skip
    return imported | (attributes - own_of(tree))


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_nobody_from_outside_uses_a_private_name(folder: str) -> None:
    private = private_names()
    used = {path.name: sorted(used_by(path) & private) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert {name: names for name, names in used.items() if names} == {}


def test_long_lists_of_parameters_are_named_at_the_call_and_explained() -> None:
    """More than seven: no call could be read without the names."""
    astray = []
    for name, path in modules().items():
        if name.startswith("fastgrpo_kernels"):
            continue
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            if len(positional) > 7 or (len(positional) + len(node.args.kwonlyargs) > 7 and not explained(path, node)):
                astray.append(f"{name}:{node.lineno} {node.name}")
    assert not astray


def explained(path: Path, function: ast.FunctionDef) -> bool:
    """It has a docstring, or is the `__init__` of a class that has one."""
    if ast.get_docstring(function):
        return True
    classes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
    owners = [node for node in classes if node.lineno < function.lineno <= (node.end_lineno or 0)]
    return function.name == "__init__" and any(ast.get_docstring(node) for node in owners)


def without_encoding(path: Path) -> list[int]:
    """The lines of a file that read or write text in the encoding of whatever system it runs on."""
    astray = []
    for node in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        name = ast.unparse(node.func).rsplit(".", 1)[-1]
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        of_bytes = any("b" in mode and set(mode) <= set("rwaxb+") for mode in modes)
        method = isinstance(node.func, ast.Attribute)
        text = (method and name in ("read_text", "write_text")) or (name == "open" and not of_bytes)
        elsewhere = ast.unparse(node.func) in ("Image.open", "os.open")
        if text and not elsewhere and "encoding" not in {keyword.arg for keyword in node.keywords}:
            astray.append(node.lineno)
    return astray


@pytest.mark.parametrize("folder", ["fastgrpo", "kernels", "benchmarks", "docs"])
def test_every_text_file_is_read_and_written_as_utf_8(folder: str) -> None:
    """Without a word Python takes the locale's encoding, in which another machine cannot read what this one wrote."""
    astray = {path.name: without_encoding(path) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert {name: lines for name, lines in astray.items() if lines} == {}


def test_no_test_file_imports_another() -> None:
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    astray = [
        f"{path.name} imports {name}" for path in (ROOT / "tests").rglob("*.py")
        for name in {imported.split(".")[0] for imported in Imports(path).names} & names
    ]  # fmt: skip
    assert not astray


def test_kernels_is_no_package() -> None:
    """A top-level import name `kernels` would hide the Hugging Face package that transformers looks for."""
    assert not [path for path in ROOT.rglob("__init__.py") if path.parent.name == "kernels" and ".venv" not in path.parts]


def test_no_file_is_read_as_a_pickle() -> None:
    """Reading one runs what it says. Objects that ranks of one run send each other are another matter."""
    astray = []
    for name, path in modules().items():
        if {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & Imports(path).names:
            astray.append(f"{name} imports a pickle")
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                astray.append(f"{name}:{node.lineno} torch.load without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("trust_remote_code", "False") != "False":
                astray.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not astray
