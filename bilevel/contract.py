"""The routing operators, declared once (standard library only).

The ONNX schema, the PyTorch custom op and its shape function, the exported function bodies and the tests are derived from
``OPS``. Normative semantics live in ``bilevel/operators/reference.py``; this file says what goes in, what comes out, and which
attribute values are allowed.

Letters: B batch rows, L tokens of this call, Hq query heads, Hkv key/value heads, Hr/Hk route query/key heads, Hs selection
heads, Hc candidate heads, D head dim, Dr route dim, U pooled key units (one per block, at least ceil(valid tokens / block_size)
of them), M cache capacity in tokens (or units), H heads of a cache, W its width, K blocks kept, T flattened tokens, E experts,
Gp expert groups, d model width, f expert width. "T" as a dtype is the model's float type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilevel.errors import ContractError

DOMAIN = "bilevel"
VERSION = 1
MAX_TOPK = 3840  # TensorRT's TopK limit; a larger K would build nowhere
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Port:
    """One tensor of an operator: its name, dtype ("T", "int32", "float32") and symbolic shape."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    """One compile-time constant of an operator; ``kind`` is "int", "float" or "string"."""

    name: str
    kind: str
    meaning: str
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> None:
        """Raise ContractError when ``value`` has the wrong type or lies outside what is allowed."""
        expected = {"int": int, "float": (int, float), "string": str}[self.kind]
        if isinstance(value, bool) or not isinstance(value, expected):  # type: ignore[arg-type]
            raise ContractError(f"attribute {self.name}={value!r} must be of type {self.kind}")
        if self.choices and value not in self.choices:
            raise ContractError(f"attribute {self.name}={value!r} must be one of {', '.join(self.choices)}")
        if isinstance(value, int) and self.kind == "int":
            low = -INT32_MAX if self.minimum is None else self.minimum
            high = INT32_MAX if self.maximum is None else self.maximum
            if not low <= value <= high:
                raise ContractError(f"attribute {self.name}={value} must lie between {low} and {high}")


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
        """Every attribute must be given (there are no defaults), be known, and lie in its range."""
        for attribute in self.attributes:
            if attribute.name not in values:
                raise ContractError(f"{self.name} needs the attribute {attribute.name} ({attribute.meaning})")
            attribute.check(values[attribute.name])
        unknown = set(values) - {attribute.name for attribute in self.attributes}
        if unknown:
            raise ContractError(f"{self.name} has no attribute {min(unknown)}")

    def bind_shapes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Match input shapes against the declared symbols; returns symbol -> size or raises ContractError."""
        if len(shapes) != len(self.inputs):
            raise ContractError(f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}")
        sizes: dict[str, int] = {}
        for port, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(port.shape):
                raise ContractError(f"{self.name}: {port.name} must have shape [{', '.join(port.shape)}], got {list(shape)}")
            for symbol, size in zip(port.shape, shape, strict=True):
                if symbol[0].isdigit():
                    continue  # a fixed factor ("2f") is checked below, when its symbol is known
                if isinstance(size, int) and isinstance(sizes.get(symbol), int) and sizes[symbol] != size:
                    raise ContractError(
                        f"{self.name}: {port.name} has {symbol}={size}, but an earlier input has {symbol}={sizes[symbol]}"
                    )
                sizes.setdefault(symbol, size)
        self._check_factors(shapes, sizes)
        return sizes

    def _check_factors(self, shapes: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> None:
        """A dimension declared as "2f" must be twice f."""
        for port, shape in zip(self.inputs, shapes, strict=True):
            for symbol, size in zip(port.shape, shape, strict=True):
                if not symbol[0].isdigit() or not isinstance(size, int) or not isinstance(sizes[symbol[1:]], int):
                    continue
                if size != int(symbol[0]) * sizes[symbol[1:]]:
                    raise ContractError(
                        f"{self.name}: {port.name} has {symbol}={size}, but {symbol[1:]}={sizes[symbol[1:]]} elsewhere"
                    )


def _int(name: str, meaning: str, minimum: int, maximum: int | None = None) -> Attribute:
    return Attribute(name, "int", meaning, minimum, maximum)


_LENGTHS = (Port("past_len", "int32", ("B",)), Port("new_len", "int32", ("B",)))
_ROUTE_QUERY = (Port("query", "T", ("B", "Hr", "L", "Dr")), Port("unit_key", "T", ("B", "Hk", "U", "Dr")))
_ROUTES = (Port("routes", "int32", ("B", "Hs", "L", "K")),)
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
    (*_ROUTE_QUERY, Port("candidates", "int32", ("B", "Hc", "L", "K1")), *_LENGTHS),
    _ROUTES,
    _ROUTE_ATTRIBUTES,
)
ROUTED_ATTENTION = Op(
    "RoutedAttention",
    "Softmax attention over the tokens of the routed blocks.",
    (
        Port("q", "T", ("B", "Hq", "L", "D")),
        Port("k", "T", ("B", "Hkv", "M", "D")),
        Port("v", "T", ("B", "Hkv", "M", "D")),
        Port("routes", "int32", ("B", "Hs", "L", "K")),
        *_LENGTHS,
    ),
    (Port("out", "T", ("B", "Hq", "L", "D")),),
    (_BLOCK_SIZE, _CAUSAL, Attribute("scale", "float", "factor on q.k before the softmax")),
)
EXPERT_ROUTE = Op(
    "ExpertRoute",
    "Keep groups of experts, then the best experts inside them.",
    (
        Port("logits", "float32", ("T", "E")),
        Port("group_logits", "float32", ("T", "Gp")),
        Port("select_bias", "float32", ("E",)),
    ),
    (Port("ids", "int32", ("T", "k")), Port("weights", "float32", ("T", "k"))),
    (
        _int("top_k", "experts kept", 1, MAX_TOPK),
        _int("topk_group", "groups kept", 1),
        Attribute("score_func", "string", "logits to scores", choices=("sigmoid", "softmax")),
        Attribute(
            "group_score",
            "string",
            "score of a group: its best, its two best summed, or the input group_logits",
            choices=("max", "top2_sum", "external"),
        ),
        _int("normalize", "1: the kept weights sum to 1 before scaling", 0, 1),
        Attribute("scale", "float", "factor on the weights"),
    ),
)
ROUTED_EXPERTS = Op(
    "RoutedExperts",
    "The weighted sum of the chosen experts' SwiGLU.",
    (
        Port("x", "T", ("T", "d")),
        Port("ids", "int32", ("T", "k")),
        Port("weights", "float32", ("T", "k")),
        Port("gate_up", "T", ("E", "2f", "d")),
        Port("down", "T", ("E", "d", "f")),
    ),
    (Port("out", "T", ("T", "d")),),
)

# Of engines only: a bundle's graph says the same by ScatterND (``export/engine/cache_writes.py``).
WRITE_CACHE = Op(
    "WriteCache",
    "The cache with the update at each row's start; nothing is written beyond its end.",
    (Port("cache", "T", ("B", "H", "M", "W")), Port("update", "T", ("B", "H", "L", "W")), Port("start", "int32", ("B",))),
    (Port("out", "T", ("B", "H", "M", "W")),),
    in_place=True,
)

OPS: tuple[Op, ...] = (COARSE_ROUTE, FINE_ROUTE, ROUTED_ATTENTION, EXPERT_ROUTE, ROUTED_EXPERTS)
GPU_OPS: tuple[Op, ...] = (*OPS, WRITE_CACHE)  # what a kernel library and its TensorRT plugins hold
BY_NAME: dict[str, Op] = {op.name: op for op in GPU_OPS}
