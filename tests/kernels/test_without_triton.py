"""Where there is no Triton (macOS, Windows) everything runs on the torch reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import ROOT, environment
from support.without_triton import results


@pytest.mark.processes
def test_everything_runs_on_the_reference(tmp_path: Path) -> None:
    """In a process of its own: this one has triton. It trains there too, as far as imports tell."""
    saved = tmp_path / "results.pt"
    command = (sys.executable, str(ROOT / "tests" / "support" / "without_triton.py"), str(saved))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "normal_fwd_kernel needs Triton, which is not installed" in done.stdout
    found, expected = torch.load(saved), results("_ref")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
