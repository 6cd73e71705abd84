"""The contract's operators as ONNX schemas and as translations of ``torch.ops.bilevel``, both derived from the contract."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import onnx.defs
from onnxscript.values import Opset

from bilevel.plugins import contract

# 24 would bring TensorScatter, but ONNX Runtime for Python 3.10 and TensorRT on JetPack 6 stop before it. ScatterND writes a
# cache in place just as well where input and output share a buffer.
ONNX_OPSET = 23
# TensorRT 10.15 and later take a plugin in place of a model-local function only where the node names a plugin namespace.
PLUGIN_NAMESPACE = "plugin_namespace"

_TENSORS = {"int32": "tensor(int32)", "float32": "tensor(float)"}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _schema(op: contract.Op) -> onnx.defs.OpSchema:
    """The ONNX schema of one operator of the contract."""
    Schema = onnx.defs.OpSchema
    kinds = {"int": Schema.AttrType.INT, "float": Schema.AttrType.FLOAT, "string": Schema.AttrType.STRING}

    def parameters(ports: tuple[contract.Port, ...]) -> list[onnx.defs.OpSchema.FormalParameter]:
        return [Schema.FormalParameter(p.name, _TENSORS.get(p.dtype, "T"), f"[{', '.join(p.shape)}]") for p in ports]

    uses_t = any(port.dtype == "T" for port in (*op.inputs, *op.outputs))
    return Schema(
        op.name,
        contract.DOMAIN,
        op.version,
        op.summary,
        inputs=parameters(op.inputs),
        outputs=parameters(op.outputs),
        type_constraints=[("T", _FLOATS, "the model's float type")] if uses_t else [],
        attributes=[
            *(Schema.Attribute(a.name, kinds[a.kind], a.meaning, required=True) for a in op.attributes),
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
    op = Opset("", ONNX_OPSET)
    namespace = getattr(torch.ops, contract.DOMAIN)
    table: dict[Any, Callable[..., Any]] = {
        getattr(namespace, spec.torch_name).default: _translation(spec, domain) for spec in contract.OPS
    }

    def write_cache(cache: Any, update: Any, start: Any) -> Any:
        """ScatterND of whole vectors: indices (row, head, position), or (row, position) of scalars for [B, M]."""
        rank = 3 if len(cache.shape) > 2 else 2
        shape = op.Shape(update, start=0, end=rank)
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        columns = []
        for axis in range(rank):
            others = op.Constant(value_ints=[i for i in range(rank) if i != axis])
            count = op.Squeeze(op.Shape(update, start=axis, end=axis + 1))
            columns.append(op.Unsqueeze(op.Range(zero, count, one), others))
        first = op.Unsqueeze(op.Cast(start, to=onnx.TensorProto.INT64), op.Constant(value_ints=list(range(1, rank))))
        columns[-1] = op.Add(columns[-1], first)
        last = op.Constant(value_ints=[-1])
        index = op.Concat(*(op.Unsqueeze(op.Expand(column, shape), last) for column in columns), axis=-1)
        return op.ScatterND(cache, index, update)

    def gather_blocks(tokens: Any, first_block: Any, num_blocks: Any, block_size: int) -> Any:
        heads = op.Shape(tokens, start=0, end=2)
        width = op.Shape(tokens, start=3, end=4)
        blocks = op.Div(op.Shape(tokens, start=2, end=3), op.Constant(value_ints=[block_size]))
        count = op.Reshape(num_blocks, op.Constant(value_ints=[1]))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        row = op.Reshape(
            op.Range(zero, op.ReduceProd(heads, keepdims=0), one), op.Concat(heads, op.Constant(value_ints=[1]), axis=0)
        )
        start = op.Unsqueeze(op.Cast(first_block, to=onnx.TensorProto.INT64), op.Constant(value_ints=[1, 2]))
        index = op.Add(op.Add(op.Mul(row, blocks), start), op.Range(zero, op.Squeeze(count), one))
        size = op.Constant(value_ints=[block_size])
        flat = op.Reshape(tokens, op.Concat(op.Constant(value_ints=[-1]), op.Mul(size, width), axis=0))
        return op.Reshape(op.Gather(flat, index, axis=0), op.Concat(heads, count, size, width, axis=0))

    table[namespace.write_cache.default] = write_cache
    table[namespace.gather_blocks.default] = gather_blocks
    return table
