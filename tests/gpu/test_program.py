"""The program behind ``make gpu-test``, on the CPU: its checks pass in the interpreter, and report errors that are planted."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import gpu_kernels
from bilevel.plugins.library.gpu import KernelLibrary
from bilevel.plugins.tensorrt.headers import find_headers
from tests.doubles.gpu import Gpu, fake_gpu, number_kernels
from tests.gpu import checks_backends as gpu_checks_backends
from tests.gpu import checks_device as gpu_checks_device
from tests.gpu import checks_kernels as kernels
from tests.gpu import checks_library as gpu_checks_library
from tests.gpu import checks_plugins as gpu_checks_plugins
from tests.gpu import checks_sanitizer as gpu_checks_sanitizer
from tests.gpu import program as gpu_test
from tests.gpu.cases import HALF, SINGLE, Attention, Cache, ExpertRoute, Experts, Route
from tests.gpu.checks_library import Cases, library
from tests.gpu.checks_plugins import plugins
from tests.gpu.machine import Machine
from tests.gpu.result import Result
from tests.support.triton_calls import triton_launch

ATTENTION = Attention((4, 2, 2), 16, 4, 6, 3, (2, 17), (SINGLE,))
ROUTES = [Route((2, 1, 1), 3, 4, 6, 2, (2,), (HALF,), candidates=5)]
CASES_OF_EXPERTS = [Experts((2,), 3, 6, 7, 5, (HALF,))]
CASES_OF_CACHES = [Cache(2, 5, 9, (1, 4), (HALF,))]
CASES = Cases(
    (Attention((4, 2, 2), 16, 4, 6, 3, (), (HALF,)),),
    (Route((2, 1, 1), 3, 4, 6, 2, (), (SINGLE,), candidates=5),),
    (ExpertRoute(8, 4, 3, 4, "sigmoid", "external"),),
    (Experts((), 3, 6, 7, 5, (SINGLE,)),),
    (Cache(2, 5, 9, (), (SINGLE,)),),
    tokens=(2,),
)


class HostMachine(Machine):
    """Host memory and the driver of ``tests/doubles/gpu.py``."""

    arch = 80  # type: ignore[assignment]
    compile_all = staticmethod(number_kernels)

    def __init__(self, gpu: Gpu) -> None:
        super().__init__("cpu")
        self.gpu = gpu

    def allocate(self, count: int) -> Tensor:
        return self.gpu.memory.bytes(count)

    def synchronize(self) -> None:
        pass

    @contextmanager
    def stream(self) -> Iterator[int]:
        yield 0

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        return lambda: work(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu_program")


@pytest.fixture
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostMachine]:
    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cpu"}))
    gpu_kernels._load.cache_clear()
    with fake_gpu(folder) as gpu, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield HostMachine(gpu)
    gpu_kernels._load.cache_clear()


def right(results: Iterator[Result]) -> list[Result]:
    found = list(results)
    assert found and [result for result in found if result.ok is False] == []
    return found


def all_kernels(machine: Machine) -> Iterator[Result]:
    yield from kernels.attention(machine, [ATTENTION])
    yield from kernels.routes(machine, ROUTES)
    yield from kernels.expert_route(machine, CASES.expert_routes, tokens=3)
    yield from kernels.experts(machine, CASES_OF_EXPERTS)
    yield from kernels.caches(machine, CASES_OF_CACHES)


def test_kernels_pass(machine: HostMachine) -> None:
    found = {result.name for result in right(all_kernels(machine))}
    assert found >= {f"RoutedAttention {plan}" for plan in ("split", "tiles")} | {"FineRoute rows", "ExpertRoute rows"}
    assert found >= {f"{name} {plan}" for name in ("CoarseRoute", "SelectBlocks") for plan in ("split", "tiles")} | {
        "RoutedExperts pairs",
        "RoutedExperts tiles",
    }
    assert "WriteCache rows" in found
    assert all(result.ok for result in right(kernels.margins(machine, 20, 40, 8)))


def test_an_altered_output_is_reported(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one output of every call, by a little."""
    run_plan = triton_launch.run_plan

    def altered(op: Any, plan: Any, tensors: Any, outputs: Any, *rest: Any) -> None:
        run_plan(op, plan, tensors, outputs, *rest)
        flat = outputs[-1].view(-1)
        flat[0] += 1 if flat.dtype == torch.int32 else 64 * torch.finfo(flat.dtype).eps * float(flat.abs().max())

    monkeypatch.setattr(triton_launch, "run_plan", altered)
    found = [next(kernels.attention(machine, [ATTENTION])), next(kernels.expert_route(machine, CASES.expert_routes, tokens=3))]
    found += [next(kernels.experts(machine, CASES_OF_EXPERTS)), *kernels.routes(machine, ROUTES)]
    found += kernels.caches(machine, CASES_OF_CACHES)
    assert len(found) == 10 and all(result.ok is False for result in found)


def test_a_write_behind_a_tensor_is_reported(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    run_plan = triton_launch.run_plan

    def overrunning(*arguments: Any) -> None:
        run_plan(*arguments)
        if machine._guards:
            machine._guards[-1][0] = 0  # of the workspace

    monkeypatch.setattr(triton_launch, "run_plan", overrunning)
    first = next(kernels.attention(machine, [ATTENTION]))
    assert first.ok is False and "WROTE BEHIND A TENSOR" in first.measure


def test_what_bilevel_ops_gives_is_compared(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton_launch.run
    monkeypatch.setattr(triton_launch, "run", lambda *arguments: run(*arguments) * 2)
    first = next(kernels.attention(machine, [ATTENTION]))
    assert first.ok is False and "bilevel.ops gives something else" in first.measure
    monkeypatch.setattr(gpu_kernels, "DEVICES", frozenset({"cuda"}))
    first = next(kernels.attention(machine, [ATTENTION]))
    assert first.ok is False and "bilevel.ops would not use the kernel" in first.measure


def test_the_c_interface_and_the_plugins(machine: HostMachine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass, and a driver that loses launches and a library that refuses nothing are reported."""
    found = right(library(machine, folder, CASES))
    assert {result.name for result in found} == {"C interface", "C interface in place", "C interface refuses", "CUDA graph"}
    assert all(result.ok for result in found)
    has_headers = not isinstance(find_headers(), str)
    found = right(plugins(machine, folder, CASES))
    assert [result.ok for result in found] == ([True] * 7 if has_headers else [None])
    machine.gpu.driver.fake_configure(13000, 80, 1, 0, None)
    lost = [result for result in library(machine, folder, CASES) if result.name != "C interface refuses"]
    assert lost and all(result.ok is False for result in lost)
    if has_headers:
        assert all(result.ok is False for result in plugins(machine, folder, CASES))
    machine.gpu.configure()
    with monkeypatch.context() as lax:
        lax.setattr(KernelLibrary, "launch", lambda *arguments: None)
        lax_results = [result for result in library(machine, folder, CASES) if result.name == "C interface refuses"]
    assert len(lax_results) == 7 and all(result.ok is False for result in lax_results)
    assert "accepted (a rank too low)" in lax_results[0].measure


def test_groups_report_how_they_end() -> None:
    def raising() -> Iterator[Result]:
        yield Result("a", "b", "c", True)
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    lines: list[str] = []
    assert gpu_test.run_group(iter([Result("a", "b", "c", None)]), lines.append) == 0
    assert gpu_test.run_group(iter([Result("a", "b", "c", False)]), lines.append) == 1
    assert gpu_test.run_group(raising(), lines.append) == 1
    assert json.loads(lines[-1]) == ["the group ended early", "RuntimeError", "CUDA error: an illegal memory access", False]
    good, bad = json.dumps(["a", "b", "c", True]), json.dumps(["a", "b", "c", False])
    assert [r[3] for r in gpu_test.read_results([good], 0, "", "routes")] == [True]
    assert [r[3] for r in gpu_test.read_results([good, bad], 1, "", "routes")] == [True, False]
    for lines, status in (([], 0), ([good], -11), ([good], 1), ([good], 124)):
        last = gpu_test.read_results(lines, status, "Segmentation\nfault", "routes")[-1]
        assert last == ["the group ended early", "routes", f"exit status {status}: fault", False]


def test_every_group_is_wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's name leads to its checks."""
    ran: list[str] = []

    def noted(name: str) -> Callable[..., Iterator[Result]]:
        def check(*given: Any) -> Iterator[Result]:
            needs_machine = name not in gpu_test.RUNTIME
            assert isinstance(given[0], Machine) if needs_machine else True
            rest = given[1:] if needs_machine else given
            assert rest in ((), (tmp_path,))
            ran.append(name)
            yield from ()

        return check

    expected = [
        "attention",
        "routes",
        "margins",
        "experts",
        "expert_route",
        "caches",
        "library",
        "plugins",
        "far_offsets",
        "device",
        "backends",
        "small",
        "overrun",
    ]
    modules = (gpu_checks_library, gpu_checks_plugins, gpu_checks_sanitizer, gpu_checks_device, gpu_checks_backends)
    for module in (kernels, *modules):
        for name in expected:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, noted(name))
    for group in (*gpu_test.GROUPS, *gpu_test.ALONE, gpu_test.SANITIZED, "overrun"):
        list(gpu_test._group(group, tmp_path))
    assert ran == expected


def test_a_group_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as the program starts it; on a machine without a GPU it ends at once, which is a failure of the group."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gpu_test.read_results(*gpu_test.start("attention", tmp_path), "attention")
    assert [result[3] for result in found] == [False] and "exit status 2: gpu-test: PyTorch" in found[0][2]
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho '[1]'; exec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu_test, "_MOST_SECONDS", 0.5)
    lines, status, errors = gpu_test.start("attention", tmp_path, [str(slow)])
    assert (lines, status) == (["[1]"], 124) and "still running" in errors


def test_the_memory_checker_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    ok = json.dumps(["a", "b", "c", True])

    def verdicts(script: str) -> list[bool | None]:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return [result[3] for result in gpu_test.sanitize(tmp_path)]

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert verdicts(f"case \"$*\" in *sanitized*) echo '{ok}';; *) exit 86;; esac") == [True, True]
    assert verdicts("exit 86") == [False, True]  # an error, and nothing checked
    assert verdicts(f"echo '{ok}'; exit 86") == [False, True]  # every value right, but memory was touched that is nobody's
    assert verdicts(f"echo '{ok}'") == [True, False]  # it notices nothing
    monkeypatch.setattr(gpu_test, "find_sanitizer", lambda: None)
    assert [result[3] for result in gpu_test.sanitize(tmp_path)] == [None]


OUT = ["--json", os.devnull]


def test_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_test.main(OUT) == 2
    assert "is built without CUDA; name another Python: make gpu-test GPU_PYTHON=" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_test.main(OUT) == 2
    assert "PyTorch sees no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "TRITON_INTERPRET is set" in gpu_test.what_is_missing()


def test_a_board_without_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The runtime's checks are made, and what was not is said."""
    monkeypatch.setattr(gpu_test, "what_is_missing", lambda: "this Python has no PyTorch")
    monkeypatch.setattr(gpu_test, "has_gpu", lambda: True)
    assert gpu_test.describe_machine(has_torch=False).endswith(f"Python {sys.version.split()[0]}")
    started: list[str] = []

    def noted(name: str, folder: Path) -> tuple[list[str], int, str]:
        started.append(name)
        return [json.dumps(["a", name, "c", True])], 0, ""

    monkeypatch.setattr(gpu_test, "start", noted)
    assert gpu_test.main(OUT) == 0 and started == ["device", "backends"]
    printed = capsys.readouterr().out
    assert "not run kernels" in printed and "this Python has no PyTorch" in printed and "2 ok, 0 failed, 1 not run" in printed


def test_the_report_fails_where_a_check_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_test, "what_is_missing", lambda: "")
    monkeypatch.setattr(gpu_test, "describe_machine", lambda has_torch: "a GPU")
    monkeypatch.setattr(gpu_test, "sanitize", lambda folder: [["memory checker", "", "", None]])
    for ok, status in ((True, 0), (False, 1)):
        line = json.dumps(["a", "b", "c", ok])
        monkeypatch.setattr(gpu_test, "start", lambda name, folder, line=line: ([line], 0, ""))
        assert gpu_test.main(OUT) == status
        printed = capsys.readouterr().out
        assert ("7 ok, 0 failed, 1 not run" if ok else "0 ok, 7 failed, 1 not run") in printed


def test_it_ends_with_a_table_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts of every kind of check, each failure and what was not run with its reason; as JSON, and as a line of evidence."""
    results = [["routes", "a", "0", True], ["routes", "b", "off by 1", False], ["backend", "rtx", "no wheel", None]]
    monkeypatch.setattr(gpu_test, "what_is_missing", lambda: "")
    monkeypatch.setattr(gpu_test, "describe_machine", lambda has_torch: "a GPU")
    monkeypatch.setattr(gpu_test, "run_all", lambda folder: results)
    file = tmp_path / "build" / "gpu.json"
    assert gpu_test.main(["--json", str(file)]) == 1
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        "check passed failed not run",
        "routes 1 1 0",
        "failed: b: off by 1",
        "backend 0 0 1",
        "not run: rtx: no wheel",
    ):
        assert line.split() in printed
    written = json.loads(file.read_text())
    assert written["counts"] == {"passed": 1, "failed": 1, "not run": 1} and written["machine"] == "a GPU"
    assert [each["verdict"] for each in written["checks"]] == ["passed", "failed", "not run"]
    assert written["evidence"] == (
        f"| `make gpu-test`: routes: 1 checks; 1 checks failed | device | a GPU | {written['date']} |"
    )
