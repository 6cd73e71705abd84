"""Shorter ways through torch.onnx and onnxscript, which give the same graphs; they hold while a module is traced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from onnxscript.rewriter.rules.common import slice_split_rule
from torch.onnx._internal.exporter import _registration


@contextmanager
def quicker() -> Iterator[None]:
    """Leave out what an export of ours repeats, or needs not at all."""
    with _without_slow_rule(), _registry_once():
        yield


@contextmanager
def _without_slow_rule() -> Iterator[None]:
    """Without onnxscript's rewrite of two Slices to a Split: it scans the whole graph at every node, which was the largest
    part of an export of 30 layers, and our graphs hold no such pair."""
    slice_split_rule.try_rewrite = lambda *arguments, **options: None  # hides the method of this one rule
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


_FROM_TORCHLIB = "from_torchlib"
_read_torchlib = _registration.ONNXRegistry.from_torchlib


@lru_cache(maxsize=1)
def _torchlib(**options: Any) -> _registration.ONNXRegistry:
    return _read_torchlib(**options)


def _from_torchlib(**options: Any) -> _registration.ONNXRegistry:
    """The registry of PyTorch's operators; a copy, because an export adds translations of its own."""
    registry = copy.copy(_torchlib(**options))
    registry.functions = {target: list(translations) for target, translations in registry.functions.items()}
    return registry


@contextmanager
def _registry_once() -> Iterator[None]:
    """torch.onnx reads the source of 500 translations at every export, a fifth of a small one: once in a process is enough."""
    before = vars(_registration.ONNXRegistry)[_FROM_TORCHLIB]
    setattr(_registration.ONNXRegistry, _FROM_TORCHLIB, staticmethod(_from_torchlib))
    try:
        yield
    finally:
        setattr(_registration.ONNXRegistry, _FROM_TORCHLIB, before)
