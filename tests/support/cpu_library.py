"""The CPU library under test: its instruction sets, and one-node models that nothing but the library can answer."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from bilevel.plugins.library.cpu import VARIABLE, find_cpu_library, instruction_set
from tests.support.operator_calls import Attributes, Inputs, model_of, node_of

SETS = ("avx512", "avx2", "baseline")


@contextmanager
def wanted_set(name: str) -> Iterator[None]:
    """The library's kernels are created for this instruction set, where the CPU has it."""
    before = os.environ.get("BILEVEL_CPU_ISA")
    os.environ["BILEVEL_CPU_ISA"] = name
    try:
        yield
    finally:
        os.environ.pop("BILEVEL_CPU_ISA")
        if before is not None:
            os.environ["BILEVEL_CPU_ISA"] = before


def required_library() -> Path:
    """The library; its absence fails a test, unless it was asked for or there is no compiler to build it with."""
    found = find_cpu_library()
    if found is not None:
        return found
    if os.environ.get(VARIABLE, "").lower() == "none":
        pytest.skip(f"{VARIABLE}=none")
    compilers = [os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        pytest.skip("no C++ compiler: the library is not built")
    pytest.fail("there is a C++ compiler, but no library in plugins/: pip install -e . and read what the compiler says")


@functools.cache
def sets_here() -> tuple[str, ...]:
    """The instruction sets that this CPU has, the widest first."""
    found = []
    for name in SETS:
        with wanted_set(name):
            found += [name] if instruction_set(required_library()) == name else []
    return tuple(found)


def options_with_library(threads: int = 1) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(required_library()))
    return options


@functools.lru_cache(maxsize=64)
def open_kernel(name: str, attributes: tuple[tuple[str, Any], ...], isa: str, threads: int) -> ort.InferenceSession:
    model = model_of([node_of(name, dict(attributes))])
    del model.functions[:]
    with wanted_set(isa):
        return ort.InferenceSession(model.SerializeToString(), options_with_library(threads))


def run_kernel(name: str, inputs: Inputs, attributes: Attributes, isa: str = SETS[0], threads: int = 1) -> list[Tensor]:
    """What the library answers; an instruction set that the CPU lacks gives way to the best one."""
    session = open_kernel(name, tuple(attributes.items()), isa, threads)
    return [torch.from_numpy(out) for out in session.run(None, {key: value.numpy() for key, value in inputs.items()})]
