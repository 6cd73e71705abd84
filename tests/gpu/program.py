"""Everything that needs a GPU to be shown: ``make gpu-test``, or ``python -m tests.gpu.program`` in the repository's folder.

Needs an NVIDIA GPU, PyTorch with its Triton, NumPy and g++; no network and no test framework. One line for every check: what
ran, the worst error or a count, ok or FAILED; exit status 1 where one failed. NVIDIA's TensorRT headers (TENSORRT_ROOT),
compute-sanitizer, ONNX Runtime's CUDA provider and TensorRT are used where they are found, and a line says so where they are
not. Without PyTorch, as on a board that only runs engines, the runtime's checks are made (cuda-bindings and NumPy are enough),
and a line says so. It ends with one table of what passed, failed and was not run, and why; build/gpu-test.json holds the same
and a line for the table of evidence in tests/README.md.

The groups of checks run side by side in processes of their own: Triton compiles for minutes on one core, and a kernel that
fails takes its process's GPU context with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.gpu import report

GROUPS = ("attention", "routes", "experts", "library")
RUNTIME = ("device", "backends")
ALONE = ("far", *RUNTIME)  # take much of a GPU's memory, or look at how much there is
SANITIZED, SANITIZED_STATUS = "sanitized", 86
_MOST_SECONDS = 420  # of a group; all but the runtime's are to stay under eight minutes together
_NEEDED = {"torch": "PyTorch", "triton": "Triton, which PyTorch's CUDA builds bring", "numpy": "NumPy"}


def what_is_missing() -> str:
    """One sentence that says why nothing can be run here, "" where everything is there."""
    for module, name in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            return f"{sys.executable} has no {name}; name a Python that has it: make gpu-test GPU_PYTHON=..."
    import torch

    if torch.version.cuda is None:
        remedy = "name another Python: make gpu-test GPU_PYTHON=..."
        return f"PyTorch {torch.__version__} of {sys.executable} is built without CUDA; {remedy}"
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU; run this on a machine that has one (nvidia-smi lists it)"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so no kernel would reach the GPU; unset it and start again"
    return ""


def _runtime(name: str, folder: Path) -> Iterator[Any]:
    """The results of a group that needs no PyTorch."""
    if name == "device":
        from tests.gpu.checks_device import device

        return device()
    from tests.gpu.checks_backends import backends

    return backends(folder)


def _group(name: str, folder: Path) -> Iterator[Any]:
    """The results of one group, in this process."""
    if name in RUNTIME:
        yield from _runtime(name, folder)
        return
    from tests.gpu import checks_kernels as kernels
    from tests.gpu.checks_library import library
    from tests.gpu.checks_plugins import plugins
    from tests.gpu.machine import Machine

    machine = Machine()
    if name == "attention":
        yield from kernels.attention(machine)
    elif name == "routes":
        yield from kernels.routes(machine)
        yield from kernels.margins(machine)
    elif name == "experts":
        yield from kernels.experts(machine)
        yield from kernels.expert_route(machine)
        yield from kernels.caches(machine)
    elif name == "far":
        yield from kernels.far_offsets(machine)
    elif name == "library":
        yield from library(machine, folder)
        yield from plugins(machine, folder)
    elif name == SANITIZED:
        from tests.gpu.checks_sanitizer import small

        yield from small(machine, folder)
    else:
        from tests.gpu.checks_sanitizer import overrun

        yield from overrun(machine)


def run_group(results: Iterator[Any], out: Callable[[str], Any]) -> int:
    """Write every result as a line of JSON; 1 where one failed. What is raised is a failure too, and ends the group."""
    failed = 0
    try:
        for result in results:
            failed |= result.ok is False
            out(json.dumps([result.name, result.what, result.measure, result.ok]))
    except Exception as error:  # noqa: BLE001 (whatever it is, the report has to say it)
        text = (str(error).strip().splitlines() or [""])[0]
        out(json.dumps(["the group ended early", type(error).__name__, text, False]))
        failed = 1
    return int(failed)


def read_results(lines: Sequence[str], status: int, errors: str, name: str) -> list[list[Any]]:
    """What a group's process printed; a line for its end where it did not end well."""
    found = [json.loads(line) for line in lines if line.startswith("[")]
    told = any(result[3] is False for result in found)
    if status not in (0, 1) or (status == 1 and not told) or not found:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        found.append(["the group ended early", name, f"exit status {status}: {last}", False])
    return found


def _environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def start(name: str, folder: Path, before: Sequence[str] = (), **more: str) -> tuple[list[str], int, str]:
    """(lines, exit status, what it said to stderr) of one group in its own process; ``before`` goes in front of the command."""
    command = [*before, sys.executable, "-m", "tests.gpu.program", "--group", name, "--folder", str(folder)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment(**more), timeout=_MOST_SECONDS
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        return text.splitlines(), 124, f"it was still running after {_MOST_SECONDS} s"
    return run.stdout.splitlines(), run.returncode, run.stderr


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the search path or in CUDA's folders."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home] + [
        str(Path(home) / "compute-sanitizer") for home in homes if home
    ]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitize(folder: Path) -> list[list[Any]]:
    """A small part of the checks under NVIDIA's memory checker, and a planted overrun that it must notice."""
    tool = find_sanitizer()
    if tool is None:
        return [["memory checker", "compute-sanitizer", "it is not installed (it comes with the CUDA toolkit)", None]]
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(SANITIZED_STATUS), "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]  # not compilers
    found = []
    lines, status, errors = start(SANITIZED, folder, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    checked = [json.loads(line) for line in lines if line.startswith("[")]
    right = status == 0 and bool(checked) and all(result[3] is not False for result in checked)
    said = next((line for line in (*lines, *errors.splitlines()) if "ERROR SUMMARY" in line or "Invalid" in line), "")
    wrong = next((f"; {result[0]} {result[1]}: {result[2]}" for result in checked if result[3] is False), "")
    measure = f"{len(checked)} calls, exit status {status} {said.strip('= ')}{wrong}"
    found.append(["memory checker", "a call of every kernel", measure, right])
    lines, status, errors = start("overrun", folder, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    measure = f"exit status {status}, {SANITIZED_STATUS} is expected"
    found.append(["memory checker", "notices a planted write behind a tensor", measure, status == SANITIZED_STATUS])
    return found


def show(result: Sequence[Any]) -> None:
    name, what, measure, ok = result
    verdict = "ok" if ok else "FAILED" if ok is False else "not run"
    print(f"{verdict:<8}{name:<24} {what:<62} {measure}", flush=True)


def describe_machine(has_torch: bool = True) -> str:
    if not has_torch:
        from bilevel.machine import look

        machine = look()
        gpus = ", ".join(f"{gpu.name} (sm_{gpu.capability}, {gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in machine.gpus)
        return f"{gpus}, CUDA {machine.driver_cuda}, Python {sys.version.split()[0]}"
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB), "
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    )


def run_runtime(folder: Path, why: str) -> list[list[Any]]:
    """What needs no PyTorch. why: the rest is not run."""
    results = [["kernels", "all checks", why, None]]
    for name in RUNTIME:
        results += read_results(*start(name, folder), name)
    for result in results:
        show(result)
    return results


def run_all(folder: Path) -> list[list[Any]]:
    """Every group, then the memory checker, which finds the library built and most kernels in Triton's cache."""
    results = []
    with ThreadPoolExecutor(max_workers=min(len(GROUPS), os.cpu_count() or 1)) as pool:
        running = {pool.submit(start, name, folder): name for name in GROUPS}
        for done in as_completed(running):
            lines, status, errors = done.result()
            for result in read_results(lines, status, errors, running[done]):
                show(result)
                results.append(result)
    for name in ALONE:
        for result in read_results(*start(name, folder), name):
            show(result)
            results.append(result)
    for result in sanitize(folder):
        show(result)
        results.append(result)
    return results


def has_gpu() -> bool:
    """Whether the driver has one, and NumPy is there: enough for the runtime's checks."""
    if importlib.util.find_spec("numpy") is None:
        return False
    from bilevel.machine import look

    return bool(look().gpus)


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 0 where none failed, 1 where one did, 2 where nothing can run here."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.program", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--group", help="run one group in this process and print JSON: " + ", ".join((*GROUPS, *ALONE, SANITIZED))
    )
    parser.add_argument("--folder", type=Path, help="where the kernel library is built (with --group)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu-test.json", help="where the results are written")
    options = parser.parse_args(arguments)
    problem = "" if options.group in RUNTIME else what_is_missing()
    if problem and (options.group or not has_gpu()):
        print(f"gpu-test: {problem}", file=sys.stderr)
        return 2
    if options.group:
        return run_group(
            _group(options.group, options.folder or Path(tempfile.mkdtemp())), lambda line: print(line, flush=True)
        )
    begin = time.monotonic()
    machine = describe_machine(not problem)
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="bilevel-gpu-test-") as folder:
        results = run_runtime(Path(folder), problem) if problem else run_all(Path(folder))
    seconds, counts = time.monotonic() - begin, report.count(results)
    report.write(options.json, machine, results, seconds)
    print("", *report.table(results), "", sep="\n")
    print(f"{counts['passed']} ok, {counts['failed']} failed, {counts['not run']} not run, {seconds:.0f} s; {options.json}")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
