"""The set-up of the tests and of their child processes: packages, devices, and the releases that go together."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT, environment

import fastgrpo
from fastgrpo import interpreter
from fastgrpo.interpreter import use_interpreter


def child(code: str, *paths: Path, **settings: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment(*paths, **settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_children_see_what_the_callers_path_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the project and what the test itself adds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    for folder, names in {"carried": ("only_carried", "twice", "fastgrpo"), "given": ("twice",)}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("")
    code = "import only_carried, twice, fastgrpo as own; print(only_carried.__file__, twice.__file__, own.__file__)"
    only_carried, twice, own = (Path(place) for place in child(code, tmp_path / "given").split())
    assert only_carried.parent == tmp_path / "carried" and twice.parent == tmp_path / "given"
    assert own.is_relative_to(ROOT)


@pytest.mark.processes
def test_children_are_no_ranks_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert child("import os; print(os.environ.keys() & {'RANK', 'TRITON_INTERPRET'}, os.environ['A'])", A="b") == "set() b\n"


def test_without_the_mark_no_process_is_started() -> None:
    for start in (lambda: subprocess.run(["true"]), multiprocessing.get_context("spawn").Process(target=print).start):
        with pytest.raises(pytest.fail.Exception, match="give it the mark `processes`"):
            start()


def installed(monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str) -> None:
    """As in a process that has not imported triton yet."""
    monkeypatch.setattr(interpreter, "version", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    monkeypatch.delitem(sys.modules, "triton", raising=False)


APART = [("3.6.0", "2.4.6"), ("3.6.1+git5", "2.10.0"), ("3.6.0", "3.0.0")]
TOGETHER = [("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.10.0", "2.5.2"), ("4.0.0", "3.0.0")]


@pytest.mark.parametrize(("triton", "numpy"), APART)
def test_an_interpreter_that_this_numpy_breaks_is_refused(triton: str, numpy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, triton, numpy)
    with pytest.raises(RuntimeError) as refused:
        use_interpreter()
    for part in (f"triton {triton}", f"numpy {numpy}", "pip install 'numpy<2.4'", "triton>=3.7"):
        assert part in str(refused.value)
    assert os.environ["TRITON_INTERPRET"] == ""


@pytest.mark.parametrize(("triton", "numpy"), TOGETHER)
def test_releases_that_go_together_are_taken(triton: str, numpy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, triton, numpy)
    use_interpreter()
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.processes
def test_the_interpreter_is_there_before_triton_or_not_at_all() -> None:
    use = "from fastgrpo.interpreter import use_interpreter\n"
    assert child(use + "use_interpreter()\nimport triton; print(triton.knobs.runtime.interpret)") == "True\n"
    late = child(use + "import triton\ntry: use_interpreter()\nexcept RuntimeError as error: print(error)")
    assert "triton was imported before, as a compiler" in late


def test_every_place_says_the_same_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fastgrpo.__version__}\n" in citation
    assert f"## [{fastgrpo.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
