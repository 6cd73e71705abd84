"""The contract's operators as ONNX schemas and as translations of ``torch.ops.bilevel``, both derived from the contract."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import onnx.defs
from onnxscript.values import Opset

from bilevel import contract
from bilevel.bundle.tensors import DTYPES

# 24 would bring TensorScatter, but ONNX Runtime for Python 3.10 and TensorRT on JetPack 6 stop before it. ScatterND writes a
# cache in place just as well where input and output share a buffer.
ONNX_OPSET = 23
# TensorRT 10.15 and later take a plugin in place of a model-local function only where the node names a plugin namespace.
PLUGIN_NAMESPACE = "plugin_namespace"
PRIVATE_DOMAIN, NAME_NODE = "bilevel.names", "Name"

_op = Opset("", ONNX_OPSET)
_FLOATS = [DTYPES[name].ort_name for name in contract.FLOAT_TYPES]


def _schema(op: contract.Op) -> onnx.defs.OpSchema:
    """The ONNX schema of one operator of the contract."""
    Schema = onnx.defs.OpSchema
    kinds = {"int": Schema.AttrType.INT, "float": Schema.AttrType.FLOAT, "string": Schema.AttrType.STRING}

    def parameters(ports: tuple[contract.Port, ...]) -> list[onnx.defs.OpSchema.FormalParameter]:
        kind = {"T": "T", **{name: dtype.ort_name for name, dtype in DTYPES.items()}}
        return [Schema.FormalParameter(port.name, kind[port.dtype], str(port)) for port in ports]

    return Schema(
        op.name,
        contract.DOMAIN,
        op.version,
        op.summary,
        inputs=parameters(op.inputs),
        outputs=parameters(op.outputs),
        type_constraints=[("T", _FLOATS, "the model's float type")] if op.has_float_type else [],
        attributes=[
            *(Schema.Attribute(a.name, kinds[a.kind], a.meaning, required=a.default is None) for a in op.attributes),
            Schema.Attribute(PLUGIN_NAMESPACE, Schema.AttrType.STRING, "TensorRT plugin namespace", required=True),
        ],
    )


@functools.cache
def register_schemas() -> Opset:
    """Make the ``bilevel`` domain known to onnx in this process; returns it as an onnxscript opset."""
    for op in contract.OPS:
        if not onnx.defs.has(op.name, contract.VERSION, contract.DOMAIN):
            onnx.defs.register_schema(_schema(op))
    return Opset(contract.DOMAIN, contract.VERSION)


@functools.cache
def _private() -> Opset:
    """A domain for nodes that exist only until the graph is written."""
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            NAME_NODE,
            PRIVATE_DOMAIN,
            1,
            "The input, under the name that the attribute gives.",
            inputs=[onnx.defs.OpSchema.FormalParameter("x", "T", "[...]")],
            outputs=[onnx.defs.OpSchema.FormalParameter("y", "T", "[...]")],
            type_constraints=[("T", _FLOATS, "any float type")],
            attributes=[onnx.defs.OpSchema.Attribute("name", onnx.defs.OpSchema.AttrType.STRING, "the name", required=True)],
        )
    )
    return Opset(PRIVATE_DOMAIN, 1)


def _name_value(x: Any, name: str) -> Any:
    """A node that ``bilevel.export.graph.module`` replaces by the value's name."""
    return getattr(_private(), NAME_NODE)(x, name=name)


def _translation(op: contract.Op, domain: Opset) -> Callable[..., Any]:
    """The function that torch.onnx calls for ``torch.ops.bilevel.<op>``: it emits the one node of the contract."""
    node = getattr(domain, op.name)

    def translate(*tensors: Any, **attributes: Any) -> Any:
        return node(*tensors, **attributes, **{PLUGIN_NAMESPACE: contract.DOMAIN})

    # torch.onnx reads parameter names and kinds from the signature.
    kinds = {"int": int, "float": float, "string": str}
    positional = [inspect.Parameter(p.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in op.inputs]
    keyword = [inspect.Parameter(a.name, inspect.Parameter.KEYWORD_ONLY, annotation=kinds[a.kind]) for a in op.attributes]
    translate.__signature__ = inspect.Signature([*positional, *keyword])  # type: ignore[attr-defined]
    translate.__name__ = op.name
    return translate


def translation_table() -> dict[Any, Callable[..., Any]]:
    """``custom_translation_table`` for ``torch.onnx.export``: every operator of the contract, and cache writes."""
    import torch

    import bilevel.ops  # noqa: F401  (registers torch.ops.bilevel)

    domain = register_schemas()
    namespace = getattr(torch.ops, contract.DOMAIN)
    table: dict[Any, Callable[..., Any]] = {
        getattr(namespace, spec.torch_name).default: _translation(spec, domain) for spec in contract.OPS
    }
    table[namespace.write_cache.default] = _write_cache
    table[namespace.gather_blocks.default] = _gather_blocks
    table[namespace.name_value.default] = _name_value
    return table


def _ints(*values: int) -> Any:
    return _op.Constant(value_ints=list(values))


def _range(count: Any) -> Any:
    """0, 1, ... for a count that is a number or a tensor of one element."""
    if isinstance(count, int):
        return _ints(*range(count))
    return _op.Range(_op.Constant(value_int=0), _op.Squeeze(count), _op.Constant(value_int=1))


def _heads(tokens: Any) -> Any:
    """The size of axis 1: a number where it is static, which lets layers share what depends on it."""
    static = tokens.shape[1]
    return static if isinstance(static, int) else _op.Shape(tokens, start=1, end=2)


def _write_cache(cache: Any, update: Any, start: Any, length: Any) -> Any:
    """ScatterND of whole vectors: indices (row, head, position), or (row, position) of scalars for [B, M].

    The indices depend on start and length only, so ONNX Runtime computes them once for all layers.
    """
    batch, count = _op.Shape(start), _op.Reshape(length, _ints(1))
    position = _op.Add(_op.Unsqueeze(_op.Cast(start, to=onnx.TensorProto.INT64), _ints(1)), _range(count))
    row = _range(batch)
    if len(cache.shape) > 2:
        heads = _heads(update)
        shape = _op.Concat(batch, _ints(heads) if isinstance(heads, int) else heads, count, axis=0)
        columns = [
            _op.Unsqueeze(row, _ints(1, 2)),
            _op.Unsqueeze(_range(heads), _ints(0, 2)),
            _op.Unsqueeze(position, _ints(1)),
        ]
    else:
        shape = _op.Concat(batch, count, axis=0)
        columns = [_op.Unsqueeze(row, _ints(1)), position]
    index = _op.Concat(*(_op.Unsqueeze(_op.Expand(column, shape), _ints(-1)) for column in columns), axis=-1)
    return _op.ScatterND(cache, index, update)


def _gather_blocks(tokens: Any, first_block: Any, num_blocks: Any, block_size: int) -> Any:
    """GatherND of (head, block) in each row of the cache seen as [B, H, N, R, D].

    The indices depend on first_block and num_blocks only, so ONNX Runtime computes them once for all layers.
    """
    heads, width = _heads(tokens), tokens.shape[3]
    count = _op.Reshape(num_blocks, _ints(1))
    shape = _op.Concat(_op.Shape(first_block), _ints(heads) if isinstance(heads, int) else heads, count, axis=0)
    start = _op.Unsqueeze(_op.Cast(first_block, to=onnx.TensorProto.INT64), _ints(1))
    block = _op.Unsqueeze(_op.Add(start, _range(count)), _ints(1))
    columns = [_op.Unsqueeze(_range(heads), _ints(0, 2)), block]
    index = _op.Concat(*(_op.Unsqueeze(_op.Expand(column, shape), _ints(-1)) for column in columns), axis=-1)
    if isinstance(width, int):
        blocks = _op.Reshape(tokens, _ints(0, 0, -1, block_size, width))
    else:
        sizes = [_ints(0, 0, -1, block_size), _op.Shape(tokens, start=3, end=4)]
        blocks = _op.Reshape(tokens, _op.Concat(*sizes, axis=0))
    return _op.GatherND(blocks, index, batch_dims=1)
