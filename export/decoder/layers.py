"""Which layers of a decoder are alike, so that one of each has to be traced (``bilevel.export.graph.repeat``).

Alike is judged by structure alone: the modules' classes, every attribute that they keep, and the shapes and types of their
tensors. Whatever a later layer adds (a gate, a switch of its own) sets it apart without a word here; a layer that knows its
index is alike to none, and is traced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from bilevel.export.graph.repeat import Layers
from bilevel.model import CausalLM, hidden_name
from bilevel.state import LayerState, Step

_WEIGHT = re.compile(r"(?<=^model\.model\.layers\.)\d+(?=\.)")  # model.model.layers.3.mlp.down_proj.weight
_PORT = re.compile(r"(?<=\.)\d+$")  # past.key.3
_TENSORS = ("_parameters", "_buffers", "_modules")


class _Left(nn.Module):
    """The place of a layer that is not traced: nothing is done there."""

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState | None]:
        return x, state


@contextmanager
def only(model: CausalLM, indices: Iterable[int]) -> Iterator[None]:
    """While the context lasts, the model has these layers only, each in its own place."""
    layers, wanted = model.model.layers, set(indices)
    try:
        model.model.layers = nn.ModuleList(layer if i in wanted else _Left() for i, layer in enumerate(layers))
        yield
    finally:
        model.model.layers = layers


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with several names appears once, under the first."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in _all_tensors(module):
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def port_layer(name: str) -> int | None:
    """The layer that an input or output of the graph belongs to: 3 for past.key.3, None for token_ids."""
    found = _PORT.search(name)
    return int(found.group()) if found else None


def alike(decoder: nn.Module, model: CausalLM, ports: Sequence[str]) -> Layers:
    """For each layer of ``model``, which ``decoder`` holds as its ``model``, the first one of its structure.

    ports: the names of the graph's inputs and outputs; layers of one structure have the same.
    """
    uses = Counter(id(tensor) for _, tensor in _all_tensors(decoder))
    shared = {name for name, tensor in named_tensors(decoder).items() if uses[id(tensor)] > 1}
    first: dict[Hashable, int] = {}
    template = [
        first.setdefault((_structure(layer, uses), tuple(_PORT.sub("", p) for p in ports if port_layer(p) == index)), index)
        for index, layer in enumerate(model.model.layers)
    ]

    def own(name: str) -> int | None:
        found = None if name in shared else _WEIGHT.search(name) or _PORT.search(name)
        return int(found.group()) if found else None

    def renamed(name: str, index: int) -> str:
        pattern = _WEIGHT if _WEIGHT.search(name) else _PORT
        return pattern.sub(str(index), name)

    return Layers(template, hidden_name, own, renamed)


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def _structure(layer: nn.Module, uses: Mapping[int, int]) -> Hashable:
    """Everything that the trace of a layer can depend on but for the values of its own tensors."""
    parts: list[Hashable] = []
    for path, module in layer.named_modules():
        facts = tuple((name, _fact(value)) for name, value in sorted(vars(module).items()) if name not in _TENSORS)
        tensors = tuple(
            (name, tensor if tensor is None else (tuple(tensor.shape), tensor.dtype, id(tensor) * (uses[id(tensor)] > 1)))
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
        )
        parts.append((path, type(module), facts, tensors, tuple(n for n, m in module._modules.items() if m is None)))
    return tuple(parts)


def _fact(value: object) -> Hashable:
    """An attribute for comparison: by value where it has one; what may change is itself alone, unless it is empty."""
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, Hashable) and not isinstance(value, torch.Tensor):
        return value
    return id(value) if value else ()
