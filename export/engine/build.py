"""A bundle to an engine: ``engines/NAME.plan`` and its manifest ``NAME.json``, specified in ``bilevel/bundle/engines.py``.

The build itself runs in a process of its own (``worker``). Nothing appears in ``engines/`` before it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import bilevel
from bilevel.bundle.engines import FOLDER, Engine
from bilevel.bundle.format import Bundle
from bilevel.contract import GPU_OPS
from bilevel.errors import EngineError
from bilevel.export.engine.cache_writes import choose_writer, write_in_place
from bilevel.export.engine.dense_layers import say_as_attention
from bilevel.export.engine.memory import Estimate
from bilevel.export.engine.network import Limits
from bilevel.export.engine.older_operators import lower_operators
from bilevel.export.engine.plugins import Plugins
from bilevel.export.engine.versions import (
    Flavour,
    builds_ahead_of_time,
    must_strip_functions,
)
from bilevel.export.engine.worker import NO_PLUGINS, Job
from bilevel.export.graph.nodes import routed_nodes
from bilevel.folders import file_sha256

_PLUGIN_OPS = frozenset(op.name for op in GPU_OPS)
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")  # what a reproducible build keeps
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to build. archs: what for, as in 89. timings: where measurements are kept."""

    bundle: Bundle
    flavour: Flavour
    archs: tuple[int, ...]
    limits: Limits
    plugins: Plugins
    estimate: Estimate
    timings: Path | None = None
    weight_streaming: bool = False
    reproducible: bool = False

    @property
    def name(self) -> str:
        """The same for the same options, so that an engine is replaced by its like and by nothing else."""
        rows, least = self.limits.batch, self.limits.batch_least
        archs = "-".join(f"sm{arch}" for arch in self.archs)
        batch = str(rows) if least == rows else f"{least}to{rows}"
        marks = ("-portable" if self.plugins.source == NO_PLUGINS else "") + ("-streaming" if self.weight_streaming else "")
        sizes = f"capacity{self.limits.capacity}-chunk{self.limits.chunk}-batch{batch}"
        return f"{self.flavour.backend}-{archs}-{self.bundle.precision}-{sizes}{marks}"


def build_engine(plan: Plan, on_progress: Progress = lambda phase, done, total: None) -> Path:
    """Build, and put plan and manifest into the bundle; the manifest's path. Raises EngineError; then nothing has changed.

    on_progress(phase, done, all): called often; all is 0 where a phase has no steps.
    """
    bundle = plan.bundle.folder
    folder = bundle / FOLDER
    with _scratch_folder(folder, plan.name) as scratch:
        model, nodes = _prepare_model(plan, scratch)
        built = scratch / "plan"
        # Files by their places in the bundle: a plan's bytes depend on the lengths of paths.
        job = Job(
            model=str(model.relative_to(bundle)),
            graph=str(plan.bundle.graph_path.relative_to(bundle)),
            nodes=nodes if plan.plugins.source != NO_PLUGINS else 0,
            backend=plan.flavour.backend,
            archs=plan.archs if builds_ahead_of_time(plan.flavour) else (),
            limits=plan.limits,
            plugins=plan.plugins.source,
            out=str(built.relative_to(bundle)),
            timings="" if plan.timings is None else str(plan.timings.absolute()),
            weight_streaming=plan.weight_streaming,
            reproducible=plan.reproducible,
        )
        result = _run(job, bundle, scratch / "log", on_progress)
        engine = describe_engine(plan, nodes, built, result["version"])
        # A manifest stands for a whole plan, at every moment.
        (folder / f"{plan.name}.json").unlink(missing_ok=True)
        os.replace(built, engine.path)
        return engine.write()


@contextmanager
def _scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside the engines, gone afterwards; what killed builds have left goes as well. Raises EngineError."""
    scratch = folder / f".{name}.building"
    try:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.building"):
            if _is_free(left):
                shutil.rmtree(left, ignore_errors=True)
        if scratch.exists():
            raise EngineError(f"another process is building {name} in {folder} now; wait for it, or stop it")
        scratch.mkdir()
        with (scratch / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until this process lets go or dies
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise EngineError(
            f"{folder} could not be written ({error.strerror or error}); free some space and try again"
        ) from error


def _is_free(scratch: Path) -> bool:
    """Whether nobody works in a scratch folder."""
    try:
        with (scratch / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # killed before there was a lock
    return True


def _prepare_model(plan: Plan, scratch: Path) -> tuple[Path, int]:
    """(the ONNX file to parse, its nodes for plugins): caches in place; no functions where they would win over plugins."""
    model = onnx.load(str(plan.bundle.graph_path), load_external_data=False)
    if (head := plan.bundle.graph.head) is not None:  # an engine gives each row's last logits only
        outputs = [value for value in model.graph.output if value.name != head.hidden]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
    limits = plan.limits
    sizes = {name: limits.sizes(limits.batch, 1)[name] for name in ("capacity", "num_blocks")}
    if limits.batch_least == limits.batch:
        sizes["batch"] = limits.batch
    write_in_place(
        model,
        plan.bundle.graph.state,
        sizes,
        lambda write: choose_writer(plan.flavour, write, plan.plugins.source != NO_PLUGINS),
    )
    say_as_attention(model)
    lower_operators(model, plan.flavour)
    if plan.plugins.source != NO_PLUGINS and must_strip_functions(plan.flavour):
        kept = [function for function in model.functions if function.name not in _PLUGIN_OPS]
        del model.functions[:]
        model.functions.extend(kept)
    path = scratch / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, sum(node.op_type in _PLUGIN_OPS for node in routed_nodes(model.graph))


@contextmanager
def _worker(job: Job, bundle: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that builds; killed when it is left before its end. A signal to this program's group does not reach it."""
    command = [sys.executable, "-m", "bilevel.export.engine.worker", job.to_json()]
    # The worker finds bilevel where this process found it. A plan's bytes depend on the length of the environment as well.
    paths = os.pathsep.join([str(Path(bilevel.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    names = _ENVIRONMENT if job.reproducible else os.environ
    environment = {name: os.environ[name] for name in names if name in os.environ}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            cwd=bundle,
            env={**environment, "PYTHONPATH": paths},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _run(job: Job, bundle: Path, log: Path, on_progress: Progress) -> dict[str, Any]:
    """The worker's result. Raises EngineError with its sentence, or with what is known of its end."""
    result: dict[str, Any] = {}
    with _worker(job, bundle, log) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                raise EngineError(event["error"])
            if "phase" in event:
                on_progress(event["phase"], event["step"], event["steps"])
            else:
                result = event
        status = process.wait()
    if status == 0 and result:
        return result
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = "it may have run out of memory" if status == -signal.SIGKILL else said[-1][:300] if said else "it gave no reason"
    raise EngineError(f"the process that builds {how} ({hint}); try a smaller --capacity or --batch, or --plugins none")


def describe_engine(plan: Plan, nodes: int, built: Path, version: str) -> Engine:
    """The engine of which ``built`` is the plan, as it will lie in the bundle."""
    backend, limits, estimate, size = plan.flavour.backend, plan.limits, plan.estimate, built.stat().st_size
    has_plugins = plan.plugins.source != NO_PLUGINS
    return Engine(
        name=plan.name,
        path=plan.bundle.folder / FOLDER / f"{plan.name}.plan",
        created_by={"bilevel": bilevel.__version__, backend: version, "python": platform.python_version()},
        backend=backend,
        version=version,
        platform=platform.machine() if backend == "tensorrt" else None,
        architectures=plan.archs,
        precision=plan.bundle.precision,
        capacity=limits.capacity,
        batch=(limits.batch_least, limits.batch),
        new_tokens=tuple((calls[0]["new_tokens"], calls[-1]["new_tokens"]) for calls in limits.profiles().values()),
        plugins={"nodes": nodes, "library": plan.plugins.sha256} if has_plugins else None,
        weight_streaming=plan.weight_streaming,
        graph_sha256=file_sha256(plan.bundle.graph_path),
        # A plan holds weights in the order in which they are read, some of them more than once.
        memory_bytes={
            "weights": max(size, estimate.weights),
            "activations": estimate.activations,
            "caches": estimate.caches,
        },
        sha256=file_sha256(built),
        num_bytes=size,
    )
