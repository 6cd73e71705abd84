"""``bundle.json`` while it is being read: values of the right type, or one sentence that says what is wrong with it.

The format is described in ``bilevel/bundle/format.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bilevel.bundle.tensors import DTYPES, PRECISIONS, SYMBOLS, TensorSpec
from bilevel.contract import OPS
from bilevel.errors import BundleError

FORMAT, FORMAT_VERSION = "bilevel-bundle", 1
MANIFEST = "bundle.json"
WEIGHT_FORMATS = ("fp32", "int8", "int4")
CALL_INPUTS = {"input_ids": "int64", "past_len": "int32", "new_len": "int32"}


@dataclass(frozen=True)
class FileRecord:
    """What bundle.json says of one file."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class RouteOutputs:
    """Names of the outputs that tell what the routers chose; blocks: one per layer, experts: by layer."""

    candidates: str | None
    blocks: tuple[str, ...]
    experts: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file of a bundle; state pairs each cache's input with the name of its output."""

    file: str
    operators: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[TensorSpec, str], ...]
    vocab_size: int
    routes: RouteOutputs | None


def remedy(folder: Path) -> str:
    """What to do about a damaged bundle."""
    return f"make the bundle anew: bilevel export CHECKPOINT {folder} --force"


class Manifest:
    """bundle.json while it is being read; every error names the bundle and the remedy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{folder} is not a bundle (it has no bundle.json); make one: bilevel export CHECKPOINT {folder}"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self.error(f"bundle.json is not valid JSON ({error})") from None

    def error(self, problem: str) -> BundleError:
        """The problem as a sentence."""
        return BundleError(f"{self.folder}: {problem}; {remedy(self.folder)}")

    def get(self, key: str, kind: type | tuple[type, ...], at: object = None) -> Any:
        """The value at a dotted key below ``at`` (bundle.json itself if None), of the type asked for."""
        value: Any = self.raw if at is None else at
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise self.error(f"bundle.json does not give {key}")
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"bundle.json gives {key} as {type(value).__name__}, which is the wrong type")
        return value

    def positive(self, key: str) -> int:
        """The whole number at ``key``, at least 1."""
        value = self.get(key, int)
        if value < 1:
            raise self.error(f"bundle.json gives {key}={value}, which must be at least 1")
        return int(value)

    def check_format(self) -> None:
        """Refuse another format or version."""
        found, version = self.get("format", str), self.get("format_version", int)
        if (found, version) != (FORMAT, FORMAT_VERSION):
            raise self.error(f"it has format {found} version {version}, this bilevel reads {FORMAT} version {FORMAT_VERSION}")

    def graph(self, key: str, operators: Mapping[str, int], files: Mapping[str, FileRecord]) -> Graph:
        """The graph described at ``key``."""
        inputs, outputs = self.tensors(f"{key}.inputs"), self.tensors(f"{key}.outputs")
        return Graph(
            file=self.graph_file(key, files),
            operators=operators,
            inputs=tuple(inputs.values()),
            outputs=tuple(outputs.values()),
            state=self.state(key, inputs, outputs),
            vocab_size=self.vocab_size(outputs),
            routes=self.routes(key, outputs),
        )

    def precision(self) -> str:
        """The float type of weights, activations and caches."""
        if (found := self.get("precision", str)) not in PRECISIONS:
            raise self.error(f"its precision is {found}, this bilevel reads {', '.join(PRECISIONS)}")
        return str(found)

    def weights(self) -> dict[str, Any]:
        """How the weights are stored; a manifest that does not say has floats."""
        if "weights" not in self.raw:
            return {"format": "fp32"}
        if (found := self.get("weights.format", str)) not in WEIGHT_FORMATS:
            raise self.error(f"its weights have the format {found}, this bilevel reads {', '.join(WEIGHT_FORMATS)}")
        return dict(self.get("weights", dict))

    def files(self) -> dict[str, FileRecord]:
        """Every listed file; all lie in the folder."""
        files = {}
        for name, raw in self.get("files", dict).items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                raise self.error(f"bundle.json lists {name!r}, which lies outside the bundle")
            files[name] = FileRecord(self.get("sha256", str, raw), self.get("bytes", int, raw))
        return files

    def graph_file(self, key: str, files: Mapping[str, FileRecord]) -> str:
        """The ONNX file of the graph at ``key``, which must be listed."""
        name = self.get(f"{key}.file", str)
        for needed in (name, "tokenizer.json"):
            if needed not in files:
                raise self.error(f"bundle.json does not list {needed} among its files")
        return str(name)

    def operators(self, key: str) -> dict[str, int]:
        """{operator: version} at ``key``, all of this contract."""
        operators, known = self.get(key, dict), {op.name: op.version for op in OPS}
        for name, version in operators.items():
            if name not in known:
                raise self.error(f"it uses the operator {name}, which this bilevel does not know")
            if version != known[name]:
                raise self.error(f"it uses {name} version {version}, this bilevel has version {known[name]}")
        return dict(operators)

    def tensors(self, key: str) -> dict[str, TensorSpec]:
        """The tensors listed at ``key``, by name."""
        specs = {}
        for raw in self.get(key, list):
            spec = TensorSpec(self.get("name", str, raw), self.get("dtype", str, raw), tuple(self.get("shape", list, raw)))
            if spec.dtype not in DTYPES:
                raise self.error(f"{spec.name} has dtype {spec.dtype}, which this bilevel does not know")
            for size in spec.shape:
                if size not in SYMBOLS and not (isinstance(size, int) and size > 0):
                    raise self.error(f"{spec.name} has the unknown size {size!r} in its shape")
            specs[spec.name] = spec
        return specs

    def state(
        self, key: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> tuple[tuple[TensorSpec, str], ...]:
        """Caches of the graph at ``key``: (input, name of the output); they and CALL_INPUTS are all its inputs."""
        pairs = []
        for raw in self.get(f"{key}.state", list):
            past, present = self.get("input", str, raw), self.get("output", str, raw)
            if past not in inputs or present not in outputs:
                raise self.error(f"the state {past} -> {present} is not among the graph's inputs and outputs")
            if (inputs[past].dtype, inputs[past].shape) != (outputs[present].dtype, outputs[present].shape):
                raise self.error(f"{past} and {present} differ in dtype or shape, so they cannot share a buffer")
            pairs.append((inputs[past], present))
        others = {name: spec.dtype for name, spec in inputs.items()}
        for spec, _ in pairs:
            others.pop(spec.name, None)
        if others != CALL_INPUTS:
            raise self.error(f"the graph's inputs besides its state are {others}, expected {CALL_INPUTS}")
        return tuple(pairs)

    def routes(self, key: str, outputs: Mapping[str, TensorSpec]) -> RouteOutputs | None:
        """The outputs of the graph at ``key`` that tell what its routers chose; None where the bundle names none."""
        if "routes" not in self.get(key, dict):
            return None
        candidates = self.get(f"{key}.routes.candidates", (str, type(None)))
        blocks = self.get(f"{key}.routes.blocks", list)
        experts = self.get(f"{key}.routes.experts", dict)
        names = [*blocks, *experts.values(), *([] if candidates is None else [candidates])]
        if not blocks or not all(isinstance(n, str) and n in outputs and outputs[n].dtype == "int32" for n in names):
            raise self.error(
                f"bundle.json gives {key}.routes with outputs {names}, which are not all int32 outputs of the graph"
            )
        if not all(layer.isdecimal() for layer in experts):
            raise self.error(f"bundle.json gives {key}.routes.experts for {list(experts)}, which are not all numbers of layers")
        return RouteOutputs(
            candidates=candidates, blocks=tuple(blocks), experts={int(layer): name for layer, name in experts.items()}
        )

    def eos(self) -> tuple[int, ...]:
        """Ids that end a text."""
        ids = self.get("tokens.eos", list)
        if not all(isinstance(token, int) for token in ids):
            raise self.error(f"bundle.json gives tokens.eos={ids}, which must be a list of token ids")
        return tuple(ids)

    def vocab_size(self, outputs: Mapping[str, TensorSpec]) -> int:
        """The width of the logits."""
        logits = outputs.get("logits")
        if logits is None or logits.dtype != "float32" or len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
            raise self.error("the graph must have an output logits of float32 [batch, vocab]")
        return logits.shape[1]
