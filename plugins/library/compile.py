"""Ahead-of-time compilation of the kernels, for any known architecture on any machine: no GPU and no driver is asked."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from bilevel.errors import KernelError, require
from bilevel.plugins.launch.launches import Launch
from bilevel.plugins.launch.tiles import shared_limit
from bilevel.plugins.library.assemblers import Assembler

_KINDS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "int64": "i64"}
_POINTER_BYTES = 16  # what every pointer is a multiple of


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code: ``symbol`` in ``cubin``, ``shared`` bytes of dynamic shared memory, ``threads`` in a program.

    Its parameters are the launch's arguments in order, then ``scratch`` pointers to memory that these kernels do not use: null.
    """

    symbol: str
    cubin: bytes
    shared: int
    threads: int
    scratch: int


def compile_launch(launch: Launch, arch: int, assembler: Assembler | None = None) -> Compiled:
    """Compile a launch's kernel for an architecture as in 87; ``assembler``: by which (None: Triton's own).

    Raises KernelError where the machine code needs more shared memory than the architecture has, MissingDependency without
    Triton.
    """
    limit, triton = shared_limit(arch), require("triton")
    function = getattr(importlib.import_module(f"bilevel.plugins.kernels.{launch.module}"), launch.kernel)
    if triton.knobs.runtime.interpret:
        raise KernelError("TRITON_INTERPRET is set, so nothing can be compiled; unset it and start again")
    signature = {a.name: f"*{_KINDS[a.kind[1:]]}" if a.kind.startswith("*") else _KINDS[a.kind] for a in launch.arguments}
    signature |= dict.fromkeys(launch.constants, "constexpr")
    aligned = {(n,): [["tt.divisibility", _POINTER_BYTES]] for n, a in enumerate(launch.arguments) if a.kind.startswith("*")}
    source = require("triton.compiler").ASTSource(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs=dict(launch.constants),
        attrs=aligned,
    )
    options: dict[str, Any] = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    target = require("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it would hold the paths of this machine
        if assembler is not None:
            options["ptx_version"] = assembler.ptx_version
            triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell = str(assembler.path)
        compiled = triton.compile(source, target=target, options=options)
    data = compiled.metadata
    if data.shared > limit:
        raise KernelError(f"{launch.kernel} takes {data.shared} bytes of shared memory; sm_{arch} has {limit}")
    if data.global_scratch_size or data.profile_scratch_size:
        raise KernelError(f"{launch.kernel} takes scratch memory on sm_{arch}, which no launcher gives; choose smaller tiles")
    scratch = count_parameters(compiled.asm["ptx"], data.name) - len(launch.arguments)
    return Compiled(data.name, compiled.asm["cubin"], data.shared, 32 * data.num_warps, scratch)


def count_parameters(ptx: str, symbol: str) -> int:
    """Parameters of a kernel in PTX.

    Behind its arguments Triton adds pointers to scratch memory: two since 3.4, fewer before.
    """
    entry = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\((.*?)\)\s", ptx, re.DOTALL)
    if entry is None:
        raise KernelError(f"the compiled code has no kernel {symbol}; install the Triton that PyTorch was built with")
    return entry[1].count(".param")
