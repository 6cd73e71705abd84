"""From geometries to one shared library: compile the kernels for every architecture, embed the machine code, link.

``csrc/gpu/bilevel_kernels.h`` describes the library from outside, ``csrc/gpu/kernel_tables.h`` from inside. Neither a GPU nor
its driver is asked. What takes time, the machine code, is spread over processes and kept in Triton's cache.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import bilevel
from bilevel import contract
from bilevel.errors import KernelError, MissingDependency, require
from bilevel.plugins.launch.launches import Geometry, Launch
from bilevel.plugins.launch.plans import plans, plans_everywhere
from bilevel.plugins.library import assemblers
from bilevel.plugins.library.assemblers import Assembler
from bilevel.plugins.library.compile import Compiled, compile_launch
from bilevel.plugins.library.gpu import ABI, MARK
from bilevel.plugins.library.source import CodeKey, Kernel, Variant, fixed_values, make_source
from bilevel.plugins.tensorrt.headers import Headers, find_headers

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = ("gpu/cuda_driver.cpp", "gpu/kernel_calls.cpp", "gpu/kernel_library.cpp")
PLUGIN_SOURCES = ("tensorrt/calls.cpp", "tensorrt/fields.cpp", "tensorrt/plugin.cpp")

TARGETS = ("x86_64", "aarch64")

_FLAGS = ("-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
# The C++ runtime is the device's: linked in, a recent compiler's would ask for a glibc that JetPack 6 (2.35) does not have.
_LINK = (f"-Wl,--version-script={CSRC / 'gpu' / 'exports.map'}", "-Wl,-z,defs", "-Wl,--build-id=none", "-s", "-ldl")

KernelRequest = tuple[contract.Op, Geometry, str]  # operator, geometry, data type
Compile = Callable[[Launch, int], Compiled]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Build:
    """A library that was built: its file, what ``bilevel_library_info`` says, bytes of machine code.

    without_plugins: why the TensorRT plugins were left out, "" where they were not.
    """

    path: Path
    info: Mapping[str, object]
    code_bytes: int
    without_plugins: str


def plan_variants(requests: Sequence[KernelRequest], archs: Sequence[int]) -> list[Variant]:
    """The variants of a library, each once. Raises ContractError for what the kernels do not cover."""
    variants: dict[str, Variant] = {}
    for op, geometry, dtype in requests:
        kind = dtype if op.has_float_type else "float32"
        key = json.dumps([op.name, kind, fixed_values(op, geometry)])
        if key not in variants:
            wanted = {arch: plans(op, geometry, kind, arch) for arch in sorted(set(archs))}
            variants[key] = Variant(op, geometry, kind, plans_everywhere(op, geometry, kind), tuple(wanted))
    return list(variants.values())


def launches_of(variants: Sequence[Variant]) -> dict[CodeKey, Launch]:
    """Every kernel to compile, once: (code, architecture) -> a launch of it."""
    launches: dict[CodeKey, Launch] = {}
    for variant in variants:
        for arch in variant.built:
            for plan in variant.plans[arch]:
                for launch in plan.launches:
                    launches.setdefault((launch.code, arch), launch)
    return launches


def find_compiler(target: str) -> str:
    """The C++ compiler for a machine, "x86_64" or "aarch64": CXX for this one's own, else GNU's cross compiler."""
    if target not in TARGETS:
        raise KernelError(f"there is no target {target!r}; take {' or '.join(TARGETS)}")
    is_own = target == platform.machine()
    name = os.environ.get("CXX", "g++") if is_own else f"{target}-linux-gnu-g++"
    if shutil.which(name) is None:
        package = "g++" if is_own else f"g++-{target.replace('_', '-')}-linux-gnu"
        raise MissingDependency(f"the C++ compiler {name} is not installed; on Debian and Ubuntu: apt install {package}")
    return name


def _compile_one(launch: Launch, arch: int, assembler: Assembler) -> Compiled:
    """In a process of its own: see ``compile_kernels``."""
    os.environ.pop("TRITON_INTERPRET", None)
    return compile_launch(launch, arch, assembler)


def compile_kernels(
    wanted: Mapping[CodeKey, Launch], tools: Mapping[int, Assembler], jobs: int, on_progress: Progress
) -> dict[CodeKey, Compiled]:
    """Machine code of every kernel, by ``jobs`` processes."""
    require("triton")
    codes: dict[CodeKey, Compiled] = {}
    # Kernels are modules' functions that Triton decorates when the module is loaded: a forked copy of this process would keep
    # what this process decorated.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(jobs, len(wanted)), mp_context=context) as pool:
        try:
            running = {pool.submit(_compile_one, launch, key[1], tools[key[1]]): key for key, launch in wanted.items()}
            for done in as_completed(running):
                key = running[done]
                codes[key] = done.result()
                on_progress(len(codes), len(wanted), f"{wanted[key].kernel} for sm_{key[1]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return codes


def _embed(
    folder: Path, codes: Mapping[CodeKey, Compiled], tools: Mapping[int, Assembler]
) -> tuple[list[Kernel], dict[CodeKey, int]]:
    """Write the machine code into ``folder``; the kernels, and where each stands among them. Equal code is written once."""
    kernels: list[Kernel] = []
    indices: dict[CodeKey, int] = {}
    for key in sorted(codes, key=repr):
        code, arch = codes[key], key[1]
        image = folder / f"{sha256(code.cubin).hexdigest()[:16]}.cubin"
        image.write_bytes(code.cubin)
        indices[key] = len(kernels)
        kernels.append(Kernel(code.symbol, image, arch, tools[arch].number, code.threads, code.shared, code.scratch))
    return kernels, indices


def _describe(
    variants: Sequence[Variant],
    codes: Mapping[CodeKey, Compiled],
    tools: Mapping[int, Assembler],
    target: str,
    headers: Headers | str,
) -> dict[str, object]:
    """What ``bilevel_library_info`` returns, as ``plugins/library/gpu.py`` documents it."""
    return {
        "library": MARK,
        "abi": ABI,
        "bilevel": bilevel.__version__,
        "target": target,
        "operators": {op.name: op.version for op in contract.GPU_OPS},
        "architectures": {str(arch): "{}.{}".format(*tool.version) for arch, tool in sorted(tools.items())},
        "shared": {str(arch): max((code.shared for key, code in codes.items() if key[1] == arch), default=0) for arch in tools},
        "tensorrt": headers.version if isinstance(headers, Headers) else None,
        "variants": [{"op": v.op.name, "dtype": v.dtype, "geometry": fixed_values(v.op, v.geometry)} for v in variants],
    }


def _link(folder: Path, source: str, compiler: str, headers: Headers | str) -> Path:
    """Compile and link in ``folder``; the library's file."""
    (folder / "variants.cpp").write_text(source, encoding="utf-8")
    out = folder / "library.so"
    has_plugins = isinstance(headers, Headers)
    files = [str(CSRC / name) for name in (*SOURCES, *(PLUGIN_SOURCES if has_plugins else ()))]
    # System folders: NVIDIA's headers deprecate what their own newer versions replace.
    folders = [f"-isystem{path}" for path in headers.include_dirs] if isinstance(headers, Headers) else []
    command = [compiler, *_FLAGS, f"-I{CSRC / 'gpu'}", *folders, *files, "variants.cpp", "-o", str(out), *_LINK]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line.lower()]
        reason = errors[0] if errors else run.stderr.strip()[-300:] or "no message"
        raise KernelError(f"{compiler} could not build the library ({reason}); install a compiler with C++17, GCC 9 or newer")
    return out


def choose_assemblers(archs: Sequence[int], cuda: str) -> dict[int, Assembler]:
    """Architecture -> assembler, for drivers of CUDA ``cuda`` (see ``assemblers.choose``)."""
    tools = assemblers.installed()
    return {arch: assemblers.choose(arch, cuda, tools) for arch in sorted(set(archs))}


def choose_headers(plugins: str) -> Headers | str:
    """NVIDIA's headers, or why the library goes without the TensorRT plugins.

    Raises MissingDependency where they are required.
    """
    if plugins == "none":
        return "they were not asked for"
    headers = find_headers()
    if plugins == "required" and isinstance(headers, str):
        raise MissingDependency(headers)
    return headers


def build_library(
    requests: Sequence[KernelRequest],
    archs: Sequence[int],
    out: Path,
    *,
    cuda: str = "auto",
    target: str = "",
    plugins: str = "auto",
    jobs: int = 0,
    compile_all: Callable[..., dict[CodeKey, Compiled]] = compile_kernels,
    on_progress: Progress = lambda done, total, what: None,
) -> Build:
    """Build the library for ``requests`` on ``archs`` (as in 87) and put it at ``out``, which is replaced in one step.

    cuda: "auto", "12" or "13", the drivers' CUDA. target: "x86_64" or "aarch64" ("": this machine's). plugins: TensorRT's;
    "auto" (where NVIDIA's headers are found), "none" or "required". jobs: processes (0: one per core). on_progress(done, all,
    what): called after every kernel. Raises ContractError for geometries that no kernel covers, KernelError for wrong
    options and for a compiler that fails, MissingDependency; before anything is compiled where it can.
    """
    target, out = target or platform.machine(), out.absolute()
    compiler, variants, tools = find_compiler(target), plan_variants(requests, archs), choose_assemblers(archs, cuda)
    headers = choose_headers(plugins)
    out.parent.mkdir(parents=True, exist_ok=True)
    codes = compile_all(launches_of(variants), tools, jobs or os.cpu_count() or 1, on_progress)
    info = _describe(variants, codes, tools, target, headers)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        folder = Path(name)
        kernels, indices = _embed(folder, codes, tools)
        library = _link(folder, make_source(variants, kernels, indices, json.dumps(info)), compiler, headers)
        os.replace(library, out)
    code_bytes = sum(len(cubin) for cubin in {code.cubin for code in codes.values()})
    return Build(out, info, code_bytes, headers if isinstance(headers, str) else "")
