"""The routing operators, declared once (standard library only).

The ONNX schema, the PyTorch custom op and its shape function, the exported function bodies and the tests are derived from
``OPS``. Normative semantics live in ``bilevel/operators/reference.py``; this file says what goes in, what comes out, and which
attribute values are allowed.

Letters: B batch rows, L tokens of this call, Hq query heads, Hkv key/value heads, Hr/Hk route query/key heads, Hs selection
heads, Hc candidate heads, D head dim, Dv that of the values, Dr route dim, U units: pooled keys or scores (one per block, at
least ceil(valid tokens / block_size) of them), M cache capacity in tokens (or units), H heads of a cache, W its width, K blocks
kept, T flattened tokens, E experts, Gp expert groups, d model width, f expert width, R rows of a packed gate_up (2f), Pd and Pf
bytes of a packed row along d and f, Sd and Sf its blocks that share a scale, C bytes of a packed row of a cache
(``bilevel/bundle/cache_rows.py``), S tokens of a block. "T" as a dtype is the model's float type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.errors import ContractError

DOMAIN = "bilevel"
VERSION = 1
# What a file may ask for at most: a hundred times what models have, and less than what arithmetic or memory would fail at.
MOST_BLOCK, MOST_POSITIONS = 65_536, 2**24
MAX_TOPK = 3840  # TensorRT's TopK limit; a larger K would build nowhere
INT32_MAX = 2**31 - 1


# Bytes of an element type. The names are those of torch and NumPy; "T" is one of FLOAT_TYPES.
DTYPE_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8}
FLOAT_TYPES = ("float16", "bfloat16", "float32")
DTYPE_CODES = {"float16": 1, "bfloat16": 2, "float32": 3, "int32": 4}  # bilevel_dtype of bilevel_kernels.h


@dataclass(frozen=True)
class Dim:
    """One size of a tensor: ``factor`` times the size that ``symbol`` stands for.

    sized_by: in an output, the attribute that gives the size; "" where an input has the symbol.
    """

    symbol: str
    factor: int = 1
    sized_by: str = ""

    def __str__(self) -> str:
        return self.symbol if self.factor == 1 else f"{self.factor}{self.symbol}"

    def size(self, sizes: Mapping[str, Any]) -> Any:
        """The size, from those of the symbols."""
        return sizes[self.symbol] if self.factor == 1 else self.factor * sizes[self.symbol]


@dataclass(frozen=True)
class Port:
    """One tensor of an operator: its name, dtype ("T", "int32", "float32", "uint8") and symbolic shape."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}]"

    def element_type(self, float_type: str) -> str:
        """The name of the dtype in a model of ``float_type``. A model in fp64 has fp64 where the contract says float32."""
        return float_type if self.dtype == "T" or (self.dtype, float_type) == ("float32", "float64") else self.dtype


@dataclass(frozen=True)
class Attribute:
    """One compile-time constant of an operator; ``kind`` is "int", "float" or "string".

    default: of an attribute that came later than its operator, what a file that does not have it means; None: it must be given.
    """

    name: str
    kind: str
    meaning: str
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str | int, ...] = ()
    default: int | float | str | None = None

    def check(self, value: object) -> None:
        """Raise ContractError when ``value`` has the wrong type or lies outside what is allowed."""
        expected = {"int": int, "float": (int, float), "string": str}[self.kind]
        if isinstance(value, bool) or not isinstance(value, expected):  # type: ignore[arg-type]
            raise ContractError(f"attribute {self.name}={value!r} must be of type {self.kind}")
        if self.choices and value not in self.choices:
            raise ContractError(f"attribute {self.name}={value!r} must be one of {', '.join(map(str, self.choices))}")
        if isinstance(value, int) and self.kind == "int":
            low = -INT32_MAX if self.minimum is None else self.minimum
            high = INT32_MAX if self.maximum is None else self.maximum
            if not low <= value <= high:
                raise ContractError(f"attribute {self.name}={value} must lie between {low} and {high}")
        is_bounded = self.kind == "float" and self.minimum is not None
        if is_bounded and isinstance(value, (int, float)) and not self.minimum <= value < float("inf"):  # type: ignore[operator]
            raise ContractError(f"attribute {self.name}={value} must be a finite number of at least {self.minimum}")


@dataclass(frozen=True)
class Op:
    """One operator of the contract."""

    name: str
    summary: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...] = ()
    version: int = VERSION
    in_place: bool = False  # the output is the first input, changed: given one address for both, nothing else is written

    @property
    def torch_name(self) -> str:
        """The operator's name in ``torch.ops.bilevel``: CoarseRoute -> coarse_route."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    def check_attributes(self, values: Mapping[str, object]) -> None:
        """Every attribute without a default must be given; all must be known, and lie in their range."""
        values = self.with_defaults(values)
        for attribute in self.attributes:
            if attribute.name not in values:
                raise ContractError(f"{self.name} needs the attribute {attribute.name} ({attribute.meaning})")
            attribute.check(values[attribute.name])
        unknown = set(values) - {attribute.name for attribute in self.attributes}
        if unknown:
            raise ContractError(f"{self.name} has no attribute {min(unknown)}")

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes with those that may be left out."""
        return {**{each.name: each.default for each in self.attributes if each.default is not None}, **values}

    @property
    def symbols(self) -> set[str]:
        """The symbols of the inputs' shapes: what ``bind_shapes`` gives sizes of."""
        return {dim.symbol for port in self.inputs for dim in port.shape}

    def check_ranks(self, shapes: Sequence[Sequence[Any]]) -> None:
        """One shape for every input, of as many sizes as declared. Raises ContractError."""
        if len(shapes) != len(self.inputs):
            raise ContractError(f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}")
        for port, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(port.shape):
                raise ContractError(f"{self.name}: {port.name} must have shape {port}, got {list(shape)}")

    def bind_shapes(self, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Match input shapes against the declared symbols; returns symbol -> size or raises ContractError.

        A size that is no int (torch's SymInt, a TensorRT expression) is bound, not compared.
        """
        self.check_ranks(shapes)
        sizes: dict[str, Any] = {}
        multiples: list[tuple[Port, Dim, int]] = []  # compared below, when their symbols are bound
        for port, shape in zip(self.inputs, shapes, strict=True):
            for dim, size in zip(port.shape, shape, strict=True):
                if dim.factor > 1:
                    multiples.append((port, dim, size))
                    continue
                known = sizes.setdefault(dim.symbol, size)
                if isinstance(size, int) and isinstance(known, int) and known != size:
                    raise ContractError(f"{self.name}: {port.name} has {dim}={size}, but an earlier input has {dim}={known}")
        for port, dim, size in multiples:
            known = sizes[dim.symbol]
            if isinstance(size, int) and isinstance(known, int) and size != dim.factor * known:
                raise ContractError(f"{self.name}: {port.name} has {dim}={size}, but {dim.symbol}={known} elsewhere")
        return sizes

    def input_shapes(self, sizes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The shape of every input. sizes: of the symbols."""
        return [tuple(dim.size(sizes) for dim in port.shape) for port in self.inputs]

    def output_shapes(self, sizes: Mapping[str, Any], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The shape of every output. sizes: what ``bind_shapes`` made of the inputs' shapes."""
        return [
            tuple(attributes[dim.sized_by] if dim.sized_by else dim.size(sizes) for dim in port.shape) for port in self.outputs
        ]

    def output_dtypes(self, float_type: str) -> list[str]:
        """The element type of every output, in a model of ``float_type``."""
        return [port.element_type(float_type) for port in self.outputs]

    @property
    def has_float_type(self) -> bool:
        """Whether some input is of the model's float type."""
        return any(port.dtype == "T" for port in self.inputs)


def _port(name: str, dtype: str, *shape: str | Dim) -> Port:
    return Port(name, dtype, tuple(Dim(size) if isinstance(size, str) else size for size in shape))


def _int(name: str, meaning: str, minimum: int, maximum: int | None = None) -> Attribute:
    return Attribute(name, "int", meaning, minimum, maximum)


_LENGTHS = (_port("past_len", "int32", "B"), _port("new_len", "int32", "B"))
_ROUTE_QUERY = (_port("query", "T", "B", "Hr", "L", "Dr"), _port("unit_key", "T", "B", "Hk", "U", "Dr"))
_ROUTES = (_port("routes", "int32", "B", Dim("Hs", sized_by="num_selection_heads"), "L", Dim("K", sized_by="topk")),)
SCORE_FUNCS = ("sigmoid", "softmax", "sqrtsoftplus")  # their places are the numbers that the kernels know them by
_TOP_K = Dim("k", sized_by="top_k")
_BLOCK_SIZE = _int("block_size", "tokens per block", 1)
_CAUSAL = _int("causal", "1: position t sees tokens 0..t; 0: it sees every valid token", 0, 1)
_ROUTE_ATTRIBUTES = (
    _BLOCK_SIZE,
    _int("topk", "blocks kept, forced ones included", 1, MAX_TOPK),
    _int("num_selection_heads", "independent choices (Hs); scores of the Hr/Hs heads that share one are summed", 1),
    _int("init_blocks", "first blocks of the text that are always kept", 0),
    _int("local_blocks", "most recent blocks that are always kept, the own block included", 1),
    _CAUSAL,
)
NEVER_SCORED, SCORED, ALWAYS_KEPT = 0, 1, 2  # values of partial_block

COARSE_ROUTE = Op(
    "CoarseRoute",
    "Score every visible block and keep K.",
    (*_ROUTE_QUERY, *_LENGTHS),
    _ROUTES,
    _ROUTE_ATTRIBUTES,
)
FINE_ROUTE = Op(
    "FineRoute",
    "Score only the candidate blocks (and the forced ones) and keep K.",
    (*_ROUTE_QUERY, _port("candidates", "int32", "B", "Hc", "L", "K1"), *_LENGTHS),
    _ROUTES,
    _ROUTE_ATTRIBUTES,
)
SELECT_BLOCKS = Op(
    "SelectBlocks",
    "Keep K blocks by given scores, whatever computed them.",
    (_port("scores", "float32", "B", "Hs", "L", "U"), *_LENGTHS),
    (_port("routes", "int32", "B", "Hs", "L", Dim("K", sized_by="topk")),),
    (
        _BLOCK_SIZE,
        _int("topk", "blocks kept, forced ones included", 1, MAX_TOPK),
        _int("scored_topk", "of them at most so many for their score; topk: forced blocks lie inside the budget", 0, MAX_TOPK),
        _int("init_blocks", "first blocks of the text that are always kept", 0),
        _int("local_blocks", "most recent blocks that are always kept, the own block included; 0: none", 0),
        _int(
            "partial_block",
            "a block of which only the first tokens are visible: 0 never chosen by score, 1 scored like others, 2 always kept",
            NEVER_SCORED,
            ALWAYS_KEPT,
        ),
        _CAUSAL,
    ),
)
ROUTED_ATTENTION = Op(
    "RoutedAttention",
    "Softmax attention over the tokens of the routed blocks.",
    (
        _port("q", "T", "B", "Hq", "L", "D"),
        _port("k", "T", "B", "Hkv", "M", "D"),
        _port("v", "T", "B", "Hkv", "M", "Dv"),
        _port("routes", "int32", "B", "Hs", "L", "K"),
        *_LENGTHS,
    ),
    (_port("out", "T", "B", "Hq", "L", "Dv"),),
    (_BLOCK_SIZE, _CAUSAL, Attribute("scale", "float", "factor on q.k before the softmax")),
)
# An operator of its own: arity is fixed (TensorRT's parser rejects empty optional inputs), so an input of RoutedAttention would
# be one that every model without sinks carries, and that no bundle of an earlier version has.
ROUTED_ATTENTION_SINKS = Op(
    "RoutedAttentionSinks",
    "RoutedAttention with a logit a query head that joins the softmax and reads nothing.",
    (*ROUTED_ATTENTION.inputs, _port("sinks", "float32", "Hq")),
    ROUTED_ATTENTION.outputs,
    ROUTED_ATTENTION.attributes,
)
EXPERT_ROUTE = Op(
    "ExpertRoute",
    "Keep groups of experts, then the best experts inside them.",
    (
        _port("logits", "float32", "T", "E"),
        _port("group_logits", "float32", "T", "Gp"),
        _port("select_bias", "float32", "E"),
    ),
    (_port("ids", "int32", "T", _TOP_K), _port("weights", "float32", "T", _TOP_K)),
    (
        _int("top_k", "experts kept", 1, MAX_TOPK),
        _int("topk_group", "groups kept", 1),
        Attribute("score_func", "string", "logits to scores", choices=SCORE_FUNCS),
        Attribute(
            "group_score",
            "string",
            "score of a group: its best, its two best summed, or the input group_logits",
            choices=("max", "top2_sum", "external"),
        ),
        _int("normalize", "1: the kept weights sum to 1 before scaling", 0, 1),
        Attribute("scale", "float", "factor on the weights"),
        Attribute("norm_floor", "float", "what the kept weights' sum is at least taken for when it normalises", 0, default=0.0),
        Attribute(
            "zero_fill",
            "int",
            "experts of groups that are not kept: 0 never chosen, 1 chosen as if their biased score were 0",
            0,
            1,
            default=0,
        ),
    ),
)
ROUTED_EXPERTS = Op(
    "RoutedExperts",
    "The weighted sum of the chosen experts' SwiGLU.",
    (
        _port("x", "T", "T", "d"),
        _port("ids", "int32", "T", "k"),
        _port("weights", "float32", "T", "k"),
        _port("gate_up", "T", "E", Dim("f", 2), "d"),
        _port("down", "T", "E", "d", "f"),
    ),
    (_port("out", "T", "T", "d"),),
    (
        Attribute("gate_scale", "float", "factor on the gate inside its sigmoid", default=1.0),
        Attribute("limit", "float", "bound of gate, from above, and of up, on both sides; 0: none", 0, default=0.0),
        Attribute("up_shift", "float", "what is added to up", default=0.0),
    ),
)

ROUTED_EXPERTS_QUANTIZED = Op(
    "RoutedExpertsQuantized",
    "RoutedExperts over weights in 4 or 8 bits, in blocks along the contraction.",
    (
        *ROUTED_EXPERTS.inputs[:3],
        *(
            _port(f"{name}_{part}", dtype, "E", rows, width)
            for name, rows, letter in (("gate_up", "R", "d"), ("down", "d", "f"))
            for part, dtype, width in (
                ("codes", "uint8", f"P{letter}"),
                ("scales", "float32", f"S{letter}"),
                ("zeros", "uint8", f"S{letter}"),
            )
        ),
    ),
    ROUTED_EXPERTS.outputs,
    (
        Attribute("bits", "int", "bits of a weight", choices=(4, 8)),
        Attribute("block_size", "int", "weights that share a scale and a zero point", choices=(32, 64, 128)),
    ),
)

_PACKED_CACHE = (
    Attribute("bits", "int", "bits of a number", choices=(4, 8)),
    _int("groups", "parts of a row with a scale of their own", 1, 64),
)
WRITE_CACHE_QUANTIZED = Op(
    "WriteCacheQuantized",
    "The packed cache with the update, rounded, at each row's start.",
    (_port("update", "T", "B", "H", "L", "D"), _port("cache", "uint8", "B", "H", "M", "C"), _port("start", "int32", "B")),
    (_port("out", "uint8", "B", "H", "M", "C"),),
    _PACKED_CACHE,
)
UNPACK_CACHE = Op(
    "UnpackCache",
    "The numbers of some blocks of a packed cache.",
    (_port("rows", "uint8", "B", "H", "U", "S", "C"),),
    (_port("out", "float32", "B", "H", "U", "S", Dim("D", sized_by="width")),),
    (*_PACKED_CACHE, _int("width", "numbers in a row (D)", 1)),
)
ROUTED_ATTENTION_QUANTIZED = Op(
    "RoutedAttentionQuantized",
    "RoutedAttention over packed caches.",
    (
        ROUTED_ATTENTION.inputs[0],
        *(_port(name, "uint8", "B", "Hkv", "M", "C") for name in ("k", "v")),
        *ROUTED_ATTENTION.inputs[3:],
    ),
    (_port("out", "T", "B", "Hq", "L", "D"),),
    (*ROUTED_ATTENTION.attributes, *_PACKED_CACHE),
)

# Of engines only: a bundle's graph says the same by ScatterND (``export/engine/cache_writes.py``).
WRITE_CACHE = Op(
    "WriteCache",
    "The cache with the update at each row's start; nothing is written beyond its end.",
    (_port("cache", "T", "B", "H", "M", "W"), _port("update", "T", "B", "H", "L", "W"), _port("start", "int32", "B")),
    (_port("out", "T", "B", "H", "M", "W"),),
    in_place=True,
)

_FLOAT_OPS = (COARSE_ROUTE, FINE_ROUTE, SELECT_BLOCKS, ROUTED_ATTENTION, EXPERT_ROUTE, ROUTED_EXPERTS)
PACKED_CACHE_OPS: tuple[Op, ...] = (WRITE_CACHE_QUANTIZED, UNPACK_CACHE, ROUTED_ATTENTION_QUANTIZED)
# What a bundle's graph may hold.
OPS: tuple[Op, ...] = (*_FLOAT_OPS, ROUTED_ATTENTION_SINKS, ROUTED_EXPERTS_QUANTIZED, *PACKED_CACHE_OPS)
GPU_OPS: tuple[Op, ...] = (*_FLOAT_OPS, WRITE_CACHE)  # what a kernel library and its TensorRT plugins hold
BY_NAME: dict[str, Op] = {op.name: op for op in (*OPS, WRITE_CACHE)}
