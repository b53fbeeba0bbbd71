"""Compiles every kernel for four targets, without a GPU, and prints what the compilers made of it as JSON.

Run by test_kernel_compile.py in a process of its own, because the tests import triton in interpreter mode. By
hand:

    PYTHONPATH=kernels python tests/support/compile_kernels.py
"""

import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo_kernels.common import BLOCK, THREADS
from fastgrpo_kernels.guidance import guided_velocity_fwd_kernel
from fastgrpo_kernels.philox import normal_fwd_kernel
from fastgrpo_kernels.sde_step import SUM, UNROLLED, log_prob_fwd_kernel, sde_step_fwd_kernel
from fastgrpo_kernels.transition import moments_fwd_kernel, transition_bwd_kernel, transition_fwd_kernel

# What no driver tells is read from the files: resources from the cubin or the assembly, widths from the text.
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

INT64_POINTERS = ("step", "seed", "iteration", "sample_id")
SCALARS = {"D": "i32", "BLOCKS": "i32", "SUMS": "i32", "table_stride": "i32", "guidance_scale": "fp32"}
BF16 = dict.fromkeys(("v", "v_uncond", "x_next_model", "dv", "dv_uncond"), "*bf16")
UNGUIDED = dict.fromkeys(("v_uncond", "v_guided", "x_next_model", "dv_uncond"))
CONSTANTS = {"BLOCK": BLOCK, "SUM": SUM}
EVEN, UNEVEN = {"UNROLL": 1, "EVEN": True}, {"UNROLL": 1, "EVEN": False}
LARGE = {"UNROLL": UNROLLED, "EVEN": True}

# Kernel, the arguments that are not fp32 pointers (a type, or the value of a constant; None: absent), and whether D is a
# multiple of 16.
CASES = {
    "normal_fwd": (normal_fwd_kernel, {}, True),
    "normal_fwd odd": (normal_fwd_kernel, {}, False),
    "sde_step_fwd fp32": (sde_step_fwd_kernel, UNGUIDED | EVEN, True),
    "sde_step_fwd bf16": (sde_step_fwd_kernel, BF16 | EVEN, True),
    "sde_step_fwd uneven": (sde_step_fwd_kernel, BF16 | UNEVEN, True),
    "sde_step_fwd odd": (sde_step_fwd_kernel, BF16 | UNEVEN, False),
    "sde_step_fwd large fp32": (sde_step_fwd_kernel, UNGUIDED | LARGE, True),
    "sde_step_fwd large bf16": (sde_step_fwd_kernel, BF16 | LARGE, True),
    "log_prob_fwd": (log_prob_fwd_kernel, {}, True),
    "transition_fwd fp32": (transition_fwd_kernel, UNGUIDED, True),
    "transition_fwd bf16": (transition_fwd_kernel, BF16, True),
    "transition_bwd fp32": (transition_bwd_kernel, UNGUIDED, True),
    "transition_bwd bf16": (transition_bwd_kernel, BF16, True),
    "transition_bwd odd": (transition_bwd_kernel, BF16, False),
    "moments_fwd": (moments_fwd_kernel, {}, True),
    "guided_velocity_fwd fp32": (guided_velocity_fwd_kernel, {}, True),
    "guided_velocity_fwd bf16": (guided_velocity_fwd_kernel, BF16, True),
    "guided_velocity_fwd odd": (guided_velocity_fwd_kernel, BF16, False),
}


def compile_case(kernel, types: dict[str, str | int | None], divisible: bool, target: GPUTarget):
    """As a launch with 16-byte aligned tensors would."""
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        default = "*i64" if name in INT64_POINTERS else SCALARS.get(name, "*fp32")
        signature[name] = (CONSTANTS | types).get(name, default)
        if not isinstance(signature[name], str):
            signature[name], constants[name] = "constexpr", signature[name]
        if signature[name].startswith("*") or name == "D" and divisible:
            hints[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": THREADS // target.warp_size}
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=options)


def guidance_arithmetic(ptx: str) -> dict[str, int]:
    """The float32 operations of a thread that the compiler says are made of guidance.py, whichever kernel it is part of.

    Rounding to nearest is left out of their names, as some have it by default, and so is an operand that is read as bf16;
    a pair in one instruction counts twice.
    """
    operation = re.compile(r"\s*((?:add|sub|mul|fma)[.\w]*?)(?:\.rn)?\.f32(x2)?(?:\.bf16)?\s")
    found, inside = Counter(), False
    for line in ptx.splitlines():
        if line.lstrip().startswith(".loc"):
            inside = "// guidance.py:" in line
        elif inside and (instruction := operation.match(line)):
            found[instruction[1]] += 2 if instruction[2] else 1
    return dict(found)


def nvidia_report(assembly: dict) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        instructions = subprocess.check_output([TOOLS / "nvdisasm", file.name], text=True, stderr=subprocess.DEVNULL)
    access = re.compile(r"(ld|st)\.global[.\w:]*?((?:\.v\d)?\.b\d+)")
    # STACK holds what ptxas spills and LOCAL what it indexes.
    resources = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {
        "registers": resources["REG"],
        "spills": resources["STACK"] + resources["LOCAL"],
        "barriers": assembly["ptx"].count("bar.sync"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.global\b", assembly["ptx"])),
        "access": dict(Counter(kind + width for kind, width in access.findall(assembly["ptx"]))),
        "guidance": guidance_arithmetic(assembly["ptx"]),
        "arithmetic": dict(Counter(re.findall(r"\b((?:FADD|FMUL|FFMA|MUFU|SHFL)[.\w]*) ", instructions))),
    }


def amd_report(assembly: dict) -> dict:
    text = assembly["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    access = re.compile(r"(?:global|buffer)_((?:load|store)_\w+)")
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        "barriers": text.count("s_barrier"),
        "atomics": len(re.findall(r"\b(?:global|buffer|flat)_atomic_", text)),
        "access": dict(Counter(access.findall(text))),
    }


def main() -> None:
    # One warning a compilation announces a new default for fma fusion; the kernels spell out the fma that
    # matters.
    warnings.simplefilter("ignore")
    report = {}
    for case, (kernel, types, divisible) in CASES.items():
        for name, target in TARGETS.items():
            assembly = compile_case(kernel, types, divisible, target).asm
            read = nvidia_report if target.backend == "cuda" else amd_report
            report[f"{case} {name}"] = read(assembly)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
