"""The operators as a module calls them: ``coarse_route``, ``fine_route``, ``select_blocks``, ``routed_attention``,
``routed_attention_sinks``, ``expert_route``, ``routed_experts``, ``routed_experts_quantized``, ``write_cache`` and, for packed
caches, ``write_cache_quantized``, ``unpack_cache`` and ``routed_attention_quantized``.

Called eagerly they run the vectorised PyTorch forms (trainable). While ``torch.export`` traces, each becomes one node
``torch.ops.bilevel.<name>``, which ``bilevel.export`` turns into one ONNX node of the contract. Any ``nn.Module`` that calls
these functions can therefore be exported; nothing needs to be registered or subclassed.

On a GPU the Triton kernels run in place of the PyTorch forms wherever Triton is installed, no gradient is asked of the output
(routes have none) and the kernels cover the sizes; ``bilevel.gpu_kernels`` finds them or switches them off. Where a
gradient is asked, forward and backward are PyTorch's: kernels with a PyTorch backward would compute the forward pass twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import contract, gpu_kernels
from bilevel.bundle.cache_rows import CacheRows
from bilevel.errors import ContractError
from bilevel.operators import attention, experts, packed_caches, routing
from bilevel.operators.precision import wide


@dataclass(frozen=True)
class Call:
    """One call of an operator by a module: what went in and what came out."""

    op: contract.Op
    tensors: tuple[Tensor, ...]
    attributes: dict[str, Any]
    outputs: tuple[Tensor, ...]


_recording: ContextVar[list[Call] | None] = ContextVar("recording", default=None)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """A list that every eager call of an operator of the contract inside the block is added to, in order."""
    calls: list[Call] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


_KINDS = {"int": "int", "float": "float", "string": "str"}
_library = torch.library.Library(contract.DOMAIN, "DEF")


def _torch_schema(op: contract.Op) -> str:
    """``name(Tensor a, ..., *, int topk, ...) -> Tensor``, derived from the contract."""
    tensors = ", ".join(f"Tensor {port.name}" for port in op.inputs)
    attributes = "".join(f", {_KINDS[a.kind]} {a.name}" for a in op.attributes)
    outputs = ", ".join("Tensor" for _ in op.outputs)
    keyword = f", *{attributes}" if attributes else ""
    return f"{op.torch_name}({tensors}{keyword}) -> {outputs if len(op.outputs) == 1 else f'({outputs})'}"


def _check(op: contract.Op, tensors: tuple[Tensor, ...], attributes: dict[str, Any]) -> dict[str, int]:
    """Shapes, dtypes and attributes against the contract, before any work; returns symbol -> size."""
    op.check_attributes(attributes)
    sizes = op.bind_shapes([tensor.shape for tensor in tensors])
    first = _dtype_name(tensors[0])
    for port, tensor in zip(op.inputs, tensors, strict=True):
        dtype, expected = _dtype_name(tensor), port.element_type(first)
        if port.dtype == "T" and not tensor.dtype.is_floating_point:
            raise ContractError(f"{op.name}: {port.name} must be of a float type, got {dtype}")
        if port.dtype == "T" and dtype != expected:
            raise ContractError(f"{op.name}: {port.name} is {dtype}, but {op.inputs[0].name} is {first}; give both one type")
        if dtype != expected:
            raise ContractError(f"{op.name}: {port.name} must be {expected}, got {dtype}")
    _check_divisible(op, sizes, attributes)
    return sizes


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_divisible(op: contract.Op, sizes: dict[str, int], attributes: dict[str, Any]) -> None:
    """The divisibility rules that symbolic shapes cannot say."""
    pairs = [("Hr", "Hs"), ("Hr", "Hk")] if "Hr" in sizes else [("Hq", "Hkv"), ("Hq", "Hs")] if "Hq" in sizes else []
    heads = {**sizes, "Hs": attributes.get("num_selection_heads", sizes.get("Hs", 1))}
    if "Hc" in sizes:
        pairs.append(("Hs", "Hc"))
    for many, few in pairs:
        if heads[few] < 1 or heads[many] % heads[few]:
            raise ContractError(f"{op.name}: {many}={heads[many]} heads are not divisible by {few}={heads[few]}")
    capacity = sizes.get("M")
    if isinstance(capacity, int) and "block_size" in attributes and capacity % attributes["block_size"]:
        raise ContractError(
            f"{op.name}: k and v hold {capacity} tokens, not a multiple of block_size={attributes['block_size']}; "
            "pad them with bilevel.ops.pad_to_blocks"
        )
    if "C" in sizes:
        _check_packed_cache(op, sizes, attributes)
    if "R" in sizes:
        experts.check_packed_shapes(sizes, attributes["bits"], attributes["block_size"])
    if "Gp" in sizes:
        experts.check_expert_shapes(sizes["E"], sizes["Gp"], attributes["top_k"], attributes["topk_group"])


def _check_packed_cache(op: contract.Op, sizes: dict[str, int], attributes: dict[str, Any]) -> None:
    """A packed row must have the bytes that its attributes ask for."""
    width, groups = attributes.get("width", sizes.get("D", 0)), attributes["groups"]
    expected = CacheRows(width, attributes["bits"], groups).num_bytes
    if width % groups or (attributes["bits"] == 4 and width // groups % 2) or sizes["C"] != expected:
        raise ContractError(
            f"{op.name}: rows of {width} numbers in {attributes['bits']} bits and {groups} groups do not fit into {sizes['C']} "
            "bytes; take the layout from bilevel.bundle.cache_rows"
        )


def _fake_outputs(op: contract.Op, tensors: tuple[Tensor, ...], attributes: dict[str, Any]) -> Any:
    """Empty outputs of the declared shapes and dtypes (the shape function that tracing uses)."""
    sizes = _check(op, tensors, attributes)
    shapes, dtypes = op.output_shapes(sizes, attributes), op.output_dtypes(_dtype_name(tensors[0]))
    outputs = tuple(
        tensors[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return outputs if len(outputs) > 1 else outputs[0]


def _form(op: contract.Op, eager: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` on checked inputs: by the kernels, or by the PyTorch form ``eager``."""
    differentiable = _is_differentiable(op)

    def form(*tensors: Tensor, **attributes: Any) -> Any:
        kernels = gpu_kernels.kernels_for(tensors[0].device.type)
        trained = differentiable and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # torch.compile traces the PyTorch form: it has a gradient, and the launcher's Python is not for tracing.
        if kernels is None or trained or torch.compiler.is_compiling() or not kernels.covers(op, tensors, attributes):
            return eager(*tensors, **attributes)
        return kernels.run(op, tensors, attributes)

    return form


def _is_differentiable(op: contract.Op) -> bool:
    return any(port.dtype != "int32" for port in op.outputs)


def _register_gradient(op: contract.Op, eager: Callable[..., Any]) -> None:
    """The gradient of ``torch.ops.bilevel.<name>``: that of the PyTorch form, which is computed again from the inputs. It is an
    operator of its own, ``<name>_backward``, so that torch.compile does not look into what follows the data."""
    floats = [port.dtype != "int32" for port in op.outputs]
    learned = [n for n, port in enumerate(op.inputs) if port.dtype in ("T", "float32")]
    schema = _torch_schema(op).split("(", 1)[1].rsplit(" ->", 1)[0]
    gradients = ", ".join(f"Tensor gradient{n}" for n, is_float in enumerate(floats) if is_float)
    outputs = ", ".join("Tensor" for _ in learned)
    name = f"{op.torch_name}_backward"
    _library.define(f"{name}({gradients}, {schema} -> ({outputs})")

    def backward(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        given, inputs = tensors[: sum(floats)], [x.detach() for x in tensors[sum(floats) :]]
        sources = [inputs[n].requires_grad_() for n in learned]
        with torch.enable_grad():
            outputs = eager(*inputs, **attributes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [out for out, is_float in zip(outputs, floats, strict=True) if is_float]
        found = torch.autograd.grad(outputs, sources, given, allow_unused=True, materialize_grads=True)
        return tuple(x.contiguous() for x in found)

    def fake(*tensors: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensors[sum(floats) + n], memory_format=torch.contiguous_format) for n in learned)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: dict[str, Any] | None = None) -> None:
        ctx.save_for_backward(*inputs)
        ctx.attributes = keyword_only_inputs or {}

    def gradient(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        node = getattr(getattr(torch.ops, contract.DOMAIN), name)
        given = tuple(grad for grad, is_float in zip(given, floats, strict=True) if is_float)
        found = dict(zip(learned, node(*given, *ctx.saved_tensors, **ctx.attributes), strict=True))
        return tuple(found.get(n) if want else None for n, want in enumerate(ctx.needs_input_grad))

    _library.impl(name, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{contract.DOMAIN}::{name}", fake, lib=_library)
    torch.library.register_autograd(f"{contract.DOMAIN}::{op.torch_name}", gradient, setup_context=setup, lib=_library)


def _define(op: contract.Op, eager: Callable[..., Any], *, is_opaque: bool = False) -> Callable[..., Any]:
    """Register ``torch.ops.bilevel.<name>`` and return the function that modules call. is_opaque: torch.compile calls the
    operator as a whole, since what its PyTorch form does follows the data."""
    form = _form(op, eager)

    def checked(*tensors: Tensor, **attributes: Any) -> Any:
        _check(op, tensors, attributes)
        return form(*tensors, **attributes)

    _library.define(_torch_schema(op))
    _library.impl(op.torch_name, checked, "CompositeExplicitAutograd")

    def fake(*tensors: Tensor, **attributes: Any) -> Any:
        return _fake_outputs(op, tensors, attributes)

    torch.library.register_fake(f"{contract.DOMAIN}::{op.torch_name}", fake, lib=_library)
    if _is_differentiable(op):
        _register_gradient(op, eager)
    node = getattr(getattr(torch.ops, contract.DOMAIN), op.torch_name)

    def call(*tensors: Tensor, **attributes: Any) -> Any:
        attributes = op.with_defaults(attributes)  # a node of a graph names them all
        if not torch.compiler.is_exporting():
            if is_opaque and torch.compiler.is_compiling():
                return node(*tensors, **attributes)
            outputs = checked(*tensors, **attributes)
            if (calls := _recording.get()) is not None:
                calls.append(Call(op, tensors, attributes, outputs if isinstance(outputs, tuple) else (outputs,)))
            return outputs
        if tensors[0].dtype == torch.float64:
            raise ContractError(
                f"{op.name}: {op.inputs[0].name} is float64, which no device has kernels for; "
                "export the module in float32, float16 or bfloat16"
            )
        return node(*tensors, **attributes)

    call.__name__, call.__doc__ = op.torch_name, f"{op.summary} See ``{eager.__module__}.{op.torch_name}``."
    return call


coarse_route = _define(contract.COARSE_ROUTE, routing.coarse_route)
fine_route = _define(contract.FINE_ROUTE, routing.fine_route)
select_blocks = _define(contract.SELECT_BLOCKS, routing.select_blocks)
routed_attention = _define(contract.ROUTED_ATTENTION, attention.routed_attention, is_opaque=True)
routed_attention_sinks = _define(contract.ROUTED_ATTENTION_SINKS, attention.routed_attention_sinks, is_opaque=True)
expert_route = _define(contract.EXPERT_ROUTE, experts.expert_route)
routed_experts = _define(contract.ROUTED_EXPERTS, experts.routed_experts)
routed_experts_quantized = _define(contract.ROUTED_EXPERTS_QUANTIZED, experts.routed_experts_quantized)
write_cache_quantized = _define(contract.WRITE_CACHE_QUANTIZED, packed_caches.write_cache_quantized)
unpack_cache = _define(contract.UNPACK_CACHE, packed_caches.unpack_cache)
routed_attention_quantized = _define(contract.ROUTED_ATTENTION_QUANTIZED, packed_caches.routed_attention_quantized)


def _write(cache: Tensor, update: Tensor, start: Tensor, length: int) -> Tensor:
    out = cache.clone()
    for row, first in enumerate(start.tolist()):
        out[row].narrow(-2 if cache.dim() > 2 else -1, first, length).copy_(update[row])
    return out


# The length is an argument of its own so that all layers of a graph share one set of indices.
_library.define("write_cache(Tensor cache, Tensor update, Tensor start, SymInt length) -> Tensor")
_library.impl("write_cache", _write, "CompositeExplicitAutograd")
torch.library.register_fake("bilevel::write_cache", lambda cache, *_: torch.empty_like(cache), lib=_library)


def write_cache(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """Write ``update`` into each row of a cache at the row's own position; returns the cache.

    cache: [B, H, M, D] (or [B, M]). update: [B, H, L, D] (or [B, L]). start: int32 [B], start + L <= M.
    Eagerly the cache is changed in place; exported, it is one ONNX ScatterND whose output the runtime binds to the
    input's buffer.
    """
    axis = 2 if cache.dim() > 2 else 1
    if torch.compiler.is_exporting():
        return torch.ops.bilevel.write_cache(cache, update, start, update.shape[axis])
    length, capacity, last = update.shape[axis], cache.shape[axis], int(start.max())
    if last + length > capacity:
        raise ContractError(
            f"write_cache: {length} tokens do not fit at {last} in a cache of {capacity}; make the cache larger"
        )
    for row, first in enumerate(start.tolist()):
        cache[row].narrow(axis - 1, first, length).copy_(update[row])
    return cache


_library.define("gather_blocks(Tensor tokens, Tensor first_block, SymInt num_blocks, int block_size) -> Tensor")
_library.impl("gather_blocks", routing.gather_blocks, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bilevel::gather_blocks",
    lambda tokens, first_block, num_blocks, block_size: tokens.new_empty(
        [*tokens.shape[:2], num_blocks, block_size, tokens.shape[3]]
    ),
    lib=_library,
)


def gather_blocks(tokens: Tensor, first_block: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """[B, H, num_blocks, block_size, D]: consecutive blocks of each row's cache (see ``operators.routing.gather_blocks``).

    One traced node, because the divisions by block_size on free sizes would cost the tracer seconds per layer.
    """
    gather = torch.ops.bilevel.gather_blocks if torch.compiler.is_exporting() else routing.gather_blocks
    return gather(tokens, first_block, num_blocks, block_size)


def pool_blocks(tokens: Tensor, first_block: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """[B, H, num_blocks, D]: fp32 (fp64 for an fp64 cache) means of a cache's consecutive blocks, rounded to the cache's dtype.

    A mean over a block that is not complete yet is never read: only complete blocks are scored, and the block is pooled
    again in the call that completes it.
    """
    return wide(gather_blocks(tokens, first_block, num_blocks, block_size)).mean(3).to(tokens.dtype)


_library.define("name_value(Tensor x, str name) -> Tensor")
_library.impl("name_value", lambda x, name: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("bilevel::name_value", lambda x, name: torch.empty_like(x), lib=_library)


def name_value(x: Tensor, name: str) -> Tensor:
    """``x`` itself; the exported graph calls this value ``name``, so that tools find it there."""
    return torch.ops.bilevel.name_value(x, name) if torch.compiler.is_exporting() else x


def pad_to_blocks(tokens: Tensor, block_size: int) -> Tensor:
    """Zero-pad [B, H, L, D] along L to a multiple of ``block_size`` (what ``routed_attention`` asks of k and v)."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, -tokens.shape[2] % block_size))
