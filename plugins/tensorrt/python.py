"""The operators as TensorRT plugins written in Python: for development machines, and to build engines without a kernel library.

``register_plugins(trt)`` makes them known to ``tensorrt`` or ``tensorrt_rtx``. They take and give the same shapes, types and
fields as the C++ plugins (``csrc/tensorrt/plugin.cpp``), so an engine that was built with one runs with the other. ``enqueue``
runs the Triton kernels through PyTorch on TensorRT's stream and needs both packages; building an engine needs neither.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np

from bilevel import contract
from bilevel.errors import BilevelError, ContractError, KernelError
from bilevel.plugins.launch.launches import ALIGNMENT
from bilevel.plugins.launch.plans import plans_everywhere
from bilevel.plugins.tensorrt.fields import (
    Field,
    PluginNode,
    geometry_of,
    largest_sizes,
    read_fields,
    workspace_limit,
    write_fields,
)

_FLOATS = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}  # TensorRT's names of a model's float types
_FIXED = {"int32": "INT32", "float32": "FLOAT"}
_NUMPY = {"INT32": np.int32, "FLOAT32": np.float32, "CHAR": np.uint8, "INT64": np.int64}
_Result = TypeVar("_Result")
_log = logging.getLogger("bilevel.tensorrt")  # TensorRT's own logger does not reach Python plugins


class _Bytes:
    """Memory on the GPU as PyTorch imports it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def tensor_at(address: int, shape: Sequence[int], dtype: str, device: str) -> Any:
    """The memory at ``address`` as a tensor, without a copy; device: "cuda" or "cpu"."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    size = math.prod(shape) * kind.itemsize
    if size == 0:
        return torch.empty(tuple(shape), dtype=kind, device=device)
    if device == "cpu":
        memory = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    else:
        memory = torch.as_tensor(_Bytes(address, size), device=device)
    return memory.view(kind).reshape(tuple(shape))


def run_at(
    node: PluginNode, shapes: Sequence[Sequence[int]], addresses: Sequence[int], workspace: int, stream: int, device: str
) -> None:
    """Run an operator on tensors by their addresses, inputs first. Raises ContractError for shapes outside the contract.

    shapes: of the inputs, which decide those of the outputs. node.dtype is the float type. workspace: its address; it must hold
    what ``workspace_limit`` says.
    """
    import torch

    # Loaded here, because Triton's modules are for whoever runs them.
    launch = importlib.import_module("bilevel.plugins.kernels.launch")
    launches = importlib.import_module("bilevel.plugins.launch.launches")
    op, attributes = node.op, dict(node.attributes)
    sizes = op.bind_shapes(shapes)
    dtypes = [port.element_type(node.dtype) for port in (*op.inputs, *op.outputs)]
    every_shape = [*shapes, *op.output_shapes(sizes, attributes)]
    tensors = [tensor_at(*place, device) for place in zip(addresses, every_shape, dtypes, strict=True)]
    inputs, outputs = tensors[: len(op.inputs)], tensors[len(op.inputs) :]
    plans, _ = launch.plans_for(op, inputs, attributes)
    plan = launches.choose_plan(plans, sizes)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)) if device == "cuda" else nullcontext():
        memory = tensor_at(workspace, (plan.workspace_bytes(sizes),), "uint8", device)
        launch.run_plan(op, plan, inputs, outputs, memory, sizes, attributes)


def _most_workspace(node: PluginNode) -> int:
    """Bytes of workspace that calls within node.dims need on any architecture.

    Raises ContractError for what no kernel covers.
    """
    sizes = largest_sizes(node.op, node.dims, [[False] * len(shape) for shape in node.dims])
    geometry, dtype = geometry_of(node, sizes), node.dtype or "float32"
    return max(workspace_limit(plans, sizes) for plans in plans_everywhere(node.op, geometry, dtype).values())


def with_room(num_bytes: int) -> int:
    """Bytes to ask for, so that an address can be rounded up: nobody promises how a workspace is aligned."""
    return num_bytes + ALIGNMENT - 1 if num_bytes else 0


def aligned(workspace: int) -> int:
    """The first address from ``workspace`` on that buffers may begin at."""
    return -(-workspace // ALIGNMENT) * ALIGNMENT


class _Plugin:
    """What every plugin class of ``_plugin_class`` does; ``trt`` is the TensorRT module."""

    trt: Any
    # Where enqueue's addresses lie; the tests, which have no GPU, say "cpu".
    device = "cuda"

    def __init__(self, node: PluginNode) -> None:
        self.node = node
        self.plugin_name, self.plugin_version = node.op.name, str(node.op.version)
        self.plugin_namespace, self.num_outputs = contract.DOMAIN, len(node.op.outputs)
        self.timing_cache_id = f"{node.op.name}/{node.op.version}/{sorted(node.attributes.items())}"

    def _guarded(self, what: str, failed: _Result, work: Callable[[], _Result]) -> _Result:
        """``work()``; a failure is logged and returned as ``failed``, as TensorRT wants it."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 (TensorRT takes a status)
            reason = error if isinstance(error, BilevelError) else f"{type(error).__name__}: {error}"
            _log.error("%s %s: %s", self.node.op.name, what, reason)
            return failed

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        other = type(self)(self.node)
        other.device = self.device
        return other

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        floats = [given for given, port in zip(types, self.node.op.inputs, strict=True) if port.dtype == "T"]
        fixed = {name: getattr(self.trt.DataType, kind) for name, kind in _FIXED.items()}
        return [fixed[port.dtype] if port.dtype in fixed else floats[0] for port in self.node.op.outputs]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], exprs: Any) -> list[Any]:
        op = self.node.op
        sizes = op.bind_shapes([[shape[axis] for axis in range(len(shape))] for shape in inputs])
        values = {dim.sized_by: self.node.attributes[dim.sized_by] for port in op.outputs for dim in port.shape if dim.sized_by}
        constants = {name: exprs.constant(value) for name, value in values.items()}
        return [self.trt.DimsExprs(list(shape)) for shape in op.output_shapes(sizes, constants)]

    def supports_format_combination(self, position: int, descs: Sequence[Any], num_inputs: int) -> bool:
        ports = (*self.node.op.inputs, *self.node.op.outputs)
        given, port, kinds = descs[position].desc, ports[position], self.trt.DataType
        if given.format != self.trt.TensorFormat.LINEAR:
            return False
        if port.dtype in _FIXED:
            return bool(given.type == getattr(kinds, _FIXED[port.dtype]))
        first = next(index for index, other in enumerate(ports) if other.dtype == "T")
        return (
            given.type in [getattr(kinds, name) for name in _FLOATS]
            if first == position
            else given.type == descs[first].desc.type
        )

    def _float_type(self, descs: Sequence[Any]) -> str:
        names = [given.type.name for given, port in zip(descs, self.node.op.inputs, strict=True) if port.dtype == "T"]
        if names and names[0] not in _FLOATS:
            raise ContractError(f"{self.node.op.name} computes in {', '.join(_FLOATS.values())}, not in {names[0]}")
        return _FLOATS[names[0]] if names else ""

    def _profiled(self, inputs: Sequence[Any]) -> PluginNode:
        """The node with what a profile says of its inputs."""
        op = self.node.op
        fixed = [[size >= 0 for size in given.desc.dims] for given in inputs]
        sizes = largest_sizes(op, [tuple(given.max) for given in inputs], fixed)
        dtype = self._float_type([given.desc for given in inputs])
        return dataclasses.replace(self.node, dtype=dtype, dims=tuple(op.input_shapes(sizes)))

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.node = self._profiled(inputs)
        _most_workspace(self.node)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return self._guarded("gets no workspace", 0, lambda: with_room(_most_workspace(self._profiled(inputs))))

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        pass

    def get_fields_to_serialize(self) -> Any:
        self._fields = Fields(self.trt, write_fields(self.node))
        return self._fields.collection

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return self._guarded("refuses these shapes", 1, lambda: self._check(inputs))

    def _check(self, inputs: Sequence[Any]) -> int:
        self.node.op.bind_shapes([tuple(given.dims) for given in inputs])
        return 0

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> int:
        def work() -> int:
            node = dataclasses.replace(self.node, dtype=self._float_type(input_desc))
            shapes = [tuple(given.dims) for given in input_desc]
            run_at(node, shapes, [*inputs, *outputs], aligned(workspace), stream, self.device)
            return 0

        return self._guarded("was not run", 1, work)


class Fields:
    """A PluginFieldCollection, ``collection``, and what it points to: TensorRT keeps neither the fields nor their data."""

    def __init__(self, trt: Any, fields: Sequence[Field]) -> None:
        self._data = [np.array(field.data, dtype=_NUMPY[field.kind]) for field in fields]
        kinds = [getattr(trt.PluginFieldType, field.kind) for field in fields]
        self._fields = [
            trt.PluginField(field.name, data, kind) for field, data, kind in zip(fields, self._data, kinds, strict=True)
        ]
        self.collection = trt.PluginFieldCollection(self._fields)


def _plugin_class(trt: Any) -> Any:
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(_Plugin, *bases):  # type: ignore[misc]
        def __init__(self, node: PluginNode) -> None:
            for base in bases:
                base.__init__(self)
            _Plugin.__init__(self, node)

    Plugin.trt = trt
    return Plugin


def _creator_class(trt: Any, plugin: Any) -> Any:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: contract.Op) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.name = op, op.name
            self.plugin_namespace, self.plugin_version = contract.DOMAIN, str(op.version)
            kinds = {"int": "INT32", "float": "FLOAT32", "string": "CHAR"}
            self._fields = Fields(trt, [Field(a.name, kinds[a.kind], ()) for a in op.attributes])
            self.field_names = self._fields.collection

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = [Field(f.name, f.type.name, f.data.tolist() if f.size else ()) for f in fields]
            return plugin(read_fields(self.op, given, from_plan=phase == trt.TensorRTPhase.RUNTIME))

    return Creator


@functools.cache
def creators(trt: Any) -> tuple[Any, ...]:
    """One plugin creator per operator, of the module ``trt``."""
    make = _creator_class(trt, _plugin_class(trt))
    return tuple(make(op) for op in contract.GPU_OPS)


@functools.cache
def register_plugins(trt: Any) -> None:
    """Make the operators known to ``trt``, ``tensorrt`` or ``tensorrt_rtx``; again and again changes nothing."""
    registry = trt.get_plugin_registry()
    for creator in creators(trt):
        if not registry.register_creator(creator, contract.DOMAIN):
            raise KernelError(
                f"{trt.__name__} has another plugin bilevel.{creator.name} already; "
                "load the kernel library or register these, not both"
            )
