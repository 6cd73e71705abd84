"""What ``bilevel doctor`` tries: the driver's version, memory on the GPU, libraries; and pairs of versions that do not fit."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bilevel.errors import BilevelError
from bilevel.machine import Machine, is_loaded
from bilevel.plugins.library.gpu import KernelLibrary
from bilevel.runtime.backend.device_memory import CudaDevice

_TRIAL_BYTES = 1 << 20
# What to install for a driver's CUDA; a Jetson's driver comes with JetPack and is not replaced.
_FITTING = {
    12: "JetPack 6.2 (CUDA 12.6) takes JetPack's own TensorRT 10.3 and pip install 'cuda-bindings==12.*'; elsewhere take "
    "wheels that end in -cu12, or a newer driver",
    13: "JetPack 7.x (CUDA 13) takes JetPack's own TensorRT and pip install 'cuda-bindings==13.*'; elsewhere take wheels "
    "that end in -cu13",
}


@dataclass(frozen=True)
class Trial:
    """One call that was made. problem: why it failed, with the remedy; "" where it did not. measure: what it gave."""

    what: str
    measure: str
    problem: str


def find_wheels() -> dict[str, str]:
    """Installed distributions that are made for one CUDA (``...-cu13``), and their versions."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "")
        if re.search(r"^(tensorrt|onnxruntime).*[-_]cu\d+", name):
            found[name.replace("_", "-")] = distribution.version
    return found


def pair_problems(machine: Machine, wheels: Iterable[str] = ()) -> Iterator[str]:
    """Pairs of versions that do not fit: what is made for a later CUDA than the driver's major version."""
    if machine.driver_cuda is None:
        return
    driver = int(machine.driver_cuda.split(".")[0])
    remedy = _FITTING.get(driver, "install a driver for CUDA 12 or newer")
    bindings = machine.packages.get("cuda.bindings")
    made_for = {f"cuda-bindings {bindings}": bindings} if bindings and is_loaded(bindings) else {}
    made_for |= {name: name.rsplit("-cu", 1)[1] for name in wheels}
    for name, version in made_for.items():
        number = re.match(r"\d+", version)
        if number and int(number[0]) > driver:
            board = f"{machine.jetpack}'s" if machine.jetpack else "the"
            yield f"{name} is for CUDA {int(number[0])}, {board} driver for CUDA {machine.driver_cuda}: {remedy}"


def _try(what: str, call: Callable[[], str]) -> Trial:
    try:
        return Trial(what, call(), "")
    except (BilevelError, OSError) as error:
        return Trial(what, "", str(error))


def _use_memory() -> str:
    """A MiB is allocated, written, read and freed."""
    device = CudaDevice()
    memory, sent = device.allocate(_TRIAL_BYTES, zeroed=True), np.arange(16, dtype=np.int32)
    back = np.zeros_like(sent)
    device.upload(memory.address, sent)
    device.download(back, memory.address)
    device.synchronize()
    if not np.array_equal(back, sent):
        raise OSError("what was copied to the GPU came back changed; check the GPU: nvidia-smi -q, dmesg")
    return f"1 MiB written and read, {device.free_bytes() / 2**30:.1f} GiB free"


def _load(path: Path) -> str:
    return ", ".join(f"sm_{arch}" for arch in KernelLibrary(path).info["architectures"])


def try_all(machine: Machine, libraries: Iterable[Path]) -> list[Trial]:
    """Every call: of the driver, of memory where there is a GPU, of each kernel library for this machine."""
    driver = machine.driver_cuda
    trials = [Trial("driver version", f"CUDA {driver}" if driver else "", machine.driver_problem)]
    if machine.gpus and is_loaded(machine.packages.get("cuda.bindings")):
        trials.append(_try("memory of the GPU", _use_memory))
    trials += [_try(f"load {path}", lambda path=path: _load(path)) for path in libraries]  # type: ignore[misc]
    return trials + [Trial("versions", "", problem) for problem in pair_problems(machine, find_wheels())]
