"""The tables of a kernel library as C++ (standard library only): what ``csrc/gpu/kernel_tables.h`` declares.

``variants`` with their plans come from ``plugins/library/build.py``; the machine code is included from files.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bilevel import contract
from bilevel.errors import KernelError
from bilevel.plugins.launch.launches import Geometry, Launch, LaunchPlan
from bilevel.plugins.launch.plans import RUNTIME_SIZES

CodeKey = tuple[tuple[object, ...], int]  # (Launch.code, architecture)
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.LtE: "<="}


@dataclass(frozen=True)
class Kernel:
    """Machine code in the file ``image``, beside the source; the fields of ``csrc/gpu/kernel_tables.h``."""

    symbol: str
    image: Path
    arch: int
    cuda: int
    threads: int
    shared: int
    scratch: int


@dataclass(frozen=True)
class Variant:
    """An operator in one geometry and data type, planned for every architecture; ``built``: those whose kernels are wanted."""

    op: contract.Op
    geometry: Geometry
    dtype: str
    plans: Mapping[int, tuple[LaunchPlan, ...]]
    built: tuple[int, ...]


def fixed_values(op: contract.Op, geometry: Geometry) -> dict[str, int | str]:
    """What of a geometry is fixed in machine code: all but the attributes of kind float, which are arguments."""
    floats = {attribute.name for attribute in op.attributes if attribute.kind == "float"}
    return {name: geometry[name] for name in sorted(geometry) if name not in floats}


def expression(text: str, geometry: Geometry) -> str:
    """An expression of ``plugins/launch/launches.py`` in C++; sizes of a call are members of ``z``. Raises KernelError."""

    def emit(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return f"Number({node.value})"
        if isinstance(node, ast.Name) and node.id in RUNTIME_SIZES:
            return f"Number(z.{node.id})"
        if isinstance(node, ast.Name) and isinstance(geometry.get(node.id), int):
            return f"Number({geometry[node.id]})"
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return f"({emit(node.left)} {_OPERATORS[type(node.op)]} {emit(node.right)})"
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
            return f"({emit(node.left)} {_OPERATORS[type(node.ops[0])]} {emit(node.comparators[0])})"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return f"{node.func.id}({', '.join(map(emit, node.args))})"
        raise KernelError(f"{ast.unparse(node)!r} in {text!r} cannot be said in C++")

    return emit(ast.parse(text, mode="eval").body)


@dataclass
class _Writer:
    """Collects definitions; equal ones are written once."""

    indices: Mapping[CodeKey, int]
    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def define(self, letter: str, head: str, body: str) -> str:
        """The name of a definition; ``head`` has a place for it."""
        key = head + body
        if key not in self.names:
            self.names[key] = f"{letter}{len(self.names)}"
            self.lines.append(f"{head.format(self.names[key])}{body}")
        return self.names[key]

    def array(self, letter: str, kind: str, items: Sequence[str]) -> str:
        """The name of an array of constants; ``nullptr`` for none."""
        return self.define(letter, f"const {kind} {{}}[] = ", f"{{{', '.join(items)}}};") if items else "nullptr"

    def function(self, text: str, geometry: Geometry) -> str:
        body = expression(text, geometry)
        unused = "" if "z." in body else " /*z*/"
        return self.define("f", "Number {}" + f"(const Sizes&{unused or ' z'})", f" {{ return {body}; }}")

    def launch(self, variant: Variant, plan: LaunchPlan, launch: Launch, arch: int) -> str:
        op = variant.op
        places: dict[str, int] = {}
        for name in (*(p.name for p in (*op.inputs, *op.outputs)), *(buffer.name for buffer in plan.buffers)):
            places[name] = len(places)
        attributes = [attribute.name for attribute in op.attributes]
        items = []
        for argument in launch.arguments:
            if argument.kind.startswith("*"):
                items.append(f"{{ArgumentKind::kPointer, {places[argument.value]}, nullptr}}")
            elif argument.kind == "float32":
                items.append(f"{{ArgumentKind::kFloat32, {attributes.index(argument.value)}, nullptr}}")
            else:
                items.append(f"{{ArgumentKind::kInt32, 0, {self.function(argument.value, variant.geometry)}}}")
        arguments = self.array("a", "Argument", items)
        grid = ", ".join(self.function(size, variant.geometry) for size in launch.grid)
        return f"{{{self.indices[launch.code, arch]}, {len(items)}, {arguments}, {{{grid}}}}}"

    def plan(self, variant: Variant, plan: LaunchPlan, arch: int) -> str:
        when = self.function(plan.when, variant.geometry) if plan.when else "nullptr"
        sizes = [f"({buffer.count}) * {contract.DTYPE_BYTES[buffer.kind]}" for buffer in plan.buffers]
        buffers = self.array("b", "Expression", [self.function(size, variant.geometry) for size in sizes])
        wanted = plan.launches if arch in variant.built else ()
        launches = self.array("l", "Launch", [self.launch(variant, plan, launch, arch) for launch in wanted])
        return f'{{"{plan.name}", {when}, {len(plan.buffers)}, {buffers}, {len(wanted)}, {launches}}}'

    def variant(self, variant: Variant) -> str:
        values = fixed_values(variant.op, variant.geometry).items()
        texts = [f'{{"{n}", 0, "{v}"}}' if isinstance(v, str) else f'{{"{n}", {v}, nullptr}}' for n, v in values]
        architectures = []
        for arch, plans in variant.plans.items():
            array = self.array("p", "Plan", [self.plan(variant, plan, arch) for plan in plans])
            architectures.append(f"{{{arch}, {str(arch in variant.built).lower()}, {len(plans)}, {array}}}")
        fixed, listed = self.array("g", "Fixed", texts), self.array("v", "ArchitecturePlans", architectures)
        codes = f"{contract.GPU_OPS.index(variant.op)}, {contract.DTYPE_CODES[variant.dtype]}"
        return f"    {{{codes}, {len(texts)}, {fixed}, {len(architectures)}, {listed}}},\n"


def make_source(variants: Sequence[Variant], kernels: Sequence[Kernel], indices: Mapping[CodeKey, int], info: str) -> str:
    """The C++ file. indices: code -> place in ``kernels``. info: what ``bilevel_library_info`` returns."""
    writer = _Writer(indices)
    listed = "".join(writer.variant(variant) for variant in variants)
    images = {kernel.image: f"image_{n}" for n, kernel in reversed(list(enumerate(kernels)))}
    included = "".join(
        f'asm(".section .rodata\\n.balign 64\\n{name}:\\n.incbin \\"{path.name}\\"\\n.previous\\n");\n'
        f'extern "C" __attribute__((visibility("hidden"))) const unsigned char {name}[];\n'
        for path, name in sorted(images.items(), key=lambda item: item[1])
    )
    rows = "".join(
        f'    {{"{k.symbol}", {images[k.image]}, {k.arch}, {k.cuda}, {k.threads}, {k.shared}, {k.scratch}}},\n' for k in kernels
    )
    definitions = "\n".join(writer.lines)
    text = info.replace("\\", "\\\\").replace('"', '\\"')
    return (
        '// Generated by `bilevel kernels build`.\n#include "kernel_tables.h"\n\n'
        f"{included}\nnamespace bilevel {{\nnamespace {{\n{definitions}\n}}  // namespace\n\n"
        f"const Kernel kKernels[] = {{\n{rows}}};\nconst int32_t kNumKernels = {len(kernels)};\n"
        f"const Variant kVariants[] = {{\n{listed}}};\nconst int32_t kNumVariants = {len(variants)};\n"
        f'const char kInfo[] = "{text}";\n}}  // namespace bilevel\n'
    )
