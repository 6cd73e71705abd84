"""The contract's operators as ONNX schemas and as translations of ``torch.ops.bilevel``, both derived from the contract."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import onnx.defs
from onnxscript.values import Opset

from bilevel.plugins import contract

ONNX_OPSET = 24  # the first with TensorScatter, which writes a cache in place
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
        axis = 2 if len(cache.shape) > 2 else 1
        return op.TensorScatter(cache, update, op.Cast(start, to=onnx.TensorProto.INT64), axis=axis)

    table[namespace.write_cache.default] = write_cache
    return table
