"""The house: three floors, no circle, arrows that only run down. See the floors in `FLOORS`, from the ground up."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    ["fastgrpo_kernels"],
    [],  # everything that is named nowhere else
    ["fastgrpo.trainer", "fastgrpo.commands", "fastgrpo.__main__", "fastgrpo.train", "fastgrpo.rewards.make_prompts"],
]
# Libraries that one place alone may know, so that the rest does not depend on them.
HOMES = {
    "deepspeed": ["fastgrpo.engine.zero"],
    "diffusers": ["fastgrpo.models", "fastgrpo.testing", "fastgrpo.tiny.pretrain"],
    "transformers": ["fastgrpo.models", "fastgrpo.rewards", "fastgrpo.testing", "fastgrpo.tiny.pretrain"],
    "httpx2": ["fastgrpo.rewards.judge", "fastgrpo.rewards.serving.remote"],
    "peft": ["fastgrpo.models"],
    "triton": ["fastgrpo_kernels.optional_triton"],
    "fastapi": ["fastgrpo.rewards.serving.service"],
    "uvicorn": ["fastgrpo.rewards.serving.service"],
}


def modules() -> dict[str, Path]:
    """Every module of the two packages by name."""
    found = {}
    for base, package in ((ROOT, "fastgrpo"), (ROOT / "kernels", "fastgrpo_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """What a file imports anywhere, functions included; `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def arrows() -> dict[str, set[str]]:
    """Module -> modules of the project that it imports. `from package import module` is an arrow to the module alone."""
    known = modules()
    graph = {}
    for name, path in known.items():
        targets = imports(path) & known.keys() - {name}
        graph[name] = {t for t in targets if not any(other.startswith(t + ".") for other in targets)}
    return graph


def within(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def floor(name: str) -> int:
    return next((i for i, names in enumerate(FLOORS) if within(name, names)), 1)


def test_arrows_never_run_up() -> None:
    up = [f"{a} -> {b}" for a, targets in arrows().items() for b in targets if floor(b) > floor(a)]
    assert not up


def test_every_module_is_read() -> None:
    assert len(modules()) > 25
    assert {floor(name) for name in modules()} == {0, 1, 2}


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
        for imported in imports(path):
            homes = HOMES.get(imported.split(".")[0])
            if homes and not within(name, homes):
                astray.append(f"{name} imports {imported}")
    assert not astray


def test_kernels_is_no_package() -> None:
    """A top-level import name `kernels` would hide the Hugging Face package that transformers looks for."""
    assert not [path for path in ROOT.rglob("__init__.py") if path.parent.name == "kernels" and ".venv" not in path.parts]
