"""What the compilers make of the kernels, on a machine without a GPU: no spills, no atomics, and full-width accesses."""

import json
import subprocess
import sys

import pytest
from support.helpers import ROOT, environment

pytestmark = pytest.mark.processes
TESTS = ROOT / "tests" / "support"

NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
# At four elements a thread an fp32 tensor moves in 128-bit and a bf16 tensor in 64-bit accesses, one a
# thread and block. Tensors: fp32 loaded, bf16 loaded, fp32 stored, bf16 stored; then the sums over a block. A sum takes
# one barrier or two, by the release of Triton, as it does in `log_prob_fwd`, which is one sum and nothing else; and there
# is one more between two sums, which share their memory. `sde_step_fwd` sums within a warp, where there is nothing to wait
# for; in a large batch a thread has four blocks.
EXPECTED = {
    "normal_fwd": ((0, 0, 1, 0), 0),
    "sde_step_fwd fp32": ((2, 0, 1, 0), 0),
    "sde_step_fwd bf16": ((1, 2, 2, 1), 0),
    "sde_step_fwd uneven": ((1, 2, 2, 1), 0),
    "sde_step_fwd large fp32": ((8, 0, 4, 0), 0),
    "sde_step_fwd large bf16": ((4, 8, 8, 4), 0),
    "transition_fwd fp32": ((5, 0, 0, 0), 3),
    "transition_fwd bf16": ((4, 2, 0, 0), 3),
    "transition_bwd fp32": ((5, 0, 1, 0), 0),
    "transition_bwd bf16": ((4, 2, 0, 2), 0),
    "guided_velocity_fwd fp32": ((2, 0, 1, 0), 0),
    "guided_velocity_fwd bf16": ((0, 2, 1, 0), 0),
}
# How many blocks a program of each kernel that guides has.
GUIDED = dict.fromkeys(
    ("sde_step_fwd bf16", "sde_step_fwd uneven", "sde_step_fwd odd", "transition_fwd bf16", "transition_bwd bf16",
     "transition_bwd odd", "guided_velocity_fwd fp32", "guided_velocity_fwd bf16", "guided_velocity_fwd odd"), 1,
) | {"sde_step_fwd large bf16": 4}  # fmt: skip
WIDE_ACCESSES = {
    "cuda": ("ld.v4.b32", "ld.v2.b32", "st.v4.b32", "st.v2.b32"),
    "hip": ("load_dwordx4", "load_dwordx2", "store_dwordx4", "store_dwordx2"),
}
# By the start of a case's name. 65536 registers hold 2048 threads, all that a multiprocessor runs, up to 32; 1536 up to 40,
# more than a small batch has; and 768 up to 80, which in a large batch have the elements of 3072.
MAX_REGISTERS = {"": 32, "sde_step_fwd": 40, "sde_step_fwd large": 80}


@pytest.fixture(scope="module")
def report() -> dict:
    """Of a process in which triton is a compiler and not an interpreter."""
    command = (sys.executable, str(TESTS / "compile_kernels.py"))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_spills(report):
    assert {name: entry["spills"] for name, entry in report.items() if entry["spills"]} == {}


def test_no_atomics(report):
    """Their order is the hardware's: of the same numbers another sum each time, and a ratio beside 1."""
    assert {name: entry["atomics"] for name, entry in report.items() if entry["atomics"]} == {}


def test_occupancy(report):
    """Of rows that are aligned."""
    registers = {name: entry["registers"] for name, entry in report.items() if name.endswith(NVIDIA) and "odd" not in name}
    most = {name: max(count for start, count in MAX_REGISTERS.items() if name.startswith(start)) for name in registers}
    assert {name: count for name, count in registers.items() if count > most[name]} == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", EXPECTED)
def test_wide_accesses_and_no_detour(report, case, target):
    entry = report[f"{case} {target}"]
    accesses, sums = EXPECTED[case]
    barriers = sums * report[f"log_prob_fwd {target}"]["barriers"] + max(0, sums - 1)
    names = WIDE_ACCESSES["cuda" if target in NVIDIA else "hip"]
    assert tuple(entry["access"].get(name, 0) for name in names) == accesses
    # A further barrier would mean that a block changes its layout through shared memory.
    assert entry["barriers"] == barriers
    assert not any("16" in name or "short" in name for name in entry["access"])


@pytest.mark.parametrize("target", NVIDIA)
def test_guidance_is_one_expression_everywhere(report, target):
    """A difference and one fma for each of a thread's four elements, in every kernel that guides: the same bits."""
    found = {name: entry["guidance"] for name, entry in report.items() if name.endswith(target) and entry["guidance"]}
    assert found == {f"{case} {target}": {"sub": 4 * blocks, "fma": 4 * blocks} for case, blocks in GUIDED.items()}


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_a_block_of_a_large_batch_has_the_arithmetic_of_a_small_one(report, dtype, target):
    """The compiler fuses in each block what it fuses in a program's only one: the same bits in a batch of any size."""
    small, large = (report[f"sde_step_fwd {size}{dtype} {target}"]["arithmetic"] for size in ("", "large "))
    assert large == {name: 4 * count for name, count in small.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_odd_sizes_fall_back_to_narrow_accesses(report, target):
    """Their rows are not aligned: a wide access would fault."""
    for case in ("sde_step_fwd odd", "guided_velocity_fwd odd"):
        entry = report[f"{case} {target}"]
        assert not any(name in entry["access"] for names in WIDE_ACCESSES.values() for name in names)
