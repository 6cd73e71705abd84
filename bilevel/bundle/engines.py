"""Engines in a bundle: ``engines/NAME.plan``, a plan that TensorRT or TensorRT-RTX built, and ``engines/NAME.json``, its manifest.

The manifest, format version 1, is one JSON object:

    format, format_version    "bilevel-engine" and 1; another version is refused
    created_by                {tool: version}
    backend, version          "tensorrt" or "tensorrt-rtx", and its version: a plan runs with the version that built it
    platform                  "x86_64" or "aarch64" for tensorrt, whose plans run on the kind of machine that built them; else null
    architectures             compute capabilities, as in [86, 89], that the plan was built for
    precision                 the bundle's
    capacity                  tokens that a row's caches hold
    batch                     [fewest, most] rows
    new_tokens                [[fewest, most] per optimisation profile], the profile for single tokens last
    plugins                   null, or {"nodes": number of plugin layers, "library": SHA-256 of the kernel library that the plan was
                              built with, or null where the Python plugins served}
    weight_streaming          whether weights may stay in the host's memory, as much of them as the GPU has no room for
    graph_sha256              of the bundle's graph that the plan was built from
    memory_bytes              {"weights", "activations", "caches"}: what running it takes, with the largest batch
    plan                      {"file", "sha256", "bytes"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import EngineError

FORMAT, FORMAT_VERSION = "bilevel-engine", 1
FOLDER = "engines"
BACKENDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> Python module
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "created_by": dict,
    "backend": str,
    "version": str,
    "platform": (str, type(None)),
    "architectures": list,
    "precision": str,
    "capacity": int,
    "batch": list,
    "new_tokens": list,
    "plugins": (dict, type(None)),
    "weight_streaming": bool,
    "graph_sha256": str,
    "memory_bytes": dict,
    "plan": dict,
}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine's manifest; fields as the module's docstring gives them."""

    name: str
    path: Path
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


def _pair(value: Any, name: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value) and 1 <= value[0] <= value[1]):
        raise ValueError(f"{name}={value!r} is no range")
    return value[0], value[1]


def _parse(path: Path) -> Engine:
    """Raises ValueError for what is no manifest."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"it is not of format {FORMAT} version {FORMAT_VERSION}")
    for name, kind in _FIELDS.items():
        if name not in raw or not isinstance(raw[name], kind) or (isinstance(raw[name], bool) and kind is not bool):
            raise ValueError(f"{name} is missing or of the wrong type")
    if raw["backend"] not in BACKENDS:
        raise ValueError(f"its backend {raw['backend']!r} is none of {', '.join(BACKENDS)}")
    plan = raw["plan"]
    if not isinstance(plan.get("file"), str) or Path(plan["file"]).name != plan["file"]:
        raise ValueError(f"its plan {plan.get('file')!r} lies outside its folder")
    if not isinstance(plan.get("sha256"), str) or type(plan.get("bytes")) is not int:
        raise ValueError("it does not give its plan's hash and size")
    if not raw["new_tokens"] or not all(type(arch) is int for arch in raw["architectures"]):
        raise ValueError("it has no profile, or an architecture that is no number")
    copied = (
        "backend",
        "version",
        "platform",
        "precision",
        "capacity",
        "plugins",
        "weight_streaming",
        "graph_sha256",
        "memory_bytes",
    )
    return Engine(
        name=path.stem,
        path=path.parent / plan["file"],
        architectures=tuple(raw["architectures"]),
        batch=_pair(raw["batch"], "batch"),
        new_tokens=tuple(_pair(each, "new_tokens") for each in raw["new_tokens"]),
        sha256=plan["sha256"],
        num_bytes=plan["bytes"],
        **{name: raw[name] for name in copied},
    )


def read_engine(path: Path) -> Engine:
    """The engine that the manifest at ``path`` describes. Raises EngineError."""
    try:
        return _parse(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        folder = path.parent.parent
        raise EngineError(f"{path} is no engine's manifest ({error}); build it anew: bilevel build {folder}") from None


def find_engines(bundle: Path) -> tuple[list[Engine], list[EngineError]]:
    """(the engines in a bundle's folder, what is wrong with those that cannot be read), in the order of their names."""
    engines, problems = [], []
    for path in sorted((bundle / FOLDER).glob("*.json")):
        try:
            engines.append(read_engine(path))
        except EngineError as error:
            problems.append(error)
    return engines, problems
