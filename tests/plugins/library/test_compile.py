"""Ahead-of-time compilation without a GPU: real shared memory against the limit and the estimate, arguments, symbols."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel import contract
from bilevel.errors import ContractError, KernelError
from bilevel.machine import SHARED_LIMIT
from bilevel.plugins.launch.plans import plans
from bilevel.plugins.library import sweep
from bilevel.plugins.library.compile import compile_launch, count_parameters
from tests import ROOT
from tests.support import triton_calls  # sets the interpreter up before any kernel is loaded

# Operator, data type, architecture, number of the geometry in the sweep, kernels: every limit, large head dims, small blocks.
SPREAD = [
    ("RoutedAttention", "float16", 87, 0, ["attention_plan", "attention_tiles", "attention_split", "attention_merge"]),
    ("RoutedAttention", "bfloat16", 120, 4, ["attention_tiles"]),
    ("RoutedAttention", "float16", 100, 6, ["attention_tiles"]),
    ("CoarseRoute", "bfloat16", 86, 4, ["coarse_route_tiles"]),
    ("CoarseRoute", "float32", 80, 1, ["coarse_route_split", "coarse_route_merge"]),
    ("FineRoute", "float16", 89, 0, ["fine_route_rows"]),
    ("ExpertRoute", "float32", 110, 0, ["expert_route_rows"]),
    ("RoutedExperts", "bfloat16", 90, 2, ["expert_order", "tile_hidden", "expert_offsets"]),
]
PROGRAM = """
import json, sys
from bilevel import contract
from bilevel.plugins.library import sweep
from bilevel.plugins.launch.plans import plans
from bilevel.plugins.library.compile import compile_launch

for name, dtype, arch, number, kernels in json.loads(sys.stdin.read()):
    geometry = list(sweep.geometries(name))[number]
    made = plans(contract.BY_NAME[name], geometry, dtype, arch)
    last = {launch.kernel: launch for plan in made for launch in plan.launches}
    for kernel in kernels:
        code = compile_launch(last[kernel], arch)
        found = {"kernel": kernel, "arch": arch, "shared": code.shared, "estimate": last[kernel].tile.shared}
        found |= {"symbol": code.symbol.encode() in code.cubin, "elf": code.cubin[:4] == b"\\x7fELF", "threads": code.threads}
        found |= {"scratch": code.scratch}
        print(json.dumps({**found, "warps": last[kernel].tile.warps}))
"""


def run_without_interpreter(arguments: list[str], folder: Path, text: str = "") -> str:
    """The output of a Python process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *arguments], check=False, input=text, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.thorough
def test_compiled_kernels_keep_the_limit_and_the_estimate(tmp_path: Path) -> None:
    lines = run_without_interpreter(["-c", PROGRAM], tmp_path, json.dumps(SPREAD)).splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [line["kernel"] for line in found] == [kernel for *_, kernels in SPREAD for kernel in kernels]
    for line in found:
        assert line["shared"] <= line["estimate"] <= SHARED_LIMIT[line["arch"]], line
        assert line["symbol"] and line["elf"] and line["threads"] == 32 * line["warps"] and line["scratch"] == 2, line
    largest = {line["kernel"]: line["shared"] / line["estimate"] for line in found}
    assert largest["attention_split"] > 0.5 and largest["attention_tiles"] > 0.3  # the estimates are not mere guesses


def test_sweep_prints_a_line_for_every_operator(tmp_path: Path) -> None:
    arguments = ["-m", "bilevel.plugins.library.sweep", "--arch", "sm_90", "--dtype", "float16", "--op", "ExpertRoute"]
    lines = run_without_interpreter(arguments, tmp_path).splitlines()
    assert lines[0].startswith("sm_90 float16 ExpertRoute: 4 kernels, ") and "limit 232448" in lines[0]
    assert lines[1] == "4 kernels compiled, 0 above their estimate of shared memory, none above its limit"


def test_arguments_are_the_kernels_parameters() -> None:
    """In their order, with a constant for every parameter that is one."""
    for op in contract.GPU_OPS:
        for launch in sweep.variants(op.name, "float16", 90):
            kernel = getattr(importlib.import_module(f"bilevel.plugins.kernels.{launch.module}"), launch.kernel)
            constants = [name for name in kernel.arg_names if name.isupper()]
            assert [argument.name for argument in launch.arguments] == kernel.arg_names[: -len(constants)], launch.kernel
            assert set(launch.constants) == set(constants), launch.kernel


def test_compiling_in_the_interpreter_is_refused() -> None:
    assert triton_calls.run_kernels
    (plan,) = plans(contract.EXPERT_ROUTE, next(sweep.geometries("ExpertRoute")), "float32", 90)
    with pytest.raises(KernelError, match="TRITON_INTERPRET is set, so nothing can be compiled; unset it and start again"):
        compile_launch(plan.launches[0], 90)
    with pytest.raises(ContractError, match="no architecture sm_75"):
        compile_launch(plan.launches[0], 75)


def test_parameters_are_counted() -> None:
    """In the kernel's own list, whatever functions stand beside it."""
    ptx = (
        ".func other(.param .b32 a)\n{}\n"
        ".visible .entry f(\n\t.param .u64 .ptr .global .align 1 f_0,\n\t.param .u32 f_1\n)\n.reqntid 128\n{}"
    )
    assert count_parameters(ptx, "f") == 2
    with pytest.raises(KernelError, match="has no kernel g; install the Triton that PyTorch was built with"):
        count_parameters(ptx, "g")


def test_no_size_of_a_call_is_specialised() -> None:
    """Triton makes a specialisable whole number of 1 a constant, which has no ``to``: a call of one token would not compile."""
    found = set()
    for op in contract.GPU_OPS:
        for geometry in sweep.geometries(op.name):
            for launch in (launch for plan in plans(op, geometry, "float16", 80) for launch in plan.launches):
                module = importlib.import_module(f"bilevel.plugins.kernels.{launch.module}")
                wholes = {argument.name for argument in launch.arguments if argument.kind == "int32"}
                # The interpreter, which this process has Triton use, keeps what the decorator was told.
                given = getattr(module, launch.kernel).kwargs["do_not_specialize"]
                found |= {(launch.kernel, name) for name in wholes - set(given or ())}
    assert not found
