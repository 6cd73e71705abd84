"""Which rows of which stored tensor fill which of the model's tensors, from a family's layout and from what is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.config import ModelConfig
from bilevel.families.shared.family import EMBEDDING, HEAD, K, Layout, Q

_IN_LAYER = re.compile(r"^model\.layers\.\d+\.")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _as_row(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass(frozen=True)
class Piece:
    """A stored tensor, times ``factor``, fills ``view`` of the model's tensor ``target``.

    shape: of the whole stored tensor. rows: the (first, end) that belong there, None: all. order: of the rows of one head,
    None where they keep theirs.
    """

    target: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = _itself
    rows: tuple[int, int] | None = None
    factor: float = 1.0
    order: tuple[int, ...] | None = None

    def fill(self, stored: Tensor, target: Tensor) -> Tensor:
        """Copy what belongs there; returns the part of ``target`` that was filled."""
        value, place = stored if self.rows is None else stored[slice(*self.rows)], self.view(target)
        if self.order is not None:
            value = value.unflatten(0, (-1, len(self.order)))[:, list(self.order)].flatten(0, 1)
        if self.factor != 1:
            value = value.to(torch.promote_types(value.dtype, torch.float32)) * self.factor
        place.copy_(value)
        return place

    def add(self, stored: Tensor, change: Tensor) -> None:
        """Add to ``stored`` what adds ``change``, a tensor of the model's shape and fp32, to the model's tensor."""
        change, place = self.view(change) / self.factor, stored if self.rows is None else stored[slice(*self.rows)]
        if self.order is not None:
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            change = change.unflatten(0, (-1, len(back)))[:, back].flatten(0, 1)
        place.copy_(place.float() + change)


def _rest(name: str) -> tuple[str, str]:
    """A tensor's name as (``model.layers.{i}.`` or nothing, the rest)."""
    prefix = match.group() if (match := _IN_LAYER.match(name)) else ""
    return prefix, name[len(prefix) :]


def _under(rest: str, modules: Collection[str]) -> str | None:
    """The longest of ``modules`` that the tensor ``rest`` is, or belongs to."""
    owners = [module for module in modules if rest == module or rest.startswith(f"{module}.")]
    return max(owners, key=len, default=None)


def _stored_name(name: str, layout: Layout) -> str:
    prefix, rest = _rest(name)
    module = _under(rest, layout.names)
    return name if module is None else f"{prefix}{layout.names[module]}{rest[len(module) :]}"


def _rotary_order(rest: str, config: ModelConfig, layout: Layout) -> tuple[int, ...] | None:
    """Order of a head's rows where positions turn neighbours: the pairs' first channels, their second ones, the unturned."""
    modules = (Q, K, "self_attn.q_norm", "self_attn.k_norm")
    if not layout.interleaved or _under(rest, modules) is None:
        return None
    turned = config.rotated_channels
    return (*range(0, turned, 2), *range(1, turned, 2), *range(turned, config.head_dim))


def plan(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, layout: Layout, stored: Collection[str]
) -> dict[str, list[Piece]]:
    """Stored name -> its pieces, for a model whose tensors have these shapes. stored: the names that there are."""
    pieces: dict[str, list[Piece]] = {}
    for name, shape in shapes.items():
        prefix, rest = _rest(name)
        module = _under(rest, layout.factors)
        piece = Piece(name, shape, factor=layout.factors[module] if module else 1.0, order=_rotary_order(rest, config, layout))
        if rest in layout.one_row:
            piece = Piece(name, (1, *shape), _as_row)
        fused = next((whole for whole, parts in layout.fused.items() if _under(rest, parts)), None)
        source = _stored_name(name, layout)
        if fused is not None:
            source, piece = _fused(prefix, rest, fused, layout, shapes, piece)
        elif rest.startswith("mlp.experts.") and not _is_stacked(prefix, layout, stored):
            for expert_name, expert in _one_by_one(prefix, rest, piece):
                pieces.setdefault(expert_name, []).append(expert)
            continue
        else:
            source = _end(name, source, config, layout, stored)
        pieces.setdefault(source, []).append(piece)
    return pieces


def _end(name: str, source: str, config: ModelConfig, layout: Layout, stored: Collection[str]) -> str:
    """What a tied embedding or head is read from: its own tensor, or the other one where that alone is stored."""
    ends = [_stored_name(f"{end}.weight", layout) for end in (EMBEDDING, HEAD)]
    if source not in ends or source in stored or not (config.tie_word_embeddings or layout.tied):
        return source
    other = ends[1 - ends.index(source)]
    return other if other in stored else source


def tied_names(config: ModelConfig, layout: Layout) -> tuple[str, str] | None:
    """The stored names of embedding and head, which must be equal where both are there; None where they are two."""
    if not (config.tie_word_embeddings or layout.tied):
        return None
    embedding, head = (_stored_name(f"{end}.weight", layout) for end in (EMBEDDING, HEAD))
    return embedding, head


def _fused(
    prefix: str, rest: str, whole: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]], piece: Piece
) -> tuple[str, Piece]:
    """Name and rows of a tensor inside the stored one that holds several."""
    parts = layout.fused[whole]
    module = _under(rest, parts)
    assert module is not None
    leaf = rest[len(module) :]
    counts = [shapes[f"{prefix}{part}{leaf}"][0] for part in parts]
    first = sum(counts[: parts.index(module)])
    rows = (first, first + piece.shape[0])
    shape = (sum(counts), *piece.shape[1:])
    return f"{prefix}{whole}{leaf}", Piece(piece.target, shape, rows=rows, factor=piece.factor, order=piece.order)


def _is_stacked(prefix: str, layout: Layout, stored: Collection[str]) -> bool:
    names = (_stored_name(f"{prefix}mlp.experts.{kind}", layout) for kind in ("gate_up_proj", "down_proj"))
    return any(name in stored for name in names)


def _one_by_one(prefix: str, rest: str, piece: Piece) -> list[tuple[str, Piece]]:
    """(stored name, piece) of every expert's own tensors, where they are stored one by one."""
    count, rows, columns = piece.shape
    kinds = [("down", slice(None), rows)]
    if rest.endswith("gate_up_proj"):
        kinds = [("gate", slice(0, rows // 2), rows // 2), ("up", slice(rows // 2, rows), rows // 2)]
    return [
        (
            f"{prefix}mlp.experts.{expert}.{kind}_proj.weight",
            Piece(piece.target, (height, columns), _part(expert, part), factor=piece.factor),
        )
        for expert in range(count)
        for kind, part, height in kinds
    ]


def _part(expert: int, rows: slice) -> Callable[[Tensor], Tensor]:
    def view(stack: Tensor) -> Tensor:
        return stack[expert, rows]

    return view
