"""The bundle, format version 1: a folder that holds everything needed to run one exported model.

    bundle.json       this manifest
    config.json       the model's configuration in Hugging Face's format, with its "routing" and "experts" sections
    tokenizer.json    Hugging Face ``tokenizers``
    model.onnx        the graph; model.data its weights

``bundle.json`` is one JSON object:

    format, format_version    "bilevel-bundle" and 1; another version is refused
    created_by                {tool: version}
    precision                 float type of weights and caches, for example "float32"
    config                    the contents of config.json
    block_size                R; a cache's capacity is a multiple of it
    limits                    {"max_positions": tokens a row may hold, "prefill_chunk": most tokens of one call}
    tokens                    {"bos": id or null, "eos": [ids]}
    operators                 {operator: version}, those of ``bilevel.plugins.contract`` that the graph uses
    graph.file, graph.opset   the ONNX file and its opset
    graph.inputs, .outputs    [{"name", "dtype", "shape"}]; a size is a number or one of batch, new_tokens, capacity and
                              num_blocks (= capacity / block_size)
    graph.state               [{"input", "output"}]: caches, carried from one call to the next
    files                     {name: {"sha256", "bytes"}} of every other file in the folder
    checks                    verdicts that ``bilevel check`` appended

One call of the graph. Rows are right-padded. ``input_ids`` int64 [batch, new_tokens]; ``past_len`` int32 [batch], tokens
already in each row's caches; ``new_len`` int32 [batch], valid tokens of this call, 0 for an idle row. All new_tokens of every
row are written at past_len, so past_len + new_tokens <= capacity holds for idle rows too. ``logits`` float32 [batch, vocab]
belong to each row's last valid token. Caches start as zeros; a cache's input and output are bound to one buffer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bilevel.plugins.contract import BY_NAME
from bilevel.plugins.errors import BundleError
from bilevel.runtime.tensors import DTYPES, SYMBOLS, TensorSpec

FORMAT, FORMAT_VERSION = "bilevel-bundle", 1
CALL_INPUTS = {"input_ids": "int64", "past_len": "int32", "new_len": "int32"}


@dataclass(frozen=True)
class FileRecord:
    """What bundle.json says of one file."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's manifest, checked. Fields are those of bundle.json (see the module's docstring).

    state pairs each cache's input with the name of its output.
    """

    folder: Path
    created_by: Mapping[str, str]
    precision: str
    config: Mapping[str, Any]
    block_size: int
    max_positions: int
    prefill_chunk: int
    bos: int | None
    eos: tuple[int, ...]
    operators: Mapping[str, int]
    graph_file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[TensorSpec, str], ...]
    vocab_size: int
    files: Mapping[str, FileRecord]
    checks: tuple[Mapping[str, Any], ...]

    @property
    def graph_path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.graph_file

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.json"

    def round_up(self, tokens: int) -> int:
        """The smallest capacity that holds ``tokens``."""
        return max(1, math.ceil(tokens / self.block_size)) * self.block_size

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        """Values of the symbols that caches use."""
        return {"batch": batch, "capacity": capacity, "num_blocks": capacity // self.block_size}

    def state_bytes(self, batch: int, capacity: int) -> int:
        """Memory of all caches for ``batch`` rows of ``capacity`` tokens."""
        sizes = self.sizes(batch, capacity)
        return sum(math.prod(spec.resolve(sizes)) * DTYPES[spec.dtype].numpy.itemsize for spec, _ in self.state)

    @property
    def remedy(self) -> str:
        """What to do about a damaged bundle."""
        return _remedy(self.folder)

    def file_problem(self, name: str, verify: bool = True) -> str | None:
        """What is wrong with a listed file ("is missing", ...), or None; its contents are looked at if ``verify``."""
        path, record = self.folder / name, self.files[name]
        if not path.is_file():
            return "is missing"
        if not verify:
            return None
        if (found := path.stat().st_size) != record.num_bytes:
            return f"holds {found} bytes instead of {record.num_bytes}"
        return None if _sha256(path) == record.sha256 else "differs from the SHA-256 in bundle.json"


def read_manifest(path: str | Path) -> Bundle:
    """Read and check bundle.json alone, not the files that it lists. Raises BundleError."""
    manifest = _Manifest(Path(path))
    manifest.check_format()
    return manifest.parse()


def load_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Read and check a bundle folder; the format is described in this module's docstring.

    verify: compare every file's size and SHA-256 with the manifest (that the files exist is checked always).
    Raises BundleError naming what differs and the command that makes the bundle anew.
    """
    bundle = read_manifest(path)
    for name in bundle.files:
        if problem := bundle.file_problem(name, verify):
            raise BundleError(f"{bundle.folder}: {name} {problem}; {bundle.remedy}")
    return bundle


def _remedy(folder: Path) -> str:
    return f"make the bundle anew: bilevel export CHECKPOINT {folder} --force"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class _Manifest:
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
        return BundleError(f"{self.folder}: {problem}; {_remedy(self.folder)}")

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
        value = self.get(key, int)
        if value < 1:
            raise self.error(f"bundle.json gives {key}={value}, which must be at least 1")
        return int(value)

    def check_format(self) -> None:
        found, version = self.get("format", str), self.get("format_version", int)
        if (found, version) != (FORMAT, FORMAT_VERSION):
            raise self.error(f"it has format {found} version {version}, this bilevel reads {FORMAT} version {FORMAT_VERSION}")

    def parse(self) -> Bundle:
        inputs, outputs = self.tensors("graph.inputs"), self.tensors("graph.outputs")
        files = self.files()
        return Bundle(
            folder=self.folder,
            created_by=self.get("created_by", dict),
            precision=self.get("precision", str),
            config=self.get("config", dict),
            block_size=self.positive("block_size"),
            max_positions=self.positive("limits.max_positions"),
            prefill_chunk=self.positive("limits.prefill_chunk"),
            bos=self.get("tokens.bos", (int, type(None))),
            eos=self.eos(),
            operators=self.operators(),
            graph_file=self.graph_file(files),
            opset=self.positive("graph.opset"),
            inputs=tuple(inputs.values()),
            outputs=tuple(outputs.values()),
            state=self.state(inputs, outputs),
            vocab_size=self.vocab_size(outputs),
            files=files,
            checks=tuple(self.get("checks", list)),
        )

    def files(self) -> dict[str, FileRecord]:
        files = {}
        for name, raw in self.get("files", dict).items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                raise self.error(f"bundle.json lists {name!r}, which lies outside the bundle")
            files[name] = FileRecord(self.get("sha256", str, raw), self.get("bytes", int, raw))
        return files

    def graph_file(self, files: Mapping[str, FileRecord]) -> str:
        name = self.get("graph.file", str)
        for needed in (name, "tokenizer.json"):
            if needed not in files:
                raise self.error(f"bundle.json does not list {needed} among its files")
        return str(name)

    def operators(self) -> dict[str, int]:
        operators = self.get("operators", dict)
        for name, version in operators.items():
            if name not in BY_NAME:
                raise self.error(f"it uses the operator {name}, which this bilevel does not know")
            if version != BY_NAME[name].version:
                raise self.error(f"it uses {name} version {version}, this bilevel has version {BY_NAME[name].version}")
        return dict(operators)

    def tensors(self, key: str) -> dict[str, TensorSpec]:
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

    def state(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> tuple[tuple[TensorSpec, str], ...]:
        pairs = []
        for raw in self.get("graph.state", list):
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

    def eos(self) -> tuple[int, ...]:
        ids = self.get("tokens.eos", list)
        if not all(isinstance(token, int) for token in ids):
            raise self.error(f"bundle.json gives tokens.eos={ids}, which must be a list of token ids")
        return tuple(ids)

    def vocab_size(self, outputs: Mapping[str, TensorSpec]) -> int:
        logits = outputs.get("logits")
        if logits is None or logits.dtype != "float32" or len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
            raise self.error("the graph must have an output logits of float32 [batch, vocab]")
        return logits.shape[1]
