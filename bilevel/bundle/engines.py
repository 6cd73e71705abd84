"""Engines in a bundle: ``engines/NAME.plan``, a plan that TensorRT or TensorRT-RTX built, and ``engines/NAME.json``, its
manifest.

The manifest, format version 1, is one JSON object:

    format, format_version    "bilevel-engine" and 1; another version is refused
    created_by                {tool: version}
    backend, version          "tensorrt" or "tensorrt-rtx", and its version: a plan runs with the version that built it
    platform                  "x86_64" or "aarch64" for tensorrt, whose plans run on the kind of machine that built them,
                              else null
    architectures             compute capabilities, as in [86, 89], that the plan was built for
    precision                 the bundle's
    capacity                  tokens that a row's caches hold
    batch                     [fewest, most] rows
    new_tokens                [[fewest, most] per optimisation profile], the profile for single tokens last
    plugins                   null, or {"nodes": number of plugin layers, "library": SHA-256 of the kernel library that the plan
                              was built with, or null where the Python plugins served}
    weight_streaming          whether weights may stay in the host's memory, as much of them as the GPU has no room for
    graph_sha256              of the bundle's graph that the plan was built from
    memory_bytes              {"weights", "activations", "caches"}: what running it takes, with the largest batch
    plan                      {"file", "sha256", "bytes"}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from bilevel.errors import EngineError
from bilevel.folders import write_json
from bilevel.sections import Section

FORMAT, FORMAT_VERSION = "bilevel-engine", 1
FOLDER = "engines"
BACKENDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> Python module
_MEMORY = ("weights", "activations", "caches")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine's manifest; fields as the module's docstring gives them. path, sha256, num_bytes: of the plan."""

    name: str
    path: Path
    created_by: Mapping[str, str]
    backend: str
    version: str
    platform: str | None
    architectures: tuple[int, ...]
    precision: str
    capacity: int
    batch: tuple[int, int]
    new_tokens: tuple[tuple[int, int], ...]
    plugins: Mapping[str, Any] | None
    weight_streaming: bool
    graph_sha256: str
    memory_bytes: Mapping[str, int]
    sha256: str
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The manifest's contents."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _COPIED},
            "plan": {"file": self.path.name, "sha256": self.sha256, "bytes": self.num_bytes},
        }

    def write(self) -> Path:
        """Write the manifest beside the plan, in one step; returns where it lies. Raises OSError."""
        path = self.path.with_name(f"{self.name}.json")
        write_json(path, self.as_dict())
        return path

    @property
    def device_bytes(self) -> int:
        """What must lie in the GPU's memory: with streaming all but the weights."""
        return sum(size for name, size in self.memory_bytes.items() if name != "weights" or not self.weight_streaming)

    @property
    def remedy(self) -> str:
        """What to do about an engine that does not serve."""
        folder = self.path.parent.parent
        archs = ",".join(map(str, self.architectures))
        options = f" --backend tensorrt-rtx --sm {archs}" if self.backend == "tensorrt-rtx" else " --backend tensorrt"
        return f"build it anew: bilevel build {folder}{options}"

    def read_plan(self) -> bytes:
        """The plan, compared with its hash. Raises EngineError where it is missing or damaged."""
        try:
            plan = self.path.read_bytes()
        except OSError as error:
            raise EngineError(f"{self.path} cannot be read ({error.strerror}); {self.remedy}") from None
        if hashlib.sha256(plan).hexdigest() != self.sha256:
            raise EngineError(f"{self.path} is damaged: its SHA-256 differs from the one in its manifest; {self.remedy}")
        return plan

    def plan_problem(self, verify: bool) -> str:
        """What is wrong with the plan's file, "" where nothing is. verify: read all of it, as ``read_plan`` does."""
        if verify:
            try:
                self.read_plan()
            except EngineError as error:
                return str(error)
        elif not self.path.is_file():
            return f"{self.path} is missing; {self.remedy}"
        return ""


# Fields that a manifest gives under their own names, in its order.
_COPIED = (
    "created_by",
    "backend",
    "version",
    "platform",
    "architectures",
    "precision",
    "capacity",
    "batch",
    "new_tokens",
    "plugins",
    "weight_streaming",
    "graph_sha256",
    "memory_bytes",
)


def _ranges(manifest: Section, key: str, values: list[Any]) -> tuple[tuple[int, int], ...]:
    """Every value as (fewest, most)."""
    for value in values:
        numbers = value if isinstance(value, list) and all(type(each) is int for each in value) else []
        if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise manifest.wrong(key, value, "[fewest, most]")
    return tuple((fewest, most) for fewest, most in values)


def read_engine(path: Path) -> Engine:
    """The engine that the manifest at ``path`` describes. Raises EngineError."""

    def fail(problem: str) -> EngineError:
        return EngineError(f"{path} is no engine's manifest ({problem}); build it anew: bilevel build {path.parent.parent}")

    try:
        manifest = Section.read(path, fail)
    except OSError as error:
        raise fail(error.strerror or str(error)) from None
    if (manifest.get("format", str), manifest.get("format_version", int)) != (FORMAT, FORMAT_VERSION):
        raise fail(f"it is not of format {FORMAT} version {FORMAT_VERSION}")
    plan, new_tokens = manifest.get("plan.file", str), manifest.get("new_tokens", list)
    if Path(plan).name != plan:
        raise fail(f"its plan {plan!r} lies outside its folder")
    if not new_tokens:
        raise fail("it has no profile")
    memory = manifest.section("memory_bytes")
    return Engine(
        name=path.stem,
        path=path.parent / plan,
        created_by=manifest.get("created_by", dict),
        backend=manifest.choice("backend", BACKENDS),
        version=manifest.get("version", str),
        platform=manifest.get("platform", str, NoneType),
        architectures=manifest.numbers("architectures"),
        precision=manifest.get("precision", str),
        capacity=manifest.number("capacity"),
        batch=_ranges(manifest, "batch", [manifest.get("batch", list)])[0],
        new_tokens=_ranges(manifest, "new_tokens", new_tokens),
        plugins=manifest.get("plugins", dict, NoneType),
        weight_streaming=manifest.get("weight_streaming", bool),
        graph_sha256=manifest.get("graph_sha256", str),
        memory_bytes={part: memory.number(part, 0) for part in _MEMORY},
        sha256=manifest.get("plan.sha256", str),
        num_bytes=manifest.number("plan.bytes", 0),
    )


def find_engines(bundle: Path) -> tuple[list[Engine], list[EngineError]]:
    """(the engines in a bundle's folder, what is wrong with those that cannot be read), in the order of their names."""
    engines, problems = [], []
    for path in sorted((bundle / FOLDER).glob("*.json")):
        try:
            engines.append(read_engine(path))
        except EngineError as error:
            problems.append(error)
    return engines, problems
