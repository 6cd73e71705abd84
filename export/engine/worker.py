"""The process that builds one engine: ``python -m bilevel.export.engine.worker JOB``, JOB being a Job as JSON.

It writes the plan to the job's ``out`` and events to standard output, one JSON object a line: {"phase", "step", "steps"} while
it builds, {"error"} for a failure that has a sentence, {"version"} when it has built.

A process of its own: a build that is interrupted, runs out of memory or crashes ends alone.

``reproducible``: the same bytes every time, for a bundle in one place. TensorRT orders parts of a plan by addresses. For these
to be the same, memory lies where it lay the last time (no address space randomisation), little is imported here besides
TensorRT, and TensorRT's threads never run at the same time as the one that builds: all share one core, and the builder gives
way to them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError, EngineError
from bilevel.export.engine.network import Limits, Network, add_profiles, failure, parse_graph
from bilevel.export.engine.sampling import add_best_logits
from bilevel.export.engine.versions import Flavour, builder_flags, compute_capabilities, load_flavour

_FIXED_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of <sys/personality.h>
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_ASKED = "BILEVEL_FIXED_ADDRESSES"
PYTHON_PLUGINS, NO_PLUGINS = "python", "none"


@dataclass(frozen=True)
class Job:
    """What to build.

    model: the ONNX file to parse; graph: the bundle's, beside which the weights lie. nodes: that must become plugins.
    archs: as in 89; empty: the GPU at hand. plugins: a kernel library's file, "python" or "none". out: the plan's file.
    timings: the file that keeps what was measured from build to build, "" for none. weight_streaming: weights may stay in the
    host's memory.
    """

    model: str
    graph: str
    nodes: int
    backend: str
    archs: tuple[int, ...]
    limits: Limits
    plugins: str
    out: str
    timings: str = ""
    weight_streaming: bool = False
    reproducible: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        raw = json.loads(text)
        return Job(**{**raw, "archs": tuple(raw["archs"]), "limits": Limits(**raw["limits"])})


def make_reproducible(job: Job) -> None:
    """Start this program again with fixed addresses, and give way to its threads. Raises EngineError where it may not."""
    if not sys.platform.startswith("linux"):
        raise EngineError("--reproducible needs Linux; leave it out")
    if not os.environ.get(_ASKED):
        if ctypes.CDLL(None).personality(_FIXED_ADDRESSES) == -1:
            raise EngineError("this system refuses fixed addresses (personality), which --reproducible needs; leave it out")
        # Modules that Python has to compile first leave memory in another state: the second start finds all of them compiled.
        load_plugins(load_flavour(job.backend), PYTHON_PLUGINS)
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _ASKED: "1", "PYTHONHASHSEED": "0"})
    os.sched_setaffinity(0, {quietest_core()})
    os.sched_setscheduler(0, os.SCHED_IDLE | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def quietest_core() -> int:
    """The core that idles most. A process that gives way to all others hardly runs where another one computes."""

    def idle() -> dict[int, int]:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        return {int(line[0][3:]): int(line[4]) for line in lines if re.fullmatch("cpu[0-9]+", line[0])}

    before = idle()
    time.sleep(0.1)
    after = idle()
    return max(sorted(os.sched_getaffinity(0)), key=lambda core: after.get(core, 0) - before.get(core, 0))


def load_plugins(flavour: Flavour, plugins: str) -> None:
    """Make the operators known. Raises EngineError for a library that TensorRT does not take."""
    if plugins == PYTHON_PLUGINS:
        from bilevel.plugins.tensorrt.python import register_plugins

        register_plugins(flavour.trt)
    elif plugins != NO_PLUGINS and not flavour.trt.get_plugin_registry().load_library(plugins):
        raise EngineError(
            f"{flavour.backend} cannot load the plugins of {plugins}; build the library anew: bilevel kernels build --geometry "
            "BUNDLE"
        )


def _monitor(trt: Any, tell: Callable[..., None]) -> Any:
    """TensorRT's progress, told event by event."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            tell(phase=name, step=0, steps=steps)

        def step_complete(self, name: str, step: int) -> bool:
            tell(phase=name, step=step + 1, steps=self.steps.get(name, 0))
            return True

        def phase_finish(self, name: str) -> None:
            steps = self.steps.pop(name, 0)
            tell(phase=name, step=steps, steps=steps)

    return Monitor()


def take_timings(config: Any, file: Path) -> None:
    """Let a build begin with the timings of earlier ones; those of another device or version, or damaged ones, are dropped."""
    for known in (file.read_bytes() if file.is_file() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def keep_timings(config: Any, file: Path) -> None:
    """Keep the timings for the next build."""
    cache = config.get_timing_cache()
    if cache is not None:
        new = file.with_name(f".{file.name}.{os.getpid()}")
        new.write_bytes(memoryview(cache.serialize()))
        os.replace(new, file)


def build_plan(parsed: Network, job: Job, tell: Callable[..., None]) -> Any:
    """The serialised engine. Raises EngineError with what TensorRT said."""
    trt, flavour = parsed.flavour.trt, parsed.flavour
    config = parsed.builder.create_builder_config()
    monitor = _monitor(trt, tell)
    config.progress_monitor = monitor
    add_profiles(parsed, config, job.limits)
    for flag in builder_flags(flavour, job.weight_streaming):
        config.set_flag(flag)
    if job.timings:
        take_timings(config, Path(job.timings))
    members = compute_capabilities(flavour)
    if job.archs:
        config.num_compute_capabilities = len(job.archs)
        for index, arch in enumerate(job.archs):
            config.set_compute_capability(members[arch], index)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        what = f"{flavour.backend} {trt.__version__} could not build {job.graph}"
        raise failure(
            parsed.logger, what, "try a smaller --capacity, --batch or --prefill-chunk, or bilevel build --plugins none"
        )
    if job.timings:
        keep_timings(config, Path(job.timings))
    return plan


def run(job: Job, tell: Callable[..., None]) -> None:
    """Build and write the plan."""
    flavour = load_flavour(job.backend)
    tell(phase="loading plugins", step=0, steps=0)
    load_plugins(flavour, job.plugins)
    tell(phase="reading the graph", step=0, steps=0)
    parsed = parse_graph(flavour, Path(job.model).read_bytes(), Path(job.graph), job.nodes)
    add_best_logits(parsed)
    plan = build_plan(parsed, job, tell)
    with open(job.out, "wb") as file:
        file.write(memoryview(plan))
    tell(version=flavour.trt.__version__)


def main(text: str) -> int:
    """Run the job; the exit status."""
    events = sys.stdout
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    try:
        job = Job.from_json(text)
        if job.reproducible:
            make_reproducible(job)
        # TensorRT and plugins may print: events have the pipe to themselves.
        events = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        run(job, tell)
        return 0
    except (BilevelError, OSError) as error:
        tell(error=str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
