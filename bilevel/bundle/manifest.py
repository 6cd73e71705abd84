"""``bundle.json`` while it is being read: what it says, or one sentence that says what is wrong with it; and its writer.

The format is described in ``bilevel/bundle/format.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from bilevel.bundle.tensors import DTYPES, SYMBOLS, TensorSpec
from bilevel.contract import OPS
from bilevel.errors import BundleError
from bilevel.folders import file_sha256, sweep, write_json
from bilevel.sections import Section

FORMAT, FORMAT_VERSION = "bilevel-bundle", 1
MANIFEST = "bundle.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_FORMATS = ("fp32", "int8", "int4")
CALL_INPUTS = {"input_ids": "int64", "past_len": "int32", "new_len": "int32"}


@dataclass(frozen=True)
class FileRecord:
    """What bundle.json says of one file."""

    sha256: str
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Of a file as it is."""
        return cls(file_sha256(path), path.stat().st_size)

    def as_dict(self) -> dict[str, Any]:
        """As bundle.json lists it."""
        return {"sha256": self.sha256, "bytes": self.num_bytes}


@dataclass(frozen=True, kw_only=True)
class RouteOutputs:
    """Names of the outputs that tell what the routers chose; blocks: ``blocks.{layer}`` of every routed layer, experts: by
    layer."""

    candidates: str | None
    blocks: tuple[str, ...]
    experts: Mapping[int, str]

    @property
    def layers(self) -> tuple[int, ...]:
        """The routed layers, in the order of ``blocks``."""
        return tuple(int(name.rpartition(".")[2]) for name in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head's ONNX file, and the decoder's output that enters it."""

    file: str
    hidden: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file of a bundle; state pairs each cache's input with the name of its output. head: None where it has none."""

    file: str
    operators: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[TensorSpec, str], ...]
    vocab_size: int
    routes: RouteOutputs | None
    head: Head | None = None


def remedy(folder: Path) -> str:
    """What to do about a damaged bundle."""
    return f"make the bundle anew: bilevel export CHECKPOINT {folder} --force"


def open_manifest(folder: Path) -> Section:
    """bundle.json of this format, whose errors name the folder and the remedy. Raises BundleError."""

    def fail(problem: str) -> BundleError:
        return BundleError(f"{folder}: {problem}; {remedy(folder)}")

    sweep(folder.parent, folder.name)
    try:
        manifest = Section.read(folder / MANIFEST, fail)
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file() or any((folder / name).is_file() for name in _WEIGHTS):
            what = "a checkpoint" if folder.is_dir() else "a file"
            raise BundleError(f"{folder} is {what}, not a bundle; make one of it: bilevel export {folder} BUNDLE") from None
        raise BundleError(
            f"{folder} is not a bundle (it has no {MANIFEST}); make one: bilevel export CHECKPOINT {folder}"
        ) from None
    except OSError as error:
        raise BundleError(
            f"{folder / MANIFEST} cannot be read ({error.strerror}); check its permissions and its disk"
        ) from None
    name, version = manifest.get("format", str), manifest.get("format_version", int)
    if (name, version) != (FORMAT, FORMAT_VERSION):
        raise fail(f"it has format {name} version {version}, this bilevel reads {FORMAT} version {FORMAT_VERSION}")
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write bundle.json in one step; ``content``: all but its format. Raises OSError."""
    write_json(folder / MANIFEST, {"format": FORMAT, "format_version": FORMAT_VERSION, **content})


def read_weights(manifest: Section) -> dict[str, Any]:
    """How the weights are stored; a manifest that does not say has floats."""
    if "weights" not in manifest:
        return {"format": "fp32"}
    manifest.choice("weights.format", WEIGHT_FORMATS)
    for name, size in manifest.get("weights.kept_fp32", dict, default={}).items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise manifest.wrong(f"weights.kept_fp32.{name}", size, "a whole number")
    return dict(manifest.get("weights", dict))


def read_files(manifest: Section) -> dict[str, FileRecord]:
    """Every listed file; all lie in the folder."""
    files = {}
    for name, record in manifest.named("files").items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise manifest.fail(f"{MANIFEST} lists {name!r}, which lies outside the bundle")
        files[name] = FileRecord(record.get("sha256", str), record.number("bytes", 0))
    return files


def read_graph(graph: Section, operators: Section, files: Mapping[str, FileRecord]) -> Graph:
    """A graph, whose ONNX file must be listed."""
    name = graph.get("file", str)
    if name not in files:
        raise graph.fail(f"{MANIFEST} does not list {name} among its files")
    inputs, outputs = _tensors(graph, "inputs"), _tensors(graph, "outputs")
    return Graph(
        file=name,
        operators=_operators(operators),
        inputs=tuple(inputs.values()),
        outputs=tuple(outputs.values()),
        state=_state(graph, inputs, outputs),
        vocab_size=_vocab_size(graph, outputs),
        routes=_routes(graph.section("routes"), outputs) if "routes" in graph else None,
        head=_head(graph.section("head"), files) if "head" in graph else None,
    )


def _head(head: Section, files: Mapping[str, FileRecord]) -> Head:
    name = head.get("file", str)
    if name not in files:
        raise head.fail(f"{MANIFEST} does not list {name} among its files")
    return Head(file=name, hidden=head.get("hidden", str))


def _operators(operators: Section) -> dict[str, int]:
    """{operator: version}, all of this contract."""
    known = {op.name: op.version for op in OPS}
    for name, version in operators.values.items():
        if name not in known:
            raise operators.fail(f"it uses the operator {name}, which this bilevel does not know")
        if version != known[name]:
            raise operators.fail(f"it uses {name} version {version}, this bilevel has version {known[name]}")
    return dict(operators.values)


def _tensors(graph: Section, key: str) -> dict[str, TensorSpec]:
    """The tensors listed at ``key``, by name."""
    specs = {}
    for raw in graph.listed(key):
        spec = TensorSpec(raw.get("name", str), raw.choice("dtype", DTYPES), tuple(raw.get("shape", list)))
        for size in spec.shape:
            if size not in SYMBOLS and not (isinstance(size, int) and size > 0):
                raise graph.fail(f"{spec.name} has the unknown size {size!r} in its shape")
        specs[spec.name] = spec
    return specs


def _state(
    graph: Section, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> tuple[tuple[TensorSpec, str], ...]:
    """Caches: (input, name of the output); they and CALL_INPUTS are all inputs."""
    pairs = []
    for raw in graph.listed("state"):
        past, present = raw.get("input", str), raw.get("output", str)
        if past not in inputs or present not in outputs:
            raise graph.fail(f"the state {past} -> {present} is not among the graph's inputs and outputs")
        if (inputs[past].dtype, inputs[past].shape) != (outputs[present].dtype, outputs[present].shape):
            raise graph.fail(f"{past} and {present} differ in dtype or shape, so they cannot share a buffer")
        pairs.append((inputs[past], present))
    caches = {spec.name for spec, _ in pairs}
    others = {name: spec.dtype for name, spec in inputs.items() if name not in caches}
    if others != CALL_INPUTS:
        raise graph.fail(f"the graph's inputs besides its state are {others}, expected {CALL_INPUTS}")
    return tuple(pairs)


def _routes(routes: Section, outputs: Mapping[str, TensorSpec]) -> RouteOutputs:
    """The outputs that tell what the routers chose."""
    candidates, blocks = routes.get("candidates", str, NoneType), routes.get("blocks", list)
    experts = routes.get("experts", dict)
    names: list[Any] = [*blocks, *experts.values(), *([] if candidates is None else [candidates])]
    if not blocks or not all(isinstance(n, str) and n in outputs and outputs[n].dtype == "int32" for n in names):
        key = routes.prefix.removesuffix(".")
        raise routes.fail(f"{MANIFEST} gives {key} with outputs {names}, which are not all int32 outputs of the graph")
    if not all(name.rpartition(".")[2].isdecimal() for name in blocks):
        raise routes.wrong("blocks", blocks, "names that end in the number of a layer")
    if not all(layer.isdecimal() for layer in experts):
        raise routes.wrong("experts", list(experts), "numbers of layers")
    return RouteOutputs(
        candidates=candidates, blocks=tuple(blocks), experts={int(layer): name for layer, name in experts.items()}
    )


def _vocab_size(graph: Section, outputs: Mapping[str, TensorSpec]) -> int:
    """The width of the logits."""
    logits = outputs.get("logits")
    if logits is None or logits.dtype != "float32" or len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
        raise graph.fail("the graph must have an output logits of float32 [batch, vocab]")
    return logits.shape[1]
