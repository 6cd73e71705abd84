"""Which backend runs a bundle on this machine, and why the others do not.

A bundle's graph runs in ONNX Runtime anywhere; its engines run where their TensorRT, their GPU and their kernel library are.
``choose`` takes the best, and says so. ONNX Runtime on the GPU is never taken unasked: the graph's portable bodies run there,
whose speed on a GPU has been measured nowhere, while the CPU has kernels for the same operators whose speed is known.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bilevel
from bilevel.bundle.engines import BACKENDS, FOLDER, Engine, find_engines
from bilevel.bundle.format import Bundle, load_bundle
from bilevel.errors import EngineError, KernelError, RequestError
from bilevel.folders import file_sha256
from bilevel.machine import Machine, is_loaded, look
from bilevel.plugins.library.gpu import distrust_problem, read_info, serves
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.session import Session

AUTO, ONNX, ONNX_CUDA = "auto", "onnx", "onnx-cuda"
CHOICES = (AUTO, ONNX, ONNX_CUDA, *BACKENDS)
LIBRARY_VARIABLE, LIBRARY_NAME = "BILEVEL_KERNEL_LIBRARY", "libbilevel_kernels.so"
MOST_THREADS = 1024
RTX_ARCHITECTURES = frozenset({75, 80, 86, 89, 120, 121})  # GPUs that TensorRT-RTX serves
_RESERVE = 256 * 2**20  # bytes of a GPU's memory that driver and libraries take for themselves


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """``--backend`` and ``--library``, for every command that runs a bundle by ``open_session``."""
    parser.add_argument(
        "--backend",
        choices=CHOICES,
        default=AUTO,
        help="what runs the bundle; auto takes its best engine that runs here, else ONNX Runtime (default: %(default)s)",
    )
    parser.add_argument(
        "--library", type=Path, metavar="FILE", help="the kernel library for TensorRT's plugins (see bilevel doctor)"
    )


@dataclass(frozen=True)
class BackendOption:
    """One of the things that can run a bundle: an engine built from it, or its graph in ONNX Runtime.

    problem: why it does not run here, "" where it does; one sentence with the remedy.
    """

    backend: str
    name: str
    problem: str
    engine: Engine | None = None
    library: Path | None = None

    @property
    def does_run(self) -> bool:
        """Whether nothing is in its way."""
        return not self.problem


def library_places(bundle: Path | None, machine: Machine, named: Path | None) -> list[tuple[str, Path]]:
    """Where the kernel library is looked for, in this order: the argument, the bundle, the environment, the package."""
    places = [("argument", named)] if named else []
    if bundle is not None:
        places.append(("bundle", bundle / "kernels" / machine.machine / LIBRARY_NAME))
    if os.environ.get(LIBRARY_VARIABLE):
        places.append(("environment", Path(os.environ[LIBRARY_VARIABLE])))
    places.append(("package", Path(bilevel.__file__).parent / "plugins" / LIBRARY_NAME))
    return [(where, path) for where, path in places if path is not None]


def find_library(bundle: Path, machine: Machine, named: Path | None = None) -> Path | None:
    """The first kernel library that is there and may be loaded. Raises KernelError where ``named`` is no file.

    A bundle's own is taken where this user built it, trusts it, or names it.
    """
    if named is not None and not named.is_file():
        raise KernelError(f"{named} is no file; build it: bilevel kernels build --geometry {bundle} --out {named}")
    places = [(where, path) for where, path in library_places(bundle, machine, named) if path.is_file()]
    return next((path for where, path in places if where != "bundle" or not distrust_problem(path)), None)


def library_problem(library: Path, machine: Machine) -> str:
    """Why TensorRT cannot use a kernel library here; "" where it can."""
    try:
        info: dict[str, Any] = read_info(library)
    except KernelError as error:
        return str(error)
    archs = ",".join(f"sm_{arch}" for arch in sorted(machine.architectures)) or "sm_NN"
    remedy = f"bilevel kernels build --geometry BUNDLE --arch {archs}"
    if info["target"] != machine.machine:
        return (
            f"{library} is for {info['target']}, this machine is {machine.machine}; "
            f"build one: {remedy} --target {machine.machine}"
        )
    if info.get("tensorrt") is None:
        return f"{library} was built without TensorRT's headers and has no plugins; build it again with them: {remedy}"
    if machine.architectures and not any(serves(info, capability) for capability in machine.architectures):
        return f"{library} holds no kernels for this GPU; build one: {remedy}"
    return ""


def engine_problem(engine: Engine, bundle: Bundle, machine: Machine, library: Path | None, verify: bool = False) -> str:
    """Why an engine does not run here; "" where it does. verify: compare its plan with its hash, as opening it does anyway."""
    module = BACKENDS[engine.backend]
    installed = machine.packages.get(module)
    if engine.platform not in (None, machine.machine):
        return f"it was built on {engine.platform}, this machine is {machine.machine}; {engine.remedy}"
    if machine.driver_problem:
        return machine.driver_problem
    if not machine.architectures & set(engine.architectures):
        built = ", ".join(f"sm_{arch}" for arch in engine.architectures)
        here = ", ".join(f"sm_{gpu.capability} ({gpu.name})" for gpu in machine.gpus)
        return f"it was built for {built}, this machine has {here}; {_rebuild(engine, machine)}"
    if not is_loaded(installed):
        return f"the Python module {module} is {installed or 'not installed'}; install version {engine.version}"
    if installed != engine.version:
        return f"it was built by {module} {engine.version}, installed is {installed}; {engine.remedy}"
    if problem := _bindings_problem(machine):
        return problem
    graph = bundle.files[bundle.graph.file].sha256
    if engine.graph_sha256 != graph:
        return f"it was built from another graph than {bundle.graph.file}; {engine.remedy}"
    return _plugin_problem(engine, machine, library) or _memory_problem(engine, machine) or engine.plan_problem(verify)


def _rebuild(engine: Engine, machine: Machine) -> str:
    """How to make an engine for this machine's GPU."""
    folder = engine.path.parent.parent
    if engine.backend == "tensorrt-rtx":
        supported = sorted(machine.architectures & RTX_ARCHITECTURES)
        if not supported:
            return f"TensorRT-RTX does not serve this GPU, TensorRT does: bilevel build {folder} --backend tensorrt"
        return f"build one: bilevel build {folder} --backend tensorrt-rtx --sm {','.join(map(str, supported))}"
    return f"build one on this machine: bilevel build {folder} --backend tensorrt"


def _plugin_problem(engine: Engine, machine: Machine, library: Path | None) -> str:
    if engine.plugins is None:
        return ""
    remedy = "bilevel kernels build --geometry " + str(engine.path.parent.parent)
    if library is None:
        within = engine.path.parent.parent / "kernels" / machine.machine / LIBRARY_NAME
        problem = f"{distrust_problem(within)}, or build one" if within.is_file() else "there is none; build one"
        return f"it needs a kernel library, and {problem}: {remedy}"
    wanted = engine.plugins.get("library")
    if wanted and file_sha256(library) != wanted:
        return f"{library} is another kernel library than the one it was built with; give that one, or {engine.remedy}"
    return library_problem(library, machine)


def _memory_problem(engine: Engine, machine: Machine) -> str:
    needed = engine.device_bytes
    largest = max(gpu.memory_bytes for gpu in machine.gpus) - _RESERVE
    if needed <= largest:
        return ""
    return (
        f"it needs {needed / 2**20:.0f} MiB, the GPU has {largest / 2**20:.0f} MiB to give; "
        "build it with a smaller --capacity or --batch"
    )


def list_options(bundle: Bundle, machine: Machine, named: Path | None = None, verify: bool = False) -> list[BackendOption]:
    """All that can run a bundle, the best first: engines of TensorRT, of TensorRT-RTX, ONNX Runtime on the CPU, on the GPU."""
    library = find_library(bundle.folder, machine, named)
    engines, problems = find_engines(bundle.folder)
    options = [
        BackendOption(
            each.backend,
            each.name,
            engine_problem(each, bundle, machine, library, verify),
            each,
            library if each.plugins else None,
        )
        for each in engines
    ]
    options.sort(key=lambda each: (list(BACKENDS).index(each.backend), -(each.engine.capacity if each.engine else 0)))
    options += [BackendOption("engine", "unreadable", str(problem)) for problem in problems]
    for backend, name, problem in (
        (ONNX, "on the CPU", _onnx_problem(machine, "cpu")),
        (ONNX_CUDA, "on the GPU (portable bodies, of unknown speed)", _cuda_problem(machine)),
    ):
        options.append(BackendOption(backend, f"{bundle.graph.file} in ONNX Runtime {name}", problem))
    return options


def _onnx_problem(machine: Machine, extra: str) -> str:
    installed = machine.packages.get("onnxruntime")
    return "" if is_loaded(installed) else f"onnxruntime is {installed or 'not installed'}; pip install 'bilevel[{extra}]'"


def _cuda_problem(machine: Machine) -> str:
    """Why ONNX Runtime does not run on the GPU here; "" where it does."""
    if problem := _onnx_problem(machine, "gpu") or machine.driver_problem or machine.cuda_provider_problem:
        return problem
    return _bindings_problem(machine)


def _bindings_problem(machine: Machine) -> str:
    """Why NVIDIA's bindings do not serve, for whatever runs on the GPU; "" where they do."""
    installed = machine.packages.get("cuda.bindings")
    if is_loaded(installed):
        return ""
    major = (machine.driver_cuda or "").partition(".")[0]
    wanted = f"'cuda-bindings=={major}.*'" if major else "cuda-bindings"
    return f"cuda.bindings is {installed or 'not installed'}; pip install {wanted}"


def choose(options: list[BackendOption], backend: str = AUTO) -> tuple[BackendOption, str]:
    """(the best that runs here, one line on which and why). Raises EngineError where nothing of the backend asked for does."""
    eligible = [option for option in options if backend in (AUTO, option.backend)]
    problems: list[str] = []
    for option in eligible:
        if option.does_run:
            return option, option.name + (f" (not {'; not '.join(problems)})" if problems else "")
        problems.append(f"{option.name}: {option.problem}")
    if not eligible:
        raise EngineError(f"the bundle has no engine of {backend}; build one: bilevel build BUNDLE --backend {backend}")
    raise EngineError(f"nothing runs this bundle here: {problems[0]}")


def open_session(
    path: str | Path, backend: str = AUTO, *, verify: bool = True, threads: int = 0, library: Path | None = None
) -> tuple[Session, str]:
    """(the bundle at ``path`` on a backend of CHOICES, one line on which and why).

    backend: "auto" takes the best of its engines that runs here, else ONNX Runtime on the CPU; see ``choose``. verify: compare
    the files with their sizes and hashes. threads: of ONNX Runtime. library: the kernel library for TensorRT's plugins (None:
    ``library_places`` says where it is looked for). Raises RequestError for an unknown backend, BundleError, EngineError,
    KernelError or MissingDependency where it does not open.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= MOST_THREADS:
        raise RequestError(f"threads={threads!r} must lie between 0 (one per core) and {MOST_THREADS}")
    if backend not in CHOICES:
        raise RequestError(f"there is no backend {backend!r}; take {', '.join(CHOICES)}")
    bundle = load_bundle(path, verify)
    # Nothing is asked of the machine where there is nothing to choose from.
    if backend == ONNX or (backend == AUTO and not any((bundle.folder / FOLDER).glob("*.json"))):
        return OnnxSession(bundle, threads), "ONNX Runtime on the CPU"
    option, why = choose(list_options(bundle, look(), library), backend)
    return open_option(bundle, option, threads), why


def open_option(bundle: Bundle, option: BackendOption, threads: int = 0) -> Session:
    """A bundle on one of its options. Raises what ``open_session`` raises."""
    if option.backend == ONNX:
        return OnnxSession(bundle, threads)
    if option.engine is None:
        from bilevel.runtime.backend.onnx_cuda import CudaSession

        return CudaSession(bundle, threads)
    from bilevel.runtime.backend.engine import EngineSession

    return EngineSession(bundle, option.engine, option.library)
