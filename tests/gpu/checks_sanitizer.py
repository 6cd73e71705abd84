"""Checks of ``make gpu-test`` that run under compute-sanitizer: one call of every kernel, and a write to be noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from tests.gpu import checks_kernels as kernels
from tests.gpu.cases import BRAIN, HALF, SINGLE, Attention, Cache, ExpertRoute, Experts, Route
from tests.gpu.checks_library import CASES, build, launches
from tests.gpu.checks_plugins import plugins
from tests.gpu.machine import Machine
from tests.gpu.result import Result

# Of these the kernels are compiled already: they are among gpu_cases.
_ATTENTION = (Attention((6, 3, 2), 80, 48, 9, 2, (1, 70), (SINGLE,)), Attention((4, 2, 2), 64, 5, 30, 4, (1, 40), (HALF,)))
_ROUTES = (Route((6, 3, 2), 20, 5, 6, 9, (1, 20), (SINGLE,), init=2, local=3, causal=0),)
_EXPERTS = (Experts((3, 70), 3, 6, 17, 40, (BRAIN,)),)


def small(machine: Machine, folder: Path) -> Iterator[Result]:
    """Every kernel of every operator, the C interface and, where the library has them, the plugins."""
    yield from kernels.attention(machine, _ATTENTION)
    yield from kernels.routes(machine, _ROUTES)
    yield from kernels.expert_route(machine, (ExpertRoute(8, 4, 3, 4, "sigmoid", "external"),))
    yield from kernels.experts(machine, _EXPERTS)
    yield from kernels.caches(machine, (Cache(3, 5, 40, (2, 40), (SINGLE,)),))
    if (folder / "library.so").is_file():
        yield from launches(machine, build(machine, CASES, folder / "library.so"), list(CASES.calls(machine)))
        yield from plugins(machine, folder)


def overrun(machine: Machine) -> Iterator[Result]:
    """A float written right behind a tensor that has memory of its own."""
    from tests.gpu.overrun import write_one

    out = torch.zeros(1024, device=machine.device)
    write_one[(1,)](out, out.numel())
    machine.synchronize()
    yield Result("overrun", "a float behind a tensor", "written", True)
