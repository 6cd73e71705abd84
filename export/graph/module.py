"""Any ``nn.Module`` that calls ``bilevel.ops`` -> one ONNX file whose routed nodes carry a portable body.

    save_onnx(module, inputs, path, output_names=[...], dynamic={"x": {1: "tokens"}})

The module is traced once by ``torch.export``. Every operator becomes one node of domain ``bilevel`` and, beside it, a
model-local function of the same name in standard ONNX operators. What would make the export silently wrong is refused by
name (``bilevel.export.graph.guards``).
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError, ExportError
from bilevel.export.graph import guards
from bilevel.export.graph.exact_rules import exact_rules
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.quicker import quicker
from bilevel.export.graph.schemas import ONNX_OPSET, PRIVATE_DOMAIN, translation_table
from bilevel.export.graph.specialise import specialise_functions

Inputs = Mapping[str, Tensor | Sequence[Tensor]]
Dynamic = Mapping[str, Mapping[int, str]]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx reports missing optional packages and shared axis names on every export; neither is for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used.*")
        try:
            yield
        finally:
            logger.setLevel(level)


def _export_error(error: BaseException) -> BilevelError:
    """torch wraps what a shape function raised: dig out our own sentence, or summarise torch's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BilevelError):
            return cause
        cause = cause.__cause__ or cause.__context__
    fixed = re.search(r"marked L\['(\w+)'\](\S*)\.size\(\)\[(\d+)\].* constant \((\d+)\)", str(error))
    if fixed:
        name, index, axis, size = fixed.groups()
        return ExportError(
            f"the module fixes axis {axis} of {name}{index} to {size}, but dynamic names it; compute with the tensor's shape, "
            "not with a number taken from the example"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = lines[0] if lines else type(error).__name__
    return ExportError(f"torch.export could not trace the module ({type(error).__name__}: {summary[:300]}); see --debug")


def flat_names(inputs: Inputs) -> list[str]:
    """One ONNX name per tensor: a sequence ``past`` becomes past.0, past.1, ..."""
    return [
        name if isinstance(value, Tensor) else f"{name}.{index}"
        for name, value in inputs.items()
        for index in range(1 if isinstance(value, Tensor) else len(value))
    ]


def _as_lists(inputs: Inputs) -> dict[str, Tensor | list[Tensor]]:
    """torch.export wants its inputs and their dynamic shapes in containers of one type.

    Copies: it would take two inputs that are one tensor for one input, and the graph would read the first in both places.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) else [tensor.clone() for tensor in value]
        for name, value in inputs.items()
    }


def _dynamic_shapes(inputs: Inputs, dynamic: Dynamic, names: Sequence[str]) -> dict[str, object]:
    """torch.export's ``dynamic_shapes``; ``dynamic`` is keyed by ONNX input name.

    Dim.DYNAMIC rather than named dims: a named one makes torch refuse harmless guards such as "more than one block".
    """
    unknown = set(dynamic) - set(names)
    if unknown:
        raise ExportError(f"dynamic names the input {min(unknown)!r}, but the inputs are {', '.join(names)}")
    flat = iter([dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in names])
    return {key: next(flat) if isinstance(value, Tensor) else [next(flat) for _ in value] for key, value in inputs.items()}


def _name_sizes(model: onnx_ir.Model, dynamic: Dynamic, names: Sequence[str]) -> None:
    """Replace torch's symbols (s70) by the caller's names (capacity) in every shape of the graph."""
    named: dict[str, str] = {}
    for value, name in zip(model.graph.inputs, names, strict=True):
        for axis, size in dynamic.get(name, {}).items():
            found = value.shape[axis] if value.shape else size
            if isinstance(found, int):
                raise ExportError(
                    f"the module fixes {size!r} (axis {axis} of {name}) to {found}; compute with the tensor's shape, "
                    "not with a number taken from the example"
                )
            symbol = str(getattr(found, "value", found))
            if named.setdefault(symbol, size) != size:
                raise ExportError(
                    f"the example tensors give {named[symbol]!r} and {size!r} the same size, so tracing cannot tell them "
                    "apart; use different example sizes"
                )
    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named.get(str(getattr(s, "value", s)), s) for s in value.shape])


def name_values(model: onnx_ir.Model) -> None:
    """Give values the names that ``ops.name_value`` asked for, and drop its nodes."""
    for node in [node for node in model.graph if node.domain == PRIVATE_DOMAIN]:
        value, name = node.inputs[0], node.attributes["name"].value
        assert value is not None
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        value.name = name
    model.opset_imports.pop(PRIVATE_DOMAIN, None)


def _forget_sources(model: onnx_ir.Model) -> None:
    """Drop what torch notes on every node and value: stack traces, with the paths of the machine that exported."""
    graph = model.graph
    values = (value for node in graph.all_nodes() for value in node.outputs)
    for props in (each.metadata_props for each in (*graph.inputs, *graph.initializers.values(), *values)):
        props.clear()
    for props in (model.metadata_props, graph.metadata_props, *(node.metadata_props for node in graph.all_nodes())):
        props.clear()


def _cast_before_norms(model: onnx_ir.Model) -> None:
    """Give every RMSNormalization one type. A norm that a module writes out in fp32 over 16-bit vectors becomes one of two,
    which the standard allows and onnx's own inference refuses."""
    for node in [node for node in model.graph if node.op_type == "RMSNormalization" and not node.domain]:
        x, scale = node.inputs[:2]
        if x is None or scale is None or None in (x.dtype, scale.dtype) or x.dtype == scale.dtype:
            continue
        cast = onnx_ir.node("Cast", [x], attributes={"to": scale.dtype})
        cast.outputs[0].type, cast.outputs[0].shape = scale.type, x.shape
        model.graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])


def trace(module: nn.Module, inputs: Inputs, dynamic: Dynamic, names: Sequence[str]) -> onnx_ir.Model:
    """Trace with example tensors and translate to an ONNX IR model without bodies; the nodes of ``ops.name_value`` still stand.

    Raises ExportError and ContractError.
    """
    shapes = _dynamic_shapes(inputs, dynamic, names)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), _quiet(), quicker(), exact_rules():
            program = torch.export.export(module, (), _as_lists(inputs), dynamic_shapes=shapes, strict=False)
            guards.check_parameters_used(program)
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=ONNX_OPSET, custom_translation_table=translation_table(), verbose=False
            )
    except BilevelError:
        raise
    except Exception as error:
        raise _export_error(error) from error
    finally:
        module.train(was_training)
    assert onnx_program is not None  # only None when torch writes the file itself
    _name_sizes(onnx_program.model, dynamic, names)
    _cast_before_norms(onnx_program.model)
    _forget_sources(onnx_program.model)
    return onnx_program.model


def name_ports(model: onnx_ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs their public names; values that already carry one are moved out of the way."""
    for kind, values, names in (("input", model.graph.inputs, inputs), ("output", model.graph.outputs, outputs)):
        if len(values) != len(names):
            raise ExportError(f"the module has {len(values)} {kind} tensors, but {len(names)} {kind} names were given")
    taken = set(inputs) | set(outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for value, name in zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name


def save_onnx(
    module: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    output_names: Sequence[str],
    input_names: Sequence[str] | None = None,
    dynamic: Dynamic | None = None,
) -> onnx.ModelProto:
    """Export ``module`` to ``path`` (weights beside it, model.onnx: model.data); returns the model without its weights.

    inputs: example tensors by the parameter names of ``module.forward``; a list or tuple of tensors is allowed. Use at least 2
    for every size that shall stay free (torch.export treats a size of 1 as fixed).
    dynamic: {input: {axis: name of the size}}. Errors: ExportError, ContractError, each naming what to change.
    """
    names = list(input_names) if input_names is not None else flat_names(inputs)
    model = trace(module, inputs, dynamic or {}, names)
    name_values(model)
    name_ports(model, names, output_names)
    return write(model, Path(path))


def _written_whole(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    """A transposed view of a weight as a tensor that is copied when it is written: numpy writes a view element by element."""
    array = getattr(tensor, "raw", None)
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous:
        return tensor
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.ascontiguousarray(array), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=onnx_ir.Shape(array.shape),
        name=tensor.name,
    )


def write(ir_model: onnx_ir.Model, path: Path) -> onnx.ModelProto:
    """Write a traced graph whose inputs and outputs have their names, with bodies, to ``path``; see :func:`save_onnx`."""
    for value in ir_model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _written_whole(value.const_value)
    # In a folder of its own first: what is refused, or interrupted, leaves no file and no earlier file is lost.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder) / path.name
        onnx_ir.save(ir_model, written, external_data=f"{path.stem}.data")
        model = onnx.load(written, load_external_data=False)
        guards.check_selections(model.graph)
        model = specialise_functions(attach_functions(model))
        onnx.save(model, written)
        onnx.checker.check_model(str(written), full_check=True)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, path.parent / file.name)
    return model
