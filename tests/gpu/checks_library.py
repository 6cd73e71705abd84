"""Checks of ``make gpu-test``, second part: a kernel library built for this GPU, by its C interface."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import contract
from bilevel.errors import BilevelError, KernelError
from bilevel.plugins.launch.tiles import ARCHITECTURES
from bilevel.plugins.library.build import build_library
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall, KernelLibrary
from tests.gpu.cases import BRAIN, HALF, SINGLE, Attention, Cache, ExpertRoute, Experts, Route
from tests.gpu.judges import judge
from tests.gpu.machine import Attributes, Inputs, Machine, choose_cuda, dtype_name, geometry_of
from tests.gpu.result import Result


@dataclass(frozen=True)
class Made:
    """One call: its inputs where a generator lives. tokens: L or T."""

    name: str
    inputs: Inputs
    attributes: Attributes
    tokens: int


@dataclass(frozen=True)
class Cases:
    """The geometries of the library. tokens: of the calls, few and many: an operator's first and last plan."""

    attention: tuple[Attention, ...]
    routes: tuple[Route, ...]
    expert_routes: tuple[ExpertRoute, ...]
    experts: tuple[Experts, ...]
    caches: tuple[Cache, ...]
    tokens: tuple[int, ...] = (2, 70)

    def calls(self, machine: Machine, seed: int = 0) -> Iterator[Made]:
        """One call for every geometry, data type and number of tokens; another seed gives other values of the same sizes."""
        for tokens in self.tokens:
            for case in self.attention:
                for dtype in case.dtypes:
                    yield Made("RoutedAttention", *case.call(machine.random(seed), tokens, dtype), tokens)
            for route in self.routes:
                yield Made("SelectBlocks", *route.given(machine.random(seed), tokens), tokens)
                for dtype in route.dtypes:
                    yield Made("CoarseRoute", *route.call(machine.random(seed), tokens, dtype, fine=False), tokens)
                    yield Made("FineRoute", *route.call(machine.random(seed), tokens, dtype, fine=True), tokens)
            for choice in self.expert_routes:
                yield Made("ExpertRoute", *choice.call(machine.random(seed), tokens), tokens)
            for experts in self.experts:
                for dtype in experts.dtypes:
                    yield Made("RoutedExperts", *experts.call(machine.random(seed), tokens, dtype), tokens)
            for cache in self.caches:
                for dtype in cache.dtypes:
                    yield Made("WriteCache", *cache.call(machine.random(seed), tokens, dtype), tokens)


CASES = Cases(
    (
        Attention((32, 8, 8), 128, 64, 64, 16, (), (HALF, BRAIN)),
        Attention((6, 3, 2), 80, 48, 9, 2, (), (SINGLE,)),
    ),
    (Route((32, 8, 8), 128, 64, 300, 16, (), (HALF,)), Route((6, 3, 2), 20, 5, 20, 9, (), (SINGLE,), init=2, local=3)),
    (ExpertRoute(256, 8, 4, 8, "sigmoid", "top2_sum"),),
    (Experts((), 8, 64, 512, 256, (BRAIN,)), Experts((), 3, 6, 17, 40, (SINGLE,))),
    (Cache(8, 128, 4096, (), (HALF, BRAIN)), Cache(3, 5, 100, (), (SINGLE,))),
)


def build(machine: Machine, cases: Cases, path: Path) -> KernelLibrary:
    """The library at ``path``, built for this machine's architecture unless it lies there already. Raises BilevelError."""
    if not path.is_file():
        found = {}
        for made in cases.calls(machine):
            op = contract.BY_NAME[made.name]
            kind = dtype_name(next(iter(made.inputs.values())))
            geometry = geometry_of(op, made.inputs, made.attributes)
            found[repr((op.name, sorted(geometry.items()), kind))] = (op, geometry, kind)
        cuda = choose_cuda(machine.arch)
        build_library(list(found.values()), [machine.arch], path, cuda=cuda, compile_all=machine.compile_all)
    return KernelLibrary(path)


def describe(tensor: Tensor) -> DeviceTensor:
    return DeviceTensor(tensor.data_ptr(), tuple(tensor.shape), dtype_name(tensor))


@dataclass
class Placed:
    """A call in the machine's memory, with a workspace of exactly the size that the library asks for."""

    made: Made
    inputs: Inputs
    outputs: list[Tensor]
    workspace: Tensor
    call: KernelCall

    def launch(self, library: KernelLibrary, stream: int) -> None:
        library.launch(self.call, self.workspace.data_ptr(), self.workspace.numel(), stream)

    def judge(self) -> tuple[str, bool]:
        return judge(self.made.name, self.outputs, self.inputs, self.made.attributes)


def place(machine: Machine, library: KernelLibrary, made: Made) -> Placed:
    op = contract.BY_NAME[made.name]
    inputs = {key: machine.put(x) for key, x in made.inputs.items()}
    outputs = machine.outputs(op, inputs, made.attributes)
    call = KernelCall(op, [describe(x) for x in inputs.values()], [describe(x) for x in outputs], made.attributes)
    return Placed(made, inputs, outputs, machine.bytes(library.workspace_size(call, machine.arch)), call)


def _title(made: Made) -> str:
    size = "T" if made.name in ("ExpertRoute", "RoutedExperts") else "L"
    return f"{made.name} {dtype_name(next(iter(made.inputs.values())))} {size}={made.tokens}"


def launches(machine: Machine, library: KernelLibrary, calls: Sequence[Made]) -> Iterator[Result]:
    """Every operator on a side stream; nothing may be written behind a tensor or the workspace."""
    for made in calls:
        placed = place(machine, library, made)
        with machine.stream() as stream:
            placed.launch(library, stream)
        intact = machine.intact()
        measure, right = placed.judge()
        measure = f"{measure}, workspace {placed.workspace.numel():,} bytes" + ("" if intact else ", WROTE BEHIND A TENSOR")
        yield Result("C interface", _title(made), measure, right and intact)


def in_place(machine: Machine, library: KernelLibrary, calls: Sequence[Made]) -> Iterator[Result]:
    """A cache whose output is itself: what is not updated stays where it is."""
    for made in calls:
        if made.name != "WriteCache":
            continue
        placed, truth = place(machine, library, made), machine.put(made.inputs["cache"])
        cache = placed.inputs["cache"]
        call = replace(placed.call, outputs=[describe(cache)])
        with machine.stream() as stream:
            library.launch(call, placed.workspace.data_ptr(), placed.workspace.numel(), stream)
        intact = machine.intact()
        measure, right = judge(made.name, [cache], {**placed.inputs, "cache": truth}, made.attributes)
        measure += "" if intact else ", WROTE BEHIND A TENSOR"
        yield Result("C interface in place", _title(made), measure, right and intact)


def _bad_calls(call: KernelCall) -> Iterator[tuple[str, KernelCall]]:
    """Calls that break the contract, each in one place."""

    def changed(index: int, **values: Any) -> KernelCall:
        inputs = list(call.inputs)
        inputs[index] = replace(inputs[index], **values)
        return replace(call, inputs=inputs)

    first = call.inputs[0]
    yield "a rank too low", changed(0, shape=first.shape[1:])
    yield "a size that differs elsewhere", changed(1, shape=(*call.inputs[1].shape[:-1], call.inputs[1].shape[-1] + 1))
    yield "a negative size", changed(0, shape=(-1, *first.shape[1:]))
    yield "another data type", changed(0, dtype="int32")
    yield "a null address", changed(1, address=0)
    yield "an address off by 8 bytes", changed(0, address=first.address + 8)
    yield "an input less", replace(call, inputs=call.inputs[:-1])
    yield (
        "an output of another shape",
        replace(call, outputs=[replace(call.outputs[0], shape=(*call.outputs[0].shape[:-1], 1 + call.outputs[0].shape[-1]))]),
    )
    for name, value in call.attributes.items():
        yield f"no {name}", replace(call, attributes={key: x for key, x in call.attributes.items() if key != name})
        if not isinstance(value, float):
            yield f"{name} not a number", replace(call, attributes={**call.attributes, name: float("nan")})
        if isinstance(value, int):
            yield f"{name} that was not built", replace(call, attributes={**call.attributes, name: value + 1000})


def refusals(machine: Machine, library: KernelLibrary, calls: Sequence[Made]) -> Iterator[Result]:
    """Wrong calls are refused in a sentence and leave the outputs as they were."""
    done: set[str] = set()
    for made in calls:
        if made.name in done:
            continue
        done.add(made.name)
        placed = place(machine, library, made)
        accepted, bad = [], list(_bad_calls(placed.call))
        room = placed.workspace.numel()
        bad_rooms = [(255, 0), (0, 0), (room, 128)] if room else []  # a plan that has a buffer needs 256 bytes
        for what, call in bad:
            with suppress(KernelError):
                library.launch(call, placed.workspace.data_ptr(), room)
                accepted.append(what)
        for size, offset in bad_rooms:
            with suppress(KernelError):
                library.launch(placed.call, placed.workspace.data_ptr() + offset, size)
                accepted.append(f"a workspace of {size} bytes at an offset of {offset}")
        blank = machine.outputs(placed.call.op, placed.inputs, made.attributes)
        intact = machine.intact()
        same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(placed.outputs, blank, strict=True))
        measure = f"{len(bad) + len(bad_rooms)} wrong calls, {len(accepted)} accepted" + (
            f" ({accepted[0]})" if accepted else ""
        )
        measure += "" if same else "; AN OUTPUT WAS WRITTEN"
        yield Result("C interface refuses", made.name, measure, not accepted and same and intact)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def graphs(machine: Machine, library: KernelLibrary, cases: Cases) -> Iterator[Result]:
    """``bilevel_prepare`` in a library from which nothing ran yet, capture into a CUDA graph, replay with other inputs."""
    # Another file is another library to the loader.
    fresh = KernelLibrary(Path(shutil.copy(library.path, Path(tempfile.mkdtemp(dir=library.path.parent)) / "fresh.so")))
    others = list(cases.calls(machine, seed=1))
    for made, other in zip(cases.calls(machine), others, strict=True):
        placed = place(machine, fresh, made)
        fresh.prepare(placed.call)
        replay = machine.capture(lambda stream, placed=placed: placed.launch(fresh, stream))  # type: ignore[misc]
        untouched = all(
            bool((_bits(x) == _bits(y)).all()) for x, y in zip(placed.outputs, _blank(machine, placed), strict=True)
        )
        for key, x in placed.inputs.items():
            x.copy_(other.inputs[key])
        replay()
        intact = machine.intact()
        measure, right = placed.judge()
        measure += "" if untouched else "; CAPTURING RAN THE KERNELS"
        yield Result("CUDA graph", f"{_title(made)}, other inputs", measure, right and intact and untouched)


def _blank(machine: Machine, placed: Placed) -> list[Tensor]:
    return machine.outputs(placed.call.op, placed.inputs, placed.made.attributes)


def library(machine: Machine, folder: Path, cases: Cases = CASES) -> Iterator[Result]:
    """All checks of the C interface; builds ``folder``/library.so."""
    if machine.arch not in ARCHITECTURES:
        yield Result("C interface", f"sm_{machine.arch}", "bilevel kernels build has no such architecture", None)
        return
    try:
        made = build(machine, cases, folder / "library.so")
    except BilevelError as error:
        yield Result("C interface", f"sm_{machine.arch}", f"cannot be built: {error}", False)
        return
    calls = list(cases.calls(machine))
    yield from launches(machine, made, calls)
    yield from in_place(machine, made, calls)
    yield from refusals(machine, made, calls)
    yield from graphs(machine, made, cases)
