"""How a kernel launch is described: the one form that the Python launcher (``plugins/kernels/launch.py``), the ahead-of-time
compiler (``plugins/library/compile.py``) and a C launcher follow (standard library only). ``plugins/launch/plans.py`` describes
every operator in it.

A ``LaunchPlan`` is a list of buffers in the workspace and a list of launches. What is known when kernels are compiled (the
geometry) is in the launches' constants; the sizes of a call are names in expressions: the contract's letters and the
attributes' names, with +, -, *, parentheses, ceil_div(a, b), floor_div(a, b), min(a, b), max(a, b) and <=. They are valid C as
well, and ``evaluate`` computes them here; 64-bit integers hold every value.

A launcher must see to this: all tensors are contiguous and 16-byte aligned; the workspace is aligned to ALIGNMENT bytes; an
empty grid is left out; launches run in order on one stream; no dimension of a grid may exceed MAX_GRID.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch.tiles import Tile

Geometry = Mapping[str, Any]  # str -> int, or a string or float for the attributes that are

ALIGNMENT = 256
MAX_GRID = (2**31 - 1, 65535, 65535)

_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "ceil_div": lambda a, b: -(-a // b),
    "floor_div": operator.floordiv,
    "min": min,
    "max": max,
}
_UNKNOWN = "{!r} in {!r} is no size, number or function of plugins/launch/launches.py"
_OPERATORS = (ast.Add, ast.Sub, ast.Mult)


@dataclass(frozen=True)
class Argument:
    """One runtime argument of a kernel.

    ``kind``: "*" and the element type for a pointer, else "int32" or "float32". ``value``: the name of a port or buffer for a
    pointer, an expression for an int32, an attribute for a float32.
    """

    name: str
    kind: str
    value: str


@dataclass(frozen=True)
class Buffer:
    """One array in the workspace: ``count`` elements of type ``kind``."""

    name: str
    kind: str
    count: str


@dataclass(frozen=True)
class Launch:
    """One kernel, a function of ``bilevel.plugins.kernels.<module>``: its arguments in order, its constants, its grid."""

    module: str
    kernel: str
    arguments: tuple[Argument, ...]
    constants: Mapping[str, int]
    grid: tuple[str, str, str]
    tile: Tile  # of which a launcher needs the warps, and of which the estimate of shared memory is tested

    @property
    def code(self) -> tuple[object, ...]:
        """What the machine code depends on; launches in which it is equal share it."""
        kinds = tuple((argument.name, argument.kind) for argument in self.arguments)
        constants = tuple(sorted(self.constants.items()))
        return (self.module, self.kernel, kinds, constants, self.tile.warps, self.tile.stages)


@dataclass(frozen=True)
class LaunchPlan:
    """One way to run an operator, for calls that meet ``when`` (empty: any)."""

    name: str
    when: str
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]

    def offsets(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Buffer name -> (first byte in the workspace, bytes). Every buffer starts at a multiple of ALIGNMENT."""
        offsets, end = {}, 0
        for buffer in self.buffers:
            size = evaluate(buffer.count, sizes) * contract.DTYPE_BYTES[buffer.kind]
            offsets[buffer.name] = (end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return offsets

    def workspace_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of workspace that a call of these sizes needs."""
        return max((-(-(first + size) // ALIGNMENT) * ALIGNMENT for first, size in self.offsets(sizes).values()), default=0)


def _check_expression(node: ast.expr, expression: str) -> None:
    """Raise ContractError for anything that is no expression of this module; names are looked up when it is evaluated."""
    parts: list[ast.expr]
    if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int):
        parts = []
    elif isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.LtE):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and len(node.args) == 2:
        parts = node.args
    else:
        raise ContractError(_UNKNOWN.format(ast.unparse(node), expression))
    for part in parts:
        _check_expression(part, expression)


class _SizeLookup(ast.NodeTransformer):
    """``L`` becomes ``sizes["L"]``; the names of functions stay."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Subscript(ast.Name("sizes", ast.Load()), ast.Constant(node.id), ast.Load())

    def visit_Call(self, node: ast.Call) -> ast.expr:
        return ast.Call(node.func, [self.visit(argument) for argument in node.args], [])


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> Callable[[Mapping[str, int]], int]:
    """The expression as a function of the sizes: it is evaluated for every argument of every launch."""
    tree = ast.parse(expression, mode="eval").body
    _check_expression(tree, expression)
    function = ast.parse("lambda sizes: 0", mode="eval")
    assert isinstance(function.body, ast.Lambda)
    function.body.body = _SizeLookup().visit(tree)
    code = compile(ast.fix_missing_locations(function), f"<{expression}>", "eval")
    value: Callable[[Mapping[str, int]], int] = eval(code, {"__builtins__": {}, **_FUNCTIONS})
    return value


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of an expression of this module. Raises ContractError for anything that is none."""
    try:
        return _compiled(expression)(sizes)
    except KeyError as error:
        raise ContractError(_UNKNOWN.format(error.args[0], expression)) from None


def choose_plan(plans: Sequence[LaunchPlan], sizes: Mapping[str, int]) -> LaunchPlan:
    """The first plan whose condition the sizes meet; the last of an operator's plans has none."""
    return next(plan for plan in plans if not plan.when or evaluate(plan.when, sizes))


class Builder:
    """Makes launches of one operator in one data type; an argument's kind follows from its name."""

    def __init__(self, op: contract.Op, dtype: str, buffers: tuple[Buffer, ...] = (), **values: str) -> None:
        self.kinds = {port.name: port.element_type(dtype) for port in (*op.inputs, *op.outputs)}
        self.kinds |= {buffer.name: buffer.kind for buffer in buffers}
        self.floats = {attribute.name for attribute in op.attributes if attribute.kind == "float"}
        self.values = {"length": "L", "units": "U", "capacity": "M", **values}

    def _argument(self, name: str) -> Argument:
        if name in self.kinds:
            return Argument(name, f"*{self.kinds[name]}", name)
        return Argument(name, "float32", name) if name in self.floats else Argument(name, "int32", self.values[name])

    def launch(self, kernel: str, names: str, constants: Mapping[str, int], grid: tuple[str, str, str], tile: Tile) -> Launch:
        """``kernel``: "module.function". ``names``: the runtime arguments."""
        module, _, function = kernel.partition(".")
        return Launch(module, function, tuple(map(self._argument, names.split())), constants, grid, tile)
