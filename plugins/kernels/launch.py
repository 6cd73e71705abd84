"""The operators on tensors, by the Triton kernels: what ``plans`` describes, run with PyTorch's memory and stream."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch.launches import MAX_GRID, Launch, LaunchPlan, choose_plan, evaluate
from bilevel.plugins.launch.plans import RUNTIME_SIZES, plans
from bilevel.plugins.launch.tiles import nearest_architecture


@functools.lru_cache(maxsize=256)
def _cached_plans(name: str, geometry: tuple[tuple[str, Any], ...], dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    return plans(contract.BY_NAME[name], dict(geometry), dtype, arch)


@functools.lru_cache(maxsize=16)
def _architecture(device: torch.device) -> int:
    """A GPU's architecture as the tiles know it; what the interpreter pretends to be otherwise."""
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        raise ContractError("the kernels are made for NVIDIA's GPUs; elsewhere the PyTorch forms run")
    major, minor = torch.cuda.get_device_capability(device)
    return nearest_architecture(10 * major + minor)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def plans_for(
    op: contract.Op, tensors: Sequence[Tensor], attributes: dict[str, Any]
) -> tuple[tuple[LaunchPlan, ...], dict[str, int]]:
    """(the operator's plans for these tensors, the sizes of the call). Raises ContractError for what no kernel covers."""
    sizes = op.bind_shapes([tensor.shape for tensor in tensors])
    fixed = {name: size for name, size in sizes.items() if name not in RUNTIME_SIZES}
    geometry = {**fixed, **op.with_defaults(attributes)}
    dtype = _dtype_name(tensors[0])
    return _cached_plans(op.name, tuple(sorted(geometry.items())), dtype, _architecture(tensors[0].device)), sizes


def covers(op: contract.Op, tensors: Sequence[Tensor], attributes: dict[str, Any]) -> bool:
    """Whether the kernels run ``op`` on these inputs: their sizes, one device, a GPU that is new enough."""
    if any(tensor.device != tensors[0].device for tensor in tensors):
        return False
    try:
        plans_for(op, tensors, attributes)
    except ContractError:
        return False
    return True


def run(op: contract.Op, tensors: Sequence[Tensor], attributes: dict[str, Any]) -> Any:
    """The outputs of ``op``; inputs as ``bilevel.ops`` checks them. Raises ContractError for what no kernel covers."""
    plans_of_op, sizes = plans_for(op, tensors, attributes)
    device, dtypes = tensors[0].device, op.output_dtypes(_dtype_name(tensors[0]))
    outputs = [
        torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for shape, dtype in zip(op.output_shapes(sizes, attributes), dtypes, strict=True)
    ]
    plan = choose_plan(plans_of_op, sizes)
    workspace = torch.empty(plan.workspace_bytes(sizes), dtype=torch.uint8, device=device)
    run_plan(op, plan, tensors, outputs, workspace, sizes, attributes)
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def run_plan(
    op: contract.Op,
    plan: LaunchPlan,
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    workspace: Tensor,
    sizes: dict[str, int],
    attributes: dict[str, Any],
) -> None:
    """Run one plan into ``outputs`` (contiguous), with ``workspace`` uint8 [at least plan.workspace_bytes(sizes)]."""
    device = tensors[0].device
    arrays = {port.name: tensor.contiguous() for port, tensor in zip(op.inputs, tensors, strict=True)}
    arrays |= {port.name: tensor for port, tensor in zip(op.outputs, outputs, strict=True)}
    places = plan.offsets(sizes)
    for buffer in plan.buffers:
        first, size = places[buffer.name]
        arrays[buffer.name] = workspace[first : first + size].view(getattr(torch, buffer.kind))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if op.in_place and outputs[0].data_ptr() != tensors[0].data_ptr():
            outputs[0].copy_(tensors[0])
        for launch in plan.launches:
            _launch(launch, arrays, sizes, op.with_defaults(attributes))


def _launch(launch: Launch, arrays: dict[str, Tensor], sizes: dict[str, int], attributes: dict[str, Any]) -> None:
    grid = tuple(evaluate(size, sizes) for size in launch.grid)
    if 0 in grid:
        return
    if any(size > most for size, most in zip(grid, MAX_GRID, strict=True)):
        raise ContractError(f"{launch.kernel} would need a grid of {grid}; a GPU launches {MAX_GRID} at most: split the batch")
    arguments: list[Any] = []
    for argument in launch.arguments:
        if argument.kind == "int32":
            arguments.append(evaluate(argument.value, sizes))
        elif argument.kind == "float32":
            arguments.append(float(attributes[argument.value]))
        else:
            arguments.append(arrays[argument.value])
    kernel = getattr(importlib.import_module(f"bilevel.plugins.kernels.{launch.module}"), launch.kernel)
    kernel[grid](*arguments, **launch.constants, num_warps=launch.tile.warps, num_stages=launch.tile.stages)
