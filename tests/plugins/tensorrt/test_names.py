"""Every name of TensorRT's that the code uses exists in the real modules: read out of the sources, looked up in the modules."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests import ROOT

BUILDING = ("export/engine/network.py", "export/engine/sampling.py", "export/engine/worker.py", "export/engine/versions.py")
PLUGINS = ("plugins/tensorrt/python.py",)
# What a variable or field of this name is.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
}


def last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def names_in(source: str) -> Iterator[tuple[str, ...]]:
    """("DataType", "HALF") for trt.DataType.HALF, ("Builder", "create_network") for builder.create_network."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        if last_name(node.value) == "trt":
            yield (node.attr,)
        elif isinstance(node.value, ast.Attribute) and last_name(node.value.value) == "trt":
            yield node.value.attr, node.attr
        elif last_name(node.value) in CLASSES:
            yield CLASSES[last_name(node.value)], node.attr


def missing(trt: Any, files: tuple[str, ...]) -> set[str]:
    found = set()
    for file in files:
        for path in names_in((ROOT / file).read_text(encoding="utf-8")):
            holder = trt
            for name in path:
                if not hasattr(holder, name):
                    found.add(".".join(path))
                    break
                holder = getattr(holder, name)
    return found


def test_the_reader_notices() -> None:
    source = "parsed.builder.create_network(0)\ntrt.DataType.HALF\nself.trt.Nothing\nconfig.progress_monitor = 1"
    expected = {
        ("Builder", "create_network"),
        ("DataType", "HALF"),
        ("DataType",),
        ("Nothing",),
        ("IBuilderConfig", "progress_monitor"),
    }
    assert set(names_in(source)) == expected


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="there is no TensorRT-RTX for this machine")
def test_tensorrt_rtx_has_every_name() -> None:
    import tensorrt_rtx

    names = {path for file in BUILDING for path in names_in((ROOT / file).read_text(encoding="utf-8"))}
    assert ("Builder", "build_serialized_network") in names and ("OnnxParser", "parse") in names
    assert missing(tensorrt_rtx, (*BUILDING, *PLUGINS)) == set()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_lean") is None, reason="there is no lean TensorRT for this machine")
def test_the_lean_runtime_has_every_name_of_plugins() -> None:
    """It builds nothing: it has no builder, and no formats, which only a plugin that is being built is asked about."""
    import tensorrt_lean

    assert missing(tensorrt_lean, PLUGINS) == {"TensorFormat", "TensorFormat.LINEAR"}
    assert "Builder" in missing(tensorrt_lean, BUILDING)
