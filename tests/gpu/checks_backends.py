"""Checks of ``make gpu-test``, fifth part: a bundle on this GPU, by ONNX Runtime's CUDA provider and by engines.

The bundle is BILEVEL_GPU_BUNDLE's, or build/example-bundle, or is exported here. An engine is built where a TensorRT is
installed and the bundle has none that runs here. What is not there is said, with what to do about it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bilevel.bundle.engines import BACKENDS
from bilevel.bundle.format import load_bundle
from bilevel.errors import BilevelError
from bilevel.machine import is_loaded, look
from bilevel.plugins.library.gpu import KernelLibrary
from bilevel.plugins.tensorrt.headers import find_headers
from bilevel.runtime.backend.select import (
    LIBRARY_NAME,
    ONNX,
    ONNX_CUDA,
    RTX_ARCHITECTURES,
    BackendOption,
    list_options,
    open_option,
)
from bilevel.runtime.backend.session import Session
from bilevel.runtime.generate.sampling import Sampler, SamplingParams
from tests import ROOT
from tests.gpu.result import Result

VARIABLE = "BILEVEL_GPU_BUNDLE"
ROWS, PROMPT, TOKENS, CHUNK = 2, 90, 24, 32
_TOLERANCE = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 4e-1}  # of a logit: another order of summing, on another machine
Open = Callable[[Path, BackendOption], Session]


def find_bundle(folder: Path) -> Path | str:
    """A copy of a bundle that may be written to, or why there is none."""
    found = Path(os.environ.get(VARIABLE) or ROOT / "build" / "example-bundle")
    if not (found / "bundle.json").is_file():
        missing = [name for name in ("torch", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        remedy = f"make one where they are: bilevel export examples/model BUNDLE, and name it in {VARIABLE}"
        if missing:
            return f"there is no bundle at {found}, and to export one {', '.join(missing)} are missing; {remedy}"
        found = folder / "exported"
        run = _bilevel("export", str(ROOT / "examples" / "model"), str(found))
        if run.returncode:
            return f"the export failed: {(run.stderr.strip().splitlines() or ['it said nothing'])[-1]}; {remedy}"
    return Path(shutil.copytree(found, folder / "bundle", dirs_exist_ok=True))


def _bilevel(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def read_and_write(session: Session, tokens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [ROWS, TOKENS] taken greedily, or those given; the logits [TOKENS, ROWS, vocab] that each followed).

    Two rows of different lengths are read in pieces, the last token of each alone.
    """
    vocab, limit = session.bundle.vocab_size, PROMPT + TOKENS + 1
    caches = session.allocate(ROWS, session.bundle.round_up(limit))
    chunk = min(CHUNK, session.bundle.prefill_chunk)
    prompt = np.random.default_rng(7).integers(0, vocab, (ROWS, PROMPT))
    lengths, past = np.array([PROMPT, PROMPT - 37], np.int32), np.zeros(ROWS, np.int32)
    for start in range(0, PROMPT - 1, chunk):
        new = np.clip(lengths - 1 - start, 0, min(chunk, PROMPT - 1 - start)).astype(np.int32)
        piece = np.zeros((ROWS, max(1, int(new.max()))), np.int64)
        for row in range(ROWS):
            piece[row, : new[row]] = prompt[row, start : start + new[row]]
        caches.run(piece, past, new)
        past = past + new
    last = prompt[np.arange(ROWS), lengths - 1]
    samplers, written, seen = [Sampler(SamplingParams(), vocab) for _ in range(ROWS)], [], []
    for step in range(TOKENS):
        logits = caches.run(last[:, None], past, np.ones(ROWS, np.int32))
        own = np.array([sampler.sample(logits[row]) for row, sampler in enumerate(samplers)])
        seen.append(np.array(logits))
        last = own if tokens is None else tokens[:, step]
        written.append(own)
        past = past + 1
    return np.stack(written, 1), np.stack(seen)


def compare(name: str, session: Session, expected: tuple[np.ndarray, np.ndarray]) -> Result:
    """The CPU's tokens, step by step behind the same text; a token may differ only where the CPU's two best nearly tie."""
    tokens, logits = expected
    found, values = read_and_write(session, tokens)
    tolerance = _TOLERANCE[session.bundle.precision]
    error = float(np.abs(values - logits).max()) if np.isfinite(values).all() else float("nan")
    differ = found != tokens
    margin = np.sort(logits, -1)[..., -1] - np.take_along_axis(logits, found.T[..., None], -1)[..., 0]
    excused = margin.T <= 2 * tolerance
    measure = f"{(~differ).sum()} of {differ.size} tokens equal, largest error of a logit {error:.1e}"
    return Result("backend", name, measure, bool(error <= tolerance and (excused | ~differ).all()))


def build_library(bundle: Path) -> Result:
    """The bundle's kernel library with its plugins, for this GPU."""
    archs = ",".join(f"sm_{arch}" for arch in sorted(look().architectures))
    name = f"kernel library for {archs}"
    headers = find_headers()
    if isinstance(headers, str):
        return Result("engine", name, headers, None)
    if missing := [each for each in ("torch", "triton", "onnx") if importlib.util.find_spec(each) is None]:
        return Result("engine", name, f"{', '.join(missing)} not installed, by which kernels are compiled", None)
    out = bundle / "kernels" / platform.machine() / LIBRARY_NAME
    given = ("--geometry", str(bundle), "--arch", archs, "--out", str(out), "--tensorrt", "required")
    run = _bilevel("kernels", "build", *given)
    return Result("engine", name, (run.stderr.strip().splitlines() or ["built"])[-1], run.returncode == 0)


def judge_build(name: str, status: int, said: str) -> Result:
    """What a build ended with. That some TensorRTs need the plugins is by design, and no failure."""
    by_design = status == 2 and "needs the plugin WriteCache" in said
    return Result("engine", f"build {name}", said, None if by_design else status == 0)


def build_engines(bundle: Path) -> Iterator[Result]:
    """Engines of each TensorRT that is installed: with plugins of the bundle's library, without, with streamed weights."""
    machine = look()
    yield (built := build_library(bundle))
    for backend, module in BACKENDS.items():
        if not is_loaded(machine.packages.get(module)):
            yield Result("engine", f"build with {backend}", f"the Python module {module} is not installed", None)
            continue
        options = ["--batch", str(ROWS), "--prefill-chunk", str(CHUNK)]
        if backend == "tensorrt-rtx":
            served = sorted(machine.architectures & RTX_ARCHITECTURES)
            if not served:
                yield Result("engine", f"build with {backend}", "TensorRT-RTX does not serve this machine's GPU", None)
                continue
            options += ["--sm", ",".join(map(str, served))]
        library = str(bundle / "kernels" / platform.machine() / LIBRARY_NAME)
        for name, wanted in (
            ("with plugins", ["--plugins", library]),
            ("without plugins", ["--plugins", "none"]),
            ("streaming weights", ["--plugins", library if built.ok else "none", "--weight-streaming"]),
        ):
            title = f"with {backend}, {name}"
            if name == "with plugins" and not built.ok:
                yield Result("engine", f"build {title}", f"there is no kernel library: {built.measure}", None)
            elif name == "streaming weights" and all(gpu.is_integrated for gpu in machine.gpus):
                yield Result("engine", f"build {title}", "this GPU's memory is the host's", None)
            else:
                run = _bilevel("build", str(bundle), "--backend", backend, *options, *wanted)
                yield judge_build(title, run.returncode, (run.stderr.strip().splitlines() or ["built"])[-1])


def _options(bundle: Path) -> list[BackendOption]:
    return [option for option in list_options(load_bundle(bundle), look()) if option.backend != ONNX]


def open_crowded(bundle: Path, option: BackendOption) -> Session:
    """The option's session; one whose weights may stream finds a GPU without room for any, so that all of them do."""
    if option.engine is None or not option.engine.weight_streaming:
        return open_option(load_bundle(bundle), option)
    from bilevel.runtime.backend.device_memory import CudaDevice
    from bilevel.runtime.backend.engine import EngineSession

    class Crowded(CudaDevice):
        def free_bytes(self) -> int:
            return 0

    return EngineSession(load_bundle(bundle), option.engine, option.library, Crowded())


def copied_caches(option: BackendOption) -> int:
    """Calls of WriteCache so far that copied their cache, in the library that the option's plugins are in."""
    return 0 if option.library is None else KernelLibrary(option.library).num_copies()


def run_options(bundle: Path, options: list[BackendOption], open_it: Open = open_crowded) -> Iterator[Result]:
    """Every backend beside ONNX Runtime on the CPU, every engine; engines twice in this process, at the same time."""
    expected = read_and_write(open_it(bundle, BackendOption(ONNX, ONNX, "")))
    for option in options:
        title = f"{option.backend}: {option.name}"
        if option.problem:
            yield Result("backend", title, option.problem, None)
            continue
        try:
            first = open_it(bundle, option)
            yield compare(title, first, expected)
            if option.engine is not None:
                yield compare(f"{title}, a second session", open_it(bundle, option), expected)
                copies = copied_caches(option)
                yield Result("backend", f"{title}, caches in place", f"{copies} caches copied", copies == 0)
        except BilevelError as error:
            yield Result("backend", title, str(error), False)


def backends(folder: Path) -> Iterator[Result]:
    """All of them."""
    missing = [name for name in ("onnxruntime", "tokenizers") if importlib.util.find_spec(name) is None]
    bundle = f"{', '.join(missing)} not installed; pip install 'bilevel[gpu]'" if missing else find_bundle(folder)
    if isinstance(bundle, str):
        yield Result("backend", f"{ONNX_CUDA} and engines", bundle, None)
        return
    yield from build_engines(bundle)
    yield from run_options(bundle, _options(bundle))
